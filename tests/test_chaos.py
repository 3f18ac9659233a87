"""A sample of the cases of tests/fuzz.py, the same for the same seed; every one counts: none may fail.

CHAOS_SEED=7 python -m pytest tests/test_chaos.py    # other cases
"""

import os

import numpy as np
import pytest
from fuzz import collect, failures

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::DeprecationWarning")
SEED = int(os.environ.get("CHAOS_SEED", 14))
SAMPLE = {"values": 70, "files": 35, "api": 30, "data": 15}  # by what a case of the area costs


def test_a_seed_decides_the_cases_and_no_two_have_one_name():
    for area, cases in collect(SEED).items():
        names = [(case.group, case.name) for case in cases]
        again = [(case.group, case.name) for case in collect(SEED, [area])[area]]
        assert names == again and len(set(names)) == len(names), area


def test_a_sample_of_what_may_go_wrong():
    """No traceback, nothing silent, no hang, no changed file of the user; each area has its share."""
    rng, wrong = np.random.default_rng(SEED), []
    for area, cases in collect(SEED).items():
        quick = [case for case in cases if not case.group.startswith("slow: ")]
        chosen = rng.permutation(len(quick))[: SAMPLE.get(area, 20)]
        wrong += [
            f"{area}: {c.group}: {c.name}: {what}" for c, what in failures(quick[i] for i in chosen) if what
        ]
    assert not wrong, "\n".join(wrong)
