"""Discriminators of the adversarial phase: networks that learn to tell a decoder's audio from its targets.

Five look at the waveform folded at a period of 2, 3, 5, 7 and 11 samples (Kong et al. 2020, HiFi-GAN), three
at short-time spectra of 2048, 1024 and 512 samples, cut into five bands with a network each (Kumar et al.
2023, Descript Audio Codec). Together they see the whole band: judged in the high band alone, a head shows a
seam where that begins.

What they see of a target is what the decoder can know. Of a restored target (SIDON) the spectrum is right but
the phase is SIDON's own, so in such rows, of audio and target alike,

- the spectral ones see magnitudes only; real and imaginary parts are 0;
- those of periods see what lies below 10.5 kHz, of the target that of the recording itself: pitch and most
  harmonics lie there, and its phase is true. (Not 12 kHz: where the recording ends, filters would differ, and
  the head would learn a seam.)

Rows whose target is the recording are seen whole, and the 24 kHz head always is. Both kinds may stand in one
batch: a row's audio and its target are shown the same way, so the way itself tells nothing. Levels are left
as they are: a head that is too quiet looks too quiet.
"""

from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils.parametrizations import weight_norm

from .losses import Judged, double_rate, hann, low_pass

PERIODS = (2, 3, 5, 7, 11)  # primes: what they fold overlaps least
N_FFTS = (2048, 1024, 512)  # hop is a quarter
BANDS = (0.0, 0.1, 0.25, 0.5, 0.75, 1.0)  # edges, as shares of the bins
LOW_BAND = 10500.0  # Hz up to which a waveform is compared with the recording's
SLOPE = 0.1  # of leaky ReLU


def conv(channels_in: int, channels_out: int, kernel, stride=(1, 1), padding=(0, 0)):
    return weight_norm(nn.Conv2d(channels_in, channels_out, kernel, stride, padding))


class PeriodDiscriminator(nn.Module):
    """Waveform [B, N], folded to [B, 1, N / period, period]; convolutions run along what repeats."""

    def __init__(self, period: int, width: int):
        super().__init__()
        self.period, sizes = period, [1, width, 4 * width, 16 * width, 32 * width]
        layers = [conv(a, b, (5, 1), (3, 1), (2, 0)) for a, b in pairwise(sizes)]
        self.layers = nn.ModuleList([*layers, conv(sizes[-1], sizes[-1], (5, 1), padding=(2, 0))])
        self.last = conv(sizes[-1], 1, (3, 1), padding=(1, 0))

    def forward(self, wave):
        """[B, N] -> what each layer makes of it, the scores last."""
        x = F.pad(wave, (0, -wave.shape[-1] % self.period)).view(len(wave), 1, -1, self.period)
        found = []
        for layer in self.layers:
            x = F.leaky_relu(layer(x), SLOPE)
            found.append(x)
        return [*found, self.last(x)]


class SpectrumDiscriminator(nn.Module):
    """Spectrum of [B, N] in bands with a network each; one more joins what they have found."""

    def __init__(self, n_fft: int, width: int):
        super().__init__()
        self.n_fft, bins = n_fft, n_fft // 2 + 1
        self.edges = [int(share * bins) for share in BANDS]
        along = lambda a: conv(a, width, (3, 9), (1, 2), (1, 4))
        self.bands = nn.ModuleList(
            nn.ModuleList(
                [
                    conv(3, width, (3, 9), padding=(1, 4)),
                    *[along(width) for _ in range(3)],
                    conv(width, width, (3, 3), padding=(1, 1)),
                ]
            )
            for _ in self.edges[1:]
        )
        self.last = conv(width, 1, (3, 3), padding=(1, 1))

    def forward(self, audio, phase_true):
        """[B, N], [B] -> what each layer of each band makes of it, the scores last."""
        channels, found, joined = spectral_channels(audio, self.n_fft, phase_true), [], []
        for layers, low, high in zip(self.bands, self.edges, self.edges[1:]):
            x = channels[..., low:high]
            for layer in layers:
                x = F.leaky_relu(layer(x), SLOPE)
                found.append(x)
            joined.append(x)
        return [*found, self.last(torch.cat(joined, -1))]


def spectral_channels(audio, n_fft: int, phase_true):
    """[B, N] -> [B, 3, frames, bins]: magnitude, real and imaginary part of a Hann STFT (hop a quarter), the
    last two 0 where phase_true [B] is not. Compressed to the power 0.3 (Braun & Tashev 2021), or what lies
    40 dB below the rest would not be seen; 1e-6, the rounding noise of a 16-bit file, keeps gradients finite.
    Frames are cut as slices: the gradient of torch.stft adds them up in no fixed order on a GPU."""
    hop = n_fft // 4
    frames = audio.shape[-1] // hop + 1
    x = F.pad(audio, (2 * hop, (frames + 3) * hop - 2 * hop - audio.shape[-1]))
    hops = x.view(len(x), frames + 3, hop)
    cut = torch.cat([hops[:, i : i + frames] for i in range(4)], -1)  # [B, frames, n_fft]
    s = torch.fft.rfft(cut * hann(n_fft, x.device))
    power, known = s.real.square() + s.imag.square() + 1e-6, phase_true.to(x.dtype)[:, None, None]
    scale = power.pow(-0.35) * known
    return torch.stack([power.pow(0.15), s.real * scale, s.imag * scale], 1)


class Discriminators(nn.Module):
    """All that judge one head. width: channels of the first layers; 32 is that of the publications."""

    def __init__(self, width: int = 32):
        super().__init__()
        self.periods = nn.ModuleList(PeriodDiscriminator(p, width) for p in PERIODS)
        self.spectra = nn.ModuleList(SpectrumDiscriminator(n, width) for n in N_FFTS)

    def forward(self, wave, audio, phase_true):
        """As `views` gives them -> for each discriminator what its layers make of it, the scores last."""
        return [d(wave) for d in self.periods] + [d(audio, phase_true) for d in self.spectra]


def views(x: Judged):
    """((wave, audio) of the decoder, (wave, audio) of the target, phase_true): waveforms [B, N] for the
    discriminators of periods, audio [B, N] and phase_true [B] for those of spectra."""
    if x.audio.shape == x.original.shape or x.all_phase_true:
        return (x.audio, x.audio), (x.target, x.target), torch.ones_like(x.phase_true)
    wave, share, whole = x.original, LOW_BAND / (x.rate / 2), x.phase_true[:, None]
    while wave.shape[-1] < x.audio.shape[-1]:
        wave = double_rate(wave)
    of_audio = torch.where(whole, x.audio, low_pass(x.audio, share))
    of_target = torch.where(whole, x.target, low_pass(wave, share))
    return (of_audio, x.audio), (of_target, x.target), x.phase_true


# ---- losses, each [B]: least squares (Mao et al. 2017) ----


def mean_of(x):
    return x.float().flatten(1).mean(1)


def disc_loss(real, fake):
    """What the discriminators minimise, mean over them: 0 where they tell everything, 0.5 by chance."""
    return sum(mean_of((1 - r[-1]).square()) + mean_of(f[-1].square()) for r, f in zip(real, fake)) / len(
        real
    )


def adv_loss(fake):
    """How far the decoder's audio is from being taken for real, sum over the discriminators."""
    return sum(mean_of((1 - f[-1]).square()) for f in fake)


def feat_loss(real, fake):
    """Feature matching: L1 between what the layers make of target and audio, sum over all of them."""
    return sum(mean_of((a - b).abs()) for r, f in zip(real, fake) for a, b in zip(r[:-1], f[:-1]))
