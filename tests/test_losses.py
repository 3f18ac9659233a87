"""snac48/losses.py: what judges audio."""

import math

import pytest
import torch
from conftest import voice

import train_dual_head as T
from snac48.losses import (
    REPORTED,
    TERMS,
    Magnitude,
    double_rate,
    halve_rate,
    head_losses,
    lasting_loss,
    low_pass,
    lsd,
    mel_filters,
    mel_loss,
    multi_mel_loss,
    stft_loss,
    weighted,
)

WEIGHTS = {"l1": 1.0, "stft": 1.0, "mel": 0.0}


def batch_of(n=8192, valid=None, phase_true=True):
    x = torch.from_numpy(voice(2 * n / 48000 + 0.1, 48000, 3)[: 2 * n])[None, None]
    valid = torch.tensor([valid or n])
    keep = torch.arange(2 * n) < 2 * valid
    x = x * keep
    return {"audio_48k": x, "audio_24k": halve_rate(x[:, 0])[:, None] * (torch.arange(n) < valid),
            "valid_24k": valid, "phase_true": torch.tensor([phase_true])}  # fmt: skip


def test_every_weight_of_the_loss_options_is_a_term():
    """A misspelt name would weigh nothing."""
    named = {name for name in T.OPTIONS["loss"] if name.endswith("_weight")}
    of_the_codec = {"commitment_weight", "codebook_weight"}  # terms of FullCodec, not of audio
    assert named == {f"{term}_weight" for term in TERMS} | of_the_codec
    assert set(REPORTED) <= set(TERMS)


def test_a_term_of_a_name_that_does_not_exist_is_an_error():
    batch = batch_of()
    with pytest.raises(KeyError, match="mle"):
        head_losses((None, batch["audio_48k"]), batch, {"l1": 1.0, "mle": 0.5})
    with pytest.raises(KeyError, match="loss_96k"):
        weighted({"loss_24k": 1.0}, {"loss_24k": 0.3, "loss_96k": 1.0})


def test_a_heads_loss_is_the_weighted_sum_of_its_terms():
    batch, weights = batch_of(), {"l1": 2.0, "stft": 0.5, "mel": 3.0}
    found = head_losses((batch["audio_24k"] * 0.9, batch["audio_48k"] * 0.5), batch, weights)
    for head in ("24k", "48k"):
        total = sum(weight * found[f"{term}_{head}"] for term, weight in weights.items())
        assert torch.allclose(found[f"loss_{head}"], total) and total > 0


def test_losses_are_zero_at_the_target_and_ignore_what_lies_past_the_end():
    batch = batch_of(valid=5000)
    junk = torch.cat([batch["audio_48k"][..., :10000], torch.ones(1, 1, 6384)], -1)
    for x in (batch["audio_48k"], junk):
        found = head_losses((None, x), batch, WEIGHTS)
        assert set(found) == {"l1_48k", "stft_48k", "loss_48k"}
        assert all(abs(float(v)) < 1e-6 for v in found.values())


def test_magnitude_loss_forgives_phase_and_complex_does_not():
    torch.manual_seed(0)
    x = torch.randn(1, 16384) * 0.1
    valid = torch.tensor([16384])
    assert stft_loss(-x, x, valid, [1024]) < 1e-5 < 1 < stft_loss(-x, x, valid, [1024], "complex")


def test_a_target_without_true_phase_gets_its_waveform_loss_below_12_khz_only():
    batch = batch_of(phase_true=False)
    high = 0.1 * torch.sin(torch.arange(16384) * 2 * math.pi * 17000 / 48000)[None, None]
    found = head_losses((None, batch["audio_48k"] + high), batch, WEIGHTS)
    assert found["l1_48k"] < 1e-3  # 17 kHz is not judged by waveform
    batch["phase_true"][:] = True
    assert head_losses((None, batch["audio_48k"] + high), batch, WEIGHTS)["l1_48k"] > 0.05


def test_the_mel_loss_of_seven_scales_matches_its_definition():
    a, b = (torch.from_numpy(voice(0.5, 24000, seed))[None] for seed in (1, 2))
    valid, wanted = torch.tensor([a.shape[-1]]), 0.0
    for bands, n in ((5, 32), (10, 64), (20, 128), (40, 256), (80, 512), (160, 1024), (320, 2048)):
        window, hop = torch.hann_window(n), n // 4
        mels = [
            mel_filters(24000, n, bands)
            @ torch.stft(x, n, hop, window=window, pad_mode="constant", return_complex=True).abs()
            for x in (a, b)
        ]
        wanted += float(((mels[0] + 1e-3).log10() - (mels[1] + 1e-3).log10()).abs().mean())
    assert math.isclose(float(multi_mel_loss(a, b, valid, 24000)), wanted, rel_tol=1e-4)
    assert float(multi_mel_loss(a, a, valid, 24000)) == 0
    batch = batch_of()
    junk, only_mel = torch.randn_like(batch["audio_24k"]) * 0.1, {"mel": 1.0}
    found = {
        m: float(head_losses((junk, None), batch, only_mel, mel=m)["mel_24k"]) for m in ("single", "multi")
    }
    x = junk[:, 0], batch["audio_24k"][:, 0], batch["valid_24k"], 24000
    assert found["single"] == float(mel_loss(*x)) and found["multi"] == float(multi_mel_loss(*x))


def test_a_doubled_rate_halves_to_what_it_was():
    x = batch_of()["audio_24k"][:, 0]
    twice = double_rate(x)
    assert twice.shape[-1] == 2 * x.shape[-1]
    assert (twice[:, ::2] - x).abs().max() < 0.01 * x.abs().max()
    low, wanted = (low_pass(x, 0.4)[:, 200:-200] for x in (twice, batch_of()["audio_48k"][:, 0]))
    assert (low - wanted).abs().max() < 1e-3
    s = torch.fft.rfft(twice * torch.hann_window(twice.shape[-1])).abs()[0]
    assert s[int(13000 / 24000 * len(s)) :].max() < 1e-3 * s.max()  # nothing above 12 kHz


def test_lsd_matches_its_definition():
    torch.manual_seed(1)
    a, b = torch.randn(1, 24000) * 0.1, torch.randn(1, 24000) * 0.01
    window = torch.hann_window(2048)
    s = [
        torch.stft(x, 2048, 512, window=window, pad_mode="constant", return_complex=True).abs() ** 2
        for x in (a, b)
    ]
    d = (torch.log10(s[0].clamp(min=1e-8)) - torch.log10(s[1].clamp(min=1e-8))) ** 2
    expected = d.mean(1).sqrt().mean()
    assert abs(float(lsd(a, b, torch.tensor([24000]), 48000)) - float(expected)) < 1e-5
    high = d[:, 512:].mean(1).sqrt().mean()  # bin 512 of 2048 at 48 kHz is 12 kHz
    assert abs(float(lsd(a, b, torch.tensor([24000]), 48000, 12000)) - float(high)) < 1e-5


def test_the_gradient_of_magnitudes_is_that_of_torch():
    x = torch.randn(2, 5000, dtype=torch.float64)
    for n_fft, hop in ((1024, 256), (512, 512), (1022, 255)):
        one, two = x.clone().requires_grad_(), x.clone().requires_grad_()
        window = torch.hann_window(n_fft, dtype=torch.float64)
        s = torch.stft(one, n_fft, hop, window=window, center=True, pad_mode="constant", return_complex=True)
        weight = torch.randn(s.shape, dtype=torch.float64)
        (s.abs() * weight).sum().backward()
        (Magnitude.apply(two, n_fft, hop) * weight).sum().backward()
        assert torch.allclose(one.grad, two.grad, rtol=1e-5, atol=1e-5)  # our window is fp32
    silent = torch.zeros(1, 4096, requires_grad=True)
    (1e3 * Magnitude.apply(silent, 1024, 256)).sum().backward()  # as the logarithm's slope at 1e-3
    assert not silent.grad.any()


def test_the_lasting_loss_sees_what_is_wrong_in_every_frame_and_not_what_is_wrong_by_chance():
    n, frame = 96 * 1024, 1024  # 96 latent frames at 48 kHz
    rng = torch.Generator().manual_seed(0)
    target, other = (
        0.05 * torch.randn(1, n, generator=rng) for _ in range(2)
    )  # the same sound, other samples
    loss = lambda x, valid=n: float(lasting_loss(x, target, torch.tensor([valid]), frame))
    hz = torch.fft.rfftfreq(n, 1 / 48000)
    dip = torch.fft.irfft(torch.fft.rfft(other) * (1 - 0.5 * ((hz - 12000).abs() < 300)), n)
    comb = lambda samples: other * (1 + 0.5 * torch.cos(2 * math.pi * torch.arange(n) / samples))
    chance, quiet = loss(other), loss(other * 0.7)
    assert loss(target) == 0 and chance < 0.03
    assert quiet - chance > 0.1 and loss(dip) - chance > 0.003 and loss(comb(frame)) - chance > 0.05
    assert loss(comb(0.77 * frame)) - chance < 0.01  # a voice of another pitch, whose mean is right
    seen = stft_loss(comb(frame), target, torch.tensor([n]), [1024]) / stft_loss(
        other, target, torch.tensor([n]), [1024]
    )
    assert seen < 1.1  # what it is there for: a window of a whole frame does not see the comb
    junk = torch.cat([target[:, : 80 * frame], 9 * other[:, 80 * frame :]], 1)
    assert loss(junk, 79 * frame) < 1e-3 and loss(target, 100) == 0
    assert math.isfinite(float(lasting_loss(other, target, torch.tensor([n]), 882)))  # hop 441
