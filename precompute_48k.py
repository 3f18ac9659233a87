"""48 kHz targets from a folder of recordings at any rate, with the SIDON speech restorer where one is needed.

    python precompute_48k.py --input_dir data/train/audio --output_dir data/train/audio_48k --device 0
    python precompute_48k.py ... --sidon_dir models/sidon     # no network: the same files in a folder
    python precompute_48k.py ... --native_rate 44100          # CD-quality corpora: nothing to restore
    python precompute_48k.py ... --test_mode                  # ten files and a table, before the long run

Sources at --native_rate or above are kept (decoded, downmixed, resampled to 48 kHz where the rate differs);
lower ones go through SIDON: aligned, at the source's level, exactly as long as it, checked one by one.
Start one process a GPU, on any number of machines: they share the output folder. The same command continues
where a killed one stopped. Output: <same path>.wav (PCM16, mono), {manifest,skipped}.jsonl, summary.json.

Exit codes: 0 done; 1 wrong input or environment; 3 stopped by a signal, the same command continues; 5 done,
but more files were bad than --max_bad_fraction allows (skipped.jsonl names them all, with the reason).
"""

from __future__ import annotations

import argparse
import collections
import itertools
import json
import multiprocessing
import os
import re
import socket
import sys
import tempfile
import threading
import time
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from functools import partial
from multiprocessing.connection import wait as wait_for
from pathlib import Path

import numpy as np

# fmt: off
from snac48.audio import AudioError, audio_blocks, find_audio, link_roots, resolve_inside, target_names
from snac48.cli import (
    EXIT_BAD_INPUT,
    EXIT_STOPPED,
    Parser,
    StopFlag,
    UserError,
    ignore_stop_signals,
    main_guard,
    stop_at_once,
)
from snac48.files import atomic_file, read_json, sweep_leftovers, write_json, write_jsonl
from snac48.runlog import RunLog, human_time
from snac48.sidon import CHUNK, NOTHING, RATE, SIDON_REVISION, Resampler, Sidon, front_end, settle
from snac48.work import SharedWork

# fmt: on

UNIT_FILES = 64  # files a claim; a killed process loses at most this much work
BLOCK_SECONDS = 5.0  # read at a time
LONG_SECONDS = 300  # longer files are read by the main process: 64 of them would not fit in memory
SPOOL_BYTES = 256 << 20  # a 48 kHz float32 waveform above this (23 min) waits in a temporary file


# ---- reading and writing ----


class Spool:
    """A waveform on its way out: float32 pieces, in memory while short, in a temporary file when long."""

    def __init__(self, folder: Path):
        self.file = tempfile.SpooledTemporaryFile(SPOOL_BYTES, dir=folder)
        self.peak, self.n = 0.0, 0

    def add(self, x) -> None:
        self.file.write(np.ascontiguousarray(x, dtype="<f4").tobytes())
        self.peak = max(self.peak, float(np.abs(x).max(initial=0.0)))
        self.n += len(x)

    def save(self, target: Path, scale: float) -> float:
        """PCM16 48 kHz mono wav of `scale` times the pieces, whole or not at all; returns its `level`.

        level = 1, or the smaller factor that keeps the loudest sample within full scale.
        """
        import soundfile as sf

        top = 32767 / 32768
        level = 1.0 if self.peak * scale <= top else top / (self.peak * scale)
        self.file.seek(0)
        with atomic_file(target) as f, sf.SoundFile(f, "w", RATE, 1, "PCM_16", format="WAV") as wav:
            while block := self.file.read(4 * 60 * RATE):
                x = np.rint(np.frombuffer(block, "<f4") * (scale * level * 32768.0))
                wav.write(np.clip(x, -32768, 32767).astype(np.int16))
        return level


def write_row(rel: str, name: str, job: dict, kind: str, fill) -> dict:
    """Write the target `name` of the source `rel`; returns its manifest row.

    fill(keep) hands float32 pieces to keep(), returns rate, n (source samples), scale and what was measured.
    gain: stored wav / raw waveform; level: stored wav / source, below 1 only where PCM16 would have clipped.
    """
    target = Path(job["output_dir"]) / name
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        spool = Spool(target.parent)
        with spool.file:
            found = fill(spool.add)
            rate, n, scale = found.pop("rate"), found.pop("n"), found.pop("scale")
            level = spool.save(target, scale)
    except OSError as e:
        raise UserError(f"{target} could not be written: {e.strerror or e}; make room or choose another "
                        "--output_dir, then run the same command again") from None  # fmt: skip
    row = {"path": rel, "target": name, "kind": kind, "source_rate": rate}
    row |= {"seconds": round(n / rate, 6), "samples": spool.n, "gain": scale * level, "level": level}
    return row | found


def read_file(rel: str, name: str, job: dict) -> dict:
    """One source, in a reading process: its manifest row (kept), what SIDON needs, or why it is skipped."""
    try:
        source = resolve_inside(job["input_dir"], rel, job["allowed"])
        blocks = audio_blocks(source, BLOCK_SECONDS)
        first, rate = next(blocks)
        blocks = itertools.chain([first], (x for x, _ in blocks))
        if rate < job["native_rate"] and job["upsampler"] == "sidon":
            pieces = list(itertools.islice(blocks, int(LONG_SECONDS / BLOCK_SECONDS) + 1))
            if len(pieces) * BLOCK_SECONDS > LONG_SECONDS:
                return {"path": rel, "rate": rate, "long": source}
            return {"path": rel, "rate": rate, "front": front_end(lambda: iter(pieces), rate)}

        def fill(keep):
            to_48k, n = Resampler(rate, RATE), 0
            for x in blocks:
                n += len(x)
                keep(to_48k(x))
            keep(to_48k(NOTHING, last=True))
            return {"rate": rate, "n": n, "scale": 1.0, "lag_samples": 0.0, "envelope_corr": 1.0}

        return write_row(rel, name, job, "copied" if rate >= job["native_rate"] else "sinc", fill)
    except AudioError as e:
        return {"path": rel, "reason": str(e)}


def start_reader() -> None:
    """Signals are the parent's business; a reader whose parent was killed (-9 too) goes at once."""
    ignore_stop_signals()
    parent = multiprocessing.parent_process().sentinel
    threading.Thread(target=lambda: (wait_for([parent]), os._exit(1)), daemon=True).start()


# ---- the job ----


class Progress:
    """`N/M files` lines every few seconds, the same as metrics, and one rewritten line on a terminal."""

    def __init__(self, log: RunLog, total: int, every_s: float = 10.0):
        self.log, self.total, self.every_s = log, total, every_s
        self.start = self.last = time.monotonic()
        self.done = self.mine = self.skipped = self.settled = 0
        self.seconds = 0.0
        self.proc = f"{socket.gethostname()}-{os.getpid()}"  # several processes append to one metrics.jsonl
        self.terminal = sys.stdout.isatty()

    def add(self, seconds: float | None) -> None:
        """One more file of ours; None = skipped."""
        self.done, self.mine = self.done + 1, self.mine + 1
        self.skipped += seconds is None
        self.seconds += seconds or 0.0
        if self.terminal:
            print(f"\r{self.text()}\033[K", end="", flush=True)
        if time.monotonic() - self.last >= self.every_s:
            self.say()

    def others(self, files: int) -> None:
        """So many more files are in finished units, ours or not."""
        self.settled += files
        self.done = max(self.done, self.settled)

    def rate(self) -> float:
        return self.seconds / max(1e-9, time.monotonic() - self.start)

    def text(self) -> str:
        spent = time.monotonic() - self.start
        eta = human_time((self.total - self.done) * spent / self.mine if self.mine else None)
        return (
            f"{self.done}/{self.total} files  skipped {self.skipped}  {self.rate():.1f} audio-s/s  eta {eta}"
        )

    def say(self) -> None:
        self.last = time.monotonic()
        if self.terminal:
            print("\r\033[K", end="")
        self.log.say(self.text())
        values = {"files": self.total, "skipped": self.skipped, "audio_s_per_s": round(self.rate(), 2)}
        self.log.metric(step=self.done, proc=self.proc, **values)


class Stopped(Exception):
    """A stop was asked for in the middle of a long file: nothing of it lands."""


class Job:
    """One process's share: claims units, keeps readers, SIDON and writers busy, commits what is finished."""

    def __init__(self, args, files: list[str], names: dict[str, str], job: dict, work: SharedWork, log, stop):
        self.args, self.job, self.work, self.log, self.stop = args, job, work, log, stop
        wanted, self.names = set(files), names
        self.units = [u for u, unit in enumerate(work.units) if not wanted.isdisjoint(unit)]
        self.progress = Progress(log, sum(len(work.units[u]) for u in self.units))
        self.writers = ThreadPoolExecutor(2)
        self.sidon: Sidon | None = None
        self.readers = None
        if args.num_workers:
            os.environ.setdefault(
                "OPENBLAS_NUM_THREADS", "1"
            )  # a reader is one thread; torch is not concerned
            context = multiprocessing.get_context("spawn")  # a fork would copy threads and CUDA's state
            self.readers = ProcessPoolExecutor(args.num_workers, context, start_reader)

    def run(self) -> None:
        """Until every unit is done, by us or by others: those that live processes hold are waited for."""
        while self.units and not self.stop:
            for unit, group in itertools.groupby(self.results(), key=lambda r: r[0]):
                self.finish(unit, [result for _, result in group])
            done = [u for u in self.units if self.work.result_path(u).exists()]
            self.units = sorted(set(self.units) - set(done))
            self.progress.others(sum(len(self.work.units[u]) for u in done))
            if self.units:
                time.sleep(0.5)  # should their owner die, their unit is ours

    def claimed(self):
        """(unit, file) of everything this process gets to do, claimed only as the readers come to it."""
        for u in self.units:
            if not self.stop and self.work.claim(u):
                yield from itertools.takewhile(lambda _: not self.stop, ((u, f) for f in self.work.units[u]))

    def results(self):
        """(unit, read_file(file)) in order; the readers are at most one unit ahead (memory)."""
        read = partial(read_file, job=self.job)
        if self.readers is None:
            yield from ((u, read(rel, self.names[rel])) for u, rel in self.claimed())
            return
        waiting: collections.deque = collections.deque()
        try:
            for u, rel in self.claimed():
                waiting.append((u, self.readers.submit(read, rel, self.names[rel])))
                if len(waiting) > UNIT_FILES:  # so that the device finds the next unit read
                    u, future = waiting.popleft()
                    yield u, future.result()
            while waiting:
                u, future = waiting.popleft()
                yield u, future.result()
        except BrokenProcessPool:
            raise UserError("a reader was killed (out of memory?); try a smaller --num_workers") from None

    def finish(self, unit: int, results: list[dict]) -> None:
        """SIDON where needed, wait for the writers, commit; a unit cut short by a stop is given back."""
        rows = [r for r in results if "target" in r]
        skipped = [r for r in results if "reason" in r]
        for r in rows + skipped:
            self.progress.add(r.get("seconds"))
        restored = [r for r in results if "front" in r or "long" in r]
        if restored and not self.stop:
            self.load_sidon(restored[0])
            futures = [f for group in self.batches(restored) for f in self.restore(group, skipped)]
            rows += [f.result() for f in futures]
        if len(rows) + len(skipped) < len(self.work.units[unit]):
            self.work.release(unit)
        elif self.work.still_ours(unit):
            self.work.commit(unit, {"rows": rows, "skipped": skipped})

    def load_sidon(self, first: dict) -> None:
        """At the first file that needs it: a corpus of native rate runs without."""
        if self.sidon:
            return
        args = self.args
        why = (
            f"{first['path']} has {first['rate']} Hz, below --native_rate {args.native_rate}: it needs SIDON"
        )
        if 44100 <= first["rate"] < args.native_rate:
            why += " (CD-quality recordings can be kept instead: --native_rate 44100, another --output_dir)"
        self.log.say(f"{why}: loading it")
        try:
            sums = read_sums(args.sidon_sha256) if args.sidon_sha256 else None
            self.sidon = Sidon(args.sidon_dir, args.sidon_revision, args.device, sums, args.batch_size)
        except UserError as e:
            raise UserError(f"{why}. {e}. (--upsampler sinc: an explicit baseline, no new band.)") from None
        self.work.agree("sidon.json", self.sidon.sha256)  # every process on this folder runs the same files
        for name, digest in self.sidon.sha256.items():
            self.log.say(f"sidon {digest}  {name}")

    def batches(self, restored: list[dict]) -> list[list[dict]]:
        """Groups of utterances of one length, to within --batch_slack; longer than one chunk: alone."""
        frames = {r["path"]: len(r["front"]["features"]) if "front" in r else 10**9 for r in restored}
        slack = int(self.args.batch_slack * 50)
        groups: list[list[dict]] = []
        for r in sorted(restored, key=lambda r: (frames[r["path"]], r["path"])):
            last = groups[-1] if groups else []
            full = not last or len(last) == self.sidon.batch_size
            if full or frames[r["path"]] > min(CHUNK, frames[last[0]["path"]] + slack):
                groups.append([r])
            else:
                last.append(r)
        return groups

    def restore(self, group: list[dict], skipped: list[dict]) -> list:
        """SIDON over one batch; returns futures of the manifest rows. Nothing after a stop."""
        first = group[0]
        if self.stop:
            return []
        if "long" in first:
            try:
                again = partial(audio_blocks, first["long"], BLOCK_SECONDS)
                first["front"] = front_end(lambda: (x for x, _ in again()), first["rate"])
            except AudioError as e:
                skipped.append({"path": first["path"], "reason": str(e)})
                self.progress.add(None)
                return []
        features = [r["front"].pop("features") for r in group]
        frames = max(map(len, features))
        padded = [np.pad(f, ((0, frames - len(f)), (0, 0)), mode="edge") for f in features]
        stream = self.sidon.stream(np.stack(padded))  # [B, T, 160]
        pieces = [self.until_stopped(stream)] if frames > CHUNK else [[w] for w in next(stream)]
        futures = []
        for r, p in zip(group, pieces):
            front = r["front"]

            def fill(keep, front=front, p=p):
                return {"rate": front["rate"], "n": front["n"]} | settle(front, p, keep)

            write = partial(write_row, r["path"], self.names[r["path"]], self.job, "sidon", fill)
            futures.append(self.writers.submit(write))
            if frames > CHUNK and isinstance(futures[0].exception(), Stopped):  # the writer drives SIDON
                return []
            self.progress.add(front["n"] / front["rate"])
        return futures

    def until_stopped(self, stream):
        for wave in stream:
            if self.stop:
                raise Stopped
            yield wave[0]

    def close(self, in_peace: bool) -> None:
        self.writers.shutdown(wait=True)
        if self.readers:
            self.readers.shutdown(wait=in_peace, cancel_futures=True)
        self.work.release()
        self.work.close()


def read_sums(path: Path) -> dict[str, str]:
    """A list as sha256sum prints it: a sum and a file name a line."""
    try:
        lines = [line.split() for line in path.read_text().splitlines() if line.strip()]
        return {Path(name.lstrip("*")).name: digest.lower() for digest, name in lines}
    except (OSError, ValueError) as e:
        raise UserError(f"--sidon_sha256 {path} is no list as sha256sum prints it: {e}") from None


def merge(work: SharedWork, output_dir: Path, min_corr: float) -> dict:
    """manifest.jsonl, skipped.jsonl and summary.json of all finished units; returns the summary.

    Done again when another process finished a unit meanwhile, so that the last writer has them all.
    """

    def finished():
        return [u for u in range(len(work.units)) if work.result_path(u).exists()]

    done: list[int] | None = None
    while done != finished():
        done = finished()
        results = [read_json(work.result_path(u)) for u in done]
        rows = sorted((r for x in results for r in x["rows"]), key=lambda r: r["path"])
        skipped = sorted((r for x in results for r in x["skipped"]), key=lambda r: r["path"])
        for row in rows:
            row["faithful"] = row["envelope_corr"] >= min_corr
        reasons = (re.sub(r"\d+ |:.*", "", r["reason"]) for r in skipped)
        summary = {
            "files": len(rows) + len(skipped),
            "kinds": dict(collections.Counter(r["kind"] for r in rows)),
            "skipped": len(skipped),
            "reasons": dict(collections.Counter(reasons)),
            "unfaithful": sum(not r["faithful"] for r in rows),
            "scaled_to_fit": sum(r["level"] != 1.0 for r in rows),
            "seconds": round(sum(r["seconds"] for r in rows), 3),
        }
        write_jsonl(output_dir / "manifest.jsonl", rows)
        write_jsonl(output_dir / "skipped.jsonl", skipped)
        write_json(output_dir / "summary.json", summary)
    return summary


# ---- command line ----


# fmt: off
def build_parser() -> argparse.ArgumentParser:
    p = Parser(description=__doc__)
    add = p.add_argument
    # data
    add("--input_dir", type=Path, required=True, help="recordings, any rate, searched recursively")
    add("--output_dir", type=Path, required=True, help="48 kHz targets, manifest.jsonl, summary.json")
    add("--limit", type=int, default=-1, help="first N files only; -1 = all")
    add("--start_idx", type=int, default=0, help="first file of the sorted list that this process does")
    add("--end_idx", type=int, default=-1, help="the file it stops before; -1 = to the end")
    add("--native_rate", type=int, default=48000, metavar="HZ",
        help="sources at this rate or above are kept; 44100 suits CD-quality corpora")
    add("--num_workers", type=int, default=2, help="reading processes; 0 = read in this one")
    # what lower rates get
    add("--upsampler", choices=["sidon", "sinc"], default="sidon", help="sinc: a baseline without new band")
    add("--device", default="0", help="where SIDON runs: a GPU's number, or cpu")
    add("--sidon_dir", type=Path, help="folder with SIDON's files; default: the hub")
    add("--sidon_revision", default=SIDON_REVISION, metavar="SHA", help="commit on the hub (40 hex digits)")
    add("--sidon_sha256", type=Path, metavar="FILE", help="sums to check them against (sha256sum's format)")
    add("--batch_size", type=int, default=8, help="utterances of one length a pass, if SIDON takes batches")
    add("--batch_slack", type=float, default=0.0, metavar="SECONDS",
        help="0: only equal lengths share a pass, the same samples as one by one; above: shorter ones are "
             "continued by their last frame to the longest, which changes their ends a little")
    # checks
    add("--min_envelope_corr", type=float, default=0.9, help="rows below: faithful false, out of training")
    add("--max_bad_fraction", type=float, default=0.01, help="more bad files: exit code 5, at the end")
    add("--test_mode", action="store_true", help="only the first files that need upsampling, then a table")
    add("--test_samples", type=int, default=10, help="how many files --test_mode takes")
    return p
# fmt: on


def choose_files(args, files: list[str]) -> list[str]:
    """--start_idx, --end_idx, --limit, --test_mode."""
    files = files[args.start_idx : args.end_idx if args.end_idx >= 0 else None]
    files = files[: args.limit] if args.limit >= 0 else files
    if args.test_mode:
        import soundfile as sf

        def low(rel: str) -> bool:
            try:
                return sf.info(args.input_dir / rel).samplerate < args.native_rate
            except sf.LibsndfileError:
                return False

        files = list(itertools.islice(filter(low, files), args.test_samples))
    if not files:
        flags = "--start_idx, --end_idx, --limit or --test_mode"
        raise UserError(f"nothing to do below {args.input_dir}: {flags} leave no file")
    return files


def main() -> int:
    args = build_parser().parse_args()
    if (
        min(args.num_workers, args.start_idx, args.batch_slack) < 0
        or min(args.native_rate, args.batch_size) < 1
    ):
        raise UserError(
            "--num_workers, --start_idx, --batch_slack: 0 or more; --native_rate, --batch_size: 1 or more"
        )
    source, output = args.input_dir.resolve(), args.output_dir.resolve()
    if output.is_relative_to(source):
        raise UserError(f"--output_dir {args.output_dir} lies inside --input_dir; choose a folder beside it")
    listed = find_audio(args.input_dir)
    files = choose_files(args, listed)
    settings = {"native_rate": args.native_rate, "upsampler": args.upsampler, "input_dir": str(source)}
    job = settings | {"output_dir": str(output), "allowed": link_roots(source)}
    try:
        output.mkdir(parents=True, exist_ok=True)
        log = RunLog(args.output_dir, log_name="precompute.log")
    except OSError as e:
        raise UserError(f"--output_dir {args.output_dir} cannot be written: {e.strerror}") from None
    work = SharedWork(output, files, UNIT_FILES, settings)
    stop = StopFlag()
    names = target_names(sorted(set(listed).union(*work.units)))  # others may have seen more files
    for folder in {os.path.dirname(name) for name in names.values()} - {""}:
        sweep_leftovers(output / folder)
    run = Job(args, files, names, job, work, log, stop)
    progress = run.progress
    log.metric(event="start", kind="precompute", files=progress.total, proc=progress.proc)
    log.say(
        f"precompute_48k: {len(files)} of {len(listed)} files below {args.input_dir} -> {args.output_dir}"
    )
    in_peace = False
    try:
        run.run()
        in_peace = True
    finally:
        run.close(in_peace)
    if stop:
        log.say(f"stopped by {stop.signal}; the same command continues")
        log.metric(event="end", code=EXIT_STOPPED, proc=progress.proc)
        return EXIT_STOPPED
    summary = merge(work, output, args.min_envelope_corr)
    progress.say()
    if args.test_mode:
        wanted = set(files)
        for row in map(json.loads, (output / "manifest.jsonl").read_text(encoding="utf-8").splitlines()):
            if row["path"] in wanted:
                log.say(f"{row['kind']}  lag {row['lag_samples']:+.1f} samples  envelope_corr "
                        f"{row['envelope_corr']:.3f}  gain {row['gain']:.3g}  {row['target']}")  # fmt: skip
    log.say("summary: " + ", ".join(f"{k} {v}" for k, v in summary.items()))
    code = EXIT_BAD_INPUT if summary["skipped"] > args.max_bad_fraction * summary["files"] else 0
    log.metric(event="end", code=code, proc=progress.proc, **summary)
    if code:
        share = f"{summary['skipped']} of {summary['files']} files were skipped"
        allowed = f"more than --max_bad_fraction {args.max_bad_fraction}"
        print(f"precompute_48k.py: {share}, {allowed}: see {output / 'skipped.jsonl'}", file=sys.stderr)
    return code


if __name__ == "__main__":
    stop_at_once()
    main_guard(main)
