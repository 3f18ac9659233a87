"""Is a process alive? The one rule of launch.sh, of the monitor and of claims on shared work: /proc decides.

A PID is given again to a later process, PID and kernel start time together are not. A zombie is dead.
Imports nothing: launch.sh asks it several times a second.
"""


def process_stat(pid: int, proc="/proc") -> tuple[str, int, int] | None:
    """(state letter, session id, kernel start time in clock ticks); None when there is no such process."""
    try:
        with open(f"{proc}/{pid}/stat", errors="replace") as f:
            fields = f.read().rpartition(")")[2].split()
        return fields[0], int(fields[3]), int(fields[19])
    except (OSError, ValueError, IndexError):
        return None


def start_time(pid: int, proc="/proc") -> int | None:
    """Kernel start time of a live process in clock ticks; None for a dead one or a zombie."""
    stat = process_stat(pid, proc)
    return None if stat is None or stat[0] in "ZXx" else stat[2]


def job_state(pid_file, proc="/proc") -> tuple[str | None, int | None]:
    """(state, pid) from launch.sh's file `PID START COMMAND…`: RUNNING, DEAD, STALE_PID; None without a file.

    STALE_PID: the number lives on in another process, which is none of ours.
    """
    try:
        with open(pid_file, errors="replace") as f:
            words = f.read().split()
    except OSError:
        return None, None
    if not words or not words[0].isdigit():
        return "DEAD", None
    pid = int(words[0])
    began = start_time(pid, proc)
    if began is None:
        return "DEAD", pid
    return ("RUNNING" if words[1:2] == [str(began)] else "STALE_PID"), pid
