"""The terminal is after the monitor what it was before, however that ends: a pty, real signals."""

import os
import re
import select
import signal
import subprocess
import sys
import termios
import time

import pytest
from conftest import ROOT
from helpers import fake_runs as fake

MODES = re.compile(rb"\x1b\[\?([\d;]+)([hl])")


class Terminal:
    """A program in a pseudo-terminal of its own; what it writes, and the modes which that leaves on."""

    def __init__(self, command, cwd, env):
        self.ours, self.theirs = os.openpty()
        termios.tcsetwinsize(self.theirs, (24, 80))
        self.before, self.text = termios.tcgetattr(self.theirs), b""
        env = os.environ | {"TERM": "xterm-256color", **env}
        self.p = subprocess.Popen(command, cwd=cwd, env=env, stdin=self.theirs, stdout=self.theirs,
                                  stderr=self.theirs, start_new_session=True)  # fmt: skip

    def read(self, done, timeout=30):
        deadline = time.monotonic() + timeout
        while not done():
            assert time.monotonic() < deadline, self.text[-500:]
            if select.select([self.ours], [], [], 0.05)[0]:
                self.text += os.read(self.ours, 65536)

    def until(self, text):
        self.read(lambda: text in self.text)

    def ended(self) -> int:
        self.read(lambda: self.p.poll() is not None)
        while select.select([self.ours], [], [], 0.1)[0]:
            self.text += os.read(self.ours, 65536)
        return self.p.returncode

    def left_on(self) -> set[int]:
        on = set()
        for modes, letter in MODES.findall(self.text):
            for mode in map(int, modes.split(b";")):
                on = on | {mode} if letter == b"h" else on - {mode}
        return on - {7, 25}  # line wrap and cursor are on in a terminal at rest

    def assert_as_before(self):
        assert self.left_on() == set() and {b"25", b"7;25"} & {m for m, letter in MODES.findall(self.text)
                                                               if letter == b"h"}  # fmt: skip
        assert termios.tcgetattr(self.theirs) == self.before

    def close(self):
        if self.p.poll() is None:
            os.killpg(self.p.pid, signal.SIGKILL)
            self.p.wait()
        os.close(self.ours)
        os.close(self.theirs)


@pytest.fixture
def terminal(tmp_path):
    """Start the window, by itself or by launch.sh."""
    made = []
    fake.add_run(tmp_path, "train_gpu0", "train", [0], records=fake.train_records(20))
    python = tmp_path / "venv" / "bin" / "python"
    python.parent.mkdir(parents=True)
    python.write_text(f'#!/bin/sh\necho $$ > {tmp_path}/pid\nexec {sys.executable} "$@"\n')
    python.chmod(0o755)
    (tmp_path / "venv" / ".installed").write_bytes((ROOT / "requirements.txt").read_bytes())
    env = {"LOG_DIR": str(tmp_path / "logs"), "VENV": str(tmp_path / "venv")}

    def start(launcher=False):
        command = [ROOT / "launch.sh", "monitor"] if launcher else [sys.executable, ROOT / "monitor.py"]
        made.append(Terminal(command, tmp_path, env))
        made[-1].until(b"train_gpu0")
        return made[-1]

    yield start
    for t in made:
        t.close()


@pytest.mark.parametrize("launcher", [False, True], ids=["monitor.py", "launch.sh"])
@pytest.mark.parametrize("end", ["q", "\x03", signal.SIGTERM, signal.SIGHUP, signal.SIGINT])
def test_the_terminal_is_as_before(terminal, launcher, end):
    t = terminal(launcher)
    assert {1049, 1000, 1003} <= t.left_on() and termios.tcgetattr(t.theirs) != t.before
    if isinstance(end, str):
        os.write(t.ours, end.encode())
        assert t.ended() == 0
    else:
        t.p.send_signal(end)  # to launch.sh itself, where that started the window
        assert t.ended() in (128 + end, 128 + signal.SIGTERM)
    t.assert_as_before()


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSEGV])
def test_launch_sh_restores_the_terminal_of_a_killed_monitor(terminal, tmp_path, number):
    t = terminal(launcher=True)
    os.kill(int((tmp_path / "pid").read_text()), number)
    assert t.ended() == 128 + number
    t.assert_as_before()


def test_a_terminal_that_went_away_ends_the_monitor(terminal):
    t = terminal()
    os.close(t.theirs)
    os.close(t.ours)
    t.ours, t.theirs = os.openpty()
    os.kill(t.p.pid, signal.SIGHUP)  # what the kernel sends to the session's leader
    t.p.wait(timeout=20)
