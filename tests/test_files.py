"""snac48/files.py and runlog.py: what killed processes leave behind."""

import json
import os
import subprocess
import time

from snac48.files import short_space, sweep_leftovers
from snac48.runlog import RunLog, SampleLog


def test_leftovers_of_the_dead_are_swept_and_of_the_living_kept(tmp_path):
    dead = subprocess.Popen(["true"])
    dead.wait()
    here = short_space()
    names = {f".c.pt.{here}.{dead.pid}.1.tmp": False, f".c.pt.{here}.{os.getppid()}.1.tmp": True,
             ".c.pt.elsewhere.1.1.tmp": True, ".note.tmp": True}  # fmt: skip
    for name in names:
        (tmp_path / name).write_text("x")
    old = tmp_path / ".c.pt.elsewhere.2.1.tmp"
    old.write_text("x")
    os.utime(old, (time.time() - 7200,) * 2)
    (tmp_path / f".index.{here}.{dead.pid}.1.tmp").mkdir()
    assert sweep_leftovers(tmp_path) == 3
    assert {p.name for p in tmp_path.iterdir()} == {n for n, stays in names.items() if stays}


def test_json_lines_after_a_kill_start_on_their_own(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n{"ste')
    RunLog(tmp_path).metric(step=2)
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert lines[:2] == ['{"step": 1}', '{"ste'] and json.loads(lines[2])["step"] == 2


def test_the_sample_log_forgets_the_steps_that_no_checkpoint_has_seen(tmp_path):
    for rank in (0, 1):
        (tmp_path / f"samples.rank{rank}.log").write_text("1 1 5 3\n2 1 4\n3 1 0 2\n4 1 7")
    SampleLog(tmp_path, 0, 2).add(3, 1, [8, 9])
    assert (tmp_path / "samples.rank0.log").read_text() == "1 1 5 3\n2 1 4\n3 1 8 9\n"
    assert (tmp_path / "samples.rank1.log").read_text() == "1 1 5 3\n2 1 4\n"
