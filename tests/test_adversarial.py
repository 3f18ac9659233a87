"""snac48/adversarial.py: the adversarial phase of a training, its checkpoints and its accidents."""

import math
import subprocess
import sys

import pytest
import torch
from conftest import ROOT
from helpers.training import (
    Training,
    assert_same_state,
    cached,
    metrics,
    newest,
    options,
    raw,
    recipe_training,
    stop_after,
    tiny_args,
    train_step,
    training,
)

from snac48 import adversarial, speed
from snac48.adversarial import Adversary
from snac48.checkpoint import load_checkpoint
from snac48.cli import UserError
from snac48.codec import geometry_of, load_snac
from snac48.decoder import DualHeadDecoder

# two steps of warmup, four adversarial ones: in the first only discriminators train, in the second all but
# the trunk
TINY = ("--adv_weight", 1, "--disc_width", 1, "--disc_lr", 1e-3, "--limit", 8, "--batch_size", 2,
        "--epochs", 2, "--epoch_ranges", "1-1,2-2", "--segment_schedule", "0.2,0.2",
        "--val_segment", 0.2, "--val_limit", 2, "--scheduler", "constant",
        "--disc_alone", 0.25, "--disc_young", 0.5)  # fmt: skip


@pytest.fixture(scope="module")
def data(cache_dir, targets_dir, snac_dir):
    return cache_dir, targets_dir, snac_dir


@pytest.fixture(scope="module")
def unbroken(data, tmp_path_factory):
    """(run directory, weights of the model after each step)."""
    out, after = tmp_path_factory.mktemp("adversarial"), {}

    def watch(run, state, batch):
        result = train_step(run, state, batch)
        after[state.step] = {k: v.clone() for k, v in state.model.state_dict().items()}
        return result

    assert training(*data, out, *TINY, "--save_every_batches", 1, "--keep_checkpoints", -1).train(watch) == 0
    return out, after


def moved(a: dict, b: dict) -> set[str]:
    """Parts of the model that differ."""
    return {k.partition(".")[0] for k in a if not torch.equal(a[k], b[k])}


def test_the_phase_trains_discriminators_alone_then_heads_then_the_trunk(unbroken):
    out, after = unbroken
    assert moved(after[1], after[2]) == {"head_48k"}  # warmup
    assert moved(after[2], after[3]) == set()
    assert moved(after[3], after[4]) == {"head_48k", "head_24k"}
    assert moved(after[4], after[5]) == moved(after[5], after[6]) == {"head_48k", "head_24k", "trunk"}
    rows = metrics(out)
    assert [r["phase"] for r in rows] == ["warmup"] * 2 + ["adversarial"] * 4
    names = {f"{loss}_{head}" for loss in ("disc", "adv", "feat") for head in ("24k", "48k")}
    assert not names & set(rows[1]) and all(names <= set(r) for r in rows[2:])
    assert [r["lr_trunk"] for r in rows[2:]] == [0, 0, 2e-5, 2e-5]
    for r in rows[2:]:  # the total is what the weights say
        heads = {"24k": 0.3, "48k": 1.0}
        total = sum(w * (r[f"loss_{h}"] + r[f"adv_{h}"] + 2 * r[f"feat_{h}"]) for h, w in heads.items())
        assert math.isclose(r["loss"], total, rel_tol=1e-5)
    val = metrics(out, "val")[-1]
    assert not names & set(val) and val["best"] == ["loss", "loss_24k", "loss_48k"]  # the newest counts
    before, later = (load_checkpoint(out / f"checkpoint_epoch{e}.pt") for e in (1, 2))
    assert "adversarial" not in before and later["adversarial"]["skipped"] == 0
    steps = [s["step"] for s in later["adversarial"]["optimizer"]["state"].values()]
    assert steps and all(s == 4 for s in steps)


def test_without_it_nothing_of_it_is_there(data, tmp_path, monkeypatch):
    monkeypatch.setattr(adversarial, "Discriminators", None)  # would fail
    t = training(*data, tmp_path, *TINY, "--adv_weight", 0)
    assert t.train() == 0 and t.state.adversary is None
    assert "adversarial" not in load_checkpoint(tmp_path / "checkpoint_epoch2.pt")
    written = set().union(*metrics(tmp_path))
    assert not {k for k in written if k.startswith(("adv", "disc", "feat", "lr_disc"))}


@pytest.mark.parametrize("stop_at", [2, 4])
def test_resume_continues_as_if_never_stopped(stop_at, data, tmp_path, unbroken):
    """Stopped before the phase, and within it: the same bits, the discriminators' optimiser too."""
    assert training(*data, tmp_path, *TINY).train(stop_after(stop_at)) == 3
    assert newest(tmp_path)[1]["global_step"] == stop_at
    assert Training(["--resume", "auto", "--output_dir", str(tmp_path)]).train() == 0
    assert_same_state(tmp_path / "checkpoint_epoch2.pt", unbroken[0] / "checkpoint_epoch2.pt")


def test_a_checkpoint_without_its_discriminators_is_malformed(data, tmp_path, unbroken):
    saved = load_checkpoint(unbroken[0] / "checkpoint_epoch2_iter4.pt")
    del saved["adversarial"]["optimizer"]
    torch.save(saved, tmp_path / "broken.pt")
    with pytest.raises(UserError, match="malformed"):
        training(*data, tmp_path / "run", *TINY, "--resume", tmp_path / "broken.pt")


# ---- the same step, cut into other pieces ----


def close(a, b) -> None:
    for r, s in zip(metrics(a), metrics(b), strict=True):
        for k in ("disc_48k", "adv_48k", "feat_48k", "disc_24k", "loss", "disc_norm"):
            assert k not in r or math.isclose(r[k], s[k], rel_tol=1e-3), (r["step"], k)


def test_micro_batches_give_the_same_step(data, tmp_path, unbroken):
    assert training(*data, tmp_path, *TINY, "--accum_steps", 2).train() == 0
    close(tmp_path, unbroken[0])


def test_two_processes_train_as_one(data, tmp_path, unbroken):
    argv = tiny_args(*data, tmp_path, *TINY)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    done = subprocess.run([*command, str(ROOT / "train_dual_head.py"), *argv], capture_output=True, text=True,
                          timeout=300)  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    close(tmp_path, unbroken[0])


# ---- accidents of the discriminators ----


def test_nan_in_the_discriminators_alone_costs_their_step_only(data, tmp_path, unbroken, monkeypatch):
    """The decoder's step is the one it would have been, bit for bit; they are as before it."""
    good, weights = adversarial.disc_loss, {}

    def step(run, state, batch):
        bad = state.step == 4
        monkeypatch.setattr(adversarial, "disc_loss", lambda r, f: good(r, f) * (math.nan if bad else 1))
        before = {k: v.clone() for k, v in state.adversary.nets.state_dict().items()} if bad else {}
        result = train_step(run, state, batch)
        if bad:
            weights.update({k: v.clone() for k, v in state.model.state_dict().items()})
            assert all(torch.equal(v, before[k]) for k, v in state.adversary.nets.state_dict().items())
        return result

    start = unbroken[0] / "checkpoint_epoch2_iter4.pt"
    t = training(*data, tmp_path, *TINY, "--resume", start)
    assert t.train(step) == 0
    assert moved(weights, unbroken[1][5]) == set()
    assert t.state.skipped == 0 and t.state.adversary.skipped == 1
    saved = load_checkpoint(tmp_path / "checkpoint_epoch2.pt")
    assert saved["adversarial"]["skipped"] == 1 and saved["guard"]["skipped"] == 0
    assert all(v.isfinite().all() for v in saved["adversarial"]["model"].values())
    (event,) = metrics(tmp_path, "skip")
    assert event["step"] == 5 and "discriminators nan" in event["reason"] and event["disc_skipped"] == 1
    assert [r["disc_skipped"] for r in metrics(tmp_path)] == [1, 1]


def test_broken_discriminators_leave_the_decoder_to_its_other_losses(data, tmp_path, unbroken):
    t = training(*data, tmp_path, *TINY, "--resume", unbroken[0] / "checkpoint_epoch2_iter4.pt")
    with torch.no_grad():
        next(t.state.adversary.nets["48k"].parameters()).fill_(math.nan)
    assert t.train() == 0
    assert t.state.skipped == 0 and t.state.adversary.skipped == 2
    model = t.state.model.state_dict()
    assert all(v.isfinite().all() for v in model.values())
    assert "head_48k" in moved(model, unbroken[1][4])


def test_a_step_that_the_decoder_skips_they_skip_too(data, tmp_path, unbroken):
    t = training(*data, tmp_path, *TINY, "--resume", unbroken[0] / "checkpoint_epoch2_iter4.pt")
    before = {k: v.clone() for k, v in t.state.adversary.nets.state_dict().items()}

    def step(run, state, batch):
        if state.step == 4:
            batch.parts[0]["audio_48k"][0, 0, 0] = math.nan
        result = train_step(run, state, batch)
        if state.step == 5:
            assert all(torch.equal(v, before[k]) for k, v in state.adversary.nets.state_dict().items())
        return result

    assert t.train(step) == 0 and t.state.skipped == 1


# ---- where it begins, and what it must not touch ----


def test_gradients_of_discriminators_reach_audio_only(snac_dir):
    adversary = Adversary(options(disc_width=1, heads="24k"), torch.device("cpu"), bf16=False)
    audio = torch.randn(2, 1, 4096, requires_grad=True)
    batch = {"audio_24k": torch.randn(2, 1, 4096), "valid_24k": torch.tensor([4096, 0]),
             "phase_true": torch.tensor([True, True])}  # fmt: skip
    adversary.begin({"disc": 1e-4})
    found = adversary.losses((audio, None), batch, 2)
    theirs = [p.grad.clone() for p in adversary.nets.parameters()]
    assert audio.grad is None  # what they learn from is detached
    (found["adv_24k"] + found["feat_24k"]).sum().backward()
    assert all(torch.equal(p.grad, g) for p, g in zip(adversary.nets.parameters(), theirs))
    assert audio.grad[0].any() and not audio.grad[1].any()  # a filler has no part in it
    assert not any(found[k][1] for k in found) and not found["disc_24k"].requires_grad


def test_a_decoder_of_24_khz_learns_from_them_and_its_encoder_does_not(speech_48k, snac_dir, tmp_path):
    flags = *raw(speech_48k), *TINY, "--warmup_epochs", 0, "--epochs", 1
    t = recipe_training("phase10", snac_dir, tmp_path / "run", *flags)
    before = {k: v.clone() for k, v in t.state.model.state_dict().items()}
    assert t.train() == 0
    assert moved(before, t.state.model.state_dict()) == {"trunk", "head_24k"}
    assert {"disc_24k", "lr_disc"} <= set(metrics(tmp_path / "run")[-1])
    for part in ("encoder", "vq"):
        with pytest.raises(UserError, match="harm encoder and quantizers"):
            recipe_training("phase10", snac_dir, tmp_path / "no", *flags, f"--no-freeze_{part}")


def test_phase12_gan_goes_on_from_a_finished_run(codes_48k, speech_48k, snac_dir, tmp_path):
    of_data = cached(codes_48k, speech_48k)
    assert recipe_training("phase12", snac_dir, tmp_path / "a", *of_data, "--epochs", 1).train() == 0
    finished, out = tmp_path / "a" / "checkpoint_epoch1.pt", tmp_path / "b"
    short = "--limit", 4, "--segment_schedule", "0.2,0.2", "--disc_width", 1, "--val_limit", 1, "--epochs", 1
    with pytest.raises(UserError, match="goes on from a finished run"):
        recipe_training("phase12-gan", snac_dir, out, *of_data, *short)
    with pytest.raises(UserError, match="has heads 24k and 48k: give --heads both"):
        recipe_training(
            "phase12-gan", snac_dir, out, *of_data, "--start_checkpoint", finished, "--heads", "48k"
        )
    t = recipe_training("phase12-gan", snac_dir, out, *of_data, *short, "--start_checkpoint", finished)
    assert moved(t.state.model.state_dict(), load_checkpoint(finished)["model"]) == set()
    assert t.state.phase == "adversarial" and t.run.args.mel == "multi"
    finished.unlink()  # a resumed run has its own
    assert t.train(stop_after(1)) == 3 or t.state.step == 1
    assert Training(["--resume", "auto", "--output_dir", str(out)]).state.adversary is not None


def test_the_memory_of_a_step_counts_them(snac_dir):
    snac = load_snac(str(snac_dir))
    geometry, model = geometry_of(snac, ""), DualHeadDecoder(snac, ("48k",))
    with_them, without = (
        speed.bytes_a_second(model, geometry, options(heads="48k", disc_width=1, adv_weight=w), False, None,
                             (0.2, 0.4))[0]
        for w in (1.0, 0.0)
    )  # fmt: skip
    assert with_them > 1.2 * without
