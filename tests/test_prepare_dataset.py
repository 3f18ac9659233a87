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
    assert "of another split" in one_sentence(done)
    run("prepare_dataset.py", *grouped, "--output_dir", tmp_path / "c", "--seed", 7, "--copy")
    assert not any(p.is_symlink() for p in (tmp_path / "c").rglob("*.wav"))


def test_links_of_a_prepared_dataset_are_followed_by_the_cache(snac_dir, audio_dir, tmp_path):
    run("prepare_dataset.py", "--input_dir", audio_dir, "--output_dir", tmp_path / "d", "--train_ratio", 0.7)
    folders = ("--data_dir", tmp_path / "d" / "valid" / "audio", "--output_dir", tmp_path / "c")
    run("cache_codes.py", *folders, "--pretrained_model", snac_dir, "--device", "cpu", "--num_workers", 0)
    assert json.loads((tmp_path / "c" / "metadata.json").read_text())["rows"] == 4


def test_a_speaker_of_nested_folders_stays_in_one_part(tmp_path, monkeypatch):
    """Without any flag but --input_dir; by the top folder; by a regex over the path; a warning by parent."""
    for rel in (f"{s}/{kind}/{i}.wav" for s in ("es", "fr", "de", "en") for kind in "ab" for i in range(3)):
        path = tmp_path / "recordings" / rel
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"")
    monkeypatch.chdir(tmp_path)
    done = run("prepare_dataset.py", "--input_dir", "recordings")
    assert (
        "23 training and 1 validation files (95.8 % for training; asked: --train_ratio 0.95)" in done.stdout
    )
    assert len(list((tmp_path / "corpus/train/audio").rglob("*.wav"))) == 23

    def parts(out, *flags) -> tuple:
        done = run("prepare_dataset.py", "--input_dir", "recordings", "--output_dir", out, *flags)
        valid = tmp_path / out / "valid" / "audio"
        return done.stderr, {p.relative_to(valid).parent.as_posix() for p in valid.rglob("*.wav")}

    for out, by in (("top", "top"), ("regex", "regex:^([a-z]+)/")):
        told, valid = parts(out, "--group_by", by, "--train_ratio", "0.7")
        assert len(valid) == 2 and len({group[:2] for group in valid}) == 1 and not told
    told, valid = parts("parent", "--group_by", "parent", "--train_ratio", "0.9")
    assert len(valid) == 1 and told.count("\n") == 1
    (group,) = valid
    assert f"warning: {', '.join(sorted(group.split('/')))} in both parts" in told
