"""tui/ui.py: what keys do, without a terminal."""

from itertools import combinations

import pytest
from helpers import fake_runs as fake
from helpers.fleet import fleet_at, one

from snac48.tui.ui import Ui, act, free_device, matching
from snac48.tui.views import metrics_of

HEADS = ("24k", "48k")
OTHERS = "lr lr_trunk lr_head_48k lr_head_24k lr_final_24k grad_norm skipped audio_s_per_s batch_size"
STEP = ["loss", *(f"{loss}_{h}" for loss in ("loss", "l1", "stft", "mel") for h in HEADS), *OTHERS.split()]
VAL = ["loss", *(f"{loss}_{h}" for loss in ("loss", "l1", "stft") for h in HEADS), "lsd_48k", "lsd_12_24k"]


def test_27_metrics_are_each_reached_by_three_letters(tmp_path):
    r = [{"step": s, "epoch": 1, **dict.fromkeys(STEP, 1.0)} for s in (1, 2)]
    r.append({"event": "val", "step": 2, "epoch": 1, **dict.fromkeys(VAL, 1.0)})
    _, run = one(tmp_path, r)
    names = metrics_of([run])
    assert len(names) == len(STEP) + len(VAL) == 27
    for name in names:
        typed = ["".join(q) for q in combinations([c for c in name if c.isalnum()], min(3, len(name)))]
        assert name in {matching(q, names)[0] for q in typed}
    wanted = {"los": "loss", "l48": "loss_48k", "l24": "loss_24k", "vl4": "val loss_48k", "gn": "grad_norm",
              "mel": "mel_24k", "s48": "stft_48k", "tru": "lr_trunk", "af8": "val stft_48k"}  # fmt: skip
    assert {q: matching(q, names)[0] for q in wanted} == wanted
    assert matching("xyz", names) == [] and matching("VAL LOSS", names)[0] == "val loss"


def test_start_proposes_what_this_machine_has(tmp_path):
    fleet = fleet_at(tmp_path)
    fleet.poll()
    assert act(fleet, Ui(), "start") == ["train", "cpu"]
    gpus = fake.FakeNvml([(0, 7, 10**9)])
    fleet, run = one(tmp_path / "b", fake.train_records(10), nvml=gpus)
    assert run.gpu["index"] == [0] and free_device(fleet) == "1"  # 0 is at work, 2 and 3 are fuller
    fleet.gpus[1]["mem_used"] = 80 * 10**9
    assert act(fleet, Ui(), "start") == ["train", "2"]


@pytest.mark.parametrize(
    "end, said", [("finished", "train_gpu0 has finished: there is nothing to resume"), ("stopped", None)]
)
def test_resume_of_a_finished_run_says_so(tmp_path, end, said):
    r = [*fake.train_records(100), {"event": "end", "reason": end, "t": fake.NOW}]
    fleet, _ = one(tmp_path, r, state=None)
    ui = Ui()
    assert act(fleet, ui, "resume") == (None if said else ["resume", "train_gpu0"])
    assert ui.message.startswith(said or "") and bool(said) == bool(ui.message)
