"""snac48/checkpoint.py: written whole, verified before they are believed."""

import argparse
import os

import pytest
import torch
from helpers.training import newest, tiny_args, training

import train_dual_head as T
from snac48 import files
from snac48.checkpoint import (
    OPENED,
    RESUMED,
    load_checkpoint,
    prune,
    refuse_overwriting,
    require,
    restore_optimizer,
    save_checkpoint,
    set_aside,
)
from snac48.cli import UserError


def test_a_checkpoint_is_the_old_or_the_new_one_wherever_its_writing_ends(tmp_path, monkeypatch):
    path = tmp_path / "c.pt"
    save_checkpoint(path, {"a": torch.zeros(3)})
    for function in ("fsync", "replace"):
        with monkeypatch.context() as m:
            m.setattr(files.os, function, lambda *a: (_ for _ in ()).throw(KeyboardInterrupt))
            with pytest.raises(KeyboardInterrupt):
                save_checkpoint(path, {"a": torch.ones(3)})
        assert load_checkpoint(path)["a"].sum() == 0 and os.listdir(tmp_path) == ["c.pt"]


def test_every_flipped_bit_of_the_headers_is_noticed_or_harmless(tmp_path):
    """The zip's own structure has no checksum: all bits of one local header and of its directory entry."""
    path = tmp_path / "c.pt"
    save_checkpoint(path, {"a": torch.arange(20.0), "b": {"c": 3}})
    data = path.read_bytes()
    central = data.index(b"PK\x01\x02")
    spots = [*range(0, 64), *range(central, central + 80), *range(len(data) - 22, len(data))]
    noticed = 0
    for at in spots:
        for bit in range(0, 8, 3):
            path.write_bytes(data[:at] + bytes([data[at] ^ 1 << bit]) + data[at + 1 :])
            try:
                state = load_checkpoint(path)
                assert torch.equal(state["a"], torch.arange(20.0)) and state["b"] == {"c": 3}, (at, bit)
            except UserError:
                noticed += 1
    assert noticed > len(spots) // 2


def test_a_pickle_that_would_run_code_is_refused(tmp_path):
    class Bad:
        def __reduce__(self):
            return (open, (str(tmp_path / "owned"), "w"))

    torch.save({"model": Bad()}, tmp_path / "bad.pt")
    with pytest.raises(UserError, match="refused"):
        load_checkpoint(tmp_path / "bad.pt")
    assert not (tmp_path / "owned").exists()


def test_a_checkpoint_that_lacks_anything_is_not_resumed(cache_dir, targets_dir, snac_dir, tmp_path):
    flags = cache_dir, targets_dir, snac_dir, tmp_path / "run", "--limit", 4, "--val_limit", 1
    assert training(*flags).train() == 0
    path, whole = newest(tmp_path / "run")
    assert path.name == "checkpoint_epoch3.pt" and "codes" in RESUMED
    for key in RESUMED:
        saved = {k: v for k, v in whole.items() if k != key}
        with pytest.raises(UserError, match=f"it lacks {key}$"):
            require(saved, path, RESUMED)
        if key not in OPENED:
            assert require(saved, path) is saved  # enough to decode with
    with pytest.raises(UserError, match="is a checkpoint of older scripts"):
        require({k: whole[k] for k in ("model", "optimizer", "epoch")}, path)
    save_checkpoint(path, {k: v for k, v in whole.items() if k != "codes"})
    with pytest.raises(UserError, match="it lacks codes"):
        T.parse_args([*tiny_args(*flags), "--resume", str(path)])


def make(folder, step, validated=0, name=None, **args):
    """A checkpoint of a step, whose file is the older the later the step: as by a clock that was set back."""
    folder.mkdir(exist_ok=True)
    path = folder / (name or f"checkpoint_epoch{step}.pt")
    known = {"global_step": step, "validated_epoch": validated, "args": args}
    save_checkpoint(path, dict.fromkeys(RESUMED, 1) | known)
    os.utime(path, (1000 - step, 1000 - step))
    return path


def test_the_step_says_which_is_the_newest_never_the_clock(tmp_path, capsys):
    for step in (9, 10, 100, 20):
        make(tmp_path, step)
    make(tmp_path, 100, 3, "checkpoint_epoch3_time_20200101_000000.pt")
    assert newest(tmp_path)[0].name == "checkpoint_epoch3_time_20200101_000000.pt"  # validated: it is later
    (tmp_path / "checkpoint_epoch999.pt").write_bytes(b"half of it")
    assert newest(tmp_path)[1]["validated_epoch"] == 3
    assert "checkpoint_epoch999.pt is damaged" in capsys.readouterr().err
    prune(tmp_path.glob("*.pt"), -1)
    assert len(list(tmp_path.glob("*.pt"))) == 6
    prune(tmp_path.glob("*.pt"), 3)  # the damaged one goes first
    assert sorted(p.name for p in tmp_path.glob("*.pt")) == [
        "checkpoint_epoch100.pt", "checkpoint_epoch20.pt",
        "checkpoint_epoch3_time_20200101_000000.pt"]  # fmt: skip


def test_checkpoints_beyond_the_one_that_a_run_goes_on_from_step_aside(tmp_path):
    for step in (5, 10, 15):
        make(tmp_path, step)
    (tmp_path / "checkpoint_bad.pt").write_bytes(b"it would be warned about for ever")
    said = []
    set_aside(tmp_path, "checkpoint_*.pt", (5, 0), said.append)
    assert "from step 5; checkpoint_bad.pt, checkpoint_epoch10.pt, checkpoint_epoch15.pt, damaged" in said[0]
    assert sorted(p.name for p in (tmp_path / "abandoned").iterdir()) == [
        "checkpoint_bad.pt", "checkpoint_epoch10.pt", "checkpoint_epoch15.pt"]  # fmt: skip
    set_aside(tmp_path, "checkpoint_*.pt", (5, 0), said.append)
    assert newest(tmp_path)[0].name == "checkpoint_epoch5.pt" and len(said) == 1
    make(tmp_path, 10)  # again: the one of before stays
    set_aside(tmp_path, "checkpoint_*.pt", (5, 0), said.append)
    assert (tmp_path / "abandoned" / "checkpoint_epoch10.pt.1").is_file()
    assert len(list((tmp_path / "abandoned").iterdir())) == 4


def test_a_run_of_others_is_never_overwritten(tmp_path):
    start = lambda folder, asked=False, resume="", **rest: refuse_overwriting(
        argparse.Namespace(output_dir=str(folder), resume=resume, **rest), asked
    )
    start(tmp_path / "new")
    make(tmp_path / "held", 5)
    for asked, words in ((False, "or go on with that run by --resume auto"), (True, "can't be used")):
        with pytest.raises(UserError, match=words):
            start(tmp_path / "held", asked)
    start(tmp_path / "held", resume=str(tmp_path / "held" / "checkpoint_epoch5.pt"))
    other = make(tmp_path / "other", 7)
    with pytest.raises(UserError, match=r"holds a run of its own .*lies elsewhere"):
        start(tmp_path / "held", resume=str(other))
    start(tmp_path / "third", resume=str(other))
    # a best model alone: of another run, of one of ours that was killed before its checkpoint, of a start
    make(tmp_path / "best", 5, name="best_model.pt", lr=0.1, device="cpu")
    with pytest.raises(
        UserError, match=r"holds best_model.pt of step 5 of an earlier run with other options"
    ):
        start(tmp_path / "best", lr=0.2)
    start(tmp_path / "best", asked=True, lr=0.1, device="0", bf16=None)
    make(tmp_path / "begun", 0, name="best_model_48k.pt", lr=0.1)
    start(tmp_path / "begun", lr=0.2)


@pytest.mark.parametrize("fused", [True, False])
def test_an_optimisers_options_are_the_new_runs(fused):
    """Torch puts `step` where the kernel wants it only if the flags are right before it loads; a checkpoint
    of a CPU (fused=False) would otherwise turn a GPU's fused kernel off."""

    def optimizer(**options):
        torch.manual_seed(0)
        p = torch.nn.Parameter(torch.randn(8))
        p.grad = torch.randn(8)
        return p, torch.optim.AdamW([p], **options)

    _, old = optimizer(lr=0.3, fused=not fused, foreach=None if fused else False, weight_decay=0.5)
    old.step()
    saved = old.state_dict()
    saved["state"][0]["step"] = saved["state"][0]["step"].double()  # shows whether torch converts it
    p, new = optimizer(lr=0.1, fused=fused, weight_decay=0.1)
    restore_optimizer(new, saved)
    group, moments = new.param_groups[0], new.state[p]
    assert (group["fused"], group["foreach"], group["weight_decay"], group["lr"]) == (fused, None, 0.1, 0.3)
    assert moments["step"].dtype == (torch.float32 if fused else torch.float64) and moments["step"] == 1
    assert torch.equal(moments["exp_avg"], saved["state"][0]["exp_avg"])
    assert saved["param_groups"][0]["weight_decay"] == 0.5  # the checkpoint's own content is left alone
    moments["step"] = moments["step"].float()
    new.step()
    with pytest.raises(ValueError):
        restore_optimizer(new, saved | {"param_groups": saved["param_groups"] * 2})
