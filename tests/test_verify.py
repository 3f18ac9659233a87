"""Proving data: targets beside recordings, rows of a training, everything; files that are what they were."""

import json
import os
import shutil

import numpy as np
import pytest
import soundfile as sf
from conftest import call, refused, voice
from helpers.chaos_data import CHANGES, exchange, rewrite
from helpers.training import metrics, training

import cache_codes
import precompute_48k
from snac48 import cache, codec, verify
from snac48.cache import CodeIndex
from snac48.cli import UserError
from snac48.data import CachedCodesDataset
from snac48.proof import CHANGED, MISSING, SAME, read_proof, stamp_of, state_of, write_proof
from snac48.verify import target_fault


def all_pass(x, rate):
    """The same envelope, another phase: what a restorer's target is beside its recording."""
    if not x.any():
        return x
    n, rng = rate // 400, np.random.default_rng(3)
    h = np.fft.irfft(np.exp(1j * rng.uniform(-np.pi, np.pi, n // 2 + 1)), n)
    y = np.convolve(x, np.roll(h, n // 2))[n // 2 :][: len(x)]
    return (y * np.linalg.norm(x) / np.linalg.norm(y)).astype(np.float32)


@pytest.mark.parametrize("rate", [8000, 16000])
@pytest.mark.parametrize("true", [True, False])
def test_a_target_is_the_recording_s_or_it_is_said_what_is_wrong(rate, true):
    x, change = voice(2.0, rate, 4), (lambda x, rate: x) if true else all_pass
    assert target_fault(x, change(x, rate), rate, true) is None
    assert target_fault(x, np.rint(32768 * change(x, rate)) / np.float32(32768), rate, true) is None
    said = {
        name: target_fault(x, change(f(x, rate), rate)[: len(x)], rate, true) for name, f in CHANGES.items()
    }
    for name in ("other audio of the same length", "shifted by 300 ms", "noise", "backwards"):
        assert "is not the recording's (correlation" in said[name]
    assert said["silenced"] == "it is silent" and "ms too early" in said["shifted by 5 ms"]
    assert "30.0 ms too late" in said["shifted by 30 ms"] or not true
    assert "its level is -" in said["half as loud"] and "its level is +" in said["twice as loud"]
    assert (
        "speaks where" in target_fault(0 * x, x, rate, true)
        and target_fault(0 * x, 0 * x, rate, true) is None
    )
    late = np.roll(x, rate // 20)  # as its manifest says
    assert target_fault(x, late, rate, False, corr=0.5, lag=2400.0) is None


def test_a_file_is_what_its_stamp_says(tmp_path):
    path, allowed = tmp_path / "a.wav", (tmp_path,)
    path.write_bytes(b"abcd")
    os.utime(path, ns=(0, 5_000_000_123))
    stamp = stamp_of(path)
    state = lambda **more: state_of(tmp_path, "a.wav", allowed, stamp, **more)
    assert state() == state(content=True) == SAME
    os.utime(path, ns=(0, 5_000_000_000))  # as tar keeps it
    assert state() == SAME
    path.write_bytes(b"abcd")  # copied: the content decides
    assert state() == SAME
    path.write_bytes(b"abce")
    assert state() == CHANGED
    os.utime(path, ns=(0, 5_000_000_123))
    assert state() == SAME and state(content=True) == CHANGED
    path.write_bytes(b"abc")
    assert state() == CHANGED
    path.unlink()
    assert state() == MISSING


def test_a_proof_sees_every_byte_of_its_files(tmp_path, monkeypatch):
    monkeypatch.setattr("snac48.proof.PIECE", 1000)
    content = np.random.default_rng(0).bytes(2500)
    (tmp_path / "a").write_bytes(content)
    (tmp_path / "b").write_bytes(b"")
    write_proof(tmp_path / "p.json", {"more": [1, {"x": 0.5}]}, ["a", "b"])
    proof = lambda **more: read_proof(tmp_path / "p.json", **more)
    assert proof() == {"more": [1, {"x": 0.5}]}
    for at in (0, 999, 1000, 2499):
        (tmp_path / "a").write_bytes(content[:at] + bytes([content[at] ^ 1]) + content[at + 1 :])
        assert proof() is None and proof(at_most=2499) is not None
    for wrong in (content[:-1], content + b"x", content[1000:2000] + content[:1000] + content[2000:]):
        (tmp_path / "a").write_bytes(wrong)
        assert proof() is None


# ---- a training ----


def looked(data, snac, rows=None) -> verify.Looked:
    rows = data.rows if rows is None else rows
    return verify.prove(data, rows, snac, codec.align_samples(snac), codec.encode_context(snac), "cpu", 1)


def test_a_training_says_that_its_data_is_proven_or_ends_by_name(
    cache_dir, targets_dir, audio_dir, snac_dir, tmp_path
):
    t = training(cache_dir, targets_dir, snac_dir, tmp_path / "a", "--verify_rows", 5)
    assert t.run.told[0].startswith("training: 5 rows proven, 100.00 % of ")
    assert ", 5 targets (" in t.run.told[0] and t.run.told[1].startswith("validation: 4 rows proven")
    t = training(cache_dir, targets_dir, snac_dir, tmp_path / "b", "--verify_rows", 0)
    assert t.run.told[0] == "--verify_rows 0: nobody has looked at the training rows"
    folder = shutil.copytree(targets_dir, tmp_path / "targets")
    name, times = folder / "a" / "utt03.wav", os.stat(targets_dir / "a" / "utt03.wav")
    rewrite(name, CHANGES["shifted by 300 ms"])
    os.utime(name, ns=(0, times.st_mtime_ns))  # size and time as recorded: the look finds it
    with pytest.raises(UserError, match=r"1 of 14 rows looked at .*utt03\.mp3 \(target: it has") as e:
        training(cache_dir, folder, snac_dir, tmp_path / "c")
    assert e.value.code == 5 and "run precompute_48k.py again" in str(e.value)
    assert not (tmp_path / "c").exists()


def test_rows_drawn_and_rows_looked_at(cache_dir, targets_dir, snac, tmp_path):
    """2 % of wrong targets end about 73 % of trainings that look at 64 rows, clean data ends none: the look
    itself finds each wrong row and no other one, the draw has one among its rows as chance says."""
    folder = shutil.copytree(targets_dir, tmp_path / "targets")
    rows = [json.loads(line) for line in open(folder / "manifest.jsonl")]
    for row in rows:
        del row["target_stamp"], row["source_stamp"]  # of an older program: nothing but the sound tells
    (folder / "manifest.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert not looked(CachedCodesDataset(cache_dir, folder, 0.5), snac).wrong
    for i, change in enumerate(
        ["other audio of the same length", "shifted by 30 ms", "silenced", "half as loud"]
    ):
        rewrite(folder / rows[3 * i]["target"], CHANGES[change])
    found = looked(CachedCodesDataset(cache_dir, folder, 0.5), snac)
    assert [path for path, *_ in found.wrong] == [rows[3 * i]["path"] for i in range(4)]
    wrong, many = np.arange(10_000) % 50 == 7, range(1000)
    drawn = [verify.draw(np.arange(10_000), 64, seed, 0) for seed in many]
    assert all(len(set(rows.tolist())) == 64 for rows in drawn)
    assert 690 <= sum(wrong[rows].any() for rows in drawn) <= 760  # 1 - 0.98^64 = 0.726
    assert not np.array_equal(drawn[3], verify.draw(np.arange(10_000), 64, 3, 500))  # others after a resume


def test_a_recording_that_changed_is_no_row(speech_48k, snac_dir, tmp_path):
    """By size and time in the table of headers; read later, it is one bad file."""
    folder, codes = shutil.copytree(speech_48k, tmp_path / "speech"), tmp_path / "codes"
    call(cache_codes, "--data_dir", folder, "--output_dir", codes, "--pretrained_model", snac_dir,
         "--device", "cpu", "--num_workers", 0, "--min_seconds", 0.1)  # fmt: skip
    data = CachedCodesDataset(codes, "", 0.3)
    assert len(data) == 12 and not data.left_out
    rewrite(folder / "utt03.wav", CHANGES["backwards"])
    assert data[[3, 4]]["bad_file"] == [("utt03.wav", "it has changed since it was indexed")]
    shutil.rmtree(data.index.folder)
    words = r"1 of 12 rows have a recording that is gone or has changed .*utt03\.wav"
    with pytest.raises(UserError, match=words):
        CachedCodesDataset(codes, "", 0.3)
    data = CachedCodesDataset(codes, "", 0.3, max_bad_fraction=0.1)
    assert len(data) == 11 and 3 not in data.rows


def test_codes_of_a_large_index_are_proven_when_they_are_read(codes_48k, speech_48k, tmp_path, monkeypatch):
    codes = tmp_path / "codes"
    shutil.copytree(codes_48k, codes, ignore=shutil.ignore_patterns("index-*"))
    data = CachedCodesDataset(codes, speech_48k, 0.3, target_kind="recordings")
    monkeypatch.setattr(cache, "AT_OPENING", 100)
    content = bytearray((data.index.folder / "codes.i16").read_bytes())
    at = 14 * int(data.index.offsets[5]) + 3
    content[at] ^= 1
    (data.index.folder / "codes.i16").write_bytes(content)
    again = CachedCodesDataset(codes, speech_48k, 0.3, target_kind="recordings")
    batch = again[[4, 5, 6]]
    assert not again.told and (batch["valid_24k"] > 0).tolist() == [True, False, True]
    assert "delete that folder" in batch["bad_file"][0][1]
    monkeypatch.undo()
    whole = CachedCodesDataset(codes, speech_48k, 0.3, target_kind="recordings")
    assert "it is built again" in whole.told[0] and not whole[[4, 5, 6]]["bad_file"]


# ---- everything ----


def test_verify_finds_one_swapped_target_in_200_by_name_and_goes_on_where_it_was(
    tmp_path, capsys, monkeypatch
):
    source, out = tmp_path / "in", tmp_path / "out"
    source.mkdir()
    for i in range(200):
        sf.write(source / f"{i:03d}.wav", voice(0.3, 48000, i), 48000)
    flags = ("--input_dir", source, "--output_dir", out, "--num_workers", 0)
    assert "run the same command without --verify first" in refused(precompute_48k, *flags, "--verify")
    assert call(precompute_48k, *flags) == 0
    rows = [json.loads(line) for line in open(out / "manifest.jsonl")]
    old = [{k: v for k, v in row.items() if not k.endswith("_stamp")} for row in rows]
    (out / "manifest.jsonl").write_text("".join(json.dumps(row) + "\n" for row in old))
    shutil.copy(out / "078.wav", out / "077.wav")
    capsys.readouterr()
    real, calls = precompute_48k.line_of, []

    def counted(row, *folders):
        calls.append(row["path"])
        if len(calls) == 150:
            os.kill(os.getpid(), 15)
        return real(row, *folders)

    monkeypatch.setattr(precompute_48k, "line_of", counted)
    assert call(precompute_48k, *flags, "--verify") == 3
    assert call(precompute_48k, *flags, "--verify") == 0  # 1 of 200 is no more than 1 %
    said = capsys.readouterr().out
    assert "wrong: 077.wav (target: its waveform below 8 kHz is not the recording's" in said
    assert "verified 200 rows: 1 are wrong" in said and len(calls) < 290
    assert json.loads((out / "wrong_rows.jsonl").read_text())["path"] == "077.wav"
    assert call(precompute_48k, *flags, "--verify", "--max_bad_fraction", 0) == 5
    assert call(precompute_48k, *flags) == 0 and call(precompute_48k, *flags, "--verify") == 0
    assert "verified 200 rows: 0 are wrong" in capsys.readouterr().out


def test_recordings_and_results_that_changed_are_made_again_and_counted(
    audio_dir, snac_dir, tmp_path, capsys
):
    source, out = tmp_path / "in", tmp_path / "c"
    shutil.copytree(audio_dir / "a", source)
    flags = ("--data_dir", source, "--output_dir", out, "--pretrained_model", snac_dir, "--device", "cpu",
             "--num_workers", 0)  # fmt: skip
    assert call(cache_codes, *flags) == 0
    before = {i.path(r): i.slice(r, 0, 5) for i in [CodeIndex(out)] for r in range(7)}
    rewrite(source / "utt00.wav", CHANGES["backwards"])
    shards = sorted(out.glob("*.parquet"))
    shards[3].unlink()
    capsys.readouterr()
    assert call(cache_codes, *flags) == 0
    said = capsys.readouterr().out
    assert "1 recordings have changed, first utt00.wav; 1 files of ours are gone or not as written" in said
    assert "7 files in 7 units, 2 to do" in said and "done: 7 rows" in said
    index = CodeIndex(out)
    after = {index.path(r): index.slice(r, 0, 5) for r in range(7)}
    same = {name: all(map(np.array_equal, before[name], after[name])) for name in before}
    assert [name for name, equal in same.items() if not equal] == ["utt00.wav"]
    (source / "utt01.flac").unlink()
    assert call(cache_codes, *flags) == 0
    assert (
        "1 recordings are gone since, first utt01.flac: what was made of them stays"
        in capsys.readouterr().out
    )


def test_a_recording_that_comes_later_takes_no_other_one_s_target(tmp_path):
    source, out = tmp_path / "in", tmp_path / "out"
    source.mkdir()
    flags = ("--input_dir", source, "--output_dir", out, "--num_workers", 0)
    sf.write(source / "a.mp3", voice(1.0, 48000, 1), 48000)
    assert call(precompute_48k, *flags) == 0
    first = (out / "a.wav").read_bytes()
    sf.write(source / "a.wav", voice(1.0, 48000, 2), 48000)
    assert call(precompute_48k, *flags) == 0
    rows = {row["path"]: row["target"] for row in map(json.loads, open(out / "manifest.jsonl"))}
    assert rows == {"a.mp3": "a.wav", "a.wav": "a.wav.wav"} and (out / "a.wav").read_bytes() == first
    exchange(out, "a.wav", "a.wav.wav")
    assert call(precompute_48k, *flags) == 0 and (out / "a.wav").read_bytes() == first
    assert metrics(out, "end")[-1]["files"] == 2
