"""cache_codes.py: the codes of every file, any number of processes, whatever the files are like."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pyarrow.parquet as pq
import soundfile as sf
import torch
from conftest import ROOT, call, children_cpu, one_sentence, parquet_rows, refused, run, voice

import cache_codes
from snac48.audio import find_audio, read_audio, resample
from snac48.cache import CodeIndex
from snac48.codec import geometry_of


def flags(data, out, model, workers=0) -> tuple:
    folders = ("--data_dir", data, "--output_dir", out, "--pretrained_model", model)
    return (*folders, "--device", "cpu", "--num_workers", workers)


def test_cached_codes_equal_encoding_each_file_alone(cache_dir, audio_dir, snac):
    rows = parquet_rows(cache_dir)
    assert [r["file_path"] for r in rows] == find_audio(audio_dir)  # every file, sorted, relative
    for row in rows:
        x, rate = read_audio(audio_dir / row["file_path"])
        audio = torch.from_numpy(resample(x, rate, 24000))[None, None]
        assert row["audio_length"] == audio.shape[-1]
        for k, codes in enumerate(snac.encode(audio)):
            assert row[f"codes_scale_{k}"] == codes[0].tolist(), row["file_path"]


def test_cache_says_which_model_made_it_and_counts(cache_dir, snac):
    meta = json.loads(pq.read_schema(next(cache_dir.glob("*.parquet"))).metadata[b"snac"])
    assert (meta["hop_length"], meta["vq_strides"], meta["sampling_rate"]) == (512, [4, 2, 1], 24000)
    assert meta["weights_sha256"] == geometry_of(snac, "").weights_sha256
    counts = json.loads((cache_dir / "metadata.json").read_text())
    assert counts["rows"] == 14 and counts["rows"] + counts["skipped"] == counts["files"]
    assert sorted(p.name for p in cache_dir.glob("*.parquet")) == [
        f"codes_batch_gpu0_{i}.parquet" for i in range(3)
    ]


def test_clips_encoded_together_have_the_codes_of_each_alone(snac):
    clips = [(f"{i}.wav", voice(1.0, 24000, i)[: 24000 - 100 * i]) for i in range(3)]
    together = cache_codes.begin_batch(snac, 24576, clips)()
    for rel, samples in clips:
        n, codes = together[rel]
        wanted = snac.encode(torch.from_numpy(samples)[None, None])
        assert n == len(samples) and all(c.dtype == np.int16 for c in codes)
        assert [c.tolist() for c in codes] == [c[0].tolist() for c in wanted]


def test_a_batch_is_fetched_after_the_next_one_has_begun():
    """So that a GPU has work while codes are taken apart; files are still asked for one batch at a time."""
    done = []

    def items():
        for i in range(3):
            done.append(f"read {i}")
            yield i, 10 * i

    def begin(i, ten):
        done.append(f"begin {i}")
        return lambda: done.append(f"fetch {i}") or ten + 1

    found = []
    for item, result in cache_codes.one_late(items(), begin):
        done.append(f"use {item[0]}")
        found.append((item, result))
    assert found == [((0, 0), 1), ((1, 10), 11), ((2, 20), 21)]
    words = (
        "read 0, begin 0, read 1, begin 1, fetch 0, use 0, read 2, begin 2, fetch 1, use 1, fetch 2, use 2"
    )
    assert ", ".join(done) == words and not list(cache_codes.one_late([], begin))


def test_cache_says_how_it_was_encoded(cache_dir, tmp_path):
    shards = sorted(cache_dir.glob("*.parquet"))
    how = json.loads(pq.read_schema(shards[0]).metadata[b"encoding"])
    assert how == {"dtype": "float32", "tf32": False, "torch": torch.__version__, "device": "cpu"}
    for shard in shards:  # an older cache does not say it, and opens as before
        table = pq.read_table(shard)
        meta = {k: v for k, v in table.schema.metadata.items() if k != b"encoding"}
        pq.write_table(table.replace_schema_metadata(meta), tmp_path / shard.name)
    assert len(CodeIndex(str(tmp_path))) == len(CodeIndex(str(cache_dir))) == 14


def test_restart_skips_what_is_done_and_new_files_are_added(audio_dir, snac_dir, tmp_path):
    data = tmp_path / "data"
    shutil.copytree(audio_dir / "a", data)
    args = flags(data, tmp_path / "c", snac_dir)
    assert call(cache_codes, *args) == 0
    first = {p.name: p.stat().st_mtime_ns for p in (tmp_path / "c").glob("*.parquet")}
    shutil.copy(audio_dir / "b c" / "utt07.wav", data / "new.wav")
    assert call(cache_codes, *args) == 0
    second = {p.name: p.stat().st_mtime_ns for p in (tmp_path / "c").glob("*.parquet")}
    assert first.items() < second.items() and len(second) == len(first) + 1
    assert json.loads((tmp_path / "c" / "metadata.json").read_text())["rows"] == 8
    assert "other settings" in refused(cache_codes, *args, "--min_seconds", "2.5")


def test_processes_share_a_folder_and_a_killed_one_is_replaced(audio_dir, snac_dir, cache_dir, tmp_path):
    args = (*flags(audio_dir, tmp_path / "c", snac_dir), "--rows_per_file", 2)
    command = [sys.executable, ROOT / "cache_codes.py", *args]
    jobs = [subprocess.Popen(list(map(str, command)), stdout=subprocess.DEVNULL) for _ in range(2)]
    deadline = time.time() + 60
    while not list((tmp_path / "c" / "work").glob("*.claim")) and time.time() < deadline:
        time.sleep(0.02)
    jobs[0].send_signal(signal.SIGKILL)
    jobs[0].wait()
    assert jobs[1].wait(timeout=120) == 0
    run("cache_codes.py", *args)  # takes over what the dead one held, if it held anything
    rows = parquet_rows(tmp_path / "c")
    key = lambda r: r["file_path"]
    assert sorted(rows, key=key) == sorted(parquet_rows(cache_dir), key=key)


def test_bad_files_are_skipped_by_name_and_reason(audio_dir, snac_dir, tmp_path):
    data = tmp_path / "data"
    shutil.copytree(audio_dir / "a", data)
    sf.write(data / "short.wav", voice(0.3, 24000, 1), 24000)
    (data / "text.wav").write_text("this is not audio")
    whole = (data / "utt00.wav").read_bytes()
    (data / "cut.wav").write_bytes(whole[: len(whole) // 2])
    (data / "empty.wav").write_bytes(b"")
    sf.write(data / "nan.wav", np.full(30000, np.nan, np.float32), 24000, subtype="FLOAT")
    sf.write(data / "zero.wav", np.zeros(0, np.float32), 24000)
    args = flags(data, tmp_path / "c", snac_dir)
    done = run("cache_codes.py", *args, code=5)
    assert "5 bad files of 13" in one_sentence(done)
    assert "5 bad files of 13" in refused(cache_codes, *args)  # not forgotten by a restart
    assert call(cache_codes, *args, "--max_bad_fraction", 0.5) == 0
    skipped = {r["file_path"]: r["reason"] for r in map(json.loads, open(tmp_path / "c" / "skipped.jsonl"))}
    assert set(skipped) == {"short.wav", "text.wav", "cut.wav", "empty.wav", "nan.wav", "zero.wav"}
    assert "min_seconds" in skipped["short.wav"] and "truncated" in skipped["cut.wav"]
    assert "NaN" in skipped["nan.wav"] and "0 samples" in skipped["zero.wav"]
    assert json.loads((tmp_path / "c" / "metadata.json").read_text())["files"] == 13


def test_mistakes_get_one_sentence_and_leave_nothing(audio_dir, snac_dir, tmp_path):
    base = ["--pretrained_model", snac_dir, "--device", "cpu", "--output_dir", tmp_path / "c"]
    (tmp_path / "void").mkdir()
    for extra, words in [
        (["--data_dir", tmp_path / "nowhere"], "does not exist"),
        (["--data_dir", tmp_path / "void"], "no audio file"),
        (["--data_dir", audio_dir, "--device", "7"], "GPU 7 isn't there"),
        (["--data_dir", audio_dir, "--pretrained_model", tmp_path / "void"], "lacks config.json"),
    ]:
        assert words in refused(cache_codes, *base, *extra)
    assert words in one_sentence(run("cache_codes.py", *base, *extra, code=1))
    assert not (tmp_path / "c").exists()


def test_a_signal_to_the_whole_group_stops_and_the_same_command_goes_on(audio_dir, snac_dir, tmp_path):
    args = (*flags(audio_dir, tmp_path / "c", snac_dir, 1), "--rows_per_file", 1)
    command = list(map(str, [sys.executable, ROOT / "cache_codes.py", *args]))
    job = subprocess.Popen(command, start_new_session=True, stdout=subprocess.DEVNULL)
    deadline = time.time() + 120
    while not list((tmp_path / "c").glob("*.parquet")) and time.time() < deadline:
        time.sleep(0.01)
    os.killpg(job.pid, signal.SIGTERM)
    assert job.wait(timeout=30) in (0, 3)  # 0: it was done before the signal came
    run("cache_codes.py", *args)
    assert len(parquet_rows(tmp_path / "c")) == 14


def test_help_and_mistakes_in_flags_come_before_torch(tmp_path):
    start = children_cpu()
    assert "--rows_per_file" in run("cache_codes.py", "--help").stdout
    for flags, words in [
        (["--data_dirs", "x"], "--data_dir"),
        (["--data_dir", "x", "--output_dir", tmp_path, "--batch_size", 0], "--batch_size must be from 1"),
        (["--data_dir", "x", "--output_dir", tmp_path, "--num_workers", -1], "--num_workers must be from 0"),
    ]:
        assert words in one_sentence(run("cache_codes.py", *flags, code=2))
    assert children_cpu() - start < 1.5  # torch alone takes more than one second


def test_both_splits_without_a_flag(audio_dir, snac_dir, tmp_path, monkeypatch, capsys):
    for split, part in (("train", "a"), ("valid", "b c")):
        shutil.copytree(audio_dir / part, tmp_path / "corpus" / split / "audio")
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("DATA_ROOT", raising=False)
    args = ("--pretrained_model", snac_dir, "--num_workers", 0, "--segment_length", "4.0")
    assert call(cache_codes, *args) == 0
    out = capsys.readouterr().out
    device = "cuda:0" if torch.cuda.is_available() else "cpu"
    assert out.startswith(f"cache: {device}; corpus/train/audio -> codes/train: 7 files in 7 units, 7 to do")
    assert "their codes serve every length" in out
    assert "batches of up to 1 clips, 0 decoding processes, IEEE fp32" in out or device != "cpu"
    assert [len(parquet_rows(tmp_path / "codes" / split)) for split in ("train", "val")] == [7, 7]
    monkeypatch.chdir("/")
    assert call(cache_codes, *args, "--data_root", tmp_path) == 0  # nothing left to do
    told = refused(cache_codes, "--data_dir", tmp_path / "corpus")
    assert told.startswith("--data_dir and --output_dir go together: give both, or neither")
    assert "corpus/train/audio is missing" in refused(cache_codes, "--data_root", tmp_path / "codes")


def test_two_processes_share_360_files(snac_dir, tmp_path):
    """About evenly, with lines from the first seconds on; each waits for the other and ends with code 0."""
    for i in range(360):
        path = tmp_path / "in" / f"s{i % 8}" / f"{i:03d}.wav"
        path.parent.mkdir(parents=True, exist_ok=True)
        sf.write(path, voice(1.0, 44100, i), 44100)
    command = [sys.executable, ROOT / "cache_codes.py", *flags(tmp_path / "in", tmp_path / "c", snac_dir)]
    jobs = [subprocess.Popen(list(map(str, command)), stdout=subprocess.PIPE, text=True) for _ in range(2)]
    told = [job.communicate(timeout=120)[0] for job in jobs]
    assert [job.returncode for job in jobs] == [0, 0]
    assert all("cache 360/360 files" in text or "done: 360 rows" in text for text in told)
    owners = [json.loads(p.read_text())["pid"] for p in (tmp_path / "c" / "work").glob("*.claim")]
    assert len(owners) == 72 and min(map(owners.count, {job.pid for job in jobs})) >= 18, owners
    assert len(parquet_rows(tmp_path / "c")) == 360
