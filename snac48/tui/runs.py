"""Runs: their files, process, numbers and alarms (a new one: `Limits`, `Run.judge`), and all of them."""

import json
import os
import re
import shutil
import threading
import time
from dataclasses import dataclass
from pathlib import Path

from ..cli import UserError
from ..files import finite_json
from ..process import job_state, process_stat
from ..runlog import human_time
from .parse import ERROR, counted, number, parse_line
from .state import RunState
from .system import GpuSampler, cpu_ticks, memory
from .tail import Tailer, read_at
from .text import clean, human_size, short

CHUNK = 1 << 19  # bytes of history read in one go
SUMMARIES = (b"[Val]", b"kHz: ", b"PHASE ", b"val")  # lines of a log that tell of validations
HISTORY_BYTES = 1 << 26  # what lies further back is left unread (500,000 lines of a log)


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
            info = json.loads((self.folder / f"{self.name}.json").read_text(errors="replace"))
        except (OSError, ValueError):
            return
        self.info = info if isinstance(info, dict) else {}
        run_dir = self.info.get("run_dir")
        if isinstance(run_dir, str) and run_dir and Path(run_dir) != self.run_dir:
            self.run_dir, self.state, self.metrics, self.past = Path(run_dir), RunState(), None, None

    def poll(self, now: float, mono: float, proc) -> None:
        if self.folder:
            self.read_info()
            self.status, self.pid = job_state(self.folder / f"{self.name}.pid", proc)
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
            if self.disk and self.disk.free < limits.disk_gb * 1e9:
                free = f"{human_size(self.disk.free)} free, {limits.disk_gb:g}G wanted"
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

    def __init__(self, log_dir, files=(), limits=None, nvml=None, proc="/proc", clocks=None):
        self.log_dir, self.limits, self.proc = Path(log_dir), limits or Limits(), proc
        self.now, self.mono = clocks or (time.time, time.monotonic)
        self.lock = threading.RLock()
        self.runs: dict[str, Run] = {}
        self.gpus: list[dict] = []
        self.sampler, self.polls = GpuSampler(nvml, self.mono), 0
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
        folder = (run.run_dir or run.folder).absolute()
        try:
            run.disk = shutil.disk_usage(next(p for p in (folder, *folder.parents) if p.exists()))
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
        return min((r.disk.free for r in self.runs.values() if r.disk), default=shutil.disk_usage(".").free)

    def report(self) -> dict:
        """--json."""
        system = {"cpu_percent": self.cpu_percent, "ram_used": self.ram[0], "ram_total": self.ram[1]}
        system |= {"disk_free": self.disk_free(), "gpus": self.gpus}
        return finite_json({"runs": [r.row() for r in self.listed()], "system": system})
