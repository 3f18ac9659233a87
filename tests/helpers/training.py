"""Tiny trainings: their options, and one opened in this process that a test can watch and disturb."""

import argparse
import json
from pathlib import Path

import pytest
import torch

import train_dual_head as T
from snac48.checkpoint import RESUMED, find_resume, load_checkpoint, require
from snac48.cli import UserError
from snac48.runlog import HELD

train_step = T.train_step


def options(**changes) -> argparse.Namespace:
    return argparse.Namespace(**(T.DEFAULTS | changes))


def tiny_args(cache_dir, targets_dir, snac_dir, out, *more) -> list[str]:
    """Options of a run of a few steps: warmup 1 epoch, then 2 with a curriculum."""
    argv = ["--cache_dir", cache_dir, "--val_cache_dir", cache_dir, "--audio_48k_dir", targets_dir,
            "--val_audio_48k_dir", targets_dir, "--pretrained_model", snac_dir, "--output_dir", out,
            "--device", "cpu", "--epochs", 3, "--epoch_ranges", "1-1,2-3", "--segment_schedule", "0.3,0.5",
            "--batch_multiplier", "2.0,1.0", "--batch_size", 4, "--val_segment", 0.5, "--val_limit", 4,
            "--num_workers", 0, "--log_every", 1, "--main_lr", 1e-3,
            "--lr_24k_final_conv", 2e-4, *more]  # fmt: skip
    return [str(a) for a in argv]


def recipe_args(recipe, snac_dir, out, *more) -> list[str]:
    """Options of two short epochs of a recipe; the data is among `more`."""
    argv = ["--recipe", recipe, "--pretrained_model", snac_dir, "--output_dir", out, "--device", "cpu",
            "--batch_size", 4, "--val_segment", 0.5, "--val_limit", 4, "--num_workers", 0, "--log_every", 1,
            "--epochs", 2, "--epoch_ranges", "1-1,2-2", "--segment_schedule", "0.3,0.5",
            "--batch_multiplier", "1.0,1.0", "--n_ffts", "512,1024", *more]  # fmt: skip
    return [str(a) for a in argv]


def raw(folder) -> list:
    return ["--data_dir", folder, "--val_data_dir", folder]


def cached(cache, folder) -> list:
    return ["--cache_dir", cache, "--val_cache_dir", cache, "--audio_48k_dir", folder,
            "--val_audio_48k_dir", folder, "--target_kind", "recordings"]  # fmt: skip


class Training:
    """A training opened in this process: its `run` and `state`."""

    def __init__(self, argv):
        try:
            args, _, saved = T.parse_args(argv)
            self.run, self.state = T.open_run(args, saved)
        except UserError:  # a program would end, and with it its locks
            while HELD:
                HELD.popitem()[1].close()
            raise

    def train(self, step=train_step) -> int:
        """What main() does with it, up to the exit code; step(run, state, batch): in place of train_step."""
        with pytest.MonkeyPatch.context() as m:
            m.setattr(T, "train_step", step)
            try:
                T.train(self.run, self.state)
            except tuple(T.ENDINGS) as ending:
                return T.end(self.run, self.state, ending)


def training(*tiny) -> Training:
    return Training(tiny_args(*tiny))


def recipe_training(*tiny) -> Training:
    return Training(recipe_args(*tiny))


def stop_after(last: int):
    """A train_step after which, at step `last`, a stop is asked for."""

    def step(run, state, batch):
        if state.step == last - 1:
            run.stop.signal = "SIGTERM"
        return train_step(run, state, batch)

    return step


def newest(folder) -> tuple[Path | None, dict | None]:
    """What --resume auto would go on from: (path, content)."""
    path, saved = find_resume("auto", str(folder), "checkpoint_*.pt", lambda s, p: require(s, p, RESUMED))
    return (Path(path) if path else None), saved


def metrics(folder, event=None) -> list[dict]:
    """The records of metrics.jsonl of one event; None: the steps."""
    lines = (Path(folder) / "metrics.jsonl").read_text().splitlines()
    return [m for m in map(json.loads, lines) if m.get("event") == event]


def assert_same_state(a, b) -> None:
    a, b = (load_checkpoint(p) for p in (a, b))
    assert a["global_step"] == b["global_step"] and a["best"] == b["best"]
    for k in a["model"]:
        assert torch.equal(a["model"][k], b["model"][k]), k
    for i, s in a["optimizer"]["state"].items():
        assert all(torch.equal(s[k], b["optimizer"]["state"][i][k]) for k in s)
    for k in a["ema"] or {}:
        assert torch.equal(a["ema"][k], b["ema"][k])
    assert torch.equal(a["codes"], b["codes"])
    assert ("adversarial" in a) == ("adversarial" in b)
    if "adversarial" in a:
        ours, theirs = a["adversarial"], b["adversarial"]
        assert ours["skipped"] == theirs["skipped"]
        assert all(torch.equal(v, theirs["model"][k]) for k, v in ours["model"].items())
        assert ours["optimizer"]["state"].keys() == theirs["optimizer"]["state"].keys()
        for i, s in ours["optimizer"]["state"].items():
            assert all(torch.equal(s[k], theirs["optimizer"]["state"][i][k]) for k in s)
