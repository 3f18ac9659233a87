"""The window: a Textual app. It repaints only the stretch of each line that changed: little goes over SSH."""

import asyncio
import os
import shlex
import signal
import subprocess
import threading
import time
from pathlib import Path

from rich.segment import Segment
from rich.style import Style
from textual.app import App
from textual.binding import Binding
from textual.containers import Vertical
from textual.geometry import Region
from textual.message import Message
from textual.screen import ModalScreen
from textual.strip import Strip
from textual.widget import Widget
from textual.widgets import Input, OptionList, Static

from .runs import Fleet
from .ui import KEYS, Ui, act, matching
from .views import draw, metrics_of, overlaid


class Polled(Message):
    """New data (posted by the thread that reads)."""


class Pane(Widget, can_focus=True):
    lines: list | tuple = ()

    def show(self, lines: list) -> None:
        old, self.lines = self.lines, lines
        for y, line in enumerate(lines):
            before = old[y] if y < len(old) else []
            if before != line:
                a, b = ("".join(t for t, _ in x) for x in (before, line))
                first = last = 0
                if [(len(t), s) for t, s in before] == [(len(t), s) for t, s in line]:
                    first = next(i for i, (p, q) in enumerate(zip(a, b)) if p != q)
                    last = next(i for i in range(len(b)) if a[-1 - i] != b[-1 - i])
                self.refresh(Region(first, y, len(b) - first - last, 1))

    def render_line(self, y: int) -> Strip:
        line = self.lines[y] if y < len(self.lines) else []
        strip = Strip([Segment(t, Style.parse(s)) for t, s in line])
        return strip.adjust_cell_length(self.size.width, Style.null())

    def on_click(self, event) -> None:
        for y, a, b, action, arg in self.app.ui.zones:
            if y == event.y and a <= event.x < b:
                self.app.action_do(action, arg)
                break

    def on_mouse_scroll_up(self) -> None:
        self.app.action_do("zoom_out" if self.app.ui.view in ("run", "overlay") else "up")

    def on_mouse_scroll_down(self) -> None:
        self.app.action_do("zoom_in" if self.app.ui.view in ("run", "overlay") else "down")

    def on_resize(self) -> None:
        self.app.paint()


class Ask(ModalScreen):
    """`edit`: a line to complete; else yes or no."""

    CSS = """Ask { align: center middle; }
    #box { width: 70; max-width: 95%; height: auto; border: heavy ansi_yellow; padding: 0 1; }
    #box Static { height: auto; } Input { border: none; height: 1; padding: 0; }"""
    BINDINGS = (Binding("y", "answer(True)"), Binding("n,escape", "answer(False)"))

    def __init__(self, question: str, edit: str | None = None):
        super().__init__()
        self.question, self.edit = question, edit

    def compose(self):
        with Vertical(id="box"):
            yield Static(self.question, markup=False)
            if self.edit is not None:
                yield Input(self.edit, select_on_focus=False)
            yes_no = "[@click=screen.answer(True)]y  yes[/]      [@click=screen.answer(False)]n  no[/]"
            yield Static(yes_no if self.edit is None else "Enter goes on · Esc leaves")

    def on_input_submitted(self, event) -> None:
        self.dismiss(event.value)

    def action_answer(self, yes: bool) -> None:
        self.dismiss(yes and self.edit is None)


class Pick(ModalScreen):
    """A list to choose from by typing some letters, by arrows or by mouse."""

    CSS = """Pick { align: center middle; }
    #box { width: 50; max-width: 95%; height: auto; border: heavy ansi_yellow; padding: 0 1; }
    #box Static { height: auto; } Input { border: none; height: 1; padding: 0; }
    OptionList { border: none; height: auto; max-height: 16; padding: 0; }"""
    BINDINGS = (
        Binding("up", "move('up')", priority=True), Binding("down", "move('down')", priority=True),
        Binding("escape", "leave"),
    )  # fmt: skip

    def __init__(self, title: str, names: list[str], now: str):
        super().__init__()
        self.names, self.found, self.heading, self.now = names, names, title, now

    def compose(self):
        with Vertical(id="box"):
            yield Static(self.heading, markup=False)
            yield Input(placeholder="type some of its letters")
            yield OptionList(*self.names, markup=False)
            yield Static("↑↓ Enter chooses · Esc leaves")

    def on_mount(self) -> None:
        self.query_one(Input).focus()
        self.query_one(OptionList).highlighted = self.names.index(self.now) if self.now in self.names else 0

    def on_input_changed(self, event) -> None:
        self.found = matching(event.value, self.names) if event.value else self.names
        options = self.query_one(OptionList)
        options.clear_options()
        options.add_options(self.found)
        options.highlighted = 0 if self.found else None

    def on_input_submitted(self) -> None:
        at = self.query_one(OptionList).highlighted
        if at is not None:
            self.dismiss(self.found[at])

    def on_option_list_option_selected(self, event) -> None:
        self.dismiss(self.found[event.option_index])

    def action_move(self, way: str) -> None:
        getattr(self.query_one(OptionList), f"action_cursor_{way}")()

    def action_leave(self) -> None:
        self.dismiss(None)


class Monitor(App):
    CSS = "Pane { width: 100%; height: 100%; }"
    ENABLE_COMMAND_PALETTE = False
    BINDINGS = tuple(
        Binding(k, f"do('{action}')", text, show=False, priority=k == "ctrl+c")
        for keys, action, text in KEYS
        for k in keys.split(",")
    )

    def __init__(self, fleet: Fleet, ui: Ui, launcher: Path, refresh_s: float = 1.0, bell: bool = True):
        super().__init__(ansi_color=True)  # the terminal's own 16 colours, none under NO_COLOR
        self.theme = "ansi-dark"
        self.fleet, self.ui, self.pane = fleet, ui, Pane()
        self.launcher, self.refresh_s, self.rings = launcher, refresh_s, bell
        self.stopping, self.heard = threading.Event(), set()

    def compose(self):
        yield self.pane

    def on_load(self) -> None:
        """Before the terminal is changed: whoever ends us, it shall be as it was."""
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGTERM, signal.SIGHUP, signal.SIGINT):
                loop = asyncio.get_running_loop()
                loop.add_signal_handler(number, lambda n=number: self.exit(return_code=128 + n))

    def on_mount(self) -> None:
        self.pane.focus()
        threading.Thread(target=self.watch, daemon=True).start()

    def on_unmount(self) -> None:
        self.stopping.set()

    def watch(self) -> None:
        """Thread: read everything once a second, history in between; widgets are only told."""
        while not self.stopping.is_set():
            start = time.monotonic()
            try:
                self.fleet.look_closer = self.ui.view == "system"
                self.fleet.poll()
                self.post_message(Polled())
                while self.fleet.load_older(0.05) and time.monotonic() - start < self.refresh_s:
                    self.stopping.wait(0.02)
            except Exception as e:  # a file in a shape nobody thought of: say so, keep the window
                self.ui.message = f"reading failed: {type(e).__name__}: {e}"
                self.post_message(Polled())
            self.stopping.wait(max(0.05, self.refresh_s - (time.monotonic() - start)))

    def on_polled(self) -> None:
        self.paint()
        with self.fleet.lock:
            loud = {(r.name, text.split()[0]) for r in self.fleet.listed() for yes, text in r.alarms if yes}
        if loud - self.heard and self.rings:
            self.bell()
        self.heard = loud

    def paint(self) -> None:
        width, height = self.pane.size
        if width >= 20 and height >= 8:
            with self.fleet.lock:
                self.pane.show(draw(self.fleet, self.ui, width, height))

    def action_do(self, action: str, arg=None) -> None:
        if action == "quit":
            self.exit()
            return
        if action == "metric" and not arg:
            self.pick_metric()
            return
        with self.fleet.lock:
            command = act(self.fleet, self.ui, action, arg)
        self.paint()
        if command and action == "start":
            question = "Start: precompute | cache | train | rvq, GPUs (0 or 0,1 or cpu), more flags"
            ask = Ask(question, " ".join(command))
            self.push_screen(ask, lambda text: text and self.confirm(shlex.split(text)))
        elif command:
            self.confirm(command)

    def pick_metric(self) -> None:
        with self.fleet.lock:
            names = metrics_of(overlaid(self.fleet, self.ui))
        if names:
            title, now = f"Metric of the overlay ({len(names)})", self.ui.metric or names[0]
            self.push_screen(Pick(title, names, now), lambda name: name and self.action_do("metric", name))

    def confirm(self, command: list[str]) -> None:
        def answer(yes) -> None:
            if yes:
                self.ui.message = f"running {self.launcher.name} {shlex.join(command)} …"
                self.paint()
                threading.Thread(target=self.launch, args=(command,), daemon=True).start()

        self.push_screen(Ask(f"Run this?\n\n  {self.launcher} {shlex.join(command)}\n"), answer)

    def launch(self, command: list[str]) -> None:
        try:
            env = {**os.environ, "LOG_DIR": str(self.fleet.log_dir.resolve())}
            how = {"cwd": self.launcher.parent, "stdin": subprocess.DEVNULL, "errors": "replace", "env": env}
            p = subprocess.run([self.launcher, *command], capture_output=True, **how)
            said = [x for x in (p.stderr + "\n" + p.stdout).splitlines() if x.strip()]
            end = "done" if p.returncode == 0 else f"FAILED (exit {p.returncode})"
            self.ui.message = f"{end}: {said[0] if said else shlex.join(command)}"
        except OSError as e:
            self.ui.message = f"{self.launcher} could not be run: {e.strerror}"
        self.post_message(Polled())
