"""Speed by device: what a run switches on where it runs, with the reason, and how much memory a step takes.

    for line in settle_speed(args, device, plan, rate): ...      # before the model is built
    memory_plan([24, 80, 141], ...)                              # lines for people who choose a card
"""

import ctypes

import torch

from . import kernels

# Options that are None until the machine is known. A resumed run keeps what was found at its start where that
# changes the numbers (bf16, tf32); the others are found anew.
FOUND = ("bf16", "tf32", "compile", "num_workers", "accum_steps")


def set_kernels(device: torch.device, plain: bool) -> list[str]:
    """Choose the kernels of this process. Returns what was chosen, as lines."""
    kernels.use_plain(plain)
    told = [f"Snake: {kernels.prepare(device.type)}"]
    if device.type == "cpu" and not plain and keep_heap():
        told.append("memory: freed blocks are kept (page faults took a fifth of a step)")
    return told


def keep_heap() -> bool:
    """Tell glibc's malloc to keep what is freed: activations of 20 MB are otherwise mapped, zeroed page by page
    and unmapped again at every operator. False where there is no glibc."""
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError):
        return False
    M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4
    return bool(mallopt(M_MMAP_MAX, 0) and mallopt(M_TRIM_THRESHOLD, 2**31 - 1))
