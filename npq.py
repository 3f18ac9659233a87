"""Codec tokens on disk as [T, K] frames: .npq files (DAC) and our own SNAC cache, read through memory maps.

    python npq.py info FILE.npq ...                what a file holds, every token checked
    python npq.py from-cache CACHE_DIR OUT_DIR     our parquet cache -> one .npq per utterance
    python npq.py from-dac CODES.npy OUT.npq       codes [K, T] of DacModel.encode -> .npq

A frame is what one step of the language model covers. DAC: one token of each of K codebooks. SNAC: one
coarse (scale-0) token with all finer tokens below it in depth-first order; strides 4, 2, 1 give
c0 c1 c2 c2 c1 c2 c2.
Layouts, little-endian and packed:

    NPQ1  magic, u16 version 1, u16 K, f32 token_rate, f32 kbps, u32 T, u32[K] vocab, u8 dtype, tokens [T, K]
    v0-A  magic, i32 K, f32 fps, f32 kbps, i32 T, i32[K] vocab, u16 tokens [T, K]
    v0-B  magic, i32 K, f32 fps, i32[K] vocab, i32 T, u16 tokens [T, K]
    NPQ2  magic, u16 version 1, u8 mode 1 (mid/side), u16 k_mid, u16 k_side, f32 fps, f32 kbps, u32 T,
          u32[k_mid + k_side] vocab, u8 dtype, tokens [T, K] with the mid columns first
"""

from __future__ import annotations

import argparse
import glob
import itertools
import json
import math
import os
import struct
from pathlib import Path

import numpy as np

from runlog import UserError, atomic_file, main_guard, read_json

DTYPES = {0: "<u1", 1: "<u2", 2: "<u4"}
MAX_K = 512
SCAN_FRAMES = 1 << 20  # frames checked at a time: the scan's memory stays flat


class NpqError(Exception):
    """One bad token file; the message is the reason. A job lists it as skipped and goes on."""


# ---- frames and codes ----


def frame_slots(vq_strides: list[int]) -> list[tuple[int, int]]:
    """[(scale, index within the coarse frame)] in depth-first order; 4, 2, 1 -> c0 c1 c2 c2 c1 c2 c2."""
    if not vq_strides or any(s < 1 for s in vq_strides):
        raise UserError(f"vq_strides {vq_strides} must be positive")
    if any(a % b for a, b in itertools.pairwise(vq_strides)):
        raise UserError(f"vq_strides {vq_strides}: each must be a multiple of the next to nest in one frame")

    def walk(scale, index):
        yield scale, index
        if scale + 1 < len(vq_strides):
            n = vq_strides[scale] // vq_strides[scale + 1]
            for i in range(index * n, (index + 1) * n):
                yield from walk(scale + 1, i)

    return list(walk(0, 0))


def slot_columns(vq_strides: list[int]) -> list[list[int]]:
    """Frame columns of each scale in time order; 4, 2, 1 -> [[0], [1, 4], [2, 3, 5, 6]]."""
    slots = frame_slots(vq_strides)
    return [[c for c, (s, _) in enumerate(slots) if s == k] for k in range(len(vq_strides))]


def frames_from_codes(codes: list, vq_strides: list[int]) -> np.ndarray:
    """SNAC codes, one array [T_k] a scale -> frames [T_0, K]. Lengths must be T_0 * (S // vq_strides[k])."""
    columns = slot_columns(vq_strides)
    out = np.empty((len(codes[0]), sum(map(len, columns))), dtype=np.asarray(codes[0]).dtype)
    for k, cols in enumerate(columns):
        if len(codes[k]) != len(out) * len(cols):
            raise NpqError(f"scale {k} has {len(codes[k])} codes, {len(out)} x {len(cols)} expected")
        out[:, cols] = np.asarray(codes[k]).reshape(len(out), len(cols))
    return out


def codes_from_frames(frames: np.ndarray, vq_strides: list[int]) -> list[np.ndarray]:
    """The inverse: frames [T, K] -> one array [T * S // vq_strides[k]] a scale."""
    return [np.ascontiguousarray(frames[:, cols]).reshape(-1) for cols in slot_columns(vq_strides)]


# ---- .npq ----


class Mapped:
    """A [T, K] array in a file, memory-mapped on first use; only the address travels to loader workers."""

    def __init__(self, path, dtype: str, offset: int, shape: tuple[int, int], columns: int):
        self.where = (str(path), dtype, offset, shape, columns)
        self.map = None

    def __getstate__(self):
        return {"where": self.where, "map": None}

    def array(self) -> np.ndarray:
        path, dtype, offset, shape, columns = self.where
        if self.map is None:
            self.map = np.memmap(path, dtype=dtype, mode="r", offset=offset, shape=shape)[:, :columns]
        return self.map


class Npq:
    """An opened and fully validated file: .kind, .fps, .kbps, .vocab, .frames (T), .tokens() -> [T, K]."""

    def __init__(self, kind: str, fps: float, kbps: float, vocab: list[int], mapped: Mapped):
        self.kind, self.fps, self.kbps, self.vocab, self.mapped = kind, fps, kbps, vocab, mapped
        self.frames = mapped.where[3][0]

    def tokens(self) -> np.ndarray:
        return self.mapped.array()


def parse_header(head: bytes, size: int, legacy: str = "") -> tuple:
    """(kind, fps, kbps, T, vocab, dtype string, data offset, k_mid) from a file's first bytes.

    legacy: "A" or "B" forces a v0 layout. Raises NpqError with the reason.
    """

    def take(fmt, offset):
        if offset + struct.calcsize(fmt) > len(head):
            raise NpqError(f"header cut off at byte {len(head)}")
        return struct.unpack_from(fmt, head, offset)

    magic = head[:4]
    if magic not in (b"NPQ1", b"NPQ0", b"NPQ2"):
        raise NpqError(f"magic {magic!r} is neither NPQ1 nor NPQ2")
    if magic == b"NPQ2":
        version, mode, k_mid, k_side, fps, kbps, T = take("<HBHHffI", 4)
        if version != 1:
            raise NpqError(f"NPQ2 version {version} is not 1")
        if mode != 1:
            raise NpqError(f"NPQ2 mode {mode} is not 1 (mid/side)")
        if k_mid < 1:
            raise NpqError("NPQ2 without a mid codebook (k_mid 0)")
        kind, K, at = "NPQ2", k_mid + k_side, 23
    elif not legacy:
        version, K, fps, kbps, T = take("<HHffI", 4)
        if magic == b"NPQ0" or (K == 0 and 1 <= version <= MAX_K):  # an i32 K: no version field, so legacy v0
            return parse_legacy(head, size)
        if version != 1:
            raise NpqError(f"NPQ1 version {version} is not 1")
        kind, at, k_mid = "NPQ1", 20, K
    elif legacy == "A":
        K, fps, kbps, T = take("<iffi", 4)
        kind, at, k_mid = "v0-A", 20, K
    else:
        K, fps = take("<if", 4)
        kind, at, k_mid, kbps = "v0-B", 12, K, 0.0
    if not 1 <= K <= MAX_K:
        raise NpqError(f"K {K} is outside 1..{MAX_K}")
    vocab = list(take(f"<{K}{'i' if legacy else 'I'}", at))
    at += 4 * K
    if legacy == "B":
        (T,) = take("<i", at)
        at += 4
    if legacy:
        dtype = "<u2"
    else:
        (number,) = take("<B", at)
        at += 1
        if number not in DTYPES:
            raise NpqError(f"dtype {number} is not 0 (u8), 1 (u16) or 2 (u32)")
        dtype = DTYPES[number]
    width = int(dtype[2])
    if not (math.isfinite(fps) and fps > 0):
        raise NpqError(f"token rate {fps} is not a positive number")
    if not (math.isfinite(kbps) and kbps >= 0):
        raise NpqError(f"bitrate {kbps} kbps is not a number of at least 0")
    if min(vocab) < 1:
        raise NpqError(f"vocabulary size {min(vocab)} is below 1")
    if legacy and max(vocab) > 1 << 16:
        raise NpqError(f"vocabulary size {max(vocab)} does not fit u16 tokens")
    if T < 1:
        raise NpqError(f"{T} frames")
    if size < at + T * K * width:
        raise NpqError(f"truncated: {T} x {K} tokens need {at + T * K * width} bytes, the file has {size}")
    return kind, fps, kbps, T, vocab, dtype, at, k_mid


def parse_legacy(head: bytes, size: int) -> tuple:
    """v0 says neither its layout nor a version: take the one whose header is possible, exact size first."""
    found, reasons = [], []
    for layout in "AB":
        try:
            found.append(parse_header(head, size, layout))
        except NpqError as e:
            reasons.append(f"v0-{layout}: {e}")
    if not found:
        raise NpqError("; ".join(reasons))
    return min(found, key=lambda h: size - (h[6] + h[3] * len(h[4]) * 2))


def open_npq(path: str | Path, npq2: str = "mid") -> Npq:
    """Open and validate a whole file: header, size and every token. Raises NpqError.

    npq2: `mid` keeps the first k_mid columns of a stereo file, `both` all of them.
    """
    try:
        size = os.path.getsize(path)
        with open(path, "rb") as f:
            head = f.read(64 + 4 * 2 * 65536)
    except OSError as e:
        raise NpqError(f"cannot be read: {e.strerror}") from None
    kind, fps, kbps, T, vocab, dtype, offset, k_mid = parse_header(head, size)
    mapped = Mapped(path, dtype, offset, (T, len(vocab)), k_mid if npq2 == "mid" else len(vocab))
    found = Npq(kind, fps, kbps, vocab[: mapped.where[4]], mapped)
    check_tokens(found.tokens(), found.vocab)
    return found


def check_tokens(tokens: np.ndarray, vocab: list[int]) -> None:
    """Raises NpqError naming the first token of [T, K] that its vocabulary does not hold."""
    limit = np.asarray(vocab, dtype=np.int64)
    for start in range(0, len(tokens), SCAN_FRAMES):
        block = tokens[start : start + SCAN_FRAMES]
        if (block.max(axis=0) >= limit).any() or (block.dtype.kind == "i" and block.min() < 0):
            t, k = np.argwhere((block < 0) | (block >= limit))[0]
            raise NpqError(
                f"token {int(block[t, k])} at frame {start + t}, codebook {k} is not in 0..{limit[k] - 1}"
            )


def _payload(tokens, vocab, dtype) -> tuple[bytes, np.ndarray]:
    tokens = np.asarray(tokens)
    if tokens.ndim != 2 or tokens.shape[1] != len(vocab) or not 1 <= len(vocab) <= MAX_K or not len(tokens):
        raise NpqError(f"tokens {tokens.shape} are not [T, K] with K = {len(vocab)} vocabulary sizes")
    if tokens.dtype.kind not in "iu":
        raise NpqError(f"tokens are {tokens.dtype}, not integers")
    check_tokens(tokens, vocab)
    if dtype is None:
        dtype = next(d for d, bits in ((0, 8), (1, 16), (2, 32)) if max(vocab) <= 1 << bits)
    if tokens.max() >= 1 << 8 * int(DTYPES[dtype][2]):
        raise NpqError(f"token {tokens.max()} does not fit dtype {dtype}")
    return struct.pack(f"<{len(vocab)}IB", *vocab, dtype), np.ascontiguousarray(tokens, DTYPES[dtype])


def write_npq(
    path, tokens, vocab: list[int], fps: float, kbps: float | None = None, dtype: int | None = None
):
    """NPQ1, atomically. tokens: integers [T, K]; dtype 0, 1, 2, None: the smallest; kbps None: computed."""
    tail, data = _payload(tokens, vocab, dtype)
    kbps = fps * sum(math.log2(v) for v in vocab) / 1000 if kbps is None else kbps
    with atomic_file(path) as f:
        f.write(b"NPQ1" + struct.pack("<HHffI", 1, len(vocab), fps, kbps, len(data)) + tail)
        f.write(data.tobytes())


def write_npq2(path, mid, side, vocab: list[int], fps: float, kbps: float = 0.0, dtype: int | None = None):
    """NPQ2 (stereo mid/side): mid [T, k_mid], side [T, k_side], vocab of all columns, M then S."""
    tail, data = _payload(np.concatenate([mid, side], axis=1), vocab, dtype)
    with atomic_file(path) as f:
        f.write(b"NPQ2" + struct.pack("<HBHHffI", 1, 1, mid.shape[1], side.shape[1], fps, kbps, len(data)))
        f.write(tail + data.tobytes())


# ---- our SNAC cache ----


def cache_shards(folder: str | Path) -> list[str]:
    return sorted(glob.glob(os.path.join(glob.escape(str(folder)), "codes_batch_gpu*.parquet")))


def read_snac_metadata(path: str | Path) -> dict:
    """The `snac` JSON of a shard's schema. Raises NpqError."""
    import pyarrow.parquet as pq

    try:
        meta = json.loads((pq.read_schema(path).metadata or {})[b"snac"])
        meta["vq_strides"] = [int(s) for s in meta["vq_strides"]]
        for key in ("sampling_rate", "hop_length", "codebook_size"):
            meta[key] = int(meta[key])
            if meta[key] < 1:
                raise ValueError(f"{key} is {meta[key]}")
    except KeyError as e:
        raise NpqError(f"no {e} in its schema metadata: not a cache of cache_codes.py") from None
    except (OSError, ValueError, TypeError) as e:  # pyarrow's own errors are ValueError and OSError too
        raise NpqError(str(e).splitlines()[0]) from None
    return meta


def snac_fps(meta: dict) -> float:
    """Coarse frames a second: 24000 / (512 * 4) = 11.72 for snac_24khz."""
    return meta["sampling_rate"] / (meta["hop_length"] * meta["vq_strides"][0])


def read_shard(path: str | Path, meta: dict):
    """(paths, lengths [rows], frames int16 [sum, K], bad [(path, reason)]) of one shard. Raises NpqError."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    columns = slot_columns(meta["vq_strides"])
    names = [f"codes_scale_{k}" for k in range(len(columns))]
    try:
        table = pq.read_table(path, columns=["file_path", *names]).combine_chunks()
    except (OSError, ValueError, KeyError, pa.ArrowException) as e:
        raise NpqError(str(e).splitlines()[0]) from None
    paths = table["file_path"].to_pylist()
    values, offsets = [], []
    for name in names:
        column = table[name].chunk(0) if table.num_rows else pa.array([], table[name].type)
        if not (pa.types.is_list(column.type) or pa.types.is_large_list(column.type)) or column.null_count:
            raise NpqError(f"column {name} is not a list column without nulls")
        flat = column.values.to_numpy(zero_copy_only=False)
        if flat.dtype.kind not in "iu":
            raise NpqError(f"column {name} holds {flat.dtype}, not integers")
        values.append(flat)
        offsets.append(column.offsets.to_numpy().astype(np.int64))
    coarse = np.diff(offsets[0]) // len(columns[0])
    reason = np.full(len(paths), "", dtype=object)
    reason[coarse < 1] = "no codes"
    for k, cols in enumerate(columns):
        have = np.diff(offsets[k])
        reason[(have != coarse * len(cols)) & (reason == "")] = f"scale {k} is not {len(cols)} codes a frame"
        wrong = np.concatenate([[0], np.cumsum((values[k] < 0) | (values[k] >= meta["codebook_size"]))])
        outside = wrong[offsets[k][1:]] > wrong[offsets[k][:-1]]
        reason[outside & (reason == "")] = f"scale {k} has a code outside 0..{meta['codebook_size'] - 1}"
    good = reason == ""
    frames = np.empty((int(coarse[good].sum()), sum(map(len, columns))), dtype=np.int16)
    for k, cols in enumerate(columns):
        keep = np.repeat(good, np.diff(offsets[k]))
        flat = values[k][offsets[k][0] : offsets[k][-1]][keep]
        frames[:, cols] = flat.reshape(len(frames), len(cols))
    bad = [(paths[i], reason[i]) for i in np.flatnonzero(~good)]
    return [p for p, g in zip(paths, good) if g], coarse[good], frames, bad


def index_cache(folder: str | Path) -> dict:
    """Build (once, atomically) or reuse `rvq_index/` beside the shards; returns its key.

    `frames_*.bin` int16 [sum T, K] as in the shards; `files_*.npy` int64 [files, 2] (start, T), in the order
    of file_path so that the split does not depend on how many processes wrote the cache.
    """
    folder = Path(folder)
    shards = cache_shards(folder)
    if not shards:
        raise UserError(f"no codes_batch_gpu*.parquet in {folder}; make the cache with cache_codes.py")
    stats = [[os.path.basename(s), os.path.getsize(s), os.stat(s).st_mtime_ns] for s in shards]
    where = folder / "rvq_index"
    if (where / "index.json").is_file():
        key = read_json(where / "index.json")
        files = [where / key.get("frames_file", "?"), where / key.get("files_file", "?")]
        whole = all(f.is_file() for f in files) and files[0].stat().st_size == 2 * key["frames"] * key["K"]
        if key.get("shards") == stats and whole:
            return key
    try:
        meta = read_snac_metadata(shards[0])
    except NpqError as e:
        raise UserError(f"{shards[0]}: {e}; delete the shard and run cache_codes.py again") from None
    K, bad, all_paths, lengths = len(frame_slots(meta["vq_strides"])), [], [], []
    if meta["codebook_size"] > 1 << 15:
        raise UserError(f"{folder}: codebook_size {meta['codebook_size']} does not fit int16 codes")
    stamp = f"{os.getpid()}_{os.stat(shards[-1]).st_mtime_ns}"
    try:
        where.mkdir(exist_ok=True)
        with atomic_file(where / f"frames_{stamp}.bin") as f:
            for shard in shards:
                try:
                    other = read_snac_metadata(shard)
                    if other != meta:
                        differ = [k for k in meta | other if meta.get(k) != other.get(k)]
                        raise UserError(f"{shard} comes from another model than {shards[0]}: {differ} "
                                        "differ; make one cache with one model")  # fmt: skip
                    paths, n, frames, wrong = read_shard(shard, meta)
                except NpqError as e:
                    bad.append([os.path.basename(shard), str(e), 1000])
                    continue
                bad += [[p, r, 1] for p, r in wrong]
                all_paths += paths
                lengths.append(n)
                f.write(frames.tobytes())
        n = np.concatenate([*lengths, np.zeros(0, np.int64)])
        starts = np.concatenate([[0], np.cumsum(n)[:-1]]) if len(n) else n
        order = sorted(range(len(all_paths)), key=all_paths.__getitem__)
        with atomic_file(where / f"files_{stamp}.npy") as f:
            np.save(f, np.stack([starts, n], axis=1)[order].astype(np.int64).reshape(-1, 2))
        key = {"shards": stats, "snac": meta, "K": K, "frames": int(n.sum()), "bad": bad,
               "frames_file": f"frames_{stamp}.bin", "files_file": f"files_{stamp}.npy"}  # fmt: skip
        with atomic_file(where / "index.json", "w", encoding="utf-8") as f:
            json.dump(key, f)
    except OSError as e:
        raise UserError(f"the index {where} cannot be written: {e.strerror}; make {folder} writable "
                        "or copy it to a folder that is") from e  # fmt: skip
    for old in where.glob("f*_*"):  # of an earlier state of the cache; open maps keep their inode
        if old.name not in (key["frames_file"], key["files_file"]):
            old.unlink(missing_ok=True)
    return key


def write_cache(path: str | Path, rows: list[tuple[str, np.ndarray]], meta: dict) -> None:
    """A parquet shard of cache_codes.py's schema from [(file_path, frames [T, K])], atomically."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    scales = len(meta["vq_strides"])
    samples = meta["vq_strides"][0] * meta["hop_length"]
    codes = [codes_from_frames(np.asarray(frames, dtype=np.int16), meta["vq_strides"]) for _, frames in rows]
    columns = {
        "file_path": pa.array([name for name, _ in rows], pa.string()),
        "audio_length": pa.array([len(frames) * samples for _, frames in rows], pa.int64()),
    }
    for k in range(scales):
        columns[f"codes_scale_{k}"] = pa.array([c[k] for c in codes], pa.list_(pa.int16()))
    with atomic_file(path) as f:
        pq.write_table(pa.table(columns).replace_schema_metadata({"snac": json.dumps(meta)}), f)


# ---- one corpus, whatever the files ----


class Corpus:
    """Token frames of many files: .lengths int64 [files], .vocab, .K, .fps, .source, .bad; read() -> [n, K].

    source: {"kind": "npq"} or {"kind": "snac", **metadata of the cache}: what decodes the tokens.
    """

    def __init__(self, data: str, npq2: str = "mid"):
        self.bad: list[tuple[str, str]] = []
        if os.path.isdir(data) and cache_shards(data):
            key = index_cache(data)
            meta, where = key["snac"], Path(data) / "rvq_index"
            self.files = np.load(where / key["files_file"], mmap_mode=None)
            self.maps = [Mapped(where / key["frames_file"], "<i2", 0, (key["frames"], key["K"]), key["K"])]
            self.vocab = [meta["codebook_size"]] * key["K"]
            self.fps, self.source = snac_fps(meta), {"kind": "snac", **meta}
            self.bad = [(name, reason) for name, reason, _ in key["bad"]]
            bad_rows = sum(n for _, _, n in key["bad"])
            self.lengths = self.files[:, 1]
        else:
            pattern = os.path.join(glob.escape(data), "*.npq") if os.path.isdir(data) else data
            paths = sorted(glob.glob(pattern, recursive=True))
            if not paths:
                raise UserError(
                    f"--data {data}: no such .npq files and no cache folder with codes_batch_gpu*.parquet"
                )
            self.files, self.maps, lengths, first = None, [], [], None
            for path in paths:
                try:
                    one = open_npq(path, npq2)
                except NpqError as e:
                    self.bad.append((path, str(e)))
                    continue
                shape = (one.vocab, round(one.fps, 2))
                if first is None:
                    first, first_path = shape, path
                    self.vocab, self.fps = one.vocab, float(one.fps)
                elif shape != first:
                    sizes = sorted(set(one.vocab))
                    raise UserError(f"{path}: K {len(one.vocab)}, vocabulary {sizes} at {shape[1]} frames/s "
                                    f"differ from {first_path}; give one kind of file")  # fmt: skip
                one.mapped.map = None  # opened per window: the kernel allows 65530 maps
                self.maps.append(one.mapped)
                lengths.append(one.frames)
            self.lengths, self.source = np.asarray(lengths, np.int64), {"kind": "npq"}
            bad_rows = len(self.bad)
        self.bad_fraction = bad_rows / max(1, bad_rows + len(self.lengths))
        if not len(self.lengths):
            name, reason = self.bad[0] if self.bad else (data, "empty")
            raise UserError(f"--data {data}: no usable file ({name}: {reason})")
        self.K = len(self.vocab)

    def read(self, i: int, start: int = 0, n: int | None = None) -> np.ndarray:
        """A copy of frames start .. start + n of file i: [n, K]."""
        n = int(self.lengths[i]) - start if n is None else n
        if self.files is not None:
            start += int(self.files[i, 0])
            return np.array(self.maps[0].array()[start : start + n])
        frames = np.array(self.maps[i].array()[start : start + n])
        self.maps[i].map = None
        return frames


# ---- writers from DAC codes and from our cache ----


def npq_from_dac(codes, path, fps: float = 44100 / 512, codebook_size: int = 1024) -> None:
    """Codes [K, T] or [1, K, T] (DacModel.encode(...).audio_codes) -> NPQ1."""
    codes = np.asarray(codes)
    codes = codes[0] if codes.ndim == 3 and len(codes) == 1 else codes
    if codes.ndim != 2:
        raise NpqError(f"codes {codes.shape} are not [K, T]")
    write_npq(path, codes.T, [codebook_size] * codes.shape[0], fps)


def npq_from_cache(cache_dir, output_dir) -> int:
    """Every row of a cache -> `<output_dir>/<file_path without suffix>.npq`; the number written."""
    import pyarrow.parquet as pq

    from corpus import AudioError, resolve_inside, target_names

    shards = cache_shards(cache_dir)
    if not shards:
        raise UserError(f"no codes_batch_gpu*.parquet in {cache_dir}")
    names = target_names([p for s in shards for p in pq.read_table(s, columns=["file_path"])[0].to_pylist()])
    Path(output_dir).mkdir(parents=True, exist_ok=True)
    written = 0
    for shard in shards:
        meta = read_snac_metadata(shard)
        paths, lengths, frames, bad = read_shard(shard, meta)
        for name, reason in bad:
            print(f"skipped {name}: {reason}")
        for name, end, n in zip(paths, np.cumsum(lengths), lengths):
            try:
                out = resolve_inside(output_dir, names[name].removesuffix(".wav") + ".npq")
            except AudioError as e:
                print(f"skipped {name}: {e}")
                continue
            out.parent.mkdir(parents=True, exist_ok=True)
            write_npq(out, frames[end - n : end], [meta["codebook_size"]] * frames.shape[1], snac_fps(meta))
            written += 1
    return written


# ---- command line ----


def main() -> int:
    parser = argparse.ArgumentParser(description="Read, check and write token files (.npq)")
    commands = parser.add_subparsers(dest="command", required=True)
    one = commands.add_parser("info", help="check every token of .npq files and print what they hold")
    one.add_argument("files", nargs="+")
    one = commands.add_parser("from-cache", help="parquet cache -> one .npq an utterance")
    one.add_argument("cache_dir")
    one.add_argument("output_dir")
    one = commands.add_parser("from-dac", help="codes [K, T] saved with numpy -> .npq")
    one.add_argument("codes")
    one.add_argument("output")
    one.add_argument("--fps", type=float, default=44100 / 512, help="frames/s (default: DAC 44.1 kHz)")
    one.add_argument("--codebook_size", type=int, default=1024)
    args = parser.parse_args()
    failed = 0
    try:
        if args.command == "info":
            for path in args.files:
                try:
                    n = open_npq(path, "both")
                    what = f"{n.kind}, {n.frames} frames x {len(n.vocab)} at {n.fps:.2f}/s"
                    print(f"{path}: {what} = {n.frames / n.fps:.1f} s, "
                          f"vocabulary {sorted(set(n.vocab))}, {n.kbps:.2f} kbps")  # fmt: skip
                except NpqError as e:
                    failed += 1
                    print(f"{path}: refused: {e}")
        elif args.command == "from-cache":
            print(f"{npq_from_cache(args.cache_dir, args.output_dir)} files in {args.output_dir}")
        else:
            npq_from_dac(np.load(args.codes), args.output, args.fps, args.codebook_size)
    except (NpqError, OSError, ValueError) as e:
        raise UserError(f"{getattr(args, 'codes', '')} {e}".strip()) from None
    return 1 if failed else 0


if __name__ == "__main__":
    main_guard(main)
