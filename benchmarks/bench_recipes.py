"""Every recipe on the same speech for the same number of epochs: does its validation loss fall, how do they
compare?

    ./launch.sh demo
    python benchmarks/bench_recipes.py --demo demo --epochs 8 --device cpu

Reads the split, codes and targets that the demonstration left in --demo. Batches are small and rates larger
than a recipe's own by --rate_factor, the same for all, because these runs have some hundred steps instead of
a million; segments last 1 s; each recipe keeps its init, its share of frozen epochs, its heads, its
schedule's shape and the ratio of its rates. One more row trains all of the codec (phase10 with
--no-freeze_encoder --no-freeze_vq). Prints validation losses of every epoch, the ratio phase11-warmup /
phase11-standard of each, and evaluate.py's table of all checkpoints on the same clips.
"""

import argparse
import json
import math
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
TRAINER = [sys.executable, str(ROOT / "train_dual_head.py")]

RUNS = {  # name: (recipe, raw audio instead of the cache, more flags)
    "phase10": ("phase10", True, []),
    "phase10-full": ("phase10", True, ["--no-freeze_encoder", "--no-freeze_vq"]),
    "phase11-standard": ("phase11-standard", True, []),
    "phase11-warmup": ("phase11-warmup", True, []),
    "phase11-fast": ("phase11-fast", False, []),
    "phase12": ("phase12", False, []),
}


def command(name: str, args, out: Path) -> list[str]:
    recipe, raw, more = RUNS[name]
    printed = subprocess.run([*TRAINER, "--recipe", recipe, "--print_config", "json"], check=True,
                             stdout=subprocess.PIPE).stdout  # fmt: skip
    own = {key: each["value"] for key, each in json.loads(printed).items()}
    warm = math.ceil(own["warmup_epochs"] * args.epochs / own["epochs"])
    demo = Path(args.demo)
    if raw:
        data = ["--data_dir", demo / "data/train/audio", "--val_data_dir", demo / "data/valid/audio"]
        data += ["--native_rate", "44100"]
    else:
        data = ["--cache_dir", demo / "codes/train", "--val_cache_dir", demo / "codes/valid"]
        data += ["--audio_48k_dir", demo / "targets/train", "--val_audio_48k_dir", demo / "targets/valid"]
    rates = [f"--{k}={own[k] * args.rate_factor:g}" for k in ("lr", "main_lr", "lr_24k_final_conv")]
    return [*TRAINER, "--recipe", recipe, *map(str, data), *more, *rates,
            "--pretrained_model", args.pretrained_model, "--device", args.device, "--output_dir", str(out),
            "--epochs", str(args.epochs), "--warmup_epochs", str(warm), "--batch_size", str(args.batch_size),
            "--epoch_ranges", f"1-{args.epochs}", "--segment_schedule", "1.0", "--batch_multiplier", "1.0",
            "--val_segment", "1.0", "--num_workers", "0", "--log_every", "50"]  # fmt: skip


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--demo", default="demo", help="what ./launch.sh demo wrote")
    p.add_argument("--output_dir", default="bench_recipes")
    p.add_argument("--pretrained_model", default="assets/codec")
    p.add_argument("--epochs", type=int, default=8)
    p.add_argument("--batch_size", type=int, default=6)
    p.add_argument("--rate_factor", type=float, default=10.0)
    p.add_argument("--device", default="cpu")
    args = p.parse_args()
    curves, spent = {}, {}
    for name in RUNS:
        out, began = Path(args.output_dir) / name, time.time()
        subprocess.run(command(name, args, out), check=True, stdout=subprocess.DEVNULL)
        spent[name] = time.time() - began
        rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
        curves[name] = [r for r in rows if r.get("event") == "val"]
        print(f"{name}: {curves[name][0]['loss']:.4f} -> {curves[name][-1]['loss']:.4f}", flush=True)
    print(f"\n| run | minutes | {' | '.join(f'epoch {e}' for e in range(args.epochs + 1))} | change |")
    print("|---" * (args.epochs + 4) + "|")
    for name, vals in curves.items():
        losses = " | ".join(f"{v['loss']:.3f}" for v in vals)
        print(f"| {name} | {spent[name] / 60:.1f} | {losses} | {-vals[-1]['improved_percent']:+.1f} % |")
    pairs = zip(curves["phase11-warmup"], curves["phase11-standard"])
    ratios = " | ".join(f"{a['loss'] / b['loss']:.3f}" for a, b in pairs)
    print(f"| warmup / standard | | {ratios} | |\n", flush=True)
    subprocess.run([sys.executable, str(ROOT / "evaluate.py"), "--checkpoint",
                    *(str(Path(args.output_dir) / name / "best_model.pt") for name in RUNS), "--data_dirs",
                    str(Path(args.demo) / "data/valid/audio"), "--device", args.device, "--pretrained_model",
                    args.pretrained_model, "--output", str(Path(args.output_dir) / "evaluation.json"),
                    "--samples_dir", str(Path(args.output_dir) / "samples")], check=True)  # fmt: skip


if __name__ == "__main__":
    main()
