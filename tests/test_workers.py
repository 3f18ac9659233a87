"""snac48/workers.py: processes that end with their parent, and loaders that are not waited for in vain."""

import resource
import subprocess
import sys
import time

import pytest
from conftest import ROOT

from snac48 import workers
from snac48.cli import LoaderDied, Stopped, UserError
from snac48.process import start_time

PARENT = """
import subprocess, sys, time
code = "import sys, time; sys.path.insert(0, sys.argv[1]); from snac48.workers import end_with_parent;"
code += "end_with_parent(); print('up', flush=True); time.sleep(60)"
child = subprocess.Popen([sys.executable, "-c", code, sys.argv[1]])
print(child.pid, flush=True)
time.sleep(60)
"""


def test_a_worker_goes_with_a_parent_that_was_killed(tmp_path):
    parent = subprocess.Popen([sys.executable, "-c", PARENT, ROOT], stdout=subprocess.PIPE, text=True)
    pid = int(parent.stdout.readline())
    assert parent.stdout.readline() == "up\n"
    parent.kill()
    parent.wait()
    parent.stdout.close()
    deadline = time.monotonic() + 10
    while start_time(pid) and time.monotonic() < deadline:
        time.sleep(0.02)
    assert start_time(pid) is None


class Silent:
    """A DataLoader's iterator whose workers live and say nothing."""

    def __iter__(self):
        return self

    def __next__(self):
        raise RuntimeError("DataLoader timed out after 2 seconds")


def test_a_stop_is_heard_and_the_end_of_patience_told(monkeypatch):
    with pytest.raises(Stopped):
        next(workers.polled(Silent(), stop=True))
    monkeypatch.setattr(workers, "STUCK_S", -1.0)
    with pytest.raises(LoaderDied, match="no batch for"):
        next(workers.polled(Silent()))


@pytest.mark.parametrize(
    ("error", "words"),
    [(RuntimeError("DataLoader worker (pid(s) 7) exited unexpectedly"), "exited"),
     (OSError(24, "Too many open files"), "ulimit -n"),
     (RuntimeError("received 0 items of ancdata"), "ulimit -n"),
     (RuntimeError("unable to allocate shared memory(shm) for file </torch_1>"), "/dev/shm is full")],
)  # fmt: skip
def test_what_the_machine_lacks_is_said(error, words):
    def batches():
        yield 1
        raise error

    found = workers.polled(batches())
    assert next(found) == 1
    with pytest.raises(LoaderDied, match=words):
        next(found)


def test_a_fault_of_the_program_stays_one():
    def batches():
        raise RuntimeError("Caught IndexError in DataLoader worker process 0.")
        yield

    with pytest.raises(RuntimeError, match="IndexError"):
        next(workers.polled(batches()))


def test_room_is_asked_for_before_the_start(monkeypatch):
    with pytest.raises(UserError, match=r"lower --num_workers \(0 needs none\) or give .* --shm-size=\d+g"):
        workers.check_loaders(4, 5, 1 << 50, 2, "--num_workers")
    monkeypatch.setattr(resource, "getrlimit", lambda _: (40, 40))
    with pytest.raises(UserError, match=r"136 open files are needed and 40 allowed: lower --num_workers"):
        workers.check_loaders(4, 5, 1, 2, "--num_workers")
    workers.check_loaders(0, 5, 1 << 60, 2, "--num_workers")
