"""The data path of training: index beside a cache, 48 kHz targets, slices whose codes and audio match
exactly.

    data = CachedCodesDataset("codes/train", "targets/train", segment_length=2.0)
    data[0]["codes"], data[0]["audio_24k"], data[0]["audio_48k"]

Don't touch without thinking of caches on people's disks: the parquet schema that CodeIndex reads (SCHEMA
below), and the crop, a function of (seed, epoch, row), which resuming relies on.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch

from cache_codes import Geometry, slice_at
from corpus import AudioError, find_audio, link_roots, read_audio_span, resolve_inside, target_names
from runlog import EXIT_BAD_INPUT, UserError, atomic_file, read_json, write_json

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
        import pyarrow as pa
        import pyarrow.parquet as pq

        tmp = self.cache_dir / f".index.{os.uname().nodename}.{os.getpid()}.tmp"
        shutil.rmtree(tmp, ignore_errors=True)
        try:
            tmp.mkdir()
        except OSError as e:
            raise UserError(
                f"the index of cache {self.cache_dir} can't be written there: {e.strerror}"
            ) from None
        geometry, data_dir, seen = None, None, set()
        offsets, lengths, path_ends = [np.zeros(1, np.int64)], [], [np.zeros(1, np.int64)]
        bad, bad_rows = {}, []
        with open(tmp / "codes.i16", "wb") as codes_file, open(tmp / "paths.bin", "wb") as paths_file:
            for shard in shards:
                try:
                    table = pq.read_table(shard)
                except (pa.ArrowException, OSError) as e:
                    raise UserError(f"cache file {shard} is corrupt ({str(e).splitlines()[0]}); delete it "
                                    "and run "
                                    "cache_codes.py again (remove its unit in work/ "
                                    "too)") from None  # fmt: skip
                meta = table.schema.metadata or {}
                if b"snac" not in meta:
                    raise UserError(f"cache file {shard} does not say which model made it (no 'snac' "
                                    "metadata); "
                                    "make the cache anew with cache_codes.py")  # fmt: skip
                found = Geometry.from_json(meta[b"snac"].decode())
                geometry = geometry or found
                data_dir = data_dir or meta.get(b"data_dir", b"").decode()
                if geometry.difference(found):
                    raise UserError(f"cache {self.cache_dir} mixes models: {shard.name} differs "
                                    f"({found.difference(geometry)})")  # fmt: skip
                try:
                    block, n, length, names, reasons = shard_arrays(table, geometry, seen)
                except (KeyError, TypeError, ValueError, pa.ArrowException) as e:
                    raise UserError(f"cache file {shard} has an unexpected layout: {e}") from None
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
            shutil.rmtree(tmp)
            raise UserError(f"cache {self.cache_dir} has no usable row: {bad}")
        write_json(tmp / "index.json", {"snac": asdict(geometry), "data_dir": data_dir, "bad": bad})
        for old in self.cache_dir.glob("index-*"):
            if old != self.folder:
                shutil.rmtree(old, ignore_errors=True)  # of an earlier state of the cache
        try:
            os.rename(tmp, self.folder)
        except OSError:  # another process built the same index first
            shutil.rmtree(tmp, ignore_errors=True)


def shard_arrays(table, geometry: Geometry, seen: set[int]):
    """One shard as arrays: (codes [coarse, F] int16, coarse codes a row, audio lengths, paths, {bad row:
    reason}).

    seen: hashes of the paths of earlier shards, extended here; a path that comes twice is a bad row.
    """
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
        column = table[f"codes_scale_{k}"].combine_chunks()
        column = column.chunk(0) if hasattr(column, "chunk") else column
        refuse(np.asarray(column.is_null()), "no codes")
        flat = column.flatten()
        if flat.null_count:
            raise ValueError(f"null codes in codes_scale_{k}")
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
    refuse(
        (length <= 0) | (length > coarse * geometry.coarse_samples),
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


class Targets:
    """Which 48 kHz file belongs to each index row: kind uint8 [rows] (index into KINDS), path, and level
    float32 [rows]: what the stored wav was scaled by to fit 16 bits, undone on reading.

    From the folder's manifest.jsonl (precompute_48k.py), read once and kept beside the index; a folder
    without a manifest holds real 48 kHz recordings and is listed at every start.
    """

    def __init__(self, folder: str, index: CodeIndex):
        self.folder = Path(folder)
        if not self.folder.is_dir():
            raise UserError(f"48 kHz folder {folder} does not exist; make it with precompute_48k.py")
        manifest = self.folder / "manifest.jsonl"
        if manifest.is_file():
            stat = manifest.stat()
            key = f"{manifest.resolve()} {stat.st_size} {stat.st_mtime_ns}"
            table = index.folder / f"targets-{hashlib.sha256(key.encode()).hexdigest()[:16]}.npz"
            if not table.exists():
                with atomic_file(table) as f:
                    np.savez(f, **self._table(index, self._read_manifest(manifest)))
        else:
            present = set(find_audio(folder))
            rows = [index.path(r) for r in range(len(index))]
            names, copied = target_names(rows), KINDS.index("copied")
            found = {r: (n, copied, 1.0) for r in rows for n in (r, names[r]) if n in present}
            table = None
        data = np.load(table) if table else self._table(index, found)
        self.kinds, self.levels, self.blob, self.ends = (data[k] for k in ("kinds", "levels", "blob", "ends"))

    @staticmethod
    def _read_manifest(manifest: Path) -> dict[str, tuple[str, int, float]]:
        found = {}
        with open(manifest, encoding="utf-8") as f:
            for number, line in enumerate(f, 1):
                try:
                    row = json.loads(line)
                    kind = row["kind"] if row.get("faithful", True) else "unfaithful"
                    found[row["path"]] = (row["target"], KINDS.index(kind), float(row.get("level", 1.0)))
                except (ValueError, KeyError, TypeError) as e:
                    raise UserError(f"{manifest} line {number} is not a manifest row ({e}); run "
                                    "precompute_48k.py "
                                    "again to rewrite it") from None  # fmt: skip
        return found

    @staticmethod
    def _table(index: CodeIndex, found: dict) -> dict:
        table = [found.get(index.path(r), ("", 0, 1.0)) for r in range(len(index))]
        blobs = [name.encode() for name, _, _ in table]
        return {
            "kinds": np.array([kind for _, kind, _ in table], np.uint8),
            "levels": np.array([level for _, _, level in table], np.float32),
            "blob": np.frombuffer(b"".join(blobs), np.uint8),
            "ends": np.concatenate([[0], np.cumsum([len(b) for b in blobs], dtype=np.int64)]),
        }

    def path(self, row: int) -> str:
        return bytes(self.blob[self.ends[row] : self.ends[row + 1]]).decode()


class CachedCodesDataset:
    """Random slices of cached codes with exactly matching 24 and 48 kHz audio (a torch map-style dataset).

    Items: {codes: [K int64 tensors], audio_24k [N], audio_48k [2N], valid_24k: samples of real audio (the
    rest is to be masked), kind, file_path, start_pos (coarse codes), row, noise_key, error}. A crop is a
    function of (seed, epoch, row); `set_epoch` before each epoch. `fixed=True`: the same crop in every
    epoch (validation). Utterances shorter than the segment are filled with code -1, which the model takes
    as silence beyond the end.
    """

    def __init__(self, cache_dir, audio_48k_dir, segment_length, limit=None, *, audio_24k_dir="", seed=42,
                 fixed=False, include_unfaithful=False, max_bad_fraction=0.01):  # fmt: skip
        self.index = CodeIndex(str(cache_dir))
        self.targets = Targets(str(audio_48k_dir), self.index)
        self.seed, self.fixed, self.epoch = seed, fixed, 0
        self.force_24k = bool(audio_24k_dir)
        self.audio_24k_dir = str(audio_24k_dir or self.index.data_dir)
        self.allowed_24k = link_roots(self.audio_24k_dir)
        self.allowed_48k = link_roots(audio_48k_dir)
        kinds, n = self.targets.kinds, len(self.index)
        self.left_out = {f"cache: {reason}": count for reason, count in self.index.bad.items()}
        missing = int((kinds == 0).sum())
        if missing > max_bad_fraction * n:
            raise UserError(f"48 kHz folder {audio_48k_dir} lacks {missing} of {n} files, first "
                            f"{self.index.path(int(np.flatnonzero(kinds == 0)[0]))}; run "
                            f"precompute_48k.py on {self.index.data_dir} (or raise "
                            "--max_bad_fraction to leave them out)")  # fmt: skip
        bad = sum(self.index.bad.values())
        if bad > max_bad_fraction * (n + bad):
            raise UserError(f"{bad} of {n + bad} rows of cache {cache_dir} are bad ({self.index.bad}), "
                            "more than "
                            f"--max_bad_fraction {max_bad_fraction:g}: see "
                            f"{self.index.folder}/bad_rows.jsonl",
                            EXIT_BAD_INPUT)  # fmt: skip
        keep = kinds != 0
        if missing:
            self.left_out["no 48 kHz target"] = missing
        unfaithful = int((kinds == KINDS.index("unfaithful")).sum())
        if unfaithful and not include_unfaithful:
            keep &= kinds != KINDS.index("unfaithful")
            self.left_out["unfaithful 48 kHz target"] = unfaithful
        self.rows = np.flatnonzero(keep)
        if limit is not None and limit >= 0:
            self.rows = self.rows[:limit]
        if not len(self.rows):
            raise UserError(f"no row of {cache_dir} can be used: {self.left_out}")
        originals = self.force_24k or (kinds[self.rows] != KINDS.index("copied")).any()
        if originals and not Path(self.audio_24k_dir).is_dir():
            raise UserError(f"originals folder {self.audio_24k_dir or '(not recorded in the cache)'} does "
                            "not exist: the 24 kHz target lies there; give --audio_24k_dir")  # fmt: skip
        self.set_segment_length(segment_length)

    def set_segment_length(self, seconds: float) -> None:
        self.coarse_len = self.index.geometry.coarse_len(seconds)

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, i: int) -> dict:
        masked = i < 0  # a filler that gives every rank a batch: its content does not count
        row = int(self.rows[~i if masked else i])
        g = self.index.geometry
        crop = np.random.default_rng([self.seed, 0 if self.fixed else self.epoch, row])
        coarse = self.index.coarse(row)
        take = min(coarse, self.coarse_len)
        start = int(crop.integers(0, coarse - take + 1))
        noise_key = int(crop.integers(0, 2**62))
        at = slice_at(start, self.coarse_len, g.hop_length, g.vq_strides)
        codes = []
        for part, n in zip(self.index.slice(row, start, take), at["scale_len"]):
            padded = np.full(n, -1, np.int64)
            padded[: len(part)] = part
            codes.append(torch.from_numpy(padded))
        item = {
            "codes": codes,
            "valid_24k": min(at["samples_24k"], int(self.index.lengths[row]) - at["start_sample_24k"]),
            "kind": KINDS[self.targets.kinds[row]],
            "file_path": self.index.path(row),
            "start_pos": start,
            "row": row,
            "noise_key": noise_key,
            "error": "",
        }
        try:
            audio_24k, audio_48k = self._audio(row, item, at)
        except (
            AudioError
        ) as e:  # counted and named by the trainer; silence is never a target, so nothing is valid
            audio_24k = np.zeros(at["samples_24k"], np.float32)
            audio_48k = np.zeros(at["samples_48k"], np.float32)
            item["error"], item["valid_24k"] = str(e), 0
        if masked:
            item["valid_24k"] = 0
        # past the end of the recording there is nothing to learn: silence there, masked by the loss
        audio_24k[item["valid_24k"] :] = 0
        audio_48k[2 * item["valid_24k"] :] = 0
        return item | {"audio_24k": torch.from_numpy(audio_24k), "audio_48k": torch.from_numpy(audio_48k)}

    def _audio(self, row: int, item: dict, at: dict):
        target = resolve_inside(self.targets.folder, self.targets.path(row), self.allowed_48k)
        rate = self.index.geometry.sampling_rate
        level = self.targets.levels[row]
        audio_48k = read_audio_span(target, at["start_sample_48k"], at["samples_48k"], 2 * rate) / level
        source, source_level = target, level
        if item["kind"] != "copied" or self.force_24k:
            source, source_level = resolve_inside(self.audio_24k_dir, item["file_path"], self.allowed_24k), 1
        audio_24k = read_audio_span(source, at["start_sample_24k"], at["samples_24k"], rate) / source_level
        return audio_24k, audio_48k


def collate(items: list[dict]) -> dict:
    """codes: [K] of [B, T_k]; audio_24k [B, 1, N]; audio_48k [B, 1, 2N]; valid_24k, phase_true, noise_key
    [B]."""
    k = range(len(items[0]["codes"]))
    return {
        "codes": [torch.stack([it["codes"][j] for it in items]) for j in k],
        "audio_24k": torch.stack([it["audio_24k"] for it in items])[:, None],
        "audio_48k": torch.stack([it["audio_48k"] for it in items])[:, None],
        "valid_24k": torch.tensor([it["valid_24k"] for it in items]),
        "phase_true": torch.tensor([it["kind"] in ("copied", "sinc") for it in items]),
        "noise_key": torch.tensor([it["noise_key"] for it in items]),
        "bad": [(it["file_path"], it["error"]) for it in items if it["error"]],
    }
