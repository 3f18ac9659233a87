"""The full codec as a thing to train: straight-through quantizers, their losses, dead entries, and a start
from nothing.

Used by recipe phase10 with --no-freeze_encoder / --no-freeze_vq, and by --from_scratch MODEL_CONFIG.json. A
residual quantizer that starts at random collapses to one entry a codebook within 100 steps, and an
autoencoder without codebooks needs many thousand steps before its latents tell vowels apart. So a codec from
scratch starts from what is known about speech:

1. start_from_features: we want the latents to be log-mel features, and how periodic each frame is at which
   pitch: without that the codes cannot carry a voice, and what is trained on them whispers. With that the
   quantizers are settled: in_proj and out_proj are principal components of what the quantizers before left,
   the entries k-means centres. Every convolution begins with outputs of mean 0 and a set variance on real
   speech (LSUV, Mishkin & Matas 2015): with PyTorch's default start the signal dies in 30 layers.
2. phase "features": the encoder learns the features (a regression), the decoder to speak from the quantized
   true ones. Neither waits for the other.
3. phase "main": the codec as it will be used, end to end.
"""

import itertools
import math

import torch
import torch.nn.functional as F
from snac.layers import NoiseBlock, ResidualUnit
from torch import nn

from .losses import mel_filters


class FullCodec(nn.Module):
    """Audio in, audio out, through encoder and quantizers of a DualHeadDecoder that has an encoder.

    align: SNAC's padding unit in samples (codec.align_samples); pitch: as of features.
    forward(audio [B, 1, N], N whole coarse codes) -> (audio of each of HEADS as from the decoder, losses
    {commitment, codebook}, each [B], codes [K] of [B, T_k], latents [K] of [B, D, T_k]); with `from_features`
    the loss is features, the encoder's error, and there are no codes.
    """

    from_features = False

    def __init__(self, model, align: int, pitch: int = 0):
        super().__init__()
        self.model, self.align, self.pitch = model, align, pitch

    def encode(self, audio):
        """audio [B, 1, N] -> z [B, D, T], padded as SNAC pads."""
        return self.model.encoder(F.pad(audio, (0, -audio.shape[-1] % self.align)))

    def forward(self, audio):
        z, codes, latents = self.encode(audio), [], []
        with torch.autocast(z.device.type, enabled=False):  # bf16 would pick other codes than encode()
            if self.from_features:
                with torch.no_grad():
                    wanted = features(audio, z.shape[1], z.shape[-1], self.pitch)
                    z_q, _ = self.model.quantizer(wanted)
                losses = {"features": (z.float() - wanted).square().mean((1, 2))}
            else:
                z_q, losses, codes, latents = quantize(self.model.quantizer, z.float())
        heard = [x if x is None else x[..., : audio.shape[-1]] for x in self.model(z_q, ("24k",))]
        return tuple(heard), losses, codes, latents


def quantize(quantizer, z):
    """SNAC's residual quantization with gradients: z [B, D, T] -> (z' [B, D, T], losses, codes, latents as of
    FullCodec). Nearest entries, straight-through; commitment pulls latents to their entries, codebook entries
    to their latents (van den Oord et al. 2017)."""
    residual, total, codes, latents, losses = z, 0, [], [], {"commitment": 0, "codebook": 0}
    for vq in quantizer.quantizers:
        e = vq.in_proj(F.avg_pool1d(residual, vq.stride, vq.stride))  # [B, 8, T / stride]
        entry, nearest = vq.decode_latents(e)
        codes.append(nearest)
        latents.append(e.detach())
        losses["commitment"] = losses["commitment"] + (e - entry.detach()).square().mean((1, 2))
        losses["codebook"] = losses["codebook"] + (entry - e.detach()).square().mean((1, 2))
        out = vq.out_proj(e + (entry - e).detach()).repeat_interleave(vq.stride, dim=-1)
        total, residual = total + out, residual - out
    return total, losses, codes, latents


# ---- codebooks in use ----


def usage(counts) -> dict:
    """Of one codebook, counts int64 [size]: share of entries that occur, and exp of the entropy."""
    p = counts.double() / counts.sum().clamp(min=1)
    entropy = -(p[p > 0] * p[p > 0].log()).sum()
    return {"usage": float((counts > 0).double().mean()), "perplexity": float(entropy.exp())}


def count_codes(codes, valid, geometry):
    """How often each entry occurs in codes [K] of [B, T_k] of `valid` [B] samples: int64 [K, size]."""
    counts = torch.zeros(len(codes), geometry.codebook_size, dtype=torch.int64)
    for k, each in enumerate(codes):
        length = -(-valid // (geometry.hop_length * geometry.vq_strides[k]))
        real = torch.arange(each.shape[1], device=each.device) < length[:, None]
        counts[k] = torch.bincount(each[real], minlength=geometry.codebook_size).cpu()
    return counts


@torch.no_grad()
def restart_dead_entries(vq, counts, latents, optimizer, generator) -> int:
    """Move the entries that never occurred (counts int64 [size]) to random latents [B, D, T] and forget their
    momentum. Returns how many."""
    weight = vq.codebook.weight
    dead = torch.nonzero(counts.to(weight.device) == 0)[:, 0]
    points = latents.transpose(1, 2).flatten(0, 1)
    pick = torch.randint(len(points), (len(dead),), generator=generator).to(points.device)
    weight[dead] = points[pick].to(weight.dtype)
    for value in optimizer.state.get(weight, {}).values():
        if torch.is_tensor(value) and value.shape == weight.shape:
            value[dead] = 0
    return len(dead)


# ---- from scratch ----


def features(audio, channels: int, frames: int, pitch: int = 0):
    """What we want the latents of a codec from scratch to be: audio [B, 1, N] -> [B, channels, frames].
    Natural log of min(80, channels - pitch) mel bands, halved to about unit variance, two hops long, frame t
    centred on its hop of N / frames samples; then `pitch` channels of periodicity; further channels are 0."""
    hop, bands = audio.shape[-1] // frames, min(80, channels - pitch)
    size = 2 * hop
    x = F.pad(audio[:, 0].float(), ((size - hop) // 2, size - hop - (size - hop) // 2))
    window = torch.hann_window(size, device=x.device)
    s = torch.stft(x, size, hop, window=window, center=False, return_complex=True).abs()
    mel = (mel_filters(24000, size, bands).to(x.device) @ s + 1e-2).log() / 2
    found = [mel, periodicity(audio[:, 0].float(), frames, pitch)] if pitch else [mel]
    return F.pad(torch.cat(found, 1), (0, 0, 0, channels - bands - pitch))


PITCH_HZ = (70.0, 400.0)
PITCH_WINDOW = 1024  # samples at 24 kHz: three periods of 70 Hz


def periodicity(x, frames: int, channels: int):
    """How far each frame repeats itself after a lag: x [B, N] at 24 kHz -> [B, channels, frames]. Normalised
    cross-correlation (Talkin 1995), -1 to 1, at lags of 1/400 to 1/70 s, the largest of each of `channels`
    logarithmic bands, high pitch first. A mel spectrum of 43 ms cannot tell harmonics of 100 Hz apart."""
    hop, (low, high) = x.shape[-1] // frames, PITCH_HZ
    longest = math.ceil(24000 / low)
    edges = torch.linspace(math.log(24000 / high), math.log(longest + 1), channels + 1).exp().round().long()
    size = PITCH_WINDOW + longest
    before = (size - hop) // 2
    parts = F.pad(x, (before, size - hop - before)).unfold(-1, size, hop)  # [B, frames, size]
    fast = 1 << (size + PITCH_WINDOW).bit_length()
    head = torch.fft.rfft(parts[..., :PITCH_WINDOW], fast)
    products = torch.fft.irfft(head.conj() * torch.fft.rfft(parts, fast), fast)[..., : longest + 1]
    power = F.pad(parts.double().square().cumsum(-1), (1, 0))
    energy = (power[..., PITCH_WINDOW:] - power[..., :-PITCH_WINDOW]).float()[..., : longest + 1]  # by lag
    # 1e-4 a sample, -40 dB: what is silent has no pitch
    alike = products / ((energy[..., :1] * energy).clamp(min=0).sqrt() + 1e-4 * PITCH_WINDOW)
    bands = [alike[..., a : max(b, a + 1)].amax(-1) for a, b in itertools.pairwise(edges.tolist())]
    return torch.stack(bands, 1)


@torch.no_grad()
def start_from_features(snac, audio, seed: int, pitch: int = 0) -> None:
    """Set quantizers, and the scale of every convolution, of a fresh SNAC from speech [B, 1, N]; pitch: as of
    features."""
    frames = audio.shape[-1] // int(snac.hop_length)
    z = torch.cat([features(part, snac.latent_dim, frames, pitch) for part in audio.split(256)])
    fit_quantizers(snac.quantizer, z, seed)
    few = audio[:16]
    unit_variance(snac.encoder, snac.preprocess(few), 1.0)
    # the encoder's outputs begin with mean and spread of each band: Adam would need 1,000 steps to get there
    last = [m for m in snac.encoder.modules() if isinstance(m, nn.Conv1d)][-1]
    last.parametrizations.weight.original0.mul_(z.std((0, 2))[:, None, None])
    last.bias.copy_(z.mean((0, 2)) + last.bias * z.std((0, 2)))
    unit_variance(snac.decoder, snac.quantizer(z[: len(few)])[0], 0.1)


@torch.no_grad()
def fit_quantizers(quantizer, z, seed: int) -> None:
    """Quantizers for latents z [B, D, T]: each takes principal components of the rest, entries by k-means.
    SNAC looks entries up by direction. One latent value is therefore a constant, so large that directions are
    as far apart as the other values are."""
    generator = torch.Generator().manual_seed(seed)
    for vq in quantizer.quantizers:
        points = F.avg_pool1d(z, vq.stride, vq.stride).transpose(1, 2).flatten(0, 1)  # [N, D]
        mean, parts = points.mean(0), vq.codebook.weight.shape[1] - 1
        axes = torch.linalg.eigh(torch.cov(points.T)).eigenvectors[:, -parts:].flip(1)  # [D, parts]
        values = (points - mean) @ axes
        constant = (4 * values.square().sum(1).mean().sqrt()).clamp(min=1e-3).view(1)
        set_conv(vq.in_proj, torch.cat([0 * mean[None], axes.T]), torch.cat([constant, -axes.T @ mean]))
        set_conv(vq.out_proj, torch.cat([mean[:, None] / constant, axes], 1), 0 * mean)
        latents = torch.cat([constant.expand(len(values), 1), values], 1)
        few = torch.randperm(len(latents), generator=generator)[: 12 * vq.codebook_size]
        vq.codebook.weight.copy_(kmeans(latents[few], vq.codebook_size, generator))
        z = z - vq(z)[0]


def kmeans(points, k: int, generator, rounds: int = 15):
    """points [N, D] -> centres [k, D], by direction as SNAC; an empty cluster restarts at a random point."""
    centres = points[torch.randperm(len(points), generator=generator)[torch.arange(k) % len(points)]]
    for _ in range(rounds):
        directions = F.normalize(centres).T
        index = torch.cat([(F.normalize(part) @ directions).argmax(1) for part in points.split(8192)])
        sums = torch.zeros_like(centres).index_add_(0, index, points)
        number = torch.bincount(index, minlength=k)
        empty = number == 0
        sums[empty] = points[torch.randint(len(points), (int(empty.sum()),), generator=generator)]
        centres = sums / number.clamp(min=1)[:, None]
    return centres


def set_conv(conv, weight, bias) -> None:
    """Set a pointwise weight-normed conv to weight [out, in]; copying into `.weight` would change nothing."""
    norm = weight.norm(dim=1, keepdim=True)
    norm = torch.where(norm > 1e-6 * norm.max(), norm, 0.0)
    direction = torch.where(norm > 0, weight / norm, 1.0)  # any: a row of zeros has none
    conv.parametrizations.weight.original1.copy_(direction[..., None])
    conv.parametrizations.weight.original0.copy_(norm[..., None])
    conv.bias.copy_(bias)


@torch.no_grad()
def unit_variance(module, x, last: float) -> None:
    """One pass of x through `module` in which every convolution is scaled to outputs of mean 0 and std 1
    (residual branches 0.4, noise gains 0.5, the last one `last`)."""
    convs = [m for m in module.modules() if isinstance(m, nn.Conv1d | nn.ConvTranspose1d)]
    wanted = {m.block[-1]: 0.4 for m in module.modules() if isinstance(m, ResidualUnit)}
    wanted |= {m.linear: 0.5 for m in module.modules() if isinstance(m, NoiseBlock)}
    wanted[convs[-1]] = last

    def rescale(conv, _, out):
        mean = out.mean((0, 2))
        by_channel = isinstance(conv, nn.Conv1d)  # a transposed one has its gains on the input side
        std = (out - mean[:, None]).std((0, 2) if by_channel else None)
        # a channel that gets nothing (latents beyond the mel bands) keeps its gain: 1 / 0 would explode later
        scale = torch.where(std > 1e-3 * std.max(), wanted.get(conv, 1.0) / std, 1.0)
        conv.parametrizations.weight.original0.mul_(scale.view(-1, 1, 1) if by_channel else scale)
        if conv.bias is not None:
            conv.bias.copy_((conv.bias - mean) * scale)
            out = out - mean[:, None]
        return out * (scale[:, None] if by_channel else scale)

    hooks = [c.register_forward_hook(rescale) for c in convs]
    module(x)
    for h in hooks:
        h.remove()
