"""evaluate.py: the tables of all systems on the same clips, and what else it writes."""

import csv
import json

import numpy as np
import pytest
import soundfile as sf
import torch
from conftest import ROOT, call, one_sentence, refused, run, voice

import evaluate as E
from snac48.audio import resample

FAULTS_48K = {"level_24k", "comb", "seam", "tones"}


def measured(row) -> set:
    """Without what some clips have no value of."""
    return set(row) - {"seam", "comb"}


def test_audio_is_measured_as_16_bits():
    assert torch.equal(E.pcm16(torch.tensor([2.0, -2.0, 0.5])), torch.tensor([32767 / 32768, -1.0, 0.5]))


def test_evaluate_compares_all_systems_on_the_same_clips(checkpoint, audio_dir, tmp_path):
    args = ("--checkpoint", checkpoint, "--data_dirs", audio_dir, "--device", "cpu", "--segment_length", 0.5)
    args = (*args, "--num_samples", 4)
    done = run("evaluate.py", *args, "--output", tmp_path / "e" / "r.json", "--samples_dir", tmp_path / "s")
    assert done.stderr.splitlines()[0] == f"{checkpoint} on cpu"
    listen = f"listen: open {tmp_path}/s/index.html in a browser; keys 1-5 switch the system"
    assert done.stdout.splitlines()[-1] == listen
    r = json.loads((tmp_path / "e" / "r.json").read_text())
    assert r["clips"] == r["clips_48k"] == 4 and abs(r["seconds"] - 4 * 5 * 2048 / 24000) < 1e-3
    assert list(r["systems"]) == ["base_snac", "base_snac_sinc48", "ours_24k", "ours_48k"]
    everywhere = {"l1", "stft", "mel", "level", "rtf"}
    for name, row in r["systems"].items():
        own = {"lsd", "lsd_12_24k", "level_24k", "tones"} if "48" in name else {"si_sdr"}
        assert measured(row) == everywhere | own
        bounds = r["intervals"][name]
        assert set(bounds) >= everywhere | own
        assert all(low <= row[k] <= high for k, (low, high) in bounds.items())
    assert measured(r["original"]) == {"level_24k", "tones"}
    assert r["systems"]["ours_48k"]["lsd"] != r["systems"]["base_snac_sinc48"]["lsd"]
    assert abs(r["systems"]["base_snac_sinc48"]["level_24k"]) < 0.1
    assert "no system is scaled" in r["level_policy"] and r["level_policy"] in done.stdout
    wavs = {p.name: sf.read(p) for p in (tmp_path / "s").glob("000_*.wav")}
    rates = {
        name: 24000 if name in ("base_snac", "ours_24k") else 48000 for name in ("original", *r["systems"])
    }
    assert {n.split("_", 1)[1][:-4]: w[1] for n, w in wavs.items()} == rates
    signals = [w[0].tobytes() for w in wavs.values()]
    assert len(set(signals)) == 5  # five different sounds, not one written five times
    text = (tmp_path / "e" / "r.md").read_text()
    assert "| ours_48k |" in text and "| original |" in text and text in done.stdout
    assert (tmp_path / "e" / "r.png").read_bytes()[:4] == b"\x89PNG"
    with open(tmp_path / "e" / "r.csv") as f:
        lines = list(csv.DictReader(f))
    assert len(lines) == 4 * 5 and {line["system"] for line in lines} == {"original", *r["systems"]}
    of_ours = [float(line["lsd"]) for line in lines if line["system"] == "ours_48k"]
    assert np.mean(of_ours) == pytest.approx(r["systems"]["ours_48k"]["lsd"])
    call(
        E, *args, "--output", tmp_path / "2.json", "--samples_dir", tmp_path / "s2", "--max_samples_saved", 0
    )
    again = json.loads((tmp_path / "2.json").read_text())["systems"]
    assert all(again[s][k] == v for s, row in r["systems"].items() for k, v in row.items() if k != "rtf")
    assert not (tmp_path / "s2").exists()


def test_compare_says_which_differences_are_real(checkpoint, audio_dir, tmp_path):
    """Against another of the same weights none is; against base SNAC some are."""
    (tmp_path / "other").mkdir()
    copy = tmp_path / "other" / "best_model.pt"
    copy.write_bytes(checkpoint.read_bytes())
    args = ("--data_dirs", audio_dir, "--device", "cpu", "--segment_length", 0.4, "--max_samples_saved", 0)
    args = (*args, "--output", tmp_path / "r.json")
    call(E, "--checkpoint", checkpoint, "--compare", copy, *args)
    r = json.loads((tmp_path / "r.json").read_text())
    found = {(d["system"], d["against"]): d["metrics"] for d in r["differences"]}
    name = checkpoint.parent.name
    assert set(found) == {
        (f"ours_24k:{name}", "base_snac"), (f"ours_24k:{name}", "ours_24k:other"),
        (f"ours_48k:{name}", "base_snac_sinc48"), (f"ours_48k:{name}", "ours_48k:other"),
        ("ours_24k:other", "base_snac"), ("ours_48k:other", "base_snac_sinc48"),
    }  # fmt: skip
    same = found[f"ours_48k:{name}", "ours_48k:other"]
    assert {"lsd", "level_24k"} < set(same) and "rtf" not in same
    assert all(m == {"mean": 0, "low": 0, "high": 0, "real": False} for m in same.values())
    sinc = found[f"ours_48k:{name}", "base_snac_sinc48"]["lsd_12_24k"]
    assert sinc["real"] == (sinc["low"] > 0 or sinc["high"] < 0) and sinc["mean"] != 0
    row = f"| ours_48k:{name} - base_snac_sinc48 |"
    assert row in (tmp_path / "r.md").read_text()
    assert "same file twice" in refused(E, "--checkpoint", checkpoint, "--compare", checkpoint, *args)


@pytest.fixture(scope="module")
def low_corpus(tmp_path_factory):
    """Recordings at 24 kHz in low/, for two of the three a target in high/, half as loud as its manifest row
    says; and one recording at 48 kHz that has a target, too."""
    root = tmp_path_factory.mktemp("low_corpus")
    rows = []
    for folder in ("low", "high"):
        (root / folder).mkdir()
    for i, rate in enumerate((24000, 24000, 24000, 48000)):
        sf.write(root / "low" / f"{i}.wav", voice(1.0, rate, i), rate)
        if i:
            same = 0.5 * resample(voice(1.0, rate, i), rate, 48000)
            sf.write(root / "high" / f"{i}.wav", same, 48000, subtype="FLOAT")
            row = {"path": f"{i}.wav", "target": f"{i}.wav", "kind": "sidon", "level": 0.5}
            rows.append(json.dumps(row | {"faithful": i != 2}))
    (root / "high" / "manifest.jsonl").write_text("\n".join(rows) + "\n")
    return root


def test_a_24_khz_corpus_is_judged_against_its_targets(checkpoint, low_corpus, tmp_path):
    """One clip has a faithful target, one is a truth itself, two have none above 12 kHz."""
    args = ("--checkpoint", checkpoint, "--data_dirs", low_corpus / "low", "--device", "cpu")
    args = (*args, "--output", tmp_path / "r.json", "--samples_dir", tmp_path / "s", "--segment_length", 0.4)
    call(E, *args, "--audio_48k_dir", low_corpus / "high", "--seed", 7)
    r = json.loads((tmp_path / "r.json").read_text())
    assert (r["clips"], r["clips_48k"]) == (4, 2)
    assert "2 without 48 kHz truth" in (tmp_path / "r.md").read_text()
    sidon = r["systems"]["sidon"]
    assert measured(sidon) == {"l1", "stft", "mel", "si_sdr", "level", "level_24k", "tones"}
    assert sidon["si_sdr"] > 10  # the same span of both (white noise: the halving filter costs its top)
    assert abs(sidon["level"]) < 0.5 and abs(sidon["level_24k"]) < 0.5  # its level is the recording's again
    with open(tmp_path / "r.csv") as f:
        lines = {(line["clip"], line["system"]): line for line in csv.DictReader(f)}
    assert [n for n in "0123" if lines[f"{n}.wav", "ours_48k"]["lsd"]] == ["1", "3"]
    assert all(lines[f"{n}.wav", "ours_24k"]["si_sdr"] for n in "0123")
    assert [n for n in "0123" if (f"{n}.wav", "sidon") in lines] == ["1"]
    rates = {p.name[4:-4]: {sf.info(q).samplerate for q in p.parent.glob(f"*{p.name[3:]}")}
             for p in (tmp_path / "s").glob("*.wav")}  # fmt: skip
    assert rates["original"] == {24000, 48000} and rates["sidon"] == {48000}


def test_a_24_khz_corpus_without_targets_has_its_24_khz_metrics(checkpoint, low_corpus, tmp_path):
    args = ("--checkpoint", checkpoint, "--data_dirs", low_corpus / "low", "--device", "cpu")
    args = (*args, "--output", tmp_path / "r.json", "--max_samples_saved", 0, "--min_rate", 50000)
    call(E, *args)
    r = json.loads((tmp_path / "r.json").read_text())
    assert (r["clips"], r["clips_48k"]) == (4, 0)
    assert measured(r["systems"]["ours_24k"]) == {"l1", "stft", "mel", "si_sdr", "level", "rtf"}
    assert measured(r["systems"]["ours_48k"]) == {"level_24k", "tones", "rtf"}
    assert measured(r["original"]) == set()


def test_targets_belong_to_data_folders(checkpoint, low_corpus, tmp_path, capsys):
    args = ("--checkpoint", checkpoint, "--data_dirs", low_corpus / "low", "--device", "cpu")
    (tmp_path / "bare").mkdir()
    assert "--target_kind" in refused(E, *args, "--audio_48k_dir", tmp_path / "bare")
    with pytest.raises(SystemExit):
        call(E, *args, "--audio_48k_dir", low_corpus / "high", low_corpus / "high")
    assert "one folder for each of --data_dirs" in capsys.readouterr().err


def test_the_picture_shows_the_loudest_clips_and_says_what_is_missing(monkeypatch, tmp_path):
    """Three columns, a row a system; words where a 24 kHz system has nothing; levels in dB re full scale."""
    import matplotlib.pyplot as plt

    figures = []
    monkeypatch.setattr(plt, "close", figures.append)
    tone = lambda rate: E.Signal(torch.sin(2 * torch.pi * 3000 * torch.arange(rate) / rate), rate)
    shown = [(name, {"original": tone(48000), "base_snac": tone(24000)}) for name in "abc"]
    E.draw(tmp_path / "p.png", shown)
    (figure,) = figures
    assert "energy" in figure.get_suptitle()
    *panels, bar = figure.axes
    assert [len(panels), bar.get_ylabel()] == [6, "dB re full scale"]
    for panel, rate in zip(panels, [48000] * 3 + [24000] * 3):
        assert ["nothing above 12 kHz" in t.get_text() for t in panel.texts] == [True] * (rate == 24000)
        level = panel.images[0].get_array()[:, 40]
        assert abs(level.max()) < 0.1 and level.argmax() == 128  # 3 kHz at 23.4 Hz a bin


def test_extras_measure_and_are_named_when_missing(checkpoint, audio_dir, tmp_path):
    argv = ["evaluate.py", "--checkpoint", checkpoint, "--data_dirs", audio_dir, "--device", "cpu"]
    argv += ["--num_samples", 1, "--output", tmp_path / "r.json", "--samples_dir", tmp_path / "s"]
    found = {"PYTHONPATH": f"{tmp_path}:{ROOT}"}
    for flag, package in (("--visqol", "visqol"), ("--pitch", "librosa")):
        (tmp_path / f"{package}.py").write_text("raise ImportError")
        said = one_sentence(run(*argv, flag, code=1, env=found))
        assert "pip install -r requirements-evaluate.txt" in said and package in said
    extras = (ROOT / "requirements-evaluate.txt").read_text()
    assert "\nvisqol-python==" in extras and "\nlibrosa==" in extras
    (tmp_path / "visqol.py").write_text(
        "class R: moslqo = 3.25\n"
        "class VisqolApi:\n"
        "    def create(self, mode): assert mode == 'audio'\n"
        "    def measure_from_arrays(self, reference, degraded, rate):\n"
        "        assert rate == 48000 and len(reference) == len(degraded) and any(reference != degraded)\n"
        "        return R\n"
    )
    (tmp_path / "librosa.py").write_text(
        "import numpy as np\n"
        "def pyin(x, fmin, fmax, sr, frame_length, hop_length):\n"
        "    assert sr == 24000 and x.ndim == 1\n"
        "    return np.linspace(100, 200, len(x) // hop_length + 1), None, None\n"
    )
    run(*argv, "--visqol", "--pitch", env=found)
    r = json.loads((tmp_path / "r.json").read_text())
    systems = r["systems"]
    assert {s for s, row in systems.items() if row.get("visqol") == 3.25} == {"base_snac_sinc48", "ours_48k"}
    assert all(row["f0_corr"] == pytest.approx(1) and row["voicing_error"] == 0 for row in systems.values())
    assert all("hnr" in row for row in (r["original"], *systems.values())) and "f0_corr" not in r["original"]
    text = (tmp_path / "r.md").read_text()
    assert "| visqol |" in text and "| hnr |" in text
