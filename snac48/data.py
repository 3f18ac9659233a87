"""The data path of training: batches of slices whose codes and audio match exactly.

    data = CachedCodesDataset("codes/train", "targets/train", segment_length=2.0)
    batch = to_device(data[[3, 14, 15]], "cuda:0")
    batch["codes"], batch["audio_24k"], batch["audio_48k"]
    data = RawAudioDataset(["corpus/train/audio"], segment_length=2.0, geometry=..., context=..., align=...)
    data[[3, 14, 15]]["encode"], ...    # audio whose codes are the slices': the trainer encodes it

A batch is filled in place, row by row, by one process; nothing is collated.

Don't touch without thinking of runs on people's disks: a crop is a function of (seed, epoch, row), which
resuming relies on.
"""

import collections
import functools
import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from .audio import (
    HALVING_REACH,
    AudioError,
    find_audio,
    halving_filter,
    link_roots,
    read_audio,
    resample,
    resolve_inside,
)
from .cache import CodeIndex, scales_of
from .cli import EXIT_BAD_INPUT, UserError, kill_workers_at_exit
from .codec import Geometry, encode, slice_at
from .decoder import HEADS
from .losses import masked
from .schedule import Epoch
from .targets import KINDS, Originals, PathBlob, Targets
from .workers import LOOK_S, begin_loader_worker, check_loaders, polled

# 12 dB over full scale: nobody speaks so. Lossy codecs decode to 1.6 at most; integers stored as floats and
# broken recordings are louder, and one in 30 steps keeps Adam's second moments off for all other weights.
MAX_PEAK = 4.0
HALVED = "48k"  # the head whose audio, where it is the recording itself, the 24 kHz audio is made of


def peak_of(x) -> float:
    return float(max(x.max(), -x.min()))


@dataclass(frozen=True)
class Filler:
    """In the place of a dataset index: gives a rank without work a batch; its content does not count."""

    index: int


class SliceDataset:
    """Random slices of utterances with exactly matching 24 and 48 kHz audio: a torch map-style dataset whose
    keys are lists of indices.

    data[[i, j, ...]] is a batch of B rows:
    audio_24k [B, 1, N], audio_48k [B, 1, 2N] and so on for each of `heads` (before to_device they may lack
    what it makes: see there); valid_24k [B]: samples of real audio, the rest is masked out of the loss; start
    [B], in coarse codes; phase_true [B]; noise_key [B]; rows: those that are no fillers; bad_file, left_out:
    [(path, reason)] of rows whose valid_24k is 0; and what the subclass adds. Its fill_codes and fill_audio
    fill row b; the latter returns the peak, or 1 where it cannot be more.

    A crop is a function of (seed, epoch, row); `set_epoch` before each epoch. `fixed=True`: the same crop in
    every epoch (validation). heads: which of HEADS are trained; the 24 kHz audio always comes.
    """

    def __init__(self, geometry: Geometry, segment_length: float, seed: int, fixed: bool, heads):
        self.geometry, self.seed, self.fixed, self.epoch = geometry, seed, fixed, 0
        self.heads = {name: head for name, head in HEADS.items() if name in heads or head.factor == 1}
        self.left_out: dict[str, int] = {}
        self.margins: dict[str, int] = {}  # samples more on each side of a head's audio, for to_device
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

    def __getitem__(self, indices: list) -> dict:
        batch = self.blank(len(indices))
        for b, i in enumerate(indices):
            self.fill(batch, b, i)
        return {k: torch.from_numpy(v) if isinstance(v, np.ndarray) else v for k, v in batch.items()}

    def blank(self, size: int) -> dict:
        """The arrays of a batch of `size` rows."""
        n, numbers = self.coarse_len * self.geometry.coarse_samples, ("valid_24k", "start", "noise_key")
        batch = {name: np.zeros(size, np.int64) for name in numbers}
        batch |= {"phase_true": np.zeros(size, bool), "rows": [], "bad_file": [], "left_out": []}
        for name, head in self.heads.items():  # every sample of them is written, if only with 0
            samples = head.factor * n + 2 * self.margins.get(name, 0)
            batch[f"audio_{name}"] = np.empty((size, 1, samples), np.float32)
        return batch

    def fill(self, batch: dict, b: int, i: int | Filler) -> None:
        """Put the row of dataset index i into the arrays of a batch, as its row b."""
        filler, g, error = isinstance(i, Filler), self.geometry, ""
        row = int(self.rows[i.index if filler else i])
        draw = np.random.default_rng([self.seed, 0 if self.fixed else self.epoch, row])
        try:
            utterance = self.open(row)
        except AudioError as e:
            utterance, error = {"coarse": 1, "samples": 0, "kind": "missing"}, str(e)
        take = min(utterance["coarse"], self.coarse_len)
        # the crop: where it begins, in coarse codes (validation's too); noise_key is drawn after it
        start = int(draw.integers(0, utterance["coarse"] - take + 1))
        at = slice_at(start, self.coarse_len, g.hop_length, g.vq_strides)
        valid = min(at["samples_24k"], utterance["samples"] - at["start_sample_24k"])
        batch["start"][b], batch["noise_key"][b] = start, draw.integers(0, 2**62)
        batch["phase_true"][b] = utterance["kind"] in ("copied", "sinc")
        self.fill_codes(batch, b, row, utterance, start, take)
        audio, peak = {name: batch[f"audio_{name}"][b, 0] for name in self.heads}, 0.0
        if not error:
            try:
                peak = self.fill_audio(batch, b, row, utterance, at, audio)
            except AudioError as e:
                error = str(e)
        if error:
            batch["bad_file"].append((self.path(row), error))
        elif peak > MAX_PEAK:
            why = f"samples reach {peak:.3g} where full scale is 1"
            batch["left_out"].append((self.path(row), why))
        if not filler:
            batch["rows"].append(row)
        if filler or error or peak > MAX_PEAK:  # named and counted by the trainer; silence is never a target
            for name in self.heads:
                batch[f"audio_{name}"][b] = 0
            return
        batch["valid_24k"][b] = valid
        for name, x in audio.items():
            # past the end of the recording there is nothing to learn: silence there, masked by the loss
            x[self.heads[name].factor * valid + 2 * self.margins.get(name, 0) :] = 0


class CachedCodesDataset(SliceDataset):
    """Slices of a cache of cache_codes.py: batches also have codes [K] of int64 [B, T_k], filled with -1 past
    the end, which the model takes as silence there. Without audio_48k_dir: for a decoder of 24 kHz alone.

    Where the 48 kHz file is the recording itself (kind copied), it is read once: to_device makes the 24 kHz
    audio of it, of the rows that `halve`, bool [B], names. Not with audio_24k_dir: the 24 kHz audio then lies
    there.
    """

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
        one_file = np.zeros(n, bool)
        if self.targets and not audio_24k_dir:
            one_file = self.targets.kinds == KINDS.index("copied")
        wanted, self.originals = np.zeros(n, bool), None
        wanted[self.rows] = ~one_file[self.rows]
        if not wanted[self.rows].all():
            self.margins = {HALVED: HALVING_REACH}
        if wanted.any():
            if not Path(self.audio_24k_dir).is_dir():
                raise UserError(
                    f"originals folder {self.audio_24k_dir or '(not recorded in the cache)'} does "
                    "not exist: the 24 kHz target lies there; give --audio_24k_dir"
                )
            self.originals = Originals(self.audio_24k_dir, self.index.path, wanted, self.index.folder)
        self.force_24k = bool(audio_24k_dir) or not self.targets

    def path(self, row: int) -> str:
        return self.index.path(row)

    def open(self, row: int) -> dict:
        kind = KINDS[self.targets.kinds[row]] if self.targets else "copied"
        samples = int(self.index.lengths[row])
        # codes of the padding past the end have no audio: a crop never begins there
        coarse = min(self.index.coarse(row), math.ceil(samples / self.geometry.coarse_samples))
        return {"coarse": coarse, "samples": samples, "kind": kind}

    def __getitem__(self, indices: list) -> dict:
        batch = super().__getitem__(indices)
        codes = batch.pop("codes")  # [B, coarse, F], as the index holds them
        scales = scales_of(codes.reshape(-1, codes.shape[-1]).numpy(), self.geometry)
        batch["codes"] = [torch.from_numpy(scale.reshape(len(indices), -1)) for scale in scales]
        if self.margins and batch["halve"].all():
            del batch["audio_24k"]  # nothing to be sent
        return batch

    def blank(self, size: int) -> dict:
        shape = (size, self.coarse_len, sum(self.geometry.per_coarse))
        batch = super().blank(size) | {"codes": np.full(shape, -1, np.int16), "sources": {}}
        return batch | {"halve": np.zeros(size, bool)} if self.margins else batch

    def fill_codes(self, batch: dict, b: int, row: int, utterance: dict, start: int, take: int) -> None:
        batch["codes"][b, :take] = self.index.block(row, start, take)

    def fill_audio(self, batch: dict, b: int, row: int, utterance: dict, at: dict, audio: dict) -> float:
        peak = 1.0
        rate, low, n = self.geometry.sampling_rate, at["start_sample_24k"], at["samples_24k"]
        need = min(n, utterance["samples"] - low)
        if utterance["kind"] == "copied" and not self.force_24k:
            del audio["24k"]
            batch["halve"][b] = True
        for name, x in audio.items():
            f, margin = self.heads[name].factor, self.margins.get(name, 0)
            if f > 1:
                within = self.targets.read(x, row, f * low - margin, f * rate, f * need + margin)
            else:
                within = self.originals.read(x, row, low, rate, need)
            peak = peak if within else max(peak, peak_of(x))
        return peak


class RawAudioDataset(SliceDataset):
    """Slices of recordings, to be encoded on the fly: batches also have encode, B tensors [m] (audio at the
    model's rate whose codes hold the slice's), encode_at (where: first coarse code, number of them), and
    sources {b: (path, samples, rate, first)} of what SIDON is to restore.

    context, align: samples that the encoder sees beyond a slice, and the unit that spans are rounded to; with
    these the codes of the span are those of the whole utterance. 48 kHz targets: audio_48k_dir as for the
    cache; or the recording itself where its rate is native_rate or more, and below that what `upsampler`
    says: sinc, or sidon (the trainer restores it); else the file is bad.
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

    def blank(self, size: int) -> dict:
        return super().blank(size) | {"encode": [], "encode_at": [], "sources": {}}

    def fill_codes(self, batch: dict, b: int, row: int, utterance: dict, start: int, take: int) -> None:
        n, whole = self.geometry.coarse_samples, utterance.get("audio", np.zeros(self.align, np.float32))
        lo = max(0, (start * n - self.context) // self.align * self.align)
        hi = min(len(whole), -(-((start + take) * n + self.context) // self.align) * self.align)
        batch["encode"].append(torch.from_numpy(whole[lo:hi].copy()))
        batch["encode_at"].append((start - lo // n, take))

    def fill_audio(self, batch: dict, b: int, row: int, utterance: dict, at: dict, audio: dict) -> float:
        def cut(out, x, first):
            part = x[first : first + len(out)]
            out[: len(part)] = part
            out[len(part) :] = 0

        low, n, (x, rate) = at["start_sample_24k"], at["samples_24k"], utterance["source"]
        for name, out in audio.items():
            f = self.heads[name].factor
            if f == 1:
                cut(out, utterance["audio"], low)
            elif self.targets:
                self.targets.read(
                    out, row, f * low, f * self.geometry.sampling_rate, f * min(n, utterance["samples"] - low)
                )
            elif utterance["kind"] == "sidon":
                batch["sources"][b] = (self.path(row), x, rate, f * low)
                out[:] = 0
            else:
                cut(out, resample(x, rate, self.heads[name].rate), f * low)
        return max(map(peak_of, audio.values()))


# ---- batches ----


def batches(order, epoch: Epoch, first_step: int, rank: int, world: int, accum: int):
    """Yields the dataset indices of this rank's micro-batches from global step `first_step` to the end of the
    epoch; a Filler where a rank has none. Every step has `accum` micro-batches; the split of a batch over
    ranks and micro-batches changes no result."""
    for step in range(first_step - epoch.first_step, epoch.steps):
        batch = order[step * epoch.batch : (step + 1) * epoch.batch]
        mine = batch[rank::world]
        for part in np.array_split(mine, accum):
            yield part.tolist() or [Filler(int(batch[0]))]


PREFETCH = 4  # batches of each worker on their way


def check_room(data: SliceDataset, plan: list[Epoch], num_workers: int, parts: int) -> None:
    """Whether the loader's processes have room for the largest batches of the plan, each cut into so many
    parts. Raises UserError."""
    rates = sum(head.rate for head in data.heads.values())
    largest = max(math.ceil(e.batch / parts) * e.segment * rates * 4 for e in plan)
    check_loaders(num_workers, PREFETCH + 1, int(largest), len(data.heads), "--num_workers")


def loader(data, index_lists, num_workers: int, pin_memory: bool, stop=None):
    """The batches of the indices that `index_lists` yields, in order. Raises LoaderDied, and Stopped where
    `stop` is set while one is waited for."""
    kill_workers_at_exit()
    batches = torch.utils.data.DataLoader(
        data,
        sampler=index_lists,  # a list is one key of the dataset, a batch one of its items
        batch_size=None,
        collate_fn=Sender() if num_workers else as_it_is,
        num_workers=num_workers,
        worker_init_fn=begin_loader_worker,
        timeout=LOOK_S if num_workers else 0,
        pin_memory=pin_memory,
        prefetch_factor=PREFETCH if num_workers else None,
    )
    mapped = collections.deque(maxlen=(PREFETCH + 1) * num_workers)  # spares mapping the same memory again
    for batch in polled(batches, stop):
        mapped.append(batch)
        yield received(batch, pin_memory) if num_workers else batch


def as_it_is(batch: dict) -> dict:
    """The dataset gives whole batches: nothing to collate."""
    return batch


class Sender:
    """In a worker: puts a batch's audio into shared memory that is used again and again (new memory costs
    several times the copy), and the small tensors into the message itself, as numpy arrays.

    A batch is asked for when the last but PREFETCH has been handed on, and `received` copies each before it
    asks for the next: with PREFETCH + 1 slots none is written while somebody may still read it.
    """

    def __init__(self):
        self.slots, self.turn = [{} for _ in range(PREFETCH + 1)], 0

    def __call__(self, batch: dict) -> dict:
        slot, self.turn = self.slots[self.turn], (self.turn + 1) % len(self.slots)

        def send(key, v):
            if not torch.is_tensor(v):
                return v
            return self.shared(slot, key, v) if key.startswith("audio_") else v.numpy()

        return changed(batch, send)

    def shared(self, slot: dict, key: str, audio):
        n = audio.numel()
        if key not in slot or slot[key].numel() < n:
            slot[key] = torch.empty(n).share_memory_()
        return slot[key][:n].view(audio.shape).copy_(audio)


def received(batch: dict, pinned: bool) -> dict:
    """A batch of Sender's in tensors of its own. pinned: its audio has been copied, to pinned memory."""

    def own(key, v):
        if isinstance(v, np.ndarray):
            return torch.from_numpy(v).pin_memory() if pinned else torch.from_numpy(v)
        return v.clone() if key.startswith("audio_") and not pinned else v

    return changed(batch, own)


def changed(batch: dict, change) -> dict:
    """The batch with change(key, value) in the place of every value, of each scale of the codes."""
    each = lambda k, v: [change(k, scale) for scale in v] if k == "codes" else change(k, v)
    return {k: each(k, v) for k, v in batch.items()}


def to_device(batch: dict, device) -> dict:
    """The batch with its tensors on the device; 24 kHz audio is made there of the 48 kHz audio where
    CachedCodesDataset leaves it to us, and the latter loses its margin."""
    batch = changed(batch, lambda k, v: v.to(device, non_blocking=True) if torch.is_tensor(v) else v)
    if "halve" in batch:
        wide, low, valid = batch[f"audio_{HALVED}"], batch.get("audio_24k"), batch["valid_24k"]
        made = masked(resample_to_24k(wide), valid)
        batch["audio_24k"] = made if low is None else made.where(batch["halve"][:, None, None], low)
        batch[f"audio_{HALVED}"] = masked(wide[..., HALVING_REACH:-HALVING_REACH], 2 * valid)
        del batch["halve"]
    return batch


def resample_to_24k(wide):
    """48 kHz audio with HALVING_REACH samples more on each side, [B, 1, 2N + 2R], at 24 kHz [B, 1, N]: the
    samples of snac48.audio.resample within 1e-6. By FFT, which is fp32 whatever the setting of TF32; what is
    folded back from 12 kHz on the filter has taken away."""
    n = wide.shape[-1]
    size = min(m << math.ceil(math.log2(n / m)) for m in (1, 3, 5))  # 2^k, 3 * 2^k, 5 * 2^k: fast ones
    spectrum = torch.fft.rfft(wide, size)[..., : size // 4 + 1] * halving_response(size, wide.device)
    return torch.fft.irfft(spectrum, size // 2)[..., HALVING_REACH // 2 : (n - HALVING_REACH) // 2]


@functools.lru_cache(maxsize=8)
def halving_response(size: int, device: torch.device):
    """Frequency response of the filter in resample_to_24k for `size` samples: float32 [size // 4 + 1]."""
    taps = np.zeros(size)
    taps[: 2 * HALVING_REACH + 1] = halving_filter() / 2  # half as many samples come back
    response = np.fft.rfft(np.roll(taps, -HALVING_REACH)).real[: size // 4 + 1]
    return torch.from_numpy(response.astype(np.float32)).to(device)


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
    for i, (name, audio, rate, first) in batch["sources"].items():
        restored, info = sidon.upsample(audio, rate)
        target = batch["audio_48k"][i, 0]
        part = torch.from_numpy(restored[first : first + target.shape[-1]]).to(target.device)
        target[: len(part)] = part
        target[2 * int(batch["valid_24k"][i]) :] = 0
        if info["envelope_corr"] < min_envelope_corr:
            batch["valid_24k"][i] = 0
            unfaithful.append((name, info["envelope_corr"]))
    return unfaithful
