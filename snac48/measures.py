"""What the evaluation measures: how far audio is from its target, and faults that need none to be heard.

Audio is float [N], full scale 1. Nothing is scaled before it is measured. A measure that says nothing about
a clip (the pitch of a clip without voice, the seam of audio that ends at 12 kHz) is left out of the dict.
"""

import numpy as np
import torch

from .cli import UserError
from .losses import halve_rate, lsd, mel_filters, spectrum, stft_loss

N_FFTS = (1024, 2048, 4096)
EXTRAS = "pip install -r requirements-evaluate.txt"

# in the order of the tables
DISTANCES = (
    "l1", "stft", "mel", "si_sdr", "lsd", "lsd_12_24k", "visqol", "f0_corr", "voicing_error", "rtf"
)  # fmt: skip
FAULTS = ("level", "level_24k", "comb", "seam", "tones", "hnr")
METRICS = DISTANCES + FAULTS


# ---- distances: pred [N] against target [N] ----


def mel_distance(pred, target, rate: int) -> float:
    """Mean |difference| of log-mel magnitudes (Hann 2048, hop 512, natural log, floor 1e-5)."""
    filters = mel_filters(rate, 2048)
    a, b = ((filters @ spectrum(x[None], 2048, 512)[0].abs()).clamp(min=1e-5).log() for x in (pred, target))
    return float((a - b).abs().mean())


def si_sdr(pred, target) -> float:
    """Scale-invariant signal-to-distortion ratio in dB (Le Roux et al. 2019)."""
    target, pred = target.double() - target.double().mean(), pred.double() - pred.double().mean()
    scaled = target * (pred @ target) / (target @ target).clamp(min=1e-12)
    wanted, error = (x.square().sum().clamp(min=1e-12) for x in (scaled, pred - scaled))
    return float(10 * torch.log10(wanted / error))


VISQOL_NEEDS = 46080  # samples at 48 kHz: of shorter clips it has no patch, and raises


def load_visqol():
    """(pred [N], target [N]) at 48 kHz -> MOS-LQO. Raises UserError where the package is missing."""
    try:
        from visqol import VisqolApi
    except ImportError:
        raise UserError(f"--visqol needs visqol-python: {EXTRAS}") from None
    api = VisqolApi()
    api.create(mode="audio")
    return lambda pred, target: float(
        api.measure_from_arrays(target.double().numpy(), pred.double().numpy(), 48000).moslqo
    )


def distances(pred, target, rate: int, visqol=None) -> dict:
    """All distances that apply at this rate, and the level of pred against the target's."""
    valid = torch.tensor([len(target)])
    found = {"l1": float((pred - target).abs().mean())}
    found["stft"] = float(stft_loss(pred[None], target[None], valid, N_FFTS))
    found["mel"] = mel_distance(pred, target, rate)
    found |= level(pred, target, "level")
    if rate == 24000:
        return found | {"si_sdr": si_sdr(pred, target)}
    found["lsd"] = float(lsd(pred[None], target[None], valid, rate))
    found["lsd_12_24k"] = float(lsd(pred[None], target[None], valid, rate, 12000))
    return found | ({"visqol": visqol(pred, target)} if visqol and len(target) >= VISQOL_NEEDS else {})


# ---- faults ----


def faults(audio, rate: int, frame_seconds: float, audio_24k=None) -> dict:
    """Faults of one signal. frame_seconds: a latent frame of the codec. audio_24k [N / 2]: what the 24 kHz
    head makes of the same codes (of an original: the recording at 24 kHz), for 48 kHz signals."""
    found = comb(audio, rate, frame_seconds)
    if rate == 48000:
        found |= seam(audio) | tones(audio)
    if rate == 48000 and audio_24k is not None:
        found |= level(halve_rate(audio[None])[0], audio_24k, "level_24k")  # in the band that both have
    return found


def level(audio, reference, name: str) -> dict:
    """RMS of audio against that of the reference in dB. Nothing of silence."""
    a, b = (float(x.double().square().mean()) for x in (audio, reference))
    return {name: 10 * np.log10(a / b)} if min(a, b) > 1e-10 else {}


def power(audio, n_fft: int):
    """Power spectrogram, Hann with 3/4 overlap: float64 [n_fft // 2 + 1, frames]. Of the frames that lie
    wholly inside: a clip is cut out of speech, and its edges are clicks. audio: n_fft samples at least."""
    return spectrum(audio[None], n_fft, n_fft // 4)[0, :, 2:-2].abs().square().double().numpy()


ROUNDING = 10 * np.log10(4096 * 3 / 8 / 12 / 32768**2)  # of 16 bits: dB in each bin of power(x, 4096)


def seam(audio_48k) -> dict:
    """How far the clip's mean spectrum at 11.75-12.25 kHz lies below the straight line between its levels at
    10.5-11.25 and 12.75-13.5 kHz, in dB: more than 0 is a dip where the new band begins, less a ridge.
    Nothing where the upper side is 30 dB under the lower or near the rounding noise of 16 bits: that is an
    end of the spectrum, not a seam."""
    mean, hz = power(audio_48k, 4096).mean(1), np.arange(2049) * 48000 / 4096
    sides = ((10500, 11250), (11750, 12250), (12750, 13500))
    below, at, above = (10 * np.log10(mean[(hz >= a) & (hz < b)].mean() + 1e-12) for a, b in sides)
    return {"seam": float((below + above) / 2 - at)} if above > max(below - 30, ROUNDING + 6) else {}


def comb(audio, rate: int, frame_seconds: float, multiples: int = 8) -> dict:
    """How far the envelope's lines at 1 to 8 times the frame rate stand out of what lies between them, in dB
    (mean over the lines; 0: not at all). Envelope: RMS of the first difference, which weighs high bands as
    much as low ones, 32 values a frame, against its mean over two frames, so that quiet parts count, too.
    Nothing of clips under 16 frames, whose lines are not told apart."""
    step = round(frame_seconds * rate / 32)
    frames = len(audio) // (32 * step)
    if frames < 16 or not audio.any():
        return {}
    change = np.diff(audio.double().numpy(), prepend=float(audio[0]))[: frames * 32 * step]
    envelope = np.sqrt(np.square(change).reshape(-1, step).mean(1) + 1e-10)  # 1e-5: a third of a 16-bit step
    envelope /= np.convolve(envelope, np.full(64, 1 / 64), "same")
    lines = np.square(np.abs(np.fft.rfft((envelope - envelope.mean()) * np.hanning(len(envelope)))))
    found, half = [], frames // 2  # a line lies in bin multiple * frames; Hann spreads it over three
    for at in range(frames, frames * multiples + 1, frames):
        between = np.concatenate([lines[at - half : at - 2], lines[at + 3 : at + half + 1]])
        found.append(10 * np.log10(lines[at] / between.mean()))
    return {"comb": float(np.mean(found))}


def tones(audio_48k) -> dict:
    """How far the strongest steady line above 10 kHz stands out of the 940 Hz around it, in dB. Steady: in
    the mean over time of the spectrum in dB, where a short burst counts for little."""
    mean = 10 * np.log10(power(audio_48k, 2048) + 1e-9).mean(1)  # of 16-bit rounding: about -75
    around = np.lib.stride_tricks.sliding_window_view(np.pad(mean, 20, mode="edge"), 41)
    hz = np.arange(len(mean)) * 48000 / 2048
    out = (mean - np.median(around, 1))[(hz >= 10000) & (hz < 23000)]
    return {"tones": float(out.max())}


# ---- pitch, at 24 kHz: frames of 2048 samples, a value every 256 ----

PITCH_FRAME, PITCH_HOP, LOWEST_HZ, HIGHEST_HZ = 2048, 256, 60.0, 500.0


def load_pitch():
    """audio [N] at 24 kHz -> F0 in Hz, float [N // 256 + 1], NaN where there is no voice: pYIN (Mauch and
    Dixon 2014) of librosa. Raises UserError where the package is missing."""
    try:
        from librosa import pyin
    except ImportError:
        raise UserError(f"--pitch needs librosa: {EXTRAS}") from None
    options = {"fmin": LOWEST_HZ, "fmax": HIGHEST_HZ, "frame_length": PITCH_FRAME, "hop_length": PITCH_HOP}
    return lambda audio: pyin(audio.numpy(), sr=24000, **options)[0]


def pitch_distances(f0, f0_target) -> dict:
    """f0_corr: Pearson correlation over the frames that have voice in both (of 10 at least); voicing_error:
    share of the frames that have voice in one alone, in %. float [T] each, NaN: no voice."""
    voiced, wanted = ~np.isnan(f0), ~np.isnan(f0_target)
    found, both = {"voicing_error": float(100 * (voiced != wanted).mean())}, voiced & wanted
    if both.sum() >= 10 and np.ptp(f0[both]) > 0 and np.ptp(f0_target[both]) > 0:
        found["f0_corr"] = float(np.corrcoef(f0[both], f0_target[both])[0, 1])
    return found


def harmonics_to_noise(audio_24k, f0) -> dict:
    """hnr: harmonics-to-noise ratio in dB of the frames where f0 [T] names a pitch (of 10 at least):
    10 log10(r / (1 - r)) of their mean normalised autocorrelation r, divided by the window's (Boersma 1993),
    at its highest within 10 % of that pitch's lag. f0: the original's, so that a whisper is asked, too."""
    at = np.flatnonzero(~np.isnan(f0))
    if len(at) < 10:
        return {}
    padded = np.pad(audio_24k.double().numpy(), PITCH_FRAME // 2)  # frame i is centred on i * PITCH_HOP
    frames = np.lib.stride_tricks.sliding_window_view(padded, PITCH_FRAME)[::PITCH_HOP][at]
    window = np.hanning(PITCH_FRAME)
    longest = int(1.1 * 24000 / LOWEST_HZ) + 2
    autocorrelation = lambda x: np.fft.irfft(np.square(np.abs(np.fft.rfft(x, 2 * PITCH_FRAME))))[
        ..., :longest
    ]
    r = autocorrelation((frames - frames.mean(1, keepdims=True)) * window)
    r = r / np.maximum(r[:, :1], 1e-9) / (autocorrelation(window) / autocorrelation(window)[0])
    lags = [slice(int(0.9 * lag), int(1.1 * lag) + 2) for lag in 24000 / f0[at]]
    best = np.clip(np.mean([row[lag].max() for row, lag in zip(r, lags)]), 1e-3, 1 - 1e-4)  # -30 to 40 dB
    return {"hnr": float(10 * np.log10(best / (1 - best)))}


def pitched(audio, rate: int, pitch, f0_target) -> dict:
    """All of pitch of a signal at 24 or 48 kHz. pitch: of load_pitch; f0_target: what it says of the
    original."""
    audio = halve_rate(audio[None])[0] if rate == 48000 else audio
    return pitch_distances(pitch(audio), f0_target) | harmonics_to_noise(audio, f0_target)
