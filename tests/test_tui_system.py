"""tui/system.py: GPUs."""

import json
import os
import sys

from helpers import fake_runs as fake
from helpers.fleet import one, plain

from snac48.tui.system import GpuSampler
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
