"""A list of files shared among any number of processes on any machines, without server and locks."""

import collections
import itertools
import json
import multiprocessing
import os
import threading
import time
import uuid
from concurrent.futures import ProcessPoolExecutor
from multiprocessing.connection import wait as wait_for
from pathlib import Path

from .cli import UserError, ignore_stop_signals
from .files import read_json, sweep_leftovers, temporary, write_json
from .process import pid_space, start_time
from .runlog import RunLog, human_time
from .workers import check_descriptors, end_with_parent

HEARTBEAT_S = 20.0
PROGRESS_S = 3.0  # between two lines
STALE_S = 300.0  # a claim of another machine or container without a heartbeat this long is taken over
WAIT_S = 0.5  # between two looks at units that others hold


def share(files: int, most: int) -> int:
    """Files a unit of a job that begins: a 64th, at least 1 and at most `most`."""
    return max(1, min(most, files // 64))


class SharedWork:
    """A list of files cut into units that any number of processes on any machines work off together.

    Below `<output_dir>/work/`: `plan_K.bin` (NUL-separated file list, immutable once linked into place),
    `unit_N.G.claim` (exclusive creation is the claim; a dead owner is followed by generation G+1),
    `unit_N.json` (the unit's result, written after its outputs: the commit). Nothing is ever locked, so a
    kill -9 at any moment leaves only a claim that the next process sees is dead. warn(text) is called where
    a claim can't be kept alive.

    unit_size: files a unit. Without it the folder's own, or where we begin it a 64th of the files, `most` at
    most: a small job has units for every process, too.
    """

    def __init__(self, output_dir, files: list[str], unit_size: int | None, settings: dict, warn, most=1000):
        self.dir = Path(output_dir) / "work"
        self.dir.mkdir(parents=True, exist_ok=True)
        sweep_leftovers(self.dir)
        self.warn, self.token = warn, uuid.uuid4().hex
        self.claims: dict[int, Path] = {}  # units that are ours now
        self.seen: dict[str, tuple] = {}  # claims of elsewhere: (their last heartbeat, when we first saw it)
        given, first = ({"unit_size": size} if size else {} for size in (unit_size, share(len(files), most)))
        self.unit_size = self.agree("settings.json", settings | given, first)["unit_size"]
        self.units = self._plan(files, self.unit_size)
        self._stop = threading.Event()
        threading.Thread(target=self._heartbeat, daemon=True).start()

    # -- agreement --

    def _create(self, name: str, content: bytes) -> bool:
        """Create a file with its whole content, or return False because it exists."""
        tmp = temporary(self.dir / name, f"{self.token}.")
        with open(tmp, "wb") as f:
            f.write(content)
            f.flush()
            os.fsync(f.fileno())
        try:
            os.link(tmp, self.dir / name)
            return True
        except FileExistsError:
            return False
        finally:
            tmp.unlink()

    def agree(self, name: str, settings: dict, first: dict | None = None) -> dict:
        """The first process writes `settings` to work/NAME, and of `first` what they lack: the later ones
        take that as it is. Returns what is written; UserError for a process that has other settings."""
        self._create(name, json.dumps((first or {}) | settings, indent=1).encode())
        begun = read_json(self.dir / name)
        differ = [f"{k}: {begun.get(k)!r} then, {v!r} now" for k, v in settings.items() if begun.get(k) != v]
        if differ:
            todo = "use the same ones or another --output_dir"
            raise UserError(f"{self.dir.parent} was begun with other settings ({'; '.join(differ)}); {todo}")
        return begun

    def _plan(self, files: list[str], size: int) -> list[list[str]]:
        """The units of all plans, after a plan of our own for files that none has."""
        units, planned = [], set()
        for number in itertools.count():
            path = self.dir / f"plan_{number:03d}.bin"
            if not path.exists():
                new = [f for f in files if f not in planned]
                if not new:
                    return units
                self._create(path.name, b"\0".join(map(os.fsencode, new)))
            listed = [os.fsdecode(b) for b in path.read_bytes().split(b"\0")]
            units += [listed[i : i + size] for i in range(0, len(listed), size)]
            planned.update(listed)

    # -- claims --

    def _owner_alive(self, claim: Path) -> bool:
        """By the process table where it is ours, else by heartbeats alone: a host name says nothing of it."""
        try:
            owner = read_json(claim)
            if owner["space"] == pid_space():
                return start_time(owner["pid"]) == owner["start"]
        except (UserError, TypeError, KeyError):  # torn by a crash, or of an older version: its age tells
            pass
        try:
            beat = claim.stat().st_mtime
        except OSError:
            return False
        if self.seen.get(claim.name, (None,))[0] != beat:
            self.seen[claim.name] = beat, time.monotonic()
        # by two clocks: where one has been set back, its ages say nothing
        return max(time.time() - beat, time.monotonic() - self.seen[claim.name][1]) < STALE_S

    def _heartbeat(self) -> None:
        while not self._stop.wait(HEARTBEAT_S):
            for held in list(self.claims.values()):
                try:
                    os.utime(held)
                except OSError as e:
                    self.warn(f"warning: claim {held.name} could not be refreshed: {e}")

    def result_path(self, unit: int) -> Path:
        return self.dir / f"unit_{unit:06d}.json"

    def claim(self, unit: int) -> bool:
        """True when the unit is ours to do now; False when it is done or a live process works on it."""
        if self.result_path(unit).exists():
            return False
        generations = (self.dir / f"unit_{unit:06d}.{n:04d}.claim" for n in itertools.count())
        last, claim = None, next(generations)
        while claim.exists():  # no listing of the folder, it may hold 100,000 files
            last, claim = claim, next(generations)
        if last and self._owner_alive(last):
            return False
        me = {"space": pid_space(), "pid": os.getpid(), "start": start_time(os.getpid())}
        if not self._create(claim.name, json.dumps(me).encode()) or self.result_path(unit).exists():
            return False  # taken, or even committed, between our two looks
        self.claims[unit] = claim
        return True

    def still_ours(self, unit: int) -> bool:
        """False when we slept so long that another took the unit over: then our output must not land."""
        stem, number, _ = self.claims[unit].name.split(".")
        return not (self.dir / f"{stem}.{int(number) + 1:04d}.claim").exists()

    def commit(self, unit: int, result: dict) -> None:
        write_json(self.result_path(unit), result)
        self.claims.pop(unit, None)

    def release(self, unit: int | None = None) -> None:
        """Give a unit, or all that are ours, back unfinished (a stop was asked for)."""
        for u in list(self.claims) if unit is None else [unit]:
            if self.still_ours(u):  # else the next generation rests on ours
                self.claims[u].unlink(missing_ok=True)
            del self.claims[u]

    def results(self) -> list[dict]:
        """Results of the units that are done, by whomever, in order."""
        paths = map(self.result_path, range(len(self.units)))
        return [read_json(p) for p in paths if p.exists()]

    def unfinished(self, units=None) -> list[int]:
        """Those of `units` (of all, without them) that nobody has finished."""
        units = range(len(self.units)) if units is None else units
        return [u for u in units if not self.result_path(u).exists()]

    def close(self) -> None:
        self._stop.set()


class Progress:
    """How far a shared job is: log line, stdout, metrics every few seconds; one rewritten line on a terminal.

    Units are claimed in order, so files before the unit that we are at are done, or with others. sizes:
    {unit: files}; marks: what tells our lines in metrics.jsonl from those of other processes.
    """

    def __init__(self, log: RunLog, kind: str, sizes: dict[int, int], **marks):
        self.log, self.kind, self.marks, self.total = log, kind, marks, sum(sizes.values())
        self.before = dict(zip(sizes, itertools.accumulate(sizes.values(), initial=0)))
        self.start = self.last = time.monotonic()
        self.done = self.skipped = self.seconds = 0
        self.base = None  # files that were done before we began
        self.waits = False

    def at(self, unit: int) -> None:
        """Ours is this unit now."""
        self.done = max(self.done, self.before[unit])
        self.base = self.done if self.base is None else self.base

    def add(self, seconds: float | None) -> None:
        """One more file of ours, of so many seconds; None = skipped."""
        self.done += 1
        self.skipped += seconds is None
        self.seconds += seconds or 0.0
        self.log.rewrite(self.text())
        if time.monotonic() - self.last >= PROGRESS_S:
            self.say()

    def left(self, files: int) -> None:
        """All units were looked at; so many files are in those that others work on."""
        self.done = self.total - files
        if files and not self.waits:
            self.log.say(f"{files} files are with other processes: waiting for them")
            self.waits = True
        elif time.monotonic() - self.last >= PROGRESS_S:
            self.say()

    def values(self) -> dict:
        spent, moved = max(1e-9, time.monotonic() - self.start), self.done - (self.base or 0)
        eta = (self.total - self.done) * spent / moved if moved else None
        return {"skipped": self.skipped, "audio_s_per_s": round(self.seconds / spent, 2), "eta_s": eta}

    def text(self) -> str:
        v = self.values()
        speed = f"{v['audio_s_per_s']:.1f} audio-s/s  eta {human_time(v['eta_s'])}"
        return f"{self.kind} {self.done}/{self.total} files  skipped {v['skipped']}  {speed}"

    def say(self) -> None:
        self.last = time.monotonic()
        self.log.say(self.text())
        values = {k: v for k, v in self.values().items() if v is not None}
        self.log.metric(step=self.done, total_steps=self.total, **values, **self.marks)


def start_process() -> None:
    """Signals are the parent's business; a process whose parent was killed (-9 too) goes at once."""
    end_with_parent()  # where that is a fork server, which ends with it
    ignore_stop_signals()
    parent = multiprocessing.parent_process().sentinel
    threading.Thread(target=lambda: (wait_for([parent]), os._exit(1)), daemon=True).start()


def share_of_cores(device_type: str) -> int:
    """Processes that read and decode for one GPU: this process' cores over the GPUs that it sees, or over its
    fellows on this machine where each is shown one alone. Beside a CPU one: its cores are the model's."""
    if device_type == "cpu":
        return 1
    import torch

    sharers = max(1, torch.cuda.device_count(), int(os.environ.get("LOCAL_WORLD_SIZE", 1)))
    return max(1, len(os.sched_getaffinity(0)) // sharers)


def processes(number: int, method: str) -> ProcessPoolExecutor | None:
    """A pool for in_order. method: spawn or forkserver; a fork would copy threads and CUDA's state."""
    check_descriptors(64 + 8 * number)
    context = multiprocessing.get_context(method)
    return ProcessPoolExecutor(number, context, start_process) if number else None


def in_order(pool, function, jobs, ahead: int):
    """Yield (key, function(*args)) of the jobs (key, args), in their order; at most `ahead` of them are with
    the processes of the pool (None: each is done here when its turn comes)."""
    if pool is None:
        yield from ((key, function(*args)) for key, args in jobs)
        return
    begun = collections.deque()
    for key, args in jobs:
        begun.append((key, pool.submit(function, *args)))
        if len(begun) == ahead:
            key, future = begun.popleft()
            yield key, future.result()
    for key, future in begun:
        yield key, future.result()
