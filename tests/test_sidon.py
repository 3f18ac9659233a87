"""SIDON's surroundings, with a stand-in for SIDON whose right answer is known (tests/helpers/standin.py)."""

import numpy as np
import pytest
import torch
from helpers import standin
from helpers.standin import buzz
from scipy.signal import fftconvolve

from snac48 import sidon as sidon_module
from snac48.cli import UserError
from snac48.sidon import NOTHING, RATE, Fbank, HighPass, Resampler, Sidon, SincResampler, front_end


@pytest.fixture(scope="session")
def sidon(sidon_dir) -> Sidon:
    return Sidon(sidon_dir, device="cpu", batch_size=4)


def burst_lags(x, rate: int, y, centres) -> np.ndarray:
    """How late each burst's envelope is in y (48 kHz), in samples: the peak of their cross-correlation."""
    up = Resampler(rate, RATE)
    x = np.concatenate([up(x), up(NOTHING, last=True)])
    x, y = (np.sqrt(np.maximum(0, fftconvolve(np.square(s), np.ones(480) / 480, "same"))) for s in (x, y))
    found = []
    for c in centres:
        a, b = round((c - 0.2) * RATE), round((c + 0.2) * RATE)
        template = x[a:b] - x[a:b].mean()  # 800 samples of play on each side
        found.append(int(np.argmax(fftconvolve(y[a - 800 : b + 800], template[::-1], "valid"))) - 800)
    return np.array(found)


def in_band_db(x, rate: int, top: int) -> float:
    """RMS below top / 2."""
    down = Resampler(rate, top)
    y = np.concatenate([down(x), down(NOTHING, last=True)])
    return float(10 * np.log10(np.mean(np.square(y.astype(np.float64)))))


def published_recipe(sidon: Sidon, x, rate: int) -> np.ndarray:
    """The chunking that circulates, after its description: 60 s pieces padded by 40, five latent frames
    carried over, 4,800 samples cut from later pieces, 150 from the first, a 1.5 s tail, the gain left in."""
    front = SincResampler(rate, 16000)
    high_pass = HighPass(rate)
    x16 = np.concatenate([front(high_pass(0.9 * x / np.abs(x).max())), front(NOTHING, last=True)])
    x16 = np.pad(x16, (0, 24000))
    out, carried = [], None
    for start in range(0, len(x16), 60 * 16000):
        fbank = Fbank()  # pads by 40 itself
        fbank(x16[start : start + 60 * 16000])
        with torch.inference_mode():
            latents = sidon.extractor(torch.from_numpy(fbank.features()[None]))["last_hidden_state"]
            both = latents if carried is None else torch.cat([carried, latents], dim=1)
            wave = sidon.decoder(both.transpose(1, 2))[0, 0].numpy()
        out.append(wave[150:] if carried is None else wave[4800:])
        carried = latents[:, -5:]
    return np.concatenate(out)


# ---- the front end ----

# torchaudio 2.11.0, double precision: resample(highpass_biquad(x, rate, 50.), rate, 16000) of `sweep(rate)`
TORCHAUDIO = {
    8000: [0.14504, 0.33094, 0.5453, 0.01971, -0.23939, 0.02295],
    22050: [0.15188, -0.4261, -0.82297, -0.30798, 0.0984, 0.0002],
    24000: [0.15284, -0.3649, -0.60267, 0.00703, 0.1017, 0.00013],
    44100: [0.1625, 0.17996, 0.8079, -0.00319, 5e-05, -0.0],
    48000: [0.16436, -0.11002, 0.01081, 0.00012, 0.0, 0.0],
    192000: [0.23169, 0.24087, -1e-05, -0.0, -0.0, 0.0],
}


def sweep(rate: int) -> np.ndarray:
    t = np.arange(rate // 4) / rate
    return (
        0.9 * np.sin(2 * np.pi * (60 * t + 0.45 * rate * 2 * t * t)) * np.cos(2 * np.pi * 7 * t) + 0.05
    ).astype(np.float32)


@pytest.mark.parametrize("rate", TORCHAUDIO)
def test_filters_are_torchaudios(rate):
    x = sweep(rate)
    high_pass, to_16k = HighPass(rate), SincResampler(rate, 16000)
    y = [to_16k(high_pass(x[i : i + 997])) for i in range(0, len(x), 997)] + [to_16k(NOTHING, last=True)]
    y = np.concatenate(y)
    assert len(y) == 4000
    np.testing.assert_allclose(y[[5, 333, 1000, 2000, 3000, 3990]], TORCHAUDIO[rate], atol=2e-5)


@pytest.mark.parametrize("n", [1, 320, 321, 1600, 16000, 32007, 16000 * 21])
def test_front_end_is_seamless(n):
    """Same audio, same numbers, built without network; 21 s covers the pieces."""
    from transformers import SeamlessM4TFeatureExtractor

    rng = np.random.default_rng(n)
    x = (rng.standard_normal(n) * np.abs(np.sin(np.arange(n) / 3000)) * 0.1).astype(np.float32)
    x[n // 2 : n // 2 + n // 8] = 0
    fbank = Fbank()
    for i in range(0, n, 7777):
        fbank(x[i : i + 7777])
    ours = fbank.features()
    assert ours.shape == (-(-n // 320), 160) and np.isfinite(ours).all()
    if n > 320:  # of one mel frame the reference divides by no variance and gives NaN
        reference = SeamlessM4TFeatureExtractor(padding_value=1.0)
        padded = np.pad(x, (40, 40 + -n % 320))
        theirs = reference(padded, sampling_rate=16000, return_tensors="np")["input_features"][0]
        np.testing.assert_allclose(ours, theirs, atol=2e-4)


# ---- alignment, level, length, seams ----


@pytest.mark.parametrize("rate", [8000, 16000, 22050, 24000, 44100])
def test_lag_level_length(sidon, rate):
    lags = []
    for seed in range(3):
        x, centres = buzz(rate, 15.013, seed)
        x *= [1.0, 0.02, 4.0][seed]  # level must come back whatever it was
        y, info = sidon.upsample(x, rate)
        assert len(y) == (2 * len(x) * RATE + rate) // (2 * rate) and y.dtype == np.float32
        lags.append(burst_lags(x, rate, y, centres))
        top = min(rate, 16000)
        assert abs(in_band_db(y, RATE, top) - in_band_db(x, rate, top)) < 0.1
        assert info["envelope_corr"] > 0.9 and abs(info["lag_samples"]) < 48
    assert abs(np.mean(lags)) < 24, np.mean(lags)


def test_padding_is_the_delay(sidon, monkeypatch):
    """3 * (pad - 40): 160 zeros in front are 360 samples late."""
    monkeypatch.setattr(sidon_module, "PAD", 160)
    x, centres = buzz(24000, 15.013)
    y, info = sidon.upsample(x, 24000)
    assert 320 < np.mean(burst_lags(x, 24000, y, centres)) < 420
    assert 320 < info["lag_samples"] < 420  # and the manifest would say so


def test_published_recipe_fails_the_same_checks(sidon):
    """150 samples early, 1.5 s too long, another level: the checks above see each of them."""
    lags = []
    for seed in range(3):
        x, centres = buzz(24000, 20.013, seed)
        y = published_recipe(sidon, x, 24000)
        lags.append(burst_lags(x, 24000, y, centres))
    assert -190 < np.mean(lags) < -110, np.mean(lags)
    assert len(y) - 2 * len(x) > 1.4 * RATE
    assert abs(in_band_db(y, RATE, 16000) - in_band_db(x, 24000, 16000)) > 1


def one_pass(sidon: Sidon, x, rate: int) -> np.ndarray:
    """The whole file through extractor and decoder at once, raw."""
    features, _ = front_end(lambda: iter([x]), rate)
    with torch.inference_mode():
        latents = sidon.extractor(torch.from_numpy(features[None]))["last_hidden_state"]
        return sidon.decoder(latents.transpose(1, 2))[0, 0].numpy()


def test_130_seconds_equal_one_pass(sidon):
    x, _ = buzz(16000, 130.007, floor=0.05)
    whole = one_pass(sidon, x, 16000)[: 3 * len(x)]
    y, info = sidon.upsample(x, 16000)
    assert len(y) == 3 * len(x)
    assert np.abs(y / np.float32(info["scale"]) - whole).max() < 1e-4
    # the published chunking, put where it belongs, is another signal around 60 s and 120 s
    broken = np.pad(published_recipe(sidon, x, 16000), (150, 0))[: len(whole)]
    for seam in (60, 120):
        near = slice(round((seam - 0.2) * RATE), round((seam + 0.2) * RATE))
        assert np.abs(broken[near] - whole[near]).max() > 1e-2 * np.abs(whole).max()


@pytest.mark.parametrize("what", ["EDGE", "CONTEXT"])
def test_context_matters(sidon, monkeypatch, what):
    """Without real context for decoder or extractor the seams are back, and the test above sees it."""
    monkeypatch.setattr(sidon_module, what, 0)
    x, _ = buzz(16000, 70, floor=0.05)
    y, info = sidon.upsample(x, 16000)
    assert np.abs(y / np.float32(info["scale"]) - one_pass(sidon, x, 16000)[: len(y)]).max() > 1e-3


def test_odd_inputs(sidon):
    x, _ = buzz(24000, 2)
    silent, info = sidon.upsample(np.zeros(24000), 24000)
    assert len(silent) == 48000 and not silent.any() and info["envelope_corr"] == 1.0
    for name, audio, rate in [
        ("dc", np.full(24000, 0.5), 24000),
        ("clipped", np.clip(x * 100, -1, 1), 24000),
        ("0.1 s", x[:2400], 24000),
        ("one sample", x[6000:6001], 24000),
        ("stereo", np.stack([x, -0.5 * x]), 24000),
        ("torch", torch.from_numpy(x), 24000),
        ("8 kHz", x[:8000], 8000),
        ("prime rate", x, 22051),
        ("192 kHz", np.tile(x, 4), 192000),
    ]:
        y, info = sidon.upsample(audio, rate)
        n = np.shape(audio)[-1]
        assert len(y) == (2 * n * RATE + rate) // (2 * rate) and np.isfinite(y).all(), name
        assert np.isfinite(list(info.values())).all(), (name, info)
    mono, _ = sidon.upsample(0.25 * x, 24000)
    np.testing.assert_allclose(sidon.upsample(np.stack([x, -0.5 * x]), 24000)[0], mono, atol=1e-6)
    for bad in (np.zeros(0), np.array([0.0, np.nan])):
        with pytest.raises(ValueError, match="finite"):
            sidon.upsample(bad, 24000)


# ---- loading ----


class NarrowExtractor(standin.Extractor):
    def __init__(self):
        super().__init__(512)


class SingleExtractor(standin.Extractor):
    def forward(self, input_features: torch.Tensor) -> dict[str, torch.Tensor]:
        b, t, _ = input_features.shape
        assert b == 1, "traced for one utterance"
        energy = input_features.reshape(b, t, 2, 80).mean(dim=3)
        return {"last_hidden_state": torch.cat([energy, torch.zeros(b, t, self.width - 2)], dim=2)}


def test_wrong_files_are_one_sentence(tmp_path, sidon_dir):
    def refusal(*args, **kwargs) -> str:
        with pytest.raises(UserError) as e:
            Sidon(*args, **kwargs)
        assert "\n" not in str(e.value)
        return str(e.value)

    narrow = standin.build(tmp_path / "narrow", extractor=NarrowExtractor())
    assert "[1, 50, 512] where SIDON's gives [1, 50, 1024]" in refusal(narrow)
    short = standin.build(tmp_path / "short", lost=960)
    assert "the decoder gave shape [1, 1, 47040]" in refusal(short)
    cuda = standin.build(tmp_path / "cuda", "cuda")
    assert "lacks feature_extractor_cpu.pt and decoder_cpu.pt" in refusal(cuda)
    assert "does not exist" in refusal(tmp_path / "none") or "no .pt file" in refusal(tmp_path / "none")
    (tmp_path / "text").mkdir()
    for name in ("feature_extractor_cpu.pt", "decoder_cpu.pt"):
        (tmp_path / "text" / name).write_text("hello")
    assert "SIDON cannot be loaded from" in refusal(tmp_path / "text")
    assert "no full commit SHA" in refusal(revision="main")
    assert "reached" in refusal(revision="0" * 40)
    good = {p.name: sidon_module.sha256_of(p) for p in sidon_dir.glob("*.pt")}
    Sidon(sidon_dir, sha256=good)
    assert "lists " + "0" * 64 in refusal(sidon_dir, sha256=good | {"decoder_cpu.pt": "0" * 64})
    if not torch.cuda.is_available():
        assert "torch sees 0 GPU(s) here" in refusal(sidon_dir, device="3")


def test_released_decoder_is_26_samples_short(tmp_path, sidon):
    """Its transposed convolutions of stride 5 and 3 drop 26 samples at the end; we fill them with zeros."""
    short = Sidon(standin.build(tmp_path, lost=26))
    x, _ = buzz(16000, 2)
    a, b = sidon.upsample(x, 16000)[0], short.upsample(x, 16000)[0]
    assert len(a) == len(b) == 96000 and not b[-26:].any()
    np.testing.assert_allclose(a[:-26], b[:-26], rtol=1e-3, atol=1e-6)


def test_batches(tmp_path, sidon):
    x = np.stack([front_end(lambda s=s: iter([buzz(16000, 3, s)[0]]), 16000)[0] for s in range(4)])
    together = np.concatenate(list(sidon.stream(x)), axis=1)
    singly = [np.concatenate(list(sidon.stream(x[i : i + 1])), axis=1)[0] for i in range(4)]
    np.testing.assert_allclose(together, singly, atol=1e-6)
    assert sidon.batch_size == 4 and sidon.no_batches is None
    single = Sidon(standin.build(tmp_path, extractor=SingleExtractor()), batch_size=4)
    assert single.batch_size == 1 and "traced for one utterance" in single.no_batches
