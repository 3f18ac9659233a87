"""snac48/discriminators.py: what they are, and what they see of a target."""

import torch
from conftest import voice

from snac48.discriminators import (
    BANDS,
    N_FFTS,
    PERIODS,
    Discriminators,
    adv_loss,
    disc_loss,
    feat_loss,
    spectral_channels,
    views,
)
from snac48.losses import Judged, halve_rate

N = 9600  # 0.2 s at 48 kHz


def speech(*seeds):
    return torch.stack([torch.from_numpy(voice(0.3, 48000, seed)[:N]) for seed in seeds])


def judged(target, phase_true, audio=None):
    original = halve_rate(speech(1, 2))
    audio = speech(3, 4) if audio is None else audio
    phase_true = torch.tensor(phase_true)
    return Judged(audio, target, torch.tensor([N, N]), 48000, original, phase_true, bool(phase_true.all()))


def rotated(x):
    """x with every phase turned by a quarter: the same magnitudes, another waveform."""
    s = torch.fft.rfft(x)
    return torch.fft.irfft(s * -1j, n=x.shape[-1])


def test_there_is_a_discriminator_of_every_period_and_window_and_every_sample_is_seen():
    net = Discriminators(1)
    x = speech(1, 2).requires_grad_()
    seen = net(x, x, torch.tensor([True, True]))
    assert len(seen) == len(PERIODS) + len(N_FFTS) == 8
    assert [d[-1].shape[-1] for d in seen[:5]] == list(PERIODS)
    assert all(len(d) == 5 + 1 for d in seen[:5])  # layers, then the scores
    assert all(len(d) == 5 * (len(BANDS) - 1) + 1 for d in seen[5:])
    for d in seen:
        assert len(d[-1]) == 2 and d[-1].shape[1] == 1
        (grad,) = torch.autograd.grad(d[-1].sum(), x, retain_graph=True)
        assert (grad[:, : N - 11] != 0).float().mean() > 0.9
    for n in (N - 1, N // 2 + 3, 4801):  # no length is special
        assert len(net(x[:, :n], x[:, :n], torch.tensor([True, True]))) == 8


def test_bands_cover_every_bin_once():
    for d in Discriminators(1).spectra:
        assert d.edges[0] == 0 and d.edges[-1] == d.n_fft // 2 + 1 and d.edges == sorted(set(d.edges))


def test_the_published_width_has_the_published_size():
    """HiFi-GAN counts 41.1 M in its five discriminators of periods."""
    periods = sum(p.numel() for p in Discriminators(32).periods.parameters())
    assert 40.5e6 < periods < 41.5e6


def test_spectral_channels_are_the_compressed_short_time_spectrum():
    x = speech(1, 2)
    for n_fft in N_FFTS:
        window = torch.hann_window(n_fft)
        s = torch.stft(x, n_fft, n_fft // 4, window=window, pad_mode="constant", return_complex=True).mT
        found = spectral_channels(x, n_fft, torch.tensor([True, True]))[:, :, : s.shape[1]]
        assert torch.allclose(found[:, 0], (s.abs() ** 2 + 1e-6) ** 0.15, atol=1e-4)
        loud = s.abs() > 0.1
        for part, wanted in ((found[:, 1], s.real), (found[:, 2], s.imag)):
            assert torch.allclose(part[loud], (wanted * s.abs() ** -0.7)[loud], atol=1e-3)
    silent = torch.zeros(1, N, requires_grad=True)
    spectral_channels(silent, 512, torch.tensor([True])).sum().backward()
    assert silent.grad.isfinite().all()


def test_of_a_restored_target_no_phase_is_seen():
    """Turned phases give the discriminators the same input; of a phase-true row they give another one."""
    target = speech(1, 2)
    turned = rotated(target)
    for phase_true in ([False, False], [False, True]):
        row = judged(target, phase_true), judged(turned, phase_true)
        (_, (wave, audio), known), (_, (wave2, audio2), _) = map(views, row)
        assert torch.equal(wave[0], wave2[0])  # the recording, whatever the target is
        for n_fft in N_FFTS:
            a, b = (spectral_channels(x, n_fft, known) for x in (audio, audio2))
            inner = slice(8, -8)  # the ends of a segment turn into each other
            assert not a[0, 1:].any() and not b[0, 1:].any()
            assert (a[0, 0, inner] - b[0, 0, inner]).abs().mean() < 0.05 * a[0, 0, inner].mean()
            flipped = spectral_channels(-audio, n_fft, known)
            assert torch.equal(flipped[0], a[0])
            if phase_true[1]:
                assert not torch.equal(wave[1], wave2[1]) and a[1, 1:].any()
                assert not torch.allclose(flipped[1], a[1])


def test_periods_of_a_restored_row_are_those_of_the_recordings_band():
    high = 0.1 * torch.sin(torch.arange(N) * 2 * torch.pi * 12500 / 48000)
    plain, with_high = (judged(speech(1, 2), [False, True], speech(3, 4) + x) for x in (0, high))
    ((wave, audio), _, _), ((wave2, audio2), _, _) = views(plain), views(with_high)
    assert (wave[0] - wave2[0]).abs()[200:-200].max() < 1e-3  # not seen there, but by the spectra:
    assert torch.equal(audio2, speech(3, 4) + high) and torch.equal(audio, speech(3, 4))
    assert (wave[1] - wave2[1]).abs().max() > 0.09
    # a head that is right looks like the recording, though that has lost what lies above 12 kHz
    (of_audio, _), (of_target, _), _ = views(judged(speech(5, 6), [False, True], speech(1, 2)))
    inner = slice(200, -200)
    assert (of_audio[0] - of_target[0]).abs()[inner].max() < 1e-3 < of_target[0].abs().max()
    assert torch.equal(of_target[1], speech(6)[0])


def test_the_24_khz_head_is_seen_whole():
    x = halve_rate(speech(1, 2))
    row = Judged(x, -x, torch.tensor([N // 2] * 2), 24000, -x, torch.tensor([False, False]))
    (wave, audio), (of_target, _), known = views(row)
    assert torch.equal(wave, x) and torch.equal(audio, x) and torch.equal(of_target, -x) and known.all()


def test_losses_are_those_of_least_squares():
    score = lambda *values: [[torch.zeros(2, 1, 4), torch.full((2, 1, 3), v)] for v in values]
    assert disc_loss(score(1.0, 1.0), score(0.0, 0.0)).tolist() == [0.0, 0.0]  # tells everything
    assert disc_loss(score(0.5, 0.5), score(0.5, 0.5)).tolist() == [0.5, 0.5]  # by chance
    assert adv_loss(score(1.0, 1.0)).tolist() == [0.0, 0.0]
    assert adv_loss(score(0.0, 0.0)).tolist() == [2.0, 2.0]  # a sum, as in DAC, whose weights we use
    real, fake = score(0.0), score(0.0)
    fake[0][0][1] = 3.0
    assert feat_loss(real, fake).tolist() == [0.0, 3.0]  # each item its own
