"""tui/panels.py and tui/views.py: what is drawn, without a terminal."""

import math

import pytest
from helpers import fake_runs as fake
from helpers.fleet import one, plain, run_text, state_of, steady_fleet

from snac48.tui.panels import boundaries, panel, panels_of
from snac48.tui.runs import Run
from snac48.tui.ui import VIEWS, Ui
from snac48.tui.views import best_text, draw


def test_boundaries_of_the_curriculum():
    run = Run("x", None)
    run.state = state_of(fake.train_records(1480))
    assert boundaries(run) == [(205, "main"), (405, "2s"), (805, "3s"), (1205, "4s")]


def test_best_and_boundaries_and_bad_steps_are_drawn(tmp_path):
    r = fake.train_records(1480)
    r[50] |= {"loss_48k": math.nan}
    fleet, _ = one(tmp_path, r)
    text = "\n".join(plain(draw(fleet, Ui(view="run"), 120, 40)))
    assert "★" in text and "┊" in text and "×" in text and "best 0.47@6" in text and "4s" in text
    zoomed = "\n".join(plain(draw(fleet, Ui(view="run", zoom=3), 120, 40)))
    assert "└1295" in zoomed


def test_rvq_draws_a_curve_for_every_codebook(tmp_path):
    fleet, run = one(tmp_path, fake.rvq_records(), kind="rvq")
    assert run.kind == "rvq"
    titles = [title for title, *_ in panels_of(run)]
    assert titles == ["loss", "cross-entropy", "lr", "ppl", "cross-entropy val", "bits/s"]
    ce = [run.state.series[f"ce_{k}"].ys[-1] for k in range(3)]
    assert "cross-entropy " + " ".join(f"{k} {c:.4g}" for k, c in enumerate(ce)) in run_text(fleet)
    for number in (2, 5):  # alone, large: every curve ends in its codebook's number
        lines = panel(run, Ui(), 80, 20, panels_of(run)[number - 1])
        ends = {text: style for line in lines[1:] for text, style in line if text in ("0", "1", "2")}
        assert len(ends) == len(set(ends.values())) == 3
    many, run = one(tmp_path / "many", fake.rvq_records(codebooks=12), kind="rvq")
    text = run_text(many, 80, 24, panel=2)
    assert all(f" {c} " in text for c in "0123456789ab")  # a legend of two lines
    assert "f: 2 more" in run_text(many, 80, 24)


def test_a_run_of_one_head_has_no_empty_panels(tmp_path):
    for head, other in (("24k", "48k"), ("48k", "24k")):
        fleet, run = one(tmp_path / head, fake.one_head_records(head))
        titles = [title for title, *_ in panels_of(run)]
        both = {"24k": ["codes used", "perplexity", "codec"], "48k": []}[head]
        assert titles == [f"{head[:2]} kHz", "lr", "LSD val", *both, "audio s/s"]
        for view in VIEWS:
            for metric in ("", "loss_24k", "lr", "val loss_24k"):
                text = "\n".join(plain(draw(fleet, Ui(view=view, metric=metric), 120, 40)))
                assert view == "system" or "no points yet" not in text
                assert view in ("overview", "help") or other not in text
        best = run.state.best()
        assert best["epoch"] == 6 and best_text(run) == {"24k": "0.42@6", "48k": "0.47@6"}[head]
        row = run.row()
        assert row[f"loss_{other}"] is row[f"val_loss_{other}"] is None and row["best_epoch"] == 6
        assert row["best_val_loss_48k"] == (best["loss_48k"] if head == "48k" else None)
        assert "best val " + {"24k": "loss 0.42", "48k": "48k 0.47"}[head] in run_text(fleet)
    assert "codes used 0 1 1 0.9 2 0.8" in run_text(one(tmp_path / "x", fake.one_head_records("24k"))[0])


@pytest.mark.parametrize("phase", ["features", "autoencoder"])
def test_the_trainer_says_which_validations_count(tmp_path, phase):
    """In a phase whose decoder is fed more than codes a validation may be low, but is never the best."""
    first = [{"step": s, "epoch": 1, "phase": phase, "loss": 1.0, "features": 1.0} for s in range(1, 9)]
    val = {"event": "val", "loss_24k": 0.1, "loss": 0.1, "best": []}
    fleet, run = one(tmp_path, [{"event": "start", "step": 0}, val | {"step": 0, "epoch": 0}, *first])
    assert phase in run_text(fleet, 80, 24) and panels_of(run)[0][0] == "24 kHz"
    for r in (
        val | {"step": 8, "epoch": 1, "loss": 0.05},
        val | {"step": 20, "epoch": 2, "loss": 0.5, "best": ["loss"]},
    ):
        run.state.feed(r)
    assert best_text(run) == "0.5@2"


def test_a_new_user_finds_the_four_things_on_the_screen(tmp_path, monkeypatch):
    """Best validation and its epoch, ETA, which run is dead and why, GPU memory of a run."""
    text = "\n".join(plain(draw(steady_fleet(tmp_path, monkeypatch), Ui(selected="train_gpu3"), 80, 24)))
    assert "best val 48k 0.47 at epoch 6" in text and "ETA 0:50:40" in text and "GPU 3 83% 38.0G" in text
    assert "train_gpu0: DEAD at step 700: torch.OutOfMemoryError: CUDA out of memory." in text
