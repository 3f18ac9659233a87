"""Which losses? The 48 kHz head and its trunk, trained with each of LOSSES at equal compute, towards targets
that are phase-true and towards targets whose phase is scrambled (a stand-in for SIDON's), three seeds each.

    ./launch.sh demo
    pip install -r requirements-evaluate.txt
    OMP_NUM_THREADS=1 python benchmarks/losses.py --data demo/data --output_dir bench_losses

--data holds train/audio and valid/audio, as prepare_dataset.py makes them; recordings below 44.1 kHz are left
out. --every 8 takes every eighth file of train. Run again, it goes on where it was ended: a training that has
finished is not repeated. --scale multiplies the number of epochs.

Equal compute is equal CPU time: the epochs in LOSSES are chosen for it, and the first table holds what each
took. All are judged by the recordings themselves, whatever they were trained towards. An interval resamples
seeds and clips (95 %, bootstrap); a difference is taken between the same clips and seeds and is real (*)
where its interval leaves 0 out.
"""

import argparse
import csv
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import soundfile as sf

ROOT = Path(__file__).resolve().parent.parent
MULTI = ["--mel", "multi", "--mel_weight", "1"]
# the proportions of phase12-gan, beside magnitudes of weight 1
JUDGED = ["--adv_weight", "0.067", "--feat_weight", "0.13", "--disc_width", "2", "--adv_lr", "3e-4",
          "--adv_lr_trunk", "1e-4", "--disc_lr", "5e-4", "--disc_young", "0"]  # fmt: skip
LOSSES = {  # name: (epochs, how many of them adversarial, flags)
    "magnitude": (19, 0, []),
    "magnitude + lasting": (19, 0, ["--lasting_weight", "1"]),
    "magnitude + mel": (15, 0, MULTI),
    "magnitude + mel + GAN": (8, 2, [*MULTI, *JUDGED]),
}
TARGETS = ("phase-true", "scrambled")
SHOWN = {"visqol": "ViSQOL", "lsd_12_24k": "LSD 12-24 kHz", "lsd": "LSD", "seam": "seam", "comb": "comb"}


def call(*command) -> float:
    """Run one of the project's scripts; CPU seconds that it took. What it says goes to stderr."""
    process = subprocess.Popen([sys.executable, *map(str, command)], cwd=ROOT, stdout=sys.stderr)
    _, status, used = os.wait4(process.pid, 0)
    if status:
        raise SystemExit(f"failed: {' '.join(map(str, command))}")
    return used.ru_utime + used.ru_stime


# ---- data: codes, targets, targets with another phase ----


def prepare(args, out: Path) -> None:
    for split in ("train", "valid"):
        folder = out / "data" / split
        every = args.every if split == "train" else 1
        source = args.data / split / "audio"
        files = sorted(f for f in source.rglob("*") if f.suffix in (".wav", ".flac", ".ogg"))
        files = [f for f in files if sf.info(f).samplerate in (44100, 48000)]  # others have no 48 kHz truth
        for file in files[::every]:
            copy = folder / file.relative_to(source)
            copy.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(file, copy)
        common = ["--device", "cpu", "--num_workers", 0]
        for name in TARGETS:
            target = out / name / split
            if name == "phase-true":
                where = ["--input_dir", folder, "--output_dir", target, "--native_rate", 44100]
                call("precompute_48k.py", *where, *common)
            else:
                scramble_folder(out / "phase-true" / split, target)
        codes = ["--data_dir", folder, "--output_dir", out / "codes" / split, "--min_seconds", 0.5]
        call("cache_codes.py", *codes, "--pretrained_model", args.pretrained_model, *common)


def scramble_folder(source: Path, target: Path) -> None:
    for i, file in enumerate(sorted(source.rglob("*.wav"))):
        wav = target / file.relative_to(source)
        if not wav.exists():
            wav.parent.mkdir(parents=True, exist_ok=True)
            x, rate = sf.read(file, dtype="float32")
            sf.write(wav, scramble(x, np.random.default_rng(i)), rate, subtype="PCM_16")


def scramble(x, rng):
    """Audio [N] at 48 kHz through a random all-pass: its group delay wanders by about 1.5 ms from one 50 Hz
    to the next, so that spectra stay what they are and, but for the lowest harmonics, phases do not."""
    n = len(x) + 4800  # what is delayed past the end does not come back at the start
    hz = np.fft.rfftfreq(n, 1 / 48000)
    delay = np.interp(hz, np.arange(0, 24001, 50), rng.normal(0, 0.0015, 481))
    phase = -2 * np.pi * np.cumsum(delay) * (hz[1] - hz[0])
    return np.fft.irfft(np.fft.rfft(x, n) * np.exp(1j * phase), n)[: len(x)].astype(np.float32)


# ---- training ----


def name_of(target: str, loss: str) -> str:
    return f"{target}_{loss}".replace(" ", "")


def train(args, out: Path, seed: str, target: str, loss: str) -> tuple[Path, float]:
    """(best_model.pt, CPU seconds) of one training, now or when it was made."""
    run = out / f"seed_{seed}" / name_of(target, loss)
    done = run / "cpu_seconds.json"
    if done.is_file():
        return run / "best_model.pt", json.loads(done.read_text())
    for old in run.glob("*"):
        old.unlink()
    epochs, adversarial, flags = LOSSES[loss]
    epochs, adversarial = (round(n * args.scale) for n in (epochs, adversarial))
    targets = ["--audio_48k_dir", out / target / "train", "--val_audio_48k_dir", out / target / "valid"]
    kind = "recordings" if target == "phase-true" else "sidon"
    spent = call(
        "train_dual_head.py", "--heads", "48k", "--device", "cpu", "--num_workers", 0, "--seed", seed,
        "--pretrained_model", args.pretrained_model, "--output_dir", run, *targets, "--target_kind", kind,
        "--cache_dir", out / "codes/train", "--val_cache_dir", out / "codes/valid", "--val_limit", 4,
        "--epochs", epochs, "--warmup_epochs", round(3 * args.scale), "--lr", 1e-3, "--main_lr", 5e-4,
        "--batch_size", 6, "--segment_schedule", 0.5, "--batch_multiplier", 1,
        "--epoch_ranges", f"1-{epochs}", "--val_segment", 0.5, "--save_every", 1000, *flags,
        *(["--adv_epochs", adversarial] if adversarial else []),
    )  # fmt: skip
    done.write_text(json.dumps(spent))
    return run / "best_model.pt", spent


# ---- judging ----


def clips_of(path: Path) -> dict:
    """{system: {clip: row}} of the .csv of evaluate.py."""
    found: dict = {}
    with open(path, newline="") as f:
        for row in csv.DictReader(f):
            found.setdefault(row["system"], {})[row["clip"]] = row
    return found


def judge(args, out: Path, seed: str, runs: list[Path]) -> dict:
    """{system: {clip: row}} of all trainings of a seed, judged now or when they were judged."""
    result = out / f"seed_{seed}" / "evaluation.json"
    if not result.with_suffix(".csv").is_file():
        call("evaluate.py", "--checkpoint", *runs, "--data_dirs", out / "data/valid", "--device", "cpu",
             "--pretrained_model", args.pretrained_model, "--output", result, "--num_samples", args.clips,
             "--samples_dir", result.with_name("samples"), "--max_samples_saved", 0, "--visqol")  # fmt: skip
    return clips_of(result.with_suffix(".csv"))


def interval(table) -> tuple[float, float, float]:
    """(mean, low, high) of float [seeds, clips], both resampled; NaN: the clip has no such value."""
    rng, (seeds, clips) = np.random.default_rng(0), table.shape
    drawn = lambda n: rng.integers(0, n, (2000, n))
    found = [np.nanmean(table[np.ix_(a, b)]) for a, b in zip(drawn(seeds), drawn(clips))]
    return float(np.nanmean(table)), *np.quantile(found, [0.025, 0.975]).tolist()


def report(cells: dict, spent: dict, base: dict, original: dict) -> None:
    """Tables of {(loss, target): [{clip: row} a seed]}."""
    names = sorted(base)
    number = lambda row, key: float(row[key]) if row.get(key) else np.nan
    table = lambda rows, key: np.array([[number(row[c], key) for c in names] for row in rows])
    print("| losses | targets | CPU s | " + " | ".join(SHOWN.values()) + " |")
    print("|---" * (len(SHOWN) + 3) + "|")
    for who, rows in (("the recordings", original), ("base + sinc", base)):
        known = [table([rows], key) for key in SHOWN]
        means = [f"{np.nanmean(x):.3f}" if np.isfinite(x).any() else "" for x in known]
        print(f"| {who} | | | " + " | ".join(means) + " |")
    for (loss, target), rows in cells.items():
        shown = [interval(table(rows, key)) for key in SHOWN]
        text = [f"{mean:.3f} ± {(high - low) / 2:.3f}" for mean, low, high in shown]
        print(f"| {loss} | {target} | {np.mean(spent[loss, target]):.0f} | " + " | ".join(text) + " |")
    seeds = len(next(iter(cells.values())))
    print(f"\n{len(names)} clips, {seeds} seeds. Differences from magnitude alone:\n")
    print("| losses | targets | " + " | ".join(SHOWN.values()) + " |\n" + "|---" * (len(SHOWN) + 2) + "|")
    for (loss, target), rows in cells.items():
        if loss != "magnitude":
            text = []
            for key in SHOWN:
                mean, low, high = interval(table(rows, key) - table(cells["magnitude", target], key))
                text.append(f"{mean:+.3f} ± {(high - low) / 2:.3f}{'*' * (low > 0 or high < 0)}")
            print(f"| {loss} | {target} | " + " | ".join(text) + " |")


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--data", type=Path, default=Path("demo/data"))
    p.add_argument("--output_dir", type=Path, default=Path("bench_losses"))
    p.add_argument("--pretrained_model", default="assets/codec")
    p.add_argument("--every", type=int, default=1, help="take every N-th training file")
    p.add_argument("--scale", type=float, default=1.0, help="of the number of epochs")
    p.add_argument("--seeds", default="1,2,3")
    p.add_argument("--clips", type=int, default=-1, help="held-out clips (-1 = all)")
    args = p.parse_args()
    out = args.output_dir.resolve()
    if not (out / "prepared").exists():
        prepare(args, out)
        (out / "prepared").touch()
    cells, spent = {(loss, target): [] for target in TARGETS for loss in LOSSES}, {}
    for seed in args.seeds.split(","):  # seeds outermost: every end leaves whole rounds
        runs = []
        for loss, target in cells:
            run, cpu = train(args, out, seed, target, loss)
            runs.append(run)
            spent.setdefault((loss, target), []).append(cpu)
            print(f"{loss}, {target}, seed {seed}: {cpu:.0f} CPU s", file=sys.stderr, flush=True)
        systems = judge(args, out, seed, runs)
        for loss, target in cells:
            cells[loss, target].append(systems[f"ours_48k:{name_of(target, loss)}"])
        print(f"\nafter seed {seed} of {args.seeds}\n")
        report(cells, spent, systems["base_snac_sinc48"], systems["original"])


if __name__ == "__main__":
    main()
