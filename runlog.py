"""What the programs agree on: run directory, log line, metrics file, atomic files, checkpoints, exit codes.

Imported by every script (torch only inside the functions that need it, so that --help stays fast).
"""

from __future__ import annotations

import contextlib
import json
import math
import os
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


def leave(code: int) -> None:
    """Exit; under launch.sh the code is left in $JOB_EXIT_FILE, by which status tells FINISHED from DEAD."""
    path = os.environ.get("JOB_EXIT_FILE")
    if path and os.environ.get("RANK", "0") == "0":
        Path(path).write_text(f"{code}\n")
    sys.exit(code)


def main_guard(main, *args) -> None:
    leave(guarded(main, *args) or EXIT_OK)


class StopFlag:
    """SIGTERM, SIGINT and SIGUSR1 set a flag that loops poll; a second SIGINT interrupts at once."""

    def __init__(self):
        self.signal: str | None = None
        for sig in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
            signal.signal(sig, self._handle)

    def _handle(self, number, frame):
        if self.signal and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.signal = signal.Signals(number).name

    def __bool__(self) -> bool:
        return self.signal is not None


def ignore_stop_signals(*_) -> None:
    """For workers: `launch.sh stop` signals the whole process group, but the main process decides."""
    for sig in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
        signal.signal(sig, signal.SIG_IGN)


# ---- atomic files ----


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
    tmp = path.with_name(f".{path.name}.{socket.gethostname()}.{os.getpid()}.{threading.get_ident()}.tmp")
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
            broken = z.testzip()
        return f"CRC error in {broken}" if broken else None
    except (zipfile.BadZipFile, OSError, EOFError, ValueError, NotImplementedError) as e:
        return str(e) or type(e).__name__


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
        raise UserError(f"checkpoint {path} was refused: {str(e).splitlines()[0]}") from None
    if not isinstance(state, dict):
        raise UserError(f"checkpoint {path} holds a {type(state).__name__}, not a dict")

    def walk(value, where):
        if isinstance(value, torch.Tensor):
            if value.layout != torch.strided or value.is_quantized:
                raise UserError(
                    f"checkpoint {path}: {where} is a {value.layout} tensor; only dense ones are read"
                )
        elif isinstance(value, dict):
            for k, v in value.items():
                walk(v, f"{where}.{k}")
        elif isinstance(value, (list, tuple)):
            for i, v in enumerate(value):
                walk(v, f"{where}[{i}]")

    walk(state, "state")
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
        self.metrics = open(self.dir / "metrics.jsonl", "a", encoding="utf-8")
        if self.metrics.tell():  # a killed writer may have left half a line; ours must start on its own
            with open(self.dir / "metrics.jsonl", "rb") as f:
                f.seek(-1, os.SEEK_END)
                if f.read(1) != b"\n":
                    self.metrics.write("\n")
        self.log = open(self.dir / log_name, "a", encoding="utf-8")

    def say(self, text: str) -> None:
        if self.quiet:
            return
        print(text, flush=True)
        self.log.write(f"{time.strftime('%Y-%m-%d %H:%M:%S')} {text}\n")
        self.log.flush()

    def metric(self, **values) -> None:
        """One line of metrics.jsonl; `event=` for start, resume, checkpoint, val, skip, end."""
        if self.quiet:
            return
        self.metrics.write(
            json.dumps(finite_json({"t": round(time.time(), 3), **values}), allow_nan=False) + "\n"
        )
        self.metrics.flush()


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
