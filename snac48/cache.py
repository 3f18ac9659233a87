"""THE cache of codes: its parquet schema, written and read, and the index beside it.

Don't touch without thinking of caches on people's disks.
"""

from __future__ import annotations

import errno
import hashlib
import json
import math
import os
import shutil
from dataclasses import asdict
from pathlib import Path

import numpy as np

from .cli import UserError, first_line
from .codec import Geometry
from .files import atomic_file, read_json, sweep_leftovers, temporary, write_json


class CodeIndex:
    """A cache folder as flat memory-mapped arrays: no per-row Python object, opened at once at any size.

    Built once beside the cache (`index-KEY/`, KEY = names, sizes and mtimes of the shards), atomically.
    codes: int16 [total coarse codes, F], F = sum of codes a coarse code over the scales, scale by scale,
    so a slice of any utterance is one contiguous read. offsets: int64 [rows + 1] in coarse codes.
    lengths: int64 [rows], samples at the model's rate. paths: UTF-8 blob, path_offsets [rows + 1].
    Malformed rows are left out, counted in `bad` (reason -> number) and listed in bad_rows.jsonl.
    """

    def __init__(self, cache_dir: str):
        self.cache_dir = Path(cache_dir)
        if not self.cache_dir.is_dir():
            raise UserError(f"cache folder {cache_dir} does not exist; make it with cache_codes.py")
        shards = sorted(self.cache_dir.glob("codes_batch_gpu*_*.parquet"))
        if not shards:
            raise UserError(
                f"cache folder {cache_dir} holds no codes_batch_gpu*_*.parquet; run cache_codes.py first"
            )
        stats = [(s.name, s.stat().st_size, s.stat().st_mtime_ns) for s in shards]
        key = hashlib.sha256(json.dumps(["v1", stats]).encode()).hexdigest()[:16]
        self.folder = self.cache_dir / f"index-{key}"
        if not (self.folder / "index.json").exists():
            self._build(shards)
        self._open()

    def _open(self):
        info = read_json(self.folder / "index.json")
        self.geometry = Geometry.from_json(json.dumps(info["snac"]))
        self.data_dir, self.bad = info["data_dir"], info["bad"]
        f = sum(self.geometry.frames_per_coarse(k) for k in range(len(self.geometry.vq_strides)))
        array = lambda name, dtype: np.fromfile(self.folder / name, dtype)
        self.offsets, self.lengths = array("offsets.i64", np.int64), array("lengths.i64", np.int64)
        self.path_offsets = array("path_offsets.i64", np.int64)
        self.codes = np.memmap(self.folder / "codes.i16", np.int16, "r").reshape(-1, f)
        self.paths = np.memmap(self.folder / "paths.bin", np.uint8, "r")

    def __getstate__(self):  # spawned workers open the files themselves
        return {"folder": self.folder, "cache_dir": self.cache_dir}

    def __setstate__(self, state):
        self.__dict__.update(state)
        self._open()

    def __len__(self) -> int:
        return len(self.lengths)

    def path(self, row: int) -> str:
        return bytes(self.paths[self.path_offsets[row] : self.path_offsets[row + 1]]).decode()

    def coarse(self, row: int) -> int:
        """Coarse codes of an utterance."""
        return int(self.offsets[row + 1] - self.offsets[row])

    def slice(self, row: int, start: int, coarse_len: int) -> list:
        """Codes of all scales, int64 numpy [coarse_len * S // vq_strides[k]] each."""
        first = int(self.offsets[row]) + start
        block = self.codes[first : first + coarse_len].astype(np.int64)  # [coarse_len, F]
        parts, at = [], 0
        for k in range(len(self.geometry.vq_strides)):
            n = self.geometry.frames_per_coarse(k)
            parts.append(block[:, at : at + n].reshape(-1))
            at += n
        return parts

    def _build(self, shards):
        sweep_leftovers(self.cache_dir)
        tmp = temporary(self.cache_dir / "index")
        try:
            tmp.mkdir()
        except OSError as e:
            raise UserError(
                f"the index of cache {self.cache_dir} can't be written there: {e.strerror}"
            ) from None
        try:
            self._build_in(tmp, shards)
            os.rename(tmp, self.folder)
        except OSError as e:
            if e.errno not in (errno.EEXIST, errno.ENOTEMPTY):  # those: another process was first
                raise
        finally:
            shutil.rmtree(tmp, ignore_errors=True)
        for old in self.cache_dir.glob("index-*"):
            if old != self.folder:
                shutil.rmtree(old, ignore_errors=True)  # of an earlier state of the cache

    def _build_in(self, tmp, shards):
        import pyarrow as pa
        import pyarrow.parquet as pq

        geometry, data_dir, seen = None, None, set()
        offsets, lengths, path_ends = [np.zeros(1, np.int64)], [], [np.zeros(1, np.int64)]
        bad, bad_rows = {}, []
        with open(tmp / "codes.i16", "wb") as codes_file, open(tmp / "paths.bin", "wb") as paths_file:
            for shard in shards:
                try:
                    table = pq.read_table(shard, page_checksum_verification=True)
                except (pa.ArrowException, OSError, ValueError, MemoryError) as e:
                    raise UserError(f"cache file {shard} is corrupt ({first_line(e)}); delete it "
                                    "and run cache_codes.py again (remove its unit in work/ "
                                    "too)") from None  # fmt: skip
                meta = table.schema.metadata or {}
                if b"snac" not in meta:
                    raise UserError(f"cache file {shard} does not say which model made it (no 'snac' "
                                    "metadata); make the cache anew with cache_codes.py")  # fmt: skip
                found = Geometry.from_json(meta[b"snac"].decode(errors="replace"), f"cache file {shard}")
                geometry = geometry or found
                data_dir = data_dir or meta.get(b"data_dir", b"").decode()
                if geometry.difference(found):
                    raise UserError(f"cache {self.cache_dir} mixes models: {shard.name} differs "
                                    f"({found.difference(geometry)})")  # fmt: skip
                try:
                    block, n, length, names, reasons = shard_arrays(table, geometry, seen)
                except (KeyError, TypeError, ValueError, pa.ArrowException) as e:
                    raise UserError(f"cache file {shard} has an unexpected layout: {first_line(e)}") from None
                for row, reason in reasons.items():
                    bad[reason] = bad.get(reason, 0) + 1
                    bad_rows.append({"shard": shard.name, "row": row, "reason": reason})
                codes_file.write(block.tobytes())
                offsets.append(offsets[-1][-1] + np.cumsum(n))
                lengths.append(length)
                blobs = [name.encode() for name in names]
                paths_file.write(b"".join(blobs))
                path_ends.append(path_ends[-1][-1] + np.cumsum([len(b) for b in blobs], dtype=np.int64))
        np.concatenate([o for o in offsets if len(o)]).astype(np.int64).tofile(tmp / "offsets.i64")
        np.concatenate(lengths).astype(np.int64).tofile(tmp / "lengths.i64")
        np.concatenate([p for p in path_ends if len(p)]).astype(np.int64).tofile(tmp / "path_offsets.i64")
        (tmp / "bad_rows.jsonl").write_text("".join(json.dumps(r) + "\n" for r in bad_rows))
        if sum(map(len, lengths)) == 0:
            raise UserError(f"cache {self.cache_dir} has no usable row: {bad}")
        write_json(tmp / "index.json", {"snac": asdict(geometry), "data_dir": data_dir, "bad": bad})


def shard_arrays(table, geometry: Geometry, seen: set[int]):
    """One shard as arrays: (codes [coarse, F] int16, coarse codes a row, audio lengths, paths, {bad row:
    reason}).

    seen: hashes of the paths of earlier shards, extended here; a path that comes twice is a bad row.
    """
    import pyarrow as pa

    rows, scales = table.num_rows, range(len(geometry.vq_strides))
    reasons: dict[int, str] = {}

    def refuse(mask, reason):
        for row in np.flatnonzero(mask):
            reasons.setdefault(int(row), reason)

    names = table["file_path"].to_pylist()
    length_column = table["audio_length"]
    refuse(np.asarray(length_column.is_null()), "no audio length")
    length = np.asarray(length_column.fill_null(0).cast("int64"))
    for row, name in enumerate(names):
        if (
            not isinstance(name, str)
            or not name
            or "\0" in name
            or name[0] in "/\\"
            or ".." in name.split("/")
        ):
            reasons[row] = "unsafe path"
        elif hash(name) in seen:
            reasons.setdefault(row, "path occurs twice")
        else:
            seen.add(hash(name))
    values, ends = [], []
    for k in scales:
        kind = table[f"codes_scale_{k}"].type
        if not hasattr(kind, "value_type") or not pa.types.is_integer(kind.value_type):
            raise ValueError(f"codes_scale_{k} is {kind}, not a list of integers")
        column = table[f"codes_scale_{k}"].combine_chunks()
        column = column.chunk(0) if hasattr(column, "chunk") else column
        refuse(np.asarray(column.is_null()), "no codes")
        flat = column.flatten().fill_null(-1)
        counts = np.asarray(column.value_lengths().fill_null(0).cast("int64"))
        values.append(np.asarray(flat.cast("int64")))
        ends.append(np.concatenate([[0], np.cumsum(counts)]))
    coarse = np.diff(ends[0])
    refuse(coarse == 0, "no codes")
    for k in scales:
        refuse(np.diff(ends[k]) != coarse * geometry.frames_per_coarse(k), "scales that don't match")
        out = (values[k] < 0) | (values[k] >= geometry.codebook_size)
        total = np.concatenate([[0], np.cumsum(out)])
        refuse(total[ends[k][1:]] - total[ends[k][:-1]] > 0, "code outside the codebook")
    # SNAC pads to whole coarse codes and to whole windows of its attention, 32 latent frames where it has one
    padding = geometry.hop_length * math.lcm(geometry.vq_strides[0], 32)
    coded = coarse * geometry.coarse_samples
    refuse(
        (length <= 0) | (length > coded) | (length <= coded - padding),
        "audio length that doesn't match the codes",
    )
    good = np.array([r not in reasons for r in range(rows)], bool)
    blocks = []
    for k in scales:
        keep = np.repeat(good, np.diff(ends[k]))
        blocks.append(values[k][keep].astype(np.int16).reshape(-1, geometry.frames_per_coarse(k)))
    kept = [n for n, g in zip(names, good) if g]
    return np.concatenate(blocks, axis=1), coarse[good], length[good], kept, reasons


def write_shard(path: Path, rows: dict, geometry: Geometry, data_dir: str) -> None:
    """One parquet file, atomically; rows in the order of their paths, so a re-run gives the same bytes."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    rels = sorted(rows)
    columns = {
        "file_path": pa.array(rels, pa.string()),
        "audio_length": pa.array([rows[r][0] for r in rels], pa.int64()),
    }
    for k in range(len(geometry.vq_strides)):
        columns[f"codes_scale_{k}"] = pa.array([rows[r][1][k] for r in rels], pa.list_(pa.int16()))
    meta = {"snac": json.dumps(asdict(geometry)), "data_dir": str(Path(data_dir).resolve())}
    with atomic_file(path) as f:
        table = pa.table(columns).replace_schema_metadata(meta)
        pq.write_table(table, f, write_page_checksum=True)  # a flipped bit is an error, not another code


def open_shard(path: str | Path) -> tuple:
    """One parquet file on its own: (geometry, *shard_arrays). Raises UserError when it is none of ours."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        table = pq.read_table(path, page_checksum_verification=True)
        geometry = Geometry.from_json(table.schema.metadata[b"snac"].decode(), str(path))
        return geometry, *shard_arrays(table, geometry, set())
    except (KeyError, TypeError, ValueError, OSError, pa.ArrowException) as e:
        raise UserError(f"{path} is not a parquet file of cache_codes.py: {first_line(e)}") from None
