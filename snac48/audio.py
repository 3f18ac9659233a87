"""What every program that walks an audio folder agrees on: listing, safe paths, decoding, resampling."""

import math
import os
import stat
import struct
import tempfile
from pathlib import Path

import numpy as np

from .cli import UserError
from .files import atomic_file, read_json

AUDIO_SUFFIXES = tuple(
    f".{s}" for s in ("wav", "flac", "mp3", "ogg", "oga", "opus", "aif", "aiff", "w64", "rf64", "caf", "au")
)
SPOOL_BYTES = 256 << 20  # a 48 kHz float32 waveform above this (23 min) waits in a temporary file


class AudioError(Exception):
    """One bad file: the reason goes to skipped.jsonl or the manifest; the job goes on."""


# ---- listing and paths ----


def find_audio(root: str | Path) -> list[str]:
    """Relative POSIX paths of all audio files below `root`, sorted (listings come unordered).

    Raises UserError when the folder is missing or holds no audio.
    """
    root = Path(root)
    if not root.is_dir():
        raise UserError(f"audio folder {root} does not exist")
    found = []
    for folder, _, names in os.walk(root, followlinks=False):
        rel = os.path.relpath(folder, root)
        prefix = "" if rel == "." else rel.replace(os.sep, "/") + "/"
        found += [prefix + n for n in names if n.lower().endswith(AUDIO_SUFFIXES)]
    if not found:
        raise UserError(f"no audio file ({' '.join(AUDIO_SUFFIXES)}) below {root}")
    return sorted(found)


def link_roots(root: str | Path) -> tuple[Path, ...]:
    """Folders that links below `root` may lead to: itself and what prepare_dataset.py recorded.

    prepare_dataset.py makes folders of symbolic links and names their source in a manifest.json beside them.
    """
    root = Path(root).resolve()
    roots = [root]
    for folder in (root, *root.parents[:2]):  # {train,valid}/audio lies two levels below the manifest
        if (folder / "manifest.json").is_file():
            source = read_json(folder / "manifest.json").get("input_dir")
            if source:
                roots.append(Path(source).resolve())
    return tuple(roots)


def is_safe(rel: str) -> bool:
    """Whether a path is relative and has no `..`: links may still lead out, resolve_inside looks at them."""
    absolute = rel.startswith(("/", "\\")) or rel[1:3] == ":\\"
    return bool(rel) and not absolute and "\0" not in rel and ".." not in rel.split("/")


def resolve_inside(root: str | Path, rel: str, allowed: tuple[Path, ...] = ()) -> Path:
    """The file `rel` (relative POSIX path) below `root`; `..`, absolute, NUL and escaping links are refused.

    allowed: resolved folders a link may lead to (default: root itself). Raises AudioError.
    """
    if not is_safe(rel):
        raise AudioError(f"unsafe path {rel!r}: must be relative, without '..'")
    path = Path(root) / rel
    try:
        real = path.resolve()
    except (OSError, RuntimeError) as e:  # a link to itself, a name too long for the file system
        reason = getattr(e, "strerror", None) or "a loop of links"
        raise AudioError(f"path {rel[:80]!r} leads nowhere: {reason}") from None
    if not any(real.is_relative_to(r) for r in allowed or (Path(root).resolve(),)):
        raise AudioError(f"{rel} is a link that leaves {root}")
    return path


def target_names(files: list[str]) -> dict[str, str]:
    """Source path -> path of its 48 kHz target: `a/b.mp3` -> `a/b.wav`.

    Sources that share a stem (a/b.mp3 beside a/b.ogg) keep their suffix after the first: `a/b.ogg.wav`.
    """
    taken: dict[str, str] = {}
    names = {}
    for rel in sorted(files, key=lambda r: (os.path.splitext(r)[0], not r.lower().endswith(".wav"), r)):
        name = os.path.splitext(rel)[0] + ".wav"
        if name.lower() in taken:
            name = rel + ".wav"
        taken[name.lower()] = rel
        names[rel] = name
    return names


# ---- decoding ----


def wav_layout(f) -> tuple[int, int, int, int, int]:
    """(format tag, channels, rate, data offset, data bytes) of an open RIFF WAVE file.

    Raises AudioError when the header claims more data than the file holds (libsndfile shortens it silently).
    Streaming writers that never came back to fill in the length (0, 0x7FFFFFFF.., 0xFFFFFFFF) are accepted.
    """
    size = f.seek(0, os.SEEK_END)
    f.seek(0)
    head = f.read(12)
    if len(head) < 12 or head[:4] not in (b"RIFF", b"RF64") or head[8:] != b"WAVE":
        raise AudioError("not a RIFF WAVE file")
    fmt, ds64 = None, None
    while True:
        chunk = f.read(8)
        if len(chunk) < 8:
            raise AudioError("wav without a data chunk (truncated?)")
        name, length = chunk[:4], struct.unpack("<I", chunk[4:])[0]
        if name == b"data":
            break
        body = f.read(min(length, 64))
        if name == b"fmt " and len(body) >= 16:
            fmt = struct.unpack("<HHIIHH", body[:16])
        if name == b"ds64" and len(body) >= 16:
            ds64 = struct.unpack("<Q", body[8:16])[0]
        f.seek(length + (length & 1) - len(body), os.SEEK_CUR)
    offset = f.tell()
    if fmt is None:
        raise AudioError("wav without a fmt chunk")
    if head[:4] == b"RF64" and ds64 is not None:
        length = ds64
    held = size - offset
    if length > held:
        if length < 0x7FFF0000:
            raise AudioError(f"truncated: the header claims {length} bytes of audio, the file holds {held}")
        length = held
    if length == 0 and held > 0:
        length = held
    return fmt[0], fmt[1], fmt[2], offset, length


def check_regular(path: str | Path) -> None:
    """Raises AudioError for what would block or never end when opened: a pipe, a device, a folder."""
    try:
        mode = os.stat(path).st_mode
    except FileNotFoundError:
        raise AudioError("file not found") from None
    except OSError as e:
        raise AudioError(f"unreadable: {e.strerror}") from None
    if not stat.S_ISREG(mode):
        raise AudioError("not a regular file (a folder, pipe or device)")


def check_rate(rate: int) -> None:
    """Raises AudioError for a rate that no recording has: resampling "1 Hz" would make hours of a second."""
    if not 1000 <= rate <= 1_000_000:
        raise AudioError(f"sampling rate {rate} Hz in the header")


def why(e: Exception) -> str:
    """What libsndfile or the system says of a file it can't read."""
    return getattr(e, "error_string", None) or getattr(e, "strerror", None) or str(e) or type(e).__name__


def check_audio(x) -> None:
    """Raises AudioError for zero samples and for NaN or infinite ones."""
    if len(x) == 0:
        raise AudioError("0 samples")
    if not np.isfinite(x).all():
        raise AudioError(f"{int((~np.isfinite(x)).sum())} NaN or infinite samples")


def audio_blocks(path: str | Path, block_seconds: float = 60.0):
    """Decode a file piece by piece: yields (mono float32 samples [n], rate in Hz). Channels are averaged.

    The pieces joined are what `read_audio` returns; memory stays that of one piece. Raises AudioError (never
    anything else) for whatever is wrong with the file, perhaps only after some pieces.
    """
    import soundfile as sf

    check_regular(path)
    try:
        if str(path).lower().endswith(".wav"):
            with open(path, "rb") as f:
                wav_layout(f)
        with sf.SoundFile(path) as f:
            check_rate(f.samplerate)
            expected, rate, done = f.frames, f.samplerate, 0
            while len(x := f.read(max(1, int(block_seconds * rate)), dtype="float32", always_2d=True)):
                done += len(x)
                x = x[:, 0] if x.shape[1] == 1 else x.mean(axis=1)
                check_audio(x)
                yield x, rate
    except FileNotFoundError:
        raise AudioError("file not found") from None
    except (sf.LibsndfileError, OSError, RuntimeError, ValueError, MemoryError) as e:
        raise AudioError(f"unreadable: {why(e)}") from None
    if done == 0:
        raise AudioError("0 samples")
    if 0 < expected < 2**62 and done < expected * 0.999 - 4096:  # mp3 and ogg only estimate their length
        raise AudioError(f"truncated: {done} of {expected} frames decoded")


def read_audio(path: str | Path):
    """Decode a file to mono float32: (samples [n], rate in Hz). Channels are averaged.

    Raises AudioError (never anything else) for whatever is wrong with the file.
    """
    blocks = list(audio_blocks(path))
    rate = blocks[0][1]
    return (blocks[0][0] if len(blocks) == 1 else np.concatenate([x for x, _ in blocks])), rate


def resample(x, rate: int, new_rate: int):
    """Band-limited (soxr VHQ, linear phase, no delay): float32 [n] -> [round(n * new_rate / rate)]."""
    import soxr

    if rate == new_rate:
        return x
    n = resampled_length(len(x), rate, new_rate)
    y = soxr.resample(x, rate, new_rate, quality="VHQ")
    if len(y) < n:
        y = np.pad(y, (0, n - len(y)))
    return np.ascontiguousarray(y[:n], dtype=np.float32)


def resampled_length(n: int, rate: int, new_rate: int) -> int:
    """round(n * new_rate / rate), half up, in integers."""
    return (2 * n * new_rate + rate) // (2 * rate)


# ---- spans: what a trainer reads of a file ----

SHORT_S = 0.05  # a file may end this much early: encoders' padding and rounding


def read_audio_span(path: str | Path, start: int, count: int, rate: int, need: int = 0):
    """Mono float32 samples [start, start + count) of a file as if resampled whole to `rate`; zeros past
    its end.

    need: how many of them must lie in the file; a file that ends more than SHORT_S earlier is an AudioError,
    because training on the zeros would teach silence.

    16-bit mono wav at `rate` is read by one seek; everything else by soundfile, resampled from a span
    that begins on a common sample of both rates, with a margin longer than the filter. Raises AudioError.
    """
    import soundfile as sf

    def held_to(frames: int, file_rate: int) -> None:
        ends, needed = frames / file_rate, (start + need) / rate
        if ends < needed - SHORT_S:
            raise AudioError(f"ends after {ends:.2f} s, {needed:.2f} s are needed")

    out = np.zeros(count, np.float32)
    check_regular(path)
    try:
        if str(path).lower().endswith(".wav"):
            with open(path, "rb") as f:
                tag, channels, file_rate, offset, held = wav_layout(f)
                if tag == 1 and channels == 1 and file_rate == rate and _bits(f) == 16:
                    held_to(held // 2, rate)
                    raw = os.pread(f.fileno(), max(0, min(2 * count, held - 2 * start)), offset + 2 * start)
                    x = np.frombuffer(raw, "<i2", len(raw) // 2)
                    out[: len(x)] = x
                    out /= 32768.0
                    return out
        with sf.SoundFile(path) as f:
            check_rate(f.samplerate)
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
    except FileNotFoundError:
        raise AudioError("file not found") from None
    except (sf.LibsndfileError, OSError, RuntimeError, ValueError, MemoryError) as e:
        raise AudioError(f"unreadable: {why(e)}") from None
    return out


def _bits(f) -> int:
    """Bits a sample of an open RIFF wav whose fmt chunk stands first, as it nearly always does; else 0."""
    f.seek(12)
    head = f.read(24)
    return struct.unpack("<H", head[22:24])[0] if head[:4] == b"fmt " else 0


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
        """PCM16 mono wav of `scale` times the pieces, whole or not at all; returns its `level`.

        level = 1, or the smaller factor that keeps the loudest sample within full scale.
        """
        import soundfile as sf

        top = 32767 / 32768
        level = 1.0 if self.peak * scale <= top else top / (self.peak * scale)
        self.file.seek(0)
        with atomic_file(target) as f, sf.SoundFile(f, "w", rate, 1, "PCM_16", format="WAV") as wav:
            while block := self.file.read(4 * 60 * rate):
                x = np.rint(np.frombuffer(block, "<f4") * (scale * level * 32768.0))
                wav.write(np.clip(x, -32768, 32767).astype(np.int16))
        return level
