"""Make the demonstration codec: a small SNAC with snac_24khz's geometry, trained on a CPU in under an hour.

    python assets/make_codec.py --data_dir klettres/usr/share/klettres
        fillets/usr/share/games/fillets-ng/sound \\ --exclude assets/codec/held_out.txt --output_dir
assets/codec --ae_steps 1200 --decoder_steps 1200

(the packages klettres-data, fillets-ng-data-cs and fillets-ng-data-nl, unpacked with `dpkg -x`). How:

1. Every convolution starts with outputs of zero mean and unit variance on real speech (LSUV, Mishkin &
   Matas 2015). PyTorch's default start lets the signal die in 30 layers: the loss then stays on a plateau
of speech-shaped noise. 2. An autoencoder without codebooks: each quantizer's in_proj and out_proj are a
   linear bottleneck of 8 values. From half-way on the latents are whitened (the function stays the same)
   and put on the sphere, where SNAC's nearest-neighbour search happens.
3. The codebooks are spherical k-means centres of the latents, each on what the one before it left.
   Encoder and quantizer stay frozen from here on, so the entries keep being used as k-means spread them.
4. The decoder learns to speak from the quantized latents.

A quantizer trained from a random start collapses to one entry a codebook within 100 steps.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
from pathlib import Path

import numpy as np
import snac
import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from corpus import AudioError, find_audio, read_audio, resample
from dual_head import lsd, mel_filters
from runlog import UserError, main_guard, write_json

CROP = 8 * 2048  # samples: 8 coarse codes, 0.68 s
CONFIG = {
    "sampling_rate": 24000,
    "encoder_dim": 12,
    "encoder_rates": [2, 4, 8, 8],
    "decoder_dim": 256,
    "decoder_rates": [8, 8, 4, 2],
    "attn_window_size": None,
    "codebook_size": 4096,
    "codebook_dim": 8,
    "vq_strides": [4, 2, 1],
    "noise": True,
    "depthwise": True,
}

# ---- data ----


def load_stream(data_dirs, excluded: set[str], seed: int):
    """(all training speech in shuffled order as int16 [samples], loud parts at RMS 0.08; held-out clips
    [n])."""
    clips, held_out, found = [], [], set()
    files = [(Path(d), rel) for d in data_dirs for rel in find_audio(d)]
    for i in np.random.default_rng(seed).permutation(len(files)):
        folder, rel = files[i]
        try:
            x = resample(*read_audio(folder / rel), 24000)
        except AudioError as e:
            print(f"left out {rel}: {e}", flush=True)
            continue
        if rel in excluded:
            found.add(rel)
            held_out.append((rel, x[: 6 * 24000]))
            continue
        frames = x[: len(x) // 480 * 480].reshape(-1, 480)
        power = (frames**2).mean(1) if len(frames) else np.zeros(1)
        if power.max() > 1e-6:  # silence teaches nothing
            level = math.sqrt(power[power > 0.01 * power.max()].mean())
            clips.append(((x * (0.08 / level)).clip(-1, 1) * 32767).astype(np.int16))
    if excluded - found:
        raise UserError(
            f"--exclude names {len(excluded - found)} files that don't exist, such as {min(excluded - found)}"
        )
    return np.concatenate(clips), [x for _, x in sorted(held_out, key=lambda p: p[0])]


def draw_batch(stream, batch: int, length: int, rng):
    """Random crops at random gain (-8 to +8 dB), pauses skipped: [batch, 1, length]."""
    crops = []
    while len(crops) < batch:
        start = rng.integers(len(stream) - length)
        x = stream[start : start + length].astype(np.float32) / 32767
        peak = np.abs(x).max()
        if peak > 0.02:
            crops.append(x * min(10 ** (rng.uniform(-8, 8) / 20), 0.99 / peak))
    return torch.from_numpy(np.stack(crops))[:, None]


# ---- loss ----


def magnitude(x, n_fft: int):
    """[B, 1, N] -> [B, F, T], Hann, hop n_fft / 4, zero padding."""
    window = torch.hann_window(n_fft)
    s = torch.stft(x[:, 0], n_fft, n_fft // 4, window=window, pad_mode="constant", return_complex=True)
    return (s.real**2 + s.imag**2 + 1e-10).sqrt()


def log_mel(x):
    return (mel_filters(24000, 1024) @ magnitude(x, 1024)).clamp(min=1e-2).log()


def audio_loss(y, x):
    """L1 + 2 x log-mel L1 + mean over STFT sizes of spectral convergence + log-magnitude L1."""
    loss = (y - x).abs().mean() + 2 * (log_mel(y) - log_mel(x)).abs().mean()
    for n_fft in (2048, 1024, 512, 256):
        a, b = magnitude(y, n_fft), magnitude(x, n_fft)
        logs = (a.clamp(min=1e-2).log() - b.clamp(min=1e-2).log()).abs().mean()
        loss = loss + ((a - b).norm() / b.norm() + logs) / 4
    return loss


# ---- start, bottleneck, codebooks ----


def bottleneck(model, z, sphere: bool):
    """The quantizers without codebooks: z [B, D, T] -> z' [B, D, T], and each one's latents [B, 8, T /
    stride]."""
    residual, total, latents = z, 0, []
    for vq in model.quantizer.quantizers:
        e = vq.in_proj(F.avg_pool1d(residual, vq.stride, vq.stride))
        latents.append(e.detach())
        if sphere:
            e = F.normalize(e, dim=1) * e.shape[1] ** 0.5
        out = vq.out_proj(e).repeat_interleave(vq.stride, dim=-1)
        total, residual = total + out, residual - out
    return total, latents


@torch.no_grad()
def start_with_unit_variance(model, x) -> None:
    """Data-dependent start: one forward pass in which every convolution is scaled to mean 0 and a chosen
    std."""
    wanted = {model.decoder.model[-2]: 0.1}  # the waveform
    for m in model.modules():
        if isinstance(m, snac.layers.ResidualUnit):
            wanted[m.block[-1]] = 0.4
        if isinstance(m, snac.layers.NoiseBlock):
            wanted[m.linear] = 0.1

    def rescale(conv, _, out):
        mean = out.mean((0, 2))
        by_channel = isinstance(conv, torch.nn.Conv1d)  # a transposed one has its gains on the input side
        std = (out - mean[:, None]).std((0, 2) if by_channel else None) + 1e-8
        scale = wanted.get(conv, 1.0) / std
        conv.parametrizations.weight.original0.mul_(scale.view(-1, 1, 1) if by_channel else scale)
        column = scale[:, None] if by_channel else scale
        if conv.bias is None:
            return out * column
        conv.bias.copy_((conv.bias - mean) * scale)
        return (out - mean[:, None]) * column

    convs = [m for m in model.modules() if isinstance(m, (torch.nn.Conv1d, torch.nn.ConvTranspose1d))]
    hooks = [c.register_forward_hook(rescale) for c in convs]
    model.decoder(bottleneck(model, model.encoder(x), False)[0])
    for h in hooks:
        h.remove()


def set_conv(conv, weight, bias) -> None:
    """Set a pointwise weight-normed conv; copying into `.weight` would change nothing."""
    conv.parametrizations.weight.original1.copy_(weight[..., None])
    conv.parametrizations.weight.original0.copy_(weight.norm(dim=1).view(-1, 1, 1))
    conv.bias.copy_(bias)


@torch.no_grad()
def whiten(model, z) -> None:
    """Latents get mean 0 and covariance 1, out_proj the inverse: the same function, directions that all
    count."""
    residual = z
    for vq in model.quantizer.quantizers:
        e = vq.in_proj(F.avg_pool1d(residual, vq.stride, vq.stride))
        residual = residual - vq.out_proj(e).repeat_interleave(vq.stride, dim=-1)
        points = e.transpose(1, 2).flatten(0, 1)
        mean, (variance, axes) = points.mean(0), torch.linalg.eigh(torch.cov(points.T))
        std = variance.clamp(min=variance.max() * 1e-4).sqrt()
        w_in, w_out, b_in = (
            vq.in_proj.weight[..., 0].clone(),
            vq.out_proj.weight[..., 0].clone(),
            vq.in_proj.bias.clone(),
        )
        to, back = (axes / std).T, axes * std
        set_conv(vq.in_proj, to @ w_in, to @ (b_in - mean))
        set_conv(vq.out_proj, w_out @ back, w_out @ mean + vq.out_proj.bias)


def spherical_kmeans(points, k: int, rounds: int = 12):
    """points [N, D] -> unit centres [k, D]; an empty cluster restarts at a random point."""
    points = F.normalize(points)
    centres = points[torch.randperm(len(points))[torch.arange(k) % len(points)]]
    for _ in range(rounds):
        index = torch.cat([(part @ centres.T).argmax(1) for part in points.split(8192)])
        sums = torch.zeros_like(centres).index_add_(0, index, points)
        empty = torch.bincount(index, minlength=k) == 0
        sums[empty] = points[torch.randint(len(points), (int(empty.sum()),))]
        centres = F.normalize(sums)
    return centres


@torch.no_grad()
def make_codebooks(model, z) -> None:
    for vq in model.quantizer.quantizers:
        e = vq.in_proj(F.avg_pool1d(z, vq.stride, vq.stride)).transpose(1, 2).flatten(0, 1)
        points = e if len(e) < 100000 else e[torch.randperm(len(e))[:100000]]
        vq.codebook.weight.copy_(
            spherical_kmeans(points, vq.codebook_size) * vq.codebook.weight.shape[1] ** 0.5
        )
        z = z - vq(z)[0]


# ---- report ----


@torch.no_grad()
def measure(model, clips, seed: int) -> tuple[dict, list]:
    """Mean LSD (AP-BWE's) and log-mel distance of decode(encode(clip)), and the codes of all clips."""
    torch.manual_seed(seed)  # the NoiseBlocks draw fresh noise
    rows, codes = [], []
    for clip in clips:
        x = torch.from_numpy(clip)[None, None]
        codes.append(model.encode(x))
        y = model.decode(codes[-1])[..., : x.shape[-1]]
        d = float(lsd(y[0], x[0], torch.tensor([x.shape[-1]]), 24000))
        rows.append((d, float((log_mel(y) - log_mel(x)).abs().mean())))
    means = np.mean(rows, 0)
    return {"lsd": round(float(means[0]), 4), "log_mel": round(float(means[1]), 4)}, codes


def entries_used(codes, size: int) -> dict:
    """Of one codebook: entries that occur, their share, exp of the entropy."""
    p = torch.bincount(codes, minlength=size) / len(codes)
    entropy = -(p[p > 0] * p[p > 0].log()).sum()
    used = int((p > 0).sum())
    return {
        "tokens": len(codes),
        "used": used,
        "share": round(used / size, 4),
        "perplexity": round(math.exp(entropy)),
    }


def save(model, folder: Path) -> None:
    """config.json and pytorch_model.bin for SNAC.from_pretrained; float16 halves the file, loading casts
    back."""
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / "config.json", CONFIG)
    torch.save({k: v.detach().half() for k, v in model.state_dict().items()}, folder / "pytorch_model.bin")


# ---- main ----


def optimise(module) -> torch.optim.Optimizer:
    """AdamW; Snake's alpha at a tenth of the rate: 1/alpha explodes when a large step takes it near 0."""
    alphas = [p for name, p in module.named_parameters() if name.endswith("alpha")]
    others = [p for name, p in module.named_parameters() if not name.endswith("alpha")]
    groups = [{"params": others, "share": 1.0}, {"params": alphas, "share": 0.1}]
    return torch.optim.AdamW(groups, betas=(0.8, 0.99), weight_decay=0)


def parse_args():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--data_dir", nargs="+", required=True, help="folders of speech, read recursively")
    p.add_argument(
        "--exclude", required=True, help="list of paths inside a data_dir: never trained on, measured on"
    )
    p.add_argument("--output_dir", required=True, help="gets config.json, pytorch_model.bin, report.json")
    p.add_argument("--start_from", default="", help="codec whose codebooks stand: train its decoder only")
    p.add_argument("--ae_steps", type=int, default=1200, help="steps without codebooks")
    p.add_argument(
        "--decoder_steps", type=int, default=1200, help="steps of the decoder on quantized latents"
    )
    p.add_argument("--batch_size", type=int, default=6, help="crops of 0.68 s a step")
    p.add_argument("--lr", type=float, default=1.5e-3)
    p.add_argument("--kmeans_minutes", type=float, default=70, help="audio for the codebooks")
    p.add_argument("--threads", type=int, default=1, help="CPU threads")
    p.add_argument("--seed", type=int, default=42)
    return p.parse_args()


class Training:
    """Model, data and clock of one run; `step` is one optimiser step."""

    def __init__(self, args):
        self.args, self.began = args, time.time()
        self.rng = np.random.default_rng(args.seed)
        excluded = {line for line in Path(args.exclude).read_text().splitlines() if line}
        self.stream, self.clips = load_stream(args.data_dir, excluded, args.seed)
        # torch.compile cannot fuse the scripted snake of snac/layers.py; this is the same function
        snac.layers.snake = lambda x, alpha: x + (alpha + 1e-9).reciprocal() * torch.sin(alpha * x).pow(2)

    def batch(self, n: int):
        return draw_batch(self.stream, n, CROP, self.rng)

    @torch.no_grad()
    def latents(self, model, minutes: float):
        """Encoder output of that much speech: [B, D, T]."""
        batches = math.ceil(minutes * 60 * 24000 / 16 / CROP)
        return torch.cat([model.encoder(self.batch(16)) for _ in range(batches)])

    def step(self, optimizer, lr: float, speak, name: str, n: int, total: int) -> None:
        for group in optimizer.param_groups:
            group["lr"] = lr * group["share"] * min(1, (n + 1) / 100)
        x = self.batch(self.args.batch_size)
        loss = audio_loss(speak(x), x)
        optimizer.zero_grad()
        loss.backward()
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        if torch.nn.utils.clip_grad_norm_(parameters, 10.0).isfinite():
            optimizer.step()
        if (n + 1) % 50 == 0:
            print(
                f"{name} step {n + 1}/{total} loss {loss.item():.3f} {time.time() - self.began:.0f} s",
                flush=True,
            )

    def autoencoder(self):
        """Steps 1 to 3 of the manual: a codec whose codebooks stand, and whose decoder knows continuous
        latents."""
        args, model = self.args, snac.SNAC(**CONFIG)
        start_with_unit_variance(model, self.batch(16))
        encoder, decoder = torch.compile(model.encoder), torch.compile(model.decoder)
        optimizer, sphere = optimise(model), False
        for n in range(args.ae_steps):
            done = n / args.ae_steps
            if not sphere and done > 0.55:
                whiten(model, self.latents(model, 2.2))
                optimizer, sphere = optimise(model), True
            lr = args.lr * (1 if done < 0.7 else 1 - 0.8 * (done - 0.7) / 0.3)
            speak = lambda x, on=sphere: decoder(bottleneck(model, encoder(x), on)[0])  # noqa: E731
            self.step(optimizer, lr, speak, "autoencoder", n, args.ae_steps)
        whiten(model, self.latents(model, 2.2))
        make_codebooks(model, self.latents(model, args.kmeans_minutes))
        return model

    def decoder(self, model) -> None:
        """Step 4: the decoder learns to speak from quantized latents; encoder and quantizer are frozen."""
        args = self.args
        model.requires_grad_(False)
        model.decoder.requires_grad_(True)
        encoder, decoder, optimizer = (
            torch.compile(model.encoder),
            torch.compile(model.decoder),
            optimise(model.decoder),
        )

        def speak(x):
            with torch.no_grad():
                z = model.quantizer(encoder(x))[0]
            return decoder(z)

        for n in range(args.decoder_steps):
            lr = args.lr * (0.52 + 0.48 * math.cos(math.pi * n / args.decoder_steps))
            self.step(optimizer, lr, speak, "decoder", n, args.decoder_steps)


def main() -> int:
    args = parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)
    out, run = Path(args.output_dir), Training(args)
    untrained, _ = measure(snac.SNAC(**CONFIG), run.clips, args.seed)
    print(
        f"{len(run.stream) / 1440000:.0f} min of speech, {len(run.clips)} held-out clips; untrained "
        f"{untrained}",
        flush=True,
    )
    if not args.start_from:
        save(run.autoencoder(), out)
    # from the saved file, so that the decoder learns the very codes that the shipped 16-bit weights give
    model = snac.SNAC.from_pretrained(args.start_from or str(out))
    run.decoder(model)
    save(model, out)
    report(out, run.clips, run.stream, untrained, args)
    return 0


def report(folder: Path, clips, stream, untrained: dict, args) -> None:
    """Measure the saved codec and write report.json: distances on held-out clips, entries used on 45 min
    of speech."""
    model = snac.SNAC.from_pretrained(str(folder))
    trained, codes = measure(model, clips, args.seed)
    rng = np.random.default_rng(1)
    with torch.no_grad():
        codes += [
            model.encode(draw_batch(stream, 16, CROP, rng)) for _ in range(45 * 60 * 24000 // (16 * CROP))
        ]
    used = [entries_used(torch.cat([c[k].flatten() for c in codes]), 4096) for k in range(3)]
    found = {"steps": [args.ae_steps, args.decoder_steps], "speech_minutes": round(len(stream) / 1440000, 1),
             "held_out_clips": len(clips), "held_out_seconds": round(sum(map(len, clips)) / 24000, 1),
             "untrained": untrained, "trained": trained, "codebooks": used}  # fmt: skip
    write_json(folder / "report.json", found)
    print(json.dumps(found, indent=1))


if __name__ == "__main__":
    main_guard(main)
