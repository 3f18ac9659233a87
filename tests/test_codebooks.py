"""snac48/codebooks.py: the full codec in training, and one from nothing."""

import json
import math

import torch
from conftest import TINY, make_snac, run
from helpers.training import metrics, raw, recipe_training

from snac48.codebooks import (
    PITCH_HZ,
    features,
    fit_quantizers,
    fundamental,
    restart_dead_entries,
    usage,
    voice_features,
)
from snac48.codec import load_snac, new_snac
from snac48.decoder import load_dual_head
from snac48.training import some_speech


def test_a_codec_from_scratch_uses_its_codebooks(speech_48k, tmp_path):
    config = tmp_path / "codec.json"
    config.write_text(json.dumps(TINY | {"codebook_size": 16, "encoder_dim": 8}))
    t = recipe_training(
        "phase10", "none", tmp_path / "run", *raw(speech_48k), "--no-freeze_encoder", "--no-freeze_vq",
        "--from_scratch", config, "--feature_epochs", 24, "--epochs", 30, "--epoch_ranges", "1-30",
        "--segment_schedule", "0.4", "--batch_multiplier", "1.0", "--lr", 4e-3, "--val_limit", 2,
        "--main_lr", 3e-4, "--save_every", 30,
    )  # fmt: skip
    gains = [v.abs().max() for k, v in t.state.model.state_dict().items() if k.endswith("original0")]
    assert max(gains) < 300  # a channel without input is not blown up
    assert t.train() == 0
    found = metrics(tmp_path / "run", "usage")
    assert len(found) == 6
    for k in range(3):
        last = [f[f"usage_{k}"] for f in found[-3:]]  # of 16 entries a few come and go
        assert sum(last) / 3 > 0.45 and found[-1][f"perplexity_{k}"] > 4
    vals = metrics(tmp_path / "run", "val")
    assert vals[-1]["loss"] < 0.8 * vals[0]["loss"] and vals[1]["best"] == [] and any(v["best"] for v in vals)
    # without the start that makes it possible, most entries are never used
    torch.manual_seed(0)
    fresh, speech = new_snac(str(config)), some_speech(t.run, 40)
    plain = [usage(torch.bincount(c.flatten(), minlength=16))["usage"] for c in fresh.encode(speech)]
    assert min(plain) < 0.3
    # the result is a SNAC folder, and codes come out of it as out of the checkpoint
    best = tmp_path / "run" / "best_model.pt"
    run("infer.py", "--checkpoint", best, "--export", tmp_path / "codec", "--half")
    again, mine = load_snac(str(tmp_path / "codec")), load_dual_head(best)
    codes = again.encode(speech)
    same = [float((a == b).double().mean()) for a, b in zip(codes, mine.encode(speech))]
    assert min(same) > 0.9  # float16 weights flip few codes
    assert mine.decode(codes)[0].abs().max() > 1e-3


def test_dead_entries_restart_and_used_ones_stay(snac):
    vq = snac.quantizer.quantizers[0]
    before = vq.codebook.weight.clone()
    optimizer = torch.optim.AdamW([vq.codebook.weight])
    optimizer.state[vq.codebook.weight] = {"exp_avg": torch.ones_like(before)}
    counts = torch.ones(64, dtype=torch.int64)
    counts[[3, 60]] = 0
    n = restart_dead_entries(vq, counts, torch.randn(2, 4, 30), optimizer, torch.Generator().manual_seed(0))
    moved = (vq.codebook.weight != before).any(1)
    assert n == 2 and moved.nonzero()[:, 0].tolist() == [3, 60]
    assert (optimizer.state[vq.codebook.weight]["exp_avg"][moved] == 0).all()
    vq.codebook.weight.data.copy_(before)


def test_latents_from_features_hold_pitch_and_phase_of_a_voice():
    """A buzz of many harmonics: the features name its pitch, their wave is its fundamental."""
    n, frames, samples = 23552, 46, 16
    t = torch.arange(n) / 24000
    for hz, start in ((80.0, 0.0), (125.0, 1.0), (210.0, 2.0), (370.0, -1.0)):
        phase = 2 * torch.pi * hz * t + start
        buzz = phase.cos() + sum(torch.cos(k * phase + k * k) / k for k in range(2, 12))
        voiced, found, _ = fundamental(0.1 * buzz[None], frames)
        assert (voiced[:, 3:-3] == 1).all() and (found[:, 3:-3] / hz - 1).abs().max() < 0.01
        wave, height = voice_features(0.1 * buzz[None], frames, samples)[0].split([samples, 5])
        middle = (torch.arange(frames * samples) + 0.5) * 512 / samples / 24000
        wanted = 1.5 * torch.cos(2 * torch.pi * hz * middle + start).view(frames, samples).T
        assert (wave - wanted)[:, 3:-3].abs().max() < 0.35  # lags are whole samples
        a = math.log(hz / PITCH_HZ[0]) / math.log(PITCH_HZ[1] / PITCH_HZ[0]) * torch.pi
        wanted = 3 * torch.tensor([1.0, math.cos(a), math.sin(a), math.cos(2 * a), math.sin(2 * a)])
        assert (height[:, 3:-3] - wanted[:, None]).abs().max() < 0.15
    torch.manual_seed(0)
    assert fundamental(0.1 * torch.randn(1, n), frames)[0].mean() < 0.05
    assert not voice_features(torch.zeros(1, n), frames, samples).any()
    audio = 0.1 * buzz.expand(2, 1, n)
    mels = features(audio, 192, 46)
    both = features(audio, 192, 46, samples)
    assert torch.equal(both[:, :80], mels[:, :80]) and both[:, 80:101].any() and not both[:, 101:].any()
    assert both.shape == mels.shape == (2, 192, 46)


def test_quantizers_fitted_to_features_keep_the_phase_of_a_voice():
    """Through 64 entries a codebook: little of the power of the fundamental is lost."""
    t = torch.arange(23552) / 24000
    torch.manual_seed(0)
    phase = 2 * torch.pi * ((110 + 40 * torch.rand(32, 1)) * t + torch.rand(32, 1))
    voices = 0.1 * sum(torch.cos(k * phase + k * k) / k for k in range(1, 8))[:, None]
    snac = make_snac(codebook_size=64, codebook_dim=16, encoder_dim=8)
    z = features(voices, 128, 46, 16)[..., :44]
    fit_quantizers(snac.quantizer, z, 0)
    with torch.no_grad():
        lost = (snac.quantizer(z)[0] - z)[:, 80:96].square().mean() / z[:, 80:96].square().mean()
    assert lost < 0.3
