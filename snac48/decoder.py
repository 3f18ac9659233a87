"""The dual-head decoder: SNAC codes in, 24 and 48 kHz audio out; as a module to train, and ready to decode.

    tts = load_dual_head("exported", device="cuda:0")  # or a checkpoint, or hub-id@COMMIT
    audio_24k, audio_48k = tts.decode(codes)                    # codes: [K] of [B, T_k]
    for audio_24k, audio_48k in tts.stream(chunks_of_codes):    # as a language model produces them
        ...
    stream = tts.open_stream(batch=32)                          # the same, many at once: streaming.py

This file, codec.py and streaming.py open an exported decoder wherever torch, numpy, safetensors and snac are
installed: copy the three into a server. Long inputs are decoded piece by piece; noise is a function of
position, so the samples are those of one pass. One DualHead may be used from several threads.
"""

import json
import math
import threading
from dataclasses import dataclass
from pathlib import Path

import torch
from snac import SNAC
from snac.layers import DecoderBlock, NoiseBlock, ResidualUnit, Snake1d, WNConv1d
from torch import nn

if __package__:
    from . import codec, streaming
else:  # copied beside a server
    import codec
    import streaming

UserError = codec.UserError

# ---- heads: what comes out of the shared trunk ----

TRUNK_RATE = 24000  # Hz of the trunk's last features: one for each sample of the pretrained head


@dataclass(frozen=True)
class Head:
    rate: int  # Hz of its audio, a multiple of TRUNK_RATE

    @property
    def factor(self) -> int:
        """Samples for each sample of the trunk; 1: the pretrained head."""
        return self.rate // TRUNK_RATE


HEADS = {"24k": Head(24000), "48k": Head(48000)}  # the order of every tuple of audio


# ---- noise ----


def counter_noise(key, spans: list[tuple], device) -> list:
    """Standard normal noise as a function of (key, layer, position): float32 [B, 1, length] on `device` for
    each of spans, (layer, first position or a list of B, length).

    key: int64 [B]. Position-keyed, so a chunk of an utterance gets the noise of the whole, and a sample the
    same noise on any number of GPUs and after a resume. 32-bit integer mixing, then Box-Muller. The layers
    share one tensor: a few dozen kernels on a GPU instead of some eighty a layer.
    """
    layers = torch.tensor([as_int32(layer * 0x9E3779B9) for layer, *_ in spans], dtype=torch.int32)
    low, high = key.to(torch.int32)[:, None], (key >> 32 & 0x7FFFFFFF).to(torch.int32)[:, None]
    stream = mix_(mix_(low ^ layers.to(key.device, non_blocking=True)) ^ high)
    stream = stream.to(device, non_blocking=True)  # [B, layers]
    position = torch.cat([positions(first, n, device) for _, first, n in spans], -1)  # [(B,) all positions]
    lengths = [n for *_, n in spans]
    each = lambda per_layer: [x.expand(-1, n) for x, n in zip(per_layer.split(1, 1), lengths)]
    a = mix_(position.to(torch.int32)) ^ torch.cat(each(stream), 1)  # [B, all positions]
    if max((max(first) if isinstance(first, list) else first) + n for _, first, n in spans) <= 1 << 32:
        second = torch.cat(each(mix_(stream ^ 0x5BF03635)), 1)
    else:
        second = mix_(torch.cat(each(stream), 1) ^ (position >> 32).to(torch.int32) ^ 0x5BF03635)
    b = mix_(second.bitwise_xor_(mix_(a)))
    a, b = (x.view(torch.uint32).to(torch.float32) for x in (a, b))
    radius = a.add_(0.5).mul_(2.0**-32).log_().mul_(-2).sqrt_()
    return radius.mul_(b.mul_(2 * math.pi * 2.0**-32).cos_())[:, None].split(lengths, 2)


def positions(first, n: int, device):
    """n positions from `first` on: int64 [n], of a list [B, n]."""
    if isinstance(first, list):
        return torch.tensor(first, device=device)[:, None] + torch.arange(n, device=device)
    return torch.arange(first, first + n, device=device)


def mix_(x):
    """Wellons' "lowbias32" of int32 x, in place. Products wrap; >> copies the sign, so it is masked off."""
    for shift, factor in ((16, 0x7FEB352D), (15, 0x846CA68B)):
        x.bitwise_xor_((x >> shift).bitwise_and_((1 << 32 - shift) - 1)).mul_(as_int32(factor))
    return x.bitwise_xor_((x >> 16).bitwise_and_(0xFFFF))


def as_int32(n: int) -> int:
    """The signed number with the same 32 low bits."""
    return (n + (1 << 31)) % (1 << 32) - (1 << 31)


class PositionedNoise(NoiseBlock):
    """SNAC's NoiseBlock: fresh noise like it, but `noise` [B, 1, T] where the model has set it."""

    noise, layer, rate, head = None, 0, 1, ""  # rate: samples a latent frame; head: "" in the trunk

    def forward(self, x):
        if self.noise is None:
            return super().forward(x)
        return codec.add_noise(x, self.noise.to(x.dtype), self.linear)


# ---- the model ----


class DualHeadDecoder(nn.Module):
    """SNAC codes -> (audio_24k [B, 1, N], audio_48k [B, 1, 2N]); one trunk, a head for each rate.

    quantizer, trunk: `snac.decoder.model` up to the last DecoderBlock; head_24k: the pretrained Snake1d,
    Conv, Tanh; head_48k: DecoderBlock of stride 2, Snake1d, Conv, Tanh, with PyTorch's own initial values
    (better ones: starts.py). Shares its modules with `pretrained_snac`: the 24 kHz output is
    `snac.decode(codes)`.

    heads: names of HEADS; taps: {head: taps of its last conv} where they are not the pretrained one's.
    with_encoder: the codec's encoder is a part of the model, as phase 10 needs it. Raises UserError for a
    model that doesn't run at 24 kHz.
    """

    def __init__(self, pretrained_snac, heads=tuple(HEADS), taps=None, with_encoder=False):
        super().__init__()
        if pretrained_snac.sampling_rate != TRUNK_RATE:
            raise UserError(
                f"this model runs at {pretrained_snac.sampling_rate} Hz: the heads assume "
                f"{TRUNK_RATE} Hz, so only a 24 kHz SNAC can be the trunk"
            )
        layers = list(pretrained_snac.decoder.model)
        self.heads = tuple(heads)
        self.encoder = pretrained_snac.encoder.requires_grad_(False) if with_encoder else None
        self.quantizer = pretrained_snac.quantizer.requires_grad_(False)
        self.trunk = nn.Sequential(*layers[:-3]).requires_grad_(True)
        for name in self.heads:
            old, n = HEADS[name].factor == 1, (taps or {}).get(name)
            head = nn.Sequential(*layers[-3:]) if old else new_head(layers, HEADS[name], n)
            self.add_module(f"head_{name}", head.requires_grad_(True))
        self.noises, self.noise_key = [], None
        trunk_rate = self._find_noises(self.trunk, 1, "")
        # samples a latent frame
        self.head_rates = {n: self._find_noises(self.head(n), trunk_rate, n) for n in self.heads}
        self.trunk_frozen = False
        codec.replace_layers(self)

    def head(self, name: str) -> nn.Module:
        return getattr(self, f"head_{name}")

    def _find_noises(self, layers, rate: int, head: str) -> int:
        """Tell every noise layer its number and rate; returns the samples a latent frame after `layers`."""
        for block in [m for m in layers if isinstance(m, DecoderBlock)]:
            rate *= next(m for m in block.modules() if isinstance(m, nn.ConvTranspose1d)).stride[0]
            for m in block.modules():
                if isinstance(m, NoiseBlock):
                    m.__class__ = PositionedNoise  # the same parameters and state-dict keys
                    m.layer, m.rate, m.head = len(self.noises), rate, head
                    self.noises.append(m)
        return rate

    positioned_noise = staticmethod(counter_noise)

    def set_noise(self, key) -> None:
        """Position-keyed noise for the next calls (key: int64 [B], cheapest on the CPU), or None: fresh noise
        like stock SNAC."""
        self.noise_key = key

    def noise(self, key, frames: int, heads, device) -> dict:
        """{noise layer of trunk and `heads`: its noise [B, 1, n]} of `frames` latent frames."""
        layers = [m for m in self.noises if m.head in ("", *heads)]
        spans = [(m.layer, 0, frames * m.rate) for m in layers]
        return dict(zip(layers, counter_noise(key, spans, device) if spans else []))

    def codes_to_z(self, codes):
        """codes [K] of [B, T_k] -> z [B, D, T]. Code -1 lies past the end: z is 0 there, as padding is."""
        with torch.autocast(codes[0].device.type, enabled=False):  # entries as they are, whatever follows
            z = self.quantizer.from_codes([c.clamp(min=0) for c in codes])
        real = (codes[0] >= 0).repeat_interleave(self.quantizer.quantizers[0].stride, dim=1)  # [B, T]
        return z * real[:, None].to(z.dtype)

    def forward(self, codes_or_z, heads=None):
        """List of codes or z [B, D, T] -> audio [B, 1, factor * N] of each of HEADS, None where a head is
        absent or not among `heads` (default: all)."""
        wanted = self.heads if heads is None else [name for name in self.heads if name in heads]
        with torch.set_grad_enabled(torch.is_grad_enabled() and not self.trunk_frozen):
            z = codes_or_z if isinstance(codes_or_z, torch.Tensor) else self.codes_to_z(codes_or_z)
            if self.noise_key is not None:
                for m, noise in self.noise(self.noise_key, z.shape[-1], wanted, z.device).items():
                    m.noise = noise
            h = self.trunk(z)  # [B, C, hop * T]
        audio = tuple(codec.run(self.head(name), h) if name in wanted else None for name in HEADS)
        for m in self.noises:
            m.noise = None
        return audio


def new_head(layers: list, head: Head, taps: int | None = None):
    """A head at a multiple of the rate of the decoder `layers` of SNAC, with PyTorch's initial values."""
    channels = layers[-3].alpha.shape[1]
    noisy = any(isinstance(m, NoiseBlock) for m in layers[-4].modules())
    unit = next(m for m in layers[-4].modules() if isinstance(m, ResidualUnit))
    taps = taps or layers[-2].kernel_size[0]
    groups = channels if unit.block[1].groups > 1 else 1
    return nn.Sequential(
        DecoderBlock(channels, channels, head.factor, noisy, groups=groups),
        Snake1d(channels),
        WNConv1d(channels, 1, kernel_size=taps, padding=taps // 2),
        nn.Tanh(),
    )


def from_state(state: dict, config: dict) -> DualHeadDecoder:
    """The model of a checkpoint's weights, not loaded yet: its heads, their taps and whether it holds an
    encoder show in the names and shapes."""
    parts = {key.partition(".")[0] for key in state}
    heads = [name for name in HEADS if f"head_{name}" in parts]
    return DualHeadDecoder(SNAC(**config), heads, taps_of(state), with_encoder="encoder" in parts)


def taps_of(state: dict) -> dict[str, int]:
    """Taps of the last conv of each new head in a checkpoint's weights."""
    last = {name: state.get(f"head_{name}.2.parametrizations.weight.original1") for name in HEADS}
    return {name: weight.shape[-1] for name, weight in last.items() if weight is not None}


# ---- ready to decode ----


class DualHead:
    """A trained decoder with its geometry. `heads`: names of those that are there, `rates`: theirs in Hz.
    `encode` also needs the codec's encoder: loaded when asked, unless the checkpoint has its own, as those of
    phase 10 do."""

    def __init__(self, model, geometry: codec.Geometry, config: dict, device, encoder_from: str):
        self.model = codec.fold_weight_norm(model.to(device).eval().requires_grad_(False))
        self.geometry, self.config, self.device, self.encoder_from = geometry, config, device, encoder_from
        self.heads = model.heads
        self.rates = tuple(HEADS[name].rate for name in model.heads)
        self.snac = None
        if model.encoder is not None:
            self.snac = SNAC(**config).to(device).eval().requires_grad_(False)
            self.snac.encoder, self.snac.quantizer = model.encoder, model.quantizer
        stride, self.window = geometry.vq_strides[0], config["attn_window_size"] or 1  # latent frames
        self.align = math.lcm(stride, self.window) // stride  # coarse codes: pieces are multiples
        self.plans, self.lock = {}, threading.Lock()

    def encode(self, audio_24k):
        """audio [B, 1, N], tensor or numpy array -> codes [K] of [B, T_k], as `SNAC.encode`; long clips in
        chunks. Raises UserError."""
        audio_24k = codec.check_audio(audio_24k)
        with self.lock:
            if self.snac is None:
                self.snac = codec.load_encoder(self.encoder_from, self.device)
                if differs := self.geometry.difference(codec.geometry_of(self.snac, self.encoder_from)):
                    self.snac = None
                    raise UserError(
                        f"encoder {self.encoder_from} is not the one this decoder was trained with "
                        f"({differs}); give the right one as --pretrained_model"
                    )
                codec.fold_weight_norm(self.snac)
        with torch.inference_mode():
            return codec.encode(self.snac, audio_24k.to(self.device))

    def check(self, codes, batch=None, empty=False) -> list:
        """`codes` as int64 tensors on the device of the model; raises UserError (codec.check_codes)."""
        codes = codec.check_codes(codes, self.geometry, self.align, batch, empty)
        return [c.to(self.device, torch.long, non_blocking=True) for c in codes]

    def check_heads(self, heads) -> tuple[str, ...]:
        wanted = self.heads if heads is None else heads
        if isinstance(wanted, str) or not wanted or not set(wanted) <= set(self.heads):
            raise codec.InputError(
                f"heads {wanted!r}: this decoder has {list(self.heads)}; give a list of them"
            )
        return tuple(name for name in self.heads if name in wanted)

    def by_head(self, found) -> tuple:
        """Pairs (head, audio) as a tuple over HEADS, None where there is none."""
        found = dict(found)
        return tuple(found.get(name) for name in HEADS)

    @torch.inference_mode()
    def decode(self, codes, heads=None, chunk_seconds=20.0, noise_seed=0):
        """codes [K] of [B, T_k] -> (audio_24k [B, 1, N] | None, audio_48k [B, 1, 2N] | None). heads: names of
        those to decode (default: all that are there). Beyond chunk_seconds it is decoded piece by piece, with
        the same samples. Raises UserError."""
        codes, heads = self.check(codes), self.check_heads(heads)
        if codes[0].shape[1] > self._coarse(chunk_seconds):
            parts = zip(*self.stream([codes], chunk_seconds, noise_seed, heads))
            return tuple(torch.cat(p, -1) if p[0] is not None else None for p in parts)
        seeds = codec.check_seeds(noise_seed, len(codes[0]))
        with self.lock:  # the noise of one call waits in the layers
            self.model.set_noise(torch.tensor(seeds))
            return self.model(codes, heads)

    def stream(self, code_chunks, chunk_seconds=0.5, noise_seed=0, heads=None):
        """Yield (audio_24k, audio_48k) while codes arrive: code_chunks gives [K] of [B, T_k] lists. They are
        decoded chunk_seconds at a time (0: as they come). Joined, the pieces are the output of one pass; the
        last one holds what lay behind the others. Raises UserError."""
        chunk, held, stream = self._coarse(chunk_seconds), None, None
        per_coarse = self.geometry.per_coarse
        for part in code_chunks:
            part = self.check(part, empty=True)
            if stream is None:
                stream = self.open_stream(len(part[0]), noise_seed, heads)
                held = [c[:, :0] for c in part]
            if len(part[0]) != stream.batch:
                raise codec.InputError(f"codes of {len(part[0])} streams follow those of {stream.batch}")
            held = [torch.cat(pair, 1) for pair in zip(held, part)]
            while held[0].shape[1] >= chunk:
                yield from settled(stream.push([c[:, : chunk * f] for c, f in zip(held, per_coarse)]))
                held = [c[:, chunk * f :] for c, f in zip(held, per_coarse)]
        if stream is None or not (any(stream.at) or held[0].numel()):
            raise UserError("there are no codes to decode")
        yield from settled(stream.push(held))
        yield stream.finish()

    def open_stream(self, batch=1, noise_seed=0, heads=None) -> streaming.Stream:
        """A stream, or `batch` of them, to push codes into as they come: streaming.py."""
        heads = self.check_heads(heads)
        seeds = codec.check_seeds(noise_seed, batch)
        return streaming.Stream(self, self.plan(heads), seeds)

    def plan(self, heads=None) -> streaming.Plan:
        """What a stream of these heads carries."""
        heads = self.heads if heads is None else heads
        with self.lock:
            if heads not in self.plans:
                self.plans[heads] = streaming.plan(self.model, heads, self.window, self.device)
            return self.plans[heads]

    def _coarse(self, seconds) -> int:
        """Coarse codes in about so many seconds, at least what a piece needs."""
        if not isinstance(seconds, (int, float)) or not 0 <= seconds < math.inf:
            raise codec.InputError(f"chunk_seconds {seconds!r} is not a number of seconds")
        return max(1, self.geometry.coarse_len(seconds) // self.align) * self.align


def settled(audio):
    """The piece, if anything is in it."""
    return [audio] if any(x is not None and x.shape[-1] for x in audio) else []


def load_dual_head(path, device="cpu", pretrained_model: str = "") -> DualHead:
    """Open a checkpoint of train_dual_head.py, a folder of infer.py --export, or that on the hub (id@COMMIT).
    device: cpu, cuda:0 or a torch.device. pretrained_model: where the encoder is, when not where the training
    found it. Raises UserError."""
    device = codec.pick_device(device) if isinstance(device, str) else device
    path = str(path)
    state, config, geometry = (read_checkpoint if path.endswith(".pt") else read_export)(path)
    geometry = codec.Geometry.from_json(json.dumps(geometry, default=str), path)
    try:
        geometry.check_config(config, path)
        with torch.device("meta"):  # what doesn't fit is refused before it takes memory
            codec.check_weights(from_state(state, config), state, path)
        model = from_state(state, config)
    except (AttributeError, IndexError, KeyError, TypeError, ValueError, RuntimeError) as e:
        reason = str(e).partition("\n")[0]
        raise UserError(f"{path} describes no model ({type(e).__name__}: {reason})") from None
    codec.check_finite(state, path)
    model.load_state_dict(state)
    return DualHead(model, geometry, config, device, pretrained_model or geometry.pretrained_model)


def read_checkpoint(path: str) -> tuple[dict, dict, dict]:
    """(weights, SNAC's arguments, geometry) of a checkpoint of train_dual_head.py."""
    if not __package__:
        raise UserError(f"{path}: this copy opens exported folders; make one with infer.py --export DIR")
    from .checkpoint import load_checkpoint, require

    saved = require(load_checkpoint(path), path)
    return saved["model"], saved["model_config"], saved["geometry"]


def read_export(path: str) -> tuple[dict, dict, dict]:
    """The same of an exported folder, here or on the hub."""
    from safetensors.torch import load_file

    folder = Path(path)
    if not folder.is_dir():
        repo, _, revision = path.partition("@")
        if repo.count("/") != 1 or not revision:
            raise UserError(
                f"{path} is neither a .pt file nor a folder; a model on the hub is named id@COMMIT"
            )
        files = ["config.json", "model.safetensors", codec.ENCODER]
        folder = codec.fetch(repo, revision, files, "the folder instead")
    if not (folder / "model.safetensors").is_file():
        raise UserError(
            f"{path} is no dual-head decoder: it lacks model.safetensors (a SNAC codec is "
            "given by --pretrained_model; train_dual_head.py trains its heads)"
        )
    try:
        described = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        state = load_file(folder / "model.safetensors")
        config, geometry = described["model_config"], described["geometry"]
    except Exception as e:  # safetensors has its own exception classes
        raise UserError(f"{path} cannot be read: {type(e).__name__}: {str(e)[:200]}") from None
    wanted, found = described.get("weights_sha256"), codec.file_hash(folder / "model.safetensors")
    if wanted is not None and wanted != found:
        raise UserError(
            f"{path}: model.safetensors is not the file that config.json describes (SHA-256 {found[:12]}, "
            f"not {str(wanted)[:12]}): copy the whole folder again"
        )
    if (folder / codec.ENCODER).is_file() and isinstance(geometry, dict):
        geometry = geometry | {"pretrained_model": str(folder)}
    return state, config, geometry
