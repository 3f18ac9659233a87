"""tui/system.py: the machine, processes, GPUs."""

import json
import os
import subprocess
import sys
import time
from types import SimpleNamespace

import psutil
from helpers import fake_runs as fake
from helpers.fleet import one, plain

from snac48.tui import system
from snac48.tui.system import GpuSampler, Machine, Processes, mount_of, partitions
from snac48.tui.ui import Ui
from snac48.tui.views import draw, gpu_text


def test_nvml_dying_on_any_call_never_raises():
    whole = fake.FakeNvml([(3, 7, 10**9)])
    GpuSampler(whole).sample()
    for n in range(1, whole.calls + 2):
        clock = [100.0]
        nvml = fake.FakeNvml([(3, 7, 10**9)], dies_at=n)
        sampler = GpuSampler(nvml, lambda c=clock: c[0])
        gpus = sampler.sample()
        if n <= whole.calls:
            assert sampler.error == "GPU is lost"
        json.dumps(gpus)
        sampler.sample()
        nvml.dies_at = 10**9  # the driver is back
        clock[0] += 31
        assert len(sampler.sample()) == 4 and sampler.error is None


def test_one_broken_value_leaves_the_others():
    for name in (
        "Name",
        "UtilizationRates",
        "MemoryInfo",
        "PowerUsage",
        "Temperature",
        "ComputeRunningProcesses",
    ):
        sampler = GpuSampler(fake.FakeNvml(broken=(f"nvmlDeviceGet{name}",)))
        (gpu, *_) = sampler.sample()
        assert sum(v is None for v in gpu.values()) == {"MemoryInfo": 2, "ComputeRunningProcesses": 0}.get(
            name, 1
        )


def test_no_nvml(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "pynvml", None)
    sampler = GpuSampler()
    assert sampler.sample() == [] and sampler.error
    monkeypatch.setattr(os.path, "exists", lambda p: True)  # a driver, but no Python package
    sampler = GpuSampler()
    assert sampler.sample() == [] and "not installed" in sampler.error
    fleet, _ = one(tmp_path, fake.train_records(10))
    assert "N/A (GPU is lost)" in "\n".join(plain(draw(fleet, Ui(view="system"), 80, 24)))


def test_gpu_memory_of_a_run_by_its_session(tmp_path):
    fleet, run = one(
        tmp_path, fake.train_records(10), nvml=fake.FakeNvml([(0, 555, 38 * 10**9), (1, 8, None)])
    )
    assert gpu_text(fleet, run) == "0 80% 40.0G*"  # pid 555 is not known to /proc: the whole GPU's
    fake.FakeProc(tmp_path / "proc").add(555, session=7)
    fleet.poll()
    assert gpu_text(fleet, run) == "0 80% 38.0G"
    assert fleet.report()["system"]["gpus"][0]["processes"] == [
        {"pid": 555, "mem": 38 * 10**9, "run": "train_gpu0"}
    ]


# ---- the machine ----


def test_histories_of_the_machine(monkeypatch):
    disk = [0, 0]
    monkeypatch.setattr(psutil, "cpu_percent", lambda: 40.0)
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(total=100, available=25))
    monkeypatch.setattr(
        psutil, "disk_io_counters", lambda: SimpleNamespace(read_bytes=disk[0], write_bytes=disk[1])
    )
    m, gpus = Machine(), [{"index": 0, "util_percent": 83, "mem_used": 30, "mem_total": 60}]
    m.sample(1000.0, gpus)
    assert m.cpu_percent is None and m.rates is None  # both are between two looks
    disk[:] = 4_000_000, 1_000_000
    m.sample(1002.0, gpus)
    assert (m.cpu_percent, m.ram, m.rates) == (40.0, (75, 100), (2e6, 5e5))
    last = {k: (s.xs[-1], s.ys[-1]) for k, s in m.history.items()}
    assert last == {"cpu": (20, 40), "ram": (20, 75), "gpu0": (20, 83), "gpu memory": (20, 50),
                    "read": (20, 2), "write": (20, 0.5)}  # fmt: skip
    disk[:] = 0, 0  # a disk was taken out: no negative rates
    m.sample(1003.0, [])
    assert m.rates == (0, 0)
    for second in range(1004, 1004 + 6000):
        m.sample(float(second), gpus)
    assert all(2000 <= len(s.xs) <= 4000 for s in m.history.values())


def test_what_a_machine_does_not_tell(monkeypatch):
    def fails(*args, **kwargs):
        raise OSError

    for name in ("virtual_memory", "disk_io_counters", "disk_partitions"):
        monkeypatch.setattr(psutil, name, fails)
    m = Machine()
    m.sample(1.0, [])
    m.sample(2.0, [])
    assert m.ram == (None, None) and m.rates is None and partitions() == []
    monkeypatch.setattr(psutil, "disk_io_counters", lambda: None)
    assert system.traffic() is None


def test_mount_points(tmp_path):
    assert os.path.ismount(mount_of(tmp_path / "not" / "there"))
    assert mount_of("/proc/self/fd") == "/proc"
    assert all(os.path.ismount(m) for m in partitions())


LOAD = """import os, subprocess, sys, threading, time
workers = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(2)]
threading.Thread(target=time.sleep, args=(60,), daemon=True).start()
f = open(sys.argv[1], "wb")
while True:
    f.write(bytes(1 << 20))
    f.flush()
    os.fsync(f.fileno())
    f.seek(0)
    time.sleep(0.01)
"""


def test_processes_of_a_run_with_its_workers_folded_in(tmp_path):
    p = subprocess.Popen([sys.executable, "-c", LOAD, tmp_path / "x"], start_new_session=True)
    try:
        processes, deadline = Processes(), time.monotonic() + 30
        while True:
            before = processes.sample({p.pid: "train_gpu0", 2**22 + 1: "gone"}, time.monotonic())
            if before and before["train_gpu0"].count == 3:
                break
            assert time.monotonic() < deadline
        time.sleep(1)
        found = processes.sample({p.pid: "train_gpu0", 2**22 + 1: "gone"}, time.monotonic())
        assert list(found) == ["train_gpu0"]
        u = found["train_gpu0"]
        assert (u.pid, u.count, u.threads) == (p.pid, 3, 4) and u.cpu_percent > 20
        assert (5e6 < u.memory < 1e9 and u.write is None) or u.write >= 0
        later = processes.sample({p.pid: "train_gpu0"}, time.monotonic() + 100)["train_gpu0"]
        assert later.cpu_percent is None  # the look before is too long ago
    finally:
        os.killpg(p.pid, 9)
        p.wait()


def test_a_process_started_by_hand_has_its_workers_by_parents():
    code = "import subprocess as s, time; s.Popen(['sleep', '60'], start_new_session=True); time.sleep(60)"
    p = subprocess.Popen([sys.executable, "-c", code])
    try:
        deadline = time.monotonic() + 20
        while Processes().sample({p.pid: "x"}, 1.0).get("x", system.Usage(0)).count != 2:
            assert time.monotonic() < deadline
            time.sleep(0.05)
    finally:
        for child in [*psutil.Process(p.pid).children(), p]:
            child.kill()
        p.wait()
