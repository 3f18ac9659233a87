"""snac48/codebooks.py: the full codec in training, and one from nothing."""

import json

import torch
from conftest import TINY, run
from helpers.training import metrics, raw, recipe_training

from snac48.codebooks import PITCH_HZ, features, periodicity, restart_dead_entries, usage
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


def test_periodicity_tells_the_pitch_of_a_voice_and_silence_and_noise_from_it():
    """A buzz of many harmonics: the largest channel is that of its period; noise and silence have none."""
    n, frames, channels = 24000, 46, 40
    t = torch.arange(n) / 24000
    for hz in (80.0, 125.0, 210.0, 380.0):
        buzz = sum(torch.cos(2 * torch.pi * hz * k * t + k * k) / k for k in range(1, 12))[None]
        found = periodicity(0.1 * buzz, frames, channels)[0, :, 3:-3]
        assert found.shape == (channels, frames - 6)
        low, high = (24000 / f for f in (PITCH_HZ[1], PITCH_HZ[0]))
        wanted = (
            channels * torch.log(torch.tensor(24000 / hz / low)) / torch.log(torch.tensor((high + 1) / low))
        )
        first = (found > 0.9).float().argmax(0)  # multiples of the period repeat, too: the first is the pitch
        assert ((first - int(wanted)).abs() <= 1).all() and found.max() < 1.01
    torch.manual_seed(0)
    assert periodicity(0.1 * torch.randn(1, n), frames, channels).amax() < 0.4
    assert periodicity(torch.zeros(1, n), frames, channels).abs().amax() == 0
    audio = torch.randn(2, 1, 23552)
    mels = features(audio, 192, 46)
    both = features(audio, 192, 46, 40)
    assert torch.equal(both[:, :80], mels[:, :80]) and both[:, 80:120].any() and not both[:, 120:].any()
    assert both.shape == mels.shape == (2, 192, 46)
