"""snac48/jobs.py: the files of launch.sh's jobs. helpers/chaos_files.py has many that are none."""

import json
import os

import pytest

from snac48 import jobs
from snac48.process import start_time


def test_status_of_every_kind_of_job(tmp_path):
    me = f"{os.getpid()} {start_time(os.getpid())} x"
    for name, pid, code in (("a", me, None), ("b", "4999999 1 x", "0"), ("c", "4999999 1 x", "3"),
                            ("d", "4999999 1 x", "5"), ("e", "4999999 1 x", None), ("f", me + "1", None),
                            ("g", f"{os.getpid()} 1 x", None)):  # fmt: skip
        (tmp_path / f"{name}.json").write_text("{}")
        (tmp_path / f"{name}.pid").write_text(pid)
        (tmp_path / f"{name}.log").write_text("first\nlast\x1b[31m\n\n")
        if code:
            (tmp_path / f"{name}.exit").write_text(code + "\n")
    (tmp_path / "h.json").write_text('{"host": "elsewhere"}')
    words = [line.split()[1] for line in jobs.status(tmp_path)]
    states = ["RUNNING", "FINISHED", "STOPPED", "DEAD(5)", "DEAD", "RUNNING", "STALE_PID", "ON_elsewhere"]
    assert words == states and "last\\x1b[31m" in jobs.status(tmp_path)[0]
    assert jobs.status(tmp_path / "none") == [f"no jobs in {tmp_path / 'none'}"]


def test_a_pipe_holds_nobody_up(tmp_path):
    (tmp_path / "a.json").write_text("{}")
    for suffix in ("pid", "log", "exit"):
        os.mkfifo(tmp_path / f"a.{suffix}")
    assert "not a regular file" in jobs.status(tmp_path)[0]


def test_what_others_could_have_written_is_not_run_again(tmp_path):
    path = tmp_path / "a.json"
    job = {"kind": "cache", "gpus": "0", "cwd": "/", "command": ["x", "y"], "started": 1, "run_dir": None}
    path.write_text(json.dumps(job))
    path.chmod(0o644)
    assert jobs.resumed(path) == ["cache", "0", "", "/", "x", "y"]
    path.chmod(0o664)
    with pytest.raises(ValueError, match="others may write to it"):
        jobs.resumed(path)
