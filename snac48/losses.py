"""What judges audio: waveform L1, multi-resolution STFT, log-mel, log-spectral distance; fp32, per item."""

from __future__ import annotations

import functools
import math

import numpy as np
import torch
import torch.nn.functional as F

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
    mel = lambda f: 2595 * np.log10(1 + f / 700)
    edges = 700 * (10 ** (np.linspace(0, mel(rate / 2), bands + 2) / 2595) - 1)
    f = np.linspace(0, rate / 2, n_fft // 2 + 1)
    up = (f - edges[:-2, None]) / (edges[1:-1] - edges[:-2])[:, None]
    down = (edges[2:, None] - f) / (edges[2:] - edges[1:-1])[:, None]
    return torch.from_numpy(np.clip(np.minimum(up, down), 0, None).astype(np.float32))
