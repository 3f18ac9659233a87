"""Look through the checkpoints of a run, of train_rvq.py or train_dual_head.py, and say where it went wrong.

    python doctor.py                               # no checkpoints: can torch use this machine's GPUs?
    python doctor.py --ckpts rvq_ckpts/*.pt
    python doctor.py --ckpts rvq_ckpts/*_e*.pt --probe-data CACHE_DIR --csv health.csv
    python doctor.py --ckpts checkpoints/phase12_dual_head/checkpoint_*.pt

One row per checkpoint in training order. A checkpoint is sick when
    it cannot be read, or holds NaN or Inf in weights or Adam moments;
    its loss (on the probe, else the run's own validation, else its training loss) is more than --jump nats
    above the best one before it, or above guessing (ln V; token models only);
    its weights moved more than --stride times the median of the steps before, per optimiser step and relative
    to their size, and its loss does not say that it got better by it.
Exit code 0: all healthy; 1: torch can't use the GPUs that are here; 4: the first sick checkpoint is named.
"""

import argparse
import csv
import glob
import math
from pathlib import Path
from statistics import median

from snac48.checkpoint import load_checkpoint
from snac48.cli import EXIT_DIVERGED, UserError, first_line, main_guard, read_flags, unusable_gpus
from snac48.files import atomic_file
from snac48.places import check_free

COLUMNS = {  # name -> how the table prints it; the CSV has all of them in full precision
    "file": "{}", "kind": None, "epoch": "{}", "step": "{}", "val_loss": "{:.4f}", "best_val": "{:.4f}",
    "train_loss": "{:.4f}", "lr": "{:.1e}", "parameters": None, "l2": "{:.2f}", "delta": "{:.3f}",
    "delta_per_step": "{:.1e}", "nonfinite": "{}", "nonfinite_names": None, "adam_m": "{:.1e}",
    "adam_v": "{:.1e}", "adam_max": None, "zero_weights": "{:.3f}", "zero_moments": "{:.3f}",
    "probe_ce": "{:.4f}", "entropy": "{:.4f}", "skipped": None, "sick": "{}",
}  # fmt: skip


def weights_stats(state: dict) -> dict:
    """Parameter count, L2, share of exact zeros and non-finite tensors of weights and Adam moments."""
    import torch

    weights = {name: w for name, w in state["model"].items() if w.is_floating_point()}
    optimizer, moments = state.get("optimizer") or {}, {}
    for i, entry in optimizer.get("state", {}).items():
        kept = [key for key in ("exp_avg", "exp_avg_sq") if entry.get(key) is not None]
        moments |= {f"optimizer {i}.{key}": entry[key] for key in kept}
    bad = [name for name, x in (weights | moments).items() if not torch.isfinite(x).all()]
    total = sum(w.numel() for w in weights.values())
    zeros = sum(int((w == 0).sum()) for w in weights.values())
    l2 = math.sqrt(sum(w.double().square().sum().item() for w in weights.values()))
    row = {"parameters": total, "l2": l2, "nonfinite": len(bad), "nonfinite_names": " ".join(bad[:5])}
    row["zero_weights"] = zeros / max(1, total)
    first = [m for name, m in moments.items() if name.endswith(".exp_avg")]
    second = [m for name, m in moments.items() if name.endswith(".exp_avg_sq")]
    count = sum(m.numel() for m in second)
    if count:  # root mean square of the two moments: the usual step is adam_m / adam_v
        row["adam_m"] = math.sqrt(sum(m.double().square().sum().item() for m in first) / count)
        row["adam_v"] = math.sqrt(max(0.0, sum(m.double().sum().item() for m in second) / count))
        row["adam_max"] = max(0.0, *(m.max().item() for m in second))
        row["zero_moments"] = sum(int((m == 0).sum()) for m in second) / count
    rates = [g["lr"] for g in optimizer.get("param_groups", [])]
    return row | ({"lr": max(rates)} if rates else {})


def distance(a: dict, b: dict) -> float | None:
    """L2 of the difference of two state-dicts; None when their tensors differ in name or shape."""
    if a.keys() != b.keys() or any(a[k].shape != b[k].shape for k in a):
        return None
    numbers = [k for k in a if a[k].is_floating_point()]
    return math.sqrt(sum((a[k].double() - b[k].double()).square().sum().item() for k in numbers))


def probe(state: dict, name: str, windows: int) -> dict:
    """Plain cross-entropy and mean entropy of the output distribution (nats) on some windows of a corpus."""
    import numpy as np
    import torch

    from snac48.token_lm import build, token_losses
    from snac48.tokens import Corpus, Windows

    corpus, model = Corpus(name, state["args"].get("npq2", "mid")), build(state, "model")
    if corpus.vocab != model.vocab:
        raise UserError(f"--probe-data {name} holds other tokens than the checkpoint's model")
    ctx = min(model.arch["ctx"], 256)
    data = Windows(corpus, np.arange(len(corpus.lengths)), ctx, ctx)
    picked = np.linspace(0, len(data) - 1, min(windows, len(data))).astype(int)
    nll = entropy = frames = 0.0
    with torch.no_grad():
        for i in picked:
            codes = torch.from_numpy(data[i].astype(np.int32))[None]
            logits = model(codes)
            nll += token_losses(logits, codes, model.sizes)[0].sum().item()
            p = logits.softmax(-1)
            entropy += -(p * p.clamp(min=1e-30).log()).sum().item()
            frames += codes.shape[1] * model.K
    return {"probe_ce": nll / frames, "entropy": entropy / frames}


def examine(path: str, args, before: tuple | None) -> tuple[dict, dict | None]:
    """(row, state) of one checkpoint; before: (row, state) of the previous one in training order."""
    state = load_checkpoint(path)
    if "model" not in state or "global_step" not in state:
        raise UserError(f"{path} is not a checkpoint of train_rvq.py or train_dual_head.py")
    if not isinstance(state["global_step"], int):
        raise UserError(f"{path} is malformed: global_step {state['global_step']!r}")
    row = {"file": Path(path).name, "kind": state.get("kind", "dual_head"), "step": state["global_step"]}
    row |= {k: state.get(k) for k in ("epoch", "val_loss", "train_loss", "lr")}
    best, guard = state.get("best"), state.get("guard") or {}
    row |= {"best_val": best.get("loss") if isinstance(best, dict) else best, "skipped": guard.get("skipped")}
    try:
        row |= weights_stats(state)
    except (AttributeError, KeyError, TypeError, ValueError, RuntimeError) as e:
        raise UserError(f"{path} is malformed ({type(e).__name__}: {first_line(e)})") from None
    if before is not None:
        row["delta"] = distance(state["model"], before[1]["model"])
        steps = row["step"] - before[0]["step"]
        if row["delta"] is not None and steps > 0 and before[0]["l2"]:
            row["delta_per_step"] = row["delta"] / steps / before[0]["l2"]
    if args.probe_data and row["kind"] != "rvq":
        raise UserError(f"--probe-data measures token models; {path} is of train_dual_head.py: leave it out")
    if args.probe_data and not row["nonfinite"]:
        row |= probe(state, args.probe_data, args.probe_windows)
    if row["kind"] == "rvq":
        row["guessing"] = sum(map(math.log, state["arch"]["vocab"])) / len(state["arch"]["vocab"])
    return row, state


def loss_of(row: dict) -> float | None:
    return next((row[k] for k in ("probe_ce", "val_loss", "train_loss") if row.get(k) is not None), None)


def diagnose(row: dict, healthy: list[dict], jump: float, stride: float) -> str:
    """Why this checkpoint is sick, "" when it is not; healthy: the rows before it."""
    if row["nonfinite"]:
        return f"NaN or Inf in {row['nonfinite']} tensors: {row['nonfinite_names']}"
    loss = loss_of(row)
    known = [x for x in map(loss_of, healthy) if x is not None]
    if loss is not None and not math.isfinite(loss):
        return f"loss {loss}"
    if loss is not None and known and loss > min(known) + jump:
        return f"loss {loss:.3f}, {loss - min(known):.3f} above the best before it ({min(known):.3f})"
    if loss is not None and loss > row.get("guessing", math.inf) * 1.02 + 0.05:
        return f"loss {loss:.3f}, worse than guessing ({row['guessing']:.3f})"
    moves = [r["delta_per_step"] for r in healthy if r.get("delta_per_step")]
    better = loss is not None and known and loss <= min(known)
    ratio = (row.get("delta_per_step") or 0) / median(moves) if len(moves) >= 2 and not better else 0
    return f"weights moved {ratio:.0f} times as far per step as before" if ratio > stride else ""


def report(rows: list[dict]) -> None:
    names = [n for n, form in COLUMNS.items() if form and any(r.get(n) not in (None, "") for r in rows)]
    cell = lambda row, n: "-" if row.get(n) in (None, "") else COLUMNS[n].format(row[n])
    cells = [names] + [[cell(row, n) for n in names] for row in rows]
    widths = [max(len(line[i]) for line in cells) for i in range(len(names))]
    for line in cells:
        print("  ".join(cell.ljust(w) for cell, w in zip(line, widths)).rstrip())


def look_at_machine() -> int:
    """Print torch's version and the GPUs that it sees. Raises UserError where the driver sees more."""
    import torch

    if not torch.cuda.is_available() and (why := unusable_gpus()):
        raise UserError(why)
    print(f"torch {torch.__version__}, CUDA {torch.version.cuda or 'none'}")
    for i in range(torch.cuda.device_count()):
        gpu = torch.cuda.get_device_properties(i)
        print(f"GPU {i}: {gpu.name}, {gpu.total_memory / 2**30:.0f} GiB")
    if not torch.cuda.device_count():
        print("no GPU: --device cpu")
    return 0


def main() -> int:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = p.add_argument
    add("--ckpts", nargs="+", help="checkpoints of one run: files, globs (default: look at the machine)")
    add("--probe-data", help=".npq glob or cache folder: token models' entropy and loss (default: none)")
    add("--probe-windows", type=int, default=16, help="of up to 256 frames (default: %(default)s)")
    add("--csv", help="write all columns there (default: none)")
    add("--overwrite", action="store_true", help="replace --csv where it exists (default: no)")
    add("--jump", type=float, default=0.5, help="nats above the best loss before (default: %(default)s)")
    add("--stride", type=float, default=10.0, help="times the median step length (default: %(default)s)")
    args, paths = read_flags(p), set()
    if not args.ckpts:
        return look_at_machine()
    for name in args.ckpts:
        found = [name] if Path(name).exists() else glob.glob(name, recursive=True)
        if not found:
            raise UserError(f"--ckpts {name}: no such file")
        paths |= set(found)
    if args.csv:
        check_free([args.csv], paths, args.overwrite, "--csv")

    rows, order = [], []
    for path in sorted(paths):  # one at a time: a large run's checkpoints do not fit in memory together
        try:
            state = load_checkpoint(path)
            order.append((state.get("global_step", -1), state.get("epoch", -1), path))
        except UserError as e:
            rows.append({"file": Path(path).name, "sick": f"unreadable: {e}"})
    healthy, before, first, last = [], None, None, None
    for _, _, path in sorted(order):
        row, state = examine(path, args, before)
        row["sick"] = diagnose(row, healthy, args.jump, args.stride)
        if not row["sick"]:
            healthy.append(row)
        elif first is None:
            first, last = row, healthy[-1] if healthy else None
        rows.append(row)
        before = (row, state)
    report(rows)
    if args.csv:
        with atomic_file(args.csv, "w", encoding="utf-8", newline="") as f:
            table = csv.DictWriter(f, COLUMNS, extrasaction="ignore", restval="")
            table.writeheader()
            table.writerows(rows)
    for row in rows:
        if row["sick"].startswith("unreadable"):
            print(row["sick"])
    if first:
        advice = "None before it is healthy."
        if last:
            advice = f"The last healthy one is {last['file']}; go on from it with --resume and a lower --lr."
        where = f"{first['file']} (epoch {first['epoch']}, step {first['step']})"
        print(f"\nIt went wrong at {where}: {first['sick']}. {advice}")
    elif all(not r["sick"] for r in rows):
        print(f"\n{len(rows)} checkpoints, nothing wrong.")
    return EXIT_DIVERGED if any(r["sick"] for r in rows) else 0


if __name__ == "__main__":
    main_guard(main)
