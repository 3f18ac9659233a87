"""Codec tokens as frames [T, K]: .npq files (DAC) and our own cache (SNAC), one corpus, its training windows.

A frame is what one step of the language model covers. DAC: one token of each of K codebooks. SNAC: one
coarse (scale-0) token with all finer tokens below it in depth-first order; strides 4, 2, 1 give
c0 c1 c2 c2 c1 c2 c2.
Layouts of .npq, little-endian and packed:

    NPQ1  magic, u16 version 1, u16 K, f32 token_rate, f32 kbps, u32 T, u32[K] vocab, u8 dtype, tokens [T, K]
    v0-A  magic, i32 K, f32 fps, f32 kbps, i32 T, i32[K] vocab, u16 tokens [T, K]
    v0-B  magic, i32 K, f32 fps, i32[K] vocab, i32 T, u16 tokens [T, K]
    NPQ2  magic, u16 version 1, u8 mode 1 (mid/side), u16 k_mid, u16 k_side, f32 fps, f32 kbps, u32 T,
          u32[k_mid + k_side] vocab, u8 dtype, tokens [T, K] with the mid columns first
"""

import glob
import itertools
import math
import os
import struct
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np

from .cli import UserError, kill_workers_at_exit, numbers
from .files import atomic_file
from .workers import LOOK_S, begin_loader_worker, check_loaders, polled

DTYPES = {0: "<u1", 1: "<u2", 2: "<u4"}
MAX_K = 512
SCAN_FRAMES = 1 << 20  # frames checked at a time: the scan's memory stays flat


class NpqError(Exception):
    """One bad token file; the message is the reason. A job lists it as skipped and goes on."""


# ---- frames and codes ----


def slot_columns(vq_strides: list[int]) -> list[list[int]]:
    """Columns of a frame that hold each scale, in time order; 4, 2, 1 -> [[0], [1, 4], [2, 3, 5, 6]]."""
    if not vq_strides or any(s < 1 for s in vq_strides):
        raise UserError(f"vq_strides {vq_strides} must be positive")
    if any(a % b for a, b in itertools.pairwise(vq_strides)):
        raise UserError(f"vq_strides {vq_strides}: each must be a multiple of the next to nest in one frame")
    scales = range(len(vq_strides))
    # depth first: in the order of their times, of those that begin together the coarser first
    slots = sorted((t, k) for k in scales for t in range(0, vq_strides[0], vq_strides[k]))
    return [[c for c, (_, scale) in enumerate(slots) if scale == k] for k in scales]


def codes_from_frames(frames: np.ndarray, vq_strides: list[int]) -> list[np.ndarray]:
    """Frames [T, K] -> SNAC codes, one array [T * vq_strides[0] // vq_strides[k]] a scale."""
    return [np.ascontiguousarray(frames[:, cols]).reshape(-1) for cols in slot_columns(vq_strides)]


# ---- .npq ----


@dataclass(frozen=True)
class Npq:
    """What the header of a file says; only this address travels to loader workers, never an open map."""

    path: str
    kind: str  # NPQ1, NPQ2, v0-A, v0-B
    fps: float  # frames a second
    kbps: float
    frames: int
    vocab: list[int]  # codebook size of each column that is read
    dtype: str
    offset: int  # of the tokens, bytes
    columns: int  # in the file
    k_mid: int

    def tokens(self) -> np.ndarray:
        """[T, K], mapped anew at each call: a process may hold 65,530 maps, a corpus has more files."""
        shape = (self.frames, self.columns)
        return np.memmap(self.path, self.dtype, "r", self.offset, shape)[:, : len(self.vocab)]

    def __str__(self) -> str:
        K, sizes, seconds = len(self.vocab), sorted(set(self.vocab)), self.frames / self.fps
        size = f"{self.frames} frames x {K} at {self.fps:.2f}/s = {seconds:.1f} s"
        return f"{self.kind}, {size}, vocabulary {sizes}, {self.kbps:.2f} kbps"


def take(head: bytes, fmt: str, offset: int) -> tuple:
    if offset + struct.calcsize(fmt) > len(head):
        raise NpqError(f"header cut off at byte {len(head)}")
    return struct.unpack_from(fmt, head, offset)


def check_k(K: int) -> None:
    if not 1 <= K <= MAX_K:
        raise NpqError(f"K {K} is outside 1..{MAX_K}")


def parse_header(path: str, head: bytes, size: int) -> Npq:
    """The header of a file of `size` bytes from its first bytes. Raises NpqError with the reason."""
    magic, mode = head[:4], 1
    if magic == b"NPQ2":
        kind, at = "NPQ2", 23
        version, mode, k_mid, k_side, fps, kbps, T = take(head, "<HBHHffI", 4)
        K = k_mid + k_side
    elif magic in (b"NPQ1", b"NPQ0"):
        kind, at = "NPQ1", 20
        version, K, fps, kbps, T = take(head, "<HHffI", 4)
        if magic == b"NPQ0" or (K == 0 and 1 <= version <= MAX_K):  # an i32 K: no version field, so legacy v0
            return parse_legacy(path, head, size)
        k_mid = K
    else:
        raise NpqError(f"magic {magic!r} is neither NPQ1 nor NPQ2")
    if version != 1:
        raise NpqError(f"{kind} version {version} is not 1")
    if mode != 1:
        raise NpqError(f"NPQ2 mode {mode} is not 1 (mid/side)")
    if k_mid < 1 and kind == "NPQ2":
        raise NpqError("NPQ2 without a mid codebook (k_mid 0)")
    check_k(K)
    *vocab, number = take(head, f"<{K}IB", at)
    if number not in DTYPES:
        raise NpqError(f"dtype {number} is not 0 (u8), 1 (u16) or 2 (u32)")
    return checked(Npq(path, kind, fps, kbps, T, vocab, DTYPES[number], at + 4 * K + 1, K, k_mid), size)


def parse_legacy(path: str, head: bytes, size: int) -> Npq:
    """v0 says neither its layout nor a version: take the one whose header is possible, exact size first."""
    found, reasons = [], []
    for kind in ("v0-A", "v0-B"):
        try:
            K, fps = take(head, "<if", 4)
            check_k(K)
            if kind == "v0-A":
                at, (kbps, T, *vocab) = 20 + 4 * K, take(head, f"<fi{K}i", 12)
            else:
                at, kbps, (*vocab, T) = 16 + 4 * K, 0.0, take(head, f"<{K}ii", 12)
            found.append(checked(Npq(path, kind, fps, kbps, T, vocab, "<u2", at, K, K), size))
        except NpqError as e:
            reasons.append(f"{kind}: {e}")
    if not found:
        raise NpqError("; ".join(reasons))
    return min(found, key=lambda h: size - (h.offset + h.frames * h.columns * 2))


def checked(h: Npq, size: int) -> Npq:
    """`h` when a file of `size` bytes can have this header; else NpqError."""
    if not 0 < h.fps < math.inf:
        raise NpqError(f"token rate {h.fps} is not a positive number")
    if not 0 <= h.kbps < math.inf:
        raise NpqError(f"bitrate {h.kbps} kbps is not a number of at least 0")
    if min(h.vocab) < 1:
        raise NpqError(f"vocabulary size {min(h.vocab)} is below 1")
    if h.kind.startswith("v0") and max(h.vocab) > 1 << 16:
        raise NpqError(f"vocabulary size {max(h.vocab)} does not fit u16 tokens")
    if h.frames < 1:
        raise NpqError(f"T is {h.frames}: no frames")
    need = h.offset + h.frames * h.columns * int(h.dtype[2])
    if size < need:
        raise NpqError(f"truncated: {h.frames} x {h.columns} tokens need {need} bytes, the file has {size}")
    return h


def open_npq(path: str | Path, npq2: str = "mid") -> Npq:
    """Open and validate a whole file: header, size and every token. Raises NpqError.

    npq2: `mid` keeps the first k_mid columns of a stereo file, `both` all of them.
    """
    try:
        with open(path, "rb") as f:
            head, size = f.read(64 + 4 * 2 * 65536), os.fstat(f.fileno()).st_size
    except OSError as e:
        raise NpqError(f"cannot be read: {e.strerror}") from None
    found = parse_header(str(path), head, size)
    found = replace(found, vocab=found.vocab[: found.k_mid]) if npq2 == "mid" else found
    check_tokens(found.tokens(), found.vocab)
    return found


def check_tokens(tokens: np.ndarray, vocab: list[int]) -> None:
    """Raises NpqError naming the first token of [T, K] that its vocabulary does not hold."""
    limit = np.asarray(vocab, dtype=np.int64)
    for start in range(0, len(tokens), SCAN_FRAMES):
        block = tokens[start : start + SCAN_FRAMES]
        if (block.max(axis=0) >= limit).any() or (block.dtype.kind == "i" and block.min() < 0):
            t, k = np.argwhere((block < 0) | (block >= limit))[0]
            where = f"at frame {start + t}, codebook {k}"
            raise NpqError(f"token {block[t, k]} {where} is not in 0..{limit[k] - 1}")


def write_npq(path, tokens, vocab: list[int], fps: float) -> None:
    """NPQ1, atomically, in the smallest dtype that holds the vocabulary. tokens: integers [T, K]."""
    tokens = np.asarray(tokens)
    if tokens.ndim != 2 or tokens.shape[1] != len(vocab) or not 1 <= len(vocab) <= MAX_K or not len(tokens):
        raise NpqError(f"tokens {tokens.shape} are not [T, K] with K = {len(vocab)} vocabulary sizes")
    if tokens.dtype.kind not in "iu":
        raise NpqError(f"tokens are {tokens.dtype}, not integers")
    check_tokens(tokens, vocab)
    dtype = next(d for d, bits in ((0, 8), (1, 16), (2, 32)) if max(vocab) <= 1 << bits)
    kbps = fps * sum(math.log2(v) for v in vocab) / 1000
    with atomic_file(path) as f:
        f.write(b"NPQ1" + struct.pack("<HHffI", 1, len(vocab), fps, kbps, len(tokens)))
        f.write(struct.pack(f"<{len(vocab)}IB", *vocab, dtype) + tokens.astype(DTYPES[dtype]).tobytes())


# ---- our SNAC cache ----


def slot_order(vq_strides: list[int]) -> np.ndarray:
    """Columns of a CodeIndex row block (scale by scale) in frame order; 4, 2, 1 -> 0 1 3 4 2 5 6."""
    return np.argsort(np.concatenate(slot_columns(vq_strides)))


def snac_source(geometry) -> dict:
    """What a checkpoint keeps of a cache's geometry: what made the tokens, hence what can speak them."""
    return {"kind": "snac", **asdict(geometry), "vq_strides": list(geometry.vq_strides)}


def read_shard(path: str | Path):
    """One parquet file of a cache -> (source, [frames int16 [T, K] of each row]). Raises UserError."""
    from .cache import open_shard, shard_arrays

    table, geometry, _ = open_shard(path)
    block, coarse, _, _, bad = shard_arrays(table, geometry, set(), path)
    if bad:  # row numbers would silently mean other rows
        raise UserError(f"{path} has {len(bad)} bad rows, first row {min(bad)}: {bad[min(bad)]}")
    frames = block[:, slot_order(geometry.vq_strides)]
    return snac_source(geometry), np.split(frames, np.cumsum(coarse)[:-1])


def write_cache(path: str | Path, rows: dict[str, np.ndarray], source: dict) -> None:
    """A shard of cache_codes.py's schema from {file_path: frames [T, K]}, atomically."""
    from .cache import write_shard
    from .codec import Geometry

    strides = source["vq_strides"]
    geometry = Geometry(**{k: v for k, v in source.items() if k != "kind"} | {"vq_strides": tuple(strides)})
    codes = {name: codes_from_frames(np.asarray(f, dtype=np.int16), strides) for name, f in rows.items()}
    write_shard(
        path, {name: (len(c[0]) * geometry.coarse_samples, c) for name, c in codes.items()}, geometry, ""
    )


# ---- one corpus, whatever the files ----


class Corpus:
    """Token frames of many files: .lengths int64 [files], .vocab, .K, .fps, .source, .bad; read() -> [n, K].

    source: {"kind": "npq"} or {"kind": "snac", **metadata of the cache}: what decodes the tokens.
    bad: [(file, reason)]; bad_fraction: share of files, or of rows, that are left out.
    """

    def __init__(self, data: str, npq2: str = "mid"):
        self.index, self.files, self.bad = None, [], []
        is_cache = any(Path(data).glob("codes_batch_gpu*.parquet"))
        bad_rows = self._open_cache(data) if is_cache else self._open_files(data, npq2)
        self.bad_fraction = bad_rows / max(1, bad_rows + len(self.lengths))
        if not len(self.lengths):
            name, reason = self.bad[0] if self.bad else (data, "empty")
            raise UserError(f"--data {data}: no usable file ({name}: {reason})")
        self.K = len(self.vocab)

    def _open_cache(self, data: str) -> int:
        from .cache import CodeIndex

        self.index = CodeIndex(data)
        geometry = self.index.geometry
        self.source, self.order = snac_source(geometry), slot_order(geometry.vq_strides)
        self.vocab = [geometry.codebook_size] * len(self.order)
        self.fps = geometry.sampling_rate / geometry.coarse_samples  # snac_24khz: 24000 / (512 * 4) = 11.72
        self.lengths = np.diff(self.index.offsets)
        self.bad = [(data, f"{n} rows: {reason}") for reason, n in self.index.bad.items()]
        return sum(self.index.bad.values())

    def _open_files(self, data: str, npq2: str) -> int:
        pattern = os.path.join(glob.escape(data), "*.npq") if os.path.isdir(data) else data
        paths = sorted(glob.glob(pattern, recursive=True))
        if not paths:
            what = "no such .npq files and no cache folder with codes_batch_gpu*.parquet"
            raise UserError(f"--data {data}: {what}")
        for path in paths:
            try:
                one = open_npq(path, npq2)
            except NpqError as e:
                self.bad.append((path, str(e)))
                continue
            if not self.files:
                first, self.vocab, self.fps = one, one.vocab, float(one.fps)
            if (one.vocab, round(one.fps, 2)) != (first.vocab, round(first.fps, 2)):
                what = f"K {len(one.vocab)}, vocabulary {sorted(set(one.vocab))} at {one.fps:.2f} frames/s"
                raise UserError(f"{path}: {what} differ from {first.path}; give one kind of file")
            self.files.append(one)
        self.lengths, self.source = np.array([f.frames for f in self.files], np.int64), {"kind": "npq"}
        return len(self.bad)

    def read(self, i: int, start: int = 0, n: int | None = None) -> np.ndarray:
        """A copy of frames start .. start + n of file i: [n, K]."""
        n = int(self.lengths[i]) - start if n is None else n
        if self.index is not None:
            start += int(self.index.offsets[i])
            return self.index.codes[start : start + n][:, self.order]
        return np.array(self.files[i].tokens()[start : start + n])


# ---- windows: what a forward pass sees, functions of seed, epoch and step ----


def window_counts(lengths: np.ndarray, ctx: int, step: int) -> np.ndarray:
    """Windows per file: floor((T - ctx) / step) + 1; a file shorter than ctx is one window of its length."""
    return np.where(lengths >= ctx, (lengths - ctx) // step + 1, 1)


def window_table(lengths: np.ndarray, files: np.ndarray, ctx: int, step: int) -> np.ndarray:
    """int64 [windows, 3]: file, first frame, frames."""
    counts = window_counts(lengths[files], ctx, step)
    owner = np.repeat(files, counts)
    start = step * (np.arange(len(owner)) - np.repeat(np.cumsum(counts) - counts, counts))
    return np.stack([owner, start, np.minimum(ctx, lengths[owner] - start)], axis=1)


def split_files(counts: np.ndarray, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """(train, val) file numbers: whole files, shuffled by the seed, up to int(0.05 * windows) windows.

    By file because windows of one file overlap: a split over windows would validate on training frames.
    """
    if len(counts) < 2:
        raise UserError("one file cannot be split by file: give more files, or --val-data")
    order = np.random.default_rng([seed, 1]).permutation(len(counts))
    n = int((np.cumsum(counts[order]) <= int(0.05 * counts.sum())).sum())
    if n == 0:  # the first is larger than the share: hold out the smallest
        n, order = 1, np.roll(order, -int(np.argmin(counts[order])))
    return np.sort(order[n:]), np.sort(order[:n])


def epoch_order(windows: int, seed: int, epoch: int) -> np.ndarray:
    return np.random.default_rng([seed, 2, epoch]).permutation(windows)


def steps_per_epoch(windows: int, batch: int, accum: int) -> int:
    """floor(ceil(windows / batch) / accum); the left-over batches join the epoch's last step."""
    return max(1, math.ceil(windows / batch) // accum)


def step_windows(order, lengths, step: int, batch: int, accum: int) -> np.ndarray:
    """The windows of one optimiser step, the longest first."""
    last = step + 1 == steps_per_epoch(len(order), batch, accum)
    own = order[step * batch * accum : None if last else (step + 1) * batch * accum]
    return own[np.argsort(-lengths[own], kind="stable")]


def passes_of(windows, batch: int, rank: int = 0, world: int = 1) -> list[np.ndarray]:
    """Forward passes of one rank: every world-th window, those of similar length together, so little is
    padded; [] for a rank that has none."""
    own = windows[rank::world]
    return [own[i : i + batch] for i in range(0, len(own), batch)]


class Windows:
    """A data set for torch's DataLoader: window i of some files of a corpus, as frames [T, K]."""

    def __init__(self, corpus: Corpus, files: np.ndarray, ctx: int, step: int):
        self.corpus, self.files = corpus, files
        self.table = window_table(corpus.lengths, files, ctx, step)

    def __len__(self):
        return len(self.table)

    def __getitem__(self, i) -> np.ndarray:
        return self.corpus.read(*map(int, self.table[i]))


def pad_batch(items: list[np.ndarray]):
    """[T_i, K] each -> int32 tensor [B, max T, K]; -1 beyond a window's end: no input and no loss there."""
    import torch

    items = [torch.from_numpy(item.astype(np.int32)) for item in items]
    return torch.nn.utils.rnn.pad_sequence(items, batch_first=True, padding_value=-1)


def make_loader(windows: Windows, pin: bool, args):
    """A DataLoader of int32 [B, T, K]: the windows listed in its .batch_sampler when an iteration begins.

    args: num_workers, prefetch (batches a worker) and persistent_workers of train_rvq.py.
    """
    from torch.utils.data import DataLoader

    kill_workers_at_exit()
    size = args.batch * args.ctx * windows.corpus.K * 4
    check_loaders(args.num_workers, args.prefetch + 1, size, 1, "--num-workers")
    how = {"num_workers": args.num_workers, "worker_init_fn": begin_loader_worker, "pin_memory": pin}
    if args.num_workers:
        how["timeout"] = LOOK_S
        how |= {"prefetch_factor": args.prefetch, "persistent_workers": args.persistent_workers}
    return DataLoader(windows, batch_sampler=[], collate_fn=pad_batch, **how)


def loaded(loader, lists: list[list[int]], stop=None):
    """The batches of a loader of make_loader, each of the windows of a list. Raises what polled does."""
    loader.batch_sampler[:] = lists
    return polled(loader if lists else [], stop)  # persistent workers would never end an empty epoch


def split_windows(corpus: Corpus, held_out: Corpus | None, ctx: int, step: int, seed: int):
    """(training, validation) Windows: all of both, or whole files of `corpus` where nothing is held out."""
    if held_out:
        return [Windows(c, np.arange(len(c.lengths)), ctx, step) for c in (corpus, held_out)]
    files = split_files(window_counts(corpus.lengths, ctx, step), seed)
    return [Windows(corpus, own, ctx, step) for own in files]


def architecture(args, vocab: list[int]) -> dict:
    """What TokenLM is built from, by the options of train_rvq.py. Raises UserError."""
    size = args.d_model // args.heads
    wide = args.depth_d_model or max(1, args.heads // 2) * size
    if wide % size:
        raise UserError(f"--depth_d_model {wide} must be a multiple of the head size {size}")
    names = ("pattern", "d_model", "layers", "heads", "depth_layers", "dropout", "ctx")
    return {k: getattr(args, k) for k in names} | {"vocab": vocab, "depth_d_model": wide}


def codebook_weights(text: str, alpha: float, K: int) -> list[float]:
    """Weights in the loss. auto: 1 + alpha * k / (K - 1); uniform: 1; or K numbers, comma-separated."""
    if text == "auto":
        return [1 + alpha * k / max(1, K - 1) for k in range(K)]
    if text == "uniform":
        return [1.0] * K
    weights = numbers(float, text, "--cb-weights (auto, uniform or numbers)")
    if len(weights) != K or not min(weights) >= 0 or not 0 < sum(weights) < math.inf:
        raise UserError(f"--cb-weights needs {K} numbers of at least 0, got {text!r}")
    return weights


# ---- one file in, one file out ----


def read_prompt(path: str, row: int, source: dict, vocab: list[int]) -> np.ndarray:
    """Frames [T, K] of an .npq file, or of a row of a cache's parquet file, for a model of such tokens.

    Raises UserError when they are of another codec or vocabulary.
    """
    if path.endswith(".parquet"):
        made_by, rows = read_shard(path)
        if not 0 <= row < len(rows):
            raise UserError(f"{path}: row {row} of {len(rows)}")
        if source.get("weights_sha256") != made_by["weights_sha256"]:
            raise UserError(f"{path} was encoded with another model than the checkpoint's tokens")
        tokens, sizes = rows[row], [made_by["codebook_size"]] * rows[0].shape[1]
    else:
        try:
            one = open_npq(path, "both" if len(vocab) != len(open_npq(path).vocab) else "mid")
        except NpqError as e:
            raise UserError(f"{path}: {e}") from None
        tokens, sizes = one.tokens(), one.vocab
    if sizes != vocab:
        raise UserError(f"{path}: vocabulary {sizes} is not the model's {vocab}")
    return tokens


def npq_from_dac(codes, path, fps: float, codebook_size: int) -> None:
    """Codes [K, T] or [1, K, T] (DacModel.encode(...).audio_codes) -> NPQ1."""
    codes = np.asarray(codes)
    codes = codes[0] if codes.ndim == 3 and len(codes) == 1 else codes
    if codes.ndim != 2:
        raise NpqError(f"codes {codes.shape} are not [K, T]")
    write_npq(path, codes.T, [codebook_size] * codes.shape[0], fps)


def npq_from_cache(cache_dir, output_dir) -> Corpus:
    """Every row of a cache -> `<output_dir>/<file_path without suffix>.npq`; the cache, for its .bad rows."""
    from .audio import resolve_inside, target_names

    corpus = Corpus(str(cache_dir))
    if corpus.index is None:
        raise UserError(f"{cache_dir} is not a cache folder of cache_codes.py")
    paths = [corpus.index.path(i) for i in range(len(corpus.lengths))]
    names = target_names(paths)
    Path(output_dir).mkdir(parents=True, exist_ok=True)
    for i, name in enumerate(paths):
        out = resolve_inside(output_dir, names[name].removesuffix(".wav") + ".npq")
        out.parent.mkdir(parents=True, exist_ok=True)
        write_npq(out, corpus.read(i), corpus.vocab, corpus.fps)
    return corpus
