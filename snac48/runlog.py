"""A run directory as every program keeps it: metrics.jsonl, training.log, and where the run came from."""

import contextlib
import errno
import fcntl
import json
import math
import os
import socket
import subprocess
import sys
import time
from pathlib import Path

from .cli import UserError, printable
from .files import finite_json, sweep_leftovers
from .jobs import read_small
from .process import pid_space, start_time

# ---- provenance ----


def git_sha() -> str | None:
    try:
        out = subprocess.run(
            ["git", "rev-parse", "HEAD"], cwd=Path(__file__).parent, capture_output=True, text=True
        )
    except OSError:
        return None
    return out.stdout.strip() or None


def versions() -> dict:
    import platform
    from importlib.metadata import PackageNotFoundError, version

    found = {"python": platform.python_version()}
    for name in ("torch", "snac", "numpy", "pyarrow", "soundfile", "soxr", "transformers"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = None
    return found


# ---- one owner ----

HELD: dict[tuple[int, int], object] = {}  # lock files of this process: (device, inode) -> open file


def hold(folder: str | Path) -> None:
    """Own a run directory until the end event or the end of this process, whichever way: the kernel keeps the
    lock on run.lock. Raises UserError naming the owner where another process, perhaps of another machine,
    has it."""
    path = Path(folder) / "run.lock"
    try:
        if path.exists() and identity(os.stat(path)) in HELD:  # to open and close it would give it back
            return
        f = open(path, "a+")
    except OSError as e:
        raise UserError(f"{path} could not be written: {e.strerror}") from None
    try:
        fcntl.lockf(f, fcntl.LOCK_EX | fcntl.LOCK_NB)  # not inherited by workers: theirs would outlive us
    except OSError as e:
        if e.errno not in (errno.EACCES, errno.EAGAIN):
            todo = "choose an --output_dir on one that does"
            raise UserError(f"{folder} lies on a file system without locks ({e.strerror}); {todo}") from None
        raise UserError(f"{folder} is in use by {owner_of(folder)}") from None
    HELD[identity(os.fstat(f.fileno()))] = f
    f.truncate(0)
    me = {"host": socket.gethostname(), "pid": os.getpid(), "since": time.strftime("%F %T")}
    f.write(json.dumps(me))
    f.flush()


def hold_begun(folder: str | Path) -> None:
    """`hold`, by the first process of a training, of a directory that may not exist yet."""
    if os.environ.get("RANK", "0") == "0" and Path(folder).is_dir():
        hold(folder)


def release(folder: str | Path) -> None:
    with contextlib.suppress(OSError, KeyError):
        HELD.pop(identity(os.stat(Path(folder) / "run.lock"))).close()


def identity(found: os.stat_result) -> tuple[int, int]:
    return found.st_dev, found.st_ino


def owner_of(folder: str | Path) -> str:
    todo = "stop it first (./launch.sh status names its job), or choose another folder"
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
        owner = json.loads(read_small(Path(folder) / "run.lock"))
        return f"process {owner['pid']} on {owner['host']} since {owner['since']}: {todo}"
    return f"another process: {todo}"


class RunLog:
    """`metrics.jsonl` (one flushed object a line) and `training.log` (one human line) in a run directory, and
    `processes.jsonl`, a line for every process that writes there: by it a reader knows whether one lives. The
    human line also goes to stdout, which the launcher sends to logs/NAME.log. Rank > 0: `quiet=True`.
    alone: the directory belongs to this process, see `hold`."""

    def __init__(self, output_dir, log_name: str = "training.log", quiet: bool = False, alone: bool = False):
        self.dir = Path(output_dir)
        self.quiet = quiet
        self.rewriting = False  # the last line on the terminal is to be replaced by the next
        if quiet:
            return
        self.dir.mkdir(parents=True, exist_ok=True)
        if alone:
            hold(self.dir)
        sweep_leftovers(self.dir)
        self.metrics = append_to(self.dir / "metrics.jsonl")
        self.log = append_to(self.dir / log_name)
        pid = os.getpid()
        me = {"t": time.time(), "host": socket.gethostname(), "space": pid_space()}
        me |= {"pid": pid, "start": start_time(pid)}
        with append_to(self.dir / "processes.jsonl") as f:
            write_all(f, json.dumps(me | {"argv": sys.argv}) + "\n")

    def say(self, text: str) -> None:
        """One line, whatever names it holds."""
        if self.quiet:
            return
        text = printable(text)
        show("\r\033[K" * self.rewriting + text + "\n")
        self.rewriting = False
        write_all(self.log, f"{time.strftime('%Y-%m-%d %H:%M:%S')} {text}\n")

    def rewrite(self, text: str) -> None:
        """On a terminal only: a line that the next one replaces."""
        if sys.stdout.isatty() and not self.quiet:
            show(f"\r{printable(text)}\033[K")
            self.rewriting = True

    def metric(self, **values) -> None:
        """One line of metrics.jsonl; `event=` for start, resume, checkpoint, val, skip, end."""
        if self.quiet:
            return
        values = finite_json({"t": round(time.time(), 3), **values})
        write_all(self.metrics, json.dumps(values, allow_nan=False) + "\n")
        if values.get("event") == "end":
            release(self.dir)


def show(text: str) -> None:
    """On stdout. Where nobody reads that any more (`train … | head`, a closed terminal), the run goes on
    without it: its log has every line."""
    try:
        print(text, end="", flush=True)
    except UnicodeEncodeError:  # a terminal of another encoding
        print(text.encode("ascii", "backslashreplace").decode(), end="", flush=True)
    except OSError as e:
        if e.errno not in (errno.EPIPE, errno.EIO):
            raise
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def append_to(path: Path):
    """The file, open to append unbuffered: what a full disk refuses must not wait in a buffer."""
    f = open(path, "ab+", buffering=0)
    if f.tell():  # a killed writer may have left half a line; ours must start on its own
        f.seek(-1, os.SEEK_END)
        if f.read(1) != b"\n":
            f.write(b"\n")
    return f


def write_all(f, text: str) -> None:
    """Raises OSError naming the file when the disk is full."""
    data = text.encode()
    try:
        while data:
            data = data[f.write(data) :]
    except OSError as e:
        raise OSError(e.errno, e.strerror, f.name) from None


class SampleLog:
    """`step epoch row row …` for each committed optimiser step: the rows that the weights have seen. Cut to
    `step` when a run starts or resumes, so that what was lost by a kill is not counted twice; rank 0 does so
    for all ranks, which may have been more."""

    def __init__(self, folder: Path, rank: int, step: int):
        for path in folder.glob("samples.rank*.log") if rank == 0 else ():
            lines = path.read_text().splitlines(keepends=True)
            path.write_text("".join(x for x in lines if x.endswith("\n") and int(x.split()[0]) <= step))
        folder.mkdir(parents=True, exist_ok=True)  # of a machine of its own, perhaps
        self.file = append_to(folder / f"samples.rank{rank}.log")

    def add(self, step: int, epoch: int, rows: list[int]) -> None:
        write_all(self.file, " ".join(map(str, [step, epoch, *rows])) + "\n")


def step_line(step: int, total: int, epoch: int, epochs: int, phase: str, values: dict) -> str:
    """The stable grammar of a progress line: `step N/M epoch E/F PHASE key value key value …`."""
    parts = []
    for key, value in values.items():
        if isinstance(value, float):
            value = f"{value:.2e}" if key.startswith("lr") else f"{value:.4g}"
        parts.append(f"{key} {value}")
    return f"step {step}/{total} epoch {epoch}/{epochs} {phase} " + " ".join(parts)


def human_time(seconds: float | None) -> str:
    if seconds is None or not math.isfinite(seconds):
        return "?"
    s = int(seconds)
    return f"{s // 3600}:{s // 60 % 60:02d}:{s % 60:02d}"
