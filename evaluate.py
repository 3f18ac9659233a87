"""Compare on the same held-out clips: original, base SNAC, base SNAC upsampled by sinc to 48 kHz, our two
heads.

    python evaluate.py --checkpoint checkpoints/phase12_dual_head/best_model.pt --data_dirs corpus/valid/audio
    python evaluate.py --checkpoint a/best_model.pt b/best_model.pt --data_dirs corpus/valid/audio

Checkpoints of any recipes stand beside each other: phase10 and 12 meet at 24 kHz, 11 and 12 at 48 kHz.

Writes --output (JSON), the same as a Markdown table beside it (.md), spectrograms (.png), and
NNN_{original,base_snac,base_snac_sinc48,ours_24k,ours_48k}.wav into --samples_dir. Every system is
rounded to 16 bits before it is measured: that is what people will listen to.

Metrics (mean over clips; lower is better except si_sdr): l1 (waveform), stft (multi-resolution magnitude +
log-magnitude, as in training), mel (log-mel L1, 80 bands), si_sdr (dB, 24 kHz systems), lsd (0-24 kHz) and
lsd_12_24k (12-24 kHz) as AP-BWE defines them (48 kHz systems), visqol (with --visqol: MOS-LQO of ViSQOL's
audio mode, 48 kHz systems, higher is better), rtf (decoding time / audio time).
"""

import argparse
import collections
import math
import time
from dataclasses import dataclass
from pathlib import Path

from snac48.cli import EXIT_STOPPED, StopFlag, UserError, guarded, main_guard, pick_device, read_flags, warn


def parse_args(argv=None):
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = p.add_argument
    add("--checkpoint", nargs="+", required=True, help="checkpoints or exported folders")
    add("--data_dirs", nargs="+", required=True, help="folders of held-out recordings, 44.1 kHz or more")
    add("--pretrained_model", default="", help="base SNAC (default: as recorded in the checkpoint)")
    add("--segment_length", type=float, default=2.0, help="seconds a clip; shorter files are used whole")
    add("--num_samples", type=int, default=5000, help="clips at most, drawn with --seed (-1 = all)")
    add("--min_rate", type=int, default=44100, help="files below it have no 12-24 kHz band: left out")
    add("--seed", type=int, default=42)
    add("--device", default="0", help="GPU number or cpu")
    add("--output", default="evaluation_results.json")
    add("--samples_dir", default="comparison_samples")
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


def draw(path: Path, name: str, signals: dict[str, Signal]) -> None:
    """Spectrograms of one clip, a row a system: log magnitude over 0-24 kHz."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    size = (10, 2.1 * len(signals))
    fig, axes = plt.subplots(len(signals), 1, figsize=size, sharex=True, constrained_layout=True)
    for ax, (system, signal) in zip(np.atleast_1d(axes), signals.items()):
        x, rate = signal.audio, signal.rate
        s = spectrum(x[None], 1024 * rate // 24000, 256 * rate // 24000)[0].abs().clamp(min=1e-5)
        extent = (0, len(x) / rate, 0, rate / 2000)
        style = {"origin": "lower", "aspect": "auto", "cmap": "magma", "vmin": -60, "vmax": 35}
        ax.imshow(20 * s.log10().numpy(), extent=extent, **style)
        ax.set_ylim(0, 24)
        ax.axhline(12, color="white", lw=0.5, ls=":")
        ax.set_ylabel(f"{system}\nkHz", fontsize=8)
    np.atleast_1d(axes)[-1].set_xlabel(f"seconds of {name}")
    fig.savefig(path, dpi=90)
    plt.close(fig)


def wav_name(system: str) -> str:
    return system.replace(":", "_").replace("/", "_")


def save_results(args, results: dict, shown: str, signals: dict[str, Signal]) -> None:
    """JSON, Markdown and the picture of the clip `shown`; the table also to stdout."""
    out, table = Path(args.output), markdown(results)
    md, png = out.with_suffix(".md"), out.with_suffix(".png")
    out.parent.mkdir(parents=True, exist_ok=True)
    write_json(out, results)
    md.write_text(table, encoding="utf-8")
    draw(png, shown, signals)
    print(f"\n{table}\nnumbers: {out}\ntable: {md}\nspectrograms: {png}")
    print(f"wavs: {Path(args.samples_dir)}/NNN_{{{','.join(map(wav_name, signals))}}}.wav")


def main(args) -> int:
    stop, samples = StopFlag(), Path(args.samples_dir)
    device, visqol = pick_device(args.device), load_visqol() if args.visqol else None
    base, ours = open_systems(args, device)
    samples.mkdir(parents=True, exist_ok=True)
    rows, count, seconds = collections.defaultdict(list), 0, 0.0  # {system: [metrics of a clip]}
    loudest, shown = -math.inf, None
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
        high = float(spectrum(signals["original"].audio[None], 2048, 512)[0, 512:].abs().mean())
        if high > loudest:  # the clip with most energy above 12 kHz shows the difference best
            loudest, shown = high, (name, signals)
        count += 1
        seconds += length
        if count % 50 == 0:
            warn(f"{count} clips")
    if count == 0:
        raise UserError(f"no clip of {', '.join(args.data_dirs)} can be used (44.1 kHz or more, long enough)")
    results = {"clips": count, "seconds": round(seconds, 3), "checkpoint": ", ".join(args.checkpoint)}
    mean = lambda found: {k: float(np.mean([r[k] for r in found])) for k in found[0]}
    results["systems"] = {system: mean(found) for system, found in rows.items()}
    save_results(args, results, *shown)
    return 0


if __name__ == "__main__":
    main_guard(main, ARGS)
