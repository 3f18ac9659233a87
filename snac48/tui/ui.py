"""Keys: what the person looking can choose. A new key is a line of KEYS and a branch of `act`."""

import re
from dataclasses import dataclass, field

from .panels import SMOOTH, panels_of
from .runs import Fleet, Run
from .tail import Pager

VIEWS = ("overview", "run", "overlay", "log", "system", "help")
# key names of Textual | action | what it does. Bindings, footer and help screen all come from this table.
KEYS = (
    ("1", "overview", "Overview: all runs, alarms, one run's numbers"),
    ("2,enter", "run", "Run: curves of the selected run"),
    ("3", "overlay", "Overlay: one curve of several runs"),
    ("4", "log", "Log of the selected run"),
    ("5", "system", "System: GPUs, CPU, memory, disks, processes"),
    ("question_mark", "help", "Help"),
    ("up,k", "up", "previous run; in a log: scroll up"),
    ("down,j", "down", "next run; in a log: scroll down"),
    ("pageup", "page_up", "a page up"),
    ("pagedown", "page_down", "a page down"),
    ("home,g", "top", "first run, beginning of the log"),
    ("end,G", "bottom", "last run, follow the end of the log"),
    ("space", "mark", "choose the run for the overlay (none: all)"),
    ("m", "metric", "choose the overlay's metric by typing"),
    ("f", "focus", "next panel large, then all panels"),
    ("s", "smooth", "smoothing: off, 2, 5, 15 % of the width"),
    ("l", "scale", "logarithmic y axis"),
    ("plus,equals_sign", "zoom_in", "zoom in on the latest half"),
    ("minus", "zoom_out", "zoom out"),
    ("0", "zoom_all", "whole run"),
    ("left", "left", "earlier; in a log: scroll left"),
    ("right", "right", "later; in a log: scroll right"),
    ("n", "start", "start a job (asks first)"),
    ("x", "stop", "stop the selected run (asks first)"),
    ("r", "resume", "resume the selected run (asks first)"),
    ("q,ctrl+c", "quit", "leave; the jobs go on"),
)
KEY_SIGN = {"question_mark": "?", "plus": "+", "equals_sign": "=", "minus": "-", "pageup": "PgUp",
            "pagedown": "PgDn", "up": "↑", "down": "↓", "left": "←", "right": "→",
            "ctrl+c": "^C"}  # fmt: skip
FOOTER = {
    "overview": "run mark overlay log start stop resume help quit",
    "run": "down focus smooth scale zoom_in zoom_out help quit",
    "overlay": "metric mark smooth scale zoom_in zoom_out help quit",
    "log": "up page_up top bottom left right help quit",
    "system": "down page_down overview help quit",
    "help": "down page_down overview quit",
}


def sign(keys: str) -> str:
    return " ".join(KEY_SIGN.get(k, k.capitalize() if len(k) > 1 else k) for k in keys.split(","))


@dataclass
class Ui:
    """What the person looking has chosen."""

    view: str = "overview"
    selected: str | None = None
    marked: set = field(default_factory=set)
    smooth: int = 2
    log: bool = False
    zoom: int = 0  # the visible part is 1 / 2**zoom of the run
    back: float = 0.0  # … and ends this share of the run before its end
    panel: int = 0  # 0: all panels; in help and system: lines scrolled
    metric: str = ""  # of the overlay; "": the first there is
    message: str = ""
    readonly: bool = False
    pager: Pager | None = None
    height: int = 20  # of the body, for pages
    zones: list = field(default_factory=list)  # (y, x0, x1, action, argument): what a click does


def chosen(fleet: Fleet, ui: Ui) -> Run | None:
    runs = fleet.listed()
    if ui.selected not in fleet.runs and runs:  # first look: what needs attention
        loud = [r for r in runs if any(a[0] for a in r.alarms)]
        ui.selected = (loud + [r for r in runs if r.status == "RUNNING"] + runs)[0].name
    return fleet.runs.get(ui.selected)


def free_device(fleet: Fleet) -> str:
    """The GPU with the most free memory, no run's before a run's; cpu where there is none."""
    busy = {i for r in fleet.runs.values() if r.gpu for i in r.gpu["index"]}
    free = lambda g: (g["index"] not in busy, (g["mem_total"] or 0) - (g["mem_used"] or 0), -g["index"])
    return str(max(fleet.gpus, key=free)["index"]) if fleet.gpus else "cpu"


def matching(query: str, names: list[str]) -> list[str]:
    """Names whose letters include those of `query` in order, the likeliest first: it begins the name, or is
    made of its words' first letters, or stands in it. `l48` finds loss_48k."""
    query = query.lower().replace(" ", "")

    def rank(name: str) -> tuple:
        words = re.findall(r"\d+|[a-z]+", name.lower())  # loss_48k: loss, 48, k
        plain, initials = "".join(words), "".join(w if w.isdigit() else w[0] for w in words)
        return (
            not plain.startswith(query),
            query not in initials,
            query not in plain,
            "loss" not in name,
            len(name),
        )

    return sorted((n for n in names if within(query, n.lower())), key=rank)


def within(query: str, text: str) -> bool:
    """Whether the letters of `query` come in `text` in this order."""
    letters = iter(text)
    return all(c in letters for c in query)


def act(fleet: Fleet, ui: Ui, action: str, arg=None) -> list[str] | None:
    """One key or click. Returns the launcher's arguments where a confirmation is wanted."""
    ui.message = ""
    run, names, pager = chosen(fleet, ui), [r.name for r in fleet.listed()], ui.pager
    page = ui.height - 2
    jump = {"up": -1, "down": 1, "page_up": -page, "page_down": page, "top": -(10**9), "bottom": 10**9}
    if action in VIEWS:
        ui.view, ui.panel = action, 0
    elif action == "select":
        ui.selected = arg
    elif ui.view == "log" and pager and action in ("top", "bottom"):
        pager.top, pager.counted = (0 if action == "top" else None), pager.size()
    elif ui.view == "log" and pager and action in jump:
        pager.scroll(jump[action], ui.height - 1)
    elif ui.view == "log" and pager and action in ("left", "right"):
        pager.column = max(0, pager.column + (20 if action == "right" else -20))
    elif action in jump and ui.view in ("help", "system"):
        ui.panel = max(0, ui.panel + jump[action])
    elif action in jump and names:
        ui.selected = names[min(max(0, names.index(run.name) + jump[action]), len(names) - 1)]
    elif action == "mark" and run:
        ui.marked ^= {run.name}
    elif action == "metric":
        ui.view, ui.metric = "overlay", arg or ui.metric
    elif action == "focus" and run:
        ui.panel = (0 if ui.panel else arg) if arg else (ui.panel + 1) % (len(panels_of(run)) + 1)
    elif action == "smooth":
        ui.smooth = (ui.smooth + 1) % len(SMOOTH)
    elif action == "scale":
        ui.log = not ui.log
    elif action in ("zoom_in", "zoom_out", "zoom_all"):
        ui.zoom = {"zoom_in": min(ui.zoom + 1, 12), "zoom_out": max(ui.zoom - 1, 0)}.get(action, 0)
    elif action in ("left", "right"):
        ui.back += (1 if action == "left" else -1) * 0.25 / 2**ui.zoom
    elif action in ("start", "stop", "resume"):
        if ui.readonly:
            ui.message = f"--readonly: {action} is off"
        elif action == "start":
            return ["train", free_device(fleet)]
        elif run is None or not run.folder:
            ui.message = f"{action}: select a run that launch.sh started"
        elif action == "resume" and run.shown_state == "FINISHED":
            ui.message = f"{run.name} has finished: there is nothing to resume; n starts another"
        elif (action == "stop") != (run.status == "RUNNING"):
            ui.message = f"{run.name} is {'not running' if action == 'stop' else 'running already'}"
        else:
            return [action, run.name]
    ui.back = min(max(0.0, ui.back), 1 - 0.5**ui.zoom)
    return None
