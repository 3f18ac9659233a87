"""Conventional folders: ours and the older scripts', which of two sources wins, what is missing."""

import pytest

import train_dual_head as T
from snac48.cli import UserError
from snac48.places import both_splits, found, made


def folders(root, *names):
    for name in names:
        (root / name).mkdir(parents=True)
    return root


def parsed(*argv):
    return T.parse_args([*map(str, argv), "--output_dir", "run"])[0]


OURS = (
    "corpus/train/audio",
    "corpus/valid/audio",
    "targets/train",
    "targets/val",
    "codes/train",
    "codes/val",
)
OLDER = ("combine/train/audio", "combine/valid/audio", "combine_48khz/train/audio",
         "combine_48khz/valid/audio", "codes_phase11/train", "codes_phase11/val")  # fmt: skip


@pytest.mark.parametrize("layout", [OURS, OLDER], ids=["ours", "older"])
def test_a_training_finds_its_folders(layout, tmp_path, monkeypatch):
    root = folders(tmp_path / "data", *layout)
    monkeypatch.chdir(tmp_path)
    for how in (["--data_root", root], []):
        monkeypatch.setenv("DATA_ROOT", "" if how else str(root))
        args = parsed(*how)
        assert [args.cache_dir, args.val_cache_dir] == [str(root / name) for name in layout[4:]]
        assert [args.audio_48k_dir, args.val_audio_48k_dir] == [str(root / name) for name in layout[2:4]]
        raw = parsed(*how, "--recipe", "phase10")
        assert [raw.data_dir, raw.val_data_dir] == [
            str(root / name) for name in layout[:2]
        ] and not raw.cache_dir


def test_all_that_is_missing_is_named_with_the_commands(tmp_path, monkeypatch):
    monkeypatch.chdir(folders(tmp_path, "codes/train", "corpus/train/audio"))
    with pytest.raises(UserError) as error:
        parsed()
    text = str(error.value)
    for words in (
        "codes/val",
        "targets/train",
        "targets/val",
        "./launch.sh cache",
        "./launch.sh precompute",
        "DATA_ROOT",
    ):
        assert words in text
    assert "codes/train," not in text and "prepare_dataset" not in text


def test_the_stronger_source_of_two_wins(tmp_path, monkeypatch):
    monkeypatch.chdir(folders(tmp_path, *OURS, "other/train", "other/valid"))
    config = tmp_path / "c.json"
    config.write_text('{"recipe": "phase12", "train_data": "codes/train", "val_data": "codes/val"}')
    args = parsed("--config", config, "--codes_dir", "other")
    assert (args.cache_dir, args.val_cache_dir) == ("other/train", "other/valid")
    args = parsed("--config", config, "--cache_dir", "mine")
    assert (args.cache_dir, args.val_cache_dir) == ("mine", "codes/val")
    config.write_text('{"recipe": "phase11-warmup", "train_data": "corpus/train/audio", "val_data": "v"}')
    assert parsed("--config", config).data_dir == "corpus/train/audio"
    args = parsed("--config", config, "--codes_dir", "codes")  # its recordings are the originals then
    assert (args.data_dir, args.cache_dir, args.audio_24k_dir) == ("", "codes/train", "corpus/train/audio")


def test_both_splits_and_where_their_outputs_go(tmp_path):
    folders(tmp_path, "corpus/train/audio", "corpus/valid/audio", "targets/valid")
    pairs = both_splits(tmp_path, "recordings", "targets")
    assert [str(p.relative_to(tmp_path)) for pair in pairs for p in pair] == [
        "corpus/train/audio", "targets/train", "corpus/valid/audio", "targets/valid"]  # fmt: skip
    assert (
        found(tmp_path, "codes", "train") is None and made(tmp_path, "codes", "val") == tmp_path / "codes/val"
    )
    with pytest.raises(UserError, match="prepare_dataset"):
        both_splits(tmp_path / "empty", "recordings", "codes")
