"""Compare on the same held-out clips: original, base SNAC, base SNAC upsampled by sinc to 48 kHz, our two
heads.

    python evaluate.py --checkpoint checkpoints/phase12_dual_head/best_model.pt --data_dirs corpus/valid/audio
    python evaluate.py --checkpoint new/best_model.pt --compare old/best_model.pt --data_dirs valid/audio
    python evaluate.py --checkpoint C/best_model.pt --data_dirs valid/audio --audio_48k_dir targets/valid

Checkpoints of any recipes stand beside each other: phase10 and 12 meet at 24 kHz, 11 and 12 at 48 kHz.

A recording of --min_rate or more is its own 48 kHz truth. A lower one is judged at 48 kHz against its target
in --audio_48k_dir (row `sidon`: that target itself, at 24 kHz against the recording), and where there is none
at 24 kHz alone.

Writes --output (JSON) and beside it the tables as Markdown (.md), every clip's numbers (.csv), spectrograms
of the three clips with most energy (.png); into --samples_dir NNN_SYSTEM.wav of the original and each system,
and index.html, the page to listen to them.
Every system is rounded to 16 bits before it is measured: that is what people will listen to.

Distances (mean over clips, ± half of its 95 % bootstrap interval; lower is better except si_sdr, visqol and
f0_corr): l1 (waveform), stft (multi-resolution magnitude + log-magnitude, as in training), mel (log-mel L1,
80 bands), si_sdr (dB, 24 kHz systems), lsd (0-24 kHz) and lsd_12_24k (12-24 kHz) as AP-BWE defines them
(48 kHz systems), rtf (real-time factor: processing time / audio time); with --visqol: visqol (MOS-LQO of
ViSQOL's audio mode, 48 kHz systems); with --pitch: f0_corr (correlation of F0 where both have voice) and
voicing_error (% of the frames).
Faults, beside what the original has (dB): level (RMS against the target), level_24k (48 kHz systems against
their own 24 kHz), comb (lines of the envelope at multiples of the frame rate), seam (dip at 12 kHz), tones
(strongest steady line above 10 kHz), hnr (with --pitch: harmonics to noise).
"""

import argparse
import csv
import os
import textwrap
import time
from dataclasses import dataclass, field
from pathlib import Path

from snac48.cli import EXIT_STOPPED, StopFlag, UserError, guarded, main_guard, pick_device, read_flags, warn
from snac48.places import ALLOW_LINKS, check_free, check_place


def parse_args(argv=None):
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = p.add_argument
    add("--checkpoint", nargs="+", required=True, help="checkpoints or exported folders")
    add("--compare", default="", help="a checkpoint: which differences of the others from it are real")
    add("--data_dirs", nargs="+", required=True, help="folders of held-out recordings")
    add("--allow_links", **ALLOW_LINKS)
    add("--audio_48k_dir", nargs="+", default=[], help="their 48 kHz targets, a folder for each of them")
    add(
        "--target_kind", choices=("sidon", "recordings"), default="", help="of targets without manifest.jsonl"
    )
    add("--pretrained_model", default="", help="base SNAC (default: where the training found it)")
    add("--segment_length", type=float, default=2.0, help="seconds a clip; shorter files are used whole")
    add("--num_samples", type=int, default=5000, help="clips at most, drawn with --seed (-1 = all)")
    add("--min_rate", type=int, default=44100, help="from here on a recording has the band of 12-24 kHz")
    add("--seed", type=int, default=42, help="of the choice of clips, their place in the file, the noise")
    add("--device", default="", help="GPU number or cpu (default: a GPU where there is one, else the CPU)")
    add("--output", default="evaluation_results.json", help="the numbers; tables and picture lie beside them")
    add("--samples_dir", default="comparison_samples", help="where the wavs and the listening page go")
    add("--max_samples_saved", type=int, default=20, help="clips to listen to (-1 = all)")
    add("--overwrite", action="store_true", help="replace files there that are not of an evaluation")
    add("--visqol", action="store_true", help="also ViSQOL (requirements-evaluate.txt; about 1 s a clip)")
    add("--pitch", action="store_true", help="also F0, voicing, harmonics (requirements-evaluate.txt)")
    args = read_flags(p, argv)
    if args.audio_48k_dir and len(args.audio_48k_dir) != len(args.data_dirs):
        p.error("--audio_48k_dir takes one folder for each of --data_dirs, in the same order")
    check_outputs(args)
    return args


def check_outputs(args) -> None:
    """Raises UserError for places that can't be written, and for files that are no older evaluation's."""
    out, samples = Path(args.output), Path(args.samples_dir)
    check_place(samples, "--samples_dir", [*args.data_dirs, *args.audio_48k_dir])
    ours = os.path.isfile(out) and '"level_policy"' in out.read_text(encoding="utf-8", errors="replace")
    results = [out, *(out.with_suffix(suffix) for suffix in (".md", ".csv", ".png"))]
    check_free(results, args.checkpoint, args.overwrite or ours, "--output")
    held = samples.is_dir() and next(samples.iterdir(), None)
    if held and not (args.overwrite or (samples / "audio" / "000.js").is_file()):
        raise UserError(f"--samples_dir {samples} holds {held.name}, of no evaluation: choose another folder")


if __name__ == "__main__":  # before torch is imported: --help and a misspelt flag answer at once
    ARGS = guarded(parse_args)

import numpy as np
import torch

from snac48.audio import (
    AudioError,
    allow_links,
    find_audio,
    read_audio,
    resample,
    resampled_length,
    resolve_inside,
)
from snac48.codec import geometry_of, load_snac, model_config
from snac48.decoder import HEADS, DualHead, DualHeadDecoder, load_dual_head
from snac48.files import atomic_file, write_json
from snac48.intervals import differences, intervals, means
from snac48.listening import ListeningPage
from snac48.losses import halve_rate, spectrum
from snac48.measures import DISTANCES, FAULTS, METRICS, distances, faults, load_pitch, load_visqol, pitched
from snac48.runlog import show
from snac48.targets import KINDS, Targets

DRAWN = 3  # clips in the picture
LEVEL_POLICY = (
    "Level: no system is scaled before it is measured, and a target is taken at its recording's level; "
    "level says how far each lies off (1 dB alone moves lsd by up to 0.1)."
)


@dataclass
class Signal:
    """Audio [N] at `rate` Hz, how long its decoding took, and what the same codes give at 24 kHz."""

    audio: torch.Tensor
    rate: int
    seconds: float = 0.0
    audio_24k: torch.Tensor | None = None


def pcm16(x):
    """[N] rounded to 16 bits, as the wav that people hear."""
    return torch.round(x * 32768).clamp(-32768, 32767) / 32768


# ---- clips ----


@dataclass
class Clip:
    """A span of whole coarse codes: {rate: what a system should give back, [N]}, 48 kHz where that is known,
    and whether it is known from a restored target alone."""

    name: str
    truth: dict[int, torch.Tensor]
    restored: bool = False

    def signals(self) -> dict[str, Signal]:
        """What is known of it: the recording, and the target that SIDON made of it."""
        low, high = Signal(self.truth[24000], 24000), None
        if 48000 in self.truth:
            high = Signal(self.truth[48000], 48000, audio_24k=self.truth[24000])
        if high is None:
            return {"original": low}
        return {"original": low, "sidon": high} if self.restored else {"original": high}


def clips(args, g):
    """Yield clips of whole coarse codes, drawn with the seed."""
    files = [(i, rel) for i, d in enumerate(args.data_dirs) for rel in find_audio(d)]
    targets = [targets_of(args, i, [rel for k, rel in files if k == i]) for i in range(len(args.data_dirs))]
    first = [sum(k < i for k, _ in files) for i in range(len(args.data_dirs))]
    left_out, count = {}, 0
    for i in np.random.default_rng(args.seed).permutation(len(files)):
        if args.num_samples >= 0 and count >= args.num_samples:
            break
        folder, rel = files[i]
        try:
            x, rate = read_audio(resolve_inside(args.data_dirs[folder], rel))
            coarse = resampled_length(len(x), rate, g.sampling_rate) // g.coarse_samples
            n = min(g.coarse_len(args.segment_length), coarse)
            if n == 0:
                raise AudioError("shorter than one coarse code")
            start = int(np.random.default_rng([args.seed, int(i)]).integers(0, coarse - n + 1))
            clip = Clip(rel, {24000: cut(x, rate, 24000, start, n, g)})
            if rate >= args.min_rate:
                clip.truth[48000] = cut(x, rate, 48000, start, n, g)
            elif targets[folder]:
                add_target(clip, targets[folder], int(i) - first[folder], start, g)
        except AudioError as e:
            left_out[rel] = str(e)
            continue
        count += 1
        yield clip
    for rel, reason in sorted(left_out.items())[:10]:
        warn(f"left out {rel}: {reason}")
    if left_out:
        warn(f"{len(left_out)} files left out, {count} clips used")


def cut(x, rate: int, new_rate: int, start: int, n: int, g):
    """The span of n coarse codes from coarse code `start` at another rate; zeros past the end."""
    samples = g.coarse_samples * new_rate // g.sampling_rate  # a coarse code
    part = resample(x, rate, new_rate)[start * samples : (start + n) * samples]
    return torch.from_numpy(np.pad(part, (0, n * samples - len(part))))


def targets_of(args, folder: int, files: list[str]) -> Targets | None:
    """The 48 kHz targets of the files of a data folder; None without --audio_48k_dir."""
    if not args.audio_48k_dir:
        return None
    return Targets(args.audio_48k_dir[folder], files.__getitem__, len(files), kind=args.target_kind)


def add_target(clip: Clip, targets: Targets, row: int, start: int, g) -> None:
    """The clip's 48 kHz truth, from its target, if that has the band above 12 kHz and follows the recording.
    Raises AudioError for one that can't be read."""
    kind = KINDS[targets.kinds[row]]
    if kind in ("copied", "sidon"):
        audio = np.zeros(2 * len(clip.truth[24000]), np.float32)
        first = start * g.coarse_samples * 48000 // g.sampling_rate
        targets.read(audio, row, first, 48000, len(audio))
        clip.truth[48000], clip.restored = torch.from_numpy(audio), kind == "sidon"


# ---- systems ----


def open_systems(args, device) -> tuple[DualHead, dict[str, DualHead]]:
    """(base SNAC, {label: decoder} of the checkpoints, --compare's last). Raises UserError for codecs that
    don't compare."""
    paths = [*args.checkpoint, *filter(None, [args.compare])]
    folders = [Path(p).parent.name for p in paths]  # of one name: told apart by path
    labels = [f if folders.count(f) == 1 else p for f, p in zip(folders, paths)]
    if len(set(labels)) < len(labels):
        raise UserError("--checkpoint and --compare name the same file twice")
    loaded = [load_dual_head(p, device, args.pretrained_model) for p in paths]
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
    spent, low = time.perf_counter() - began, found.get("24k")
    return {head: Signal(x, HEADS[head].rate, spent, low) for head, x in found.items()}


def decode_all(clip: Clip, base: DualHead, ours: dict[str, DualHead], seed: int) -> dict[str, Signal]:
    """The clip as every system gives it back."""
    audio_24k = clip.truth[24000][None, None]
    codes = base.encode(audio_24k)
    low = timed(base, codes, seed)["24k"]
    sinc = torch.from_numpy(resample(low.audio.numpy(), low.rate, 48000))
    systems = {"base_snac": low, "base_snac_sinc48": Signal(sinc, 48000, low.seconds, low.audio)}
    for label, tts in ours.items():
        own = codes if tts.snac is None else tts.encode(audio_24k)
        suffix = f":{label}" if len(ours) > 1 else ""
        systems |= {f"ours_{head}{suffix}": signal for head, signal in timed(tts, own, seed).items()}
    return systems


# ---- measuring ----


def measure(clip: Clip, systems: dict[str, Signal], frame: float, visqol, pitch) -> dict[str, dict]:
    """{system: {metric: value}} of a clip, the original among them. frame: seconds of a latent frame."""
    truth = {rate: pcm16(x) for rate, x in clip.truth.items()}
    f0, rows = pitch(truth[24000]) if pitch else None, {}
    for name, s in (clip.signals() | systems).items():
        s.audio = pcm16(s.audio)
        row = faults(s.audio, s.rate, frame, s.audio_24k)
        if name == "sidon":
            row |= distances(halve_rate(s.audio[None])[0], truth[24000], 24000)
        elif name != "original" and s.rate in truth:
            row |= distances(s.audio, truth[s.rate], s.rate, visqol)
        if pitch:
            row |= pitched(s.audio, s.rate, pitch, f0)
        if name == "original":  # its distance from itself says nothing
            row = {k: v for k, v in row.items() if k in FAULTS}
        if name in systems:
            row["rtf"] = s.seconds / (len(s.audio) / s.rate)
        rows[name] = row
    return rows


@dataclass
class Findings:
    """What is kept of all clips."""

    clips: list[dict] = field(default_factory=list)  # {clip, seconds, full_band, systems: {name: metrics}}
    loudest: list = field(default_factory=list)  # (energy, name, signals) of the clips to draw: not of pauses

    def add(self, clip: Clip, signals: dict[str, Signal], rows: dict[str, dict]) -> None:
        low = clip.truth[24000]
        about = {"clip": clip.name, "seconds": len(low) / 24000, "full_band": 48000 in clip.truth}
        self.clips.append(about | {"systems": rows})
        self.loudest.append((float(low.square().sum()), clip.name, signals))
        self.loudest = sorted(self.loudest, key=lambda c: c[0], reverse=True)[:DRAWN]

    def rows(self, system: str) -> list[dict]:
        """Its metrics of every clip, {} of one that it does not occur in."""
        return [clip["systems"].get(system, {}) for clip in self.clips]

    def results(self, args, labels: list[str]) -> dict:
        """The JSON."""
        systems = list(dict.fromkeys(name for clip in self.clips for name in clip["systems"]))
        rows = {name: self.rows(name) for name in systems}
        found = {
            "clips": len(self.clips),
            "seconds": round(sum(clip["seconds"] for clip in self.clips), 3),
            "checkpoint": ", ".join(args.checkpoint),
            "systems": {name: means(rows[name]) for name in systems if name != "original"},
            "original": means(rows["original"]),
            "intervals": {name: intervals(rows[name]) for name in systems},
            "clips_48k": sum(clip["full_band"] for clip in self.clips),
            "level_policy": LEVEL_POLICY,
            "differences": [],
        }
        for a, b in pairs(systems, labels[-1] if args.compare else ""):
            metrics = differences(rows[a], rows[b])
            metrics.pop("rtf", None)  # a busy machine, no matter of clips
            found["differences"].append({"system": a, "against": b, "metrics": metrics})
        return found


def pairs(systems: list[str], compared: str):
    """(a system of ours, what it is held against): base SNAC, and the checkpoint labelled `compared`."""
    for name in systems:
        if name.startswith("ours_"):
            head, _, label = name.partition(":")
            yield name, "base_snac_sinc48" if head == "ours_48k" else "base_snac"
            if compared and label != compared and f"{head}:{compared}" in systems:
                yield name, f"{head}:{compared}"


# ---- output ----


def table(metrics, rows: dict[str, dict], cell) -> str:
    """Markdown: a row a system, a column each of `metrics` that any has; cell(system, metric) is its text."""
    keys = [k for k in metrics if any(k in row for row in rows.values())]
    lines = ["| system | " + " | ".join(keys) + " |", "|---" * (len(keys) + 1) + "|"]
    for name, row in rows.items():
        lines.append(f"| {name} | " + " | ".join(cell(name, k) if k in row else "" for k in keys) + " |")
    return "\n".join(lines)


def markdown(results: dict) -> str:
    known, bounds = {"original": results["original"]} | results["systems"], results["intervals"]
    half = lambda low, high: (high - low) / 2
    spread = lambda name, k, digits: f" ± {half(*bounds[name][k]):.{digits}f}" if k in bounds[name] else ""
    number = lambda digits: lambda name, k: f"{known[name][k]:.{digits}f}{spread(name, k, digits)}"
    gaps = {f"{d['system']} - {d['against']}": d["metrics"] for d in results["differences"]}
    gap = lambda name, k: f"{gaps[name][k]['mean']:+.4f}{'*' * gaps[name][k]['real']}"
    lacking = results["clips"] - results["clips_48k"]
    alone = f" ({lacking} without 48 kHz truth, judged at 24 kHz alone)" if lacking else ""
    parts = [
        f"{results['clips']} clips, {results['seconds']:.1f} s{alone}, checkpoint {results['checkpoint']}",
        table(DISTANCES, results["systems"], number(4)),
        "±: 95 % interval, by bootstrap over the clips. " + LEVEL_POLICY,
        "Faults in dB, beside what the original has:",
        table(FAULTS, known, number(2)),
        "Differences, clip by clip (*: real, the 95 % interval leaves 0 out):",
        table(METRICS, gaps, gap),
    ]
    return "\n\n".join(parts) + "\n"


def draw(path: Path, shown: list[tuple[str, dict[str, Signal]]]) -> None:
    """Spectrograms of (name of a clip, its signals): a column a clip, a row a system, 0-24 kHz. A sine of
    amplitude 1 has 0 dB."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    systems = list(dict.fromkeys(system for _, signals in shown for system in signals))
    grid, size = (len(systems), len(shown)), (5 * len(shown) + 1.5, 2.2 * len(systems) + 1)
    shared = {"sharex": "col", "sharey": True, "squeeze": False}
    fig, axes = plt.subplots(*grid, figsize=size, layout="constrained", **shared)
    fig.suptitle("Held-out speech, as recorded and by each system (most energy first)")
    for column, (name, signals) in zip(axes.T, shown):
        for ax, system in zip(column, systems):
            if system not in signals:
                ax.axis("off")
                continue
            signal = signals[system]
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


def write_csv(path: Path, findings: Findings) -> None:
    """A line for each clip and system."""
    rows = [row for clip in findings.clips for row in clip["systems"].values()]
    metrics = [k for k in METRICS if any(k in row for row in rows)]
    with atomic_file(path, "w", encoding="utf-8", newline="") as f:
        out = csv.DictWriter(f, ["clip", "seconds", "system", *metrics])
        out.writeheader()
        for clip in findings.clips:
            named = {"clip": clip["clip"], "seconds": round(clip["seconds"], 3)}
            out.writerows(named | {"system": name} | row for name, row in clip["systems"].items())


def save_results(args, results: dict, findings: Findings, page: ListeningPage) -> None:
    """JSON, CSV, Markdown, the picture and the listening page; the tables also to stdout."""
    out, text = Path(args.output), markdown(results)
    md, table_of_clips, png = (out.with_suffix(suffix) for suffix in (".md", ".csv", ".png"))
    out.parent.mkdir(parents=True, exist_ok=True)
    write_json(out, results)
    md.write_text(text, encoding="utf-8")
    write_csv(table_of_clips, findings)
    draw(png, [(name, signals) for _, name, signals in findings.loudest])
    show(f"\n{text}\nnumbers: {out}, clip by clip: {table_of_clips}\ntables: {md}\nspectrograms: {png}\n")
    if page.clips:
        show(
            f"listen: open {page.save(results)} in a browser; keys 1-{len(page.systems)} switch the system\n"
        )


def main(args) -> int:
    allow_links(args.allow_links)
    stop = StopFlag()
    device, visqol = pick_device(args.device), load_visqol() if args.visqol else None
    pitch = load_pitch() if args.pitch else None
    base, ours = open_systems(args, device)
    warn(f"{', '.join([*args.checkpoint, *filter(None, [args.compare])])} on {device}")
    findings, page = Findings(), ListeningPage(args.samples_dir)
    for clip in clips(args, base.geometry):
        if stop:
            warn(f"stopped by {stop.signal}; nothing was written")
            return EXIT_STOPPED
        count = len(findings.clips)
        if count == 0:
            timed(base, base.encode(clip.truth[24000][None, None]), args.seed)  # warms up kernels
        systems = decode_all(clip, base, ours, args.seed)
        rows = measure(clip, systems, base.geometry.hop_length / base.geometry.sampling_rate, visqol, pitch)
        signals = {name: Signal(pcm16(s.audio), s.rate) for name, s in (clip.signals() | systems).items()}
        findings.add(clip, signals, rows)
        if args.max_samples_saved < 0 or count < args.max_samples_saved:
            page.add(clip.name, {name: (s.audio.numpy(), s.rate) for name, s in signals.items()}, rows)
        if (count + 1) % 50 == 0:
            warn(f"{count + 1} clips")
    if not findings.clips:
        raise UserError(
            f"no clip of {', '.join(args.data_dirs)} can be used (readable, a coarse code or more)"
        )
    save_results(args, findings.results(args, list(ours)), findings, page)
    return 0


if __name__ == "__main__":
    main_guard(main, ARGS)
