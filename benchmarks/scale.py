"""Millions of rows: how long index and tables take to build and to open, and the memory of a loader's worker.

python benchmarks/scale.py                        # 3,447,109 rows; needs 8 GB on the disk, takes minutes
python benchmarks/scale.py --rows 20000 --folder /tmp/scale --json

Each row has an original and a 48 kHz file, hard links to a few real ones; every second target is the
recording itself (kind copied), the others are restored (sidon). Each line of the table is a process of its
own. Private memory is what /proc/PID/smaps_rollup calls so, pages that no other process shares, of a worker
that serves batches beside one that serves nothing.
"""

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

os.environ["OPENBLAS_NUM_THREADS"] = os.environ["OMP_NUM_THREADS"] = "1"  # before numpy starts its threads

import numpy as np
import soundfile as sf

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
from snac48.cache import CodeIndex, write_shard
from snac48.codec import Geometry

GEOMETRY = Geometry("benchmark", "0" * 64, 24000, 512, (4, 2, 1), 4096)
SECONDS, LINKS = 1.5, 50_000  # of a recording; to one file (ext4 allows 65,000)
SEGMENT_S, BATCH, WORKERS = 1.0, 8, 2
MEASURED = {"source_rate": 48000, "gain": 1.0, "level": 1.0, "lag_samples": 0, "envelope_corr": 0.98}


def name_of(row: int) -> str:
    return f"speaker{row // 1000:05d}/session{row // 100 % 10}/utterance{row:08d}.wav"


def make(folder: Path, rows: int) -> None:
    """Recordings, targets, cache and manifest as the three data programs leave them."""
    folder.mkdir(parents=True, exist_ok=True)
    rng, n = np.random.default_rng(0), int(SECONDS * 24000)
    codes = [rng.integers(0, 4096, -(-n // 2048) * f, np.int16) for f in GEOMETRY.per_coarse]
    for rate, kind in ((24000, "audio"), (48000, "targets")):
        for row in range(rows):
            if row % LINKS == 0:
                real = folder / f"{kind}{row // LINKS}.wav"
                sf.write(real, rng.uniform(-0.2, 0.2, n * rate // 24000), rate)
            path = folder / kind / name_of(row)
            if row % 100 == 0:
                path.parent.mkdir(parents=True)
            os.link(real, path)
    (folder / "codes").mkdir()
    with open(folder / "targets" / "manifest.jsonl", "w", encoding="utf-8") as manifest:
        for start in range(0, rows, 1000):
            names = [name_of(row) for row in range(start, min(start + 1000, rows))]
            shard = folder / "codes" / f"codes_batch_gpu0_{start // 1000}.parquet"
            write_shard(shard, dict.fromkeys(names, (n, codes)), GEOMETRY, str(folder / "audio"))
            for i, name in enumerate(names):
                row = {"path": name, "target": name, "kind": ("copied", "sidon")[i % 2]} | MEASURED
                manifest.write(json.dumps(row) + "\n")


# ---- what is measured: each in a process of its own, that prints JSON ----


def index(folder: Path) -> dict:
    return {"rows": len(CodeIndex(str(folder / "codes")))}


def dataset(folder: Path) -> dict:
    from snac48.data import CachedCodesDataset

    return {"rows": len(CachedCodesDataset(folder / "codes", folder / "targets", SEGMENT_S))}


def private_mb(pid: int) -> float:
    lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    return sum(int(line.split()[1]) for line in lines if line.startswith("Private_")) / 1000


class Nothing:
    """What an idle worker serves."""

    def __getitem__(self, indices: list) -> dict:
        return {}


def serve(data, lists) -> tuple[float, float]:
    """(private_mb of a worker after all batches, samples/s of all workers together)."""
    from multiprocessing import active_children

    from snac48.data import loader

    batches, began = loader(data, lists, WORKERS, False), time.perf_counter()
    for _ in range(len(lists) - 2 * WORKERS):  # some are left, so that the workers still live
        next(batches)
    rate = BATCH * (len(lists) - 2 * WORKERS) / (time.perf_counter() - began)
    found = private_mb(active_children()[0].pid)
    for _ in batches:
        pass
    return found, rate


def workers(folder: Path) -> dict:
    import torch

    from snac48.data import CachedCodesDataset

    torch.set_num_threads(1)
    data = CachedCodesDataset(folder / "codes", folder / "targets", SEGMENT_S)
    order = np.random.default_rng(0).permutation(len(data))[:8000].tolist()
    lists = [order[i : i + BATCH] for i in range(0, len(order), BATCH)]
    idle, _ = serve(Nothing(), lists)
    busy, rate = serve(data, lists)
    return {"rows": len(data), "idle_mb": idle, "busy_mb": busy, "samples_per_s": rate}


STEPS = {"index built": index, "index opened": index, "48 kHz table and headers built": dataset,
         "everything opened": dataset, "workers": workers}  # fmt: skip


def measured(step: str, folder: Path) -> dict:
    """What step's function returns, with its seconds (imports aside) and the peak MB of its process."""
    command = [sys.executable, __file__, "--step", step, "--folder", str(folder)]
    return json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout)


def in_this_process(step: str, folder: Path) -> None:
    import snac48.data  # noqa: F401  before the clock starts

    began = time.perf_counter()
    found = STEPS[step](folder) | {"seconds": time.perf_counter() - began}
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1000
    print(json.dumps(found | {"peak_mb": peak}))


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--rows", type=int, default=3_447_109)
    p.add_argument("--folder", type=Path, help="made there and kept (default: a temporary folder)")
    p.add_argument("--json", action="store_true", help="print one JSON object instead of a table")
    p.add_argument("--step", choices=STEPS, help=argparse.SUPPRESS)
    args = p.parse_args()
    if args.step:
        return in_this_process(args.step, args.folder)
    with tempfile.TemporaryDirectory() as temporary:
        folder = args.folder or Path(temporary)
        if not (folder / "codes").exists():
            make(folder, args.rows)
        found = {step: measured(step, folder) for step in STEPS}
    if args.json:
        print(json.dumps(found))
        return None
    print(f"| {found['workers']['rows']:,} rows | seconds | peak MB of the process |\n|---|---|---|")
    for step, each in found.items():
        print(f"| {step} | {each['seconds']:.2f} | {each['peak_mb']:.0f} |")
    each = found["workers"]
    more, rate = each["busy_mb"] - each["idle_mb"], each["samples_per_s"]
    print(f"\nPrivate memory of a worker: {each['busy_mb']:.1f} MB, {more:.1f} MB more than an idle one's.")
    print(f"{WORKERS} workers: {rate:,.0f} samples/s.")
    return None


if __name__ == "__main__":
    main()
