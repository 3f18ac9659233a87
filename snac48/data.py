"""The data path of training: index beside a cache, 48 kHz targets, slices whose codes and audio match
exactly.

    data = CachedCodesDataset("codes/train", "targets/train", segment_length=2.0)
    data[0]["codes"], data[0]["audio_24k"], data[0]["audio_48k"]
    data = RawAudioDataset(["corpus/train/audio"], segment_length=2.0, geometry=..., context=..., align=...)
    data[0]["encode"], ...          # audio whose codes are the slice's: the trainer encodes it

Don't touch without thinking of caches on people's disks: the parquet schema that CodeIndex reads (SCHEMA
below), and the crop, a function of (seed, epoch, row), which resuming relies on.
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
import torch

from cache_codes import Geometry, slice_at

from .audio import (
    AudioError,
    find_audio,
    link_roots,
    read_audio,
    read_audio_span,
    resample,
    resolve_inside,
    target_names,
)
from .runlog import (
    EXIT_BAD_INPUT,
    UserError,
    atomic_file,
    first_line,
    read_json,
    sweep_leftovers,
    temporary,
    write_json,
)

# 12 dB over full scale: nobody speaks so. Lossy codecs decode to 1.6 at most; integers stored as floats and
# broken recordings are louder, and one in 30 steps keeps Adam's second moments off for all other weights.
MAX_PEAK = 4.0

# ---- data: the index beside the cache ----


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
        array = lambda name, dtype: np.fromfile(self.folder / name, dtype)  # noqa: E731
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


KINDS = ("missing", "copied", "sidon", "sinc", "unfaithful")


class PathBlob:
    """Many paths as one blob, without a Python object each: list -> [row]."""

    def __init__(self, paths):
        blobs = [p.encode("utf-8", "surrogateescape") for p in paths]
        self.blob = np.frombuffer(b"".join(blobs), np.uint8)
        self.ends = np.concatenate([[0], np.cumsum([len(b) for b in blobs], dtype=np.int64)])

    def __getitem__(self, row: int) -> str:
        return bytes(self.blob[self.ends[row] : self.ends[row + 1]]).decode("utf-8", "surrogateescape")


class Targets:
    """Which 48 kHz file belongs to each row: kind uint8 [rows] (index into KINDS), path, and level float32
    [rows]: what the stored wav was scaled by to fit 16 bits, undone on reading.

    From the folder's manifest.jsonl (precompute_48k.py), read once and kept in `index_folder`, if given; a
    folder without a manifest holds real 48 kHz recordings and is listed at every start. path: row -> path of
    the source, for rows 0 to n - 1.
    """

    def __init__(self, folder: str, path, n: int, index_folder: Path | None = None):
        self.folder = Path(folder)
        if not self.folder.is_dir():
            raise UserError(f"48 kHz folder {folder} does not exist; make it with precompute_48k.py")
        self.allowed = link_roots(folder)
        manifest, table = self.folder / "manifest.jsonl", None
        if not manifest.is_file():
            present, rows = set(find_audio(folder)), [path(r) for r in range(n)]
            names, copied = target_names(rows), KINDS.index("copied")
            data = self._table(
                rows, {r: (t, copied, 1.0) for r in rows for t in (r, names[r]) if t in present}
            )
        else:
            stat = manifest.stat()
            key = f"{manifest.resolve()} {stat.st_size} {stat.st_mtime_ns}"
            if index_folder:
                table = index_folder / f"targets-{hashlib.sha256(key.encode()).hexdigest()[:16]}.npz"
            if table and table.exists():
                data = np.load(table)
            else:
                data = self._table([path(r) for r in range(n)], self._read_manifest(manifest))
                if table:
                    with atomic_file(table) as f:
                        np.savez(f, **data)
        self.kinds, self.levels = data["kinds"], data["levels"]
        self.paths = PathBlob([])
        self.paths.blob, self.paths.ends = data["blob"], data["ends"]

    @staticmethod
    def _read_manifest(manifest: Path) -> dict[str, tuple[str, int, float]]:
        found, present = {}, set(find_audio(manifest.parent))
        with open(manifest, encoding="utf-8") as f:
            for number, line in enumerate(f, 1):
                try:
                    row = json.loads(line)
                    kind = row["kind"] if row.get("faithful", True) else "unfaithful"
                    if row["target"] in present:
                        found[row["path"]] = row["target"], KINDS.index(kind), float(row.get("level", 1.0))
                except (ValueError, KeyError, TypeError) as e:
                    raise UserError(f"{manifest} line {number} is not a manifest row ({e}); run "
                                    "precompute_48k.py again to rewrite it") from None  # fmt: skip
        return found

    @staticmethod
    def _table(rows: list[str], found: dict) -> dict:
        table = [found.get(r, ("", 0, 1.0)) for r in rows]
        paths = PathBlob([name for name, _, _ in table])
        return {
            "kinds": np.array([kind for _, kind, _ in table], np.uint8),
            "levels": np.array([level for _, _, level in table], np.float32),
            "blob": paths.blob,
            "ends": paths.ends,
        }

    def usable(self, data: SliceDataset, include_unfaithful: bool, max_bad_fraction: float):
        """Mask of the rows that have a (faithful) target; the others are counted in data.left_out. Raises
        UserError where more than max_bad_fraction have none."""
        keep, n = self.kinds != 0, len(self.kinds)
        missing = int((~keep).sum())
        if missing > max_bad_fraction * n:
            raise UserError(f"48 kHz folder {self.folder} lacks {missing} of {n} files, first "
                            f"{data.path(int(np.flatnonzero(~keep)[0]))}; run precompute_48k.py on the "
                            "recordings (or raise --max_bad_fraction to leave them out)")  # fmt: skip
        if missing:
            data.left_out["no 48 kHz target"] = missing
        unfaithful = self.kinds == KINDS.index("unfaithful")
        if unfaithful.any() and not include_unfaithful:
            keep &= ~unfaithful
            data.left_out["unfaithful 48 kHz target"] = int(unfaithful.sum())
        return keep

    def read(self, row: int, start: int, count: int, rate: int, need: int):
        """Samples [start, start + count) of the row's target at `rate`, at the source's level: float32. At
        least `need` of them must exist."""
        path = resolve_inside(self.folder, self.paths[row], self.allowed)
        return read_audio_span(path, start, count, rate, need) / self.levels[row]


class SliceDataset:
    """Random slices of utterances with exactly matching 24 and 48 kHz audio (a torch map-style dataset).

    Items: {audio_24k [N], audio_48k [2N] (unless no 48 kHz head is trained), valid_24k: samples of real
    audio (the rest is to be masked), kind, file_path, start_pos (coarse codes), row, noise_key, error} and
    what the subclass adds. A crop is a function of (seed, epoch, row); `set_epoch` before each epoch.
    `fixed=True`: the same crop in every epoch (validation).
    """

    def __init__(self, geometry: Geometry, segment_length: float, seed: int, fixed: bool, want_48k: bool):
        self.geometry, self.seed, self.fixed, self.epoch = geometry, seed, fixed, 0
        self.want_48k = want_48k
        self.left_out: dict[str, int] = {}
        self.set_segment_length(segment_length)

    def set_segment_length(self, seconds: float) -> None:
        self.coarse_len = self.geometry.coarse_len(seconds)

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, i: int) -> dict:
        masked = i < 0  # a filler that gives every rank a batch: its content does not count
        row, g = int(self.rows[~i if masked else i]), self.geometry
        crop = np.random.default_rng([self.seed, 0 if self.fixed else self.epoch, row])
        audio, error, left_out = {}, "", ""
        try:
            utterance = self.open(row)
        except AudioError as e:
            utterance, error = {"coarse": 1, "samples": 0, "kind": "missing"}, str(e)
        take = min(utterance["coarse"], self.coarse_len)
        start = int(crop.integers(0, utterance["coarse"] - take + 1))
        at = slice_at(start, self.coarse_len, g.hop_length, g.vq_strides)
        item = {
            "valid_24k": min(at["samples_24k"], utterance["samples"] - at["start_sample_24k"]),
            "kind": utterance["kind"],
            "file_path": self.path(row),
            "start_pos": start,
            "row": -1 if masked else row,
            "noise_key": int(crop.integers(0, 2**62)),
        } | self.slice(row, utterance, start, take, at)
        if not error:
            try:
                audio = self.audio(row, utterance, at)
            except AudioError as e:
                error = str(e)
        peak = max((float(np.abs(x).max(initial=0)) for k, x in audio.items() if k != "source"), default=0)
        if peak > MAX_PEAK:
            left_out = f"samples reach {peak:.3g} where full scale is 1"
        if (
            masked or error or left_out
        ):  # counted and named by the trainer; silence is never a target: nothing is valid
            item["valid_24k"] = 0
        if not self.want_48k:
            audio.pop("audio_48k", None)
        for name, factor in (("audio_24k", 1), ("audio_48k", 2))[: 1 + self.want_48k]:
            x = audio.get(name)
            x = np.zeros(factor * at["samples_24k"], np.float32) if x is None else x
            # past the end of the recording there is nothing to learn: silence there, masked by the loss
            x[factor * item["valid_24k"] :] = 0
            item[name] = torch.from_numpy(x)
        return item | {"error": error, "left_out": left_out, "source": audio.get("source")}


class CachedCodesDataset(SliceDataset):
    """Slices of a cache of cache_codes.py: items also have codes [K int64 tensors], filled with -1 past the
    end, which the model takes as silence there. Without audio_48k_dir: for a decoder without a 48 kHz head.
    """

    def __init__(self, cache_dir, audio_48k_dir, segment_length, limit=None, *, audio_24k_dir="", seed=42,
                 fixed=False, include_unfaithful=False, max_bad_fraction=0.01):  # fmt: skip
        self.index = CodeIndex(str(cache_dir))
        super().__init__(self.index.geometry, segment_length, seed, fixed, bool(audio_48k_dir))
        n = len(self.index)
        self.audio_24k_dir = str(audio_24k_dir or self.index.data_dir)
        self.left_out = {f"cache: {reason}": count for reason, count in self.index.bad.items()}
        bad = sum(self.index.bad.values())
        if bad > max_bad_fraction * (n + bad):
            raise UserError(f"{bad} of {n + bad} rows of cache {cache_dir} are bad ({self.index.bad}), "
                            f"more than --max_bad_fraction {max_bad_fraction:g}: see "
                            f"{self.index.folder}/bad_rows.jsonl", EXIT_BAD_INPUT)  # fmt: skip
        self.targets, keep = None, np.ones(n, bool)
        if audio_48k_dir:
            self.targets = Targets(str(audio_48k_dir), self.index.path, n, self.index.folder)
            keep = self.targets.usable(self, include_unfaithful, max_bad_fraction)
        self.force_24k = bool(audio_24k_dir) or self.targets is None
        self.rows = limited(keep, limit, cache_dir, self.left_out)
        originals = self.force_24k or (self.targets.kinds[self.rows] != KINDS.index("copied")).any()
        if originals and not Path(self.audio_24k_dir).is_dir():
            raise UserError(f"originals folder {self.audio_24k_dir or '(not recorded in the cache)'} does "
                            "not exist: the 24 kHz target lies there; give --audio_24k_dir")  # fmt: skip
        self.allowed_24k = link_roots(self.audio_24k_dir)

    def path(self, row: int) -> str:
        return self.index.path(row)

    def open(self, row: int) -> dict:
        kind = KINDS[self.targets.kinds[row]] if self.targets else "copied"
        samples = int(self.index.lengths[row])
        # codes of the padding past the end have no audio: a crop never begins there
        coarse = min(self.index.coarse(row), math.ceil(samples / self.geometry.coarse_samples))
        return {"coarse": coarse, "samples": samples, "kind": kind}

    def slice(self, row: int, utterance: dict, start: int, take: int, at: dict) -> dict:
        codes = []
        for part, n in zip(self.index.slice(row, start, take), at["scale_len"]):
            padded = np.full(n, -1, np.int64)
            padded[: len(part)] = part
            codes.append(torch.from_numpy(padded))
        return {"codes": codes}

    def audio(self, row: int, utterance: dict, at: dict) -> dict:
        found, rate = {}, self.geometry.sampling_rate
        low, n = at["start_sample_24k"], at["samples_24k"]
        need = min(n, utterance["samples"] - low)
        if self.targets:
            found["audio_48k"] = self.targets.read(row, 2 * low, 2 * n, 2 * rate, 2 * need)
        if utterance["kind"] == "copied" and not self.force_24k:
            found["audio_24k"] = self.targets.read(row, low, n, rate, need)
        else:
            source = resolve_inside(self.audio_24k_dir, self.path(row), self.allowed_24k)
            found["audio_24k"] = read_audio_span(source, low, n, rate, need)
        return found


class RawAudioDataset(SliceDataset):
    """Slices of recordings, to be encoded on the fly: items also have encode [m] (audio at the model's rate
    whose codes hold the slice's) and encode_at (where: first coarse code, number of them).

    context, align: samples that the encoder sees beyond a slice, and the unit that spans are rounded to; with
    these the codes of the span are those of the whole utterance. 48 kHz targets: audio_48k_dir as for the
    cache; or the recording itself where its rate is native_rate or more, and below that what `upsampler`
    says: sinc, or sidon (items then carry the recording as `source`, the trainer restores it); else the
    file is bad.
    """

    def __init__(self, data_dirs, segment_length, limit=None, *, geometry, context, align, audio_48k_dir="",
                 want_48k=True, upsampler="", native_rate=48000, seed=42, fixed=False,
                 include_unfaithful=False, max_bad_fraction=0.01):  # fmt: skip
        super().__init__(geometry, segment_length, seed, fixed, want_48k)
        self.context, self.align = context, align
        self.upsampler, self.native_rate = upsampler, native_rate
        self.roots = [(str(d), link_roots(d)) for d in data_dirs]
        found = [(root, rel) for root, (d, _) in enumerate(self.roots) for rel in find_audio(d)]
        self.files = PathBlob([rel for _, rel in found])
        self.root_of = np.array([root for root, _ in found], np.int16)
        self.targets, keep = None, np.ones(len(found), bool)
        if want_48k and audio_48k_dir:
            if len(data_dirs) > 1:
                raise UserError("--audio_48k_dir goes with one --data_dir")
            self.targets = Targets(str(audio_48k_dir), self.files.__getitem__, len(found))
            keep = self.targets.usable(self, include_unfaithful, max_bad_fraction)
        self.rows = limited(keep, limit, ", ".join(map(str, data_dirs)), self.left_out)

    def path(self, row: int) -> str:
        return self.files[row]

    def open(self, row: int) -> dict:
        folder, allowed = self.roots[self.root_of[row]]
        x, rate = read_audio(resolve_inside(folder, self.path(row), allowed))
        audio = resample(x, rate, self.geometry.sampling_rate)
        samples, padded = len(audio), -(-len(audio) // self.align) * self.align
        coarse = math.ceil(samples / self.geometry.coarse_samples)
        audio = np.pad(audio, (0, padded - samples))
        found = {"coarse": coarse, "samples": samples, "kind": "copied", "audio": audio, "source": (x, rate)}
        if self.targets:
            found["kind"] = KINDS[self.targets.kinds[row]]
        elif self.want_48k and rate < self.native_rate:
            if not self.upsampler:
                raise AudioError(f"{rate} Hz is below --native_rate {self.native_rate}: it needs --upsampler "
                                 "sidon (CD-quality recordings: or --native_rate 44100)")  # fmt: skip
            found["kind"] = self.upsampler
        return found

    def slice(self, row: int, utterance: dict, start: int, take: int, at: dict) -> dict:
        n, whole = self.geometry.coarse_samples, utterance.get("audio", np.zeros(self.align, np.float32))
        lo = max(0, (start * n - self.context) // self.align * self.align)
        hi = min(len(whole), -(-((start + take) * n + self.context) // self.align) * self.align)
        return {"encode": torch.from_numpy(whole[lo:hi].copy()), "encode_at": (start - lo // n, take)}

    def audio(self, row: int, utterance: dict, at: dict) -> dict:
        def cut(x, first, n):
            out = np.zeros(n, np.float32)
            part = x[first : first + n]
            out[: len(part)] = part
            return out

        found = {"audio_24k": cut(utterance["audio"], at["start_sample_24k"], at["samples_24k"])}
        if self.want_48k:
            first, n, (x, rate) = at["start_sample_48k"], at["samples_48k"], utterance["source"]
            if self.targets:
                need = min(n, 2 * (utterance["samples"] - first // 2))
                found["audio_48k"] = self.targets.read(row, first, n, 48000, need)
            elif utterance["kind"] == "sidon":
                found["source"] = (x, rate, first)
            else:
                found["audio_48k"] = cut(resample(x, rate, 48000), first, n)
        return found


def limited(keep, limit, name, left_out: dict):
    """Row numbers that stay, int64 [rows]: those marked in `keep`, at most `limit` of them, at least one."""
    rows = np.flatnonzero(keep)
    rows = rows[:limit] if limit is not None and limit >= 0 else rows
    if not len(rows):
        raise UserError(f"nothing in {name} can be used{f': {left_out}' if left_out else ''}")
    return rows


def collate(items: list[dict]) -> dict:
    """audio_24k [B, 1, N]; audio_48k [B, 1, 2N] if there; valid_24k, phase_true, noise_key [B]; rows: those
    that are no fillers; codes [K] of [B, T_k], or encode (list of [m]) and encode_at; names; sources: {b:
    (samples, rate, first)} that SIDON restores."""
    stack = lambda name: torch.stack([it[name] for it in items])  # noqa: E731
    batch = {"audio_24k": stack("audio_24k")[:, None]}
    if "audio_48k" in items[0]:
        batch["audio_48k"] = stack("audio_48k")[:, None]
    if "codes" in items[0]:
        batch["codes"] = [
            torch.stack([it["codes"][k] for it in items]) for k in range(len(items[0]["codes"]))
        ]
    else:
        batch |= {k: [it[k] for it in items] for k in ("encode", "encode_at")}
    return batch | {
        "valid_24k": torch.tensor([it["valid_24k"] for it in items]),
        "phase_true": torch.tensor([it["kind"] in ("copied", "sinc") for it in items]),
        "noise_key": torch.tensor([it["noise_key"] for it in items]),
        "bad": [(it["file_path"], it["error"]) for it in items if it["error"]],
        "left_out": [(it["file_path"], it["left_out"]) for it in items if it["left_out"]],
        "sources": {i: it["source"] for i, it in enumerate(items) if it["source"]},
        "names": [it["file_path"] for it in items],
        "rows": [it["row"] for it in items if it["row"] >= 0],
    }
