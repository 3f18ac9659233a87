"""Whether rows are what they should be: codes those of the recording, the target the same utterance.

A target that is the recording itself must have its waveform below 8 kHz. A restorer's has a phase of its own:
its envelope is compared, as when it was made.
"""

import contextlib
import math
import re
import shutil
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from .audio import AudioError, bad_file, header_of, link_roots, open_inside, read_span, resample
from .cli import EXIT_BAD_INPUT, EXIT_STOPPED, Stopped, UserError
from .files import write_json, write_jsonl
from .proof import MISSING, READERS, SAME, state_of
from .targets import KINDS, LENGTH_S
from .work import WAIT_S, Progress, SharedWork, processes

BAND_RATE = 16000  # Hz: compared is what lies below half of it
WINDOW_S = 30.0  # of a recording are compared at most
CODES_S = 2.0  # and so much of it is encoded
LAG_S = 0.002  # by which a target may come too early or too late
CORR = 0.8  # of waveforms; unrelated speech has 0.3 at most
ENVELOPE_CORR = 0.9  # of a restored target where its manifest says nothing
ENVELOPE_SLACK = 0.1  # by which it may lie below what the manifest says
LEVEL_DB = {"true": 1.0, "restored": 3.0}  # by which the level of a target may differ
QUIET = 4 / 32768  # a peak below which 16 bits hold no waveform to compare
ROW_AGREES = 0.9  # of the codes of one row; of all together cache.AGREE


# ---- a target beside its recording ----


def band_of(x, rate: int):
    """What sidon.compare compares of samples [n] at `rate`, of BAND_RATE or less: from 50 Hz on."""
    from .sidon import Band, HighPass

    band = Band()
    band(resample(HighPass(rate)(x), rate, BAND_RATE))
    return band.done()


def target_fault(source, target, rate: int, true: bool, corr: float = 1.0, lag: float = 0.0) -> str | None:
    """What is wrong with a target, float32 [n] at `rate`, beside its recording, the same span; None: nothing.
    true: it should have the recording's waveform. corr, lag: what its manifest says of a restored one: the
    correlation of the envelopes, and the lag in samples at 48 kHz."""
    from .sidon import compare

    peaks = [float(np.abs(x).max(initial=0)) for x in (source, target)]
    if max(peaks) < QUIET:
        return None
    if min(peaks) < QUIET / 4:
        return "it is silent" if peaks[1] < peaks[0] else "it speaks where the recording is silent"
    top = max(peaks)
    found = compare(*(band_of(x / top, rate) for x in (source, target)))
    alike, wanted = (found["band_corr"], CORR) if true else (found["envelope_corr"], ENVELOPE_CORR)
    if not true:
        wanted = min(wanted, corr) - ENVELOPE_SLACK
    late = (found["band_lag_samples"] if true else found["lag_samples"] - lag) / 48
    if alike < wanted:
        what = "waveform below 8 kHz" if true else "envelope"
        return f"its {what} is not the recording's (correlation {alike:.2f})"
    if abs(late) > 1000 * LAG_S:
        return f"it lies {abs(late):.1f} ms too {'late' if late > 0 else 'early'}"
    level = -20 * math.log10(found["rms_scale"])
    if abs(level) > LEVEL_DB["true" if true else "restored"]:
        return f"its level is {level:+.1f} dB from the recording's"
    return None


@dataclass(frozen=True)
class Sound:
    """A file below a folder: what is read of it."""

    folder: Path
    rel: str
    allowed: tuple

    def measure(self) -> tuple[float, int]:
        """(seconds, rate) by its header. Raises AudioError."""
        import soundfile as sf

        with bad_file():
            fd, found = open_inside(self.folder, self.rel, self.allowed)
            with open(fd, "rb", closefd=True) as f:
                *_, held, _, rate, channels, bits, tag = header_of(fd, found.st_size, self.rel)
                if tag:
                    return held // (channels * bits // 8) / rate, rate
                info = sf.info(f)
                return info.frames / info.samplerate, info.samplerate

    def rate_if_long(self, seconds: float) -> int:
        """Its rate. Raises AudioError where it does not last so long (an mp3 only estimates it)."""
        said, rate = self.measure()
        if abs(said - seconds) > LENGTH_S and not self.rel.lower().endswith(".mp3"):
            raise AudioError(f"it lasts {said:.3f} s, and {seconds:.3f} s as it was")
        return rate

    def read(self, first: int, count: int, rate: int):
        """Samples [first, first + count) at `rate`: float32. Raises AudioError."""
        out = np.empty(count, np.float32)
        read_span(out, self.folder, self.rel, self.allowed, first, rate)
        return out


def pair_fault(source: Sound, target: Sound, seconds: float, at: float, **how) -> str | None:
    """target_fault of two files, of at most WINDOW_S, which begin at the share `at` of what is left; or that
    they differ in length. seconds: of the source. level: what the target was scaled by. true, corr, lag: as
    for target_fault. Raises AudioError for a source that can't be read, or is not so long."""
    level, rate = how.pop("level", 1.0), min(source.rate_if_long(seconds), BAND_RATE)
    count = round(min(seconds, WINDOW_S) * rate)
    first = int(at * max(0, round(seconds * rate) - count))
    original = source.read(first, count, rate)
    try:
        length, _ = target.measure()
        if abs(length - seconds) > LENGTH_S:
            return f"it lasts {length:.3f} s, the recording {seconds:.3f} s"
        return target_fault(original, target.read(first, count, rate) / np.float32(level), rate, **how)
    except AudioError as e:
        return f"it can't be read: {e}"


# ---- everything ----


def line_of(row: dict, source_dir: str, target_dir: str) -> tuple | None:
    """(path, recording | target, what is wrong) with a row of a manifest as manifest_row gives it; None."""
    source, target = (
        Sound(Path(folder), row[name], link_roots(folder))
        for folder, name in ((source_dir, "path"), (target_dir, "target"))
    )
    for what, sound in (("recording", source), ("target", target)):
        stamp = row["source_stamp" if what == "recording" else "target_stamp"]
        state = state_of(sound.folder, sound.rel, sound.allowed, stamp, content=True)
        if state != SAME:
            why = "it is gone" if state == MISSING else "it has changed since the target was written"
            return row["path"], what, why
    kind = KINDS[row["kind"]]
    how = {"true": kind != "sidon", "corr": row["corr"], "lag": row["lag"], "level": row["level"]}
    try:
        seconds = source.measure()[0] if math.isinf(row["seconds"]) else row["seconds"]
        for at in (0.0,) if seconds <= WINDOW_S else (0.0, 0.5, 1.0):
            why = kind != "unfaithful" and pair_fault(source, target, seconds, at, **how)
            if why:
                return row["path"], "target", why
    except AudioError as e:
        return row["path"], "recording", str(e)
    return None


def look_at_all(
    folder: Path, state: str, sizes: list[int], name: str, told: str, wrong_of, method: str, args, stop, log
) -> int:
    """Look at all rows of `folder`, in units of `sizes` rows that any number of processes share; returns the
    exit code. state: of what is looked at, see shared_look. name: of the script; told: what it says at the
    start. wrong_of(pool, unit, progress): [(path, one of STEPS, why)] of the wrong rows of a unit; may raise
    Stopped. method: by which the --num_workers reading processes are started."""
    work = shared_look(folder, state, sizes, log.say)
    log.say(f"verify: {told}")
    progress = Progress(log, "verify", dict(enumerate(sizes)))
    try:
        with contextlib.closing(work), contextlib.ExitStack() as stack:
            if pool := processes(args.num_workers, method):
                stack.callback(pool.shutdown, wait=False, cancel_futures=True)
            for unit in units_of(work, stop):
                progress.at(unit)
                work.commit(unit, {"rows": sizes[unit], "wrong": wrong_of(pool, unit, progress)})
    except Stopped:
        work.release()
        log.say(f"stopped by {stop.signal}: the same command goes on")
        return EXIT_STOPPED
    wrong, rows = report(folder, work, name, log)
    if wrong and (folder / "work").is_dir():
        with contextlib.closing(SharedWork(folder, [], None, {}, log.say)) as made:
            give_back(made, wrong)
    return EXIT_BAD_INPUT if len(wrong) > args.max_bad_fraction * rows else 0


def shared_look(folder: Path, state: str, sizes: list[int], warn) -> SharedWork:
    """Units of a look at everything, shared by any number of processes: below `folder`, by its `state`. What
    was begun on this state goes on; what was finished, or begun on another one, begins anew."""
    place, units = folder / f"verify-{state}", [str(u) for u in range(len(sizes))]
    for other in folder.glob("verify-*"):
        done = sum(1 for _ in other.glob("work/unit_*.json")) >= len(sizes)
        if other.is_dir() and (other != place or done):
            shutil.rmtree(other, ignore_errors=True)
    return SharedWork(place, units, 1, {"sizes": sizes[:1] + sizes[-1:]}, warn)


def units_of(work: SharedWork, stop):
    """The units that we get to do, until all are done, by us or by others. Raises Stopped."""
    units = list(range(len(work.units)))
    while units:
        for unit in units:
            if stop:
                raise Stopped
            if work.claim(unit):
                yield unit
        units = work.unfinished(units)
        if units:
            time.sleep(WAIT_S)


def report(folder: Path, work: SharedWork, name: str, log) -> tuple[list[str], int]:
    """Write verify.json and wrong_rows.jsonl into `folder`, say what was found; (wrong rows, rows)."""
    results = work.results()
    rows, wrong = sum(r["rows"] for r in results), sorted(tuple(w) for r in results for w in r["wrong"])
    found = dict(Counter(f"{what}: {re.sub(r'[-+0-9.]+', 'N', why)}" for _, what, why in wrong).most_common())
    write_jsonl(folder / "wrong_rows.jsonl", [{"path": p, "what": w, "reason": why} for p, w, why in wrong])
    now = time.strftime("%Y-%m-%d %H:%M:%S")
    write_json(folder / "verify.json", {"time": now, "rows": rows, "wrong": len(wrong), "reasons": found})
    for path, what, why in wrong[:20]:
        log.say(f"wrong: {path} ({what}: {why})")
    more = f", all of them in {folder / 'wrong_rows.jsonl'}: {name} without --verify makes them again"
    log.say(f"verified {rows} rows: {len(wrong)} are wrong{more if wrong else ''}")
    return [path for path, *_ in wrong], rows


def give_back(work: SharedWork, wrong: list[str]) -> None:
    """Have the units of wrong rows done again by the next ordinary start."""
    for unit, names in enumerate(work.units):
        if not set(wrong).isdisjoint(names):
            work.forget(unit)


# ---- rows of a training ----

STEPS = {  # what is wrong with a row: what makes it again
    "codes": "run cache_codes.py again",
    "target": "run precompute_48k.py again",
    "recording": "put the recording back, or run precompute_48k.py and cache_codes.py again",
}


@dataclass
class Looked:
    """What was found of some rows."""

    rows: int = 0
    targets: int = 0  # that were compared
    codes: int = 0  # likewise
    equal: int = 0  # of these codes
    wrong: list[tuple] = field(default_factory=list)  # (path, one of STEPS, why)


@dataclass
class Seen:
    """A row, read and compared; its codes are still to be made."""

    row: int
    wrong: tuple | None = None  # (one of STEPS, why)
    target: bool = False  # whether one was compared
    span: tuple | None = None  # (first sample, float32 [m] of what is to be encoded)
    start: int = 0  # of the codes that are compared, in coarse codes
    take: int = 0
    least: float = ROW_AGREES  # of them that must agree


class Prover:
    """Looks at rows of a dataset of data.py. align, context: as for RawAudioDataset."""

    def __init__(self, data, align: int, context: int):
        self.data, self.align, self.context = data, align, context
        self.index = getattr(data, "index", None)

    def sound(self, folder: str | Path, rel: str) -> Sound:
        return Sound(Path(folder), rel, link_roots(folder))

    def look(self, row: int, at: float) -> Seen:
        """Read and compare a row; at: where in it, from 0 to 1."""
        seen = Seen(row)
        try:
            seen.wrong = self.look_at_codes(seen, at) if self.index else self.look_at_recording(seen, at)
        except AudioError as e:
            seen.wrong = "recording", str(e)
        return seen

    def look_at_recording(self, seen: Seen, at: float) -> tuple | None:
        """Of recordings that are encoded on the fly only the targets are derived."""
        root = self.data.roots[self.data.root_of[seen.row]][0]
        seconds = self.data.open(seen.row)["samples"] / self.data.geometry.sampling_rate
        return self.look_at_target(seen, at, self.sound(root, self.data.path(seen.row)), seconds)

    def look_at_codes(self, seen: Seen, at: float) -> tuple | None:
        index, row, rel = self.index, seen.row, self.data.path(seen.row)
        encoded, given = Path(index.data_dir), Path(self.data.audio_24k_dir)
        folders = dict.fromkeys(Path(f) for f in (index.data_dir, self.data.audio_24k_dir) if f)
        there = [f for f in folders if (f / rel).exists()]
        seconds = float(index.lengths[row] / index.geometry.sampling_rate)
        if not there and self.data.originals is not None and not self.data.halved(row):
            return "recording", "it is gone"
        source = self.sound(there[0], rel) if there else None
        stamp = index.stamps[row]
        if there[:1] == [encoded] and state_of(encoded, rel, source.allowed, stamp, content=True) != SAME:
            return "recording", "it has changed since it was encoded"
        if source is None:  # the target is the recording: rounded to 16 bits it has nearly the same codes
            source, seen.least = self.target(row), 0.5
        else:
            seen.wrong = self.look_at_target(seen, at, source, seconds)
        if there and source.folder != given and not self.data.halved(row):
            why = pair_fault(source, self.sound(given, rel), seconds, at, true=True)
            if why:
                return "recording", f"that in --audio_24k_dir: {why}"
        self.choose_span(seen, at, source)
        return seen.wrong

    def choose_span(self, seen: Seen, at: float, source: Sound) -> None:
        """The part of the recording whose codes are compared, with what the encoder sees beside it."""
        g, found = self.data.geometry, self.data.open(seen.row)
        source.rate_if_long(found["samples"] / g.sampling_rate)
        seen.take = min(found["coarse"], g.coarse_len(CODES_S))
        seen.start, n = int(at * (found["coarse"] - seen.take)), g.coarse_samples
        up = lambda samples: -(-samples // self.align) * self.align
        lo = max(0, (seen.start * n - self.context) // self.align * self.align)
        hi = min(up(found["samples"]), up((seen.start + seen.take) * n + self.context))
        seen.span = lo, source.read(lo, hi - lo, g.sampling_rate)

    def target(self, row: int) -> Sound:
        targets = self.data.targets
        return Sound(targets.folder, targets.path(row), targets.allowed)

    def look_at_target(self, seen: Seen, at: float, source: Sound, seconds: float) -> tuple | None:
        targets, row = self.data.targets, seen.row
        if not targets:
            return None
        noted, target, seen.target = targets.rows[row], self.target(row), True
        stamp = noted["header"]["size"], noted["header"]["mtime"], noted["crc"]
        if stamp[1] >= 0 and state_of(target.folder, target.rel, target.allowed, stamp, content=True) != SAME:
            return "target", "it has changed since it was written"
        kind = KINDS[noted["kind"]]
        if kind == "unfaithful":  # nobody says that it is the same
            return None
        how = {"true": kind != "sidon", "corr": float(noted["corr"]), "lag": float(noted["lag"])}
        why = pair_fault(source, target, seconds, at, level=float(noted["level"]), **how)
        return ("target", why) if why else None


def draw(rows, n: int, seed: int, step: int):
    """At most n of the rows, sorted: others for another step."""
    chosen = np.random.default_rng([seed, step]).choice(rows, min(n, len(rows)), replace=False)
    return np.sort(chosen)


def prove(data, rows, snac, align: int, context: int, device, seed: int) -> Looked:
    """Look at these rows of a dataset, int [n]; seed: decides where in them. snac made their codes."""
    looked, places = Looked(len(rows)), np.random.default_rng(seed).random(len(rows)).tolist()
    prover = Prover(data, align, context)
    with ThreadPoolExecutor(READERS) as readers:
        seen = list(readers.map(prover.look, map(int, rows), places))
    if prover.index:
        encode_seen(data, [s for s in seen if s.span], snac, device, looked)
    looked.targets = sum(s.target for s in seen)
    looked.wrong = [(data.path(s.row), *s.wrong) for s in seen if s.wrong]
    return looked


def proven(which: str, data, snac, n: int, seed: int, step: int, ranks) -> list[str]:
    """Look at n rows of the `which` data, this rank's share of them; returns what the log says. Raises
    UserError where rows are not what they should be."""
    from .codec import align_samples, encode_context

    index, lines, began = getattr(data, "index", None), data.told, time.time()
    if not (index or data.targets):
        return lines  # recordings as they are: nothing is derived from them
    if index and index.stamps[0]["size"] < 0:
        lines.append(f"cache {index.cache_dir} says nothing of its recordings' size and time: it is older")
    if n == 0:
        return [*lines, f"--verify_rows 0: nobody has looked at the {which} rows"]
    rows = draw(data.rows, n, seed, step)[ranks.rank :: ranks.world]
    looked = prove(data, rows, snac, align_samples(snac), encode_context(snac), ranks.device, step)
    if wrong := refusal(looked):
        raise UserError(f"{which} data: {wrong}", EXIT_BAD_INPUT)
    return [*lines, f"{which}: {told(looked)} ({time.time() - began:.1f} s)"]


def encode_seen(data, seen: list[Seen], snac, device, looked: Looked) -> None:
    """Encode the spans of rows and compare the codes with the cache's."""
    import torch

    from .data import encode_spans

    g, at_once = data.geometry, 64 if torch.device(device).type == "cuda" else 4
    for i in range(0, len(seen), at_once):
        part = seen[i : i + at_once]
        spans = [torch.from_numpy(s.span[1]) for s in part]
        places = [(s.start - s.span[0] // g.coarse_samples, s.take) for s in part]
        longest = max(s.take for s in part) * g.coarse_samples
        codes = [c.cpu().numpy() for c in encode_spans(snac, spans, places, longest, g, device)]
        for b, s in enumerate(part):
            s.span = None
            try:
                kept = data.index.slice(s.row, s.start, s.take)
            except AudioError as e:
                s.wrong = "codes", str(e)
                continue
            equal = sum(int((c[b, : len(k)] == k).sum()) for c, k in zip(codes, kept))
            count = sum(map(len, kept))
            if equal < s.least * count:
                why = f"encoded again, {100 * equal / count:.0f} % of its codes are these"
                neither = ("recording", f"{why}, and its target: {s.wrong[1]}") if s.wrong else None
                s.wrong = neither or ("codes", why)
            elif s.least == ROW_AGREES:
                looked.codes, looked.equal = looked.codes + count, looked.equal + equal


def refusal(looked: Looked) -> str | None:
    """One sentence on what is wrong with the rows, and what to do; None: nothing is."""
    from .cache import AGREE  # imports torch

    if looked.wrong:
        names = "; ".join(f"{path} ({what}: {why})" for path, what, why in looked.wrong[:5])
        more = f" and {len(looked.wrong) - 5} more" if len(looked.wrong) > 5 else ""
        steps = ", ".join(dict.fromkeys(STEPS[what] for _, what, _ in looked.wrong))
        todo = f"{steps} (with --verify it names all such rows)"
        return f"{len(looked.wrong)} of {looked.rows} rows looked at are not right: {names}{more}; {todo}"
    if looked.equal < AGREE * looked.codes:
        share = f"{100 * looked.equal / looked.codes:.1f} % of the codes of {looked.rows} rows"
        todo = "make the cache anew with the codec that is trained, on hardware like this"
        return f"encoded again, only {share} are those of the cache: {todo}"
    return None


def told(looked: Looked) -> str:
    """What is said of rows that are right."""
    codes = f", {100 * looked.equal / looked.codes:.2f} % of {looked.codes} codes" if looked.codes else ""
    return f"{looked.rows} rows proven{codes}, {looked.targets} targets"
