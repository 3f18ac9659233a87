"""train_rvq.py, token_lm.py and npq.py: formats, arithmetic, the four patterns, training that survives."""

import json
import math
import os
import random
import signal
import struct
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import children_cpu

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import train_rvq
from snac48 import token_lm
from snac48 import tokens as npq
from snac48.checkpoint import load_checkpoint
from snac48.cli import UserError

PATTERNS = ["depth", "parallel", "delay", "flatten"]
META = {"pretrained_model": "toy", "weights_sha256": "0" * 64, "sampling_rate": 24000, "hop_length": 512,
        "vq_strides": [4, 2, 1], "codebook_size": 16}  # fmt: skip


def tokens(T=20, K=3, V=16, seed=0):
    return np.random.default_rng(seed).integers(0, V, (T, K))


def legacy(layout, tok, vocab, fps=86.13, kbps=8.0, magic=b"NPQ1"):
    """The v0 writers, for tests only: nobody should write these again."""
    T, K = tok.shape
    vocab = struct.pack(f"<{K}i", *vocab)
    if layout == "A":
        head = magic + struct.pack("<iffi", K, fps, kbps, T) + vocab
    else:
        head = magic + struct.pack("<if", K, fps) + vocab + struct.pack("<i", T)
    return head + tok.astype("<u2").tobytes()


# ---- formats ----


@pytest.mark.parametrize("dtype,V", [(0, 256), (1, 1024), (1, 65536), (2, 70000)])
def test_npq1_round_trip(tmp_path, dtype, V):
    tok = tokens(50, 9, V)
    npq.write_npq(tmp_path / "a.npq", tok, [V] * 9, 86.1328, 7.75, dtype)
    got = npq.open_npq(tmp_path / "a.npq")
    assert (got.kind, got.vocab, got.frames) == ("NPQ1", [V] * 9, 50)
    assert got.fps == pytest.approx(86.1328, rel=1e-6) and got.kbps == 7.75
    assert np.array_equal(got.tokens(), tok) and got.tokens().dtype == np.dtype(npq.DTYPES[dtype])
    raw = (tmp_path / "a.npq").read_bytes()  # the layout by hand, not by our own reader
    assert raw[:8] == b"NPQ1\x01\x00\x09\x00" and len(raw) == 20 + 36 + 1 + 450 * (1, 2, 4)[dtype]
    assert struct.unpack_from("<I", raw, 16)[0] == 50 and raw[56] == dtype


@pytest.mark.parametrize("layout", ["A", "B"])
@pytest.mark.parametrize("K,T,V", [(9, 40, 1024), (1, 7, 1024), (2, 1, 65536), (9, 1024, 1024)])
def test_legacy_round_trip(tmp_path, layout, K, T, V):
    tok = tokens(T, K, V)
    (tmp_path / "a.npq").write_bytes(legacy(layout, tok, [V] * K))
    got = npq.open_npq(tmp_path / "a.npq")
    assert (got.kind, got.vocab, got.frames) == (f"v0-{layout}", [V] * K, T)
    assert got.fps == pytest.approx(86.13) and np.array_equal(got.tokens(), tok)


@pytest.mark.parametrize("dtype,V", [(0, 200), (1, 1024), (2, 1024)])
def test_npq2_round_trip(tmp_path, dtype, V):
    mid, side = tokens(30, 9, V), tokens(30, 4, V, 1)
    npq.write_npq2(tmp_path / "a.npq", mid, side, [V] * 13, 86.13, 11.2, dtype)
    assert np.array_equal(npq.open_npq(tmp_path / "a.npq").tokens(), mid)
    both = npq.open_npq(tmp_path / "a.npq", "both")
    assert np.array_equal(both.tokens(), np.concatenate([mid, side], 1)) and both.vocab == [V] * 13


def malformed():
    tok = tokens(6, 3, 1024)
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
    with pytest.raises(npq.NpqError, match=reason) as e:
        npq.open_npq(tmp_path / "a.npq", "both")
    assert len(str(e.value)) > 8


def test_random_bytes_and_flips_never_crash(tmp_path):
    good, rng = legacy("A", tokens(6, 3, 1024), [1024] * 3), random.Random(0)
    npq.write_npq(tmp_path / "a.npq", tokens(6, 3, 1024), [1024] * 3, 86.0)
    sources = [good, legacy("B", tokens(6, 3, 1024), [1024] * 3), (tmp_path / "a.npq").read_bytes()]
    for _ in range(600):
        data = bytearray(rng.choice(sources))
        for _ in range(rng.randint(1, 4)):
            data[rng.randrange(len(data))] = rng.randrange(256)
        (tmp_path / "b.npq").write_bytes(data[: rng.randint(0, len(data))] if rng.random() < 0.3 else data)
        try:
            got = npq.open_npq(tmp_path / "b.npq", "both")
        except npq.NpqError:
            continue
        assert (got.tokens() < np.array(got.vocab)).all()  # what is accepted holds what it promises


def test_writer_refuses_bad_tokens(tmp_path):
    for bad, why in (
        (tokens(5, 3, 16) + 16, "not in 0"),
        (tokens(5, 3) - 1, "not in 0"),
        (tokens(5, 2), "K = 3"),
    ):
        with pytest.raises(npq.NpqError, match=why):
            npq.write_npq(tmp_path / "a.npq", bad, [16] * 3, 86.0)
    assert not (tmp_path / "a.npq").exists()


def test_frame_slots_come_from_the_strides():
    assert [k for k, _ in npq.frame_slots([4, 2, 1])] == [0, 1, 2, 2, 1, 2, 2]
    assert len(npq.frame_slots([8, 4, 2, 1])) == 15 and npq.frame_slots([1]) == [(0, 0)]
    codes = [np.arange(3) + 100, np.arange(6) + 200, np.arange(12) + 300]
    frames = npq.frames_from_codes(codes, [4, 2, 1])
    assert frames[1].tolist() == [101, 202, 304, 305, 203, 306, 307]  # every token at its time
    for a, b in zip(npq.codes_from_frames(frames, [4, 2, 1]), codes):
        assert np.array_equal(a, b)
    with pytest.raises(UserError, match="multiple"):
        npq.frame_slots([4, 3, 1])


def make_cache(folder, rows, meta=META, shard=0):
    """A shard as SPEC 5 says, written with pyarrow alone. rows: {path: [codes of each scale]}."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    folder.mkdir(parents=True, exist_ok=True)
    table = {"file_path": list(rows), "audio_length": [len(c[-1]) * 512 for c in rows.values()]}
    for k in range(3):
        table[f"codes_scale_{k}"] = pa.array([list(c[k]) for c in rows.values()], pa.list_(pa.int16()))
    table = pa.table(table).replace_schema_metadata({"snac": json.dumps(meta)})
    pq.write_table(table, folder / f"codes_batch_gpu0_{shard}.parquet")


def speech(T, seed, V=16):
    rng = np.random.default_rng(seed)
    return [rng.integers(0, V, T * n) for n in (1, 2, 4)]


def test_cache_and_npq_are_one_corpus(tmp_path):
    rows = {f"s{i % 3}/{i}.wav": speech(5 + i, i) for i in range(12)}
    make_cache(tmp_path / "cache", dict(list(rows.items())[:7]))
    make_cache(tmp_path / "cache", dict(list(rows.items())[7:]), shard=1)
    corpus = npq.Corpus(str(tmp_path / "cache"))
    assert corpus.K == 7 and corpus.vocab == [16] * 7 and corpus.fps == pytest.approx(24000 / 2048)
    by_path = {corpus.index.path(i): i for i in range(12)}
    for name, codes in rows.items():
        want = npq.frames_from_codes(codes, [4, 2, 1])
        assert np.array_equal(corpus.read(by_path[name]), want)
        assert np.array_equal(corpus.read(by_path[name], 2, 3), want[2:5])
    assert npq.npq_from_cache(tmp_path / "cache", tmp_path / "npq") == 12
    files = npq.Corpus(str(tmp_path / "npq" / "**" / "*.npq"))
    assert files.lengths.sum() == corpus.lengths.sum() and files.vocab == corpus.vocab
    assert np.array_equal(npq.open_npq(tmp_path / "npq/s1/4.npq").tokens(), corpus.read(by_path["s1/4.wav"]))
    npq.write_cache(tmp_path / "out.parquet", {"a.wav": corpus.read(3)}, corpus.source)
    source, frames = npq.read_shard(tmp_path / "out.parquet")
    assert source == corpus.source and np.array_equal(frames[0], corpus.read(3))


def test_dac_codes_to_npq(tmp_path):
    codes = np.random.default_rng(0).integers(0, 1024, (1, 9, 33))
    npq.npq_from_dac(codes, tmp_path / "a.npq")
    got = npq.open_npq(tmp_path / "a.npq")
    assert np.array_equal(got.tokens().T, codes[0]) and got.fps == pytest.approx(86.1328, rel=1e-5)
    assert got.kbps == pytest.approx(7.75, rel=1e-3)  # 9 x 10 bits x 86.13


def test_bad_files_are_counted_mixed_ones_refused(tmp_path):
    for i in range(3):
        npq.write_npq(tmp_path / f"{i}.npq", tokens(), [16] * 3, 86.0)
    (tmp_path / "9.npq").write_bytes(b"NPQ1 nonsense")
    corpus = npq.Corpus(str(tmp_path / "*.npq"))
    assert len(corpus.lengths) == 3 and corpus.bad_fraction == 0.25 and corpus.bad[0][0].endswith("9.npq")
    npq.write_npq(tmp_path / "8.npq", tokens(), [16, 16, 17], 86.0)
    with pytest.raises(UserError, match=r"8\.npq"):
        npq.Corpus(str(tmp_path / "*.npq"))
    with pytest.raises(UserError, match="no such"):
        npq.Corpus(str(tmp_path / "none/*.npq"))


# ---- arithmetic ----


def test_known_numbers():
    steps = train_rvq.steps_per_epoch
    assert steps(34520, 4, 6) == 1438 and steps(62640, 6, 6) == 1740
    for windows, val in ((34520 + 1816, 1816), (62640 + 3296, 3296)):  # files of one window: exact shares
        train, held = train_rvq.split_files(np.ones(windows, int), 42)
        assert len(held) == val and len(train) == windows - val and not set(train) & set(held)
    assert train_rvq.summary([4.1932] * 9, 86.13)["ppl"] == pytest.approx(66.2, abs=0.05)
    assert train_rvq.window_counts(np.array([1279, 1280, 1919, 1920, 12800]), 1280, 640).tolist() == [
        1,
        1,
        1,
        2,
        19,
    ]
    lr = [train_rvq.lr_at(s, 1000, 2e-4, 0.01, 0.05) for s in range(1000)]
    assert lr[-1] == pytest.approx(1e-5) and max(lr) == pytest.approx(2e-4) and lr[0] == pytest.approx(2e-5)
    assert lr[:10] == sorted(lr[:10]) and lr[10:] == sorted(lr[10:], reverse=True)
    assert train_rvq.codebook_weights("auto", 0.5, 9) == [1 + 0.5 * k / 8 for k in range(9)]
    assert train_rvq.codebook_weights("1,2,0.5", 0.5, 3) == [1, 2, 0.5]
    bits = train_rvq.summary([math.log(4096)] * 7, 24000 / 2048)
    assert bits["bits_per_frame"] == pytest.approx(84) and bits["bits_per_s"] == pytest.approx(984.4, abs=0.1)


def test_every_window_once_an_epoch_and_split_by_file():
    lengths = np.array([30, 100, 64, 7, 200, 64])
    table = train_rvq.window_table(lengths, np.arange(6), 64, 32)
    assert (table[:, 1] + table[:, 2] <= lengths[table[:, 0]]).all()
    assert len(table) == train_rvq.window_counts(lengths, 64, 32).sum()
    for windows, batch, accum in ((53, 4, 6), (7, 4, 6), (48, 4, 3), (50, 4, 3)):
        sizes, order = np.arange(windows) % 9 + 1, train_rvq.epoch_order(windows, 1, 2)
        n = train_rvq.steps_per_epoch(windows, batch, accum)
        steps = [train_rvq.step_batches(order, sizes, s, batch, accum) for s in range(n)]
        seen = np.concatenate([b for s in steps for b in s])
        assert sorted(seen) == list(range(windows))  # left-over batches join the true last step
    assert not np.array_equal(train_rvq.epoch_order(99, 1, 2), train_rvq.epoch_order(99, 1, 3))
    train, val = train_rvq.split_files(np.array([10, 20, 3, 40, 5]), 0)
    assert len(val) >= 1 and len(train) + len(val) == 5


# ---- the model ----


def toy(pattern, vocab=(11,) * 4, ctx=16, d=32, layers=2, scale=None, seed=0):
    torch.manual_seed(seed)
    model = token_lm.TokenLM({"pattern": pattern, "vocab": list(vocab), "d_model": d, "layers": layers,
                              "heads": 2, "depth_layers": 2, "depth_d_model": d, "dropout": 0.0,
                              "ctx": ctx})  # fmt: skip
    if scale:  # at initialisation logits hardly depend on the input: make them
        with torch.no_grad():
            for p in model.parameters():
                p.copy_(torch.randn_like(p) * scale)
    return model.eval()


def codes_like(model, B, T, seed=0):
    g = torch.Generator().manual_seed(seed)
    return torch.stack([torch.randint(0, v, (B, T), generator=g) for v in model.vocab], -1)


@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("V", [1024, 4096])
def test_first_loss_is_ln_v(pattern, V):
    model = toy(pattern, (V,) * 3, d=64)
    codes = codes_like(model, 2, 12)
    nll, flat = token_lm.token_losses(model(codes), codes, model.sizes)
    assert nll.mean().item() == pytest.approx(math.log(V), rel=0.01)
    assert flat.mean().item() == pytest.approx(math.log(V), rel=0.01)


def order_of(pattern, t, k, K):
    """When a token is sampled: what comes at the same time or later must not be seen."""
    return {"parallel": t, "delay": t + k}.get(pattern, t * K + k)


@pytest.mark.parametrize("pattern", PATTERNS)
def test_no_logit_sees_its_own_or_a_later_token(pattern):
    model = toy(pattern, (11, 7, 5, 11), scale=0.3)
    codes = codes_like(model, 1, 6)
    base, K = model(codes), 4
    for t, k in ((0, 0), (2, 1), (3, 3), (5, 2)):
        other = codes.clone()
        other[0, t, k] = (other[0, t, k] + 1) % model.vocab[k]
        changed = (model(other) - base).nan_to_num(0).abs().amax(-1)[0] > 0  # [T, K]
        for a in range(6):
            for b in range(K):
                before = order_of(pattern, a, b, K) <= order_of(pattern, t, k, K)
                assert not (before and changed[a, b]), (t, k, a, b)
        later = [(a, b) for a in range(6) for b in range(K)
                 if order_of(pattern, a, b, K) > order_of(pattern, t, k, K)]  # fmt: skip
        assert not later or any(changed[a, b] for a, b in later)  # and it is seen afterwards


@pytest.mark.parametrize("pattern", PATTERNS)
def test_padding_changes_nothing_and_costs_nothing(pattern):
    model = toy(pattern, scale=0.3)
    a, b = codes_like(model, 1, 5), codes_like(model, 1, 9, 1)
    both = torch.full((2, 9, 4), -1)
    both[0, :5], both[1] = a[0], b[0]
    assert torch.allclose(model(both)[0, :5], model(a)[0], atol=1e-5)
    none = model.rows(torch.full((1, 1, 4), -1))  # "no token" is a row of its own, never a real code
    assert (none >= sum(model.vocab)).all() and len(none.unique()) == 4
    loss, ce = train_rvq.objective(model, both, torch.ones(4), 0.0, 14)
    parts = [token_lm.token_losses(model(c), c, model.sizes)[0].sum().item() for c in (a, b)]
    assert loss.item() == pytest.approx(sum(parts) / 14 / 4, rel=1e-5)
    assert ce.sum().item() == pytest.approx(sum(parts), rel=1e-5)


def test_objective_against_pytorch():
    model = toy("depth", (11, 7, 5, 9), scale=0.3)
    codes, w = codes_like(model, 2, 6), torch.tensor([1.0, 1.1, 1.3, 1.5])
    logits = model(codes)
    want = 0.0
    for k, v in enumerate(model.vocab):
        flat, target = logits[:, :, k, :v].reshape(-1, v), codes[:, :, k].reshape(-1)
        want += w[k] / w.sum() * torch.nn.functional.cross_entropy(flat, target, label_smoothing=0.05)
    got, _ = train_rvq.objective(model, codes, w, 0.05, 12)
    assert got.item() == pytest.approx(want.item(), rel=1e-5)


@pytest.mark.parametrize("prompt", [0, 3, 20])
@pytest.mark.parametrize("pattern", PATTERNS)
def test_cached_sampling_equals_full_forward(pattern, prompt):
    model = toy(pattern, (11, 7, 5, 11), ctx=12, scale=0.3)
    seen = {}
    given = codes_like(model, 2, prompt) if prompt else None
    note = lambda t, k, logits, t0: seen.setdefault((t, k), (logits.clone(), t0))
    codes = token_lm.sample(model, 17, given, 2, temperature=1.0, seed=3, on_logits=note)
    assert codes.shape == (2, prompt + 17, 4) and (codes >= 0).all()
    assert (codes < torch.tensor(model.vocab)).all() and len(seen) == 17 * 4
    if prompt:
        assert torch.equal(codes[:, :prompt], given)
    for (t, k), (logits, t0) in seen.items():
        window = codes[:, t0 : t0 + 12].clone()
        if pattern == "delay":  # tokens that come later in the pattern's order are not there yet
            for a in range(window.shape[1]):
                for b in range(4):
                    if a + b >= t - t0 + k and not a + t0 < prompt:
                        window[:, a, b] = -1
        assert t - t0 < 12
        full = model(window)[:, t - t0, k]
        assert torch.allclose(logits, full, atol=2e-4), (t, k, t0)


def test_sampling_filters_and_seed():
    logits = torch.log(torch.tensor([[0.5, 0.3, 0.15, 0.05]])).repeat(4000, 1)
    g = torch.Generator().manual_seed(0)
    assert (token_lm.pick(logits, 0, 0, 0, g) == 0).all()
    assert set(token_lm.pick(logits, 1.0, 2, 0, g).tolist()) == {0, 1}
    assert set(token_lm.pick(logits, 1.0, 0, 0.6, g).tolist()) == {0, 1}
    assert set(token_lm.pick(logits, 1.0, 0, 0.5, g).tolist()) == {0}
    counts = np.bincount(token_lm.pick(logits, 1.0, 0, 0, g), minlength=4) / 4000
    assert np.allclose(counts, [0.5, 0.3, 0.15, 0.05], atol=0.03)
    hot = np.bincount(token_lm.pick(logits, 10.0, 0, 0, g), minlength=4) / 4000
    assert hot.max() < 0.32
    model = toy("depth", scale=0.3)
    assert torch.equal(token_lm.sample(model, 5, seed=1), token_lm.sample(model, 5, seed=1))
    assert not torch.equal(token_lm.sample(model, 5, seed=1), token_lm.sample(model, 5, seed=2))


def fit(model, batch_at, steps, lr):
    opt = torch.optim.AdamW(model.parameters(), lr=lr, betas=(0.9, 0.95), weight_decay=0.0)
    model.train()
    for s in range(steps):
        for g in opt.param_groups:
            g["lr"] = train_rvq.lr_at(s, steps, lr, 0.05, 0.05)
        codes = batch_at(s)
        loss, _ = train_rvq.objective(model, codes, torch.ones(model.K), 0.0, codes.shape[0] * codes.shape[1])
        opt.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        opt.step()
    model.eval()
    return model


@pytest.mark.parametrize("pattern", PATTERNS)
def test_copy_task(pattern):
    """c_k = (c_0 + 3 k) mod V: only a pattern that sees inside the frame can do better than ln V."""
    V, K = 8, 4
    model = toy(pattern, (V,) * K, ctx=12, d=32)

    def batch(s):
        g = torch.Generator().manual_seed(s)
        return (torch.randint(0, V, (16, 12, 1), generator=g) + 3 * torch.arange(K)) % V

    fit(model, batch, 250, 4e-3)
    with torch.no_grad():
        codes = torch.cat([batch(10_000 + i) for i in range(8)])
        ce = token_lm.token_losses(model(codes), codes, model.sizes)[0].mean().item()
    if pattern == "parallel":
        assert ce == pytest.approx(math.log(V), rel=0.03)
    else:
        assert math.log(V) / K * 0.98 < ce < math.log(V) / K * 1.10


def test_overfits_8_by_48_frames():
    model = toy("depth", (64,) * 4, ctx=48, d=64)
    codes = codes_like(model, 8, 48)
    fit(model, lambda s: codes, 220, 4e-3)
    with torch.no_grad():
        assert token_lm.token_losses(model(codes), codes, model.sizes)[0].mean() < 0.1


def test_no_decay_on_vectors_and_flops():
    model = toy("depth")
    assert {p.ndim for n, p in model.named_parameters() if "norm" in n or n == "start"} == {1}
    big = token_lm.TokenLM({"pattern": "parallel", "vocab": [64] * 9, "d_model": 64, "layers": 3, "heads": 2,
                            "depth_layers": 1, "depth_d_model": 64, "dropout": 0, "ctx": 8})  # fmt: skip
    weights = 3 * 12 * 64 * 64 + 9 * 64 * 64
    assert big.flops_per_frame(8) == pytest.approx(6 * weights + 6 * 3 * 64 * 8, rel=0.02)


# ---- skipping ----


def test_guard_survives_nan_and_outlier():
    guard = train_rvq.StepGuard(5)
    assert [guard.reason(2.0, 1.0) for _ in range(30)] == [None] * 30
    assert guard.reason(float("nan"), 1.0) == "non-finite" and guard.reason(2.0, float("inf")) == "non-finite"
    assert guard.reason(50.0, 1.0) == "outlier" and guard.running == pytest.approx(2.0)
    assert guard.reason(2.1, 1.0) is None and guard.in_a_row == 0 and guard.skipped == 3
    low = train_rvq.StepGuard(5)
    low.running = 0.01
    assert low.reason(0.5, 1.0) is None  # an overfitted run is not an outlier of itself
    first = train_rvq.StepGuard(5)
    assert first.reason(float("nan"), float("nan")) == "non-finite" and first.reason(7.0, 1.0) is None


def make_npqs(folder, files=24, T=12, K=3, V=16):
    folder.mkdir(parents=True, exist_ok=True)
    for i in range(files):
        rng = np.random.default_rng(i)
        tok = (rng.integers(0, V, (T + i % 3, 1)) + 3 * np.arange(K)) % V
        npq.write_npq(folder / f"{i:03d}.npq", tok, [V] * K, 86.13)
    return str(folder / "*.npq")


def command(tmp, data, *extra, run="run"):
    return ["--data", data, "--save_dir", str(tmp / run), "--eval-outdir", str(tmp / "eval"),
            "--device", "cpu", "--ctx", "12", "--batch", "2", "--accum", "2", "--epochs", "3",
            "--d_model", "16", "--layers", "1", "--heads", "2", "--depth_layers", "1", "--num_workers", "0",
            "--lr", "3e-3", "--log-lr-steps", "1", "--eval-audio-every", "0", "--eval-decoder", "none",
            "--archive-every", "1", *extra]  # fmt: skip


def metrics(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def run_here(argv):
    return train_rvq.train(train_rvq.parse_training(argv))


def test_nan_and_outlier_batches_are_skipped_in_a_run(tmp_path, monkeypatch):
    data, real, calls = make_npqs(tmp_path / "npq"), train_rvq.objective, [0]

    def poisoned(model, codes, *rest):
        calls[0] += 1
        loss, ce = real(model, codes, *rest)
        return loss * {11: float("nan"), 21: 1000.0}.get(calls[0], 1.0), ce

    monkeypatch.setattr(train_rvq, "objective", poisoned)
    assert run_here(command(tmp_path, data)) == 0
    lines = metrics(tmp_path / "run")
    skips = [m for m in lines if m.get("event") == "skip"]
    assert [(m["step"], m["reason"]) for m in skips] == [(6, "non-finite"), (11, "outlier")]
    steps = [m for m in lines if "event" not in m]
    assert steps[-1]["step"] == steps[-1]["total_steps"] and steps[-1]["skipped"] == 2
    state = load_checkpoint(tmp_path / "run/rvq_3cb_latest.pt")
    assert all(torch.isfinite(v).all() for v in state["model"].values())
    want = {"step", "total_steps", "epoch", "epochs", "phase", "loss", "ppl", "bits_per_s", "ce", "lr",
            "tokens_per_s", "eta_s"}  # fmt: skip
    assert want <= set(steps[0]) and len(steps[0]["ce"]) == 3
    events = [m["event"] for m in lines if "event" in m]
    assert events[0] == "start" and events[-1] == "end" and lines[-1]["reason"] == "finished"
    assert {"checkpoint", "val"} <= set(events)


def test_a_run_that_stays_broken_stops_with_its_own_code(tmp_path, monkeypatch):
    data, real = make_npqs(tmp_path / "npq"), train_rvq.objective
    monkeypatch.setattr(train_rvq, "objective", lambda *a: (real(*a)[0] * float("nan"), real(*a)[1]))
    with pytest.raises(UserError, match="in a row") as e:
        run_here(command(tmp_path, data, "--epochs", "9"))
    assert e.value.code == 4 and metrics(tmp_path / "run")[-1]["reason"] == "diverged"
    assert (tmp_path / "run/rvq_3cb_latest.pt").exists()  # a run that hits NaN still saves, good weights


# ---- runs ----


def test_archives_pruned_ema_validates_and_finished_runs_stay(tmp_path):
    data = make_npqs(tmp_path / "npq")
    assert run_here(command(tmp_path, data, "--epochs", "5", "--keep-archived", "2", "--tag", "x")) == 0
    names = sorted(p.name.split("__")[0] for p in (tmp_path / "run").glob("*.pt"))
    assert [n for n in names if "_epoch_" in n] == ["rvq_3cb_x_epoch_e0004", "rvq_3cb_x_epoch_e0005"]
    assert len([n for n in names if "best_e" in n]) <= 2 and {
        "rvq_3cb_x_latest.pt",
        "rvq_3cb_x_best.pt",
    } <= set(names)
    state = load_checkpoint(tmp_path / "run/rvq_3cb_x_latest.pt")
    corpus, args = npq.Corpus(data), train_rvq.parse_training(command(tmp_path, data))
    _, val = train_rvq.split_files(train_rvq.window_counts(corpus.lengths, 12, 6), 42)
    held = train_rvq.Windows(corpus, train_rvq.window_table(corpus.lengths, val, 12, 6))
    ema = train_rvq.plain_ce(token_lm.build(state, "ema"), held, 2, torch.device("cpu"), False)
    raw = train_rvq.plain_ce(token_lm.build(state, "model"), held, 2, torch.device("cpu"), False)
    logged = [m for m in metrics(tmp_path / "run") if m.get("event") == "val"][-1]
    assert (
        logged["val_loss"] == pytest.approx(np.mean(ema), abs=1e-5) != pytest.approx(np.mean(raw), abs=1e-5)
    )
    assert logged["ppl"] == pytest.approx(math.exp(logged["val_loss"]))
    again = command(tmp_path, data, "--epochs", "5", "--tag", "x")
    assert run_here(again) == 0 and args.step == 6  # finished: nothing more to do


def test_resume_flags_and_architecture(tmp_path, capsys):
    data = make_npqs(tmp_path / "npq")
    with pytest.raises(UserError, match="does not exist"):
        run_here(command(tmp_path, data, "--resume"))
    run_here(command(tmp_path, data, "--epochs", "1"))
    run_here(command(tmp_path, data, "--epochs", "2", "--d_model", "32", "--pattern", "delay"))
    state = load_checkpoint(tmp_path / "run/rvq_3cb_latest.pt")
    assert state["arch"]["d_model"] == 16 and state["arch"]["pattern"] == "depth" and state["epoch"] == 2
    assert "architecture from the checkpoint" in capsys.readouterr().out
    run_here(command(tmp_path, data, "--epochs", "1", "--d_model", "32", "--ignore-arch"))
    assert load_checkpoint(tmp_path / "run/rvq_3cb_latest.pt")["arch"]["d_model"] == 32
    archives = sorted((tmp_path / "run").glob("*.pt"))
    latest = tmp_path / "run/rvq_3cb_latest.pt"
    latest.write_bytes(latest.read_bytes()[:-100])  # damaged: the newest good one takes over
    run_here(command(tmp_path, data, "--epochs", "2"))
    out = capsys.readouterr().out
    assert "is damaged" in out and load_checkpoint(latest)["epoch"] == 2 and archives
    with pytest.raises(UserError, match="another --save_dir"):
        run_here(command(tmp_path, make_npqs(tmp_path / "other", V=9)))


def start(argv, **kw):
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    return subprocess.Popen([sys.executable, str(ROOT / "train_rvq.py"), *argv], env=env, text=True,
                            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, **kw)  # fmt: skip


def same(a, b):
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    if isinstance(a, list):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b


def wait_for(folder, step, process, seconds=60):
    end = time.time() + seconds
    while time.time() < end and process.poll() is None:
        path = folder / "metrics.jsonl"
        if path.exists() and any(f'"step": {s},' in path.read_text() for s in (step, step + 1, step + 2)):
            return
        time.sleep(0.002)
    raise AssertionError("the run never came to that step: " + process.stdout.read())


def test_kill_9_and_resume_is_bit_identical(tmp_path):
    """Dropout, EMA, accumulation with a left-over last step; killed twice, then stopped by SIGTERM."""
    data = make_npqs(tmp_path / "npq", files=60)
    flags = ["--epochs", "4", "--dropout", "0.2", "--save-every-steps", "3", "--fused-optim"]
    assert run_here(command(tmp_path, data, *flags, run="whole")) == 0
    steps = []
    for at, sig, code in ((8, signal.SIGKILL, -9), (26, signal.SIGKILL, -9), (44, signal.SIGTERM, 3)):
        p = start(command(tmp_path, data, *flags))
        wait_for(tmp_path / "run", at, p)
        p.send_signal(sig)
        out = p.communicate(timeout=60)[0]
        assert p.returncode == code, out
        steps.append(load_checkpoint(tmp_path / "run/rvq_3cb_latest.pt")["global_step"])
    assert metrics(tmp_path / "run")[-1]["reason"] == "stopped" and steps == sorted(steps)
    assert run_here(command(tmp_path, data, *flags)) == 0
    a, b = (load_checkpoint(tmp_path / run / "rvq_3cb_latest.pt") for run in ("whole", "run"))
    for key in ("model", "ema", "optimizer", "global_step", "closed", "best", "guard", "val_loss"):
        assert same(a[key], b[key]), key
    resumed = [m for m in metrics(tmp_path / "run") if m.get("event") == "resume"]
    assert len(resumed) == 3 and any(m["step"] % a["per_epoch"] for m in resumed)  # in mid-epoch, too


def test_held_out_files_of_their_own_and_too_few_files(tmp_path):
    data, other = make_npqs(tmp_path / "npq", files=3), make_npqs(tmp_path / "held", files=2)
    assert run_here(command(tmp_path, data, "--val-data", other, "--epochs", "1")) == 0
    first = metrics(tmp_path / "run")[0]
    assert (first["windows"], first["val_windows"]) == (3, 2)
    with pytest.raises(UserError, match="--val-data"):
        run_here(command(tmp_path, make_npqs(tmp_path / "one", files=1), run="b"))
    with pytest.raises(UserError, match="other tokens"):
        run_here(command(tmp_path, data, "--val-data", make_npqs(tmp_path / "v", files=2, V=9), run="c"))
    (tmp_path / "npq" / "bad.npq").write_bytes(b"NPQ1")
    with pytest.raises(UserError, match=r"bad\.npq") as e:
        run_here(command(tmp_path, data, run="d"))
    assert e.value.code == 5
    assert run_here(command(tmp_path, data, "--max_bad_fraction", "0.5", "--epochs", "1", run="e")) == 0


def test_a_stop_during_validation_loses_nothing(tmp_path, monkeypatch):
    data, real, calls = make_npqs(tmp_path / "npq"), train_rvq.plain_ce, [0]
    assert run_here(command(tmp_path, data, run="whole")) == 0

    def interrupted(*args):
        calls[0] += 1
        if calls[0] == 2:
            os.kill(os.getpid(), signal.SIGTERM)
        return real(*args)

    monkeypatch.setattr(train_rvq, "plain_ce", interrupted)
    assert run_here(command(tmp_path, data)) == 3
    state = load_checkpoint(tmp_path / "run/rvq_3cb_latest.pt")
    assert state["global_step"] == 2 * state["per_epoch"] and state["closed"] == 1
    assert run_here(command(tmp_path, data)) == 0
    epochs = [
        [m["epoch"] for m in metrics(tmp_path / r) if m.get("event") == "val"] for r in ("whole", "run")
    ]
    assert epochs == [[1, 2, 3], [1, 2, 3]]
    a, b = (load_checkpoint(tmp_path / run / "rvq_3cb_latest.pt") for run in ("whole", "run"))
    for key in ("model", "ema", "optimizer", "global_step", "closed", "best", "val_loss"):
        assert same(a[key], b[key]), key


def test_workers_amp_and_other_flags_run(tmp_path):
    data = make_npqs(tmp_path / "npq")
    flags = ["--epochs", "2", "--amp", "--num_workers", "2", "--persistent-workers", "--prefetch", "2",
             "--quiet", "--pattern", "delay", "--cb-weights", "uniform", "--ema", "0",
             "--eval-audio-every", "2",
             "--eval-frames", "20", "--eval-top-k", "5"]  # fmt: skip
    assert run_here(command(tmp_path, data, *flags)) == 0
    sample = npq.open_npq(next((tmp_path / "eval").glob("*.npq")))
    assert sample.frames == 20 and sample.vocab == [16] * 3
    assert not any(line.split(" ", 2)[2].startswith("step ")
                   for line in (tmp_path / "run/training.log").read_text().splitlines())  # fmt: skip


# ---- the command line ----


def test_help_is_fast_and_flags_are_the_specified_ones():
    began = children_cpu()
    for argv in (["--help"], ["generate", "--help"]):
        out = subprocess.run(
            [sys.executable, str(ROOT / "train_rvq.py"), *argv], capture_output=True, text=True
        )
        assert out.returncode == 0 and "--" in out.stdout
    assert children_cpu() - began < 2.5  # two of them; torch alone takes 2 s each
    d = vars(train_rvq.parse_training([]))
    want = {"data": "npq_out/*.npq", "ctx": 1280, "step": 640, "batch": 4, "accum": 6, "epochs": 350,
            "amp": False, "d_model": 768, "layers": 16, "heads": 12, "dropout": 0.1, "lr": 2e-4,
            "weight_decay": 0.02,
            "ema": 0.999, "label_smoothing": 0.05, "cb_weights": "auto", "cb_weights_auto_alpha": 0.5,
            "warmup_ratio": 0.01, "eta_min_ratio": 0.05, "grad_clip": 1.0, "outlier_skip_factor": 5,
            "val_every": 1, "eval_audio_every": 5, "eval_frames": 1290, "eval_temperature": 1.1,
            "eval_outdir": "rvq_eval", "save_dir": "rvq_ckpts", "archive_every": 10, "keep_archived": 20,
            "log_lr_steps": 50, "prefetch": 6, "pattern": "depth"}  # fmt: skip
    assert {k: d[k] for k in want} == want


@pytest.mark.parametrize("run", [1, 2, 3])
def test_configs_of_the_documents(run):
    args = train_rvq.parse_training(["--config", str(ROOT / f"configs/rvq_run{run}.json")])
    assert (args.batch, args.accum) == ((4, 6), (6, 6), (4, 6))[run - 1]
    assert train_rvq.steps_per_epoch({1: 34520, 2: 62640, 3: 34520}[run], args.batch, args.accum) in (
        1438,
        1740,
    )
    if run == 3:
        default = vars(train_rvq.parse_training([]))
        assert {k: v for k, v in vars(args).items() if default[k] != v and k not in ("config", "tag")} == {}
    over = train_rvq.parse_training(["--config", str(ROOT / f"configs/rvq_run{run}.json"), "--batch", "9"])
    assert over.batch == 9  # flag > config


def test_config_errors_name_the_nearest_key(tmp_path):
    for text, why in (('{"bacth": 4}', "did you mean 'batch'"), ('{"batch": "4"}', "must be of type int"),
                      ('{"amp": 1}', "must be of type bool"), ('{"pattern": "x"}', "not one of"),
                      ("{", "cannot be read")):  # fmt: skip
        (tmp_path / "c.json").write_text(text)
        with pytest.raises(UserError, match=why):
            train_rvq.parse_training(["--config", str(tmp_path / "c.json")])
    (tmp_path / "c.json").write_text('{"data": "http://x/*.npq", // a comment\n "lr": 1}')
    args = train_rvq.parse_training(["--config", str(tmp_path / "c.json")])
    assert args.data == "http://x/*.npq" and args.lr == 1


def test_user_errors_are_one_sentence(tmp_path):
    out = subprocess.run([sys.executable, str(ROOT / "train_rvq.py"), "--data", str(tmp_path / "no/*.npq")],
                         capture_output=True, text=True)  # fmt: skip
    assert out.returncode == 1 and out.stderr.count("\n") == 1 and "Traceback" not in out.stderr


# ---- generate and speaking ----


@pytest.fixture(scope="module")
def snac_run(tmp_path_factory):
    tmp = tmp_path_factory.mktemp("snac")
    make_cache(tmp / "cache", {f"{i}.wav": speech(10, i) for i in range(24)})
    run_here(command(tmp, str(tmp / "cache"), "--epochs", "1"))
    return tmp


def generate(tmp, out, *extra):
    argv = [
        "--checkpoint",
        str(tmp / "run/rvq_7cb_latest.pt"),
        "--output",
        str(tmp / out),
        "--frames",
        "20",
        *extra,
    ]
    return train_rvq.generate(train_rvq.generate_parser().parse_args(argv))


def test_generate_npq_and_parquet_with_prompts(snac_run):
    tmp = snac_run
    assert (
        generate(tmp, "a.npq") == 0
        and generate(tmp, "b.parquet", "--temperature", "0.9", "--top-p", "0.9") == 0
    )
    a = npq.open_npq(tmp / "a.npq")
    assert a.frames == 20 and a.vocab == [16] * 7 and a.fps == pytest.approx(11.71875)
    source, rows = npq.read_shard(tmp / "b.parquet")
    assert source["weights_sha256"] == META["weights_sha256"] and rows[0].shape == (20, 7)
    prompt = str(tmp / "cache/codes_batch_gpu0_0.parquet")
    assert generate(tmp, "c.npq", "--prompt", prompt, "--prompt-row", "3", "--prompt-frames", "4") == 0
    want = npq.read_shard(prompt)[1][3][:4]
    assert np.array_equal(npq.open_npq(tmp / "c.npq").tokens()[:4], want)
    assert generate(tmp, "d.npq", "--prompt", str(tmp / "a.npq")) == 0
    assert npq.open_npq(tmp / "d.npq").frames == 40
    npq.write_npq(tmp / "other.npq", tokens(), [16] * 3, 86.0)
    for name, why in ((str(tmp / "other.npq"), "vocabulary"), ("none.npq", "cannot be read")):
        with pytest.raises(UserError, match=why):
            generate(tmp, "e.npq", "--prompt", name)
    with pytest.raises(UserError, match="suffix"):
        generate(tmp, "e.mp3")


def test_generate_wav_through_the_dual_head(snac_run, monkeypatch):
    """The call infer.py answers: K LongTensors [1, T_k] in, (24 kHz, 48 kHz) out, 48 kHz written."""
    import types

    seen = {}

    class Decoder:
        geometry = types.SimpleNamespace(weights_sha256=META["weights_sha256"])

        def decode(self, codes):
            seen["codes"] = codes
            return torch.zeros(1, 1, 20 * 2048), torch.full((1, 1, 20 * 4096), 0.5)

    speaker = lambda path, device: seen.setdefault("path", path) and Decoder()
    monkeypatch.setattr("snac48.decoder.load_dual_head", speaker)
    assert generate(snac_run, "a.wav", "--decoder", "our.pt") == 0
    import soundfile

    audio, rate = soundfile.read(snac_run / "a.wav")
    assert rate == 48000 and len(audio) == 20 * 4096 and abs(audio.mean() - 0.5) < 1e-3
    assert [tuple(c.shape) for c in seen["codes"]] == [(1, 20), (1, 40), (1, 80)] and seen["path"] == "our.pt"
    assert all(c.dtype == torch.long for c in seen["codes"])


def test_dac_samples_are_spoken_by_dacmodel(tmp_path):
    from transformers import DacConfig, DacModel

    torch.manual_seed(0)
    config = DacConfig(encoder_hidden_size=8, downsampling_ratios=[2, 4], decoder_hidden_size=32,
                       n_codebooks=3, codebook_size=16, codebook_dim=4, upsampling_ratios=[4, 2],
                       hidden_size=32)  # fmt: skip
    dac = DacModel(config)
    dac.save_pretrained(tmp_path / "dac")
    data = make_npqs(tmp_path / "npq")
    flags = ["--epochs", "1", "--eval-audio-every", "1", "--eval-frames", "30", "--eval-on-cpu"]
    assert run_here(command(tmp_path, data, *flags, "--eval-decoder", str(tmp_path / "dac"))) == 0
    import soundfile

    audio, rate = soundfile.read(tmp_path / "eval/rvq_3cb_e0001.wav")
    frames = npq.open_npq(tmp_path / "eval/rvq_3cb_e0001.npq").tokens().astype(np.int64)
    with torch.no_grad():
        want = (
            dac.eval().decode(audio_codes=torch.from_numpy(frames.T[None])).audio_values.reshape(-1).numpy()
        )
    assert rate == config.sampling_rate and len(audio) == len(want)
    assert np.abs(audio - want.clip(-1, 1)).max() < 1e-3
    # a decoder that is not there is said, tokens are kept, the run goes on
    assert run_here(command(tmp_path, data, *flags, "--eval-decoder", str(tmp_path / "none"), run="b")) == 0
    assert "not decoded" in (tmp_path / "b/training.log").read_text()


def test_the_circle_closes(cache_dir, snac_dir, tmp_path):
    """Real codes of cache_codes.py -> model -> sampled codes -> infer.py -> 48 kHz, by both ways the same."""
    from dataclasses import asdict

    import soundfile
    from conftest import run

    from snac48.codec import geometry_of, load_snac, model_config
    from snac48.decoder import DualHeadDecoder, initialise_48k

    snac = load_snac(str(snac_dir))
    model = DualHeadDecoder(snac)
    with torch.no_grad():
        initialise_48k(model, "first")
    geometry = asdict(geometry_of(snac, str(snac_dir)))
    geometry["vq_strides"] = list(geometry["vq_strides"])
    state = {"model": model.state_dict(), "model_config": model_config(snac), "geometry": geometry,
             "args": {}, "global_step": 0}  # fmt: skip
    torch.save(state, tmp_path / "dual.pt")
    assert run_here(command(tmp_path, str(cache_dir), "--epochs", "1")) == 0
    assert generate(tmp_path, "out.wav", "--decoder", str(tmp_path / "dual.pt")) == 0
    assert generate(tmp_path, "out.parquet") == 0
    run("infer.py", "--checkpoint", tmp_path / "dual.pt", "--input", tmp_path / "out.parquet",
        "--output", tmp_path / "wavs", "--device", "cpu")  # fmt: skip
    ours, rate = soundfile.read(tmp_path / "out.wav")
    theirs, _ = soundfile.read(next((tmp_path / "wavs").rglob("*.wav")))
    assert rate == 48000 and len(ours) == len(theirs) == 20 * 2048 * 2
    assert np.abs(ours).max() > 1e-3 and np.abs(ours - theirs).max() < 1e-3
    state["geometry"]["weights_sha256"] = "f" * 64
    torch.save(state, tmp_path / "other.pt")
    with pytest.raises(UserError, match="another codec"):
        generate(tmp_path, "out.wav", "--decoder", str(tmp_path / "other.pt"))
