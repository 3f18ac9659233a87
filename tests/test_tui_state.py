"""tui/state.py: what the records of one run add up to."""

import pytest
from helpers import fake_runs as fake
from helpers.fleet import state_of

from snac48.tui.state import POINTS, RunState


def test_resume_replaces_overlapping_steps():
    records = fake.train_records(500)
    again = [{"event": "resume", "step": 300, "t": fake.NOW}]
    again += [fake.train_record(s, seed=9) for s in range(305, 405, 5)]
    s = state_of(records + again)
    xs = s.series["loss_48k"].xs.tolist()
    assert xs == sorted(set(xs)) and xs[-1] == s.step == 400
    assert s.series["loss_48k"].ys[-1] == pytest.approx(fake.train_record(400, seed=9)["loss_48k"])
    assert [v["step"] for v in s.vals] == [200]  # the one at 400 belongs to steps that were trained again
    assert s.end is None
    s = state_of([*records, again[0]])  # before its first step line
    assert s.step == 300 and s.series["loss"].xs[-1] == 300


def test_a_fresh_start_in_the_same_directory_forgets_the_old_run():
    s = state_of([*fake.train_records(500), {"event": "end", "reason": "finished"}, *fake.train_records(50)])
    assert s.step == 50 and s.vals == [] and s.series["loss"].xs[0] == 1 and s.end is None


def test_spikes_survive_thinning():
    s = RunState()
    for x in range(POINTS + 5000):
        s.draw(x, {"loss": 99.0 if x == 77777 else 1.0})
    s = s.series["loss"]
    assert len(s.xs) < POINTS and max(s.ys) == 99 and s.xs[s.ys.index(99.0)] == 77777


def test_clock_going_back():
    records = [fake.train_record(s) | {"t": 1000.0 - s} for s in range(1, 100)]
    s = state_of(records)
    assert len(s.series["loss"].xs) == 99 and s.usual_gap() is None
