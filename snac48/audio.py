"""What every program that walks an audio folder agrees on: listing, safe paths, decoding, resampling."""

import contextlib
import functools
import math
import os
import stat
import struct
import tempfile
from pathlib import Path

import numpy as np

from .cli import UserError
from .files import atomic_file, read_json

SUFFIXES = (".wav", ".flac", ".mp3", ".ogg", ".oga", ".opus", ".aif", ".aiff", ".w64", ".rf64", ".caf", ".au")
SPOOL_BYTES = 256 << 20  # a 48 kHz float32 waveform above this (23 min) waits in a temporary file


class AudioError(Exception):
    """One bad file: the reason goes to skipped.jsonl or the manifest; the job goes on."""


# ---- listing and paths ----


def find_audio(root: str | Path) -> list[str]:
    """Relative POSIX paths of all audio files below `root`, sorted. Raises UserError where there are none."""
    root = Path(root)
    if not root.is_dir():
        raise UserError(f"audio folder {root} does not exist")
    found = []
    for folder, _, names in os.walk(root):
        below = Path(folder).relative_to(root)
        found += [(below / n).as_posix() for n in names if n.lower().endswith(SUFFIXES)]
    if not found:
        raise UserError(f"no audio file ({' '.join(SUFFIXES)}) below {root}")
    return sorted(found)


@functools.cache
def link_roots(root: str | Path) -> tuple[Path, ...]:
    """Folders that links below `root` may lead to: itself, and the source that prepare_dataset.py linked and
    names in manifest.json."""
    root = Path(root).resolve()
    beside = (f / "manifest.json" for f in (root, *root.parents[:2]))  # {train,valid}/audio: two levels up
    sources = (read_json(path).get("input_dir") for path in beside if path.is_file())
    return (root, *(Path(source).resolve() for source in sources if source))


def is_safe(rel: str) -> bool:
    """Whether a path is relative and has no `..`: links may still lead out, resolve_inside looks at them."""
    absolute = rel.startswith(("/", "\\")) or rel[1:3] == ":\\"
    return bool(rel) and not absolute and "\0" not in rel and ".." not in rel.split("/")


def resolve_inside(root: str | Path, rel: str, allowed: tuple[Path, ...] = ()) -> Path:
    """The file `rel` (relative POSIX path) below `root`. Raises AudioError for `..`, absolute paths, NUL and
    links that lead out of the `allowed` folders (default: link_roots of root)."""
    if not is_safe(rel):
        raise AudioError(f"unsafe path {rel!r}: must be relative, without '..'")
    path = Path(root) / rel
    try:
        real = path.resolve()
    except (OSError, RuntimeError) as e:  # a link to itself, a name too long for the file system
        reason = getattr(e, "strerror", None) or "a loop of links"
        raise AudioError(f"path {rel[:80]!r} leads nowhere: {reason}") from None
    if not any(real.is_relative_to(r) for r in allowed or link_roots(root)):
        raise AudioError(f"{rel} is a link that leaves {root}")
    return path


def target_names(files: list[str]) -> dict[str, str]:
    """{source path: path of its 48 kHz target}: `a/b.mp3` -> `a/b.wav`; sources that share a stem (a/b.mp3
    beside a/b.ogg) keep their suffix after the first: `a/b.ogg.wav`."""
    taken, names = set(), {}
    for rel in sorted(files, key=lambda r: (os.path.splitext(r)[0], not r.lower().endswith(".wav"), r)):
        name = os.path.splitext(rel)[0] + ".wav"
        names[rel] = rel + ".wav" if name.lower() in taken else name
        taken.add(names[rel].lower())
    return names


# ---- decoding ----


@contextlib.contextmanager
def bad_file():
    """Inside, whatever is wrong with a file becomes an AudioError that says what."""
    try:
        yield
    except FileNotFoundError:
        raise AudioError("file not found") from None
    except (OSError, RuntimeError, ValueError, MemoryError) as e:  # libsndfile's errors are RuntimeErrors
        reason = getattr(e, "error_string", None) or getattr(e, "strerror", None) or str(e)
        raise AudioError(f"unreadable: {reason or type(e).__name__}") from None


def wav_layout(f) -> tuple[int, int, int, int, int, int]:
    """(format tag, channels, rate, bits a sample, data offset, data bytes) of an open RIFF WAVE file.
    Raises AudioError when the header claims more data than the file holds (libsndfile shortens it silently).
    Streaming writers that never came back to fill in the length (0, 0x7FFFFFFF.., 0xFFFFFFFF) are fine."""
    size = f.seek(0, os.SEEK_END)
    f.seek(0)
    head = f.read(12)
    if len(head) < 12 or head[:4] not in (b"RIFF", b"RF64") or head[8:] != b"WAVE":
        raise AudioError("not a RIFF WAVE file")
    fmt, ds64 = None, None
    while len(chunk := f.read(8)) == 8:
        name, length = struct.unpack("<4sI", chunk)
        if name == b"data":
            break
        body = f.read(min(length, 64))
        if name == b"fmt " and len(body) >= 16:
            fmt = struct.unpack("<HHIIHH", body[:16])
        if name == b"ds64" and len(body) >= 16:
            ds64 = struct.unpack("<Q", body[8:16])[0]
        f.seek(length + (length & 1) - len(body), os.SEEK_CUR)
    else:
        raise AudioError("wav without a data chunk (truncated?)")
    offset = f.tell()
    if fmt is None:
        raise AudioError("wav without a fmt chunk")
    if head[:4] == b"RF64" and ds64 is not None:
        length = ds64
    held = size - offset
    if held < length < 0x7FFF0000:
        raise AudioError(f"truncated: the header claims {length} bytes of audio, the file holds {held}")
    tag, channels, rate, _, _, bits = fmt
    return tag, channels, rate, bits, offset, min(length or held, held)


def check_header(path: str | Path) -> tuple | None:
    """wav_layout of a .wav file. Raises AudioError for what would block or never end when opened, too."""
    if not stat.S_ISREG(os.stat(path).st_mode):
        raise AudioError("not a regular file (a folder, pipe or device)")
    if not str(path).lower().endswith(".wav"):
        return None
    with open(path, "rb") as f:
        return wav_layout(f)


def open_sound(path: str | Path):
    """soundfile's file. Raises AudioError for a rate that no recording has: "1 Hz" would become hours."""
    import soundfile as sf

    f = sf.SoundFile(path)
    if not 1000 <= f.samplerate <= 1_000_000:
        raise AudioError(f"sampling rate {f.samplerate} Hz in the header")
    return f


def check_audio(x) -> None:
    """Raises AudioError for zero samples and for NaN or infinite ones."""
    if len(x) == 0:
        raise AudioError("0 samples")
    if not np.isfinite(x).all():
        raise AudioError(f"{int((~np.isfinite(x)).sum())} NaN or infinite samples")


def audio_blocks(path: str | Path, block_seconds: float = 60.0):
    """Decode a file piece by piece: yields (mono float32 samples [n], rate in Hz). Channels are averaged;
    memory stays that of one piece. Raises AudioError (never anything else) for whatever is wrong with the
    file, perhaps only after some pieces."""
    with bad_file():
        check_header(path)
        with open_sound(path) as f:
            expected, rate, done = f.frames, f.samplerate, 0
            while len(x := f.read(max(1, int(block_seconds * rate)), dtype="float32", always_2d=True)):
                done += len(x)
                x = x[:, 0] if x.shape[1] == 1 else x.mean(axis=1)
                check_audio(x)
                yield x, rate
    if done == 0:
        raise AudioError("0 samples")
    if 0 < expected < 2**62 and done < expected * 0.999 - 4096:  # mp3 and ogg only estimate their length
        raise AudioError(f"truncated: {done} of {expected} frames decoded")


def read_audio(path: str | Path):
    """audio_blocks joined: (mono float32 samples [n], rate in Hz). Raises AudioError, never anything else."""
    blocks, rates = zip(*audio_blocks(path))
    return (blocks[0] if len(blocks) == 1 else np.concatenate(blocks)), rates[0]


def resample(x, rate: int, new_rate: int):
    """Band-limited (soxr VHQ, linear phase, no delay): float32 [n] -> [round(n * new_rate / rate)]."""
    import soxr

    if rate == new_rate:
        return x
    n = resampled_length(len(x), rate, new_rate)
    y = soxr.resample(x, rate, new_rate, quality="VHQ")[:n]
    return np.ascontiguousarray(np.pad(y, (0, n - len(y))), dtype=np.float32)


def resampled_length(n: int, rate: int, new_rate: int) -> int:
    """round(n * new_rate / rate), half up, in integers."""
    return (2 * n * new_rate + rate) // (2 * rate)


# ---- spans: what a trainer reads of a file ----

SHORT_S = 0.05  # a file may end this much early: encoders' padding and rounding


def read_audio_span(path: str | Path, start: int, count: int, rate: int, need: int = 0):
    """Mono float32 samples [start, start + count) of a file as if resampled whole to `rate`; zeros past
    its end. Raises AudioError.

    need: how many of them must lie in the file; a file that ends more than SHORT_S earlier is an AudioError,
    because training on the zeros would teach silence. 16-bit mono wav at `rate` is read by one seek;
    everything else by soundfile, resampled from a span that begins on a common sample of both rates, with a
    margin longer than the filter.
    """

    def held_to(frames: int, file_rate: int) -> None:
        ends, needed = frames / file_rate, (start + need) / rate
        if ends < needed - SHORT_S:
            raise AudioError(f"ends after {ends:.2f} s, {needed:.2f} s are needed")

    out = np.zeros(count, np.float32)
    with bad_file():
        layout = check_header(path)
        if layout and layout[:4] == (1, 1, rate, 16):
            offset, held = layout[4:]
            held_to(held // 2, rate)
            x = np.fromfile(path, "<i2", max(0, min(count, held // 2 - start)), offset=offset + 2 * start)
            out[: len(x)] = x
            out /= 32768.0
            return out
        with open_sound(path) as f:
            held_to(f.frames, f.samplerate)
            g = math.gcd(f.samplerate, rate)
            p, q = f.samplerate // g, rate // g  # q output samples lie exactly on p input samples
            margin = 0 if p == q else 64 * max(1, math.ceil(rate / f.samplerate)) + 512
            first = max(0, (start - margin) // q) * q
            want = math.ceil((start + count + margin - first) * p / q)
            if first // q * p < f.frames:
                f.seek(first // q * p)
                x = f.read(want, dtype="float32", always_2d=True).mean(axis=1)
                if len(x):
                    check_audio(x)
                    y = resample(x, f.samplerate, rate)[start - first : start - first + count]
                    out[: len(y)] = y
    return out


# ---- writing ----


class Spool:
    """A waveform on its way out: float32 pieces, in memory while short, in a temporary file when long."""

    def __init__(self, folder: Path):
        self.file = tempfile.SpooledTemporaryFile(SPOOL_BYTES, dir=folder)
        self.peak, self.n = 0.0, 0

    def add(self, x) -> None:
        self.file.write(np.ascontiguousarray(x, dtype="<f4").tobytes())
        self.peak = max(self.peak, float(np.abs(x).max(initial=0.0)))
        self.n += len(x)

    def save(self, target: Path, rate: int, scale: float) -> float:
        """PCM16 mono wav of `scale` times the pieces, whole or not at all; returns its `level`: 1, or the
        smaller factor that keeps the loudest sample within full scale."""
        import soundfile as sf

        top = 32767 / 32768
        level = 1.0 if self.peak * scale <= top else top / (self.peak * scale)
        self.file.seek(0)
        with atomic_file(target) as f, sf.SoundFile(f, "w", rate, 1, "PCM_16", format="WAV") as wav:
            while block := self.file.read(4 * 60 * rate):
                x = np.rint(np.frombuffer(block, "<f4") * (scale * level * 32768.0))
                wav.write(np.clip(x, -32768, 32767).astype(np.int16))
        return level
