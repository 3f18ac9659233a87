"""tui/parse.py and tui/text.py: lines of logs and of metrics.jsonl."""

import json
import math

import pytest
from helpers import fake_runs as fake
from helpers.fleet import state_of

from snac48.tui.parse import parse_line
from snac48.tui.runs import Limits, Run
from snac48.tui.text import clean


@pytest.mark.parametrize(
    "line, want",
    [
        ('{"t": 1, "step": 3, "loss": "NaN", "loss_48k": "Infinity"}', {"step": 3, "loss_48k": math.inf}),
        (
            "2026-01-02 03:04 step 120/3000 epoch 2/15 main loss 1.234 24k 0.61 48k 0.5 lr 5e-05 eta 1:02:03",
            {
                "step": 120,
                "total_steps": 3000,
                "epoch": 2,
                "epochs": 15,
                "phase": "main",
                "loss": 1.234,
                "loss_24k": 0.61,
                "loss_48k": 0.5,
                "lr": 5e-5,
                "eta_s": 3723.0,
            },
        ),
        ("step 1/2 epoch 1/1 main loss nan 48k inf", {"step": 1, "loss_48k": math.inf}),
        (
            "Epoch 4:  45%|####5  | 450/1000 [01:23<02:34, 5it/s, loss=0.5123, 24k=0.61, 48k=0.5, lr=5e-05]",
            {
                "step": 3450,
                "total_steps": None,
                "epoch": 4,
                "loss": 0.5123,
                "loss_24k": 0.61,
                "loss_48k": 0.5,
                "lr": 5e-5,
            },
        ),
        ("Epoch 2/3: 50%|## | 5/10 [00:10<00:10, loss=1]", {"step": 15, "total_steps": 30, "eta_s": 30.0}),
        ("files: 50%|## | 5/10 [00:10<00:20, 1it/s]", {"step": 5, "total_steps": 10, "eta_s": 20.0}),
        (
            "Epoch 4 [Train]: Loss=0.61, 24kHz=0.60, 48kHz=0.50",
            {"event": "epoch", "epoch": 4, "loss_48k": 0.5},
        ),
        (
            "Epoch 4 [Val]: Loss=0.65, 24kHz=0.63, 48kHz=0.52",
            {"event": "val", "loss": 0.65, "loss_24k": 0.63},
        ),
    ],
)
def test_lines_of_every_kind(line, want):
    got = parse_line(line)
    assert {k: got.get(k) for k in want} == want


@pytest.mark.parametrize(
    "line", ["", "hello", "{", '{"a": ', "[1]", '"x"', "{" * 5000, "step 1 of 2", "\x00\xff"]
)
def test_other_text_is_no_record(line):
    assert parse_line(line) is None


def test_odd_values_are_harmless():
    odd = [
        {"step": True},
        {"step": -1},
        {"step": 2**40, "loss": 1},
        {"step": 1, "loss": None},
        {"step": "x"},
        {"step": 2, "loss": [1], "ce": {"a": 1}},
        {"event": "val"},
        {"event": "val", "loss_48k": "x"},
        {"event": 3},
        {"step": 3, "loss": 1e300},
        {"step": 4, "phase": {"a": 1}, "epoch": "y"},
        {"event": "skip"},
        {},
    ]
    s = state_of(odd)
    assert s.step == 4 and s.bad.tolist() == [3]
    run = Run("x", None)
    run.state = s
    run.judge(0, Limits())
    json.dumps(fake.finite_json(run.row()), allow_nan=False)


def test_control_characters_do_not_reach_the_terminal():
    assert clean("a\x1b[2Jb\x1b]0;title\x07c\x9bd\x00") == "abc·d·"
