"""Runs: their files, process, numbers and alarms (a new one: `Limits`, `Run.judge`), and all of them."""

import os
import re
import shutil
import socket
import threading
import time
from dataclasses import dataclass
from pathlib import Path

from ..cli import UserError
from ..files import finite_json
from ..jobs import description, exit_code, job_state
from ..process import alive, pid_space, process_stat
from ..runlog import human_time
from .parse import ERROR, counted, number, parse_json, parse_line
from .state import RunState
from .system import GpuSampler, Machine, Processes, mount_of, owner, partitions
from .tail import Tailer, read_at
from .text import clean, human_size, short

CHUNK = 1 << 19  # bytes of history read in one go
LOGS = ("training.log", "cache.log", "precompute.log")  # in run directories
SUMMARIES = (b"[Val]", b"[Train]", b"kHz: ", b"PHASE ", b"val")  # lines of a log that tell of validations
HISTORY_BYTES = 1 << 26  # what lies further back is left unread (500,000 lines of a log)


def last_process(path: Path, proc="/proc") -> tuple[str | None, int | None, float | None]:
    """(state, pid, start by the clock) of a run directory's process: a live one of this machine, else the
    last; (None, None, None) where the file tells of none."""
    size = path.stat().st_size if path.is_file() else 0
    found = [
        r
        for line in read_at(path, max(0, size - (1 << 16)), 1 << 16).splitlines()
        if (r := parse_json(line.decode("utf-8", "replace"))) and type(r.get("pid")) is int
    ]
    ours = [
        (alive(r["pid"], r.get("start"), proc), r["pid"], number(r.get("t")))
        for r in found
        if r.get("host") == socket.gethostname() and r.get("space", pid_space()) == pid_space()
    ]
    if not ours:
        return None, None, None
    return next((p for p in reversed(ours) if p[0] == "RUNNING"), ours[-1])


@dataclass
class Limits:
    """Thresholds of the alarms (docs/monitor.md lists them)."""

    stall_s: float = 300.0  # RUNNING without a new line for longer than this and than 20 usual gaps
    diverge: float = 3.0  # median of the last 20 losses over the lowest such median at this segment length
    disc_wins: float = 0.05  # median of the last 20 disc_*: 0.5 is chance, 0 tells everything
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
        self.paused, self.began = False, None  # SIGSTOP; start of its process by the clock
        self.error = self.last_line = self.left = None
        self.grown: float | None = None  # monotonic time of the last growth
        self.stepped: float | None = None  # … of the last step line
        self.seen = 0.0  # … of the last look
        self.disk = None  # total, used, free bytes of the run directory's file system
        self.alarms: list[tuple[bool, str]] = []
        self.gpu: dict | None = None

    @property
    def kind(self) -> str | None:
        raw, known = self.state.raw, ("train", "cache", "precompute", "rvq")
        guesses = [self.info.get("kind"), raw.get("kind"), re.split(r"[_\d]", self.name)[0]]
        guesses.append("rvq" if "ppl" in raw or "ppl" in (self.state.vals or [raw])[-1] else raw.get("phase"))
        return next((k for k in guesses if k in known), "train" if self.state.vals else None)

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
            self.info = description(self.folder / f"{self.name}.json")
        except (OSError, ValueError):
            return
        run_dir = self.info.get("run_dir")
        if isinstance(run_dir, str) and run_dir and "\0" not in run_dir and Path(run_dir) != self.run_dir:
            self.run_dir, self.state, self.metrics, self.past = Path(run_dir), RunState(), None, None

    def exit_code(self) -> dict | None:
        """NAME.exit as an end event, for a job without metrics; None for an error: its log says more."""
        code = exit_code(self.folder, self.name)
        return {"0": {"reason": "finished", "code": 0}, "3": {"reason": "stopped", "code": 3}}.get(code)

    def find_process(self, proc) -> None:
        """By launch.sh's PID file, and by the run directory: not every run was started by launch.sh."""
        self.status = self.pid = None
        if self.folder:
            self.status, self.pid = job_state(self.folder / f"{self.name}.pid", proc)
            self.left = self.exit_code()
            self.status = self.status or ("DEAD" if self.info else None)
        if self.run_dir and self.status != "RUNNING" and not self.shares:
            status, pid, began = last_process(self.run_dir / "processes.jsonl", proc)
            if status == "RUNNING" or self.status is None:
                self.status, self.pid, self.began = status, pid, began
        stat = process_stat(self.pid, proc) if self.status == "RUNNING" else None
        self.paused = stat is not None and stat[0] in "Tt"

    @property
    def shares(self) -> bool:
        """Whether it is one of several jobs that write into one folder."""
        return bool(self.folder) and self.info.get("kind") in ("cache", "precompute")

    @property
    def places(self) -> set[str]:
        """Its files, by which the same run is recognised."""
        return {os.path.realpath(p) for p in (self.log, self.run_dir) if p}

    def poll(self, now: float, mono: float, proc) -> None:
        self.find_process(proc)
        self.seen = mono
        path = self.run_dir and self.run_dir / "metrics.jsonl"
        if self.metrics is None and path and path.is_file():  # its numbers are better than the log's
            self.metrics, self.state, self.past = Tailer(path), RunState(), None
        if self.text is None and self.log:
            self.text = Tailer(self.log)
        grew, step = False, self.state.step
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
        if self.stepped is None or step != self.state.step:
            self.stepped = self.grown

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
        needles = SUMMARIES if not self.metrics else (b'"event"',)
        needles = needles if events_only and old else (b"",)
        for line in re.split(rb"[\r\n]+", data[:size]):
            if any(n in line for n in needles) and (r := self.record(line.decode("utf-8", "replace"))):
                self.past.feed(r)
        self.at += size
        if self.at >= end or not data:
            self.state, self.past, tail.before = self.past, None, 0
        return tail.before > 0

    @property
    def end(self) -> dict | None:
        """The end event of this attempt (not of an earlier one in the same directory); where no metrics hold
        one, or the clock was set back, the exit code that the job left."""
        end = self.state.end or self.left
        t, started = number((end or {}).get("t")), number(self.info.get("started", self.began))
        return self.left if t is not None and started is not None and t < started else end

    @property
    def shown_state(self) -> str | None:
        """RUNNING, PAUSED, FINISHED, DEAD, STALE_PID; None for a log without a process."""
        if self.status == "RUNNING" and self.paused:
            return "PAUSED"
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
        last = f"; last line: {last}" if last else ""
        return self.error or f"vanished without a word (kill -9? out of memory?){last}"

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
            for key in ("disc_48k", "disc_24k"):
                last = sorted(s.series[key].ys[-20:]) if key in s.series else []
                if len(last) == 20 and last[10] < limits.disc_wins and key in s.line:
                    told = f"{key} {short(last[10])}, by chance 0.5: a lower --disc_lr may help"
                    found.append((True, f"DISC WINS: {told}"))
            low = s.lowest.get(s.marks[-1][1:]) if s.marks else None
            median = sorted(s.window)[10] if len(s.window) == 20 else 0
            if low and median > limits.diverge * low:
                ratio = f"{median / low:.1f}x its lowest {short(low)}"
                found.append((True, f"DIVERGING: loss {short(median)} is {ratio}"))
        if state == "PAUSED":
            found.append((False, f"PAUSED{at}: SIGSTOP holds it; kill -CONT {self.pid} lets it go on"))
        if state == "RUNNING":
            quiet, usual = mono - self.grown, s.usual_gap()
            if quiet > max(limits.stall_s, 20 * (usual or 0)):
                usually = f", usually {usual:.1f} s" if usual else ""
                found.append((True, f"STALL: no new line for {human_time(quiet)}{usually}"))
            if self.disk and self.disk.free < limits.disk_gb * 1e9:
                free = f"{human_size(self.disk.free)} free, {limits.disk_gb:g}G wanted"
                found.append((True, f"DISK: {free} in {self.run_dir or self.folder}"))
        self.alarms = found

    def eta(self) -> float | None:
        """Seconds left. A training says so itself (its steps grow with its segments); the others go on at the
        median pace of their latest lines. Counts down between two lines."""
        s, latest = self.state, self.state.latest
        state, left, pace = self.shown_state, latest.get("eta_s"), s.usual_pace()
        if state is None:
            return left
        if state != "RUNNING":
            return None
        if (left is None or self.kind != "train") and pace is not None and latest.get("total_steps"):
            left = max(0.0, latest["total_steps"] - s.step) * pace
        return None if left is None else max(0.0, left - (self.seen - self.stepped))

    def row(self) -> dict:
        """The object of --json (docs: exactly these keys). What the newest step line doesn't tell is None."""
        s, older = self.state, self.state.older
        latest = {k: v for k, v in s.latest.items() if k not in older}
        val, best = s.vals[-1] if s.vals else {}, s.best() or {}
        return {
            "name": self.name, "kind": self.kind, "state": self.shown_state, "pid": self.pid,
            "epoch": counted(latest.get("epoch")), "epochs": counted(latest.get("epochs")), "step": s.step,
            **{k: latest.get(k) for k in ("phase", "segment_length", "loss", "loss_24k", "loss_48k")},
            "val_loss_24k": val.get("loss_24k"), "val_loss_48k": val.get("loss_48k"),
            "best_val_loss_48k": best.get("loss_48k"), "best_epoch": best.get("epoch"),
            "lr": latest.get("lr"), "eta_s": self.eta(),
            "alerts": [text for _, text in self.alarms], "log": str(self.log) if self.log else None,
        }  # fmt: skip


def named(file: Path) -> Run:
    """The run of a log file or run directory named on the command line. Raises UserError."""
    ours = file.name in LOGS and (file.parent / "metrics.jsonl").is_file()
    if file.is_dir() or file.name == "metrics.jsonl" or ours:
        folder = file if file.is_dir() else file.parent
        if not (folder / "metrics.jsonl").is_file():
            raise UserError(f"{folder} holds no metrics.jsonl; name a run directory or a log file")
        log = next((folder / name for name in LOGS if (folder / name).is_file()), None)
        return Run(folder.resolve().name, log, run_dir=folder)
    if not file.is_file():
        raise UserError(f"{file} does not exist; name a log file, a run directory, or use --log_dir")
    return Run(file.stem, file)


def usage_of(mount: str):
    """Total, used and free bytes of a file system; None where it doesn't answer."""
    try:
        return shutil.disk_usage(mount)
    except OSError:
        return None


class Fleet:
    """All runs of a log directory and the files named on the command line, and the machine."""

    def __init__(self, log_dir, files=(), limits=None, nvml=None, proc="/proc", clocks=None):
        self.log_dir, self.limits, self.proc = Path(log_dir), limits or Limits(), proc
        self.now, self.mono = clocks or (time.time, time.monotonic)
        self.lock = threading.RLock()
        self.jobs: dict[str, Run] = {}  # of the log directory
        self.named = [named(Path(file)) for file in files]
        self.runs: dict[str, Run] = {}  # both, each run once
        self.gpus: list[dict] = []
        self.sampler, self.polls = GpuSampler(nvml, self.mono), 0
        self.machine, self.processes = Machine(), Processes()
        self.usage: dict = {}  # of the processes of each run, while somebody looks at them
        self.look_closer = False
        self.disks: list[tuple] = []  # (mount point, usage, names of the runs that write there)

    def find(self) -> None:
        try:
            names = {Path(e).stem for e in os.listdir(self.log_dir) if e.endswith((".json", ".pid", ".log"))}
        except OSError:
            names = set()
        for name in names - self.jobs.keys():
            self.jobs[name] = Run(name, self.log_dir / f"{name}.log", self.log_dir)
        self.jobs = {name: run for name, run in self.jobs.items() if name in names}
        for run in self.jobs.values():
            run.read_info()
        self.runs = self.distinct()

    def distinct(self) -> dict[str, Run]:
        """Each run once: of jobs that trained in one directory the latest; a job before its folder or log
        that was named on the command line."""
        found, taken, places = {}, set(), set()
        latest = lambda run: number(run.info.get("started")) or 0.0
        for run in sorted(self.jobs.values(), key=latest, reverse=True):
            folder = {os.path.realpath(run.run_dir)} if run.run_dir and not run.shares else set()
            places |= run.places
            if not folder & taken:
                found[run.name] = run
            taken |= folder
        for run in self.named:
            if not run.places & places:
                while run.name in found:
                    run.name += "'"
                found[run.name] = run
                places |= run.places
        return found

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
            if self.polls % 10 == 0:
                self.weigh()
            for run in self.runs.values():
                run.judge(mono, self.limits)
            live = {r.pid: r for r in self.runs.values() if r.pid and r.status == "RUNNING"}
            for gpu, p in ((g, p) for g in gpus for p in g["processes"]):
                if run := live.get(owner(p["pid"], live, self.proc)):
                    p["run"], run.gpu = run.name, run.gpu or {"mem": 0, "index": []}
                    run.gpu["mem"] += p["mem"] or 0
                    run.gpu["index"].append(gpu["index"])
            self.machine.sample(mono, gpus)
            if self.look_closer:
                self.usage = self.processes.sample({pid: r.name for pid, r in live.items()}, mono)
            self.polls += 1

    def weigh(self) -> None:
        """Free space where the runs write, and of the machine's other disks."""
        writers: dict[str, list] = {mount_of(self.log_dir): []}
        for run in self.listed():
            if folder := run.run_dir or run.folder:
                mount = mount_of(folder)
                run.disk = usage_of(mount)
                writers.setdefault(mount, []).append(run.name)
        for mount in partitions():
            writers.setdefault(mount, [])
        self.disks = [(m, usage, names) for m, names in writers.items() if (usage := usage_of(m))]

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
        return min((r.disk.free for r in self.runs.values() if r.disk), default=shutil.disk_usage(".").free)

    def report(self) -> dict:
        """--json."""
        m = self.machine
        system = {"cpu_percent": m.cpu_percent, "ram_used": m.ram[0], "ram_total": m.ram[1]}
        system |= {"disk_free": self.disk_free(), "gpus": self.gpus}
        return finite_json({"runs": [r.row() for r in self.listed()], "system": system})
