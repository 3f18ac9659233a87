"""Decoding codes while they come. Every convolution keeps the inputs that the next piece needs: nothing is
computed twice, and the samples are those of one pass, whatever the pieces.

    stream = tts.open_stream()
    for codes in pieces:                              # [K] of [1, T_k]: any number of coarse codes, also none
        audio_24k, audio_48k = stream.push(codes)     # [1, 1, n]: the samples that these codes settle
    audio_24k, audio_48k = stream.finish()            # the rest

SNAC's convolutions are centred: a sample is settled once the codes that it can see on its right are there
(9.3 latent frames in snac_24khz, 0.2 s). So each layer's output lags behind its input by a fixed number of
samples, the same for every stream of a batch. What lies before the first or behind the last code is held at
zero, as the padding of one pass is.
"""

import math
import threading
from dataclasses import dataclass

import torch
from snac.attention import LocalMHA
from snac.layers import DecoderBlock, NoiseBlock, ResidualUnit, Snake1d
from torch import nn
from torch.nn import functional as F

if __package__:
    from . import codec
else:  # copied beside a server
    import codec

FEW_COLUMNS = 64  # up to here a transposed convolution is faster as one matrix product on a CPU


class Pass:
    """One piece on its way through the layers.

    state: what the piece before left, a tensor a layer (None: zeros, as before an utterance); kept: what this
    one leaves. edges: (first, end), int64 [B]: latent frames at which the piece begins, and at which its
    utterance ends; None where neither is near. noise: of each noise layer, [B, 1, n]; None: without.
    rate: samples a latent frame at this layer; lag: samples by which they lie behind the latent frames.
    spans: (number of the noise layer, rate, lag) of those passed.
    """

    def __init__(self, state=None, edges=None, noise=None):
        self.state, self.edges, self.noise = state and iter(state), edges, noise and iter(noise)
        self.kept, self.spans, self.rate, self.lag = [], [], 1, 0

    def run(self, layers, x):
        """The output of `layers` for x [B, C, n]: as many latent frames, `lag` samples behind."""
        layers = list(layers)
        for i, layer in enumerate(layers):
            if isinstance(layer, DecoderBlock):
                x = self.run(layer.block, x)
            elif isinstance(layer, Snake1d) and isinstance(layers[i + 1], nn.Conv1d):
                continue  # with the convolution, as codec.run computes them
            elif isinstance(layer, nn.ConvTranspose1d):
                x = self.upsample(layer, x)
            elif isinstance(layer, nn.Conv1d):
                x = self.centred(layers[i - (i > 0 and isinstance(layers[i - 1], Snake1d)) : i + 1], layer, x)
            elif isinstance(layer, ResidualUnit):
                x = self.centred([layer], layer.block[1], x)
            elif isinstance(layer, NoiseBlock):
                x = self.add_noise(layer, x)
            elif isinstance(layer, LocalMHA):
                x = self.attend(layer, x)
            else:
                x = layer(x)
        return x

    def behind(self, x, n: int):
        """x behind the n inputs before it; the last n are kept."""
        before = x.new_zeros(*x.shape[:2], n) if self.state is None else next(self.state)
        whole = torch.cat([before, x], -1)
        self.kept.append(whole[..., whole.shape[-1] - n :].clone())
        return whole

    def centred(self, layers, conv, x):
        """Layers of which `conv` alone looks around itself; its reach is what lies before and behind x."""
        reach = conv.dilation[0] * (conv.kernel_size[0] - 1) // 2
        whole = self.behind(x, 2 * reach) if reach else x
        self.lag += reach
        return self.inside(codec.run(layers, whole)[..., reach : whole.shape[-1] - reach])

    def upsample(self, conv, x):
        """A transposed convolution, whose kernel is two strides long: every input reaches into the outputs of
        the next one; that part is kept."""
        (b, c, n), stride, weight, bias = x.shape, conv.stride[0], conv.weight, conv.bias[:, None]
        before = x.new_zeros(b, weight.shape[1], stride) if self.state is None else next(self.state)
        if not torch.compiler.is_exporting() and b * n <= FEW_COLUMNS and x.device.type == "cpu":
            y = x.transpose(1, 2).reshape(b * n, c) @ weight.to(x.dtype).view(c, -1)
            own, over = y.view(b, n, -1, 2 * stride).transpose(1, 2).split(stride, -1)  # [B, D, n, stride]
            y = own + torch.cat([before[:, :, None], over[:, :, :-1]], 2)
            y, after = y.flatten(2).add_(bias), over[:, :, -1].contiguous()
        else:
            y = F.conv_transpose1d(x, weight, conv.bias, stride)
            head = y[..., :stride] + before
            after = y[..., n * stride :] - bias
            y = torch.cat([head, y[..., stride : n * stride]], -1)
        self.kept.append(after)
        self.rate, self.lag = self.rate * stride, self.lag * stride + conv.padding[0]
        return self.inside(y)

    def add_noise(self, layer, x):
        self.spans.append((layer.layer, self.rate, self.lag))
        return x if self.noise is None else codec.add_noise(x, next(self.noise).to(x.dtype), layer.linear)

    def attend(self, layer, x):
        """Attention sees whole windows: the input waits until the lag is some of them."""
        wait = -self.lag % layer.window_size
        if wait:
            x = self.behind(x, wait)[..., : x.shape[-1]]
            self.lag += wait
        return self.inside(layer(x))

    def inside(self, x):
        """x with zeros where no utterance is, as its padding in one pass."""
        if self.edges is None:
            return x
        first, end = (edge[:, None, None] * self.rate for edge in self.edges)
        position = first - self.lag + torch.arange(x.shape[-1], device=x.device)
        return x.masked_fill((position < 0) | (position >= end), 0.0)


def advance(model, z, heads, state=None, edges=None, noise=None):
    """Latent frames z [B, D, n] through trunk and `heads` -> ([audio of each head], [lag of each], Pass)."""
    step, audio, lags = Pass(state, edges, noise), [], []
    h = step.run(model.trunk, step.inside(z))
    shared = step.rate, step.lag
    for name in heads:
        step.rate, step.lag = shared
        audio.append(step.run(model.head(name), h))
        lags.append(step.lag)
    return audio, lags, step


def blank(model, batch: int, frames: int, device):
    """Latent frames of no codes: zeros [batch, D, frames]."""
    vq = model.quantizer.quantizers[0]
    return torch.zeros(batch, vq.out_proj.out_channels, frames, dtype=vq.codebook.weight.dtype, device=device)


@dataclass(frozen=True)
class Plan:
    """What a stream of these heads carries; read off a piece of zeros."""

    heads: tuple[str, ...]
    ahead: int  # latent frames behind the last code that settle the last sample
    shapes: tuple  # of the state: [C, n] each, behind the batch
    spans: tuple  # (number, rate, lag) of each noise layer
    rates: tuple[int, ...]  # of each head: samples a latent frame
    lags: tuple[int, ...]  # of each head: samples


def plan(model, heads, window: int, device) -> Plan:
    """window: latent frames that attention sees at a time, else 1."""
    with torch.inference_mode():
        _, lags, step = advance(model, blank(model, 1, window, device), heads)
    rates = tuple(model.head_rates[name] for name in heads)
    ahead = max(math.ceil(lag / rate / window) * window for lag, rate in zip(lags, rates))
    shapes = tuple(tuple(x.shape[1:]) for x in step.kept)
    return Plan(tuple(heads), ahead, shapes, tuple(step.spans), rates, tuple(lags))


class Stream:
    """`batch` streams that are decoded together, each at its own position in its own utterance.

    seeds: of the noise, one each. A stream may be used from several threads: a call waits for the one before.
    Made by DualHead.open_stream.
    """

    def __init__(self, tts, plan: Plan, seeds: list[int]):
        self.tts, self.plan, self.batch = tts, plan, len(seeds)
        self.key, batch = torch.tensor(seeds), len(seeds)
        self.at = [0] * batch  # latent frames that each stream has been given
        none = blank(tts.model, 0, 0, tts.device)
        self.state = [none.new_zeros(batch, *shape) for shape in plan.shapes]
        self.lock = threading.Lock()

    def push(self, codes, rows=None):
        """codes [K] of [B, T_k] -> what they settle: audio [B, 1, n] of each of HEADS (None: not decoded).

        rows: numbers of the streams that these codes continue, where not all of them do: codes [K] of
        [len(rows), T_k]; returned is a list, for each row its own audio [1, 1, n] of each of HEADS. T_k of 0
        is allowed, n too. Raises UserError, before anything is decoded, for codes that are none of this
        codec's.
        """
        with self.lock, torch.inference_mode():
            chosen = self._rows(rows)
            codes = self.tts.check(codes, len(chosen), empty=True)
            z = self.tts.model.codes_to_z(codes) if codes[0].numel() else None
            return self._give(self._advance(chosen, z), rows)

    def finish(self, rows=None):
        """The samples behind those that push has given, in the same form. These streams then begin anew."""
        with self.lock, torch.inference_mode():
            chosen = self._rows(rows)
            given = [r for r in chosen if self.at[r]]
            z = blank(self.tts.model, len(given), self.plan.ahead, self.tts.device)
            found = dict(zip(given, self._advance(given, z, last=True)))
            for r in given:
                self.at[r] = 0
            for held in self.state:
                held[given] = 0
            return self._give([found.get(r) or self._nothing() for r in chosen], rows)

    def _rows(self, rows) -> list[int]:
        numbers = range(self.batch)
        chosen = list(numbers) if rows is None else rows
        if not isinstance(chosen, (list, tuple)) or not all(
            isinstance(r, int) and r in numbers for r in chosen
        ):
            raise codec.InputError(f"rows {rows!r} are not a list of streams of 0..{self.batch - 1}")
        if len(set(chosen)) < len(chosen):
            raise codec.InputError(f"rows {rows!r} name a stream twice")
        if rows is None and len(set(self.at)) > 1:
            raise codec.InputError("these streams stand at different positions: say which by rows=[...]")
        return list(chosen)

    def _nothing(self):
        return [torch.zeros(1, 1, 0, device=self.tts.device) for _ in self.plan.heads]

    def _advance(self, rows: list[int], z, last: bool = False) -> list:
        """Decode z [R, D, n] of these streams: for each row the audio [1, 1, n] of each head."""
        if z is None or not rows:
            return [self._nothing() for _ in rows]
        p, n, model, device = self.plan, z.shape[-1], self.tts.model, self.tts.device
        starts = [self.at[r] for r in rows]
        ends = starts if last else [start + n for start in starts]
        edges = None
        if last or min(starts) < p.ahead:
            edges = [torch.tensor(v, device=device) for v in (starts, ends)]
        together = len(set(starts)) == 1
        first = lambda start, rate, lag: start * rate - lag
        place = lambda *of: first(starts[0], *of) if together else [first(start, *of) for start in starts]
        spans = [(layer, place(rate, lag), n * rate) for layer, rate, lag in p.spans]
        noise = model.positioned_noise(self.key[rows], spans, device) if spans else []
        whole = rows == list(range(self.batch))
        index = torch.tensor(rows, device=device)
        state = self.state if whole else [held[index] for held in self.state]
        audio, _, step = advance(model, z, p.heads, state, edges, noise)
        if whole:
            self.state = step.kept
        else:
            for held, new in zip(self.state, step.kept):
                held[index] = new
        for r in rows:
            self.at[r] += n
        pieces, scales = [], list(zip(p.rates, p.lags))
        for start, end, *row in zip(starts, ends, *(x.split(1) for x in audio)):
            bounds = [(max(0, lag - start * rate), (end - start) * rate + lag) for rate, lag in scales]
            pieces.append([x[..., lo:hi] for x, (lo, hi) in zip(row, bounds)])
        return pieces

    def _give(self, pieces: list, rows):
        """As tuples over HEADS: joined where all streams go together, else a list."""
        if rows is not None:
            return [self.tts.by_head(zip(self.plan.heads, piece)) for piece in pieces]
        return self.tts.by_head(zip(self.plan.heads, map(torch.cat, zip(*pieces))))
