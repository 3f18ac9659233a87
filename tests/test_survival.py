"""Kill it, damage its checkpoints, change the number of processes: the result is the unbroken run."""

import os
import shutil
import signal
import subprocess
import sys
import time

import pytest
import torch
from conftest import ROOT
from helpers.training import assert_same_state, newest, stop_after, tiny_args, training

from snac48.checkpoint import load_checkpoint

sys.path.insert(0, str(ROOT / "benchmarks"))
import survive


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory):
    """(folder of tiny data, run directory): a run of 24 steps that nothing disturbed."""
    folder = tmp_path_factory.mktemp("survive")
    survive.prepare(folder)
    done = subprocess.run(survive.command(folder, folder / "whole"), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return folder, folder / "whole"


def finish(folder, out):
    done = subprocess.run(survive.command(folder, out), capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done


def test_killed_inside_checkpoint_writes_and_the_newest_one_damaged_every_time(unbroken, tmp_path):
    folder, whole = unbroken
    out, command, errors = tmp_path / "run", survive.command(folder, tmp_path / "run"), []
    for how in ("bit", "truncated", "empty"):
        half, lives = False, 0
        while not half or len(list(out.glob("checkpoint_*.pt"))) < 2:
            for path in out.glob(".*.pt.*.tmp"):  # one_life waits for one: let it be this life's
                path.unlink()
            code, half, said = survive.one_life(command, out, 0.0, in_write=True, least=2)
            assert code in (-9, 0), said
            errors.append(said)
            lives += 1
            assert lives < 60
        survive.damage(out, how)
    assert any(out.glob(".*.pt.*.tmp"))
    errors.append(finish(folder, out).stderr)
    assert sum("is damaged" in said for said in errors) == 3
    assert survive.differences(whole, out) == [] and survive.check_samples(out, 15) == []
    assert not any(out.glob(".*.pt.*.tmp"))  # a killed run's gigabytes do not stay


def test_killed_in_the_adversarial_phase(unbroken, tmp_path):
    """With -9, where the phase begins and within it: the same bits, the discriminators' optimiser too."""
    folder, _ = unbroken
    short = *survive.ADVERSARIAL, "--segment_schedule", "0.3,0.2", "--val_limit", "1"
    argv = {name: survive.command(folder, tmp_path / name, *short) for name in ("whole", "run")}
    assert subprocess.run(argv["whole"], capture_output=True).returncode == 0
    for step in (16, 19):  # it begins after step 16
        process = subprocess.Popen(argv["run"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        while not (tmp_path / "run" / f"checkpoint_epoch{step // 4 + (step % 4 > 0)}_iter{step}.pt").exists():
            assert process.poll() is None
            time.sleep(0.01)
        process.kill()
        process.wait()
    assert subprocess.run(argv["run"], capture_output=True).returncode == 0
    assert survive.differences(tmp_path / "whole", tmp_path / "run") == []
    one = load_checkpoint(tmp_path / "run" / "checkpoint_epoch6.pt")
    assert all(s["step"] == 8 for s in one["adversarial"]["optimizer"]["state"].values())


def test_the_comparison_would_see_a_difference(unbroken, tmp_path):
    _, whole = unbroken
    other = shutil.copytree(whole, tmp_path / "other")
    saved = load_checkpoint(other / "checkpoint_epoch6.pt")
    next(iter(saved["ema"].values())).view(-1)[0] += 1e-6
    torch.save(saved, other / "checkpoint_epoch6.pt")
    lines = (other / "samples.rank0.log").read_text().splitlines()
    (other / "samples.rank0.log").write_text("\n".join(lines[:-1]) + "\n")
    assert len(survive.differences(whole, other)) == 1 and survive.check_samples(other, 15)


def test_one_process_two_and_one_again(unbroken, tmp_path):
    """World size 1 -> 2 -> 1 over resumes: the same samples, losses within 1e-5."""
    folder, whole = unbroken
    out = tmp_path / "run"

    def until(step, processes):
        argv = survive.command(folder, out)
        if processes == 2:
            argv = [
                sys.executable,
                "-m",
                "torch.distributed.run",
                "--standalone",
                "--nproc_per_node",
                "2",
                *argv[1:],
            ]
        process = subprocess.Popen(argv, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
        while process.poll() is None:
            reached = [int(p.stem.rsplit("iter", 1)[1]) for p in out.glob("checkpoint_*iter*.pt")]
            if step and max(reached, default=0) >= step:
                process.send_signal(signal.SIGTERM)
                break
            time.sleep(0.05)
        _, errors = process.communicate(timeout=120)
        assert step or process.returncode == 0, errors

    until(6, 1)
    until(14, 2)
    until(None, 1)
    seen = {}
    for rank in (0, 1):
        for line in (out / f"samples.rank{rank}.log").read_text().splitlines():
            step, _, *rows = line.split()
            seen.setdefault(int(step), []).extend(map(int, rows))
    wanted = {}
    for line in (whole / "samples.rank0.log").read_text().splitlines():
        step, _, *rows = line.split()
        wanted[int(step)] = sorted(map(int, rows))
    assert {s: sorted(r) for s, r in seen.items()} == wanted
    assert len((out / "samples.rank1.log").read_text()) > 0
    a, b = (load_checkpoint(p / "checkpoint_epoch6.pt") for p in (whole, out))
    for k, v in a["best"].items():
        assert b["best"][k] == pytest.approx(v, rel=1e-5)


def test_sigterm_at_any_moment_leaves_a_checkpoint_to_go_on_from(unbroken, tmp_path):
    """In the warmup, in the validation that follows step 12, in the main phase, in a checkpoint's write."""
    folder, whole = unbroken
    out = tmp_path / "run"
    for moment in ("step 3/", "step 12/", "step 14/", "write"):
        process = subprocess.Popen(
            survive.command(folder, out), stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
        )
        if moment == "write":
            while not any(out.glob(".*.pt.*.tmp")):
                assert process.poll() is None
        else:
            assert any(line.startswith(moment) for line in process.stdout), moment
        began = time.time()
        process.send_signal(signal.SIGTERM)
        process.communicate(timeout=30)
        spent = time.time() - began
        assert process.returncode == 3 and spent < 20  # about a second; a busy machine takes longer
        assert newest(out)[0]
    finish(folder, out)
    assert survive.differences(whole, out) == []


@pytest.mark.parametrize(
    "script", ["train_dual_head.py", "cache_codes.py", "precompute_48k.py", "train_rvq.py"]
)
def test_a_signal_during_start_up_ends_it_with_the_documented_code(
    script, cache_dir, targets_dir, snac_dir, audio_dir, tmp_path
):
    out = tmp_path / "out"
    flags = {
        "train_dual_head.py": tiny_args(cache_dir, targets_dir, snac_dir, out),
        "cache_codes.py": ["--data_dir", audio_dir, "--output_dir", out, "--device", "cpu",
                           "--pretrained_model", snac_dir],
        "precompute_48k.py": ["--input_dir", audio_dir, "--output_dir", out, "--device", "cpu",
                              "--upsampler", "sinc"],
        "train_rvq.py": ["--data", cache_dir, "--save_dir", out, "--device", "cpu"],
    }[script]  # fmt: skip
    note = tmp_path / "exit"
    job = subprocess.Popen([sys.executable, ROOT / script, *map(str, flags)], stderr=subprocess.PIPE,
                           stdout=subprocess.DEVNULL, text=True,
                           env=os.environ | {"JOB_EXIT_FILE": str(note)})  # fmt: skip
    while not handles_sigterm(job.pid):
        assert job.poll() is None, job.stderr.read()
        time.sleep(0.002)
    job.terminate()
    errors = job.communicate(timeout=20)[1]
    assert job.returncode == 3 and note.read_text() == "3\n" and "Traceback" not in errors, errors
    assert not list(out.glob("*.pt"))


def handles_sigterm(pid: int) -> bool:
    lines = open(f"/proc/{pid}/status").read().splitlines()
    mask = next(int(line.split()[1], 16) for line in lines if line.startswith("SigCgt"))
    return bool(mask & 1 << (signal.SIGTERM - 1))


def test_a_full_disk_keeps_the_last_checkpoint_and_says_so(cache_dir, targets_dir, snac_dir, tmp_path):
    """A file size limit below a checkpoint's size fails as a full disk does (EFBIG for ENOSPC)."""
    argv = tiny_args(
        cache_dir, targets_dir, snac_dir, tmp_path / "run", "--ema", 0.9, "--save_every_batches", 1
    )
    small = (
        "import resource, signal, runpy, sys; signal.signal(signal.SIGXFSZ, signal.SIG_IGN);"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (400000, 400000)); sys.argv = sys.argv[1:];"
        "runpy.run_path(sys.argv[0], run_name='__main__')"
    )
    script = str(ROOT / "train_dual_head.py")
    flags = cache_dir, targets_dir, snac_dir
    t = training(*flags, tmp_path / "run", "--ema", 0.9, "--save_every_batches", 1)
    assert t.train(stop_after(5)) == 3
    before = {p.name: p.read_bytes() for p in (tmp_path / "run").glob("*.pt")}
    done = subprocess.run(
        [sys.executable, "-c", small, script, *argv, "--resume", "auto"],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 1 and "could not be written" in done.stderr and "Traceback" not in done.stderr
    assert {p.name: p.read_bytes() for p in (tmp_path / "run").glob("*.pt")} == before
    assert not list((tmp_path / "run").glob(".*.tmp"))
    done = subprocess.run([sys.executable, script, *argv, "--resume", "auto"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert training(*flags, tmp_path / "whole", "--ema", 0.9).train() == 0
    assert_same_state(*(tmp_path / name / "checkpoint_epoch3.pt" for name in ("run", "whole")))


FILL = """
set -e
mount -t tmpfs -o size="$2" none "$1"
folder=$1; out=$3; shift 3
code=0; "$@" || code=$?
echo "exit code $code"
cp -r "$folder" "$out/full"
mount -o remount,size=1g "$folder"
"$@"
cp -r "$folder" "$out/freed"
"""


def test_a_full_file_system_then_space_again(cache_dir, targets_dir, snac_dir, tmp_path):
    """A tmpfs of three checkpoints and a half, in a mount namespace of its own."""
    space = ["unshare", "--user", "--map-root-user", "--mount"]
    allowed = subprocess.run([*space, "mount", "-t", "tmpfs", "none", str(tmp_path)], capture_output=True)
    if allowed.returncode:
        pytest.skip(f"no file system can be mounted here: {allowed.stderr.decode().strip()}")
    (tmp_path / "run").mkdir()
    flags = cache_dir, targets_dir, snac_dir
    extra = "--ema", 0.9, "--save_every_batches", 1
    assert training(*flags, tmp_path / "whole", *extra).train() == 0
    last = tmp_path / "whole" / "checkpoint_epoch3.pt"
    argv = tiny_args(*flags, tmp_path / "run", *extra, "--resume", "auto")
    command = [sys.executable, str(ROOT / "train_dual_head.py"), *argv]
    done = subprocess.run([*space, "bash", "-c", FILL, "-", str(tmp_path / "run"),
                           f"{3.5 * last.stat().st_size // 1024:.0f}k", str(tmp_path), *command],
                          capture_output=True, text=True, timeout=240)  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "exit code 1" in done.stdout and "Traceback" not in done.stderr, done.stderr
    assert done.stderr.count("could not be written") == 1 and "free some space" in done.stderr
    kept = list((tmp_path / "full").glob("*.pt"))
    assert kept and all(load_checkpoint(path)["global_step"] >= 0 for path in kept)
    assert not list((tmp_path / "full").glob(".*.tmp"))
    assert_same_state(tmp_path / "freed" / "checkpoint_epoch3.pt", last)
