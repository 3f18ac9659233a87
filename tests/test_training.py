"""snac48/training.py: what a run is made of, and that a resumed one is the unbroken one."""

import math
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch
from conftest import ROOT, run
from helpers.training import (
    Training,
    assert_same_state,
    cached,
    metrics,
    newest,
    raw,
    recipe_args,
    recipe_training,
    stop_after,
    tiny_args,
    train_step,
    training,
)

import train_dual_head as T
from snac48.checkpoint import load_checkpoint
from snac48.cli import UserError
from snac48.codec import geometry_of, load_snac, weights_hash
from snac48.losses import head_losses


@pytest.fixture(scope="module")
def unbroken(cache_dir, targets_dir, snac_dir, tmp_path_factory):
    out = tmp_path_factory.mktemp("unbroken")
    assert training(cache_dir, targets_dir, snac_dir, out, "--ema", 0.9).train() == 0
    return out


def test_a_run_trains_in_two_phases_and_writes_what_it_promises(cache_dir, targets_dir, snac_dir, tmp_path):
    t = training(cache_dir, targets_dir, snac_dir, tmp_path / "run", "--ema", 0.5)
    start = {k: v.clone() for k, v in t.state.model.state_dict().items()}
    after = {}

    def watch(run, state, batch):
        result = train_step(run, state, batch)
        after[state.step] = {k: v.clone() for k, v in state.model.state_dict().items()}
        return result

    assert t.train(watch) == 0
    assert sorted(after) == list(range(1, 1 + 2 + 4 + 4))
    for k, v in after[2].items():  # warmup: two steps
        assert torch.equal(v, start[k]) == (not k.startswith("head_48k")), k
    frozen = [k for k, v in after[10].items() if torch.equal(v, start[k])]
    assert all(k.startswith("quantizer") for k in frozen) and len(frozen) > 0  # main: everything else moves
    logged, vals = metrics(tmp_path / "run"), metrics(tmp_path / "run", "val")
    assert [r["step"] for r in logged] == list(range(1, 11))
    assert [r["phase"] for r in logged] == ["warmup"] * 2 + ["main"] * 8
    assert all(math.isclose(r["lr_head_24k"], r["lr_trunk"] / 5) for r in logged[2:])
    assert [v["epoch"] for v in vals] == [0, 1, 2, 3]
    assert {"l1_24k", "stft_24k", "l1_48k", "stft_48k", "lsd_48k", "lsd_12_24k"} <= set(vals[0])
    assert vals[-1]["loss_48k"] < vals[0]["loss_48k"]
    (last,) = metrics(tmp_path / "run", "end")
    assert last["reason"] == "finished"
    names = {p.name for p in (tmp_path / "run").glob("*.pt")}
    assert {"best_model.pt", "best_model_24k.pt", "best_model_48k.pt", "checkpoint_epoch3.pt"} <= names
    state = load_checkpoint(tmp_path / "run" / "checkpoint_epoch3.pt")
    promised = (
        "model optimizer scheduler epoch global_step phase segment_length args geometry rng best versions"
    )
    assert set(promised.split()) <= set(state)
    best = min(v["loss"] for v in vals)
    assert math.isclose(load_checkpoint(tmp_path / "run" / "best_model.pt")["best"]["loss"], best)


# ---- resuming ----


@pytest.mark.parametrize("stop_at", [1, 2, 5, 6, 9])
def test_resume_continues_as_if_never_stopped(stop_at, cache_dir, targets_dir, snac_dir, tmp_path, unbroken):
    """Stopped in the warmup, at its end, in the main phase, at an epoch's end: the same losses and the
    same bits."""
    t = training(cache_dir, targets_dir, snac_dir, tmp_path, "--ema", 0.9)
    assert t.train(stop_after(stop_at)) == 3
    assert newest(tmp_path)[1]["global_step"] == stop_at
    again = Training(["--resume", "auto", "--output_dir", str(tmp_path)])  # flags come from the checkpoint
    assert again.state.step == stop_at and again.train() == 0
    assert_same_state(tmp_path / "checkpoint_epoch3.pt", unbroken / "checkpoint_epoch3.pt")
    losses = [{r["step"]: r["loss_48k"] for r in metrics(d)} for d in (tmp_path, unbroken)]
    assert losses[0] == losses[1]


@pytest.mark.parametrize("value", ["auto", "file"])
def test_a_resume_reads_its_checkpoint_once(value, unbroken, tmp_path, monkeypatch):
    """It may be gigabytes on a network drive."""
    out = shutil.copytree(unbroken, tmp_path / "run")
    path, opened, load = newest(out)[0], [], torch.load

    def counted(file, **kwargs):
        if not kwargs.get("mmap"):  # the step alone was asked for
            opened.append(str(file))
        return load(file, **kwargs)

    monkeypatch.setattr(torch, "load", counted)
    argv = ["--resume", "auto" if value == "auto" else str(path), "--output_dir", str(out)]
    assert Training(argv).state.step == 10
    assert [name for name in opened if name.startswith(str(out))] == [str(path)]


def test_resume_continues_a_raw_full_codec_run_as_if_never_stopped(speech_48k, snac_dir, tmp_path):
    flags = *raw(speech_48k), "--no-freeze_encoder", "--no-freeze_vq", "--main_lr", 1e-3
    flags = *flags, "--save_every_batches", 2
    recipe_training("phase10", snac_dir, tmp_path / "a", *flags).train()
    whole = load_checkpoint(tmp_path / "a" / "checkpoint_epoch2.pt")
    middle = tmp_path / "a" / "checkpoint_epoch2_iter4.pt"
    recipe_training("phase10", snac_dir, tmp_path / "b", *flags, "--resume", middle).train()
    resumed = load_checkpoint(tmp_path / "b" / "checkpoint_epoch2.pt")
    assert whole["global_step"] == resumed["global_step"] == 6
    assert_same_state(tmp_path / "a" / "checkpoint_epoch2.pt", tmp_path / "b" / "checkpoint_epoch2.pt")
    assert torch.equal(whole["codes"], resumed["codes"])
    start, hashed = load_snac(str(snac_dir)), geometry_of(load_snac(str(snac_dir)), "").weights_sha256
    key = "encoder.block.0.bias"
    assert not torch.equal(start.state_dict()[key], whole["model"][key])
    assert whole["geometry"]["weights_sha256"] != hashed
    # and a frozen codec stays what it was
    recipe_training("phase10", snac_dir, tmp_path / "c", *raw(speech_48k)).train()
    frozen = load_checkpoint(tmp_path / "c" / "checkpoint_epoch2.pt")
    assert frozen["geometry"]["weights_sha256"] == hashed


def test_a_full_codec_run_does_not_depend_on_the_hash_seed(speech_48k, snac_dir, tmp_path):
    for seed in ("1", "2"):  # decides the order in which a set of names is walked
        argv = recipe_args("phase10", snac_dir, tmp_path / seed, *raw(speech_48k), "--no-freeze_encoder",
                           "--no-freeze_vq", "--main_lr", 1e-3, "--epochs", 1)  # fmt: skip
        run("train_dual_head.py", *argv, env={"PYTHONHASHSEED": seed})
    assert_same_state(*(tmp_path / seed / "checkpoint_epoch1.pt" for seed in ("1", "2")))
    losses = [[m["loss"] for m in metrics(tmp_path / seed)] for seed in ("1", "2")]
    assert losses[0] == losses[1] and len(losses[0]) == 3


# ---- the same run, cut into other pieces ----


def test_micro_batches_give_the_same_weights(cache_dir, targets_dir, snac_dir, tmp_path, unbroken):
    t = training(cache_dir, targets_dir, snac_dir, tmp_path / "r", "--ema", 0.9, "--accum_steps", 2)
    assert t.train() == 0
    a, b = (load_checkpoint(p / "checkpoint_epoch3.pt")["model"] for p in (tmp_path / "r", unbroken))
    assert all(torch.allclose(a[k], b[k], atol=2e-4) for k in a)


def test_two_processes_train_as_one(cache_dir, targets_dir, snac_dir, tmp_path, unbroken):
    """torchrun with two processes (gloo): the same batches, so the same losses as one process."""
    argv = tiny_args(cache_dir, targets_dir, snac_dir, tmp_path / "two", "--ema", 0.9)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    done = subprocess.run([*command, str(ROOT / "train_dual_head.py"), *argv], capture_output=True, text=True,
                          timeout=300)  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    folders = unbroken, tmp_path / "two"
    one, two = ({m["step"]: m["loss_48k"] for m in metrics(d)} for d in folders)
    assert one.keys() == two.keys() and all(math.isclose(one[s], two[s], rel_tol=1e-4) for s in one)
    assert np.allclose(*([m["lsd_12_24k"] for m in metrics(d, "val")] for d in folders), rtol=1e-3)


# ---- steps that are no good ----


def spoil(batch):
    with torch.no_grad():
        batch.parts[0]["audio_48k"][0, 0, 0] = math.nan


def test_nan_steps_are_skipped_and_many_end_the_run(cache_dir, targets_dir, snac_dir, tmp_path, monkeypatch):
    def nan(*args, **options):
        return {k: v * math.nan for k, v in head_losses(*args, **options).items()}

    monkeypatch.setattr(T, "head_losses", nan)
    t = training(cache_dir, targets_dir, snac_dir, tmp_path / "run", "--batch_size", 1)
    before = {k: v.clone() for k, v in t.state.model.state_dict().items()}
    assert t.train() == 4 and t.state.skipped == 20
    assert all(torch.equal(v, before[k]) for k, v in t.state.model.state_dict().items())


def test_a_nan_step_is_as_if_that_batch_had_never_been(cache_dir, targets_dir, snac_dir, tmp_path):
    def with_nan(run, state, batch):
        if state.step == 7:
            spoil(batch)
        return train_step(run, state, batch)

    def left_out(run, state, batch):
        if state.step != 7:
            return train_step(run, state, batch)
        state.step += 1
        return T.StepResult({}, math.nan, False, batch.size)

    a, b = (training(cache_dir, targets_dir, snac_dir, tmp_path / n) for n in "ab")
    assert a.train(with_nan) == b.train(left_out) == 0
    assert a.state.skipped == 1
    assert_same_state(tmp_path / "a" / "checkpoint_epoch3.pt", tmp_path / "b" / "checkpoint_epoch3.pt")
    assert np.isfinite(list(a.state.best.values())).all() and a.state.best == b.state.best


def test_a_diverged_run_leaves_a_checkpoint_from_before_and_repeats_from_there(
    cache_dir, targets_dir, snac_dir, tmp_path, monkeypatch
):
    flags = cache_dir, targets_dir, snac_dir
    batches = "--batch_size", 1, "--epochs", 2, "--epoch_ranges", "1-1,2-2"
    monkeypatch.setattr(T, "SKIPS_IN_A_ROW", 4)

    def step(run, state, batch):
        if state.step > 8:
            spoil(batch)
        return train_step(run, state, batch)

    assert training(*flags, tmp_path / "whole", *batches).train() == 0
    t = training(*flags, tmp_path / "run", *batches)
    assert t.train(step) == 4 and t.state.skipped == 4
    _, before = newest(tmp_path / "run")
    assert before["global_step"] == t.state.step - 4 and before["guard"]["in_a_row"] == 0
    assert all(torch.isfinite(v).all() for v in before["model"].values())
    again = training(*flags, tmp_path / "run", *batches, "--resume", "auto")
    assert again.train() == 0  # the fault has gone: as if it had never been
    assert_same_state(*(tmp_path / name / "checkpoint_epoch2.pt" for name in ("run", "whole")))


def test_too_many_bad_files_end_the_run_with_a_checkpoint(cache_dir, targets_dir, snac_dir, tmp_path):
    targets, out = shutil.copytree(targets_dir, tmp_path / "targets"), tmp_path / "run"
    t = training(cache_dir, targets, snac_dir, out, "--max_bad_fraction", 0.1)

    def truncate(run, state, batch):
        if state.step == 3:
            for wav in targets.rglob("*.wav"):
                wav.write_bytes(wav.read_bytes()[:30])
        return train_step(run, state, batch)

    with pytest.raises(UserError, match=r"could not be read, first .* then --resume auto") as stopped:
        t.train(truncate)
    assert stopped.value.code == 5
    (last,) = metrics(out, "end")
    assert last["reason"] == "too many bad files" and last["code"] == 5
    assert newest(out)[1]["global_step"] == t.state.step
    shutil.copytree(targets_dir, targets, dirs_exist_ok=True)
    assert training(cache_dir, targets, snac_dir, out, "--resume", "auto").train() == 0


# ---- a trunk of phase 10 ----


def test_a_phase10_checkpoint_is_a_trunk_only_for_its_own_codes(speech_48k, codes_48k, snac_dir, tmp_path):
    recipe_training("phase10", snac_dir, tmp_path / "frozen", *raw(speech_48k), "--main_lr", 1e-3).train()
    recipe_training("phase10", snac_dir, tmp_path / "full", *raw(speech_48k), "--no-freeze_encoder").train()
    # written out as a codec, the frozen encoder has the hash it had: caches stay valid
    run("infer.py", "--checkpoint", tmp_path / "frozen" / "best_model.pt", "--export", tmp_path / "codec")
    old, new = (load_snac(str(folder)) for folder in (snac_dir, tmp_path / "codec"))
    assert weights_hash(old.state_dict()) == weights_hash(new.state_dict())
    assert any(not torch.equal(a, b) for a, b in zip(old.decoder.parameters(), new.decoder.parameters()))
    data = cached(codes_48k, speech_48k)

    def dual(name, *more):
        return recipe_training("phase12", snac_dir, tmp_path / name, *data, *more).state.model

    tuned, key = tmp_path / "frozen" / "checkpoint_epoch2.pt", "trunk.0.bias"
    model, saved = dual("dual", "--phase10_checkpoint", tuned), load_checkpoint(tuned)["model"]
    assert torch.equal(model.state_dict()[key], saved[key])
    assert torch.equal(model.head_24k[1].bias, saved["head_24k.1.bias"])
    assert not torch.equal(dual("plain").state_dict()[key], saved[key])
    with pytest.raises(UserError, match="another encoder than the cache"):
        dual("no", "--phase10_checkpoint", tmp_path / "full" / "checkpoint_epoch2.pt")
