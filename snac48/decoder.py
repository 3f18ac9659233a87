"""The dual-head decoder: SNAC codes in, 24 and 48 kHz audio out. This file and codec.py open a trained one.

model = DualHeadDecoder(SNAC.from_pretrained("hubertsiuzdak/snac_24khz"))
audio_24k, audio_48k = model(codes)        # [B, 1, N], [B, 1, 2N]
"""

from __future__ import annotations

import json
import math
from pathlib import Path

import snac.layers
import torch
from snac import SNAC
from snac.layers import DecoderBlock, NoiseBlock, ResidualUnit, Snake1d, WNConv1d
from torch import nn

from .checkpoint import check_ours, load_checkpoint
from .cli import UserError, first_line, pick_device
from .codec import (
    Geometry,
    Snake,
    encode,
    fold_weight_norm,
    geometry_of,
    load_snac,
    load_weights,
    receptive_reach,
)
from .files import read_json

snac.layers.snake = Snake.apply


def counter_noise(key, layer: int, start: int, length: int):
    """Standard normal noise as a function of (key, layer, position): float32 [B, length].

    key: int64 [B]. Position-keyed, so a chunk of an utterance gets the noise of the whole (infer.py), and
    a sample the same noise on any number of GPUs and after a resume. 32-bit integer mixing (constants of
    Wellons' "lowbias32") in int64 arithmetic, then Box-Muller.
    """

    def mix(x):
        x = (x ^ (x >> 16)) * 0x7FEB352D & 0xFFFFFFFF
        x = (x ^ (x >> 15)) * 0x846CA68B & 0xFFFFFFFF
        return x ^ (x >> 16)

    position = torch.arange(start, start + length, device=key.device)
    low, high = key & 0xFFFFFFFF, (key >> 32) & 0x7FFFFFFF
    stream = mix(mix(low ^ (layer * 0x9E3779B9 & 0xFFFFFFFF)) ^ high)[:, None]  # [B, 1]
    a = mix(mix(position & 0xFFFFFFFF) ^ stream)
    b = mix(a ^ mix(stream ^ (position >> 32) ^ 0x5BF03635))
    u1, u2 = (a.to(torch.float32) + 0.5) * 2.0**-32, b.to(torch.float32) * 2.0**-32
    return torch.sqrt(-2 * torch.log(u1)) * torch.cos(2 * math.pi * u2)


class PositionedNoise(NoiseBlock):
    """SNAC's NoiseBlock: fresh noise like it, unless `noise_key` is set: then position-keyed noise."""

    noise_key, noise_start, noise_layer = None, 0, 0

    def forward(self, x):
        if self.noise_key is None:
            return super().forward(x)
        n = counter_noise(self.noise_key, self.noise_layer, self.noise_start, x.shape[-1])
        return x + n[:, None].to(x.dtype) * self.linear(x)


HEADS = ("24k", "48k", "both")


class DualHeadDecoder(nn.Module):
    """SNAC codes -> (audio_24k [B, 1, N], audio_48k [B, 1, 2N]); one trunk, two heads.

    quantizer, trunk: `snac.decoder.model` up to the last DecoderBlock, head_24k: the pretrained Snake1d +
    Conv + Tanh, head_48k: DecoderBlock of stride 2, Snake1d, Conv, Tanh. Shares its modules with
    `pretrained_snac`. At initialisation the 24 kHz output is `snac.decode(codes)`.

    init: interpolate | average | first | random; kernel: taps of the last 48 kHz conv, given when the
    weights come from a checkpoint anyway. heads: both, or only one of them (phases 10 and 11).
    with_encoder: the codec's encoder is a part of the model, as phase 10 needs it. Raises UserError for a
    model that doesn't run at 24 kHz.
    """

    def __init__(self, pretrained_snac, init="interpolate", kernel=None, heads="both", with_encoder=False):
        super().__init__()
        if pretrained_snac.sampling_rate != 24000:
            raise UserError(f"this model runs at {pretrained_snac.sampling_rate} Hz: the heads are 24 and "
                            "48 kHz, so only a 24 kHz SNAC can be the trunk")  # fmt: skip
        layers = list(pretrained_snac.decoder.model)
        self.encoder = pretrained_snac.encoder.requires_grad_(False) if with_encoder else None
        self.quantizer = pretrained_snac.quantizer.requires_grad_(False)
        self.trunk = nn.Sequential(*layers[:-3]).requires_grad_(True)
        self.head_24k = nn.Sequential(*layers[-3:]).requires_grad_(True)
        self.head_48k = None
        if heads != "24k":
            self.head_48k = new_head_48k(layers, init, kernel)
            if kernel is None:
                with torch.no_grad():
                    initialise_48k(self, init)
        if heads == "48k":
            self.head_24k = None
        self.noises = []  # (noise layer, its samples a latent frame)
        rate = 1
        for block in [m for m in (*self.trunk, *(self.head_48k or ())) if isinstance(m, DecoderBlock)]:
            rate *= next(m for m in block.modules() if isinstance(m, nn.ConvTranspose1d)).stride[0]
            for m in block.modules():
                if isinstance(m, NoiseBlock):
                    m.__class__ = PositionedNoise  # the same parameters and state-dict keys
                    m.noise_layer = len(self.noises)
                    self.noises.append((m, rate))
        self.trunk_frozen = False

    @property
    def heads(self) -> str:
        return "24k" if self.head_48k is None else "48k" if self.head_24k is None else "both"

    def set_noise(self, key, start_frame: int = 0) -> None:
        """Position-keyed noise for the next calls (key: int64 [B]), or None: fresh noise like stock SNAC."""
        for block, rate in self.noises:
            block.noise_key, block.noise_start = key, start_frame * rate

    def codes_to_z(self, codes):
        """codes [K] of [B, T_k] -> z [B, D, T]. A code of -1 lies past the end: z is 0 there, like conv
        padding."""
        z = self.quantizer.from_codes([c.clamp(min=0) for c in codes])
        real = (codes[0] >= 0).repeat_interleave(self.quantizer.quantizers[0].stride, dim=1)  # [B, T]
        return z * real[:, None].to(z.dtype)

    def forward(self, codes_or_z, output_24k=True, output_48k=True):
        """List of codes or z [B, D, T] -> (audio_24k [B, 1, N] | None, audio_48k [B, 1, 2N] | None)."""
        with torch.set_grad_enabled(torch.is_grad_enabled() and not self.trunk_frozen):
            z = codes_or_z if isinstance(codes_or_z, torch.Tensor) else self.codes_to_z(codes_or_z)
            h = self.trunk(z)  # [B, C, hop * T]
        audio_24k = self.head_24k(h) if output_24k and self.head_24k is not None else None
        audio_48k = self.head_48k(h) if output_48k and self.head_48k is not None else None
        return audio_24k, audio_48k


def new_head_48k(layers: list, init: str, kernel: int | None):
    """The 48 kHz head of the decoder `layers` (of SNAC), with PyTorch's own initial values."""
    channels = layers[-3].alpha.shape[1]
    noisy = any(isinstance(m, NoiseBlock) for m in layers[-4].modules())
    unit = next(m for m in layers[-4].modules() if isinstance(m, ResidualUnit))
    old = layers[-2].kernel_size[0]
    taps = kernel or (2 * old + len(SMOOTH_TAPS) - 2 if init == "interpolate" else old)
    return nn.Sequential(
        DecoderBlock(channels, channels, 2, noisy, groups=channels if unit.block[1].groups > 1 else 1),
        Snake1d(channels),
        WNConv1d(channels, 1, kernel_size=taps, padding=taps // 2),
        nn.Tanh(),
    )


def from_state(state: dict, config: dict) -> DualHeadDecoder:
    """The model of a checkpoint's weights, not loaded yet: its heads and whether it holds an encoder show in
    the names."""
    has = lambda part: any(k.startswith(part + ".") for k in state)
    heads = "both" if has("head_24k") and has("head_48k") else "24k" if has("head_24k") else "48k"
    taps = state["head_48k.2.parametrizations.weight.original1"].shape[-1] if has("head_48k") else None
    return DualHeadDecoder(SNAC(**config), kernel=taps, heads=heads, with_encoder=has("encoder"))


# 2x interpolation of every channel (linear: even samples are the input), and the half-band filter that the
# head's last conv adds against the images it leaves above 12 kHz. Chosen by loss at step 0: BENCHMARKS.md.
UP_TAPS = (0.5, 1.0, 0.5, 0.0)
SMOOTH_TAPS = tuple(t / 32 for t in (-1, 0, 9, 16, 9, 0, -1))


def initialise_48k(model: DualHeadDecoder, init: str) -> None:
    """Set head_48k in place. Weight-normed layers are set through their parametrization: copying into
    `.weight` of one changes nothing. `random` leaves the layers as PyTorch made them."""
    block, snake, conv, _ = model.head_48k
    first_snake, up, *rest = block.block
    channels = snake.alpha.shape[1]
    if init in ("first", "average"):
        source = model.trunk[-1].block  # pretrained 2C -> C block of stride 2
        if source[1].stride[0] != 2:
            raise UserError(f"--init {init} copies the last decoder block, which must have stride 2 but has "
                            f"{source[1].stride[0]} in this model; use --init interpolate")  # fmt: skip
        halve = (lambda w: w[:channels]) if init == "first" else lambda w: (w[0::2] + w[1::2]) / 2
        first_snake.alpha.copy_(halve(source[0].alpha[0]).reshape(1, -1, 1))
        up.weight = halve(source[1].weight)  # [2C, C, 4] -> [C, C, 4]
        up.bias.copy_(source[1].bias)
        for mine, theirs in zip(rest, source[2:]):
            mine.load_state_dict(theirs.state_dict())
        conv.weight = model.head_24k[1].weight.clone()
    elif init == "interpolate":
        # Linear interpolation of every channel, then the 24 kHz head with its taps 2 apart, smoothed: the
        # output is the 24 kHz one resampled, with faint images above 12 kHz to start from.
        first_snake.alpha.fill_(1e-4)  # snake(x) = x + sin²(αx)/α -> x
        taps = torch.zeros_like(up.weight)  # [C, C, 4]
        taps[range(channels), range(channels)] = torch.tensor(UP_TAPS, device=taps.device)
        up.weight = taps
        up.bias.zero_()
        for layer in rest:
            last = layer.linear if isinstance(layer, NoiseBlock) else layer.block[-1]
            last.parametrizations.weight.original0.zero_()  # gain 0; the direction stays random
            if last.bias is not None:
                last.bias.zero_()
        spread, n = torch.zeros_like(conv.weight), model.head_24k[1].kernel_size[0]
        for i, share in enumerate(SMOOTH_TAPS):
            spread[..., i : i + 2 * n - 1 : 2] += share * model.head_24k[1].weight
        conv.weight = spread
    if init != "random":
        snake.alpha.copy_(model.head_24k[0].alpha)
        conv.bias.copy_(model.head_24k[1].bias)


class DualHead:
    """A trained decoder with its geometry; `encode` also needs the codec's encoder (loaded when asked, unless
    the checkpoint has its own, as those of phase10 do). `rates`: the heads that are there, in Hz."""

    def __init__(self, model, geometry: Geometry, config: dict, device, encoder_from: str):
        self.model = fold_weight_norm(model.to(device).eval().requires_grad_(False))
        self.geometry, self.config, self.device, self.encoder_from = geometry, config, device, encoder_from
        self.rates = {"24k": (24000,), "48k": (48000,), "both": (24000, 48000)}[model.heads]
        self.snac = None
        if model.encoder is not None:
            self.snac = SNAC(**config).to(device).eval().requires_grad_(False)
            self.snac.encoder, self.snac.quantizer = model.encoder, model.quantizer
        stride = geometry.vq_strides[0]
        reach, _ = receptive_reach([*model.trunk, *(model.head_48k or model.head_24k)])  # latent frames
        self.align = math.lcm(stride, config["attn_window_size"] or 1) // stride  # coarse codes
        self.context = math.ceil(math.ceil(reach) / stride / self.align) * self.align

    def encode(self, audio_24k):
        """audio [B, 1, N] at the model's rate -> codes [K] of [B, T_k] (like `SNAC.encode`; long clips in
        chunks)."""
        if self.snac is None:
            self.snac = load_snac(self.encoder_from, self.device)
            differs = self.geometry.difference(geometry_of(self.snac, self.encoder_from))
            if differs:
                raise UserError(f"encoder {self.encoder_from} is not the one this decoder was trained with "
                                f"({differs}); give the right one as --pretrained_model")  # fmt: skip
            fold_weight_norm(self.snac)
        with torch.inference_mode():
            return encode(self.snac, audio_24k.to(self.device))

    def decode(self, codes, output_24k=True, output_48k=True, chunk_seconds=20.0, noise_seed=0):
        """codes [K] of [B, T_k] -> (audio_24k [B, 1, N] | None, audio_48k [B, 1, 2N] | None)."""
        parts = list(self.stream([codes], chunk_seconds, noise_seed, output_24k, output_48k))
        return tuple(torch.cat(p, -1) if p[0] is not None else None for p in zip(*parts))

    @torch.inference_mode()
    def stream(self, code_chunks, chunk_seconds=0.5, noise_seed=0, output_24k=True, output_48k=True):
        """Yield (audio_24k, audio_48k) pieces while codes arrive: code_chunks gives [K] of [B, T_k] lists.

        A piece is decoded once the codes that it can see on its right are there (`context` coarse codes:
        3 for snac_24khz, 0.26 s) or the input has ended. Joined, the pieces are the output of one pass.
        """
        g = self.geometry
        chunk = max(1, g.coarse_len(chunk_seconds) // self.align) * self.align
        held, first, done = (
            None,
            0,
            0,
        )  # codes kept; coarse position of the oldest; coarse codes already decoded
        pending = iter(code_chunks)
        ended = False
        while True:
            while not ended and (held is None or first + held[0].shape[1] < done + chunk + self.context):
                part = next(pending, None)
                ended = part is None
                if part is not None:
                    part = [c.to(self.device, torch.long) for c in part]
                    held = part if held is None else [torch.cat(p, 1) for p in zip(held, part)]
            if held is None:
                raise UserError("there are no codes to decode")
            total = first + held[0].shape[1]
            if done >= total:
                return
            lo, stop = max(0, done - self.context), min(done + chunk, total)
            hi = min(stop + self.context, total)
            window = [c[:, (lo - first) * g.frames_per_coarse(k) : (hi - first) * g.frames_per_coarse(k)]
                      for k, c in enumerate(held)]  # fmt: skip
            key = torch.full((window[0].shape[0],), noise_seed, dtype=torch.int64, device=self.device)
            self.model.set_noise(key, lo * g.vq_strides[0])
            out = self.model(window, output_24k, output_48k)
            a, b = (done - lo) * g.coarse_samples, (stop - lo) * g.coarse_samples
            yield tuple(x if x is None else x[..., a * f : b * f] for f, x in zip((1, 2), out))
            done = stop
            drop = max(0, done - self.context) - first
            held = [c[:, drop * g.frames_per_coarse(k) :] for k, c in enumerate(held)]
            first += drop


def load_dual_head(path, device="cpu", pretrained_model: str = "") -> DualHead:
    """Open a checkpoint of train_dual_head.py, a folder of --export, or the same on the hub (id@COMMIT).

    pretrained_model: where the encoder is, when not where the training found it. Raises UserError.
    """
    device = pick_device(device) if isinstance(device, str) else device
    path = str(path)
    if path.endswith(".pt"):
        saved = load_checkpoint(path)
        check_ours(saved, path)
        state, config, geometry = saved["model"], saved["model_config"], saved["geometry"]
    else:
        from safetensors.torch import load_file

        folder = Path(path) if Path(path).is_dir() else fetch(path)
        if not (folder / "model.safetensors").is_file():
            raise UserError(f"{path} is no dual-head decoder: it lacks model.safetensors (a SNAC codec is "
                            "given by --pretrained_model; train_dual_head.py trains its heads)")  # fmt: skip
        described = read_json(folder / "config.json")
        config, geometry = described["model_config"], described["geometry"]
        state = load_file(folder / "model.safetensors")
    geometry = Geometry.from_json(json.dumps(geometry, default=str), path)
    try:
        model = from_state(state, config)
    except (AttributeError, IndexError, KeyError, TypeError, ValueError, RuntimeError) as e:
        raise UserError(f"{path} describes no model ({type(e).__name__}: {first_line(e)})") from None
    load_weights(model, state, path)
    return DualHead(model, geometry, config, device, pretrained_model or geometry.pretrained_model)


def fetch(name: str) -> Path:
    """Folder of an exported model on the hub; the revision must be pinned: id@COMMIT."""
    repo, _, revision = name.partition("@")
    if repo.count("/") != 1 or not revision:
        raise UserError(f"{name} is neither a .pt file nor a folder; a model on the hub is named id@COMMIT")
    from huggingface_hub import snapshot_download

    try:
        return Path(
            snapshot_download(repo, revision=revision, allow_patterns=["config.json", "model.safetensors"])
        )
    except Exception as e:  # network and hub errors have many classes; all mean the same to the user
        raise UserError(f"{name} could not be fetched from the hub ({str(e).splitlines()[0]})") from e
