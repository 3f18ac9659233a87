"""Encode an audio folder once: FULL SNAC codes of every file, in parquet, for training at any segment length.

    python cache_codes.py                          # corpus/{train,valid}/audio -> codes/{train,val}
    python cache_codes.py --data_dir corpus/train/audio --output_dir codes/train --device 0
    python cache_codes.py --data_dir corpus/train/audio --output_dir codes/train --device 1  # beside it
    python cache_codes.py --data_dir assets/speech --output_dir codes/demo --device cpu \\
        --pretrained_model assets/codec --min_seconds 0.5                          # tiny, on a CPU
    python cache_codes.py --import older/codes_phase11/train --data_dir corpus/train/audio  # an old cache

--import checks a random sample of an older cache's rows by encoding them again, and writes those of the right
lengths in our schema; the same command without it then encodes the files that were missing or refused.
--verify encodes every recording of a finished cache once more and names the rows that have other codes.

Any number of processes on any machines that see the folder share the work; a restart skips what is done.
Writes codes_batch_gpu{G}_{N}.parquet, metadata.json (rows, seconds, skipped by reason), skipped.jsonl (one
line a file left out, with the reason) and work/ (claims). Columns: file_path (relative, POSIX), audio_length
(samples at the model's rate), codes_scale_0 … codes_scale_{K-1} (list<int16>).
"""

import argparse
import collections
import contextlib
import errno
import math
import os
import random
import shutil
import time
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict
from functools import partial
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
from snac48.places import ALLOW_LINKS, asked, check_place, data_root, imports


def parse_args(argv=None):
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = p.add_argument
    add("--data_dir", default="", help="audio folder, read recursively; default: both splits")
    add("--output_dir", default="", help="cache folder, may be shared by several processes; default: both")
    add("--data_root", default="", metavar="DIR", help="where corpus/ and codes/ lie; default: DATA_ROOT, .")
    add("--pretrained_model", default=DEFAULT_MODEL, help="SNAC folder, hub id, or hub id@COMMIT")
    add("--allow_links", **ALLOW_LINKS)
    add("--device", default="", help="GPU number or cpu; default: a GPU where there is one")
    clips = "clips of one length encoded together, at most; default: 32 on a GPU, 1 on a CPU"
    add("--batch_size", type=int, default=None, help=clips)
    rows = "audio files a parquet file (and a claim); default: a 64th of all, 1000 at most"
    add("--rows_per_file", type=int, default=None, help=rows)
    add("--min_seconds", type=float, default=1.0, help="shorter files are skipped, and listed")
    add("--limit", type=int, default=-1, help="only the first N files of the sorted listing (-1 = all)")
    workers = "decoding processes, 0 = in this process; default: cores / GPUs, 1 beside a CPU"
    add("--num_workers", type=int, default=None, help=workers)
    add("--max_bad_fraction", type=float, default=0.01, help="stop when more files than this are bad")
    look = "encode everything once more and compare; exit code 5 beyond --max_bad_fraction"
    add("--verify", action="store_true", help=look)
    add("--import", dest="old", metavar="OLD", help="a cache of the older schema, instead of encoding")
    add("--import_sample", type=int, default=64, help="rows of it to encode again; -1 = all, keep the right")
    add("--segment_length", type=float, help="not needed: whole files are encoded, for every length")
    args = read_flags(p, argv)
    flags = "--data_dir and --output_dir"
    if args.old:
        root = data_root(args.data_root)
        args.folders = imports(Path(args.old), args.data_dir, args.output_dir, root)
    else:
        args.folders = asked(args.data_dir, args.output_dir, flags, args.data_root, "codes")
    for data_dir, output_dir, *_ in args.folders:
        if not data_dir.is_dir():
            raise UserError(f"audio folder {data_dir} does not exist")
        check_place(output_dir, "--output_dir")
    return args


if __name__ == "__main__":  # before torch is imported: --help and a misspelt flag answer at once
    stop_at_once()
    ARGS = guarded(parse_args)

import torch

from snac48.audio import AudioError, allow_links, find_audio, read_audio, resample, resolve_inside
from snac48.cache import SHARDS, CodeIndex, OldCache, check_ours, row_differs, stamps_in, write_shard
from snac48.codec import (
    Geometry,
    align_samples,
    encode,
    encoding_of,
    fold_weight_norm,
    geometry_of,
    load_snac,
)
from snac48.files import sweep_leftovers, temporary, write_json, write_jsonl
from snac48.proof import ABSENT, NO_STAMP, forget_changed, stamp_of
from snac48.runlog import RunLog
from snac48.verify import look_at_all
from snac48.work import WAIT_S, Progress, SharedWork, in_order, processes, share, share_of_cores

MAX_BATCH_SECONDS = 240  # of audio at once, however many clips: bounds the memory
MANY_BAD = 10  # more than so many stop a job early, fewer at its end with all of their names
MAX_WAITING_SECONDS = 30 * 60  # of audio that waits for companions of its length

# ---- reading ----


def read_one(root: str, rel: str, rate: int):
    """In a reading process: (path, samples at `rate` | None, reason | None, stamp of the file)."""
    stamp = ABSENT
    try:
        rel.encode("utf-8")
        path = resolve_inside(root, rel)
        stamp = stamp_of(path)  # its bytes are in memory then
        samples, source_rate = read_audio(path)
        return rel, resample(samples, source_rate, rate), None, stamp
    except UnicodeEncodeError:
        return rel.encode("utf-8", "backslashreplace").decode(), None, "file name is not UTF-8", stamp
    except AudioError as e:
        return rel, None, str(e), stamp


def read(pool, files: list[str], args, rate: int, stop: StopFlag):
    """Yield read_one(...) of each file in order, a bounded number ahead. Raises Stopped."""
    root = os.path.abspath(args.data_dir)
    jobs = ((rel, (root, rel, rate)) for rel in files)
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


def long_enough(clips, min_seconds: float, rate: int, skipped: list, stamps: dict):
    """Those of read_one's clips that will be encoded, (path, samples); the others join `skipped`. stamps: of
    all of them."""
    for rel, samples, reason, stamp in clips:
        stamps[rel] = stamp
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


def begin_batch(model, length: int, batch: list):
    """Start to encode clips that are padded to `length` samples, and to copy their codes to the CPU. Returns
    a function that waits for them: {path: (samples, [int16 codes of each scale])}."""
    device = next(model.parameters()).device
    gpu = device.type == "cuda"
    # from and to pinned memory a copy runs beside the codec's kernels
    audio = torch.zeros(len(batch), 1, length, pin_memory=gpu)
    for row, (_, samples) in zip(audio, batch):
        row[0, : len(samples)] = torch.from_numpy(samples)
    with torch.inference_mode():
        codes = encode(model, audio.to(device, non_blocking=True))
        codes = [c.to(torch.int16).to("cpu", non_blocking=True) for c in codes]
    done = torch.cuda.current_stream(device).record_event() if gpu else None

    def fetch() -> dict:
        if done:
            done.synchronize()
        scales = [c.numpy() for c in codes]
        return {rel: (len(samples), [c[i] for c in scales]) for i, (rel, samples) in enumerate(batch)}

    return fetch


def one_late(items, begin):
    """Yield (item, begin(*item)()) of each item in order, where the next one is begun before an item's result
    is fetched: a GPU has work while the CPU takes results apart and waits for the next batch's files."""
    held = None
    for item in items:
        begun = item, begin(*item)
        if held:
            yield held[0], held[1]()
        held = begun
    if held:
        yield held[0], held[1]()


def encode_unit(model, clips, args, stop: StopFlag, progress: Progress):
    """({path: (samples, codes)}, [{file_path, reason, bad}] of those left out, {path: stamp} of all). Raises
    Stopped."""
    rows, skipped, stamps, rate = {}, [], {}, model.sampling_rate
    clips = long_enough(clips, args.min_seconds, rate, skipped, stamps)
    batches = equally_long(clips, align_samples(model), rate, args.batch_size)
    for (_, batch), codes in one_late(batches, partial(begin_batch, model)):
        if stop:
            raise Stopped
        rows |= codes
        for _, samples in batch:
            progress.add(len(samples) / rate)
    for _ in skipped:
        progress.add(None)
    return rows, skipped, stamps


# ---- the job ----


def encode_all(model, geometry: Geometry, work: SharedWork, progress: Progress, args, stop: StopFlag) -> None:
    """Until every unit has its parquet file, by us or by others: those that live processes hold are waited
    for. Raises Stopped and TooManyBadFiles."""
    allowed, bad, units = args.max_bad_fraction * progress.total, 0, list(range(len(work.units)))
    with contextlib.closing(work), contextlib.ExitStack() as stack:
        if pool := processes(args.num_workers, "forkserver"):
            stack.callback(pool.shutdown, wait=False, cancel_futures=True)
        while units:
            for unit in units:
                if stop:
                    raise Stopped
                if work.claim(unit):
                    bad += encode_claimed(unit, model, geometry, work, progress, args, pool, stop)
                if bad > max(allowed, MANY_BAD):
                    raise TooManyBadFiles(bad)
            units = work.unfinished(units)
            progress.left(sum(len(work.units[u]) for u in units))
            if units:
                time.sleep(WAIT_S)  # should their owner die, their unit is ours
    if stop:
        raise Stopped
    progress.say()


def encode_claimed(unit: int, model, geometry, work: SharedWork, progress: Progress, args, pool, stop) -> int:
    """Write and commit a unit of ours; returns how many of its files are bad. Raises Stopped."""
    out, worker = Path(args.output_dir), args.worker
    progress.at(unit)
    try:
        clips = read(pool, work.units[unit], args, geometry.sampling_rate, stop)
        rows, skipped, stamps = encode_unit(model, clips, args, stop, progress)
    except Stopped:
        work.release(unit)
        raise
    if not work.still_ours(unit):
        progress.log.say(f"unit {unit} was taken over while this process slept; its rows are dropped here")
        return 0
    for stale in out.glob(f"codes_batch_gpu*_{unit}.parquet"):
        stale.unlink()  # of an owner that died before it could commit
    shard = f"codes_batch_{worker}_{unit}.parquet" if rows else None
    if rows:
        write_shard(out / shard, rows, geometry, args.data_dir, encoding_of(model), stamps)
    seconds = sum(length for length, _ in rows.values()) / geometry.sampling_rate
    result = {"shard": shard, "rows": len(rows), "seconds": seconds, "skipped": skipped}
    result |= {"shard_stamp": stamp_of(out / shard) if shard else None}
    result |= {"stamps": {s["file_path"]: stamps[s["file_path"]] for s in skipped}}
    work.commit(unit, result)
    return sum(s["bad"] for s in skipped)


def recorded_of(out: Path, result: dict) -> tuple[dict, dict]:
    """({recording: stamp}, {parquet file: stamp}) of a unit that is done, for forget_changed."""
    sources, shard = dict(result.get("stamps", {})), result["shard"]
    if shard is None:
        return sources, {}
    return sources | stamps_in(out / shard), {shard: result.get("shard_stamp") or NO_STAMP}


def finish(work: SharedWork, log: RunLog, args, geometry: Geometry) -> None:
    """Merge the results of all units, by whomever, into metadata.json and skipped.jsonl. Raises
    TooManyBadFiles, of all processes and earlier starts of this command; UserError for no rows."""
    results = work.results()
    skipped = sorted((s for r in results for s in r["skipped"]), key=lambda s: s["file_path"])
    rows, seconds = (sum(r[key] for r in results) for key in ("rows", "seconds"))
    summarize(rows, seconds, skipped, log, args, geometry)
    if rows == 0:
        where = f"{args.output_dir}/skipped.jsonl"
        raise UserError(f"no file of {args.data_dir} could be cached: see {where} for the reasons")
    bad = sum(s["bad"] for s in skipped)
    if bad > args.max_bad_fraction * sum(map(len, work.units)):
        raise TooManyBadFiles(bad)


def summarize(rows: int, seconds: float, skipped: list, log: RunLog, args, geometry: Geometry) -> None:
    """metadata.json and skipped.jsonl, and the same in words."""
    reasons = collections.Counter(s["reason"] for s in skipped)
    metadata = {"snac": asdict(geometry), "data_dir": str(Path(args.data_dir).resolve())}
    metadata |= {"files": rows + len(skipped), "rows": rows, "seconds": round(seconds, 3)}
    metadata |= {"skipped": len(skipped), "skipped_by_reason": dict(reasons.most_common())}
    write_jsonl(Path(args.output_dir) / "skipped.jsonl", skipped)
    write_json(Path(args.output_dir) / "metadata.json", metadata)
    counted = f"{rows} rows ({seconds / 3600:.3f} h) + {len(skipped)} skipped = {rows + len(skipped)} files"
    log.say(f"done: {counted}")
    for why, n in reasons.most_common(10):
        log.say(f"  skipped {n}: {why}")


# ---- a look at everything ----


def verify(model, geometry: Geometry, device, args, stop: StopFlag) -> int:
    """Encode every recording of a cache again and compare the codes; returns the exit code."""
    out, index = Path(args.output_dir), CodeIndex(args.output_dir)
    if differs := geometry.difference(index.geometry):
        raise UserError(f"cache {out} was made by another model ({differs}): give it as --pretrained_model")
    size = share(len(index), 1000)
    sizes = [min(size, len(index) - first) for first in range(0, len(index), size)]
    log = RunLog(args.output_dir, "cache.log")

    def wrong_of(pool, unit: int, progress: Progress) -> list[tuple]:
        rows = range(unit * size, unit * size + sizes[unit])
        return wrong_rows(index, rows, model, args, pool, stop, progress)

    state, told = index.folder.name.removeprefix("index-"), f"{device}; {len(index)} rows of {out}"
    told += f", recordings in {args.data_dir}"
    return look_at_all(out, state, sizes, "cache_codes.py", told, wrong_of, "forkserver", args, stop, log)


def wrong_rows(index: CodeIndex, rows: range, model, args, pool, stop: StopFlag, progress) -> list[tuple]:
    """[(path, what, why)] of those rows that are not what encoding their recordings gives. Raises Stopped."""
    again = argparse.Namespace(**vars(args) | {"min_seconds": 0.0})
    clips = read(pool, [index.path(row) for row in rows], again, model.sampling_rate, stop)
    fresh, skipped, _ = encode_unit(model, clips, again, stop, progress)
    reasons, wrong = {s["file_path"]: s["reason"] for s in skipped}, []
    for row in rows:
        path = index.path(row)
        if path not in fresh:
            wrong.append((path, "recording", reasons[path]))
            continue
        kept = int(index.lengths[row]), index.slice(row, 0, index.coarse(row))
        if why := row_differs(kept, fresh[path]):
            wrong.append((path, "codes", why))
    return wrong


# ---- caches of the older schema ----


def import_cache(model, geometry: Geometry, device, args, stop: StopFlag) -> int:
    """Write what is right of an older cache in our schema: whole, or not at all."""
    old, out = args.old, Path(args.output_dir)
    if not (shards := sorted(old.glob(SHARDS))):
        raise UserError(f"--import {old} holds no {SHARDS}")
    out.parent.mkdir(parents=True, exist_ok=True)
    sweep_leftovers(out.parent)
    tmp = temporary(out)
    try:
        log = RunLog(tmp, "cache.log")
        log.say(f"cache: {device}; importing {old} -> {out}, recordings in {args.data_dir}")
        files = find_audio(args.data_dir)
        shards = watched(shards, "reading", log, stop)
        rows = OldCache(shards, files, geometry, align_samples(model), tmp / "codes.i16")
        check_rows(rows, model, log, args, stop)
        work = write_rows(rows, files, geometry, tmp, log, args, stop)
        (tmp / "codes.i16").unlink()
        skipped = [
            {"file_path": rel, "reason": why, "bad": True} for rel, why in sorted(rows.refused.items())
        ]
        seconds = sum(length for length, _, _ in rows.rows.values()) / geometry.sampling_rate
        place = argparse.Namespace(**vars(args) | {"output_dir": str(tmp)})
        summarize(len(rows.rows), seconds, skipped, log, place, geometry)
        if left := len(set(files).difference(*work.units)):
            log.say(
                f"{left} files of {args.data_dir} are not in it: the same command without --import adds them"
            )
        os.rename(tmp, out)
    except OSError as e:
        if e.errno != errno.ENOTEMPTY:
            raise
        raise UserError(f"{out} was made by another process meanwhile") from None
    except Stopped:
        print(f"stopped by {stop.signal}: nothing was imported")
        return EXIT_STOPPED
    finally:
        shutil.rmtree(tmp, ignore_errors=True)
    return 0


def watched(items: list, what: str, log: RunLog, stop: StopFlag):
    """The items, with a line every few seconds. Raises Stopped."""
    progress = Progress(log, what, {0: len(items)})
    for item in items:
        if stop:
            raise Stopped
        yield item
        progress.add(0.0)


def check_rows(rows: OldCache, model, log: RunLog, args, stop: StopFlag) -> None:
    """Encode a sample of the rows, or all, once more and refuse those that differ. Raises UserError where a
    sample has one of another model: then nobody knows about the others."""
    chosen = sorted(rows.rows)
    everything = not 0 <= args.import_sample < len(chosen)
    if not everything:
        chosen = sorted(random.Random(0).sample(chosen, args.import_sample))
    progress, differ = Progress(log, "import", {0: len(chosen)}), {}
    again = argparse.Namespace(**vars(args) | {"min_seconds": 0.0})
    with contextlib.ExitStack() as stack:
        if pool := processes(args.num_workers, "forkserver"):
            stack.callback(pool.shutdown, wait=False, cancel_futures=True)
        for i in range(0, len(chosen), 1000):
            part = chosen[i : i + 1000]
            clips = read(pool, part, again, model.sampling_rate, stop)
            fresh, *_ = encode_unit(model, clips, again, stop, progress)
            differ |= {rel: why for rel in part if (why := rows.compare(rel, fresh.get(rel)))}
    if chosen:
        log.say(f"{len(chosen) - len(differ)} of {len(chosen)} rows agree with {args.pretrained_model}")
    if not everything and (wrong := [rel for rel, why in differ.items() if "recording can't" not in why]):
        names = ", ".join(f"{rel} ({differ[rel]})" for rel in wrong[:3])
        todo = "--import_sample -1 checks every row and keeps the right ones"
        raise UserError(f"{len(wrong)} of {len(chosen)} sampled rows are not this model's: {names}; {todo}")
    for rel, why in differ.items():
        rows.refused[rel] = why
        del rows.rows[rel]
    if not rows.rows:
        why, n = collections.Counter(rows.refused.values()).most_common(1)[0]
        raise UserError(f"--import {args.old} has no row that could be used; of {n} rows: {why}")


def write_rows(
    rows: OldCache, files: list[str], geometry: Geometry, out: Path, log, args, stop
) -> SharedWork:
    """The parquet files, and the plan by which this program goes on with what is missing."""
    size = args.rows_per_file or share(len(files), 1000)
    work = SharedWork(out, sorted(rows.rows), size, settings_of(geometry, args), print)
    for unit, names in enumerate(watched(work.units, "writing", log, stop)):
        shard, found = f"codes_batch_{args.worker}_{unit}.parquet", {rel: rows.row(rel) for rel in names}
        write_shard(out / shard, found, geometry, args.data_dir)
        seconds = sum(length for length, _ in found.values()) / geometry.sampling_rate
        work.commit(unit, {"shard": shard, "rows": len(found), "seconds": seconds, "skipped": []})
    work.close()
    return work


def settings_of(geometry: Geometry, args) -> dict:
    """What all processes on one cache must agree on."""
    settings = {"data_dir": str(Path(args.data_dir).resolve()), "weights_sha256": geometry.weights_sha256}
    return settings | {"min_seconds": args.min_seconds}


# ---- encoding a folder ----


def main(args) -> int:
    allow_links(args.allow_links)
    device, stop = pick_device(args.device), StopFlag()
    if args.batch_size is None:  # on a CPU a larger batch is no faster, and takes its share of memory
        args.batch_size = 32 if device.type == "cuda" else 1
    if args.num_workers is None:
        args.num_workers = share_of_cores(device.type)
    for _, output_dir, *_ in args.folders:
        if args.old and output_dir.is_dir() and any(output_dir.iterdir()):
            raise UserError(f"{output_dir} is not empty: choose another --output_dir for the import")
        check_ours(output_dir)
    model = load_snac(args.pretrained_model, device)
    geometry = geometry_of(model, args.pretrained_model)
    if (size := geometry.codebook_size) > 32767:
        raise UserError(f"codebook of {size} entries does not fit the cache's int16 columns")
    fold_weight_norm(model)
    job = import_cache if args.old else verify if args.verify else cache
    code = 0
    for data_dir, output_dir, *old in args.folders:
        place = {
            "data_dir": str(data_dir),
            "output_dir": str(output_dir),
            "worker": f"gpu{device.index or 0}",
        }
        place |= {"old": old[0]} if old else {}
        found = job(model, geometry, device, argparse.Namespace(**vars(args) | place), stop)
        code = max(code, found)
        if found == EXIT_STOPPED or (found and not args.verify):
            return found
    return code


def cache(model, geometry: Geometry, device, args, stop: StopFlag) -> int:
    """Encode one folder into one cache; returns the exit code."""
    files = find_audio(args.data_dir)
    files = files[: args.limit] if args.limit >= 0 else files
    work = SharedWork(args.output_dir, files, args.rows_per_file, settings_of(geometry, args), print)
    log = RunLog(args.output_dir, "cache.log")
    out, units = Path(args.output_dir), range(len(work.units))
    forget_changed(work, units, partial(recorded_of, out), Path(args.data_dir), out, log.say)
    marks = {"phase": "cache", "worker": args.worker if device.type == "cuda" else "cpu"}
    progress = Progress(log, "cache", {u: len(unit) for u, unit in enumerate(work.units)}, **marks)
    codec = f"{geometry.sampling_rate} Hz, hop {geometry.hop_length}, strides {geometry.vq_strides}"
    todo = f"{progress.total} files in {len(work.units)} units, {len(work.unfinished())} to do"
    log.say(f"cache: {device}; {args.data_dir} -> {args.output_dir}: {todo}; {codec}")
    log.say(f"batches of up to {args.batch_size} clips, {args.num_workers} decoding processes, IEEE fp32")
    if args.segment_length is not None:
        log.say("--segment_length is not needed: whole files are encoded, their codes serve every length")
    end = lambda reason: log.metric(event="end", reason=reason, kind="cache", **marks)
    log.metric(event="start", kind="cache", total_steps=progress.total, **marks)
    try:
        encode_all(model, geometry, work, progress, args, stop)
        finish(work, log, args, geometry)
    except TooManyBadFiles as e:
        end("bad input")
        share = (
            f"{e} bad files of {progress.total} are more than --max_bad_fraction {args.max_bad_fraction:g}"
        )
        bad = [s for r in work.results() for s in r["skipped"] if s["bad"]]
        names = ", ".join(f"{s['file_path']} ({s['reason']})" for s in bad[:3])
        todo = "mend them, or run again with a higher --max_bad_fraction"
        raise UserError(f"{share}: {names}; {todo}", EXIT_BAD_INPUT) from None
    except Stopped:
        end("stopped")
        log.say(f"stopped by {stop.signal}: finished units are kept, the same command continues")
        return EXIT_STOPPED
    end("finished")
    return 0


if __name__ == "__main__":
    main_guard(main, ARGS)
