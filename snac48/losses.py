"""What judges audio: waveform L1, multi-resolution STFT, log-mel, log-spectral distance; fp32, per item."""

import functools
import math
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F

from .decoder import HEADS

hann = functools.cache(lambda n_fft, device: torch.hann_window(n_fft, device=device))


def spectrum(x, n_fft: int, hop: int):
    """Hann STFT of [B, N], complex [B, F, T]. Zero padding: reflect is not deterministic on CUDA."""
    window = hann(n_fft, x.device)
    return torch.stft(x, n_fft, hop, window=window, center=True, pad_mode="constant", return_complex=True)


class Magnitude(torch.autograd.Function):
    """|spectrum(x)|: [B, N] -> [B, F, T]. Its gradient adds overlapping frames up slice by slice: that of
    torch.stft scatters them one by one, in no fixed order on a GPU."""

    @staticmethod
    def forward(ctx, x, n_fft, hop):
        s = spectrum(x, n_fft, hop)
        magnitude = s.abs()
        ctx.save_for_backward(s, magnitude)
        ctx.sizes = n_fft, hop, x.shape[-1]
        return magnitude

    @staticmethod
    def backward(ctx, grad):
        (s, magnitude), (n_fft, hop, n) = ctx.saved_tensors, ctx.sizes
        # of |s|: s / |s|, 0 at 0; of the real FFT: the inverse one, which counts inner bins twice
        of_s = s / magnitude.clamp(min=torch.finfo(grad.dtype).tiny) * grad
        of_s[:, 1:-1] /= 2
        frames = torch.fft.irfft(of_s, n_fft, dim=1, norm="forward") * hann(n_fft, s.device)[:, None]
        b, t = len(s), s.shape[-1]
        out = frames.new_zeros(b, -(-(n + n_fft) // hop), hop)
        for i, part in enumerate(frames.split(hop, 1)):  # a frame's i-th hop lies i hops after its first
            out[:, i : i + t, : part.shape[1]] += part.transpose(1, 2)
        return out.flatten(1)[:, n_fft // 2 : n_fft // 2 + n], None, None


def masked(x, valid):
    """x [B, ..., N] with everything from sample valid[b] on set to 0."""
    valid = valid.view(-1, *[1] * (x.dim() - 1))
    return x * (torch.arange(x.shape[-1], device=x.device) < valid).to(x.dtype)


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
        if mode == "complex":
            p, t = spectrum(pred, n_fft, hop), spectrum(target, n_fft, hop)
            d = (p.real - t.real).abs() + (p.imag - t.imag).abs()
        else:
            p, t = (Magnitude.apply(x, n_fft, hop) for x in (pred, target))
            d = (p - t).abs() + ((p + 1e-3).log() - (t + 1e-3).log()).abs()
        total = total + frame_mean(d, valid, hop)
    return total / len(n_ffts)


def mel_loss(pred, target, valid, rate: int):
    """Mean |difference| of log magnitudes in 80 mel bands (Hann 1024, hop 256): [B, N] x 2 -> [B]."""
    filters = mel_filters(rate, 1024).to(pred.device)
    p, t = ((filters @ Magnitude.apply(x, 1024, 256) + 1e-3).log() for x in (pred, target))
    return frame_mean((p - t).abs(), valid, 256)


# Bands and Hann windows of the seven scales of DAC's mel loss; hop is a quarter.
MEL_SCALES = ((5, 32), (10, 64), (20, 128), (40, 256), (80, 512), (160, 1024), (320, 2048))


def multi_mel_loss(pred, target, valid, rate: int):
    """Mean |difference| of log10 magnitudes in mel bands, summed over MEL_SCALES: [B, N] x 2 -> [B]. As in
    DAC (Kumar et al. 2023), so that its weight of 15 fits. Its floor of 1e-5 is that of filters of unit area;
    ours have unit height, about a hundred times as much."""
    total = 0
    for bands, n_fft in MEL_SCALES:
        filters = mel_filters(rate, n_fft, bands).to(pred.device, non_blocking=True)
        p, t = ((filters @ Magnitude.apply(x, n_fft, n_fft // 4) + 1e-3).log10() for x in (pred, target))
        total = total + frame_mean((p - t).abs(), valid, n_fft // 4)
    return total


def low_pass_taps(share: float, device):
    """Zero-phase low pass up to a share of the band, [1, 1, 127], their sum is 1: Kaiser 8 (0.5 of 48 kHz:
    -6 dB at 12 kHz, -80 dB from 12.7 kHz on)."""
    n = torch.arange(127, device=device, dtype=torch.float32) - 63
    taps = torch.special.sinc(n * share) * share * torch.kaiser_window(127, False, 8.0, device=device)
    return (taps / taps.sum())[None, None]


def low_pass(x, share: float):
    """[B, N] -> [B, N]: what lies below a share of the band."""
    return F.conv1d(x[:, None], low_pass_taps(share, x.device), padding=63)[:, 0]


def halve_rate(x):
    """[B, 2N] -> [B, N]: every second sample of low_pass(x, 0.5)."""
    return F.conv1d(x[:, None], low_pass_taps(0.5, x.device), stride=2, padding=63)[:, 0, : x.shape[-1] // 2]


def double_rate(x):
    """[B, N] -> [B, 2N], in step with halve_rate: sample i becomes sample 2i."""
    taps = 2 * low_pass_taps(0.5, x.device)
    return F.conv_transpose1d(x[:, None], taps, stride=2, padding=63, output_padding=1)[:, 0]


# ---- the terms of a head's loss ----


@dataclass(frozen=True)
class Judged:
    """What a term sees of a batch: the audio of one head beside its target, both 0 from `valid` on."""

    audio: torch.Tensor  # [B, N] fp32
    target: torch.Tensor  # [B, N]
    valid: torch.Tensor  # [B] samples
    rate: int  # Hz
    original: torch.Tensor  # [B, N * 24000 / rate]: the 24 kHz recording
    phase_true: torch.Tensor  # [B] bool: whether the target's waveform is the recording's
    all_phase_true: bool = False  # known to be: the CPU need not ask the GPU
    n_ffts: tuple[int, ...] = (1024, 2048, 4096)
    stft: str = "magnitude"
    mel: str = "single"  # or multi: seven scales


def waveform_term(x: Judged):
    """Waveform L1; of a target that is not phase-true only below 12 kHz, against the recording."""
    loss, low, valid = l1_loss(x.audio, x.target, x.valid), x.audio, x.valid
    if low.shape == x.original.shape or x.all_phase_true:
        return loss
    while low.shape[-1] > x.original.shape[-1]:
        low, valid = halve_rate(low), valid // 2
    return torch.where(x.phase_true, loss, l1_loss(low, x.original, valid))


MEL_LOSSES = {"single": mel_loss, "multi": multi_mel_loss}

# Add yours here: {name of the log and, with _weight, of the flag: Judged of either head -> [B]}
TERMS = {
    "l1": waveform_term,
    "stft": lambda x: stft_loss(x.audio, x.target, x.valid, x.n_ffts, x.stft),
    "mel": lambda x: MEL_LOSSES[x.mel](x.audio, x.target, x.valid, x.rate),
}

REPORTED = ("l1", "stft")  # in every log and validation, whatever they weigh


def weighted(losses: dict, weights: dict):
    """The sum of weight x loss over the names of `weights`: a name that is not in `losses` is a KeyError."""
    return sum(weight * losses[name] for name, weight in weights.items())


def judged(audio, batch, **options):
    """(name, Judged) of every head that there is audio of: audio [B, 1, N] of each of HEADS, or None."""
    for (name, head), x in zip(HEADS.items(), audio):
        if x is not None:
            valid = head.factor * batch["valid_24k"]
            yield (
                name,
                Judged(
                    masked(x[:, 0].float(), valid),
                    batch[f"audio_{name}"][:, 0],
                    valid,
                    head.rate,
                    batch["audio_24k"][:, 0],
                    batch["phase_true"],
                    batch.get("all_phase_true", False),
                    **options,
                ),
            )


def head_losses(audio, batch, weights: dict, **options) -> dict:
    """Every loss of each item, fp32 [B], by the names of logs and flags: l1_24k, stft_24k, loss_24k, …_48k.
    audio: as for judged. weights: {term: weight}; of those of weight 0 only REPORTED are computed. options:
    of Judged."""
    out, weights = {}, {term: weight for term, weight in weights.items() if weight or term in REPORTED}
    for name, x in judged(audio, batch, **options):
        terms = {term: TERMS[term](x) for term in weights}
        out |= {f"{term}_{name}": loss for term, loss in terms.items()}
        out[f"loss_{name}"] = weighted(terms, weights)
    return {k: torch.where(batch["valid_24k"] > 0, v, torch.zeros_like(v)) for k, v in out.items()}


# ---- measures ----


def distances(audio, batch) -> dict:
    """Log-spectral distances of each item [B], by name: lsd_24k, lsd_48k and, above 12 kHz, lsd_12_24k."""
    out = {}
    for name, x in judged(audio, batch):
        out[f"lsd_{name}"] = lsd(x.audio, x.target, x.valid, x.rate)
        if name == "48k":
            out["lsd_12_24k"] = lsd(x.audio, x.target, x.valid, x.rate, 12000)
    return {k: v * (batch["valid_24k"] > 0) for k, v in out.items()}


def lsd(pred, target, valid, rate: int, above_hz: float = 0.0):
    """Log-spectral distance as AP-BWE defines it (Lu et al. 2024): [B, N] x 2 -> [B]. Hann 2048, hop 512;
    log10 of |S|² clamped at 1e-8; root of the mean over frequency, mean over frames. above_hz restricts the
    mean over frequency to the bins from there up."""
    first = math.ceil(above_hz * 2048 / rate)
    p, t = (spectrum(x, 2048, 512).abs().square().clamp(min=1e-8).log10()[:, first:] for x in (pred, target))
    return frame_mean((p - t).square().mean(1, keepdim=True).sqrt(), valid, 512)


@functools.cache
def mel_filters(rate: int, n_fft: int, bands: int = 80):
    """Triangular HTK-mel filters from 0 Hz to rate/2: float32 [bands, n_fft // 2 + 1]."""
    mel = lambda f: 2595 * np.log10(1 + f / 700)
    edges = 700 * (10 ** (np.linspace(0, mel(rate / 2), bands + 2) / 2595) - 1)
    f = np.linspace(0, rate / 2, n_fft // 2 + 1)
    up = (f - edges[:-2, None]) / (edges[1:-1] - edges[:-2])[:, None]
    down = (edges[2:, None] - f) / (edges[2:] - edges[1:-1])[:, None]
    return torch.from_numpy(np.clip(np.minimum(up, down), 0, None).astype(np.float32))
