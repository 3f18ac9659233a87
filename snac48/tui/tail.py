"""Files that grow, read without ever holding them whole."""

import os
import re
from itertools import islice
from pathlib import Path

from ..jobs import open_regular
from .text import clean

TAIL_BYTES = 1 << 18  # read before the first paint; what lies before comes in afterwards
LONGEST = 1 << 20  # a longer line is skipped


def read_at(path: Path, start: int, size: int) -> bytes:
    try:
        with open(open_regular(path), "rb") as f:
            f.seek(start)
            return f.read(size)
    except OSError:
        return b""


class Tailer:
    """New lines of a file that is rotated, truncated, half-written. `\\r` ends a line too (tqdm's bar).

    Starts `tail` bytes before the end; `before` is the offset of what was left unread.
    """

    def __init__(self, path: Path, tail: int = TAIL_BYTES):
        self.path, self.tail = path, tail
        self.file = self.id = None
        self.begin()

    def begin(self, at: int = 0) -> None:
        self.pos = self.before = at
        self.partial, self.skipping, self.mark = b"", False, b""

    def open(self) -> bool:
        try:
            self.file = open(open_regular(self.path), "rb")
        except OSError:
            return False
        st = os.fstat(self.file.fileno())
        first, self.id, start = self.id is None, (st.st_dev, st.st_ino), st.st_size - self.tail
        self.begin()
        if first and start > 0:
            self.file.seek(start)
            self.begin(start + self.file.read(self.tail).find(b"\n") + 1)
        return True

    def poll(self, limit: int = 4 << 20) -> list[str]:
        """Lines completed since the last call, at most `limit` bytes; none while the file is missing."""
        if self.file is None and not self.open():
            return []
        lines = self._read(limit)
        try:
            st = os.stat(self.path)
        except OSError:
            return lines
        if (st.st_dev, st.st_ino) != self.id:  # rotated: what was left of the old file is read above
            self.file.close()
            self.file = None
            if self.open():
                lines += self._read(limit)
        return lines

    def _read(self, limit: int) -> list[str]:
        self.file.seek(self.pos - len(self.mark))
        if self.file.read(len(self.mark)) != self.mark:  # truncated, even where it has grown past us again
            self.begin()
        self.file.seek(self.pos)
        data = self.file.read(limit)
        self.pos += len(data)
        self.mark = (self.mark + data)[-64:]
        pieces = re.split(rb"[\r\n]+", self.partial + data)
        self.partial = pieces.pop()
        if self.skipping and pieces:
            pieces, self.skipping = pieces[1:], False
        if self.skipping or len(self.partial) > LONGEST:
            self.partial, self.skipping = b"", True
        return [p.decode("utf-8", "replace") for p in pieces if p and len(p) <= LONGEST]


class Pager:
    """A window of a log of any size: only byte offsets are kept, lines are looked up around them."""

    BLOCK = 1 << 16  # a longer line is shown in pieces

    def __init__(self, path: Path):
        self.path, self.top, self.column = path, None, 0  # top None: follow the end
        self.new = self.counted = 0

    def size(self) -> int:
        return os.path.getsize(self.path) if os.path.exists(self.path) else 0

    def start_before(self, end: int, n: int) -> int:
        """Offset of the n-th line before `end` (a line's start, or the size), or of the first there is."""
        starts: list[int] = []
        while end > 0 and len(starts) < n:
            base = max(0, end - self.BLOCK)
            data = read_at(self.path, base, end - base - 1)  # the last byte ends the last line, or is of it
            found = [base + m.end() for m in re.finditer(b"\n", data)]
            if base == 0 or not found:  # the file's first line, or a piece of a very long one
                found.insert(0, base)
            starts, end = found + starts, found[0]
        return starts[-n:][0] if starts else 0

    def page(self, height: int) -> list[str]:
        size = self.size()
        if self.top is not None and self.top > size:  # truncated under the reader
            self.top = None
        if self.top is None:
            start, self.new = self.start_before(size, height), 0
            data = read_at(self.path, start, size - start)
        else:
            if size > self.counted:
                self.new += read_at(self.path, self.counted, min(size - self.counted, 16 << 20)).count(b"\n")
            data = read_at(self.path, self.top, 2 * self.BLOCK)
        self.counted = size
        lines = data.removesuffix(b"\n").split(b"\n")[:height] if data else []
        bars = (next((p for p in reversed(x.split(b"\r")) if p), b"") for x in lines)  # the latest bar
        return [clean(x.decode("utf-8", "replace")) for x in bars]

    def scroll(self, n: int, height: int) -> None:
        last = self.start_before(self.size(), height)
        top = last if self.top is None else self.top
        if n < 0:
            self.top = self.start_before(top, -n)
        else:
            ends = [m.end() for m in islice(re.finditer(b"\n", read_at(self.path, top, 2 * self.BLOCK)), n)]
            top += ends[-1] if ends else self.BLOCK
            self.top = None if top >= last else top
