"""Kill it, damage its checkpoints, change the number of processes: the result is the unbroken run."""

import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from conftest import ROOT
from test_train import same_state, tiny_args, trainer

import train_dual_head as T
from snac48 import runlog
from snac48.checkpoint import load_checkpoint, save_checkpoint
from snac48.files import sweep_leftovers

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


@pytest.mark.parametrize("how", ["bit", "truncated", "empty"])
def test_killed_inside_a_checkpoint_write_and_the_one_before_damaged(unbroken, how, tmp_path):
    folder, whole = unbroken
    out = tmp_path / "run"
    for _ in range(20):
        code, half, errors = survive.one_life(survive.command(folder, out), out, 3.0, in_write=True)
        assert code in (-9, 0), errors
        if half or code == 0:
            break
    assert half and any(out.glob(".*.pt.*.tmp"))
    while len(list(out.glob("checkpoint_*.pt"))) < 2:
        survive.one_life(survive.command(folder, out), out, 4.0, in_write=False)
    survive.damage(out, how)
    assert "is damaged" in finish(folder, out).stderr
    assert survive.differences(whole, out) == [] and survive.check_samples(out, 15) == []
    assert not any(out.glob(".*.pt.*.tmp"))  # a killed run's gigabytes do not stay


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


@pytest.mark.parametrize("moment", ["warmup", "main", "validation", "write"])
def test_sigterm_at_any_moment_leaves_a_checkpoint_to_go_on_from(unbroken, moment, tmp_path):
    folder, whole = unbroken
    out = tmp_path / "run"
    process = subprocess.Popen(
        survive.command(folder, out), stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    )
    if moment == "write":
        while not any(out.glob(".checkpoint*.tmp")):
            assert process.poll() is None
    else:
        words = {"warmup": "step 3/", "main": "step 14/", "validation": "step 12/"}[moment]
        for line in process.stdout:  # step 12 ends an epoch: its validation follows
            if line.startswith(words):
                break
    began = time.time()
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=30)
    spent = time.time() - began
    assert process.returncode == 3 and spent < 20  # about a second; a busy machine takes longer
    assert T.find_resume("auto", str(out))
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


def test_a_nan_step_is_as_if_that_batch_had_never_been(
    cache_dir, targets_dir, snac_dir, tmp_path, monkeypatch
):
    def run_with(out, spoil):
        t = trainer(cache_dir, targets_dir, snac_dir, out)
        original = t.train_step

        def step(parts, size):
            if t.step != 7:
                return original(parts, size)
            if spoil == "nan":
                with torch.no_grad():
                    parts[0]["audio_48k"][0, 0, 0] = math.nan
                return original(parts, size)
            return {}, math.nan, False  # the batch is left out

        t.train_step = step
        assert t.train() == 0
        return t

    a, b = run_with(tmp_path / "a", "nan"), run_with(tmp_path / "b", "leave out")
    assert a.skipped == 1
    same_state(tmp_path / "a" / "checkpoint_epoch3.pt", tmp_path / "b" / "checkpoint_epoch3.pt")
    assert np.isfinite(list(a.best.values())).all() and a.best == b.best


def test_a_diverged_run_leaves_a_checkpoint_from_before_and_repeats_from_there(
    cache_dir, targets_dir, snac_dir, tmp_path, monkeypatch
):
    flags = cache_dir, targets_dir, snac_dir
    batches = "--batch_size", 1, "--epochs", 2, "--epoch_ranges", "1-1,2-2"
    monkeypatch.setattr(T, "SKIPS_IN_A_ROW", 4)
    assert trainer(*flags, tmp_path / "whole", *batches).train() == 0
    t = trainer(*flags, tmp_path / "run", *batches)
    original = t.train_step

    def step(parts, size):
        if t.step > 8:
            with torch.no_grad():
                parts[0]["audio_48k"][0, 0, 0] = math.nan
        return original(parts, size)

    t.train_step = step
    assert t.train() == 4 and t.skipped == 4
    before = load_checkpoint(T.find_resume("auto", str(tmp_path / "run")))
    assert before["global_step"] == t.step - 4 and before["guard"]["in_a_row"] == 0
    assert all(torch.isfinite(v).all() for v in before["model"].values())
    again = trainer(*flags, tmp_path / "run", *batches, "--resume", "auto")
    assert again.train() == 0  # the fault has gone: as if it had never been
    same_state(tmp_path / "run" / "checkpoint_epoch2.pt", tmp_path / "whole" / "checkpoint_epoch2.pt")


def test_too_many_bad_files_end_the_run_with_a_checkpoint(cache_dir, targets_dir, snac_dir, tmp_path):
    targets, out = shutil.copytree(targets_dir, tmp_path / "targets"), tmp_path / "run"
    t = trainer(cache_dir, targets, snac_dir, out, "--max_bad_fraction", 0.1)
    original = t.train_step

    def spoil(*a):
        if t.step == 3:
            for wav in targets.rglob("*.wav"):
                wav.write_bytes(wav.read_bytes()[:30])
        return original(*a)

    t.train_step = spoil
    with pytest.raises(runlog.UserError, match=r"could not be read, first .* then --resume auto") as stopped:
        t.train()
    assert stopped.value.code == 5
    events = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert events[-1]["reason"] == "too many bad files" and events[-1]["code"] == 5
    assert load_checkpoint(T.find_resume("auto", str(out)))["global_step"] == t.step
    shutil.copytree(targets_dir, targets, dirs_exist_ok=True)
    assert trainer(cache_dir, targets, snac_dir, out, "--resume", "auto").train() == 0


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
    t = trainer(cache_dir, targets_dir, snac_dir, tmp_path / "run", "--ema", 0.9, "--save_every_batches", 1)
    original = t.train_step

    def stop(*a):
        if t.step == 4:
            t.stop.signal = "SIGTERM"
        return original(*a)

    t.train_step = stop
    assert t.train() == 3
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
    assert trainer(cache_dir, targets_dir, snac_dir, tmp_path / "whole", "--ema", 0.9).train() == 0
    same_state(tmp_path / "run" / "checkpoint_epoch3.pt", tmp_path / "whole" / "checkpoint_epoch3.pt")


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
    assert trainer(*flags, tmp_path / "whole", *extra).train() == 0
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
    same_state(tmp_path / "freed" / "checkpoint_epoch3.pt", last)


def test_leftovers_of_the_dead_are_swept_and_of_the_living_kept(tmp_path):
    dead = subprocess.Popen(["true"])
    dead.wait()
    host = runlog.socket.gethostname()
    names = {f".c.pt.{host}.{dead.pid}.1.tmp": False, f".c.pt.{host}.{os.getppid()}.1.tmp": True,
             ".c.pt.elsewhere.1.1.tmp": True, ".note.tmp": True}  # fmt: skip
    for name in names:
        (tmp_path / name).write_text("x")
    old = tmp_path / ".c.pt.elsewhere.2.1.tmp"
    old.write_text("x")
    os.utime(old, (time.time() - 7200,) * 2)
    (tmp_path / f".index.{host}.{dead.pid}.1.tmp").mkdir()
    assert sweep_leftovers(tmp_path) == 3
    assert {p.name for p in tmp_path.iterdir()} == {n for n, stays in names.items() if stays}


def test_a_checkpoint_is_the_old_or_the_new_one_wherever_its_writing_ends(tmp_path, monkeypatch):
    path = tmp_path / "c.pt"
    save_checkpoint(path, {"a": torch.zeros(3)})
    for function in ("fsync", "replace"):
        with monkeypatch.context() as m:
            m.setattr(runlog.os, function, lambda *a: (_ for _ in ()).throw(KeyboardInterrupt))
            with pytest.raises(KeyboardInterrupt):
                save_checkpoint(path, {"a": torch.ones(3)})
        assert load_checkpoint(path)["a"].sum() == 0 and os.listdir(tmp_path) == ["c.pt"]


def test_every_flipped_bit_of_the_headers_is_noticed_or_harmless(tmp_path):
    """The zip's own structure has no checksum: all bits of one local header and of its directory entry."""
    path = tmp_path / "c.pt"
    save_checkpoint(path, {"a": torch.arange(20.0), "b": {"c": 3}})
    data = path.read_bytes()
    central = data.index(b"PK\x01\x02")
    spots = [*range(0, 64), *range(central, central + 80), *range(len(data) - 22, len(data))]
    noticed = 0
    for at in spots:
        for bit in range(0, 8, 3):
            path.write_bytes(data[:at] + bytes([data[at] ^ 1 << bit]) + data[at + 1 :])
            try:
                state = load_checkpoint(path)
                assert torch.equal(state["a"], torch.arange(20.0)) and state["b"] == {"c": 3}, (at, bit)
            except runlog.UserError:
                noticed += 1
    assert noticed > len(spots) // 2


def test_json_lines_after_a_kill_start_on_their_own(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n{"ste')
    runlog.RunLog(tmp_path).metric(step=2)
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert lines[:2] == ['{"step": 1}', '{"ste'] and json.loads(lines[2])["step"] == 2
