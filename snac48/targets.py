"""Which audio belongs to each row of the data, where it lies, what its header says: tables beside the index.

Made once, by opening every file once, and read row by row afterwards: a worker holds nothing of them, at any
number of rows.
"""

import hashlib
import json
import math
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from pathlib import Path

import numpy as np

from .audio import HEADER, UNKNOWN, link_roots, note_header, read_span, target_names
from .cli import UserError
from .files import Records, atomic_file
from .proof import (
    AT_ONCE,
    CHANGED,
    NO_STAMP,
    READERS,
    SAME,
    STAMP,
    is_stamp,
    kept_table,
    same_times,
    states_of,
    write_proof,
)

# What a row's target is. Those after unfaithful are not what was recorded: such rows are never trained.
KINDS = ("missing", "copied", "sidon", "sinc", "unfaithful", "changed", "older", "length")
REFUSED = {
    "missing": "no 48 kHz target",
    "changed": "a 48 kHz target that has changed since precompute_48k.py wrote it",
    "older": "a 48 kHz target of another recording than the one that was encoded",
    "length": "a 48 kHz target of another length than its recording",
}
LENGTH_S = 0.02  # by which the lengths of a recording and its target may differ
LEVELS = 1e-10, 1.0  # of a target: what a recording of integers stored as floats was scaled by, and none


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


def keep_as_recorded(folder: Path, headers, stamps, path) -> np.ndarray:
    """bool [n]: files below `folder` that are not as their stamps, STAMP [n], say. The headers, HEADER [n] of
    note_headers, keep the mtime of those that are: from now on they must not change. path: i -> name."""
    noted = stamps["size"] >= 0
    differ = noted & (headers["size"] != stamps["size"])
    touched = np.flatnonzero(noted & ~differ & ~same_times(headers["mtime"], stamps["mtime"]))
    found = states_of(folder, map(path, touched.tolist()), stamps[touched], link_roots(folder))
    differ[touched] = found != SAME  # another mtime: the content decides
    headers["mtime"][~noted] = -1
    return differ


class Originals:
    """The recordings that 24 kHz audio is read from, with their headers: HEADER [rows], noted for the rows
    `wanted`, bool [rows]. path: row -> path below `folder`. stamps: STAMP [rows] as the cache noted them, if
    these are the files that it was made of. changed: rows whose recording is another one now. told: lines."""

    def __init__(self, folder: str, path, wanted, index_folder: Path, stamps=None):
        self.folder, self.path, self.allowed, self.told = Path(folder), path, link_roots(folder), []
        what = np.packbits(wanted).tobytes() + bytes(self.folder.resolve()) + str(stamps is None).encode()
        table = index_folder / f"headers-{hashlib.sha256(what).hexdigest()[:16]}.rows"
        if (known := kept_table(table, self.told)) is None or known.keys() != {"changed"}:
            rows, headers = np.flatnonzero(wanted), np.full(len(wanted), np.array(UNKNOWN, HEADER))
            there, _ = note_headers(self.folder, map(path, rows.tolist()))
            asked = (
                np.full(len(rows), np.array(NO_STAMP, STAMP)) if stamps is None else np.asarray(stamps)[rows]
            )
            changed = keep_as_recorded(self.folder, there, asked, lambda i: path(int(rows[i])))
            headers[rows] = there
            with atomic_file(table) as f:
                headers.tofile(f)
            known = {"changed": rows[changed].tolist()}
            write_proof(table.with_suffix(".json"), known, [table.name])
        self.headers = Records(table, HEADER, 0, len(wanted), mapped=True)
        self.changed = np.array(known["changed"], np.int64)

    def read(self, out, row: int, start: int, rate: int, need: int) -> bool:
        """read_span of a row."""
        noted = self.headers[row].item()
        return read_span(out, self.folder, self.path(row), self.allowed, start, rate, need, noted)


# ---- 48 kHz targets ----

# kind: index into KINDS. level: what the stored wav was scaled by to fit 16 bits. corr, lag: correlation of
# its envelope with the recording's, and samples at 48 kHz that it is late, as it was made. path: where it
# begins in the blob of paths that follows the rows in the file, `size` bytes of UTF-8. crc: of the file, by
# which its content is proven; size of that in the header.
TARGET = np.dtype(
    [("header", HEADER), ("path", "i8"), ("level", "f4"), ("size", "u4"), ("corr", "f4"), ("lag", "f4"),
     ("crc", "u4"), ("kind", "u1")],
    align=True,
)  # fmt: skip


class Targets:
    """Which 48 kHz file belongs to each row, TARGET [rows], and its samples. kinds: uint8 [rows].

    From the folder's manifest.jsonl (precompute_48k.py). Of a folder without a manifest `kind` says what it
    holds (sidon or recordings), and files belong together by their names. The table is kept in
    `index_folder`, if given, until the manifest changes; without a manifest it is made anew while files are
    missing. Rows whose file is not what it should be get a kind of REFUSED.
    path: row -> path of the source, for rows 0 to n - 1. seconds: [n] of the sources, where they are known;
    stamps: likewise, STAMP [n], as they were encoded; recordings: where the sources lie, if they are to be
    looked at instead. told: lines on tables that were damaged.
    """

    def __init__(
        self,
        folder: str,
        path,
        n: int,
        index_folder: Path | None = None,
        kind: str = "",
        seconds=None,
        stamps=None,
        recordings: str = "",
    ):
        self.folder, self.n, self.told, table = Path(folder), n, [], None
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
            key = hashlib.sha256(f"v3 {self.folder.resolve()} {what}".encode()).hexdigest()[:16]
            table = index_folder / f"targets-{key}.rows"
            if kept_table(table, self.told) is not None and (self._open(table) or listed):
                return
        self.rows, self.blob = (
            self._by_manifest(path, manifest, stamps, recordings) if listed else self._by_name(path, kind)
        )
        if seconds is not None:
            self._compare_lengths(np.asarray(seconds))
        self.kinds = self.rows["kind"].copy()
        if table:
            with atomic_file(table) as f:
                self.kinds.tofile(f)
                self.rows.tofile(f)
                self.blob.tofile(f)
            write_proof(table.with_suffix(".json"), {}, [table.name])
            self._open(table)

    def _open(self, table: Path) -> bool:
        """Whether nothing is missing."""
        self.kinds = np.fromfile(table, np.uint8, self.n)
        self.rows = Records(table, TARGET, self.n, self.n, mapped=True)
        self.blob = Records(table, np.uint8, self.n * (1 + TARGET.itemsize))
        return bool(self.kinds.all())

    def _by_manifest(self, path, manifest: Path, encoded, recordings: str) -> tuple:
        """(TARGET [n], blob). Rows are found by the hash of their path: no Python object a row is kept.
        encoded, recordings: as for __init__, `stamps` and itself."""
        hashes = np.fromiter((hash(path(r)) for r in range(self.n)), np.int64, self.n)
        order = np.argsort(hashes)
        hashes, rows, blob = hashes[order], np.zeros(self.n, TARGET), bytearray()
        stamps, sources = (np.full(self.n, np.array(NO_STAMP, STAMP)) for _ in range(2))
        names = np.zeros(self.n, np.int64)  # hashes
        lines = manifest_rows(manifest)
        while part := list(islice(lines, AT_ONCE)):
            first = np.searchsorted(hashes, np.fromiter((hash(p["path"]) for p in part), np.int64, len(part)))
            for line, at in zip(part, first.tolist()):
                while at < self.n and hashes[at] == hash(line["path"]):
                    row = order[at]
                    if path(row) == line["path"]:
                        name = line["target"].encode("utf-8", "surrogateescape")
                        measured = line["corr"], line["lag"], line["target_stamp"][2]
                        found = UNKNOWN, len(blob), line["level"], len(name), *measured, line["kind"]
                        rows[row], names[row] = found, hash(line["target"])
                        blob += name
                        stamps[row], sources[row] = line["target_stamp"], line["source_stamp"]
                        break
                    at += 1
        self.rows, self.blob = rows, np.frombuffer(blob + b"\n", np.uint8)
        named = np.flatnonzero(rows["kind"])
        self._refuse_shared(names[named], named, path, manifest)
        headers, there = note_headers(self.folder, map(self.path, named.tolist()))
        differ = keep_as_recorded(self.folder, headers, stamps[named], lambda i: self.path(named[i]))
        rows["header"][named] = headers
        rows["kind"][named[differ]] = KINDS.index("changed")
        if encoded is not None:
            encoded = np.asarray(encoded)
            older = (encoded["size"] >= 0) & (sources["size"] >= 0)
            older &= (encoded["size"] != sources["size"]) | (encoded["crc"] != sources["crc"])
            rows["kind"][older & (rows["kind"] > 0)] = KINDS.index("older")
        if recordings:
            states = states_of(recordings, map(path, range(self.n)), sources, link_roots(recordings))
            rows["kind"][(states == CHANGED) & (rows["kind"] > 0)] = KINDS.index("older")
        rows["kind"][named[~there]] = KINDS.index("missing")
        return rows, self.blob

    def _refuse_shared(self, names, rows, path, manifest: Path) -> None:
        """Raises UserError where two rows have one target, by the hashes of the targets' names."""
        order = np.argsort(names)
        twice = np.flatnonzero(np.diff(names[order]) == 0)
        if len(twice):
            a, b = rows[order[twice[0]]], rows[order[twice[0] + 1]]
            what = f"{manifest} gives {path(a)} and {path(b)} the same target, {self.path(a)}"
            raise UserError(f"{what}: run precompute_48k.py again into another --output_dir")

    def _compare_lengths(self, seconds) -> None:
        """Refuse targets that are shorter or longer than their sources, of which the header says all."""
        h, kinds = self.rows["header"], self.rows["kind"]
        known = np.flatnonzero((h["tag"] > 0) & (kinds <= KINDS.index("unfaithful")) & (kinds > 0))
        h = h[known]
        frames = h["held"] // (h["channels"].astype(np.int64) * h["bits"] // 8)
        differ = np.abs(frames / h["rate"] - seconds[known]) > LENGTH_S
        kinds[known[differ]] = KINDS.index("length")

    def _by_name(self, path, kind: str) -> tuple:
        """(TARGET [n], blob): the target of a/b.mp3 is a/b.wav, else a/b.mp3."""
        sources = [path(r) for r in range(self.n)]
        known = target_names(sources)
        names, rows = [known[source] for source in sources], np.zeros(self.n, TARGET)
        rows["header"], there = note_headers(self.folder, names)
        for row in (others := np.flatnonzero(~there)):
            names[row] = sources[row]
        rows["header"][others], there[others] = note_headers(self.folder, (names[row] for row in others))
        rows["header"]["mtime"] = -1  # nothing says what the files were
        rows["kind"] = np.where(there, KINDS.index("sidon" if kind == "sidon" else "copied"), 0)
        rows["level"] = rows["corr"] = 1
        paths = PathBlob([*names, "\n"])
        rows["path"], rows["size"] = paths.ends[:-2], np.diff(paths.ends)[:-1]
        return rows, paths.blob

    def path(self, row: int) -> str:
        """The row's target below the folder."""
        _, first, _, size, *_ = self.rows[row].item()
        return bytes(self.blob[first : first + size]).decode("utf-8", "surrogateescape")

    def read(self, out, row: int, start: int, rate: int, need: int) -> bool:
        """read_span of a row's target, at its source's level."""
        header, first, level, size, *_ = self.rows[row].item()
        rel = bytes(self.blob[first : first + size]).decode("utf-8", "surrogateescape")
        within = read_span(out, self.folder, rel, self.allowed, start, rate, need, header)
        if level != 1:
            out /= np.float32(level)
        return within and level >= 1


def manifest_rows(manifest: Path):
    """manifest_row of each line. Raises UserError."""
    with open(manifest, encoding="utf-8") as f:
        for number, line in enumerate(f, 1):
            yield manifest_row(line, f"{manifest} line {number}")


def manifest_row(line: str, where: str) -> dict:
    """{path, target, kind as an index into KINDS, level, corr, lag, seconds, source_stamp, target_stamp} of a
    line; the stamps are NO_STAMP where an older program noted none. Raises UserError, naming `where`."""
    try:
        row = json.loads(line)
        kind = KINDS.index(row["kind"] if row.get("faithful", True) else "unfaithful")
        found = {"path": str(row["path"]), "target": str(row["target"]), "kind": kind}
        numbers = {"level": "level", "corr": "envelope_corr", "lag": "lag_samples", "seconds": "seconds"}
        normal = {"level": 1.0, "corr": 1.0, "lag": 0.0, "seconds": math.inf}
        found |= {name: float(row.get(key, normal[name])) for name, key in numbers.items()}
        if not LEVELS[0] <= found["level"] <= LEVELS[1]:
            raise ValueError(f"level {found['level']:g}, which lies between 0 and 1")
        for name in ("source_stamp", "target_stamp"):
            if name in row and not is_stamp(row[name]):
                raise ValueError(f"{name} {row[name]}")
            found[name] = tuple(row.get(name, NO_STAMP))
        return found
    except (ValueError, KeyError, TypeError, AttributeError) as e:
        todo = "run precompute_48k.py again to rewrite it"
        raise UserError(f"{where} is not a manifest row ({e}); {todo}") from None
