"""measures.py: each on signals whose value is known."""

import numpy as np
import pytest
import torch
from conftest import voice

from snac48 import measures as M
from snac48.audio import resample

FRAME = 512 / 24000
T48 = torch.arange(96256) / 48000  # 94 frames


def noise(n=96256, seed=0):
    return 0.05 * torch.randn(n, generator=torch.Generator().manual_seed(seed))


def sine(hz, t=T48):
    return torch.sin(2 * torch.pi * hz * t)


def shaped(gain_db):
    """Noise at 48 kHz with gain_db(Hz) dB."""
    spectrum = torch.fft.rfft(noise().double())
    hz = np.fft.rfftfreq(96256, 1 / 48000)
    return torch.fft.irfft(spectrum * torch.from_numpy(10 ** (gain_db(hz) / 20))).float()


def test_distances_are_right_on_known_signals():
    x = 0.3 * sine(440)
    assert M.si_sdr(0.5 * x, x) > 100
    off = x + 0.03 * torch.cos(2 * torch.pi * 440 * T48)
    assert abs(M.si_sdr(off, x) - 20) < 0.1
    assert M.mel_distance(x, x, 48000) == 0 and M.mel_distance(10 * x, x, 48000) > 0.5
    n = noise()
    found = M.distances(n * 10 ** (-1 / 20), n, 48000)
    assert abs(found["level"] + 1) < 1e-3 and abs(found["lsd"] - 0.1) < 0.01  # as the level policy says
    assert set(found) == {"l1", "stft", "mel", "level", "lsd", "lsd_12_24k"}
    assert set(M.distances(n, n, 24000)) == {"l1", "stft", "mel", "level", "si_sdr"}
    assert M.distances(n, n, 48000, visqol=lambda p, t: 4.5)["visqol"] == 4.5
    short = n[: int(0.94 * 48000)]  # the package raises there: "smaller than minimum patch size"
    assert "visqol" not in M.distances(short, short, 48000, visqol=lambda p, t: 4.5)


def test_level_is_that_of_the_own_24_khz_head():
    low = noise(48128)
    high = 0.5 * torch.from_numpy(resample(low.numpy(), 24000, 48000)) + 0.1 * sine(18000)
    assert abs(M.faults(high, 48000, FRAME, low)["level_24k"] + 6.02) < 0.3  # the new band doesn't count
    assert "level_24k" not in M.faults(high, 48000, FRAME)
    assert M.level(torch.zeros(100), low, "level") == {}


def test_seam_is_the_depth_of_a_dip_at_12_khz_and_not_a_slope_or_an_end():
    falling = lambda hz: -6 * (hz - 10000) / 1000
    assert abs(M.seam(shaped(falling))["seam"]) < 0.7
    dip = lambda hz: falling(hz) - 6 * (np.abs(hz - 12000) < 400)
    assert abs(M.seam(shaped(dip))["seam"] - 6) < 0.7
    ridge = lambda hz: falling(hz) + 6 * (np.abs(hz - 12000) < 400)
    assert abs(M.seam(shaped(ridge))["seam"] + 6) < 0.7
    ends = shaped(lambda hz: -90.0 * (hz > 11900))
    assert M.seam(ends) == {}
    rounded = torch.round(shaped(lambda hz: -90.0 * (hz > 11900)) * 32768) / 32768
    assert M.seam(rounded) == {}


@pytest.mark.parametrize("rate", (24000, 48000))
def test_comb_stands_out_at_the_frame_rate_alone(rate):
    x = noise(94 * 512 * rate // 24000)
    at = torch.arange(len(x)) / rate
    comb = lambda hz: M.comb(x * (1 + 0.5 * (torch.cos(2 * torch.pi * hz * at) > 0.9)), rate, FRAME)["comb"]
    assert abs(M.comb(x, rate, FRAME)["comb"]) < 2
    assert comb(1 / FRAME) > 10  # a click in every frame
    assert comb(0.77 / FRAME) < 3  # a voice of another pitch
    assert M.comb(x[: 15 * 512], rate, FRAME) == {} or rate == 24000
    assert M.comb(torch.zeros(96256), rate, FRAME) == {}


def test_tones_are_steady_lines_above_10_khz():
    x = noise()
    assert M.tones(x)["tones"] < 4
    assert M.tones(x + 0.05 * sine(13000))["tones"] > 15
    assert M.tones(x + 0.05 * sine(8000))["tones"] < 4
    burst = 0.05 * sine(13000) * ((T48 > 0.5) & (T48 < 0.6))
    assert M.tones(x + burst)["tones"] < 5


def test_the_shortest_clip_has_numbers_or_none():
    for rate in (24000, 48000):
        x = noise(2048 * rate // 24000)
        found = M.faults(x, rate, FRAME, noise(2048))
        assert all(np.isfinite(v) for v in found.values()) and "comb" not in found


def test_pitch_distances():
    target = np.r_[np.full(10, np.nan), np.linspace(100, 200, 30)]
    assert M.pitch_distances(1.1 * target, target) == {"voicing_error": 0.0, "f0_corr": pytest.approx(1.0)}
    flipped = np.r_[target[:10], target[:9:-1]]
    assert M.pitch_distances(flipped, target)["f0_corr"] == pytest.approx(-1.0)
    whisper = np.full(40, np.nan)
    assert M.pitch_distances(whisper, target) == {"voicing_error": 75.0}


def test_harmonics_to_noise_of_known_mixtures():
    at = torch.arange(48000) / 24000
    buzz = sum(torch.sin(2 * torch.pi * 120 * h * at) for h in range(1, 20))
    buzz /= buzz.square().mean().sqrt()
    f0 = np.full(48000 // 256 + 1, 120.0)
    hiss = noise(48000) / noise(48000).square().mean().sqrt()
    for ratio in (0, 10, 20):
        found = M.harmonics_to_noise(buzz + hiss * 10 ** (-ratio / 20), f0)["hnr"]
        assert abs(found - ratio) < 1.5, (ratio, found)
    assert M.harmonics_to_noise(hiss, f0)["hnr"] < -5
    assert M.harmonics_to_noise(buzz, np.full(188, np.nan)) == {}


def test_librosa_finds_the_pitch_of_a_voice():
    pytest.importorskip("librosa", reason="librosa is not installed (requirements-evaluate.txt)")
    pitch = M.load_pitch()
    x = torch.from_numpy(voice(1.5, 24000, 3))
    f0 = pitch(x)
    assert len(f0) == len(x) // 256 + 1 and (~np.isnan(f0)).mean() > 0.5
    high = torch.from_numpy(voice(1.5, 48000, 3))
    found = M.pitched(high, 48000, pitch, f0)
    assert found["f0_corr"] > 0.9 and found["voicing_error"] < 20
    whisper = M.pitched(noise(36000), 24000, pitch, f0)
    assert whisper["hnr"] < found["hnr"] - 5
