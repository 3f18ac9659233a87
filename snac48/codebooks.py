"""The full codec as a thing to train: straight-through quantizers, their losses, dead entries, and a start
from nothing.

Used by recipe phase10 with --no-freeze_encoder / --no-freeze_vq, and by --from_scratch MODEL_CONFIG.json. A
residual quantizer that starts at random collapses to one entry a codebook within 100 steps, and an
autoencoder without codebooks needs many thousand steps before its latents tell vowels apart. So a codec from
scratch starts from what is known about speech:

1. start_from_features: we want the latents to be log-mel features, and a wave with pitch and phase of the
   voice's fundamental: without that the codes carry no voice, and what is trained on them whispers. With that
   the quantizers are settled: in_proj and out_proj are principal components of what the quantizers before
   left, the entries k-means centres. Every convolution begins with outputs of mean 0 and a set variance on
   real speech (LSUV, Mishkin & Matas 2015): with PyTorch's default start the signal dies in 30 layers.
2. phase "features": the encoder learns the features (a regression), the decoder to speak from the quantized
   true ones. Neither waits for the other.
3. phase "main": the codec as it will be used, end to end.
"""

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
    Natural log of min(80, channels) mel bands, halved to about unit variance, two hops long, frame t centred
    on its hop of N / frames samples; with `pitch` the channels of voice_features; further channels are 0."""
    hop, voiced = audio.shape[-1] // frames, pitch + 5 if pitch else 0
    size, bands = 2 * hop, min(80, channels - voiced)
    x = F.pad(audio[:, 0].float(), ((size - hop) // 2, size - hop - (size - hop) // 2))
    window = torch.hann_window(size, device=x.device)
    s = torch.stft(x, size, hop, window=window, center=False, return_complex=True).abs()
    mel = (mel_filters(24000, size, bands).to(x.device) @ s + 1e-2).log() / 2
    found = [mel, voice_features(audio[:, 0].float(), frames, pitch)] if pitch else [mel]
    return F.pad(torch.cat(found, 1), (0, 0, 0, channels - bands - voiced))


PITCH_HZ = (70.0, 400.0)
PITCH_WINDOW = 1024  # samples at 24 kHz that are compared with what lies a lag later
PHASE_WINDOW = 1440  # 60 ms: under Hann, harmonics of 70 Hz don't reach into each other


def voice_features(x, frames: int, samples: int):
    """What mel bands don't tell of a voice: x [B, N] at 24 kHz -> [B, samples + 5, frames].

    `samples` values a frame of a cosine with frequency and phase of the fundamental: magnitudes alone leave
    the phase open from frame to frame, and a decoder that cannot know it makes noise. As a wave it passes the
    linear projections of a quantizer; a frame of 512 samples needs 16 of it for 375 Hz. Then, for the slower
    quantizers, how high it is: 1, cos a, sin a, cos 2a, sin 2a with a = 0 to pi from 70 to 400 Hz. All of it
    times how voiced the frame is."""
    hop, low = x.shape[-1] // frames, math.log(PITCH_HZ[0])
    voiced, hz, phase = fundamental(x, frames)
    at = ((torch.arange(samples, device=x.device) + 0.5) / samples - 0.5) * hop / 24000  # s from the centre
    wave = 1.5 * torch.cos(phase[:, None] + 2 * math.pi * hz[:, None] * at[:, None])
    a = math.pi * ((hz.log() - low) / (math.log(PITCH_HZ[1]) - low)).clamp(0, 1)
    height = 3 * torch.stack([torch.ones_like(a), a.cos(), a.sin(), (2 * a).cos(), (2 * a).sin()], 1)
    return torch.cat([wave, height], 1) * voiced[:, None]


def fundamental(x, frames: int):
    """Of each frame how voiced it is (0 to 1), its pitch in Hz, the phase of the fundamental in its middle:
    x [B, N] at 24 kHz -> three times [B, frames]. The lag of the largest normalised cross-correlation (Talkin
    1995), where a shorter one counts a little more, because multiples of a period repeat, too."""
    short, long = int(24000 / PITCH_HZ[1]), math.ceil(24000 / PITCH_HZ[0])
    parts = around_frames(x, frames, PITCH_WINDOW + long)
    fast = 1 << (parts.shape[-1] + PITCH_WINDOW).bit_length()
    head = torch.fft.rfft(parts[..., :PITCH_WINDOW], fast)
    products = torch.fft.irfft(head.conj() * torch.fft.rfft(parts, fast), fast)[..., : long + 1]
    power = F.pad(parts.double().square().cumsum(-1), (1, 0))
    energy = (power[..., PITCH_WINDOW:] - power[..., :-PITCH_WINDOW]).float()  # by lag
    # 1e-4 a sample, -40 dB: what is silent has no pitch
    alike = products / ((energy[..., :1] * energy).clamp(min=0).sqrt() + 1e-4 * PITCH_WINDOW)
    lags = torch.arange(short, long + 1, device=x.device)
    favour = 1 - 0.15 * (lags / short).log() / math.log(long / short)
    best = (alike[..., short:] * favour).argmax(-1)
    voiced = ((alike[..., short:].gather(-1, best[..., None])[..., 0] - 0.3) / 0.4).clamp(0, 1)
    hz = 24000 / lags[best].float()
    parts = around_frames(x, frames, PHASE_WINDOW) * torch.hann_window(PHASE_WINDOW, device=x.device)
    t = (torch.arange(PHASE_WINDOW, device=x.device) - PHASE_WINDOW // 2) / 24000
    turn = 2 * math.pi * hz[..., None] * t
    return voiced, hz, torch.atan2(-(parts * turn.sin()).sum(-1), (parts * turn.cos()).sum(-1))


def around_frames(x, frames: int, size: int):
    """x [B, N] -> [B, frames, size]: the samples around the middle of each frame, 0 beyond the ends."""
    hop = x.shape[-1] // frames
    before = (size - hop) // 2
    return F.pad(x, (before, size - hop - before)).unfold(-1, size, hop)


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
