"""What every program that walks an audio folder agrees on: listing, safe paths, decoding, resampling."""

import contextlib
import errno
import functools
import math
import os
import struct
import tempfile
from pathlib import Path

import numpy as np

from .cli import UserError
from .containers import AudioError, inspect
from .files import atomic_file, read_json
from .jobs import NotRegular, open_regular

SUFFIXES = (".wav", ".flac", ".mp3", ".ogg", ".oga", ".opus", ".aif", ".aiff", ".w64", ".rf64", ".caf", ".au")
SPOOL_BYTES = 256 << 20  # a 48 kHz float32 waveform above this (23 min) waits in a temporary file


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


def allow_links(folders: str) -> None:
    """--allow_links: links may lead to these folders, DIR or DIR:DIR, too, in this process and in those that
    it starts. Raises UserError for one that is not there."""
    known = [*filter(None, os.environ.get("ALLOW_LINKS", "").split(":"))]
    for folder in filter(None, folders.split(":")):
        if not Path(folder).is_dir():
            raise UserError(f"--allow_links {folder} is not a folder")
        known.append(str(Path(folder).resolve()))
    os.environ["ALLOW_LINKS"] = ":".join(dict.fromkeys(known))
    link_roots.cache_clear()


SPLIT_FORMAT = "snac48 split 1"  # in the manifest.json that prepare_dataset.py writes


def split_source(root: Path) -> Path | None:
    """The recordings that a split of prepare_dataset.py links to; `root`: its train/audio or valid/audio.
    Only a manifest that says it was written here is believed: a data set may bring a file of that name, and
    what stands in it must not open folders of ours to links of theirs."""
    place = root.parents[1] if len(root.parents) > 1 else root
    try:
        found = read_json(place / "manifest.json")
    except UserError:
        return None
    if not isinstance(found, dict) or found.get("format") != SPLIT_FORMAT:
        return None
    source, made = found.get("input_dir"), found.get("output_dir")
    if not isinstance(source, str) or made != str(place) or "\0" in source:
        return None
    source = Path(source).resolve()
    return None if source == Path("/") else source


@functools.cache
def link_roots(root: str | Path) -> tuple[Path, ...]:
    """Folders that links below `root` may lead to: itself, what the user allows (--allow_links, ALLOW_LINKS),
    and the recordings that a split of prepare_dataset.py was made of."""
    root = Path(root).resolve()
    named = [Path(f).resolve() for f in os.environ.get("ALLOW_LINKS", "").split(":") if f]
    source = split_source(root)
    return (root, *named, *([source] if source else []))


def is_safe(rel: str) -> bool:
    """Whether a path is relative and has no `..`: links may still lead out, resolve_inside looks at them."""
    absolute = rel.startswith(("/", "\\")) or rel[1:3] == ":\\"
    return bool(rel) and not absolute and "\0" not in rel and ".." not in rel.split("/")


def check_name(rel: str) -> None:
    """Raises AudioError for a path that leads elsewhere, and for one that no table of ours could hold."""
    if not is_safe(rel):
        raise AudioError(f"unsafe path {rel!r}: must be relative, without '..'")
    try:
        rel.encode()
    except UnicodeEncodeError:  # bytes of another encoding, which Python keeps as lone surrogates
        raise AudioError("file name is not UTF-8: rename it") from None


def resolve_inside(root: str | Path, rel: str, allowed: tuple[Path, ...] = ()) -> Path:
    """The file `rel` (relative POSIX path) below `root`. Raises AudioError for `..`, absolute paths, NUL and
    links that lead out of the `allowed` folders (default: link_roots of root)."""
    check_name(rel)
    path = Path(root) / rel
    try:
        real = path.resolve()
    except (OSError, RuntimeError) as e:  # a link to itself, a name too long for the file system
        reason = getattr(e, "strerror", None) or "a loop of links"
        raise AudioError(f"path {rel[:80]!r} leads nowhere: {reason}") from None
    if not any(real.is_relative_to(r) for r in allowed or link_roots(root)):
        raise AudioError(leaves(rel, root))
    return path


def leaves(rel: str, root) -> str:
    return f"{rel} is a link that leaves {root}: name the folder that it leads to by --allow_links"


@functools.lru_cache(maxsize=1 << 13)
def real_folder(folder: str, allowed: tuple[Path, ...]) -> str | None:
    """Where a folder really lies; None outside of the `allowed` ones. Looked up once a process."""
    real = os.path.realpath(folder)
    return real if any(Path(real).is_relative_to(r) for r in allowed) else None


def open_inside(root: str | Path, rel: str, allowed: tuple[Path, ...]) -> tuple[int, os.stat_result]:
    """(descriptor, its stat) of a regular file, with the promise of resolve_inside at a tenth of its cost:
    folders are resolved once a process, and the file itself is opened without following a link; where it is
    one, its target is opened likewise. Raises AudioError, and OSError where there is no such file."""
    check_name(rel)
    path = f"{root}/{rel}"
    for _ in range(40):  # as many links as Linux follows
        folder, _, name = path.rpartition("/")
        real = real_folder(folder, allowed)
        if real is None:
            raise AudioError(leaves(rel, root))
        path = f"{real}/{name}"
        try:
            return open_sound_file(path, os.O_NOFOLLOW)
        except OSError as e:
            if e.errno != errno.ELOOP:
                raise
        path = os.path.join(real, os.readlink(path))
    raise AudioError(f"path {rel[:80]!r} leads nowhere: a loop of links")


def open_sound_file(path: str | Path, flags: int = 0) -> tuple[int, os.stat_result]:
    """(descriptor, its stat). Raises AudioError for what would never end when read, OSError."""
    try:
        fd = open_regular(path, flags)
    except NotRegular as e:
        raise AudioError(e.strerror) from None
    return fd, os.fstat(fd)


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


DISK_FAILS = (errno.EIO, errno.ESTALE, errno.ENOTCONN, errno.EREMOTEIO, errno.ETIMEDOUT, errno.EHOSTDOWN)


class bad_file(contextlib.AbstractContextManager):
    """Inside, whatever is wrong with a file becomes an AudioError that says what. path: of a file that is
    left out for good; where its disk fails, that is a UserError: a whole corpus would be left out."""

    def __init__(self, path: str | Path = ""):
        self.path = path

    def __exit__(self, kind, e, _):
        if self.path and (why := disk_failure(Path(self.path), e)):
            todo = "run the same command again when it is back (or, where only this file fails, move it away)"
            raise UserError(f"{self.path}: {why}; {todo}") from None
        if isinstance(e, FileNotFoundError):
            raise AudioError("file not found") from None
        if isinstance(e, (OSError, RuntimeError, ValueError, MemoryError)):  # libsndfile's are RuntimeErrors
            reason = getattr(e, "error_string", None) or getattr(e, "strerror", None) or str(e)
            raise AudioError(f"unreadable: {reason or type(e).__name__}") from None


def disk_failure(path: Path, e) -> str:
    """Why it is the disk, not the file at `path`, that is the reason of an error; else ""."""
    if isinstance(e, FileNotFoundError):
        folder = next((f for f in path.absolute().parents if f.is_dir()), Path("/"))
        seen = os.listdir(folder) if os.access(folder, os.R_OK) else ["?"]
        return "" if seen else f"{folder} is empty: was a file system unmounted"
    if getattr(e, "code", 0) == 2:  # libsndfile's SF_ERR_SYSTEM: a disk, or a header that leads nowhere
        try:
            with open(path, "rb") as f:
                while f.read(1 << 20):
                    pass
        except OSError as found:
            e = found
    return os.strerror(e.errno) if isinstance(e, OSError) and e.errno in DISK_FAILS else ""


# What a header says of its file. size: of the file, by which a noted header is recognised; -1: never.
# held: bytes of audio from `offset` on. tag: 1 integers, 3 floats; 0: to be decoded by soundfile.
HEADER = np.dtype(
    [("size", "i8"), ("held", "i8"), ("offset", "i8"), ("rate", "u4"), ("channels", "u2"), ("bits", "u2"),
     ("tag", "u2")],
    align=True,
)  # fmt: skip
UNKNOWN = (-1, 0, 0, 0, 0, 0, 0)
PLAIN = {(1, 16), (1, 24), (3, 32)}  # (tag, bits): read by one pread


def header_of(fd: int, size: int, name: str | Path) -> tuple:
    """What HEADER names of an open file of `size` bytes. Raises AudioError, for a .wav whose header claims
    more data than the file holds, too (libsndfile shortens it silently). Streaming writers that never came
    back to fill in the length (0, 0x7FFFFFFF.., 0xFFFFFFFF) are fine."""
    if not str(name).lower().endswith((".wav", ".rf64")):
        return (size, *UNKNOWN[1:])
    head = os.pread(fd, 4096, 0)
    part = lambda at, n: head[at : at + n] if at + n <= len(head) else os.pread(fd, n, at)
    if len(head) < 12 or head[:4] not in (b"RIFF", b"RF64") or head[8:12] != b"WAVE":
        raise AudioError("not a RIFF WAVE file")
    at, fmt, ds64 = 12, b"", None
    while len(chunk := part(at, 8)) == 8:
        name, length = struct.unpack("<4sI", chunk)
        at += 8
        if name == b"data":
            break
        body = part(at, min(length, 64))
        if name == b"fmt " and len(body) >= 16:
            fmt = body
        if name == b"ds64" and len(body) >= 16:
            ds64 = struct.unpack("<Q", body[8:16])[0]
        at += length + (length & 1)
    else:
        raise AudioError("wav without a data chunk (truncated?)")
    if not fmt:
        raise AudioError("wav without a fmt chunk")
    if head[:4] == b"RF64" and ds64 is not None:
        length = ds64
    held = size - at
    if held < length < 0x7FFF0000:
        raise AudioError(f"truncated: the header claims {length} bytes of audio, the file holds {held}")
    tag, channels, rate, _, width, bits = struct.unpack("<HHIIHH", fmt[:16])
    if tag == 0xFFFE and len(fmt) >= 26:  # "extensible": the tag proper comes later
        tag = struct.unpack("<H", fmt[24:26])[0]
    if (tag, bits) not in PLAIN or not channels or width != channels * bits // 8:
        tag = 0
    return size, min(length or held, held), at, check_rate(rate), channels, bits, tag


def note_header(root: str | Path, rel: str, allowed: tuple[Path, ...]) -> tuple | None:
    """header_of a file below root, UNKNOWN where something is wrong with it, None where there is none."""
    try:
        fd, found = open_inside(root, rel, allowed)
    except FileNotFoundError:
        return None
    except (AudioError, OSError):
        return UNKNOWN
    try:
        return header_of(fd, found.st_size, rel)
    except (AudioError, OSError):
        return UNKNOWN
    finally:
        os.close(fd)


def check_rate(rate: int) -> int:
    """The rate. Raises AudioError for one that no recording has: "1 Hz" would become hours."""
    if not 1000 <= rate <= 1_000_000:
        raise AudioError(f"sampling rate {rate} Hz in the header")
    return rate


def open_sound(path: str | Path):
    """soundfile's file. Raises AudioError."""
    import soundfile as sf

    f = sf.SoundFile(path)
    if f.format == "RAW":  # what libsndfile makes of an .au or .vox file without a header
        raise AudioError("not an audio file: it has no header")
    check_rate(f.samplerate)
    return f


def checked(x):
    """x. Raises AudioError for NaN or infinite samples."""
    if not np.isfinite(x).all():
        raise AudioError(f"{int((~np.isfinite(x)).sum())} NaN or infinite samples")
    return x


def audio_blocks(path: str | Path, block_seconds: float = 60.0):
    """Decode a file piece by piece: yields (mono float32 samples [n], rate in Hz). Channels are averaged;
    memory stays that of one piece. Raises AudioError (never anything else) for whatever is wrong with the
    file, perhaps only after some pieces; also where it holds more, or less, than its decoder finds."""
    with bad_file(path):
        fd, found = open_sound_file(path)
        try:
            header_of(fd, found.st_size, path)
            held = inspect(fd, found.st_size)
        finally:
            os.close(fd)
        with open_sound(path) as f:
            expected, rate, done, lossy = f.frames, f.samplerate, 0, f.format in ("MP3", "OGG")
            while len(x := f.read(max(1, int(block_seconds * rate)), dtype="float32", always_2d=True)):
                done += len(x)
                x = x[:, 0] if x.shape[1] == 1 else x.mean(axis=1)
                yield checked(x), rate
    if done == 0:
        raise AudioError("0 samples")
    expected = max(expected if expected < 2**62 else 0, held or 0)
    spare = 0.001 * expected + 8 * 1152 if lossy else 0  # mp3 and ogg only estimate; encoders add some frames
    if done < expected - spare:
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


def read_span(out, root, rel: str, allowed, start: int, rate: int, need: int = 0, noted=UNKNOWN) -> bool:
    """Fill `out`, float32 [count], with mono samples [start, start + count) of the file `rel` below `root`
    (as for open_inside) as if resampled whole to `rate`; zeros before its begin and past its end. Returns
    whether they cannot be beyond full scale. Raises AudioError.

    need: how many of them must lie in the file; a file that ends more than SHORT_S earlier is an AudioError,
    because training on the zeros would teach silence.
    noted: its header as an index has it. It is believed as long as the file has the size of then; this is the
    place for stronger checks that a file is still the one that was indexed.
    """
    with bad_file():
        fd, found = open_inside(root, rel, allowed)
        try:
            header = noted if noted[0] == found.st_size else header_of(fd, found.st_size, rel)
            _, held, _, file_rate, channels, bits, tag = header
            if tag:
                frames = held // (channels * bits // 8)
                decode = lambda first, part: plain_frames(fd, header, first, part)
                place(out, decode, frames, file_rate, start, rate, need)
                return tag == 1 and file_rate == rate
        finally:
            os.close(fd)
        with open_sound(Path(root) / rel) as f:

            def decode(first: int, part) -> int:
                f.seek(first)
                x = checked(f.read(len(part), dtype="float32", always_2d=True).mean(axis=1))
                part[: len(x)] = x
                return len(x)

            place(out, decode, f.frames, f.samplerate, start, rate, need)
    return False


def plain_frames(fd: int, header: tuple, first: int, out) -> int:
    """Fill float32 `out` with mono samples from `first` on of a wav of a kind in PLAIN, by one pread; returns
    how many there are."""
    _, held, offset, _, channels, bits, _ = header
    width = channels * bits // 8
    count = min(len(out), held // width - first)
    raw = os.pread(fd, count * width, offset + first * width)
    if len(raw) < count * width:
        raise AudioError("truncated while it was read")
    if bits == 16:
        x, scale = np.frombuffer(raw, "<i2"), 2**-15
    elif bits == 24:
        wide = np.zeros((count * channels, 4), np.uint8)
        wide[:, 1:] = np.frombuffer(raw, np.uint8).reshape(-1, 3)
        x, scale = wide.view("<i4")[:, 0], 2**-31
    else:
        x, scale = checked(np.frombuffer(raw, "<f4")), 1
    if channels > 1:
        x, scale = np.multiply(x, scale, dtype=np.float32).reshape(-1, channels).mean(axis=1), 1
    np.multiply(x, scale, out=out[:count], dtype=np.float32)
    return count


def place(out, decode, frames: int, file_rate: int, start: int, rate: int, need: int) -> None:
    """What read_span does with an open file of so many frames. decode(first, part): put its samples from
    `first` on into `part`; returns how many. Resampled from a span that begins on a common sample of both
    rates, with a margin longer than the filter."""
    ends, needed = frames / file_rate, (start + need) / rate
    if ends < needed - SHORT_S:
        raise AudioError(f"ends after {ends:.2f} s, {needed:.2f} s are needed")
    out[: max(0, -start)] = 0
    out, start, n = out[max(0, -start) :], max(0, start), 0
    if file_rate == rate:
        n = decode(start, out) if start < frames else 0
    else:
        g = math.gcd(file_rate, rate)
        p, q = file_rate // g, rate // g  # q output samples lie exactly on p input samples
        margin = 64 * max(1, math.ceil(rate / file_rate)) + 512
        first = max(0, (start - margin) // q)
        if first * p < frames:
            x = np.empty(math.ceil((start + len(out) + margin - first * q) * p / q), np.float32)
            y = resample(x[: decode(first * p, x)], file_rate, rate)[start - first * q :][: len(out)]
            n = len(y)
            out[:n] = y
    out[n:] = 0


# ---- 24 kHz of 48 kHz ----

HALVING_REACH = 256  # samples at 48 kHz that the filter sees on each side: what lies beyond adds below 1e-8


@functools.cache
def halving_filter():
    """The filter of resample(x, 48000, 24000) as its impulse response, float64 [2 * HALVING_REACH + 1]: with
    it, audio whose rate is halved on a GPU has the samples that resample gives."""
    import soxr

    m, taps = HALVING_REACH, np.zeros(2 * HALVING_REACH + 1)
    for odd in (0, 1):  # output j of an impulse at 4 m - odd is tap 2 j - 4 m + odd, counted from the middle
        impulse = np.zeros(8 * m)
        impulse[4 * m - odd] = 1
        y = soxr.resample(impulse, 48000, 24000, quality="VHQ")
        taps[odd::2] = y[3 * m // 2 :][: m + 1 - odd]
    return taps


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
