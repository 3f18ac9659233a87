"""Kill a training run with -9 at random moments, inside checkpoint writes too, damage its checkpoints, and
resume: is the result the run that was never killed, bit for bit?

    OMP_NUM_THREADS=1 python benchmarks/survive.py --kills 50 --seed 1
    OMP_NUM_THREADS=1 python benchmarks/survive.py --kills 20 --seed 1 --adversarial

Makes tiny speech and a tiny codec, trains unbroken, then again: every life is killed at a random moment,
every third one while a checkpoint is being written; before every fifth one the newest checkpoint is
damaged (a bit flipped, truncated or emptied). Each life is `train_dual_head.py --resume auto`. Compares
weights, averaged weights and optimiser of the last checkpoint, those of discriminators too, and the samples
that the committed steps saw. Exit code 1 where anything differs.
"""

import argparse
import os
import random
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
import soundfile as sf
from conftest import make_snac, save_snac, voice

from snac48.checkpoint import load_checkpoint

EPOCHS = 6
ADVERSARIAL = ("--adv_weight", "1", "--adv_epochs", "2", "--disc_width", "1", "--heads", "48k")


def prepare(folder: Path) -> None:
    for i in range(15):
        (folder / "audio").mkdir(parents=True, exist_ok=True)
        sf.write(folder / "audio" / f"{i:02d}.wav", voice(0.5 + 0.1 * i, 48000, i), 48000)
    save_snac(make_snac(), folder / "codec")
    subprocess.run([sys.executable, str(ROOT / "cache_codes.py"), "--data_dir", str(folder / "audio"),
                    "--output_dir", str(folder / "codes"), "--pretrained_model", str(folder / "codec"),
                    "--device", "cpu", "--num_workers", "0", "--min_seconds", "0.1"],
                   check=True, stdout=subprocess.DEVNULL)  # fmt: skip


def command(folder: Path, out: Path, *more: str) -> list[str]:
    return [sys.executable, str(ROOT / "train_dual_head.py"), "--cache_dir", str(folder / "codes"),
            "--val_cache_dir", str(folder / "codes"), "--audio_48k_dir", str(folder / "audio"),
            "--val_audio_48k_dir", str(folder / "audio"), "--pretrained_model", str(folder / "codec"),
            "--output_dir", str(out), "--device", "cpu", "--epochs", str(EPOCHS), "--warmup_epochs", "2",
            "--epoch_ranges", f"1-3,4-{EPOCHS}", "--segment_schedule", "0.3,0.5",
            "--batch_multiplier", "1.0,1.0",
            "--batch_size", "4", "--val_segment", "0.3", "--val_limit", "2", "--num_workers", "0",
            "--save_every_batches", "1", "--ema", "0.9", "--sample_log", "--log_every", "1",
            "--main_lr", "1e-3", "--target_kind", "recordings",
            "--deterministic", "--resume", "auto", *more]  # fmt: skip


def one_life(argv: list[str], out: Path, seconds: float, in_write: bool, least=0) -> tuple[int, bool, str]:
    """(exit code, whether a half-written checkpoint was left, stderr) of a run killed after that long,
    in_write: while it writes a checkpoint, when there are `least` whole ones."""
    with tempfile.TemporaryFile("w+") as errors:
        process = subprocess.Popen(argv, stdout=subprocess.DEVNULL, stderr=errors)
        began = time.time()
        while process.poll() is None:
            late = time.time() - began > seconds and len(list(out.glob("checkpoint_*.pt"))) >= least
            if late and (not in_write or any(out.glob(".*.pt.*.tmp"))):
                process.kill()
                process.wait()
            time.sleep(0 if late else 0.01)
        errors.seek(0)
        return process.returncode, any(out.glob(".*.pt.*.tmp")), errors.read()


def damage(out: Path, how: str) -> None:
    newest = max(out.glob("checkpoint_*.pt"), key=lambda p: p.stat().st_mtime)
    data, stat = bytearray(newest.read_bytes()), newest.stat()
    if how == "bit":
        data[len(data) // 3] ^= 4
    newest.write_bytes({"bit": data, "truncated": data[: len(data) // 2], "empty": b""}[how])
    os.utime(newest, ns=(stat.st_atime_ns, stat.st_mtime_ns))


def differences(one: Path, other: Path) -> list[str]:
    found = []
    x, y = (load_checkpoint(p / f"checkpoint_epoch{EPOCHS}.pt") for p in (one, other))
    pairs = [("", x, y)]
    if "adversarial" in x:
        pairs.append(("adversarial ", x["adversarial"], y["adversarial"]))
    for whose, a, b in pairs:
        for part in ("model",) if whose else ("model", "ema"):
            found += [f"{whose}{part} {k}" for k in a[part] if not torch.equal(a[part][k], b[part][k])]
        for i, state in a["optimizer"]["state"].items():
            theirs = b["optimizer"]["state"][i]
            found += [f"{whose}optimizer {i} {k}" for k in state if not torch.equal(state[k], theirs[k])]
    if x["best"] != y["best"]:
        found.append("best")
    return found


def check_samples(out: Path, rows: int) -> list[str]:
    """What is wrong in the committed sample log: every row once an epoch."""
    epochs: dict[str, list[int]] = {}
    for line in (out / "samples.rank0.log").read_text().splitlines():
        _, epoch, *seen = line.split()
        epochs.setdefault(epoch, []).extend(map(int, seen))
    wanted = {str(e): list(range(rows)) for e in range(1, EPOCHS + 1)}
    return [] if {e: sorted(r) for e, r in epochs.items()} == wanted else [f"samples {epochs}"]


def main() -> int:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--kills", type=int, default=50)
    p.add_argument("--seed", type=int, default=1)
    p.add_argument("--adversarial", action="store_true", help="the last two epochs are adversarial")
    args = p.parse_args()
    more = ADVERSARIAL if args.adversarial else ()
    rng, folder = random.Random(args.seed), Path(tempfile.mkdtemp(prefix="survive"))
    prepare(folder)
    whole, out = folder / "whole", folder / "killed"
    began = time.time()
    subprocess.run(command(folder, whole, *more), check=True, stdout=subprocess.DEVNULL)
    length = time.time() - began
    print(f"unbroken run: {length:.1f} s", flush=True)
    kills = in_write = falls = runs = 0
    wrong: list[str] = []
    while kills < args.kills:  # a run that finishes starts over, until the kills are spent
        shutil.rmtree(out, ignore_errors=True)
        runs += 1
        while True:
            done = kills >= args.kills
            how = None
            if kills % 5 == 4 and not done and len(list(out.glob("checkpoint_*.pt"))) > 1:
                how = rng.choice(("bit", "truncated", "empty"))
                damage(out, how)
            limit = 1e9 if done else rng.uniform(0.5, 1.1) * length
            code, half, errors = one_life(command(folder, out, *more), out, limit, kills % 3 == 2)
            if how and code in (0, -9) and "is damaged" not in errors and limit > 4:
                wrong.append(f"a checkpoint ({how}) was damaged and nothing was said")
            falls += bool(how)
            if code == 0:
                break
            if code != -9:
                print(errors[-2000:])
                return 1
            kills += 1
            in_write += half
            if kills % 10 == 0:
                print(f"{kills} kills, {in_write} inside a checkpoint write", flush=True)
        wrong += differences(whole, out) + check_samples(out, 15)
    print(f"{kills} kills ({in_write} inside a checkpoint write), {falls} damaged checkpoints, {runs} runs: "
          + (f"{len(wrong)} differences, first {wrong[0]}" if wrong else "equal to the unbroken run bit "
                                                                         "for bit; "
             "every sample once an epoch"))  # fmt: skip
    shutil.rmtree(folder)
    return bool(wrong)


if __name__ == "__main__":
    sys.exit(main())
