"""What people have on their disks from commit 26daf45 opens, resumes, decodes and shows as it did then:
tests/fixtures/before, made by that commit's own programs (the README there says how)."""

import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import soundfile as sf
import torch
from conftest import ROOT, run

BEFORE = ROOT / "tests" / "fixtures" / "before"
# Of the losses of resumed steps. At 26daf45 they are equal to the last digit on the machine that made them;
# another CPU adds in another order, and a corrected gradient of Snake's alpha moves them by less than this.
RTOL = 1e-4
SHARD_TIME = 1_700_000_000  # as in tests/helpers/make_fixtures.py
CHECKPOINT = "checkpoint_epoch2_iter3.pt"
EXACT = ("best", "segment_length")  # and all that is no float, and the learning rates
UNJUDGED = {
    "t",
    "audio_s_per_s",
    "eta_s",
    "tokens_per_s",
    "grad_norm",
    "improved_percent",
}  # clocks, differences


@pytest.fixture(scope="module")
def before(tmp_path_factory) -> Path:
    """A copy that runs may write into, with its place filled in where the files name it."""
    here = tmp_path_factory.mktemp("before") / "old runs"
    shutil.copytree(BEFORE, here)
    for path in here.rglob("*"):
        if path.suffix in (".json", ".jsonl", ".log", ".pid"):
            path.write_bytes(path.read_bytes().replace(b"@HERE@", str(here).encode()))
    for shard in here.glob("cache/*/*.parquet"):
        os.utime(shard, (SHARD_TIME, SHARD_TIME))  # the index beside it is the one of then
    return here


def records(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def what(record: dict) -> tuple:
    return record.get("event"), record.get("step")


def same_steps(before: Path, name: str, run_dir: Path) -> None:
    """The lines a resumed run has added are those that the old code added: steps and validations."""
    wanted = records(before / "expected" / f"{name}.jsonl")
    added = records(run_dir / "metrics.jsonl")[len(records(BEFORE / name / "metrics.jsonl")) :]
    assert [what(r) for r in added] == [what(r) for r in wanted]
    judged = [(a, b) for a, b in zip(added, wanted) if b.get("event") in (None, "val")]
    assert len(judged) > 5
    for ours, theirs in judged:
        assert set(ours) >= set(theirs)
        for key in set(theirs) - UNJUDGED:
            loss = isinstance(theirs[key], float | list) and key not in EXACT and not key.startswith("lr")
            value = pytest.approx(theirs[key], rel=RTOL) if loss else theirs[key]
            assert ours[key] == value, (name, theirs["step"], key)


# ---- decoder runs ----

CACHES = {"cache_dir": "cache/train", "val_cache_dir": "cache/val",
          "audio_48k_dir": "targets/train", "val_audio_48k_dir": "targets/val"}  # fmt: skip
ORIGINALS = {"audio_24k_dir": "audio/train", "val_audio_24k_dir": "audio/val"}
RUNS = {  # what a run that has moved must be told: where things are now
    "phase12": CACHES | ORIGINALS,
    "phase11_fast": CACHES | ORIGINALS,
    "full_codec": {"data_dir": "audio/train", "val_data_dir": "audio/val"},
}


@pytest.mark.parametrize("name", RUNS)
def test_a_run_goes_on_with_the_same_losses(before, name):
    """From the middle of an epoch: every step and validation that followed."""
    run_dir = shutil.copytree(before / name, before / "resumed" / name)
    folders = [x for flag, folder in RUNS[name].items() for x in (f"--{flag}", before / folder)]
    run("train_dual_head.py", "--resume", run_dir / CHECKPOINT if name == "phase12" else "auto", *folders,
        "--pretrained_model", before / "snac", "--output_dir", run_dir, "--device", "cpu")  # fmt: skip
    same_steps(before, name, run_dir)
    if name == "phase11_fast":  # --sample_log: the rows of every step
        ours, wanted = (p / "samples.rank0.log" for p in (run_dir, before / "expected"))
        assert ours.read_text() == wanted.read_text()


# ---- caches and targets ----


def test_finished_caches_and_targets_have_nothing_left_to_do(before):
    made = [*before.glob("cache/train/*.parquet"), *before.glob("targets/train/*.wav")]
    made.append(before / "targets/train/manifest.jsonl")
    assert len(made) == 2 + 6 + 1
    was = {path: path.read_bytes() for path in made}
    times = {path: path.stat().st_mtime_ns for path in made[:-1]}  # the manifest is written anew
    run("cache_codes.py", "--data_dir", before / "audio/train", "--output_dir", before / "cache/train",
        "--pretrained_model", before / "snac", "--rows_per_file", 4, "--min_seconds", 0.5, "--num_workers", 0,
        "--device", "cpu")  # fmt: skip
    run("precompute_48k.py", "--input_dir", before / "audio/train", "--output_dir", before / "targets/train",
        "--native_rate", 44100, "--num_workers", 0, "--device", "cpu")  # fmt: skip
    assert {path: path.read_bytes() for path in made} == was
    assert {path: path.stat().st_mtime_ns for path in times} == times


# ---- decoding ----


def decoded(before):
    """(codes [K] of [1, T_k], audio_24k, audio_48k) as the old code decoded them with noise seed 0."""
    with np.load(BEFORE / "expected/decoded.npz") as f:
        codes = [torch.from_numpy(f[k])[None] for k in ("codes_0", "codes_1", "codes_2")]
        return codes, f["audio_24k"], f["audio_48k"]


@pytest.mark.parametrize("name", ["exported_dual", f"phase12/{CHECKPOINT}"])
def test_exports_and_checkpoints_decode_to_the_same_samples(before, name):
    from snac48.decoder import load_dual_head

    codes, *wanted = decoded(before)
    found = load_dual_head(before / name).decode(codes, noise_seed=0)
    for ours, theirs, samples in zip(found, wanted, (6 * 2048, 6 * 4096), strict=True):
        assert ours.shape == (1, 1, samples) and np.abs(theirs).max() > 0.01
        assert np.abs(ours[0, 0].numpy() - theirs).max() < 1e-5


def test_a_cache_decodes_to_files(before):
    out = before / "decoded"
    run("infer.py", "--checkpoint", before / "exported_dual", "--input", before / "cache/val",
        "--output", out, "--sample_rate", "both", "--device", "cpu")  # fmt: skip
    for rate, wanted in zip((24, 48), decoded(before)[1:]):
        assert len(list(out.glob(f"*_{rate}k.wav"))) == 2
        ours, _ = sf.read(out / f"g_{rate}k.wav", dtype="float32")
        n = len(wanted) // 2  # beyond, the codes that follow are heard
        assert np.abs(ours[:n] - wanted[:n]).max() < 1.1 / 32768


def test_an_exported_codec_makes_the_same_codes(before):
    import pyarrow.parquet as pq

    out = before / "codes of the exported codec"
    run("cache_codes.py", "--data_dir", before / "audio/val", "--output_dir", out, "--pretrained_model",
        before / "exported_codec", "--min_seconds", 0.5, "--num_workers", 0, "--device", "cpu",
        "--rows_per_file", 1000)  # fmt: skip
    table = pq.read_table(out / "codes_batch_gpu0_0.parquet").to_pydict()
    with np.load(BEFORE / "expected/codec_codes.npz") as wanted:
        assert sorted(table["file_path"]) == sorted(wanted)
        for i, name in enumerate(table["file_path"]):
            codes = [np.array(table[f"codes_scale_{k}"][i]).reshape(-1, 2**k) for k in range(3)]
            assert np.array_equal(np.concatenate(codes, 1), wanted[name])


# ---- language model ----


def test_a_language_model_goes_on_with_the_same_losses(before):
    run_dir = shutil.copytree(before / "rvq", before / "resumed/rvq")
    flags = json.loads((before / "jobs/rvq_cpu.json").read_text())["command"][3:]  # python -u train_rvq.py …
    flags[flags.index("--save_dir") + 1] = run_dir
    run("train_rvq.py", *flags)
    same_steps(before, "rvq", run_dir)


def test_a_language_model_speaks_the_same_tokens(before):
    out = before / "tokens.npq"
    run("train_rvq.py", "generate", "--checkpoint", before / "rvq/rvq_7cb_latest.pt", "--frames", 120,
        "--seed", 5, "--prompt", before / "cache/val/codes_batch_gpu0_0.parquet", "--prompt-frames", 4,
        "--device", "cpu", "--output", out)  # fmt: skip
    assert out.read_bytes() == (BEFORE / "expected/tokens.npq").read_bytes()


# ---- the monitor ----


def test_the_monitor_shows_old_jobs_and_runs_as_it_did(before):
    runs = [before / "phase11_fast", before / "full_codec"]
    done = run("monitor.py", "--json", "--log_dir", before / "jobs", *runs)
    shown = {row["name"]: row for row in json.loads(done.stdout)["runs"]}
    wanted = json.loads((BEFORE / "expected/monitor.json").read_text())
    assert sorted(shown) == [row["name"] for row in wanted] and len(wanted) == 8
    for theirs in wanted:
        ours, alerts = shown[theirs["name"]], theirs.pop("alerts")
        assert {k: ours[k] for k in theirs} == theirs
        assert len(ours["alerts"]) == len(alerts)  # their wording is free
