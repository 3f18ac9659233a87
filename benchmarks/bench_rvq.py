"""Does the token model learn real speech? The patterns at equal CPU time against the unigram entropy.

    python benchmarks/bench_rvq.py CACHE_DIR --cpu_seconds 420 --patterns depth,parallel

CACHE_DIR: SNAC codes of recordings (cache_codes.py). Whole files are held out by the split of train_rvq.py;
the loss is its plain validation cross-entropy (EMA weights, best epoch). One thread. Each pattern first runs
one epoch and two, to learn what one costs, then as many as fit the time, so that the rate decays to its end.
Held-out files whose tokens equal those of a training file (copies in the corpus) are counted and said.
"""

import argparse
import json
import math
import os
import resource
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import numpy as np

from snac48.tokens import Corpus, split_windows

FIXED = {"device": "cpu", "num_workers": 0, "accum": 1, "heads": 4, "depth_layers": 2, "dropout": 0.2}
FIXED |= {"ema": 0.99, "warmup-ratio": 0.05, "cb-weights": "uniform"}
FIXED |= {"eval-audio-every": 0, "archive-every": 0, "keep-archived": 1}


def unigram(corpus: Corpus, files, val) -> tuple[float, float]:
    """(entropy of the training tokens, cross-entropy of held-out tokens under add-1/2 training counts): nats,
    mean over the K slots. The entropy is the empirical one: it errs low, against us."""
    tokens, held = (np.concatenate([corpus.read(i) for i in part]) for part in (files, val))
    entropy = cross = 0.0
    for k, V in enumerate(corpus.vocab):
        counts = np.bincount(tokens[:, k], minlength=V).astype(float)
        p = counts[counts > 0] / counts.sum()
        entropy -= (p * np.log(p)).sum()
        cross -= np.log((counts + 0.5) / (counts + 0.5).sum())[held[:, k]].mean()
    return entropy / corpus.K, cross / corpus.K


def train(args, pattern: str, epochs: int, folder: Path) -> tuple[float, list[dict]]:
    """CPU seconds spent (everything, start and validation too) and the metrics of a run."""
    sizes = {"epochs": epochs, "ctx": args.ctx, "batch": args.batch, "d_model": args.d_model, "lr": args.lr}
    sizes |= {"layers": args.layers, "depth_d_model": args.d_model, "pattern": pattern}
    flags = [f"--{name}={value}" for name, value in (FIXED | sizes).items()]
    began = resource.getrusage(resource.RUSAGE_CHILDREN)
    command = [sys.executable, ROOT / "train_rvq.py", "--data", args.cache, "--save_dir", folder]
    command += [*flags, "--fused-optim", "--quiet"]
    subprocess.run(command, check=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
    ended = resource.getrusage(resource.RUSAGE_CHILDREN)
    spent = ended.ru_utime + ended.ru_stime - began.ru_utime - began.ru_stime
    return spent, [json.loads(x) for x in open(folder / "metrics.jsonl")]


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("cache", help="cache folder of cache_codes.py")
    p.add_argument("--cpu_seconds", type=float, default=420, help="for each pattern")
    p.add_argument("--patterns", default="depth,parallel")
    p.add_argument("--ctx", type=int, default=64, help="coarse frames")
    p.add_argument("--batch", type=int, default=16)
    p.add_argument("--d_model", type=int, default=96)
    p.add_argument("--layers", type=int, default=3)
    p.add_argument("--lr", type=float, default=2e-3)
    args = p.parse_args()
    corpus = Corpus(args.cache)
    own, val = (part.files for part in split_windows(corpus, None, args.ctx, args.ctx // 2, 42))
    entropy, cross = unigram(corpus, own, val)
    known = {corpus.read(i).tobytes() for i in own}
    copies = sum(corpus.read(i).tobytes() in known for i in val)
    print(
        f"{len(own)} files, {corpus.lengths[own].sum()} frames; held out {len(val)} files, "
        f"{corpus.lengths[val].sum()} frames, {copies} of the files copies; K {corpus.K}, V {corpus.vocab[0]}"
    )
    uniform = f"nats: ln V {math.log(corpus.vocab[0]):.3f}, unigram entropy of training tokens {entropy:.3f}"
    print(f"{uniform}, held-out tokens under it {cross:.3f}\n")
    rows = []
    with tempfile.TemporaryDirectory() as tmp:
        for pattern in args.patterns.split(","):
            one, two = (train(args, pattern, n, Path(tmp) / f"{pattern}_{n}")[0] for n in (1, 2))
            epochs = max(2, 1 + round((args.cpu_seconds - one) / max(two - one, 0.1)))
            spent, lines = train(args, pattern, epochs, Path(tmp) / pattern)
            best = min((m for m in lines if m.get("event") == "val"), key=lambda m: m["val_loss"])
            rows.append((pattern, lines[0]["parameters"] / 1e6, epochs, spent, best))
    print("\n| pattern | parameters | epochs | CPU s | val CE | below unigram | ppl | bits/frame | bits/s |")
    print("|---|---|---|---|---|---|---|---|---|")
    for pattern, size, epochs, spent, best in rows:
        ce, ppl = best["val_loss"], f"{best['ppl']:.1f}"
        bits = f"{best['bits_per_frame']:.2f} | {best['bits_per_s']:.0f}"
        run = f"{pattern} | {size:.2f} M | {epochs} | {spent:.0f}"
        print(f"| {run} | {ce:.3f} | {entropy - ce:.3f} | {ppl} | {bits} |")
    for pattern, _, _, _, best in rows:
        print(f"{pattern}: CE by slot {' '.join(f'{c:.2f}' for c in best['ce'])}")


if __name__ == "__main__":
    main()
