"""The machine: CPU and memory from /proc, GPUs from NVML."""

import os
import time

from .text import clean


def cpu_ticks() -> tuple[int, int] | None:
    """(all, idle) ticks of all cores since boot."""
    try:
        with open("/proc/stat") as f:
            ticks = [int(x) for x in f.readline().split()[1:9]]
        return sum(ticks), ticks[3] + ticks[4]
    except (OSError, ValueError, IndexError):
        return None


def memory() -> tuple[int | None, int | None]:
    """(used, total) bytes of RAM; used = total - available."""
    try:
        with open("/proc/meminfo") as f:
            info = {k: int(v.split()[0]) * 1024 for k, v in (line.split(":") for line in f)}
        return info["MemTotal"] - info["MemAvailable"], info["MemTotal"]
    except (OSError, ValueError, KeyError, IndexError):
        return None, None


class GpuSampler:
    """NVML, one value at a time: what can't be read is None, and `error` says why. Never raises."""

    def __init__(self, nvml=None, now=time.monotonic):
        self.nvml, self.now = nvml, now
        self.ready, self.retry_at, self.error = False, 0.0, None

    def ask(self, name: str, *args):
        try:
            return getattr(self.nvml, name)(*args)
        except Exception as e:  # NVMLError has a class per code, and drivers raise others: all mean N/A
            self.error = clean(e) or type(e).__name__
            return None

    def start(self) -> bool:
        if self.now() < self.retry_at:
            return False
        self.retry_at, self.error = self.now() + 30, None
        if self.nvml is None:
            if not any(map(os.path.exists, ("/dev/nvidiactl", "/proc/driver/nvidia", "/dev/dxg"))):
                self.error = "no NVIDIA driver"  # importing NVML would cost a tenth of a second
                return False
            try:
                import pynvml
            except ImportError:
                self.error = "nvidia-ml-py is not installed"
                return False
            self.nvml = pynvml
        self.ask("nvmlInit")
        return self.error is None

    def sample(self) -> list[dict]:
        self.ready = self.ready or self.start()
        if not self.ready:
            return []
        self.error = None
        count = self.ask("nvmlDeviceGetCount")
        if count is None:  # driver gone or reloaded: initialise again later
            self.ready, self.retry_at = False, self.now() + 30
        return [self.gpu(i) for i in range(count or 0)]

    def gpu(self, index: int) -> dict:
        handle = self.ask("nvmlDeviceGetHandleByIndex", index)

        def get(name, *args):
            return None if handle is None else self.ask(f"nvmlDeviceGet{name}", handle, *args)

        name, util, memory, power = map(get, ("Name", "UtilizationRates", "MemoryInfo", "PowerUsage"))
        processes = get("ComputeRunningProcesses") or []
        return {
            "index": index,
            "name": name.decode() if isinstance(name, bytes) else name,
            "util_percent": util and util.gpu,
            "mem_used": memory and memory.used,
            "mem_total": memory and memory.total,
            "power_w": None if power is None else power / 1000,
            "temp_c": get("Temperature", 0),
            "processes": [{"pid": p.pid, "mem": p.usedGpuMemory, "run": None} for p in processes],
        }
