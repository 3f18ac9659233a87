"""Decoders with random weights, ready to decode, and codes for them."""

import torch
from conftest import make_snac

from snac48.codec import geometry_of, model_config
from snac48.decoder import DualHead, DualHeadDecoder


def opened(**changes) -> DualHead:
    """Of conftest's tiny SNAC with these arguments changed."""
    snac = make_snac(**changes)
    geometry, config = geometry_of(snac, ""), model_config(snac)
    return DualHead(DualHeadDecoder(snac), geometry, config, torch.device("cpu"), "")


def codes_of(tts: DualHead, n: int, batch=1, seed=0) -> list:
    """Random codes of n coarse steps."""
    g = torch.Generator().manual_seed(seed)
    size = tts.geometry.codebook_size
    return [torch.randint(size, (batch, n * f), generator=g) for f in tts.geometry.per_coarse]


def cut(tts: DualHead, codes, a: int, b: int) -> list:
    return [c[:, a * f : b * f] for c, f in zip(codes, tts.geometry.per_coarse)]
