"""infer.py on a trained tiny checkpoint: files, chunks, streams and exports."""

import re

import numpy as np
import pytest
import soundfile as sf
import torch
from conftest import call, make_snac, one_sentence, refused, run, save_snac, voice

import infer
from snac48.checkpoint import load_checkpoint, save_checkpoint
from snac48.cli import UserError
from snac48.codec import geometry_of, model_config
from snac48.decoder import DualHead, DualHeadDecoder, load_dual_head


@pytest.fixture(scope="module")
def tts(checkpoint):
    return load_dual_head(checkpoint)


def codes_of(n, seed=0):
    g = torch.Generator().manual_seed(seed)
    return [torch.randint(64, (1, n * f), generator=g) for f in (1, 2, 4)]


@pytest.mark.parametrize("chunk_seconds", [0.1, 0.35, 1.0, 2.9])
def test_chunks_have_the_samples_of_one_pass(tts, chunk_seconds):
    codes = codes_of(40)
    whole = tts.decode(codes, chunk_seconds=99)
    parts = tts.decode(codes, chunk_seconds=chunk_seconds)
    for a, b in zip(whole, parts):
        assert a.shape == b.shape and (a - b).abs().max() < 2e-6
    assert whole[1].shape[-1] == 2 * whole[0].shape[-1] == 80 * 2048


def test_export_opens_as_the_same_model(checkpoint, tts, tmp_path):
    run("infer.py", "--checkpoint", checkpoint, "--export", tmp_path / "out", "--device", "cpu", umask=0o027)
    assert {p.stat().st_mode & 0o777 for p in (tmp_path / "out").iterdir()} == {0o640}  # others can serve it
    again = load_dual_head(tmp_path / "out")
    for a, b in zip(tts.decode(codes_of(8)), again.decode(codes_of(8))):
        assert torch.equal(a, b)


def test_wav_folder_and_cache_give_the_same_48k_files(checkpoint, audio_dir, cache_dir, tmp_path):
    base = ("--checkpoint", checkpoint, "--device", "cpu")
    done = run("infer.py", *base, "--input", audio_dir, "--output", tmp_path / "a")
    first, *_, last = done.stderr.splitlines()
    assert first == f"{checkpoint} on cpu" and re.search(r" s of audio in [\d.]+ s \(rtf [\d.]+\)", last)
    said, listen = done.stdout.splitlines()[-2:]
    assert listen == f"listen: aplay '{tmp_path}/a/b c/utt13.wav', or any player" and "utt13" in said
    call(infer, *base, "--input", cache_dir, "--output", tmp_path / "b")
    one = ("--input", audio_dir / "a" / "utt00.wav", "--output", tmp_path / "one.wav")
    call(infer, *base, *one, "--sample_rate", "both", "--chunk_seconds", 0.3)
    found = sorted(p.relative_to(tmp_path / "a").as_posix() for p in (tmp_path / "a").rglob("*.wav"))
    assert len(found) == 14 and "b c/utt07.wav" in found
    for rel in found:
        x, rate = sf.read(tmp_path / "a" / rel, dtype="int16")
        y, _ = sf.read(tmp_path / "b" / rel, dtype="int16")
        n = min(len(x), len(y))
        assert rate == 48000 and abs(len(x) - len(y)) <= 1 and np.abs(x[:n].astype(int) - y[:n]).max() <= 1
    x, _ = sf.read(tmp_path / "one_48k.wav", dtype="int16")
    y, _ = sf.read(tmp_path / "a" / "a" / "utt00.wav", dtype="int16")
    assert len(x) == 48000 and np.abs(x.astype(int) - y).max() <= 1
    assert len(sf.read(tmp_path / "one_24k.wav")[0]) == 24000
    talk = ("--input", audio_dir / "a" / "utt00.wav", "--output", "-", "--stream")
    raw = run("infer.py", *base, *talk, text_ok=False)
    assert np.abs(np.frombuffer(raw.stdout, "<i2").astype(int) - y).max() <= 2


def test_one_shard_and_names_that_are_taken(checkpoint, audio_dir, cache_dir, tmp_path):
    """A single .parquet gives the wavs of its rows; a/b.mp3 and a/b.ogg do not overwrite each other."""
    shard = cache_dir / "codes_batch_gpu0_2.parquet"
    args = ("--checkpoint", checkpoint, "--device", "cpu", "--sample_rate", 24000)
    call(infer, *args, "--input", shard, "--output", tmp_path / "s")
    assert sorted(p.name for p in tmp_path.rglob("*.wav")) == [f"utt{i}.wav" for i in range(10, 14)]
    taken = {}
    names = [infer.wav_name(rel, "o", taken) for rel in ("a/b.mp3", "a/b.ogg", "c.wav", "a/b.mp3")]
    assert names == ["o/a/b.wav", "o/a/b.ogg.wav", "o/c.wav", "o/a/b.wav"]


def test_mistakes_get_one_sentence_and_write_nothing(checkpoint, snac_dir, tmp_path):
    (tmp_path / "text.wav").write_text("no audio")
    sf.write(tmp_path / "ok.wav", voice(1, 24000, 0), 24000)
    other = save_snac(make_snac(5), tmp_path / "other")
    state = load_checkpoint(checkpoint)
    del state["model_config"]
    save_checkpoint(tmp_path / "foreign.pt", state)
    out = tmp_path / "out.wav"
    for ckpt, extra, words in [
        (tmp_path / "none.pt", [], "does not exist"),
        (tmp_path / "foreign.pt", [], "not a checkpoint of train_dual_head.py"),
        ("someone/model", [], "id@COMMIT"),
        (snac_dir, [], "is no dual-head decoder"),
        (checkpoint, ["--input", tmp_path / "none.wav"], "does not exist"),
        (checkpoint, ["--input", tmp_path / "text.wav"], "text.wav"),
        (checkpoint, ["--pretrained_model", other], "is not the one this decoder was trained with"),
        (checkpoint, ["--device", 3], "GPU 3 isn't there"),
    ]:
        args = (
            "--input",
            tmp_path / "ok.wav",
            "--output",
            out,
            "--device",
            "cpu",
            "--checkpoint",
            ckpt,
            *extra,
        )
        assert words in refused(infer, *args)
    assert words in one_sentence(run("infer.py", *args, code=1))
    assert not out.exists()
    with pytest.raises(UserError, match="no codes"):
        list(load_dual_head(checkpoint).stream([]))


def test_an_untrained_dual_head_scores_like_base_snac(snac_dir):
    """At initialisation our 24 kHz output is base SNAC's, so a difference in the table is a difference
    learnt."""
    made = []
    for snac in (make_snac(), make_snac()):
        tts = DualHead(
            DualHeadDecoder(snac), geometry_of(snac, ""), model_config(snac), torch.device("cpu"), ""
        )
        made.append(tts.decode(codes_of(6))[0])
    assert torch.equal(*made)
