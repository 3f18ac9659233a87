"""The machine: CPU, memory, disks and processes by psutil, GPUs by NVML; now, and over the last minutes."""

import os
import time
from dataclasses import dataclass

import psutil

from ..process import process_stat
from .state import Series
from .text import clean

SPAN_S = 300  # of the histories shown
TENTHS = 10  # their x axis: tenths of a second
FORGOTTEN_S = 10.0  # a look longer ago says nothing about now


def memory() -> tuple[int | None, int | None]:
    """(used, total) bytes of RAM; used = total - available."""
    try:
        m = psutil.virtual_memory()
        return m.total - m.available, m.total
    except (OSError, KeyError, ValueError):
        return None, None


def traffic() -> tuple[int, int] | None:
    """Bytes read and written by all disks since boot; None where the kernel doesn't count them."""
    try:
        io = psutil.disk_io_counters()
        return io and (io.read_bytes, io.write_bytes)
    except (OSError, NotImplementedError):
        return None


def partitions() -> list[str]:
    """Mount points of the local disks, each disk once (its shortest path)."""
    try:
        found = sorted(psutil.disk_partitions(all=False), key=lambda p: -len(p.mountpoint))
    except OSError:
        return []
    found = [p for p in found if os.path.isdir(p.mountpoint) and p.fstype != "squashfs"]
    return sorted({p.device: p.mountpoint for p in found}.values())


def mount_of(path) -> str:
    """Mount point of the file system that `path` lies on, or would lie on."""
    path = os.path.realpath(path)
    while not os.path.ismount(path):
        path = os.path.dirname(path)
    return path


class Machine:
    """CPU, memory, disk traffic. `history`: curves in % and MB/s over tenths of a second."""

    def __init__(self):
        self.cpu_percent: float | None = None
        self.ram: tuple = (None, None)
        self.rates: tuple | None = None  # bytes read and written per second
        self.history: dict[str, Series] = {}
        self.first = self.last = None

    @property
    def now(self) -> int:
        return max((s.xs[-1] for s in self.history.values() if s.xs), default=0)

    def sample(self, mono: float, gpus: list[dict]) -> None:
        self.cpu_percent, self.ram, counted = psutil.cpu_percent(), memory(), traffic()
        if self.first is None:  # CPU use is between two looks
            self.first, self.cpu_percent = mono, None
        elif counted and self.last and mono > self.last[0]:
            t, before = self.last
            self.rates = tuple(max(0, b - a) / (mono - t) for a, b in zip(before, counted))
        self.last = (mono, counted) if counted else None
        values = {"cpu": self.cpu_percent, "ram": share(*self.ram)}
        values |= {f"gpu{g['index']}": g["util_percent"] for g in gpus}
        used, total = ([g[k] for g in gpus if g[k] is not None] for k in ("mem_used", "mem_total"))
        values |= {"gpu memory": share(sum(used), sum(total))} if used else {}
        values |= {k: rate / 1e6 for k, rate in zip(("read", "write"), self.rates or ())}
        x = round(TENTHS * (mono - self.first))
        for key, y in values.items():
            s = self.history.setdefault(key, Series())
            if y is not None and (not s.xs or x > s.xs[-1]):
                s.xs.append(x)
                s.ys.append(y)
                if len(s.xs) > 4000:
                    del s.xs[:2000], s.ys[:2000]


def share(part, whole) -> float | None:
    return 100 * part / whole if part is not None and whole else None


@dataclass
class Usage:
    """What the processes of a run use together."""

    pid: int
    count: int = 0
    cpu_percent: float | None = None  # of one core
    memory: int = 0  # bytes; what several of them share counts once
    threads: int = 0
    read: float | None = None  # bytes a second, from disks
    write: float | None = None


class Processes:
    """Processes of runs, their loader workers folded in. Rates are between two looks."""

    def __init__(self):
        self.last: tuple = (None, {})  # time, {process: CPU seconds, bytes read, bytes written}

    def sample(self, roots: dict[int, str], mono: float) -> dict[str, Usage]:
        """roots: {pid of a run: its name}."""
        then, before = self.last
        seconds = mono - then if then is not None and mono - then < FORGOTTEN_S else 0.0
        counts, shared, found = {}, dict.fromkeys(roots, 0), {pid: Usage(pid) for pid in roots}
        for pid in psutil.pids():
            root = owner(pid, roots)
            if root is None or not (look := looked_at(pid)):
                continue
            key, numbers, (rss, common), threads = look
            u, counts[key] = found[root], numbers
            u.count, u.threads = u.count + 1, u.threads + threads
            u.memory += max(0, rss - common)
            shared[root] = max(shared[root], common)
            if seconds > 0 and key in before:
                both = zip(before[key], numbers)
                cpu, read, write = (None if None in ab else (ab[1] - ab[0]) / seconds for ab in both)
                u.cpu_percent = added(u.cpu_percent, 100 * cpu)
                u.read, u.write = added(u.read, read), added(u.write, write)
        self.last = (mono, counts)
        for pid, size in shared.items():
            found[pid].memory += size
        return {roots[pid]: u for pid, u in found.items() if u.count}


def looked_at(pid: int) -> tuple | None:
    """(identity, (CPU seconds, bytes read from disks, bytes written), (resident, shared bytes), threads) of a
    process; bytes are None where they are another user's secret, all is None where it has gone."""
    try:
        p = psutil.Process(pid)
        with p.oneshot():
            cpu, memory, threads = p.cpu_times(), p.memory_info(), p.num_threads()
            try:
                io = p.io_counters()
                io = (io.read_bytes, io.write_bytes)
            except (psutil.AccessDenied, OSError):
                io = (None, None)
        return (pid, p.create_time()), (cpu.user + cpu.system, *io), (memory.rss, memory.shared), threads
    except psutil.Error:
        return None


def owner(pid: int, roots, proc="/proc") -> int | None:
    """Which of the processes `roots` this one belongs to: by its session (launch.sh gives each job one) or by
    its parents."""
    for _ in range(16):
        if pid in roots or not (stat := process_stat(pid, proc)):
            return pid if pid in roots else None
        if stat[2] in roots:
            return stat[2]
        pid = stat[1]
    return None


def added(a: float | None, b: float | None) -> float | None:
    return b if a is None else a if b is None else a + b


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
