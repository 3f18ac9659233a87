"""snac48/schedule.py: epochs, rates, the judge of gradient norms."""

import math

import numpy as np
import pytest
import torch
from helpers.training import options

from snac48.cli import UserError
from snac48.schedule import (
    adam_betas,
    clip_at,
    curriculum,
    epoch_order,
    fft_sizes,
    judge_norm,
    make_plan,
    rates_at,
    total_weights,
)


def test_phase12_is_the_documented_curriculum():
    plan = make_plan(options(), 9600)
    longest = [(4.0, 43)] * 9
    assert [(e.segment, e.batch) for e in plan] == [(1.0, 192)] * 2 + [(2.0, 96)] * 2 + [(3.0, 57)] * 2 + (
        longest
    )
    assert [e.phase for e in plan] == ["warmup"] + ["main"] * 14
    assert [e.steps for e in plan[:7]] == [50, 50, 100, 100, 169, 169, 224]


def test_rates_follow_one_cycle_over_the_whole_main_phase_and_keep_their_ratio():
    args = options()
    plan = make_plan(args, 960)
    warm = plan[0].steps
    total = plan[-1].first_step + plan[-1].steps - warm
    parameter = torch.nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD([parameter], lr=1.0)
    reference = torch.optim.lr_scheduler.OneCycleLR(optimizer, 5e-5, total_steps=total)
    assert all(rates_at(args, plan, s) == {"head_48k": 2e-4} for s in range(warm))
    for step in range(total):
        rates = rates_at(args, plan, warm + step)
        assert math.isclose(rates["trunk"], optimizer.param_groups[0]["lr"], rel_tol=1e-9, abs_tol=1e-15)
        assert rates["head_48k"] == rates["trunk"] and math.isclose(rates["head_24k"], rates["trunk"] / 5)
        optimizer.step()
        if step < total - 1:
            reference.step()


def test_the_adversarial_phase_comes_last():
    phases = lambda **changes: [e.phase for e in make_plan(options(**changes), 960)]
    assert phases(adv_weight=1.0) == ["warmup"] + ["adversarial"] * 14
    assert phases(adv_weight=1.0, adv_epochs=3) == ["warmup"] + ["main"] * 11 + ["adversarial"] * 3
    assert phases(adv_weight=1.0, adv_epochs=99) == phases(adv_weight=1.0)
    assert phases(adv_epochs=3) == phases()  # of weight 0


def test_adversarial_rates_open_one_after_another():
    args = options(adv_weight=1.0, adv_epochs=10, scheduler="constant", disc_alone=0.1, disc_young=0.5)
    plan = make_plan(args, 960)
    first, end = plan[5].first_step, plan[-1].first_step + plan[-1].steps
    at = lambda share: first + math.ceil(share * (end - first))
    heads = {"head_48k": 1e-4, "head_24k": 1e-5}
    closed = dict.fromkeys(("trunk", *heads), 0.0)
    for share, rates, clip in (
        (0.0, closed, 0.1),
        (0.1, {"trunk": 0.0} | heads, 0.1),
        (0.5, {"trunk": 2e-5} | heads, 1.0),
    ):
        assert rates_at(args, plan, at(share)) == rates | {"disc": 1e-4}
        assert clip_at(args, plan, at(share)) == clip
    assert clip_at(args, plan, first - 1) == 1.0 and "disc" not in rates_at(args, plan, first - 1)


def test_the_total_loss_has_a_share_of_each_head():
    args = options(adv_weight=2.0)
    assert total_weights(args, "adversarial") == {"loss_24k": 0.3, "loss_48k": 1.0}
    judged = {"adv_24k": 0.6, "feat_24k": 0.6, "adv_48k": 2.0, "feat_48k": 2.0}
    assert total_weights(args, "adversarial", True) == {"loss_24k": 0.3, "loss_48k": 1.0} | judged
    alone = options(adv_weight=2.0, loss_weight_24k=0.0)  # then nobody judges that head
    assert "adv_24k" not in total_weights(alone, "adversarial", True)


def test_an_epoch_outside_the_ranges_is_an_error_but_the_last_range_goes_on():
    assert curriculum(options(epochs=17))[14:] == [curriculum(options())[-1]] * 3
    with pytest.raises(UserError, match="epoch 3 is in 0"):
        curriculum(options(epoch_ranges="1-2,4-4,5-6,7-15"))
    with pytest.raises(UserError, match="equally many"):
        curriculum(options(batch_multiplier="1.0"))


@pytest.mark.parametrize(
    "read, changes, words",
    [
        (fft_sizes, {"n_ffts": "abc"}, "--n_ffts 'abc' must be a comma-separated list"),
        (adam_betas, {"adam_betas": "0.9"}, "two numbers from 0 to below 1"),
        (lambda args: adam_betas(args, "adv_betas"), {"adv_betas": "0"}, "--adv_betas '0' must be two"),
        (curriculum, {"segment_schedule": "1.0,x"}, "--segment_schedule '1.0,x' must be a comma-separated"),
        (curriculum, {"epoch_ranges": "1-x"}, "--epoch_ranges '1-x' must be ranges"),
        (curriculum, {"epoch_ranges": "1-2-3"}, "--epoch_ranges '1-2-3' must be ranges"),
    ],
)
def test_malformed_lists_are_named(read, changes, words):
    with pytest.raises(UserError) as error:
        read(options(**changes))
    assert words in str(error.value)
    assert fft_sizes(options()) == (1024, 2048, 4096) and adam_betas(options()) == (0.9, 0.999)


def test_the_outlier_guard_survives_nan_and_accepts_a_lasting_change():
    skipped, usual = [], None
    for value in [1.0] * 50 + [math.nan, 1.0, 80.0, 1.0, math.inf, 1.0] + [500.0] * 10:
        skip, usual = judge_norm(value, usual, 50.0)
        skipped.append(skip)
    assert not any(skipped[:50])
    assert skipped[50:56] == [True, False, True, False, True, False]
    assert skipped[56] and not any(skipped[60:])  # 500 is the new scale
    assert judge_norm(1e9, 1.0, -1)[0] is False and judge_norm(math.nan, 1.0, -1)[0] is True


def test_the_order_of_an_epoch_is_a_function_of_seed_and_epoch():
    order = epoch_order(42, 3, 101)
    assert sorted(order) == list(range(101)) and np.array_equal(order, epoch_order(42, 3, 101))
    assert not np.array_equal(order, epoch_order(42, 4, 101))
    assert not np.array_equal(order, epoch_order(43, 3, 101))
