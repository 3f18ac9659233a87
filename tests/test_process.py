"""snac48/process.py: is a process alive?"""

import time

from helpers import fake_runs as fake

from snac48.jobs import job_state
from snac48.process import process_stat


def test_states_from_proc(tmp_path):
    proc = fake.FakeProc(tmp_path)
    for pid, state in ((1, "R"), (2, "S"), (3, "D"), (4, "Z"), (5, "X")):
        proc.add(pid, state, ticks=100 + pid)
    file = tmp_path / "a.pid"
    for pid, want in ((1, "RUNNING"), (2, "RUNNING"), (3, "RUNNING"), (4, "DEAD"), (5, "DEAD"), (6, "DEAD")):
        file.write_text(f"{pid} {100 + pid} python train.py\n")
        assert job_state(file, tmp_path) == (want, pid)
    file.write_text("1 999 python train.py\n")
    assert job_state(file, tmp_path) == ("STALE_PID", 1)
    for junk in ("", "x", "1", "-5 3"):
        file.write_text(junk)
        assert job_state(file, tmp_path)[0] in ("DEAD", "STALE_PID")
    assert job_state(tmp_path / "none", tmp_path) == (None, None)


def test_kill_minus_9_and_zombie_for_real(tmp_path):
    p = fake.real_process(tmp_path, "train_gpu0")
    file = tmp_path / "logs" / "train_gpu0.pid"
    try:
        assert job_state(file) == ("RUNNING", p.pid)
        p.kill()
        deadline = time.time() + 5
        while process_stat(p.pid)[0] != "Z" and time.time() < deadline:
            time.sleep(0.01)
        assert process_stat(p.pid)[0] == "Z" and job_state(file) == ("DEAD", p.pid)
    finally:
        p.kill()
        p.wait()
    assert job_state(file) == ("DEAD", p.pid)


def test_reused_pid_for_real(tmp_path):
    p = fake.real_process(tmp_path, "train_gpu0")
    try:
        file = tmp_path / "logs" / "train_gpu0.pid"
        pid, ticks, *rest = file.read_text().split()
        file.write_text(f"{pid} {int(ticks) - 1} {' '.join(rest)}\n")
        assert job_state(file) == ("STALE_PID", p.pid)
    finally:
        p.kill()
        p.wait()
