"""launch.sh: starts, stops and tells the truth about processes."""

import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import ROOT

from snac48.process import process_stat

SLEEPER = "import signal, sys, time\nsignal.signal(signal.SIGTERM, lambda *a: sys.exit(3))\ntime.sleep(60)"


@pytest.fixture
def launch(tmp_path):
    """Run a snippet with launch.sh sourced: start_job and friends with any command, in a log folder of
    its own."""
    venv = tmp_path / "venv"
    (venv / "bin").mkdir(parents=True)
    (venv / "bin" / "python").symlink_to(sys.executable)
    (venv / ".installed").write_bytes((ROOT / "requirements.txt").read_bytes())
    env = dict(os.environ, LOG_DIR=str(tmp_path / "logs"), VENV=str(venv), START_WATCH="1", STOP_GRACE="5")

    def call(snippet, code=0):
        done = subprocess.run(["bash", "-c", f"source '{ROOT}/launch.sh'\n{snippet}"], env=env, cwd=tmp_path,
                              capture_output=True, text=True, timeout=90)  # fmt: skip
        assert done.returncode == code, done.stdout + done.stderr
        return done.stdout + done.stderr

    call.python, call.logs, call.env = venv / "bin" / "python", tmp_path / "logs", env
    yield call
    for path in call.logs.glob("*.pid"):
        subprocess.run(
            ["bash", "-c", f"source '{ROOT}/launch.sh'; alive {path.stem} && kill -KILL -- -$PID"], env=env
        )


def sleeper(launch, name, text=SLEEPER):
    return f"start_job {name} train cpu '' '{launch.python}' -c '{text}'"


def test_start_status_stop(launch):
    out = launch(sleeper(launch, "train_gpu0"))
    assert "started train_gpu0 (pid" in out and "./launch.sh stop train_gpu0" in out
    launch(sleeper(launch, "train_gpu1"))
    assert "already runs" in launch(sleeper(launch, "train_gpu0"), code=1)
    out = launch("status")
    assert out.count("RUNNING") == 2
    job = json.loads((launch.logs / "train_gpu0.json").read_text())
    assert job["kind"] == "train" and job["command"][0] == str(launch.python)
    assert "has stopped" in launch("stop_job train_gpu0")
    out = launch("status")
    assert re.search("train_gpu1 +RUNNING", out) and re.search("train_gpu0 +DEAD", out)  # the other lives on
    assert "nothing was signalled" in launch("stop_job train_gpu0", code=1)


def test_a_job_that_dies_at_once_shows_the_end_of_its_log_and_its_exit_code(launch):
    out = launch(
        f"start_job x train cpu '' '{launch.python}' -c 'import sys; sys.exit(\"no cache here\")'", code=1
    )
    assert "died with exit code 1" in out and "no cache here" in out


def test_a_job_that_finishes_at_once_is_no_failure(launch):
    out = launch(f"start_job x cache cpu '' '{launch.python}' -c 'print(123)'")
    assert "already finished" in out and "123" in out
    out = launch(f"start_job x cache cpu '' '{launch.python}' -c 'print(456)'")
    assert "456" in out and "123" not in out and "123" in (launch.logs / "x.log.old").read_text()


def test_of_20_starts_at_once_one_runs(launch):
    out = launch(f"for i in $(seq 20); do ( {sleeper(launch, 'train_gpu0')} ) & done; wait")
    assert out.count("started train_gpu0") == 1 and out.count("already runs") == 19


def test_a_reused_pid_is_never_signalled(launch):
    other = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    try:
        launch(sleeper(launch, "train_gpu0") + "; stop_job train_gpu0")
        (launch.logs / "train_gpu0.pid").write_text(f"{other.pid} 12345 python\n")
        assert "STALE_PID" in launch("status")
        assert "nothing was signalled" in launch("stop_job train_gpu0", code=1)
        assert other.poll() is None
    finally:
        other.kill()


def test_where_the_truth_cannot_be_told_nothing_starts(launch):
    out = launch("ask() { return 1; }; " + sleeper(launch, "train_gpu0"), code=1)
    assert "nobody can tell whether train_gpu0 runs" in out and not (launch.logs / "train_gpu0.log").exists()


def test_a_zombie_is_dead(launch):
    child = subprocess.Popen([sys.executable, "-c", "pass"])
    deadline = time.time() + 10
    while process_stat(child.pid)[0] != "Z" and time.time() < deadline:
        time.sleep(0.05)
    launch.logs.mkdir()
    (launch.logs / "x.json").write_text("{}")
    (launch.logs / "x.pid").write_text(f"{child.pid} {process_stat(child.pid)[3]} python\n")
    assert "DEAD" in launch("status") and "nothing was signalled" in launch("stop_job x", code=1)
    child.wait()


def test_the_real_scripts_leave_their_exit_code(launch, tmp_path):
    out = launch(f"start_job c cache cpu '' '{launch.python}' '{ROOT}/cache_codes.py' --data_dir nowhere "
                 f"--output_dir o", code=1)  # fmt: skip
    assert "audio folder nowhere does not exist" in out
    assert (launch.logs / "c.exit").read_text() == "1\n" and "DEAD(1)" in launch("status")


def test_preflight_and_bad_arguments(launch, tmp_path):
    for command, words in [
        ("main train", "say on which GPUS"),
        ("main train x --codes_dir .", "GPUS must be"),
        ("main train cpu --codes_dir nowhere", "./launch.sh cache cpu"),
        ("main train cpu --audio_48k_dir=nowhere", "nowhere, targets/val are missing"),
        ("main train cpu", "codes/train, codes/val, targets/train, targets/val are missing"),
        ("main cache cpu --data_dir nowhere", "does not exist"),
        ("main stop train_gpu9", "no job train_gpu9"),
        ("main frobnicate", "unknown command"),
        ("MIN_FREE_KB=999999999999 main cache cpu --data_dir .", "is free"),
    ]:
        assert words in launch(command, code=1), command


def test_the_run_directory_is_the_one_of_the_recipe_or_config(launch, tmp_path):
    config = f"--config '{ROOT}/configs/phase10_curriculum.json'"
    for folder in ("codes/train", "codes/val", "targets/train", "targets/val", "corpus/train/audio"):
        (tmp_path / folder).mkdir(parents=True)
    (tmp_path / "corpus/valid/audio").mkdir(parents=True)
    for more, name, folder in [("--recipe phase11-fast", "phase11-fast", "phase11_fast"),
                               (config, "phase10", "phase10_curriculum")]:  # fmt: skip
        launch(f'start_job() {{ echo "$1 $4" >seen; }}; main train cpu {more}')
        assert (tmp_path / "seen").read_text() == f"train_{name}_cpu checkpoints/{folder}\n"
    assert "config nothing cannot be read" in launch("main train cpu --config nothing", code=1)
    assert "a,b is missing" in launch("mkdir a; main train cpu --recipe phase10 --data_dir a,b", code=1)


def test_names_say_what_a_job_does_and_short_ones_find_it(launch, tmp_path):
    seen = "start_job() { echo $1; }; need_setup() { :; }; mkdir -p a/train/audio;"
    for command, name in [("cache cpu", "cache_cpu"), ("cache cpu --output_dir codes/val", "cache_val_cpu"),
                          ("precompute cpu --input_dir a --output_dir t/train/audio", "precompute_train_cpu"),
                          ("workflow cpu --input_dir a", "workflow_cpu")]:  # fmt: skip
        assert launch(f"{seen} main {command}").strip() == name
    for name in ("train_phase12_gpu3", "train_phase10_gpu3", "cache_train_gpu0"):
        launch(sleeper(launch, name))
    assert "may be any of: train_phase10_gpu3 train_phase12_gpu3" in launch("main stop train_gpu3", code=1)
    assert "cache_train_gpu0 has stopped" in launch("main stop cache_gpu0")
    launch("main stop train_phase10_gpu3; main stop train_phase12_gpu3")


def test_a_venv_that_uv_filled_counts_as_set_up(launch, tmp_path):
    (tmp_path / "venv/.installed").unlink()
    (tmp_path / "venv/pyvenv.cfg").write_text(Path(sys.prefix, "pyvenv.cfg").read_text())
    (tmp_path / "venv/lib").symlink_to(Path(sys.prefix, "lib"))
    launch("need_setup")
    assert (tmp_path / "venv/.installed").read_bytes() == (ROOT / "requirements.txt").read_bytes()
    (tmp_path / "venv/.installed").write_text("torch==0.1\n")
    launch("ROOT=$PWD; echo torch==0.1 >requirements.txt; rm venv/.installed; need_setup", code=1)


def test_a_hangup_of_the_terminal_leaves_the_job_alive(launch):
    """The terminal's session gets SIGHUP; the job has a session of its own."""
    snippet = f"source '{ROOT}/launch.sh'; " + sleeper(launch, "train_gpu0") + "; sleep 60"
    shell = subprocess.Popen(["bash", "-c", snippet], env=launch.env, start_new_session=True,
                             stdout=subprocess.PIPE, text=True)  # fmt: skip
    while "stop it" not in (line := shell.stdout.readline()):
        assert line, "the job did not start"
    os.killpg(shell.pid, 1)
    shell.wait()
    time.sleep(0.3)
    assert "RUNNING" in launch("status")
    launch("stop_job train_gpu0")


# ---- GPUs and machines ----


@pytest.fixture
def gpus(launch, tmp_path):
    """A machine of eight GPUs, as nvidia-smi tells it; what start_job gets goes to the file `seen`."""
    (tmp_path / "bin").mkdir()
    smi = tmp_path / "bin" / "nvidia-smi"
    smi.write_text("#!/bin/sh\nseq 0 7\n")
    smi.chmod(0o755)
    for folder in ("codes/train", "codes/val", "targets/train", "targets/val", "corpus/train/audio"):
        (tmp_path / folder).mkdir(parents=True)
    seen = 'start_job() { echo "$CUDA_DEVICE_ORDER ${CUDA_VISIBLE_DEVICES-all} $*" >>seen; };'

    def call(command, code=0, **env):
        (tmp_path / "seen").unlink(missing_ok=True)
        names = " ".join(f"{k}='{v}'" for k, v in env.items())
        said = launch(f"{seen} export PATH='{tmp_path}/bin':$PATH {names}; main {command}", code)
        return (tmp_path / "seen").read_text().rstrip() if code == 0 else said

    return call


def test_gpu_numbers_are_places_in_cuda_visible_devices(gpus):
    assert gpus("train 1,3").startswith("PCI_BUS_ID 1,3 train_phase12_gpu1_3 train 1,3 ")
    assert gpus("train 1,3", CUDA_VISIBLE_DEVICES="4,5,6,GPU-7ab").startswith("PCI_BUS_ID 5,GPU-7ab train_")
    one = gpus("train 1", CUDA_VISIBLE_DEVICES="4,5")  # torch counts there, too
    assert one.startswith("PCI_BUS_ID 4,5 ") and " --device 1 " in one and "torchrun" not in one
    assert "GPU 2 isn't there: CUDA_VISIBLE_DEVICES names 2" in gpus(
        "train 0,2", 1, CUDA_VISIBLE_DEVICES="4,5"
    )
    assert "GPU 8 isn't there: nvidia-smi lists 8" in gpus("train 8", 1)
    assert "names a GPU twice" in gpus("train 1,1", 1)
    rvq = gpus("rvq 0,1 --data x").split()
    assert rvq[2:4] == ["rvq_gpu0_1", "rvq"] and "snac48.torchrun" in rvq and "--device" not in rvq


def test_a_training_always_goes_on_from_its_folder(gpus):
    assert " --resume auto --epochs 3" in gpus("train 0 --epochs 3")
    assert gpus("train 0 --resume=auto").endswith("--device 0 --resume=auto")


def test_several_machines_by_hand(gpus):
    both = {"NNODES": 2, "MASTER": "h0:29500"}
    said = gpus("train 0,1", NODE_RANK=1, **both)
    assert "train_phase12_gpu0_1_node1" in said
    assert "--nnodes 2 --node_rank 1 --master_addr h0 --master_port 29500" in said
    assert "--shutdown_timeout 600" in said and "--nproc_per_node 2" in said
    said = gpus("train 3", NODE_RANK=0, **both)  # one GPU of each machine
    assert "--nproc_per_node 1" in said and "--device 3" in said
    assert "--nproc_per_node 3" in gpus("train cpu,cpu,cpu", NODE_RANK=0, **both)
    assert "needs NODE_RANK" in gpus("train 0", 1, **both) and "needs NODE_RANK" in gpus(
        "train 0", 1, NODE_RANK=2, **both
    )
    assert "needs MASTER=HOST:PORT" in gpus("train 0", 1, NODE_RANK=0, NNODES=2, MASTER="h0")
    assert "one machine" in gpus("workflow 0", 1, NODE_RANK=0, **both)
    assert "cache_gpu0_node1" in gpus("cache 0", NODE_RANK=1)


def test_several_machines_in_a_slurm_job(gpus, tmp_path):
    scontrol = tmp_path / "bin" / "scontrol"
    scontrol.write_text('#!/bin/sh\n[ "$*" = "show hostnames n[3-4]" ] && printf "n3\\nn4\\n"\n')
    scontrol.chmod(0o755)
    step = {"SLURM_JOB_ID": 123456, "SLURM_NNODES": 2, "SLURM_NODEID": 1, "SLURM_LOCALID": 0}
    step |= {"SLURM_STEP_ID": 0, "SLURM_STEP_NUM_NODES": 2, "SLURM_STEP_NODELIST": "n[3-4]"}
    said = gpus("train 0,1", **step)
    assert "_node1 " in said and "--nnodes 2 --node_rank 1 --master_addr n3 --master_port 23456 " in said
    assert "cache_gpu0_node1" in gpus("cache 0", **step)
    scontrol.unlink()
    assert "--master_addr 10.0.0.3 " in gpus("train 0,1", SLURM_LAUNCH_NODE_IPADDR="10.0.0.3", **step)
    assert "one task a machine" in gpus("train 0", 1, **step | {"SLURM_LOCALID": 1})
    batch = {k: v for k, v in step.items() if "STEP" not in k}
    assert "srun ./launch.sh" in gpus("train 0", 1, **batch)
    assert "--standalone" in gpus("train 0,1", NNODES=1, **batch)


def test_in_the_foreground_a_signal_is_passed_on_and_the_code_is_the_jobs(launch):
    script = "import os, signal, sys, time\n" + (
        'def stop(*a):\n print("bye"); open(os.environ["JOB_EXIT_FILE"], "w").write("3"); sys.exit(3)\n'
        'signal.signal(signal.SIGTERM, stop); print("hello", flush=True); time.sleep(60)'
    )
    snippet = (
        f"source '{ROOT}/launch.sh'; status() {{ {sleeper(launch, 'train_gpu0', script)}; }}; main status"
    )
    env = launch.env | {"SLURM_JOB_ID": "1"}
    shell = subprocess.Popen(["bash", "-c", snippet], env=env, stdout=subprocess.PIPE, text=True)
    for line in shell.stdout:
        if "hello" in line:
            break
    shell.terminate()
    assert "bye" in shell.communicate(timeout=20)[0] and shell.returncode == 3
    assert "STOPPED" in launch("status")


def test_a_kill_reaches_what_has_a_session_of_its_own(launch, tmp_path):
    """As torchrun's processes have; both ignore SIGTERM here."""
    deaf = "import signal, subprocess, sys, time\nsignal.signal(signal.SIGTERM, signal.SIG_IGN)\n"
    child = deaf + 'open(sys.argv[1], "w").write("x"); time.sleep(60)'
    (tmp_path / "child.py").write_text(child)
    parent = deaf + (f"subprocess.Popen([sys.executable, \"{tmp_path}/child.py\", \"{tmp_path}/up\"], "
                     "start_new_session=True); time.sleep(60)")  # fmt: skip
    launch(sleeper(launch, "train_gpu0", parent))
    while not (tmp_path / "up").exists():
        time.sleep(0.05)
    assert "from the checkpoint before" in launch("STOP_GRACE=1; stop_job train_gpu0")
    time.sleep(0.3)
    assert not subprocess.run(["pgrep", "-f", f"{tmp_path}/child.py"], capture_output=True).stdout


def test_a_job_of_another_machine_is_left_to_it(launch):
    launch(sleeper(launch, "train_gpu0"))
    path = launch.logs / "train_gpu0.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"host": "elsewhere"}))
    assert "ON_elsewhere" in launch("status")
    for command in ("stop", "resume"):
        assert "train_gpu0 runs on elsewhere: give this command there" in launch(
            f"main {command} train_gpu0", 1
        )


def test_resume_goes_on_from_the_newest_checkpoint(launch, tmp_path):
    """Of the job itself: what it was told to begin with counts until it has written one."""
    failing = f"'{launch.python}' -c 'import sys; sys.exit(1)' --resume x.pt"
    launch(f"start_job train_gpu0 train cpu '{tmp_path}/run' {failing}", code=1)
    seen = 'need_setup() { :; }; start_job() { echo "$@"; }; main resume train_gpu0'
    assert launch(seen).rstrip().endswith("--resume x.pt")
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "checkpoint_epoch1.pt").touch()
    assert launch(seen).rstrip().endswith("--resume x.pt --resume auto")
