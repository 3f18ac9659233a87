"""What every program shares with its user: one-sentence errors, exit codes, stop signals, choice of device.

Imports torch only inside the function that needs it, so that --help and a misspelt flag answer at once.
"""

import atexit
import contextlib
import ctypes
import difflib
import errno
import functools
import io
import json
import multiprocessing
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
from pathlib import Path

from .bounds import LISTS, wrong
from .jobs import printable

# ---- exit codes: docs/jobs.md lists them ----

EXIT_OK = 0
EXIT_ERROR = 1  # wrong input or environment: one sentence on stderr says what to do
EXIT_STOPPED = 3  # SIGTERM / SIGINT / SIGUSR1: a checkpoint was written, the same command continues
EXIT_DIVERGED = 4  # too many non-finite or outlier steps in a row
EXIT_BAD_INPUT = 5  # more bad files or rows than --max_bad_fraction allows
EXIT_BROKEN_PIPE = 128 + signal.SIGPIPE  # as a shell calls it; what keeps a log goes on without its reader

NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)  # disk full, quota used up, file size limit


class UserError(Exception):
    """Something the user can mend; `main_guard` prints it as one sentence and exits with `code`."""

    def __init__(self, message: str, code: int = EXIT_ERROR):
        super().__init__(message)
        self.code = code


# ---- how a training ends ----


class Ending(Exception):
    """Leaves a training loop; a table in each script maps it to sentence, exit code and checkpoint."""


class Finished(Ending):
    """All steps are done."""


class Stopped(Ending):
    """A signal asked for it; the same command continues."""


class Diverged(Ending):
    """Too many steps in a row were skipped: not finite, or outliers."""


class LoaderDied(Ending):
    """A data loader process was killed, most likely because the memory ran out."""


class TooManyBadFiles(Ending):
    """More than --max_bad_fraction of the files could not be read."""


# ---- flags and configs ----


def read_config(path: str | Path, known) -> dict:
    """A JSON object in UTF-8, `//` comments allowed. Raises UserError for anything else, for a key that
    stands there twice, and for one that is not in `known`, naming the nearest."""

    def once(pairs):
        keys = [key for key, _ in pairs]
        if twice := [key for key in keys if keys.count(key) > 1]:
            raise UserError(f"config {path}: key {twice[0]!r} stands there twice; which one counts?")
        return dict(pairs)

    try:
        text = Path(path).read_bytes().decode("utf-8-sig")
        if "\0" in text:
            raise UnicodeError
        text = re.sub(r'("(?:\\.|[^"\\])*")|//[^\n]*', lambda m: m[1] or "", text)
        config = json.loads(text, object_pairs_hook=once)
    except OSError as e:
        raise UserError(f"config {path} cannot be read: {e.strerror}") from None
    except UnicodeError:
        raise UserError(f"config {path} is not UTF-8 text (UTF-16 or Latin-1?): save it as UTF-8") from None
    except RecursionError:
        raise UserError(f"config {path} is nested too deeply: it must be one flat JSON object") from None
    except ValueError as e:
        raise UserError(f"config {path} is not JSON: {e}") from None
    if not isinstance(config, dict):
        raise UserError(f"config {path} must be one JSON object")
    for key in config:
        if key not in known:
            near = difflib.get_close_matches(key, known, 1, 0)
            raise UserError(f"config {path}: unknown key {key!r}; did you mean {near[0]!r}?")
    return config


def layered(layers: dict[str, dict]) -> tuple[dict, dict]:
    """{source: values}, the weakest first -> (values, source of each)."""
    values, origin = {}, {}
    for source, layer in layers.items():
        values.update(layer)
        origin.update(dict.fromkeys(layer, source))
    return values, origin


def config_text(values: dict, origin: dict, form: str) -> str:
    """What --print_config prints: every value and where it came from, as lines or as JSON."""
    if form == "json":
        return json.dumps({k: {"value": v, "origin": origin.get(k)} for k, v in values.items()}, indent=1)
    rows = ((k, f"{v!r:36} {origin[k]}" if k in origin else repr(v)) for k, v in values.items())
    return "\n".join(f"{k:22} {text}" for k, text in rows)


def as_type(kind: type, value, where: str):
    """`value` of a config or checkpoint as bool, int, float or str (a list becomes "a,b"); else a UserError
    that begins with `where`."""
    plain = lambda v: isinstance(v, (str, int, float)) and not isinstance(v, bool)
    try:
        if kind is str and isinstance(value, list) and all(map(plain, value)):
            value = ",".join(map(str, value))
        if kind is bool and isinstance(value, bool):
            return value
        if kind is bool or not plain(value) or (kind is int and float(value) != int(value)):
            raise ValueError
        return kind(value)
    except (OverflowError, ValueError):
        raise UserError(f"{where} must be {kind.__name__}, not {value!r:.200}") from None


def numbers(kind: type, text: str, name: str) -> list:
    """ "1.0,2.0" -> [1.0, 2.0]; a UserError that names the flag where `text` is no such list."""
    try:
        return [kind(v) for v in text.split(",")]
    except ValueError:
        example = "1024,2048" if kind is int else "1.0,2.0"
        raise UserError(f'{name} {text!r} must be a comma-separated list such as "{example}"') from None


def one_line_errors(parser) -> None:
    """Make the errors of an argparse parser one line that names the nearest flag, not 60 lines of usage."""

    def error(message):
        known, hints = [flag for action in parser._actions for flag in action.option_strings], []
        for word in re.findall(r"(?<!\S)--[\w-]+", message.partition("unrecognized arguments:")[2]):
            hints += [f"{word}: did you mean {near}?" for near in difflib.get_close_matches(word, known, 1)]
        said = f"{parser.prog}: error: {message}; {' '.join(hints) or '--help lists all flags'}"
        parser.exit(2, printable(said) + "\n")

    def parse_args(*given):
        args = parse(*given)
        for action in parser._actions:  # argparse takes `--lr=--` for an empty list
            if action.nargs is None and getattr(args, action.dest, None) == []:
                error(f"argument {action.option_strings[0]}: expected one argument")
        return args

    parse, parser.error, parser.parse_args = parser.parse_args, error, parse_args


def within_bounds(values: dict, flags: dict | None = None, script: str = "") -> None:
    """Raises UserError for a number that is not what BOUNDS says of its option. flags: {name: its flag} where
    that is not --name."""
    for name, value in values.items():
        flag, given = (flags or {}).get(name, f"--{name}"), value
        if name in LISTS and isinstance(value, str):
            value = numbers(LISTS[name], value, flag)
        elif isinstance(value, bool) or not isinstance(value, (int, float)):
            continue
        if must := wrong(name, value, script):
            raise UserError(f"{flag} must be {'numbers ' * (value is not given)}{must}, not {given!r}")


@contextlib.contextmanager
def told_where_from(source):
    """A UserError of the block ends with where each option that it names has its value from. source(name):
    that in words, or None."""
    try:
        yield
    except UserError as e:
        flags = dict.fromkeys(re.findall(r"(?<![\w-])--[a-z][\w-]*", str(e)))
        names = {flag: flag[2:].replace("-", "_") for flag in flags}
        told = [f"{flag}: {words}" for flag, name in names.items() if (words := source(name))]
        raise UserError(f"{e} ({'; '.join(told)})" if told else str(e), e.code) from None


def read_flags(parser, argv=None):
    """The parser's args, by one_line_errors; a number out of its bounds is an error, too. --help shows the
    defaults that the texts leave out."""
    one_line_errors(parser)
    for action in parser._actions:
        shown = str(action.default) not in ("None", "False", "", "==SUPPRESS==")
        if shown and action.help and "(default" not in action.help:
            action.help += " (default: %(default)s)"
    args = parser.parse_args(argv)
    flags = {action.dest: action.option_strings[0] for action in parser._actions if action.option_strings}
    try:
        within_bounds(vars(args), flags)
    except UserError as e:
        parser.error(f"{e} (a flag)")
    return args


def warn(text: str) -> None:
    """On stderr, of several processes on a machine by the first: all of them have the same to say."""
    if os.environ.get("LOCAL_RANK", "0") == "0":
        with contextlib.suppress(OSError):  # nobody reads it any more
            print(printable(text), file=sys.stderr, flush=True)


def complain(text: str) -> None:
    with contextlib.suppress(OSError):  # a disk that is full, a pipe without a reader
        print(f"{Path(sys.argv[0]).name}: {printable(text)}", file=sys.stderr, flush=True)


def guarded(function, *args):
    """function(*args); a UserError becomes one line on stderr and an exit, the unforeseen a traceback. Of
    several processes of one training all end with it, and one on each machine says why."""
    open_streams()
    try:
        return function(*args)
    except UserError as e:
        fail(str(e), e.code)
    except KeyboardInterrupt:
        complain("interrupted")
        leave(EXIT_STOPPED)
    except BrokenPipeError:  # `... | head`: the reader has gone, and the work may be half done
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        leave(EXIT_BROKEN_PIPE)
    except (Exception, SystemExit) as e:
        if isinstance(e, OSError) and e.errno in NO_ROOM:
            where = f"{e.filename} could not be written" if e.filename else "a file could not be written"
            todo = "free some space, then run the same command again (a training: with --resume auto)"
            fail(f"{where}: {e.strerror}; {todo}", EXIT_ERROR)
        if out_of_memory(e):
            todo = "give it more, or less to do at once: a smaller --batch_size, fewer --num_workers"
            fail(f"the memory is exhausted ({first_line(e)}): {todo}; then run the same command again", 1)
        if isinstance(e, OSError) and (e.filename or e.errno in (errno.EIO, errno.EMFILE, errno.ENFILE)):
            fail(f"{e.filename or 'a file'} can't be used: {e.strerror}", EXIT_ERROR)
        if not isinstance(e, SystemExit):
            tell_all(f"{type(e).__name__}: {first_line(e)}", EXIT_ERROR)
        elif e.code:
            tell_all("its log says why", e.code)
        raise


def out_of_memory(e: BaseException) -> bool:
    """Whether it is the memory of the machine, not of a GPU, that ran out."""
    return isinstance(e, MemoryError) or (
        isinstance(e, (OSError, RuntimeError))
        and (getattr(e, "errno", 0) == errno.ENOMEM or "can't allocate memory" in str(e))
    )


def open_streams() -> None:
    """Where the caller has closed stdin, stdout or stderr they are /dev/null: the next file that is opened
    would get the number, and in it what libraries print. What the terminal's encoding lacks is shown
    escaped."""
    for fd, name in enumerate(("stdin", "stdout", "stderr")):
        stream = getattr(sys, name)
        if stream is None:
            try:
                os.fstat(fd)
            except OSError:
                os.set_inheritable(os.open(os.devnull, os.O_RDWR), True)
            setattr(sys, name, open(fd, "w" if fd else "r", closefd=False))
        elif fd and isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def fail(sentence: str, code: int) -> None:
    """Say it once a machine, and leave."""
    if sentence := tell_all(sentence, code):
        complain(f"error: {sentence}")
    leave(code)


def tell_all(sentence: str, code: int) -> str:
    """End the other processes of this training, if there are any; what is left to say here."""
    if int(os.environ.get("WORLD_SIZE", 1)) == 1:
        return sentence
    from .ranks import end_all

    return end_all(sentence, code)


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
    if path and os.environ.get("LOCAL_RANK", "0") == "0":  # a file of this machine
        with contextlib.suppress(OSError):  # a full disk: the process still ends with the code
            Path(path).write_text(f"{code}\n")


def main_guard(main, *args) -> None:
    leave(guarded(main, *args) or EXIT_OK)


STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)


def stop_at_once() -> None:
    """While a program starts, a stop signal ends it at once with EXIT_STOPPED: there is nothing to save yet.
    A thread does it, told by the C part of Python's signal handling: the main thread may be inside a long
    call (importing torch, waiting for the other processes), where no Python handler runs. Until StopFlag."""
    open_streams()
    read, write = os.pipe()
    os.set_blocking(write, False)

    def watch():
        name = signal.Signals(os.read(read, 1)[0]).name
        said = f"stopped by {name} while starting; nothing was changed, the same command starts again"
        ranks = sys.modules.get("snac48.ranks")  # no import: it would wait for the main thread's
        if hasattr(ranks, "joined") and ranks.joined():
            if ranks.ENDING.is_set():
                return  # the main thread leaves with another code
            said = ranks.end_all(said, EXIT_STOPPED)
        if said:
            complain(said)
        note_exit(EXIT_STOPPED)
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

    def check(self) -> None:
        if self:
            raise Stopped


def ignore_stop_signals(*_) -> None:
    """For workers: `launch.sh stop` signals the whole process group, but the main process decides."""
    for sig in STOP_SIGNALS:
        signal.signal(sig, signal.SIG_IGN)


@functools.cache
def kill_workers_at_exit() -> None:
    """Once a process: at exit multiprocessing sends a SIGTERM to workers that still live, and waits for ever
    where these ignore it (of a loader that an error left open)."""
    atexit.register(lambda: [child.kill() for child in multiprocessing.active_children()])


def first_line(e: BaseException) -> str:
    """The line of a long message (TorchScript's hold whole tracebacks) that says what is wrong."""
    lines = [line.strip() for line in str(e).splitlines() if line.strip()] or [type(e).__name__]
    errors = [line for line in lines if re.match(r"\w*(Error|Exception)\b", line)]
    return (errors[-1] if errors else lines[0])[:300]


def pick_device(name: str):
    """`cpu`, a GPU number (`0`), `cuda:0`, or nothing (the first GPU where there is one, else the CPU) as a
    torch.device; a GPU becomes the current one. Of several processes that torchrun starts on a machine each
    gets the GPU of its own number, and so does each of srun's where no number is given. Raises UserError when
    a GPU that was asked for isn't there, or when none was named and the driver knows of one that torch can't
    use: a training that was meant for it would take weeks on the CPU."""
    os.environ.setdefault("CUDA_DEVICE_ORDER", "PCI_BUS_ID")  # numbers as nvidia-smi shows them
    import torch

    name, count = str(name or "").lower(), torch.cuda.device_count() if torch.cuda.is_available() else 0
    if name != "cpu" and not count and (why := unusable_gpus()):
        raise UserError(why)
    name = own_gpu(name, count)
    if name == "cpu":
        keep_freed_memory()
        return torch.device("cpu")
    number = name.removeprefix("cuda:") if name != "cuda" else "0"
    if not number.isdigit():
        raise UserError(f"--device {name}: say cpu, or a GPU number such as 0")
    if int(number) >= count:
        raise UserError(
            f"GPU {number} isn't there: torch sees {count} GPU(s) here; use --device cpu"
            + (f" or a number below {count}" if count else "")
        )
    torch.cuda.set_device(int(number))  # what allocates without naming a device must not do so on GPU 0
    return torch.device(f"cuda:{number}")


def keep_freed_memory() -> None:
    """glibc returns every block above 32 MB to the kernel when it is freed. Torch's layers on a CPU allocate
    and free such a block each, and half of their time goes into page faults on fresh, zeroed pages; with
    memory kept for the next layer it does not. The process then stays at its peak size."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)  # glibc only
    if mallopt:
        mallopt(M_MMAP_MAX, 0)
        mallopt(M_TRIM_THRESHOLD, -1)


M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4  # of malloc.h

OLDEST_DRIVER = {"13": 580, "12": 525}  # that runs a wheel for this CUDA (NVIDIA's CUDA release notes)


def unusable_gpus() -> str:
    """Why torch sees no GPU where nvidia-smi does, and what to do; "" where it sees none either, or where
    CUDA_VISIBLE_DEVICES hides them."""
    import torch

    if os.environ.get("CUDA_VISIBLE_DEVICES", "0").strip() in ("", "-1") or not shutil.which("nvidia-smi"):
        return ""
    ask = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        found = subprocess.run(ask, capture_output=True, text=True, timeout=30)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    if found.returncode or not (drivers := found.stdout.split()):
        return ""
    major, cuda = int(drivers[0].partition(".")[0]), torch.version.cuda  # as in "13.0"; None: for CPUs
    fits = next((key for key, oldest in OLDEST_DRIVER.items() if major >= oldest), "")
    wheel = f"install a wheel for CUDA {fits} (https://download.pytorch.org/whl lists cu{fits}x)"
    needed = OLDEST_DRIVER.get((cuda or "").partition(".")[0], 0)
    if not cuda:
        why, todo = "without CUDA", wheel if fits else "update the driver and install a wheel with CUDA"
    elif major < needed:
        why = f"for CUDA {cuda}, which needs driver {needed} or newer"
        todo = f"update the driver, or {wheel}" if fits else "update the driver"
    else:
        why = f"for CUDA {cuda}, which this driver runs"
        todo = "see what python -c 'import torch; torch.cuda.init()' says (in a container: --gpus all)"
    have = f"nvidia-smi shows {len(drivers)} GPU(s) with driver {drivers[0]}, torch sees none"
    return f"{have}: torch {torch.__version__} is a wheel {why}; {todo}; to do without a GPU: --device cpu"


def own_gpu(name: str, count: int) -> str:
    """`name`, or what it stands for in this process, on a machine with so many GPUs."""
    if name == "cpu" or not (name or count):
        return "cpu"
    if int(os.environ.get("LOCAL_WORLD_SIZE", 1)) > 1:
        return os.environ["LOCAL_RANK"]
    # srun may show each task one GPU alone, or all of them to each
    return name or (os.environ.get("SLURM_LOCALID", "0") if count > 1 else "0")
