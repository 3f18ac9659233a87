"""snac48/streaming.py: pieces of any length give the samples of one pass, noise included."""

import random
import threading

import numpy as np
import pytest
import torch
from helpers.decoders import codes_of, cut, opened

from snac48.cli import UserError
from snac48.decoder import HEADS


@pytest.fixture(scope="module")
def tts():
    return opened()


def pieces_of(total, sizes, rng):
    at = 0
    while at < total:
        n = min(rng.choice(sizes), total - at)
        yield at, at + n
        at += n


def assert_same(found, wanted):
    for a, b in zip(found, wanted, strict=True):
        assert a.shape == b.shape and (a - b).abs().max() < 1e-5


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"noise": False, "depthwise": False},
        {"encoder_rates": [3, 5, 4, 8], "decoder_rates": [8, 4, 5, 3], "vq_strides": [2, 1]},
        {"attn_window_size": 8, "decoder_dim": 128},  # windows of two coarse codes
    ],
    ids=["snac_24khz", "dense, no noise", "odd rates", "attention"],
)
def test_any_piecing_has_the_samples_of_one_pass(changes):
    tts, rng = opened(**changes), random.Random(7)
    for seed in range(6):
        codes = codes_of(tts, 14 * tts.align, 2, seed)
        stream, found = tts.open_stream(2, seed), []
        for a, b in pieces_of(14, [0, 1, 1, 2, 3, 6], rng):
            found.append(stream.push(cut(tts, codes, a * tts.align, b * tts.align)))
        parts = [torch.cat(p, -1) for p in zip(*found, stream.finish())]
        assert_same(parts, tts.decode(codes, noise_seed=seed))
    assert parts[1].abs().max() > 1e-2


def test_streams_of_a_batch_stand_at_their_own_positions(tts):
    """Slots of a server: utterances of all lengths begin and end when they like, some wait."""
    rng, lengths = random.Random(3), [1, 2, 3, 5, 8, 13, 4]
    utterances = [codes_of(tts, n, seed=i) for i, n in enumerate(lengths)]
    stream, waiting, slots = tts.open_stream(3, noise_seed=5), list(range(len(lengths))), {}
    found = [[] for _ in lengths]
    while waiting or slots:
        for row in range(3):
            if row not in slots and waiting:
                slots[row] = [waiting.pop(0), 0]
        rows = [r for r in slots if rng.random() < 0.7 and slots[r][1] < lengths[slots[r][0]]]
        if rows:
            new = [cut(tts, utterances[u], at, at + 1) for u, at in (slots[r] for r in rows)]
            for row, audio in zip(rows, stream.push([torch.cat(c) for c in zip(*new)], rows)):
                found[slots[row][0]].append(audio)
                slots[row][1] += 1
        ended = [r for r, (u, at) in slots.items() if at == lengths[u]]
        for row, audio in zip(ended, stream.finish(ended)):
            found[slots.pop(row)[0]].append(audio)
    for codes, audio in zip(utterances, found):
        assert_same([torch.cat(p, -1) for p in zip(*audio)], tts.decode(codes, noise_seed=5))


def test_a_piece_waits_for_what_it_can_see_and_no_longer(tts):
    stream, codes = tts.open_stream(heads=["48k"]), codes_of(tts, 5)
    settled = [stream.push(cut(tts, codes, i, i + 1))[1].shape[-1] for i in range(5)]
    lag = stream.plan.lags[0]
    assert settled == [0, 0, 3 * 4096 - lag, 4096, 4096]  # the first sound with the third code
    other = [c.clone() for c in codes]
    other[2][:, -1] += 1 - 2 * (other[2][:, -1] > 0).long()  # the last code reaches lag samples to the left
    a, b = (tts.decode(c, ["48k"])[1] for c in (codes, other))
    changed = int((a != b).nonzero()[0, -1])
    assert 5 * 4096 - 1024 - lag <= changed < 5 * 4096 - 1024 - lag + 1024
    stream.state = [torch.zeros_like(x) for x in stream.state]  # the past matters
    assert (stream.finish()[1] - a[..., -lag:]).abs().max() > 1e-3


def test_long_inputs_and_streams_of_chunks_are_one_pass(tts):
    codes = codes_of(tts, 23, 2)
    whole = tts.decode(codes)
    assert_same(tts.decode(codes, chunk_seconds=0.3), whole)
    arriving = [cut(tts, codes, i, i + 2) for i in range(0, 23, 2)]
    for chunk_seconds in (0, 0.3):
        found = list(tts.stream(arriving, chunk_seconds))
        assert len(found) > 7 and all(x.shape[-1] for piece in found for x in piece)
        assert_same([torch.cat(p, -1) for p in zip(*found)], whole)
    for nothing in ([], [cut(tts, codes, 0, 0)]):
        with pytest.raises(UserError, match="no codes"):
            list(tts.stream(nothing))
    stream = tts.open_stream(2)
    assert [x.shape for x in stream.finish()] == [(2, 1, 0)] * len(HEADS)


def test_threads_share_a_model_and_a_stream(tts):
    codes = [codes_of(tts, 6, seed=i) for i in range(6)]
    alone, wrong = [tts.decode(c, noise_seed=i) for i, c in enumerate(codes)], []

    def work(i):
        for _ in range(3):
            stream = tts.open_stream(noise_seed=i)
            pieces = [stream.push(codes[i]), stream.finish()]
            for audio in (tts.decode(codes[i], noise_seed=i), [torch.cat(p, -1) for p in zip(*pieces)]):
                wrong.extend(1 for a, b in zip(audio, alone[i]) if (a - b).abs().max() > 1e-5)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(6)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert not wrong


def test_numpy_codes_and_seeds_of_each_row(tts):
    codes = codes_of(tts, 3, 2)
    both = tts.decode([c.numpy().astype(np.uint16) for c in codes], noise_seed=[4, 9])
    for i, seed in enumerate((4, 9)):
        assert_same(tts.decode([c[i : i + 1] for c in codes], noise_seed=seed), [x[i : i + 1] for x in both])
