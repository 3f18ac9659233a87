"""snac48/checkpoint.py: written whole, verified before they are believed."""

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
    require,
    restore_optimizer,
    save_checkpoint,
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


def test_the_newest_good_one_is_found_and_the_oldest_are_pruned(tmp_path, capsys):
    for i in range(5):
        save_checkpoint(tmp_path / f"checkpoint_{i}.pt", dict.fromkeys(RESUMED, 1) | {"args": {"i": i}})
        os.utime(tmp_path / f"checkpoint_{i}.pt", (i, i))
    (tmp_path / "checkpoint_4.pt").write_bytes(b"half of it")
    assert newest(tmp_path)[1]["args"]["i"] == 3
    assert "checkpoint_4.pt is damaged" in capsys.readouterr().err
    prune(tmp_path.glob("*.pt"), -1)
    assert len(list(tmp_path.glob("*.pt"))) == 5
    prune(tmp_path.glob("*.pt"), 2)
    assert sorted(p.name for p in tmp_path.glob("*.pt")) == ["checkpoint_3.pt", "checkpoint_4.pt"]


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
