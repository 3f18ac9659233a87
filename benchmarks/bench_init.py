"""Which start of the 48 kHz head? All four --init, and base + sinc, on the same clips: at step 0 and
after equal steps.

    python benchmarks/bench_init.py --steps 120 --device cpu --pretrained_model assets/codec \\
        --cache_dir demo/codes/train --audio_48k_dir demo/targets/train \\
        --val_cache_dir demo/codes/valid --val_audio_48k_dir demo/targets/valid

Any flag of train_dual_head.py may follow. Trains the 48 kHz head only, at the constant warmup rate, to the
end of the epoch in which --steps lies.
"""

import argparse
import json
import math
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import torch

from snac48.audio import resample
from snac48.data import to_device
from snac48.losses import asked, distances, head_losses
from snac48.training import open_run, prepare


def train(flags: list[str], *more) -> str:
    command = [sys.executable, str(ROOT / "train_dual_head.py"), *flags, *map(str, more)]
    return subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout


def warmup_only(epochs: int) -> list:
    return ["--epochs", epochs, "--warmup_epochs", epochs, "--epoch_ranges", f"1-{epochs}",
            "--segment_schedule", "1.0", "--batch_multiplier", "1.0"]  # fmt: skip


@torch.no_grad()
def sinc_baseline(run, state) -> dict:
    """Validation means of the 24 kHz output upsampled by sinc, in place of the 48 kHz head."""
    found = []
    for i in range(len(run.val)):
        batch = prepare(run, state, run.val[[i]])
        state.model.set_noise(batch["noise_key"])
        audio_24k, _ = state.model(batch["codes"], ["24k"])
        up = torch.from_numpy(resample(audio_24k[0, 0].cpu().numpy(), 24000, 48000))[None, None]
        batch, audio = to_device(batch, "cpu"), (None, up)
        losses = head_losses(audio, batch, **asked(run.args, run.geometry))
        found.append({k: float(v) for k, v in (losses | distances(audio, batch)).items()})
    return {k: sum(each[k] for each in found) / len(found) for k in found[0]}


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--steps", type=int, default=120)
    own, flags = p.parse_known_args()
    with tempfile.TemporaryDirectory() as folder:
        config = json.loads(train(flags, *warmup_only(1), "--output_dir", folder, "--print_config", "json"))
        run, state = open_run(argparse.Namespace(**{k: v["value"] for k, v in config.items()}), None)
        sinc = sinc_baseline(run, state)
    each = run.plan[0].steps
    epochs = math.ceil(own.steps / each)
    after = f"after {epochs * each} steps"
    print(
        f"| start | loss_48k at step 0 | {after} | LSD 12-24 kHz at step 0 | {after} |\n|---|---|---|---|---|"
    )
    print(f"| base + sinc | {sinc['loss_48k']:.3f} | | {sinc['lsd_12_24k']:.3f} | |", flush=True)
    for init in ("interpolate", "average", "first", "random"):
        with tempfile.TemporaryDirectory() as out:
            train(flags, *warmup_only(epochs), "--init", init, "--output_dir", out)
            start = json.loads((Path(out) / "baseline_metrics.json").read_text())
            rows = map(json.loads, (Path(out) / "metrics.jsonl").read_text().splitlines())
            end = [row for row in rows if row.get("event") == "val"][-1]
        cells = [x[key] for key in ("loss_48k", "lsd_12_24k") for x in (start, end)]
        print(f"| {init} | " + " | ".join(f"{c:.3f}" for c in cells) + " |", flush=True)


if __name__ == "__main__":
    main()
