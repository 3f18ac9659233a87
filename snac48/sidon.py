"""SIDON, the speech restorer: any rate in, 48 kHz out, aligned with the source, at its level, as long as it.

    from snac48.sidon import Sidon
    sidon = Sidon(device="0")                            # the pinned revision from the hub, or
    sidon = Sidon("models/sidon", device="cpu")          # a folder with the same files
    audio_48k, info = sidon.upsample(audio, 24000)       # float32 [n] -> float32 [round(n * 48000 / rate)]

Two TorchScript modules do the work: features [1, T, 160] at 50 Hz -> latents [1, T, 1024], and these as
[1, 1024, T] -> wave [1, 1, 960 T]. Here is what has to be right around them: front end, chunks, alignment,
level, and the measuring of each.
"""

import functools
import hashlib
import itertools
import math
import re
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from .audio import resampled_length
from .cli import UserError, first_line, pick_device

SIDON_REPO = "sarulab-speech/sidon-v0.1"
# The commit, and its files' SHA-256, as independent public projects record them (we had no hub to look at;
# the _cpu sums are recorded twice, the _cuda sums once). A mismatch stops the run and shows both sums.
SIDON_REVISION = "b3b02d8bbd55fdbc410e6e46e76ef95ace4fbf52"
SIDON_SHA256 = {
    "feature_extractor_cpu.pt": "fd9abc906a9048b3c047bd3d246a25f6485d09c2d6bb85e098f527f844efc019",
    "decoder_cpu.pt": "34dcc80fab75bd1336369ba5b2063f6da475887aa824db94b495c4059c5fdea4",
    "feature_extractor_cuda.pt": "c3739c332da4ce00cc9019a328bcb19ee8f863ac5eb0b52386672772aab836ce",
    "decoder_cuda.pt": "a789c71f54ca7db4b28becdc87c5e8b9260cb568cca462d502c54900db74a1cc",
}

RATE = 48000
FRAME = 960  # samples at 48 kHz a feature frame (50 Hz)
PAD = 40  # zeros before the 16 kHz signal; output delay = 3 * (PAD - 40) = 0 samples at 48 kHz
CHUNK = 3000  # feature frames (60 s) a pass of the feature extractor ...
CONTEXT = 250  # ... which also sees this many real frames (5 s) on each side
EDGE = 10  # latent frames on each side that a decoded sample depends on
LOST = 48  # samples the decoder may be short of 960 T: the released one's odd strides lose 26 at the very end
HEAD = 600 * 16000  # samples (10 min) that lags are measured on; envelope_corr and level use all
NOTHING = np.zeros(0, np.float32)


# ---- resampling and the high-pass, piece by piece ----


class Resampler:
    """soxr VHQ (band-limited, linear phase, no delay) over pieces; the last piece makes the length exact."""

    def __init__(self, rate: int, new_rate: int):
        import soxr

        self.rates, self.taken, self.given = (rate, new_rate), 0, 0
        same = rate == new_rate
        self.stream = None if same else soxr.ResampleStream(rate, new_rate, 1, "float32", "VHQ")

    def __call__(self, x, last: bool = False):
        self.taken += len(x)
        y = x if self.stream is None else self.stream.resample_chunk(np.ascontiguousarray(x), last=last)
        if last:
            due = resampled_length(self.taken, *self.rates) - self.given
            y = np.pad(y[:due], (0, max(0, due - len(y))))
        self.given += len(y)
        return y


@functools.lru_cache(8)
def sinc_kernel(old: int, new: int):
    """[taps, new], taps = 2 * width + old: output sample j of a block of `old` input samples is column j."""
    base = min(old, new) * 0.99
    width = math.ceil(6 * old / base)
    t = -np.arange(new)[:, None] / new + np.arange(-width, width + old) / old
    t = np.clip(t * base, -6, 6)
    return (np.sinc(t) * np.cos(t * np.pi / 12) ** 2 * base / old).T.astype(np.float32)


class SincResampler:
    """torchaudio.functional.resample (Hann-windowed sinc, width 6, rolloff 0.99) over pieces, in numpy.
    SIDON was trained behind it, and soxr's sharper filter shifts the two top mel bins by 0.1 to 0.3 standard
    deviations. torchaudio itself is not used: without its C extension, which wants CUDA's libraries, it
    imports only through a stub, and its high-pass then costs 0.30 CPU seconds an audio second."""

    def __init__(self, rate: int, new_rate: int):
        common = math.gcd(rate, new_rate)
        self.old, self.new = rate // common, new_rate // common
        self.kernel = sinc_kernel(self.old, self.new)
        width = (len(self.kernel) - self.old) // 2
        self.tail = np.zeros(width + self.old, np.float32)
        self.buffer, self.taken, self.given = self.tail[:width], 0, 0

    def __call__(self, x, last: bool = False):
        self.taken += len(x)
        self.buffer = np.concatenate([self.buffer, x, self.tail] if last else [self.buffer, x])
        taps = len(self.kernel)
        blocks = max(0, (len(self.buffer) - taps) // self.old + 1)
        if not blocks:
            return NOTHING
        windows = np.lib.stride_tricks.sliding_window_view(self.buffer, taps)[:: self.old]
        step = 1 + (1 << 20) // taps  # [blocks, taps] @ [taps, new], a few MB at a time
        parts = [np.ascontiguousarray(windows[i : i + step]) @ self.kernel for i in range(0, blocks, step)]
        y = np.concatenate(parts).reshape(-1)
        self.buffer = self.buffer[blocks * self.old :]
        self.given += len(y)
        excess = self.given - -(-self.taken * self.new // self.old) if last else 0
        return y[: len(y) - excess]


class HighPass:
    """torchaudio.functional.highpass_biquad(x, rate, 50) over pieces, in double precision."""

    def __init__(self, rate: int):
        w = 2 * math.pi * 50 / rate
        alpha, cos = math.sin(w) / (2 * 0.707), math.cos(w)
        self.b = np.array([(1 + cos) / 2, -1 - cos, (1 + cos) / 2]) / (1 + alpha)
        self.a = np.array([1 + alpha, -2 * cos, 1 - alpha]) / (1 + alpha)
        self.state = np.zeros(2)

    def __call__(self, x):
        from scipy.signal import lfilter

        y, self.state = lfilter(self.b, self.a, x.astype(np.float64), zi=self.state)
        return np.clip(y, -1, 1).astype(np.float32)  # the reference clamps


# ---- SIDON's front end ----


@functools.lru_cache(1)
def kaldi_mel_filters():
    """[257, 80]: Kaldi's triangles, 20 to 8000 Hz, straight in mel (losses.py has HTK's, straight in Hz)."""
    mel = lambda hz: 1127.0 * np.log(1.0 + hz / 700.0)
    edges = np.linspace(mel(20.0), mel(8000.0), 82)
    at = mel(np.arange(257) * 16000 / 512)[:, None]
    up = (at - edges[:-2]) / (edges[1:-1] - edges[:-2])
    down = (edges[2:] - at) / (edges[2:] - edges[1:-1])
    return np.maximum(0, np.minimum(up, down))


class Fbank:
    """SeamlessM4TFeatureExtractor(padding_value=1.0) over pieces of a 16 kHz signal, in numpy: the same
    numbers in a fifth of the time, and a 2-hour file needs no more memory than its features."""

    def __init__(self):
        self.window = np.hanning(400) ** 0.85  # povey
        self.buffer, self.rows, self.n = np.zeros(PAD, np.float32), [], 0

    def __call__(self, x) -> None:
        """25 ms frames every 10 ms: mean removed, pre-emphasis 0.97, log mel power of 16-bit samples."""
        self.n += len(x)
        x = np.concatenate([self.buffer, x])
        self.buffer = x[max(0, (len(x) - 400) // 160 + 1) * 160 :]
        for start in range(0, len(x) - 399, 1000 * 160):  # ten seconds at a time, for memory
            piece = x[start : start + 999 * 160 + 400].astype(np.float64) * 32768
            frames = np.lib.stride_tricks.sliding_window_view(piece, 400)[::160]
            frames = frames - frames.mean(axis=1, keepdims=True)
            frames[:, 1:] -= 0.97 * frames[:, :-1]
            frames[:, 0] *= 0.03
            spectrum = np.fft.rfft(frames * self.window, 512)
            mel = (spectrum.real**2 + spectrum.imag**2) @ kaldi_mel_filters()
            self.rows.append(np.log(np.maximum(mel, 1.192092955078125e-07)).astype(np.float32))

    def features(self):
        """[ceil(n / 320), 160] float32: per bin mean 0 and variance 1 over the file, two mel frames a row."""
        # zeros to a whole frame and no more: SIDON was trained without a silent tail that spoils the variance
        self(np.zeros(PAD + -self.n % 320, np.float32))
        rows = np.concatenate(self.rows)  # [mel frames, 80]
        rows -= rows.mean(axis=0, dtype=np.float64).astype(np.float32)
        variance = np.einsum("ij,ij->j", rows, rows, dtype=np.float64) / max(1, len(rows) - 1)
        rows /= np.sqrt(variance + 1e-7).astype(np.float32)
        if len(rows) % 2:
            rows = np.concatenate([rows, np.ones((1, 80), np.float32)])
        return rows.reshape(-1, 160)


class Band:
    """What is compared of a 16 kHz signal: RMS envelope at 2 kHz, and the waveform's first ten minutes."""

    def __init__(self):
        self.rest, self.envelope, self.head, self.n = NOTHING, [NOTHING], [NOTHING], 0

    def __call__(self, x) -> None:
        if self.n < HEAD:
            self.head.append(x[: HEAD - self.n])
        self.n += len(x)
        x = np.concatenate([self.rest, x])
        whole = len(x) // 8 * 8
        self.envelope.append(np.sqrt(np.square(x[:whole]).reshape(-1, 8).mean(axis=1)))
        self.rest = x[whole:]

    def done(self) -> tuple:
        """(envelope [n // 8], waveform)."""
        return np.concatenate(self.envelope), np.concatenate(self.head)


@dataclass
class Source:
    """What SIDON's output is compared with: its source, as the front end saw it."""

    rate: int  # Hz
    n: int  # samples
    peak_gain: float  # what brought its peak to 0.9
    silent: bool  # digital silence: SIDON is not asked
    band: tuple  # of Band.done()


def front_end(blocks, rate: int):
    """(features [T, 160] for SIDON, Source) of a recording: peak to 0.9, 50 Hz high-pass, 16 kHz, log mel.
    blocks(): a fresh iterator over mono float32 pieces (called twice: the peak comes first)."""
    n, peak = 0, 0.0
    for x in blocks():
        n, peak = n + len(x), max(peak, float(np.abs(x).max(initial=0.0)))
    silent = peak <= 1e-7
    gain = 1.0 if silent else 0.9 / peak
    high_pass, fbank, band = HighPass(rate), Fbank(), Band()
    common = math.gcd(rate, 16000)
    odd = rate * 16000 // common**2 > 4_000_000  # 44,099 Hz, say: the reference's kernel would take gigabytes
    to_16k, in_band = (Resampler if odd else SincResampler)(rate, 16000), Resampler(rate, 16000)
    for x in itertools.chain((high_pass(x * np.float32(gain)) for x in blocks()), [None]):
        last = x is None
        fbank(to_16k(NOTHING if last else x, last))
        band(in_band(NOTHING if last else x, last))
    return fbank.features(), Source(rate, n, gain, silent, band.done())


# ---- comparing SIDON's output with its source ----


def correlate(a, b, max_lag: int) -> tuple[float, float]:
    """(lag, correlation) at the peak of the cross-correlation, parabolic; lag > 0: b is late."""
    from scipy.fft import irfft, next_fast_len, rfft

    n = min(len(a), len(b))
    max_lag = min(max_lag, n - 1)
    if max_lag < 2:
        return 0.0, 0.0
    a, b = a[:n] - a[:n].mean(), b[:n] - b[:n].mean()
    norm = math.sqrt(float(np.dot(a, a)) * float(np.dot(b, b)))
    if norm < 1e-12:
        return 0.0, 0.0
    size = next_fast_len(n + max_lag, real=True)
    c = irfft(np.conj(rfft(a, size)) * rfft(b, size), size)
    c = np.concatenate([c[-max_lag:], c[: max_lag + 1]]) / norm
    k, shift = int(np.argmax(c)), 0.0
    if 0 < k < len(c) - 1 and (curve := c[k - 1] - 2 * c[k] + c[k + 1]) < 0:
        shift = 0.5 * float(c[k - 1] - c[k + 1]) / float(curve)
    return k - max_lag + shift, float(c[k])


def compare(source: tuple, output: tuple) -> dict:
    """Lag, correlation and level of SIDON's output against its source, each as Band.done() gives it.
    envelope_corr: Pearson, of 20 ms RMS envelopes, where they lie (not shifted). rms_scale: what brings the
    output to the source's RMS in its band. Lags are in samples at 48 kHz, > 0: the output is late."""
    n = min(len(source[0]), len(output[0]))
    fine = [source[0][:n], output[0][:n]]
    power = [np.square(np.pad(e, (0, -n % 40))).reshape(-1, 40).mean(axis=1) for e in fine]
    a, b = (float(p.sum()) for p in power)
    rms = [np.sqrt(p) - np.sqrt(p).mean() if n else p for p in power]
    squares = [float(np.dot(r, r)) for r in rms]
    flat = min(squares) < 1e-12  # a steady tone: nothing to correlate
    hann = np.hanning(52)[1:-1]  # 25 ms: the pitch periods of a vocoder lie anywhere
    smooth = [np.convolve(e[: HEAD // 8], hann / hann.sum(), "same") for e in fine if n]
    lag, _ = correlate(*smooth, 100) if n else (0.0, 0.0)  # within 50 ms
    band_lag, band_corr = correlate(source[1], output[1], 800)
    corr = float(max(squares) < 1e-12) if flat else float(np.dot(*rms)) / math.sqrt(squares[0] * squares[1])
    return {
        "lag_samples": round(lag * RATE / 2000, 1),
        "envelope_corr": round(corr, 5),
        "band_lag_samples": round(band_lag * RATE / 16000, 1),
        "band_corr": round(band_corr, 5),
        "rms_scale": math.sqrt(a / b) if a > 0 and b > 0 else 1.0,
    }


class Restored:
    """SIDON's raw output `waves`, fitted to its source: iterate once over float32 pieces, round(n * 48000 /
    rate) samples in all, then `measured()`; times the measured `scale` they have the source's level (the gain
    of the peak normalisation undone, the rest by RMS in the source's band)."""

    kind = "sidon"

    def __init__(self, source: Source, waves):
        self.source, self.waves, self.band = source, waves, Band()
        self.rate, self.n = source.rate, source.n

    def __iter__(self):
        source = self.source
        due = resampled_length(source.n, source.rate, RATE)
        # a source below 16 kHz has nothing up to 8 kHz: both are compared below its own Nyquist frequency
        rates = [RATE, 16000] if source.rate >= 16000 else [RATE, source.rate, 16000]
        steps = [Resampler(a, b) for a, b in itertools.pairwise(rates)]
        for x in [] if source.silent else self.waves:
            x = x[:due]
            due -= len(x)
            yield x
            for step in steps:
                x = step(x)
            self.band(x)
        for start in range(0, due, 60 * RATE):  # silence, or the decoder's last 26 samples
            yield np.zeros(min(60 * RATE, due - start), np.float32)
        if not source.silent:
            x = np.zeros(due, np.float32)
            for step in steps:
                x = step(x, last=True)
            self.band(x)

    def measured(self) -> dict:
        """scale, peak_gain and what `compare` finds; after the last piece."""
        source, gain = self.source, self.source.peak_gain  # of silence: 1
        found = compare(source.band, source.band if source.silent else self.band.done())
        return {"scale": found["rms_scale"] / gain, "peak_gain": gain} | found


# ---- the model ----


def sha256_of(path: Path) -> str:
    with open(path, "rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()


class Sidon:
    """SIDON on one device. `upsample(audio, rate) -> (audio_48k, info)`.

    sidon_dir: a folder with feature_extractor_{cpu,cuda}.pt and decoder_{cpu,cuda}.pt; None: the hub at
    `revision`. sha256: {file name: sum} to check the files against (known for the pinned revision).
    batch_size: utterances of one length a pass (`stream` takes them); the module is tried on two first, and
    `batch_size` is 1, `no_batches` the reason, where it does not take them.
    Raises UserError, with the exact cause, for whatever keeps SIDON from running. Nothing ever replaces it.
    """

    def __init__(self, sidon_dir=None, revision=SIDON_REVISION, device="cpu", sha256=None, batch_size=1):
        import torch

        self.device = str(pick_device(device))
        kind = "cpu" if self.device == "cpu" else "cuda"
        paths = self._find([f"feature_extractor_{kind}.pt", f"decoder_{kind}.pt"], sidon_dir, revision)
        if sha256 is None and sidon_dir is None and revision == SIDON_REVISION:
            sha256 = SIDON_SHA256
        self.sha256 = {path.name: sha256_of(path) for path in paths}
        for path in paths:
            found, expected = self.sha256[path.name], (sha256 or {}).get(path.name)
            if sha256 is not None and found != expected:
                listed = f"--sidon_sha256 or the pinned revision lists {expected or 'none for it'}"
                raise UserError(f"{path} is not the expected file: its SHA-256 is {found}, {listed}")
        try:
            modules = [torch.jit.load(str(path), map_location=self.device).eval() for path in paths]
        except (torch.jit.Error, RuntimeError, ValueError, OSError) as e:
            raise UserError(f"SIDON cannot be loaded from {paths[0].parent}: {first_line(e)}") from None
        self.extractor, self.decoder = modules
        self.no_batches = self._try_out(batch_size)
        self.batch_size = 1 if self.no_batches else batch_size

    @staticmethod
    def _find(names: list[str], sidon_dir, revision: str) -> list[Path]:
        both = " and ".join(names)
        if sidon_dir is not None:
            paths = [Path(sidon_dir) / name for name in names]
            missing = " and ".join(p.name for p in paths if not p.is_file())
            if missing:
                there = ", ".join(sorted(p.name for p in Path(sidon_dir).glob("*.pt"))) or "no .pt file"
                lacks = f"--sidon_dir {Path(sidon_dir)} lacks {missing} (it holds {there})"
                todo = f"add {both}, or choose the --device that yours are for"
                raise UserError(f"{lacks}; SIDON's files are traced for one kind of device: {todo}")
            return paths
        if not re.fullmatch(r"[0-9a-f]{40}", revision):
            what = "no full commit SHA (40 hex digits); a branch or tag can change under a long run"
            raise UserError(f"--sidon_revision {revision!r} is {what}")
        try:
            from huggingface_hub import hf_hub_download

            return [Path(hf_hub_download(SIDON_REPO, name, revision=revision)) for name in names]
        except Exception as e:  # the hub client raises many kinds; each of them means: no SIDON
            cause = f"{type(e).__name__}: {first_line(e)}"
            hint = f"without network, copy {both} into a folder and name it with --sidon_dir"
            fetch = f"SIDON could not be fetched from {SIDON_REPO} at {revision}"
            raise UserError(f"{fetch}: {cause}; {hint}") from None

    def _try_out(self, batch_size: int) -> str | None:
        """Run once, so that wrong files say so now; returns why they take no batches, None where they do."""
        x = np.random.default_rng(0).standard_normal((2, 50, 160)).astype(np.float32)
        single = np.concatenate([self._run(x[i : i + 1], 0, 50) for i in range(2)])
        if batch_size == 1:
            return None
        try:
            error = float(np.abs(self._run(x, 0, 50) - single).max() / max(1e-6, np.abs(single).max()))
        except UserError as e:
            return str(e)
        return f"a batch of two differs by {error:.1g} from one by one" if error > 1e-3 else None

    def _run(self, features, start: int, stop: int):
        """features [B, T, 160] -> raw output of frames start..stop: [B, 960 * (stop - start)] (LOST: fewer).
        The extractor sees CONTEXT frames beyond them on each side, the decoder EDGE, where there are any."""
        import torch

        lo, hi = max(0, start - CONTEXT), min(features.shape[1], stop + CONTEXT)
        left, right = max(lo, start - EDGE), min(hi, stop + EDGE)
        # TorchScript's optimiser changes the last bits after the first calls; on the CPU it gains nothing
        with torch.inference_mode(), torch.jit.optimized_execution(self.device != "cpu"):
            try:
                x = torch.from_numpy(features[:, lo:hi]).to(self.device)
                hidden = self.extractor(x)["last_hidden_state"]
                self._expect("feature extractor", hidden, [len(x), hi - lo, 1024])
                wave = self.decoder(hidden[:, left - lo : right - lo].transpose(1, 2).contiguous())
                self._expect("decoder", wave, [len(x), 1, FRAME * (right - left)], LOST)
                return wave[:, 0, FRAME * (start - left) : FRAME * (stop - left)].float().cpu().numpy()
            except torch.OutOfMemoryError as e:
                raise UserError(f"{first_line(e)}; try a smaller --batch_size, or a free GPU") from None
            except (torch.jit.Error, RuntimeError, KeyError, TypeError, AttributeError) as e:
                where = "its files run only on the kind of device they were traced for (_cpu, _cuda)"
                raise UserError(f"SIDON failed on {self.device}: {first_line(e)}; {where}") from None

    @staticmethod
    def _expect(what: str, tensor, shape: list[int], lost: int = 0) -> None:
        found = list(tensor.shape)
        if found[:-1] != shape[:-1] or not shape[-1] - lost <= found[-1] <= shape[-1]:
            raise UserError(f"the {what} gave shape {found} where SIDON's gives {shape}: not SIDON's files")

    def stream(self, features):
        """[B, T, 160] (one length) -> yields raw output [B, n], one a 60 s chunk, 960 samples a frame."""
        for start in range(0, features.shape[1], CHUNK):
            yield self._run(features, start, min(start + CHUNK, features.shape[1]))

    def upsample(self, audio, rate: int) -> tuple:
        """Restore one recording: float [n] or [channels, n], numpy or torch -> (float32 numpy [n_48k], info).
        n_48k = round(n * 48000 / rate); info: Restored.measured. Raises ValueError for no samples, or NaN."""
        x = np.asarray(audio.detach().cpu() if hasattr(audio, "detach") else audio, dtype=np.float32)
        x = x if x.ndim == 1 else x.mean(axis=0)
        if len(x) == 0 or not np.isfinite(x).all():
            raise ValueError(f"upsample needs at least one sample and only finite ones, got {len(x)}")
        pieces = lambda: (x[i : i + 10 * rate] for i in range(0, len(x), 10 * rate))
        features, source = front_end(pieces, rate)
        restored = Restored(source, (wave[0] for wave in self.stream(features[None])))
        audio_48k = np.concatenate(list(restored))
        info = restored.measured()
        return audio_48k * np.float32(info["scale"]), info
