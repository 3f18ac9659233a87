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

from __future__ import annotations

import math
import sys
import time
from pathlib import Path

from snac48.cli import EXIT_STOPPED, Parser, StopFlag, UserError, guarded, main_guard, pick_device
from snac48.files import write_json


def parse_args(argv=None):
    p = Parser(description=__doc__)
    p.add_argument("--checkpoint", nargs="+", required=True, help="checkpoints or exported folders")
    p.add_argument(
        "--data_dirs", nargs="+", required=True, help="folders of held-out recordings, 44.1 kHz or more"
    )
    p.add_argument(
        "--pretrained_model", default="", help="base SNAC (default: as recorded in the checkpoint)"
    )
    p.add_argument(
        "--segment_length", type=float, default=2.0, help="seconds a clip; shorter files are used whole"
    )
    p.add_argument(
        "--num_samples", type=int, default=5000, help="clips at most, drawn with --seed (-1 = all)"
    )
    p.add_argument(
        "--min_rate", type=int, default=44100, help="files below this rate have no 12-24 kHz band: left out"
    )
    p.add_argument("--seed", type=int, default=42)
    p.add_argument("--device", default="0", help="GPU number or cpu")
    p.add_argument("--output", default="evaluation_results.json")
    p.add_argument("--samples_dir", default="comparison_samples")
    p.add_argument("--max_samples_saved", type=int, default=20, help="clips written as wav (-1 = all)")
    p.add_argument(
        "--visqol", action="store_true", help="also ViSQOL (pip install visqol-python; about 1 s a clip)"
    )
    return p.parse_args(argv)


if __name__ == "__main__":  # before torch is imported: --help and a misspelt flag answer at once
    ARGS = guarded(parse_args)

import numpy as np
import soundfile as sf
import torch

from snac48.audio import AudioError, find_audio, link_roots, read_audio, resample, resolve_inside
from snac48.codec import geometry_of, load_snac, model_config
from snac48.decoder import DualHead, DualHeadDecoder, load_dual_head
from snac48.losses import lsd, mel_filters, spectrum, stft_loss

N_FFTS = (1024, 2048, 4096)

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
    return float(10 * torch.log10(scaled.square().sum().clamp(min=1e-12)
                                  / (pred - scaled).square().sum().clamp(min=1e-12)))  # fmt: skip


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
    found = {
        "l1": float((pred - target).abs().mean()),
        "stft": float(stft_loss(pred[None], target[None], valid, N_FFTS)),
        "mel": mel_distance(pred, target, rate),
    }
    if rate == 24000:
        return found | {"si_sdr": si_sdr(pred, target)}
    return found | {
        "lsd": float(lsd(pred[None], target[None], valid, rate)),
        "lsd_12_24k": float(lsd(pred[None], target[None], valid, rate, 12000)),
        **({"visqol": visqol(pred, target)} if visqol else {}),
    }


def pcm16(x):
    """[N] rounded to 16 bits, as the wav that people hear."""
    return torch.round(x * 32768).clamp(-32768, 32767) / 32768


# ---- clips ----


def clips(args, g, log):
    """Yield (name, audio_48k [2N], audio_24k [N]) of held-out clips, N whole coarse codes; drawn with the
    seed."""
    files = [(d, rel, link_roots(d)) for d in args.data_dirs for rel in find_audio(d)]
    order = np.random.default_rng(args.seed).permutation(len(files))
    left_out, count = {}, 0
    for i in order:
        if args.num_samples >= 0 and count >= args.num_samples:
            break
        root, rel, allowed = files[i]
        try:
            x, rate = read_audio(resolve_inside(root, rel, allowed))
            if rate < args.min_rate:
                raise AudioError(f"{rate} Hz is below --min_rate {args.min_rate}")
        except AudioError as e:
            left_out[rel] = str(e)
            continue
        audio_48k = resample(x, rate, 48000)
        audio_24k = resample(x, rate, g.sampling_rate)
        n = min(g.coarse_len(args.segment_length), len(audio_24k) // g.coarse_samples)
        if n == 0:
            left_out[rel] = "shorter than one coarse code"
            continue
        room = len(audio_24k) // g.coarse_samples - n
        start = int(np.random.default_rng([args.seed, int(i)]).integers(0, room + 1)) * g.coarse_samples
        n *= g.coarse_samples
        high = np.zeros(2 * n, np.float32)
        part = audio_48k[2 * start : 2 * (start + n)]
        high[: len(part)] = part
        count += 1
        yield rel, torch.from_numpy(high), torch.from_numpy(audio_24k[start : start + n])
    for rel, reason in sorted(left_out.items())[:10]:
        log(f"left out {rel}: {reason}")
    if left_out:
        log(f"{len(left_out)} files left out, {count} clips used")


# ---- output ----


def label_of(path: str, among: list[str]) -> str:
    """Shortest name that tells a checkpoint from the others: its folder, or folder/file."""
    folders = [Path(p).parent.name for p in among]
    return Path(path).parent.name if folders.count(Path(path).parent.name) == 1 else str(path)


def markdown(results: dict) -> str:
    keys = ["l1", "stft", "mel", "si_sdr", "lsd", "lsd_12_24k", "visqol", "rtf"]
    keys = [k for k in keys if any(k in row for row in results["systems"].values())]
    lines = ["| system | " + " | ".join(keys) + " |", "|---" * (len(keys) + 1) + "|"]
    for name, row in results["systems"].items():
        lines.append(f"| {name} | " + " | ".join(f"{row[k]:.4f}" if k in row else "" for k in keys) + " |")
    head = f"{results['clips']} clips, {results['seconds']:.1f} s, checkpoint {results['checkpoint']}"
    return f"{head}\n\n" + "\n".join(lines) + "\n"


def draw(path: Path, name: str, signals: dict) -> None:
    """Spectrograms of one clip, a row a system: log magnitude over 0-24 kHz."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    fig, axes = plt.subplots(
        len(signals), 1, figsize=(10, 2.1 * len(signals)), sharex=True, constrained_layout=True
    )
    for ax, (system, (x, rate)) in zip(np.atleast_1d(axes), signals.items()):
        s = spectrum(x[None], 1024 * rate // 24000, 256 * rate // 24000)[0].abs().clamp(min=1e-5)
        ax.imshow(20 * s.log10().numpy(), origin="lower", aspect="auto", cmap="magma", vmin=-60, vmax=35,
                  extent=(0, len(x) / rate, 0, rate / 2000))  # fmt: skip
        ax.set_ylim(0, 24)
        ax.axhline(12, color="white", lw=0.5, ls=":")
        ax.set_ylabel(f"{system}\nkHz", fontsize=8)
    np.atleast_1d(axes)[-1].set_xlabel(f"seconds of {name}")
    fig.savefig(path, dpi=90)
    plt.close(fig)


def plain(system: str) -> str:
    return system.replace(":", "_").replace("/", "_")


def main() -> int:
    args = ARGS
    stop = StopFlag()
    log = lambda text: print(text, file=sys.stderr, flush=True)
    device, visqol = pick_device(args.device), load_visqol() if args.visqol else None
    ours = {
        label_of(p, args.checkpoint): load_dual_head(p, device, args.pretrained_model)
        for p in args.checkpoint
    }
    first = next(iter(ours.values()))
    base_name = args.pretrained_model or first.encoder_from
    snac = load_snac(base_name)
    geometry = geometry_of(snac, base_name)
    for name, tts in ours.items():  # a codec that phase10 trained whole has its own encoder
        differs = geometry.difference(tts.geometry)
        if differs and tts.snac is None:
            raise UserError(f"{name} was trained with another codec than {base_name} ({differs})")
        if geometry.coarse_samples != tts.geometry.coarse_samples:
            raise UserError(f"{name} has other code lengths than {base_name} ({differs})")
    base = DualHead(
        DualHeadDecoder(snac, heads="24k", with_encoder=True), geometry, model_config(snac), device, base_name
    )

    def timed(tts, codes, **want):
        began = time.perf_counter()
        out = tts.decode(codes, noise_seed=args.seed, **want)
        if device.type == "cuda":
            torch.cuda.synchronize()
        return [x if x is None else x[0, 0].float().cpu() for x in out], time.perf_counter() - began

    rows: dict[str, list[dict]] = {}
    seconds, count = 0.0, 0
    samples = Path(args.samples_dir)
    samples.mkdir(parents=True, exist_ok=True)
    best_clip, loudest = None, -math.inf
    for name, audio_48k, audio_24k in clips(args, geometry, log):
        if stop:
            log(f"stopped by {stop.signal}; nothing was written")
            return EXIT_STOPPED
        codes = base.encode(audio_24k[None, None])
        if count == 0:
            timed(base, codes)  # warm up kernels before the clock counts
        (low, _), t_base = timed(base, codes, output_48k=False)
        sinc = torch.from_numpy(resample(low.numpy(), 24000, 48000))
        systems = {"base_snac": (low, 24000, t_base), "base_snac_sinc48": (sinc, 48000, t_base)}
        for label, tts in ours.items():
            suffix = f":{label}" if len(ours) > 1 else ""
            own = codes if tts.snac is None else tts.encode(audio_24k[None, None])
            audio, spent = timed(tts, own)
            for head, rate, x in (("24k", 24000, audio[0]), ("48k", 48000, audio[1])):
                if x is not None:
                    systems[f"ours_{head}{suffix}"] = (x, rate, spent)
        targets = {24000: pcm16(audio_24k), 48000: pcm16(audio_48k)}
        length = len(audio_24k) / 24000
        signals = {"original": (targets[48000], 48000)}
        for system, (x, rate, spent) in systems.items():
            x = pcm16(x)
            signals[system] = (x, rate)
            rows.setdefault(system, []).append(
                measure(x, targets[rate], rate, visqol) | {"rtf": spent / length}
            )
        if args.max_samples_saved < 0 or count < args.max_samples_saved:
            for system, (x, rate) in signals.items():
                wav = samples / f"{count:03d}_{plain(system)}.wav"
                sf.write(wav, x.numpy(), rate, subtype="PCM_16")
        high = float(spectrum(targets[48000][None], 2048, 512)[0, 512:].abs().mean())
        if high > loudest:  # the clip with most energy above 12 kHz shows the difference best
            best_clip, loudest = (name, signals), high
        count += 1
        seconds += length
        if count % 50 == 0:
            log(f"{count} clips")
    if count == 0:
        raise UserError(f"no clip of {', '.join(args.data_dirs)} can be used (44.1 kHz or more, long enough)")
    systems = {s: {k: float(np.mean([r[k] for r in found])) for k in found[0]} for s, found in rows.items()}
    results = {
        "clips": count,
        "seconds": round(seconds, 3),
        "checkpoint": ", ".join(args.checkpoint),
        "systems": systems,
    }
    out = Path(args.output)
    out.parent.mkdir(parents=True, exist_ok=True)
    write_json(out, results)
    table = markdown(results)
    out.with_suffix(".md").write_text(table, encoding="utf-8")
    draw(out.with_suffix(".png"), *best_clip)
    print(
        f"\n{table}\nnumbers: {out}\ntable: {out.with_suffix('.md')}\nspectrograms: {out.with_suffix('.png')}"
    )
    print(f"wavs: {samples}/NNN_{{{','.join(map(plain, best_clip[1]))}}}.wav")
    return 0


if __name__ == "__main__":
    main_guard(main)
