"""evaluate.py: the metrics, and the table of all systems on the same clips."""

import json

import soundfile as sf
import torch
from conftest import ROOT, call, one_sentence, run

import evaluate as E


def test_metrics_differ_between_systems_and_are_right_on_known_signals():
    t = torch.arange(48000) / 48000
    x = 0.3 * torch.sin(2 * torch.pi * 440 * t)
    assert (
        E.si_sdr(0.5 * x, x) > 100
        and abs(E.si_sdr(x + 0.03 * torch.cos(2 * torch.pi * 440 * t), x) - 20) < 0.1
    )
    assert E.mel_distance(x, x, 48000) == 0 and E.mel_distance(10 * x, x, 48000) > 0.5
    assert torch.equal(E.pcm16(torch.tensor([2.0, -2.0, 0.5])), torch.tensor([32767 / 32768, -1.0, 0.5]))
    filters = E.mel_filters(48000, 2048)
    assert filters.shape == (80, 1025) and filters.max() <= 1 and (filters.sum(1) > 0).all()


def test_evaluate_compares_all_systems_on_the_same_clips(checkpoint, audio_dir, tmp_path):
    args = ("--checkpoint", checkpoint, "--data_dirs", audio_dir, "--device", "cpu", "--segment_length", 0.5)
    args = (*args, "--num_samples", 4)
    done = run("evaluate.py", *args, "--output", tmp_path / "e" / "r.json", "--samples_dir", tmp_path / "s")
    assert done.stderr.splitlines()[0] == f"{checkpoint} on cpu"
    assert done.stdout.splitlines()[-1].startswith(f"listen: aplay {tmp_path}/s/000_*.wav, or any player")
    r = json.loads((tmp_path / "e" / "r.json").read_text())
    assert r["clips"] == 4 and abs(r["seconds"] - 4 * 5 * 2048 / 24000) < 1e-3
    assert list(r["systems"]) == ["base_snac", "base_snac_sinc48", "ours_24k", "ours_48k"]
    everywhere = {"l1", "stft", "mel", "rtf"}
    for name, row in r["systems"].items():
        assert set(row) == everywhere | ({"lsd", "lsd_12_24k"} if "48" in name else {"si_sdr"})
    assert r["systems"]["ours_48k"]["lsd"] != r["systems"]["base_snac_sinc48"]["lsd"]
    wavs = {p.name: sf.read(p) for p in (tmp_path / "s").glob("000_*.wav")}
    rates = {
        name: 24000 if name in ("base_snac", "ours_24k") else 48000 for name in ("original", *r["systems"])
    }
    assert {n.split("_", 1)[1][:-4]: w[1] for n, w in wavs.items()} == rates
    signals = [w[0].tobytes() for w in wavs.values()]
    assert len(set(signals)) == 5  # five different sounds, not one written five times
    assert "| ours_48k |" in (tmp_path / "e" / "r.md").read_text()
    assert (tmp_path / "e" / "r.png").read_bytes()[:4] == b"\x89PNG"
    call(
        E, *args, "--output", tmp_path / "2.json", "--samples_dir", tmp_path / "s2", "--max_samples_saved", 0
    )
    again = json.loads((tmp_path / "2.json").read_text())["systems"]
    assert all(again[s][k] == v for s, row in r["systems"].items() for k, v in row.items() if k != "rtf")


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


def test_visqol_measures_48_khz_systems_and_is_named_when_missing(checkpoint, audio_dir, tmp_path):
    argv = [
        "evaluate.py",
        "--checkpoint",
        checkpoint,
        "--data_dirs",
        audio_dir,
        "--device",
        "cpu",
        "--visqol",
    ]
    argv += ["--num_samples", 1, "--output", tmp_path / "r.json", "--samples_dir", tmp_path / "s"]
    (tmp_path / "visqol.py").write_text("raise ImportError")
    found = {"PYTHONPATH": f"{tmp_path}:{ROOT}"}
    assert "pip install visqol-python" in one_sentence(run(*argv, code=1, env=found))
    (tmp_path / "visqol.py").write_text(
        "class R: moslqo = 3.25\n"
        "class VisqolApi:\n"
        "    def create(self, mode): assert mode == 'audio'\n"
        "    def measure_from_arrays(self, reference, degraded, rate):\n"
        "        assert rate == 48000 and len(reference) == len(degraded) and any(reference != degraded)\n"
        "        return R\n"
    )
    run(*argv, env=found)
    systems = json.loads((tmp_path / "r.json").read_text())["systems"]
    assert {s for s, row in systems.items() if row.get("visqol") == 3.25} == {"base_snac_sinc48", "ours_48k"}
    assert "| visqol |" in (tmp_path / "r.md").read_text()
