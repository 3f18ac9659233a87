"""The data path of training: 48 kHz targets, slices whose codes and audio match exactly, batches.

    data = CachedCodesDataset("codes/train", "targets/train", segment_length=2.0)
    data[0]["codes"], data[0]["audio_24k"], data[0]["audio_48k"]
    data = RawAudioDataset(["corpus/train/audio"], segment_length=2.0, geometry=..., context=..., align=...)
    data[0]["encode"], ...          # audio whose codes are the slice's: the trainer encodes it

Don't touch without thinking of runs on people's disks: a crop is a function of (seed, epoch, row), which
resuming relies on.
"""

import hashlib
import json
import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

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
from .cache import CodeIndex
from .cli import EXIT_BAD_INPUT, LoaderDied, UserError, ignore_stop_signals, kill_workers_at_exit
from .codec import Geometry, encode, slice_at
from .decoder import HEADS
from .files import atomic_file
from .schedule import Epoch

# 12 dB over full scale: nobody speaks so. Lossy codecs decode to 1.6 at most; integers stored as floats and
# broken recordings are louder, and one in 30 steps keeps Adam's second moments off for all other weights.
MAX_PEAK = 4.0

# ---- targets ----

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

    From the folder's manifest.jsonl (precompute_48k.py), read once and kept in `index_folder`, if given; of a
    folder without a manifest `kind` says what it holds (sidon or recordings), it is listed at every start.
    path: row -> path of the source, for rows 0 to n - 1.
    """

    def __init__(self, folder: str, path, n: int, index_folder: Path | None = None, kind: str = ""):
        self.folder = Path(folder)
        if not self.folder.is_dir():
            raise UserError(f"48 kHz folder {folder} does not exist; make it with precompute_48k.py")
        self.allowed = link_roots(folder)
        manifest, table = self.folder / "manifest.jsonl", None
        if not kind and not manifest.is_file():
            raise UserError(
                f"48 kHz folder {folder} has no manifest.jsonl: say what it holds, --target_kind sidon "
                "(restored: its waveform is not the recording's) or --target_kind recordings"
            )
        if index_folder and manifest.is_file():
            stat = manifest.stat()
            key = f"{manifest.resolve()} {stat.st_size} {stat.st_mtime_ns}"
            table = index_folder / f"targets-{hashlib.sha256(key.encode()).hexdigest()[:16]}.npz"
        if table and table.exists():
            data = np.load(table)
        else:
            data = self._table([path(r) for r in range(n)], manifest, kind)
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
                    raise UserError(
                        f"{manifest} line {number} is not a manifest row ({e}); run "
                        "precompute_48k.py again to rewrite it"
                    ) from None
        return found

    def _table(self, rows: list[str], manifest: Path, kind: str) -> dict:
        if manifest.is_file():
            found = self._read_manifest(manifest)
        else:
            number = KINDS.index("sidon" if kind == "sidon" else "copied")
            names, present = target_names(rows), set(find_audio(self.folder))
            found = {r: (t, number, 1.0) for r in rows for t in (r, names[r]) if t in present}
        table = [found.get(r, ("", 0, 1.0)) for r in rows]
        paths = PathBlob([name for name, _, _ in table])
        kinds = np.array([kind for _, kind, _ in table], np.uint8)
        levels = np.array([level for _, _, level in table], np.float32)
        return {"kinds": kinds, "levels": levels, "blob": paths.blob, "ends": paths.ends}

    def read(self, row: int, start: int, count: int, rate: int, need: int):
        """Samples [start, start + count) of the row's target at `rate`, at the source's level: float32. At
        least `need` of them must exist."""
        path = resolve_inside(self.folder, self.paths[row], self.allowed)
        return read_audio_span(path, start, count, rate, need) / self.levels[row]


@dataclass(frozen=True)
class Filler:
    """In the place of a dataset index: gives a rank without work a batch; its content does not count."""

    index: int


class SliceDataset:
    """Random slices of utterances with exactly matching 24 and 48 kHz audio (a torch map-style dataset).

    Items: {audio_24k [N], audio_48k [2N] (and so on for each of `heads`), valid_24k: samples of real audio
    (the rest is to be masked), kind, file_path, start_pos (coarse codes), row, noise_key, error} and what
    the subclass adds. A crop is a function of (seed, epoch, row); `set_epoch` before each epoch.
    `fixed=True`: the same crop in every epoch (validation). heads: which of HEADS are trained; the 24 kHz
    audio always comes.
    """

    def __init__(self, geometry: Geometry, segment_length: float, seed: int, fixed: bool, heads):
        self.geometry, self.seed, self.fixed, self.epoch = geometry, seed, fixed, 0
        self.heads = {name: head for name, head in HEADS.items() if name in heads or head.factor == 1}
        self.left_out: dict[str, int] = {}
        self.set_segment_length(segment_length)

    def choose_rows(
        self,
        name,
        n: int,
        limit,
        folder: str,
        include_unfaithful: bool,
        max_bad_fraction: float,
        index_folder: Path | None = None,
        kind="",
    ) -> None:
        """Set `targets`, those in `folder` if it is given, and `rows`, int64: at most `limit` of the n rows
        that have a (faithful) one; the others are counted in `left_out`. Raises UserError where more than
        max_bad_fraction have none, or where no row of `name`, the data, is left."""
        self.targets, keep = None, np.ones(n, bool)
        if folder:
            self.targets = Targets(str(folder), self.path, n, index_folder, kind)
            kinds = self.targets.kinds
            keep, unfaithful = kinds != KINDS.index("missing"), kinds == KINDS.index("unfaithful")
            if missing := int((~keep).sum()):
                self.left_out["no 48 kHz target"] = missing
            if missing > max_bad_fraction * n:
                raise UserError(
                    f"48 kHz folder {self.targets.folder} lacks {missing} of {n} files, first "
                    f"{self.path(int(np.flatnonzero(~keep)[0]))}; run precompute_48k.py on the "
                    "recordings (or raise --max_bad_fraction to leave them out)"
                )
            if unfaithful.any() and not include_unfaithful:
                keep &= ~unfaithful
                self.left_out["unfaithful 48 kHz target"] = int(unfaithful.sum())
        self.rows = np.flatnonzero(keep)[: limit if limit is not None and limit >= 0 else None]
        if not len(self.rows):
            left_out = f": {self.left_out}" if self.left_out else ""
            raise UserError(f"nothing in {name} can be used{left_out}")

    def set_segment_length(self, seconds: float) -> None:
        self.coarse_len = self.geometry.coarse_len(seconds)

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, i: int | Filler) -> dict:
        filler = isinstance(i, Filler)
        row, g = int(self.rows[i.index if filler else i]), self.geometry
        draw = np.random.default_rng([self.seed, 0 if self.fixed else self.epoch, row])
        audio, error, left_out = {}, "", ""
        try:
            utterance = self.open(row)
        except AudioError as e:
            utterance, error = {"coarse": 1, "samples": 0, "kind": "missing"}, str(e)
        take = min(utterance["coarse"], self.coarse_len)
        # the crop: where it begins, in coarse codes (validation's too); noise_key is drawn after it
        start = int(draw.integers(0, utterance["coarse"] - take + 1))
        at = slice_at(start, self.coarse_len, g.hop_length, g.vq_strides)
        item = {
            "valid_24k": min(at["samples_24k"], utterance["samples"] - at["start_sample_24k"]),
            "kind": utterance["kind"],
            "file_path": self.path(row),
            "start_pos": start,
            "row": -1 if filler else row,
            "noise_key": int(draw.integers(0, 2**62)),
        } | self.slice(row, utterance, start, take, at)
        if not error:
            try:
                audio = self.audio(row, utterance, at)
            except AudioError as e:
                error = str(e)
        peak = max((float(np.abs(x).max(initial=0)) for k, x in audio.items() if k != "source"), default=0)
        if peak > MAX_PEAK:
            left_out = f"samples reach {peak:.3g} where full scale is 1"
        if filler or error or left_out:  # named and counted by the trainer; silence is never a target
            item["valid_24k"] = 0
        for name, head in self.heads.items():
            x = audio.get(f"audio_{name}")
            x = np.zeros(head.factor * at["samples_24k"], np.float32) if x is None else x
            # past the end of the recording there is nothing to learn: silence there, masked by the loss
            x[head.factor * item["valid_24k"] :] = 0
            item[f"audio_{name}"] = torch.from_numpy(x)
        return item | {"error": error, "left_out": left_out, "source": audio.get("source")}


class CachedCodesDataset(SliceDataset):
    """Slices of a cache of cache_codes.py: items also have codes [K int64 tensors], filled with -1 past the
    end, which the model takes as silence there. Without audio_48k_dir: for a decoder of 24 kHz alone."""

    def __init__(
        self,
        cache_dir,
        audio_48k_dir,
        segment_length,
        limit=None,
        *,
        audio_24k_dir="",
        seed=42,
        fixed=False,
        include_unfaithful=False,
        max_bad_fraction=0.01,
        target_kind="",
    ):
        self.index = CodeIndex(str(cache_dir))
        super().__init__(self.index.geometry, segment_length, seed, fixed, HEADS if audio_48k_dir else ())
        n = len(self.index)
        self.audio_24k_dir = str(audio_24k_dir or self.index.data_dir)
        self.left_out = {f"cache: {reason}": count for reason, count in self.index.bad.items()}
        bad = sum(self.index.bad.values())
        if bad > max_bad_fraction * (n + bad):
            raise UserError(
                f"{bad} of {n + bad} rows of cache {cache_dir} are bad ({self.index.bad}), "
                f"more than --max_bad_fraction {max_bad_fraction:g}: see "
                f"{self.index.folder}/bad_rows.jsonl",
                EXIT_BAD_INPUT,
            )
        self.choose_rows(
            cache_dir,
            n,
            limit,
            audio_48k_dir,
            include_unfaithful,
            max_bad_fraction,
            self.index.folder,
            target_kind,
        )
        self.force_24k = bool(audio_24k_dir) or self.targets is None
        originals = self.force_24k or (self.targets.kinds[self.rows] != KINDS.index("copied")).any()
        if originals and not Path(self.audio_24k_dir).is_dir():
            raise UserError(
                f"originals folder {self.audio_24k_dir or '(not recorded in the cache)'} does "
                "not exist: the 24 kHz target lies there; give --audio_24k_dir"
            )
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
        parts = zip(self.index.slice(row, start, take), at["scale_len"])
        codes = [np.pad(part.astype(np.int64), (0, n - len(part)), constant_values=-1) for part, n in parts]
        return {"codes": [torch.from_numpy(scale) for scale in codes]}

    def audio(self, row: int, utterance: dict, at: dict) -> dict:
        found, rate, low, n = {}, self.geometry.sampling_rate, at["start_sample_24k"], at["samples_24k"]
        need = min(n, utterance["samples"] - low)
        for name, head in self.heads.items():
            f = head.factor
            if f > 1 or (utterance["kind"] == "copied" and not self.force_24k):
                found[f"audio_{name}"] = self.targets.read(row, f * low, f * n, f * rate, f * need)
            else:
                source = resolve_inside(self.audio_24k_dir, self.path(row), self.allowed_24k)
                found[f"audio_{name}"] = read_audio_span(source, low, n, rate, need)
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

    def __init__(
        self,
        data_dirs,
        segment_length,
        limit=None,
        *,
        geometry,
        context,
        align,
        audio_48k_dir="",
        heads=tuple(HEADS),
        upsampler="",
        native_rate=48000,
        seed=42,
        fixed=False,
        include_unfaithful=False,
        max_bad_fraction=0.01,
        target_kind="",
    ):
        super().__init__(geometry, segment_length, seed, fixed, heads)
        self.full_band = len(self.heads) > 1  # some head needs more than the 24 kHz recording
        self.context, self.align = context, align
        self.upsampler, self.native_rate = upsampler, native_rate
        self.roots = [(str(d), link_roots(d)) for d in data_dirs]
        found = [(root, rel) for root, (d, _) in enumerate(self.roots) for rel in find_audio(d)]
        self.files = PathBlob([rel for _, rel in found])
        self.root_of = np.array([root for root, _ in found], np.int16)
        folder = audio_48k_dir if self.full_band else ""
        if folder and len(data_dirs) > 1:
            raise UserError("--audio_48k_dir goes with one --data_dir")
        name = ", ".join(map(str, data_dirs))
        self.choose_rows(
            name, len(found), limit, folder, include_unfaithful, max_bad_fraction, kind=target_kind
        )

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
        elif self.full_band and rate < self.native_rate:
            if not self.upsampler:
                raise AudioError(
                    f"{rate} Hz is below --native_rate {self.native_rate}: it needs --upsampler "
                    "sidon (CD-quality recordings: or --native_rate 44100)"
                )
            found["kind"] = self.upsampler
        return found

    def slice(self, row: int, utterance: dict, start: int, take: int, at: dict) -> dict:
        n, whole = self.geometry.coarse_samples, utterance.get("audio", np.zeros(self.align, np.float32))
        lo = max(0, (start * n - self.context) // self.align * self.align)
        hi = min(len(whole), -(-((start + take) * n + self.context) // self.align) * self.align)
        return {"encode": torch.from_numpy(whole[lo:hi].copy()), "encode_at": (start - lo // n, take)}

    def audio(self, row: int, utterance: dict, at: dict) -> dict:
        def cut(x, first, n):
            part = x[first : first + n].astype(np.float32)
            return np.pad(part, (0, n - len(part)))

        low, n, (x, rate), found = at["start_sample_24k"], at["samples_24k"], utterance["source"], {}
        for name, head in self.heads.items():
            f = head.factor
            if f == 1:
                found[f"audio_{name}"] = cut(utterance["audio"], low, n)
            elif self.targets:
                need = min(n, utterance["samples"] - low)
                found[f"audio_{name}"] = self.targets.read(row, f * low, f * n, head.rate, f * need)
            elif utterance["kind"] == "sidon":
                found["source"] = (x, rate, f * low)
            else:
                found[f"audio_{name}"] = cut(resample(x, rate, head.rate), f * low, f * n)
        return found


def collate(items: list[dict]) -> dict:
    """audio_24k [B, 1, N], audio_48k [B, 1, 2N] and so on, where there; valid_24k, phase_true, noise_key [B];
    rows: those that are no fillers; codes [K] of [B, T_k], or encode (list of [m]) and encode_at; names;
    sources: {b: (samples, rate, first)} that SIDON restores."""
    batch = {}
    for key in (f"audio_{name}" for name in HEADS if f"audio_{name}" in items[0]):
        batch[key] = torch.stack([it[key] for it in items])[:, None]
    if "codes" in items[0]:
        batch["codes"] = [torch.stack(scale) for scale in zip(*(it["codes"] for it in items))]
    else:
        batch |= {k: [it[k] for it in items] for k in ("encode", "encode_at")}
    return batch | {
        "valid_24k": torch.tensor([it["valid_24k"] for it in items]),
        "phase_true": torch.tensor([it["kind"] in ("copied", "sinc") for it in items]),
        "noise_key": torch.tensor([it["noise_key"] for it in items]),
        "bad_file": [(it["file_path"], it["error"]) for it in items if it["error"]],
        "left_out": [(it["file_path"], it["left_out"]) for it in items if it["left_out"]],
        "sources": {i: it["source"] for i, it in enumerate(items) if it["source"]},
        "names": [it["file_path"] for it in items],
        "rows": [it["row"] for it in items if it["row"] >= 0],
    }


# ---- batches ----


def batches(order, epoch: Epoch, first_step: int, rank: int, world: int, accum: int) -> list[list[int]]:
    """Dataset indices of this rank's micro-batches from global step `first_step` to the end of the epoch; a
    Filler where a rank has none. Every step has `accum` micro-batches; the split of a batch over ranks and
    micro-batches changes no result."""
    found = []
    for step in range(first_step - epoch.first_step, epoch.steps):
        batch = order[step * epoch.batch : (step + 1) * epoch.batch]
        mine = batch[rank::world]
        for part in np.array_split(mine, accum):
            found.append([int(i) for i in part] or [Filler(int(batch[0]))])
    return found


def loader(data, index_lists, num_workers: int, pin_memory: bool):
    """The batches that `index_lists` name. Raises LoaderDied."""
    kill_workers_at_exit()
    try:
        yield from torch.utils.data.DataLoader(
            data,
            batch_sampler=index_lists,
            collate_fn=collate,
            num_workers=num_workers,
            worker_init_fn=ignore_stop_signals,
            pin_memory=pin_memory,
            prefetch_factor=4 if num_workers else None,
        )
    except RuntimeError as e:
        if not str(e).startswith("DataLoader worker"):
            raise
        raise LoaderDied(str(e)) from None


def to_device(batch: dict, device) -> dict:
    """The batch with its tensors on the device."""
    move = lambda v: v.to(device, non_blocking=True) if torch.is_tensor(v) else v
    return {k: [move(c) for c in v] if k == "codes" else move(v) for k, v in batch.items()}


@torch.no_grad()
def encode_spans(snac, spans, places, samples: int, geometry: Geometry, device) -> list:
    """Codes of slices of `samples` 24 kHz samples each: spans [m_b], cut at places (first, number) in coarse
    codes -> codes [K] of [B, T_k], -1 past the end."""
    lengths: dict[int, list[int]] = {}
    for b, span in enumerate(spans):
        lengths.setdefault(len(span), []).append(b)
    coarse, per = samples // geometry.coarse_samples, geometry.per_coarse
    out = [torch.full((len(spans), coarse * f), -1, device=device) for f in per]
    for rows in lengths.values():  # only equal lengths share a batch: padding would change last frames
        codes = encode(snac, torch.stack([spans[b] for b in rows])[:, None].to(device))
        for k, f in enumerate(per):
            for b, row in zip(rows, codes[k]):
                first, n = places[b]
                out[k][b, : n * f] = row[first * f : (first + n) * f]
    return out


def restore_targets(batch: dict, sidon, min_envelope_corr: float) -> list[tuple[str, float]]:
    """Fill the 48 kHz targets of `batch["sources"]` by SIDON, each from its whole recording. Returns (name,
    envelope correlation) of those below min_envelope_corr: unfaithful, masked out of the loss."""
    unfaithful = []
    for i, (audio, rate, first) in batch["sources"].items():
        restored, info = sidon.upsample(audio, rate)
        target = batch["audio_48k"][i, 0]
        part = torch.from_numpy(restored[first : first + target.shape[-1]]).to(target.device)
        target[: len(part)] = part
        target[2 * int(batch["valid_24k"][i]) :] = 0
        if info["envelope_corr"] < min_envelope_corr:
            batch["valid_24k"][i] = 0
            unfaithful.append((batch["names"][i], info["envelope_corr"]))
    return unfaithful
