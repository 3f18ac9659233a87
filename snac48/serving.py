"""The language model's side of a server: token ids become codes, samples become 16-bit PCM.

    tokens, stream = SpeechTokens(tts.geometry), tts.open_stream(heads=["48k"])
    for token in language_model:                                 # ids, one after the other
        send(pcm16(stream.push(tokens.push([token]))[1]))        # b"" until sound is settled
    send(pcm16(stream.finish()[1]))

Models of the Orpheus kind speak seven tokens a frame, in the order c0 c1 c2 c2 c1 c2 c2 (tokens.py), each
with its slot in it: id = base + 10 + 4096 * slot + code, where base is the id of <custom_token_0>."""

import threading
from collections import Counter

import numpy as np
import torch

from .codec import Geometry, InputError
from .tokens import slot_columns

POLICIES = ("drop", "stop")


class SpeechTokens:
    """Reads token ids frame by frame, whatever a model emits.

    base: id of <custom_token_0>; offset: custom tokens before the first code; end: ids that end the speech.
    bad: what a frame with a slot missing or out of order costs: "drop" leaves it out and reads on at the
    next slot 0, "stop" ends the speech there. Ids that are no codes are passed over. counts says what there
    was: frames, dropped, foreign ids, ids after the end, tokens of an unfinished frame. ended: nothing more
    is read."""

    def __init__(self, geometry: Geometry, base=128256, offset=10, end=(128258,), bad="drop"):
        if bad not in POLICIES:
            raise InputError(f"bad={bad!r}: a bad frame can cost {' or '.join(POLICIES)}")
        self.size, self.first, self.end, self.bad = geometry.codebook_size, base + offset, set(end), bad
        self.columns = slot_columns(list(geometry.vq_strides))
        self.slots = sum(map(len, self.columns))
        self.frame, self.ended, self.counts = [], False, Counter()

    def push(self, ids) -> list:
        """Any number of ids -> codes [K] of [1, T_k] of the frames that they complete; T_k may be 0."""
        frames = [frame for token in ids if (frame := self._take(int(token)))]
        return codes_of(frames, self.columns)

    def finish(self) -> None:
        """No more ids come: a frame that is not whole is counted, and left out."""
        self._lose("unfinished", len(self.frame))
        self.ended = True

    def _take(self, token: int) -> list | None:
        """The frame that this id completes."""
        slot, code = divmod(token - self.first, self.size)
        if self.ended:
            self.counts["after the end"] += 1
        elif token in self.end:
            self.finish()
        elif not 0 <= slot < self.slots:
            self.counts["foreign"] += 1
        elif slot != len(self.frame):
            if self.frame or self.bad == "stop":
                self._lose("dropped", 1)
            self.ended = self.bad == "stop"
            self.frame = [code] if slot == 0 and not self.ended else []
        else:
            self.frame.append(code)
            if len(self.frame) == self.slots:
                whole, self.frame = self.frame, []
                self.counts["frames"] += 1
                return whole
        return None

    def _lose(self, what: str, n: int) -> None:
        self.frame = []
        if n:
            self.counts[what] += n


def codes_of(frames: list, columns: list[list[int]]) -> list:
    """Frames, lists of a code a slot -> codes [K] of [1, T_k]."""
    whole = torch.tensor(frames, dtype=torch.long).view(-1, sum(map(len, columns)))
    return [whole[:, own].reshape(1, -1) for own in columns]


def pcm16(audio) -> bytes:
    """Samples -1 to 1 of one utterance as 16-bit little-endian PCM."""
    x = audio.detach().float().cpu().numpy().reshape(-1)
    return np.clip(np.rint(x * 32767), -32768, 32767).astype("<i2").tobytes()


class Converter:
    """In the place of `convert_to_audio(multiframe, count)` of such servers; one for each request.

    multiframe: codes 0 to 4095 of the last frames, slot after slot; count: codes so far. They decode a
    window of four frames a call and cut its middle out; this pushes what is new into a stream, so there are
    no seams, and nothing is computed twice. Returned is 16-bit PCM at the head's rate, or None where
    nothing is settled yet. Frames that hold anything but codes are left out, and counted in `dropped`."""

    def __init__(self, tts, head="48k", noise_seed=0):
        self.tts, self.head, self.seed = tts, head, noise_seed
        self.columns, self.size = slot_columns(list(tts.geometry.vq_strides)), tts.geometry.codebook_size
        self.stream, self.seen, self.dropped = tts.open_stream(1, noise_seed, [head]), 0, 0
        self.lock = threading.Lock()

    def __call__(self, multiframe, count: int) -> bytes | None:
        slots = sum(map(len, self.columns))
        with self.lock:
            if count // slots < self.seen:  # another utterance has begun
                self.stream, self.seen = self.tts.open_stream(1, self.seed, [self.head]), 0
            new = count // slots - self.seen
            frames = [multiframe[i : i + slots] for i in range(0, len(multiframe) - slots + 1, slots)]
            if new > len(frames):
                raise InputError(f"count {count}: {new} new frames, but multiframe holds {len(frames)}")
            frames = frames[len(frames) - new :]
            good = [list(f) for f in frames if all(0 <= code < self.size for code in f)]
            self.seen, self.dropped = self.seen + new, self.dropped + len(frames) - len(good)
            return self._bytes(self.stream.push(codes_of(good, self.columns)))

    def finish(self) -> bytes | None:
        """The last 0.2 s, which wait for codes that don't come."""
        with self.lock:
            self.seen = 0
            return self._bytes(self.stream.finish())

    def _bytes(self, audio) -> bytes | None:
        return pcm16(next(x for x in audio if x is not None)) or None
