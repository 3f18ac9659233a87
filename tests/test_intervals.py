"""intervals.py: bootstrap intervals cover what they should, and a difference is called real when it is."""

import numpy as np

from snac48.intervals import FEWEST, differences, intervals, means


def rows(values, name="lsd") -> list[dict]:
    return [{name: v} for v in values]


def test_an_interval_covers_the_true_mean_about_95_times_in_100():
    rng, hits = np.random.default_rng(0), 0
    for _ in range(300):
        low, high = intervals(rows(rng.standard_normal(60) + 5))["lsd"]
        hits += low <= 5 <= high
    assert 0.90 < hits / 300 < 0.985
    width = lambda n: np.subtract(*intervals(rows(rng.standard_normal(n)))["lsd"][::-1])
    assert abs(width(400) - 2 * 1.96 / 20) < 0.04 and 1.5 < width(100) / width(400) < 2.6


def test_clips_without_a_metric_do_not_count():
    found = [{"lsd": 1.0, "f0_corr": 0.5}, {"lsd": 3.0}, {}]
    assert means(found) == {"lsd": 2.0, "f0_corr": 0.5}
    assert intervals(found) == {"lsd": [1.0, 3.0]}  # one clip alone has no interval
    assert means([{}, {}]) == {} == intervals([{}])


def test_paired_differences_see_what_intervals_side_by_side_do_not():
    rng = np.random.default_rng(1)
    clips = rng.standard_normal(40)  # an easy and a hard clip differ more than the systems
    ours, theirs = rows(clips - 0.1 + 0.05 * rng.standard_normal(40)), rows(clips)
    (low, high), (other_low, other_high) = intervals(ours)["lsd"], intervals(theirs)["lsd"]
    assert low < other_high and other_low < high
    found = differences(ours, theirs)["lsd"]
    assert found["real"] and found["high"] < 0 and abs(found["mean"] + 0.1) < 0.03
    assert differences(theirs, ours)["lsd"]["mean"] == -found["mean"]
    same = differences(rows(clips + 0.05 * rng.standard_normal(40)), theirs)["lsd"]
    assert not same["real"] and same["low"] < 0 < same["high"]


def test_a_difference_needs_both_sides_and_enough_clips():
    few, enough = ([1.0 + 0.01 * i for i in range(n)] for n in (FEWEST - 1, FEWEST))
    assert not differences(rows(few), rows([0.0] * len(few)))["lsd"]["real"]
    assert differences(rows(enough), rows([0.0] * len(enough)))["lsd"]["real"]
    half = [{"lsd": 1.0}, {"mel": 2.0}, {"lsd": 4.0, "mel": 1.0}]
    found = differences(half, [{"lsd": 0.0}, {"lsd": 1.0}, {"lsd": 1.0}])
    assert set(found) == {"lsd"} and found["lsd"]["mean"] == 2.0
