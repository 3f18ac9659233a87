"""What the programs agree on: run directory, log line, metrics file, atomic files, checkpoints, exit codes.

Imported by every script (torch only inside the functions that need it, so that --help stays fast).
"""

from __future__ import annotations

import argparse
import contextlib
import difflib
import errno
import json
import math
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
import zipfile
from pathlib import Path

# ---- exit codes (README lists them) ----

EXIT_OK = 0
EXIT_ERROR = 1  # wrong input or environment: one sentence on stderr says what to do
EXIT_USAGE = 2  # argparse: unknown or malformed flag
EXIT_STOPPED = 3  # SIGTERM / SIGINT / SIGUSR1: a checkpoint was written, the same command continues
EXIT_DIVERGED = 4  # too many non-finite or outlier steps in a row
EXIT_BAD_INPUT = 5  # more bad files or rows than --max_bad_fraction allows


class UserError(Exception):
    """Something the user can mend; `main_guard` prints it as one sentence and exits with `code`."""

    def __init__(self, message: str, code: int = EXIT_ERROR):
        super().__init__(message)
        self.code = code


class Parser(argparse.ArgumentParser):
    """argparse whose errors are one line that names the nearest flag, not 60 lines of usage."""

    def __init__(self, **kw):
        super().__init__(**{"formatter_class": argparse.RawDescriptionHelpFormatter} | kw)

    def error(self, message):
        known, hints = [flag for action in self._actions for flag in action.option_strings], []
        for word in re.findall(r"(?<!\S)--[\w-]+", message.partition("unrecognized arguments:")[2]):
            hints += [f"{word}: did you mean {near}?" for near in difflib.get_close_matches(word, known, 1)]
        self.exit(2, f"{self.prog}: error: {message}; {' '.join(hints) or '--help lists all flags'}\n")


def guarded(function, *args):
    """function(*args); a UserError becomes one line on stderr and an exit, the unforeseen keeps its
    traceback."""
    try:
        return function(*args)
    except UserError as e:
        print(f"{Path(sys.argv[0]).name}: error: {e}", file=sys.stderr, flush=True)
        leave(e.code)
    except KeyboardInterrupt:
        print(f"{Path(sys.argv[0]).name}: interrupted", file=sys.stderr, flush=True)
        leave(EXIT_STOPPED)
    except BrokenPipeError:  # `... | head`: the reader has gone, which is no error of ours
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        leave(EXIT_OK)
    except OSError as e:
        if e.errno not in NO_ROOM:
            raise
        where = f"{e.filename} could not be written" if e.filename else "a file could not be written"
        with contextlib.suppress(OSError):  # stderr may lie on the same disk
            print(f"{Path(sys.argv[0]).name}: error: {where}: {e.strerror}; free some space, then run "
                  "the same command again (a training: with --resume auto)",
                  file=sys.stderr, flush=True)  # fmt: skip
        leave(EXIT_ERROR)


def leave(code: int) -> None:
    """Exit; under launch.sh the code is left in $JOB_EXIT_FILE, by which status tells FINISHED from DEAD."""
    note_exit(code)
    for stream in (sys.stdout, sys.stderr):  # what a full disk did not take would turn the exit code into 120
        try:
            stream.flush()
        except OSError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
    sys.exit(code)


def note_exit(code: int) -> None:
    path = os.environ.get("JOB_EXIT_FILE")
    if path and os.environ.get("RANK", "0") == "0":
        with contextlib.suppress(OSError):  # a full disk: the process still ends with the code
            Path(path).write_text(f"{code}\n")


def main_guard(main, *args) -> None:
    leave(guarded(main, *args) or EXIT_OK)


STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)


def stop_at_once() -> None:
    """While a program starts, a stop signal ends it at once with EXIT_STOPPED: there is nothing to save yet.

    A thread does it, told by the C part of Python's signal handling: the main thread may be inside a long
    call (importing torch, waiting for the other processes), where no Python handler runs. Until StopFlag.
    """
    read, write = os.pipe()
    os.set_blocking(write, False)

    def watch():
        name = signal.Signals(os.read(read, 1)[0]).name
        note_exit(EXIT_STOPPED)
        with contextlib.suppress(OSError):
            print(f"{Path(sys.argv[0]).name}: stopped by {name} while starting; nothing was changed, the "
                  "same command starts again", file=sys.stderr, flush=True)  # fmt: skip
        os._exit(EXIT_STOPPED)

    threading.Thread(target=watch, daemon=True).start()
    signal.set_wakeup_fd(write)
    for sig in STOP_SIGNALS:
        signal.signal(sig, lambda *_: None)


class StopFlag:
    """SIGTERM, SIGINT and SIGUSR1 set a flag that loops poll; a second SIGINT interrupts at once."""

    def __init__(self):
        self.signal: str | None = None
        for sig in STOP_SIGNALS:
            signal.signal(sig, self._handle)
        signal.set_wakeup_fd(-1)  # stop_at_once has had its time; in this order no signal is lost

    def _handle(self, number, frame):
        if self.signal and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.signal = signal.Signals(number).name

    def __bool__(self) -> bool:
        return self.signal is not None


def ignore_stop_signals(*_) -> None:
    """For workers: `launch.sh stop` signals the whole process group, but the main process decides."""
    for sig in STOP_SIGNALS:
        signal.signal(sig, signal.SIG_IGN)


# ---- atomic files ----

NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)  # disk full, quota used up, file size limit


def temporary(path: Path, tag: str = "") -> Path:
    """Where the content of `path` waits until it is whole; sweep_leftovers reads host and PID out of it."""
    owner = f"{socket.gethostname()}.{os.getpid()}.{threading.get_ident()}"
    return path.with_name(f".{path.name}.{tag}{owner}.tmp")


def sweep_leftovers(folder: str | Path) -> int:
    """Delete what killed processes were writing in `folder`: without this every kill -9 inside a checkpoint
    write would cost the disk a checkpoint for ever. Returns how many.

    A temporary file is a leftover when its process on this host is gone (or has our own PID: we have only
    just begun), or when nobody has touched it for an hour (another host, a container that is no more).
    """
    found = 0
    for path in Path(folder).glob(".*.tmp"):
        pid = re.search(r"\.(\d+)\.\d+\.tmp$", path.name)
        if not pid:
            continue
        here = f".{socket.gethostname()}.{pid[1]}." in path.name
        gone = here and (int(pid[1]) == os.getpid() or not Path(f"/proc/{pid[1]}").exists())
        with contextlib.suppress(FileNotFoundError):  # another process sweeps, too
            if gone or time.time() - path.stat().st_mtime > 3600:
                shutil.rmtree(path) if path.is_dir() else path.unlink()
                found += 1
    return found


def fsync_folder(folder: Path) -> None:
    fd = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


@contextlib.contextmanager
def atomic_file(path: str | Path, mode: str = "wb", **kwargs):
    """A file object whose content appears at `path` whole or not at all.

    Written beside it, fsynced, renamed, folder fsynced. A failed body (disk full, say) leaves the old file.
    """
    path = Path(path)
    tmp = temporary(path)
    try:
        with open(tmp, mode, **kwargs) as f:
            yield f
            f.flush()
            os.fsync(f.fileno())
        os.replace(tmp, path)
        fsync_folder(path.parent)
    finally:
        tmp.unlink(missing_ok=True)


def finite_json(value):
    """JSON has no NaN: non-finite floats become the strings "NaN", "Infinity", "-Infinity"."""
    if isinstance(value, dict):
        return {k: finite_json(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [finite_json(v) for v in value]
    if isinstance(value, float) and not math.isfinite(value):
        return "NaN" if math.isnan(value) else ("Infinity" if value > 0 else "-Infinity")
    return value


def write_json(path: str | Path, value) -> None:
    with atomic_file(path, "w", encoding="utf-8") as f:
        json.dump(finite_json(value), f, indent=2, allow_nan=False, default=str)
        f.write("\n")


def read_json(path: str | Path):
    """Raises UserError when the file is missing or is not JSON."""
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{path} does not exist") from None
    except (ValueError, OSError) as e:
        raise UserError(f"{path} cannot be read as JSON: {e}") from None


# ---- checkpoints ----


def save_checkpoint(path: str | Path, state: dict) -> None:
    """torch.save through a temporary file: `path` is always a whole checkpoint, old or new."""
    import torch

    try:
        with atomic_file(path) as f:
            torch.save(state, f)
    except OSError as e:
        raise UserError(f"checkpoint {path} could not be written: {e.strerror}; free some space or choose "
                        "another --output_dir, then --resume the previous checkpoint") from e  # fmt: skip
    except RuntimeError as e:  # torch's zip writer reports a full disk this way
        if not any(word in str(e) for word in ("write", "PytorchStreamWriter", "inline_container")):
            raise
        raise UserError(f"checkpoint {path} could not be written (disk full?): {str(e).splitlines()[0]}; "
                        "free some space, then --resume from the previous checkpoint") from e  # fmt: skip


def check_zip(path: Path) -> str | None:
    """Reason why a torch checkpoint is damaged, or None. torch.load never checks the zip's CRCs."""
    try:
        with zipfile.ZipFile(path) as z:
            for entry in z.infolist():  # torch.save stores plainly; inflating could also fill the memory
                if entry.compress_type != zipfile.ZIP_STORED or entry.flag_bits & 1:
                    return f"{entry.filename} is compressed or encrypted"
            broken = z.testzip()
        return f"CRC error in {broken}" if broken else None
    except Exception as e:  # a flipped bit in a header can make zipfile raise nearly anything
        return first_line(e)


def first_line(e: BaseException) -> str:
    """The line of a long message (TorchScript's hold whole tracebacks) that says what is wrong."""
    lines = [line.strip() for line in str(e).splitlines() if line.strip()] or [type(e).__name__]
    errors = [line for line in lines if re.match(r"\w*(Error|Exception)\b", line)]
    return (errors[-1] if errors else lines[0])[:300]


def load_checkpoint(path: str | Path, map_location="cpu") -> dict:
    """Verified, `weights_only=True` (a pickle that would run code is refused), dense tensors only.

    Raises UserError naming the file and the reason.
    """
    import torch

    path = Path(path)
    if not path.is_file():
        raise UserError(f"checkpoint {path} does not exist")
    reason = check_zip(path)
    if reason:
        raise UserError(f"checkpoint {path} is damaged ({reason}); use an older one from {path.parent}")
    try:
        state = torch.load(path, map_location=map_location, weights_only=True)
    except Exception as e:
        reason = first_line(e)
        if "weights_only" in str(e):  # torch goes on to say how to run the code all the same
            named = re.search(r"Unsupported (?:global: GLOBAL|class|operand) ([\w.]+)", str(e))
            what = f" ({named[1]})" if named else ""
            reason = f"it holds more than tensors and numbers{what} and could run code"
        raise UserError(f"checkpoint {path} was refused: {reason}") from None
    if not isinstance(state, dict):
        raise UserError(f"checkpoint {path} holds a {type(state).__name__}, not a dict")

    todo, seen = [("state", state)], set()
    while todo:  # no recursion: a pickle may nest as deep as it likes, or hold itself
        where, value = todo.pop()
        if isinstance(value, torch.Tensor):
            odd = value.layout != torch.strided or value.is_quantized or value.is_nested or value.is_meta
            if odd:
                kind = "nested" if value.is_nested else "empty" if value.is_meta else value.layout
                raise UserError(f"checkpoint {path}: {where} is a {kind} tensor; only dense ones are read")
            if value.numel() * value.element_size() > value.untyped_storage().nbytes():
                raise UserError(f"checkpoint {path}: {where} claims {value.numel()} numbers and holds fewer")
        elif isinstance(value, (dict, list, tuple)) and id(value) not in seen:
            seen.add(id(value))
            items = value.items() if isinstance(value, dict) else enumerate(value)
            todo += [(f"{where[:200]}.{k}", v) for k, v in items]
    return state


# ---- run directory, metrics, log ----


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


def human_time(seconds: float | None) -> str:
    if seconds is None or not math.isfinite(seconds):
        return "?"
    s = int(seconds)
    return f"{s // 3600}:{s // 60 % 60:02d}:{s % 60:02d}"


class RunLog:
    """`metrics.jsonl` (one flushed object a line) and `training.log` (one human line) in a run directory.

    The human line also goes to stdout, which the launcher sends to logs/NAME.log. Rank > 0: `quiet=True`.
    """

    def __init__(self, output_dir: str | Path, log_name: str = "training.log", quiet: bool = False):
        self.dir = Path(output_dir)
        self.quiet = quiet
        if quiet:
            return
        self.dir.mkdir(parents=True, exist_ok=True)
        sweep_leftovers(self.dir)
        self.metrics = append_to(self.dir / "metrics.jsonl")
        self.log = append_to(self.dir / log_name)

    def say(self, text: str) -> None:
        if self.quiet:
            return
        print(text, flush=True)
        write_all(self.log, f"{time.strftime('%Y-%m-%d %H:%M:%S')} {text}\n")

    def metric(self, **values) -> None:
        """One line of metrics.jsonl; `event=` for start, resume, checkpoint, val, skip, end."""
        if self.quiet:
            return
        values = finite_json({"t": round(time.time(), 3), **values})
        write_all(self.metrics, json.dumps(values, allow_nan=False) + "\n")


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
    """`step row row …` for each committed optimiser step: the rows of the cache that the weights have seen.

    Truncated to `step` when a run starts or resumes, so that what was lost by a kill is not counted twice.
    """

    def __init__(self, path: str | Path, step: int):
        path, keep = Path(path), 0
        if path.exists():
            with open(path, "rb") as f:
                for line in f:
                    if not line.endswith(b"\n") or int(line.split()[0]) > step:
                        break
                    keep += len(line)
            os.truncate(path, keep)
        self.file = append_to(path)

    def add(self, step: int, rows: list[int]) -> None:
        write_all(self.file, " ".join(map(str, [step, *rows])) + "\n")

    def sync(self) -> None:
        """Before a checkpoint is written: it must never be ahead of the log, even when the power fails."""
        os.fsync(self.file.fileno())


def step_line(step: int, total: int, epoch: int, epochs: int, phase: str, values: dict) -> str:
    """The stable grammar of a progress line: `step N/M epoch E/F PHASE key value key value …`."""
    parts = []
    for key, value in values.items():
        if isinstance(value, float):
            value = f"{value:.2e}" if key.startswith("lr") else f"{value:.4g}"
        parts.append(f"{key} {value}")
    return f"step {step}/{total} epoch {epoch}/{epochs} {phase} " + " ".join(parts)


# ---- devices ----


def pick_device(name: str):
    """`cpu`, a GPU number (`0`), or `cuda:0` -> torch.device. Raises UserError when that GPU isn't there."""
    import torch

    name = str(name).lower()
    if name == "cpu":
        return torch.device("cpu")
    number = name.removeprefix("cuda:") if name != "cuda" else "0"
    if not number.isdigit():
        raise UserError(f"--device {name}: say cpu, or a GPU number such as 0")
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if int(number) >= count:
        raise UserError(f"GPU {number} isn't there: torch sees {count} GPU(s) here; use --device cpu"
                        + (f" or a number below {count}" if count else ""))  # fmt: skip
    return torch.device(f"cuda:{number}")
