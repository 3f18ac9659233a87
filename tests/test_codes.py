"""Geometry, slicing, the cache and its index."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pyarrow.parquet as pq
import pytest
import soundfile as sf
import torch
from conftest import ROOT, make_snac, one_sentence, run, save_snac, voice

from snac48.audio import (
    AudioError,
    find_audio,
    read_audio,
    read_audio_span,
    resample,
    resolve_inside,
    target_names,
)
from snac48.cache import CodeIndex
from snac48.cli import UserError
from snac48.codec import encode, geometry_of, receptive_reach, slice_at


def rows_of(cache):
    return [r for p in sorted(cache.glob("*.parquet")) for r in pq.read_table(p).to_pylist()]


def test_slicing_reproduces_the_worked_example_of_the_older_notes():
    at = slice_at(5, 1, hop_length=441, vq_strides=(8, 4, 2))
    assert at["scale_start"] == [5, 10, 20]
    assert at["start_sample_24k"] == 17640 and at["start_sample_24k"] / 24000 == 0.735
    assert at["start_sample_48k"] == 35280


def test_segment_lengths_are_exact_in_samples_of_the_real_codec(snac):
    g = geometry_of(snac, "x")
    assert (g.hop_length, g.vq_strides) == (512, (4, 2, 1))
    assert [g.coarse_len(s) for s in (1.0, 2.0, 3.0, 4.0, 0.01)] == [11, 23, 35, 46, 1]
    at = slice_at(3, g.coarse_len(1.0), g.hop_length, g.vq_strides)
    assert (
        at["samples_24k"] == 11 * 2048 and at["samples_48k"] == 22 * 2048 and at["scale_len"] == [11, 22, 44]
    )


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"encoder_rates": [3, 3, 7, 7], "decoder_rates": [7, 7, 3, 3], "vq_strides": [8, 4, 2, 1]},
        {"encoder_rates": [2, 5, 6], "decoder_rates": [6, 5, 2], "vq_strides": [6, 3]},
    ],
    ids=["512/4,2,1", "441/8,4,2,1", "60/6,3"],
)
def test_audio_slice_is_where_the_codes_are(changes):
    """Decoding a slice of the codes gives, away from its edges, the same span of the decoded whole."""
    model = make_snac(3, noise=False, **changes)
    g = geometry_of(model, "x")
    total = 40
    codes = [
        torch.randint(g.codebook_size, (1, total * g.frames_per_coarse(k))) for k in range(len(g.vq_strides))
    ]
    whole = model.decode(codes)[0, 0]
    reach, _ = receptive_reach([*model.decoder.model])
    edge = int(np.ceil(reach / g.vq_strides[0])) * g.coarse_samples
    rng = np.random.default_rng(0)
    for _ in range(4):
        start = int(rng.integers(0, total - 14))
        at = slice_at(start, 14, g.hop_length, g.vq_strides)
        part = [c[:, a : a + n] for c, a, n in zip(codes, at["scale_start"], at["scale_len"])]
        decoded = model.decode(part)[0, 0]
        assert len(decoded) == at["samples_24k"] and edge * 2 < len(decoded)
        span = whole[at["start_sample_24k"] : at["start_sample_24k"] + at["samples_24k"]]
        assert torch.allclose(decoded[edge:-edge], span[edge:-edge], atol=1e-5)
        shifted = whole[at["start_sample_24k"] + 8 :][: at["samples_24k"]]  # and nowhere else
        n = len(shifted)
        assert not torch.allclose(decoded[edge : n - edge], shifted[edge : n - edge], atol=1e-3)


def test_cached_codes_equal_encoding_each_file_alone(cache_dir, audio_dir, snac):
    rows = rows_of(cache_dir)
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


def test_long_files_are_encoded_in_chunks_with_the_same_codes(snac):
    audio = torch.from_numpy(voice(9.0, 24000, 5))[None, None]
    for a, b in zip(snac.encode(audio), encode(snac, audio, max_seconds=2.0)):
        assert torch.equal(a, b)


def test_restart_skips_what_is_done_and_new_files_are_added(audio_dir, snac_dir, tmp_path):
    data = tmp_path / "data"
    shutil.copytree(audio_dir / "a", data)
    args = ("--data_dir", data, "--output_dir", tmp_path / "c", "--pretrained_model", snac_dir,
            "--device", "cpu", "--num_workers", 0)  # fmt: skip
    run("cache_codes.py", *args)
    first = {p.name: p.stat().st_mtime_ns for p in (tmp_path / "c").glob("*.parquet")}
    shutil.copy(audio_dir / "b c" / "utt07.wav", data / "new.wav")
    run("cache_codes.py", *args)
    second = {p.name: p.stat().st_mtime_ns for p in (tmp_path / "c").glob("*.parquet")}
    assert first.items() < second.items() and len(second) == len(first) + 1
    assert json.loads((tmp_path / "c" / "metadata.json").read_text())["rows"] == 8
    done = run("cache_codes.py", *args, "--min_seconds", "2.5", code=1)
    assert "other settings" in one_sentence(done)


def test_processes_share_a_folder_and_a_killed_one_is_replaced(audio_dir, snac_dir, cache_dir, tmp_path):
    args = ("--data_dir", audio_dir, "--output_dir", tmp_path / "c", "--pretrained_model", snac_dir,
            "--device", "cpu", "--rows_per_file", 2, "--num_workers", 0)  # fmt: skip
    command = [sys.executable, ROOT / "cache_codes.py", *args]
    jobs = [subprocess.Popen(list(map(str, command)), stdout=subprocess.DEVNULL) for _ in range(2)]
    deadline = time.time() + 60
    while not list((tmp_path / "c" / "work").glob("*.claim")) and time.time() < deadline:
        time.sleep(0.02)
    jobs[0].send_signal(signal.SIGKILL)
    jobs[0].wait()
    assert jobs[1].wait(timeout=120) == 0
    run("cache_codes.py", *args)  # takes over what the dead one held, if it held anything
    rows = rows_of(tmp_path / "c")
    key = lambda r: r["file_path"]
    assert sorted(rows, key=key) == sorted(rows_of(cache_dir), key=key)


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
    args = ("--data_dir", data, "--output_dir", tmp_path / "c", "--pretrained_model", snac_dir,
            "--device", "cpu", "--num_workers", 0)  # fmt: skip
    done = run("cache_codes.py", *args, code=5)
    assert "5 bad files of 13" in one_sentence(done)
    assert "5 bad files of 13" in one_sentence(
        run("cache_codes.py", *args, code=5)
    )  # not forgotten by a restart
    run("cache_codes.py", *args, "--max_bad_fraction", 0.5)
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
        assert words in one_sentence(run("cache_codes.py", *base, *extra, code=1))
    assert not (tmp_path / "c").exists()


def test_index_reads_back_the_parquet(cache_dir):
    index = CodeIndex(str(cache_dir))
    rows = rows_of(cache_dir)
    assert len(index) == len(rows)
    for i, row in enumerate(rows):
        assert index.path(i) == row["file_path"] and index.lengths[i] == row["audio_length"]
        for k, codes in enumerate(index.slice(i, 0, index.coarse(i))):
            assert codes.tolist() == row[f"codes_scale_{k}"]
        at = slice_at(2, 5, 512, (4, 2, 1))
        for k, codes in enumerate(index.slice(i, 2, 5)):
            a = at["scale_start"][k]
            assert codes.tolist() == row[f"codes_scale_{k}"][a : a + at["scale_len"][k]]


def test_index_refuses_what_is_not_a_cache(cache_dir, snac_dir, tmp_path):
    with pytest.raises(UserError, match="holds no codes_batch"):
        CodeIndex(str(tmp_path))
    with pytest.raises(UserError, match="does not exist"):
        CodeIndex(str(tmp_path / "nowhere"))
    shard = next(cache_dir.glob("*_0.parquet"))
    bad = tmp_path / "corrupt"
    bad.mkdir()
    (bad / shard.name).write_bytes(shard.read_bytes()[:-500])
    with pytest.raises(UserError, match="corrupt"):
        CodeIndex(str(bad))
    mixed = tmp_path / "mixed"
    mixed.mkdir()
    table = pq.read_table(shard)
    pq.write_table(table, mixed / "codes_batch_gpu0_0.parquet")
    meta = json.loads(table.schema.metadata[b"snac"]) | {"weights_sha256": "other"}
    pq.write_table(
        table.replace_schema_metadata({"snac": json.dumps(meta)}), mixed / "codes_batch_gpu0_1.parquet"
    )
    with pytest.raises(UserError, match="mixes models"):
        CodeIndex(str(mixed))


def test_malformed_rows_are_quarantined_by_reason(cache_dir, tmp_path):
    import pyarrow as pa

    shard = next(cache_dir.glob("*_0.parquet"))
    table = pq.read_table(shard)
    rows = table.to_pylist()
    rows[0]["codes_scale_0"][0] = 64  # = codebook size
    rows[1]["file_path"] = "../../etc/passwd.wav"
    rows[2]["codes_scale_2"] = rows[2]["codes_scale_2"][:-1]
    rows[3]["audio_length"] = 10**9
    pq.write_table(pa.Table.from_pylist(rows, table.schema), tmp_path / shard.name)
    index = CodeIndex(str(tmp_path))
    assert len(index) == 1 and index.path(0) == rows[4]["file_path"]
    assert sum(index.bad.values()) == 4 and len(index.bad) == 4
    assert len(open(index.folder / "bad_rows.jsonl").readlines()) == 4


@pytest.mark.parametrize("rate", [8000, 22050, 24000, 44100, 48000, 96000])
@pytest.mark.parametrize("new_rate", [24000, 48000])
def test_a_span_is_the_span_of_the_resampled_whole(rate, new_rate, tmp_path):
    x = voice(1.5, rate, 2)
    sf.write(tmp_path / "x.wav", x, rate, subtype="PCM_16")
    whole, _ = read_audio(tmp_path / "x.wav")
    whole = resample(whole, rate, new_rate)
    for start, count in ((0, 4000), (5001, 7000), (len(whole) - 3000, 6000), (len(whole) + 10, 50)):
        span = read_audio_span(tmp_path / "x.wav", start, count, new_rate)
        expected = np.zeros(count, np.float32)
        part = whole[start : start + count]
        expected[: len(part)] = part
        assert np.abs(span - expected).max() < 2e-4, (start, count)


def test_paths_that_leave_the_root_are_refused(tmp_path):
    (tmp_path / "root").mkdir()
    (tmp_path / "out.wav").write_bytes(b"")
    (tmp_path / "root" / "link.wav").symlink_to(tmp_path / "out.wav")
    for rel in ("../out.wav", "/etc/passwd", "a/../../out.wav", "x\0.wav", "", "link.wav"):
        with pytest.raises(AudioError):
            resolve_inside(tmp_path / "root", rel)


def test_target_names_never_collide():
    names = target_names(["a/b.mp3", "a/b.ogg", "a/b.wav", "a/c.flac"])
    assert names == {
        "a/b.wav": "a/b.wav",
        "a/b.mp3": "a/b.mp3.wav",
        "a/b.ogg": "a/b.ogg.wav",
        "a/c.flac": "a/c.wav",
    }


def test_another_model_has_another_hash(tmp_path):
    assert geometry_of(make_snac(1), "").weights_sha256 != geometry_of(make_snac(2), "").weights_sha256
    save_snac(make_snac(1), tmp_path)


def test_a_signal_to_the_whole_group_stops_and_the_same_command_goes_on(audio_dir, snac_dir, tmp_path):
    args = ("--data_dir", audio_dir, "--output_dir", tmp_path / "c", "--pretrained_model", snac_dir,
            "--device", "cpu", "--rows_per_file", 1, "--num_workers", 1)  # fmt: skip
    command = list(map(str, [sys.executable, ROOT / "cache_codes.py", *args]))
    job = subprocess.Popen(command, start_new_session=True, stdout=subprocess.DEVNULL)
    deadline = time.time() + 120
    while not list((tmp_path / "c").glob("*.parquet")) and time.time() < deadline:
        time.sleep(0.01)
    os.killpg(job.pid, signal.SIGTERM)
    assert job.wait(timeout=30) in (0, 3)  # 0: it was done before the signal came
    run("cache_codes.py", *args)
    assert len(rows_of(tmp_path / "c")) == 14
