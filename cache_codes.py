"""Encode an audio folder once: FULL SNAC codes of every file, in parquet, for training at any segment length.

    python cache_codes.py --data_dir corpus/train/audio --output_dir codes/train --device 0
    python cache_codes.py --data_dir corpus/train/audio --output_dir codes/train --device 1  # beside it
    python cache_codes.py --data_dir assets/speech --output_dir codes/demo --device cpu \\
        --pretrained_model assets/codec --min_seconds 0.5                          # tiny, on a CPU

Any number of processes on any machines that see the folder share the work; a restart skips what is done.
Writes codes_batch_gpu{G}_{N}.parquet, metadata.json (rows, seconds, skipped by reason), skipped.jsonl (one
line a file left out, with the reason) and work/ (claims). Columns: file_path (relative, POSIX), audio_length
(samples at the model's rate), codes_scale_0 … codes_scale_{K-1} (list<int16>).
"""

from __future__ import annotations

import collections
import concurrent.futures
import json
import math
import multiprocessing
import sys
import time
from dataclasses import asdict
from pathlib import Path

from snac48 import DEFAULT_MODEL
from snac48.audio import AudioError, find_audio, link_roots, read_audio, resample, resolve_inside
from snac48.cache import write_shard
from snac48.cli import (
    EXIT_BAD_INPUT,
    EXIT_STOPPED,
    Parser,
    StopFlag,
    UserError,
    ignore_stop_signals,
    main_guard,
    pick_device,
    stop_at_once,
)
from snac48.codec import Geometry, align_samples, encode, fold_weight_norm, geometry_of, load_snac
from snac48.files import write_json, write_jsonl
from snac48.runlog import RunLog, human_time
from snac48.work import SharedWork

# ---- encoding ----

MAX_BATCH_SECONDS = 240  # of audio at once, however many clips: bounds the memory


def _read_one(job: tuple[str, str, tuple, int]):
    """Worker process: (root, rel, allowed link roots, rate) -> (rel, samples | None, reason | None)."""
    root, rel, allowed, rate = job
    try:
        rel.encode("utf-8")
        samples, source_rate = read_audio(resolve_inside(root, rel, allowed))
        return rel, resample(samples, source_rate, rate), None
    except UnicodeEncodeError:
        return rel.encode("utf-8", "backslashreplace").decode(), None, "file name is not UTF-8"
    except AudioError as e:
        return rel, None, str(e)


class Reader:
    """Decodes and resamples files in worker processes, in order, a bounded number ahead."""

    def __init__(self, root: str, rate: int, num_workers: int, stop: StopFlag):
        self.stop, self.root, self.rate, self.allowed = stop, root, rate, link_roots(root)
        self.workers = num_workers
        context = multiprocessing.get_context("forkserver")  # not fork: CUDA is already up in the parent
        self.pool = None
        if num_workers:
            self.pool = concurrent.futures.ProcessPoolExecutor(num_workers, context, ignore_stop_signals)

    def __call__(self, files):
        jobs = ((self.root, rel, self.allowed, self.rate) for rel in files)
        if self.pool is None:
            yield from map(_read_one, jobs)
            return
        ahead = collections.deque()
        try:
            for job in jobs:
                ahead.append(self.pool.submit(_read_one, job))
                if len(ahead) >= 4 * self.workers:
                    yield ahead.popleft().result()
            while ahead:
                yield ahead.popleft().result()
        except concurrent.futures.process.BrokenProcessPool:
            time.sleep(0.2)  # a signal to the group may have reached a starting worker before us
            if self.stop:
                return
            raise UserError("a decoding process died (out of memory, or a file that crashes the decoder) "
                            f"near {job[1]}; move that file away or lower "
                            "--num_workers") from None  # fmt: skip

    def close(self):
        if self.pool is not None:
            self.pool.shutdown(wait=False, cancel_futures=True)


def encode_unit(model, reader, files, args, device, stop):
    """Encode one unit of files. Returns (rows {rel: (length, codes)}, skipped [{file_path, reason, bad}]).

    Only clips of *equal padded length* share a batch: padding one further would change its last frames.
    """
    import numpy as np
    import torch

    rate, align = model.sampling_rate, align_samples(model)
    buckets = collections.defaultdict(list)  # padded length -> [(rel, samples)]
    held, budget = 0, 30 * 60 * rate  # at most half an hour of audio waits for companions
    rows, skipped = {}, []

    def flush(length):
        batch = buckets.pop(length)
        audio = np.zeros((len(batch), 1, length), np.float32)
        for i, (_, x) in enumerate(batch):
            audio[i, 0, : len(x)] = x
        with torch.inference_mode():
            codes = [
                c.to(torch.int16).cpu().numpy() for c in encode(model, torch.from_numpy(audio).to(device))
            ]
        for i, (rel, x) in enumerate(batch):
            rows[rel] = (len(x), [c[i] for c in codes])
        return len(batch) * length

    for rel, samples, reason in reader(files):
        if stop:
            return None
        if reason is not None:
            skipped.append({"file_path": rel, "reason": reason, "bad": True})
            continue
        if len(samples) < args.min_seconds * rate:
            why = f"shorter than --min_seconds {args.min_seconds:g}"
            skipped.append(
                {"file_path": rel, "reason": why, "bad": False, "seconds": round(len(samples) / rate, 3)}
            )
            continue
        padded = math.ceil(len(samples) / align) * align
        buckets[padded].append((rel, samples))
        held += padded
        full = min(args.batch_size, max(1, MAX_BATCH_SECONDS * rate // padded))
        if len(buckets[padded]) >= full:
            held -= flush(padded)
        while held > budget:
            held -= flush(max(buckets, key=lambda n: n * len(buckets[n])))
    if stop:
        return None
    for length in sorted(buckets):
        flush(length)
    return rows, skipped


# ---- the job ----


def parse_args(argv=None):
    p = Parser(description=__doc__)
    p.add_argument("--data_dir", required=True, help="audio folder, read recursively")
    p.add_argument("--output_dir", required=True, help="cache folder; may be shared by several processes")
    p.add_argument("--pretrained_model", default=DEFAULT_MODEL, help="SNAC folder, hub id, or hub id@COMMIT")
    p.add_argument("--device", default="0", help="GPU number or cpu")
    p.add_argument("--batch_size", type=int, default=32, help="clips of one length encoded together, at most")
    p.add_argument("--rows_per_file", type=int, default=1000, help="audio files a parquet file (and a claim)")
    p.add_argument("--min_seconds", type=float, default=1.0, help="shorter files are skipped, and listed")
    p.add_argument(
        "--limit", type=int, default=-1, help="only the first N files of the sorted listing (-1 = all)"
    )
    p.add_argument("--num_workers", type=int, default=4, help="decoding processes (0 = in this process)")
    p.add_argument(
        "--max_bad_fraction", type=float, default=0.01, help="stop when more files than this are bad"
    )
    args = p.parse_args(argv)
    for flag in ("batch_size", "rows_per_file"):
        if getattr(args, flag) < 1:
            p.error(f"--{flag} must be at least 1")
    return args


def main(argv=None) -> int:
    args = parse_args(argv)
    files = find_audio(args.data_dir)
    files = files[: args.limit] if args.limit >= 0 else files
    device = pick_device(args.device)
    stop = StopFlag()
    model = load_snac(args.pretrained_model, device)
    geometry = geometry_of(model, args.pretrained_model)
    if geometry.codebook_size > 32767:
        raise UserError(
            f"codebook of {geometry.codebook_size} entries does not fit the cache's int16 columns"
        )
    fold_weight_norm(model)
    tag = f"gpu{device.index if device.type == 'cuda' else 0}"
    work = SharedWork(
        args.output_dir,
        files,
        args.rows_per_file,
        {
            "data_dir": str(Path(args.data_dir).resolve()),
            "weights_sha256": geometry.weights_sha256,
            "min_seconds": args.min_seconds,
        },
    )
    log = RunLog(args.output_dir, "cache.log")
    total = sum(len(u) for u in work.units)
    log.say(f"cache: {total} files in {len(work.units)} units, {work.unfinished()} to do; {device}, "
            f"{geometry.sampling_rate} Hz, hop {geometry.hop_length}, strides "
            f"{geometry.vq_strides}")  # fmt: skip
    log.metric(event="start", kind="cache", total_steps=total, phase="cache", worker=tag)

    progress = sys.stdout.isatty()
    reader = Reader(args.data_dir, geometry.sampling_rate, args.num_workers, stop)
    began, done_files, done_s, bad = time.time(), 0, 0.0, 0
    reason = "finished"
    try:
        for unit, unit_files in enumerate(work.units):
            if stop:
                break
            if not work.claim(unit):
                continue
            result = encode_unit(model, reader, unit_files, args, device, stop)
            if result is None:
                work.release()
                break
            rows, skipped = result
            if not work.still_ours():
                log.say(f"unit {unit} was taken over while this process slept; its rows are dropped here")
                continue
            out = Path(args.output_dir)
            for stale in out.glob(f"codes_batch_gpu*_{unit}.parquet"):
                stale.unlink()  # of an owner that died before it could commit
            shard = f"codes_batch_{tag}_{unit}.parquet" if rows else None
            if shard:
                write_shard(out / shard, rows, geometry, args.data_dir)
            seconds = sum(length for length, _ in rows.values()) / geometry.sampling_rate
            work.commit(unit, {"shard": shard, "rows": len(rows), "seconds": seconds, "skipped": skipped})
            done_files += len(unit_files)
            done_s += seconds
            bad += sum(s["bad"] for s in skipped)
            rate = done_s / (time.time() - began)
            left = sum(len(u) for i, u in enumerate(work.units) if i > unit)
            eta = left * (time.time() - began) / done_files
            log.metric(step=total - left, total_steps=total, phase="cache", audio_s_per_s=rate, eta_s=eta,
                       skipped=len(skipped), worker=tag)  # fmt: skip
            line = (f"cache {total - left}/{total} files, {rate:.0f} audio-s/s, {len(skipped)} skipped here, "
                    f"eta {human_time(eta)}")  # fmt: skip
            log.say(line) if not progress else print(f"\r{line}", end="", flush=True)
            if bad > args.max_bad_fraction * total:
                reason = "bad input"
                break
    finally:
        reader.close()
        work.close()
    if progress and done_files:
        print()
    if stop:
        reason = "stopped"
    elif reason == "finished":
        bad = finish(work, log, args.output_dir, geometry, args.data_dir, bad)
        if bad > args.max_bad_fraction * total:  # over all processes and earlier starts of this command
            reason = "bad input"
    log.metric(event="end", reason=reason, kind="cache", worker=tag)
    if reason == "bad input":
        raise UserError(f"{bad} bad files of {total} are more than --max_bad_fraction "
                        f"{args.max_bad_fraction:g}: "
                        f"{first_bad(work)}; mend them, or run again with a higher --max_bad_fraction",
                        EXIT_BAD_INPUT)  # fmt: skip
    if reason == "stopped":
        log.say(f"stopped by {stop.signal}: finished units are kept, the same command continues")
        return EXIT_STOPPED
    return 0


def first_bad(work: SharedWork) -> str:
    """Names of the first bad files with their reasons, for an error message."""
    bad = []
    for u in range(len(work.units)):
        if work.result_path(u).exists():
            bad += [s for s in json.loads(work.result_path(u).read_text())["skipped"] if s["bad"]]
    return ", ".join(f"{s['file_path']} ({s['reason']})" for s in bad[:3])


def finish(
    work: SharedWork, log: RunLog, output_dir: str, geometry: Geometry, data_dir: str, bad: int
) -> int:
    """Merge the units' results into metadata.json and skipped.jsonl once every unit is done.

    Returns the bad files of all units; while some are not done, `bad` as it came.
    """
    results = work.results()
    if results is None:
        log.say(
            f"{work.unfinished()} units are still with other processes; the last one writes metadata.json"
        )
        return bad
    skipped = sorted((s for r in results for s in r["skipped"]), key=lambda s: s["file_path"])
    reasons = collections.Counter(s["reason"] for s in skipped)
    rows = sum(r["rows"] for r in results)
    write_jsonl(Path(output_dir) / "skipped.jsonl", skipped)
    write_json(
        Path(output_dir) / "metadata.json",
        {
            "snac": asdict(geometry),
            "data_dir": str(Path(data_dir).resolve()),
            "files": rows + len(skipped),
            "rows": rows,
            "seconds": round(sum(r["seconds"] for r in results), 3),
            "skipped": len(skipped),
            "skipped_by_reason": dict(reasons.most_common()),
        },
    )
    hours = sum(r["seconds"] for r in results) / 3600
    log.say(f"done: {rows} rows ({hours:.3f} h) + {len(skipped)} skipped = {rows + len(skipped)} files")
    for why, n in reasons.most_common(10):
        log.say(f"  skipped {n}: {why}")
    if rows == 0:
        raise UserError(
            f"no file of {data_dir} could be cached: see {output_dir}/skipped.jsonl for the reasons"
        )
    return sum(s["bad"] for s in skipped)


if __name__ == "__main__":
    stop_at_once()
    main_guard(main)
