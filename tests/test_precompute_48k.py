"""precompute_48k.py with a stand-in for SIDON whose right answer is known (tests/helpers/standin.py)."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import soundfile as sf
import torch
from conftest import ROOT, call, children_cpu, one_sentence, refused, run
from helpers import standin
from helpers.standin import buzz

import precompute_48k
from precompute_48k import Waiting, batches, read_file
from snac48.sidon import RATE, Sidon, sha256_of


def precompute(*args, code=0):
    return run("precompute_48k.py", *args, code=code)


def rows_of(folder: Path, name: str = "manifest.jsonl") -> list[dict]:
    return [json.loads(line) for line in (folder / name).read_text().splitlines()]


@pytest.fixture(scope="session")
def corpus(tmp_path_factory) -> Path:
    """150 short recordings of many kinds: more than two units."""
    root = tmp_path_factory.mktemp("corpus") / "audio"
    rates = [8000, 16000, 22050, 24000, 44100, 48000, 96000]
    for i in range(150):
        rate = rates[i % len(rates)]
        x, _ = buzz(rate, 1.0 + 0.3 * (i % 3), seed=i)
        folder = root / f"speaker{i % 4}"
        folder.mkdir(parents=True, exist_ok=True)
        kind = ["wav", "flac", "ogg", "mp3"][i % 4] if rate <= 48000 else "flac"
        subtype = {"wav": ["PCM_24", "FLOAT", "PCM_16"][i % 3]}.get(kind)
        channels = {"wav": [1, 2, 6][i % 3], "flac": 2}.get(kind, 1)
        x = np.stack([x] * channels, axis=1)
        sf.write(folder / f"{i:03d}.{kind}", x, rate, subtype=subtype)
    return root


def digest(folder: Path) -> dict:
    files = sorted(p for p in folder.rglob("*.wav"))
    return {str(p.relative_to(folder)): sha256_of(p) for p in files}


@pytest.fixture(scope="session")
def finished(corpus, sidon_dir, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("finished") / "out"
    precompute("--input_dir", corpus, "--output_dir", out, "--sidon_dir", sidon_dir, "--device", "cpu")
    return out


def test_who_shares_a_pass():
    """Equal lengths, at most batch_size; --batch_slack widens it, a chunk's length bounds it."""

    def groups(lengths, size, slack):
        waiting = [Waiting(f"{i:02d}", "", None, 24000, np.zeros((n, 1))) for i, n in enumerate(lengths)]
        *found, last = batches([*waiting, Waiting("x", "", None, 24000)], size, slack)
        assert [w.path for w in last] == ["x"]  # not read yet: too long
        return [[w.frames for w in group] for group in found]

    assert groups([50, 70, 50, 50, 70], 2, 0.0) == [[50, 50], [50], [70, 70]]
    assert groups([50, 70, 50, 76], 8, 0.5) == [[50, 50, 70], [76]]
    assert groups([2990, 3010, 3010], 8, 1.0) == [[2990], [3010], [3010]]


def test_whole_job(finished, corpus):
    rows = rows_of(finished)
    assert len(rows) == 150 == len({r["path"] for r in rows}) == len({r["target"] for r in rows})
    for row in rows:
        info, source = sf.info(finished / row["target"]), sf.info(corpus / row["path"])
        assert (info.samplerate, info.channels, info.subtype) == (RATE, 1, "PCM_16")
        assert info.frames == row["samples"] and row["source_rate"] == source.samplerate
        assert row["kind"] == ("copied" if source.samplerate >= RATE else "sidon")
        assert abs(info.frames / RATE - row["seconds"]) < 1 / RATE and row["faithful"]
    summary = json.loads((finished / "summary.json").read_text())
    assert summary["files"] == 150 and summary["skipped"] == 0 and summary["kinds"]["sidon"] == 108
    events = rows_of(finished, "metrics.jsonl")
    assert events[0]["event"] == "start" and events[-1]["event"] == "end" and "audio_s_per_s" in events[-2]
    copied = next(r for r in rows if r["kind"] == "copied" and r["source_rate"] == RATE)
    x = sf.read(corpus / copied["path"], always_2d=True)[0].mean(axis=1)
    y = sf.read(finished / copied["target"])[0]
    np.testing.assert_allclose(y, x, atol=1 / 32768)
    assert (copied["gain"], copied["level"], copied["lag_samples"], copied["envelope_corr"]) == (1, 1, 0, 1)


def test_killed_twice_with_others_at_work(finished, corpus, sidon_dir, tmp_path):
    """Three processes on one folder, one of them killed -9 twice: the same bytes, every file once."""
    out = tmp_path / "out"
    flags = ["--input_dir", corpus, "--output_dir", out, "--sidon_dir", sidon_dir, "--device", "cpu"]
    args = [sys.executable, ROOT / "precompute_48k.py", *flags, "--num_workers", "1"]
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    others = [subprocess.Popen(args, **quiet)]
    for _ in range(2):
        victim = subprocess.Popen(args, **quiet)
        until = time.monotonic() + 20
        claims = out / "work"
        while victim.poll() is None and time.monotonic() < until:  # until it holds a claim
            if victim.pid in [json.loads(p.read_text())["pid"] for p in claims.glob("*.claim")]:
                break
            time.sleep(0.01)
        victim.send_signal(signal.SIGKILL)
        victim.wait()
    others.append(subprocess.Popen(args, **quiet))
    assert [p.wait(timeout=90) for p in others] == [0, 0]
    assert digest(out) == digest(finished)
    assert rows_of(out) == rows_of(finished)


def test_stop_and_continue(finished, corpus, sidon_dir, tmp_path):
    out = tmp_path / "out"
    args = ("--input_dir", corpus, "--output_dir", out, "--sidon_dir", sidon_dir, "--device", "cpu")
    command = [sys.executable, ROOT / "precompute_48k.py", *args]
    p = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    while p.poll() is None and not list((out / "work").glob("*.claim")):
        time.sleep(0.01)
    p.send_signal(signal.SIGTERM)
    assert p.wait(timeout=60) == 3
    assert not list((out / "work").glob("*.claim")) or list((out / "work").glob("unit_*.json"))
    precompute(*args)
    assert digest(out) == digest(finished)
    assert "150/150 files" in precompute(*args).stdout


def test_bad_files(tmp_path, sidon_dir):
    """Each quarantined by name and reason; the others are done; exit code 5, or 0 with a larger fraction."""
    root = tmp_path / "in"
    (root / "deep").mkdir(parents=True)
    x, _ = buzz(24000, 1)
    for i in range(3):
        sf.write(root / f"good{i}.wav", x, 24000)
    whole = (root / "good0.wav").read_bytes()
    (root / "truncated.wav").write_bytes(whole[: len(whole) // 2])
    (root / "empty.wav").write_bytes(b"")
    sf.write(root / "no_samples.wav", np.zeros(0), 24000)
    (root / "text.wav").write_text("this is no audio at all, only a name")
    (root / "deep" / "noise.mp3").write_bytes(b"\x00\x01" * 300)
    sf.write(root / "nan.wav", np.array([0.1, np.nan, 0.2] * 500), 48000, subtype="FLOAT")
    sf.write(root / "locked.wav", x, 24000)
    (root / "outside.wav").symlink_to(Path(sf.__file__).resolve())
    bad = {"truncated.wav": "truncated", "empty.wav": "RIFF", "no_samples.wav": "0 samples"}
    bad |= {"text.wav": "RIFF", "deep/noise.mp3": "unreadable", "nan.wav": "NaN", "outside.wav": "leaves"}
    if os.geteuid() != 0:  # root reads everything
        (root / "locked.wav").chmod(0)
        bad["locked.wav"] = "Permission"
    out = tmp_path / "out"
    args = ("--input_dir", root, "--output_dir", out, "--sidon_dir", sidon_dir, "--device", "cpu")
    r = precompute(*args, "--num_workers", 1, code=5)
    assert "files were skipped, more than --max_bad_fraction 0.01" in r.stderr
    skipped = {row["path"]: row["reason"] for row in rows_of(out, "skipped.jsonl")}
    assert skipped.keys() == bad.keys()
    for name, reason in bad.items():
        assert reason in skipped[name], (name, skipped[name])
    assert len(rows_of(out)) + len(skipped) == 11
    assert len(digest(out)) == len(rows_of(out))
    assert f"skipped {len(bad)}" in r.stdout
    precompute(*args, "--max_bad_fraction", 0.9)


def test_unreadable_permission(tmp_path, monkeypatch):
    """What root's tests cannot have: open() refuses."""
    sf.write(tmp_path / "a.wav", np.zeros(100), 24000)

    def refuse(*args, **kwargs):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("os.open", refuse)
    job = {"input_dir": str(tmp_path), "allowed": (tmp_path.resolve(),), "native_rate": 48000}
    found = read_file("a.wav", "a.wav", job | {"upsampler": "sidon"})
    assert found["reason"] == "unreadable: Permission denied"


def test_users_mistakes_are_one_sentence(tmp_path, corpus, sidon_dir):
    refusal = lambda *args: refused(precompute_48k, *args)
    out = tmp_path / "out"
    data = ("--input_dir", corpus, "--output_dir", out, "--device", "cpu", "--num_workers", 0)
    assert "does not exist" in refusal("--input_dir", tmp_path / "no", "--output_dir", out)
    usage = precompute(*data, "--batch_size", 0, code=2)
    assert "--batch_size must be from 1" in one_sentence(usage)
    assert "lies inside --input_dir" in refusal("--input_dir", corpus, "--output_dir", corpus / "x")
    cuda = standin.build(tmp_path / "cuda", "cuda")
    message = one_sentence(precompute(*data, "--sidon_dir", cuda, code=1))
    assert "needs SIDON" in message and "it holds decoder_cuda.pt, feature_extractor_cuda.pt" in message
    assert "reached" in refusal(*data)
    assert "other settings" in refusal(*data, "--upsampler", "sinc")
    standin.build(tmp_path / "other", lost=26)
    a = ("--input_dir", corpus, "--output_dir", tmp_path / "o", "--device", "cpu", "--num_workers", 0)
    assert call(precompute_48k, *a, "--sidon_dir", sidon_dir, "--limit", 3) == 0
    assert "other settings" in refusal(*a, "--sidon_dir", tmp_path / "other", "--limit", 9)


def test_unfaithful_rows(tmp_path, corpus):
    """A restorer that ignores its input: rows say so, the summary counts them, the exit code stays 0."""

    class Deaf(standin.Extractor):
        def forward(self, input_features: torch.Tensor) -> dict[str, torch.Tensor]:
            b, t, _ = input_features.shape
            return {"last_hidden_state": torch.zeros(b, t, 1024)}

    sidon_dir = standin.build(tmp_path / "deaf", extractor=Deaf())
    folders = ("--input_dir", corpus, "--output_dir", tmp_path / "out", "--sidon_dir", sidon_dir)
    r = precompute(*folders, "--device", "cpu", "--test_mode", "--test_samples", 4, "--num_workers", 0)
    rows = rows_of(tmp_path / "out")
    assert len(rows) == 4 and not any(row["faithful"] for row in rows) and "unfaithful 4" in r.stdout
    assert r.stdout.count("envelope_corr") == 4  # --test_mode's table


def test_sinc_ranges_and_clipping(tmp_path):
    root = tmp_path / "in"
    root.mkdir()
    x, _ = buzz(24000, 1)
    sf.write(root / "a.wav", x, 24000)
    sf.write(root / "b.wav", 3 * x / np.abs(x).max(), 48000, subtype="FLOAT")
    sf.write(root / "b.flac", x, 48000)
    args = ("--input_dir", root, "--output_dir", tmp_path / "out", "--upsampler", "sinc", "--num_workers", 0)
    precompute(*args, "--start_idx", 1, "--end_idx", 2)
    assert [r["path"] for r in rows_of(tmp_path / "out")] == ["b.flac"]
    precompute(*args)
    rows = {r["path"]: r for r in rows_of(tmp_path / "out")}
    assert rows["a.wav"]["kind"] == "sinc" and rows["b.wav"]["kind"] == "copied"
    assert rows["b.flac"]["target"] == "b.flac.wav"  # beside b.wav
    assert abs(rows["b.wav"]["level"] - 32767 / 32768 / 3) < 1e-6
    assert np.abs(sf.read(tmp_path / "out" / "b.wav", dtype="int16")[0].astype(int)).max() == 32767


def test_long_files_go_piece_by_piece(tmp_path, sidon_dir, monkeypatch):
    """More than LONG_SECONDS are read by the main process, more than one chunk goes through in pieces."""
    root = tmp_path / "in"
    root.mkdir()
    x, _ = buzz(16000, 65)
    sf.write(root / "a.wav", x, 16000, subtype="FLOAT")
    monkeypatch.setattr(precompute_48k, "LONG_SECONDS", 30)
    args = ("--input_dir", root, "--output_dir", tmp_path / "out", "--sidon_dir", sidon_dir)
    assert call(precompute_48k, *args, "--device", "cpu", "--num_workers", 0) == 0
    y = sf.read(tmp_path / "out" / "a.wav", dtype="float32")[0]
    np.testing.assert_allclose(y, Sidon(sidon_dir).upsample(x, 16000)[0], atol=1.01 / 32768)


def test_help_is_fast():
    start = children_cpu()
    precompute("--help")
    assert children_cpu() - start < 1.5


def test_both_splits_without_a_flag(tmp_path, monkeypatch, capsys):
    for split, n in (("train", 3), ("valid", 2)):
        for i in range(n):
            path = tmp_path / "corpus" / split / "audio" / f"{i}.wav"
            path.parent.mkdir(parents=True, exist_ok=True)
            sf.write(path, buzz(48000, 0.5, seed=i)[0], 48000)
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("DATA_ROOT", raising=False)
    assert call(precompute_48k, "--num_workers", 0) == 0
    device = "cuda:0" if torch.cuda.is_available() else "cpu"
    first = f"precompute_48k: 3 of 3 files below corpus/train/audio -> targets/train; {device}"
    assert capsys.readouterr().out.startswith(first)
    assert [len(rows_of(tmp_path / "targets" / split)) for split in ("train", "val")] == [3, 2]
    (tmp_path / "theirs").mkdir()
    (tmp_path / "targets/val/0.wav").rename(tmp_path / "theirs/0.wav")
    args = ("--input_dir", "corpus/train/audio")
    assert "go together" in refused(precompute_48k, *args)
    assert "has not made" in refused(precompute_48k, *args, "--output_dir", "theirs")
