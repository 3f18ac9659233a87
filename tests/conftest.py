"""Tiny real inputs: a SNAC of snac_24khz's geometry with a few thousand weights, and a folder of odd
audio files."""

import json
import os
import resource
import signal
import subprocess
import sys
from pathlib import Path

# before torch is imported, and for every process a test starts: with another number of threads sums are added
# in another order, and a resumed run would differ from the unbroken one in the last digits
os.environ["OMP_NUM_THREADS"] = "1"
signal.signal(signal.SIGHUP, signal.SIG_DFL)  # under nohup what tests start would ignore it
os.environ["HF_HUB_OFFLINE"] = "1"  # before anything imports the hub's client

import numpy as np
import pyarrow.parquet as pq
import pytest
import soundfile as sf
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from snac import SNAC

from snac48.cli import STOP_SIGNALS, UserError

TINY = {
    "sampling_rate": 24000,
    "encoder_dim": 4,
    "encoder_rates": [2, 4, 8, 8],
    "decoder_dim": 64,
    "decoder_rates": [8, 8, 4, 2],
    "attn_window_size": None,
    "codebook_size": 64,
    "codebook_dim": 4,
    "vq_strides": [4, 2, 1],
    "noise": True,
    "depthwise": True,
}


def children_cpu() -> float:
    """CPU seconds of all ended child processes: what a command costs, however busy the machine is."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def make_snac(seed=0, **changes):
    """A random SNAC whose codebooks lie on its latents of noise, so that codes vary as those of a trained
    one."""
    torch.manual_seed(seed)
    model = SNAC(**(TINY | changes)).eval().requires_grad_(False)
    audio = torch.randn(1, 1, 16 * 4096) * torch.linspace(0, 1, 16 * 4096)
    residual = model.encoder(model.preprocess(audio))
    for vq in model.quantizer.quantizers:
        z = torch.nn.functional.avg_pool1d(residual, vq.stride, vq.stride)
        vq.in_proj.bias.sub_(vq.in_proj(z).mean((0, 2)))
        latents = vq.in_proj(z)[0].T
        vq.codebook.weight.copy_(latents[torch.randint(len(latents), (model.codebook_size,))])
        vq.codebook.weight.add_(0.01 * torch.randn_like(vq.codebook.weight))
        residual = residual - vq(residual)[0]
    return model


def save_snac(model, folder: Path, changes=None) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(TINY | (changes or {})))
    torch.save(model.state_dict(), folder / "pytorch_model.bin")
    return folder


def voice(seconds: float, rate: int, seed: int):
    """A buzz with gliding pitch, syllables and hiss up to Nyquist: float32 [n]."""
    rng = np.random.default_rng(seed)
    t = np.arange(int(seconds * rate)) / rate
    pitch = 110 + 60 * np.sin(2 * np.pi * 0.7 * t + seed)
    phase = 2 * np.pi * np.cumsum(pitch) / rate
    buzz = sum(np.sin(h * phase) / h for h in range(1, 25))
    syllables = 0.5 + 0.5 * np.sin(2 * np.pi * 3 * t + seed) ** 3
    return (0.08 * syllables * (buzz + rng.standard_normal(len(t)))).astype(np.float32)


def run(script: str, *args, code=0, text_ok=True, **kwargs):
    """Run one of our scripts; returns the completed process after checking its exit code. text_ok: not
    raw PCM."""
    env = {**os.environ, "PYTHONPATH": str(ROOT)} | kwargs.pop("env", {})
    command = [sys.executable, str(ROOT / script), *map(str, args)]
    done = subprocess.run(command, capture_output=True, text=text_ok,
                          env=env, timeout=300, **kwargs)  # fmt: skip
    assert done.returncode == code, f"exit {done.returncode}, wanted {code}\n{done.stdout}\n{done.stderr}"
    return done


def one_sentence(done) -> str:
    """The error of a failed run: the last stderr line, ours, without a traceback."""
    assert "Traceback" not in done.stderr, done.stderr
    line = done.stderr.strip().splitlines()[-1]
    assert ": error: " in line, line
    return line


def parquet_rows(cache: Path) -> list[dict]:
    return [r for p in sorted(cache.glob("*.parquet")) for r in pq.read_table(p).to_pylist()]


def call(script, *args) -> int:
    """main() of an imported script, without starting torch once more; what it does to signals is undone."""
    handlers = {s: signal.getsignal(s) for s in STOP_SIGNALS}
    try:
        return script.main(script.parse_args([*map(str, args)]))
    finally:
        for s, handler in handlers.items():
            signal.signal(s, handler)


def refused(script, *args) -> str:
    """The one sentence with which an imported script refuses these arguments."""
    with pytest.raises(UserError) as e:
        call(script, *args)
    assert "\n" not in str(e.value)
    return str(e.value)


@pytest.fixture(scope="session")
def snac():
    return make_snac()


@pytest.fixture(scope="session")
def snac_dir(snac, tmp_path_factory):
    return save_snac(snac, tmp_path_factory.mktemp("snac"))


@pytest.fixture(scope="session")
def audio_dir(tmp_path_factory):
    """14 good files of many rates, formats, lengths and channel counts, in two folders."""
    root = tmp_path_factory.mktemp("audio")
    (root / "a").mkdir()
    (root / "b c").mkdir()
    kinds = [
        ("wav", 48000),
        ("flac", 44100),
        ("ogg", 44100),
        ("mp3", 48000),
        ("wav", 96000),
        ("wav", 48000),
        ("flac", 48000),
    ]
    for i in range(14):
        suffix, rate = kinds[i % 7]
        x = voice(1.0 + 0.31 * i, rate, i)
        if i % 3 == 1:
            x = np.stack([x, 0.5 * x], axis=1)
        sf.write(root / ("a" if i < 7 else "b c") / f"utt{i:02d}.{suffix}", x, rate)
    return root


@pytest.fixture(scope="session")
def cache_dir(audio_dir, snac_dir, tmp_path_factory):
    out = tmp_path_factory.mktemp("codes")
    run("cache_codes.py", "--data_dir", audio_dir, "--output_dir", out, "--pretrained_model", snac_dir,
        "--device", "cpu", "--rows_per_file", 5, "--num_workers", 2)  # fmt: skip
    return out


@pytest.fixture(scope="session")
def targets_dir(audio_dir, tmp_path_factory):
    import precompute_48k

    out, folders = tmp_path_factory.mktemp("targets"), ("--input_dir", audio_dir, "--output_dir")
    call(precompute_48k, *folders, out, "--native_rate", 44100, "--device", "cpu", "--num_workers", 0)
    return out


@pytest.fixture(scope="session")
def speech_48k(tmp_path_factory):
    """12 recordings at 48 kHz, 16 bit, of 0.6 to 2.1 s: what cache and raw audio read the same."""
    root = tmp_path_factory.mktemp("speech48")
    for i in range(12):
        sf.write(root / f"utt{i:02d}.wav", voice(0.6 + 0.14 * i, 48000, i), 48000)
    return root


@pytest.fixture(scope="session")
def codes_48k(speech_48k, snac_dir, tmp_path_factory):
    import cache_codes

    out = tmp_path_factory.mktemp("codes48")
    call(cache_codes, "--data_dir", speech_48k, "--output_dir", out, "--pretrained_model", snac_dir,
         "--device", "cpu", "--num_workers", 0, "--min_seconds", 0.1)  # fmt: skip
    return out


@pytest.fixture(scope="session")
def checkpoint(cache_dir, targets_dir, snac_dir, tmp_path_factory):
    """best_model.pt of two epochs: the first of them trains the 48 kHz head alone."""
    from helpers.training import training

    out = tmp_path_factory.mktemp("run")
    assert training(cache_dir, targets_dir, snac_dir, out, "--epochs", 2).train() == 0
    return out / "best_model.pt"


@pytest.fixture(scope="session")
def sidon_dir(tmp_path_factory):
    from helpers import standin

    return standin.build(tmp_path_factory.mktemp("sidon"))
