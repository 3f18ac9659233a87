"""snac48/containers.py: cut and joined files, and headers that lie. helpers/chaos_files.py has many more."""

import os

import numpy as np
import pytest
from helpers.chaos_files import FORMS, PLAIN, flac_claim, sound, xing_claim

from snac48.audio import AudioError, read_audio
from snac48.containers import inspect


def held(path) -> int | None:
    fd = os.open(path, os.O_RDONLY)
    try:
        return inspect(fd, os.fstat(fd).st_size)
    finally:
        os.close(fd)


@pytest.mark.parametrize("kind", FORMS)
def test_whole_files_pass_and_joined_or_cut_ones_do_not(kind, tmp_path):
    path, data = tmp_path / f"x.{kind}", sound(kind, 3)
    path.write_bytes(data)
    x, rate = read_audio(path)
    assert abs(len(x) / rate - 2) < 0.1 and np.abs(x).max() > 0.1
    for bad in (data + data, data[: len(data) // 2], data[: int(0.97 * len(data))]):
        path.write_bytes(bad)
        with pytest.raises(AudioError):
            read_audio(path)


def test_samples_are_counted_without_the_headers_claim(tmp_path):
    path = tmp_path / "x"
    path.write_bytes(sound("flac", 3))
    assert held(path) == 32000
    path.write_bytes(b"ID3\x04\0\0\0\0\x02\x01" + bytes(257) + sound("mp3", 3) + b"TAG" + bytes(125))
    assert 32000 <= held(path) < 32000 + 4 * 576
    for lying, words in ((flac_claim(sound("flac", 3), 16000), "claims 16000 samples, its frames hold 32000"),
                         (xing_claim(sound("mp3", 3), 20), "Xing header claims 20 frames")):  # fmt: skip
        path.write_bytes(lying)
        with pytest.raises(AudioError, match=words):
            held(path)


def test_other_chunks_behind_the_audio_are_fine(tmp_path):
    """Tags are written there; a chunk of another audio file is not a tag."""
    path = tmp_path / "x.wav"
    path.write_bytes(sound("wav", 3) + b"LIST" + (9000).to_bytes(4, "little") + bytes(9000))
    assert held(path) is None
    for kind in PLAIN[1:]:
        path.write_bytes(sound(kind, 3))
        assert held(path) is None
