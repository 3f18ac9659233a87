"""The files that launch.sh keeps of its jobs, read with care: NAME.json, NAME.pid, NAME.exit, NAME.log.

They lie in a folder that others may write to. A pipe among them must not hold up whoever looks, what they
hold must not drive the terminal, and a command is only run again from a description that nobody else could
have written. Imports the standard library alone: launch.sh asks without waiting for more.
"""

import errno
import glob
import json
import os
import stat
from pathlib import Path

from .process import alive

# ---- text and regular files ----


def printable(text: str) -> str:
    """The text as one line that a terminal only shows: escape sequences, line breaks, marks of direction and
    bytes that are no UTF-8, of a file's name perhaps, as \\x1b, \\n, \\u202e, \\udcff."""
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


class NotRegular(OSError):
    pass


def open_regular(path: str | Path, flags: int = 0) -> int:
    """A descriptor to read from. Raises OSError, and NotRegular for what might never begin, or never end, to
    be read: a pipe, a device, a folder."""
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK | flags)  # a pipe without a writer waits
    if not stat.S_ISREG(os.fstat(fd).st_mode):
        os.close(fd)
        raise NotRegular(errno.EINVAL, "not a regular file (a folder, pipe or device)", str(path))
    return fd


def read_small(path: str | Path, limit: int = 1 << 20) -> str:
    """The text of a regular file of at most `limit` bytes. Raises OSError."""
    with open(open_regular(path), "rb") as f:
        data = f.read(limit + 1)
    if len(data) > limit:
        raise OSError(errno.EFBIG, f"larger than {limit} bytes", str(path))
    return data.decode("utf-8", "replace")


# ---- one job ----


def job_state(pid_file, proc="/proc") -> tuple[str | None, int | None]:
    """(state as process.alive tells it, pid) from launch.sh's file `PID START COMMAND…`; (None, None) without
    a file. One that is not launch.sh's tells of no process."""
    try:
        words = read_small(pid_file).split()
    except FileNotFoundError:
        return None, None
    except OSError:
        return "DEAD", None
    pid = words[0] if words and words[0].isascii() and words[0].isdigit() else ""
    if len(words) < 2 or not 0 < len(pid) < 10:
        return "DEAD", None
    return alive(int(pid), words[1], proc), int(pid)


def description(path: str | Path) -> dict:
    """NAME.json as launch.sh wrote it. Raises OSError, and ValueError for anything else."""
    try:
        job = json.loads(read_small(path))
    except RecursionError:
        raise ValueError("nested too deeply") from None
    if not isinstance(job, dict):
        raise ValueError("not a JSON object")
    os.fsencode(json.dumps(job, ensure_ascii=False))  # else it names what no file system could hold
    return job


def exit_code(folder: Path, name: str) -> str:
    """What the job left when it ended; "" for one that had no time to."""
    try:
        code = read_small(folder / f"{name}.exit", 64).strip()
    except OSError:
        return ""
    return code if code.isascii() and code.isdigit() else ""


def job_word(folder: str | Path, name: str) -> str:
    """What `status` calls it: RUNNING, FINISHED, STOPPED, DEAD(exit code), DEAD, STALE_PID or ON_HOST."""
    folder = Path(folder)
    try:
        host = description(folder / f"{name}.json").get("host")
    except (OSError, ValueError):
        host = None
    if isinstance(host, str) and host != os.uname().nodename:
        return f"ON_{printable(host)}"
    state, _ = job_state(folder / f"{name}.pid")
    if state in ("RUNNING", "STALE_PID"):
        return state
    code = exit_code(folder, name)
    return {"": "DEAD", "0": "FINISHED", "3": "STOPPED"}.get(code, f"DEAD({code})")


def last_line(path: Path) -> str:
    try:
        with open(open_regular(path), "rb") as f:
            f.seek(max(0, os.fstat(f.fileno()).st_size - 4000))
            text = f.read(4000).decode("utf-8", "replace")
    except OSError as e:
        return "" if isinstance(e, FileNotFoundError) else f"({printable(e.strerror)})"
    lines = [line for line in text.replace("\r", "\n").split("\n") if line.strip()]
    return printable(lines[-1])[:110] if lines else ""


def status(folder: str | Path) -> list[str]:
    """A line for each job."""
    folder, lines = Path(folder), []
    for path in sorted(folder.glob("*.json")):
        name, (_, pid) = path.stem, job_state(path.with_suffix(".pid"))
        row = f"{printable(name):24} {job_word(folder, name):10} pid {pid or '':<8} "
        lines.append(row + last_line(path.with_suffix(".log")))
    return lines or [f"no jobs in {folder}"]


def resumed(path: str | Path) -> list[str]:
    """[kind, GPUs, run directory, folder to start in, command …] by which a job goes on. Raises ValueError
    where somebody else could have written the description: it would run their command."""
    try:
        found, job = os.stat(path), description(path)
        kind, gpus, cwd, command = (job[key] for key in ("kind", "gpus", "cwd", "command"))
        run_dir = job.get("run_dir") or ""
        parts = [kind, gpus, run_dir, cwd, *command]
        if not isinstance(command, list) or not all(isinstance(p, str) and "\0" not in p for p in parts):
            raise ValueError("its parts are no texts")
        started = float(job["started"])
    except (OSError, ValueError, KeyError, TypeError) as e:
        raise ValueError(f"{path} is no description of a job ({e}): start the job anew") from None
    if found.st_uid != os.geteuid() or found.st_mode & 0o022:
        whose = "you do not own it" if found.st_uid != os.geteuid() else "others may write to it"
        todo = f"look at it, then chmod go-w {path}, or start the job anew"
        raise ValueError(f"{path} says what to run, and {whose}: {todo}")
    if kind == "train":  # the last --resume counts: it goes on from its own newest checkpoint
        made = glob.glob(glob.escape(run_dir) + "/checkpoint_*.pt")
        command = command + ["--resume", "auto"] * any(os.path.getmtime(p) > started for p in made)
    if kind == "rvq":  # continues by itself, unless its first start was told to begin anew
        command = [a for a in command if a not in ("--no-resume", "--ignore-arch")]
    return [kind, gpus, run_dir, cwd, *command]
