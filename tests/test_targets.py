"""snac48/targets.py: the tables of files and headers beside the index, made once."""

import json
import shutil

import numpy as np
import pytest
import soundfile as sf
from conftest import run, voice

from snac48 import targets
from snac48.cache import CodeIndex
from snac48.cli import UserError
from snac48.data import CachedCodesDataset, to_device
from snac48.targets import KINDS, Originals, Targets


@pytest.fixture
def index(cache_dir, tmp_path):
    """The index of a copy of the cache, without tables yet."""
    shutil.copytree(cache_dir, tmp_path / "codes", ignore=shutil.ignore_patterns("index-*"))
    return CodeIndex(str(tmp_path / "codes"))


@pytest.fixture
def no_file_is_opened(monkeypatch):
    """From the call of it on, looking at a file is an error."""

    def forbid():
        monkeypatch.setattr(targets, "note_header", lambda *_: pytest.fail("a file was opened"))

    return forbid


def opened(index, folder, **more) -> Targets:
    return Targets(str(folder), index.path, len(index), index.folder, **more)


def samples(of, row: int):
    out = np.empty(3000, np.float32)
    of.read(out, row, 500, 48000, 3000)
    return out


def test_the_table_is_made_once_and_again_when_the_manifest_changes(
    index, targets_dir, tmp_path, no_file_is_opened
):
    folder = shutil.copytree(targets_dir, tmp_path / "targets")
    rows = [json.loads(line) for line in open(folder / "manifest.jsonl")]
    first = opened(index, folder)
    assert [first.path(r) for r in range(14)] == [row["target"] for row in rows]
    rows[3]["faithful"] = False
    rows[5]["level"] = 0.5
    unknown = rows[0] | {"path": "not/in/the/cache.wav"}
    lines = [json.dumps(row) + "\n" for row in [unknown, *reversed(rows)]]  # in whatever order
    (folder / "manifest.jsonl").write_text("".join(lines))
    second = opened(index, folder)
    assert [KINDS[k] for k in second.kinds[:6]] == ["copied"] * 3 + ["unfaithful"] + ["copied"] * 2
    for row in range(14):
        assert second.path(row) == first.path(row)
        assert np.allclose(samples(second, row), samples(first, row) * (2 if row == 5 else 1), atol=1e-7)
    no_file_is_opened()
    again = opened(index, folder)
    assert np.array_equal(np.asarray(again.rows), np.asarray(second.rows)) and np.array_equal(
        samples(again, 5), samples(second, 5)
    )


def test_without_a_manifest_files_belong_together_by_name(index, targets_dir, tmp_path, no_file_is_opened):
    """The table is kept once nothing is missing: until then files may still come."""
    folder = shutil.copytree(targets_dir, tmp_path / "targets", ignore=shutil.ignore_patterns("manifest*"))
    names = [index.path(r) for r in range(14)]
    (folder / names[1]).with_suffix(".wav").rename(folder / names[1])  # a wav under its source's name
    lost = (folder / names[4]).with_suffix(".wav")
    lost.rename(tmp_path / "lost.wav")
    found = opened(index, folder, kind="sidon")
    assert found.path(0) == "a/utt00.wav" and found.path(1) == names[1] == "a/utt01.flac"
    assert [KINDS[k] for k in found.kinds] == ["missing" if r == 4 else "sidon" for r in range(14)]
    (tmp_path / "lost.wav").rename(lost)
    assert opened(index, folder, kind="sidon").kinds.all()
    no_file_is_opened()
    assert opened(index, folder, kind="sidon").kinds.all()
    with pytest.raises(UserError, match="has no manifest"):
        opened(index, folder)


def test_a_line_that_is_no_manifest_row_is_named(index, targets_dir, tmp_path):
    folder = shutil.copytree(targets_dir, tmp_path / "targets")
    for line in ("{", "[]", '{"path": "a"}', '{"path": "a", "target": "a", "kind": "guessed"}'):
        (folder / "manifest.jsonl").write_text(f"\n{line}\n".lstrip("\n"))
        with pytest.raises(UserError, match="line 1 is not a manifest row"):
            opened(index, folder)


def test_headers_of_originals_are_noted_for_the_wanted_rows_only(index, audio_dir, no_file_is_opened):
    wanted = np.arange(14) % 2 == 0
    noted = Originals(str(audio_dir), index.path, wanted, index.folder)
    assert (np.asarray(noted.headers)["size"] > 0).tolist() == wanted.tolist()
    no_file_is_opened()
    again = Originals(str(audio_dir), index.path, wanted, index.folder)
    whole, rate = sf.read(audio_dir / index.path(5), dtype="float32")  # not noted: its header is read
    assert rate == 48000 and np.array_equal(samples(again, 5), whole[500:3500])


def test_a_recording_that_was_replaced_is_read_as_it_is_now(codes_48k, speech_48k, tmp_path):
    """By its own header where the noted one is of a file of another size."""
    folder = shutil.copytree(speech_48k, tmp_path / "speech")
    data = CachedCodesDataset(codes_48k, folder, 0.3, target_kind="recordings")
    x = voice(0.6, 48000, 77)
    sf.write(folder / "utt00.wav", np.stack([x, x], axis=1), 48000, subtype="FLOAT")
    batch = data[[0]]
    assert not batch["bad_file"]
    first = 4096 * int(batch["start"][0])
    found = to_device(batch, "cpu")["audio_48k"][0, 0].numpy()
    assert np.abs(found - x[first:][: len(found)]).max() < 1e-6


def test_many_rows_cost_a_worker_no_memory_of_its_own(tmp_path):
    found = json.loads(run("benchmarks/scale.py", "--rows", 20000, "--folder", tmp_path, "--json").stdout)
    assert all(each["rows"] == 20000 for each in found.values())
    assert found["workers"]["busy_mb"] < 20
    assert found["everything opened"]["seconds"] < 2
