"""Proof that files are what they were: checksums of those we derive, stamps of those that others may change.

A stamp is a file's size, its mtime in nanoseconds and the CRC-32 of its bytes. Size and mtime cost one look
at a file. Where only the mtime differs (copied without -p, fetched from a bucket), the content decides. The
bytes are summed, not the samples: decoders differ in the last bits from machine to machine.
"""

import json
import mmap
import os
import zlib
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from pathlib import Path

import numpy as np

from .audio import AudioError, bad_file, link_roots, open_inside, open_sound_file
from .cli import UserError
from .files import read_json, write_json

PIECE = 16 << 20  # bytes that are summed at once; zlib lets other threads run meanwhile
AT_ONCE = 4096  # files of a piece of work
READERS = 8  # threads that look at files: on a network file system each waits for most of its time

# ---- stamps: of recordings, targets and shards ----

STAMP = np.dtype([("size", "i8"), ("mtime", "i8"), ("crc", "u4")], align=True)
NO_STAMP = (-1, -1, 0)  # of what was made before stamps were noted
ABSENT = (-2, -1, 0)  # of a file that was not there
SAME, CHANGED, MISSING = range(3)


def crc_of(fd: int) -> int:
    """CRC-32 of an open file's bytes."""
    crc, at = 0, 0
    while piece := os.pread(fd, PIECE, at):
        crc, at = zlib.crc32(piece, crc), at + len(piece)
    return crc


def stamp_of(path: str | Path) -> tuple[int, int, int]:
    """The stamp of a regular file. Raises AudioError for another kind of file, or one that changes."""
    with bad_file():
        fd, before = open_sound_file(path)
        try:
            crc, after = crc_of(fd), os.fstat(fd)
        finally:
            os.close(fd)
    if (before.st_size, before.st_mtime_ns) != (after.st_size, after.st_mtime_ns):
        raise AudioError("it changed while it was read")
    return after.st_size, after.st_mtime_ns, crc


def is_stamp(value) -> bool:
    return isinstance(value, list) and len(value) == 3 and all(type(v) is int for v in value)


def same_times(found, noted):
    """Whether two mtimes, or arrays of them, are one: to whole seconds where that is all that the file system
    or an archive has kept."""
    return (found == noted) | ((found % 10**9 == 0) & (found // 10**9 == noted // 10**9))


def state_of(root: str | Path, rel: str, allowed: tuple, stamp, content: bool = False) -> int:
    """SAME, CHANGED or MISSING: the file `rel` below `root` (as for open_inside) beside its noted stamp.
    content: compare its bytes whatever its mtime says."""
    size, mtime, crc = (int(v) for v in stamp)
    try:
        fd, found = open_inside(root, rel, allowed)
    except (AudioError, OSError):
        return MISSING
    try:
        if size == NO_STAMP[0]:
            return SAME
        if found.st_size != size:
            return CHANGED
        if same_times(found.st_mtime_ns, mtime) and not content:
            return SAME
        return SAME if crc_of(fd) == crc else CHANGED
    except OSError:
        return MISSING
    finally:
        os.close(fd)


def states_of(root: str | Path, names, stamps, allowed: tuple) -> np.ndarray:
    """state_of each of the files `names` beside `stamps`, STAMP [n]: uint8 [n], by several threads."""
    pairs, pieces = zip(names, stamps), [np.empty(0, np.uint8)]

    def look(part) -> np.ndarray:
        return np.array([state_of(root, name, allowed, stamp) for name, stamp in part], np.uint8)

    with ThreadPoolExecutor(READERS) as readers:
        while parts := [part for _ in range(2 * READERS) if (part := list(islice(pairs, AT_ONCE)))]:
            pieces += readers.map(look, parts)
    return np.concatenate(pieces)


def forget_changed(work, units, recorded, source: Path, output: Path, say) -> None:
    """Give units of a shared job that are done back to be done again: those whose outputs below `output` are
    gone or are not what was written, and those whose sources below `source` have changed since. Sources that
    are gone can't be read again: what was made of them stays. Tells `say` how many.
    recorded(result of a unit): ({source: stamp}, {output: stamp}); raises UserError where it can't tell."""
    changed, lost, gone, again = [], [], [], 0
    for unit in units:
        if not work.result_path(unit).exists():
            continue
        try:
            sources, outputs = recorded(read_json(work.result_path(unit)))
        except (UserError, KeyError, TypeError, AttributeError, ValueError):
            sources, outputs, new, ours = {}, {}, [], [work.result_path(unit).name]
        else:
            found = {}
            for root, stamps in ((source, sources), (output, outputs)):
                asked = np.array([tuple(stamp) for stamp in stamps.values()], STAMP)
                found[root] = dict(zip(stamps, states_of(root, stamps, asked, link_roots(root))))
            new = [name for name in sources if found[source][name] == CHANGED]
            gone += [name for name in sources if found[source][name] == MISSING and sources[name][0] >= 0]
            ours = [name for name in outputs if found[output][name] != SAME]
        if new or ours:
            work.forget(unit)
            changed, lost, again = changed + new, lost + ours, again + 1
    if again:
        what = [f"{len(changed)} recordings have changed, first {changed[0]}"] if changed else []
        what += [f"{len(lost)} files of ours are gone or not as written, first {lost[0]}"] if lost else []
        say(f"made again: {'; '.join(what)} ({again} of {len(units)} units)")
    if gone:
        say(f"{len(gone)} recordings are gone since, first {gone[0]}: what was made of them stays")


# ---- checksums: of files that we derive ----


def checksums(path: Path) -> tuple[int, list[int]]:
    """(bytes, CRC-32 of each PIECE) of a file, at memory speed where it lies in memory."""
    with open(path, "rb") as f:
        size = os.fstat(f.fileno()).st_size
        if not size:
            return 0, []
        with (
            mmap.mmap(f.fileno(), size, access=mmap.ACCESS_READ) as pages,
            memoryview(pages) as view,
            ThreadPoolExecutor(READERS) as threads,
        ):
            return size, list(threads.map(lambda at: crc_piece(view, at), range(0, size, PIECE)))


def crc_piece(view: memoryview, at: int) -> int:
    with view[at : at + PIECE] as piece:
        return zlib.crc32(piece)


def write_proof(path: Path, info: dict, names: list[str]) -> None:
    """The JSON `path`: `info`, and length and checksums of the files `names` beside it, which are on the disk
    before it is."""
    arrays = {}
    for name in names:
        fd = os.open(path.parent / name, os.O_RDONLY)
        os.fsync(fd)
        os.close(fd)
        size, sums = checksums(path.parent / name)
        arrays[name] = {"bytes": size, "crc32": sums}
    info = info | {"arrays": arrays}
    write_json(path, info | {"crc32": json_crc(info)})


def json_crc(info: dict) -> int:
    return zlib.crc32(json.dumps(info, sort_keys=True).encode())


def kept_table(table: Path, told: list[str]) -> dict | None:
    """read_proof of the JSON beside a table; `told` gets a line where there is a table without its proof."""
    info = read_proof(table.with_suffix(".json"))
    if info is None and table.exists():
        told.append(f"table {table} was not as it was written: it is made again")
    return info


def read_proof(path: Path, at_most: int = 1 << 62) -> dict | None:
    """What write_proof was given; None where anything about it or its files is not as it was written.
    at_most: files of more bytes are only asked for their length."""
    try:
        info = json.loads(path.read_text(encoding="utf-8"))
        if info.pop("crc32") != json_crc(info):
            return None
        for name, wanted in info.pop("arrays").items():
            file = path.parent / name
            if file.stat().st_size != wanted["bytes"]:
                return None
            if wanted["bytes"] <= at_most and checksums(file)[1] != wanted["crc32"]:
                return None
        return info
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return None
