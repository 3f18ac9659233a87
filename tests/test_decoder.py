"""snac48/decoder.py: the dual-head model and its noise."""

import math

import pytest
import torch
from conftest import make_snac
from snac import SNAC

from snac48.cli import UserError
from snac48.codec import model_config
from snac48.decoder import HEADS, DualHeadDecoder, counter_noise
from snac48.schedule import HEAD_NAMES, chosen_heads


def test_only_the_heads_asked_for_are_computed_or_there():
    codes = [torch.randint(64, (1, 2 * f)) for f in (1, 2, 4)]
    model = DualHeadDecoder(make_snac())
    assert tuple(HEADS) == HEAD_NAMES == chosen_heads("both")  # the order of every tuple of audio
    for wanted in (["24k"], ["48k"]):
        assert [x is not None for x in model(codes, wanted)] == [name in wanted for name in HEADS]
        assert DualHeadDecoder(make_snac(), wanted).heads == tuple(wanted) == chosen_heads(wanted[0])
        assert [x is not None for x in DualHeadDecoder(make_snac(), wanted)(codes)] == [
            name in wanted for name in HEADS
        ]


def test_a_44_khz_model_is_refused_with_the_reason():
    with pytest.raises(UserError, match="44100 Hz"):
        DualHeadDecoder(make_snac(sampling_rate=44100))


def plain_noise(key, layer, start, length):
    """The definition, an operation after the other in int64: float32 [B, length]. Checkpoints rely on it."""

    def mix(x):
        x = (x ^ (x >> 16)) * 0x7FEB352D & 0xFFFFFFFF
        x = (x ^ (x >> 15)) * 0x846CA68B & 0xFFFFFFFF
        return x ^ (x >> 16)

    position = torch.arange(start, start + length)
    low, high = key & 0xFFFFFFFF, (key >> 32) & 0x7FFFFFFF
    stream = mix(mix(low ^ (layer * 0x9E3779B9 & 0xFFFFFFFF)) ^ high)[:, None]
    a = mix(mix(position & 0xFFFFFFFF) ^ stream)
    b = mix(a ^ mix(stream ^ (position >> 32) ^ 0x5BF03635))
    u1, u2 = (a.to(torch.float32) + 0.5) * 2.0**-32, b.to(torch.float32) * 2.0**-32
    return torch.sqrt(-2 * torch.log(u1)) * torch.cos(2 * math.pi * u2)


def test_the_noise_of_all_layers_is_the_definitions_bit_by_bit():
    key = torch.tensor([0, 42, 2**61 + 3, 2**62 - 1, 0xFFFFFFFF])
    spans = [(0, 0, 9000), (1, 37, 1), (3, 2**31 - 500, 1000), (7, 24000 * 3600, 4001)]
    for extra in ([], [(4, 2**32 - 300, 700)]):  # past the 32 bits of a position: 25 hours
        found = counter_noise(key, spans + extra, "cpu")
        for (layer, start, n), noise in zip(spans + extra, found, strict=True):
            assert noise.shape == (5, 1, n) and torch.equal(noise[:, 0], plain_noise(key, layer, start, n))
    starts = [5, 700, 2**32 - 300, 0, 1]  # each item at its own position
    noise = counter_noise(key, [(3, starts, 40), (1, starts, 7)], "cpu")[0][:, 0]
    for i, start in enumerate(starts):
        assert torch.equal(noise[i : i + 1], plain_noise(key[i : i + 1], 3, start, 40))
    assert key.tolist() == [0, 42, 2**61 + 3, 2**62 - 1, 0xFFFFFFFF]


def test_noise_is_a_function_of_key_layer_and_position():
    key = torch.tensor([1, 2**61 + 3])
    n, other = (x[:, 0] for x in counter_noise(key, [(2, 0, 100000), (3, 0, 100000)], "cpu"))
    assert torch.equal(counter_noise(key, [(2, 7000, 50)], "cpu")[0][:, 0], n[:, 7000:7050])
    assert abs(n.mean()) < 0.01 and abs(n.std() - 1) < 0.01 and 4 < n.abs().max() < 7
    for a, b in ((n[0], n[1]), (n[0], other[0]), (n[0, 1:], n[0, :-1])):
        assert abs(float((a * b).mean())) < 0.02


def test_every_noise_layer_gets_its_own_noise_in_few_operations():
    """At its own rate and place, whichever heads are decoded; it was some 80 operations a layer."""
    from torch.utils._python_dispatch import TorchDispatchMode

    class Count(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            calls.append((function, args))
            return function(*args, **kwargs or {})

    model, seen, calls = DualHeadDecoder(make_snac()).eval(), {}, []
    for m in model.noises:
        m.register_forward_pre_hook(lambda m, x: seen.update({m.layer: m.noise[:, 0]}))
    key = torch.tensor([7, 2**40])
    codes = [torch.randint(64, (2, 3 * f)) for f in (1, 2, 4)]
    for heads, layers in ((None, range(5)), (["24k"], range(4))):
        seen.clear()
        model.set_noise(key)
        model(codes, heads)
        assert sorted(seen) == [*layers] and all(m.noise is None for m in model.noises)
        for i, rate in zip(layers, (8, 64, 256, 512, 1024)):
            assert torch.equal(seen[i], plain_noise(key, i, 0, 12 * rate))
    with Count():
        counter_noise(key, [(i, 0, 64) for i in range(5)], "cpu")
    views = ("view", "expand", "split", "slice", "unsqueeze", "detach", "lift")
    sizes = [max(a.numel() for a in args if torch.is_tensor(a)) for f, args in calls
             if not any(w in str(f) for w in views) and any(map(torch.is_tensor, args))]  # fmt: skip
    assert sum(n > 10 for n in sizes) <= 46 and len(sizes) <= 86  # small: on the CPU where the key lies there


def test_codes_past_the_end_do_not_change_what_lies_before():
    model = DualHeadDecoder(make_snac()).eval()
    codes = [torch.randint(64, (1, 8 * f)) for f in (1, 2, 4)]
    padded = [torch.cat([c, torch.full((1, 5 * f), -1)], 1) for c, f in zip(codes, (1, 2, 4))]
    model.set_noise(torch.tensor([5]))
    a, b = model(codes), model(padded)
    n = 4 * 2048  # away from the end, whose neighbours are biases instead of padding
    assert torch.allclose(a[0][..., :n], b[0][..., :n], atol=1e-6)
    zero = [torch.cat([c, torch.zeros(1, 5 * f, dtype=torch.long)], 1) for c, f in zip(codes, (1, 2, 4))]
    n = 8 * 2048
    assert not torch.allclose(model(zero)[0][..., :n], b[0][..., :n], atol=1e-4)  # 0 is a real code


def test_the_recorded_model_config_rebuilds_the_model(snac):
    shapes = lambda model: {k: v.shape for k, v in model.state_dict().items()}
    assert shapes(SNAC(**model_config(snac))) == shapes(snac)
