"""48 kHz targets from a folder of recordings at any rate, with the SIDON speech restorer where one is needed.

    python precompute_48k.py                               # corpus/{train,valid}/audio -> targets/{train,val}
    python precompute_48k.py --input_dir data/train/audio --output_dir data/train/audio_48k --device 0
    python precompute_48k.py ... --sidon_dir models/sidon     # no network: the same files in a folder
    python precompute_48k.py ... --native_rate 44100          # CD-quality corpora: nothing to restore
    python precompute_48k.py ... --test_mode                  # ten files and a table, before the long run
    python precompute_48k.py ... --verify                     # look at every target beside its recording

Sources at --native_rate or above are kept (decoded, downmixed, resampled to 48 kHz where the rate differs);
lower ones go through SIDON: aligned, at the source's level, exactly as long as it, checked one by one.
Start one process a GPU, on any number of machines: they share the output folder. The same command continues
where a killed one stopped. Output: <same path>.wav (PCM16, mono), {manifest,skipped}.jsonl, summary.json.

Exit codes: 0 done; 1 wrong input or environment; 3 stopped by a signal, the same command continues; 5 done,
but more files were bad than --max_bad_fraction allows (skipped.jsonl names them all, with the reason).
"""

import argparse
import collections
import contextlib
import itertools
import json
import os
import re
import socket
import sys
import time
from concurrent.futures import Future, ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np

from snac48.audio import (
    AudioError,
    Spool,
    allow_links,
    audio_blocks,
    find_audio,
    open_sound_file,
    resolve_inside,
    target_names,
)
from snac48.cli import (
    EXIT_BAD_INPUT,
    EXIT_STOPPED,
    StopFlag,
    Stopped,
    UserError,
    main_guard,
    pick_device,
    read_flags,
    stop_at_once,
)
from snac48.files import read_json, sweep_leftovers, write_json, write_jsonl
from snac48.places import ALLOW_LINKS, asked, check_place
from snac48.proof import ABSENT, NO_STAMP, forget_changed, stamp_of
from snac48.runlog import RunLog
from snac48.sidon import CHUNK, NOTHING, RATE, SIDON_REVISION, Resampler, Restored, Sidon, Source, front_end
from snac48.targets import manifest_row
from snac48.verify import line_of, look_at_all
from snac48.work import WAIT_S, Progress, SharedWork, in_order, processes

UNIT_FILES = 64  # files a claim at most: a killed process loses no more work
BLOCK_SECONDS = 5.0  # read at a time
LONG_SECONDS = 300  # longer files are read by the main process: 64 of them would not fit in memory


# ---- reading and writing ----


def write_target(rel: str, name: str, output_dir: str, waveform, stamp: tuple) -> dict:
    """Write the target `name` of the source `rel` from a Kept or Restored; returns its manifest row. stamp:
    of the source. gain: stored wav / raw waveform; level: stored wav / source, below 1 only where PCM16 would
    have clipped."""
    target = Path(output_dir) / name
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        spool = Spool(target.parent)
        with spool.file:
            for piece in waveform:
                spool.add(piece)
            measured = waveform.measured()
            scale = measured.pop("scale")
            level = spool.save(target, RATE, scale)
    except OSError as e:
        todo = "make room or choose another --output_dir, then run the same command again"
        raise UserError(f"{target} could not be written: {e.strerror or e}; {todo}") from None
    row = {"path": rel, "target": name, "kind": waveform.kind, "source_rate": waveform.rate}
    row |= {"seconds": round(waveform.n / waveform.rate, 6), "samples": spool.n}
    row |= {"gain": scale * level, "level": level} | measured
    return row | {"source_stamp": stamp, "target_stamp": stamp_of(target)}


class Kept:
    """A recording of native rate (kind copied), or one resampled as a baseline (sinc), as 48 kHz pieces."""

    def __init__(self, kind: str, blocks, rate: int):
        self.kind, self.blocks, self.rate, self.n = kind, blocks, rate, 0

    def __iter__(self):
        to_48k = Resampler(self.rate, RATE)
        for x in self.blocks:
            self.n += len(x)
            yield to_48k(x)
        yield to_48k(NOTHING, last=True)

    def measured(self) -> dict:
        return {"scale": 1.0, "lag_samples": 0.0, "envelope_corr": 1.0}


@dataclass
class Waiting:
    """A recording that SIDON is to restore; a long one has no features: it is read when its turn comes."""

    path: str
    target: str
    file: Path
    rate: int
    features: np.ndarray | None = None  # [T, 160]
    source: Source | None = None
    stamp: tuple = NO_STAMP

    @property
    def frames(self) -> int:
        return sys.maxsize if self.features is None else len(self.features)


def read_file(rel: str, name: str, job: dict) -> dict | Waiting:
    """In a reading process: what SIDON needs of a file, or the manifest row of one that is kept (written
    here), or {path, reason} of one that is skipped."""
    stamp = ABSENT
    try:
        file = resolve_inside(job["input_dir"], rel)
        if len(os.fsencode(os.path.basename(name))) > 255:
            raise AudioError("its target's name would be longer than 255 bytes: rename it")
        stamp = stamp_of(file)
        blocks = audio_blocks(file, BLOCK_SECONDS)
        first, rate = next(blocks)
        blocks = itertools.chain([first], (x for x, _ in blocks))
        kind = "copied" if rate >= job["native_rate"] else job["upsampler"]
        if kind != "sidon":
            return write_target(rel, name, job["output_dir"], Kept(kind, blocks, rate), stamp)
        pieces = list(itertools.islice(blocks, int(LONG_SECONDS / BLOCK_SECONDS) + 1))
        if len(pieces) * BLOCK_SECONDS > LONG_SECONDS:
            return Waiting(rel, name, file, rate, stamp=stamp)
        return Waiting(rel, name, file, rate, *front_end(lambda: iter(pieces), rate), stamp)
    except AudioError as e:
        return {"path": rel, "reason": str(e), "source_stamp": stamp}


# ---- the job ----


class Job:
    """One process's share: claims units, keeps readers, SIDON and writers busy, commits what is finished."""

    def __init__(self, args, files: list[str], names: dict[str, str], settings, work: SharedWork, log, stop):
        self.args, self.settings, self.work, self.log, self.stop = args, settings, work, log, stop
        self.files, self.names = set(files), names
        self.units = [u for u, unit in enumerate(work.units) if not self.files.isdisjoint(unit)]
        recorded = partial(recorded_of, names)
        forget_changed(work, self.units, recorded, args.input_dir, args.output_dir, log.say)
        proc = f"{socket.gethostname()}-{os.getpid()}"  # several processes append to one metrics.jsonl
        self.progress = Progress(log, "precompute", {u: len(work.units[u]) for u in self.units}, proc=proc)
        self.writers = ThreadPoolExecutor(2)
        self.sidon: Sidon | None = None
        if args.num_workers:
            os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")  # of a reader; torch is not concerned
        self.readers = processes(args.num_workers, "spawn")

    def run(self) -> None:
        """Until every unit is done, by us or by others: those that live processes hold are waited for."""
        while self.units and not self.stop:
            for unit, group in itertools.groupby(self.read(), key=lambda r: r[0]):
                self.finish(unit, [result for _, result in group])
            self.units = self.work.unfinished(self.units)
            if not self.stop:
                self.progress.left(sum(len(self.work.units[u]) for u in self.units))
            if self.units and not self.stop:
                time.sleep(WAIT_S)  # should their owner die, their unit is ours

    def claimed(self):
        """(unit, (file, target)) of all that we get to do, claimed only as the readers come to it."""
        for u in self.units:
            if not self.stop and self.work.claim(u):
                jobs = ((u, (rel, self.names[rel])) for rel in self.work.units[u])
                yield from itertools.takewhile(lambda _: not self.stop, jobs)

    def read(self):
        """(unit, read_file(file)) in order; the readers are at most one unit ahead (memory)."""
        read = partial(read_file, job=self.settings)
        ahead = max(self.work.unit_size, 2 * self.args.num_workers) + 1
        try:  # one unit ahead: the device finds the next one read
            yield from in_order(self.readers, read, self.claimed(), ahead)
        except BrokenProcessPool:
            raise UserError("a reader was killed (out of memory?); try a smaller --num_workers") from None

    def finish(self, unit: int, results: list) -> None:
        """SIDON where needed, wait for the writers, commit; a unit cut short by a stop is given back."""
        waiting, rows = ([r for r in results if isinstance(r, kind)] for kind in (Waiting, dict))
        self.progress.at(unit)
        for row in rows:
            self.progress.add(row.get("seconds"))
        if waiting and not self.stop:
            rows += self.restore(waiting)
        if len(rows) < len(self.work.units[unit]):
            self.work.release(unit)
        elif self.work.still_ours(unit):
            done, skipped = ([r for r in rows if key in r] for key in ("target", "reason"))
            self.work.commit(unit, {"rows": done, "skipped": skipped})

    def restore(self, waiting: list[Waiting]) -> list[dict]:
        """SIDON, then the writers: rows as of read_file; fewer of them after a stop."""
        self.load_sidon(waiting[0])
        rows, writing = [], []
        for group in batches(waiting, self.sidon.batch_size, self.args.batch_slack):
            if self.stop:
                break
            if group[0].frames > CHUNK:
                rows += self.restore_long(group[0])
            else:
                writing += self.restore_batch(group)
        return rows + [future.result() for future in writing]

    def load_sidon(self, first: Waiting) -> None:
        """At the first file that needs it: a corpus of native rate runs without."""
        if self.sidon:
            return
        args = self.args
        why = f"{first.path} has {first.rate} Hz, below --native_rate {args.native_rate}: it needs SIDON"
        if 44100 <= first.rate < args.native_rate:
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
        if self.sidon.no_batches:
            self.log.say(f"SIDON takes no batches here ({self.sidon.no_batches}): one utterance at a time")

    def restore_batch(self, group: list[Waiting]) -> list[Future]:
        """One pass of SIDON over utterances of one length, or continued to the longest; written meanwhile."""
        frames, futures = group[-1].frames, []
        features = [np.pad(w.features, ((0, frames - w.frames), (0, 0)), mode="edge") for w in group]
        (waves,) = self.sidon.stream(np.stack(features))  # [B, T, 160] -> [B, 960 T]
        for w, wave in zip(group, waves):
            w.features = None  # the memory is wanted
            row = (w.path, w.target, self.settings["output_dir"], Restored(w.source, [wave]), w.stamp)
            futures.append(self.writers.submit(write_target, *row))
            self.progress.add(w.source.n / w.rate)
        return futures

    def restore_long(self, w: Waiting) -> list[dict]:
        """SIDON chunk by chunk, each written before the next is asked for: a row, or none after a stop."""
        try:
            features, source = w.features, w.source
            if features is None:
                blocks = lambda: (x for x, _ in audio_blocks(w.file, BLOCK_SECONDS))
                features, source = front_end(blocks, w.rate)
            restored = Restored(source, self.until_stopped(self.sidon.stream(features[None])))
            row = write_target(w.path, w.target, self.settings["output_dir"], restored, w.stamp)
        except AudioError as e:
            row = {"path": w.path, "reason": str(e), "source_stamp": w.stamp}
        except Stopped:
            return []
        self.progress.add(row.get("seconds"))
        return [row]

    def until_stopped(self, stream):
        """The waves [n] of one utterance; raises Stopped where a stop was asked for: nothing of it lands."""
        for wave in stream:
            if self.stop:
                raise Stopped
            yield wave[0]

    def __enter__(self) -> "Job":
        return self

    def __exit__(self, error, *_) -> None:
        self.writers.shutdown(wait=True)
        if self.readers:
            self.readers.shutdown(wait=error is None, cancel_futures=True)
        self.work.release()
        self.work.close()


def batches(waiting: list[Waiting], size: int, slack_seconds: float) -> list[list[Waiting]]:
    """Groups of at most `size` utterances of one length, to within the slack; more than one chunk: alone."""
    groups: list[list[Waiting]] = []
    for w in sorted(waiting, key=lambda w: (w.frames, w.path)):
        last = groups[-1] if groups else []
        if 0 < len(last) < size and w.frames <= min(CHUNK, last[0].frames + int(slack_seconds * 50)):
            last.append(w)
        else:
            groups.append([w])
    return groups


def read_sums(path: Path) -> dict[str, str]:
    """A list as sha256sum prints it: a sum and a file name a line."""
    try:
        lines = [line.split() for line in path.read_text().splitlines() if line.strip()]
        return {Path(name.lstrip("*")).name: digest.lower() for digest, name in lines}
    except (OSError, ValueError) as e:
        raise UserError(f"--sidon_sha256 {path} is no list as sha256sum prints it: {e}") from None


def merge(work: SharedWork, output_dir: Path, min_corr: float) -> dict:
    """manifest.jsonl, skipped.jsonl and summary.json of all finished units; returns the summary."""
    results = []  # done again when others finished a unit meanwhile, so that the last writer has them all
    while len(results) < len(work.units) - len(work.unfinished()):
        results = work.results()
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


# ---- a look at everything ----


def verify(args, stop: StopFlag) -> int:
    """Compare every target of a manifest with its recording; returns the exit code."""
    out, manifest = args.output_dir, args.output_dir / "manifest.jsonl"
    if not manifest.is_file():
        raise UserError(f"--verify: {out} has no manifest.jsonl; run the same command without --verify first")
    with open(manifest, "rb") as f:
        ends = np.cumsum([0, *map(len, f)])  # of the lines, in bytes
    sizes = [min(UNIT_FILES, len(ends) - 1 - first) for first in range(0, len(ends) - 1, UNIT_FILES)]
    log, state = RunLog(out, log_name="precompute.log"), stamp_of(manifest)[2]

    def wrong_of(pool, unit: int, progress: Progress) -> list[tuple]:
        rows = manifest_part(manifest, ends, unit * UNIT_FILES, sizes[unit])
        return compared(pool, rows, args, stop, progress)

    state, told = f"{state:08x}", f"{len(ends) - 1} targets of {out}, recordings in {args.input_dir}"
    return look_at_all(out, state, sizes, "precompute_48k.py", told, wrong_of, "spawn", args, stop, log)


def manifest_part(manifest: Path, ends, first: int, count: int) -> list[dict]:
    """manifest_row of `count` lines from line `first` on, which begin at ends[first], bytes."""
    with open(manifest, "rb") as f:
        f.seek(int(ends[first]))
        lines = f.read(int(ends[first + count] - ends[first])).decode().splitlines()
    return [manifest_row(line, f"{manifest} line {n}") for n, line in enumerate(lines, first + 1)]


def compared(pool, rows: list[dict], args, stop: StopFlag, progress: Progress) -> list[tuple]:
    """[(path, what, why)] of the rows that are wrong. Raises Stopped."""
    wrong, folders = [], (str(args.input_dir), str(args.output_dir))
    jobs = ((row["seconds"], (row, *folders)) for row in rows)
    for seconds, found in in_order(pool, line_of, jobs, 2 * args.num_workers):
        if stop:
            raise Stopped
        progress.add(seconds)
        wrong += [found] if found else []
    return wrong


# ---- command line ----


def parse_args(argv=None):
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = p.add_argument
    # data
    add("--input_dir", type=Path, help="recordings, any rate, searched recursively; default: both splits")
    add("--output_dir", type=Path, help="48 kHz targets, manifest.jsonl, summary.json; default: both splits")
    add(
        "--data_root", default="", metavar="DIR", help="where corpus/ and targets/ lie; default: DATA_ROOT, ."
    )
    add("--allow_links", **ALLOW_LINKS)
    add("--limit", type=int, default=-1, help="first N files only; -1 = all")
    add("--start_idx", type=int, default=0, help="first file of the sorted list that this process does")
    add("--end_idx", type=int, default=-1, help="the file it stops before; -1 = to the end")
    add("--native_rate", type=int, default=48000, help="sources at this rate or above are kept, Hz")
    add("--num_workers", type=int, default=2, help="reading processes; 0 = read in this one")
    # what lower rates get
    add("--upsampler", choices=["sidon", "sinc"], default="sidon", help="sinc: a baseline without new band")
    device = "where SIDON runs: a GPU's number, or cpu; default: a GPU where there is one"
    add("--device", default="", help=device)
    add("--sidon_dir", type=Path, help="folder with SIDON's files; default: the hub")
    add("--sidon_revision", default=SIDON_REVISION, metavar="SHA", help="commit on the hub (40 hex digits)")
    add("--sidon_sha256", type=Path, metavar="FILE", help="sums to check them against (sha256sum's format)")
    add("--batch_size", type=int, default=8, help="utterances of one length a pass, if SIDON takes batches")
    slack = "lengths that share a pass; 0: equal ones, no sample changes; above: shorter ones' ends change"
    add("--batch_slack", type=float, default=0.0, metavar="SECONDS", help=slack)
    # checks
    add("--min_envelope_corr", type=float, default=0.9, help="rows below: faithful false, out of training")
    add("--max_bad_fraction", type=float, default=0.01, help="more bad files: exit code 5, at the end")
    look = "look at every target beside its recording; exit code 5 beyond --max_bad_fraction"
    add("--verify", action="store_true", help=look)
    add("--test_mode", action="store_true", help="only the first files that need upsampling, then a table")
    add("--test_samples", type=int, default=10, help="how many files --test_mode takes")
    args = read_flags(p, argv)
    if -1 < args.end_idx <= args.start_idx:
        p.error(f"--end_idx {args.end_idx} must be above --start_idx {args.start_idx}: no file would be done")
    flags = "--input_dir and --output_dir"
    args.folders = asked(args.input_dir, args.output_dir, flags, args.data_root, "targets")
    for source, output in args.folders:
        if output.resolve().is_relative_to(source.resolve()):
            raise UserError(f"--output_dir {output} lies inside --input_dir; choose a folder beside it")
        check_place(output, "--output_dir")
    return args


def choose_files(args, files: list[str]) -> list[str]:
    """--start_idx, --end_idx, --limit, --test_mode."""
    files = files[args.start_idx : args.end_idx if args.end_idx >= 0 else None]
    files = files[: args.limit] if args.limit >= 0 else files
    if args.test_mode:
        import soundfile as sf

        def low(rel: str) -> bool:
            try:
                file = resolve_inside(args.input_dir, rel)
                os.close(open_sound_file(file)[0])  # a pipe would be waited for
                return sf.info(file).samplerate < args.native_rate
            except (AudioError, OSError, sf.LibsndfileError):
                return False

        files = list(itertools.islice(filter(low, files), args.test_samples))
    if not files:
        flags = "--start_idx, --end_idx, --limit or --test_mode"
        raise UserError(f"nothing to do below {args.input_dir}: {flags} leave no file")
    return files


def names_of(files: list[str], work: SharedWork) -> dict[str, str]:
    """target_names of the files, where a recording whose target is made keeps that name: one that came later
    takes no other's place."""
    made = []
    for unit in set(range(len(work.units))).difference(work.unfinished()):
        with contextlib.suppress(UserError, KeyError, TypeError):  # a damaged result: forget_changed tells
            rows = read_json(work.result_path(unit))["rows"]
            made += [(row["path"], row["target"]) for row in rows]
    held = collections.Counter(target.lower() for _, target in made)
    given = {rel: target for rel, target in made if held[target.lower()] == 1}
    return target_names(files, given)


def recorded_of(names: dict[str, str], result: dict) -> tuple[dict, dict]:
    """({recording: stamp}, {target: stamp}) of a unit that is done, for forget_changed."""
    rows = [*result["rows"], *result["skipped"]]
    sources = {row["path"]: row.get("source_stamp") or NO_STAMP for row in rows}
    shared = [row["target"] for row in result["rows"] if names[row["path"]] != row["target"]]
    targets = {row["target"]: row.get("target_stamp") or NO_STAMP for row in result["rows"]}
    return sources, targets | dict.fromkeys(shared, ABSENT)  # one file of two recordings: nobody's


def check_ours(folder: Path) -> None:
    """Raises UserError for a folder with 48 kHz files of other programs: they would be written over."""
    made = (folder / "work").exists() or (folder / "manifest.jsonl").exists()
    if not made and any(folder.rglob("*.wav")):
        todo = "train on it by --audio_48k_dir and --target_kind, or choose another --output_dir"
        raise UserError(f"{folder} holds audio that this program has not made: {todo}")


def open_job(args, stop: StopFlag) -> Job:
    """The listing, the plan shared with other processes, and the log."""
    source, output = args.input_dir.resolve(), args.output_dir.resolve()
    listed, device = find_audio(args.input_dir), pick_device(args.device)
    check_ours(args.output_dir)
    files = choose_files(args, listed)
    shared = {"native_rate": args.native_rate, "upsampler": args.upsampler, "input_dir": str(source)}
    try:
        output.mkdir(parents=True, exist_ok=True)
        log = RunLog(args.output_dir, log_name="precompute.log")
    except OSError as e:
        raise UserError(f"--output_dir {args.output_dir} cannot be written: {e.strerror}") from None
    work = SharedWork(output, files, None, shared, log.say, UNIT_FILES)
    names = names_of(sorted(set(listed).union(*work.units)), work)  # others may have seen more files
    for folder in {os.path.dirname(name) for name in names.values()} - {""}:
        sweep_leftovers(output / folder)
    job = Job(args, files, names, shared | {"output_dir": str(output)}, work, log, stop)
    log.metric(event="start", kind="precompute", total_steps=job.progress.total, **job.progress.marks)
    share = f"{len(files)} of {len(listed)} files"
    log.say(f"precompute_48k: {share} below {args.input_dir} -> {args.output_dir}; {device}")
    return job


def main(args) -> int:
    allow_links(args.allow_links)
    stop, code = StopFlag(), 0
    for input_dir, output_dir in args.folders:
        split = argparse.Namespace(**vars(args) | {"input_dir": input_dir, "output_dir": output_dir})
        found = EXIT_STOPPED if stop else (verify if args.verify else precompute)(split, stop)
        if found == EXIT_STOPPED:
            return found
        code = max(code, found)
    return code


def precompute(args, stop: StopFlag) -> int:
    """All files of one folder; returns the exit code."""
    with open_job(args, stop) as job:
        job.run()
    log, progress = job.log, job.progress
    if stop:
        log.say(f"stopped by {stop.signal}; the same command continues")
        log.metric(event="end", code=EXIT_STOPPED, **progress.marks)
        return EXIT_STOPPED
    summary = merge(job.work, args.output_dir, args.min_envelope_corr)
    progress.say()
    if args.test_mode:
        manifest = (args.output_dir / "manifest.jsonl").read_text(encoding="utf-8")
        for row in (r for r in map(json.loads, manifest.splitlines()) if r["path"] in job.files):
            measures = f"envelope_corr {row['envelope_corr']:.3f}  gain {row['gain']:.3g}"
            log.say(f"{row['kind']}  lag {row['lag_samples']:+.1f} samples  {measures}  {row['target']}")
    counted = lambda counts: f" ({', '.join(f'{k} {n}' for k, n in counts.items())})" if counts else ""
    log.say(
        f"summary: files {summary['files']}{counted(summary['kinds'])}, skipped {summary['skipped']}"
        f"{counted(summary['reasons'])}, unfaithful {summary['unfaithful']}, scaled to fit "
        f"{summary['scaled_to_fit']}, {summary['seconds'] / 3600:.3f} h"
    )
    code = EXIT_BAD_INPUT if summary["skipped"] > args.max_bad_fraction * summary["files"] else 0
    log.metric(event="end", code=code, **progress.marks, **summary)
    if code:
        share = f"{summary['skipped']} of {summary['files']} files were skipped"
        allowed = f"more than --max_bad_fraction {args.max_bad_fraction}"
        where = args.output_dir.resolve() / "skipped.jsonl"
        print(f"precompute_48k.py: {share}, {allowed}: see {where}", file=sys.stderr)
    return code


if __name__ == "__main__":
    stop_at_once()
    main_guard(lambda: main(parse_args()))
