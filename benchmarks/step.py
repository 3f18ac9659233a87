"""Time, bytes and memory of a training step of the full-size decoder, ours and a plain loop, in alternation.

    python benchmarks/step.py                      # CPU, main phase and warmup, 7 rounds
    python benchmarks/step.py --device 0 --seconds 4 --batch 24 --modes older,default,compile
    python benchmarks/step.py --before DIR         # a checkout of an earlier commit, as one more mode

older: what people ran before this project, written plainly: snac's TorchScript Snake, a dense DecoderBlock
as 48 kHz head, L1 + complex STFT (1024 to 8192, no window) on both heads, AdamW on all, clip 1, fp32. plain:
ours with --plain; default: what a run on this device does without a flag; bf16, compile, compile-bf16: with
these flags.
Bytes are counted, not timed: what every operator reads and writes, a kernel of ours being one (views are
free; torch.compile and --plain are not counted). kept: what the forward keeps for the backward.
"""

import argparse
import json
import statistics
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
MODEL = {"sampling_rate": 24000, "encoder_dim": 48, "encoder_rates": [2, 4, 8, 8], "decoder_dim": 1024,
         "decoder_rates": [8, 8, 4, 2], "attn_window_size": None, "codebook_size": 4096, "codebook_dim": 8,
         "vq_strides": [4, 2, 1], "noise": True, "depthwise": True}  # fmt: skip
N_FFTS = (1024, 2048, 4096)


def options() -> argparse.Namespace:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--device", default="cpu")
    p.add_argument("--threads", type=int, default=2)
    p.add_argument("--batch", type=int, default=2, help="utterances a step")
    p.add_argument("--seconds", type=float, default=0.94, help="segment (whole coarse codes of it are taken)")
    p.add_argument("--rounds", type=int, default=7, help="steps of every mode, in alternation")
    p.add_argument("--modes", default="older,plain,default,bf16")
    p.add_argument("--phases", default="main,warmup")
    p.add_argument("--before", default="", help="folder of an earlier checkout")
    p.add_argument("--worker", default="", help=argparse.SUPPRESS)
    return p.parse_args()


# ---- in a process of its own: one mode ----


def worker(args, mode: str, phase: str) -> None:
    """A line of JSON for every line on stdin: {seconds, loss}; "count" gives bytes instead."""
    sys.path.insert(0, args.before if mode == "before" else str(ROOT))
    import torch

    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    device = torch.device("cpu" if args.device == "cpu" else f"cuda:{args.device}")
    step = (older_step if mode == "older" else our_step)(device, mode, phase)
    batch, twice = (make_batch(args, n, device) for n in (args.batch, 2 * args.batch))
    seconds = batch["audio_24k"].numel() / 24000
    for line in sys.stdin:
        if line.strip() == "count":
            step(batch)  # the first one makes the optimiser's state
            moved, kept = count(step, batch)
            found = {"GB": moved / 1e9 / seconds, "MB": (count(step, twice)[1] - kept) / 1e6 / seconds}
        else:
            began = time.perf_counter()
            loss = step(batch)
            found = {"seconds": (time.perf_counter() - began) / seconds, "loss": loss}
        print(json.dumps(found), flush=True)


def make_batch(args, utterances: int, device) -> dict:
    import torch

    coarse = max(1, int(args.seconds * 24000 / 2048 + 1e-9))
    codes = [torch.randint(4096, (utterances, coarse * f), device=device) for f in (1, 2, 4)]
    n = coarse * 2048
    return {
        "codes": codes,
        "audio_24k": 0.1 * torch.randn(utterances, 1, n, device=device),
        "audio_48k": 0.1 * torch.randn(utterances, 1, 2 * n, device=device),
        "valid_24k": torch.full((utterances,), n, device=device),
        "phase_true": torch.ones(utterances, dtype=torch.bool, device=device),
        "noise_key": torch.arange(utterances, device=device),
    }


def older_step(device, mode, phase):
    """The loop people had."""
    import torch
    from snac import SNAC
    from snac.layers import DecoderBlock, Snake1d, WNConv1d
    from torch import nn

    snac = SNAC(**MODEL).to(device)
    layers = list(snac.decoder.model)
    trunk, head_24k = nn.Sequential(*layers[:-3]), nn.Sequential(*layers[-3:])
    head_48k = nn.Sequential(
        Snake1d(64), DecoderBlock(64, 64, 2), WNConv1d(64, 1, kernel_size=7, padding=3), nn.Tanh()
    ).to(device)
    parts = [head_48k] if phase == "warmup" else [trunk, head_24k, head_48k]
    parameters = [p for part in parts for p in part.parameters()]
    snac.requires_grad_(False)
    for p in parameters:
        p.requires_grad_(True)
    optimizer = torch.optim.AdamW(parameters, lr=1e-5)

    def distance(x, target):
        total = (x - target).abs().mean()
        for n in (1024, 2048, 4096, 8192):
            one = torch.ones(n, device=device)  # no window: torch's own default, without its warning
            a, b = (torch.stft(v[:, 0], n, n // 4, window=one, return_complex=True) for v in (x, target))
            total = total + torch.view_as_real(a - b).abs().mean()
        return total

    def step(batch):
        optimizer.zero_grad()
        with torch.no_grad():
            z = snac.quantizer.from_codes(batch["codes"])
        with torch.set_grad_enabled(phase != "warmup"):
            h = trunk(z)
        loss = distance(head_48k(h), batch["audio_48k"])
        if phase != "warmup":
            loss = loss + 0.3 * distance(head_24k(h), batch["audio_24k"])
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        return loss.item()

    return step


def our_step(device, mode, phase):
    """What train_step of train_dual_head.py computes, on one fixed batch."""
    import torch
    from snac import SNAC

    from snac48.decoder import DualHeadDecoder
    from snac48.losses import head_losses

    fused = device.type == "cuda"
    if mode != "before":
        from snac48 import cli, kernels

        fused = mode != "plain"
        kernels.use_plain(not fused)
        cli.pick_device(str(device))  # sets up memory
    model = DualHeadDecoder(SNAC(**MODEL)).to(device).train()
    heads = ("48k",) if phase == "warmup" else ("24k", "48k")
    parts = [model.head_48k] if phase == "warmup" else [model.trunk, model.head_24k, model.head_48k]
    model.requires_grad_(False)
    parameters = [p for part in parts for p in part.parameters()]
    for p in parameters:
        p.requires_grad_(True)
    model.trunk_frozen = phase == "warmup"
    optimizer = torch.optim.AdamW(parameters, lr=1e-5, fused=fused)
    forward = torch.compile(model) if "compile" in mode else model
    bf16 = "bf16" in mode or (mode == "default" and device.type == "cuda")

    def step(batch):
        optimizer.zero_grad(set_to_none=True)
        model.set_noise(batch["noise_key"])
        with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
            audio = forward(batch["codes"], heads)
        losses = head_losses(audio, batch, {"l1": 1.0, "stft": 1.0}, n_ffts=N_FFTS)
        loss = losses["loss_48k"].mean()
        if phase != "warmup":
            loss = loss + 0.3 * losses["loss_24k"].mean()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        return loss.item()

    return step


def count(step, batch) -> tuple[int, int]:
    """(bytes that the operators of a step read and write, bytes kept for its backward, weights included)."""
    import torch
    from torch.utils._python_dispatch import TorchDispatchMode
    from torch.utils._pytree import tree_leaves

    class Bytes(TorchDispatchMode):
        total = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            if not func.is_view and func._schema.name not in (
                "aten::detach",
                "aten::empty",
                "aten::empty_like",
            ):
                seen = {}
                for x in tree_leaves((args, kwargs, out)):
                    if isinstance(x, torch.Tensor):  # an expanded one is read as often as it is stored
                        storage = x.untyped_storage()
                        seen[storage.data_ptr(), x.storage_offset()] = min(x.nbytes, storage.nbytes())
                # a result in the place of an operand is read and written
                again = sum(seen.get((x.untyped_storage().data_ptr(), x.storage_offset()), 0)
                            for x in tree_leaves(args) if isinstance(x, torch.Tensor)
                            and func._schema.is_mutable and x is args[0])  # fmt: skip
                self.total += sum(seen.values()) + again
            return out

    kept = {}
    note = lambda t: kept.update({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes()}) or t
    with Bytes() as traffic, torch.autograd.graph.saved_tensors_hooks(note, lambda t: t):
        step(batch)
    return traffic.total, sum(kept.values())


# ---- all modes, in alternation ----


def main() -> None:
    args = options()
    if args.worker:
        return worker(args, *args.worker.split(":"))
    modes = [*args.modes.split(","), *(["before"] if args.before else [])]
    for phase in args.phases.split(","):
        measure(args, modes, phase)


def measure(args, modes: list[str], phase: str) -> None:
    own = [a for a in sys.argv[1:] if not a.startswith("--worker")]
    start = lambda mode: subprocess.Popen(
        [sys.executable, __file__, *own, "--worker", f"{mode}:{phase}"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    workers = {mode: start(mode) for mode in modes}

    def ask(mode, what="step"):
        workers[mode].stdin.write(what + "\n")
        workers[mode].stdin.flush()
        return json.loads(workers[mode].stdout.readline())

    losses = {mode: ask(mode)["loss"] for mode in modes}  # the first step: not timed
    counted = {mode: ask(mode, "count") for mode in modes if "plain" not in mode and "compile" not in mode}
    times = {mode: [] for mode in modes}
    for _ in range(args.rounds):
        for mode in modes:
            times[mode].append(ask(mode)["seconds"])
    for each in workers.values():
        each.stdin.close()
        each.wait()
    base = statistics.median(times[modes[0]])
    print(
        f"{phase}: seconds a second of audio (median of {args.rounds}, quartiles), speed against {modes[0]}"
    )
    for mode in modes:
        low, middle, high = statistics.quantiles(times[mode], n=4)
        more = counted.get(mode)
        more = f"  {more['GB']:6.2f} GB moved  {more['MB']:6.0f} MB kept" if more else ""
        said = f"{middle:7.3f} ({low:.3f} to {high:.3f})  {base / middle:5.2f} x  loss {losses[mode]:.5f}"
        print(f"  {mode:14} {said}{more}", flush=True)


if __name__ == "__main__":
    main()
