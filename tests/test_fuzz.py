"""All 210 cases of helpers/fuzz.py through the programs: no crash, nothing dropped unsaid, a reason each.

FUZZ_SEED=7 python -m pytest tests/test_fuzz.py    # another 210
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import soundfile as sf
import torch
from conftest import call, voice
from helpers import fuzz
from helpers.training import Training, newest, tiny_args

import cache_codes
import doctor
import precompute_48k
import train_dual_head as T
from snac48.audio import AudioError, read_span
from snac48.cache import CodeIndex
from snac48.checkpoint import load_checkpoint
from snac48.cli import UserError
from snac48.data import CachedCodesDataset, to_device
from snac48.decoder import load_dual_head
from snac48.tokens import Corpus, NpqError, read_shard

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::DeprecationWarning")
SEED = int(os.environ.get("FUZZ_SEED", 42))


def verdict(case, refused: str | None) -> str | None:
    """What is wrong with the outcome, or None; refused: the reason given, None when it was taken as good."""
    if refused is not None and not refused.strip():
        return "refused without a reason"
    if case.expect == "bad" and refused is None:
        return "taken as good"
    if case.expect == "good" and refused is not None:
        return f"refused: {refused}"


def check(outcomes: list[tuple[str, str | None]]):
    wrong = [f"{name}: {what}" for name, what in outcomes if what]
    assert not wrong, "\n".join(wrong)


def test_there_are_210_and_a_seed_decides_them():
    assert fuzz.WAVS + fuzz.SHARDS + fuzz.CHECKPOINTS == 210
    a, b, c = (fuzz.wavs(s) for s in (1, 1, 2))
    assert [x.data for x in a[:10]] == [x.data for x in b[:10]] != [x.data for x in c[:10]]


# ---- wav ----


@pytest.fixture(scope="module")
def wav_folder(tmp_path_factory):
    """Every wav case and two good files."""
    folder = tmp_path_factory.mktemp("wavs")
    cases = fuzz.wavs(SEED)
    assert len(cases) == fuzz.WAVS
    for case in cases:
        case.write(folder / f"{case.name}.wav")
    for name in ("ours_0", "ours_1"):
        sf.write(folder / f"{name}.wav", voice(1.2, 24000, 1), 24000)
    return folder, cases


def test_bad_wavs_are_listed_by_the_cache_with_their_reason(wav_folder, snac_dir, tmp_path):
    folder, cases = wav_folder
    args = ("--data_dir", folder, "--output_dir", tmp_path, "--device", "cpu", "--pretrained_model", snac_dir)
    assert call(cache_codes, *args, "--num_workers", 0, "--min_seconds", 0.1, "--max_bad_fraction", 1) == 0
    skipped = {r["file_path"]: r["reason"] for r in map(json.loads, open(tmp_path / "skipped.jsonl"))}
    rows = [r for p in tmp_path.glob("*.parquet") for r in pq.read_table(p).to_pylist()]
    kept = {r["file_path"] for r in rows}
    assert len(rows) == len(kept) and len(kept) + len(skipped) == len(cases) + 2 and not kept & set(skipped)
    assert json.loads((tmp_path / "metadata.json").read_text())["files"] == len(cases) + 2
    check([(c.name, verdict(c, skipped.get(f"{c.name}.wav"))) for c in cases])


def test_bad_wavs_are_listed_by_precompute_with_their_reason(wav_folder, tmp_path):
    folder, cases = wav_folder
    args = ("--input_dir", folder, "--output_dir", tmp_path, "--upsampler", "sinc", "--num_workers", 0)
    assert call(precompute_48k, *args, "--max_bad_fraction", 1) == 0
    skipped = {r["path"]: r["reason"] for r in map(json.loads, open(tmp_path / "skipped.jsonl"))}
    rows = {r["path"]: r for r in map(json.loads, open(tmp_path / "manifest.jsonl"))}
    assert len(rows) + len(skipped) == len(cases) + 2 and not rows.keys() & skipped.keys()
    one = [c for c in cases if c.name != "one_sample"]  # there is nothing wrong with one sample here
    check([(c.name, verdict(c, skipped.get(f"{c.name}.wav"))) for c in one])
    for row in rows.values():
        x, rate = sf.read(tmp_path / row["target"], dtype="float32")
        assert rate == 48000 and len(x) == row["samples"] and np.isfinite(x).all()


@pytest.mark.parametrize("rate", [24000, 48000])
def test_bad_wavs_are_refused_where_the_trainer_reads_spans(wav_folder, rate):
    """As target and as original; all of the 28,000 samples are asked for, 20,000 of them must be there."""
    folder, cases = wav_folder
    count, need = (n * rate // 24000 for n in (28000, 20000))
    outcomes = []
    for case in cases:
        if case.name in ("link_out_of_the_root", "link_to_itself"):
            continue  # open_inside refuses them: tests/test_audio.py
        x, reason = np.zeros(count, np.float32), None
        try:
            read_span(x, folder, f"{case.name}.wav", (folder.resolve(),), 0, rate, need)
            assert np.isfinite(x).all(), case.name
        except AudioError as e:
            reason = str(e)
        outcomes.append((case.name, verdict(case, reason)))
    check(outcomes)


# ---- parquet ----


@pytest.fixture(scope="module")
def shard_root(audio_dir, tmp_path_factory):
    """The audio folder and in it a link that leaves it."""
    root = tmp_path_factory.mktemp("root") / "audio"
    shutil.copytree(audio_dir, root)
    (root / "a" / "escape.wav").symlink_to(Path(sf.__file__).resolve())
    return root


def test_bad_shards_are_refused_or_their_rows_counted(cache_dir, targets_dir, shard_root, tmp_path):
    table = pq.read_table(next(cache_dir.glob("*_0.parquet")))
    cases = fuzz.shards(SEED, table, "a/escape.wav")
    assert len(cases) == fuzz.SHARDS
    (tmp_path / "good").mkdir()
    pq.write_table(table, tmp_path / "good" / "codes_batch_gpu0_0.parquet")
    good = CodeIndex(str(tmp_path / "good"))
    outcomes = []
    for i, case in enumerate(cases):
        folder = tmp_path / str(i)
        folder.mkdir()
        case.write(folder / "codes_batch_gpu0_0.parquet")
        reason = None
        try:
            index = CodeIndex(str(folder))
            if case.name.startswith("flip") and not index.bad:  # a bit without meaning: not another code
                assert np.array_equal(index.codes, good.codes), case.name
            bad = sum(index.bad.values())
            assert len(index) + bad == table.num_rows, case.name
            assert len(open(index.folder / "bad_rows.jsonl").readlines()) == bad, case.name
            data = CachedCodesDataset(folder, targets_dir, 0.3, audio_24k_dir=shard_root, max_bad_fraction=1)
            assert len(data) + sum(data.left_out.values()) == table.num_rows, case.name
            batch = to_device(data[list(range(len(data)))], "cpu")
            assert int((batch["valid_24k"] == 0).sum()) == len(batch["bad_file"]), case.name
            assert int(batch["valid_24k"].max()) <= batch["audio_24k"].shape[-1], case.name
            assert all(int(c.max()) < 64 and int(c.min()) >= -1 for c in batch["codes"]), case.name
            reason = "; ".join([*data.left_out, *(why for _, why in batch["bad_file"])]) or None
        except UserError as e:
            reason = str(e)
            assert str(folder) in reason, (case.name, reason)
            assert "\n" not in reason, case.name
        outcomes.append((case.name, verdict(case, reason)))
        assert not list(folder.glob(".index*")), f"{case.name} left half an index"
        for read, path in ((Corpus, folder), (read_shard, folder / "codes_batch_gpu0_0.parquet")):
            try:
                read(str(path))
            except (UserError, NpqError) as e:
                assert str(e), case.name
    check(outcomes)


# ---- checkpoints ----


@pytest.fixture(scope="module")
def good_run(cache_dir, targets_dir, snac_dir, tmp_path_factory):
    """A finished run of four steps with averaged weights."""
    out = tmp_path_factory.mktemp("good")
    argv = tiny_args(cache_dir, targets_dir, snac_dir, out, "--ema", 0.9, "--limit", 4, "--val_limit", 1)
    assert Training(argv).train() == 0
    return out, argv


def test_bad_checkpoints_are_refused_in_one_sentence(good_run, tmp_path):
    out, argv = good_run
    good, marker = out / "checkpoint_epoch3.pt", tmp_path / "owned"
    reference = load_checkpoint(good)
    cases = fuzz.checkpoints(SEED, good, marker)
    assert len(cases) == fuzz.CHECKPOINTS
    t, outcomes = Training([*argv, "--output_dir", str(tmp_path / "resumed")]), []

    def resume(path):
        t.run.args.resume, t.state.phase = str(path), ""
        t.state.load_state_dict(t.run, T.parse_args(["--resume", str(path), *argv])[2])

    def reason_of(function, *args):
        try:
            function(*args)
        except UserError as e:
            assert "\n" not in str(e) and e.code == 1, str(e)
            return str(e)

    for i, case in enumerate(cases):
        folder = tmp_path / f"{i}_{case.name[:50]}"
        folder.mkdir()
        shutil.copy(good, folder / "checkpoint_epoch2.pt")
        path = case.write(folder / "checkpoint_epoch3.pt")
        os.utime(folder / "checkpoint_epoch2.pt", (1, 1))
        refused = reason_of(resume, path)
        if refused is None and case.expect == "either":  # a byte without meaning: then it is the same state
            assert all(torch.equal(v, reference["model"][k]) for k, v in t.state.model.state_dict().items())
        outcomes.append((case.name, verdict(case, refused)))
        found, _ = newest(folder)
        if refused and reason_of(load_checkpoint, path):
            assert found == folder / "checkpoint_epoch2.pt", case.name
        spoken = reason_of(load_dual_head, path)
        if spoken is None and not refused:
            assert case.expect != "bad", case.name
        reason_of(doctor.examine, str(path), argparse.Namespace(probe_data=None), None)
    assert not marker.exists(), "a checkpoint ran code"
    check(outcomes)


def test_the_real_program_refuses_one_of_each(good_run, tmp_path):
    """What the cases above see in one process is what the command line says: one sentence, exit code 1."""
    out, argv = good_run
    marker = tmp_path / "owned"
    case = next(
        c for c in fuzz.checkpoints(SEED, out / "checkpoint_epoch3.pt", marker) if c.name == "runs_shell"
    )
    path = case.write(tmp_path / "bad.pt")
    command = [
        sys.executable,
        T.__file__,
        *argv,
        "--resume",
        str(path),
        "--output_dir",
        str(tmp_path / "run"),
    ]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 1 and "refused" in done.stderr and "Traceback" not in done.stderr
    assert not marker.exists()
