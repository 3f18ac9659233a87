"""snac48/tokens.py: formats, frames, one corpus from any files, windows and their order."""

import random
import struct

import numpy as np
import pytest
from helpers.rvq import frames_from_codes, legacy, make_cache, random_tokens, speech, write_npq2

from snac48 import tokens
from snac48.cli import UserError

# ---- .npq ----


@pytest.mark.parametrize("dtype,V", [(0, 256), (1, 1024), (1, 65536), (2, 70000)])
def test_npq1_round_trip(tmp_path, dtype, V):
    tok = random_tokens(50, 9, V)
    tokens.write_npq(tmp_path / "a.npq", tok, [V] * 9, 86.1328)
    got = tokens.open_npq(tmp_path / "a.npq")
    assert (got.kind, got.vocab, got.frames) == ("NPQ1", [V] * 9, 50)
    assert got.fps == pytest.approx(86.1328, rel=1e-6) and got.kbps == pytest.approx(
        86.1328 * 9 * np.log2(V) / 1000
    )
    assert np.array_equal(got.tokens(), tok) and got.tokens().dtype == np.dtype(tokens.DTYPES[dtype])
    raw = (tmp_path / "a.npq").read_bytes()  # the layout by hand, not by our own reader
    assert raw[:8] == b"NPQ1\x01\x00\x09\x00" and len(raw) == 20 + 36 + 1 + 450 * (1, 2, 4)[dtype]
    assert struct.unpack_from("<I", raw, 16)[0] == 50 and raw[56] == dtype


@pytest.mark.parametrize("layout", ["A", "B"])
@pytest.mark.parametrize("K,T,V", [(9, 40, 1024), (1, 7, 1024), (2, 1, 65536), (9, 1024, 1024)])
def test_legacy_round_trip(tmp_path, layout, K, T, V):
    tok = random_tokens(T, K, V)
    (tmp_path / "a.npq").write_bytes(legacy(layout, tok, [V] * K))
    got = tokens.open_npq(tmp_path / "a.npq")
    assert (got.kind, got.vocab, got.frames) == (f"v0-{layout}", [V] * K, T)
    assert got.fps == pytest.approx(86.13) and np.array_equal(got.tokens(), tok)


@pytest.mark.parametrize("dtype,V", [(0, 200), (1, 1024), (2, 1024)])
def test_npq2_round_trip(tmp_path, dtype, V):
    mid, side = random_tokens(30, 9, V), random_tokens(30, 4, V, 1)
    write_npq2(tmp_path / "a.npq", mid, side, [V] * 13, 86.13, 11.2, dtype)
    assert np.array_equal(tokens.open_npq(tmp_path / "a.npq").tokens(), mid)
    both = tokens.open_npq(tmp_path / "a.npq", "both")
    assert np.array_equal(both.tokens(), np.concatenate([mid, side], 1)) and both.vocab == [V] * 13


def malformed():
    tok = random_tokens(6, 3, 1024)
    v1 = lambda **k: npq1(tok, **k)

    def npq1(
        tok, magic=b"NPQ1", version=1, K=3, fps=86.0, kbps=8.0, T=6, vocab=(1024,) * 3, dtype=1, cut=None
    ):
        head = (
            magic + struct.pack("<HHffI", version, K, fps, kbps, T) + struct.pack(f"<{len(vocab)}I", *vocab)
        )
        return (head + struct.pack("<B", dtype) + tok.astype("<u2").tobytes())[:cut]

    def npq2(version=1, mode=1, k_mid=2, k_side=1, dtype=1):
        head = b"NPQ2" + struct.pack("<HBHHffI", version, mode, k_mid, k_side, 86.0, 8.0, 6)
        return head + struct.pack("<3IB", 1024, 1024, 1024, dtype) + tok.astype("<u2").tobytes()

    high = tok.copy()
    high[4, 2] = 1024
    yield "empty", b"", "magic"
    yield "magic", v1(magic=b"RIFF"), "magic"
    yield "magic only", b"NPQ1", "cut off"
    yield "version 0", v1(version=0), "version 0"
    yield "version 2", v1(version=2), "version 2"
    yield "K 0", v1(K=0, version=1), "token"
    yield "K 513", v1(K=513), "outside"
    yield "K 65535", v1(K=65535), "outside"
    yield "dtype", v1(dtype=3), "dtype 3"
    yield "vocab 0", v1(vocab=(1024, 0, 1024)), "below 1"
    yield "T 0", v1(T=0), "no frames"
    yield "T 7", v1(T=7), "truncated"
    yield "T max", v1(T=2**32 - 1), "truncated"
    yield "fps nan", v1(fps=float("nan")), "token rate"
    yield "fps 0", v1(fps=0.0), "token rate"
    yield "fps inf", v1(fps=float("inf")), "token rate"
    yield "kbps nan", v1(kbps=float("nan")), "bitrate"
    yield "one byte short", v1(cut=-1), "truncated"
    yield "vocab cut", v1(cut=25), "cut off"
    yield "token", npq1(high), "token 1024 at frame 4, codebook 2"
    yield "NPQ2 version", npq2(version=2), "version 2"
    yield "NPQ2 mode", npq2(mode=0), "mode 0"
    yield "NPQ2 k_mid", npq2(k_mid=0, k_side=3), "k_mid 0"
    yield "NPQ2 dtype", npq2(dtype=9), "dtype 9"
    yield "NPQ2 K", npq2(k_mid=500, k_side=500), "outside"
    for layout in "AB":
        yield f"v0-{layout} short", legacy(layout, tok, [1024] * 3)[:-1], "truncated"
        yield f"v0-{layout} vocab", legacy(layout, tok, [1024, -1, 1024]), "below 1"
        yield f"v0-{layout} token", legacy(layout, high, [1024] * 3), "token 1024"
        yield f"v0-{layout} K", legacy(layout, tok, [1024] * 3).replace(b"NPQ1\3\0", b"NPQ1\0\0"), "version 0"


@pytest.mark.parametrize("name,data,reason", list(malformed()), ids=lambda v: v if isinstance(v, str) else "")
def test_malformed_refused_with_reason(tmp_path, name, data, reason):
    (tmp_path / "a.npq").write_bytes(data)
    with pytest.raises(tokens.NpqError, match=reason) as e:
        tokens.open_npq(tmp_path / "a.npq", "both")
    assert len(str(e.value)) > 8


def test_random_bytes_and_flips_never_crash(tmp_path):
    good, rng = legacy("A", random_tokens(6, 3, 1024), [1024] * 3), random.Random(0)
    tokens.write_npq(tmp_path / "a.npq", random_tokens(6, 3, 1024), [1024] * 3, 86.0)
    sources = [good, legacy("B", random_tokens(6, 3, 1024), [1024] * 3), (tmp_path / "a.npq").read_bytes()]
    for _ in range(600):
        data = bytearray(rng.choice(sources))
        for _ in range(rng.randint(1, 4)):
            data[rng.randrange(len(data))] = rng.randrange(256)
        (tmp_path / "b.npq").write_bytes(data[: rng.randint(0, len(data))] if rng.random() < 0.3 else data)
        try:
            got = tokens.open_npq(tmp_path / "b.npq", "both")
        except tokens.NpqError:
            continue
        assert (got.tokens() < np.array(got.vocab)).all()  # what is accepted holds what it promises


def test_writer_refuses_bad_tokens(tmp_path):
    for bad, why in (
        (random_tokens(5, 3, 16) + 16, "not in 0"),
        (random_tokens(5, 3) - 1, "not in 0"),
        (random_tokens(5, 2), "K = 3"),
    ):
        with pytest.raises(tokens.NpqError, match=why):
            tokens.write_npq(tmp_path / "a.npq", bad, [16] * 3, 86.0)
    assert not (tmp_path / "a.npq").exists()


# ---- frames, caches, one corpus ----


def test_the_columns_of_a_frame_come_from_the_strides():
    assert tokens.slot_columns([4, 2, 1]) == [[0], [1, 4], [2, 3, 5, 6]]
    assert tokens.slot_order([4, 2, 1]).tolist() == [0, 1, 3, 4, 2, 5, 6]
    assert len(tokens.slot_order([8, 4, 2, 1])) == 15 and tokens.slot_columns([1]) == [[0]]
    codes = [np.arange(3) + 100, np.arange(6) + 200, np.arange(12) + 300]
    frames = frames_from_codes(codes, [4, 2, 1])
    assert frames[1].tolist() == [101, 202, 304, 305, 203, 306, 307]  # every token at its time
    for a, b in zip(tokens.codes_from_frames(frames, [4, 2, 1]), codes):
        assert np.array_equal(a, b)
    with pytest.raises(UserError, match="multiple"):
        tokens.slot_columns([4, 3, 1])


def test_cache_and_npq_are_one_corpus(tmp_path):
    rows = {f"s{i % 3}/{i}.wav": speech(5 + i, i) for i in range(12)}
    make_cache(tmp_path / "cache", dict(list(rows.items())[:7]))
    make_cache(tmp_path / "cache", dict(list(rows.items())[7:]), shard=1)
    corpus = tokens.Corpus(str(tmp_path / "cache"))
    assert corpus.K == 7 and corpus.vocab == [16] * 7 and corpus.fps == pytest.approx(24000 / 2048)
    by_path = {corpus.index.path(i): i for i in range(12)}
    for name, codes in rows.items():
        want = frames_from_codes(codes, [4, 2, 1])
        assert np.array_equal(corpus.read(by_path[name]), want)
        assert np.array_equal(corpus.read(by_path[name], 2, 3), want[2:5])
    assert len(tokens.npq_from_cache(tmp_path / "cache", tmp_path / "npq").lengths) == 12
    files = tokens.Corpus(str(tmp_path / "npq" / "**" / "*.npq"))
    assert files.lengths.sum() == corpus.lengths.sum() and files.vocab == corpus.vocab
    assert np.array_equal(
        tokens.open_npq(tmp_path / "npq/s1/4.npq").tokens(), corpus.read(by_path["s1/4.wav"])
    )
    tokens.write_cache(tmp_path / "out.parquet", {"a.wav": corpus.read(3)}, corpus.source)
    source, frames = tokens.read_shard(tmp_path / "out.parquet")
    assert source == corpus.source and np.array_equal(frames[0], corpus.read(3))


def test_dac_codes_to_npq(tmp_path):
    codes = np.random.default_rng(0).integers(0, 1024, (1, 9, 33))
    tokens.npq_from_dac(codes, tmp_path / "a.npq", 44100 / 512, 1024)
    got = tokens.open_npq(tmp_path / "a.npq")
    assert np.array_equal(got.tokens().T, codes[0]) and got.fps == pytest.approx(86.1328, rel=1e-5)
    assert got.kbps == pytest.approx(7.75, rel=1e-3)  # 9 x 10 bits x 86.13


def test_bad_files_are_counted_mixed_ones_refused(tmp_path):
    for i in range(3):
        tokens.write_npq(tmp_path / f"{i}.npq", random_tokens(), [16] * 3, 86.0)
    (tmp_path / "9.npq").write_bytes(b"NPQ1 nonsense")
    corpus = tokens.Corpus(str(tmp_path / "*.npq"))
    assert len(corpus.lengths) == 3 and corpus.bad_fraction == 0.25 and corpus.bad[0][0].endswith("9.npq")
    tokens.write_npq(tmp_path / "8.npq", random_tokens(), [16, 16, 17], 86.0)
    with pytest.raises(UserError, match=r"8\.npq"):
        tokens.Corpus(str(tmp_path / "*.npq"))
    with pytest.raises(UserError, match="no such"):
        tokens.Corpus(str(tmp_path / "none/*.npq"))


# ---- windows ----


def test_known_numbers():
    steps = tokens.steps_per_epoch
    assert steps(34520, 4, 6) == 1438 and steps(62640, 6, 6) == 1740
    for windows, val in ((34520 + 1816, 1816), (62640 + 3296, 3296)):  # files of one window: exact shares
        train, held = tokens.split_files(np.ones(windows, int), 42)
        assert len(held) == val and len(train) == windows - val and not set(train) & set(held)
    counts = tokens.window_counts(np.array([1279, 1280, 1919, 1920, 12800]), 1280, 640)
    assert counts.tolist() == [1, 1, 1, 2, 19]
    assert tokens.codebook_weights("auto", 0.5, 9) == [1 + 0.5 * k / 8 for k in range(9)]
    assert tokens.codebook_weights("1,2,0.5", 0.5, 3) == [1, 2, 0.5]


def test_every_window_once_an_epoch_and_split_by_file():
    lengths = np.array([30, 100, 64, 7, 200, 64])
    table = tokens.window_table(lengths, np.arange(6), 64, 32)
    assert (table[:, 1] + table[:, 2] <= lengths[table[:, 0]]).all()
    assert len(table) == tokens.window_counts(lengths, 64, 32).sum()
    for windows, batch, accum in ((53, 4, 6), (7, 4, 6), (48, 4, 3), (50, 4, 3)):
        sizes, order = np.arange(windows) % 9 + 1, tokens.epoch_order(windows, 1, 2)
        n = tokens.steps_per_epoch(windows, batch, accum)
        steps = [tokens.step_windows(order, sizes, s, batch, accum) for s in range(n)]
        assert sorted(np.concatenate(steps)) == list(range(windows))  # left-over batches join the last step
        for world in (1, 2, 5):  # the ranks share them, passes of one size but for the last of each
            shares = [[tokens.passes_of(own, batch, rank, world) for rank in range(world)] for own in steps]
            for own, ranks in zip(steps, shares):
                every = [one for passes in ranks for one in passes]
                assert sorted(np.concatenate(every)) == sorted(own) and max(map(len, every)) <= batch
                counts = [sum(map(len, passes)) for passes in ranks]
                assert max(counts) - min(counts) <= 1
    assert not np.array_equal(tokens.epoch_order(99, 1, 2), tokens.epoch_order(99, 1, 3))
    train, val = tokens.split_files(np.array([10, 20, 3, 40, 5]), 0)
    assert len(val) >= 1 and len(train) + len(val) == 5
