"""Reading, resampling and naming recordings."""

import os

import numpy as np
import pytest
import soundfile as sf
from conftest import voice

from snac48.audio import (
    AudioError,
    note_header,
    open_inside,
    read_audio,
    read_span,
    resample,
    resolve_inside,
    target_names,
)


def span(path, start, count, rate, **more):
    out = np.zeros(count, np.float32)
    read_span(out, path.parent, path.name, (path.parent,), start, rate, **more)
    return out


@pytest.mark.parametrize("rate", [8000, 22050, 24000, 44100, 48000, 96000])
@pytest.mark.parametrize("new_rate", [24000, 48000])
def test_a_span_is_the_span_of_the_resampled_whole(rate, new_rate, tmp_path):
    x = voice(1.5, rate, 2)
    sf.write(tmp_path / "x.wav", x, rate, subtype="PCM_16")
    whole, _ = read_audio(tmp_path / "x.wav")
    whole = resample(whole, rate, new_rate)
    places = (0, 4000), (5001, 7000), (-600, 3000), (len(whole) - 3000, 6000), (len(whole) + 10, 50)
    for start, count in places:
        expected = np.zeros(count, np.float32)
        part = whole[max(0, start) : start + count]
        expected[max(0, -start) :][: len(part)] = part
        found = span(tmp_path / "x.wav", start, count, new_rate)
        assert np.abs(found - expected).max() < 2e-4, (start, count)


@pytest.mark.parametrize(
    "kind", ["PCM_16", "PCM_24", "PCM_32", "FLOAT", "PCM_U8", "WAVEX PCM_24", "WAVEX FLOAT"]
)
@pytest.mark.parametrize("channels", [1, 2, 3])
def test_a_wav_is_read_as_soundfile_reads_it(kind, channels, tmp_path):
    """Without it, where the header tells all; with a noted header, without reading that."""
    path, subtype, form = tmp_path / "x.wav", kind.split()[-1], "WAVEX" if " " in kind else "WAV"
    x = np.stack([voice(0.2, 24000, c) for c in range(channels)], axis=1)
    sf.write(path, x, 24000, subtype=subtype, format=form)
    wanted = sf.read(path, dtype="float32", always_2d=True)[0].mean(axis=1)[100:3100]
    header = note_header(tmp_path, "x.wav", (tmp_path,))
    assert (header[-1] > 0) == (subtype in ("PCM_16", "PCM_24", "FLOAT"))
    for noted in ({}, {"noted": header}):
        assert np.array_equal(span(path, 100, 3000, 24000, **noted), wanted)


def test_a_noted_header_is_believed_only_while_the_file_has_its_size(tmp_path):
    """With an mtime it is an error where the file has changed."""
    path = tmp_path / "x.wav"
    sf.write(path, voice(1.0, 24000, 1), 24000, subtype="PCM_16")
    noted = fixed = note_header(tmp_path, "x.wav", (tmp_path,))
    span(path, 0, 5000, 24000, noted=fixed)
    os.utime(path, ns=(0, 1))
    with pytest.raises(AudioError, match="it has changed"):
        span(path, 0, 5000, 24000, noted=fixed)
    noted = (fixed[0], -1, *fixed[2:])
    sf.write(path, voice(1.0, 48000, 1), 48000, subtype="FLOAT")
    wanted = resample(sf.read(path, dtype="float32")[0], 48000, 24000)[:5000]
    assert np.abs(span(path, 0, 5000, 24000, noted=noted) - wanted).max() < 1e-5
    path.write_bytes(path.read_bytes()[:-1000])
    with pytest.raises(AudioError, match="truncated"):
        span(path, 0, 5000, 24000, noted=noted)
    path.unlink()
    with pytest.raises(AudioError, match="file not found"):
        span(path, 0, 5000, 24000, noted=noted)
    assert note_header(tmp_path, "x.wav", (tmp_path,)) is None


def test_paths_that_leave_the_root_are_refused(tmp_path):
    (tmp_path / "root").mkdir()
    (tmp_path / "out.wav").write_bytes(b"")
    (tmp_path / "root" / "link.wav").symlink_to(tmp_path / "out.wav")
    (tmp_path / "root" / "second.wav").symlink_to("link.wav")
    (tmp_path / "root" / "loop.wav").symlink_to("loop.wav")
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "x.wav").write_bytes(b"")
    (tmp_path / "root" / "folder").symlink_to(tmp_path / "elsewhere")
    links = "link.wav", "second.wav", "loop.wav", "folder/x.wav"
    for rel in ("../out.wav", "/etc/passwd", "a/../../out.wav", "x\0.wav", "", *links):
        with pytest.raises(AudioError):
            resolve_inside(tmp_path / "root", rel)
        with pytest.raises(AudioError):
            open_inside(tmp_path / "root", rel, (tmp_path / "root",))


def test_links_into_an_allowed_folder_are_followed(tmp_path):
    """As prepare_dataset.py makes them: to the file, and through folders that are links."""
    (tmp_path / "source" / "a").mkdir(parents=True)
    (tmp_path / "source" / "a" / "x.wav").write_bytes(b"here")
    (tmp_path / "root").mkdir()
    (tmp_path / "root" / "x.wav").symlink_to(tmp_path / "source" / "a" / "x.wav")
    (tmp_path / "root" / "a").symlink_to("../source/a")
    (tmp_path / "root" / "again.wav").symlink_to("a/x.wav")
    allowed = tmp_path / "root", tmp_path / "source"
    for rel in ("x.wav", "a/x.wav", "again.wav"):
        fd, found = open_inside(tmp_path / "root", rel, allowed)
        assert os.read(fd, 10) == b"here" and found.st_size == 4
        os.close(fd)


def test_what_would_never_end_is_refused(tmp_path):
    os.mkfifo(tmp_path / "pipe.wav")
    (tmp_path / "folder.wav").mkdir()
    for name in ("pipe.wav", "folder.wav"):
        with pytest.raises(AudioError, match="not a regular file"):
            open_inside(tmp_path, name, (tmp_path,))
        with pytest.raises(AudioError, match="not a regular file"):
            read_audio(tmp_path / name)


def test_target_names_never_collide():
    names = target_names(["a/b.mp3", "a/b.ogg", "a/b.wav", "a/c.flac"])
    assert names == {
        "a/b.wav": "a/b.wav",
        "a/b.mp3": "a/b.mp3.wav",
        "a/b.ogg": "a/b.ogg.wav",
        "a/c.flac": "a/c.wav",
    }
