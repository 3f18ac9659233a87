"""Which start of the 48 kHz head? All four --init, and base + sinc, on the same clips: at step 0 and
after equal steps.

    python benchmarks/bench_init.py --steps 120 --device cpu --pretrained_model assets/codec \\
        --cache_dir demo/codes/train --audio_48k_dir demo/targets/train \\
        --val_cache_dir demo/codes/valid --val_audio_48k_dir demo/targets/valid

Any flag of train_dual_head.py may follow. Trains the 48 kHz head only, at the constant warmup rate.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import torch

import train_dual_head as T
from snac48.audio import resample
from snac48.losses import head_losses, lsd, masked


@torch.no_grad()
def sinc_baseline(trainer) -> dict:
    """Validation numbers of the 24 kHz output upsampled by sinc, in place of the 48 kHz head."""
    found = []
    for i in range(len(trainer.val)):
        batch = trainer.to_device(T.collate([trainer.val[i]]))
        trainer.model.set_noise(batch["noise_key"])
        audio_24k, _ = trainer.model(batch["codes"], output_48k=False)
        up = torch.from_numpy(resample(audio_24k[0, 0].cpu().numpy(), 24000, 48000))[None, None]
        valid, target = 2 * batch["valid_24k"].cpu(), batch["audio_48k"].cpu()
        loss = head_losses(
            None, up, {k: v.cpu() for k, v in batch.items() if torch.is_tensor(v)}, trainer.args
        )
        high = lsd(masked(up[:, 0], valid), target[:, 0], valid, 48000, 12000)
        found.append((float(loss["loss_48k"]), float(high)))
    losses, highs = zip(*found)
    return {"loss_48k": sum(losses) / len(losses), "lsd_12_24k": sum(highs) / len(highs)}


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--steps", type=int, default=120)
    own, rest = p.parse_known_args()
    print(
        f"| start | loss_48k at step 0 | after {own.steps} steps | LSD 12-24 kHz at step 0 | after "
        f"{own.steps} steps |"
    )
    print("|---|---|---|---|---|")
    for init in ("sinc", "interpolate", "average", "first", "random"):
        with tempfile.TemporaryDirectory() as out:
            start = "interpolate" if init == "sinc" else init
            args, _ = T.parse_args([*rest, "--output_dir", out, "--init", start, "--epochs", "1000",
                                    "--warmup_epochs", "1000", "--epoch_ranges", "1-1000",
                                    "--segment_schedule", "1.0", "--batch_multiplier", "1.0"])  # fmt: skip
            trainer = T.Trainer(args)
            if init == "sinc":
                r = sinc_baseline(trainer)
                print(f"| base + sinc | {r['loss_48k']:.3f} | | {r['lsd_12_24k']:.3f} | |", flush=True)
                continue
            before = trainer.validate()
            epoch = None
            while trainer.step < own.steps:
                number = trainer.step // trainer.plan[0].steps
                if trainer.plan[number] is not epoch:
                    epoch = trainer.plan[number]
                    trainer.data.set_segment_length(epoch.segment)
                    trainer.data.set_epoch(epoch.number)
                    order = T.epoch_order(args.seed, epoch.number, len(trainer.data))
                    feed = iter(trainer.loader(trainer.data, T.batches(order, epoch, trainer.step, 0, 1, 1)))
                trainer.train_step([next(feed)], epoch.batch)
                trainer.step += 1
            after = trainer.validate()
            cells = [before["loss_48k"], after["loss_48k"], before["lsd_12_24k"], after["lsd_12_24k"]]
            print(f"| {init} | " + " | ".join(f"{c:.3f}" for c in cells) + " |", flush=True)


if __name__ == "__main__":
    main()
