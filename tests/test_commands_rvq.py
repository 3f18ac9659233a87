"""What people type at the language model: the three runs by value, the defaults, --help, a longer context."""

import math
import re

import pytest
from conftest import ROOT, run
from helpers.rvq import command, latest, make_npqs, metrics, options, run_here, same

import train_rvq
from snac48 import tokens
from snac48.checkpoint import save_checkpoint
from snac48.cli import UserError

MODEL = {"d_model": 768, "layers": 16, "heads": 12, "dropout": 0.1, "lr": 2e-4, "weight_decay": 0.02,
         "ema": 0.999, "label_smoothing": 0.05, "cb_weights": "auto",
         "cb_weights_auto_alpha": 0.5}  # fmt: skip
EVERY = {"data": "npq_out/*.npq", "amp": True, "log_lr_steps": 50, "eval_audio_every": 5, "eval_frames": 1290,
         "eval_temperature": 1.1}  # fmt: skip
RUNS = {
    1: EVERY | {"ctx": 1280, "step": 640, "batch": 8, "accum": 1, "epochs": 300, "d_model": 512, "layers": 12,
                "heads": 8, "dropout": 0.1, "ema": 0, "label_smoothing": 0, "outlier_skip_factor": 0,
                "cb_weights": "uniform", "eval_outdir": "rvq_eval", "quiet": True, "save_dir": "rvq_ckpts"},
    2: EVERY | MODEL | {"ctx": 1280, "step": 640, "batch": 4, "accum": 6, "epochs": 350, "archive_every": 10,
                        "keep_archived": 20, "quiet": False, "save_dir": "rvq_ckpts_big"},
    3: EVERY | MODEL | {"ctx": 512, "step": 256, "batch": 6, "accum": 6, "epochs": 250, "fused_optim": True,
                        "compile": True, "persistent_workers": True, "prefetch": 6, "eval_on_cpu": True,
                        "val_every": 1, "quiet": True, "tag": "base512", "save_dir": "rvq_ckpts_fast"},
}  # fmt: skip
# {run: (training windows, held out, steps an epoch)}
WINDOWS = {2: (34_520, 1_816, 1_438), 3: (62_640, 3_296, 1_740)}


@pytest.mark.parametrize("number", RUNS)
def test_the_three_runs_by_value(number):
    argv = ["--config", str(ROOT / f"configs/rvq_run{number}.json")]
    args, want = options(argv), RUNS[number]
    assert {k: getattr(args, k) for k in want} == want
    assert options([*argv, "--batch", "9"]).batch == 9  # flag > config
    if number in WINDOWS:
        windows, held_out, steps = WINDOWS[number]
        assert tokens.steps_per_epoch(windows, args.batch, args.accum) == steps
        assert int(0.05 * (windows + held_out)) == held_out


def test_the_defaults_are_run_3_without_what_a_machine_must_have():
    third, plain = (options(argv) for argv in (["--config", str(ROOT / "configs/rvq_run3.json")], []))
    differ = {k for k, v in vars(plain).items() if getattr(third, k) != v}
    assert differ == {"amp", "fused_optim", "compile", "persistent_workers", "eval_on_cpu", "quiet", "tag",
                      "save_dir", "config"}  # fmt: skip


@pytest.mark.parametrize("argv", [["train_rvq.py"], ["train_rvq.py", "generate"], ["doctor.py"],
                                  ["train_rvq.py", "tokens", "from-dac"]])  # fmt: skip
def test_help_shows_every_default(argv):
    shown = run(*argv, "--help").stdout
    for entry in re.split(r"\n  (?=-)", shown.partition("\noptions:\n")[2])[1:]:
        words = " ".join(entry.split())
        assert words.startswith("-h,") or "(default: " in words or "(required)" in words, words


def test_a_longer_context_goes_on_from_the_weights_averages_and_moments_of_a_shorter(tmp_path, capsys):
    """ctx first short, then fine-tuned at a longer one, in another folder: --resume FILE --ctx N --step M."""
    data = make_npqs(tmp_path / "npq", T=26)
    assert run_here(command(tmp_path, data, "--epochs", "2")) == 0
    short, path = latest(tmp_path), str(tmp_path / "run/rvq_3cb_latest.pt")
    longer = command(tmp_path, data, "--resume", path, "--ctx", "24", "--step", "12", run="long")
    _, state = train_rvq.start(train_rvq.parse_training([*longer, "--epochs", "4"]))
    found = state.state_dict()  # what the first step finds
    assert all(same(found[k], short[k]) for k in ("model", "ema", "best"))
    assert same(found["optimizer"]["state"], short["optimizer"]["state"])
    said = next(x for x in capsys.readouterr().out.splitlines() if "ctx 12 -> 24" in x)
    assert "step 6 -> 12" in said and "continuing at the start of epoch 3" in said and "batch" not in said
    assert run_here([*longer, "--epochs", "4"]) == 0
    after = latest(tmp_path, "long")
    assert after["epoch"] == 4 and after["arch"]["ctx"] == 24 and after["per_epoch"] < short["per_epoch"]
    assert after["global_step"] == 4 * after["per_epoch"]
    with pytest.raises(UserError, match="has finished its 2 epochs"):
        run_here([*longer, "--epochs", "2"])


def test_losses_are_means_since_the_last_line_and_of_the_epoch(tmp_path, monkeypatch):
    """Also over a stop between two lines; a skipped step counts in none; clocks go on, too."""
    data, calls, seen = make_npqs(tmp_path / "npq"), [0], {}
    step, objective, check_stop = train_rvq.train_step, train_rvq.objective, train_rvq.check_stop

    def spied(run, state, passes, frames):
        skipped = state.guard.skipped
        norm, ce = step(run, state, passes, frames)
        seen[state.step] = None if state.guard.skipped > skipped else (state.train_loss, *ce)
        return norm, ce

    def poisoned(*args):
        calls[0] += 1
        loss, ce = objective(*args)
        return loss * (float("nan") if calls[0] == 5 else 1), ce

    def stopped(run):
        if len(seen) == 9:
            raise train_rvq.Stopped

    for name, double in (("train_step", spied), ("objective", poisoned), ("check_stop", stopped)):
        monkeypatch.setattr(train_rvq, name, double)
    argv = command(tmp_path, data, "--epochs", "3", "--val-every", "2", "--log-lr-steps", "4")
    assert run_here(argv) == 3
    monkeypatch.setattr(train_rvq, "check_stop", check_stop)
    save_checkpoint(tmp_path / "run/rvq_3cb_latest.pt", latest(tmp_path) | {"spent": [5000.0, 500.0]})
    assert run_here(argv) == 0

    lines, before = metrics(tmp_path / "run"), 0
    assert [k for k, v in seen.items() if v is None] == [3]
    for line in (m for m in lines if "event" not in m):
        own = [seen[s] for s in range(before + 1, line["step"] + 1) if seen[s]]
        means = [sum(x) / len(own) for x in zip(*own)]
        assert [line["loss"], *line["ce"]] == pytest.approx(means, abs=1e-5)
        assert line["ppl"] == pytest.approx(math.exp(sum(means[1:]) / 3), rel=1e-4)
        before = line["step"]
    assert latest(tmp_path)["per_epoch"] == 6  # so the stop after step 9 lay between the lines of 8 and 12
    ends = [m for m in lines if m.get("event") in ("val", "epoch")]
    assert [(m["event"], m["epoch"]) for m in ends] == [("epoch", 1), ("val", 2), ("val", 3)]
    for m in ends:
        own = [seen[s][0] for s in range(m["step"] - 5, m["step"] + 1) if seen[s]]
        assert m["train_loss"] == pytest.approx(sum(own) / len(own))
    assert ends[1]["epoch_s"] >= 500 and ends[1]["elapsed_s"] >= 5000  # what was spent before the stop counts
    assert ends[2]["epoch_s"] < 100 and ends[2]["elapsed_s"] >= 5000

    text = (tmp_path / "run/training.log").read_text()
    assert text.splitlines()[0].endswith(" device cpu")
    assert re.search(r" epoch 1/3 train \d\.\d{4}; took 0:00:", text)
    means = "train {train_loss:.4f} val {val_loss:.4f} ppl {ppl:.1f} ".format(**ends[1])
    said = next(x for x in text.splitlines() if " epoch 2/3 " + means in x)
    assert re.search(r" ce( \d\.\d{3}){3}( best)?; took 0:08:\d\d, in all 1:23:\d\d$", said)
