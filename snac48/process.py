"""Is a process alive? The one rule of launch.sh, of the monitor and of claims on shared work: /proc decides.

A PID is given again to a later process, PID and kernel start time together are not. A zombie is dead.
Imports next to nothing: launch.sh asks it several times a second.
"""

import functools
import os


@functools.cache
def pid_space() -> str:
    """Where PIDs mean the same processes as here: this boot of this machine, and its PID namespace.
    Containers of one host name (docker --network host) differ in it; a reboot changes it."""
    try:
        with open("/proc/sys/kernel/random/boot_id") as f:
            return f"{f.read().strip()} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return f"{os.uname().nodename} unknown"


def process_stat(pid: int, proc="/proc") -> tuple[str, int, int, int] | None:
    """(state letter, parent, session id, kernel start time in clock ticks); None where there is none."""
    try:
        with open(f"{proc}/{pid}/stat", errors="replace") as f:
            fields = f.read().rpartition(")")[2].split()
        return fields[0], int(fields[1]), int(fields[3]), int(fields[19])
    except (OSError, ValueError, IndexError):
        return None


def start_time(pid: int, proc="/proc") -> int | None:
    """Kernel start time of a live process in clock ticks; None for a dead one or a zombie."""
    stat = process_stat(pid, proc)
    return None if stat is None or stat[0] in "ZXx" else stat[3]


def alive(pid: int, start, proc="/proc") -> str:
    """RUNNING, DEAD, or STALE_PID: the number lives on in another process, which is none of ours."""
    began = start_time(pid, proc)
    return "DEAD" if began is None else "RUNNING" if str(began) == str(start) else "STALE_PID"


def descendants(pid: int, proc="/proc") -> list[int]:
    """The live processes that `pid` started, and theirs, in whatever session: torchrun gives each of its
    processes one of its own, which a signal to the group of `pid` does not reach."""
    children: dict[int, list[int]] = {}
    for name in filter(str.isdigit, os.listdir(proc)):
        if stat := process_stat(int(name), proc):
            children.setdefault(stat[1], []).append(int(name))
    found = children.get(pid, [])
    for child in found:  # grows as we go
        found += children.get(child, [])
    return found
