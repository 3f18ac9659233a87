"""Cases of wrong data and of damaged derived files: indexes, tables, manifests, swapped and replaced audio.

Each works on a copy of one small data set: 10 recordings, their 48 kHz targets, their codes. Looking at it is
what a training does before its first step.
"""

import functools
import json
import os
import shutil
import struct
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import soundfile as sf
from conftest import call, voice

import cache_codes
import precompute_48k
from helpers.chaos import Case, unchanged
from helpers.scene import codec as snac_folder
from helpers.scene import root as home
from snac48 import cache, codec, verify
from snac48.cache import STAMP_COLUMNS
from snac48.data import CachedCodesDataset, RawAudioDataset

ROWS = 10


class Place:
    """A data set in one folder, which every case finds as it was made: caches know their recordings by
    absolute paths, so a copy lies where the original was made."""

    def __init__(self, folder: Path):
        self.root, self.audio, self.targets, self.codes = (
            folder / n for n in (".", "audio", "targets", "codes")
        )

    def name(self, row: int) -> str:
        return f"s{row % 2}/utt{row}.wav"

    def make(self, *, stamps=True) -> "Place":
        for row in range(ROWS):
            (self.audio / self.name(row)).parent.mkdir(parents=True, exist_ok=True)
            rate = 24000 if row % 5 == 4 else 48000
            sf.write(self.audio / self.name(row), voice(1.0 + 0.1 * (row // 2), rate, row), rate)
        self.precompute()
        self.cache()
        if not stamps:
            self.forget_stamps()
        return self

    def cache(self, *more) -> int:
        return call(cache_codes, "--data_dir", self.audio, "--output_dir", self.codes, "--pretrained_model",
                    snac_folder(), "--device", "cpu", "--num_workers", 0, *more)  # fmt: skip

    def precompute(self, *more) -> int:
        return call(precompute_48k, "--input_dir", self.audio, "--output_dir", self.targets, "--upsampler",
                    "sinc", "--device", "cpu", "--num_workers", 0, *more)  # fmt: skip

    def forget_stamps(self) -> None:
        """As if older programs had made it."""
        for shard in self.codes.glob("*.parquet"):
            table = pq.read_table(shard)
            pq.write_table(table.drop_columns(list(STAMP_COLUMNS)), shard)
        rows = self.manifest()
        self.write_manifest([{k: v for k, v in r.items() if not k.endswith("_stamp")} for r in rows])

    def manifest(self) -> list[dict]:
        return [json.loads(line) for line in (self.targets / "manifest.jsonl").read_text().splitlines()]

    def write_manifest(self, rows: list[dict]) -> None:
        (self.targets / "manifest.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))

    def data(self, **more):
        targets = more.pop("targets", self.targets)
        return CachedCodesDataset(self.codes, targets, 0.5, **more)

    def look(self, data=None, **more) -> str:
        """What a training says of the data before its first step; raises what it raises."""
        data = data or self.data(**more)
        said, snac = "\n".join(data.told), model()
        place = codec.align_samples(snac), codec.encode_context(snac), "cpu", 0
        looked = verify.prove(data, data.rows, snac, *place)
        return f"{said}\n{data.left_out}\n{verify.refusal(looked) or verify.told(looked)}"

    @property
    def index(self) -> Path:
        return next(p for p in self.codes.glob("index-*") if p.is_dir())


@functools.cache
def model():
    return codec.load_snac(str(snac_folder()))


@functools.cache
def pristine(stamps: bool) -> Path:
    """The data set put aside, with index and tables."""
    place = fresh_folder()
    Place(place).make(stamps=stamps).look()
    return Path(shutil.copytree(place, home() / f"pristine{stamps}"))


def fresh_folder() -> Path:
    shutil.rmtree(home() / "now", ignore_errors=True)
    return home() / "now"


def case(group: str, name: str, words: str, change, after=Place.look, *, stamps=True, user="audio") -> Case:
    """change(place, rng) does it, then after(place) tells. user: whose files nobody else may change."""

    def run(folder: Path):
        kept = pristine(stamps)
        place = Place(Path(shutil.copytree(kept, fresh_folder())))
        change(place, np.random.default_rng(abs(hash(name)) % 2**32))
        with unchanged(place.root / user):
            return after(place)

    return Case(group, name, run, words)


# ---- what is done to audio ----


def rewrite(path: Path, change, *, same_time=False) -> None:
    """change(samples float32, rate) -> samples, in the file's own format; same_time: its mtime stays."""
    info, times = sf.info(path), os.stat(path)
    x, rate = sf.read(path, dtype="float32")
    sf.write(path, np.asarray(change(x, rate), np.float32), rate, subtype=info.subtype)
    if same_time:
        os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))


def header_rate(path: Path, rate: int) -> None:
    data = bytearray(path.read_bytes())
    data[24:32] = struct.pack("<II", rate, 2 * rate)
    path.write_bytes(data)


def other(x, rate):
    return voice(len(x) / rate + 0.1, rate, 77)[: len(x)]


CHANGES = {  # what happens to a file: samples -> samples
    "other audio of the same length": other,
    "shifted by 300 ms": lambda x, rate: np.roll(x, int(0.3 * rate)),
    "shifted by 30 ms": lambda x, rate: np.roll(x, int(0.03 * rate)),
    "shifted by 5 ms": lambda x, rate: np.roll(x, -int(0.005 * rate)),
    "silenced": lambda x, rate: 0 * x,
    "noise": lambda x, rate: 0.1 * np.sin(np.cumsum(np.arange(len(x)) % 977)),
    "half as loud": lambda x, rate: 0.5 * x,
    "twice as loud": lambda x, rate: 2 * x,
    "backwards": lambda x, rate: x[::-1],
    "45 ms shorter": lambda x, rate: x[: -int(0.045 * rate)],
    "45 ms longer": lambda x, rate: np.pad(x, (0, int(0.045 * rate))),
    "half as long": lambda x, rate: x[: len(x) // 2],
}


def some(rng, most=4) -> list[int]:
    return rng.choice(ROWS, int(rng.integers(1, most)), replace=False).tolist()


def audio_cases() -> list[Case]:
    found = []
    for what, change in CHANGES.items():
        for folder, said in (("targets", "48 kHz target|target:|recording:"), ("audio", "recording")):
            for stamps, same_time in ((True, False), (True, True), (False, False)):
                if folder == "audio" and "loud" in what and not stamps:
                    continue  # codes of the same words may be the same: the target's level tells
                how = "older cache" if not stamps else "its time kept" if same_time else "replaced"

                def do(place, rng, folder=folder, change=change, same_time=same_time):
                    for row in some(rng):
                        rewrite(getattr(place, folder) / place.name(row), change, same_time=same_time)

                name = f"{folder} {what}, {how}"
                found.append(case("wrong audio", name, said, do, stamps=stamps, user=folder))
    for rate in (44100, 24000, 16000, 96000):
        for stamps in (True, False):
            do = lambda place, rng, rate=rate: [
                header_rate(place.targets / place.name(2 * int(rng.integers(4))), rate) for _ in range(2)
            ]
            name, said = f"a target whose header says {rate} Hz, {stamps}", "48 kHz target|target:"
            found.append(case("wrong audio", name, said, do, stamps=stamps, user="targets"))

    def next_one(place, rng, folder="targets"):
        names = [getattr(place, folder) / place.name(row) for row in range(ROWS)]
        contents = [path.read_bytes() for path in names]
        for path, content in zip(names, contents[1:] + contents[:1]):
            path.write_bytes(content)

    for stamps in (True, False):
        said = "48 kHz target|another length|target:|recording"
        found += [
            case("wrong audio", f"the next one's target, {stamps}", said, next_one, stamps=stamps),
            case("wrong audio", f"the next one's recording, {stamps}", said,
                 functools.partial(next_one, folder="audio"), stamps=stamps),
        ]  # fmt: skip

    def swap(place, rng):
        a, b = (place.targets / place.name(row) for row in (0, 1))  # of one length
        a.rename(place.root / "x")
        b.rename(a)
        (place.root / "x").rename(b)

    for stamps in (True, False):
        found.append(
            case(
                "wrong audio", f"two targets swapped, {stamps}", "utt[01]", swap, stamps=stamps, user="audio"
            )
        )
    return found


# ---- manifests ----


def manifest_cases() -> list[Case]:
    def edit(change):
        def do(place, rng):
            rows = place.manifest()
            place.write_manifest(change(rows, rng) or rows)

        return do

    def rotate(key):
        def change(rows, rng):
            values = [r[key] for r in rows]
            for row, value in zip(rows, values[1:] + values[:1]):
                row[key] = value

        return change

    def put(key, value, every=False):
        def change(rows, rng):
            for row in rows if every else [rows[int(rng.integers(len(rows)))]]:
                row[key] = value

        return change

    bad = "is not a manifest row"
    found = []
    for stamps in (True, False):
        either = f"stamps {stamps}"
        wrong = "48 kHz target|another recording|another length|target:|recording|rows have no"
        for key in ("path", "target"):
            found.append(
                case("manifests", f"rotated {key}s, {either}", wrong, edit(rotate(key)), stamps=stamps)
            )
        for value in (0, -1, float("nan"), 1e-30, 2, float("inf"), -0.5, "loud", None, []):
            name = f"level {value}, {either}"
            found.append(case("manifests", name, bad, edit(put("level", value)), stamps=stamps))
        name = f"level 0.5 in place of 1, {either}"
        found.append(case("manifests", name, "level is", edit(put("level", 0.5, True)), stamps=stamps))
        for value in ("guessed", 7, None):
            name = f"kind {value}, {either}"
            found.append(case("manifests", name, bad, edit(put("kind", value)), stamps=stamps))
        one = edit(put("target", "s0/utt0.wav", True))
        found.append(
            case("manifests", f"one target for all, {either}", "the same target", one, stamps=stamps)
        )
        lost = edit(lambda rows, rng: rows[:-2])
        found.append(case("manifests", f"two lines short, {either}", "no 48 kHz target", lost, stamps=stamps))
        away = edit(put("target", "../audio/s0/utt0.wav"))
        found.append(
            case("manifests", f"a target outside, {either}", "target|rows have", away, stamps=stamps)
        )
    for value in ("x", [1, 2], [1, 2, "3"], {"a": 1}, [None] * 3, 5):
        found.append(case("manifests", f"target_stamp {value}", bad, edit(put("target_stamp", value))))
    for text in ("{", "null\n", "[]\n", "{}\n", "\x00" * 50):
        do = lambda place, rng, text=text: (place.targets / "manifest.jsonl").write_text(text)
        found.append(case("manifests", f"all of it is {text[:4]!r}", bad, do))
    return found


# ---- derived files ----

DAMAGES = {  # bytes -> bytes
    "all zero": lambda data, rng: bytes(len(data)),
    "half": lambda data, rng: data[: len(data) // 2],
    "one byte short": lambda data, rng: data[:-1],
    "one byte more": lambda data, rng: data + b"\0",
    "empty": lambda data, rng: b"",
    "reversed": lambda data, rng: data[::-1],
    "shifted": lambda data, rng: data[8:] + data[:8],
    "a bit flipped": lambda data, rng: flipped(data, rng),
    "noise": lambda data, rng: rng.bytes(len(data)),
    "gone": lambda data, rng: None,
}
JSON = {
    "malformed": lambda data, rng: data.replace(b":", b";", 1),
    "a list": lambda data, rng: b"[]",
    "null": lambda data, rng: b"null",
    "a number": lambda data, rng: b"7",
    "deep": lambda data, rng: b"[" * 100000,
    "latin-1": lambda data, rng: data.replace(b"bytes", b"byt\xe9s", 1),
    "another number": lambda data, rng: data.replace(b"512", b"256", 1).replace(
        b'"bytes": ', b'"bytes": 1', 1
    ),
    "without arrays": lambda data, rng: json.dumps({**json.loads(data), "arrays": {}}).encode(),
}


def flipped(data: bytes, rng) -> bytes:
    at = int(rng.integers(len(data)))
    return data[:at] + bytes([data[at] ^ 1 << int(rng.integers(8))]) + data[at + 1 :]


def same_as_before(place: Place) -> str:
    """The data is read as before the damage, and the log has a line about it."""
    said, before = place.look(), pristine_batch()
    batch = place.data()[list(range(ROWS))]
    for key, value in before.items():
        found = batch[key]
        for a, b in zip(*([v] if not isinstance(v, list) else v for v in (value, found))):
            assert a.equal(b), key
    return said


@functools.cache
def pristine_batch() -> dict:
    """A batch as it is before anything is damaged."""
    place = Place(Path(shutil.copytree(pristine(True), home() / "aside")))
    data = place.data()
    batch = data[list(range(ROWS))]
    return {k: batch[k] for k in ("codes", "audio_48k", "start", "valid_24k")}


def derived_cases() -> list[Case]:
    found, again = [], "was not as it was written"

    def damage(pattern: str, change):
        def do(place, rng):
            pristine_batch()
            for path in sorted(place.index.glob(pattern)):
                data = change(path.read_bytes(), rng)
                path.unlink() if data is None else path.write_bytes(data)

        return do

    arrays = ["codes.i16", "offsets.i64", "lengths.i64", "path_offsets.i64", "paths.bin", "checks.u32",
              "stamps.rec", "targets-*.rows", "headers-*.rows"]  # fmt: skip
    for name in arrays:
        for what, change in DAMAGES.items():
            words = again if what != "gone" or "*" not in name else "rows proven"
            found.append(case("damaged", f"{name} {what}", words, damage(name, change), same_as_before))
    for name in ("index.json", "targets-*.json", "headers-*.json"):
        for what, change in (JSON | DAMAGES).items():
            words = again if what != "one byte short" else "rows proven"  # a newline is no content
            found.append(case("damaged", f"{name} {what}", words, damage(name, change), same_as_before))

    def halve_lengths(data, rng):
        return (np.frombuffer(data, np.int64) // 2).tobytes()

    def zero_codes(data, rng):
        codes = np.frombuffer(data, np.int16).copy()
        codes[len(codes) // 2 :] = 0
        return codes.tobytes()

    def other_codes(data, rng):
        codes = np.frombuffer(data, np.int16).copy()
        at = rng.integers(0, len(codes), 5)
        codes[at] = (codes[at] + 1) % 64
        return codes.tobytes()

    for name, change in (
        ("lengths.i64", halve_lengths),
        ("codes.i16", zero_codes),
        ("codes.i16", other_codes),
    ):
        do = damage(name, change)
        found.append(case("damaged", f"{name} by {change.__name__}", again, do, same_as_before))

    def read_later(place):
        """An index too large to be summed at its opening: each row is, when it is read."""
        data = place.data()
        path = place.index / "codes.i16"
        path.write_bytes(bytes(path.stat().st_size))
        batch = data[list(range(ROWS))]
        assert not batch["valid_24k"].any()
        return str(batch["bad_file"])

    nothing = lambda place, rng: None
    words = "not those that were written: delete that folder"
    found.append(case("damaged", "codes that change while they are read", words, nothing, read_later))
    return found


# ---- again, after something has changed ----


def again_cases() -> list[Case]:
    def made_again(*programs):
        def after(place: Place):
            for program in programs:
                assert getattr(place, program)() == 0
            return place.look()

        return after

    found = []
    change = lambda place, rng: rewrite(place.audio / place.name(3), other)
    both = made_again("precompute", "cache")
    replaced, lost, proven = (
        "1 recordings have changed, first s1/utt3",
        "of ours are gone or not",
        "10 rows proven",
    )
    then = lambda first: f"{first}(.|\n)*{proven}"
    for what, words, do, after in [
        ("a recording was replaced", then(replaced), change, both),
        ("a recording was replaced, codes alone", "another recording than", change, made_again("cache")),
        ("a recording was replaced, targets alone", "since it was encoded|another recording", change,
         made_again("precompute")),
        ("a shard was deleted", then(f"1 files {lost}"), lambda p, rng: shard_of(p).unlink(), both),
        ("a shard was cut", then(f"1 files {lost}"), lambda p, rng: cut(shard_of(p)), both),
        ("a target was deleted", then(f"1 files {lost}"),
         lambda p, rng: (p.targets / p.name(2)).unlink(), both),
        ("a target was replaced", then(f"1 files {lost}"),
         lambda p, rng: rewrite(p.targets / p.name(2), other), both),
        ("two targets were swapped", then(f"2 files {lost}"),
         lambda p, rng: exchange(p.targets, p.name(0), p.name(1)), both),
        ("a result in work/ was cut", then(lost),
         lambda p, rng: [cut(next((d / "work").glob("unit_*.json"))) for d in (p.codes, p.targets)], both),
        ("only the times have changed", proven,
         lambda p, rng: [os.utime(f) for f in p.root.rglob("*.wav")], both),
        ("all recordings are other ones", then("10 recordings have changed"),
         lambda p, rng: [rewrite(p.audio / p.name(r), other) for r in range(ROWS)], both),
    ]:  # fmt: skip
        found.append(case("again", what, words, do, after))

    def mp3_then_wav(place: Place):
        x = voice(1.2, 48000, 5)
        sf.write(place.audio / "late.flac", x, 48000)
        assert place.precompute() == 0
        before = (place.targets / "late.wav").read_bytes()
        sf.write(place.audio / "late.wav", voice(1.2, 48000, 6), 48000)
        assert place.precompute() == 0 and (place.targets / "late.wav").read_bytes() == before
        assert place.cache() == 0
        return place.look()

    nothing = lambda place, rng: None
    words = f"{ROWS + 2} rows proven"
    found.append(case("again", "a.wav comes after a.flac", words, nothing, mp3_then_wav, user="none"))

    def verified(place: Place):
        allowed = "--verify", "--max_bad_fraction", 1
        assert (place.cache(*allowed), place.precompute(*allowed)) == (0, 0)
        return ""

    swap = lambda place, rng: exchange(place.targets, place.name(0), place.name(1))
    for stamps in (True, False):
        found += [
            case("verify", f"swapped targets, {stamps}", "wrong: s0/utt0.wav .target(.|\n)*2 are wrong",
                 swap, verified, stamps=stamps),
            case("verify", f"a replaced recording, {stamps}",
                 "wrong: s1/utt3.wav .(codes|recording)(.|\n)*1 are wrong(.|\n)*1 are wrong", change,
                 verified, stamps=stamps),
            case("verify", f"nothing is wrong, {stamps}", "0 are wrong(.|\n)*0 are wrong", nothing, verified,
                 stamps=stamps),
        ]  # fmt: skip

    def raw(place: Place):
        snac = model()
        how = {"context": codec.encode_context(snac), "align": codec.align_samples(snac)}
        how |= {"geometry": codec.geometry_of(snac, ""), "audio_48k_dir": place.targets}
        return place.look(RawAudioDataset([place.audio], 0.5, **how))

    for stamps in (True, False):
        words = "another recording|target:"
        found += [
            case("raw audio", f"swapped targets, {stamps}", "48 kHz target|target:", swap, raw,
                 stamps=stamps),
            case("raw audio", f"a replaced recording, {stamps}", words, change, raw, stamps=stamps),
            case("raw audio", f"nothing is wrong, {stamps}", "10 rows proven, 10 targets", nothing, raw,
                 stamps=stamps),
        ]  # fmt: skip

    def restored(place: Place):
        return place.look(target_kind="sidon")

    def without_manifest(more):
        def do(place, rng):
            (place.targets / "manifest.jsonl").unlink()
            more(place, rng)

        return do

    late = lambda place, rng: rewrite(place.targets / place.name(2), CHANGES["shifted by 300 ms"])
    found += [
        case("no manifest", "swapped, restored", "target:", without_manifest(swap), restored),
        case("no manifest", "late, restored", "target:", without_manifest(late), restored),
        case("no manifest", "nothing is wrong, restored", proven, without_manifest(nothing), restored),
        case("no manifest", "swapped, recordings", "target:", without_manifest(swap),
             lambda place: place.look(target_kind="recordings")),
    ]  # fmt: skip
    return found


def shard_of(place: Place) -> Path:
    return next(place.codes.glob("*.parquet"))


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def exchange(folder: Path, a: str, b: str) -> None:
    (folder / a).rename(folder / "aside")
    (folder / b).rename(folder / a)
    (folder / "aside").rename(folder / b)


def cases(seed: int) -> list[Case]:
    found = [*audio_cases(), *manifest_cases(), *derived_cases(), *again_cases()]
    assert cache.AT_OPENING > 1 << 20  # these indexes are summed when they are opened
    return found
