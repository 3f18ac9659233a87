"""Starts of a new head at twice the trunk's rate (--init): what it computes before the first step.

    start_head(model, snac, "interpolate")    # the default, and the best by loss at step 0: BENCHMARKS.md

Add yours to STARTS. Weight-normed layers are set through their parametrization: copying into `.weight` of one
changes nothing.
"""

import torch
from snac.layers import NoiseBlock, WNConv1d

from .cli import UserError
from .decoder import DualHeadDecoder


def interpolate(model: DualHeadDecoder, pretrained) -> None:
    """Linear interpolation of every channel, then the 24 kHz head with its taps 2 apart, smoothed: the output
    is the 24 kHz one resampled, with faint images above 12 kHz to start from."""
    block, _, conv, _ = model.head_48k
    first_snake, up, *rest = block.block
    first_snake.alpha.fill_(1e-4)  # snake(x) = x + sin²(αx)/α -> x
    channels = up.weight.shape[0]
    taps = torch.zeros_like(up.weight)  # [C, C, 4]
    taps[range(channels), range(channels)] = torch.tensor(UP_TAPS, device=taps.device)
    up.weight = taps
    up.bias.zero_()
    for layer in rest:
        last = layer.linear if isinstance(layer, NoiseBlock) else layer.block[-1]
        last.parametrizations.weight.original0.zero_()  # gain 0; the direction stays random
        if last.bias is not None:
            last.bias.zero_()
    old = pretrained[1].weight  # [1, C, n]
    n = old.shape[-1]
    size = 2 * n + len(SMOOTH_TAPS) - 2
    spread = torch.zeros(1, channels, size, device=old.device)
    for i, share in enumerate(SMOOTH_TAPS):
        spread[..., i : i + 2 * n - 1 : 2] += share * old
    model.head_48k[2] = conv = WNConv1d(channels, 1, kernel_size=size, padding=size // 2).to(old.device)
    conv.weight = spread


# Linear: even samples are the input. And the half-band filter that the head's last conv adds against the
# images it leaves above 12 kHz.
UP_TAPS = (0.5, 1.0, 0.5, 0.0)
SMOOTH_TAPS = tuple(t / 32 for t in (-1, 0, 9, 16, 9, 0, -1))


def from_last_block(model: DualHeadDecoder, pretrained, halve) -> None:
    """The pretrained 2C -> C block of stride 2, its input channels halved to C by `halve`."""
    block, _, conv, _ = model.head_48k
    first_snake, up, *rest = block.block
    source = model.trunk[-1].block
    if source[1].stride[0] != 2:
        raise UserError(
            "--init first and average copy the last decoder block, which must have stride 2 but "
            f"has {source[1].stride[0]} in this model; use --init interpolate"
        )
    first_snake.alpha.copy_(halve(source[0].alpha[0]).reshape(1, -1, 1))
    up.weight = halve(source[1].weight)  # [2C, C, 4] -> [C, C, 4]
    up.bias.copy_(source[1].bias)
    for mine, theirs in zip(rest, source[2:]):
        mine.load_state_dict(theirs.state_dict())
    conv.weight = pretrained[1].weight.clone()


STARTS = {
    "interpolate": interpolate,
    "average": lambda *both: from_last_block(*both, lambda w: (w[0::2] + w[1::2]) / 2),
    "first": lambda *both: from_last_block(*both, lambda w: w[: len(w) // 2]),
    "random": None,  # as PyTorch made it
}


@torch.no_grad()
def start_head(model: DualHeadDecoder, snac, init: str) -> None:
    """Set `model.head_48k` in place from the model's trunk and the pretrained 24 kHz head of `snac`. Raises
    UserError where a start doesn't fit the model."""
    if STARTS[init]:
        pretrained = list(snac.decoder.model)[-3:]  # Snake1d, Conv, Tanh
        STARTS[init](model, pretrained)
        _, snake, conv, _ = model.head_48k
        snake.alpha.copy_(pretrained[0].alpha)
        conv.bias.copy_(pretrained[1].bias)
