"""Samples a second of the data path on one core, batches included: the loader people had, and ours.

python benchmarks/data.py                # writes 1,000 recordings of 7 s (1 GB) to a temporary folder

The older loader, written down plainly: an item reads the parquet file of 1,000 rows that its codes are in,
decodes both audio files whole, resamples where the rate is another, and crops; torch stacks the items. Both
read the same rows, in alternation, in one process on one core, files in the page cache; a second is one of
that core's time.
"""

import argparse
import os
import resource
import statistics
import sys
import tempfile
import time
from pathlib import Path

os.environ["OPENBLAS_NUM_THREADS"] = os.environ["OMP_NUM_THREADS"] = "1"  # before numpy starts its threads

import numpy as np
import pyarrow.parquet as pq
import soundfile as sf
import soxr
import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
from snac48.cache import write_shard
from snac48.codec import Geometry
from snac48.data import CachedCodesDataset, loader, to_device
from snac48.files import write_jsonl

GEOMETRY = Geometry("benchmark", "0" * 64, 24000, 512, (4, 2, 1), 4096)
COARSE, SEGMENT_S = 2048, 1.0


def make_corpus(folder: Path, rows: int, seconds: float, rate: int, kind: str) -> None:
    """Recordings at `rate`, 48 kHz targets of that kind with a manifest, a cache in shards of 1,000 rows."""
    rng, n = np.random.default_rng(0), int(seconds * 24000)
    for name in ("audio", "targets", "codes"):
        (folder / name).mkdir(parents=True)
    coarse, cached, manifest = -(-n // COARSE), {}, []
    for i in range(rows):
        rel = f"{i:06d}.wav"
        x = rng.integers(-8000, 8000, 2 * n, np.int16)
        sf.write(folder / "audio" / rel, x[: n * rate // 24000], rate)
        if rate == 48000:
            os.link(folder / "audio" / rel, folder / "targets" / rel)
        else:
            sf.write(folder / "targets" / rel, x, 48000)
        codes = [rng.integers(0, 4096, coarse * f, np.int16) for f in GEOMETRY.per_coarse]
        cached[rel] = (n, codes)
        manifest.append({"path": rel, "target": rel, "kind": kind})
    write_jsonl(folder / "targets" / "manifest.jsonl", manifest)
    for start in range(0, rows, 1000):
        part = dict(list(cached.items())[start : start + 1000])
        write_shard(
            folder / "codes" / f"codes_batch_gpu0_{start // 1000}.parquet", part, GEOMETRY, folder / "audio"
        )


class OlderLoader(torch.utils.data.Dataset):
    """One item at a time. free_codes: without the parquet file, its largest part."""

    def __init__(self, folder: Path, rows: int, free_codes: bool = False):
        self.folder, self.rows, self.free_codes = folder, rows, free_codes
        self.shards = sorted((folder / "codes").glob("*.parquet"))

    def __len__(self) -> int:
        return self.rows

    def codes(self, i: int) -> dict:
        row = pq.read_table(self.shards[i // 1000]).slice(i % 1000, 1).to_pylist()[0]
        return {k: torch.tensor(row[f"codes_scale_{k}"]) for k in range(3)} | {"path": row["file_path"]}

    def decoded(self, path: Path, rate: int):
        x, found = sf.read(path, dtype="float32")
        return torch.from_numpy(soxr.resample(x, found, rate) if found != rate else x)

    def __getitem__(self, i: int) -> tuple:
        if self.free_codes:
            codes, path = {k: torch.zeros(83 * 2**k, dtype=torch.int64) for k in range(3)}, f"{i:06d}.wav"
        else:
            codes = self.codes(i)
            path = codes["path"]
        low = self.decoded(self.folder / "audio" / path, 24000)
        high = self.decoded(self.folder / "targets" / path, 48000)
        length = GEOMETRY.coarse_len(SEGMENT_S)
        start = int(torch.randint(0, len(codes[0]) - length, ()))
        first, n = start * COARSE, length * COARSE
        scales = [codes[k][start * 2**k : (start + length) * 2**k] for k in range(3)]
        return *scales, low[first : first + n], high[2 * first : 2 * (first + n)]


def cpu_seconds() -> float:
    """Of this process and of the loader workers that have ended."""
    ended = resource.getrusage(resource.RUSAGE_CHILDREN)
    return time.process_time() + ended.ru_utime + ended.ru_stime


def rate_of(batches, device=None) -> float:
    """Samples a second."""
    began, n = cpu_seconds(), 0
    for batch in batches:
        if device:
            batch = to_device(batch, device)
        n += len(batch["valid_24k"] if isinstance(batch, dict) else batch[0])
    return n / (cpu_seconds() - began)


def measure(folder: Path, rows: int, repeats: int, batch: int) -> dict[str, list[float]]:
    """Samples a second of each way, `repeats` times in alternation."""
    ours = CachedCodesDataset(folder / "codes", folder / "targets", SEGMENT_S)
    older, spared = OlderLoader(folder, rows), OlderLoader(folder, rows, free_codes=True)
    plain = lambda data, lists, n=0: torch.utils.data.DataLoader(data, batch_sampler=lists, num_workers=n)
    runs = {
        "older": lambda lists: rate_of(plain(older, lists[:2])),
        "older, codes for free": lambda lists: rate_of(plain(spared, lists[:4])),
        "ours": lambda lists: rate_of(loader(ours, lists, 0, False)),
        "ours, 24 kHz audio made on this core": lambda lists: rate_of(loader(ours, lists, 0, False), "cpu"),
        "older, sent by a worker process": lambda lists: rate_of(plain(older, lists[:2], 1)),
        "ours, sent by a worker process": lambda lists: rate_of(loader(ours, 4 * lists, 1, False)),
    }
    rng, found = np.random.default_rng(1), {}
    for _ in range(repeats + 1):
        order = rng.permutation(rows).tolist()
        lists = [order[i : i + batch] for i in range(0, rows, batch)]
        for name, run in runs.items():
            found.setdefault(name, []).append(run(lists))
    return {name: rates[1:] for name, rates in found.items()}  # the first round fills caches


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--rows", type=int, default=1000)
    p.add_argument("--seconds", type=float, default=7.0, help="of each recording")
    p.add_argument("--batch", type=int, default=32)
    p.add_argument("--repeats", type=int, default=7)
    args = p.parse_args()
    os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})
    torch.set_num_threads(1)
    print(
        "| recordings | way | samples/s, median | of them | times the older loader |\n|---|---|---|---|---|"
    )
    for rate, kind in ((48000, "copied"), (24000, "sidon")):
        with tempfile.TemporaryDirectory() as folder:
            make_corpus(Path(folder), args.rows, args.seconds, rate, kind)
            found = measure(Path(folder), args.rows, args.repeats, args.batch)
        base = found["older"]
        for name, rates in found.items():
            ratio = statistics.median(a / b for a, b in zip(rates, base))
            span = f"{min(rates):,.0f} to {max(rates):,.0f}"
            cells = (
                f"{rate // 1000} kHz, {kind}",
                name,
                f"{statistics.median(rates):,.0f}",
                span,
                f"{ratio:.1f}",
            )
            print("| " + " | ".join(cells) + " |", flush=True)


if __name__ == "__main__":
    main()
