"""snac48/runlog.py: one owner of a run directory, names on one line, output that nobody reads."""

import subprocess
import sys

import pytest
from conftest import ROOT
from helpers.chaos_files import HOLDER

from snac48.cli import UserError
from snac48.runlog import RunLog, hold

SPEAKER = """
import sys, time
sys.path.insert(0, sys.argv[1])
from snac48.cli import main_guard
from snac48.runlog import RunLog
def main():
    log = RunLog(sys.argv[2])
    for i in range(2000):
        log.say(f"line {i}")
        time.sleep(0.0001)
    return 0
main_guard(main)
"""


def test_a_directory_has_one_owner_until_that_ends(tmp_path):
    command = [sys.executable, "-c", HOLDER, ROOT, tmp_path]
    other = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert other.stdout.readline() == "held\n"
    with pytest.raises(UserError, match=rf"in use by process {other.pid} on .* stop it first"):
        RunLog(tmp_path, alone=True)
    RunLog(tmp_path)  # processes that share a folder
    other.kill()
    other.wait()
    other.stdout.close()
    log = RunLog(tmp_path, alone=True)
    hold(tmp_path)  # ours: again, without giving it back
    again = subprocess.run(command, capture_output=True, text=True)
    assert "in use by process" in again.stderr
    log.metric(event="end")
    hold(tmp_path)  # it was given back


def test_a_reader_that_leaves_costs_the_output_not_the_run(tmp_path):
    command = f"{sys.executable} -c '{SPEAKER}' {ROOT} {tmp_path} | head -n 1; exit ${{PIPESTATUS[0]}}"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "line 0\n", "")
    assert (tmp_path / "training.log").read_text().count("\n") == 2000


def test_a_line_is_one_line(tmp_path, capsys):
    RunLog(tmp_path).say("bad file a\nb\x1b[2J\u202ec\udce9: unreadable")
    assert capsys.readouterr().out == "bad file a\\nb\\x1b[2J\\u202ec\\udce9: unreadable\n"
