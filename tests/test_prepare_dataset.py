"""prepare_dataset.py: the split, its groups, and its links as the next program reads them."""

import json
import os

import soundfile as sf
from conftest import one_sentence, run, voice


def test_a_split_keeps_groups_together_and_is_the_same_for_the_same_seed(tmp_path):
    source = tmp_path / "in"
    for speaker in range(10):
        for take in range(4):
            path = source / f"spk{speaker}" / f"same_name_{take}.wav"
            path.parent.mkdir(parents=True, exist_ok=True)
            sf.write(path, voice(0.1, 8000, take), 8000)
    grouped = ("--input_dir", source, "--train_ratio", 0.8, "--group_by", "parent")
    for out in ("a", "b"):
        run("prepare_dataset.py", *grouped, "--output_dir", tmp_path / out)
    listing = lambda d: sorted(p.relative_to(d).as_posix() for p in d.rglob("*.wav"))
    assert listing(tmp_path / "a") == listing(tmp_path / "b") and len(listing(tmp_path / "a")) == 40
    speakers = lambda part: {rel.split("/")[0] for rel in listing(tmp_path / "a" / part / "audio")}
    train, valid = speakers("train"), speakers("valid")
    assert len(valid) == 2 and not train & valid
    manifest = json.loads((tmp_path / "a" / "manifest.json").read_text())
    assert manifest["files"] == {"train": 32, "valid": 8} and manifest["mode"] == "symlink"
    assert os.path.islink(tmp_path / "a" / "train" / "audio" / listing(tmp_path / "a" / "train" / "audio")[0])
    done = run("prepare_dataset.py", "--input_dir", source, "--output_dir", tmp_path / "a", code=1)
    assert "already holds a split" in one_sentence(done)
    run("prepare_dataset.py", *grouped, "--output_dir", tmp_path / "c", "--seed", 7, "--copy")
    assert not any(p.is_symlink() for p in (tmp_path / "c").rglob("*.wav"))


def test_links_of_a_prepared_dataset_are_followed_by_the_cache(snac_dir, audio_dir, tmp_path):
    run("prepare_dataset.py", "--input_dir", audio_dir, "--output_dir", tmp_path / "d", "--train_ratio", 0.7)
    folders = ("--data_dir", tmp_path / "d" / "valid" / "audio", "--output_dir", tmp_path / "c")
    run("cache_codes.py", *folders, "--pretrained_model", snac_dir, "--device", "cpu", "--num_workers", 0)
    assert json.loads((tmp_path / "c" / "metadata.json").read_text())["rows"] == 4
