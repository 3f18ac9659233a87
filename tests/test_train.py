"""The model, the losses, the schedule, the data, and whole tiny training runs."""

import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from conftest import ROOT, make_snac, one_sentence, run, save_snac, voice

import train_dual_head as T
from snac48.audio import read_audio, resample
from snac48.checkpoint import load_checkpoint
from snac48.cli import UserError
from snac48.codec import model_config, slice_at
from snac48.data import CachedCodesDataset, collate
from snac48.decoder import DualHeadDecoder, counter_noise
from snac48.losses import halve_rate, head_losses, lsd, stft_loss

INITS = ("interpolate", "average", "first", "random")


def tiny_args(cache_dir, targets_dir, snac_dir, out, *more):
    """Options of a run of a few steps: warmup 1 epoch, then 2 with a curriculum."""
    argv = ["--cache_dir", cache_dir, "--val_cache_dir", cache_dir, "--audio_48k_dir", targets_dir,
            "--val_audio_48k_dir", targets_dir, "--pretrained_model", snac_dir, "--output_dir", out,
            "--device", "cpu", "--epochs", 3, "--epoch_ranges", "1-1,2-3", "--segment_schedule", "0.3,0.5",
            "--batch_multiplier", "2.0,1.0", "--batch_size", 4, "--val_segment", 0.5, "--val_limit", 4,
            "--num_workers", 0, "--log_every", 1, "--main_lr", 1e-3,
            "--lr_24k_final_conv", 2e-4, *more]  # fmt: skip
    return [str(a) for a in argv]


def trainer(*argv):
    return T.Trainer(T.parse_args(tiny_args(*argv))[0])


# ---- model ----


def test_at_initialisation_24k_equals_snac_decode_and_48k_is_twice_as_long(snac_dir):
    from snac import SNAC

    snac = SNAC.from_pretrained(str(snac_dir))
    codes = [torch.randint(64, (2, 6 * f)) for f in (1, 2, 4)]
    torch.manual_seed(1)
    expected = snac.decode(codes)
    for init in INITS:
        model = DualHeadDecoder(SNAC.from_pretrained(str(snac_dir)), init)
        torch.manual_seed(1)
        audio_24k, audio_48k = model(codes)
        assert torch.equal(audio_24k, expected)
        assert audio_48k.shape == (2, 1, 2 * audio_24k.shape[-1])
        assert model(codes, output_24k=False)[0] is None and model(codes, output_48k=False)[1] is None


def test_every_init_really_sets_the_weight_normed_layers(snac_dir):
    """Copying into `.weight` of a parametrized layer has no effect: compare what the layers compute with."""
    from snac import SNAC

    for init in ("first", "average"):
        model = DualHeadDecoder(SNAC.from_pretrained(str(snac_dir)), init)
        source, mine = model.trunk[-1].block[1].weight, model.head_48k[0].block[1].weight
        c = mine.shape[0]
        expected = source[:c] if init == "first" else (source[0::2] + source[1::2]) / 2
        assert torch.allclose(mine, expected, atol=1e-6)
        assert torch.allclose(model.head_48k[2].weight, model.head_24k[1].weight, atol=1e-6)
    model = DualHeadDecoder(SNAC.from_pretrained(str(snac_dir)), "interpolate")
    codes = [torch.randint(64, (1, 6 * f)) for f in (1, 2, 4)]
    audio_24k, audio_48k = model(codes)
    low = [torch.fft.rfft(x[0, 0])[:3000] for x in (audio_24k, audio_48k)]  # below 6 kHz
    alike = (low[0] * low[1].conj()).sum().abs() / (low[0].norm() * low[1].norm())
    assert alike > 0.99 and 1.9 < low[1].norm() / low[0].norm() < 2.2  # twice the samples, the same sound
    assert audio_24k.std() > 1e-3  # silence would satisfy the line above too


def test_a_44_khz_model_and_an_odd_last_stride_are_refused_with_the_reason():
    with pytest.raises(UserError, match="44100 Hz"):
        DualHeadDecoder(make_snac(sampling_rate=44100))
    odd = {"encoder_rates": [3, 3, 7, 7], "decoder_rates": [7, 7, 3, 3], "vq_strides": [8, 4, 2, 1]}
    with pytest.raises(UserError, match="stride 2 but has 3"):
        DualHeadDecoder(make_snac(encoder_rates=[3, 8], decoder_rates=[8, 3], vq_strides=[2, 1]), "average")
    odd = make_snac(encoder_rates=[3, 3, 7, 7], decoder_rates=[7, 7, 3, 3], vq_strides=[8, 4, 2, 1])
    codes = [torch.zeros(1, 4 * f, dtype=torch.long) for f in (1, 2, 4, 8)]
    assert DualHeadDecoder(odd, "interpolate")(codes)[1].shape[-1] == 2 * 4 * 8 * 441


def test_noise_is_a_function_of_key_layer_and_position():
    key = torch.tensor([1, 2**61 + 3])
    n = counter_noise(key, 2, 0, 100000)
    assert torch.equal(counter_noise(key, 2, 7000, 50), n[:, 7000:7050])
    assert abs(n.mean()) < 0.01 and abs(n.std() - 1) < 0.01 and 4 < n.abs().max() < 7
    other = counter_noise(key, 3, 0, 100000)
    for a, b in ((n[0], n[1]), (n[0], other[0]), (n[0, 1:], n[0, :-1])):
        assert abs(float((a * b).mean())) < 0.02


def test_codes_past_the_end_do_not_change_what_lies_before(snac):
    model = DualHeadDecoder(make_snac(), "random").eval()
    codes = [torch.randint(64, (1, 8 * f)) for f in (1, 2, 4)]
    padded = [torch.cat([c, torch.full((1, 5 * f), -1)], 1) for c, f in zip(codes, (1, 2, 4))]
    key = torch.tensor([5])
    model.set_noise(key)
    a, b = model(codes), model(padded)
    n = 4 * 2048  # away from the end, whose neighbours are biases instead of padding
    assert torch.allclose(a[0][..., :n], b[0][..., :n], atol=1e-6)
    zero = [torch.cat([c, torch.zeros(1, 5 * f, dtype=torch.long)], 1) for c, f in zip(codes, (1, 2, 4))]
    assert not torch.allclose(
        model(zero)[0][..., : 8 * 2048], b[0][..., : 8 * 2048], atol=1e-4
    )  # 0 is a real code


# ---- losses ----


def batch_of(n=8192, valid=None, phase_true=True):
    x = torch.from_numpy(voice(2 * n / 48000 + 0.1, 48000, 3)[: 2 * n])[None, None]
    valid = torch.tensor([valid or n])
    keep = torch.arange(2 * n) < 2 * valid
    x = x * keep
    return {"audio_48k": x, "audio_24k": halve_rate(x[:, 0])[:, None] * (torch.arange(n) < valid),
            "valid_24k": valid, "phase_true": torch.tensor([phase_true])}  # fmt: skip


def options(**changes):
    return T.argparse.Namespace(**(T.DEFAULTS | changes))


def test_losses_are_zero_at_the_target_and_ignore_what_lies_past_the_end():
    batch = batch_of(valid=5000)
    junk = torch.cat([batch["audio_48k"][..., :10000], torch.ones(1, 1, 6384)], -1)
    for x in (batch["audio_48k"], junk):
        found = head_losses(None, x, batch, options())
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
    found = head_losses(None, batch["audio_48k"] + high, batch, options())
    assert found["l1_48k"] < 1e-3  # 17 kHz is not judged by waveform
    batch["phase_true"][:] = True
    assert head_losses(None, batch["audio_48k"] + high, batch, options())["l1_48k"] > 0.05


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


# ---- schedule ----


def test_phase12_is_the_documented_curriculum():
    args = options()
    plan = T.make_plan(args, 9600)
    assert [(e.segment, e.batch) for e in plan] == [(1.0, 192)] * 2 + [(2.0, 96)] * 2 + [(3.0, 57)] * 2 + [
        (4.0, 43)
    ] * 9
    assert [e.phase for e in plan] == ["warmup"] + ["main"] * 14
    assert [e.steps for e in plan[:7]] == [50, 50, 100, 100, 169, 169, 224]


def test_rates_follow_one_cycle_over_the_whole_main_phase_and_keep_their_ratio():
    args = options()
    plan = T.make_plan(args, 960)
    warm = plan[0].steps
    total = plan[-1].first_step + plan[-1].steps - warm
    parameter = torch.nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD([parameter], lr=1.0)
    reference = torch.optim.lr_scheduler.OneCycleLR(optimizer, 5e-5, total_steps=total)
    assert all(T.rates_at(args, plan, s) == {"head_48k": 2e-4} for s in range(warm))
    for step in range(total):
        rates = T.rates_at(args, plan, warm + step)
        assert math.isclose(rates["trunk"], optimizer.param_groups[0]["lr"], rel_tol=1e-9, abs_tol=1e-15)
        assert rates["head_48k"] == rates["trunk"] and math.isclose(rates["head_24k"], rates["trunk"] / 5)
        optimizer.step()
        if step < total - 1:
            reference.step()


def test_every_row_once_an_epoch_whatever_ranks_and_micro_batches():
    order = T.epoch_order(42, 3, 101)
    assert not np.array_equal(order, T.epoch_order(42, 4, 101)) and np.array_equal(
        order, T.epoch_order(42, 3, 101)
    )
    epoch = T.Epoch(3, "main", 1.0, 8, 100, 13)
    for world, accum in ((1, 1), (2, 1), (3, 2), (1, 4)):
        lists = [T.batches(order, epoch, 100, r, world, accum) for r in range(world)]
        assert all(len(x) == 13 * accum for x in lists)
        seen = [i for x in lists for part in x for i in part if i >= 0]
        assert sorted(seen) == list(range(101))
        resumed = [
            i
            for r in range(world)
            for p in T.batches(order, epoch, 105, r, world, accum)
            for i in p
            if i >= 0
        ]
        assert sorted(resumed) == sorted(order[40:])


# ---- options ----


def test_config_keys_comments_and_precedence(tmp_path):
    config = tmp_path / "c.json"
    config.write_text("""{ // comment with "quotes"
      "num_epochs": 4, "learning_rate": 3e-5, "description": "http://not a comment",
      "curriculum": [{"epochs": [1, 2], "length": 1.5, "batch_multiplier": 2},
                     {"epochs": [3, 4], "length": 2.5, "batch_multiplier": 0.5}]}""")
    needed = ["--cache_dir", "a", "--val_cache_dir", "b", "--audio_48k_dir", "c", "--val_audio_48k_dir", "d"]
    args, origin = T.parse_args([*needed, "--config", str(config), "--main_lr", "7e-5"])
    assert (args.epochs, args.main_lr, args.batch_size) == (4, 7e-5, 96)
    assert (origin["epochs"], origin["main_lr"], origin["batch_size"]) == ("config", "flag", "default")
    assert T.curriculum(args) == [(1.5, 192), (1.5, 192), (2.5, 48), (2.5, 48)]


@pytest.mark.parametrize(
    "text, words",
    [
        ('{"stft_wieght": 1}', "did you mean 'stft_weight'"),
        ('{"num_epoch": 1}', "did you mean 'num_epochs'"),
        ('{"batch_size": "many"}', "must be int"),
        ('{"epochs": 3,}', "is not JSON"),
    ],
)
def test_bad_configs_are_named(text, words, tmp_path):
    (tmp_path / "c.json").write_text(text)
    assert words in one_sentence(run("train_dual_head.py", "--config", tmp_path / "c.json", code=1))


def test_help_needs_no_torch_and_a_misspelt_flag_is_an_error():
    code = """
import runpy, sys
sys.argv = ["train_dual_head.py", "--help"]
try:
    runpy.run_path("train_dual_head.py", run_name="__main__")
except SystemExit:
    assert "torch" not in sys.modules
else:
    raise AssertionError("--help did not exit")
"""
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
    run("train_dual_head.py", "--stft_wieght", "2", code=2)


def test_an_epoch_outside_the_ranges_is_an_error():
    with pytest.raises(UserError, match="epoch 16 is in 0"):
        T.curriculum(options(epochs=16))
    with pytest.raises(UserError, match="equally many"):
        T.curriculum(options(batch_multiplier="1.0"))


# ---- data ----


def test_items_hold_codes_and_audio_of_exactly_matching_place_and_length(
    cache_dir, targets_dir, audio_dir, snac
):
    data = CachedCodesDataset(cache_dir, targets_dir, 0.5)
    data.set_epoch(3)
    assert len(data) == 14 and data.coarse_len == 5
    for i in range(14):
        item = data[i]
        at = slice_at(item["start_pos"], 5, 512, (4, 2, 1))
        assert [len(c) for c in item["codes"]] == [5, 10, 20]
        assert len(item["audio_24k"]) == 5 * 2048 and len(item["audio_48k"]) == 10 * 2048
        x, rate = read_audio(audio_dir / item["file_path"])
        codes = snac.encode(torch.from_numpy(resample(x, rate, 24000))[None, None])
        for k in range(3):
            a = at["scale_start"][k]
            assert torch.equal(item["codes"][k], codes[k][0, a : a + at["scale_len"][k]])
        for audio, r, f in ((item["audio_24k"], 24000, 1), (item["audio_48k"], 48000, 2)):
            whole = resample(x, rate, r)[f * at["start_sample_24k"] :][: f * item["valid_24k"]]
            assert np.abs(audio.numpy()[: len(whole)] - whole).max() < 3e-3  # mp3/ogg sources clip at 16 bits


def test_crops_change_with_the_epoch_and_validation_crops_never_do(cache_dir, targets_dir):
    starts = lambda d, e: (d.set_epoch(e), [d[i]["start_pos"] for i in range(14)])[1]
    train, val = (CachedCodesDataset(cache_dir, targets_dir, 0.3, fixed=f) for f in (False, True))
    assert starts(train, 1) == starts(train, 1) != starts(train, 2)
    assert starts(val, 1) == starts(val, 2)


def test_a_short_utterance_is_masked_not_padded_with_a_real_code(cache_dir, targets_dir):
    item = CachedCodesDataset(cache_dir, targets_dir, 4.0)[0]  # 1.0 s long
    assert (item["codes"][0] == -1).sum() > 20 and item["valid_24k"] == 24000
    assert not item["audio_48k"][48000:].any() and item["audio_48k"][:48000].any()


def test_a_48k_folder_that_lacks_files_says_how_many_and_which_first(cache_dir, targets_dir, tmp_path):
    targets = shutil.copytree(targets_dir, tmp_path / "t")
    rows = [json.loads(line) for line in open(targets / "manifest.jsonl")]
    kept = [r for r in rows if "utt03" not in r["path"]]
    (targets / "manifest.jsonl").write_text("".join(json.dumps(r) + "\n" for r in kept))
    (targets / "a" / "utt00.wav").unlink()  # in the manifest, not on the disk
    with pytest.raises(UserError, match=r"lacks 2 of 14 files, first a/utt00.wav"):
        CachedCodesDataset(cache_dir, targets, 1.0)
    data = CachedCodesDataset(cache_dir, targets, 1.0, max_bad_fraction=0.5)
    assert len(data) == 12 and data.left_out == {"no 48 kHz target": 2}


def test_unfaithful_rows_are_left_out_and_counted(cache_dir, targets_dir, tmp_path):
    rows = [json.loads(line) for line in open(targets_dir / "manifest.jsonl")]
    rows[4]["faithful"] = False
    shutil.copytree(targets_dir, tmp_path / "t")
    (tmp_path / "t" / "manifest.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    data = CachedCodesDataset(cache_dir, tmp_path / "t", 1.0)
    assert len(data) == 13 and data.left_out == {"unfaithful 48 kHz target": 1}
    assert len(CachedCodesDataset(cache_dir, tmp_path / "t", 1.0, include_unfaithful=True)) == 14


def test_a_vanished_target_is_an_error_item_not_silence(cache_dir, targets_dir, tmp_path):
    data = CachedCodesDataset(cache_dir, shutil.copytree(targets_dir, tmp_path / "t"), 0.5)
    (tmp_path / "t" / "a" / "utt02.wav").unlink()
    item = data[2]
    assert item["error"] == "file not found" and item["valid_24k"] == 0
    batch = collate([item])
    assert batch["bad"] == [("a/utt02.ogg", "file not found")]
    found = head_losses(torch.ones(1, 1, 5 * 2048), torch.ones(1, 1, 10 * 2048), batch, options())
    assert all(float(v) == 0 for v in found.values())


# ---- whole runs ----


def test_a_run_trains_in_two_phases_and_writes_what_it_promises(cache_dir, targets_dir, snac_dir, tmp_path):
    t = trainer(cache_dir, targets_dir, snac_dir, tmp_path / "run", "--ema", 0.5)
    start = {k: v.clone() for k, v in t.model.state_dict().items()}
    steps = {}
    original = t.train_step

    def watch(*a):
        out = original(*a)
        steps[t.step] = {k: v.clone() for k, v in t.model.state_dict().items()}
        return out

    t.train_step = watch
    assert t.train() == 0
    assert sorted(steps) == list(range(2 + 4 + 4))
    for k, v in steps[1].items():  # warmup: two steps
        assert torch.equal(v, start[k]) == (not k.startswith("head_48k")), k
    frozen = [k for k, v in steps[9].items() if torch.equal(v, start[k])]
    assert all(k.startswith("quantizer") for k in frozen) and len(frozen) > 0  # main: everything else moves
    rows = [json.loads(line) for line in open(tmp_path / "run" / "metrics.jsonl")]
    logged = [r for r in rows if "event" not in r]
    assert [r["step"] for r in logged] == list(range(1, 11))
    assert [r["phase"] for r in logged] == ["warmup"] * 2 + ["main"] * 8
    assert all(math.isclose(r["lr_head_24k"], r["lr_trunk"] / 5) for r in logged[2:])
    vals = [r for r in rows if r.get("event") == "val"]
    assert [v["epoch"] for v in vals] == [0, 1, 2, 3]
    assert {"l1_24k", "stft_24k", "l1_48k", "stft_48k", "lsd_48k", "lsd_12_24k"} <= set(vals[0])
    assert vals[-1]["loss_48k"] < vals[0]["loss_48k"]
    assert rows[-1]["event"] == "end" and rows[-1]["reason"] == "finished"
    names = {p.name for p in (tmp_path / "run").glob("*.pt")}
    assert {"best_model.pt", "best_model_24k.pt", "best_model_48k.pt", "checkpoint_epoch3.pt"} <= names
    state = load_checkpoint(tmp_path / "run" / "checkpoint_epoch3.pt")
    promised = (
        "model optimizer scheduler epoch global_step phase segment_length args geometry rng best versions"
    )
    assert set(promised.split()) <= set(state)
    best = min(v["loss"] for v in vals)
    assert math.isclose(load_checkpoint(tmp_path / "run" / "best_model.pt")["best"]["loss"], best)


def same_state(a, b):
    a, b = (load_checkpoint(p) for p in (a, b))
    assert a["global_step"] == b["global_step"] and a["best"] == b["best"]
    for k in a["model"]:
        assert torch.equal(a["model"][k], b["model"][k]), k
    for i, s in a["optimizer"]["state"].items():
        assert all(torch.equal(s[k], b["optimizer"]["state"][i][k]) for k in s)
    for k in a["ema"] or {}:
        assert torch.equal(a["ema"][k], b["ema"][k])


@pytest.mark.parametrize("stop_at", [1, 2, 5, 6, 9])
def test_resume_continues_as_if_never_stopped(
    stop_at, cache_dir, targets_dir, snac_dir, tmp_path_factory, unbroken
):
    """Stopped in the warmup, at its end, in the main phase, at an epoch's end: the same losses and the
    same bits."""
    out = tmp_path_factory.mktemp("run")
    t = trainer(cache_dir, targets_dir, snac_dir, out, "--ema", 0.9)
    original = t.train_step

    def stop(*a):
        if t.step == stop_at - 1:
            t.stop.signal = "SIGTERM"
        return original(*a)

    t.train_step = stop
    assert t.train() == 3
    assert load_checkpoint(T.find_resume("auto", str(out)))["global_step"] == stop_at
    again = T.Trainer(
        T.parse_args(["--resume", "auto", "--output_dir", str(out)])[0]
    )  # flags come from the checkpoint
    assert again.step == stop_at and again.train() == 0
    same_state(out / "checkpoint_epoch3.pt", unbroken / "checkpoint_epoch3.pt")
    lines = lambda d: [json.loads(line) for line in open(d / "metrics.jsonl")]
    losses = [{r["step"]: r["loss_48k"] for r in lines(d) if "event" not in r} for d in (out, unbroken)]
    assert losses[0] == losses[1]


@pytest.fixture(scope="module")
def unbroken(cache_dir, targets_dir, snac_dir, tmp_path_factory):
    out = tmp_path_factory.mktemp("unbroken")
    assert trainer(cache_dir, targets_dir, snac_dir, out, "--ema", 0.9).train() == 0
    return out


def test_micro_batches_give_the_same_weights(cache_dir, targets_dir, snac_dir, tmp_path, unbroken):
    assert (
        trainer(cache_dir, targets_dir, snac_dir, tmp_path / "r", "--ema", 0.9, "--accum_steps", 2).train()
        == 0
    )
    a, b = (load_checkpoint(p / "checkpoint_epoch3.pt")["model"] for p in (tmp_path / "r", unbroken))
    assert all(torch.allclose(a[k], b[k], atol=2e-4) for k in a)


def test_a_nan_step_is_skipped_and_many_end_the_run(cache_dir, targets_dir, snac_dir, tmp_path, monkeypatch):
    monkeypatch.setattr(T, "head_losses", lambda *a: {k: v * math.nan for k, v in head_losses(*a).items()})
    t = trainer(cache_dir, targets_dir, snac_dir, tmp_path / "run", "--batch_size", 1)
    before = {k: v.clone() for k, v in t.model.state_dict().items()}
    assert t.train() == 4 and t.skipped == 20
    assert all(torch.equal(v, before[k]) for k, v in t.model.state_dict().items())


def test_the_outlier_guard_survives_nan_and_accepts_a_lasting_change():
    skipped, usual = [], None
    for value in [1.0] * 50 + [math.nan, 1.0, 80.0, 1.0, math.inf, 1.0] + [500.0] * 10:
        skip, usual = T.judge_norm(value, usual, 50.0)
        skipped.append(skip)
    assert not any(skipped[:50])
    assert skipped[50:56] == [True, False, True, False, True, False]
    assert skipped[56] and not any(skipped[60:])  # 500 is the new scale
    assert T.judge_norm(1e9, 1.0, -1)[0] is False and T.judge_norm(math.nan, 1.0, -1)[0] is True


def test_a_run_is_never_overwritten(cache_dir, targets_dir, snac_dir, tmp_path):
    flags = cache_dir, targets_dir, snac_dir, tmp_path / "run", "--epochs", 1, "--epoch_ranges", "1-1"
    flags = *flags, "--segment_schedule", "0.3", "--batch_multiplier", "1.0", "--warmup_epochs", 0
    assert trainer(*flags).train() == 0
    before = {p.name: p.read_bytes() for p in (tmp_path / "run").iterdir()}
    with pytest.raises(UserError, match=r"checkpoint_epoch1.pt would be overwritten: .*--resume auto"):
        trainer(*flags)
    (tmp_path / "run" / "checkpoint_epoch1.pt").write_bytes(b"half of it")
    with pytest.raises(UserError, match=r"checkpoint_epoch1.pt is damaged"):
        trainer(*flags, "--resume", "auto")
    before["checkpoint_epoch1.pt"] = b"half of it"
    assert {p.name: p.read_bytes() for p in (tmp_path / "run").iterdir()} == before


def test_an_unknown_flag_names_the_nearest():
    done = run("train_dual_head.py", "--batchsize", 3, "--nothing_like_it", code=2)
    assert done.stderr.count("\n") == 1 and "--batchsize: did you mean --batch_size?" in done.stderr


def test_mistakes_get_one_sentence(cache_dir, targets_dir, snac_dir, unbroken, tmp_path):
    base = tiny_args(cache_dir, targets_dir, snac_dir, tmp_path / "run")
    other = save_snac(make_snac(9), tmp_path / "other")
    (tmp_path / "void").mkdir()
    (tmp_path / "broken.pt").write_bytes((unbroken / "checkpoint_epoch3.pt").read_bytes()[:-100])
    for extra, words in [
        (["--device", "7"], "GPU 7 isn't there"),
        (["--pretrained_model", other], "made by another model"),
        (["--cache_dir", tmp_path / "void"], "holds no codes_batch"),
        (["--cache_dir", tmp_path / "nowhere"], "does not exist"),
        (["--audio_48k_dir", tmp_path / "nowhere"], "48 kHz folder"),
        (["--audio_48k_dir", tmp_path / "void"], "no audio file"),
        (["--resume", tmp_path / "broken.pt"], "damaged"),
        (["--resume", tmp_path / "none.pt"], "does not exist"),
        (["--resume", unbroken / "checkpoint_epoch3.pt", "--batch_size", 3], "another schedule"),
        (["--resume", unbroken / "checkpoint_epoch3.pt", "--pretrained_model", other], "another model"),
    ]:
        assert words in one_sentence(run("train_dual_head.py", *base, *extra, code=1)), extra
    assert not (tmp_path / "run").exists()


def test_a_pickle_that_would_run_code_is_refused(tmp_path):
    class Bad:
        def __reduce__(self):
            return (open, (str(tmp_path / "owned"), "w"))

    torch.save({"model": Bad()}, tmp_path / "bad.pt")
    with pytest.raises(UserError, match="refused"):
        load_checkpoint(tmp_path / "bad.pt")
    assert not (tmp_path / "owned").exists()


def test_the_recorded_model_config_rebuilds_the_model(snac):
    from snac import SNAC

    assert {k: v.shape for k, v in SNAC(**model_config(snac)).state_dict().items()} == {
        k: v.shape for k, v in snac.state_dict().items()
    }


def test_a_target_that_was_scaled_to_fit_16_bits_comes_back_at_its_level(cache_dir, targets_dir, tmp_path):
    import soundfile as sf

    shutil.copytree(targets_dir, tmp_path / "t")
    rows = [json.loads(line) for line in open(targets_dir / "manifest.jsonl")]
    x, _ = sf.read(tmp_path / "t" / rows[0]["target"])
    sf.write(tmp_path / "t" / rows[0]["target"], x * 0.5, 48000, subtype="PCM_16")
    rows[0]["level"] = 0.5
    (tmp_path / "t" / "manifest.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    a, b = (CachedCodesDataset(cache_dir, d, 0.5)[0] for d in (targets_dir, tmp_path / "t"))
    assert torch.allclose(a["audio_48k"], b["audio_48k"], atol=1e-4)
    assert torch.allclose(a["audio_24k"], b["audio_24k"], atol=1e-4) and a["audio_24k"].abs().max() > 0.05


def test_two_processes_train_as_one(cache_dir, targets_dir, snac_dir, tmp_path, unbroken):
    """torchrun with two processes (gloo): the same batches, so the same losses as one process."""
    argv = tiny_args(cache_dir, targets_dir, snac_dir, tmp_path / "two", "--ema", 0.9)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    done = subprocess.run([*command, str(ROOT / "train_dual_head.py"), *argv], capture_output=True, text=True,
                          timeout=300)  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    lines = lambda d: [json.loads(line) for line in open(d / "metrics.jsonl")]
    one, two = (
        {r["step"]: r["loss_48k"] for r in lines(d) if "event" not in r} for d in (unbroken, tmp_path / "two")
    )
    assert one.keys() == two.keys() and all(math.isclose(one[s], two[s], rel_tol=1e-4) for s in one)
    val = [
        [r["lsd_12_24k"] for r in lines(d) if r.get("event") == "val"] for d in (unbroken, tmp_path / "two")
    ]
    assert np.allclose(*val, rtol=1e-3)


def test_a_signal_to_the_whole_group_stops_with_a_checkpoint(cache_dir, targets_dir, snac_dir, tmp_path):
    """launch.sh stop signals the process group, data loader workers included."""
    out = tmp_path / "run"
    argv = tiny_args(cache_dir, targets_dir, snac_dir, out, "--num_workers", 1, "--epochs", 100,
                     "--epoch_ranges", "1-1,2-100")  # fmt: skip
    job = subprocess.Popen([sys.executable, str(ROOT / "train_dual_head.py"), *argv], start_new_session=True,
                           stdout=subprocess.DEVNULL)  # fmt: skip
    deadline = time.time() + 120
    metrics = out / "metrics.jsonl"
    while time.time() < deadline and not (metrics.exists() and '"step": 4' in metrics.read_text()):
        time.sleep(0.05)
    os.killpg(job.pid, signal.SIGTERM)
    assert job.wait(timeout=30) == 3
    last = json.loads(open(out / "metrics.jsonl").readlines()[-1])
    assert (last["event"], last["reason"]) == ("end", "stopped")
    assert load_checkpoint(T.find_resume("auto", str(out)))["global_step"] == last["step"] >= 4
