"""THE cache of codes: its parquet schema, written and read, and the index beside it.

Don't touch without thinking of caches on people's disks.
"""

import collections
import contextlib
import errno
import hashlib
import json
import math
import os
import shutil
import zlib
from dataclasses import asdict
from pathlib import Path

import numpy as np

from .audio import AudioError, is_safe
from .cli import UserError, first_line
from .codec import Geometry
from .files import Records, atomic_file, sweep_leftovers, temporary
from .proof import NO_STAMP, STAMP, read_proof, write_proof

AGREE = 0.99  # of the codes of a row: other hardware rounds otherwise now and then
AT_OPENING = 256 << 20  # bytes: a larger array of codes is checked row by row, when a row is read
SHARDS = "codes_batch_gpu*_*.parquet"  # of a cache folder


def shards_of(cache_dir: str | Path) -> list[Path]:
    """The parquet files of a cache folder, by name. Raises UserError where there are none."""
    folder = Path(cache_dir)
    if not folder.is_dir():
        raise UserError(f"cache folder {cache_dir} does not exist; make it with cache_codes.py")
    if shards := sorted(folder.glob(SHARDS)):
        return shards
    raise UserError(f"cache folder {cache_dir} holds no {SHARDS}; run cache_codes.py first")


class DamagedIndex(AudioError, UserError):
    """Codes of a row are not those that were written: one bad file of a training, the end of all else."""


class CodeIndex:
    """A cache folder as flat files of Records: no per-row Python object, opened at once at any size.

    Built once beside the cache (`index-KEY/`, KEY = names, sizes and mtimes of the shards), atomically.
    codes: int16 [total coarse codes, F], F = sum of codes a coarse code over the scales, scale by scale,
    so a slice of any utterance is one contiguous read. offsets: int64 [rows + 1] in coarse codes.
    lengths: int64 [rows], samples at the model's rate. paths: UTF-8 blob, path_offsets [rows + 1].
    stamps: STAMP [rows] of the recordings as they were encoded, NO_STAMP in older caches. checks: uint32
    [rows], CRC-32 of each row's codes, which is compared whenever a row is read.
    Malformed rows are left out, counted in `bad` (reason -> number) and listed in bad_rows.jsonl.
    index.json holds length and checksum of every array: one that is not as it was written is built again,
    which `told` says, [one line each].
    """

    WHOLE = "codes.i16", "checks.u32", "paths.bin", "stamps.rec"  # written shard by shard
    NUMBERS = "offsets", "lengths", "path_offsets"

    def __init__(self, cache_dir: str):
        self.cache_dir, self.told, shards = Path(cache_dir), [], shards_of(cache_dir)
        stats = [(s.name, s.stat().st_size, s.stat().st_mtime_ns) for s in shards]
        key = hashlib.sha256(json.dumps(["v2", stats]).encode()).hexdigest()[:16]
        self.folder = self.cache_dir / f"index-{key}"
        there, info = self.folder.exists(), self._proven()
        if info is None:
            self._build(sorted(shards, key=unit_of))
            info = self._proven()
            if there:
                self.told.append(f"index {self.folder} was not as it was written: it is built again")
        if info is None:
            raise UserError(f"index {self.folder} does not keep what is written there: check that disk")
        self._open(info)

    def _proven(self) -> dict | None:
        info = read_proof(self.folder / "index.json", AT_OPENING)
        return info if info and info.keys() == {"snac", "data_dir", "bad"} else None

    def _open(self, info: dict):
        self.info = info
        self.geometry = Geometry.from_json(json.dumps(info["snac"]))
        self.data_dir, self.bad = info["data_dir"], info["bad"]
        self.offsets, self.lengths, self.path_offsets = (
            Records(self.folder / f"{name}.i64", np.int64, mapped=True) for name in self.NUMBERS
        )
        self.codes = Records(self.folder / "codes.i16", (np.int16, sum(self.geometry.per_coarse)))
        self.checks = Records(self.folder / "checks.u32", np.uint32)
        self.paths = Records(self.folder / "paths.bin", np.uint8)
        self.stamps = Records(self.folder / "stamps.rec", STAMP)

    def __getstate__(self):  # spawned workers open the files themselves
        return {"folder": self.folder, "cache_dir": self.cache_dir, "info": self.info, "told": []}

    def __setstate__(self, state):
        self.__dict__.update(state)
        self._open(self.info)

    def __len__(self) -> int:
        return len(self.lengths)

    @property
    def seconds(self):
        """Of the recordings: float64 [rows]."""
        return np.asarray(self.lengths) / self.geometry.sampling_rate

    def path(self, row: int) -> str:
        first, end = self.path_offsets[row : row + 2].tolist()
        return bytes(self.paths[first:end]).decode()

    def coarse(self, row: int) -> int:
        """Coarse codes of an utterance."""
        first, end = self.offsets[row : row + 2].tolist()
        return end - first

    def block(self, row: int, start: int, coarse_len: int):
        """Codes of an utterance as they lie here: int16 [coarse_len, F]. Raises DamagedIndex."""
        first, end = self.offsets[row : row + 2].tolist()
        codes = self.codes[first:end]  # all of them, a kilobyte or so: the checksum is theirs
        if zlib.crc32(codes) != self.checks[row]:
            why = f"its codes in {self.folder} are not those that were written"
            raise DamagedIndex(f"{why}: delete that folder, it is built again")
        return codes[start : start + coarse_len]

    def slice(self, row: int, start: int, coarse_len: int) -> list:
        """Codes of all scales, int64 numpy [coarse_len * S // vq_strides[k]] each."""
        return scales_of(self.block(row, start, coarse_len), self.geometry)

    def rows(self):
        """Yield (path, codes as slice gives them, samples) of each row."""
        for i, n in enumerate(np.asarray(self.lengths)):
            yield self.path(i), self.slice(i, 0, self.coarse(i)), int(n)

    def _build(self, shards):
        sweep_leftovers(self.cache_dir)
        tmp = temporary(self.cache_dir / "index")
        try:
            tmp.mkdir()
        except OSError as e:
            where = f"the index of cache {self.cache_dir}"
            raise UserError(f"{where} can't be written there: {e.strerror}") from None
        try:
            self._build_in(tmp, shards)
            if self.folder.exists():  # damaged: who has it open keeps it until then
                os.rename(self.folder, temporary(self.cache_dir / "index", "old."))
            os.rename(tmp, self.folder)
        except OSError as e:
            if e.errno not in (errno.EEXIST, errno.ENOTEMPTY):  # those: another process was first
                raise
        finally:
            shutil.rmtree(tmp, ignore_errors=True)
            shutil.rmtree(temporary(self.cache_dir / "index", "old."), ignore_errors=True)
        for old in self.cache_dir.glob("index-*"):
            if old != self.folder:
                shutil.rmtree(old, ignore_errors=True)  # of an earlier state of the cache

    def _build_in(self, tmp, shards):
        geometry, data_dir, seen = None, None, set()
        arrays, bad_rows = [], []  # of each shard: coarse codes, audio lengths, bytes of the paths
        with contextlib.ExitStack() as stack:
            files = [stack.enter_context(open(tmp / name, "wb")) for name in self.WHOLE]
            for shard in shards:
                table, found, origin = open_shard(shard)
                geometry = geometry or found
                data_dir = data_dir or origin
                if geometry.difference(found):
                    differs = f"{shard.name} differs ({found.difference(geometry)})"
                    raise UserError(f"cache {self.cache_dir} mixes models: {differs}")
                block, n, length, names, reasons = shard_arrays(table, geometry, seen, shard)
                bad_rows += ({"shard": shard.name, "row": i, "reason": why} for i, why in reasons.items())
                blobs = [name.encode() for name in names]
                codes, stamps = block.tobytes(), np.delete(shard_stamps(table), list(reasons))
                contents = codes, row_checks(codes, 2 * block.shape[1] * n), b"".join(blobs), stamps
                for file, content in zip(files, contents):
                    file.write(content)
                arrays.append(np.array([n, length, [len(b) for b in blobs]], np.int64))
        coarse, lengths, path_bytes = np.concatenate(arrays, axis=1)
        lengths.tofile(tmp / "lengths.i64")
        for name, sizes in (("offsets", coarse), ("path_offsets", path_bytes)):
            np.append(0, np.cumsum(sizes)).tofile(tmp / f"{name}.i64")
        (tmp / "bad_rows.jsonl").write_text("".join(json.dumps(r) + "\n" for r in bad_rows))
        bad = dict(collections.Counter(r["reason"] for r in bad_rows))
        if not len(lengths):
            raise UserError(f"cache {self.cache_dir} has no usable row: {bad}")
        info = {"snac": asdict(geometry), "data_dir": data_dir, "bad": bad}
        write_proof(tmp / "index.json", info, [*self.WHOLE, *(f"{name}.i64" for name in self.NUMBERS)])


def row_checks(codes: bytes, sizes) -> np.ndarray:
    """CRC-32 of each row of a shard's codes, that lie one behind the other; sizes: bytes of each."""
    view, ends = memoryview(codes), np.cumsum(sizes).tolist()
    return np.array([zlib.crc32(view[a:b]) for a, b in zip([0, *ends], ends)], np.uint32)


def unit_of(shard: Path) -> tuple[int, str]:
    """The number of a shard, then its name: unit 10 comes after unit 9, whoever encoded it, so that rows lie
    in the order of the recordings."""
    number = shard.stem.rpartition("_")[2]
    return (int(number) if number.isdecimal() else 0, shard.name)


def scales_of(block, geometry: Geometry) -> list:
    """Codes of all scales, int64 [coarse * S // vq_strides[k]] each; block [coarse, F]: rows of the index."""
    counts = geometry.per_coarse
    parts = np.split(block.astype(np.int64), np.cumsum(counts)[:-1], axis=1)
    return [part.reshape(-1) for part in parts]


def open_shard(path: Path) -> tuple:
    """A parquet file of a cache: (table, geometry, data_dir). Raises UserError."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        table = pq.read_table(path, page_checksum_verification=True)
    except (pa.ArrowException, OSError, ValueError, MemoryError) as e:
        todo = "delete it and run cache_codes.py again (remove its unit in work/ too)"
        raise UserError(f"cache file {path} is corrupt ({first_line(e)}); {todo}") from None
    meta = table.schema.metadata or {}
    return table, recorded_geometry(meta, path), meta.get(b"data_dir", b"").decode()


def recorded(path: Path) -> dict:
    """Schema metadata of a parquet file, without reading its rows. Raises UserError."""
    import pyarrow.parquet as pq

    try:
        return pq.read_schema(path).metadata or {}
    except (OSError, ValueError) as e:
        raise UserError(f"cache file {path} is corrupt ({first_line(e)}): delete it") from None


def recorded_geometry(meta: dict, path: Path) -> Geometry:
    """The geometry in the schema metadata of a parquet file. Raises UserError."""
    if b"snac" not in meta:
        why = "does not say which model made it (no 'snac' metadata)"
        raise UserError(f"cache file {path} {why}; make the cache anew with cache_codes.py")
    return Geometry.from_json(meta[b"snac"].decode(errors="replace"), f"cache file {path}")


def shard_rows(path: Path) -> tuple:
    """(geometry, iterator over (path, codes as scales_of, samples) of the good rows) of one parquet file."""
    table, geometry, _ = open_shard(path)
    block, coarse, lengths, names, bad = shard_arrays(table, geometry, set(), path)
    if not names:
        raise UserError(f"cache file {path} has no usable row: {sorted(set(bad.values()))}")
    blocks = np.split(block, np.cumsum(coarse)[:-1])
    return geometry, ((p, scales_of(b, geometry), int(n)) for p, b, n in zip(names, blocks, lengths))


def shard_arrays(table, geometry: Geometry, seen: set[int], where: str | Path = ""):
    """One shard as arrays: (codes [coarse, F] int16, coarse codes a row, audio lengths, paths, {bad row:
    reason}). Raises UserError, naming `where`, for a table of another layout. seen: hashes of the paths of
    earlier shards, extended here; a path that comes twice is a bad row."""
    import pyarrow as pa

    try:
        names, lengths = table["file_path"].to_pylist(), table["audio_length"]
        length = np.asarray(lengths.fill_null(0).cast("int64"))
        scales = [list_column(table[f"codes_scale_{k}"]) for k in range(len(geometry.vq_strides))]
    except (KeyError, TypeError, ValueError, pa.ArrowException) as e:
        raise UserError(f"cache file {where} has an unexpected layout: {first_line(e)}") from None
    reasons: dict[int, str] = {}  # the first that is found

    def refuse(mask, reason):
        for row in np.flatnonzero(mask):
            reasons.setdefault(int(row), reason)

    refuse(np.asarray(lengths.is_null()), "no audio length")
    for row, name in enumerate(names):
        if not isinstance(name, str) or not is_safe(name):
            reasons[row] = "unsafe path"
        elif hash(name) in seen:
            reasons.setdefault(row, "path occurs twice")
        else:
            seen.add(hash(name))
    for _, _, missing in scales:
        refuse(missing, "no codes")
    coarse = scales[0][1]
    refuse(coarse == 0, "no codes")
    for k, (values, counts, _) in enumerate(scales):
        refuse(counts != coarse * geometry.per_coarse[k], "scales that don't match")
        outside = np.concatenate([[0], np.cumsum((values < 0) | (values >= geometry.codebook_size))])
        ends = np.cumsum(counts)
        refuse(outside[ends] > outside[ends - counts], "code outside the codebook")
    # SNAC pads to whole coarse codes and to whole windows of its attention, 32 latent frames where it has one
    padding = geometry.hop_length * math.lcm(geometry.vq_strides[0], 32)
    coded = coarse * geometry.coarse_samples
    wrong = (length <= 0) | (length > coded) | (length <= coded - padding)
    refuse(wrong, "audio length that doesn't match the codes")
    good = np.array([row not in reasons for row in range(len(names))], bool)
    blocks = [
        values[np.repeat(good, counts)].astype(np.int16).reshape(-1, geometry.per_coarse[k])
        for k, (values, counts, _) in enumerate(scales)
    ]
    kept = [name for name, g in zip(names, good) if g]
    return np.concatenate(blocks, axis=1), coarse[good], length[good], kept, reasons


def list_column(column) -> tuple:
    """A parquet column of lists of integers: (all values int64, values a row, rows that hold no list)."""
    import pyarrow as pa

    if not hasattr(column.type, "value_type") or not pa.types.is_integer(column.type.value_type):
        raise ValueError(f"a column of codes is {column.type}, not a list of integers")
    column = column.combine_chunks()
    column = column.chunk(0) if hasattr(column, "chunk") else column
    values = np.asarray(column.flatten().fill_null(-1).cast("int64"))
    return values, np.asarray(column.value_lengths().fill_null(0).cast("int64")), np.asarray(column.is_null())


STAMP_COLUMNS = {"file_size": "int64", "file_mtime": "int64", "file_crc32": "uint32"}  # as proof.STAMP


def shard_stamps(table) -> np.ndarray:
    """The stamps of a shard's recordings, STAMP [rows]: NO_STAMP where an older program noted none."""
    import pyarrow as pa

    stamps = np.full(table.num_rows, np.array(NO_STAMP, STAMP))
    if set(STAMP_COLUMNS) <= set(table.column_names):
        try:
            for (name, kind), field, none in zip(STAMP_COLUMNS.items(), STAMP.names, NO_STAMP):
                stamps[field] = np.asarray(table[name].cast(kind).fill_null(none))
        except (pa.ArrowException, ValueError, TypeError):
            return np.full(table.num_rows, np.array(NO_STAMP, STAMP))
    return stamps


def stamps_in(path: Path) -> dict[str, tuple]:
    """{recording: stamp} of a shard, without reading its codes. Raises UserError."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        there = set(pq.read_schema(path).names)
        table = pq.read_table(path, columns=["file_path", *(c for c in STAMP_COLUMNS if c in there)])
        names = table["file_path"].to_pylist()
    except (pa.ArrowException, OSError, ValueError, KeyError) as e:
        raise UserError(f"cache file {path} is corrupt ({first_line(e)})") from None
    return {name: stamp for name, stamp in zip(names, shard_stamps(table).tolist()) if isinstance(name, str)}


def write_shard(
    path: Path, rows: dict, geometry: Geometry, data_dir: str, encoding=None, stamps: dict | None = None
) -> None:
    """One parquet file, atomically; rows in the order of their paths, so a re-run gives the same bytes.
    encoding: codec.encoding_of the model that made the codes; None where nobody knows. stamps: {path: stamp}
    of the recordings as they were encoded, likewise."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    rels = sorted(rows)
    lengths, codes = zip(*(rows[r] for r in rels))
    columns = {"file_path": pa.array(rels, pa.string()), "audio_length": pa.array(lengths, pa.int64())}
    for k, scale in enumerate(zip(*codes)):
        columns[f"codes_scale_{k}"] = pa.array(scale, pa.list_(pa.int16()))
    if stamps:
        for (name, kind), values in zip(STAMP_COLUMNS.items(), zip(*(stamps[r] for r in rels))):
            columns[name] = pa.array(values, kind)
    meta = {"snac": json.dumps(asdict(geometry)), "data_dir": str(Path(data_dir).resolve())}
    meta |= {"encoding": json.dumps(encoding)} if encoding else {}
    with atomic_file(path) as f:
        table = pa.table(columns).replace_schema_metadata(meta)
        pq.write_table(table, f, write_page_checksum=True)  # a flipped bit is an error, not another code


def older_rows(path: Path, geometry: Geometry, align: int):
    """Rows of a parquet file without our metadata: (path as it stands there, samples, codes [K] of int64 [n],
    None), or (path, samples, None, why it is refused). Codes may be nested or flat, beside shape_scale_k.
    align: samples that the model pads to. Raises UserError for a file that is no such cache."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    scales = len(geometry.vq_strides)
    try:
        table = pq.read_table(path)
        found = sum(name.startswith("codes_scale_") for name in table.column_names)
        names, lengths = table["file_path"].to_pylist(), table["audio_length"].to_pylist()
        columns = [table[f"codes_scale_{k}"].to_pylist() for k in range(scales)]
    except (KeyError, pa.ArrowException, OSError, ValueError) as e:
        raise UserError(f"{path} is no cache of the older schema: {first_line(e)}") from None
    if b"snac" in (table.schema.metadata or {}):
        raise UserError(f"{path} says which model made it: this cache needs no import, use it as it is")
    if found != scales:
        raise UserError(f"{path} has {found} scales of codes, --pretrained_model has {scales}: another model")
    shapes = [
        table[f"shape_scale_{k}"].to_pylist()
        if f"shape_scale_{k}" in table.column_names
        else [None] * len(names)
        for k in range(scales)
    ]
    for name, length, codes, shape in zip(names, lengths, zip(*columns), zip(*shapes)):
        try:
            codes = [np.asarray(c, np.int64).reshape(-1) for c in codes]
            length = int(length)
        except (TypeError, ValueError):
            yield name, length, None, "no codes or no audio length"
            continue
        yield name, length, *older_codes(length, codes, shape, geometry, align)


def older_codes(length: int, codes: list, shapes, geometry: Geometry, align: int) -> tuple:
    """(codes, None), or (None, why they are refused)."""
    if any(isinstance(s, list) and math.prod(s) != len(c) for s, c in zip(shapes, codes)):
        return None, "shape that contradicts the codes"
    coarse = math.ceil(length / align) * align // geometry.coarse_samples
    if not coarse or [len(c) for c in codes] != [coarse * n for n in geometry.per_coarse]:
        return None, "scale lengths don't fit the audio length: encoded without padding"
    if any(c.min() < 0 or c.max() >= geometry.codebook_size for c in codes):
        return None, "code outside the codebook"
    return codes, None


class OldCache:
    """A cache of the older schema: its rows with the right lengths, by path below the recordings.

    Codes wait in a file of int16 (a cache of 3.4 million rows outgrows the memory) until they are written in
    the order in which a cache made anew would hold them. shards: its parquet files; listing: the recordings;
    refused: {path: reason}.
    """

    def __init__(self, shards, listing: list[str], geometry: Geometry, align: int, spool: Path):
        self.geometry, self.rows, self.refused = geometry, {}, {}  # path -> (samples, first code, coarse)
        listing, prefix, end = set(listing), None, 0
        with open(spool, "wb") as f:
            for shard in shards:
                for name, length, codes, why in older_rows(shard, geometry, align):
                    parts = Path(name or "").parts
                    if prefix is None:  # what stands there before the path below the recordings
                        cut = (i for i in range(len(parts)) if "/".join(parts[i:]) in listing)
                        prefix = next((parts[:i] for i in cut), None)
                    rel = "/".join(parts[len(prefix or ()) :])
                    if prefix is None or parts[: len(prefix)] != prefix or rel not in listing:
                        self.refused[str(name)] = "no file of that name below --data_dir"
                    elif rel in self.rows:
                        self.refused[f"{rel} ({shard.name})"] = "path occurs twice"
                    elif why:
                        self.refused[rel] = why
                    else:
                        f.write(np.concatenate(codes).astype(np.int16).tobytes())
                        self.rows[rel] = (length, end, len(codes[0]))
                        end += sum(map(len, codes))
        self.spool = np.memmap(spool, np.int16, "r") if end else None

    def row(self, rel: str) -> tuple:
        """(samples, int16 codes of each scale), as write_shard takes them."""
        length, first, coarse = self.rows[rel]
        ends = np.cumsum([coarse * n for n in self.geometry.per_coarse])
        return length, np.split(self.spool[first : first + ends[-1]], ends[:-1])

    def compare(self, rel: str, fresh: tuple | None) -> str | None:
        """Why a row is not what encoding its file again gave (fresh, None where it can't be read)."""
        if fresh is None:
            return "the recording can't be read"
        return row_differs(self.row(rel), fresh)


def row_differs(row: tuple, fresh: tuple) -> str | None:
    """Why a row is not what encoding its recording gives, both (samples, codes of each scale)."""
    (length, codes), (samples, anew) = row, fresh
    if abs(length - samples) > 1 or [len(c) for c in codes] != [len(c) for c in anew]:
        return "audio length is not the recording's"
    agree = np.mean(np.concatenate(codes) == np.concatenate(anew))
    return None if agree >= AGREE else "codes of another model or another recording"


def check_ours(folder: Path) -> None:
    """Raises UserError for a folder with a cache of the older schema: ours would be written into it."""
    shard = next(folder.glob(SHARDS), None)
    if not shard or (folder / "work").exists():
        return
    if b"snac" not in recorded(shard):
        todo = f"import it (cache_codes.py --import {folder}), or choose another --output_dir"
        raise UserError(f"{folder} holds a cache that does not say which model made it: {todo}")


def recorded_model(cache_dir: str | Path) -> str:
    """Name of the model that a cache was made with. Raises UserError."""
    shard = shards_of(cache_dir)[0]
    return recorded_geometry(recorded(shard), shard).pretrained_model
