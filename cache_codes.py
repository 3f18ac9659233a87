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

import argparse
import collections
import contextlib
import math
import sys
import time
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict
from pathlib import Path

from snac48 import DEFAULT_MODEL
from snac48.cli import (
    EXIT_BAD_INPUT,
    EXIT_STOPPED,
    StopFlag,
    Stopped,
    TooManyBadFiles,
    UserError,
    guarded,
    main_guard,
    pick_device,
    read_flags,
    stop_at_once,
)


def parse_args(argv=None):
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = p.add_argument
    add("--data_dir", required=True, help="audio folder, read recursively")
    add("--output_dir", required=True, help="cache folder; may be shared by several processes")
    add("--pretrained_model", default=DEFAULT_MODEL, help="SNAC folder, hub id, or hub id@COMMIT")
    add("--device", default="0", help="GPU number or cpu")
    add("--batch_size", type=int, default=32, help="clips of one length encoded together, at most")
    add("--rows_per_file", type=int, default=1000, help="audio files a parquet file (and a claim)")
    add("--min_seconds", type=float, default=1.0, help="shorter files are skipped, and listed")
    add("--limit", type=int, default=-1, help="only the first N files of the sorted listing (-1 = all)")
    add("--num_workers", type=int, default=4, help="decoding processes (0 = in this process)")
    add("--max_bad_fraction", type=float, default=0.01, help="stop when more files than this are bad")
    lowest = {"batch_size": 1, "rows_per_file": 1, "min_seconds": 0, "num_workers": 0, "max_bad_fraction": 0}
    args = read_flags(p, argv, **lowest)
    if not Path(args.data_dir).is_dir():
        raise UserError(f"audio folder {args.data_dir} does not exist")
    return args


if __name__ == "__main__":  # before torch is imported: --help and a misspelt flag answer at once
    stop_at_once()
    ARGS = guarded(parse_args)

import numpy as np
import torch

from snac48.audio import AudioError, find_audio, read_audio, resample, resolve_inside
from snac48.cache import write_shard
from snac48.codec import Geometry, align_samples, encode, fold_weight_norm, geometry_of, load_snac
from snac48.files import write_json, write_jsonl
from snac48.runlog import RunLog, human_time
from snac48.work import SharedWork, in_order, processes

MAX_BATCH_SECONDS = 240  # of audio at once, however many clips: bounds the memory
MAX_WAITING_SECONDS = 30 * 60  # of audio that waits for companions of its length

# ---- reading ----


def read_one(root: str, rel: str, rate: int):
    """In a reading process: (path, samples at `rate` | None, reason | None)."""
    try:
        rel.encode("utf-8")
        samples, source_rate = read_audio(resolve_inside(root, rel))
        return rel, resample(samples, source_rate, rate), None
    except UnicodeEncodeError:
        return rel.encode("utf-8", "backslashreplace").decode(), None, "file name is not UTF-8"
    except AudioError as e:
        return rel, None, str(e)


def read(pool, files: list[str], args, rate: int, stop: StopFlag):
    """Yield read_one(...) of each file in order, a bounded number ahead. Raises Stopped."""
    jobs = ((rel, (args.data_dir, rel, rate)) for rel in files)
    last = files[0]
    try:
        for rel, clip in in_order(pool, read_one, jobs, 4 * args.num_workers):
            if stop:
                raise Stopped
            last = rel
            yield clip
    except BrokenProcessPool:
        time.sleep(0.2)  # a signal to the group may have reached a starting worker before us
        if stop:
            raise Stopped from None
        why = "out of memory, or a file that crashes the decoder"
        todo = "move that file away or lower --num_workers"
        raise UserError(f"a decoding process died ({why}) near {last}; {todo}") from None


# ---- encoding ----


def long_enough(clips, min_seconds: float, rate: int, skipped: list):
    """Those of read_one's clips that will be encoded, (path, samples); the others join `skipped`."""
    for rel, samples, reason in clips:
        if reason is not None:
            skipped.append({"file_path": rel, "reason": reason, "bad": True})
        elif len(samples) < min_seconds * rate:
            why, seconds = f"shorter than --min_seconds {min_seconds:g}", round(len(samples) / rate, 3)
            skipped.append({"file_path": rel, "reason": why, "bad": False, "seconds": seconds})
        else:
            yield rel, samples


def equally_long(clips, align: int, rate: int, batch_size: int):
    """Yield (padded length, [(path, samples)]): only clips of one padded length share a batch, since padding
    further would change the last codes. A batch comes when it is full, or when too much audio waits."""
    waiting, held = collections.defaultdict(list), 0  # padded length -> clips; samples of them all
    for rel, samples in clips:
        length = math.ceil(len(samples) / align) * align
        waiting[length].append((rel, samples))
        held += length
        if len(waiting[length]) >= min(batch_size, max(1, MAX_BATCH_SECONDS * rate // length)):
            held -= length * len(waiting[length])
            yield length, waiting.pop(length)
        while held > MAX_WAITING_SECONDS * rate:
            most = max(waiting, key=lambda n: n * len(waiting[n]))
            held -= most * len(waiting[most])
            yield most, waiting.pop(most)
    yield from sorted(waiting.items())


def encode_batch(model, length: int, batch: list) -> dict:
    """{path: (samples, [int16 codes of each scale])} of clips that are padded to `length` samples."""
    audio = np.stack([np.pad(samples, (0, length - len(samples))) for _, samples in batch])[:, None]
    with torch.inference_mode():
        codes = encode(model, torch.from_numpy(audio).to(next(model.parameters()).device))
    codes = [c.to(torch.int16).cpu().numpy() for c in codes]
    return {rel: (len(samples), [c[i] for c in codes]) for i, (rel, samples) in enumerate(batch)}


def encode_unit(model, clips, args, stop: StopFlag):
    """({path: (samples, codes)}, [{file_path, reason, bad}] of those left out). Raises Stopped."""
    rows, skipped, rate = {}, [], model.sampling_rate
    clips = long_enough(clips, args.min_seconds, rate, skipped)
    for length, batch in equally_long(clips, align_samples(model), rate, args.batch_size):
        if stop:
            raise Stopped
        rows |= encode_batch(model, length, batch)
    return rows, skipped


# ---- the job ----


class Progress:
    """What this process has done, said and recorded after each unit."""

    def __init__(self, log: RunLog, work: SharedWork, worker: str):
        self.log, self.worker, self.sizes = log, worker, [len(files) for files in work.units]
        self.began, self.files, self.seconds, self.bad = time.time(), 0, 0.0, 0
        self.terminal = sys.stdout.isatty()

    def add(self, unit: int, seconds: float, skipped: list) -> None:
        self.files += self.sizes[unit]
        self.seconds += seconds
        self.bad += sum(s["bad"] for s in skipped)
        total, left, spent = sum(self.sizes), sum(self.sizes[unit + 1 :]), time.time() - self.began
        rate, eta = self.seconds / spent, left * spent / self.files
        values = {"step": total - left, "total_steps": total, "phase": "cache", "audio_s_per_s": rate}
        self.log.metric(**values, eta_s=eta, skipped=len(skipped), worker=self.worker)
        speed = f"{rate:.0f} audio-s/s, {len(skipped)} skipped here, eta {human_time(eta)}"
        line = f"cache {total - left}/{total} files, {speed}"
        print(f"\r{line}", end="", flush=True) if self.terminal else self.log.say(line)

    def close(self) -> None:
        if self.terminal and self.files:
            print()  # the rewritten line stays


def encode_all(model, geometry: Geometry, work: SharedWork, progress: Progress, args, stop: StopFlag) -> None:
    """Claim units and write their parquet files. Raises Stopped and TooManyBadFiles."""
    out, allowed = Path(args.output_dir), args.max_bad_fraction * sum(progress.sizes)
    with contextlib.closing(progress), contextlib.closing(work), contextlib.ExitStack() as stack:
        if pool := processes(args.num_workers, "forkserver"):
            stack.callback(pool.shutdown, wait=False, cancel_futures=True)
        for unit, files in enumerate(work.units):
            if stop:
                raise Stopped
            if not work.claim(unit):
                continue
            try:
                clips = read(pool, files, args, geometry.sampling_rate, stop)
                rows, skipped = encode_unit(model, clips, args, stop)
            except Stopped:
                work.release(unit)
                raise
            if not work.still_ours(unit):
                text = "was taken over while this process slept; its rows are dropped here"
                progress.log.say(f"unit {unit} {text}")
                continue
            for stale in out.glob(f"codes_batch_gpu*_{unit}.parquet"):
                stale.unlink()  # of an owner that died before it could commit
            shard = f"codes_batch_{progress.worker}_{unit}.parquet" if rows else None
            if rows:
                write_shard(out / shard, rows, geometry, args.data_dir)
            seconds = sum(length for length, _ in rows.values()) / geometry.sampling_rate
            work.commit(unit, {"shard": shard, "rows": len(rows), "seconds": seconds, "skipped": skipped})
            progress.add(unit, seconds, skipped)
            if progress.bad > allowed:
                raise TooManyBadFiles(progress.bad)
        if stop:
            raise Stopped


def finish(work: SharedWork, log: RunLog, args, geometry: Geometry) -> None:
    """Merge the units' results into metadata.json and skipped.jsonl once every unit is done, by whomever.
    Raises TooManyBadFiles, of all processes and earlier starts of this command; UserError for no rows."""
    if left := work.unfinished():
        log.say(f"{left} units are still with other processes; the last one writes metadata.json")
        return
    results = work.results()
    skipped = sorted((s for r in results for s in r["skipped"]), key=lambda s: s["file_path"])
    reasons = collections.Counter(s["reason"] for s in skipped)
    rows, seconds = (sum(r[key] for r in results) for key in ("rows", "seconds"))
    metadata = {"snac": asdict(geometry), "data_dir": str(Path(args.data_dir).resolve())}
    metadata |= {"files": rows + len(skipped), "rows": rows, "seconds": round(seconds, 3)}
    metadata |= {"skipped": len(skipped), "skipped_by_reason": dict(reasons.most_common())}
    write_jsonl(Path(args.output_dir) / "skipped.jsonl", skipped)
    write_json(Path(args.output_dir) / "metadata.json", metadata)
    counted = f"{rows} rows ({seconds / 3600:.3f} h) + {len(skipped)} skipped = {rows + len(skipped)} files"
    log.say(f"done: {counted}")
    for why, n in reasons.most_common(10):
        log.say(f"  skipped {n}: {why}")
    if rows == 0:
        where = f"{args.output_dir}/skipped.jsonl"
        raise UserError(f"no file of {args.data_dir} could be cached: see {where} for the reasons")
    bad = sum(s["bad"] for s in skipped)
    if bad > args.max_bad_fraction * sum(map(len, work.units)):
        raise TooManyBadFiles(bad)


def main(args) -> int:
    files = find_audio(args.data_dir)
    files = files[: args.limit] if args.limit >= 0 else files
    device, stop = pick_device(args.device), StopFlag()
    model = load_snac(args.pretrained_model, device)
    geometry = geometry_of(model, args.pretrained_model)
    if (size := geometry.codebook_size) > 32767:
        raise UserError(f"codebook of {size} entries does not fit the cache's int16 columns")
    fold_weight_norm(model)
    settings = {"data_dir": str(Path(args.data_dir).resolve()), "weights_sha256": geometry.weights_sha256}
    settings["min_seconds"] = args.min_seconds
    work = SharedWork(args.output_dir, files, args.rows_per_file, settings, print)
    log, worker = RunLog(args.output_dir, "cache.log"), f"gpu{device.index or 0}"
    progress = Progress(log, work, worker)
    total = sum(progress.sizes)
    codec = f"{geometry.sampling_rate} Hz, hop {geometry.hop_length}, strides {geometry.vq_strides}"
    todo = f"{total} files in {len(work.units)} units, {work.unfinished()} to do"
    log.say(f"cache: {todo}; {device}, {codec}")
    log.metric(event="start", kind="cache", total_steps=total, phase="cache", worker=worker)
    try:
        encode_all(model, geometry, work, progress, args, stop)
        finish(work, log, args, geometry)
    except TooManyBadFiles as e:
        log.metric(event="end", reason="bad input", kind="cache", worker=worker)
        share = f"{e} bad files of {total} are more than --max_bad_fraction {args.max_bad_fraction:g}"
        bad = [s for r in work.results() for s in r["skipped"] if s["bad"]]
        names = ", ".join(f"{s['file_path']} ({s['reason']})" for s in bad[:3])
        todo = "mend them, or run again with a higher --max_bad_fraction"
        raise UserError(f"{share}: {names}; {todo}", EXIT_BAD_INPUT) from None
    except Stopped:
        log.metric(event="end", reason="stopped", kind="cache", worker=worker)
        log.say(f"stopped by {stop.signal}: finished units are kept, the same command continues")
        return EXIT_STOPPED
    log.metric(event="end", reason="finished", kind="cache", worker=worker)
    return 0


if __name__ == "__main__":
    main_guard(main, ARGS)
