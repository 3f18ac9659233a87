"""What decoding costs beside base SNAC: both heads, 48 kHz alone, 24 kHz alone, a stream; one process.

    python benchmarks/decode.py                        # one thread of the CPU
    python benchmarks/decode.py --device 0 --seconds 20 --batch 8

Base SNAC is the package as it comes: TorchScript Snake, weight norm computed at every call, fresh noise; on a
CPU it gains as ours does from the memory that cli.pick_device keeps. Both have snac_24khz's sizes and random
weights. The systems take turns; a row is the median of --rounds turns, its ratio that of the medians. The
stream's samples are compared with those of one pass.
"""

import argparse
import os
import statistics
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

FULL = {"sampling_rate": 24000, "encoder_dim": 48, "encoder_rates": [2, 4, 8, 8], "decoder_dim": 1024,
        "decoder_rates": [8, 8, 4, 2], "attn_window_size": None, "codebook_size": 4096, "codebook_dim": 8,
        "vq_strides": [4, 2, 1], "noise": True, "depthwise": True}  # fmt: skip


def systems(codes, args, device) -> dict:
    """{name: function that decodes `codes`}, base SNAC first."""
    import torch
    from snac import SNAC

    from snac48.codec import geometry_of, model_config
    from snac48.decoder import DualHead, DualHeadDecoder

    torch.manual_seed(0)
    base = SNAC(**FULL).eval().to(device)
    own = SNAC(**FULL)
    own.load_state_dict(base.state_dict())
    tts = DualHead(DualHeadDecoder(own), geometry_of(own, "random"), model_config(own), device, "")
    whole = {"chunk_seconds": 2 * args.seconds}

    def stock():
        with torch.inference_mode():
            return base.decode(codes)

    return {
        "base SNAC, 24 kHz": stock,
        "both heads": lambda: tts.decode(codes, **whole),
        "48 kHz alone": lambda: tts.decode(codes, ["48k"], **whole),
        "24 kHz alone": lambda: tts.decode(codes, ["24k"], **whole),
        "both heads, stream of 0.5 s": lambda: tts.decode(codes, chunk_seconds=0.5),
    }


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--seconds", type=float, default=4.0, help="of speech (default: %(default)s)")
    p.add_argument("--batch", type=int, default=1, help="utterances at once (default: %(default)s)")
    p.add_argument("--rounds", type=int, default=7, help="turns of each system (default: %(default)s)")
    p.add_argument("--threads", type=int, default=1, help="of a CPU (default: %(default)s)")
    p.add_argument("--device", default="cpu", help="cpu or a GPU's number (default: %(default)s)")
    args = p.parse_args()
    os.environ["OMP_NUM_THREADS"] = str(args.threads)
    import torch

    from snac48.cli import pick_device

    torch.set_num_threads(args.threads)
    device = pick_device(args.device)
    coarse = int(args.seconds * 24000 / 2048)
    codes = [torch.randint(4096, (args.batch, coarse * n), device=device) for n in (1, 2, 4)]
    ways, spent = systems(codes, args, device), {}
    wait = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    outputs = {name: decode() for name, decode in ways.items()}  # warms up
    for _ in range(args.rounds):
        for name, decode in ways.items():
            wait()
            began = time.perf_counter()
            decode()
            wait()
            spent.setdefault(name, []).append(time.perf_counter() - began)
    audio = args.batch * coarse * 2048 / 24000
    medians = {name: statistics.median(times) for name, times in spent.items()}
    first = next(iter(medians.values()))
    size = f"{args.batch} x {audio / args.batch:.2f} s"
    print(f"torch {torch.__version__}, {device}, {args.threads} thread(s), {size}")
    print("| decode | seconds a second of audio | times base |\n|---|---|---|")
    for name, seconds in medians.items():
        print(f"| {name} | {seconds / audio:.4f} | {seconds / first:.2f} |")
    whole, stream = outputs["both heads"], outputs["both heads, stream of 0.5 s"]
    differ = max(float((a - b).abs().max()) for a, b in zip(whole, stream))
    print(f"largest difference of stream and one pass: {differ:.1e}")


if __name__ == "__main__":
    main()
