"""48 kHz targets from a folder of recordings at any rate.

    python precompute_48k.py --input_dir data/train/audio --output_dir data/train/audio_48k

Sources at --native_rate or above are kept (decoded, downmixed, resampled to 48 kHz only when the rate
differs); lower ones need SIDON. Any number of processes may share one output folder; the same command
continues where a killed one stopped. Output: one PCM16 mono wav a source, manifest.jsonl, skipped.jsonl,
summary.json.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import multiprocessing
import os
import signal
import socket
import sys
import tempfile
import threading
import time
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from functools import partial
from pathlib import Path

from corpus import (
    AudioError,
    SharedWork,
    audio_blocks,
    find_audio,
    link_roots,
    resampled_length,
    resolve_inside,
    target_names,
    write_jsonl,
)
from runlog import (
    EXIT_BAD_INPUT,
    EXIT_STOPPED,
    RunLog,
    StopFlag,
    UserError,
    atomic_file,
    human_time,
    main_guard,
    write_json,
)

RATE = 48000
UNIT_FILES = 64  # files a claim; a killed process loses at most this much work
SPOOL_BYTES = 256 << 20  # a 48 kHz float32 waveform longer than this (23 min) waits on disk, not in memory


# ---- reading ----


def resampled_blocks(path, new_rate: int | None, info: dict):
    """Mono float32 pieces of a file at new_rate (band-limited, no delay), soxr VHQ; None = at its own rate.

    Fills info with rate and n (source samples). Raises AudioError.
    """
    import numpy as np
    import soxr

    stream, done, due = None, 0, 0
    info["n"] = 0
    for x, rate in audio_blocks(path):
        info["rate"], info["n"] = rate, info["n"] + len(x)
        if new_rate in (None, rate):
            yield x
            continue
        stream = stream or soxr.ResampleStream(rate, new_rate, 1, dtype="float32", quality="VHQ")
        y = stream.resample_chunk(x)
        done += len(y)
        yield y
    if stream:
        due = resampled_length(info["n"], info["rate"], new_rate) - done
        y = stream.resample_chunk(np.zeros(0, np.float32), last=True)[:due]
        yield np.pad(y, (0, due - len(y)))


def write_target(path: Path, pieces, gain: float) -> None:
    """PCM16 48 kHz mono wav of `gain` times the float32 pieces; appears whole or not at all."""
    import numpy as np
    import soundfile as sf

    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_file(path) as f, sf.SoundFile(f, "w", RATE, 1, "PCM_16", format="WAV") as wav:
        for x in pieces:
            wav.write(np.rint(np.clip(x * (gain * 32768.0), -32768, 32767)).astype(np.int16))


def full_scale_gain(peak: float) -> float:
    """1, or the factor that brings a peak beyond PCM16 full scale just inside it."""
    return 1.0 if peak <= 32767 / 32768 else 32767 / 32768 / peak


class Spool:
    """A waveform on its way out: pieces of float32, in memory while short, in a temporary file when long."""

    def __init__(self, folder: Path):
        self.file = tempfile.SpooledTemporaryFile(SPOOL_BYTES, dir=folder)
        self.peak, self.n = 0.0, 0

    def add(self, x) -> None:
        if len(x):
            self.file.write(x.astype("<f4").tobytes())
            self.peak = max(self.peak, float(abs(x).max()))
            self.n += len(x)

    def pieces(self):
        import numpy as np

        self.file.seek(0)
        while block := self.file.read(4 * 60 * RATE):
            yield np.frombuffer(block, "<f4")


def read_file(rel: str, job: dict) -> dict:
    """One source file, in a worker process: its manifest row, or the reason why there is none.

    Kept sources are written here; so are those of the explicit `--upsampler sinc`.
    """
    try:
        source = resolve_inside(job["input_dir"], rel, job["allowed"])
        target = Path(job["output_dir"]) / job["targets"][rel]
        info: dict = {}
        with contextlib.closing(audio_blocks(source, 0.01)) as probe:
            rate = next(probe)[1]
        if rate < job["native_rate"] and job["upsampler"] == "sidon":
            return {"path": rel, "needs": rate}
        target.parent.mkdir(parents=True, exist_ok=True)
        spool = Spool(target.parent)
        with spool.file:
            for x in resampled_blocks(source, RATE, info):
                spool.add(x)
            gain = full_scale_gain(spool.peak)
            write_target(target, spool.pieces(), gain)
    except AudioError as e:
        return {"path": rel, "reason": str(e)}
    return {
        "path": rel,
        "target": job["targets"][rel],
        "kind": "copied" if rate >= job["native_rate"] else "sinc",
        "source_rate": rate,
        "gain": gain,  # stored wav / source waveform; below 1 only where PCM16 would have clipped
        "level": gain,
        "lag_samples": 0,
        "envelope_corr": 1.0,
        "seconds": round(info["n"] / rate, 6),
        "samples": spool.n,
    }


# ---- the job ----


def start_worker() -> None:
    """Signals are the parent's business; a worker whose parent was killed (-9 too) goes at once."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    parent = multiprocessing.parent_process().sentinel

    def watch():
        multiprocessing.connection.wait([parent])
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def in_order(pool, function, items, ahead: int):
    """function(item) for every item, in order, at most `ahead` of them under way or waiting (memory)."""
    if pool is None:
        yield from map(function, items)
        return
    waiting: collections.deque = collections.deque()
    try:
        for item in items:
            waiting.append(pool.submit(function, item))
            if len(waiting) >= ahead:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    except BrokenProcessPool:
        raise UserError("a reading worker was killed (out of memory?); try a smaller --num_workers") from None
    finally:
        for future in waiting:
            future.cancel()


def merge(work: SharedWork, output_dir: Path, min_corr: float) -> dict:
    """manifest.jsonl, skipped.jsonl and summary.json of all finished units; returns the summary.

    Done again when another process finished a unit meanwhile, so that the last writer has them all.
    """
    from runlog import read_json

    while True:
        done = [u for u in range(len(work.units)) if work.result_path(u).exists()]
        results = [read_json(work.result_path(u)) for u in done]
        rows = sorted((r for x in results for r in x["rows"]), key=lambda r: r["path"])
        skipped = sorted((r for x in results for r in x["skipped"]), key=lambda r: r["path"])
        for row in rows:
            row["faithful"] = row["envelope_corr"] >= min_corr
        summary = {
            "files": len(rows) + len(skipped),
            "kinds": dict(collections.Counter(r["kind"] for r in rows)),
            "skipped": len(skipped),
            "reasons": dict(collections.Counter(r["reason"].split(":")[0] for r in skipped)),
            "unfaithful": sum(not r["faithful"] for r in rows),
            "scaled_to_fit": sum(r["level"] != 1.0 for r in rows),
            "seconds": round(sum(r["seconds"] for r in rows), 3),
        }
        write_jsonl(output_dir / "manifest.jsonl", rows)
        write_jsonl(output_dir / "skipped.jsonl", skipped)
        write_json(output_dir / "summary.json", summary)
        if done == [u for u in range(len(work.units)) if work.result_path(u).exists()]:
            return summary


class Progress:
    """`N/M files` lines every few seconds, the same as metrics, and a bar where stdout is a terminal."""

    def __init__(self, log: RunLog, total: int, every_s: float = 10.0):
        self.log, self.total, self.every_s = log, total, every_s
        self.start = self.last = time.monotonic()
        self.done = self.mine = self.skipped = 0
        self.seconds = 0.0
        self.proc = f"{socket.gethostname()}-{os.getpid()}"  # several processes append to one metrics.jsonl
        self.bar = sys.stdout.isatty()

    def add(self, result: dict) -> None:
        self.done += 1
        self.mine += 1
        self.skipped += "reason" in result
        self.seconds += result.get("seconds", 0.0)
        if self.bar:
            print(f"\r{self.text()}\033[K", end="", flush=True)
        if time.monotonic() - self.last >= self.every_s:
            self.say()

    def text(self) -> str:
        spent = max(1e-9, time.monotonic() - self.start)
        eta = (self.total - self.done) * spent / self.mine if self.mine else None
        return (f"{self.done}/{self.total} files  skipped {self.skipped}  "
                f"{self.seconds / spent:.1f} audio-s/s  eta {human_time(eta)}")  # fmt: skip

    def say(self) -> None:
        self.last = time.monotonic()
        if self.bar:
            print("\r\033[K", end="")
        self.log.say(self.text())
        rate = self.seconds / max(1e-9, self.last - self.start)
        self.log.metric(step=self.done, files=self.total, skipped=self.skipped, audio_s_per_s=round(rate, 2),
                        proc=self.proc)  # fmt: skip


def build_parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--input_dir", type=Path, required=True, help="recordings, any rate, searched recursively")
    p.add_argument(
        "--output_dir", type=Path, required=True, help="48 kHz targets, manifest.jsonl, summary.json"
    )
    p.add_argument("--native_rate", type=int, default=48000, metavar="HZ",
                   help="sources at this rate or above are kept; 44100 suits CD-quality corpora")  # fmt: skip
    p.add_argument("--upsampler", choices=["sidon", "sinc"], default="sidon",
                   help="what lower rates get; sinc: no new band, an explicit baseline only")  # fmt: skip
    p.add_argument("--device", default="cpu", help="where SIDON runs: cpu, or a GPU's number")
    p.add_argument("--num_workers", type=int, default=2, help="reading processes; 0 = read in this one")
    p.add_argument("--limit", type=int, default=-1, help="first N files only; -1 = all")
    p.add_argument("--max_bad_fraction", type=float, default=0.01,
                   help="exit code 5 when more files were bad (all others are done first)")  # fmt: skip
    p.add_argument("--min_envelope_corr", type=float, default=0.9,
                   help="rows below carry faithful: false and stay out of training")  # fmt: skip
    return p


def main() -> int:
    args = build_parser().parse_args()
    if args.num_workers < 0 or args.native_rate < 1:
        raise UserError("--num_workers must be 0 or more and --native_rate above 0")
    inside = args.output_dir.resolve().is_relative_to(args.input_dir.resolve())
    if inside:
        raise UserError(f"--output_dir {args.output_dir} lies inside --input_dir; choose a folder beside it")
    files = find_audio(args.input_dir)
    job = {
        "input_dir": str(args.input_dir),
        "output_dir": str(args.output_dir),
        "allowed": link_roots(args.input_dir),
        "targets": target_names(files),
        "native_rate": args.native_rate,
        "upsampler": args.upsampler,
    }
    if args.limit >= 0:
        files = files[: args.limit]
    settings = {"program": "precompute_48k", "input_dir": str(args.input_dir.resolve())}
    settings |= {k: job[k] for k in ("native_rate", "upsampler")}
    args.output_dir.mkdir(parents=True, exist_ok=True)
    work = SharedWork(args.output_dir, files, UNIT_FILES, settings)
    log = RunLog(args.output_dir, log_name="precompute.log")
    stop = StopFlag()
    wanted = set(files)
    mine = [u for u, unit in enumerate(work.units) if not wanted.isdisjoint(unit)]
    progress = Progress(log, sum(len(work.units[u]) for u in mine))
    log.metric(event="start", kind="precompute", files=progress.total, proc=progress.proc)
    log.say(f"precompute_48k: {len(files)} files below {args.input_dir} -> {args.output_dir}")
    pool = None
    if args.num_workers:
        context = multiprocessing.get_context("spawn")  # fork would copy threads and CUDA's state
        pool = ProcessPoolExecutor(args.num_workers, context, start_worker)
    code = None
    try:
        code = work_off(args, work, mine, job, pool, progress, stop)
    finally:
        if pool:
            pool.shutdown(wait=code is not None, cancel_futures=True)
        work.release()
        work.close()
    if stop:
        log.say(f"stopped by {stop.signal}; the same command continues")
        log.metric(event="end", code=EXIT_STOPPED, proc=progress.proc)
        return EXIT_STOPPED
    summary = merge(work, args.output_dir, args.min_envelope_corr)
    progress.say()
    log.say("summary: " + ", ".join(f"{k} {v}" for k, v in summary.items()))
    bad = summary["skipped"] / max(1, summary["files"])
    code = EXIT_BAD_INPUT if bad > args.max_bad_fraction else 0
    log.metric(event="end", code=code, proc=progress.proc, **summary)
    if code:
        print(f"precompute_48k.py: {summary['skipped']} of {summary['files']} files were skipped, more than "
              f"--max_bad_fraction {args.max_bad_fraction}; see {args.output_dir / 'skipped.jsonl'}",
              file=sys.stderr)  # fmt: skip
    return code


def work_off(args, work: SharedWork, mine: list[int], job: dict, pool, progress: Progress, stop) -> int:
    """Claim and do units until none of `mine` is left; waits for those that live processes hold."""
    read = partial(read_file, job=job)
    counted: set[int] = set()
    while True:
        for u in mine:
            if u not in counted and work.result_path(u).exists():
                counted.add(u)
                progress.done += len(work.units[u])
            if stop or not work.claim(u):
                continue
            result = {"rows": [], "skipped": []}
            for r in in_order(pool, read, work.units[u], 2 * args.num_workers):
                if stop:
                    break
                if "needs" in r:
                    raise UserError(f"{r['path']} is sampled at {r['needs']} Hz, below --native_rate "
                                    f"{args.native_rate}: it needs SIDON, which this version cannot run yet; "
                                    "--upsampler sinc is an explicit baseline without new band")  # fmt: skip
                result["skipped" if "reason" in r else "rows"].append(r)
                progress.add(r)
            if stop:
                work.release()
            elif work.still_ours():
                work.commit(u, result)
            counted.add(u)
        if stop or all(work.result_path(u).exists() for u in mine):
            return 0
        time.sleep(1.0)  # others hold the rest; should one die, its unit is ours


if __name__ == "__main__":
    main_guard(main)
