"""precompute_48k.py and Sidon, with a stand-in for SIDON whose right answer is known (tests/standin.py).

python -m pytest tests/test_precompute.py
"""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

os.environ["HF_HUB_OFFLINE"] = "1"  # before anything imports the hub's client

import numpy as np
import pytest
import soundfile as sf
import torch
from conftest import children_cpu
from scipy.signal import fftconvolve

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import standin

import precompute_48k
from precompute_48k import Sidon
from snac48 import sidon as sidon_module
from snac48.cli import UserError
from snac48.sidon import NOTHING, RATE, Fbank, HighPass, Resampler, SincResampler, front_end
from snac48.work import SharedWork


@pytest.fixture(scope="session")
def modules(tmp_path_factory) -> Path:
    return standin.build(tmp_path_factory.mktemp("sidon"))


@pytest.fixture(scope="session")
def sidon(modules) -> Sidon:
    return Sidon(modules, device="cpu", batch_size=4)


def command(*args) -> list[str]:
    return [sys.executable, "-W", "ignore", str(ROOT / "precompute_48k.py"), *map(str, args)]


def run(*args, **kwargs) -> subprocess.CompletedProcess:
    return subprocess.run(command(*args), capture_output=True, text=True, timeout=120, **kwargs)


def rows_of(folder: Path, name: str = "manifest.jsonl") -> list[dict]:
    return [json.loads(line) for line in (folder / name).read_text().splitlines()]


def buzz(rate: int, seconds: float, seed: int = 0, floor: float = 0.01):
    """80 ms bursts of a flat-envelope buzz at random times: (float32 samples, the bursts' centres in s)."""
    rng = np.random.default_rng(seed)
    t = np.arange(round(rate * seconds)) / rate
    top = min(79, rate // 200 - 2)
    period = t[: rate // 50] if rate % 50 == 0 else t
    carrier = sum(np.cos(2 * np.pi * 100 * k * period + np.pi * k * k / top) for k in range(2, top)) / 11
    carrier = np.resize(carrier, len(t))
    centres = np.arange(0.5, seconds - 0.4, 0.5)
    centres = centres + rng.uniform(-0.1, 0.1, len(centres))
    envelope = np.full(len(t), floor)
    for c in centres:
        at = slice(max(0, round((c - 0.25) * rate)), round((c + 0.25) * rate))
        envelope[at] += rng.uniform(0.3, 1) * np.exp(-0.5 * ((t[at] - c) / 0.04) ** 2)
    return (0.1 * envelope * carrier).astype(np.float32), centres


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
    features = front_end(lambda: iter([x]), rate)["features"]
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


@pytest.mark.parametrize("what", ["EDGE", "context"])
def test_context_matters(modules, sidon, monkeypatch, what):
    """Without real context for decoder or extractor the seams are back, and the test above sees it."""
    if what == "EDGE":
        monkeypatch.setattr(sidon_module, "EDGE", 0)
    x, _ = buzz(16000, 70, floor=0.05)
    bare = sidon if what == "EDGE" else Sidon(modules, context=0)
    y, info = bare.upsample(x, 16000)
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


def test_wrong_files_are_one_sentence(tmp_path, modules, monkeypatch):
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
    assert "could not be fetched" in refusal(revision="0" * 40)
    good = {p.name: sidon_module.sha256_of(p) for p in modules.glob("*.pt")}
    Sidon(modules, sha256=good)
    assert "lists " + "0" * 64 in refusal(modules, sha256=good | {"decoder_cpu.pt": "0" * 64})
    if not torch.cuda.is_available():
        assert "torch sees 0 GPU(s) here" in refusal(modules, device="3")


def test_released_decoder_is_26_samples_short(tmp_path, sidon):
    """Its transposed convolutions of stride 5 and 3 drop 26 samples at the end; we fill them with zeros."""
    short = Sidon(standin.build(tmp_path, lost=26))
    x, _ = buzz(16000, 2)
    a, b = sidon.upsample(x, 16000)[0], short.upsample(x, 16000)[0]
    assert len(a) == len(b) == 96000 and not b[-26:].any()
    np.testing.assert_allclose(a[:-26], b[:-26], rtol=1e-3, atol=1e-6)


def test_batches(tmp_path, sidon, capsys):
    x = np.stack([front_end(lambda s=s: iter([buzz(16000, 3, s)[0]]), 16000)["features"] for s in range(4)])
    together = np.concatenate(list(sidon.stream(x)), axis=1)
    singly = [np.concatenate(list(sidon.stream(x[i : i + 1])), axis=1)[0] for i in range(4)]
    np.testing.assert_allclose(together, singly, atol=1e-6)
    assert sidon.batch_size == 4
    single = Sidon(standin.build(tmp_path, extractor=SingleExtractor()), batch_size=4)
    assert single.batch_size == 1
    assert "traced for one utterance" in capsys.readouterr().out


def test_who_shares_a_pass():
    """Equal lengths, at most batch_size; --batch_slack widens it, a chunk's length bounds it."""

    def groups(lengths, size, slack):
        args = SimpleNamespace(batch_slack=slack)
        job = SimpleNamespace(args=args, sidon=SimpleNamespace(batch_size=size))
        restored = [{"path": f"{i:02d}", "front": {"features": range(n)}} for i, n in enumerate(lengths)]
        found = precompute_48k.Job.batches(job, [*restored, {"path": "x", "long": "x.wav"}])
        assert found.pop() == [{"path": "x", "long": "x.wav"}]
        return [[len(r["front"]["features"]) for r in g] for g in found]

    assert groups([50, 70, 50, 50, 70], 2, 0.0) == [[50, 50], [50], [70, 70]]
    assert groups([50, 70, 50, 76], 8, 0.5) == [[50, 50, 70], [76]]
    assert groups([2990, 3010, 3010], 8, 1.0) == [[2990], [3010], [3010]]


# ---- the program ----


@pytest.fixture(scope="session")
def corpus(tmp_path_factory) -> Path:
    """150 short recordings of many kinds: more than two units."""
    root = tmp_path_factory.mktemp("corpus") / "audio"
    rates = [8000, 16000, 22050, 24000, 44100, 48000, 96000]
    for i in range(150):
        rate = rates[i % len(rates)]
        x, _ = buzz(rate, 1.0 + 0.3 * (i % 3), seed=i)
        folder = root / f"speaker{i % 4}"
        folder.mkdir(parents=True, exist_ok=True)
        kind = ["wav", "flac", "ogg", "mp3"][i % 4] if rate <= 48000 else "flac"
        subtype = {"wav": ["PCM_24", "FLOAT", "PCM_16"][i % 3]}.get(kind)
        channels = {"wav": [1, 2, 6][i % 3], "flac": 2}.get(kind, 1)
        x = np.stack([x] * channels, axis=1)
        sf.write(folder / f"{i:03d}.{kind}", x, rate, subtype=subtype)
    return root


def digest(folder: Path) -> dict:
    files = sorted(p for p in folder.rglob("*.wav"))
    return {str(p.relative_to(folder)): sidon_module.sha256_of(p) for p in files}


@pytest.fixture(scope="session")
def finished(corpus, modules, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("finished") / "out"
    r = run("--input_dir", corpus, "--output_dir", out, "--sidon_dir", modules, "--device", "cpu")
    assert r.returncode == 0, r.stderr
    return out


def test_whole_job(finished, corpus):
    rows = rows_of(finished)
    assert len(rows) == 150 == len({r["path"] for r in rows}) == len({r["target"] for r in rows})
    for row in rows:
        info, source = sf.info(finished / row["target"]), sf.info(corpus / row["path"])
        assert (info.samplerate, info.channels, info.subtype) == (RATE, 1, "PCM_16")
        assert info.frames == row["samples"] and row["source_rate"] == source.samplerate
        assert row["kind"] == ("copied" if source.samplerate >= RATE else "sidon")
        assert abs(info.frames / RATE - row["seconds"]) < 1 / RATE and row["faithful"]
    summary = json.loads((finished / "summary.json").read_text())
    assert summary["files"] == 150 and summary["skipped"] == 0 and summary["kinds"]["sidon"] == 108
    events = rows_of(finished, "metrics.jsonl")
    assert events[0]["event"] == "start" and events[-1]["event"] == "end" and "audio_s_per_s" in events[-2]
    copied = next(r for r in rows if r["kind"] == "copied" and r["source_rate"] == RATE)
    x = sf.read(corpus / copied["path"], always_2d=True)[0].mean(axis=1)
    y = sf.read(finished / copied["target"])[0]
    np.testing.assert_allclose(y, x, atol=1 / 32768)
    assert (copied["gain"], copied["level"], copied["lag_samples"], copied["envelope_corr"]) == (1, 1, 0, 1)


def test_killed_twice_with_others_at_work(finished, corpus, modules, tmp_path):
    """Three processes on one folder, one of them killed -9 twice: the same bytes, every file once."""
    out = tmp_path / "out"
    args = command("--input_dir", corpus, "--output_dir", out, "--sidon_dir", modules, "--device", "cpu",
                   "--num_workers", 1)  # fmt: skip
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    others = [subprocess.Popen(args, **quiet)]
    for _ in range(2):
        victim = subprocess.Popen(args, **quiet)
        until = time.monotonic() + 20
        claims = out / "work"
        while victim.poll() is None and time.monotonic() < until:  # until it holds a claim
            held = (
                [json.loads(p.read_text())["pid"] for p in claims.glob("*.claim")] if claims.exists() else []
            )
            if victim.pid in held:
                break
            time.sleep(0.01)
        victim.send_signal(signal.SIGKILL)
        victim.wait()
    others.append(subprocess.Popen(args, **quiet))
    assert [p.wait(timeout=90) for p in others] == [0, 0]
    assert digest(out) == digest(finished)
    assert rows_of(out) == rows_of(finished)


def test_stop_and_continue(finished, corpus, modules, tmp_path):
    out = tmp_path / "out"
    args = ("--input_dir", corpus, "--output_dir", out, "--sidon_dir", modules, "--device", "cpu")
    p = subprocess.Popen(command(*args), stdout=subprocess.DEVNULL)
    while p.poll() is None and not list((out / "work").glob("*.claim")):
        time.sleep(0.01)
    p.send_signal(signal.SIGTERM)
    assert p.wait(timeout=60) == 3
    assert not list((out / "work").glob("*.claim")) or list((out / "work").glob("unit_*.json"))
    assert run(*args).returncode == 0
    assert digest(out) == digest(finished)
    again = run(*args)
    assert again.returncode == 0 and "150/150 files" in again.stdout


def test_bad_files(tmp_path, modules):
    """Each quarantined by name and reason; the others are done; exit code 5, or 0 with a larger fraction."""
    root = tmp_path / "in"
    (root / "deep").mkdir(parents=True)
    x, _ = buzz(24000, 1)
    for i in range(3):
        sf.write(root / f"good{i}.wav", x, 24000)
    whole = (root / "good0.wav").read_bytes()
    (root / "truncated.wav").write_bytes(whole[: len(whole) // 2])
    (root / "empty.wav").write_bytes(b"")
    sf.write(root / "no_samples.wav", np.zeros(0), 24000)
    (root / "text.wav").write_text("this is no audio at all, only a name")
    (root / "deep" / "noise.mp3").write_bytes(b"\x00\x01" * 300)
    sf.write(root / "nan.wav", np.array([0.1, np.nan, 0.2] * 500), 48000, subtype="FLOAT")
    sf.write(root / "locked.wav", x, 24000)
    (root / "outside.wav").symlink_to(Path(sf.__file__).resolve())
    bad = {"truncated.wav": "truncated", "empty.wav": "RIFF", "no_samples.wav": "0 samples",
           "text.wav": "RIFF", "deep/noise.mp3": "unreadable", "nan.wav": "NaN",
           "outside.wav": "leaves"}  # fmt: skip
    if os.geteuid() != 0:  # root reads everything
        (root / "locked.wav").chmod(0)
        bad["locked.wav"] = "Permission"
    out = tmp_path / "out"
    args = ("--input_dir", root, "--output_dir", out, "--sidon_dir", modules, "--device", "cpu")
    r = run(*args, "--num_workers", 1)
    assert r.returncode == 5 and "files were skipped, more than --max_bad_fraction 0.01" in r.stderr
    skipped = {row["path"]: row["reason"] for row in rows_of(out, "skipped.jsonl")}
    assert skipped.keys() == bad.keys()
    for name, reason in bad.items():
        assert reason in skipped[name], (name, skipped[name])
    assert len(rows_of(out)) + len(skipped) == 11
    assert len(digest(out)) == len(rows_of(out))
    assert f"skipped {len(bad)}" in r.stdout
    assert run(*args, "--max_bad_fraction", 0.9).returncode == 0


def test_unreadable_permission(tmp_path, monkeypatch):
    """What root's tests cannot have: open() refuses."""
    sf.write(tmp_path / "a.wav", np.zeros(100), 24000)

    def refuse(*args, **kwargs):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("builtins.open", refuse)
    job = {"input_dir": str(tmp_path), "allowed": (tmp_path.resolve(),), "native_rate": 48000}
    found = precompute_48k.read_file("a.wav", "a.wav", job | {"upsampler": "sidon"})
    assert found["reason"] == "unreadable: Permission denied"


def test_users_mistakes_are_one_sentence(tmp_path, corpus, modules):
    def refusal(*args, code=1) -> str:
        r = run(*args)
        assert r.returncode == code and r.stderr.count("\n") == 1, r.stderr
        return r.stderr

    out = tmp_path / "out"
    data = ("--input_dir", corpus, "--output_dir", out, "--device", "cpu", "--num_workers", 0)
    assert "does not exist" in refusal("--input_dir", tmp_path / "no", "--output_dir", out)
    assert "lies inside --input_dir" in refusal("--input_dir", corpus, "--output_dir", corpus / "x")
    cuda = standin.build(tmp_path / "cuda", "cuda")
    message = refusal(*data, "--sidon_dir", cuda)
    assert "needs SIDON" in message and "it holds decoder_cuda.pt, feature_extractor_cuda.pt" in message
    assert "could not be fetched" in refusal(*data)
    assert "other settings" in refusal(*data, "--upsampler", "sinc")
    standin.build(tmp_path / "other", lost=26)
    a = ("--input_dir", corpus, "--output_dir", tmp_path / "o", "--device", "cpu", "--num_workers", 0)
    assert run(*a, "--sidon_dir", modules, "--limit", 3).returncode == 0
    assert "other settings" in refusal(*a, "--sidon_dir", tmp_path / "other", "--limit", 9)


def test_unfaithful_rows(tmp_path, corpus):
    """A restorer that ignores its input: rows say so, the summary counts them, the exit code stays 0."""

    class Deaf(standin.Extractor):
        def forward(self, input_features: torch.Tensor) -> dict[str, torch.Tensor]:
            b, t, _ = input_features.shape
            return {"last_hidden_state": torch.zeros(b, t, 1024)}

    modules = standin.build(tmp_path / "deaf", extractor=Deaf())
    r = run("--input_dir", corpus, "--output_dir", tmp_path / "out", "--sidon_dir", modules, "--device",
            "cpu", "--test_mode", "--test_samples", 4, "--num_workers", 0)  # fmt: skip
    assert r.returncode == 0, r.stderr
    rows = rows_of(tmp_path / "out")
    assert len(rows) == 4 and not any(row["faithful"] for row in rows) and "unfaithful 4" in r.stdout
    assert r.stdout.count("envelope_corr") == 4  # --test_mode's table


def test_sinc_ranges_and_clipping(tmp_path):
    root = tmp_path / "in"
    root.mkdir()
    x, _ = buzz(24000, 1)
    sf.write(root / "a.wav", x, 24000)
    sf.write(root / "b.wav", 3 * x / np.abs(x).max(), 48000, subtype="FLOAT")
    sf.write(root / "b.flac", x, 48000)
    args = ("--input_dir", root, "--output_dir", tmp_path / "out", "--upsampler", "sinc", "--num_workers", 0)
    assert run(*args, "--start_idx", 1, "--end_idx", 2).returncode == 0
    assert [r["path"] for r in rows_of(tmp_path / "out")] == ["b.flac"]
    assert run(*args).returncode == 0
    rows = {r["path"]: r for r in rows_of(tmp_path / "out")}
    assert rows["a.wav"]["kind"] == "sinc" and rows["b.wav"]["kind"] == "copied"
    assert rows["b.flac"]["target"] == "b.flac.wav"  # beside b.wav
    assert abs(rows["b.wav"]["level"] - 32767 / 32768 / 3) < 1e-6
    assert np.abs(sf.read(tmp_path / "out" / "b.wav", dtype="int16")[0].astype(int)).max() == 32767


def test_long_files_go_piece_by_piece(tmp_path, modules, sidon, monkeypatch, capsys):
    """More than LONG_SECONDS are read by the main process, more than one chunk goes through in pieces."""
    root = tmp_path / "in"
    root.mkdir()
    x, _ = buzz(16000, 65)
    sf.write(root / "a.wav", x, 16000, subtype="FLOAT")
    monkeypatch.setattr(precompute_48k, "LONG_SECONDS", 30)
    argv = [
        "precompute_48k.py",
        "--input_dir",
        root,
        "--output_dir",
        tmp_path / "out",
        "--sidon_dir",
        modules,
    ]
    monkeypatch.setattr(sys, "argv", [*map(str, argv), "--device", "cpu", "--num_workers", "0"])
    handlers = {s: signal.getsignal(s) for s in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)}
    assert precompute_48k.main() == 0
    for s, handler in handlers.items():
        signal.signal(s, handler)
    y = sf.read(tmp_path / "out" / "a.wav", dtype="float32")[0]
    np.testing.assert_allclose(y, sidon.upsample(x, 16000)[0], atol=1.01 / 32768)


def test_help_is_fast():
    start = children_cpu()
    assert run("--help").returncode == 0
    assert children_cpu() - start < 1.5


def test_two_claims_at_once(tmp_path):
    """SharedWork for a program that reads ahead: claims are kept, given back and committed one by one."""
    work = SharedWork(tmp_path, [f"{i}" for i in range(6)], 2, {})
    assert work.claim(0) and work.claim(1) and not work.claim(0)
    work.commit(0, {"rows": []})
    assert work.still_ours(1) and work.unfinished() == 2
    work.release(1)
    assert work.claim(1) and work.claim(2)
    work.release()
    assert work.claims == {} and not list((tmp_path / "work").glob("unit_000002*.claim"))
    work.close()
