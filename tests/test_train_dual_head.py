"""train_dual_head.py: options, configs, recipes, and whole runs as one starts them."""

import json
import math
import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from conftest import ROOT, make_snac, one_sentence, run, save_snac
from helpers.training import (
    Training,
    cached,
    metrics,
    newest,
    options,
    raw,
    recipe_args,
    recipe_training,
    tiny_args,
    training,
)

import train_dual_head as T
from snac48.cli import UserError
from snac48.decoder import load_dual_head
from snac48.schedule import curriculum, make_plan, plan_lines, rates_at

# ---- options ----

NEEDED = ["--cache_dir", "a", "--val_cache_dir", "b", "--audio_48k_dir", "c", "--val_audio_48k_dir", "d"]


def test_config_keys_comments_and_precedence(tmp_path):
    config = tmp_path / "c.json"
    config.write_text("""{ // comment with "quotes"
      "num_epochs": 4, "learning_rate": 3e-5, "description": "http://not a comment",
      "curriculum": [{"epochs": [1, 2], "length": 1.5, "batch_multiplier": 2},
                     {"epochs": [3, 4], "length": 2.5, "batch_multiplier": 0.5}]}""")
    args, origin, saved = T.parse_args([*NEEDED, "--config", str(config), "--main_lr", "7e-5"])
    assert (args.epochs, args.main_lr, args.batch_size, saved) == (4, 7e-5, 96, None)
    assert (origin["epochs"], origin["main_lr"], origin["batch_size"]) == ("config", "flag", "default")
    assert curriculum(args) == [(1.5, 192), (1.5, 192), (2.5, 48), (2.5, 48)]


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


def test_print_config_says_every_value_and_its_origin(capsys):
    printed = {}
    for form in ("text", "json"):
        with pytest.raises(SystemExit) as left:
            T.parse_args(["--recipe", "phase10", "--print_config", form, "--seed", "7"])
        assert left.value.code == 0
        printed[form] = capsys.readouterr().out
    found = json.loads(printed["json"])
    assert found["recipe"]["value"] == "phase10" and set(found) == {"recipe", *T.DEFAULTS}
    assert found["seed"] == {"value": 7, "origin": "flag"}
    assert found["main_lr"] == {"value": 1.5e-5, "origin": "recipe"}
    assert found["ema"] == {"value": 0.0, "origin": "default"}
    assert found["tf32"] == {"value": None, "origin": "default"}  # by device
    lines = {words[0]: words[1:] for words in map(str.split, printed["text"].splitlines())}
    assert lines["recipe"] == ["'phase10'"] and set(lines) == set(found)
    assert (lines["seed"], lines["main_lr"]) == (["7", "flag"], ["1.5e-05", "recipe"])


ALONE = """
import runpy, sys
sys.argv = ["train_dual_head.py", *sys.argv[1:]]
try:
    runpy.run_path("train_dual_head.py", run_name="__main__")
finally:
    assert "torch" not in sys.modules
"""


def without_torch(*argv, code=0):
    """The script's answer, found without importing torch."""
    done = subprocess.run([sys.executable, "-c", ALONE, *argv], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == code, done.stderr
    return done


def test_help_and_schedule_need_no_data_and_no_torch():
    without_torch("--help")
    lines = without_torch("--recipe", "phase10", "--print_schedule", "1000").stdout.splitlines()
    assert lines[9].startswith("epoch 10: main, 4 s, batch 21, 48 steps, trunk")


@pytest.mark.parametrize(
    "flag, value, words",
    [
        ("--n_ffts", "abc", "--n_ffts 'abc' must be a comma-separated list"),
        ("--n_ffts", "8", "--n_ffts must be numbers from 16 to 65536, not '8' (--n_ffts: a flag)"),
        ("--adam_betas", "0.9", "--adam_betas '0.9' must be two numbers"),
        ("--save_every", "0", "--save_every must be from 1 to"),
    ],
)
def test_malformed_values_are_refused_before_anything_is_loaded(flag, value, words):
    assert words in one_sentence(without_torch(*NEEDED, flag, value, code=1))


def test_an_unknown_flag_names_the_nearest():
    done = without_torch("--batchsize", "3", "--nothing_like_it", code=2)
    assert done.stderr.count("\n") == 1 and "--batchsize: did you mean --batch_size?" in done.stderr


def test_values_that_contradict_each_other_are_refused():
    for argv, words in [
        (["--recipe", "phase10", "--warmup_epochs", "1"], "heads 24k does not have"),
        (["--no-freeze_encoder"], "phase10 only"),
        (["--recipe", "phase10", "--from_scratch", "x.json"], "--no-freeze_encoder"),
        (["--recipe", "phase10"], "corpus/train/audio"),
        (["--recipe", "phase10", "--no-freeze_vq", "--cache_dir", "a", "--val_cache_dir", "b"], "recordings"),
        (["--recipe", "phase11-fast"], "codes/train, codes/val, targets/train"),
        (["--data_dir", "a", "--cache_dir", "b"], "one of them"),
    ]:
        with pytest.raises(UserError, match=words):
            T.parse_args(argv)


def test_mistakes_get_one_sentence(cache_dir, targets_dir, snac_dir, tmp_path):
    done = tmp_path / "done"
    assert training(cache_dir, targets_dir, snac_dir, done).train() == 0
    base = tiny_args(cache_dir, targets_dir, snac_dir, tmp_path / "run")
    other = save_snac(make_snac(9), tmp_path / "other")
    (tmp_path / "void").mkdir()
    (tmp_path / "broken.pt").write_bytes((done / "checkpoint_epoch3.pt").read_bytes()[:-100])
    last = done / "checkpoint_epoch3.pt"
    mistakes = [
        (["--device", "7"], "GPU 7 isn't there"),
        (["--resume", tmp_path / "broken.pt"], "damaged"),
        (["--pretrained_model", other], "made by another model"),
        (["--cache_dir", tmp_path / "void"], "holds no codes_batch"),
        (["--cache_dir", tmp_path / "nowhere"], "does not exist"),
        (["--audio_48k_dir", tmp_path / "nowhere"], "48 kHz folder"),
        (["--audio_48k_dir", tmp_path / "void"], "--target_kind"),
        (["--resume", tmp_path / "none.pt"], "does not exist"),
        (["--resume", last, "--batch_size", 3], "another schedule"),
        (["--resume", last, "--pretrained_model", other], "another model"),
    ]
    for extra, words in mistakes:
        with pytest.raises(UserError) as error:
            Training([*base, *map(str, extra)])
        assert words in str(error.value) and "\n" not in str(error.value) and error.value.code == 1, extra
    for extra, words in mistakes[:3]:  # before the imports, at loading
        assert words in one_sentence(run("train_dual_head.py", *base, *extra, code=1)), extra
    assert not (tmp_path / "run").exists()


def test_a_run_is_never_overwritten(cache_dir, targets_dir, snac_dir, tmp_path):
    flags = cache_dir, targets_dir, snac_dir, tmp_path / "run", "--epochs", 1, "--epoch_ranges", "1-1"
    flags = *flags, "--segment_schedule", "0.3", "--batch_multiplier", "1.0", "--warmup_epochs", 0
    assert training(*flags).train() == 0
    held = lambda: {p.name: p.read_bytes() for p in (tmp_path / "run").iterdir() if p.name != "run.lock"}
    before = held()
    with pytest.raises(UserError, match=r"checkpoint_epoch1.pt would be overwritten: .*--resume auto"):
        training(*flags)
    (tmp_path / "run" / "checkpoint_epoch1.pt").write_bytes(b"half of it")
    with pytest.raises(UserError, match=r"checkpoint_epoch1.pt can't be used"):
        training(*flags, "--resume", "auto")
    before["checkpoint_epoch1.pt"] = b"half of it"
    assert held() == before


def test_a_signal_to_the_whole_group_stops_with_a_checkpoint(cache_dir, targets_dir, snac_dir, tmp_path):
    """launch.sh stop signals the process group, data loader workers included."""
    out = tmp_path / "run"
    argv = tiny_args(cache_dir, targets_dir, snac_dir, out, "--num_workers", 1, "--epochs", 100,
                     "--epoch_ranges", "1-1,2-100")  # fmt: skip
    job = subprocess.Popen([sys.executable, str(ROOT / "train_dual_head.py"), *argv], start_new_session=True,
                           stdout=subprocess.DEVNULL)  # fmt: skip
    deadline = time.time() + 120
    while time.time() < deadline and not (
        (out / "metrics.jsonl").exists() and '"step": 4' in (out / "metrics.jsonl").read_text()
    ):
        time.sleep(0.05)
    os.killpg(job.pid, signal.SIGTERM)
    assert job.wait(timeout=30) == 3
    last = json.loads(open(out / "metrics.jsonl").readlines()[-1])
    assert (last["event"], last["reason"]) == ("end", "stopped")
    assert newest(out)[1]["global_step"] == last["step"] >= 4


# ---- schedules of the recipes: SPEC's table, line by line ----

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
    args = options(**T.RECIPES[recipe])
    plan = make_plan(args, 100000)
    lines = plan_lines(args, plan)
    assert [e.segment for e in plan] == segments and [e.batch for e in plan] == batch_sizes
    assert len(lines) == len(segments) == args.epochs
    main = [e for e in plan if e.phase == "main"]
    total = sum(e.steps for e in main)
    assert len(main) == len(plan) - warm and total == sum(math.ceil(100000 / b) for b in batch_sizes[warm:])
    model, reference = torch.nn.Linear(1, 1), {}  # PyTorch's own scheduler, step by step
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
            rates = rates_at(args, plan, step)
            if e.number <= warm:
                assert rates == {"head_48k": warm_rate}
                continue
            assert list(rates) == groups
            for group, rate in rates.items():
                expected = reference[group][step - main[0].first_step]
                assert rate == pytest.approx(expected, rel=1e-6, abs=1e-12), (e.number, group)
                assert f"{group} " in line


@pytest.mark.parametrize("path", sorted((ROOT / "configs").glob("phase*.json")), ids=lambda p: p.stem)
def test_the_five_config_files_are_their_recipes(path):
    values = T.config_values(str(path))
    recipe = values.pop("recipe")
    assert recipe in T.RECIPES
    plans = [make_plan(options(**(T.RECIPES[recipe] | v)), 5000) for v in ({}, values)]
    if "curriculum" not in path.stem:
        assert plans[0] == plans[1]


# ---- every recipe runs ----


@pytest.fixture(scope="module")
def trained(speech_48k, codes_48k, snac_dir, tmp_path_factory):
    """{recipe: folder of a run}; "full codec": phase10 with nothing frozen."""
    from_cache, whole = cached(codes_48k, speech_48k), ["--no-freeze_encoder", "--no-freeze_vq"]
    found, more = {}, {"phase11-warmup": ["--warmup_epochs", 1], "full codec": whole}
    for name in (*TABLE, "full codec"):
        found[name] = tmp_path_factory.mktemp("recipe")
        data = from_cache if name in ("phase11-fast", "phase12") else raw(speech_48k)
        recipe = name if name in TABLE else "phase10"
        t = recipe_training(recipe, snac_dir, found[name], *data, *more.get(name, ()))
        start = {k: v.clone() for k, v in t.state.model.state_dict().items()}
        assert t.train() == 0
        moved = {k.split(".")[0] for k, v in t.state.model.state_dict().items() if not v.equal(start[k])}
        codec = {"encoder", "quantizer"} if name == "full codec" else set()
        assert moved == set(TABLE[recipe][4]) | codec
    return found


@pytest.mark.parametrize("recipe", TABLE)
def test_every_recipe_runs_and_its_checkpoint_decodes(recipe, trained, speech_48k, tmp_path):
    folder = trained[recipe]
    vals, steps = metrics(folder, "val"), metrics(folder)
    heads = {"phase10": ["24k"], "phase12": ["24k", "48k"]}.get(recipe, ["48k"])
    for name in ("24k", "48k"):
        assert (f"loss_{name}" in vals[-1]) == (f"lsd_{name}" in vals[-1]) == (name in heads)
    assert vals[-1]["loss"] > 0 and len(vals) == 3 and all(math.isfinite(m["loss"]) for m in vals)
    baseline = json.loads((folder / "baseline_metrics.json").read_text())
    assert baseline["loss"] == vals[0]["loss"]
    assert vals[-1]["improved_percent"] == pytest.approx(100 * (1 - vals[-1]["loss"] / baseline["loss"]))
    assert {k for m in steps for k in m if k.startswith("lr_")} == {f"lr_{g}" for g in TABLE[recipe][4]}
    best = folder / "best_model.pt"
    audio = load_dual_head(best).decode([torch.zeros(1, 4 * f, dtype=torch.long) for f in (1, 2, 4)])
    assert [a is not None for a in audio] == ["24k" in heads, "48k" in heads]
    if recipe in ("phase10", "phase11-standard"):
        other = 48000 if heads == ["24k"] else 24000
        done = run("infer.py", "--checkpoint", best, "--input", speech_48k, "--output", tmp_path / "wavs",
                   "--device", "cpu", "--sample_rate", other, code=1)  # fmt: skip
        assert f"no {other} Hz head" in one_sentence(done)


def test_a_recipe_runs_as_a_program(codes_48k, speech_48k, snac_dir, tmp_path, trained):
    """And comes to the losses that the same recipe has in this process."""
    done = run("train_dual_head.py", *recipe_args("phase12", snac_dir, tmp_path / "run",
                                                  *cached(codes_48k, speech_48k)))  # fmt: skip
    assert "start: recipe phase12, 12 rows (4 validation), 6 steps" in done.stdout
    assert "finished at step 6" in done.stdout
    losses = [[m["loss"] for m in metrics(d, "val")] for d in (tmp_path / "run", trained["phase12"])]
    assert losses[0] == losses[1]


def test_one_table_compares_checkpoints_of_all_recipes(trained, speech_48k, snac_dir, tmp_path):
    names = {"ten": "full codec", "eleven": "phase11-fast", "twelve": "phase12"}
    for name, recipe in names.items():
        (tmp_path / name).symlink_to(trained[recipe])
    run("evaluate.py", "--checkpoint", *(tmp_path / name / "best_model.pt" for name in names), "--data_dirs",
        speech_48k, "--device", "cpu", "--num_samples", 3, "--output", tmp_path / "r.json", "--samples_dir",
        tmp_path / "wavs", "--pretrained_model", snac_dir)  # fmt: skip
    systems = json.loads((tmp_path / "r.json").read_text())["systems"]
    assert set(systems) == {"base_snac", "base_snac_sinc48", "ours_24k:ten", "ours_48k:eleven",
                            "ours_24k:twelve", "ours_48k:twelve"}  # fmt: skip
    values = [systems[s]["stft"] for s in ("base_snac", "ours_24k:ten", "ours_24k:twelve")]
    assert len(set(values)) == 3 and all(np.isfinite(values))
