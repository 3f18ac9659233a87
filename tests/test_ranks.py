"""snac48/ranks.py and launch.sh: several processes, on several machines, are one training with one end."""

import os
import signal
import subprocess
import sys
import threading
import time

import numpy as np
import pytest
import torch
import torch.distributed as dist
from conftest import ROOT, parquet_rows
from helpers.rvq import command as rvq_command
from helpers.rvq import latest, make_npqs, metrics, run_here

from snac48 import ranks as R
from snac48.checkpoint import load_checkpoint
from snac48.cli import UserError
from snac48.process import descendants, start_time

sys.path.insert(0, str(ROOT / "benchmarks"))
import ranks as bench
import survive


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Tiny data, and the run directory `one` of 24 steps by one process."""
    folder = tmp_path_factory.mktemp("ranks")
    survive.prepare(folder)
    bench.finished([bench.launch("cpu", bench.tiny_flags(folder, folder / "one"), folder / "logs")])
    return folder


def sentences(said: str) -> list[str]:
    return [line for line in said.splitlines() if ".py: error: " in line]


def torchrun(script, *flags, n=2, **options) -> subprocess.Popen:
    command = [sys.executable, "-m", "snac48.torchrun", "--standalone", "--nproc_per_node", str(n)]
    env = os.environ | {"PYTHONPATH": str(ROOT)} | options.pop("env", {})
    return subprocess.Popen([*command, str(ROOT / script), *map(str, flags)], env=env, text=True,
                            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, **options)  # fmt: skip


# ---- two machines ----


def test_two_machines_stopped_and_resumed_train_as_one_process(folder):
    """Two processes on each; a stop of one machine's launcher stops both, with one checkpoint."""
    out, logs = folder / "two", folder / "logs2"  # one folder of logs for both machines
    flags = [bench.tiny_flags(folder, out)] * 2
    bench.stop_at(bench.two_machines(flags, logs), out, 9)
    kept = [load_checkpoint(path)["global_step"] for path in out.glob("checkpoint_*.pt")]
    stopped_at = max(kept)
    assert 9 <= stopped_at < 24 and kept.count(stopped_at) == 1
    assert {p.read_text() for p in logs.glob("*_node[01].exit")} == {"3\n"}
    assert len(list(logs.glob("train_phase12_cpu_node[01].pid"))) == 2
    said = bench.finished(bench.two_machines(flags, logs))
    assert f"resume: recipe phase12, 15 rows (2 validation), 24 steps, from step {stopped_at}," in said[0]
    assert "Traceback" not in "".join(said)
    rows, weights, losses = bench.compare(folder / "one", out)
    assert rows and weights < 1e-6 and losses < 1e-5
    assert len(bench.rows_seen(out)) == 24
    assert all((out / f"samples.rank{rank}.log").stat().st_size for rank in range(4))


def test_machines_that_do_not_share_their_folders_end_with_one_sentence(folder, tmp_path):
    flags = [bench.tiny_flags(folder, tmp_path / "other"), bench.tiny_flags(folder, folder / "one")]
    began = time.time()
    said = bench.finished(bench.two_machines(flags, tmp_path / "logs"), codes=(1,))
    assert time.time() - began < 60
    for text in said:  # each machine's log has it once
        assert len(sentences(text)) == 1 and "Traceback" not in text, text
        assert "(rank 2, 3) the step to begin at is 24, 0 on rank 0" in sentences(text)[0]
        assert "folders that all of them share" in sentences(text)[0]
    assert sentences(said[1])[0].startswith("train_dual_head.py: error: rank 0 on ")


def test_a_mistake_on_one_machine_ends_all(folder, tmp_path):
    """Before that process has joined the others, too."""
    flags = bench.tiny_flags(folder, tmp_path / "run")
    for wrong in (["--pretrained_model", "nowhere"], ["--output_dir", "/proc/nowhere"]):
        both = bench.two_machines([flags, [*flags, *wrong]], tmp_path / "logs")
        here, there = bench.finished(both, codes=(1,), seconds=90)
        assert len(sentences(there)) == 1 and "has ended" not in there
        assert len(sentences(here)) == 1 and "error: rank " in here and wrong[1] in sentences(here)[0]
        assert not list((tmp_path / "run").glob("*.pt"))


# ---- one machine ----


def test_where_torchrun_is_killed_its_processes_stop_with_a_checkpoint(folder, tmp_path):
    out = tmp_path / "run"
    job = torchrun("train_dual_head.py", *bench.tiny_flags(folder, out), "--epochs", 60, "--device", "cpu",
                   "--epoch_ranges", "1-2,3-60", "--keep_checkpoints", 2)  # fmt: skip
    while not (out / "metrics.jsonl").exists() or max(bench.losses(out), default=0) < 3:
        assert job.poll() is None, job.communicate()[0]
        time.sleep(0.05)
    children = descendants(job.pid)
    job.kill()
    said = job.communicate(timeout=120)[0]  # until the last of them has closed its end
    assert len(children) == 2
    while any(map(start_time, children)):  # on their way out
        time.sleep(0.05)
    assert "stopped at step" in said and "Traceback" not in said, said
    steps = [load_checkpoint(path)["global_step"] for path in out.glob("checkpoint_*.pt")]
    assert max(steps) == max(bench.losses(out))


def test_the_language_model_on_two_processes_is_the_one_of_one(tmp_path):
    """Accumulation, a left-over last step; also when the two are stopped and one goes on."""
    data = make_npqs(tmp_path / "npq", files=30)
    flags = ["--epochs", "4", "--dropout", "0", "--batch", "3", "--accum", "2", "--log-lr-steps", "1"]
    flags += ["--eval-audio-every", "2", "--save-every-steps", "3"]
    assert run_here(rvq_command(tmp_path, data, *flags, run="whole")) == 0
    job = torchrun("train_rvq.py", *rvq_command(tmp_path, data, *flags, run="two"))
    assert job.communicate(timeout=120)[0].count("finished at step") == 1 and job.returncode == 0
    job = torchrun("train_rvq.py", *rvq_command(tmp_path, data, *flags, run="run"))
    while '"step": 7,' not in (
        (tmp_path / "run/metrics.jsonl").read_text() if (tmp_path / "run").exists() else ""
    ):
        assert job.poll() is None, job.communicate()[0]
        time.sleep(0.01)
    job.terminate()
    said = job.communicate(timeout=60)[0]
    assert job.returncode == 3 and said.count("stopped at step") == 1, said
    assert 7 <= latest(tmp_path, "run")["global_step"] < latest(tmp_path, "whole")["global_step"]
    assert run_here(rvq_command(tmp_path, data, *flags, run="run")) == 0
    one = latest(tmp_path, "whole")
    for name in ("two", "run"):
        other = latest(tmp_path, name)
        for part in ("model", "ema"):
            assert all(torch.allclose(one[part][k], v, rtol=0, atol=1e-6) for k, v in other[part].items())
        for event in (None, "val"):
            key = "val_loss" if event else "loss"
            found = [  # by step: one that stopped behind its last step validates again
                {m["step"]: m[key] for m in metrics(tmp_path / d) if m.get("event") == event}
                for d in ("whole", name)
            ]
            assert list(found[0]) == list(found[1])
            assert np.allclose(*(list(f.values()) for f in found), rtol=1e-5)
    for folder in (tmp_path / "whole", tmp_path / "two"):
        assert sum(m.get("event") == "start" for m in metrics(folder)) == 1  # rank 0 alone writes
        assert {p.name.split("__")[0] for p in folder.iterdir()} == {
            p.name.split("__")[0] for p in (tmp_path / "whole").iterdir()
        }


def test_the_cache_under_torchrun_is_shared_by_its_processes(audio_dir, snac_dir, tmp_path):
    flags = ["--data_dir", audio_dir, "--output_dir", tmp_path / "codes", "--pretrained_model", snac_dir,
             "--num_workers", 0, "--rows_per_file", 1]  # fmt: skip
    job = torchrun("cache_codes.py", *flags)
    said = job.communicate(timeout=120)[0]
    assert job.returncode == 0, said
    paths = [row["file_path"] for row in parquet_rows(tmp_path / "codes")]
    assert len(paths) == len(set(paths)) == 14
    assert said.count("cache: cpu; ") == 2


# ---- the parts ----


def test_differences_name_rank_host_and_what(monkeypatch):
    mine = {"step": "3", "a": "1", "b": "2", "c": "3", "host": "A"}
    assert R.differences(mine, {1: mine, 2: mine | {"host": "B"}}) == []
    theirs = {1: mine, 2: mine | {"host": "B", "step": "0"}, 3: mine | {"host": "B", "step": "0"},
              4: dict.fromkeys(mine, "x") | {"host": "C"}}  # fmt: skip
    assert R.differences(mine, theirs) == [
        "on B (rank 2, 3) step is 0, 3 on rank 0",
        "on C (rank 4) step is x, 3 on rank 0, a is x, 1 on rank 0, b is x, 2 on rank 0 and 1 more",
        "rank 0 is on A",
    ]


def test_ranks_take_their_turns_and_a_silent_owner_is_given_up(monkeypatch):
    """Four ranks on two machines: rank 0, then the other machine's first, then the rest."""
    local, store, order = threading.local(), dist.HashStore(), []
    monkeypatch.setattr(R, "env", lambda name, default=0: local.rank % 2)

    def body(rank):
        local.rank = rank
        with R.Ranks(rank, 4, torch.device("cpu"), store).in_turn("data"):
            order.append(rank)

    threads = [threading.Thread(target=body, args=(rank,)) for rank in (3, 2, 1, 0)]
    for thread in threads:
        thread.start()
        time.sleep(0.1)
    for thread in threads:
        thread.join(20)
    assert order[0] == 0 and order.index(2) < order.index(3) and sorted(order) == [0, 1, 2, 3]
    monkeypatch.setattr(R, "LOOK_S", 0.001)
    with pytest.raises(UserError, match="rank 0 has died without a word"):
        R.Ranks(1, 2, torch.device("cpu"), store).wait("never", 0)


def test_torchruns_exit_code_is_that_of_its_processes(tmp_path):
    script = tmp_path / "s.py"
    for code, wanted in (("sys.exit(5)", 5), ("os.kill(os.getpid(), 9)", 137), ("pass", 0)):
        script.write_text(f"import os, sys\n{code}\n")
        job = torchrun(script)
        said = job.communicate(timeout=60)[0]
        assert job.returncode == wanted and "Traceback" not in said


def test_a_stop_has_longer_than_torchruns_30_seconds():
    """What launch.sh passes is what this torchrun takes."""
    shown = subprocess.run([sys.executable, "-m", "snac48.torchrun", "--help"], cwd=ROOT, text=True,
                           capture_output=True)  # fmt: skip
    text = (ROOT / "launch.sh").read_text()
    for flag in (
        "--shutdown_timeout",
        "--signals_to_handle",
        "--node_rank",
        "--master_addr",
        "--master_port",
    ):
        assert flag in shown.stdout and flag in text
    assert "SHUTDOWN_TIMEOUT:-600" in text and signal.SIGUSR1.name in text
