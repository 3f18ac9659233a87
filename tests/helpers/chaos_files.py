"""Files that lie, names that bite, and what others left where our programs look: audio whose container or
header says something else than its samples, links and manifests of a data set, logs, PID files and
descriptions of jobs, claims of other containers. See chaos.py."""

import contextlib
import functools
import io
import json
import os
import struct
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import soundfile as sf

import precompute_48k
from helpers.chaos import Case, unchanged
from snac48 import audio, jobs
from snac48.process import pid_space, start_time
from snac48.runlog import RunLog, hold
from snac48.tui.runs import Fleet
from snac48.work import SharedWork

ROOT = Path(__file__).resolve().parents[2]
RATE = 16000
FORMS = {kind: (kind.upper(), "PCM_16") for kind in ("wav", "aiff", "au", "w64", "rf64", "caf", "flac")}
FORMS |= {"mp3": ("MP3", "MPEG_LAYER_III"), "ogg": ("OGG", "VORBIS"), "opus": ("OGG", "OPUS")}
PLAIN = ("wav", "aiff", "au", "w64", "rf64", "caf")


@functools.lru_cache(maxsize=64)
def sound(kind: str, seed: int, seconds: float = 2.0, rate: int = RATE) -> bytes:
    """Noise as a file of this kind."""
    form, subtype = FORMS[kind]
    out, noise = io.BytesIO(), np.random.default_rng(seed).standard_normal(int(seconds * rate))
    sf.write(out, (0.1 * noise).astype(np.float32), rate, format=form, subtype=subtype)
    return out.getvalue()


# ---- audio that is not what it says ----


def read(folder: Path, name: str, data: bytes) -> str:
    (folder / name).write_bytes(data)
    with unchanged(folder):
        x, rate = audio.read_audio(folder / name)
    return f"read {len(x) / rate:.3f} s"


def patched(data: bytes, at: int, form: str, value: int) -> bytes:
    new = bytearray(data)
    struct.pack_into(form, new, at, value)
    return bytes(new)


def flac_claim(data: bytes, samples: int) -> bytes:
    """With another number of samples in STREAMINFO."""
    old = int.from_bytes(data[18:26], "big")
    return data[:18] + (old & ~((1 << 36) - 1) | samples).to_bytes(8, "big") + data[26:]


def xing_claim(data: bytes, frames: int) -> bytes:
    at = max(data.find(b"Xing"), data.find(b"Info"))
    return patched(data, at + 8, ">I", frames)


def audio_cases(rng):
    def case(what: str, name: str, words: str, make):
        return Case("audio that lies", f"{what} {name}", lambda d: read(d, name, make()), words)

    for kind in FORMS:
        seed = int(rng.integers(1 << 30))
        whole = lambda k=kind, s=seed: sound(k, s)
        yield case("whole", f"x.{kind}", r"^read (2\.\d+|1\.99)", whole)
        cut_words = "truncated|lost sync|malformed|unreadable|samples|not a"
        for share in (0.02, 0.3, 0.5, 0.9, 0.97):
            cut = lambda w=whole, f=share: w()[: int(f * len(w()))]
            yield case(f"cut to {100 * share:.0f} %", f"x.{kind}", cut_words, cut)
        for times in (2, 3):
            joined = lambda w=whole, n=times: w() * n
            yield case(f"{times} joined in one", f"x.{kind}", "joined|follow the audio", joined)
        other = lambda k=kind, s=seed: sound(k, s) + sound(k, s + 1, 1.0, 48000)
        yield case("another rate joined", f"x.{kind}", "joined|follow the audio", other)
        tail = lambda w=whole: w() + b"TAG" + bytes(125)
        yield case("a tag behind", f"x.{kind}", r"^read (2\.\d+|1\.99)|joined|lost sync|No Ogg", tail)
        torn = lambda w=whole: w()[: len(w()) // 2] + w()[len(w()) // 2 + 700 :]
        words = r"truncated|lost sync|damaged|malformed|unreadable|missing|frames|read 1\.9|read 2\."
        yield case("700 bytes missing inside", f"x.{kind}", words, torn)
    for factor in (0.5, 0.9, 1.5, 20):
        claim = int(factor * 2 * RATE)
        words = "its header claims|truncated|lost sync"
        make = lambda n=claim: flac_claim(sound("flac", 1), n)
        yield case(f"STREAMINFO claims {factor} of", "x.flac", words, make)
        frames = int(factor * 2 * RATE / 576)
        make = lambda n=frames: xing_claim(sound("mp3", 1), n)
        yield case(f"Xing claims {factor} of", "x.mp3", "Xing header claims", make)
    yield case("no length in", "x.flac", "tells no length", lambda: flac_claim(sound("flac", 1), 0))
    pages = lambda: sound("ogg", 1, 10.0).split(b"OggS")
    drop = lambda: b"OggS".join([*pages()[:5], *pages()[6:]])
    yield case("a page is missing in", "x.ogg", "Ogg page 4 is missing", drop)
    half = lambda: patched(sound("wav", 1), 40, "<I", 2 * RATE)
    yield case("the data chunk claims half of", "x.wav", "bytes follow the audio", half)
    for value, words in ((0, "^0 samples"), (0xFFFFFFFF, "^read 2.000"), (0x7FFFFFFF, "^read 2.000")):
        stream = lambda v=value: patched(sound("wav", 1), 40, "<I", v)
        yield case(f"a streaming writer left {value:#x} in", "x.wav", words, stream)
    for kind in PLAIN[1:]:
        yield case("zeros instead of", f"x.{kind}", "unreadable|not a", lambda: bytes(3000))


# ---- names ----

BITES = {
    "an escape sequence": "a\x1b[2J\x1b[31mred.wav",
    "a title": "a\x1b]0;owned\x07.wav",
    "a line break": "a\nERROR fake line.wav",
    "a carriage return": "real\rfake.wav",
    "a mark of direction": "abc\u202evaw.exe.wav",
    "an isolate": "a\u2066b\u2069.wav",
    "a C1 control": "a\x9b31m.wav",
    "a bell": "a\x07.wav",
    "a line separator": "a\u2028b.wav",
    "250 bytes": "x" * 246 + ".wav",
    "255 bytes": "é" * 125 + "x.wav",
}
RAW = ("\x1b", "\n", "\r", "\u202e", "\u2066", "\x9b", "\x07", "\u2028")


def says_clean(folder: Path, name: str) -> str:
    """What log, stdout and status show of a bad file of this name."""
    root, logs = folder / "data", folder / "logs"
    root.mkdir(), logs.mkdir()
    (root / name).write_bytes(b"no audio")
    told = []
    out = io.StringIO()
    with contextlib.redirect_stdout(out), unchanged(root):
        log = RunLog(folder / "run", "x.log")
        for rel in audio.find_audio(root):
            try:
                audio.read_audio(audio.resolve_inside(root, rel))
            except audio.AudioError as e:
                log.say(f"skipped {rel}: {e}")
                log.metric(event="bad_file", file_path=rel)
    (logs / "j.json").write_text("{}")
    (logs / "j.log").write_text(f"skipped {name}")
    told += [out.getvalue().rstrip("\n"), *jobs.status(logs)]
    told.append((folder / "run" / "x.log").read_text().rstrip("\n"))
    assert not any(c in text for text in told for c in RAW), f"raw: {told!r}"
    return told[0]


def non_utf8(folder: Path) -> str:
    with open(os.path.join(os.fsencode(folder), b"caf\xe9.wav"), "wb") as f:
        f.write(sound("wav", 1))
    (rel,) = audio.find_audio(folder)
    RunLog(folder / "run").say(f"found {rel}")
    return str(audio.read_audio(audio.resolve_inside(folder, rel)))


def precomputed(folder: Path, *names: bytes) -> str:
    """precompute_48k.py over good recordings of these names: its manifest and list of those left out."""
    from conftest import call

    source, out = folder / "in", folder / "out"
    source.mkdir()
    for name in names:
        with open(os.path.join(os.fsencode(source), name), "wb") as f:
            f.write(sound("wav", 1, 0.3, 48000))
    with unchanged(source) if b"\xe9" not in names[0] else contextlib.nullcontext():
        call(precompute_48k, "--input_dir", source, "--output_dir", out, "--device", "cpu",
             "--num_workers", 0, "--max_bad_fraction", 1)  # fmt: skip
    assert not list(out.rglob("*.tmp")), "leftovers"
    return (out / "manifest.jsonl").read_text() + (out / "skipped.jsonl").read_text()


def name_cases(rng):
    for what, name in BITES.items():
        yield Case("names", f"a bad file, {what}", lambda d, n=name: says_clean(d, n), "skipped .*not a RIFF")
        run = lambda d, n=name: precomputed(d, n.encode())
        yield Case("names", f"precompute, {what}", run, r'"kind": "copied"')
    yield Case("names", "not UTF-8", non_utf8, "file name is not UTF-8: rename it")
    run = lambda d: precomputed(d, b"caf\xe9.wav", b"good.wav")
    yield Case("names", "precompute, not UTF-8", run, r'"good.wav"[\s\S]*not UTF-8')
    long = "x" * 251 + ".wav"
    run = lambda d: precomputed(d, long.encode(), ("x" * 251 + ".w64").encode())
    yield Case("names", "precompute, a target's name too long", run, "longer than 255 bytes")
    for bad in ("../x.wav", "/etc/passwd", "a/../../x.wav", "\\\\host\\x.wav", "C:\\x.wav", "x\0.wav"):
        run = lambda d, rel=bad: str(audio.resolve_inside(d, rel))
        yield Case("names", f"path {bad!r}", run, "unsafe path")


# ---- links and manifests of a data set ----


def linked(folder: Path, manifest, place: str, allow: str = "") -> str:
    """A data set with a link to a private file and a manifest.json of its own."""
    private, root = folder / "private", folder / "set" / "train" / "audio"
    private.mkdir(), root.mkdir(parents=True)
    (private / "x.wav").write_bytes(sound("wav", 1))
    (root / "x.wav").symlink_to(private / "x.wav")
    if manifest is not None:
        text = manifest(folder) if callable(manifest) else manifest
        (folder / "set" / place / "manifest.json").write_text(text)
    before = os.environ.pop("ALLOW_LINKS", None)
    audio.link_roots.cache_clear()
    try:
        audio.allow_links(str(folder / allow) if allow else "")
        audio.read_audio(audio.resolve_inside(root, "x.wav"))
        return "followed"
    finally:
        os.environ.pop("ALLOW_LINKS", None)
        if before is not None:
            os.environ["ALLOW_LINKS"] = before
        audio.link_roots.cache_clear()


def signed(source: str, made: str = "set"):
    text = lambda d: {
        "format": audio.SPLIT_FORMAT,
        "input_dir": source.format(d),
        "output_dir": str(d / made),
    }
    return lambda d: json.dumps(text(d))


def link_cases(rng):
    leaves = "link that leaves .*--allow_links"
    theirs = {
        "none": None, "opens the disk": '{"input_dir": "/"}', "opens the home": '{"input_dir": "~"}',
        "opens a folder": lambda d: json.dumps({"input_dir": str(d / "private")}),
        "a list": "[1, 2]", "JSON lines": '{"a": 1}\n{"b": 2}\n', "a number": "7", "a text": '"/"',
        "null": "null", "empty": "", "deep": "[" * 100_000, "binary": "\0\1\2", "a huge number": "1" * 10_000,
        "numbers as folders": '{"input_dir": 7, "output_dir": 8}', "NUL": '{"input_dir": "a\\u0000b"}',
        "our format, the whole disk": signed("/"), "our format, elsewhere": signed("{}/private", "moved"),
    }  # fmt: skip
    for place in ("", "train", "train/audio"):
        for what, manifest in theirs.items():
            run = lambda d, m=manifest, p=place: linked(d, m, p)
            yield Case("links", f"manifest.json in set/{place}: {what}", run, leaves)
    yield Case("links", "our own split", lambda d: linked(d, signed("{}/private"), ""), "^followed")
    yield Case("links", "allowed", lambda d: linked(d, None, "", "private"), "^followed")
    yield Case("links", "allowed, not there", lambda d: linked(d, None, "", "nowhere"), "is not a folder")
    yield Case("links", "another folder allowed", lambda d: linked(d, None, "", "set"), leaves)


# ---- logs, PID files, descriptions ----


def look(folder: Path, name: str, content, everything: bool = True) -> str:
    """What launch.sh's status and the monitor show where logs/NAME is this: text, bytes, a pipe …"""
    logs = folder / "logs"
    logs.mkdir()
    files = {"json": '{"kind": "train"}', "pid": "4999999 2 x", "log": "a line", "exit": "1"}
    for suffix, text in files.items():
        (logs / f"job.{suffix}").write_text(text)
    path = logs / name
    path.unlink(missing_ok=True)
    if content == "pipe":
        os.mkfifo(path)
    elif content == "folder":
        path.mkdir()
    elif content == "device":
        path.symlink_to("/dev/zero")
    else:
        path.write_bytes(content.encode() if isinstance(content, str) else content)
    lines = jobs.status(logs)
    fleet = Fleet(logs) if everything else None
    if fleet:
        fleet.poll()
        for run in fleet.runs.values():
            while run.load_older():
                pass
        lines.append(json.dumps(fleet.report(), allow_nan=False))
    text = "\n".join(lines)
    assert not any(c in text.replace("\n", "") for c in RAW), f"raw: {text!r}"
    return text


def metrics(folder: Path, content) -> str:
    run = folder / "run"
    run.mkdir()
    if content == "pipe":
        os.mkfifo(run / "metrics.jsonl")
    else:
        (run / "metrics.jsonl").write_bytes(content)
    return look(folder, "job.json", json.dumps({"kind": "train", "run_dir": str(run)}))


def job_cases(rng):
    me = os.getpid()
    for suffix in ("json", "pid", "log", "exit"):
        for what in ("pipe", "folder", "device"):
            run = lambda d, s=suffix, w=what: look(d, f"job.{s}", w)
            yield Case("jobs", f"{suffix} is a {what}", run, r"job +(DEAD|DEAD\(1\)) ")
    pids = {
        "empty": "", "one field": f"{me}", "no number": "x y z", "negative": "-1 5 x", "0": "0 0 x",
        "huge": "9" * 5000 + " 1 x", "other digits": "² 5 x", "binary": b"\xff\xfe\0\0",
        "reused": f"{me} 1 x", "a wrong start": f"{me} {'9' * 400} x", "many lines": "\n" * 9999,
        "2 MB": "1 " * (1 << 20),
    }  # fmt: skip
    for what, text in pids.items():
        run = lambda d, t=text: look(d, "job.pid", t)
        yield Case("jobs", f"PID file: {what}", run, r"job +(DEAD\(1\)|STALE_PID) ")
    running = lambda d: look(d, "job.pid", f"{me} {start_time(me)} x")
    yield Case("jobs", "PID file: right", running, r"job +RUNNING ")
    descriptions = {
        "deep": "[" * 200_000, "deep objects": '{"a":' * 100_000, "a list": "[]", "a number": "3",
        "empty": "", "binary": b"\xff\0\xfe", "half": '{"kind": "tr',
        "lists as values": '{"kind": [1], "run_dir": [2]}',
        "numbers": '{"kind": 1, "run_dir": 2, "started": "x", "host": 3}', "NUL": '{"run_dir": "a\\u0000b"}',
        "infinite": '{"started": 1e999}', "a big number": '{"started": ' + "9" * 5000 + "}",
        "a lone surrogate": '{"run_dir": "\\ud800", "host": null}',
        "2 MB": '{"a": "' + "x" * (1 << 21) + '"}',
    }  # fmt: skip
    for what, text in descriptions.items():
        run = lambda d, t=text: look(d, "job.json", t)
        yield Case("jobs", f"description: {what}", run, r"job +DEAD\(1\) ")
    host = lambda d: look(d, "job.json", '{"host": "a\\u001b[31m\\nb"}')
    yield Case("jobs", "description: a host that bites", host, r"ON_a\\x1b\[31m\\nb")
    for what, text in {"escapes": "a\x1b[2Jb", "direction": "a\u202eb", "one long line": "x" * 2_000_000,
                       "no line end": b"\xff" * 9000, "carriage returns": "1\r2\r3\x07"}.items():  # fmt: skip
        run = lambda d, t=text: look(d, "job.log", t)
        yield Case("jobs", f"log: {what}", run, r"job +DEAD\(1\) ")
    lines = {
        "a pipe": "pipe", "deep": b"[" * 200_000 + b"\n", "deep objects": b'{"a":' * 100_000 + b"\n",
        "numbers without end": b'{"step": ' + b"9" * 5000 + b"}\n", "no objects": b"1\n[]\nnull\n",
        "wrong kinds": b'{"step": "x", "loss": [1], "epoch": {}, "event": []}\n{"event": {}, "ce": {}}\n',
        "a lone surrogate": b'{"event": "end", "reason": "\\ud800"}\n',
        "NaN": b'{"step": NaN, "loss": NaN}\n',
        "negative": b'{"step": -1, "loss": 1}\n{"step": 1e300, "loss": 1}\n',
        "binary": bytes(range(256)) * 99,
    }  # fmt: skip
    for what, content in lines.items():
        run = lambda d, c=content: metrics(d, c)
        yield Case("jobs", f"metrics: {what}", run, r"job +DEAD\(1\) ")


def resumed(folder: Path, mode: int, change: dict | str) -> str:
    path = folder / "job.json"
    job = {"kind": "cache", "gpus": "cpu", "cwd": str(folder), "command": ["true"], "started": 1.0}
    path.write_text(change if isinstance(change, str) else json.dumps(job | change))
    path.chmod(mode)
    try:
        return " ".join(jobs.resumed(path))
    except ValueError as e:
        return str(e)


def resume_cases(rng):
    for mode in (0o666, 0o664, 0o646, 0o777):
        run = lambda d, m=mode: resumed(d, m, {})
        yield Case("resume", f"mode {mode:o}", run, "others may write to it.*chmod go-w")
    yield Case("resume", "our own", lambda d: resumed(d, 0o644, {}), "^cache cpu .* true$")
    changes = [{"command": "rm -rf /"}, {"command": [1]}, {"command": ["a\0b"]}, {"kind": 3},
               {"started": "x"}, {"cwd": None}, {"command": None}, "[]", "",
               "[" * 100_000, "null"]  # fmt: skip
    for change in changes:
        run = lambda d, c=change: resumed(d, 0o644, c)
        yield Case("resume", f"{str(change)[:30]}", run, "is no description of a job")


# ---- claims and owners ----


def claimed(folder: Path, claim: dict | str, age: float) -> str:
    """Whether a unit is ours, which another process claimed so and last showed life `age` seconds ago."""
    work = SharedWork(folder, ["a"], 1, {}, print)
    path = folder / "work" / "unit_000000.0000.claim"
    path.write_text(claim if isinstance(claim, str) else json.dumps(claim))
    os.utime(path, (time.time() - age,) * 2)
    got = work.claim(0)
    work.close()
    return "taken over" if got else "left to its owner"


def claim_cases(rng):
    me, far = {"pid": os.getpid(), "start": start_time(os.getpid())}, "other boot pid:[1]"
    dead = {"pid": 999_999_99, "start": 1}
    for who, claim, fresh in (
        ("here, alive", me | {"space": pid_space()}, "left"),
        ("here, dead", dead | {"space": pid_space()}, "taken"),
        ("in another container, its PID dead here", dead | {"space": far}, "left"),
        ("in another container, its PID alive here", me | {"space": far}, "left"),
        ("of an older version", dead | {"host": os.uname().nodename}, "left"),
        ("torn", '{"spa', "left"),
        ("empty", "", "left"),
        ("a list", "[]", "left"),
        ("deep", "[" * 100_000, "left"),
    ):
        for age, words in ((0, fresh), (-86400, fresh), (3600, "left" if "here, al" in who else "taken")):
            run = lambda d, c=claim, a=age: claimed(d, c, a)
            yield Case("claims", f"{who}, {age} s ago", run, f"^{words}")


HOLDER = """
import sys, time
sys.path.insert(0, sys.argv[1])
from snac48.runlog import hold
hold(sys.argv[2]); print("held", flush=True); time.sleep(60)
"""


def held(folder: Path, killed: bool) -> str:
    """A run directory that another process holds, or held until it was killed."""
    other = subprocess.Popen([sys.executable, "-c", HOLDER, ROOT, folder], stdout=subprocess.PIPE, text=True)
    try:
        assert other.stdout.readline() == "held\n"
        if killed:
            other.kill()
            other.wait()
        hold(folder)
        return "ours"
    finally:
        other.kill()
        other.wait()
        other.stdout.close()


def owner_cases(rng):
    yield Case("owner", "held by another", lambda d: held(d, False), r"in use by process \d+ on .* since")
    yield Case("owner", "its owner was killed", lambda d: held(d, True), "^ours")


def cases(seed: int) -> list[Case]:
    tables = (audio_cases, name_cases, link_cases, job_cases, resume_cases, claim_cases, owner_cases)
    return [case for table in tables for case in table(np.random.default_rng(seed))]
