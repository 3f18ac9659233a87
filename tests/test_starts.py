"""snac48/starts.py: what a new head computes before the first step."""

import pytest
import torch
from conftest import make_snac
from snac import SNAC

import train_dual_head as T
from snac48.cli import UserError
from snac48.decoder import DualHeadDecoder
from snac48.starts import STARTS, start_head


def started(snac, init):
    model = DualHeadDecoder(snac)
    start_head(model, snac, init)
    return model


def test_every_init_is_a_start():
    assert set(STARTS) == set(T.CHOICES["init"])


def test_at_initialisation_24k_equals_snac_decode_and_48k_is_twice_as_long(snac_dir):
    snac = SNAC.from_pretrained(str(snac_dir))
    codes = [torch.randint(64, (2, 6 * f)) for f in (1, 2, 4)]
    torch.manual_seed(1)
    expected = snac.decode(codes)
    for init in STARTS:
        model = started(SNAC.from_pretrained(str(snac_dir)), init)
        torch.manual_seed(1)
        audio_24k, audio_48k = model(codes)
        assert torch.allclose(audio_24k, expected, atol=1e-6)
        assert audio_48k.shape == (2, 1, 2 * audio_24k.shape[-1])


def test_every_init_really_sets_the_weight_normed_layers(snac_dir):
    """Copying into `.weight` of a parametrized layer has no effect: compare what the layers compute with."""
    for init in ("first", "average"):
        model = started(SNAC.from_pretrained(str(snac_dir)), init)
        source, mine = model.trunk[-1].block[1].weight, model.head_48k[0].block[1].weight
        c = mine.shape[0]
        expected = source[:c] if init == "first" else (source[0::2] + source[1::2]) / 2
        assert torch.allclose(mine, expected, atol=1e-6)
        assert torch.allclose(model.head_48k[2].weight, model.head_24k[1].weight, atol=1e-6)
    model = started(SNAC.from_pretrained(str(snac_dir)), "interpolate")
    codes = [torch.randint(64, (1, 6 * f)) for f in (1, 2, 4)]
    audio_24k, audio_48k = model(codes)
    low = [torch.fft.rfft(x[0, 0])[:3000] for x in (audio_24k, audio_48k)]  # below 6 kHz
    alike = (low[0] * low[1].conj()).sum().abs() / (low[0].norm() * low[1].norm())
    assert alike > 0.99 and 1.9 < low[1].norm() / low[0].norm() < 2.2  # twice the samples, the same sound
    assert audio_24k.std() > 1e-3  # silence would satisfy the line above too


def test_an_odd_last_stride_is_refused_where_it_does_not_fit():
    with pytest.raises(UserError, match="stride 2 but has 3"):
        started(make_snac(encoder_rates=[3, 8], decoder_rates=[8, 3], vq_strides=[2, 1]), "average")
    odd = make_snac(encoder_rates=[3, 3, 7, 7], decoder_rates=[7, 7, 3, 3], vq_strides=[8, 4, 2, 1])
    codes = [torch.zeros(1, 4 * f, dtype=torch.long) for f in (1, 2, 4, 8)]
    assert started(odd, "interpolate")(codes)[1].shape[-1] == 2 * 4 * 8 * 441
