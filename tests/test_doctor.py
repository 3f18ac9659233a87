"""doctor.py: names the checkpoint where a run went wrong; reads both trainers' checkpoints."""

import csv
import sys

import numpy as np
import pytest
import torch
from conftest import run
from helpers.rvq import command, make_npqs, metrics, run_here

import doctor
from snac48.checkpoint import load_checkpoint, save_checkpoint
from snac48.cli import UserError


def train(data, folder, *extra):
    return run_here(command(folder.parent, data, "--quiet", *extra, run=folder.name))


def run_doctor(monkeypatch, *argv):
    monkeypatch.setattr(sys, "argv", ["doctor.py", *map(str, argv)])
    return doctor.main()


@pytest.fixture(scope="module")
def healthy(tmp_path_factory):
    tmp = tmp_path_factory.mktemp("doctor")
    data = make_npqs(tmp / "npq")
    train(data, tmp / "run", "--epochs", "6", "--lr", "3e-3")
    return tmp, data


def test_a_healthy_run_is_healthy(healthy, monkeypatch, capsys):
    tmp, data = healthy
    files = sorted((tmp / "run").glob("*_epoch_e*.pt"))  # as a shell expands them; a glob that has them again
    code = run_doctor(
        monkeypatch, "--ckpts", *files, tmp / "run/*.pt", "--probe-data", data, "--csv", tmp / "h.csv"
    )
    out = capsys.readouterr().out
    assert code == 0 and "nothing wrong" in out
    rows = list(csv.DictReader(open(tmp / "h.csv")))
    steps = [int(r["step"]) for r in rows]
    assert sorted(r["file"] for r in rows) == sorted(p.name for p in (tmp / "run").glob("*.pt"))
    assert steps == sorted(steps) and set(rows[0]) == set(doctor.COLUMNS)
    last = next(r for r in rows if "_epoch_e0006" in r["file"])
    state = load_checkpoint(tmp / "run" / last["file"])
    flat = torch.cat([w.flatten() for w in state["model"].values()]).double()
    assert int(last["parameters"]) == len(flat) and float(last["l2"]) == pytest.approx(flat.norm().item())
    second = torch.cat([e["exp_avg_sq"].flatten() for e in state["optimizer"]["state"].values()]).double()
    assert float(last["adam_v"]) == pytest.approx(second.mean().sqrt().item(), rel=1e-6)
    assert float(last["lr"]) == pytest.approx(3e-3 * 0.05) and 0 < float(last["entropy"]) <= np.log(16)
    assert float(last["probe_ce"]) < np.log(16) and float(last["best_val"]) <= float(last["val_loss"])
    previous = load_checkpoint(tmp / "run" / next(r["file"] for r in rows if "_epoch_e0005" in r["file"]))
    other = torch.cat([w.flatten() for w in previous["model"].values()]).double()
    moved = [float(r["delta"]) for r in rows if r["epoch"] == "6" and r["delta"] and float(r["delta"])]
    assert moved[0] == pytest.approx((flat - other).norm().item(), rel=1e-6)


def test_names_where_a_large_rate_broke_the_run(healthy, tmp_path, monkeypatch, capsys):
    """The rate rises through the whole run: it learns, then falls apart. Truth: the run's own metrics."""
    _, data = healthy
    train(data, tmp_path / "run", "--epochs", "14", "--lr", "1.5", "--warmup-ratio", "0.99", "--ema", "0",
          "--outlier-skip-factor", "0", "--grad-clip", "0")  # fmt: skip
    vals = [m["val_loss"] for m in metrics(tmp_path / "run") if m.get("event") == "val"]
    sick = (v > min([9e9, *vals[:i]]) + 0.5 or v > np.log(16) * 1.02 + 0.05 for i, v in enumerate(vals))
    truth = 1 + list(sick).index(True)
    code = run_doctor(monkeypatch, "--ckpts", tmp_path / "run/*_epoch_e*.pt")
    out = capsys.readouterr().out
    assert code == 4 and f"It went wrong at rvq_3cb_epoch_e{truth:04d}__" in out, (vals, out)
    code = run_doctor(monkeypatch, "--ckpts", tmp_path / "run/*_epoch_e*.pt", "--probe-data", data)
    assert code == 4 and f"rvq_3cb_epoch_e{truth:04d}__" in capsys.readouterr().out.split("went wrong")[1]


def test_a_rate_raised_on_resume(healthy, tmp_path, monkeypatch, capsys):
    _, data = healthy
    train(data, tmp_path / "run", "--epochs", "4", "--lr", "3e-3")
    train(data, tmp_path / "run", "--epochs", "7", "--lr", "3", "--ema", "0", "--outlier-skip-factor", "0")
    assert run_doctor(monkeypatch, "--ckpts", tmp_path / "run/*_epoch_e*.pt") == 4
    out = capsys.readouterr().out
    assert "went wrong at rvq_3cb_epoch_e0005__" in out and "last healthy one is rvq_3cb_epoch_e0004__" in out


def test_nan_and_damage_are_named(healthy, tmp_path, monkeypatch, capsys):
    tmp, _ = healthy
    for path in sorted((tmp / "run").glob("*_epoch_e000[1-4]*.pt")):
        (tmp_path / path.name).write_bytes(path.read_bytes())
    third = next(tmp_path.glob("*e0003*"))
    state = load_checkpoint(third)
    state["model"]["temporal.norm.weight"][1] = float("nan")
    save_checkpoint(third, state)
    fourth = next(tmp_path.glob("*e0004*"))
    fourth.write_bytes(fourth.read_bytes()[:500])
    assert run_doctor(monkeypatch, "--ckpts", tmp_path / "*.pt") == 4
    out = capsys.readouterr().out
    assert f"went wrong at {third.name}" in out and "temporal.norm.weight" in out
    assert f"{fourth} is damaged" in out


def dual_head_checkpoint(folder, epoch, weight, lr, optimizer):
    """The dict of train_dual_head.py (SPEC 5) on a toy module."""
    save_checkpoint(folder / f"checkpoint_epoch{epoch}.pt", {
        "model": {"trunk.0.weight": weight.clone(), "count": torch.tensor(3)}, "optimizer": optimizer,
        "epoch": epoch, "scheduler": {"plan": []}, "ema": None, "global_step": epoch * 100, "phase": "main",
        "segment_length": 1.0, "args": {"lr": lr}, "geometry": {"hop_length": 512}, "rng": {"seed": 1},
        "versions": {}, "guard": {"norm": 1.0, "skipped": 2, "in_a_row": 0},
        "best": {"loss": 2.5, "loss_24k": 2.0, "loss_48k": 3.0},
    })  # fmt: skip


def test_dual_head_checkpoints(tmp_path, monkeypatch, capsys):
    torch.manual_seed(0)
    p = torch.nn.Parameter(torch.randn(64, 8))
    opt = torch.optim.AdamW([{"params": [p], "lr": 1e-4}])
    for epoch in range(1, 7):
        p.grad = torch.randn_like(p)
        opt.param_groups[0]["lr"] = 1e-4 if epoch < 5 else 0.2
        opt.step()
        dual_head_checkpoint(tmp_path, epoch, p.data, 1e-4, opt.state_dict())
    assert run_doctor(monkeypatch, "--ckpts", tmp_path / "*.pt", "--csv", tmp_path / "h.csv") == 4
    out = capsys.readouterr().out
    assert "went wrong at checkpoint_epoch5.pt" in out and "times as far" in out
    rows = list(csv.DictReader(open(tmp_path / "h.csv")))
    assert [r["epoch"] for r in rows] == list("123456")
    assert rows[0]["best_val"] == "2.5" and rows[0]["skipped"] == "2"
    assert rows[4]["lr"] == "0.2" and rows[0]["kind"] == "dual_head"


def test_errors_and_help(tmp_path, monkeypatch):
    with pytest.raises(UserError, match="no such file"):
        run_doctor(monkeypatch, "--ckpts", tmp_path / "*.pt")
    save_checkpoint(tmp_path / "a.pt", {"weights": 1})
    with pytest.raises(UserError, match="not a checkpoint of"):
        run_doctor(monkeypatch, "--ckpts", tmp_path / "*.pt")
    with pytest.raises(UserError, match=r"b\.pt: no such file"):
        run_doctor(monkeypatch, "--ckpts", tmp_path / "a.pt", tmp_path / "b.pt")
    assert "--probe-data" in run("doctor.py", "--help").stdout
