"""A list of files shared among any number of processes on any machines, without server and locks."""

import collections
import json
import os
import socket
import threading
import time
import uuid
from pathlib import Path

from .cli import UserError
from .files import read_json, sweep_leftovers, temporary, write_json
from .process import start_time

HEARTBEAT_S = 20.0
STALE_S = 300.0  # a claim of another machine without a heartbeat this long is taken over


class SharedWork:
    """A list of files cut into units that any number of processes on any machines work off together.

    Below `<output_dir>/work/`: `plan_K.bin` (NUL-separated file list, immutable once linked into place),
    `unit_N.G.claim` (exclusive creation is the claim; a dead owner is followed by generation G+1),
    `unit_N.json` (the unit's result, written after its outputs: the commit). Nothing is ever locked, so a
    kill -9 at any moment leaves only a claim that the next process sees is dead. warn(text) is called where
    a claim can't be kept alive.
    """

    def __init__(self, output_dir: str | Path, files: list[str], unit_size: int, settings: dict, warn):
        self.dir = Path(output_dir) / "work"
        self.dir.mkdir(parents=True, exist_ok=True)
        sweep_leftovers(self.dir)
        self.unit_size, self.warn = unit_size, warn
        self.token = uuid.uuid4().hex
        self.claims: dict[int, Path] = {}  # units that are ours now
        self.agree("settings.json", settings | {"unit_size": unit_size})
        self.units: list[list[str]] = []
        self._plan(files)
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

    def agree(self, name: str, settings: dict) -> None:
        """The first process writes `settings` to work/NAME; UserError for a later one that has others."""
        if self._create(name, json.dumps(settings, indent=1).encode()):
            return
        begun = read_json(self.dir / name)
        differ = [f"{k}: {begun.get(k)!r} then, {v!r} now" for k, v in settings.items() if begun.get(k) != v]
        if differ:
            todo = "use the same ones or another --output_dir"
            if not any(self.dir.glob("unit_*.json")):
                todo += f", or delete {self.dir}: no file is done yet"
            raise UserError(f"{self.dir.parent} was begun with other settings ({'; '.join(differ)}); {todo}")

    def _plan(self, files: list[str]) -> None:
        wanted = list(files)
        planned: set[str] = set()
        number = 0
        while True:
            path = self.dir / f"plan_{number:03d}.bin"
            if not path.exists():
                new = [f for f in wanted if f not in planned]
                if not new:
                    return
                self._create(path.name, b"\0".join(os.fsencode(f) for f in new))
            listed = [os.fsdecode(b) for b in path.read_bytes().split(b"\0")]
            self.units += [listed[i : i + self.unit_size] for i in range(0, len(listed), self.unit_size)]
            planned.update(listed)
            number += 1

    # -- claims --

    def _owner_alive(self, claim: Path) -> bool:
        try:
            owner = json.loads(claim.read_text())
            age = time.time() - claim.stat().st_mtime
        except (OSError, ValueError):
            return claim.exists() and time.time() - claim.stat().st_mtime < STALE_S
        if owner["host"] == socket.gethostname():
            return start_time(owner["pid"]) == owner["start"]
        return age < STALE_S

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
        number = 0  # of the next generation; no listing of the folder, it may hold 100,000 files
        while (self.dir / f"unit_{unit:06d}.{number:04d}.claim").exists():
            number += 1
        if number and self._owner_alive(self.dir / f"unit_{unit:06d}.{number - 1:04d}.claim"):
            return False
        name = f"unit_{unit:06d}.{number:04d}.claim"
        me = {"host": socket.gethostname(), "pid": os.getpid(), "start": start_time(os.getpid())}
        if not self._create(name, json.dumps(me).encode()):
            return False
        if self.result_path(unit).exists():  # its owner committed between our two looks
            return False
        self.claims[unit] = self.dir / name
        return True

    def still_ours(self, unit: int | None = None) -> bool:
        """False when we slept so long that another took the unit over: then our output must not land.

        unit: default the one claimed last.
        """
        claim = self.claims[unit if unit is not None else next(reversed(self.claims))]
        stem, number, _ = claim.name.split(".")
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

    def results(self) -> list[dict] | None:
        """Results of all units in order, or None while some are not done."""
        paths = [self.result_path(u) for u in range(len(self.units))]
        if not all(p.exists() for p in paths):
            return None
        return [read_json(p) for p in paths]

    def unfinished(self) -> int:
        return sum(not self.result_path(u).exists() for u in range(len(self.units)))

    def close(self) -> None:
        self._stop.set()


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
