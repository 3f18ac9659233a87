"""Compare on the same held-out clips: original, base SNAC, base SNAC upsampled by sinc to 48 kHz, our two
heads.

    python evaluate.py --checkpoint checkpoints/phase12_dual_head/best_model.pt --data_dirs corpus/valid/audio
    python evaluate.py --checkpoint a/best_model.pt b/best_model.pt --data_dirs corpus/valid/audio

Checkpoints of any recipes stand beside each other: phase10 and 12 meet at 24 kHz, 11 and 12 at 48 kHz.

Writes --output (JSON), the same as a Markdown table beside it (.md), spectrograms of the three clips with
most energy (.png), and NNN_{original,base_snac,base_snac_sinc48,ours_24k,ours_48k}.wav into --samples_dir.
Every system is rounded to 16 bits before it is measured: that is what people will listen to.

Metrics (mean over clips; lower is better except si_sdr): l1 (waveform), stft (multi-resolution magnitude +
log-magnitude, as in training), mel (log-mel L1, 80 bands), si_sdr (dB, 24 kHz systems), lsd (0-24 kHz) and
lsd_12_24k (12-24 kHz) as AP-BWE defines them (48 kHz systems), visqol (with --visqol: MOS-LQO of ViSQOL's
audio mode, 48 kHz systems, higher is better), rtf (real-time factor: processing time / audio time).
"""

import argparse
import collections
import textwrap
import time
from dataclasses import dataclass
from pathlib import Path

from snac48.cli import EXIT_STOPPED, StopFlag, UserError, guarded, main_guard, pick_device, read_flags, warn


def parse_args(argv=None):
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = p.add_argument
    add("--checkpoint", nargs="+", required=True, help="checkpoints or exported folders")
    add("--data_dirs", nargs="+", required=True, help="folders of held-out recordings, 44.1 kHz or more")
    add("--pretrained_model", default="", help="base SNAC (default: where the training found it)")
    add("--segment_length", type=float, default=2.0, help="seconds a clip; shorter files are used whole")
    add("--num_samples", type=int, default=5000, help="clips at most, drawn with --seed (-1 = all)")
    add("--min_rate", type=int, default=44100, help="files below it have no 12-24 kHz band: left out")
    add("--seed", type=int, default=42, help="of the choice of clips, their place in the file, the noise")
    add("--device", default="", help="GPU number or cpu (default: a GPU where there is one, else the CPU)")
    add("--output", default="evaluation_results.json", help="the numbers; table and picture lie beside them")
    add("--samples_dir", default="comparison_samples", help="where the wavs go")
    add("--max_samples_saved", type=int, default=20, help="clips written as wav (-1 = all)")
    add("--visqol", action="store_true", help="also ViSQOL (pip install visqol-python; about 1 s a clip)")
    return read_flags(p, argv, segment_length=0, min_rate=0, seed=0)


if __name__ == "__main__":  # before torch is imported: --help and a misspelt flag answer at once
    ARGS = guarded(parse_args)

import numpy as np
import soundfile as sf
import torch

from snac48.audio import AudioError, find_audio, read_audio, resample, resampled_length, resolve_inside
from snac48.codec import geometry_of, load_snac, model_config
from snac48.decoder import HEADS, DualHead, DualHeadDecoder, load_dual_head
from snac48.files import write_json
from snac48.losses import lsd, mel_filters, spectrum, stft_loss

N_FFTS = (1024, 2048, 4096)
DRAWN = 3  # clips in the picture


@dataclass
class Signal:
    """Audio [N] at `rate` Hz, and how long its decoding took."""

    audio: torch.Tensor
    rate: int
    seconds: float = 0.0


# ---- metrics: [N] against [N], floats ----


def mel_distance(pred, target, rate: int) -> float:
    """Mean |difference| of log-mel magnitudes (Hann 2048, hop 512, natural log, floor 1e-5)."""
    filters = mel_filters(rate, 2048)
    a, b = ((filters @ spectrum(x[None], 2048, 512)[0].abs()).clamp(min=1e-5).log() for x in (pred, target))
    return float((a - b).abs().mean())


def si_sdr(pred, target) -> float:
    """Scale-invariant signal-to-distortion ratio in dB (Le Roux et al. 2019)."""
    target, pred = target.double() - target.double().mean(), pred.double() - pred.double().mean()
    scaled = target * (pred @ target) / (target @ target).clamp(min=1e-12)
    wanted, error = (x.square().sum().clamp(min=1e-12) for x in (scaled, pred - scaled))
    return float(10 * torch.log10(wanted / error))


def load_visqol():
    """(pred [N], target [N]) at 48 kHz -> MOS-LQO. Raises UserError where the package is missing."""
    try:
        from visqol import VisqolApi
    except ImportError:
        raise UserError("--visqol needs the package visqol-python: pip install visqol-python") from None
    api = VisqolApi()
    api.create(mode="audio")
    return lambda pred, target: float(
        api.measure_from_arrays(target.double().numpy(), pred.double().numpy(), 48000).moslqo
    )


def measure(pred, target, rate: int, visqol=None) -> dict:
    """All metrics that apply at this rate: [N] against [N]."""
    valid = torch.tensor([len(target)])
    found = {"l1": float((pred - target).abs().mean())}
    found["stft"] = float(stft_loss(pred[None], target[None], valid, N_FFTS))
    found["mel"] = mel_distance(pred, target, rate)
    if rate == 24000:
        return found | {"si_sdr": si_sdr(pred, target)}
    found["lsd"] = float(lsd(pred[None], target[None], valid, rate))
    found["lsd_12_24k"] = float(lsd(pred[None], target[None], valid, rate, 12000))
    return found | ({"visqol": visqol(pred, target)} if visqol else {})


def pcm16(x):
    """[N] rounded to 16 bits, as the wav that people hear."""
    return torch.round(x * 32768).clamp(-32768, 32767) / 32768


# ---- clips ----


def clips(args, g):
    """Yield (name, {rate of each head: audio [N]}) of clips of whole coarse codes, drawn with the seed."""
    files = [(d, rel) for d in args.data_dirs for rel in find_audio(d)]
    left_out, count = {}, 0
    for i in np.random.default_rng(args.seed).permutation(len(files)):
        if args.num_samples >= 0 and count >= args.num_samples:
            break
        root, rel = files[i]
        try:
            x, rate = read_audio(resolve_inside(root, rel))
            if rate < args.min_rate:
                raise AudioError(f"{rate} Hz is below --min_rate {args.min_rate}")
            coarse = resampled_length(len(x), rate, g.sampling_rate) // g.coarse_samples
            n = min(g.coarse_len(args.segment_length), coarse)
            if n == 0:
                raise AudioError("shorter than one coarse code")
        except AudioError as e:
            left_out[rel] = str(e)
            continue
        start = int(np.random.default_rng([args.seed, int(i)]).integers(0, coarse - n + 1))
        count += 1
        yield rel, {head.rate: cut(x, rate, head.rate, start, n, g) for head in HEADS.values()}
    for rel, reason in sorted(left_out.items())[:10]:
        warn(f"left out {rel}: {reason}")
    if left_out:
        warn(f"{len(left_out)} files left out, {count} clips used")


def cut(x, rate: int, new_rate: int, start: int, n: int, g):
    """The span of n coarse codes from coarse code `start` at another rate; zeros past the end."""
    samples = g.coarse_samples * new_rate // g.sampling_rate  # a coarse code
    part = resample(x, rate, new_rate)[start * samples : (start + n) * samples]
    return torch.from_numpy(np.pad(part, (0, n * samples - len(part))))


# ---- systems ----


def open_systems(args, device) -> tuple[DualHead, dict[str, DualHead]]:
    """(base SNAC, {label: decoder} of the checkpoints). Raises UserError for codecs that don't compare."""
    folders = [Path(p).parent.name for p in args.checkpoint]  # of one name: told apart by path
    labels = [f if folders.count(f) == 1 else p for f, p in zip(folders, args.checkpoint)]
    loaded = [load_dual_head(p, device, args.pretrained_model) for p in args.checkpoint]
    base_name = args.pretrained_model or loaded[0].encoder_from
    snac = load_snac(base_name)
    geometry = geometry_of(snac, base_name)
    for name, tts in zip(labels, loaded):  # a codec that phase10 trained whole has its own encoder
        differs = geometry.difference(tts.geometry)
        if differs and tts.snac is None:
            raise UserError(f"{name} was trained with another codec than {base_name} ({differs})")
        if geometry.coarse_samples != tts.geometry.coarse_samples:
            raise UserError(f"{name} has other code lengths than {base_name} ({differs})")
    decoder = DualHeadDecoder(snac, heads=("24k",), with_encoder=True)
    return DualHead(decoder, geometry, model_config(snac), device, base_name), dict(zip(labels, loaded))


def timed(tts: DualHead, codes, seed: int) -> dict[str, Signal]:
    """{head: what it makes of the codes}."""
    if tts.device.type == "cuda":
        torch.cuda.synchronize(tts.device)  # encoding may still go on there: it is not this decoder's time
    began = time.perf_counter()
    out = tts.decode(codes, noise_seed=seed)
    found = {head: x[0, 0].float().cpu() for head, x in zip(HEADS, out) if x is not None}
    spent = time.perf_counter() - began
    return {head: Signal(x, HEADS[head].rate, spent) for head, x in found.items()}


def decode_all(clip: dict, base: DualHead, ours: dict[str, DualHead], seed: int) -> dict[str, Signal]:
    """The clip as every system gives it back."""
    audio_24k = clip[24000][None, None]
    codes = base.encode(audio_24k)
    low = timed(base, codes, seed)["24k"]
    sinc = torch.from_numpy(resample(low.audio.numpy(), low.rate, 48000))
    systems = {"base_snac": low, "base_snac_sinc48": Signal(sinc, 48000, low.seconds)}
    for label, tts in ours.items():
        own = codes if tts.snac is None else tts.encode(audio_24k)
        suffix = f":{label}" if len(ours) > 1 else ""
        systems |= {f"ours_{head}{suffix}": signal for head, signal in timed(tts, own, seed).items()}
    return systems


# ---- output ----


def markdown(results: dict) -> str:
    keys = ["l1", "stft", "mel", "si_sdr", "lsd", "lsd_12_24k", "visqol", "rtf"]
    keys = [k for k in keys if any(k in row for row in results["systems"].values())]
    lines = ["| system | " + " | ".join(keys) + " |", "|---" * (len(keys) + 1) + "|"]
    for name, row in results["systems"].items():
        lines.append(f"| {name} | " + " | ".join(f"{row[k]:.4f}" if k in row else "" for k in keys) + " |")
    head = f"{results['clips']} clips, {results['seconds']:.1f} s, checkpoint {results['checkpoint']}"
    return f"{head}\n\n" + "\n".join(lines) + "\n"


def draw(path: Path, shown: list[tuple[str, dict[str, Signal]]]) -> None:
    """Spectrograms of (name of a clip, its signals): a column a clip, a row a system, 0-24 kHz. A sine of
    amplitude 1 has 0 dB."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    systems = list(shown[0][1])
    grid, size = (len(systems), len(shown)), (5 * len(shown) + 1.5, 2.2 * len(systems) + 1)
    shared = {"sharex": "col", "sharey": True, "squeeze": False}
    fig, axes = plt.subplots(*grid, figsize=size, layout="constrained", **shared)
    fig.suptitle("Held-out speech, as recorded and by each system (most energy first)")
    for column, (name, signals) in zip(axes.T, shown):
        for ax, signal in zip(column, signals.values()):
            x, rate, n_fft = signal.audio, signal.rate, 1024 * signal.rate // 24000
            level = 20 * (spectrum(x[None], n_fft, n_fft // 4)[0].abs() * 4 / n_fft).clamp(min=1e-6).log10()
            style = {"extent": (0, len(x) / rate, 0, rate / 2000), "cmap": "magma", "vmin": -100, "vmax": -20}
            image = ax.imshow(level.numpy(), origin="lower", aspect="auto", **style)
            ax.axhline(12, color="white", lw=0.8, ls=":")
            ax.set(ylim=(0, 24), yticks=range(0, 25, 6), facecolor="0.92")
            if rate == 24000:
                words = "nothing above 12 kHz:\na 24 kHz system"
                ax.text(0.5, 0.75, words, transform=ax.transAxes, ha="center", va="center")
        column[0].set_title(name[-45:])
        column[-1].set_xlabel("seconds")
    for ax, system in zip(axes[:, 0], systems):
        ax.set_ylabel(f"{textwrap.fill(system, 24)}\nkHz")
    fig.colorbar(image, ax=axes, label="dB re full scale", pad=0.01, aspect=50)
    fig.savefig(path, dpi=90)
    plt.close(fig)


def wav_name(system: str) -> str:
    return system.replace(":", "_").replace("/", "_")


def save_results(args, results: dict, shown: list[tuple[str, dict[str, Signal]]]) -> None:
    """JSON, Markdown and the picture of the clips `shown`; the table also to stdout."""
    out, table = Path(args.output), markdown(results)
    md, png = out.with_suffix(".md"), out.with_suffix(".png")
    out.parent.mkdir(parents=True, exist_ok=True)
    write_json(out, results)
    md.write_text(table, encoding="utf-8")
    draw(png, shown)
    print(f"\n{table}\nnumbers: {out}\ntable: {md}\nspectrograms: {png}")
    if args.max_samples_saved:
        made = ", ".join(map(wav_name, shown[0][1]))
        print(f"listen: aplay {args.samples_dir}/000_*.wav, or any player; every clip as {made}")


def main(args) -> int:
    stop, samples = StopFlag(), Path(args.samples_dir)
    device, visqol = pick_device(args.device), load_visqol() if args.visqol else None
    base, ours = open_systems(args, device)
    warn(f"{', '.join(args.checkpoint)} on {device}")
    samples.mkdir(parents=True, exist_ok=True)
    rows, count, seconds = collections.defaultdict(list), 0, 0.0  # {system: [metrics of a clip]}
    loudest = []  # (energy, name, signals) of the clips to draw: those with speech in them, not a pause
    for name, clip in clips(args, base.geometry):
        if stop:
            warn(f"stopped by {stop.signal}; nothing was written")
            return EXIT_STOPPED
        if count == 0:
            timed(base, base.encode(clip[24000][None, None]), args.seed)  # warms up kernels
        systems = decode_all(clip, base, ours, args.seed)
        signals = {"original": Signal(clip[48000], 48000)} | systems
        for signal in signals.values():
            signal.audio = pcm16(signal.audio)
        length = len(clip[24000]) / 24000
        for system, s in systems.items():
            found = measure(s.audio, pcm16(clip[s.rate]), s.rate, visqol)
            rows[system].append(found | {"rtf": s.seconds / length})
        if args.max_samples_saved < 0 or count < args.max_samples_saved:
            for system, s in signals.items():
                wav = samples / f"{count:03d}_{wav_name(system)}.wav"
                sf.write(wav, s.audio.numpy(), s.rate, subtype="PCM_16")
        loudest.append((float(signals["original"].audio.square().sum()), name, signals))
        loudest = sorted(loudest, key=lambda clip: clip[0], reverse=True)[:DRAWN]
        count += 1
        seconds += length
        if count % 50 == 0:
            warn(f"{count} clips")
    if count == 0:
        raise UserError(f"no clip of {', '.join(args.data_dirs)} can be used (44.1 kHz or more, long enough)")
    results = {"clips": count, "seconds": round(seconds, 3), "checkpoint": ", ".join(args.checkpoint)}
    mean = lambda found: {k: float(np.mean([r[k] for r in found])) for k in found[0]}
    results["systems"] = {system: mean(found) for system, found in rows.items()}
    save_results(args, results, [(name, signals) for _, name, signals in loudest])
    return 0


if __name__ == "__main__":
    main_guard(main, ARGS)
