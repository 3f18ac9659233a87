"""snac48/onnx_graphs.py: what PyTorch computes, noise on, for any batch, length and piecing."""

import json

import numpy as np
import onnx
import onnxruntime
import pytest
from helpers.decoders import codes_of, cut, opened

from snac48 import onnx_graphs


@pytest.fixture(scope="module")
def tts():
    """Two blocks of layers instead of four: tracing takes most of the time."""
    return opened(encoder_rates=[16, 32], decoder_rates=[32, 16], decoder_dim=16)


@pytest.fixture(scope="module")
def files(tts, tmp_path_factory):
    folder, told = tmp_path_factory.mktemp("onnx"), {}
    for name, stream in (("whole", False), ("stream", True)):
        told[name] = onnx_graphs.export(tts, str(folder / name), stream)
    return folder, told


def session_of(path):
    return onnxruntime.InferenceSession(str(path))


def named(kind, values):
    return {f"{kind}_{i}": np.asarray(x) for i, x in enumerate(values)}


def test_the_whole_graph_gives_the_samples_of_decode(tts, files):
    folder, told = files
    assert (
        "codes_0 to codes_2, noise_0 to noise_2 -> audio_24k, audio_48k" in told["whole"]
        and "opset 18" in told["whole"]
    )
    session = session_of(folder / "whole")
    for batch in (1, 3):
        for n in (1, 2, 5, 11, 24):
            codes, noise = codes_of(tts, n, batch, n), onnx_graphs.noise_inputs(tts, 9, batch, 4 * n)
            found = session.run(None, named("codes", codes) | named("noise", noise))
            for a, b in zip(found, tts.decode(codes, noise_seed=9), strict=True):
                assert a.shape == b.shape and np.abs(a - b.numpy()).max() < 1e-4


def test_the_stream_graph_carries_its_state(tts, files):
    folder, _ = files
    session = session_of(folder / "stream")
    meta = json.loads(session.get_modelmeta().custom_metadata_map["snac48"])
    for batch, sizes in ((1, [1, 1, 3, 2]), (2, [4, 1, 1, 5])):
        total, codes, at, found = sum(sizes), codes_of(tts, sum(sizes), batch), 0, []
        state = [np.zeros((batch, *shape), np.float32) for shape in meta["state"]]
        padding = -(-meta["ahead"] // 4)
        for n in (*sizes, padding):
            noise = onnx_graphs.noise_inputs(tts, 9, batch, 4 * n, 4 * at)
            piece = cut(tts, codes, at, at + n)
            if at == total:
                piece = [np.zeros((batch, n * f), np.int64) for f in (1, 2, 4)]
            place = {"position": np.full(batch, 4 * at), "end": np.full(batch, 4 * total)}
            given = named("codes", piece) | named("noise", noise) | place | named("state", state)
            audio_24k, audio_48k, *state = session.run(None, given)
            found.append((audio_24k, audio_48k))
            at += n
        for parts, lag, whole in zip(zip(*found), meta["lag"], tts.decode(codes, noise_seed=9)):
            samples = np.concatenate(parts, -1)[..., lag : lag + whole.shape[-1]]
            assert np.abs(samples - whole.numpy()).max() < 1e-4


def test_stored_weights_are_smaller_and_close(tts, files):
    folder, _ = files
    whole = onnx.load(folder / "whole")
    size, codes = whole.ByteSize(), codes_of(tts, 6)
    given = named("codes", codes) | named("noise", onnx_graphs.noise_inputs(tts, 0, 1, 24))
    exact = onnxruntime.InferenceSession(whole.SerializeToString()).run(None, given)[1]
    for weights, worst in (("fp16", 2e-3), ("int8", 0.2)):
        proto = onnx.load(folder / "whole")
        onnx_graphs.store(proto, weights)
        found = onnxruntime.InferenceSession(proto.SerializeToString()).run(None, given)[1]
        assert proto.ByteSize() < size and 0 < np.abs(found - exact).max() < worst
