"""Malformed inputs of the decoder: one clear error before anything is computed, and the next call right."""

import pytest
import torch
from helpers.chaos import judge
from helpers.chaos_api import cases, codes, tts

from snac48.cli import UserError
from snac48.codec import InputError

CASES = cases(0)


def test_every_malformed_input_is_refused_in_one_sentence(tmp_path):
    good = tts().decode(codes())
    calls = [case for case in CASES if case.group == "api"]
    wrong = {f"{case.group} {case.name}": told for case in calls if (told := judge(case, tmp_path))}
    assert not wrong and len(calls) >= 150
    assert all(torch.equal(a, b) for a, b in zip(good, tts().decode(codes())))
    with pytest.raises(ValueError) as e:  # what such an error is to code that knows nothing of ours
        tts().decode(codes()[:2])
    assert isinstance(e.value, InputError) and isinstance(e.value, UserError)


def test_damaged_exports_and_codecs_are_refused_when_they_are_opened(tmp_path):
    wrong = {}
    for i, case in enumerate(CASES):
        if case.group != "api":
            (tmp_path / str(i)).mkdir()
            if told := judge(case, tmp_path / str(i)):
                wrong[f"{case.group} {case.name}"] = told
    assert not wrong and sum(case.group != "api" for case in CASES) >= 60
