"""Geometry, slices and encoding: which samples belong to which codes."""

import numpy as np
import pytest
import torch
from conftest import make_snac, voice

from snac48.codec import encode, geometry_of, receptive_reach, slice_at


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
    codes = [torch.randint(g.codebook_size, (1, total * g.per_coarse[k])) for k in range(len(g.vq_strides))]
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


def test_long_files_are_encoded_in_chunks_with_the_same_codes(snac):
    audio = torch.from_numpy(voice(9.0, 24000, 5))[None, None]
    for a, b in zip(snac.encode(audio), encode(snac, audio, max_seconds=2.0)):
        assert torch.equal(a, b)


def test_encoding_is_ieee_fp32_whatever_the_process_has_switched_on(snac):
    """TF32 or bf16 change codes; what a training has chosen stays for the training."""
    backends, seen = torch.backends, []
    kinds = (backends.cuda.matmul, backends.cudnn.conv, backends.mkldnn.matmul, backends.mkldnn.conv)
    audio = torch.from_numpy(voice(1.0, 24000, 1))[None, None]
    wanted = encode(snac, audio)
    note = lambda *_: seen.append([k.fp32_precision for k in kinds] + [torch.is_autocast_enabled("cpu")])
    handle = snac.encoder.register_forward_pre_hook(note)
    before = [k.fp32_precision for k in kinds]
    try:
        for kind, precision in zip(kinds, ("tf32", "tf32", "bf16", "bf16")):
            kind.fp32_precision = precision
        with torch.autocast("cpu", torch.bfloat16):
            found = encode(snac, audio)
            assert torch.is_autocast_enabled("cpu")
            assert [k.fp32_precision for k in kinds] == ["tf32", "tf32", "bf16", "bf16"]
    finally:
        handle.remove()
        for kind, precision in zip(kinds, before):
            kind.fp32_precision = precision
    assert seen == [["ieee"] * 4 + [False]]
    assert all(torch.equal(a, b) for a, b in zip(wanted, found))


def test_another_model_has_another_hash():
    assert geometry_of(make_snac(1), "").weights_sha256 != geometry_of(make_snac(2), "").weights_sha256
