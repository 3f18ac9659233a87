#!/usr/bin/env python3
"""One window for every job: curves, ETA, best so far, alarms, true process state, GPUs. Made for SSH.

    python monitor.py                       all runs of ${LOG_DIR:-logs} (what launch.sh started)
    python monitor.py old_run/training.log  any log or run directory, of ours or of older runs (tqdm bars too)
    python monitor.py --once | --json       one look, for scripts (never imports textual)
    python monitor.py --readonly            no start, stop, resume

Reads files and /proc, never the jobs themselves: closing it, or its crash, can't harm a run.
"""

import argparse
import json
import os
import shutil
import sys
import time
from pathlib import Path

from snac48.cli import UserError, main_guard, read_flags
from snac48.tui.runs import Fleet, Limits
from snac48.tui.text import human_size, percent
from snac48.tui.ui import Ui
from snac48.tui.views import overview


def print_once(fleet: Fleet) -> None:
    width = shutil.get_terminal_size((120, 24)).columns
    for line in overview(fleet, Ui(), width, 10**6, everything=True):
        print("".join(t for t, _ in line).rstrip())
    gpus = [f"{g['index']} {percent(g['util_percent'])} {human_size(g['mem_used'])}" for g in fleet.gpus]
    m = fleet.machine
    machine = f"CPU {percent(m.cpu_percent)} · RAM {'/'.join(map(human_size, m.ram))} · disk free "
    print(f"{machine}{human_size(fleet.disk_free())} · GPU {', '.join(gpus) or 'N/A'}")


def main() -> int:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("files", nargs="*", help="log files or run directories to watch besides --log_dir")
    root = Path(__file__).resolve().parent  # launch.sh writes into its logs from wherever it is called
    logs = "logs" if Path("logs").is_dir() or not (root / "logs").is_dir() else root / "logs"
    log_dir = os.environ.get("LOG_DIR") or logs
    p.add_argument("--once", action="store_true", help="print the overview as text and leave")
    p.add_argument("--json", action="store_true", help="print everything as one JSON object and leave")
    p.add_argument("--readonly", action="store_true", help="forbid start, stop and resume")
    p.add_argument("--quiet", action="store_true", help="no bell when an alarm appears")
    for flag, default, text in (
        ("--log_dir", log_dir, "where launch.sh keeps NAME.{log,pid,json}"),
        ("--launcher", root / "launch.sh", "starts, stops, resumes"),
        ("--refresh_s", 1.0, "seconds between two looks at the files"),
        ("--stall_s", Limits.stall_s, "alarm: seconds without a new line"),
        ("--diverge", Limits.diverge, "alarm: loss over its lowest"),
        ("--disk_gb", Limits.disk_gb, "alarm: GB free where checkpoints go"),
    ):
        kind = float if isinstance(default, float) else Path
        p.add_argument(flag, type=kind, default=default, help=f"{text} (default: %(default)s)")
    a = read_flags(p)
    fleet = Fleet(a.log_dir, a.files, Limits(stall_s=a.stall_s, diverge=a.diverge, disk_gb=a.disk_gb))
    start = time.monotonic()
    fleet.poll()
    if not (a.once or a.json):
        if not sys.stdout.isatty():
            raise UserError("no terminal here; use --once or --json in scripts")
        try:
            from snac48.tui.app import Monitor
        except ImportError as e:
            raise UserError(f"{e}; pip install textual, or use --once") from None
        app = Monitor(fleet, Ui(readonly=a.readonly), a.launcher.resolve(), a.refresh_s, not a.quiet)
        app.run()
        return app.return_code or 0
    for run in fleet.runs.values():
        while run.load_older(events_only=True):
            pass
        run.judge(fleet.mono(), fleet.limits)
    time.sleep(max(0.0, 0.05 - (time.monotonic() - start)))  # CPU use is between two looks
    fleet.machine.sample(fleet.mono(), fleet.gpus)
    if a.json:
        json.dump(fleet.report(), sys.stdout, indent=2, allow_nan=False)
        print()
    else:
        print_once(fleet)
    return 0


if __name__ == "__main__":
    main_guard(main)
