"""Reading, resampling and naming recordings."""

import numpy as np
import pytest
import soundfile as sf
from conftest import voice

from snac48.audio import AudioError, read_audio, read_audio_span, resample, resolve_inside, target_names


@pytest.mark.parametrize("rate", [8000, 22050, 24000, 44100, 48000, 96000])
@pytest.mark.parametrize("new_rate", [24000, 48000])
def test_a_span_is_the_span_of_the_resampled_whole(rate, new_rate, tmp_path):
    x = voice(1.5, rate, 2)
    sf.write(tmp_path / "x.wav", x, rate, subtype="PCM_16")
    whole, _ = read_audio(tmp_path / "x.wav")
    whole = resample(whole, rate, new_rate)
    for start, count in ((0, 4000), (5001, 7000), (len(whole) - 3000, 6000), (len(whole) + 10, 50)):
        span = read_audio_span(tmp_path / "x.wav", start, count, new_rate)
        expected = np.zeros(count, np.float32)
        part = whole[start : start + count]
        expected[: len(part)] = part
        assert np.abs(span - expected).max() < 2e-4, (start, count)


def test_paths_that_leave_the_root_are_refused(tmp_path):
    (tmp_path / "root").mkdir()
    (tmp_path / "out.wav").write_bytes(b"")
    (tmp_path / "root" / "link.wav").symlink_to(tmp_path / "out.wav")
    for rel in ("../out.wav", "/etc/passwd", "a/../../out.wav", "x\0.wav", "", "link.wav"):
        with pytest.raises(AudioError):
            resolve_inside(tmp_path / "root", rel)


def test_target_names_never_collide():
    names = target_names(["a/b.mp3", "a/b.ogg", "a/b.wav", "a/c.flac"])
    assert names == {
        "a/b.wav": "a/b.wav",
        "a/b.mp3": "a/b.mp3.wav",
        "a/b.ogg": "a/b.ogg.wav",
        "a/c.flac": "a/c.wav",
    }
