"""monitor.py: the script, without a terminal and without textual."""

import json
import os
import subprocess
import sys
import time

import pytest
from conftest import ROOT
from helpers import fake_runs as fake

SCHEMA = """name kind state pid epoch epochs step phase segment_length loss loss_24k loss_48k val_loss_24k
val_loss_48k best_val_loss_48k best_epoch lr eta_s alerts log""".split()  # noqa: SIM905


@pytest.fixture
def monitor(tmp_path):
    """Run monitor.py in a folder of its own, where neither textual nor rich can be imported."""
    absent = tmp_path / "absent"
    absent.mkdir()
    for name in ("textual", "rich"):
        (absent / f"{name}.py").write_text(f"raise ImportError('{name} is not installed')")
    env = {**os.environ, "PYTHONPATH": str(absent), "LOG_DIR": "logs"}

    def call(*args, stdout=subprocess.PIPE):
        return subprocess.run([sys.executable, ROOT / "monitor.py", *args], cwd=tmp_path, env=env, text=True,
                              stdin=subprocess.DEVNULL, stdout=stdout, stderr=subprocess.PIPE)  # fmt: skip

    return call


def test_json_schema_without_textual(tmp_path, monitor):
    fake.fleet_of_every_kind(tmp_path)
    p = monitor("--json")
    assert p.returncode == 0 and p.stderr == ""
    report = json.loads(p.stdout, parse_constant=lambda c: pytest.fail(f"{c} is not JSON"))
    assert set(report) == {"runs", "system"} and len(report["runs"]) == 8
    assert set(report["system"]) == {"cpu_percent", "ram_used", "ram_total", "disk_free", "gpus"}
    for run in report["runs"]:
        assert list(run) == SCHEMA and run["state"] in ("RUNNING", "FINISHED", "DEAD", "STALE_PID", None)
    runs = {r["name"]: r for r in report["runs"]}
    assert runs["train_gpu1"]["state"] == "FINISHED" and runs["train_gpu1"]["best_epoch"] == 6
    assert runs["train_gpu2"]["loss_48k"] in ("Infinity", pytest.approx(0.7, abs=0.2))
    assert runs["train_gpu0"]["state"] == "DEAD" and "OutOfMemoryError" in runs["train_gpu0"]["alerts"][0]
    assert runs["phase10_old"]["state"] is None and runs["phase10_old"]["val_loss_48k"] == 0.52


def test_once_is_text_without_textual(tmp_path, monitor):
    fake.fleet_of_every_kind(tmp_path)
    p = monitor("--once")
    assert p.returncode == 0 and p.stderr == ""
    assert "train_gpu0: DEAD at step 700: torch.OutOfMemoryError" in p.stdout and "RAM" in p.stdout


def test_empty_and_wrong_places_say_what_to_do(monitor):
    p = monitor("--once")
    assert p.returncode == 0 and "launch.sh train" in p.stdout
    assert json.loads(monitor("--json").stdout)["runs"] == []
    p = monitor("--once", "nothing.log")
    assert p.returncode == 1 and "does not exist" in p.stderr and "Traceback" not in p.stderr
    p = monitor()
    assert p.returncode == 1 and "--once" in p.stderr


def test_files_named_on_the_command_line(tmp_path, monitor):
    run_dir = fake.add_run(tmp_path, "somewhere", "train", [0], records=fake.train_records(50))
    (tmp_path / "x.log").write_text(fake.human(fake.train_records(60)))
    p = monitor("--json", "--log_dir", "none", str(run_dir), "x.log")
    runs = {r["name"]: r["step"] for r in json.loads(p.stdout)["runs"]}
    assert runs == {"somewhere": 50, "x": 60}


def test_help_is_fast(monitor):
    start = time.perf_counter()
    p = monitor("--help")
    assert p.returncode == 0 and p.stderr == "" and time.perf_counter() - start < 1


def test_the_window_without_textual_says_what_to_do(monitor):
    ours, terminal = os.openpty()
    p = monitor(stdout=terminal)
    os.close(terminal)
    os.close(ours)
    assert p.returncode == 1 and "pip install textual" in p.stderr and "Traceback" not in p.stderr
