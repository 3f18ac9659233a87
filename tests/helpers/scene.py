"""Small real inputs for cases of what goes wrong, each made once a process and thrown away at its end: nobody
may change them; `copy` gives an own one."""

import atexit
import contextlib
import functools
import importlib
import os
import shutil
import signal
import sys
import tempfile
from pathlib import Path
from unittest import mock

import soundfile as sf
from conftest import call, make_snac, save_snac, voice

from snac48.cli import STOP_SIGNALS, guarded


@functools.cache
def root() -> Path:
    folder = Path(tempfile.mkdtemp(prefix="chaos-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder


@functools.cache
def codec() -> Path:
    return save_snac(make_snac(), root() / "codec")


@functools.cache
def recordings() -> Path:
    """Eight at 48 kHz, 0.6 to 1.6 s."""
    folder = root() / "recordings"
    folder.mkdir()
    for i in range(8):
        sf.write(folder / f"utt{i}.wav", voice(0.6 + 0.14 * i, 48000, i), 48000)
    return folder


@functools.cache
def codes() -> Path:
    import cache_codes

    out = root() / "codes"
    call(cache_codes, "--data_dir", recordings(), "--output_dir", out, "--pretrained_model", codec(),
         "--device", "cpu", "--num_workers", 0, "--min_seconds", 0.1)  # fmt: skip
    return out


def training_flags(out, *more) -> list[str]:
    """Of a decoder training of two steps: one a phase."""
    argv = ["--cache_dir", codes(), "--val_cache_dir", codes(), "--audio_48k_dir", recordings(),
            "--val_audio_48k_dir", recordings(), "--target_kind", "recordings", "--pretrained_model", codec(),
            "--output_dir", out, "--device", "cpu", "--epochs", 2, "--epoch_ranges", "1-2",
            "--segment_schedule", 0.3, "--batch_multiplier", 1, "--batch_size", 8, "--val_segment", 0.3,
            "--val_limit", 1, "--num_workers", 0, *more]  # fmt: skip
    return [str(a) for a in argv]


@functools.cache
def run() -> Path:
    """The run directory of a finished training."""
    said = program("train_dual_head", *training_flags(root() / "run"))
    assert said == 0, said
    return root() / "run"


def copy(folder: Path, to: Path) -> Path:
    return shutil.copytree(folder, to)


def program(name: str, *argv):
    """A script of ours in this process, from its flags to its exit code (a SystemExit where it fails);
    `train_rvq generate` and `train_rvq tokens`, too."""
    name, _, job = name.partition(" ")
    script = importlib.import_module(name)
    argv = [str(a) for a in argv]
    handlers = {s: signal.getsignal(s) for s in STOP_SIGNALS}
    try:
        with mock.patch.object(sys, "argv", [f"{name}.py", *argv]):
            return guarded(started, script, job, argv)
    finally:
        for s, handler in handlers.items():
            signal.signal(s, handler)


def started(script, job: str, argv: list[str]):
    if script.__name__ == "train_dual_head":
        args, _, saved = script.parse_args(argv)
        return script.main(args, saved)
    if script.__name__ == "train_rvq":
        if not job:
            return script.start_and_train(script.parse_training(argv))
        parser, work = {"generate": (script.generate_parser, script.generate),
                        "tokens": (script.tokens_parser, script.token_files)}[job]  # fmt: skip
        return work(script.cli.read_flags(parser(), argv))
    return script.main(script.parse_args(argv)) if hasattr(script, "parse_args") else script.main()


@contextlib.contextmanager
def inside(folder: Path):
    """The block runs in that folder."""
    before = os.getcwd()
    os.chdir(folder)
    try:
        yield
    finally:
        os.chdir(before)
