"""tui/app.py: the window itself by Textual's Pilot; snapshots at 80x24 and 120x40.

Snapshots lie in tests/monitor_snapshots; UPDATE_SNAPSHOTS=1 rewrites them (look at the diff).
"""

import asyncio
import math
import os
import time
from pathlib import Path

import pytest
from helpers import fake_runs as fake
from helpers.fleet import fleet_at, steady_fleet

from snac48.tui.app import Monitor
from snac48.tui.ui import VIEWS, Ui

SNAPSHOTS = Path(__file__).parent / "monitor_snapshots"


@pytest.fixture
def steady(tmp_path, monkeypatch):
    return steady_fleet(tmp_path, monkeypatch)


def window(fleet, script, ui=None, size=(80, 24), launcher=Path("launch.sh"), refresh_s=1.0):
    """Run `script(app, pilot)` inside the app; returns the app."""

    async def go():
        app = Monitor(fleet, ui or Ui(), launcher, refresh_s)
        async with app.run_test(size=size) as pilot:
            await pilot.pause()
            await script(app, pilot)
        return app

    return asyncio.run(go())


def screen(app) -> list[str]:
    return [app.pane.render_line(y).text for y in range(app.pane.size.height)]


@pytest.mark.parametrize("size", [(80, 24), (120, 40)])
def test_snapshot_of_every_view(steady, size):
    async def script(app, pilot):
        for key, view in zip(("1", "2", "3", "4", "5", "question_mark"), VIEWS):
            await pilot.press(key)
            await pilot.pause()
            text = "\n".join(line.rstrip() for line in screen(app)) + "\n"
            assert len(screen(app)) == size[1] and all(len(x) == size[0] for x in screen(app))
            path = SNAPSHOTS / f"{view}_{size[0]}x{size[1]}.txt"
            if os.environ.get("UPDATE_SNAPSHOTS"):
                path.parent.mkdir(exist_ok=True)
                path.write_text(text, encoding="utf-8")
            assert text == path.read_text(encoding="utf-8"), f"{view}: UPDATE_SNAPSHOTS=1 rewrites {path}"

    window(steady, script, Ui(selected="train_gpu3"), size)


def test_keys(steady):
    async def script(app, pilot):
        ui = app.ui
        await pilot.press("home", "down", "down")
        assert ui.selected == "precompute_gpu1"
        await pilot.press("end", "up", "space", "2", "s", "l", "plus", "plus", "left", "f")
        assert ui.selected == "train_gpu2" and ui.marked == {"train_gpu2"} and ui.view == "run"
        assert (ui.smooth, ui.log, ui.zoom, ui.panel) == (3, True, 2, 1) and ui.back > 0
        await pilot.press("minus", "0", "3")
        assert (ui.zoom, ui.back, ui.view) == (0, 0, "overlay")
        assert "train_gpu2" in "\n".join(screen(app)) and "train_gpu1" not in "\n".join(screen(app)[3:])
        await pilot.press("question_mark", "down", "pagedown")
        assert "Help" in screen(app)[0]

    window(steady, script)


def test_a_metric_chosen_by_typing(steady):
    async def script(app, pilot):
        await pilot.press("m", *"vl4", "enter")
        await until(pilot, lambda: len(app.screen_stack) == 1)
        assert app.ui.metric == "val loss_48k" and screen(app)[2].startswith("val loss_48k")
        await pilot.press("m", *"los", "down", "enter")
        await until(pilot, lambda: len(app.screen_stack) == 1)
        assert app.ui.metric == "loss_48k"
        await pilot.press("m", *"xyz", "enter")  # nothing is called so
        assert len(app.screen_stack) == 2
        await pilot.press("escape")
        await until(pilot, lambda: len(app.screen_stack) == 1)
        assert app.ui.metric == "loss_48k"

    window(steady, script)


def test_mouse(steady):
    async def script(app, pilot):
        row = next(y for y, line in enumerate(screen(app)) if "rvq_gpu0" in line)
        await pilot.click(offset=(10, row))
        assert app.ui.selected == "rvq_gpu0"
        await pilot.click(offset=(15, 0))
        assert app.ui.view == "run"
        await pilot.click(offset=(50, 12))
        assert app.ui.panel == 2
        await pilot.click(offset=(5, 12))
        assert app.ui.panel == 0

    window(steady, script)


@pytest.mark.parametrize("size", [(20, 8), (40, 10), (79, 23), (300, 80), (10, 3)])
def test_any_size_of_terminal(steady, size):
    async def script(app, pilot):
        for view in VIEWS:
            for action in (view, "focus", "down"):
                app.action_do(action)
                await pilot.pause()
        await pilot.resize_terminal(80, 24)
        await pilot.pause()

    window(steady, script, size=size)


def test_no_runs_at_all(tmp_path):
    fleet = fleet_at(tmp_path)
    fleet.poll()

    async def script(app, pilot):
        await pilot.press("2", "3", "4", "up", "home", "space", "f", "x", "5", "1")
        assert "No runs in" in screen(app)[2]

    window(fleet, script)


def fake_launcher(tmp_path, code=0) -> Path:
    path = tmp_path / "launch.sh"
    path.write_text(f'#!/bin/sh\necho "$LOG_DIR $@" >> {tmp_path}/calls\necho "did $1"\nexit {code}\n')
    path.chmod(0o755)
    return path


async def until(pilot, condition):
    deadline = time.monotonic() + 10
    while not condition() and time.monotonic() < deadline:
        await pilot.pause(0.02)
    assert condition()


def test_stop_resume_and_start_ask_first(steady, tmp_path):
    launcher, calls = fake_launcher(tmp_path), tmp_path / "calls"

    async def script(app, pilot):
        await pilot.press("x")
        await pilot.pause()
        assert len(app.screen_stack) == 2
        await pilot.press("n")
        await pilot.pause()
        assert len(app.screen_stack) == 1 and not calls.exists()
        await pilot.press("x", "y")
        await until(pilot, lambda: "done: did stop" in screen(app)[-1])
        await pilot.press("r")
        assert "running already" in screen(app)[-1]
        await pilot.press("up", "up", "up", "r", "y")  # train_gpu0 is dead
        await until(pilot, lambda: "done: did resume" in screen(app)[-1])
        await pilot.press("n", *" --limit 5", "enter", "y")
        await until(pilot, lambda: "done: did train" in screen(app)[-1])

    window(steady, script, Ui(selected="train_gpu3"), launcher=launcher)
    logs = tmp_path / "logs"
    assert (
        calls.read_text() == f"{logs} stop train_gpu3\n{logs} resume train_gpu0\n{logs} train 0 --limit 5\n"
    )


def test_a_launcher_that_fails_is_told(steady, tmp_path):
    async def script(app, pilot):
        await pilot.press("x", "y")
        await until(pilot, lambda: "FAILED (exit 3)" in screen(app)[-1])

    window(steady, script, Ui(selected="train_gpu3"), launcher=fake_launcher(tmp_path, 3))


def test_readonly_forbids_all_three(steady, tmp_path):
    async def script(app, pilot):
        for key, action in (("x", "stop"), ("r", "resume"), ("n", "start")):
            await pilot.press(key)
            assert len(app.screen_stack) == 1 and f"--readonly: {action} is off" in screen(app)[-1]

    window(steady, script, Ui(readonly=True), launcher=fake_launcher(tmp_path))
    assert not (tmp_path / "calls").exists()


def test_the_log_view_of_the_app_does_not_yank(steady):
    async def script(app, pilot):
        await pilot.press("4", "pageup")
        before = screen(app)[3:-1]
        with open("logs/train_gpu3.log", "a") as f:
            f.write("".join(f"fresh {i}\n" for i in range(7)))
        await until(pilot, lambda: "7 new lines" in screen(app)[2])
        assert screen(app)[3:-1] == before
        await pilot.press("G")
        assert "fresh 6" in screen(app)[-2]

    window(steady, script, Ui(selected="train_gpu3"), refresh_s=0.05)


def test_new_lines_arrive_and_alarms_ring(steady, monkeypatch):
    rung = []

    async def script(app, pilot):
        monkeypatch.setattr(app, "bell", lambda: rung.append(1))
        await until(pilot, lambda: app.heard)
        rung.clear()
        with open("runs/train_gpu3/metrics.jsonl", "a") as f:
            f.write(fake.dump([fake.train_record(1485) | {"loss_48k": math.nan}]))
        await until(pilot, lambda: rung)
        assert "1485/3000" in "\n".join(screen(app)) and "train_gpu3: NaN loss" in "\n".join(screen(app))
        await pilot.pause(0.3)
        assert len(rung) == 1

    window(steady, script, Ui(selected="train_gpu3"), refresh_s=0.05)


def test_an_error_while_reading_keeps_the_window(steady, monkeypatch):
    async def script(app, pilot):
        monkeypatch.setattr(steady, "find", lambda: 1 / 0)
        await until(pilot, lambda: "reading failed: ZeroDivisionError" in screen(app)[-1])

    window(steady, script, refresh_s=0.05)


def test_sixteen_colours_and_no_colour(steady, monkeypatch):
    def colours(app):
        strips = [s for y in range(24) for s in app.pane.render_lines(app.pane.region.reset_offset)[y]]
        return {c.type.name for s in strips if s.style for c in (s.style.color, s.style.bgcolor) if c}

    async def script(app, pilot):
        for key in "12345":
            await pilot.press(key)
            found.update(colours(app))
            bold.extend(
                s.style.reverse for s in app.pane.render_lines(app.pane.region.reset_offset)[1] if s.style
            )

    found, bold = set(), []
    window(steady, script)
    assert found <= {"STANDARD", "DEFAULT"} and "STANDARD" in found
    found, bold = set(), []
    monkeypatch.setenv("NO_COLOR", "1")
    window(steady, script)
    assert found <= {"DEFAULT"} and any(bold)  # the alarm still stands out
