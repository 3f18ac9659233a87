"""Recipes phase10, phase11 (three ways) and phase12: schedules, the raw-audio path, full codecs, from
scratch."""

import json
import math

import numpy as np
import pytest
import soundfile as sf
import torch
from conftest import TINY, one_sentence, run, voice

import train_dual_head as T
from snac48.checkpoint import load_checkpoint
from snac48.cli import UserError


@pytest.fixture(scope="session")
def speech_48k(tmp_path_factory):
    """12 recordings at 48 kHz, 16 bit, of 0.6 to 2.1 s: what cache and raw audio read the same."""
    root = tmp_path_factory.mktemp("speech48")
    for i in range(12):
        sf.write(root / f"utt{i:02d}.wav", voice(0.6 + 0.14 * i, 48000, i), 48000)
    return root


@pytest.fixture(scope="session")
def codes_48k(speech_48k, snac_dir, tmp_path_factory):
    out = tmp_path_factory.mktemp("codes48")
    run(
        "cache_codes.py",
        "--data_dir",
        speech_48k,
        "--output_dir",
        out,
        "--pretrained_model",
        snac_dir,
        "--device",
        "cpu",
        "--num_workers",
        0,
        "--min_seconds",
        0.1,
    )
    return out


def tiny(recipe, snac_dir, out, *more):
    argv = [
        "--recipe",
        recipe,
        "--pretrained_model",
        snac_dir,
        "--output_dir",
        out,
        "--device",
        "cpu",
        "--batch_size",
        4,
        "--val_segment",
        0.5,
        "--val_limit",
        4,
        "--num_workers",
        0,
        "--log_every",
        1,
        "--epochs",
        2,
        "--epoch_ranges",
        "1-1,2-2",
        "--segment_schedule",
        "0.3,0.5",
        "--batch_multiplier",
        "1.0,1.0",
        "--n_ffts",
        "512,1024",
        *more,
    ]
    return [str(a) for a in argv]


def raw(folder, *more):
    return ["--data_dir", folder, "--val_data_dir", folder, *more]


def cached(cache, folder):
    return [
        "--cache_dir",
        cache,
        "--val_cache_dir",
        cache,
        "--audio_48k_dir",
        folder,
        "--val_audio_48k_dir",
        folder,
    ]


def train(*argv):
    return T.Trainer(T.parse_args(tiny(*argv))[0])


def metrics(folder, event=None):
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [m for m in lines if m.get("event") == event]


# ---- schedules: SPEC's table, line by line ----

MAIN = {
    "phase10": 1.5e-5,
    "phase11-standard": 1e-5,
    "phase11-warmup": 1e-5,
    "phase11-fast": 1e-4,
    "phase12": 5e-5,
}
GROWING = [1, 1, 2, 2, 3, 3] + [4] * 9
TABLE = {  # recipe: (segments, batches, warmup epochs, warmup rate, groups of the main phase)
    "phase10": (GROWING[:10], [96, 96, 48, 48, 28, 28, 21, 21, 21, 21], 0, None, ["trunk", "head_24k"]),
    "phase11-standard": ([4] * 15, [32] * 15, 0, None, ["trunk", "head_48k"]),
    "phase11-warmup": ([4] * 15, [32] * 15, 3, 5e-5, ["trunk", "head_48k"]),
    "phase11-fast": ([1] * 3 + [2] * 3 + [3] * 3 + [4] * 6, [32] * 15, 1, 5e-5, ["trunk", "head_48k"]),
    "phase12": (GROWING, [192, 192, 96, 96, 57, 57] + [43] * 9, 1, 2e-4, ["trunk", "head_48k", "head_24k"]),
}


@pytest.mark.parametrize("recipe", TABLE)
def test_the_schedule_is_the_documented_one(recipe):
    segments, batch_sizes, warm, warm_rate, groups = TABLE[recipe]
    args = T.argparse.Namespace(**(T.DEFAULTS | T.RECIPES[recipe]))
    plan = T.make_plan(args, 100000)
    lines = T.plan_lines(args, plan)
    assert [e.segment for e in plan] == segments and [e.batch for e in plan] == batch_sizes
    assert len(lines) == len(segments) == args.epochs
    main = [e for e in plan if e.phase == "main"]
    total = sum(e.steps for e in main)
    assert len(main) == len(plan) - warm and total == sum(math.ceil(100000 / b) for b in batch_sizes[warm:])
    model, optimizer = torch.nn.Linear(1, 1), None
    reference = {}  # PyTorch's own scheduler, step by step
    for group in groups:
        peak = 1e-5 if (recipe, group) == ("phase12", "head_24k") else MAIN[recipe]
        optimizer = torch.optim.SGD(model.parameters(), lr=peak)
        if recipe in ("phase12", "phase11-fast"):
            schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, peak, total_steps=total)
        elif recipe == "phase10":
            schedule = torch.optim.lr_scheduler.CosineAnnealingLR(
                optimizer, total - 1, peak * args.lr_min_ratio
            )
        else:
            schedule = torch.optim.lr_scheduler.ConstantLR(optimizer, 1.0)
        reference[group] = []
        for _ in range(total):
            reference[group].append(optimizer.param_groups[0]["lr"])
            optimizer.step()
            schedule.step()
    for e, line in zip(plan, lines):
        assert line.startswith(
            f"epoch {e.number}: {e.phase}, {e.segment:g} s, batch {e.batch}, {e.steps} steps"
        )
        for step in (e.first_step, e.first_step + e.steps - 1):
            rates = T.rates_at(args, plan, step)
            if e.number <= warm:
                assert rates == {"head_48k": warm_rate}
                continue
            assert list(rates) == groups
            for group, rate in rates.items():
                expected = reference[group][step - main[0].first_step]
                assert rate == pytest.approx(expected, rel=1e-6, abs=1e-12), (e.number, group)
                assert f"{group} " in line


def test_print_schedule_needs_no_data_and_no_torch():
    code = (
        "import sys, runpy; sys.argv = ['t', '--recipe', 'phase10', '--print_schedule', '1000']\n"
        "try: runpy.run_path('train_dual_head.py', run_name='__main__')\n"
        "except SystemExit as e: assert e.code == 0 and 'torch' not in sys.modules, e.code"
    )
    import subprocess
    import sys

    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        cwd=T.__file__[: -len("/train_dual_head.py")],
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[9].startswith("epoch 10: main, 4 s, batch 21, 48 steps, trunk")


def test_values_that_contradict_each_other_are_refused():
    for argv, words in [
        (["--recipe", "phase10", "--warmup_epochs", "1"], "heads 24k does not have"),
        (["--no-freeze_encoder"], "phase10 only"),
        (["--recipe", "phase10", "--from_scratch", "x.json"], "--no-freeze_encoder"),
        (["--recipe", "phase10"], "--data_dir is missing"),
        (["--recipe", "phase10", "--no-freeze_vq", "--cache_dir", "a", "--val_cache_dir", "b"], "recordings"),
        (["--recipe", "phase11-fast"], "--cache_dir is missing"),
        (["--data_dir", "a", "--cache_dir", "b"], "one of them"),
    ]:
        with pytest.raises(UserError, match=words):
            T.parse_args(argv)


@pytest.mark.parametrize(
    "path", sorted((T.Path(T.__file__).parent / "configs").glob("phase*.json")), ids=lambda p: p.stem
)
def test_the_five_config_files_are_their_recipes(path):
    values = T.read_config(str(path))
    recipe = values.pop("recipe")
    assert recipe in T.RECIPES
    defaults = T.DEFAULTS | T.RECIPES[recipe]
    schedule = (
        "epochs",
        "warmup_epochs",
        "batch_size",
        "segment_schedule",
        "batch_multiplier",
        "lr",
        "main_lr",
        "n_ffts",
    )
    plans = [T.make_plan(T.argparse.Namespace(**(defaults | v)), 5000) for v in ({}, values)]
    if "curriculum" not in path.stem:
        assert plans[0] == plans[1], {k: (defaults[k], values.get(k)) for k in schedule}


# ---- every recipe runs ----


@pytest.mark.parametrize("recipe", TABLE)
def test_every_recipe_runs_and_its_checkpoint_decodes(recipe, speech_48k, codes_48k, snac_dir, tmp_path):
    from snac48.decoder import load_dual_head

    data = cached(codes_48k, speech_48k) if recipe in ("phase11-fast", "phase12") else raw(speech_48k)
    argv = tiny(
        recipe, snac_dir, tmp_path, *data, *(("--warmup_epochs", 1) if recipe == "phase11-warmup" else ())
    )
    run("train_dual_head.py", *argv)
    vals, steps = metrics(tmp_path, "val"), metrics(tmp_path)
    heads = {"phase10": ["24k"], "phase12": ["24k", "48k"]}.get(recipe, ["48k"])
    for name in ("24k", "48k"):
        assert (f"loss_{name}" in vals[-1]) == (name in heads) and (f"lsd_{name}" in vals[-1]) == (
            name in heads
        )
    assert vals[-1]["loss"] > 0 and len(vals) == 3 and all(math.isfinite(m["loss"]) for m in vals)
    baseline = json.loads((tmp_path / "baseline_metrics.json").read_text())
    assert baseline["loss"] == vals[0]["loss"]
    assert vals[-1]["improved_percent"] == pytest.approx(100 * (1 - vals[-1]["loss"] / baseline["loss"]))
    assert {k for m in steps for k in m if k.startswith("lr_")} == {f"lr_{g}" for g in TABLE[recipe][4]}
    tts = load_dual_head(tmp_path / "best_model.pt")
    audio = tts.decode([torch.zeros(1, 4 * f, dtype=torch.long) for f in (1, 2, 4)])
    assert [a is not None for a in audio] == ["24k" in heads, "48k" in heads]
    other = 48000 if heads == ["24k"] else 24000
    if len(heads) == 1:
        done = run(
            "infer.py",
            "--checkpoint",
            tmp_path / "best_model.pt",
            "--input",
            speech_48k,
            "--output",
            tmp_path / "wavs",
            "--device",
            "cpu",
            "--sample_rate",
            other,
            code=1,
        )
        assert f"no {other} Hz head" in one_sentence(done)


def test_resume_continues_a_raw_full_codec_run_as_if_never_stopped(speech_48k, snac_dir, tmp_path):
    full = [
        "phase10",
        snac_dir,
        tmp_path / "a",
        *raw(speech_48k),
        "--no-freeze_encoder",
        "--no-freeze_vq",
        "--main_lr",
        1e-3,
        "--save_every_batches",
        2,
    ]
    train(*full).train()
    whole = load_checkpoint(tmp_path / "a" / "checkpoint_epoch2.pt")
    again = [*full[:2], tmp_path / "b", *full[3:], "--resume", tmp_path / "a" / "checkpoint_epoch2_iter4.pt"]
    train(*again).train()
    resumed = load_checkpoint(tmp_path / "b" / "checkpoint_epoch2.pt")
    assert whole["global_step"] == resumed["global_step"] == 6
    for k, v in whole["model"].items():
        assert torch.equal(v, resumed["model"][k]), k
    assert torch.equal(whole["codes"], resumed["codes"])
    start = T.load_snac(str(snac_dir)).state_dict()
    assert not torch.equal(start["encoder.block.0.bias"], whole["model"]["encoder.block.0.bias"])
    assert whole["geometry"]["weights_sha256"] != T.geometry_of(T.load_snac(str(snac_dir)), "").weights_sha256
    # and a frozen codec stays what it was
    train("phase10", snac_dir, tmp_path / "c", *raw(speech_48k)).train()
    frozen = load_checkpoint(tmp_path / "c" / "checkpoint_epoch2.pt")
    assert (
        frozen["geometry"]["weights_sha256"] == T.geometry_of(T.load_snac(str(snac_dir)), "").weights_sha256
    )


# ---- raw audio and cache are the same path ----


@pytest.mark.parametrize("recipe", ["phase11-fast", "phase12", "phase10"])
def test_cached_and_raw_path_give_the_same_loss(recipe, speech_48k, codes_48k, snac_dir, tmp_path):
    first = {}
    for name, data in (("cache", cached(codes_48k, speech_48k)), ("raw", raw(speech_48k))):
        trainer = train(recipe, snac_dir, tmp_path / name, *data)
        trainer.data.set_epoch(1)
        trainer.data.set_segment_length(0.5)
        order = T.epoch_order(42, 1, len(trainer.data))[:6]
        batch = trainer.to_device(T.collate([trainer.data[int(i)] for i in order]))
        losses = trainer.forward(trainer.model, batch)
        first[name] = {k: float(v.detach().mean()) for k, v in losses.items()} | {
            "val": trainer.validate()["loss"]
        }
        first[name]["codes"] = batch["codes"]
    codes = [c.pop("codes") for c in first.values()]
    assert all(torch.equal(a, b) for a, b in zip(*codes))
    assert first["cache"] == pytest.approx(first["raw"], rel=1e-5)


def test_raw_recordings_below_the_native_rate_need_an_upsampler(speech_48k, snac_dir, tmp_path):
    low = tmp_path / "low"
    low.mkdir()
    for i in range(4):
        sf.write(low / f"{i}.wav", voice(1.0, 22050, i), 22050)
    argv = tiny("phase11-standard", snac_dir, tmp_path / "run", *raw(low))
    done = run("train_dual_head.py", *argv, code=5)
    assert "22050 Hz is below --native_rate 48000" in one_sentence(done)
    trainer = train("phase11-standard", snac_dir, tmp_path / "sinc", *raw(low), "--upsampler", "sinc")
    item = trainer.data[0]
    assert item["kind"] == "sinc" and item["audio_48k"].abs().max() > 0.01
    done = run("train_dual_head.py", *argv, "--upsampler", "sidon", "--sidon_dir", low, code=1)
    assert "feature_extractor_cpu.pt" in one_sentence(done)


def test_a_recording_far_over_full_scale_is_left_out_by_name_and_teaches_nothing(
    speech_48k, snac_dir, tmp_path
):
    folder = tmp_path / "speech"
    folder.mkdir()
    for i in range(4):
        x = voice(1.0, 48000, i)
        sf.write(folder / f"{i}.wav", x * (40 / np.abs(x).max() if i == 2 else 1), 48000, subtype="FLOAT")
    t = train("phase12", snac_dir, tmp_path / "run", *raw(folder))
    assert [t.data[i]["valid_24k"] > 0 for i in range(4)] == [True, True, False, True]
    assert t.train() == 0 and not t.bad_files
    (event,) = metrics(tmp_path / "run", "left_out")
    assert event["file_path"] == "2.wav" and "where full scale is 1" in event["reason"]
    assert max(v["loss"] for v in metrics(tmp_path / "run", "val")) < 50


def test_sidon_on_the_fly_gives_the_targets_that_precompute_writes(speech_48k, snac_dir, tmp_path):
    from helpers.standin import build

    sidon_dir = build(tmp_path / "sidon")
    low = tmp_path / "low"
    low.mkdir()
    for i in range(3):
        sf.write(low / f"{i}.wav", voice(1.2 + 0.3 * i, 24000, i), 24000)
    run(
        "precompute_48k.py",
        "--input_dir",
        low,
        "--output_dir",
        tmp_path / "targets",
        "--sidon_dir",
        sidon_dir,
        "--device",
        "cpu",
        "--num_workers",
        0,
        "--min_envelope_corr",
        0.0,
    )
    batches = []
    for name, more in (
        ("written", ["--audio_48k_dir", tmp_path / "targets", "--val_audio_48k_dir", tmp_path / "targets"]),
        ("flying", ["--upsampler", "sidon", "--sidon_dir", sidon_dir]),
    ):
        trainer = train(
            "phase11-warmup",
            snac_dir,
            tmp_path / name,
            *raw(low),
            *more,
            "--min_envelope_corr",
            0,
            "--include_unfaithful",
        )
        batches.append(trainer.to_device(T.collate([trainer.data[i] for i in range(3)])))
    a, b = batches
    assert not a["phase_true"].any() and not b["phase_true"].any()
    assert a["audio_48k"].abs().max() > 0.01
    assert torch.allclose(a["audio_48k"], b["audio_48k"], atol=2 / 32768)
    strict = train(
        "phase11-warmup",
        snac_dir,
        tmp_path / "strict",
        *raw(low),
        "--upsampler",
        "sidon",
        "--sidon_dir",
        sidon_dir,
        "--min_envelope_corr",
        2,
    )
    masked = strict.to_device(T.collate([strict.data[i] for i in range(3)]))
    assert (masked["valid_24k"] == 0).all() and len(strict.unfaithful) == 3


def test_fast_sees_other_crops_each_epoch_and_the_same_again_with_the_seed(
    codes_48k, speech_48k, snac_dir, tmp_path
):
    def crops(trainer, data):
        found = []
        for epoch in (1, 2, 3):
            data.set_epoch(epoch)
            found.append([(data[i]["start_pos"], data[i]["noise_key"]) for i in range(len(data))])
        return found

    data = cached(codes_48k, speech_48k)
    a, b = (train("phase11-fast", snac_dir, tmp_path / n, *data) for n in "ab")
    c = train("phase11-fast", snac_dir, tmp_path / "c", *data, "--seed", 7)
    one, again, other = (crops(t, t.data) for t in (a, b, c))
    assert one == again and one != other
    assert one[0] != one[1] != one[2] != one[0]
    fixed = crops(a, a.val)
    assert fixed[0] == fixed[1] == fixed[2]


# ---- phase 10: full codec, from scratch, as a trunk ----


def test_a_codec_from_scratch_uses_its_codebooks(speech_48k, tmp_path):
    config = tmp_path / "codec.json"
    config.write_text(json.dumps(TINY | {"codebook_size": 16, "encoder_dim": 8}))
    argv = [
        "phase10",
        "none",
        tmp_path / "run",
        *raw(speech_48k),
        "--no-freeze_encoder",
        "--no-freeze_vq",
        "--from_scratch",
        config,
        "--feature_epochs",
        24,
        "--epochs",
        30,
        "--epoch_ranges",
        "1-30",
        "--segment_schedule",
        "0.4",
        "--batch_multiplier",
        "1.0",
        "--lr",
        4e-3,
        "--val_limit",
        2,
        "--main_lr",
        3e-4,
    ]
    trainer = train(*argv)
    gains = [v.abs().max() for k, v in trainer.model.state_dict().items() if k.endswith("original0")]
    assert max(gains) < 300  # a channel without input is not blown up
    assert trainer.train() == 0
    found = metrics(tmp_path / "run", "usage")
    assert len(found) == 6
    for k in range(3):
        assert found[-1][f"usage_{k}"] > 0.5 and found[-1][f"perplexity_{k}"] > 4
    vals = metrics(tmp_path / "run", "val")
    assert vals[-1]["loss"] < 0.8 * vals[0]["loss"] and vals[1]["best"] == [] and any(v["best"] for v in vals)
    # without the start that makes it possible, most entries are never used
    from snac48.codebooks import usage

    torch.manual_seed(0)
    fresh = T.new_snac(str(config))
    codes = fresh.encode(trainer.some_speech(40))
    plain = [usage(torch.bincount(c.flatten(), minlength=16))["usage"] for c in codes]
    assert min(plain) < 0.3
    # the result is a SNAC folder, and codes come out of it as out of the checkpoint
    from snac48.decoder import load_dual_head

    run("infer.py", "--checkpoint", tmp_path / "run" / "best_model.pt", "--export", tmp_path / "codec",
        "--half")  # fmt: skip
    again = T.load_snac(str(tmp_path / "codec"))
    clip = trainer.some_speech(40)[:1]
    mine = load_dual_head(tmp_path / "run" / "best_model.pt")
    same = [float((a == b).double().mean()) for a, b in zip(again.encode(clip), mine.encode(clip))]
    assert min(same) > 0.9  # float16 weights flip few codes
    audio = mine.decode(again.encode(clip))[0]
    for block, _ in mine.model.noises:
        block.noise_key = None
    assert audio.abs().max() > 1e-3


def test_dead_entries_restart_and_used_ones_stay(snac):
    from snac48.codebooks import restart_dead_entries

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


def test_a_phase10_checkpoint_is_a_trunk_only_for_its_own_codes(speech_48k, codes_48k, snac_dir, tmp_path):
    train("phase10", snac_dir, tmp_path / "frozen", *raw(speech_48k), "--main_lr", 1e-3).train()
    train("phase10", snac_dir, tmp_path / "full", *raw(speech_48k), "--no-freeze_encoder").train()
    # written out as a codec, the frozen encoder has the hash it had: caches stay valid
    run("infer.py", "--checkpoint", tmp_path / "frozen" / "best_model.pt", "--export", tmp_path / "codec")
    old, new = (T.load_snac(str(folder)) for folder in (snac_dir, tmp_path / "codec"))
    assert T.weights_hash(old.state_dict()) == T.weights_hash(new.state_dict())
    assert any(not torch.equal(a, b) for a, b in zip(old.decoder.parameters(), new.decoder.parameters()))
    tuned = tmp_path / "frozen" / "checkpoint_epoch2.pt"
    data = cached(codes_48k, speech_48k)
    trainer = train("phase12", snac_dir, tmp_path / "dual", *data, "--phase10_checkpoint", tuned)
    saved = load_checkpoint(tuned)["model"]
    key = "trunk.0.bias"
    assert torch.equal(trainer.model.state_dict()[key], saved[key])
    assert torch.equal(trainer.model.head_24k[1].bias, saved["head_24k.1.bias"])
    plain = train("phase12", snac_dir, tmp_path / "plain", *data)
    assert not torch.equal(plain.model.state_dict()[key], saved[key])
    with pytest.raises(UserError, match="another encoder than the cache"):
        train(
            "phase12",
            snac_dir,
            tmp_path / "no",
            *data,
            "--phase10_checkpoint",
            tmp_path / "full" / "checkpoint_epoch2.pt",
        )


def test_one_table_compares_checkpoints_of_all_recipes(speech_48k, codes_48k, snac_dir, tmp_path):
    paths = []
    for name, recipe, data in (
        ("ten", "phase10", [*raw(speech_48k), "--no-freeze_encoder", "--no-freeze_vq"]),
        ("eleven", "phase11-fast", cached(codes_48k, speech_48k)),
        ("twelve", "phase12", cached(codes_48k, speech_48k)),
    ):
        train(recipe, snac_dir, tmp_path / name, *data).train()
        paths.append(tmp_path / name / "best_model.pt")
    run(
        "evaluate.py",
        "--checkpoint",
        *paths,
        "--data_dirs",
        speech_48k,
        "--device",
        "cpu",
        "--num_samples",
        3,
        "--output",
        tmp_path / "r.json",
        "--samples_dir",
        tmp_path / "wavs",
        "--pretrained_model",
        snac_dir,
    )
    systems = json.loads((tmp_path / "r.json").read_text())["systems"]
    assert set(systems) == {
        "base_snac",
        "base_snac_sinc48",
        "ours_24k:ten",
        "ours_48k:eleven",
        "ours_24k:twelve",
        "ours_48k:twelve",
    }
    values = [systems[s]["stft"] for s in ("base_snac", "ours_24k:ten", "ours_24k:twelve")]
    assert len(set(values)) == 3 and all(np.isfinite(values))
