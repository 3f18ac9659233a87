"""Which audio belongs to each row of the data, where it lies, what its header says: tables beside the index.

Made once, by opening every file once, and read row by row afterwards: a worker holds nothing of them, at any
number of rows.
"""

import hashlib
import json
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from pathlib import Path

import numpy as np

from .audio import HEADER, UNKNOWN, link_roots, note_header, read_span, target_names
from .cli import UserError
from .files import Records, atomic_file

KINDS = ("missing", "copied", "sidon", "sinc", "unfaithful")
AT_ONCE = 4096  # rows of a piece of work
READERS = 8  # threads that open files: on a network file system each waits for most of its time


class PathBlob:
    """Many paths as one blob, without a Python object each: list -> [row]."""

    def __init__(self, paths):
        blobs = [p.encode("utf-8", "surrogateescape") for p in paths]
        self.blob = np.frombuffer(b"".join(blobs), np.uint8)
        self.ends = np.concatenate([[0], np.cumsum([len(b) for b in blobs], dtype=np.int64)])

    def __getitem__(self, row: int) -> str:
        return bytes(self.blob[self.ends[row] : self.ends[row + 1]]).decode("utf-8", "surrogateescape")


# ---- headers ----


def note_headers(folder: Path, names) -> tuple:
    """(HEADER [n], bool [n]: whether there is such a file) of the files `names` below `folder`."""
    allowed, names = link_roots(folder), iter(names)

    def note(part: list[str]):
        found = [note_header(folder, name, allowed) for name in part]
        return np.array([f or UNKNOWN for f in found], HEADER), np.array([f is not None for f in found])

    pieces = [(np.empty(0, HEADER), np.empty(0, bool))]
    with ThreadPoolExecutor(READERS) as readers:
        while parts := [part for _ in range(2 * READERS) if (part := list(islice(names, AT_ONCE)))]:
            pieces += readers.map(note, parts)
    return tuple(np.concatenate(column) for column in zip(*pieces))


class Originals:
    """The recordings that 24 kHz audio is read from, with their headers: HEADER [rows], noted for the rows
    `wanted`, bool [rows]. path: row -> path below `folder`."""

    def __init__(self, folder: str, path, wanted, index_folder: Path):
        self.folder, self.path, self.allowed = Path(folder), path, link_roots(folder)
        key = hashlib.sha256(np.packbits(wanted).tobytes() + bytes(self.folder.resolve())).hexdigest()[:16]
        table = index_folder / f"headers-{key}.rows"
        if not table.exists():
            headers = np.full(len(wanted), np.array(UNKNOWN, HEADER))
            headers[wanted], _ = note_headers(self.folder, map(path, np.flatnonzero(wanted).tolist()))
            with atomic_file(table) as f:
                headers.tofile(f)
        self.headers = Records(table, HEADER, mapped=True)

    def read(self, out, row: int, start: int, rate: int, need: int) -> bool:
        """read_span of a row."""
        noted = self.headers[row].item()
        return read_span(out, self.folder, self.path(row), self.allowed, start, rate, need, noted)


# ---- 48 kHz targets ----

# kind: index into KINDS. level: what the stored wav was scaled by to fit 16 bits. path: where it begins in
# the blob of paths that follows the rows in the file, `size` bytes of UTF-8.
TARGET = np.dtype(
    [("header", HEADER), ("path", "i8"), ("level", "f4"), ("size", "u4"), ("kind", "u1")], align=True
)


class Targets:
    """Which 48 kHz file belongs to each row, TARGET [rows], and its samples. kinds: uint8 [rows].

    From the folder's manifest.jsonl (precompute_48k.py). Of a folder without a manifest `kind` says what it
    holds (sidon or recordings), and files belong together by their names. The table is kept in
    `index_folder`, if given, until the manifest changes; without a manifest it is made anew while files are
    missing.
    path: row -> path of the source, for rows 0 to n - 1.
    """

    def __init__(self, folder: str, path, n: int, index_folder: Path | None = None, kind: str = ""):
        self.folder, self.n, table = Path(folder), n, None
        if not self.folder.is_dir():
            raise UserError(f"48 kHz folder {folder} does not exist; make it with precompute_48k.py")
        self.allowed = link_roots(folder)
        manifest = self.folder / "manifest.jsonl"
        listed = manifest.is_file()
        if not kind and not listed:
            raise UserError(
                f"48 kHz folder {folder} has no manifest.jsonl: say what it holds, --target_kind sidon "
                "(restored: its waveform is not the recording's) or --target_kind recordings"
            )
        if index_folder:
            stat = manifest.stat() if listed else None
            what = f"{manifest.resolve()} {stat.st_size} {stat.st_mtime_ns}" if listed else kind
            key = hashlib.sha256(f"v2 {self.folder.resolve()} {what}".encode()).hexdigest()[:16]
            table = index_folder / f"targets-{key}.rows"
            if table.exists() and (self._open(table) or listed):
                return
        self.rows, self.blob = self._by_manifest(path, manifest) if listed else self._by_name(path, kind)
        self.kinds = self.rows["kind"].copy()
        if table:
            with atomic_file(table) as f:
                self.kinds.tofile(f)
                self.rows.tofile(f)
                self.blob.tofile(f)
            self._open(table)

    def _open(self, table: Path) -> bool:
        """Whether nothing is missing."""
        self.kinds = np.fromfile(table, np.uint8, self.n)
        self.rows = Records(table, TARGET, self.n, self.n, mapped=True)
        self.blob = Records(table, np.uint8, self.n * (1 + TARGET.itemsize))
        return bool(self.kinds.all())

    def _by_manifest(self, path, manifest: Path) -> tuple:
        """(TARGET [n], blob). Rows are found by the hash of their path: no Python object a row is kept."""
        hashes = np.fromiter((hash(path(r)) for r in range(self.n)), np.int64, self.n)
        order = np.argsort(hashes)
        hashes, rows, blob = hashes[order], np.zeros(self.n, TARGET), bytearray()
        lines = manifest_rows(manifest)
        while part := list(islice(lines, AT_ONCE)):
            first = np.searchsorted(hashes, np.fromiter((hash(p) for p, *_ in part), np.int64, len(part)))
            for (source, target, kind, level), at in zip(part, first.tolist()):
                while at < self.n and hashes[at] == hash(source):
                    row = order[at]
                    if path(row) == source:
                        name = target.encode("utf-8", "surrogateescape")
                        rows[row] = (UNKNOWN, len(blob), level, len(name), kind)
                        blob += name
                        break
                    at += 1
        self.rows, self.blob = rows, np.frombuffer(blob + b"\n", np.uint8)
        named = np.flatnonzero(rows["kind"])
        rows["header"][named], there = note_headers(self.folder, map(self.path, named.tolist()))
        rows["kind"][named[~there]] = KINDS.index("missing")
        return rows, self.blob

    def _by_name(self, path, kind: str) -> tuple:
        """(TARGET [n], blob): the target of a/b.mp3 is a/b.wav, else a/b.mp3."""
        sources = [path(r) for r in range(self.n)]
        known = target_names(sources)
        names, rows = [known[source] for source in sources], np.zeros(self.n, TARGET)
        rows["header"], there = note_headers(self.folder, names)
        for row in (others := np.flatnonzero(~there)):
            names[row] = sources[row]
        rows["header"][others], there[others] = note_headers(self.folder, (names[row] for row in others))
        rows["kind"] = np.where(there, KINDS.index("sidon" if kind == "sidon" else "copied"), 0)
        rows["level"], paths = 1, PathBlob([*names, "\n"])
        rows["path"], rows["size"] = paths.ends[:-2], np.diff(paths.ends)[:-1]
        return rows, paths.blob

    def path(self, row: int) -> str:
        """The row's target below the folder."""
        _, first, _, size, _ = self.rows[row].item()
        return bytes(self.blob[first : first + size]).decode("utf-8", "surrogateescape")

    def read(self, out, row: int, start: int, rate: int, need: int) -> bool:
        """read_span of a row's target, at its source's level."""
        header, first, level, size, _ = self.rows[row].item()
        rel = bytes(self.blob[first : first + size]).decode("utf-8", "surrogateescape")
        within = read_span(out, self.folder, rel, self.allowed, start, rate, need, header)
        if level != 1:
            out /= np.float32(level)
        return within and level >= 1


def manifest_rows(manifest: Path):
    """(path, target, kind as an index into KINDS, level) of each line. Raises UserError."""
    with open(manifest, encoding="utf-8") as f:
        for number, line in enumerate(f, 1):
            try:
                row = json.loads(line)
                kind = KINDS.index(row["kind"] if row.get("faithful", True) else "unfaithful")
                yield str(row["path"]), str(row["target"]), kind, float(row.get("level", 1.0))
            except (ValueError, KeyError, TypeError, AttributeError) as e:
                raise UserError(
                    f"{manifest} line {number} is not a manifest row ({e}); run "
                    "precompute_48k.py again to rewrite it"
                ) from None
