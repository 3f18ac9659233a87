"""Files that are whole or not there: atomic writing, JSON, and the leftovers of killed processes."""

import contextlib
import hashlib
import json
import math
import mmap
import os
import re
import shutil
import threading
import time
from pathlib import Path

import numpy as np

from .cli import UserError
from .jobs import open_regular
from .process import pid_space


def temporary(path: Path, tag: str = "") -> Path:
    """Where the content of `path` waits until it is whole; sweep_leftovers reads its writer out of it. Its
    length is fixed: file systems take names of 255 bytes at most, and the path's own may have them."""
    name = hashlib.sha256(f"{path.name} {tag}".encode("utf-8", "surrogateescape")).hexdigest()[:16]
    owner = f"{short_space()}.{os.getpid()}.{threading.get_ident()}"
    return path.with_name(f".{name}{path.suffix[:8]}.{owner}.tmp")


def short_space() -> str:
    return hashlib.sha256(pid_space().encode()).hexdigest()[:12]


def sweep_leftovers(folder: str | Path) -> int:
    """Delete what killed processes were writing in `folder`: without this every kill -9 inside a checkpoint
    write would cost the disk a checkpoint for ever. Returns how many.

    A temporary file is a leftover when its process, one whose PID means something here, is gone (or has our
    own PID: we have only just begun), or when nobody has touched it for an hour (another host or container).
    """
    found = 0
    for path in Path(folder).glob(".*.tmp"):
        pid = re.search(r"\.(\d+)\.\d+\.tmp$", path.name)
        if not pid:
            continue
        here = f".{short_space()}.{pid[1]}." in path.name
        gone = here and (int(pid[1]) == os.getpid() or not Path(f"/proc/{pid[1]}").exists())
        with contextlib.suppress(FileNotFoundError):  # another process sweeps, too
            if gone or time.time() - path.stat().st_mtime > 3600:
                shutil.rmtree(path) if path.is_dir() else path.unlink()
                found += 1
    return found


@contextlib.contextmanager
def atomic_file(path: str | Path, mode: str = "wb", **kwargs):
    """A file object whose content appears at `path` whole or not at all. Written beside it, fsynced, renamed,
    folder fsynced. A failed body (disk full, say) leaves the old file."""
    path = Path(path)
    tmp = temporary(path)
    try:
        with open(tmp, mode, **kwargs) as f:
            yield f
            f.flush()
            os.fsync(f.fileno())
        os.replace(tmp, path)
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)
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
        with open(open_regular(path), encoding="utf-8") as f:
            return json.load(f)
    except FileNotFoundError:
        raise UserError(f"{path} does not exist") from None
    except (ValueError, OSError, RecursionError) as e:
        raise UserError(f"{path} cannot be read as JSON: {e}") from None


def write_jsonl(path: str | Path, rows) -> None:
    # names that are no UTF-8 become JSON's own escapes of the bytes that Python kept
    with atomic_file(path, "w", encoding="utf-8", errors="backslashreplace") as f:
        for row in rows:
            f.write(json.dumps(row, allow_nan=False, ensure_ascii=False) + "\n")


class Records:
    """A file of records of one dtype: [row], [first:end], and np.asarray for all.

    Each access is one pread, and nothing is mapped: random rows of a large file would touch all of a map,
    which counts as memory of each process that does. Numbers that are read at every turn may be `mapped` at
    once, by the process that opens the file; those that it starts share these pages.
    skip: bytes before the first record; count: of them (default: all).
    """

    def __init__(self, path: Path, dtype, skip: int = 0, count: int | None = None, mapped: bool = False):
        self.how = path, np.dtype(dtype), skip, count, mapped
        self._open()

    def _open(self):
        path, self.dtype, self.skip, count, mapped = self.how
        self.fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        held = (os.fstat(self.fd).st_size - self.skip) // self.dtype.itemsize
        self.count, self.view = held if count is None else count, None
        if mapped:
            flags = mmap.MAP_SHARED | getattr(mmap, "MAP_POPULATE", 0)
            size = self.skip + self.count * self.dtype.itemsize
            pages = mmap.mmap(self.fd, size, flags, mmap.PROT_READ)
            self.view = np.frombuffer(pages, self.dtype, self.count, self.skip)

    def __del__(self):
        with contextlib.suppress(AttributeError, OSError):  # never opened; closed at exit
            os.close(self.fd)

    def __getstate__(self):  # another process opens it itself
        return {"how": self.how}

    def __setstate__(self, state):
        self.__dict__.update(state)
        self._open()

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, where):
        if self.view is not None:
            return self.view[where]
        first, end = (where.start, where.stop) if isinstance(where, slice) else (where, where + 1)
        size = self.dtype.itemsize
        found = np.frombuffer(os.pread(self.fd, (end - first) * size, self.skip + first * size), self.dtype)
        return found if isinstance(where, slice) else found[0]

    def __array__(self, dtype=None, copy=None):
        return self[0 : self.count].astype(dtype or self.dtype.base, copy=False)
