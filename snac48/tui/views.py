"""The window of monitor.py: parsing, run state, plots, views, app."""

import json
import math
import os
import re
import shlex
import shutil
import subprocess
import textwrap
import threading
import time
from array import array
from bisect import bisect_left, bisect_right
from collections import deque
from dataclasses import dataclass, field
from itertools import islice, pairwise
from pathlib import Path

from ..runlog import UserError, finite_json, human_time

TAIL_BYTES = 1 << 18  # read before the first paint; what lies before comes in afterwards
CHUNK = 1 << 19  # bytes of history read in one go
HISTORY_BYTES = 1 << 26  # what lies further back is left unread (500,000 lines of a log)
CURVES = 64  # per run
POINTS = 1 << 18  # per curve; beyond, groups of 8 keep their lowest and highest
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
REASONS = {0: "finished", 3: "stopped", 4: "diverged", 5: "bad input"}  # by exit code, where none is given
NOT_CURVES = {"t", "step", "total_steps", "epoch", "epochs", "segment_length", "eta_s", "best"}
CONTROL = dict.fromkeys([*range(32), *range(127, 160)], "·") | {9: " "}  # a log must not drive the terminal
ESCAPES = re.compile(r"\x1b(?:\[[0-9;?]*[ -/]*[@-~]|\][^\x07\x1b]*(?:\x07|\x1b\\)?|.)")


def clean(text) -> str:
    return ESCAPES.sub("", str(text)).translate(CONTROL)


def number(value) -> float | None:
    """float of a number or of "0.5", "NaN", "Infinity", "3:10:11" (seconds); None for anything else."""
    if isinstance(value, str) and re.fullmatch(r"(\d+:)?\d+:\d\d", value):
        return float(sum(60**i * int(x) for i, x in enumerate(reversed(value.split(":")))))
    try:
        return None if isinstance(value, bool) else float(value)
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
        return parse_json(line)
    if m := STEP_LINE.search(line):
        step, total, epoch, epochs, phase, rest = m.groups()
        record = {"step": int(step), "total_steps": int(total), "epoch": int(epoch), "epochs": int(epochs)}
        record["phase"], words = phase, rest.split()
        pairs = zip(words[::2], words[1::2])
    elif m := SUMMARY.search(line):
        record = {"epoch": int(m[1]), "event": "val" if m[3] == "Val" else "epoch"}
        record |= {"epochs": int(m[2])} if m[2] else {}
        pairs = PAIR.findall(m[4])
    elif m := BAR.search(line):
        n, total, left, epoch = int(m[1]), int(m[2]), number(m[4]), EPOCH.search(line)
        record = {"step": n, "total_steps": total}
        if epoch:  # the bar counts batches of one epoch
            e, epochs = int(epoch[1]), int(epoch[2] or 0)
            record = {"step": max(0, e - 1) * total + n, "epoch": e}
            record |= {"epochs": epochs, "total_steps": epochs * total} if epochs else {}
            left = left + (epochs - e) * (left + number(m[3])) if epochs and left is not None else None
        record |= {} if left is None else {"eta_s": left}
        pairs = PAIR.findall(m[5])
    else:
        return None
    for key, value in pairs:
        if (value := number(value)) is not None:
            record.setdefault(KEYS_SEEN_AS.get(key.lower(), key.lower()), value)
    return record


def parse_json(line: str) -> dict | None:
    try:
        record = json.loads(line)
    except (ValueError, RecursionError):
        return None
    if not isinstance(record, dict):
        return None
    if isinstance(record.get("ce"), list):  # train_rvq.py: cross-entropy of each codebook
        record |= {f"ce_{k}": v for k, v in enumerate(record.pop("ce")[:32])}
    if '"NaN"' in line or 'Infinity"' in line:
        for k, v in record.items():
            if isinstance(v, str) and v in ("NaN", "Infinity", "-Infinity"):
                record[k] = float(v)
    if "files" in record:  # precompute's name for it
        record.setdefault("total_steps", record["files"])
    return record


# ---- state of one run ----


class Series:
    """One curve: x ascending, y finite."""

    __slots__ = ("xs", "ys")

    def __init__(self, points=()):
        self.xs, self.ys = array("I", [x for x, _ in points]), array("f", [y for _, y in points])

    def cut(self, x: int) -> None:
        i = bisect_left(self.xs, x)
        del self.xs[i:], self.ys[i:]

    def thin(self) -> None:
        kept = []
        for i in range(0, len(self.xs), 8):
            group = self.ys[i : i + 8]
            kept += sorted({i + group.index(min(group)), i + group.index(max(group))})
        self.xs, self.ys = (array(a.typecode, [a[i] for i in kept]) for a in (self.xs, self.ys))


class RunState:
    """What the records of one run add up to. Steps that come again (resume, restart) replace the old ones."""

    LATEST = ("epoch", "epochs", "total_steps", "segment_length", "loss", "loss_24k", "loss_48k",
              "lr", "eta_s", "audio_s_per_s", "ppl", "bits_per_s", "skipped")  # fmt: skip

    def __init__(self):
        self.raw: dict = {}  # the latest value of every key, as it came
        self.series: dict[str, Series] = {}
        self.vals: list[dict] = []
        self.marks: list[tuple] = []  # (step, phase, segment_length) where these changed
        self.bad = array("I")  # steps whose loss was not finite
        self.skips, self.skip_reason = 0, None
        self.recent: deque = deque(maxlen=50)  # per step line "", "nan" or "skip"
        self.pace: deque = deque(maxlen=20)  # (t, step)
        self.window: deque = deque(maxlen=20)  # losses, for the divergence alarm
        self.lowest: dict = {}  # (phase, segment_length) -> lowest median of 20 losses
        self.step: int | None = None
        self.end: dict | None = None
        self.records = 0

    def feed(self, r: dict) -> None:
        self.records += 1
        event, step = r.get("event"), counted(r.get("step"))
        if event in ("start", "resume"):
            self.end = None
            for q in (self.window, self.recent, self.pace):
                q.clear()
            self.raw |= {k: r[k] for k in ("epochs", "total_steps", "recipe", "kind") if r.get(k) is not None}
            if step is not None:
                self.rewind(step + (event == "resume"))
        elif event == "end":
            reason = r.get("reason") or REASONS.get(r.get("code"), f"exit code {r.get('code')}")
            self.end = r | {"reason": clean(reason)}
        elif event == "skip":
            self.skips, self.skip_reason = self.skips + 1, clean(r.get("reason"))
            self.recent.append("skip")
        elif event == "val":
            x = next((x for x in (step, self.step, counted(r.get("epoch"))) if x is not None), 0)
            self.vals = [v for v in self.vals if v["step"] < x]  # validated again after a resume
            r = {"loss": r.get("val_loss"), **r}  # rvq's name for it
            values = {k: n for k, v in r.items() if k not in NOT_CURVES and (n := number(v)) is not None}
            # losses that were the lowest so far, as the trainer counts (a decoder that is fed more than
            # codes is never the best); None: it doesn't say
            best = r["best"] if isinstance(r.get("best"), list) else None
            self.vals.append({**values, "step": x, "epoch": counted(r.get("epoch")), "best": best})
        elif event == "usage":  # of the codebooks, over an epoch
            self.draw(step or 0, r)
        elif event == "epoch":  # `[Train]` summary of older logs: a point only where there are no step lines
            if self.step is None or "by_epoch" in self.raw:
                self.raw |= {**r, "by_epoch": True}
                self.point(counted(r.get("epoch")) or 0, r)
        elif event is None:
            self.raw.update(r if None not in r.values() else {k: v for k, v in r.items() if v is not None})
            if step is not None:
                self.point(step, r)

    @property
    def latest(self) -> dict:
        """The latest values that are shown: numbers, and the phase's name."""
        found = {k: n for k in self.LATEST if (n := number(self.raw.get(k))) is not None}
        if self.raw.get("phase") is not None:
            found["phase"] = clean(self.raw["phase"])[:24]
        return found

    def point(self, step: int, r: dict) -> None:
        if self.step is not None and step < self.step:
            self.rewind(step)
        self.step, self.end = step, None
        mark = (str(self.raw.get("phase") or "")[:24], number(self.raw.get("segment_length")))
        if not self.marks or self.marks[-1][1:] != mark:
            self.marks.append((step, *mark))
            self.window.clear()
        bad = self.draw(step, r)
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

    def draw(self, step: int, r: dict) -> bool:
        """Add the numbers of a record to their curves. True when a loss among them is not finite."""
        bad, series = False, self.series
        for key, y in r.items():  # runs for every line of a long history: kept lean
            if (type(y) is not float and type(y) is not int) or key in NOT_CURVES:
                continue
            if not -3e38 < y < 3e38:
                bad |= "loss" in key
            elif key in series or len(series) < CURVES:
                s = series.get(key) or series.setdefault(key, Series())
                s.xs.append(step)
                s.ys.append(y)
                if len(s.xs) > POINTS:
                    s.thin()
        return bad

    def rewind(self, step: int) -> None:
        """Forget what lies at `step` or later: it was trained again."""
        for s in self.series.values():
            s.cut(step)
        self.vals = [v for v in self.vals if v["step"] < step]
        self.marks = [m for m in self.marks if m[0] < step]
        self.bad = array("I", [b for b in self.bad if b < step])
        if self.step is not None and self.step >= step:
            self.step = max((s.xs[-1] for s in self.series.values() if s.xs), default=None)

    @property
    def judged(self) -> str:
        """What validations are compared by: the 48 kHz head, else `loss` (24 kHz alone, rvq)."""
        return "loss_48k" if any("loss_48k" in v for v in self.vals) else "loss"

    def best(self, key: str = "") -> dict | None:
        """The validation of the lowest `key`, of those that the trainer counts where it says so."""
        key = key or self.judged
        found = [v for v in self.vals if math.isfinite(v.get(key, math.nan))]
        found = [v for v in found if v["best"] is None or key in v["best"]] or found
        return min(found, key=lambda v: v[key], default=None)

    def val_series(self, key: str) -> Series:
        return Series([(v["step"], v[key]) for v in self.vals if math.isfinite(v.get(key, math.nan))])

    def usual_gap(self) -> float | None:
        """Median seconds between step lines; a clock set back is left out."""
        gaps = sorted(b - a for (a, _), (b, _) in pairwise(self.pace) if b > a)
        return gaps[len(gaps) // 2] if gaps else None


# ---- files that grow ----


def read_at(path: Path, start: int, size: int) -> bytes:
    try:
        with open(path, "rb") as f:
            f.seek(start)
            return f.read(size)
    except OSError:
        return b""


class Tailer:
    """New lines of a file that is rotated, truncated, half-written. `\\r` ends a line too (tqdm's bar).

    Starts `tail` bytes before the end; `before` is the offset of what was left unread.
    """

    def __init__(self, path: Path, tail: int = TAIL_BYTES):
        self.path, self.tail = path, tail
        self.file = self.id = None
        self.begin()

    def begin(self, at: int = 0) -> None:
        self.pos = self.before = at
        self.partial, self.skipping, self.mark = b"", False, b""

    def open(self) -> bool:
        try:
            self.file = open(self.path, "rb")
        except OSError:
            return False
        st = os.fstat(self.file.fileno())
        first, self.id, start = self.id is None, (st.st_dev, st.st_ino), st.st_size - self.tail
        self.begin()
        if first and start > 0:
            self.file.seek(start)
            self.begin(start + self.file.read(self.tail).find(b"\n") + 1)
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
        self.file.seek(self.pos - len(self.mark))
        if self.file.read(len(self.mark)) != self.mark:  # truncated, even where it has grown past us again
            self.begin()
        self.file.seek(self.pos)
        data = self.file.read(limit)
        self.pos += len(data)
        self.mark = (self.mark + data)[-64:]
        pieces = re.split(rb"[\r\n]+", self.partial + data)
        self.partial = pieces.pop()
        if self.skipping and pieces:
            pieces, self.skipping = pieces[1:], False
        if self.skipping or len(self.partial) > LONGEST:
            self.partial, self.skipping = b"", True
        return [p.decode("utf-8", "replace") for p in pieces if p and len(p) <= LONGEST]


class Pager:
    """A window of a log of any size: only byte offsets are kept, lines are looked up around them."""

    BLOCK = 1 << 16  # a longer line is shown in pieces

    def __init__(self, path: Path):
        self.path, self.top, self.column = path, None, 0  # top None: follow the end
        self.new = self.counted = 0

    def size(self) -> int:
        return os.path.getsize(self.path) if os.path.exists(self.path) else 0

    def start_before(self, end: int, n: int) -> int:
        """Offset of the n-th line before `end` (a line's start, or the size), or of the first there is."""
        starts: list[int] = []
        while end > 0 and len(starts) < n:
            base = max(0, end - self.BLOCK)
            data = read_at(self.path, base, end - base - 1)  # the last byte ends the last line, or is of it
            found = [base + m.end() for m in re.finditer(b"\n", data)]
            if base == 0 or not found:  # the file's first line, or a piece of a very long one
                found.insert(0, base)
            starts, end = found + starts, found[0]
        return starts[-n:][0] if starts else 0

    def page(self, height: int) -> list[str]:
        size = self.size()
        if self.top is not None and self.top > size:  # truncated under the reader
            self.top = None
        if self.top is None:
            start, self.new = self.start_before(size, height), 0
            data = read_at(self.path, start, size - start)
        else:
            if size > self.counted:
                self.new += read_at(self.path, self.counted, min(size - self.counted, 16 << 20)).count(b"\n")
            data = read_at(self.path, self.top, 2 * self.BLOCK)
        self.counted = size
        lines = data.removesuffix(b"\n").split(b"\n")[:height] if data else []
        bars = (next((p for p in reversed(x.split(b"\r")) if p), b"") for x in lines)  # the latest bar
        return [clean(x.decode("utf-8", "replace")) for x in bars]

    def scroll(self, n: int, height: int) -> None:
        last = self.start_before(self.size(), height)
        top = last if self.top is None else self.top
        if n < 0:
            self.top = self.start_before(top, -n)
        else:
            ends = [m.end() for m in islice(re.finditer(b"\n", read_at(self.path, top, 2 * self.BLOCK)), n)]
            top += ends[-1] if ends else self.BLOCK
            self.top = None if top >= last else top


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

    def ask(self, name: str, *args):
        try:
            return getattr(self.nvml, name)(*args)
        except Exception as e:  # NVMLError has a class per code, and drivers raise others: all mean N/A
            self.error = clean(e) or type(e).__name__
            return None

    def start(self) -> bool:
        if self.now() < self.retry_at:
            return False
        self.retry_at, self.error = self.now() + 30, None
        if self.nvml is None:
            if not any(map(os.path.exists, ("/dev/nvidiactl", "/proc/driver/nvidia", "/dev/dxg"))):
                self.error = "no NVIDIA driver"  # importing NVML would cost a tenth of a second
                return False
            try:
                import pynvml
            except ImportError:
                self.error = "nvidia-ml-py is not installed"
                return False
            self.nvml = pynvml
        self.ask("nvmlInit")
        return self.error is None

    def sample(self) -> list[dict]:
        self.ready = self.ready or self.start()
        if not self.ready:
            return []
        self.error = None
        count = self.ask("nvmlDeviceGetCount")
        if count is None:  # driver gone or reloaded: initialise again later
            self.ready, self.retry_at = False, self.now() + 30
        return [self.gpu(i) for i in range(count or 0)]

    def gpu(self, index: int) -> dict:
        handle = self.ask("nvmlDeviceGetHandleByIndex", index)

        def get(name, *args):
            return None if handle is None else self.ask(f"nvmlDeviceGet{name}", handle, *args)

        name, util, memory, power = map(get, ("Name", "UtilizationRates", "MemoryInfo", "PowerUsage"))
        return {
            "index": index, "name": name.decode() if isinstance(name, bytes) else name,
            "util_percent": util and util.gpu, "mem_used": memory and memory.used,
            "mem_total": memory and memory.total, "power_w": None if power is None else power / 1000,
            "temp_c": get("Temperature", 0),
            "processes": [{"pid": p.pid, "mem": p.usedGpuMemory, "run": None}
                          for p in get("ComputeRunningProcesses") or []],
        }  # fmt: skip


def cpu_ticks() -> tuple[int, int] | None:
    """(all, idle) ticks of all cores since boot."""
    try:
        with open("/proc/stat") as f:
            ticks = [int(x) for x in f.readline().split()[1:9]]
        return sum(ticks), ticks[3] + ticks[4]
    except (OSError, ValueError, IndexError):
        return None


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
    disk_gb: float = 5.0  # free space where the checkpoints go


class Run:
    """One job: its files in the log directory, its process, its state."""

    def __init__(self, name: str, log: Path | None, folder: Path | None = None, run_dir: Path | None = None):
        self.name, self.log, self.folder, self.run_dir = name, log, folder, run_dir
        self.state, self.past = RunState(), None  # past: the state that history is being read into
        self.at = self.cut = 0  # how far that has come; what lies before `cut` stays unread
        self.info: dict = {}
        self.metrics: Tailer | None = None
        self.text: Tailer | None = None
        self.status: str | None = None
        self.pid: int | None = None
        self.error = self.last_line = None
        self.grown: float | None = None  # monotonic time of the last growth
        self.disk: tuple | None = None  # (used, free, total) of the run directory's file system
        self.alarms: list[tuple[bool, str]] = []
        self.gpu: dict | None = None

    @property
    def kind(self) -> str | None:
        raw, known = self.state.raw, ("train", "cache", "precompute", "rvq")
        guesses = (self.info.get("kind"), raw.get("kind"), re.split(r"[_\d]", self.name)[0],
                   "rvq" if "ppl" in raw else raw.get("phase"))  # fmt: skip
        return next((k for k in guesses if k in known), "train" if self.state.vals else None)

    @property
    def recipe(self) -> str:
        return clean(self.state.raw.get("recipe") or "")[:24]

    @property
    def source(self) -> Tailer | None:
        """Where the numbers come from: metrics.jsonl; without one, the log."""
        return self.metrics or self.text

    def record(self, line: str) -> dict | None:
        """The record of a line of `source`; None for any other line, and for one of another process: several
        cache or precompute processes write into one metrics file."""
        r = parse_line(line) if line.startswith("{") == bool(self.metrics) else None
        if not r or not self.folder or self.name.endswith("_cpu"):
            return r
        if "worker" in r:
            return r if self.name.endswith(f"_{r['worker']}") else None
        return r if "proc" not in r or str(r["proc"]).rsplit("-", 1)[-1] == str(self.pid) else None

    def read_info(self) -> None:
        try:
            info = json.loads((self.folder / f"{self.name}.json").read_text(errors="replace"))
        except (OSError, ValueError):
            return
        self.info = info if isinstance(info, dict) else {}
        run_dir = self.info.get("run_dir")
        if isinstance(run_dir, str) and run_dir and Path(run_dir) != self.run_dir:
            self.run_dir, self.state, self.metrics, self.past = Path(run_dir), RunState(), None, None

    def poll(self, now: float, mono: float, proc: Path) -> None:
        if self.folder:
            self.read_info()
            self.status, self.pid = job_status(self.folder / f"{self.name}.pid", proc)
            self.status = self.status or ("DEAD" if self.info else None)
        path = self.run_dir and self.run_dir / "metrics.jsonl"
        if self.metrics is None and path and path.is_file():  # its numbers are better than the log's
            self.metrics, self.state, self.past = Tailer(path), RunState(), None
        if self.text is None and self.log:
            self.text = Tailer(self.log)
        grew = False
        for line in self.metrics.poll() if self.metrics else ():
            grew = True
            if r := self.record(line):
                self.state.feed(r)
        for line in self.text.poll() if self.text else ():
            grew |= self.metrics is None
            if not line.startswith("{") and (r := parse_line(line)):
                self.error = None
                if self.metrics is None:
                    self.state.feed(r)
            elif ERROR.search(line):
                self.error = clean(line).strip()[:300]
            self.last_line = line if line.strip() else self.last_line
        if self.grown is None:  # the clock may have been set back: an age is never negative
            stamps = [t.path.stat().st_mtime for t in (self.metrics, self.text) if t and t.path.exists()]
            self.grown = mono - max(0.0, now - max(stamps)) if stamps else mono
        elif grew:
            self.grown = mono

    def load_older(self, events_only: bool = False) -> bool:
        """Read one more piece of what lies before the tail, forwards, into a state that takes over when all
        is in. False: nothing left. `events_only`: a single look needs only validations, starts, resumes."""
        tail = self.source
        if not tail or not tail.before:  # all read, or the file has been rotated or truncated
            self.past = None
            return False
        if self.past is None:
            self.past, self.at = RunState(), max(0, tail.before - HISTORY_BYTES)
            self.cut = self.at
        end, old = tail.pos - len(tail.partial), self.at < tail.before
        data = read_at(tail.path, self.at, min(CHUNK, (tail.before if old else end) - self.at))
        size = max(data.rfind(b"\n"), data.rfind(b"\r")) + 1 or len(data)
        needle = b"" if not (events_only and old) else b'"event"' if self.metrics else b"[Val]"
        for line in re.split(rb"[\r\n]+", data[:size]):
            if needle in line and (r := self.record(line.decode("utf-8", "replace"))):
                self.past.feed(r)
        self.at += size
        if self.at >= end or not data:
            self.state, self.past, tail.before = self.past, None, 0
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
        if self.status != "RUNNING" and self.end and self.end["reason"] == "finished":
            return "FINISHED"
        return self.status

    @property
    def state_word(self) -> str:
        """`shown_state` for people: a run that a signal ended is STOPPED, not dead."""
        stopped = self.end and self.end["reason"] == "stopped" and self.status != "RUNNING"
        return "STOPPED" if stopped else self.shown_state or "LOG"

    def why_dead(self) -> str:
        if self.end:
            code = f" (exit code {clean(self.end['code'])})" if self.end.get("code") else ""
            return ": ".join(w for w in (self.end["reason"], self.error) if w) + code
        last = clean(self.last_line or "").strip()[:120]
        vanished = "vanished without a word (kill -9? out of memory?)"
        vanished += f"; last line: {last}" if last else ""
        return self.error or vanished

    def judge(self, mono: float, limits: Limits) -> None:
        """Fill `alarms`: (loud?, text). The thresholds are those of `Limits`."""
        s, state = self.state, self.shown_state
        found: list[tuple[bool, str]] = []
        at = f" at step {s.step}" if s.step is not None else ""
        if state in ("DEAD", "STALE_PID") and self.end and self.end["reason"] == "stopped":
            signal = f" by {clean(self.end['signal'])}" if self.end.get("signal") else ""
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
            if self.disk and self.disk[1] < limits.disk_gb * 1e9:
                free = f"{human_size(self.disk[1])} free, {limits.disk_gb:g}G wanted"
                found.append((True, f"DISK: {free} in {self.run_dir or self.folder}"))
        self.alarms = found

    def row(self) -> dict:
        """The object of --json (README: exactly these keys)."""
        s, latest = self.state, self.state.latest
        val, best = s.vals[-1] if s.vals else {}, s.best() or {}
        return {
            "name": self.name, "kind": self.kind, "state": self.shown_state, "pid": self.pid,
            "epoch": counted(latest.get("epoch")), "epochs": counted(latest.get("epochs")), "step": s.step,
            **{k: latest.get(k) for k in ("phase", "segment_length", "loss", "loss_24k", "loss_48k")},
            "val_loss_24k": val.get("loss_24k"), "val_loss_48k": val.get("loss_48k"),
            "best_val_loss_48k": best.get("loss_48k"), "best_epoch": best.get("epoch"),
            "lr": latest.get("lr"),
            "eta_s": latest.get("eta_s") if self.shown_state in ("RUNNING", None) else None,
            "alerts": [text for _, text in self.alarms], "log": str(self.log) if self.log else None,
        }  # fmt: skip


class Fleet:
    """All runs of a log directory and the files named on the command line, and the machine."""

    def __init__(self, log_dir, files=(), limits=None, nvml=None, proc="/proc", now=time.time,
                 mono=time.monotonic):  # fmt: skip
        self.log_dir, self.limits = Path(log_dir), limits or Limits()
        self.proc, self.now, self.mono = Path(proc), now, mono
        self.lock = threading.RLock()
        self.runs: dict[str, Run] = {}
        self.gpus: list[dict] = []
        self.sampler, self.polls = GpuSampler(nvml, mono), 0
        self.ticks, self.cpu_percent = cpu_ticks(), None
        self.ram: tuple = (None, None)
        for file in map(Path, files):
            ours = file.name == "training.log" and (file.parent / "metrics.jsonl").is_file()
            if file.is_dir() or file.name == "metrics.jsonl" or ours:
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
            now, mono, self.gpus = self.now(), self.mono(), gpus
            for run in self.runs.values():
                run.poll(now, mono, self.proc)
                run.gpu = None
                if self.polls % 10 == 0 and (run.run_dir or run.folder):
                    self.weigh(run)
                run.judge(mono, self.limits)
            sessions = {r.pid: r for r in self.runs.values() if r.pid and r.status == "RUNNING"}
            for gpu, p in ((g, p) for g in gpus for p in g["processes"]):
                stat = process_stat(p["pid"], self.proc)
                if run := sessions.get(p["pid"]) or (sessions.get(stat[1]) if stat else None):
                    p["run"], run.gpu = run.name, run.gpu or {"mem": 0, "index": []}
                    run.gpu["mem"] += p["mem"] or 0
                    run.gpu["index"].append(gpu["index"])
            self.measure()
            self.polls += 1

    def measure(self) -> None:
        self.ram, now, last = memory(), cpu_ticks(), self.ticks
        if now and last and now[0] > last[0]:
            idle = (now[1] - last[1]) / (now[0] - last[0])
            self.ticks, self.cpu_percent = now, round(max(0.0, 100 * (1 - idle)), 1)

    def weigh(self, run: Run) -> None:
        folder = run.run_dir or run.folder
        while not folder.exists() and folder != folder.parent:
            folder = folder.parent
        try:
            d = shutil.disk_usage(folder)
            run.disk = (d.used, d.free, d.total)
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

    def disk_free(self) -> int:
        return min((r.disk[1] for r in self.runs.values() if r.disk), default=shutil.disk_usage(".").free)

    def report(self) -> dict:
        """--json."""
        used, total = self.ram
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


def raster(layers: list, width: int, height: int, y0: float, y1: float, log: bool = False) -> list[list]:
    """[(columns, style)] -> height rows of width (character, style); a later layer covers an earlier one."""
    f, top = math.log10 if log else float, 4 * height - 1
    low = f(y0)
    scale = top / ((f(y1) - low) or 1)
    rows = [[(" ", "")] * width for _ in range(height)]
    for cols, style in layers:
        bits: dict = {}

        def bar(c, a, b, bits=bits):
            for d in range(top - b, top - a + 1):
                bits[d // 4, c // 2] = bits.get((d // 4, c // 2), 0x2800) | DOTS[d % 4][c % 2]

        before = None
        for c, col in enumerate(cols):
            if col is None:
                continue
            a, b, mid = (min(max(round((f(v) - low) * scale), 0), top) for v in col)
            if before:
                pc, pa, pb, start = at = before
                at = start
                for k in range(pc + 1, c):  # a gap: a straight line
                    to = round(start + (mid - start) * (k - pc) / (c - pc))
                    bar(k, min(at, to), max(at, to))
                    at = pa = pb = to
                bar(c, min(a, pb), max(b, pa))
            else:
                bar(c, a, b)
            before = (c, a, b, mid)
        for (r, c), value in bits.items():
            rows[r][c] = (chr(value), style)
    return rows


def fit(line: list, width: int) -> list:
    """A line is [(text, style), …]; cut or pad it to `width` characters."""
    out, left = [], width
    for text, style in line:
        if left > 0:
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


def wrapped(parts: list, width: int, most: int) -> list:
    """Parts of a legend on as many lines as they need, `most` at most."""
    lines, used = [[]], 0
    for text, style in parts:
        if used and used + len(text) > width:
            lines.append([])
            used = 0
        lines[-1].append((text, style))
        used += len(text)
    return [fit(line, width) for line in lines[:most]]


def plot(curves: list, width: int, height: int, span=(0, 1), log=False, smooth=0.0, marks=(), bad=(),
         best=None) -> list:  # fmt: skip
    """`height` lines of `width`: canvas and x axis. curves: [(Series, style, dotted, letter at its end)].

    span: x range. marks: [(x, label)] vertical lines. bad: x of non-finite values. best: (x, y).
    """
    (x0, x1), (w, h) = span, (max(2, width - 8), max(1, height - 1))
    x1 = max(x1, x0 + 1)
    layers, values = [], []
    for s, style, _, _ in curves:
        cols = columns(s.xs, s.ys, x0, x1, 2 * w, log)
        seen = [c for c in cols if c]
        values += [c[0] for c in seen] + [c[1] for c in seen]
        if smooth and len(seen) > 20:
            layers += [(cols, "dim"), (smoothed(cols, smooth), style)]
        else:
            layers.append((cols, style))
    if not values:
        why = "no positive value for a log axis" if log and any(c[0].xs for c in curves) else "no points yet"
        return [[(f"{'':8}{why}"[:width] if i == h // 2 else "", "dim")] for i in range(h + 1)]
    y0, y1 = min(values), max(values)
    if y0 == y1:
        y0, y1 = (y0 / 1.1, y1 * 1.1) if log else (y0 - (abs(y0) * 0.1 or 1), y1 + (abs(y1) * 0.1 or 1))
    rows = raster(layers, w, h, y0, y1, log)

    def put(x, y, sign, style):
        if x0 <= x <= x1 and (y > 0 or not log):
            share = math.log10(y / y0) / math.log10(y1 / y0) if log else (y - y0) / (y1 - y0)
            row = rows[min(max(h - 1 - int(share * h), 0), h - 1)]
            row[min(int((x - x0) / (x1 - x0) * w), w - 1)] = (sign, style)

    axis = [" "] * w
    for text, end in ((short(x0), 0), (short(x1), w)):
        axis[max(0, end - len(text)) : max(0, end - len(text)) + len(text)] = text[:w]
    for x, label in marks:
        if x0 < x < x1:
            c = min(int((x - x0) / (x1 - x0) * w), w - 1)
            for row in rows:
                row[c] = ("┊", "dim") if row[c][0] == " " else row[c]
            if all(a == " " for a in axis[max(0, c - 1) : c + len(label) + 1]) and c + len(label) < w:
                axis[c : c + len(label)] = label
    for x in bad:
        put(x, y0, "×", "bold red")
    for s, style, dotted, letter in curves:
        lo, hi = bisect_left(s.xs, x0), bisect_right(s.xs, x1)
        for i in range(lo, hi) if dotted and hi - lo <= w // 2 else ():
            put(s.xs[i], s.ys[i], "•", style)
        if letter and hi > lo:
            put(s.xs[hi - 1], s.ys[hi - 1], letter, style + " bold reverse")
    if best:
        put(*best, "★", "bold yellow")
    labels = {0: y1, h - 1: y0}
    if h >= 5:
        labels[h // 2] = y0 * (y1 / y0) ** 0.5 if log else (y0 + y1) / 2
    lines = [
        [(f"{short(labels[i]) if i in labels else '':>7}│", "dim"), *packed(row)]
        for i, row in enumerate(rows)
    ]
    return [*lines, [(" " * 7 + "└" + "".join(axis)[:w], "dim")]]


# ---- text ----


def short(value, digits: int = 4) -> str:
    """At most about 7 characters: 0.4712, 1.2e-05, NaN, – for unknown."""
    if value is None:
        return "–"
    if not isinstance(value, (int, float)):
        return clean(value)
    if not math.isfinite(value):
        return "NaN" if math.isnan(value) else ("Inf" if value > 0 else "-Inf")
    if value == int(value) and abs(value) < 1e7:
        return str(int(value))
    return f"{value:.{digits}g}" if 1e-3 <= abs(value) < 1e4 else f"{value:.1e}"


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
    days = f"{int(seconds // 86400)}d{int(seconds % 86400 // 3600):02d}h"
    return days if seconds >= 360000 else human_time(seconds)


def percent(value) -> str:
    return "N/A" if value is None else f"{value:.0f}%"


def gauge(share, width: int) -> list:
    if share is None:
        return [("·" * width, "dim")]
    full = round(min(max(share, 0), 1) * width)
    return [("█" * full, "red" if share > 0.95 else "green"), ("░" * (width - full), "dim")]


STATE_STYLE = {"RUNNING": "green", "FINISHED": "cyan", "DEAD": "bold red", "STALE_PID": "bold red",
               None: "dim"}  # fmt: skip
LOUD = "bold red reverse"
COLOURS = ("cyan", "yellow", "magenta", "green", "blue", "red", "white")
SIGNS = "0123456789abcdefghijklmnopqrstuvwxyz"  # one character a codebook
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
    "overview": "run mark overlay log start stop resume help quit",
    "run": "down focus smooth scale zoom_in zoom_out help quit",
    "overlay": "metric mark smooth scale zoom_in zoom_out help quit",
    "log": "up page_up top bottom left right help quit",
    "system": "overview help quit",
    "help": "down page_down overview quit",
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
    if ui.selected not in fleet.runs and runs:  # first look: what needs attention
        loud = [r for r in runs if any(a[0] for a in r.alarms)]
        ui.selected = (loud + [r for r in runs if r.status == "RUNNING"] + runs)[0].name
    return fleet.runs.get(ui.selected)


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
    ("audio s/s", 9, 6, lambda f, r, j: short(r.state.latest.get("audio_s_per_s"))),
    ("ETA", 8, 1, lambda f, r, j: duration(j["eta_s"])),
    ("GPU", 12, 5, lambda f, r, j: gpu_text(f, r)),
)


def overview(fleet: Fleet, ui: Ui, width: int, height: int, everything: bool = False) -> list:
    runs, now = fleet.listed(), chosen(fleet, ui)
    if not runs:
        return [
            [(f"No runs in {fleet.log_dir} yet.", "bold")],
            [("Start one: ./launch.sh train 0    (or press n)", "")],
            [("Or name a log: python monitor.py path/to/training.log", "")],
        ]
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
            bad = "bold red" if text.strip() in ("NaN", "Inf") else ""
            style = STATE_STYLE[j["state"]] if i == 1 else bad
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
    head = f"── {run.name} ── {run.kind or 'log'}{' ' * bool(run.recipe)}{run.recipe} "
    segment = f" · segment {short(j['segment_length'])} s" if j["segment_length"] else ""
    first = (
        f"epoch {short(j['epoch'])}/{short(j['epochs'])} · step {short(j['step'])}/"
        f"{short(latest.get('total_steps'))} ({done(run)}) · {j['phase'] or '–'}{segment}"
        f" · ETA {duration(j['eta_s'])}"
    )
    names = {"loss": "loss", "loss_24k": "24k", "loss_48k": "48k"}
    more = {"ppl": "ppl", "bits_per_s": "bits/s", "lr": "lr", "audio_s_per_s": "audio s/s",
            "skipped": "skipped"}  # fmt: skip
    second = " · ".join(f"{text} {short(latest[k])}" for k, text in (names | more).items() if k in latest)
    third = [f"GPU {gpu_text(fleet, run)}"] + [f"{s.skips} steps skipped"] * bool(s.skips)
    if best:
        at = f"at epoch {short(best['epoch'])} step {best['step']}"
        third.insert(0, f"best val {names[s.judged]} {short(best[s.judged])} {at}")
    if heads := [f"{names[k]} {short(val[k])}" for k in ("loss_24k", "loss_48k") if k in val]:
        third.insert(0, f"val {' '.join(heads)}")
    state = [(run.state_word, STATE_STYLE[j["state"]]), (f" pid {short(j['pid'])}", "")]
    texts = (first, second or clean(run.last_line or "no line yet"), " · ".join(third))
    return [[(head, "bold"), *state, (" " + "─" * width, "dim")], *([(text, "")] for text in texts)]


def visible(ui: Ui, last: float, first: float = 0) -> tuple[float, float]:
    """x range shown: zoom and pan, kept inside the run."""
    span = (last - first) / 2**ui.zoom
    x1 = last - min(ui.back, 1 - 0.5**ui.zoom) * (last - first)
    return max(first, x1 - span), x1


def boundaries(run: Run) -> list[tuple[int, str]]:
    """Where the phase or the segment length changes (the first entry is the run's beginning)."""
    found = []
    for (_, p0, l0), (step, p1, l1) in pairwise(run.state.marks):
        found.append((step, " ".join([f"{short(l1)}s"] * (l1 != l0) + [clean(p1)] * (p1 != p0))))
    return found


PANELS = {  # kind -> (title, training curves, validation curves); ce_* is one curve for each codebook
    "train": (("48 kHz", "loss_48k", "loss_48k"), ("24 kHz", "loss_24k", "loss_24k"), ("lr", "lr", ""),
              ("LSD val", "", "lsd_48k lsd_12_24k lsd_24k"), ("codes used", "usage_*", ""),
              ("perplexity", "perplexity_*", ""), ("codec", "commitment codebook features", ""),
              ("audio s/s", "audio_s_per_s", "")),
    "rvq": (("loss", "loss", "loss"), ("cross-entropy", "ce_*", ""), ("lr", "lr", ""), ("ppl", "ppl", "ppl"),
            ("cross-entropy val", "", "ce_*"), ("bits/s", "bits_per_s", "bits_per_s")),
    "cache": (("audio s/s", "audio_s_per_s", ""), ("skipped", "skipped", "")),
}  # fmt: skip


def keys_of(names: str, present) -> list[tuple]:
    """[(key, label, sign at the curve's end)] of those present; `ce_*` stands for ce_0, ce_1, …"""
    found = []
    for name in names.split():
        if name.endswith("*"):
            books = ((name[:-1] + str(k), c) for k, c in enumerate(SIGNS))
            found += [(key, c, c) for key, c in books if key in present]
        elif name in present:
            found.append((name, name.removeprefix("lsd_"), ""))
    return found


def panels_of(run: Run) -> list[tuple]:
    """What this run has curves for, one head or two, codebooks or none: (title, training, validation)."""
    s, kind = run.state, {"precompute": "cache", None: "train"}.get(run.kind, run.kind)
    curves, vals = {k for k, c in s.series.items() if c.xs}, {k for v in s.vals for k in v}
    found = [(title, keys_of(train, curves), keys_of(val, vals)) for title, train, val in PANELS[kind]]
    found = [p for p in found if p[1] or p[2]]
    if kind == "train" and not {"loss_24k", "loss_48k"} & (curves | vals):
        found.insert(0, ("loss", keys_of("loss", curves), keys_of("loss", vals)))
    return found or [("no numbers yet", [], [])]


def panel(run: Run, ui: Ui, width: int, height: int, spec: tuple) -> list:
    """One set of axes. Its title is the legend: each curve's latest value, the best of the validations."""
    (title, train, val), s = spec, run.state
    curves, head, best = [], [(title, "bold")], None
    for i, (key, label, sign) in enumerate(train):
        c, style = s.series[key], COLOURS[i % len(COLOURS)]
        curves.append((c, style, title in ("codes used", "perplexity"), sign))  # those come once an epoch
        head.append((f" {label + ' ' if len(train) > 1 else ''}{short(s.latest.get(key, c.ys[-1]))}", style))
    for i, (key, label, sign) in enumerate(val, len(train)):
        c, style = s.val_series(key), COLOURS[i % len(COLOURS)]
        if c.xs:
            curves.append((c, style, not sign, sign))
            head.append((f" {'val' if train else label} {short(c.ys[-1])}", style))
            if not sign:
                at = s.best(key)
                head.append((f" best {short(at[key])}@{short(at['epoch'])}", "bold yellow"))
                best = best or (at["step"], at[key])
    edges = [v["step"] for v in s.vals] + [x for c in s.series.values() if c.xs for x in (c.xs[0], c.xs[-1])]
    span = visible(ui, max(edges, default=1), min(edges, default=0))
    smooth = 0 if title == "lr" else SMOOTH[ui.smooth]
    bad = s.bad if any("loss" in key for key, _, _ in train) else ()
    top = wrapped(head, width, max(1, height // 6))
    rest = height - len(top)
    return top + plot(curves, width, rest, span, ui.log, smooth, boundaries(run), bad, best)


def layout(n: int, width: int, height: int) -> tuple[int, int]:
    """(across, down) of n panels: two by two (below one another where narrow), as many as have room."""
    across = 1 if n == 1 or width < 70 else 2
    return across, max(1, min(math.ceil(n / across), height // 6))


def grid(run: Run, ui: Ui, width: int, height: int, y0: int, specs: list) -> list:
    (across, down), lines = layout(len(specs), width, height), []
    w = width // across
    for d in range(down):
        h, row = height // down + (d < height % down), specs[d * across : (d + 1) * across]
        blocks = [panel(run, ui, w - (across > 1), h, spec) for spec in row]
        for y in range(h):
            for a in range(len(row)):
                ui.zones.append((y0 + len(lines), a * w, (a + 1) * w, "focus", d * across + a + 1))
            lines.append([part for b in blocks for part in (*fit(b[y], w - (across > 1)), (" ", ""))])
    return lines


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


def overlay(fleet: Fleet, ui: Ui, width: int, height: int) -> list:
    runs = [r for r in fleet.listed() if r.name in ui.marked] or fleet.listed()
    known = {k for r in runs for k, c in r.state.series.items() if c.xs}
    known |= {f"val {k}" for r in runs for v in r.state.vals for k in v if k not in NOT_CURVES}
    order = ["loss_48k", "loss_24k", "loss", "val loss_48k", "val loss_24k"]
    metrics = [m for m in order if m in known] + sorted(known - set(order))
    if not metrics:
        return [[("Nothing to draw yet: no run has numbers. Choose runs with space in the overview.", "")]]
    metric = metrics[ui.metric % len(metrics)]
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
    note = f"  {ui.metric % len(metrics) + 1} of {len(metrics)} metrics, m next"
    more = "  log y" * ui.log + f"  smooth {SMOOTH[ui.smooth]:.0%}" * (ui.smooth > 0)
    title = [(metric, "bold"), (note, "dim"), (more + f"  zoom {2**ui.zoom}x" * (ui.zoom > 0), "cyan")]
    first, last = min((c[0].xs[0] for c in curves), default=0), max((c[0].xs[-1] for c in curves), default=1)
    span = visible(ui, last, first)
    rest = height - 1 - len(shown)
    return [title, *plot(curves, width, rest, span, ui.log, SMOOTH[ui.smooth]), *shown]


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
    (used, total), b, cpu = fleet.ram, max(6, min(24, width // 6)), fleet.cpu_percent
    lines = [
        [("CPU  ", "bold"), *gauge(None if cpu is None else cpu / 100, b),
         (f" {percent(cpu):>5} of {os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}", "")],
        [("RAM  ", "bold"), *gauge(used / total if total else None, b),
         (f" {percent(total and 100 * used / total):>5} {human_size(used)} of {human_size(total)}", "")],
    ]  # fmt: skip
    disks = {r.disk[2]: (r.run_dir or r.folder, r.disk) for r in reversed(fleet.listed()) if r.disk}
    for folder, (taken, free, all_) in disks.values():
        share = taken / max(1, taken + free)
        text = f" {percent(100 * share):>5} {human_size(free)} free of {human_size(all_)}  {folder}"
        lines.append([("Disk ", "bold"), *gauge(share, b), (text, "")])
    lines.append([])
    if not fleet.gpus:
        lines.append([("GPU  ", "bold"), (f"N/A ({fleet.sampler.error or 'none found'})", "yellow")])
    for g in fleet.gpus:
        share = g["mem_used"] / g["mem_total"] if g["mem_used"] is not None and g["mem_total"] else None
        util = g["util_percent"]
        power = "N/A" if g["power_w"] is None else f"{g['power_w']:.0f} W"
        temp = "N/A" if g["temp_c"] is None else f"{g['temp_c']:.0f} °C"
        lines.append([(f"GPU {g['index']} ", "bold"), *gauge(None if util is None else util / 100, b // 2),
                      (f" {percent(util):>4}  mem ", ""), *gauge(share, b // 2),
                      (f" {human_size(g['mem_used'])}/{human_size(g['mem_total'])}  {power}  {temp}  ", ""),
                      (g["name"] or "N/A", "dim")])  # fmt: skip
        for p in g["processes"]:
            lines.append([(f"      pid {p['pid']:<8} {human_size(p['mem']):>6}  ", ""),
                          (p["run"] or "not one of these runs", "green" if p["run"] else "dim")])  # fmt: skip
    if fleet.gpus and fleet.sampler.error:
        lines.append([(f"NVML: {fleet.sampler.error}", "yellow")])
    return lines


def sign(keys: str) -> str:
    return " ".join(KEY_SIGN.get(k, k.capitalize() if len(k) > 1 else k) for k in keys.split(","))


def help_view(fleet: Fleet, ui: Ui, width: int, height: int) -> list:
    limits = fleet.limits
    keys = [[(f" {sign(k):<9}", "bold cyan"), (text, "")] for k, _, text in KEYS]
    notes = [
        "ALARMS",
        "DEAD       process gone without an end; the reason beside it",
        "STALE_PID  the PID now belongs to another process",
        "NaN        a loss that is not finite in the last 50 lines",
        "SKIP       steps the trainer skipped in the last 50",
        f"DIVERGING  median of 20 losses over {limits.diverge:g}x its lowest",
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
    if loud := [(r, text) for r in fleet.listed() for is_loud, text in r.alarms if is_loud]:
        run, text = loud[0]
        count = f" !! {len(loud)} alarm{'s' * (len(loud) > 1)} "
        alarm = [(count, LOUD), (f" {run.name}: {text}", "bold red")]
        zones.append((1, 0, width, "select", run.name))
    else:
        running = sum(r.status == "RUNNING" for r in fleet.runs.values())
        alarm = [(" no alarms ", "green"), (f" {running} running", "")]
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
    elif action in jump and ui.view == "help":
        ui.panel = max(0, ui.panel + jump[action])
    elif action in jump and names:
        ui.selected = names[min(max(0, names.index(run.name) + jump[action]), len(names) - 1)]
    elif action == "mark" and run:
        ui.marked ^= {run.name}
    elif action == "metric":
        ui.metric += 1
    elif action == "focus" and run:
        ui.panel = (0 if ui.panel else arg) if arg else (ui.panel + 1) % (len(panels_of(run)) + 1)
    elif action == "smooth":
        ui.smooth = (ui.smooth + 1) % len(SMOOTH)
    elif action == "scale":
        ui.log = not ui.log
    elif action in ("zoom_in", "zoom_out", "zoom_all"):
        ui.zoom = {"zoom_in": min(ui.zoom + 1, 12), "zoom_out": max(ui.zoom - 1, 0)}.get(action, 0)
        ui.back = min(ui.back, 1 - 0.5**ui.zoom)
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
        elif (action == "stop") != (run.status == "RUNNING"):
            ui.message = f"{run.name} is {'not running' if action == 'stop' else 'running already'}"
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
    from textual.containers import Vertical
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
            for y, a, b, action, arg in ui.zones:
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
            self.ui, self.pane = ui, Pane()
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
                loud = {(r.name, text.split()[0]) for r in fleet.listed() for yes, text in r.alarms if yes}
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
