"""What streaming costs: pieces of 1, 2 and 6 coarse codes against one pass and against windows with context
on either side, as streams were decoded before; time to the first sound; many streams at once.

    python benchmarks/stream.py                        # one thread of the CPU
    python benchmarks/stream.py --device 0 --seconds 10

snac_24khz's sizes, random weights. The ways take turns; a row is the median of --rounds turns, its ratio the
median of the ratios to one pass in the same turn.
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
CONTEXT = 3  # coarse codes on either side of a window: what the decoder can see


def cut(codes, a: int, b: int) -> list:
    return [c[:, a * f : b * f] for c, f in zip(codes, (1, 2, 4))]


def windows(tts, codes, n: int):
    """The way it was: every piece of n coarse codes with its neighbours."""
    import torch

    total, pieces = codes[0].shape[1], []
    with torch.inference_mode():
        for at in range(0, total, n):
            lo, hi = max(0, at - CONTEXT), min(total, at + n + CONTEXT)
            audio = tts.model(cut(codes, lo, hi), ["48k"])[1]
            pieces.append(audio[..., (at - lo) * 4096 : (min(total, at + n) - lo) * 4096])
    return torch.cat(pieces, -1)


def pushed(tts, codes, n: int):
    import torch

    stream = tts.open_stream(len(codes[0]), heads=["48k"])
    pieces = [stream.push(cut(codes, at, at + n))[1] for at in range(0, codes[0].shape[1], n)]
    return torch.cat([*pieces, stream.finish()[1]], -1)


def first_sound(tts, codes, n: int, old: bool) -> tuple[float, int]:
    """(seconds of computing until the first samples, coarse codes that had to be there)."""
    began = time.perf_counter()
    if old:
        windows(tts, cut(codes, 0, n + CONTEXT), n + CONTEXT)
        return time.perf_counter() - began, n + CONTEXT
    stream = tts.open_stream(heads=["48k"])
    for at in range(0, codes[0].shape[1], n):
        if stream.push(cut(codes, at, at + n))[1].shape[-1]:
            return time.perf_counter() - began, at + n


def take_turns(ways: dict, rounds: int) -> dict:
    for way in ways.values():
        way()
    spent = {name: [] for name in ways}
    for _ in range(rounds):
        for name, way in ways.items():
            began = time.perf_counter()
            way()
            spent[name].append(time.perf_counter() - began)
    return spent


def table(title: str, spent: dict, seconds: float, against: str) -> None:
    print(f"\n| {title} | seconds a second of audio | times {against} |\n|---|---|---|")
    for name, times in spent.items():
        ratio = statistics.median(a / b for a, b in zip(times, spent[against]))
        print(f"| {name} | {statistics.median(times) / seconds:.4f} | {ratio:.2f} |")


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--seconds", type=float, default=5.2, help="of speech (default: %(default)s)")
    p.add_argument("--streams", type=int, default=32, help="at once (default: %(default)s)")
    p.add_argument("--rounds", type=int, default=7, help="turns of each way (default: %(default)s)")
    p.add_argument("--threads", type=int, default=1, help="of a CPU (default: %(default)s)")
    p.add_argument("--device", default="cpu", help="cpu or a GPU's number (default: %(default)s)")
    args = p.parse_args()
    os.environ["OMP_NUM_THREADS"] = str(args.threads)
    import torch
    from snac import SNAC

    from snac48.cli import pick_device
    from snac48.codec import geometry_of, model_config
    from snac48.decoder import DualHead, DualHeadDecoder

    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    device, snac = pick_device(args.device), SNAC(**FULL)
    tts = DualHead(DualHeadDecoder(snac), geometry_of(snac, "random"), model_config(snac), device, "")
    coarse = int(args.seconds * 24000 / 2048 / 6) * 6
    codes = [torch.randint(4096, (1, coarse * n), device=device) for n in (1, 2, 4)]
    wait = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    timed = lambda way, *of: lambda: (way(*of), wait())
    seconds = coarse * 2048 / 24000
    print(f"torch {torch.__version__}, {device}, {args.threads} thread(s), {seconds:.2f} s, 48 kHz alone")
    ways = {"one pass": timed(tts.decode, codes, ["48k"])}
    for n in (1, 2, 6):
        ways[f"pieces of {n}"] = timed(pushed, tts, codes, n)
        ways[f"pieces of {n}, the way it was"] = timed(windows, tts, codes, n)
    table("one stream", take_turns(ways, args.rounds), seconds, "one pass")

    print("\n| first sound, pieces of | coarse codes needed | ms of computing |\n|---|---|---|")
    for name, n, old in (("1", 1, False), ("2", 2, False), ("6", 6, False), ("5, the way it was", 5, True)):
        found = [first_sound(tts, codes, n, old) for _ in range(args.rounds)]
        print(f"| {name} | {found[0][1]} | {1000 * statistics.median(t for t, _ in found):.0f} |")

    b, some = args.streams, cut(codes, 0, 12)
    many = [c.repeat(b, 1) for c in some]
    for n in (1, 2, 6):
        alone = lambda n=n: [pushed(tts, some, n) for _ in range(b)]
        ways = {"one after the other": timed(alone), "one batch": timed(pushed, tts, many, n)}
        seconds = b * 12 * 2048 / 24000
        table(f"{b} streams, pieces of {n}", take_turns(ways, max(1, args.rounds // 3)), seconds, "one batch")
    whole, stream = tts.decode(codes, ["48k"])[1], pushed(tts, codes, 1)
    print(f"\nlargest difference of stream and one pass: {float((whole - stream).abs().max()):.1e}")


if __name__ == "__main__":
    main()
