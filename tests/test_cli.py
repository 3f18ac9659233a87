"""snac48/cli.py: configs, layers of values, one-sentence errors."""

import argparse
import json
import os
import subprocess
import sys

import pytest
import torch
from conftest import ROOT

from snac48.cli import (
    UserError,
    as_type,
    config_text,
    guarded,
    layered,
    numbers,
    one_line_errors,
    own_gpu,
    pick_device,
    read_config,
    read_flags,
)


def test_a_config_may_have_comments_and_a_misspelt_key_is_named(tmp_path):
    path = tmp_path / "c.json"
    path.write_text('{ // a "comment"\n"epochs": 3, "note": "http://not a comment"}')
    assert read_config(path, {"epochs", "note"}) == {"epochs": 3, "note": "http://not a comment"}
    with pytest.raises(UserError, match="unknown key 'note'; did you mean 'notes'"):
        read_config(path, {"epochs", "notes"})
    for text, words in (("[1]", "one JSON object"), ("{", "is not JSON")):
        path.write_text(text)
        with pytest.raises(UserError, match=words):
            read_config(path, ())
    with pytest.raises(UserError, match="cannot be read"):
        read_config(tmp_path / "none", ())


@pytest.mark.parametrize(
    "kind, value, wanted",
    [(int, 3, 3), (int, 3.0, 3), (float, 3, 3.0), (str, [1, 2.5], "1,2.5"), (bool, True, True),
     (int, 3.5, None), (int, True, None), (bool, 1, None), (float, "x", None), (int, None, None)],
)  # fmt: skip
def test_values_of_configs_and_checkpoints_are_of_the_options_type(kind, value, wanted):
    if wanted is not None:
        assert as_type(kind, value, "here") == wanted and type(as_type(kind, value, "here")) is kind
        return
    with pytest.raises(UserError, match=f"^here must be {kind.__name__}, not"):
        as_type(kind, value, "here")


def test_lists_of_numbers():
    assert numbers(int, "1,2", "--x") == [1, 2] and numbers(float, "1.5", "--x") == [1.5]
    for kind, text in ((int, "1.5"), (int, ""), (float, "1,,2")):
        with pytest.raises(UserError, match=r"^--x .* must be a comma-separated list"):
            numbers(kind, text, "--x")


def test_the_last_layer_wins_and_is_named():
    values, origin = layered({"default": {"a": 1, "b": 2}, "config": {"b": 3}, "flag": {"b": 4}})
    assert (values, origin) == ({"a": 1, "b": 4}, {"a": "default", "b": "flag"})
    assert config_text(values, origin, "text").splitlines()[1].split() == ["b", "4", "flag"]
    assert json.loads(config_text(values, origin, "json"))["b"] == {"value": 4, "origin": "flag"}


def test_a_users_mistake_is_one_sentence_and_its_exit_code(capsys, monkeypatch, tmp_path):
    def fail(code):
        raise UserError("this is wrong: do that", code)

    monkeypatch.setenv("JOB_EXIT_FILE", str(tmp_path / "exit"))
    monkeypatch.setattr("sys.argv", ["some/script.py"])
    with pytest.raises(SystemExit) as left:
        guarded(fail, 5)
    assert left.value.code == 5 and (tmp_path / "exit").read_text() == "5\n"
    assert capsys.readouterr().err == "script.py: error: this is wrong: do that\n"
    assert guarded(lambda: 7) == 7


def test_a_misspelt_flag_is_one_line_that_names_the_nearest(capsys):
    parser = argparse.ArgumentParser(prog="x")
    parser.add_argument("--batch_size", type=int)
    one_line_errors(parser)
    for flag, words in (("--batchsize", "--batchsize: did you mean --batch_size?"), ("--q", "--help lists")):
        with pytest.raises(SystemExit) as left:
            parser.parse_args([flag, "3"])
        printed = capsys.readouterr().err
        assert left.value.code == 2 and printed.count("\n") == 1 and words in printed


def test_a_value_of_two_dashes_is_none(capsys):
    parser = argparse.ArgumentParser(prog="x")
    parser.add_argument("--lr", type=float)
    one_line_errors(parser)
    with pytest.raises(SystemExit):  # argparse itself makes an empty list of it
        parser.parse_args(["--lr=--"])
    assert "argument --lr: expected one argument" in capsys.readouterr().err


@pytest.mark.parametrize(
    "take, words",
    [
        (lambda: torch.empty(1 << 50), "the memory is exhausted ("),
        (lambda: bytearray(1 << 60), "fewer --num_workers; then run the same command again"),
        (lambda: open("/proc/self/mem/x"), "/proc/self/mem/x can't be used: Not a directory"),
    ],
)
def test_what_the_machine_refuses_is_one_sentence(take, words, capsys):
    with pytest.raises(SystemExit) as left:
        guarded(take)
    said = capsys.readouterr().err
    assert left.value.code == 1 and words in said and said.count("\n") == 1


def test_closed_streams_are_dev_null_and_a_narrow_terminal_sees_escapes(tmp_path):
    code = """
import os, sys
from snac48.cli import open_streams
open_streams()
with open(sys.argv[1], "wb") as f:
    assert f.fileno() > 2
    print("never in the file"), os.system("echo nor this"), sys.stdin.read()
    print("\u00e4\u4e2d", file=sys.stderr)
"""
    shell = f'exec "$0" -c "$1" {tmp_path / "f"} <&- >&-'
    done = subprocess.run(["bash", "-c", shell, sys.executable, code], cwd=ROOT, stderr=subprocess.PIPE,
                          env={**os.environ, "PYTHONIOENCODING": "ascii"})  # fmt: skip
    assert (done.returncode, done.stderr) == (0, rb"\xe4\u4e2d" + b"\n")
    assert (tmp_path / "f").read_bytes() == b""


def test_help_shows_the_defaults_that_its_texts_leave_out(capsys):
    parser = argparse.ArgumentParser(prog="x")
    for flag, kw in {"seed": {"default": 0}, "half": {"action": "store_true"}, "in": {"default": None},
                     "device": {"default": "", "help": "where (default: a GPU)"}}.items():  # fmt: skip
        parser.add_argument(f"--{flag}", **{"help": "text"} | kw)
    with pytest.raises(SystemExit):
        read_flags(parser, ["--help"])
    said = " ".join(capsys.readouterr().out.partition("options:")[2].split())
    assert "--seed SEED text (default: 0) --half text --in IN text --device" in said and said.count("(") == 2


def test_a_program_ends_though_an_open_loader_has_workers_that_ignore_signals(tmp_path):
    code = """
import torch
from snac48.cli import ignore_stop_signals, kill_workers_at_exit
kill_workers_at_exit()
loader = torch.utils.data.DataLoader(range(100), num_workers=2, worker_init_fn=ignore_stop_signals)
feed = iter(loader)
next(feed)
"""
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, timeout=60)


@pytest.mark.parametrize(
    "driver, cuda, words",
    [
        ("550.54.14", "13.0", "needs driver 580 or newer; update the driver, or install a wheel for CUDA 12"),
        ("470.82.01", "13.0", "needs driver 580 or newer; update the driver; to do without"),
        ("580.65.06", None, "is a wheel without CUDA; install a wheel for CUDA 13"),
        ("535.10", None, "is a wheel without CUDA; install a wheel for CUDA 12"),
        ("580.65.06", "13.0", "which this driver runs; see what python -c"),
    ],
)  # fmt: skip
def test_gpus_that_only_the_driver_sees_are_explained(driver, cuda, words, tmp_path, monkeypatch, capsys):
    import doctor

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.version, "cuda", cuda)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    monkeypatch.setattr("sys.argv", ["doctor.py"])
    smi = tmp_path / "nvidia-smi"
    smi.write_text(f'#!/bin/sh\n[ "$1" = --query-gpu=driver_version ] && echo {driver} && echo {driver}\n')
    smi.chmod(0o755)
    for ask in (lambda: pick_device(""), lambda: pick_device("0"), doctor.main):
        with pytest.raises(UserError) as e:
            ask()
        told = str(e.value)
        assert f"2 GPU(s) with driver {driver}, torch sees none: torch {torch.__version__}" in told
        assert words in told and "--device cpu" in told and "\n" not in told
    assert pick_device("cpu").type == "cpu"
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")  # hidden on purpose
    assert pick_device("").type == "cpu" and doctor.main() == 0
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    smi.write_text("#!/bin/sh\necho NVIDIA-SMI has failed\nexit 9\n")
    assert pick_device("").type == "cpu"
    with pytest.raises(UserError, match="GPU 0 isn't there"):
        pick_device("0")


def test_on_a_cpu_freed_memory_stays_with_the_process():
    """Without it every activation above 32 MB is fresh pages from the kernel."""
    code = """
import resource, sys, torch
from snac48.cli import pick_device
if sys.argv[1] == "kept":
    pick_device("cpu")
for _ in range(3):
    torch.zeros(16 << 20)
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(20):
    torch.zeros(16 << 20)
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""
    ask = lambda how: subprocess.run([sys.executable, "-c", code, how], cwd=ROOT, check=True, text=True,
                                     stdout=subprocess.PIPE).stdout  # fmt: skip
    kept, plain = int(ask("kept")), int(ask("plain"))  # a block has 16384 pages of 4 kB
    assert plain > 20 * 16000 and kept < plain / 3  # the first blocks may still find no room among small ones


@pytest.mark.parametrize(
    "env, name, count, wanted",
    [({}, "", 0, "cpu"), ({}, "", 4, "0"), ({}, "2", 4, "2"), ({}, "cuda:1", 4, "cuda:1"), ({}, "1", 0, "1"),
     ({"LOCAL_RANK": "3", "LOCAL_WORLD_SIZE": "4"}, "", 4, "3"),
     ({"LOCAL_RANK": "3", "LOCAL_WORLD_SIZE": "4"}, "0", 4, "3"),
     ({"LOCAL_RANK": "3", "LOCAL_WORLD_SIZE": "4"}, "cpu", 4, "cpu"),
     ({"LOCAL_RANK": "3", "LOCAL_WORLD_SIZE": "4"}, "", 0, "cpu"),
     ({"LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1"}, "2", 4, "2"),
     ({"SLURM_LOCALID": "2"}, "", 4, "2"), ({"SLURM_LOCALID": "2"}, "", 1, "0"),
     ({"SLURM_LOCALID": "2"}, "1", 4, "1")],
)  # fmt: skip
def test_each_process_of_torchrun_or_srun_has_a_gpu_of_its_own(env, name, count, wanted, monkeypatch):
    for key in ("LOCAL_RANK", "LOCAL_WORLD_SIZE", "SLURM_LOCALID"):
        monkeypatch.delenv(key, raising=False)
    for key, value in env.items():
        monkeypatch.setenv(key, value)
    assert own_gpu(name, count) == wanted


def test_the_gpu_that_is_picked_becomes_the_current_one(monkeypatch):
    current = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    monkeypatch.setattr(torch.cuda, "set_device", current.append)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    monkeypatch.setenv("LOCAL_RANK", "2")
    assert str(pick_device("")) == "cuda:2" and current == [2]
    monkeypatch.setenv("LOCAL_RANK", "4")
    with pytest.raises(UserError, match="GPU 4 isn't there: torch sees 4"):
        pick_device("")
