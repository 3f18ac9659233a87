"""Fleets of fake runs, polled, and what they look like as text."""

import json
import math
import os
import shutil
import time
from pathlib import Path
from types import SimpleNamespace

import psutil

from helpers import fake_runs as fake
from snac48.tui import runs, system
from snac48.tui.parse import parse_line
from snac48.tui.runs import Fleet, Limits, Run
from snac48.tui.state import RunState, Series
from snac48.tui.ui import Ui
from snac48.tui.views import draw


def state_of(records) -> RunState:
    s = RunState()
    for r in records:
        s.feed(parse_line(json.dumps(fake.finite_json(r))))
    return s


def plain(lines) -> list[str]:
    return ["".join(t for t, _ in line) for line in lines]


def fleet_at(root: Path, proc=None, now=fake.NOW, mono=lambda: 1e6, nvml=None, **limits) -> Fleet:
    limits = Limits(**({"disk_gb": 0.0} | limits))
    nvml = nvml or fake.FakeNvml(broken=("nvmlInit",))
    return Fleet(root / "logs", (), limits, nvml, proc.folder if proc else "/proc", (lambda: now, mono))


def one(
    root: Path, records=(), pid=7, state="R", ticks=5000, log="", kind="train", **kwargs
) -> tuple[Fleet, Run]:
    """A fleet of one run in a /proc of our own, polled once."""
    proc = fake.FakeProc(root / "proc")
    if state:
        proc.add(pid, state, ticks)
    proc.folder.mkdir(parents=True, exist_ok=True)
    fake.add_run(root, f"{kind}_gpu0", kind, [0], pid, records=records, log=log)
    fleet = fleet_at(root, proc, **kwargs)
    fleet.poll()
    return fleet, fleet.runs[f"{kind}_gpu0"]


def alarms(run) -> str:
    return " | ".join(("!" if loud else "") + text for loud, text in run.alarms)


def run_text(fleet, width=120, height=40, **ui) -> str:
    return "\n".join(plain(draw(fleet, Ui(view="run", **ui), width, height)))


def steady_fleet(tmp_path, monkeypatch) -> Fleet:
    """A fleet whose every figure is fixed, for snapshots."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TZ", "UTC")
    time.tzset()
    proc = fake.fleet_of_every_kind(Path("."))
    proc.add(999, session=103)
    monkeypatch.setattr(system, "memory", lambda: (12 * 10**9, 64 * 10**9))
    monkeypatch.setattr(system, "traffic", lambda: None)
    monkeypatch.setattr(psutil, "cpu_percent", lambda: 37.5)
    monkeypatch.setattr(runs, "partitions", list)
    monkeypatch.setattr(runs, "mount_of", lambda p: "/mnt/data")
    monkeypatch.setattr(os, "cpu_count", lambda: 16)
    monkeypatch.setattr(os, "getloadavg", lambda: (3.2, 0, 0))
    usage = SimpleNamespace(used=6 * 10**11, free=4 * 10**11, total=10**12)
    monkeypatch.setattr(shutil, "disk_usage", lambda p: usage)
    nvml = fake.FakeNvml([(3, 999, 38 * 10**9), (2, 102, 10**9), (0, 777, 2 * 10**9)])
    fleet = fleet_at(Path("."), proc, nvml=nvml)
    fleet.poll()
    while fleet.load_older(1):
        pass
    fleet.poll()
    past(fleet)
    return fleet


def past(fleet: Fleet) -> None:
    """Five minutes of the machine, and the processes of its runs."""
    wave = lambda low, high, length: Series(
        [(10 * s, low + (high - low) * (0.5 + 0.5 * math.sin(s / length))) for s in range(300)]
    )
    m = fleet.machine
    m.history = {"cpu": wave(25, 60, 9), "ram": wave(17, 19, 40), "gpu memory": wave(40, 52, 60)}
    m.history |= {f"gpu{i}": wave(70, 80 + 5 * i, 5 + i) for i in range(4)}
    m.history |= {"read": wave(0, 800, 3), "write": wave(0, 90, 20)}
    m.rates = (640e6, 12e6)
    live = [r for r in fleet.listed() if r.status == "RUNNING"]
    fleet.usage = {r.name: system.Usage(r.pid, 1 + 3 * i, 95.0 + i, 10**9 * (i + 1), 20 + i, 1e6 * i, 3e5)
                   for i, r in enumerate(live)}  # fmt: skip
