#!/usr/bin/env python3
"""One window for every job: curves, ETA, best so far, alarms, true process state, GPUs. Made for SSH.

    python monitor.py                       all runs of ${LOG_DIR:-logs} (what launch.sh started)
    python monitor.py old_run/training.log  any log or run directory, of ours or of older runs (tqdm bars too)
    python monitor.py --once | --json       one look, for scripts (never imports textual)
    python monitor.py --readonly            no start, stop, resume
    python monitor.py --export pictures     a picture (SVG) and a text of every view, no terminal needed

Reads files and /proc, never the jobs themselves: closing it, or its crash, can't harm a run.
"""

from __future__ import annotations

import argparse
import html
import json
import math
import os
import re
import shlex
import shutil
import subprocess
import sys
import textwrap
import threading
import time
from array import array
from bisect import bisect_left, bisect_right
from collections import deque
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path

from runlog import UserError, finite_json, human_time, main_guard

TAIL_BYTES = 1 << 18  # read before the first paint; what lies before comes in afterwards, backwards
CHUNK = 1 << 19  # bytes of history read in one go
HISTORY_BYTES = 1 << 28  # older metrics than this are left unread (1 M lines)
HISTORY_LOG_BYTES = 1 << 26  # the same for logs without metrics (1 M lines)
POINTS = 1 << 18  # points kept per curve; beyond, groups of 8 keep their lowest and highest
LONGEST = 1 << 20  # a longer line is skipped

# ---- parser ----

STEP_LINE = re.compile(r"(?:^|\s)step (\d+)/(\d+) epoch (\d+)/(\d+) (\S+) ?(.*)")
BAR = re.compile(r"\d+%\|[^|]*\|\s*(\d+)/(\d+) \[(?:([\d:]+)<([\d:]+))?(.*)")
EPOCH = re.compile(r"[Ee]poch[ :]+(\d+)(?:/(\d+))?")
SUMMARY = re.compile(r"[Ee]poch (\d+)(?:/(\d+))? \[(Train|Val)\]:?(.*)")
PAIR = re.compile(r"([A-Za-z0-9_/]+)[=:]\s*([-+\w.]+)")
ERROR = re.compile(
    r"\w*(?:Error|Exception|KeyboardInterrupt)\b(?::|$)|: error: |out of memory|^Killed|Segmentation fault|"
    r"No space left|Bus error"
)
KEYS_SEEN_AS = {"24k": "loss_24k", "24khz": "loss_24k", "48k": "loss_48k", "48khz": "loss_48k",
                "eta": "eta_s", "segment": "segment_length", "audio_s/s": "audio_s_per_s",
                "audio-s/s": "audio_s_per_s", "bits/s": "bits_per_s"}  # fmt: skip
END_REASONS = {
    0: "finished",
    3: "stopped",
    4: "diverged",
    5: "bad input",
}  # by exit code, where none is given
NOT_CURVES = {"t", "step", "total_steps", "epoch", "epochs", "segment_length", "eta_s"}
CONTROL = dict.fromkeys([*range(32), *range(127, 160)], "·") | {9: " "}  # a log must not drive the terminal
ESCAPES = re.compile(r"\x1b(?:\[[0-9;?]*[ -/]*[@-~]|\][^\x07\x1b]*(?:\x07|\x1b\\)?|.)")


def clean(text: str) -> str:
    return ESCAPES.sub("", text).translate(CONTROL)


def number(value) -> float | None:
    """float of a number or of "0.5", "NaN", "Infinity", "3:10:11" (seconds); None for anything else."""
    if isinstance(value, str) and re.fullmatch(r"(\d+:)?\d+:\d\d", value):
        return float(sum(60**i * int(x) for i, x in enumerate(reversed(value.split(":")))))
    if isinstance(value, bool):
        return None
    try:
        return float(value)
    except (TypeError, ValueError, OverflowError):
        return None


def counted(value) -> int | None:
    """A step or epoch: an int that fits the curves' 32-bit x axis, else None."""
    value = value if type(value) is int else number(value)
    return int(value) if value is not None and 0 <= value < 2**32 else None


def parse_line(line: str) -> dict | None:
    """One line of metrics.jsonl or of a log -> record with the keys of metrics.jsonl; None for other text.

    Logs: our step line, a tqdm bar, `Epoch 4 [Train]: Loss=…` and `[Val]` (a record with event "val").
    """
    if line.startswith("{"):
        try:
            record = json.loads(line)
        except (ValueError, RecursionError):
            return None
        if not isinstance(record, dict):
            return None
        if '"NaN"' in line or 'Infinity"' in line:
            for k, v in record.items():
                if isinstance(v, str) and v in ("NaN", "Infinity", "-Infinity"):
                    record[k] = float(v)
        if "files" in record:  # precompute's name for it
            record.setdefault("total_steps", record["files"])
        return record
    if m := STEP_LINE.search(line):
        step, total, epoch, epochs, phase, rest = m.groups()
        words = rest.split()
        record = {"step": int(step), "total_steps": int(total), "epoch": int(epoch), "epochs": int(epochs)}
        record["phase"] = phase
        pairs = zip(words[::2], words[1::2])
    elif m := SUMMARY.search(line):
        record = {"epoch": int(m[1]), "event": "val" if m[3] == "Val" else "epoch"}
        if m[2]:
            record["epochs"] = int(m[2])
        pairs = PAIR.findall(m[4])
    elif m := BAR.search(line):
        n, total, record = int(m[1]), int(m[2]), {}
        epoch = EPOCH.search(line)
        record = {"step": n, "total_steps": total}
        left = number(m[4])
        if epoch:  # the bar counts batches of one epoch
            e, epochs = int(epoch[1]), int(epoch[2] or 0)
            record = {"step": max(0, e - 1) * total + n, "epoch": e}
            if epochs:
                record |= {"epochs": epochs, "total_steps": epochs * total}
                left = None if left is None else left + (epochs - e) * (left + number(m[3]))
            else:
                left = None
        if left is not None:
            record["eta_s"] = left
        pairs = PAIR.findall(m[5])
    else:
        return None
    for key, value in pairs:
        value = number(value)
        if value is not None:
            record.setdefault(KEYS_SEEN_AS.get(key.lower(), key.lower()), value)
    return record


# ---- state of one run ----


class Series:
    """One curve: x ascending, y finite; beyond POINTS each group of 8 keeps its lowest and highest point."""

    __slots__ = ("xs", "ys")

    def __init__(self):
        self.xs, self.ys = array("I"), array("f")

    def cut(self, x: int) -> None:
        i = bisect_left(self.xs, x)
        del self.xs[i:], self.ys[i:]

    def thin(self) -> None:
        xs, ys = array("I"), array("f")
        for i in range(0, len(self.xs), 8):
            group = self.ys[i : i + 8]
            keep = {i + group.index(min(group)), i + group.index(max(group))}
            for j in sorted(keep):
                xs.append(self.xs[j])
                ys.append(self.ys[j])
        self.xs, self.ys = xs, ys


class RunState:
    """What the records of one run add up to. Steps that come again (resume, restart) replace the old ones."""

    LATEST = ("epoch", "epochs", "total_steps", "segment_length", "loss", "loss_24k", "loss_48k",
              "lr", "eta_s", "audio_s_per_s", "ppl", "bits_per_s", "skipped")  # fmt: skip

    def __init__(self):
        self.raw: dict = {}  # the latest value of every key, as it came
        self.series: dict[str, Series] = {}
        self.vals: list[dict] = []
        self.marks: list[tuple] = []  # (step, phase, segment_length) where these changed
        self.stretch: tuple | None = None  # phase and segment length as last seen
        self.bad = array("I")  # steps whose loss was not finite
        self.skips, self.skip_reason = 0, None
        self.recent: deque = deque(maxlen=50)  # per step line "", "nan" or "skip"
        self.pace: deque = deque(maxlen=20)  # (t, step)
        self.window: deque = deque(maxlen=20)  # losses, for the divergence alarm
        self.lowest: dict = {}  # (phase, segment_length) -> lowest median of 20 losses
        self.step: int | None = None
        self.floor: int | None = None  # lowest step (re)started from: older history past it is void
        self.end: dict | None = None
        self.checkpoint: dict | None = None
        self.records = 0

    def feed(self, r: dict) -> None:
        self.records += 1
        event, step = r.get("event"), counted(r.get("step"))
        if event in ("start", "resume"):
            self.end, self.window = None, deque(maxlen=20)
            self.recent.clear()
            self.pace.clear()
            self.raw |= {k: r[k] for k in ("epochs", "total_steps", "recipe", "kind") if r.get(k) is not None}
            if step is not None:
                self.rewind(step + (event == "resume"))
        elif event == "end":
            self.end = r | {
                "reason": r.get("reason") or END_REASONS.get(r.get("code"), f"exit code {r.get('code')}")
            }
        elif event == "checkpoint":
            self.checkpoint = r
        elif event == "skip":
            self.skips, self.skip_reason = self.skips + 1, clean(str(r.get("reason")))
            self.recent.append("skip")
        elif event == "val":
            x = step if step is not None else self.step
            if x is None:
                x = counted(r.get("epoch")) or 0
            self.vals = [v for v in self.vals if v["step"] < x]  # validated again after a resume
            r = {"loss": r.get("val_loss"), **r}  # rvq's name for it
            values = {k: n for k, v in r.items() if k not in NOT_CURVES and (n := number(v)) is not None}
            self.vals.append({"step": x, "epoch": counted(r.get("epoch")), **values})
        elif event == "epoch":  # `[Train]` summary of older logs: a point only where there are no step lines
            if self.step is None or "by_epoch" in self.raw:
                self.raw |= {**r, "by_epoch": True}
                self.point(counted(r.get("epoch")) or 0, {k: v for k, v in r.items() if k != "event"})
        elif event is None:
            self.raw.update(r if None not in r.values() else {k: v for k, v in r.items() if v is not None})
            if step is not None:
                self.point(step, r)

    @property
    def latest(self) -> dict:
        """The latest values that are shown: numbers, and the phase's name."""
        found = {k: n for k in self.LATEST if (n := number(self.raw.get(k))) is not None}
        if self.raw.get("phase") is not None:
            found["phase"] = clean(str(self.raw["phase"]))[:24]
        return found

    def point(self, step: int, r: dict) -> None:
        if self.step is not None and step < self.step:
            self.rewind(step)
        self.floor = step if self.floor is None else min(self.floor, step)
        self.step, self.end = step, None
        mark = (self.raw.get("phase"), self.raw.get("segment_length"))
        if mark != self.stretch or not self.marks:
            self.stretch, mark = mark, (clean(str(mark[0] or ""))[:24], number(mark[1]))
            if not self.marks or self.marks[-1][1:] != mark:
                self.marks.append((step, *mark))
                self.window.clear()
        bad, series = False, self.series
        for key, y in r.items():  # runs for every line of a long history: kept lean
            if (type(y) is not float and type(y) is not int) or key in NOT_CURVES:
                continue
            if not -3e38 < y < 3e38:
                bad |= "loss" in key
            elif key in series or len(series) < 16:
                s = series.get(key) or series.setdefault(key, Series())
                s.xs.append(step)
                s.ys.append(y)
                if len(s.xs) > POINTS:
                    s.thin()
        self.recent.append("nan" if bad else "")
        if bad:
            self.bad.append(step)
            del self.bad[:-5000]
        loss = next((r[k] for k in ("loss", "loss_48k", "loss_24k") if k in r), None)
        if isinstance(loss, (float, int)) and math.isfinite(loss):
            self.window.append(loss)
            if self.records % 5 == 0 and len(self.window) == 20:
                key = self.marks[-1][1:]
                self.lowest[key] = min(self.lowest.get(key, math.inf), sorted(self.window)[10])
        if (t := number(r.get("t"))) is not None:
            self.pace.append((t, step))

    def rewind(self, step: int) -> None:
        """Forget what lies at `step` or later: it was trained again."""
        for s in self.series.values():
            s.cut(step)
        self.vals = [v for v in self.vals if v["step"] < step]
        self.marks, self.stretch = [m for m in self.marks if m[0] < step], None
        self.bad = array("I", [b for b in self.bad if b < step])
        self.floor = step if self.floor is None else min(self.floor, step)
        if self.step is not None and self.step >= step:
            self.step = max((s.xs[-1] for s in self.series.values() if s.xs), default=None)

    def prepend(self, older: RunState) -> None:
        """Take in records that came before all of these."""
        if self.floor is not None:
            older.rewind(self.floor)
        for key, s in older.series.items():
            mine = self.series.setdefault(key, Series())
            s.xs.extend(mine.xs)
            s.ys.extend(mine.ys)
            mine.xs, mine.ys = s.xs, s.ys
            if len(mine.xs) > POINTS:
                mine.thin()
        self.vals = older.vals + self.vals
        if older.marks and self.marks and older.marks[-1][1:] == self.marks[0][1:]:
            del self.marks[0]
        self.marks = older.marks + self.marks
        self.bad = older.bad + self.bad
        self.skips += older.skips
        for key, low in older.lowest.items():
            self.lowest[key] = min(low, self.lowest.get(key, math.inf))
        self.raw = older.raw | self.raw
        self.checkpoint = self.checkpoint or older.checkpoint
        self.step = older.step if self.step is None else self.step
        if older.floor is not None:
            self.floor = older.floor if self.floor is None else min(self.floor, older.floor)

    def best(self, key: str = "loss_48k") -> dict | None:
        """The validation with the lowest `key` ("loss" where that is not recorded)."""
        for k in (key, "loss"):
            found = [v for v in self.vals if k in v and math.isfinite(v[k])]
            if found:
                return min(found, key=lambda v: v[k])
        return None

    def usual_gap(self) -> float | None:
        """Median seconds between step lines; a clock set back is left out."""
        times = [t for t, _ in self.pace]
        gaps = sorted(b - a for a, b in pairwise(times) if b > a)
        return gaps[len(gaps) // 2] if gaps else None

    def eta(self) -> float | None:
        if self.end is not None and self.end.get("reason") == "finished":
            return 0.0
        if (eta := self.latest.get("eta_s")) is not None and math.isfinite(eta):
            return eta
        total = self.latest.get("total_steps")
        if not total or len(self.pace) < 2:
            return None
        (t0, s0), (t1, s1) = self.pace[0], self.pace[-1]
        return (total - s1) * (t1 - t0) / (s1 - s0) if t1 > t0 and s1 > s0 else None


# ---- files that grow ----


def whole_lines_before(path: Path, end: int, size: int) -> tuple[list[bytes], int]:
    """(whole lines in the `size` bytes before offset `end`, offset where they begin)."""
    start = max(0, end - size)
    with open(path, "rb") as f:
        f.seek(start)
        data = f.read(end - start)
    if start:
        cut = data.find(b"\n") + 1
        data, start = data[cut:] if cut else b"", start + cut
    return data.replace(b"\r", b"\n").split(b"\n"), start


class Tailer:
    """New lines of a file that is rotated, truncated, half-written. `\\r` ends a line too (tqdm's bar).

    Starts `tail` bytes before the end; `before` is the offset of what was left unread.
    """

    def __init__(self, path: Path, tail: int = TAIL_BYTES):
        self.path, self.tail = path, tail
        self.file = None
        self.id = self.seen = None
        self.pos = self.before = self.first = 0
        self.partial, self.skipping, self.mark = b"", False, b""

    def open(self) -> bool:
        try:
            self.file = open(self.path, "rb")
        except OSError:
            return False
        st = os.fstat(self.file.fileno())
        first, self.id = self.id is None, (st.st_dev, st.st_ino)
        self.pos, self.partial, self.skipping, self.mark = 0, b"", False, b""
        if first and st.st_size > self.tail:
            self.file.seek(st.st_size - self.tail)
            cut = self.file.read(self.tail).find(b"\n") + 1
            self.pos = st.st_size - self.tail + cut
            self.before = self.first = self.pos
        elif not first:
            self.before = 0
        return True

    def poll(self, limit: int = 4 << 20) -> list[str]:
        """Lines completed since the last call, at most `limit` bytes; none while the file is missing."""
        if self.file is None and not self.open():
            return []
        lines = self._read(limit)
        try:
            st = os.stat(self.path)
        except OSError:
            return lines
        if (st.st_dev, st.st_ino) != self.id:  # rotated: what was left of the old file is read above
            self.file.close()
            self.file = None
            if self.open():
                lines += self._read(limit)
        return lines

    def _read(self, limit: int) -> list[str]:
        st = os.fstat(self.file.fileno())
        if self.seen == (st.st_size, st.st_mtime_ns) and st.st_size == self.pos:
            return []
        if st.st_size < self.pos or not self._same():
            self.pos, self.before, self.partial, self.skipping, self.mark = 0, 0, b"", False, b""
        self.file.seek(self.pos)
        data = self.file.read(limit)
        self.pos += len(data)
        self.seen = (st.st_size, st.st_mtime_ns)
        if data:
            self.mark = (self.mark + data)[-64:]
        pieces = re.split(rb"[\r\n]+", self.partial + data)
        self.partial = pieces.pop()
        if self.skipping and pieces:
            pieces, self.skipping = pieces[1:], False
        if len(self.partial) > LONGEST:
            self.partial, self.skipping = b"", True
        elif self.skipping:
            self.partial = b""
        return [p.decode("utf-8", "replace") for p in pieces if p and len(p) <= LONGEST]

    def _same(self) -> bool:
        """Are the last bytes read still there? Not after truncation and regrowth past our position."""
        if not self.mark:
            return True
        self.file.seek(self.pos - len(self.mark))
        return self.file.read(len(self.mark)) == self.mark


class Pager:
    """A window of a log of any size: only byte offsets are kept, lines are looked up around them."""

    BLOCK = 1 << 16  # a longer line is shown in pieces

    def __init__(self, path: Path):
        self.path, self.top, self.column = path, None, 0  # top None: follow the end
        self.new, self.counted = 0, 0

    def size(self) -> int:
        try:
            return os.path.getsize(self.path)
        except OSError:
            return 0

    def read(self, start: int, length: int) -> bytes:
        try:
            with open(self.path, "rb") as f:
                f.seek(start)
                return f.read(length)
        except OSError:
            return b""

    def starts_before(self, end: int, n: int) -> list[int]:
        """Offsets of up to n lines that end at or before `end` (an offset of a line's start, or the size)."""
        starts: list[int] = []
        while end > 0 and len(starts) < n:
            base = max(0, end - self.BLOCK)
            data = self.read(base, end - base)
            found, at = [], len(data)
            if data.endswith(b"\n"):
                at -= 1
            while at >= 0 and len(starts) + len(found) < n:
                nl = data.rfind(b"\n", 0, at)
                if nl < 0:
                    if base == 0 or not found:  # the file's first line, or a piece of a very long one
                        found.append(base)
                    break
                found.append(base + nl + 1)
                at = nl
            starts += found
            if not found:
                break
            end = found[-1]
        return starts[::-1]

    def page(self, height: int) -> list[str]:
        size = self.size()
        if self.top is not None and self.top > size:  # truncated under the reader
            self.top = None
        if self.top is None:
            self.counted, self.new = size, 0
            starts = self.starts_before(size, height)
            data = self.read(starts[0], size - starts[0]) if starts else b""
        else:
            if size > self.counted:
                self.new += self.read(self.counted, min(size - self.counted, 16 << 20)).count(b"\n")
            self.counted = size
            data = self.read(self.top, self.BLOCK * 2)
        lines = data.split(b"\n")
        if not lines[-1]:
            lines.pop()
        return [
            clean(next((p for p in reversed(x.split(b"\r")) if p), b"").decode("utf-8", "replace"))
            for x in lines[:height]
        ]

    def scroll(self, n: int, height: int) -> None:
        size = self.size()
        top = self.top
        if top is None:
            if n >= 0:
                return
            top = next(iter(self.starts_before(size, height)), 0)
        if n < 0:
            self.top = next(iter(self.starts_before(top, -n)), 0)
            return
        data, at = self.read(top, self.BLOCK * 2), 0
        for _ in range(n):
            nl = data.find(b"\n", at)
            if nl < 0:
                break
            at = nl + 1
        last = self.starts_before(size, height)
        self.top = None if not last or top + at >= last[0] else top + at

    def percent(self) -> int:
        size = self.size()
        return 100 if self.top is None or not size else 100 * self.top // size


# ---- processes, GPUs, system ----


def process_stat(pid: int, proc: Path = Path("/proc")) -> tuple[str, int, int] | None:
    """(state letter, session id, start ticks) of a process; None when there is no such process."""
    try:
        text = (proc / str(pid) / "stat").read_text(errors="replace")
        fields = text[text.rindex(")") + 2 :].split()
        return fields[0], int(fields[3]), int(fields[19])
    except (OSError, ValueError, IndexError):
        return None


def job_status(pid_file: Path, proc: Path = Path("/proc")) -> tuple[str | None, int | None]:
    """(state, pid) from a file `PID START_TICKS CMDLINE…`: RUNNING, DEAD, STALE_PID; None without the file.

    /proc decides. A zombie is dead. A live process with other start ticks got the number later: STALE_PID.
    """
    try:
        words = pid_file.read_text(errors="replace").split()
    except OSError:
        return None, None
    if not words or not words[0].isdigit():
        return "DEAD", None
    pid = int(words[0])
    stat = process_stat(pid, proc)
    if stat is None:
        return "DEAD", pid
    if len(words) < 2 or words[1] != str(stat[2]):
        return "STALE_PID", pid
    return ("DEAD" if stat[0] in "ZXx" else "RUNNING"), pid


class GpuSampler:
    """NVML, one value at a time: what can't be read is None, and `error` says why. Never raises."""

    def __init__(self, nvml=None, now=time.monotonic):
        self.nvml, self.now = nvml, now
        self.ready, self.retry_at, self.error = False, 0.0, None

    def _try(self, function, *args):
        try:
            return function(*args)
        except Exception as e:  # NVMLError has a class per code, and drivers raise others: all mean N/A
            self.error = clean(str(e) or type(e).__name__)
            return None

    def sample(self) -> list[dict]:
        if not self.ready:
            if self.now() < self.retry_at:
                return []
            self.retry_at = self.now() + 30
            if self.nvml is None:
                if not any(map(os.path.exists, ("/dev/nvidiactl", "/proc/driver/nvidia", "/dev/dxg"))):
                    self.error = "no NVIDIA driver"  # importing NVML would cost a tenth of a second
                    return []
                try:
                    import pynvml
                except ImportError:
                    self.error = "nvidia-ml-py is not installed"
                    return []
                self.nvml = pynvml
            self.error = None
            self._try(self.nvml.nvmlInit)
            self.ready = self.error is None
            if not self.ready:
                return []
        n, self.error = self.nvml, None
        count = self._try(n.nvmlDeviceGetCount)
        if count is None:  # driver gone or reloaded: initialise again later
            self.ready, self.retry_at = False, self.now() + 30
            return []
        gpus = []
        for i in range(count):
            gpu = dict.fromkeys(
                ("index", "name", "util_percent", "mem_used", "mem_total", "power_w", "temp_c")
            )
            gpus.append(gpu | {"index": i, "processes": []})
            gpu = gpus[-1]
            handle = self._try(n.nvmlDeviceGetHandleByIndex, i)
            if handle is None:
                continue
            name = self._try(n.nvmlDeviceGetName, handle)
            gpu["name"] = name.decode() if isinstance(name, bytes) else name
            if (util := self._try(n.nvmlDeviceGetUtilizationRates, handle)) is not None:
                gpu["util_percent"] = util.gpu
            if (mem := self._try(n.nvmlDeviceGetMemoryInfo, handle)) is not None:
                gpu["mem_used"], gpu["mem_total"] = mem.used, mem.total
            if (power := self._try(n.nvmlDeviceGetPowerUsage, handle)) is not None:
                gpu["power_w"] = power / 1000
            gpu["temp_c"] = self._try(n.nvmlDeviceGetTemperature, handle, 0)
            for p in self._try(n.nvmlDeviceGetComputeRunningProcesses, handle) or []:
                gpu["processes"].append({"pid": p.pid, "mem": p.usedGpuMemory, "run": None})
        return gpus


class CpuMeter:
    """Busy share of all cores between two calls, from /proc/stat."""

    def __init__(self):
        self.last = self._read()

    def _read(self) -> tuple[int, int] | None:
        try:
            with open("/proc/stat") as f:
                ticks = [int(x) for x in f.readline().split()[1:9]]
        except (OSError, ValueError):
            return None
        return sum(ticks), ticks[3] + ticks[4]

    def percent(self) -> float | None:
        now, last = self._read(), self.last
        if not now or not last or now[0] <= last[0]:
            return None
        self.last = now
        return round(max(0.0, 100 * (1 - (now[1] - last[1]) / (now[0] - last[0]))), 1)


def memory() -> tuple[int | None, int | None]:
    """(used, total) bytes of RAM; used = total - available."""
    try:
        with open("/proc/meminfo") as f:
            info = {k: int(v.split()[0]) * 1024 for k, v in (line.split(":") for line in f)}
        return info["MemTotal"] - info["MemAvailable"], info["MemTotal"]
    except (OSError, ValueError, KeyError, IndexError):
        return None, None


# ---- runs ----


@dataclass
class Limits:
    """Thresholds of the alarms (README lists them)."""

    stall_s: float = 300.0  # RUNNING without a new line for longer than this and than 20 usual gaps
    diverge: float = 3.0  # median of the last 20 losses over the lowest such median at this segment length
    disk_gb: float = 5.0  # free space where the checkpoints go; also under 3x the newest checkpoint


class Run:
    """One job: its files in the log directory, its process, its state."""

    def __init__(self, name: str, log: Path | None, folder: Path | None = None, run_dir: Path | None = None):
        self.name, self.log, self.folder, self.run_dir = name, log, folder, run_dir
        self.state = RunState()
        self.info: dict = {}
        self.info_stamp = None
        self.args: dict | None = None
        self.metrics: Tailer | None = None
        self.text: Tailer | None = None
        self.by_log = False  # numbers come from the log: there is no metrics file
        self.status: str | None = None
        self.pid: int | None = None
        self.error = self.last_line = None
        self.grown: float | None = None  # monotonic time of the last growth
        self.disk: tuple | None = None  # (used, free, total) of the run directory's file system
        self.largest = 0  # bytes of the largest checkpoint
        self.alarms: list[tuple[bool, str]] = []
        self.gpu: dict | None = None

    @property
    def kind(self) -> str | None:
        raw, known = self.state.raw, ("train", "cache", "precompute", "rvq")
        guesses = (self.info.get("kind"), raw.get("kind"), re.split(r"[_\d]", self.name)[0])
        kind = next((k for k in guesses if k in known), None)
        kind = kind or ("rvq" if "ppl" in raw else raw.get("phase") if raw.get("phase") in known else None)
        return kind or ("train" if self.state.vals else None)

    @property
    def recipe(self) -> str | None:
        args = self.args or {}
        args = args["args"] if isinstance(args.get("args"), dict) else args
        return clean(str(self.state.raw.get("recipe") or args.get("recipe") or ""))[:24] or None

    def mine(self, record: dict) -> bool:
        """Several cache or precompute processes write into one metrics file: is this record of this one?"""
        if not self.folder or self.name.endswith("_cpu"):
            return True
        if "worker" in record:
            return self.name.endswith(f"_{record['worker']}")
        return "proc" not in record or str(record["proc"]).rsplit("-", 1)[-1] == str(self.pid)

    def metrics_path(self) -> Path | None:
        if self.info.get("metrics"):
            return Path(str(self.info["metrics"]))
        return self.run_dir / "metrics.jsonl" if self.run_dir else None

    def read_info(self) -> None:
        if not self.folder:
            return
        path = self.folder / f"{self.name}.json"
        try:
            st = os.stat(path)
            if (stamp := (st.st_mtime_ns, st.st_ino)) == self.info_stamp:
                return
            info = json.loads(path.read_text(errors="replace"))
        except (OSError, ValueError):
            return
        self.info_stamp, self.info = stamp, info if isinstance(info, dict) else {}
        run_dir = self.info.get("run_dir")
        if isinstance(run_dir, str) and run_dir and Path(run_dir) != self.run_dir:
            self.run_dir, self.state, self.metrics, self.args = Path(run_dir), RunState(), None, None

    def poll(self, now: float, mono: float, proc: Path) -> None:
        self.read_info()
        if self.folder:
            self.status, self.pid = job_status(self.folder / f"{self.name}.pid", proc)
            if self.status is None and self.info:
                self.status = "DEAD"
        path = self.metrics_path()
        if self.metrics is None and path and path.is_file():
            self.metrics = Tailer(path)
            if self.by_log or self.state.records == 0:
                self.state, self.by_log = RunState(), False
        if self.text is None and self.log:
            self.text = Tailer(self.log)
        if self.args is None and self.run_dir:
            try:
                self.args = json.loads((self.run_dir / "args.json").read_text())
            except (OSError, ValueError):
                self.args = None
            if not isinstance(self.args, dict):
                self.args = None
        grew = False
        if self.metrics:
            for line in self.metrics.poll():
                grew = True
                if (record := parse_line(line)) and self.mine(record):
                    self.state.feed(record)
        if self.text:
            for line in self.text.poll():
                grew |= self.metrics is None
                record = parse_line(line)
                if record and not line.startswith("{"):
                    self.error = None
                    if self.metrics is None:
                        self.by_log = True
                        self.state.feed(record)
                elif ERROR.search(line):
                    self.error = clean(line).strip()[:300]
                if line.strip():
                    self.last_line = line
        if self.grown is None:  # the clock may have been set back: an age is never negative
            stamps = [t.path.stat().st_mtime for t in (self.metrics, self.text) if t and t.path.exists()]
            self.grown = mono - max(0.0, now - max(stamps)) if stamps else mono
        elif grew:
            self.grown = mono

    def history_cut(self) -> bool:
        """True once as much history has been read as ever will be."""
        tail = self.metrics or self.text
        return tail.first - tail.before > (HISTORY_BYTES if self.metrics else HISTORY_LOG_BYTES)

    def load_events(self) -> None:
        """For a single look: of the history only validations, starts, resumes; found by their bytes."""
        tail, needle = self.metrics or self.text, b'"event"' if self.metrics else b"[Val]"
        while tail and tail.before and not self.history_cut():
            try:
                with open(tail.path, "rb") as f:
                    start = max(0, tail.before - (CHUNK << 3))
                    f.seek(start)
                    data = f.read(tail.before - start)
            except OSError:
                return
            if start:
                cut = data.find(b"\n") + 1
                start, data = start + cut, data[cut:]
            older, at = RunState(), data.find(needle)
            while at >= 0:
                a, end = data.rfind(b"\n", 0, at) + 1, data.find(b"\n", at)
                if end - a < LONGEST and (record := parse_line(data[a:end].decode("utf-8", "replace"))):
                    older.feed(record)
                at = data.find(needle, end) if end >= 0 else -1
            self.state.prepend(older)
            tail.before = start

    def load_older(self) -> bool:
        """Read one more piece of history, backwards; False when there is none left."""
        tail = self.metrics or self.text
        if not tail or not tail.before or self.history_cut():
            return False
        try:
            lines, tail.before = whole_lines_before(tail.path, tail.before, CHUNK)
        except OSError:
            tail.before = 0
            return False
        older = RunState()
        for line in lines:
            if (line.startswith(b"{") or tail is self.text) and len(line) < LONGEST:
                record = parse_line(line.decode("utf-8", "replace"))
                if record and self.mine(record):
                    older.feed(record)
        self.state.prepend(older)
        return tail.before > 0

    @property
    def end(self) -> dict | None:
        """The end event of this attempt (not of an earlier one in the same directory)."""
        end = self.state.end
        t, started = number((end or {}).get("t")), number(self.info.get("started"))
        return None if end is None or (t is not None and started is not None and t < started) else end

    @property
    def shown_state(self) -> str | None:
        """RUNNING, FINISHED, DEAD, STALE_PID; None for a log without a process."""
        if self.status != "RUNNING" and self.end and self.end.get("reason") == "finished":
            return "FINISHED"
        return self.status

    def why_dead(self) -> str:
        if self.end:
            code = f" (exit code {clean(str(self.end['code']))})" if self.end.get("code") else ""
            return ": ".join(w for w in (clean(str(self.end["reason"])), self.error) if w) + code
        if self.error:
            return self.error
        last = clean(self.last_line or "").strip()[:120]
        return "vanished without a word (kill -9? out of memory?)" + (f"; last line: {last}" if last else "")

    def judge(self, mono: float, limits: Limits) -> None:
        """Fill `alarms`: (loud?, text). The thresholds are those of `Limits`."""
        s, state = self.state, self.shown_state
        found: list[tuple[bool, str]] = []
        at = f" at step {s.step}" if s.step is not None else ""
        if state in ("DEAD", "STALE_PID") and self.end and self.end.get("reason") == "stopped":
            signal = f" by {clean(str(self.end['signal']))}" if self.end.get("signal") else ""
            found.append((False, f"STOPPED{at}{signal}: resume continues it"))
        elif state == "STALE_PID":
            why = f"PID {self.pid} now belongs to another process, this run is dead: {self.why_dead()}"
            found.append((True, f"STALE_PID{at}: {why}"))
        elif state == "DEAD":
            found.append((True, f"DEAD{at}: {self.why_dead()}"))
        if state != "FINISHED":
            if n := s.recent.count("nan"):
                found.append((True, f"NaN loss at step {s.bad[-1]}, {n} of the last {len(s.recent)} lines"))
            if n := s.recent.count("skip"):
                found.append((True, f"SKIP: {n} of the last {len(s.recent)} lines: {s.skip_reason}"))
            low = s.lowest.get(s.marks[-1][1:]) if s.marks else None
            median = sorted(s.window)[10] if len(s.window) == 20 else 0
            if low and median > limits.diverge * low:
                ratio = f"{median / low:.1f}x its lowest {short(low)}"
                found.append((True, f"DIVERGING: loss {short(median)} is {ratio}"))
        if state == "RUNNING":
            quiet, usual = mono - self.grown, s.usual_gap()
            if quiet > max(limits.stall_s, 20 * (usual or 0)):
                usually = f", usually {usual:.1f} s" if usual else ""
                found.append((True, f"STALL: no new line for {human_time(quiet)}{usually}"))
            need = max(limits.disk_gb * 1e9, 3 * self.largest)
            if self.disk and self.disk[1] < need:
                free = f"{human_size(self.disk[1])} free, {human_size(need)} wanted"
                found.append((True, f"DISK: {free} in {self.run_dir or self.folder}"))
        self.alarms = found

    def row(self) -> dict:
        """The object of --json (SPEC: exactly these keys)."""
        s, val, best = self.state, self.state.vals[-1] if self.state.vals else {}, self.state.best()
        latest = s.latest
        whole = {k: counted(latest.get(k)) for k in ("epoch", "epochs")}
        return {
            "name": self.name, "kind": self.kind, "state": self.shown_state, "pid": self.pid,
            "epoch": whole["epoch"], "epochs": whole["epochs"], "step": s.step, "phase": latest.get("phase"),
            "segment_length": latest.get("segment_length"), "loss": latest.get("loss"),
            "loss_24k": latest.get("loss_24k"), "loss_48k": latest.get("loss_48k"),
            "val_loss_24k": val.get("loss_24k"), "val_loss_48k": val.get("loss_48k"),
            "best_val_loss_48k": best.get("loss_48k") if best else None,
            "best_epoch": best.get("epoch") if best else None, "lr": latest.get("lr"),
            "eta_s": s.eta() if self.shown_state in ("RUNNING", None) else None,
            "alerts": [text for _, text in self.alarms], "log": str(self.log) if self.log else None,
        }  # fmt: skip


class Fleet:
    """All runs of a log directory and the files named on the command line, and the machine."""

    def __init__(
        self, log_dir, files=(), limits=None, nvml=None, proc="/proc", now=time.time, mono=time.monotonic
    ):
        self.log_dir, self.limits = Path(log_dir), limits or Limits()
        self.proc, self.now, self.mono = Path(proc), now, mono
        self.lock = threading.RLock()
        self.runs: dict[str, Run] = {}
        self.gpus: list[dict] = []
        self.sampler, self.cpu, self.polls = GpuSampler(nvml, mono), CpuMeter(), 0
        self.cpu_percent = self.ram = None
        for file in map(Path, files):
            if file.is_dir() or file.name == "metrics.jsonl":
                folder = file if file.is_dir() else file.parent
                if not (folder / "metrics.jsonl").is_file():
                    raise UserError(f"{folder} holds no metrics.jsonl; name a run directory or a log file")
                log = folder / "training.log"
                run = Run(folder.resolve().name, log if log.is_file() else None, run_dir=folder)
            elif file.is_file():
                run = Run(file.stem, file)
            else:
                raise UserError(f"{file} does not exist; name a log file, a run directory, or use --log_dir")
            while run.name in self.runs:
                run.name += "'"
            self.runs[run.name] = run

    def find(self) -> None:
        try:
            names = {Path(e).stem for e in os.listdir(self.log_dir) if e.endswith((".json", ".pid", ".log"))}
        except OSError:
            return
        for name in names - self.runs.keys():
            self.runs[name] = Run(name, self.log_dir / f"{name}.log", self.log_dir)
        for name in [n for n, r in self.runs.items() if r.folder and n not in names]:
            del self.runs[name]

    def listed(self) -> list[Run]:
        def natural(run):
            return [int(x) if x.isdigit() else x for x in re.split(r"(\d+)", run.name)]

        return sorted(self.runs.values(), key=natural)

    def poll(self) -> None:
        gpus = self.sampler.sample()  # outside the lock: a sick driver may take its time
        with self.lock:
            self.find()
            now, mono = self.now(), self.mono()
            for run in self.runs.values():
                run.poll(now, mono, self.proc)
                if self.polls % 10 == 0 and (run.run_dir or run.folder):
                    self.weigh(run)
                run.judge(mono, self.limits)
            self.gpus = gpus
            sessions = {r.pid: r for r in self.runs.values() if r.pid and r.status == "RUNNING"}
            for run in self.runs.values():
                run.gpu = None
            for gpu in gpus:
                for p in gpu["processes"]:
                    stat = process_stat(p["pid"], self.proc)
                    run = sessions.get(p["pid"]) or (sessions.get(stat[1]) if stat else None)
                    if run:
                        p["run"] = run.name
                        run.gpu = run.gpu or {"mem": 0, "index": []}
                        run.gpu["mem"] += p["mem"] or 0
                        run.gpu["index"].append(gpu["index"])
            percent = self.cpu.percent()
            self.cpu_percent = self.cpu_percent if percent is None else percent
            self.ram = memory()
            self.polls += 1

    def weigh(self, run: Run) -> None:
        folder = run.run_dir or run.folder
        while not folder.exists() and folder != folder.parent:
            folder = folder.parent
        try:
            d = shutil.disk_usage(folder)
            run.disk = (d.used, d.free, d.total)
            if run.run_dir and run.run_dir.is_dir():
                sizes = [e.stat().st_size for e in os.scandir(run.run_dir) if e.name.endswith(".pt")]
                run.largest = max(sizes, default=0)
        except OSError:
            run.disk = None

    def load_older(self, seconds: float) -> bool:
        """Spend about `seconds` on history; False when all of it is in."""
        deadline = time.monotonic() + seconds
        for run in self.listed():
            while True:
                with self.lock:
                    if not run.load_older():
                        break
                if time.monotonic() > deadline:
                    return True
        return False

    def disk_free(self) -> int | None:
        free = [r.disk[1] for r in self.runs.values() if r.disk]
        return min(free) if free else shutil.disk_usage(".").free

    def report(self) -> dict:
        """--json."""
        used, total = self.ram or (None, None)
        system = {"cpu_percent": self.cpu_percent, "ram_used": used, "ram_total": total,
                  "disk_free": self.disk_free(), "gpus": self.gpus}  # fmt: skip
        return finite_json({"runs": [r.row() for r in self.listed()], "system": system})


# ---- plot: braille, lowest and highest per column, so that a spike of one step survives ----

DOTS = ((0x01, 0x08), (0x02, 0x10), (0x04, 0x20), (0x40, 0x80))


def columns(xs, ys, x0: float, x1: float, n: int, log: bool = False) -> list[tuple | None]:
    """(lowest, highest, mean) of the points in each of n equal parts of [x0, x1]; None where none."""
    found, i, width = [], bisect_left(xs, x0), (x1 - x0) / n
    for c in range(n):
        j = bisect_right(xs, x1, i) if c == n - 1 else bisect_left(xs, x0 + (c + 1) * width, i)
        part, i = ys[i:j], j
        if part and log and min(part) <= 0:  # no place on a logarithmic axis
            part = [v for v in part if v > 0]
        found.append((min(part), max(part), sum(part) / len(part)) if part else None)
    return found


def smoothed(cols: list, window: float) -> list:
    """Mean over `window` (a share of the visible width), centred."""
    k = max(1, round(window * len(cols) / 2))
    out = []
    for c, col in enumerate(cols):
        near = [p[2] for p in cols[max(0, c - k) : c + k + 1] if p]
        out.append(col and (sum(near) / len(near),) * 3)
    return out


def raster(
    layers: list, width: int, height: int, y0: float, y1: float, log: bool = False
) -> list[list[tuple]]:
    """[(columns, style)] -> height rows of width (character, style); a later layer covers an earlier one."""
    f = math.log10 if log else float
    low, top = f(y0), 4 * height - 1
    scale = top / ((f(y1) - low) or 1)
    rows = [[(0, "")] * width for _ in range(height)]

    for cols, style in layers:
        bits: dict = {}

        def bar(c, a, b, bits=bits):
            for d in range(a, b + 1):
                cell = ((top - d) // 4, c // 2)
                bits[cell] = bits.get(cell, 0) | DOTS[(top - d) % 4][c % 2]

        before = None
        for c, col in enumerate(cols):
            if col is None:
                continue
            a, b, mid = (min(max(round((f(v) - low) * scale), 0), top) for v in col)
            if before:
                pc, pa, pb, at = before
                for k in range(pc + 1, c):  # a gap: a straight line
                    to = round(before[3] + (mid - before[3]) * (k - pc) / (c - pc))
                    bar(k, min(at, to), max(at, to))
                    at = pa = pb = to
                bar(c, min(a, pb), max(b, pa))
            else:
                bar(c, a, b)
            before = (c, a, b, mid)
        for (r, c), value in bits.items():
            rows[r][c] = (value, style)
    return [[(chr(0x2800 + v) if v else " ", s) for v, s in row] for row in rows]


def fit(line: list, width: int) -> list:
    """A line is [(text, style), …]; cut or pad it to `width` characters."""
    out, left = [], width
    for text, style in line:
        if left <= 0:
            break
        out.append((text[:left], style))
        left -= len(text)
    return [*out, (" " * left, "")] if left > 0 else out


def packed(cells: list[tuple]) -> list:
    """Neighbours of one style joined."""
    out: list = []
    for text, style in cells:
        if out and out[-1][1] == style:
            out[-1] = (out[-1][0] + text, style)
        else:
            out.append((text, style))
    return out


def plot(title: list, curves: list, width: int, height: int, span=(0, 1), log=False, smooth=0.0, clip=False,
         marks=(), bad=(), best=None) -> list:  # fmt: skip
    """`height` lines of `width`: title, axis and canvas. curves: [(xs, ys, style, dotted, letter)].

    span: x range. marks: [(x, label)] vertical lines. bad: x of non-finite values. best: (x, y).
    """
    (x0, x1), (w, h) = span, (max(2, width - 8), max(1, height - 2))
    x1 = max(x1, x0 + 1)
    layers, values = [], []
    for xs, ys, style, _, _ in curves:
        cols = columns(xs, ys, x0, x1, 2 * w, log)
        seen = [c for c in cols if c]
        values += [c[0] for c in seen] + [c[1] for c in seen]
        if smooth and len(seen) > 20:
            layers += [(cols, "dim"), (smoothed(cols, smooth), style)]
        else:
            layers.append((cols, style))
    if not values:
        why = (
            "no positive value for a log axis" if log and any(len(c[0]) for c in curves) else "no points yet"
        )
        return [
            fit(title, width),
            *[[("" if i != h // 2 else f"{'':8}{why}"[:width], "dim")] for i in range(h + 1)],
        ]
    values.sort()
    cut = len(values) // 50 if clip else 0
    y0, y1 = values[cut], values[-1 - cut]
    if y0 == y1:
        y0, y1 = (y0 / 1.1, y1 * 1.1) if log else (y0 - (abs(y0) * 0.1 or 1), y1 + (abs(y1) * 0.1 or 1))
    rows = raster(layers, w, h, y0, y1, log)

    def cell(x, y):
        c = min(int((x - x0) / (x1 - x0) * w), w - 1)
        y = math.log10(y / y0) / math.log10(y1 / y0) if log else (y - y0) / (y1 - y0)
        return min(max(h - 1 - int(y * h), 0), h - 1), c

    axis = [" "] * w
    for text, end in ((short(x0), 0), (short(x1), w)):
        axis[max(0, end - len(text)) : max(0, end - len(text)) + len(text)] = text[:w]
    for x, label in marks:
        if x0 < x < x1:
            c = cell(x, y0)[1]
            for row in rows:
                row[c] = ("┊", "dim") if row[c][0] == " " else row[c]
            if all(a == " " for a in axis[max(0, c - 1) : c + len(label) + 1]) and c + len(label) < w:
                axis[c : c + len(label)] = label
    for x in bad:
        if x0 <= x <= x1:
            rows[h - 1][cell(x, y0)[1]] = ("×", "bold red")
    for xs, ys, style, dotted, letter in curves:
        lo, hi = bisect_left(xs, x0), bisect_right(xs, x1)
        for i in range(lo, hi) if dotted and hi - lo <= w // 2 else ():
            if ys[i] > 0 or not log:
                r, c = cell(xs[i], ys[i])
                rows[r][c] = ("•", style)
        if letter and hi > lo and (ys[hi - 1] > 0 or not log):
            r, c = cell(xs[hi - 1], ys[hi - 1])
            rows[r][c] = (letter, style + " bold reverse")
    if best and x0 <= best[0] <= x1 and (best[1] > 0 or not log):
        r, c = cell(*best)
        rows[r][c] = ("★", "bold yellow")
    labels = {0: y1, h - 1: y0}
    if h >= 5:
        labels[h // 2] = y0 * (y1 / y0) ** 0.5 if log else (y0 + y1) / 2
    lines = [fit(title, width)]
    for i, row in enumerate(rows):
        lines.append([(f"{short(labels[i]) if i in labels else '':>7}", "dim"), ("│", "dim"), *packed(row)])
    return [*lines, [(" " * 7 + "└", "dim"), ("".join(axis)[:w], "dim")]]


# ---- text ----


def short(value, digits: int = 4) -> str:
    """At most about 7 characters: 0.4712, 1.2e-05, 45.2k, NaN, – for unknown."""
    if value is None:
        return "–"
    if not isinstance(value, (int, float)):
        return clean(str(value))
    if not math.isfinite(value):
        return "NaN" if math.isnan(value) else ("Inf" if value > 0 else "-Inf")
    if value == int(value) and abs(value) < 1e5:
        return str(int(value))
    if abs(value) >= 1e4:
        for unit, name in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
            if abs(value) >= unit:
                return f"{value / unit:.4g}{name}" if abs(value) < 1e13 else f"{value:.1e}"
    return f"{value:.1e}" if abs(value) < 1e-3 else f"{value:.{digits}g}"


def human_size(n) -> str:
    if n is None:
        return "N/A"
    for unit in ("B", "K", "M", "G"):
        if abs(n) < 1000:
            return f"{n:.0f}{unit}" if unit in "BK" or abs(n) >= 100 else f"{n:.1f}{unit}"
        n /= 1000
    return f"{n:.1f}T"


def duration(seconds) -> str:
    if seconds is None or not math.isfinite(seconds):
        return "–"
    return (
        f"{int(seconds // 86400)}d{int(seconds % 86400 // 3600):02d}h"
        if seconds >= 360000
        else human_time(seconds)
    )


def percent(value) -> str:
    return "N/A" if value is None else f"{value:.0f}%"


def bar(share, width: int) -> list:
    if share is None:
        return [("·" * width, "dim")]
    full = round(min(max(share, 0), 1) * width)
    style = "red" if share > 0.95 else "green"
    return [("█" * full, style), ("░" * (width - full), "dim")]


STATE_STYLE = {
    "RUNNING": "green",
    "FINISHED": "cyan",
    "DEAD": "bold red",
    "STALE_PID": "bold red",
    None: "dim",
}
LOUD = "bold red reverse"
COLOURS = ("cyan", "yellow", "magenta", "green", "blue", "red", "white")
SMOOTH = (0.0, 0.02, 0.05, 0.15)
VIEWS = ("overview", "run", "overlay", "log", "system", "help")

# key names of Textual | action | what it does. Bindings, footer and help screen all come from this table.
KEYS = (
    ("1", "overview", "Overview: all runs, alarms, one run's numbers"),
    ("2,enter", "run", "Run: curves of the selected run"),
    ("3", "overlay", "Overlay: one curve of several runs"),
    ("4", "log", "Log of the selected run"),
    ("5", "system", "System: GPUs, CPU, RAM, disks"),
    ("question_mark", "help", "Help"),
    ("up,k", "up", "previous run; in a log: scroll up"),
    ("down,j", "down", "next run; in a log: scroll down"),
    ("pageup", "page_up", "a page up"),
    ("pagedown", "page_down", "a page down"),
    ("home,g", "top", "first run, beginning of the log"),
    ("end,G", "bottom", "last run, follow the end of the log"),
    ("space", "mark", "choose the run for the overlay (none chosen: all)"),
    ("m", "metric", "next metric of the overlay"),
    ("f", "focus", "next panel large, then all panels"),
    ("s", "smooth", "smoothing: off, 2, 5, 15 % of the width"),
    ("l", "scale", "logarithmic y axis"),
    ("y", "clip", "y axis without the outer 2 % of points"),
    ("plus,equals_sign", "zoom_in", "zoom in on the latest half"),
    ("minus", "zoom_out", "zoom out"),
    ("0", "zoom_all", "whole run"),
    ("left", "left", "earlier; in a log: scroll left"),
    ("right", "right", "later; in a log: scroll right"),
    ("n", "start", "start a job (asks first)"),
    ("x", "stop", "stop the selected run (asks first)"),
    ("r", "resume", "resume the selected run (asks first)"),
    ("q", "quit", "leave; the jobs go on"),
)
KEY_SIGN = {"question_mark": "?", "plus": "+", "equals_sign": "=", "minus": "-", "pageup": "PgUp",
            "pagedown": "PgDn", "up": "↑", "down": "↓", "left": "←", "right": "→"}  # fmt: skip
FOOTER = {
    "overview": ("run", "mark", "overlay", "log", "start", "stop", "resume", "help", "quit"),
    "run": ("down", "focus", "smooth", "scale", "clip", "zoom_in", "zoom_out", "left", "help", "quit"),
    "overlay": ("metric", "mark", "smooth", "scale", "clip", "zoom_in", "zoom_out", "help", "quit"),
    "log": ("up", "page_up", "top", "bottom", "left", "right", "help", "quit"),
    "system": ("overview", "help", "quit"),
    "help": ("down", "page_down", "overview", "quit"),
}


# ---- views: (fleet, ui, width, height) -> lines; no terminal needed ----


@dataclass
class Ui:
    """What the person looking has chosen."""

    view: str = "overview"
    selected: str | None = None
    marked: set = field(default_factory=set)
    smooth: int = 2
    log: bool = False
    clip: bool = False
    zoom: int = 0  # the visible part is 1 / 2**zoom of the run
    back: float = 0.0  # … and ends this share of the run before its end
    panel: int = 0  # 0: all panels
    metric: int = 0
    message: str = ""
    readonly: bool = False
    pager: Pager | None = None
    height: int = 20  # of the body, for pages
    zones: list = field(default_factory=list)  # (y, x0, x1, action, argument): what a click does


def chosen(fleet: Fleet, ui: Ui) -> Run | None:
    runs = fleet.listed()
    if ui.selected not in fleet.runs:  # first look: what needs attention
        loud = [r for r in runs if any(a[0] for a in r.alarms)]
        live = [r for r in runs if r.status == "RUNNING"]
        ui.selected = (loud + live + runs)[0].name if runs else None
    return next((r for r in runs if r.name == ui.selected), None)


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


def trend(run: Run, n: int) -> str:
    for key in ("loss_48k", "loss", "audio_s_per_s"):
        if (s := run.state.series.get(key)) and len(s.xs) > 1:
            cols = columns(s.xs, s.ys, s.xs[0], s.xs[-1], 2 * n)
            seen = [c[2] for c in cols if c]
            cols = [c and (c[2],) * 3 for c in cols]
            return "".join(c for c, _ in raster([(cols, "")], n, 1, min(seen), max(seen))[0])
    return ""


def best_text(run: Run) -> str:
    best = run.state.best()
    if not best:
        return "–"
    return f"{short(best.get('loss_48k', best.get('loss')))}@{short(best['epoch'])}"


def overview(fleet: Fleet, ui: Ui, width: int, height: int, everything: bool = False) -> list:
    runs, now = fleet.listed(), chosen(fleet, ui)
    if not runs:
        return [
            [(f"No runs in {fleet.log_dir} yet.", "bold")],
            [("Start one: ./launch.sh train 0    (or press n)", "")],
            [("Or name a log: python monitor.py path/to/training.log", "")],
        ]
    name_w = min(max(len(r.name) for r in runs), 20 if width < 110 else 28)
    table = [  # title, width, importance (0 = always), text
        ("run", name_w, 0, lambda r, j: r.name),
        ("state", 9, 0, lambda r, j: j["state"] or "LOG"),
        ("phase", 8, 7, lambda r, j: j["phase"] or "–"),
        ("epoch", 6, 1, lambda r, j: "–" if j["epoch"] is None else f"{j['epoch']}/{short(j['epochs'])}"),
        (
            "step",
            13,
            6,
            lambda r, j: f"{short(j['step'])}/{short(counted(r.state.latest.get('total_steps')))}",
        ),
        ("done", 4, 2, lambda r, j: done(r)),
        ("24k", 6, 3, lambda r, j: short(j["loss_24k"])),
        ("48k", 6, 2, lambda r, j: short(j["loss_48k"] if j["loss_48k"] is not None else j["loss"])),
        ("val 48k", 7, 5, lambda r, j: short(j["val_loss_48k"])),
        ("best@ep", 10, 2, lambda r, j: best_text(r)),
        ("lr", 7, 6, lambda r, j: short(j["lr"])),
        ("audio s/s", 9, 5, lambda r, j: short(r.state.latest.get("audio_s_per_s"))),
        ("ETA", 8, 1, lambda r, j: duration(j["eta_s"])),
        ("GPU", 12, 4, lambda r, j: gpu_text(fleet, r)),
        ("trend", 10, 8, lambda r, j: trend(r, 10)),
    ]
    while sum(c[1] + 1 for c in table) + 3 > width and any(c[2] for c in table):
        table.remove(max(table, key=lambda c: c[2]))
    titles = [f"{c[0]:<{c[1]}}" if i < 2 else f"{c[0]:>{c[1]}}" for i, c in enumerate(table)]
    lines = [[("   " + " ".join(titles), "bold underline")]]
    alarms = [(r, loud, text) for r in runs for loud, text in r.alarms]
    room = len(runs) if everything else max(3, height - 8 - min(len(alarms), max(3, height // 4)))
    at = runs.index(now)
    first = max(0, min(at - room // 2, len(runs) - room))
    for r in runs[first : first + room]:
        j, loud = r.row(), any(a[0] for a in r.alarms)
        back = " reverse" if r is now and not everything else ""
        sign = "!!" if loud else ("* " if r.name in ui.marked else "  ")
        line = [(sign, "bold red" + back), (" ", back.strip())]
        for i, (_, w, _, text) in enumerate(table):
            value = text(r, j)[:w]
            style = STATE_STYLE[j["state"]] if i == 1 else ("bold red" if value in ("NaN", "Inf") else "")
            line += [(f"{value:<{w}}" if i < 2 else f"{value:>{w}}", style + back), (" ", back.strip())]
        ui.zones.append((len(lines), 0, width, "select", r.name))
        lines.append(line)
    if len(runs) > room:
        lines.append([(f"   … {len(runs)} runs, ↑↓ for the others", "dim")])
    if everything:
        return lines + [
            [("!! " if loud else "   ", "bold red"), (f"{r.name}: {text}", "")] for r, loud, text in alarms
        ]
    lines += [[], *details(fleet, now, width)]
    for r, loud, text in alarms:
        for i, part in enumerate(textwrap.wrap(f"{r.name}: {text}", width - 4)[:2]):
            ui.zones.append((len(lines), 0, width, "select", r.name))
            first = ("!! " if loud else " · ") if i == 0 else "   "
            lines.append([(first, "bold red"), (part, "red" if loud else "")])
    if height - len(lines) > 8:
        lines += [[], *grid(now, ui, width, height - len(lines) - 1, len(lines) + 1, panels_of(now)[:2])]
    return lines


def done(run: Run) -> str:
    total, step = run.state.latest.get("total_steps"), run.state.step
    return f"{100 * step / total:.0f}%" if total and step is not None else "–"


def details(fleet: Fleet, run: Run, width: int) -> list:
    """Four lines: everything known about one run."""
    s, j = run.state, run.row()
    val, best, latest = s.vals[-1] if s.vals else {}, s.best() or {}, s.latest
    seg = f" · segment {short(j['segment_length'])} s" if j["segment_length"] else ""
    head = f"── {run.name} ── {run.kind or 'log'}{' ' + run.recipe if run.recipe else ''} "
    first = (
        f"epoch {short(j['epoch'])}/{short(j['epochs'])} · step {short(j['step'])}/"
        f"{short(counted(latest.get('total_steps')))} ({done(run)}) · {j['phase'] or '–'}{seg}"
        f" · ETA {duration(j['eta_s'])}"
    )
    losses = " · ".join(
        f"{label} {short(latest[key])}"
        for key, label in (("loss", "loss"), ("loss_24k", "24k"), ("loss_48k", "48k"), ("ppl", "ppl"),
                           ("bits_per_s", "bits/s"), ("lr", "lr"), ("audio_s_per_s", "audio s/s"),
                           ("skipped", "skipped"))
        if key in latest
    )  # fmt: skip
    third = f"GPU {gpu_text(fleet, run)}"
    if best:
        key, name = ("loss_48k", "48k") if "loss_48k" in best else ("loss", "loss")
        now = (
            f"val 24k {short(val.get('loss_24k'))} 48k {short(val.get('loss_48k'))} · "
            if name == "48k"
            else ""
        )
        at = f"at epoch {short(best['epoch'])} step {best['step']}"
        third = f"{now}best val {name} {short(best[key])} {at} · {third}"
    if s.skips:
        third += f" · {s.skips} steps skipped"
    state = [(j["state"] or "LOG ONLY", STATE_STYLE[j["state"]]), (f" pid {short(j['pid'])}", "")]
    return [
        [(head, "bold"), *state, (" " + "─" * width, "dim")],
        [(first, "")],
        [(losses or (clean(run.last_line or "no line yet")), "")],
        [(third, "")],
    ]


def visible(ui: Ui, last: float, first: float = 0) -> tuple[float, float]:
    """x range shown: zoom and pan, kept inside the run."""
    span = (last - first) / 2**ui.zoom
    x1 = last - min(ui.back, 1 - 0.5**ui.zoom) * (last - first)
    return max(first, x1 - span), x1


def val_series(run: Run, key: str) -> tuple[array, array]:
    points = [(v["step"], v[key]) for v in run.state.vals if key in v and math.isfinite(v[key])]
    return array("I", [p[0] for p in points]), array("f", [p[1] for p in points])


def boundaries(run: Run) -> list[tuple[int, str]]:
    """Where the phase or the segment length changes (the first entry is the run's beginning)."""
    found = []
    for (_, p0, l0), (step, p1, l1) in pairwise(run.state.marks):
        found.append(
            (step, " ".join(([f"{short(l1)}s"] if l1 != l0 else []) + ([str(p1)] if p1 != p0 else [])))
        )
    return found


PANELS = {  # kind -> panels; a panel: title, training curves, validation curves
    "train": (("48 kHz", ("loss_48k",), ("loss_48k",)), ("24 kHz", ("loss_24k",), ("loss_24k",)),
              ("lr", ("lr",), ()), ("LSD val", (), ("lsd_48k", "lsd_12_24k"))),
    "rvq": (("loss", ("loss",), ("loss",)), ("ppl", ("ppl",), ("ppl",)), ("lr", ("lr",), ()),
            ("bits/s", ("bits_per_s",), ("bits_per_s",))),
    "cache": (("audio s/s", ("audio_s_per_s",), ()), ("skipped", ("skipped",), ())),
}  # fmt: skip


def panels_of(run: Run) -> list:
    s, kind = run.state, {"precompute": "cache", None: "train"}.get(run.kind, run.kind)
    drawn = {*s.series, *(f"val {k}" for v in s.vals[-1:] for k in v)}
    found = [p for p in PANELS[kind] if drawn & {*p[1], *(f"val {k}" for k in p[2])}]
    if kind == "train" and len(found) < 4 and "audio_s_per_s" in s.series:
        found.append(PANELS["cache"][0])
    return found or [("loss", ("loss",), ("loss",))]


def panel(run: Run, ui: Ui, width: int, height: int, spec: tuple) -> list:
    """One set of axes with training and validation curves; the title has their latest and best values."""
    (title, train, val), s = spec, run.state
    curves, head, best = [], [(title, "bold")], None
    for key, style in zip(train, COLOURS):
        if key in s.series:
            curves.append((s.series[key].xs, s.series[key].ys, style, False, ""))
            head.append((f" {short(s.latest.get(key, s.series[key].ys[-1:][0]))}", style))
    for key, style in zip(val, COLOURS[len(train) :]):
        xs, ys = val_series(run, key)
        if xs:
            curves.append((xs, ys, style, True, ""))
            low = min(range(len(ys)), key=ys.__getitem__)
            epoch = next((v["epoch"] for v in s.vals if v["step"] == xs[low]), None)
            head += [(f" {'val' if train else key.removeprefix('lsd_')} {short(ys[-1])}", style),
                     (f" best {short(ys[low])}@{short(epoch)}", "bold yellow")]  # fmt: skip
            best = best or (xs[low], ys[low])
    edges = [v["step"] for v in s.vals] + [x for c in s.series.values() if c.xs for x in (c.xs[0], c.xs[-1])]
    span = visible(ui, max(edges, default=1), min(edges, default=0))
    smooth = SMOOTH[ui.smooth] if "lr" not in train else 0
    bad = s.bad if any("loss" in k for k in train) else ()
    return plot(head, curves, width, height, span, ui.log, smooth, ui.clip, boundaries(run), bad, best)


def grid(run: Run, ui: Ui, width: int, height: int, y0: int, specs: list) -> list:
    """Panels two by two (below one another where narrow), as many rows as there is room for."""
    across = 1 if len(specs) == 1 or width < 70 else 2
    down = max(1, min(math.ceil(len(specs) / across), height // 4))
    lines, w = [], width // across
    for d in range(down):
        h, row = height // down + (d < height % down), specs[d * across : (d + 1) * across]
        blocks = [panel(run, ui, w - (across > 1), h, spec) for spec in row]
        for a in range(len(row)):
            for y in range(h):
                ui.zones.append((y0 + len(lines) + y, a * w, (a + 1) * w, "focus", d * across + a + 1))
        lines += [
            [part for b in blocks for part in (*fit(b[y], w - (across > 1)), (" ", ""))] for y in range(h)
        ]
    return lines


def run_view(fleet: Fleet, ui: Ui, width: int, height: int) -> list:
    run = chosen(fleet, ui)
    if run is None:
        return [[("No run selected.", "")]]
    s, tail, specs = run.state, run.metrics or run.text, panels_of(run)
    if ui.panel:
        specs = [specs[(ui.panel - 1) % len(specs)]]
    notes = [f"smooth {SMOOTH[ui.smooth]:.0%}"] if ui.smooth else ["not smoothed"]
    notes += ["log y"] * ui.log + ["clipped y"] * ui.clip + [f"zoom {2**ui.zoom}x"] * (ui.zoom > 0)
    if tail and tail.before:
        part = 100 - 100 * tail.before // max(1, tail.pos)
        notes.append(
            f"latest {human_size(tail.first - tail.before)} only" if run.history_cut() else f"reading {part}%"
        )
    notes += [f"× {len(s.bad)} not finite"] * (len(s.bad) > 0)
    lines = details(fleet, run, width)
    lines.append([("★ best  • validation  ┊ new phase or segment  ", "dim"), (" · ".join(notes), "cyan")])
    for loud, text in run.alarms[:2]:
        lines.append([("!! " if loud else " · ", "bold red"), (text, "red" if loud else "")])
    return lines + grid(run, ui, width, height - len(lines), len(lines), specs)


def overlay_metrics(runs: list[Run]) -> list[str]:
    train = {k for r in runs for k in r.state.series}
    val = {f"val {k}" for r in runs for v in r.state.vals[-1:] for k in v if k not in NOT_CURVES}
    order = ["loss_48k", "loss_24k", "loss", "val loss_48k", "val loss_24k"]
    return [m for m in order if m in train | val] + sorted((train | val) - set(order))


def overlay(fleet: Fleet, ui: Ui, width: int, height: int) -> list:
    runs = [r for r in fleet.listed() if r.name in ui.marked] or fleet.listed()
    metrics = overlay_metrics(runs)
    if not metrics:
        return [[("Nothing to draw yet: no run has numbers. Choose runs with space in the overview.", "")]]
    metric = metrics[ui.metric % len(metrics)]
    curves, legend = [], []
    for run in runs:
        if metric.startswith("val "):
            xs, ys = val_series(run, metric[4:])
        elif metric in run.state.series:
            xs, ys = run.state.series[metric].xs, run.state.series[metric].ys
        else:
            continue
        if not xs:
            continue
        style, letter = COLOURS[len(curves) % len(COLOURS)], chr(ord("a") + len(curves) % 26)
        curves.append((xs, ys, style, metric.startswith("val "), letter))
        low = min(range(len(ys)), key=ys.__getitem__)
        legend.append([(letter, style + " bold reverse"), (f" {run.name:<20.20} ", style),
                       (f"now {short(ys[-1])}  lowest {short(ys[low])} at step {xs[low]}", "")])  # fmt: skip
    if not curves:
        return [[(f"No chosen run has {metric}; m for the next metric.", "")]]
    shown = legend[: max(1, height // 3)]
    if len(legend) > len(shown):
        shown[-1] = [(f"  … {len(legend) - len(shown) + 1} more; choose with space in the overview", "dim")]
    note = f"  {ui.metric % len(metrics) + 1} of {len(metrics)} metrics, m next"
    title = [(metric, "bold"), (note, "dim"), ("  log y" if ui.log else "", "cyan"),
             (f"  smooth {SMOOTH[ui.smooth]:.0%}" if ui.smooth else "", "cyan"),
             (f"  zoom {2**ui.zoom}x" if ui.zoom else "", "cyan")]  # fmt: skip
    span = visible(ui, max(c[0][-1] for c in curves), min(c[0][0] for c in curves))
    body = plot(title, curves, width, height - len(shown), span, ui.log, SMOOTH[ui.smooth], ui.clip)
    return body + shown


def log_view(fleet: Fleet, ui: Ui, width: int, height: int) -> list:
    run = chosen(fleet, ui)
    path = run and (run.log if run.log and run.log.exists() else run.metrics_path())
    if not path:
        return [[("This run has no log.", "")]]
    if ui.pager is None or ui.pager.path != path:
        ui.pager = Pager(path)
    pager = ui.pager
    lines = pager.page(height - 1)
    c = pager.column
    where = [(" following the end ", "green")] if pager.top is None else [(f" {pager.percent()}% ", "")]
    if pager.top is not None and pager.new:
        where = [*where, (f" {pager.new} new line{'s' * (pager.new != 1)} below, G or End follows ", LOUD)]
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
    used, total = fleet.ram or (None, None)
    b = max(6, min(24, width // 6))
    cpu = fleet.cpu_percent
    lines = [
        [("CPU  ", "bold"), *bar(None if cpu is None else cpu / 100, b),
         (f" {percent(cpu):>5} of {os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}", "")],
        [("RAM  ", "bold"), *bar(used / total if total else None, b),
         (f" {percent(total and 100 * used / total):>5} {human_size(used)} of {human_size(total)}", "")],
    ]  # fmt: skip
    disks = {}
    for r in fleet.listed():
        if r.disk:
            disks.setdefault(r.disk[2], (r.run_dir or r.folder, r.disk))
    for folder, (taken, free, all_) in disks.values():
        share = taken / max(1, taken + free)
        text = f" {percent(100 * share):>5} {human_size(free)} free of {human_size(all_)}  {folder}"
        lines.append([("Disk ", "bold"), *bar(share, b), (text, "")])
    lines.append([])
    if not fleet.gpus:
        lines.append([("GPU  ", "bold"), (f"N/A ({fleet.sampler.error or 'none found'})", "yellow")])
    for g in fleet.gpus:
        share = g["mem_used"] / g["mem_total"] if g["mem_used"] is not None and g["mem_total"] else None
        util = g["util_percent"]
        power = "N/A" if g["power_w"] is None else f"{g['power_w']:.0f} W"
        temp = "N/A" if g["temp_c"] is None else f"{g['temp_c']:.0f} °C"
        lines.append([(f"GPU {g['index']} ", "bold"), *bar(None if util is None else util / 100, b // 2),
                      (f" {percent(util):>4}  mem ", ""), *bar(share, b // 2),
                      (f" {human_size(g['mem_used'])}/{human_size(g['mem_total'])}  {power}  {temp}  ", ""),
                      (g["name"] or "N/A", "dim")])  # fmt: skip
        for p in g["processes"]:
            lines.append([(f"      pid {p['pid']:<8} {human_size(p['mem']):>6}  ", ""),
                          (p["run"] or "not one of these runs", "green" if p["run"] else "dim")])  # fmt: skip
    if fleet.gpus and fleet.sampler.error:
        lines.append([(f"NVML: {fleet.sampler.error}", "yellow")])
    lines += [[], [("run                   state     pid      GPU use, memory", "bold underline")]]
    for r in fleet.listed():
        if r.status == "RUNNING":
            lines.append([(f"{r.name:<21.21} {r.status:<9} {short(r.pid):<8} {gpu_text(fleet, r)}", "")])
    return lines


def sign(keys: str) -> str:
    return " ".join(KEY_SIGN.get(k, k.capitalize() if len(k) > 1 else k) for k in keys.split(","))


def help_view(fleet: Fleet, ui: Ui, width: int, height: int) -> list:
    limits = fleet.limits
    keys = [[(f" {sign(k):<9}", "bold cyan"), (f"{text}", "")] for k, _, text in KEYS]
    notes = [
        "ALARMS",
        "DEAD       process gone without an end; the reason beside it",
        "STALE_PID  the PID now belongs to another process",
        "NaN        a loss that is not finite in the last 50 lines",
        "SKIP       steps the trainer skipped in the last 50",
        f"DIVERGING  median of 20 losses over {limits.diverge:g}x its lowest",
        f"STALL      no new line for {human_time(limits.stall_s)} and 20 usual gaps",
        f"DISK       under {limits.disk_gb:g} GB or 3 checkpoints free",
        "",
        "best@ep    lowest validation loss @ its epoch",
        "24k 48k    loss of each head; val: fixed validation crops",
        "audio s/s  seconds of audio trained on per second",
        "GPU        index, use, memory of the run (*: of the GPU)",
        "Mouse: click a tab, a run, a panel, a key; wheel scrolls.",
    ] + (["", "--readonly: start, stop and resume are off."] if ui.readonly else [])
    texts = [[(n, "bold" if n == "ALARMS" else "")] for n in notes]
    if width >= 116:
        rows = max(len(keys), len(texts))
        keys, texts = keys + [[]] * (rows - len(keys)), texts + [[]] * (rows - len(texts))
        lines = [[*fit(k, 58), (" ", ""), *t] for k, t in zip(keys, texts)]
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
    loud = [(r, text) for r in fleet.listed() for is_loud, text in r.alarms if is_loud]
    if loud:
        run, text = loud[0]
        alarm = [
            (f" !! {len(loud)} alarm{'s' * (len(loud) > 1)} ", LOUD),
            (f" {run.name}: {text}", "bold red"),
        ]
        zones.append((1, 0, width, "select", run.name))
    else:
        alarm = [
            (" no alarms ", "green"),
            (f" {sum(r.status == 'RUNNING' for r in fleet.runs.values())} running", ""),
        ]
    footer, x = [], 0
    for action in FOOTER[ui.view]:
        keys = next(k for k, a, _ in KEYS if a == action)
        if ui.readonly and action in ("start", "stop", "resume"):
            continue
        for text, style in (
            (f" {sign(keys).split()[0]}", "bold cyan"),
            (f" {action.replace('_', ' ')} ", ""),
        ):
            footer.append((text, style))
            zones.append((height - 1, x, x + len(text), action, None))
            x += len(text)
    if ui.message:
        footer = [(f" {clean(ui.message)} ", "bold yellow reverse")]
    ui.zones = zones
    body = [*body[: ui.height], *[[]] * (ui.height - len(body))]
    return [fit(line, width) for line in (tabs, alarm, *body, footer)]


def act(fleet: Fleet, ui: Ui, action: str, arg=None) -> list[str] | None:
    """One key or click. Returns the launcher's arguments where a confirmation is wanted."""
    ui.message = ""
    run, names = chosen(fleet, ui), [r.name for r in fleet.listed()]
    jump = {"up": -1, "down": 1, "page_up": -(ui.height - 2), "page_down": ui.height - 2, "top": -(10**9),
            "bottom": 10**9}.get(action)  # fmt: skip
    if action in VIEWS:
        ui.view, ui.panel = action, 0
    elif action == "select":
        ui.selected = arg
    elif jump is not None and ui.view == "log":
        if ui.pager and action in ("top", "bottom"):
            ui.pager.top = 0 if action == "top" else None
            ui.pager.counted = ui.pager.size()
        elif ui.pager:
            ui.pager.scroll(jump, ui.height - 1)
    elif jump is not None and ui.view == "help":
        ui.panel = max(0, ui.panel + jump)
    elif jump is not None and names:
        ui.selected = names[min(max(0, names.index(run.name) + jump), len(names) - 1)]
    elif action == "mark" and run:
        ui.marked ^= {run.name}
    elif action == "metric":
        ui.metric += 1
    elif action == "focus":
        ui.panel = (0 if ui.panel else arg) if arg else (ui.panel + 1) % 5
    elif action == "smooth":
        ui.smooth = (ui.smooth + 1) % len(SMOOTH)
    elif action == "scale":
        ui.log = not ui.log
    elif action == "clip":
        ui.clip = not ui.clip
    elif action in ("zoom_in", "zoom_out", "zoom_all"):
        ui.zoom = {"zoom_in": min(ui.zoom + 1, 12), "zoom_out": max(ui.zoom - 1, 0)}.get(action, 0)
        ui.back = min(ui.back, 1 - 0.5**ui.zoom)
    elif action in ("left", "right") and ui.view == "log" and ui.pager:
        ui.pager.column = max(0, ui.pager.column + (20 if action == "right" else -20))
    elif action in ("left", "right"):
        ui.back += (1 if action == "left" else -1) * 0.25 / 2**ui.zoom
        ui.back = min(max(0.0, ui.back), 1 - 0.5**ui.zoom)
    elif action in ("start", "stop", "resume"):
        if ui.readonly:
            ui.message = f"--readonly: {action} is off"
        elif action == "start":
            return ["train", "0"]
        elif run is None or not run.folder:
            ui.message = f"{action}: select a run that launch.sh started"
        elif action == "stop" and run.status != "RUNNING":
            ui.message = f"{run.name} is not running"
        elif action == "resume" and run.status == "RUNNING":
            ui.message = f"{run.name} is running already"
        else:
            return [action, run.name]
    return None


# ---- terminal (the only part that needs textual) ----


def make_app(fleet: Fleet, ui: Ui, launcher: Path, refresh_s: float = 1.0, bell: bool = True):
    """The Textual app. It repaints only the stretch of each line that changed: little goes over SSH."""
    from rich.segment import Segment
    from rich.style import Style
    from textual.app import App
    from textual.binding import Binding
    from textual.geometry import Region
    from textual.message import Message
    from textual.screen import ModalScreen
    from textual.strip import Strip
    from textual.widget import Widget
    from textual.widgets import Input, Static

    class Polled(Message):
        """New data (posted by the thread that reads)."""

    class Pane(Widget, can_focus=True):
        lines: list = []  # noqa: RUF012

        def show(self, lines: list) -> None:
            old, self.lines = self.lines, lines
            for y, line in enumerate(lines):
                if y >= len(old) or old[y] != line:
                    a, b = "".join(t for t, _ in old[y]) if y < len(old) else "", "".join(t for t, _ in line)
                    styles = y < len(old) and [(len(t), s) for t, s in old[y]] == [
                        (len(t), s) for t, s in line
                    ]
                    first = next((i for i, (p, q) in enumerate(zip(a, b)) if p != q), 0) if styles else 0
                    last = next((i for i in range(len(b)) if a[-1 - i] != b[-1 - i]), 0) if styles else 0
                    self.refresh(Region(first, y, len(b) - first - last, 1))

        def render_line(self, y: int) -> Strip:
            if y >= len(self.lines):
                return Strip.blank(self.size.width, Style.null())
            strip = Strip([Segment(t, Style.parse(s)) for t, s in self.lines[y]])
            return strip.adjust_cell_length(self.size.width, Style.null())

        def on_click(self, event) -> None:
            for y, a, b, action, arg in self.app.ui.zones:
                if y == event.y and a <= event.x < b:
                    self.app.do(action, arg)
                    break

        def on_mouse_scroll_up(self) -> None:
            self.app.do("zoom_out" if ui.view in ("run", "overlay") else "up")

        def on_mouse_scroll_down(self) -> None:
            self.app.do("zoom_in" if ui.view in ("run", "overlay") else "down")

        def on_resize(self) -> None:
            self.app.paint()

    class Ask(ModalScreen):
        """`edit`: a line to complete; else yes or no."""

        CSS = """Ask { align: center middle; }
        #box { width: 70; max-width: 95%; height: auto; border: heavy ansi_yellow; padding: 0 1; }
        #box Static { height: auto; } Input { border: none; height: 1; padding: 0; }"""
        BINDINGS = [Binding("y", "answer(True)"), Binding("n,escape", "answer(False)")]  # noqa: RUF012

        def __init__(self, question: str, edit: str | None = None):
            super().__init__()
            self.question, self.edit = question, edit

        def compose(self):
            from textual.containers import Vertical

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

    class Monitor(App):
        CSS = "Pane { width: 100%; height: 100%; }"
        ENABLE_COMMAND_PALETTE = False
        BINDINGS = [Binding(k, f"do('{action}')", text, show=False) for k, action, text in KEYS]  # noqa: RUF012

        def __init__(self):
            super().__init__(ansi_color=True)  # the terminal's own 16 colours, none under NO_COLOR
            self.theme = "ansi-dark"
            self.fleet, self.ui, self.pane = fleet, ui, Pane()
            self.stopping, self.heard = threading.Event(), set()

        def compose(self):
            yield self.pane

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
                    fleet.poll()
                    self.post_message(Polled())
                    while fleet.load_older(0.05) and time.monotonic() - start < refresh_s:
                        self.stopping.wait(0.02)
                except Exception as e:  # a file in a shape nobody thought of: say so, keep the window
                    ui.message = f"reading failed: {type(e).__name__}: {e}"
                    self.post_message(Polled())
                self.stopping.wait(max(0.05, refresh_s - (time.monotonic() - start)))

        def on_polled(self) -> None:
            self.paint()
            with fleet.lock:
                loud = {
                    (r.name, text.split()[0]) for r in fleet.listed() for is_loud, text in r.alarms if is_loud
                }
            if loud - self.heard and bell:
                self.bell()
            self.heard = loud

        def paint(self) -> None:
            width, height = self.pane.size
            if width >= 20 and height >= 8:
                with fleet.lock:
                    self.pane.show(draw(fleet, ui, width, height))

        def action_do(self, action: str) -> None:
            self.do(action)

        def do(self, action: str, arg=None) -> None:
            if action == "quit":
                self.exit()
                return
            with fleet.lock:
                command = act(fleet, ui, action, arg)
            self.paint()
            if command and action == "start":
                question = "Start: precompute | cache | train | rvq, GPUs (0 or 0,1 or cpu), more flags"
                self.push_screen(Ask(question, " ".join(command)), self.confirm_text)
            elif command:
                self.confirm(command)

        def confirm_text(self, text) -> None:
            if text:
                self.confirm(shlex.split(text))

        def confirm(self, command: list[str]) -> None:
            def answer(yes) -> None:
                if yes:
                    ui.message = f"running {launcher.name} {shlex.join(command)} …"
                    self.paint()
                    threading.Thread(target=self.launch, args=(command,), daemon=True).start()

            self.push_screen(Ask(f"Run this?\n\n  {launcher} {shlex.join(command)}\n"), answer)

        def launch(self, command: list[str]) -> None:
            try:
                p = subprocess.run([launcher, *command], cwd=launcher.parent, capture_output=True, text=True,
                                   stdin=subprocess.DEVNULL, errors="replace",
                                   env={**os.environ, "LOG_DIR": str(fleet.log_dir.resolve())})  # fmt: skip
                said = [x for x in (p.stderr + "\n" + p.stdout).splitlines() if x.strip()]
                how = "done" if p.returncode == 0 else f"FAILED (exit {p.returncode})"
                ui.message = f"{how}: {said[0] if said else shlex.join(command)}"
            except OSError as e:
                ui.message = f"{launcher} could not be run: {e.strerror}"
            self.post_message(Polled())

    return Monitor()


def drawn_dots(svg: str) -> str:
    """Braille as small squares, and no font from the net: the picture looks the same everywhere."""
    text = re.compile(
        r'<text class="([^"]+)" x="([\d.]+)" y="([\d.]+)"([^>]*)>([^<]*[\u2801-\u28ff][^<]*)</text>'
    )

    def squares(m):
        x, y, path = float(m[2]), float(m[3]), []
        for i, c in enumerate(html.unescape(m[5])):
            for r, c2 in ((r, c2) for r in range(4) for c2 in range(2) if "\u2800" < c <= "\u28ff"):
                if ord(c) & DOTS[r][c2]:
                    path.append(f"M{x + 12.2 * i + 1.6 + 6.1 * c2:.1f} {y - 17.5 + 6.15 * r:.1f}h3v3h-3z")
        kept = re.sub("[\u2800-\u28ff]", "&#160;", m[5])
        d = "".join(path)
        return f'<path class="{m[1]}" d="{d}"/><text class="{m[1]}" x="{m[2]}" y="{m[3]}"{m[4]}>{kept}</text>'

    svg = re.sub(r"@font-face \{.*?\}", "", svg, flags=re.S).replace("Fira Code", "DejaVu Sans Mono")
    return text.sub(squares, svg)


def export(fleet: Fleet, folder: Path, sizes=((80, 24), (120, 40))) -> list[Path]:
    """A picture (SVG) and a text of every view at each size, drawn by the app itself without a terminal."""
    import asyncio

    folder.mkdir(parents=True, exist_ok=True)
    written = []

    async def pictures(width, height):
        app = make_app(fleet, Ui(), Path("launch.sh"))
        async with app.run_test(size=(width, height)) as pilot:
            for view in VIEWS:
                app.do(view)
                await pilot.pause()
                base = folder / f"monitor_{view}_{width}x{height}"
                svg = drawn_dots(app.export_screenshot(title="monitor.py"))
                base.with_suffix(".svg").write_text(svg, encoding="utf-8")
                text = "\n".join("".join(t for t, _ in line).rstrip() for line in app.pane.lines)
                base.with_suffix(".txt").write_text(text + "\n", encoding="utf-8")
                written.extend([base.with_suffix(".svg"), base.with_suffix(".txt")])

    for width, height in sizes:
        asyncio.run(pictures(width, height))
    return written


# ---- main ----


def main() -> int:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("files", nargs="*", help="log files or run directories to watch besides --log_dir")
    beside = Path(__file__).resolve().with_name("logs")  # where launch.sh writes from wherever it is called
    log_dir = os.environ.get("LOG_DIR") or (
        "logs" if Path("logs").is_dir() or not beside.is_dir() else beside
    )
    p.add_argument("--log_dir", default=log_dir, help="where launch.sh keeps NAME.{log,pid,json}")
    p.add_argument("--once", action="store_true", help="print the overview as text and leave")
    p.add_argument("--json", action="store_true", help="print everything as one JSON object and leave")
    p.add_argument("--readonly", action="store_true", help="forbid start, stop and resume")
    p.add_argument("--export", metavar="DIR", help="write a picture (SVG) and a text of every view and leave")
    launcher = Path(__file__).resolve().with_name("launch.sh")
    p.add_argument("--launcher", default=launcher, type=Path, help="script that starts, stops, resumes")
    p.add_argument("--refresh_s", type=float, default=1.0, help="seconds between two looks at the files")
    p.add_argument("--quiet", action="store_true", help="no bell when an alarm appears")
    limits = Limits()
    p.add_argument("--stall_s", type=float, default=limits.stall_s, help="alarm: seconds without a new line")
    p.add_argument("--diverge", type=float, default=limits.diverge, help="alarm: loss over its lowest")
    p.add_argument(
        "--disk_gb", type=float, default=limits.disk_gb, help="alarm: GB free where checkpoints go"
    )
    a = p.parse_args()
    fleet = Fleet(a.log_dir, a.files, Limits(a.stall_s, a.diverge, a.disk_gb))
    start = time.monotonic()
    fleet.poll()
    if a.once or a.json or a.export:
        if a.export:
            fleet.load_older(60)
        for run in fleet.runs.values():
            run.load_events()
            run.judge(fleet.mono(), fleet.limits)
        time.sleep(max(0.0, 0.05 - (time.monotonic() - start)))  # the CPU meter needs two looks
        fleet.cpu_percent = fleet.cpu.percent() if fleet.cpu_percent is None else fleet.cpu_percent
    if a.json:
        json.dump(fleet.report(), sys.stdout, indent=2, allow_nan=False)
        print()
    elif a.once:
        width = shutil.get_terminal_size((120, 24)).columns
        for line in overview(fleet, Ui(), width, 10**6, everything=True):
            print("".join(t for t, _ in line).rstrip())
        used, total = fleet.ram or (None, None)
        gpus = ", ".join(
            f"{g['index']} {percent(g['util_percent'])} {human_size(g['mem_used'])}" for g in fleet.gpus
        )
        print(f"CPU {percent(fleet.cpu_percent)} · RAM {human_size(used)}/{human_size(total)} · disk free "
              f"{human_size(fleet.disk_free())} · GPU {gpus or 'N/A'}")  # fmt: skip
    elif a.export:
        for path in export(fleet, Path(a.export)):
            print(path)
    else:
        if not sys.stdout.isatty():
            raise UserError("no terminal here; use --once or --json in scripts")
        try:
            app = make_app(fleet, Ui(readonly=a.readonly), a.launcher.resolve(), a.refresh_s, not a.quiet)
        except ImportError as e:
            raise UserError(f"{e}; pip install textual, or use --once") from None
        app.run()
    return 0


if __name__ == "__main__":
    main_guard(main)
