"""What an audio file says of its own length: is it cut, is it several files joined in one?

Decoders hide both: they shorten a truncated AIFF, AU, W64 or RF64 file in silence, stop at the end of the
first of several joined streams, and believe a wrong count in a header. So a file is looked at before it is
decoded. `inspect` is the way in; formats it doesn't know pass.
"""

import functools
import os
import re
import struct


class AudioError(Exception):
    """One bad file: the reason goes to skipped.jsonl or the manifest; the job goes on."""


class Window:
    """The bytes of an open file, by pread, a megabyte at a time: a mapped one would end the process (SIGBUS)
    where the disk fails or somebody shortens the file."""

    def __init__(self, fd: int, size: int):
        self.fd, self.size, self.first, self.held = fd, size, 0, b""

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, where: slice) -> bytes:
        first, end = where.start, min(where.stop, self.size)
        if first < self.first or end > self.first + len(self.held):
            self.first, self.held = first, os.pread(self.fd, max(end - first, 1 << 20), first)
        return self.held[first - self.first : max(end, first) - self.first]

    def unpack(self, form: str, at: int) -> tuple:
        found = self[at : at + struct.calcsize(form)]
        if len(found) < struct.calcsize(form):
            raise AudioError("truncated inside a header")
        return struct.unpack(form, found)

    def find(self, wanted: bytes, at: int) -> int:
        """Where these bytes come first from `at` on; -1 where they don't."""
        while at < self.size:
            part = self[at : at + (1 << 20)]
            if (found := part.find(wanted)) >= 0:
                return at + found
            at += max(1, len(part) - len(wanted) + 1)
        return -1

    def each(self, pattern: bytes, at: int) -> list[int]:
        """All places from `at` on where a pattern of at most 8 bytes matches, read once."""
        found = []
        while at < self.size:
            part = self[at : at + (1 << 20)]
            found += [at + m.start() for m in re.finditer(pattern, part, re.DOTALL)]
            at += max(1, len(part) - 8) if len(part) == 1 << 20 else len(part)
        return sorted(set(found))


JOINED = "convert it into one stream (ffmpeg -i FILE NEW.wav)"


def inspect(fd: int, size: int) -> int | None:
    """Samples a channel that an open file of `size` bytes holds, counted without its headers' claims; None
    where only decoding can tell. Raises AudioError for a truncated file, for several streams in one, and for
    a header that claims another number of samples than the file holds."""
    if size < 12:
        return None
    data = Window(fd, size)
    start = after_id3(data, 0)
    magic = data[start : start + 4]
    if magic in CHUNKED and not start:
        return check_chunks(data, CHUNKED[magic])
    if magic == b".snd":
        return check_au(data)
    if magic == b"OggS":
        return check_ogg(data, start)
    if magic == b"fLaC":
        return check_flac(data, start)
    return check_mpeg(data, start) if magic[:1] == b"\xff" or start else None


def after_id3(data, at: int) -> int:
    """Where an ID3v2 tag at `at` ends; `at` where there is none."""
    while data[at : at + 3] == b"ID3" and at + 10 <= len(data):
        flags, a, b, c, d = data[at + 5 : at + 10]
        at += 10 + ((a & 127) << 21 | (b & 127) << 14 | (c & 127) << 7 | d & 127) + 10 * bool(flags & 16)
    return at


# ---- chunks: WAV, RF64, AIFF, W64, CAF ----

# first four bytes: (where the first chunk begins, bytes of a chunk's id, form of its size, whether that
# counts the chunk's header, to how many bytes chunks are filled up, id of the one with the audio)
CHUNKED = {
    b"RIFF": (12, 4, "<I", False, 2, b"data"),
    b"RF64": (12, 4, "<I", False, 2, b"data"),
    b"FORM": (12, 4, ">I", False, 2, b"SSND"),
    b"riff": (40, 16, "<Q", True, 8, b"data"),
    b"caff": (8, 4, ">q", False, 1, b"data"),
}
OPEN_ENDED = 0x7FFF0000  # sizes from here on, 0 and -1: of writers that never came back to fill them in
SLACK = 4096  # bytes behind the audio that may be anything


def check_chunks(data, form: tuple) -> None:
    at, wide, size_form, counts_header, align, audio = form
    end, header, long_size, heard = len(data), wide + struct.calcsize(size_form), None, False
    while at + header <= end:
        name = data[at : at + 4]
        (length,) = data.unpack(size_form, at + wide)
        length -= header if counts_header else 0
        if heard and name in CHUNKED:
            raise AudioError(f"several files joined in one, the second at byte {at}: {JOINED}")
        if heard and not all(32 <= byte < 127 for byte in name):
            if end - at > SLACK and any(data[at : at + (1 << 20)]):
                raise AudioError(f"{end - at} bytes follow the audio that the header claims: {JOINED}")
            return
        if name == b"ds64":
            (long_size,) = data.unpack("<Q", at + header + 8)
        if name == audio:
            if length >= OPEN_ENDED and long_size is not None:
                length = long_size
            if size_form in ("<I", ">I") and long_size is None and (not length or length >= OPEN_ENDED):
                return
            if length < 0:
                return
            if length > end - at - header:
                held = end - at - header
                raise AudioError(
                    f"truncated: the header claims {length} bytes of audio, the file holds {held}"
                )
            heard = True
        at += header + length + -length % align


def check_au(data) -> None:
    offset, length = data.unpack(">II", 4)
    held = len(data) - offset
    if length == 0xFFFFFFFF:
        return
    if length > held:
        raise AudioError(f"truncated: the header claims {length} bytes of audio, the file holds {held}")
    if held - length > SLACK:
        raise AudioError(f"{held - length} bytes follow the audio that the header claims: {JOINED}")


# ---- Ogg: Vorbis, Opus, FLAC ----


def check_ogg(data, at: int) -> None:
    """Pages must follow one another without a gap, and no stream begin after another has."""
    size, begun, pages = len(data), False, {}
    while at < size:
        if data[at : at + 4] != b"OggS":
            if data.find(b"OggS", at) >= 0:
                raise AudioError(f"damaged at byte {at}: no Ogg page where one must begin")
            return  # a tag behind the last page
        head = data[at : at + 27 + 255]
        end = at + 27 + (head[26] if len(head) > 26 else 256)
        end += sum(head[27 : end - at])
        if end > size:
            raise AudioError("truncated: the last Ogg page is not whole")
        first, (serial, number) = head[5] & 2, struct.unpack_from("<II", head, 14)
        if first and begun:
            raise AudioError(f"several Ogg streams joined in one file, the second at byte {at}: {JOINED}")
        if pages.get(serial, number) != number:
            raise AudioError(f"damaged: Ogg page {pages[serial]} is missing")
        begun, pages[serial], at = begun or not first, number + 1, end


# ---- FLAC ----


def check_flac(data, start: int) -> int:
    """The number of samples by the last frame's header, which STREAMINFO must claim, too."""
    if len(data) < start + 42:
        raise AudioError("truncated: shorter than its FLAC header")
    if others := data.each(b"fLaC[\x00\x80]\x00\x00\x22", start + 4):
        at = others[0]
        raise AudioError(f"several FLAC streams joined in one file, the second at byte {at}: {JOINED}")
    info = data[start + 8 : start + 42]
    block, largest = struct.unpack(">H", info[:2])[0], int.from_bytes(info[7:10], "big")
    claimed = int.from_bytes(info[13:18], "big") & (1 << 36) - 1
    # the header of the last frame lies in the last bytes; what looks like one by chance is told by its CRC
    tail = data[max(start, len(data) - (largest + 1024 if largest else 1 << 16)) : len(data)]
    found = []
    for sync in re.finditer(rb"(?=\xff[\xf8\xf9].{5})", tail, re.DOTALL):
        if end := flac_frame_end(tail, sync.start(), block):
            found.append((sync.start(), end))
    if not claimed:
        raise AudioError(f"its FLAC header tells no length (of a writer that was cut off): {JOINED}")
    if claimed in (end for _, end in found):
        return claimed
    for at, end in reversed(found):
        if crc(tail[at:-2], 0x8005, 16) == int.from_bytes(tail[-2:], "big"):
            raise AudioError(f"its header claims {claimed} samples, its frames hold {end}: decode it anew")
    return claimed


def flac_frame_end(tail: bytes, at: int, block: int) -> int | None:
    """The number of the sample after the frame that begins at `at`; None where none does. block: samples of
    all frames but the last, where their size is fixed."""
    number_at, lead = at + 4, tail[at + 4]
    more = 0 if lead < 0x80 else 8 - (lead ^ 0xFF).bit_length() - 1  # bytes that follow, as in UTF-8
    if lead >= 0x80 and not 1 <= more <= 6:
        return None
    number = lead if not more else lead & (0x3F >> more)
    for byte in tail[number_at + 1 : number_at + 1 + more]:
        number = number << 6 | byte & 0x3F
    end, code, rate = number_at + 1 + more, tail[at + 2] >> 4, tail[at + 2] & 15
    extra = 1 if code == 6 else 2 if code == 7 else 0
    if code in (6, 7):
        size = int.from_bytes(tail[end : end + extra], "big") + 1
    else:
        size = (0, 192, *(576 << k for k in range(4)), 0, 0, *(256 << k for k in range(8)))[code]
    end += extra + {12: 1, 13: 2, 14: 2}.get(rate, 0)
    if not size or end >= len(tail) or crc(tail[at:end], 0x07, 8) != tail[end]:
        return None
    return size + (number if tail[at + 1] & 1 else number * block)


def crc(data: bytes, polynomial: int, bits: int) -> int:
    value, top, mask = 0, 1 << bits - 1, (1 << bits) - 1
    for byte in data:
        value ^= byte << bits - 8
        for _ in range(8):
            value = (value << 1 ^ (polynomial if value & top else 0)) & mask
    return value


# ---- MPEG audio ----

# kbit/s by index, of MPEG 1 layers 1 to 3 and of MPEG 2 and 2.5 layer 1 and layers 2, 3
RATES_1 = (
    (32, 64, 96, 128, 160, 192, 224, 256, 288, 320, 352, 384, 416, 448),
    (32, 48, 56, 64, 80, 96, 112, 128, 160, 192, 224, 256, 320, 384),
    (32, 40, 48, 56, 64, 80, 96, 112, 128, 160, 192, 224, 256, 320),
)
RATES_2 = (
    (32, 48, 56, 64, 80, 96, 112, 128, 144, 160, 176, 192, 224, 256),
    (8, 16, 24, 32, 40, 48, 56, 64, 80, 96, 112, 128, 144, 160),
)


@functools.lru_cache(maxsize=1 << 10)
def mpeg_frame(head: bytes) -> tuple[int, int, tuple[int, int]] | None:
    """(bytes, samples, (layer, rate in Hz)) of the frame that begins with these 4 bytes; None for none."""
    if len(head) < 4 or head[0] != 0xFF or head[1] & 0xE0 != 0xE0:
        return None
    version, layer = head[1] >> 3 & 3, 4 - (head[1] >> 1 & 3)  # version: 0 is 2.5, 2 is 2, 3 is 1
    index, rate_index, padding = head[2] >> 4, head[2] >> 2 & 3, head[2] >> 1 & 1
    if version == 1 or layer == 4 or index in (0, 15) or rate_index == 3:
        return None
    table = RATES_1[layer - 1] if version == 3 else RATES_2[layer > 1]
    rate = (44100, 48000, 32000)[rate_index] >> {3: 0, 2: 1, 0: 2}[version]
    samples = 384 if layer == 1 else 576 if layer == 3 and version != 3 else 1152
    if layer == 1:
        return (12000 * table[index - 1] // rate + padding) * 4, samples, (layer, rate)
    return samples // 8 * 1000 * table[index - 1] // rate + padding, samples, (layer, rate)


def check_mpeg(data, at: int) -> int | None:
    """The samples of all frames, which a Xing or Info header must claim, too."""
    size, claimed, total, kind, samples = len(data), None, 0, None, 1152
    marks = data.each(b"Xing|Info", at)
    while at + 4 <= size:
        frame = mpeg_frame(data[at : at + 4])
        if frame is None or (kind and frame[2] != kind):
            nearest = next_frame(data, at, kind)
            if nearest is None:
                return None if kind is None else counted(total, claimed, samples)
            at = nearest
            continue
        length, samples, kind = frame
        if at + length > size:
            return counted(total, claimed, samples)
        if marks and marks[0] < at + length:
            mark = marks.pop(0)
            if mark < at + 64 and total:
                raise AudioError(f"several MP3 files joined in one, the second at byte {at}: {JOINED}")
            if mark < at + 64:
                flags, frames = data.unpack(">II", mark + 4)
                claimed = frames if flags & 1 else None
                total -= samples  # a frame without audio
        total, at = total + samples, at + length
    return counted(total, claimed, samples) if kind else None


def next_frame(data, at: int, kind) -> int | None:
    """Where a frame of this kind (None: of any) begins after `at`, and another right behind it. Raises
    AudioError for a run of frames of another kind: another recording."""
    while (at := data.find(b"\xff", at + 1)) >= 0 and at + 4 <= len(data):
        run, first, here = 0, None, at
        while run < 3 and (frame := mpeg_frame(data[here : here + 4])) and frame[2] == (first or frame[2]):
            run, first, here = run + 1, frame[2], here + frame[0]
        if run < 2 or (run == 2 and here < len(data)):
            continue
        if kind and first != kind:
            raise AudioError(f"MPEG frames of {kind[1]} and of {first[1]} Hz joined in one file: {JOINED}")
        return at
    return None


def counted(total: int, claimed: int | None, samples: int) -> int:
    frames = total // samples
    if claimed is not None and not claimed - 1 <= frames <= claimed + 2:  # some count their own frame, too
        told = f"its Xing header claims {claimed} frames, the file holds {frames}"
        raise AudioError(f"truncated: {told}" if frames < claimed else f"{told}: {JOINED}")
    return total
