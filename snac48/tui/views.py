"""Views: (fleet, ui, width, height) -> lines of (text, style); no terminal needed."""

import os
import re
import textwrap
import time
from itertools import zip_longest

from ..runlog import human_time
from .panels import COLOURS, SMOOTH, grid, layout, panels_of, visible
from .parse import ERROR, NOT_CURVES
from .plot import plot
from .runs import HISTORY_BYTES, Fleet, Run
from .state import Series
from .system import SPAN_S, TENTHS
from .tail import Pager
from .text import clean, duration, fit, gauge, human_size, percent, short
from .ui import FOOTER, KEYS, VIEWS, Ui, chosen, sign

STYLES = {
    "RUNNING": "green",
    "PAUSED": "yellow",
    "FINISHED": "cyan",
    "DEAD": "bold red",
    "STALE_PID": "bold red",
    None: "dim",
}
LOUD = "bold red reverse"


def gpu_text(fleet: Fleet, run: Run) -> str:
    """`3 81% 40.1G`: index, use, memory of this run; `*`: of the whole GPU (no process of the run seen)."""
    ids = run.gpu["index"] if run.gpu else [int(x) for x in re.findall(r"\d+", str(run.info.get("gpus", "")))]
    if not ids:
        return "cpu" if "cpu" in str(run.info.get("gpus", "")) else "–"
    mine = [g for g in fleet.gpus if g["index"] in ids]
    name = ",".join(map(str, sorted(set(ids))))
    if not mine or run.status != "RUNNING":
        return name if run.status != "RUNNING" else f"{name} N/A"
    utils = [g["util_percent"] for g in mine if g["util_percent"] is not None]
    used = [g["mem_used"] for g in mine if g["mem_used"] is not None]
    mem = run.gpu["mem"] if run.gpu and run.gpu["mem"] else None
    mem_text = human_size(mem) if mem else (human_size(sum(used)) + "*" if used else "N/A")
    return f"{name} {percent(sum(utils) / len(utils) if utils else None)} {mem_text}"


def best_text(run: Run) -> str:
    best = run.state.best()
    return f"{short(best[run.state.judged])}@{short(best['epoch'])}" if best else "–"


def done(run: Run) -> str:
    total, step = run.state.latest.get("total_steps"), run.state.step
    return f"{100 * step / total:.0f}%" if total and step is not None else "–"


def newest(run: Run, key: str) -> float | None:
    """The value of the newest step line: one of an older step would stand beside values of another age."""
    return None if key in run.state.older else run.state.latest.get(key)


COLUMNS = (  # of the overview: title, width, importance (0 = always), text(fleet, run, its row of --json)
    ("run", 0, 0, lambda f, r, j: r.name),
    ("state", 9, 0, lambda f, r, j: r.state_word),
    ("phase", 8, 8, lambda f, r, j: j["phase"] or "–"),
    ("epoch", 6, 1, lambda f, r, j: done(r) if j["epoch"] is None else f"{j['epoch']}/{short(j['epochs'])}"),
    ("step", 13, 7, lambda f, r, j: f"{short(j['step'])}/{short(r.state.latest.get('total_steps'))}"),
    ("done", 4, 5, lambda f, r, j: done(r)),
    ("loss", 6, 3, lambda f, r, j: short(j["loss"])),
    ("24k", 6, 4, lambda f, r, j: short(j["loss_24k"])),
    ("48k", 6, 3, lambda f, r, j: short(j["loss_48k"])),
    ("val", 6, 6, lambda f, r, j: short((r.state.vals or [{}])[-1].get(r.state.judged))),
    ("best@ep", 10, 2, lambda f, r, j: best_text(r)),
    ("lr", 7, 7, lambda f, r, j: short(j["lr"])),
    ("audio s/s", 9, 6, lambda f, r, j: short(newest(r, "audio_s_per_s"))),
    ("ETA", 8, 1, lambda f, r, j: duration(j["eta_s"])),
    ("GPU", 12, 5, lambda f, r, j: gpu_text(f, r)),
)


def overview(fleet: Fleet, ui: Ui, width: int, height: int, everything: bool = False) -> list:
    runs, now = fleet.listed(), chosen(fleet, ui)
    if not runs:
        how = "Start one: ./launch.sh train 0    (or press n)"
        other = "Or name a log: python monitor.py path/to/training.log"
        return [[(f"No runs in {fleet.log_dir} yet.", "bold")], [(how, "")], [(other, "")]]
    table = [list(c) for c in COLUMNS]
    table[0][1] = min(max(len(r.name) for r in runs), 20 if width < 110 else 28)
    while sum(c[1] + 1 for c in table) + 3 > width and any(c[2] for c in table):
        table.remove(max(table, key=lambda c: c[2]))

    def cells(texts):
        return [f"{t[: c[1]]:{'<' if i < 2 else '>'}{c[1]}}" for i, (t, c) in enumerate(zip(texts, table))]

    lines = [[("   " + " ".join(cells(c[0] for c in table)), "bold underline")]]
    alarms = [(r, loud, text) for r in runs for loud, text in r.alarms]
    room = len(runs) if everything else max(3, height - 8 - min(len(alarms), max(3, height // 4)))
    first = max(0, min(runs.index(now) - room // 2, len(runs) - room))
    for r in runs[first : first + room]:
        j, loud = r.row(), any(a[0] for a in r.alarms)
        back = " reverse" if r is now and not everything else ""
        line = [("!! " if loud else "*  " if r.name in ui.marked else "   ", "bold red" + back)]
        for i, text in enumerate(cells(c[3](fleet, r, j) for c in table)):
            style = STYLES[j["state"]] if i == 1 else "bold red" * (text.strip() in ("NaN", "Inf"))
            line += [(text + " ", style + back)]
        ui.zones.append((len(lines), 0, width, "select", r.name))
        lines.append(line)
    if len(runs) > room:
        lines.append([(f"   … {len(runs)} runs, ↑↓ for the others", "dim")])
    if not everything:
        lines += [[], *details(fleet, now, width)]
    for r, loud, text in alarms:
        whole = f"{r.name}: {text}"
        for i, part in enumerate([whole] if everything else textwrap.wrap(whole, width - 4)[:2]):
            ui.zones.append((len(lines), 0, width, "select", r.name))
            lines.append(alarm_line(loud, part, i > 0))
    if height - len(lines) > 8 and not everything:
        lines += [[], *grid(now, ui, width, height - len(lines) - 1, len(lines) + 1, panels_of(now)[:2])]
    return lines


def alarm_line(loud: bool, text: str, goes_on: bool = False) -> list:
    return [("   " if goes_on else "!! " if loud else " · ", "bold red"), (text, "red" if loud else "")]


def details(fleet: Fleet, run: Run, width: int) -> list:
    """Four lines: everything known about one run."""
    s, j, latest = run.state, run.row(), run.state.latest
    val, best = s.vals[-1] if s.vals else {}, s.best()
    head = f"── {run.name} ── {run.kind or 'log'} {clean(s.raw.get('recipe') or '')[:24]}".rstrip() + " "
    segment = f" · segment {short(j['segment_length'])} s" if j["segment_length"] else ""
    first = (
        f"epoch {short(j['epoch'])}/{short(j['epochs'])} · step {short(j['step'])}/"
        f"{short(latest.get('total_steps'))} ({done(run)}) · {j['phase'] or '–'}{segment}"
        f" · ETA {duration(j['eta_s'])}"
    )
    names = {"loss": "loss", "loss_24k": "24k", "loss_48k": "48k", "ppl": "ppl", "bits_per_s": "bits/s"}
    names |= {"lr": "lr", "audio_s_per_s": "audio s/s", "skipped": "skipped"}
    older = {k: f" (step {step})" for k, step in s.older.items()}
    second = " · ".join(
        f"{text} {short(latest[k])}{older.get(k, '')}" for k, text in names.items() if k in latest
    )
    third = [f"GPU {gpu_text(fleet, run)}"] + [f"{s.skips} steps skipped"] * bool(s.skips)
    if best:
        at = f"at epoch {short(best['epoch'])}" + f" step {best['step']}" * (width >= 100)
        third.insert(0, f"best val {names[s.judged]} {short(best[s.judged])} {at}")
    if heads := [f"{names[k]} {short(val[k])}" for k in ("loss_24k", "loss_48k") if k in val]:
        third.insert(0, f"val@{short(val['epoch'])} {' '.join(heads)}")
    state = [(run.state_word, STYLES[j["state"]]), (f" pid {short(j['pid'])}", "")]
    texts = (first, second or clean(run.last_line or "no line yet"), " · ".join(third))
    return [[(head, "bold"), *state, (" " + "─" * width, "dim")], *([(text, "")] for text in texts)]


def run_view(fleet: Fleet, ui: Ui, width: int, height: int) -> list:
    run = chosen(fleet, ui)
    if run is None:
        return [[("No run selected.", "")]]
    s, tail, specs = run.state, run.source, panels_of(run)
    lines = details(fleet, run, width)
    alarms = [alarm_line(*alarm) for alarm in run.alarms[:2]]
    height -= len(lines) + 1 + len(alarms)
    across, down = layout(len(specs), width, height)
    hidden = 0 if ui.panel else len(specs) - across * down
    specs = [specs[(ui.panel - 1) % len(specs)]] if ui.panel else specs
    notes = [f"smooth {SMOOTH[ui.smooth]:.0%}" if ui.smooth else "not smoothed"]
    notes += ["log y"] * ui.log + [f"zoom {2**ui.zoom}x"] * (ui.zoom > 0)
    notes += [f"f: {hidden} more"] * (hidden > 0) + [f"× {len(s.bad)} not finite"] * (len(s.bad) > 0)
    if tail and tail.before:
        notes.append(f"reading {100 * (run.at - run.cut) // max(1, tail.pos - run.cut)}%")
    elif run.cut:
        notes.append(f"latest {human_size(HISTORY_BYTES)} only")
    lines.append([("★ best  • validation  ┊ new phase or segment  ", "dim"), (" · ".join(notes), "cyan")])
    lines += alarms
    return lines + grid(run, ui, width, height, len(lines), specs)


def metrics_of(runs: list[Run]) -> list[str]:
    """What the overlay can draw: curves, and `val NAME` of validations; losses first."""
    known = {k for r in runs for k, c in r.state.series.items() if c.xs}
    known |= {f"val {k}" for r in runs for v in r.state.vals for k in v if k not in NOT_CURVES}
    order = ["loss_48k", "loss_24k", "loss", "val loss_48k", "val loss_24k"]
    return [m for m in order if m in known] + sorted(known - set(order))


def overlaid(fleet: Fleet, ui: Ui) -> list[Run]:
    return [r for r in fleet.listed() if r.name in ui.marked] or fleet.listed()


def overlay(fleet: Fleet, ui: Ui, width: int, height: int) -> list:
    runs = overlaid(fleet, ui)
    metrics = metrics_of(runs)
    if not metrics:
        return [[("Nothing to draw yet: no run has numbers. Choose runs with space in the overview.", "")]]
    metric = ui.metric if ui.metric in metrics else metrics[0]
    curves, legend = [], []
    for run in runs:
        name, val = metric.removeprefix("val "), metric.startswith("val ")
        c = run.state.val_series(name) if val else run.state.series.get(name, Series())
        if c.xs:
            style, letter = COLOURS[len(curves) % len(COLOURS)], chr(ord("a") + len(curves) % 26)
            curves.append((c, style, val, letter))
            low = min(range(len(c.ys)), key=c.ys.__getitem__)
            text = f"now {short(c.ys[-1])}  lowest {short(c.ys[low])} at step {c.xs[low]}"
            legend.append([(letter, style + " bold reverse"), (f" {run.name:<20.20} ", style), (text, "")])
    shown = legend[: max(1, height // 3)]
    if len(legend) > len(shown):
        shown[-1] = [(f"  … {len(legend) - len(shown) + 1} more; choose with space in the overview", "dim")]
    note = f"  {metrics.index(metric) + 1} of {len(metrics)} metrics, m: choose"
    ui.zones.append((0, 0, width, "metric", None))
    more = "  log y" * ui.log + f"  smooth {SMOOTH[ui.smooth]:.0%}" * (ui.smooth > 0)
    title = [(metric, "bold"), (note, "dim"), (more + f"  zoom {2**ui.zoom}x" * (ui.zoom > 0), "cyan")]
    first, last = min((c[0].xs[0] for c in curves), default=0), max((c[0].xs[-1] for c in curves), default=1)
    drawn = plot(curves, width, height - 1 - len(shown), visible(ui, first, last), ui.log, SMOOTH[ui.smooth])
    return [title, *drawn, *shown]


def log_view(fleet: Fleet, ui: Ui, width: int, height: int) -> list:
    run = chosen(fleet, ui)
    path = run and (run.log if run.log and run.log.exists() else run.source and run.source.path)
    if not path:
        return [[("This run has no log.", "")]]
    if ui.pager is None or ui.pager.path != path:
        ui.pager = Pager(path)
    pager, lines = ui.pager, ui.pager.page(height - 1)
    c = pager.column
    share = 100 * (pager.top or 0) // max(1, pager.size())
    where = [(" following the end ", "green")] if pager.top is None else [(f" {share}% ", "")]
    if pager.top is not None and pager.new:
        where += [(f" {pager.new} new line{'s' * (pager.new != 1)} below, G or End follows ", LOUD)]
        ui.zones.append((0, 0, width, "bottom", None))
    head = [(f"{path}  {human_size(pager.size())} ", "bold"), *where, (f" column {c}" if c else "", "dim")]
    if sum(len(t) for t, _ in head) > width:  # the news matter more than the folder
        head[0] = (f"…/{path.name} ", "bold")
    body = []
    for text in lines:
        style = "bold red" if ERROR.search(text) else ("yellow" if re.search("warn|NaN|nan", text) else "")
        body.append([(text[c : c + width - 1] + ("›" if len(text) > c + width - 1 else ""), style)])
    return [head, *body]


def system(fleet: Fleet, ui: Ui, width: int, height: int) -> list:
    """Curves of the last minutes above; GPUs, processes and disks below, scrolled where they don't fit."""
    below = [*gpu_lines(fleet, width), *process_lines(fleet, width), *disk_lines(fleet, width)]
    above = max(height - len(below) - 1, min(10, height // 2))
    lines = histories(fleet, width, above) if above >= 5 else []
    lines += [[]] * (height > above + len(below))
    room = height - len(lines)
    ui.panel = max(0, min(ui.panel, len(below) - room))
    shown = below[ui.panel : ui.panel + room]
    if hidden := len(below) - ui.panel - room if len(below) > ui.panel + room else 0:
        shown[-1] = [(f"… {hidden + 1} more lines, ↓", "dim")]
    return [*lines, *shown]


def histories(fleet: Fleet, width: int, height: int) -> list:
    """CPU, memory, GPUs and disks, two by two (below one another where narrow)."""
    m, h = fleet.machine, fleet.machine.history
    (used, total), rates = m.ram, m.rates or (None, None)
    gpu = " ".join(f"{g['index']}: {percent(g['util_percent'])}" for g in fleet.gpus)
    gpus = [(f"gpu{g['index']}", COLOURS[i % 7], str(g["index"])[-1]) for i, g in enumerate(fleet.gpus)]
    gpu_memory = f" · GPUs {percent(h['gpu memory'].ys[-1])}" if "gpu memory" in h else ""
    top = max([1.0, *(y for k in ("read", "write") if k in h for y in h[k].ys[-SPAN_S:])])
    specs = [  # title, what it says now, curves, y range
        ("CPU", f"{percent(m.cpu_percent)} of {os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}",
         [("cpu", "cyan", "")], (0, 100)),
        ("GPU", gpu or f"N/A ({fleet.sampler.error or 'none found'})", gpus, (0, 100)),
        ("Memory", f"{human_size(used)} of {human_size(total)}{gpu_memory}",
         [("ram", "cyan", ""), ("gpu memory", "magenta", "g")], (0, 100)),
        ("Disks", f"read {human_size(rates[0])}/s, write {human_size(rates[1])}/s",
         [("read", "cyan", "r"), ("write", "yellow", "w")], (0, top)),
    ]  # fmt: skip
    across = 2 if width >= 70 else 1
    down = max(1, min(len(specs) // across, height // 5))
    w, lines = width // across - (across > 1), []
    for d in range(down):
        rows = height // down + (d < height % down)
        blocks = [history(h, m.now, w, rows, *spec) for spec in specs[d * across : (d + 1) * across]]
        lines += [[part for b in blocks for part in (*fit(b[y], w), (" ", ""))] for y in range(rows)]
    return lines


def history(curves: dict, now: int, width: int, height: int, title, text, keys, limits) -> list:
    """One of them. The axis moves on by whole columns: what is drawn stays as it is in between."""
    span = SPAN_S * TENTHS
    column = max(1, span // (2 * max(2, width - 8)))
    end = -(-now // column) * column
    found = [(curves[k], style, False, letter) for k, style, letter in keys if k in curves]
    ends = (f"{SPAN_S // 60} min ago", "now")
    drawn = plot(found, width, height - 1, (end - span, end), limits=limits, ends=ends)
    unit = " MB/s" if title == "Disks" else " %"
    head = [(title, "bold"), (unit, "dim"), (f"  {text}", "")]
    return [head, *(drawn if found else [[]] * (height - 1))]  # where there is nothing, the title says why


def gpu_lines(fleet: Fleet, width: int) -> list:
    lines, b = [], max(4, min(12, width // 12))
    for g in fleet.gpus:
        util, used, total = g["util_percent"], g["mem_used"], g["mem_total"]
        power = "N/A" if g["power_w"] is None else f"{g['power_w']:.0f} W"
        temp = "N/A" if g["temp_c"] is None else f"{g['temp_c']:.0f} °C"
        line = [(f"GPU {g['index']} ", "bold"), *gauge(None if util is None else util / 100, b)]
        line += [(f" {percent(util):>4}  mem ", ""), *gauge(used / total if used and total else None, b)]
        line += [(f" {human_size(used)}/{human_size(total)}  {power}  {temp}  ", "")]
        others = [p for p in g["processes"] if not p["run"]]
        names = {p["run"] for p in g["processes"] if p["run"]}
        line += [(" ".join(sorted(names)), "green")] + [(" ", "")] * bool(names)
        if others:
            line.append((f"{len(others)} other: {human_size(sum(p['mem'] or 0 for p in others))} ", "yellow"))
        lines.append([*line, (g["name"] or "N/A", "dim")])
    if fleet.gpus and fleet.sampler.error:
        lines.append([(f"NVML: {fleet.sampler.error}", "yellow")])
    return [*lines, []] if lines else []


def process_lines(fleet: Fleet, width: int) -> list:
    """A line for each live run: its processes together, loader workers folded in."""
    live = [r for r in fleet.listed() if r.status == "RUNNING"]
    if not live:
        return [[("No run of these is alive.", "dim")], []]
    columns = (("procs", 5), ("CPU", 6), ("memory", 7), ("GPU", 12), ("read/s", 7), ("write/s", 7),
               ("threads", 7), ("pid", 8))  # fmt: skip
    head = "".join(f" {title:>{w}}" for title, w in columns)
    lines = [[(f"{'run':<20}{head}", "bold underline")]]
    for r in live:
        u = fleet.usage.get(r.name)
        values = [u.count, percent(u.cpu_percent), human_size(u.memory)] if u else ["–"] * 3
        values.append(gpu_text(fleet, r))
        values += [human_size(u.read), human_size(u.write), u.threads] if u else ["–"] * 3
        cells = "".join(f" {x:>{w}}" for x, (_, w) in zip([*values, r.pid], columns))
        lines.append([(f"{r.name:<20.20}", STYLES[r.shown_state]), (cells, "")])
    return [*lines, []]


def disk_lines(fleet: Fleet, width: int) -> list:
    lines, b = [], max(4, min(12, width // 12))
    for mount, disk, names in fleet.disks:
        share = disk.used / max(1, disk.used + disk.free)
        text = f" {percent(100 * share):>4}  {human_size(disk.free)} free of {human_size(disk.total)}  "
        lines.append(
            [
                ("Disk  ", "bold"),
                *gauge(share, b),
                (text, ""),
                (f"{mount}  ", "bold"),
                (" ".join(names), "dim"),
            ]
        )
    return lines


def help_view(fleet: Fleet, ui: Ui, width: int, height: int) -> list:
    limits = fleet.limits
    keys = [[(f" {sign(k):<9}", "bold cyan"), (text, "")] for k, _, text in KEYS]
    notes = [
        "ALARMS",
        "DEAD       process gone without an end; the reason beside it",
        "STALE_PID  the PID now belongs to another process",
        "PAUSED     SIGSTOP holds it (no alarm); kill -CONT goes on",
        "NaN        a loss that is not finite in the last 50 lines",
        "SKIP       steps the trainer skipped in the last 50",
        f"DIVERGING  median of 20 losses over {limits.diverge:g}x its lowest",
        f"DISC WINS  median of 20 disc_* under {limits.disc_wins:g}",
        f"STALL      no new line for {human_time(limits.stall_s)} and 20 usual gaps",
        f"DISK       under {limits.disk_gb:g} GB free where the checkpoints go",
        "",
        "24k 48k    loss of each head",
        "val        validation loss: of 48k, else of loss",
        "best@ep    the lowest of these @ its epoch",
        "audio s/s  seconds of audio trained on per second",
        "GPU        index, use, memory of the run (*: of the GPU)",
        "0 1 2 …    codebooks, at the ends of their curves",
        "Mouse: click a tab, a run, a panel, a key; wheel scrolls.",
    ] + ["", "--readonly: start, stop and resume are off."] * ui.readonly
    texts = [[(n, "bold" if n == "ALARMS" else "")] for n in notes]
    if width >= 116:
        lines = [[*fit(k, 58), (" ", ""), *t] for k, t in zip_longest(keys, texts, fillvalue=[])]
    else:
        lines = [*keys, [], *texts]
    ui.panel = max(0, min(ui.panel, len(lines) - height))
    return lines[ui.panel : ui.panel + height]


BODY = dict(zip(VIEWS, (overview, run_view, overlay, log_view, system, help_view)))


def draw(fleet: Fleet, ui: Ui, width: int, height: int) -> list:
    """The whole screen: tabs, alarm bar, body, keys. `ui.zones` gets what a click on each place does."""
    ui.zones, ui.height = [], height - 3
    body = BODY[ui.view](fleet, ui, width, ui.height)
    zones = [(y + 2, a, b, action, arg) for y, a, b, action, arg in ui.zones]
    tabs, x = [], 0
    for i, name in enumerate(VIEWS):
        text = f" {i + 1 if name != 'help' else '?'} {name.capitalize()} "
        tabs.append((text, "bold reverse" if name == ui.view else ""))
        zones.append((0, x, x + len(text), name, None))
        x += len(text)
    clock = time.strftime("%H:%M:%S", time.localtime(fleet.now()))
    if width - x > len(clock) + 1:
        tabs += [(" " * (width - x - len(clock) - 1), ""), (clock, "dim")]
    if loud := [(r, text) for r in fleet.listed() for is_loud, text in r.alarms if is_loud]:
        run, text = loud[0]
        count = f" !! {len(loud)} alarm{'s' * (len(loud) > 1)} "
        alarm = [(count, LOUD), (f" {run.name}: {text}", "bold red")]
        zones.append((1, 0, width, "select", run.name))
    else:
        states = [r.shown_state for r in fleet.runs.values()]
        paused = f", {states.count('PAUSED')} paused" * ("PAUSED" in states)
        alarm = [(" no alarms ", "green"), (f" {states.count('RUNNING')} running{paused}", "")]
    footer, x = [], 0
    for action in FOOTER[ui.view].split():
        if not (ui.readonly and action in ("start", "stop", "resume")):
            key = sign(next(k for k, a, _ in KEYS if a == action)).split()[0]
            footer += [(f" {key}", "bold cyan"), (f" {action.replace('_', ' ')} ", "")]
            zones.append((height - 1, x, x + len(key) + len(action) + 3, action, None))
            x += len(key) + len(action) + 3
    if ui.message:
        footer = [(f" {clean(ui.message)} ", "bold yellow reverse")]
    ui.zones = zones
    body = [*body[: ui.height], *[[]] * (ui.height - len(body))]
    return [fit(line, width) for line in (tabs, alarm, *body, footer)]
