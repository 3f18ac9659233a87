"""snac48/bounds.py: every number of every script has bounds, and a value outside is named with its source."""

import argparse
import json
import math

import pytest
from helpers.training import options

import train_dual_head
import train_rvq
from snac48 import cli, schedule
from snac48.bounds import BOUNDS, LISTS, OWN, bound, wrong
from snac48.cli import UserError, read_flags, told_where_from, within_bounds


@pytest.mark.parametrize("name", sorted(BOUNDS))
def test_every_bound_refuses_what_is_no_number_and_says_a_range(name):
    for text in (BOUNDS[name], *(own[name] for own in OWN.values() if name in own)):
        other, low, _, high, _ = bound(text)
        assert low < high
        for value in (math.nan, math.inf, -math.inf, low - 1.5, high * 1.01 + 1):
            assert wrong(name, value) and wrong(name, [low / 2 + high / 2, value])
        assert wrong(name, low / 2 + high / 2) is None and wrong(name, high - (high - low) / 1e9) is None
        assert math.isnan(other) or wrong(name, other) is None


def test_the_words_of_a_range():
    assert wrong("lr", 0) == "above 0 and at most 10" and wrong("ema", 1) == "at least 0 and below 1"
    assert wrong("epochs", 0) == "from 1 to 10000" and wrong("limit", 0) == "-1, or from 1 to 1e+12"
    assert wrong("grad_clip", 0) and not wrong("grad_clip", 0, "train_rvq")  # there it is off


def test_the_defaults_of_both_trainers_lie_in_their_bounds_and_so_do_all_recipes():
    within_bounds(train_dual_head.DEFAULTS)
    within_bounds(train_rvq.DEFAULTS, train_rvq.FLAGS, "train_rvq")
    for recipe in train_dual_head.RECIPES.values():
        within_bounds(recipe)
        schedule.check(options(**recipe))
    assert set(LISTS) <= set(BOUNDS)


def test_a_number_without_a_row_is_noticed():
    parser = argparse.ArgumentParser()
    parser.add_argument("--novelty", type=int, default=3, help="text")
    with pytest.raises(KeyError, match="novelty"):
        read_flags(parser, [])


def test_where_a_value_came_from_is_told(tmp_path):
    path = tmp_path / "c.json"
    path.write_text(json.dumps({"recipe": "phase11-warmup", "num_epochs": 3, "adv_weight": 1}))
    with pytest.raises(UserError) as e:
        train_dual_head.parse_args(["--config", str(path), "--adv_epochs", "2"])
    assert f"--adv_weight: config {path}; --warmup_epochs: recipe phase11-warmup" in str(e.value)
    with pytest.raises(UserError, match=r"^--val-every must be .*, not 0 \(--val-every: a flag\)$"):
        train_rvq.parse_training(["--val-every", "0"])
    with pytest.raises(UserError, match=r"^other$"), told_where_from(lambda name: "a flag"):
        raise UserError("other")


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"loss_weight_48k": 0.0}, "the warmup phase would train nothing: --loss_weight_48k is 0"),
        (
            {"l1_weight": 0.0, "stft_weight": 0.0},
            "--l1_weight, --stft_weight, --mel_weight, --lasting_weight are 0",
        ),
        ({"warmup_epochs": 0, "loss_weight_24k": 0.0, "loss_weight_48k": 0.0}, "the main phase would train"),
        ({"accum_steps": 500}, "--accum_steps 500 would cut a step of 192 utterances"),
        ({"adv_weight": 1.0, "warmup_epochs": 15}, "--adv_weight 1 has no epoch"),
        ({"adv_weight": 1.0, "adv_epochs": 16}, "--adv_epochs 16 are more than --epochs 15"),
        ({"from_scratch": "x", "heads": "24k", "warmup_epochs": 0, "feature_epochs": 15}, "leave none"),
    ],
)
def test_a_run_that_would_train_nothing_is_refused(changes, words):
    with pytest.raises(UserError, match=words):
        schedule.check(options(**changes))
    schedule.check(options(loss_weight_24k=0.0))  # the trunk and the new head learn


@pytest.mark.parametrize(
    "text, words",
    [
        (b'{"epochs": 3, "epochs": 4}', "key 'epochs' stands there twice"),
        (b'{"epochs": 3, "num_epochs": 4}', "'epochs' and 'num_epochs' both give --epochs"),
        ('{"epochs": 3}'.encode("utf-16"), "is not UTF-8"),
        ('{"epochs": 3}'.encode("utf-16-le"), "is not UTF-8"),
        ('{"description": "für"}'.encode("latin-1"), "is not UTF-8"),
        (b"[" * 100_000, "nested too deeply"),
        (b'{"recipe": ["phase12"]}', "recipe must be str"),
        (b'{"curriculum": 3}', "curriculum must be a list of stages such as"),
        (b'{"curriculum": [{"epochs": "1-2", "length": 1, "batch_multiplier": 1}]}', "list of stages"),
        (b'{"curriculum": [{"epochs": [1, 15], "length": true, "batch_multiplier": 1}]}', "list of stages"),
        (b'{"output_dir": null}', "output_dir must be str"),
        (b'{"n_ffts": [[1024]]}', "n_ffts must be str"),
        (b'{"epochs": 1e999}', "epochs must be int"),
        (b'{"lr": NaN}', r"--lr must be above 0 and at most 10, not nan \(--lr: config "),
    ],
)  # fmt: skip
def test_configs_that_nobody_can_mean(text, words, tmp_path):
    (tmp_path / "c.json").write_bytes(text)
    with pytest.raises(UserError, match=words):
        train_dual_head.parse_args(["--config", str(tmp_path / "c.json")])
    (tmp_path / "c.json").write_bytes(b"\xef\xbb\xbf" + b'{"epochs": 3}')  # a mark that editors write
    assert cli.read_config(tmp_path / "c.json", {"epochs"}) == {"epochs": 3}
