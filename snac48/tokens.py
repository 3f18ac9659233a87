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
import math
import os
import struct
from dataclasses import asdict
from pathlib import Path

import numpy as np

from .cli import UserError, main_guard
from .files import atomic_file

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
        raise NpqError(f"T is {T}: no frames")
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


def is_cache(folder: str) -> bool:
    return bool(glob.glob(os.path.join(glob.escape(folder), "codes_batch_gpu*.parquet")))


def slot_order(vq_strides: list[int]) -> np.ndarray:
    """Columns of a CodeIndex row block (scale by scale) in frame order; 4, 2, 1 -> 0 1 3 4 2 5 6."""
    counts = [len(c) for c in slot_columns(vq_strides)]
    first = np.cumsum([0, *counts])
    return np.array([first[k] + i for k, i in frame_slots(vq_strides)])


def snac_source(geometry) -> dict:
    """What a checkpoint keeps of a cache's geometry: what made the tokens, hence what can speak them."""
    return {"kind": "snac", **asdict(geometry), "vq_strides": list(geometry.vq_strides)}


def snac_fps(source: dict) -> float:
    """Coarse frames a second: 24000 / (512 * 4) = 11.72 for snac_24khz."""
    return source["sampling_rate"] / (source["hop_length"] * source["vq_strides"][0])


def read_shard(path: str | Path):
    """One parquet file of a cache -> (source, [frames int16 [T, K] of each row]). Raises NpqError."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    from .cache import shard_arrays
    from .codec import Geometry

    try:
        table = pq.read_table(path, page_checksum_verification=True)
        geometry = Geometry.from_json(table.schema.metadata[b"snac"].decode(), str(path))
        block, coarse, _, _, bad = shard_arrays(table, geometry, set())
    except (KeyError, TypeError, ValueError, OSError, UserError, pa.ArrowException) as e:
        raise NpqError(f"not a parquet file of cache_codes.py: {str(e).splitlines()[0]}") from None
    if bad:  # row numbers would silently mean other rows
        raise NpqError(f"{len(bad)} bad rows, first row {min(bad)}: {bad[min(bad)]}")
    frames = block[:, slot_order(geometry.vq_strides)]
    return snac_source(geometry), np.split(frames, np.cumsum(coarse)[:-1])


def write_cache(path: str | Path, rows: dict[str, np.ndarray], source: dict) -> None:
    """A shard of cache_codes.py's schema from {file_path: frames [T, K]}, atomically."""
    from .cache import write_shard
    from .codec import Geometry

    strides = source["vq_strides"]
    geometry = Geometry(**{k: v for k, v in source.items() if k != "kind"} | {"vq_strides": tuple(strides)})
    samples = geometry.coarse_samples
    codes = {name: codes_from_frames(np.asarray(f, dtype=np.int16), strides) for name, f in rows.items()}
    write_shard(path, {name: (len(c[0]) * samples, c) for name, c in codes.items()}, geometry, "")


# ---- one corpus, whatever the files ----


class Corpus:
    """Token frames of many files: .lengths int64 [files], .vocab, .K, .fps, .source, .bad; read() -> [n, K].

    source: {"kind": "npq"} or {"kind": "snac", **metadata of the cache}: what decodes the tokens.
    """

    def __init__(self, data: str, npq2: str = "mid"):
        self.bad: list[tuple[str, str]] = []
        self.index = None
        if os.path.isdir(data) and is_cache(data):
            from .cache import CodeIndex

            self.index = CodeIndex(data)
            self.source = snac_source(self.index.geometry)
            self.order = slot_order(self.source["vq_strides"])
            self.vocab = [self.source["codebook_size"]] * len(self.order)
            self.fps = snac_fps(self.source)
            self.lengths = np.diff(self.index.offsets)
            self.bad = [(data, f"{n} rows: {reason}") for reason, n in self.index.bad.items()]
            bad_rows = sum(self.index.bad.values())
        else:
            pattern = os.path.join(glob.escape(data), "*.npq") if os.path.isdir(data) else data
            paths = sorted(glob.glob(pattern, recursive=True))
            if not paths:
                raise UserError(
                    f"--data {data}: no such .npq files and no cache folder with codes_batch_gpu*.parquet"
                )
            self.maps, lengths, first = [], [], None
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
        if self.index is not None:
            start += int(self.index.offsets[i])
            return self.index.codes[start : start + n][:, self.order]
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
    from .audio import resolve_inside, target_names

    corpus = Corpus(str(cache_dir))
    if corpus.index is None:
        raise UserError(f"{cache_dir} is not a cache folder of cache_codes.py")
    for name, reason in corpus.bad:
        print(f"skipped {name}: {reason}")
    paths = [corpus.index.path(i) for i in range(len(corpus.lengths))]
    names = target_names(paths)
    Path(output_dir).mkdir(parents=True, exist_ok=True)
    for i, name in enumerate(paths):
        out = resolve_inside(output_dir, names[name].removesuffix(".wav") + ".npq")
        out.parent.mkdir(parents=True, exist_ok=True)
        write_npq(out, corpus.read(i), corpus.vocab, corpus.fps)
    return len(paths)


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
