"""Processes that work for another one: they end with it, and where they fail, it hears of it."""

import ctypes
import errno
import multiprocessing.queues
import os
import resource
import shutil
import signal
import threading
import time

from .cli import LoaderDied, Stopped, UserError, complain, first_line, ignore_stop_signals

LOOK_S = 2.0  # between two looks at stop flag and clock while a batch is waited for
STUCK_S = 900.0  # without a batch from any worker: a file system that hangs, or a worker that does
PR_SET_PDEATHSIG = 1  # of sys/prctl.h


def end_with_parent(sig=signal.SIGKILL) -> None:
    """From now on the kernel sends this process `sig` when its parent ends, by kill -9 too (Linux)."""
    prctl = getattr(ctypes.CDLL(None), "prctl", None)
    if prctl:
        prctl(PR_SET_PDEATHSIG, int(sig))


def begin_loader_worker(_=None) -> None:
    """worker_init_fn of a DataLoader. What a worker cannot send (no descriptor left, /dev/shm full) torch
    drops, and its parent waits for ever: such a worker ends instead, and the parent is told."""
    end_with_parent()
    ignore_stop_signals()

    def failed(e, batch):
        complain(f"data loader process {os.getpid()} cannot send a batch: {first_line(e)}")
        os._exit(1)

    multiprocessing.queues.Queue._on_queue_feeder_error = staticmethod(failed)


def polled(loader, stop=None):
    """The batches of a DataLoader that was made with timeout=LOOK_S. Raises Stopped where `stop` is set
    while one is waited for, LoaderDied for a worker that was killed, cannot send or says nothing more."""
    asked, batches = time.monotonic(), None
    while True:
        try:
            if batches is None:
                batches = iter(loader)
                # torch's handler would raise a dead worker's error wherever the main thread is just now
                if threading.current_thread() is threading.main_thread():
                    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            batch = next(batches)
        except StopIteration:
            return
        except (RuntimeError, OSError) as e:
            if not str(e).startswith("DataLoader timed out"):
                if why := what_failed(e):
                    raise LoaderDied(why) from None
                raise
            if stop:
                raise Stopped from None
            if time.monotonic() - asked > STUCK_S:
                raise LoaderDied(f"no batch for {STUCK_S / 60:.0f} minutes") from None
            continue
        yield batch
        asked = time.monotonic()


def what_failed(e: Exception) -> str:
    """What the machine lacked, where an error of a DataLoader is no fault of the program; else ""."""
    text = str(e)
    if text.startswith("DataLoader worker"):
        return first_line(e)
    if getattr(e, "errno", 0) in (errno.EMFILE, errno.ENFILE) or "ancdata" in text or "open files" in text:
        return "too many open files: raise ulimit -n"
    if "shared memory" in text or "/torch_" in text:
        return "/dev/shm is full"
    return ""


# ---- before they start ----


def check_descriptors(needed: int, flag: str = "--num_workers") -> None:
    """Raise this process' limit of open files to what its workers need. Raises UserError where that is more
    than it may have."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != resource.RLIM_INFINITY and soft < needed:
        if hard != resource.RLIM_INFINITY and hard < needed:
            todo = f"lower {flag}, or raise the limit (ulimit -n {needed})"
            raise UserError(f"{needed} open files are needed and {hard} allowed: {todo}")
        resource.setrlimit(resource.RLIMIT_NOFILE, (needed, hard))


def check_loaders(workers: int, batches_each: int, batch_bytes: int, files_a_batch: int, flag: str) -> None:
    """Whether so many loader processes of each of this machine's trainers, each with so many batches on their
    way, have room in /dev/shm and descriptors. Raises UserError naming what to change."""
    if not workers:
        return
    check_descriptors(64 + workers * (8 + batches_each * files_a_batch), flag)
    needed = int(os.environ.get("LOCAL_WORLD_SIZE", 1)) * workers * batches_each * batch_bytes
    if os.path.isdir("/dev/shm") and (free := shutil.disk_usage("/dev/shm").free) < needed:
        sizes = f"{workers} data loader processes need {needed / 2**20:.0f} MiB of /dev/shm, "
        todo = f"lower {flag} (0 needs none) or give the container more (docker run --shm-size="
        raise UserError(f"{sizes}{free / 2**20:.0f} MiB are free: {todo}{needed // 2**30 + 1}g)")
