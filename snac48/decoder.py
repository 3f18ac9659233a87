"""The dual-head decoder and what judges it: model, initialisations, losses, log-spectral distance.

model = DualHeadDecoder(SNAC.from_pretrained("hubertsiuzdak/snac_24khz"))
audio_24k, audio_48k = model(codes)        # [B, 1, N], [B, 1, 2N]
"""

from __future__ import annotations

import functools
import math

import numpy as np
import snac.layers
import torch
import torch.nn.functional as F
from snac.layers import DecoderBlock, NoiseBlock, ResidualUnit, Snake1d, WNConv1d
from torch import nn

from .runlog import UserError

# ---- model ----


class Snake(torch.autograd.Function):
    """x + sin(alpha x)² / alpha (Ziyin et al. 2020): x [B, C, T], alpha [1, C, 1].

    In the place of snac.layers.snake, which is TorchScript: its executor changes kernels after the first
    calls, so that a resumed run differs from the unbroken one in the last bit; and torch.compile stops at it.
    """

    @staticmethod
    def forward(ctx, x, alpha):
        ctx.save_for_backward(x, alpha)
        return x + (alpha + 1e-9).reciprocal() * torch.sin(alpha * x).square()

    @staticmethod
    def backward(ctx, grad):
        x, alpha = ctx.saved_tensors
        inverse, double = (alpha + 1e-9).reciprocal(), 2 * alpha * x
        slope = torch.sin(double)
        of_x = grad * (1 + alpha * inverse * slope)
        half = (1 - torch.cos(double)) / 2  # sin²
        of_alpha = (grad * inverse * (x * slope - inverse * half)).sum((0, 2), keepdim=True)
        return of_x, of_alpha.to(alpha.dtype)


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
    from snac import SNAC

    has = lambda part: any(k.startswith(part + ".") for k in state)  # noqa: E731
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


def model_config(snac) -> dict:
    """Arguments of SNAC(**config): with them a checkpoint opens without the pretrained folder."""
    quantizer = snac.quantizer.quantizers[0]
    noise = any(isinstance(m, NoiseBlock) for m in snac.decoder.modules())
    first_unit = next(m for m in snac.encoder.modules() if isinstance(m, ResidualUnit))
    return {
        "sampling_rate": snac.sampling_rate,
        "encoder_dim": snac.encoder_dim,
        "encoder_rates": list(snac.encoder_rates),
        "latent_dim": snac.latent_dim,
        "decoder_dim": snac.decoder_dim,
        "decoder_rates": list(snac.decoder_rates),
        "attn_window_size": snac.attn_window_size,
        "codebook_size": snac.codebook_size,
        "codebook_dim": quantizer.codebook_dim if hasattr(quantizer, "codebook_dim") else snac.codebook_dim,
        "vq_strides": list(snac.vq_strides),
        "noise": noise,
        "depthwise": first_unit.block[1].groups > 1,
    }


# ---- losses ----

_WINDOWS: dict = {}


def spectrum(x, n_fft: int, hop: int):
    """STFT of [B, N] with a Hann window, complex [B, F, T]. Zero padding: reflect is not deterministic on
    CUDA."""
    key = (n_fft, x.device)
    if key not in _WINDOWS:
        _WINDOWS[key] = torch.hann_window(n_fft, device=x.device)
    return torch.stft(
        x, n_fft, hop, window=_WINDOWS[key], center=True, pad_mode="constant", return_complex=True
    )


def masked(x, valid):
    """[B, N] with everything from sample valid[b] on set to 0."""
    return x * (torch.arange(x.shape[-1], device=x.device) < valid[:, None]).to(x.dtype)


def l1_loss(pred, target, valid):
    """Mean |pred - target| over the valid samples: [B, N] x 2, valid [B] -> [B]."""
    return (pred - target).abs().sum(-1) / valid.clamp(min=1)


def frame_mean(x, valid, hop: int):
    """Mean over frequency and over the frames that touch valid samples: [B, F, T] -> [B]."""
    frames = (valid // hop + 1).clamp(max=x.shape[-1])
    inside = torch.arange(x.shape[-1], device=x.device) < frames[:, None]  # [B, T]
    return (x.mean(1) * inside).sum(-1) / frames


def stft_loss(pred, target, valid, n_ffts, mode="magnitude"):
    """Mean over n_ffts of |magnitude| + |log magnitude| L1, or of complex L1: [B, N] x 2 -> [B].

    Magnitudes because a SIDON target has the right spectrum but not the phase: waveform and complex L1
    against such a target are minimised by silence. 1e-3 is added before the logarithm (a full-scale
    sine has n_fft / 4): about the rounding noise of a 16-bit file; with less, near-silent bins of magnitude m
    rule the step by their gradient 1/m.
    """
    total = 0
    for n_fft in n_ffts:
        hop = n_fft // 4
        p, t = spectrum(pred, n_fft, hop), spectrum(target, n_fft, hop)
        if mode == "complex":
            d = (p.real - t.real).abs() + (p.imag - t.imag).abs()
        else:
            p, t = p.abs(), t.abs()
            d = (p - t).abs() + ((p + 1e-3).log() - (t + 1e-3).log()).abs()
        total = total + frame_mean(d, valid, hop)
    return total / len(n_ffts)


def mel_loss(pred, target, valid, rate: int):
    """Mean |difference| of log magnitudes in 80 mel bands (Hann 1024, hop 256): [B, N] x 2 -> [B]."""
    filters = mel_filters(rate, 1024).to(pred.device)
    p, t = ((filters @ spectrum(x, 1024, 256).abs() + 1e-3).log() for x in (pred, target))
    return frame_mean((p - t).abs(), valid, 256)


def halve_rate(x):
    """[B, 2N] at 48 kHz -> [B, N] at 24 kHz: zero-phase half-band FIR (127 taps, Kaiser 8: -80 dB from
    12.7 kHz)."""
    n = torch.arange(127, device=x.device, dtype=torch.float32) - 63
    taps = torch.special.sinc(n / 2) / 2 * torch.kaiser_window(127, False, 8.0, device=x.device)
    return F.conv1d(x[:, None], (taps / taps.sum())[None, None], stride=2, padding=63)[
        :, 0, : x.shape[-1] // 2
    ]


def head_losses(audio_24k, audio_48k, batch, args) -> dict:
    """Every loss of each item, fp32 [B], by the names of logs and flags: l1_24k, stft_24k, loss_24k, …_48k.

    Either output may be None. Rows whose target is not phase-true get their 48 kHz waveform L1 in the
    band below 12 kHz only, against the original 24 kHz audio.
    """
    out, valid, n_ffts = {}, batch["valid_24k"], [int(n) for n in args.n_ffts.split(",")]
    target_24k = batch["audio_24k"][:, 0]
    if audio_24k is not None:
        pred = masked(audio_24k[:, 0].float(), valid)
        out["l1_24k"] = l1_loss(pred, target_24k, valid)
        out["stft_24k"] = stft_loss(pred, target_24k, valid, n_ffts, args.stft)
        out["loss_24k"] = args.l1_weight * out["l1_24k"] + args.stft_weight * out["stft_24k"]
        if args.mel_weight:
            out["mel_24k"] = mel_loss(pred, target_24k, valid, 24000)
            out["loss_24k"] = out["loss_24k"] + args.mel_weight * out["mel_24k"]
    if audio_48k is not None:
        pred, target = masked(audio_48k[:, 0].float(), 2 * valid), batch["audio_48k"][:, 0]
        out["l1_48k"] = l1_loss(pred, target, 2 * valid)
        if not batch["phase_true"].all():
            low = l1_loss(halve_rate(pred), target_24k, valid)
            out["l1_48k"] = torch.where(batch["phase_true"], out["l1_48k"], low)
        out["stft_48k"] = stft_loss(pred, target, 2 * valid, n_ffts, args.stft)
        out["loss_48k"] = args.l1_weight * out["l1_48k"] + args.stft_weight * out["stft_48k"]
        if args.mel_weight:
            out["mel_48k"] = mel_loss(pred, target, 2 * valid, 48000)
            out["loss_48k"] = out["loss_48k"] + args.mel_weight * out["mel_48k"]
    counted = valid > 0
    return {k: torch.where(counted, v, torch.zeros_like(v)) for k, v in out.items()}


def lsd(pred, target, valid, rate: int, above_hz: float = 0.0):
    """Log-spectral distance as AP-BWE defines it (Lu et al. 2024): [B, N] x 2 -> [B].

    Hann 2048, hop 512; log10 of |S|² clamped at 1e-8; root of the mean over frequency, mean over frames.
    above_hz restricts the mean over frequency to the bins from there up.
    """
    first = math.ceil(above_hz * 2048 / rate)
    p, t = (spectrum(x, 2048, 512).abs().square().clamp(min=1e-8).log10()[:, first:] for x in (pred, target))
    return frame_mean((p - t).square().mean(1, keepdim=True).sqrt(), valid, 512)


@functools.cache
def mel_filters(rate: int, n_fft: int, bands: int = 80):
    """Triangular HTK-mel filters from 0 Hz to rate/2: float32 [bands, n_fft // 2 + 1]."""
    mel = lambda f: 2595 * np.log10(1 + f / 700)  # noqa: E731
    edges = 700 * (10 ** (np.linspace(0, mel(rate / 2), bands + 2) / 2595) - 1)
    f = np.linspace(0, rate / 2, n_fft // 2 + 1)
    up = (f - edges[:-2, None]) / (edges[1:-1] - edges[:-2])[:, None]
    down = (edges[2:, None] - f) / (edges[2:] - edges[1:-1])[:, None]
    return torch.from_numpy(np.clip(np.minimum(up, down), 0, None).astype(np.float32))
