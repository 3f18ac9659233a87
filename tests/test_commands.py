"""What people type today, row by row: each command works here, literally or with the same values."""

import json
import shlex
import shutil

import pytest
from conftest import ROOT, run

import train_dual_head as T

CONFIGS = ROOT / "configs"
FLAGS = ('--batch_size 96 --epochs 15 --warmup_epochs 1 --lr 2e-4 --main_lr 5e-5 --lr_24k_final_conv 1e-5 '
         '--segment_schedule "1.0,2.0,3.0,4.0" --batch_multiplier "2.0,1.0,0.6,0.45" '
         '--epoch_ranges "1-2,3-4,5-6,7-15" --output_dir checkpoints/phase12_dual_head')  # fmt: skip
PHASE12 = {"recipe": "phase12", "cache_dir": "codes/train", "val_cache_dir": "codes/val",
           "audio_48k_dir": "targets/train", "lr": 2e-4, "main_lr": 5e-5,
           "lr_24k_final_conv": 1e-5}  # fmt: skip
OLDER = {  # configs of the older scripts name no recipe: their keys tell
    "phase10": {"train_data": "corpus/train/audio", "val_data": "corpus/valid/audio", "freeze_encoder": True,
                "freeze_vq": True, "num_epochs": 10, "batch_size": 48},
    "phase11": {"train_data": "corpus/train/audio", "val_data": "corpus/valid/audio", "num_epochs": 15,
                "audio_48khz_train_dir": "targets/train", "audio_48khz_val_dir": "targets/val",
                "warmup_epochs": 3, "warmup_learning_rate": 5e-5, "segment_length": 3.0},
}  # fmt: skip


@pytest.fixture(autouse=True)
def folders(tmp_path, monkeypatch):
    for name in ("corpus/train/audio", "corpus/valid/audio", "targets/train", "targets/val", "codes/train",
                 "codes/val", "codes_phase11/train", "codes_phase11/val"):  # fmt: skip
        (tmp_path / name).mkdir(parents=True)
    for name, config in OLDER.items():
        (tmp_path / f"{name}.json").write_text(json.dumps(config))
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("DATA_ROOT", raising=False)


TRAINER = {
    "": PHASE12,
    f"--device 0 {FLAGS}": PHASE12 | {"device": "0", "batch_size": 96, "epochs": 15},
    "--config CONFIGS/phase10_revolab_all.json --device 0": {
        "recipe": "phase10", "heads": "24k", "epochs": 10, "data_dir": "corpus/train/audio"},
    "--config phase10.json": {"recipe": "phase10", "data_dir": "corpus/train/audio", "main_lr": 1.5e-5},
    "--recipe phase10": {"data_dir": "corpus/train/audio", "val_data_dir": "corpus/valid/audio"},
    "--recipe phase11-standard": {"init": "random", "segment_schedule": "4.0",
                                  "audio_48k_dir": "targets/train"},
    "--config CONFIGS/phase11_decoder_48khz.json --device 0": {"recipe": "phase11-warmup", "warmup_epochs": 3,
                                                               "data_dir": "corpus/train/audio"},
    "--config phase11.json": {"recipe": "phase11-warmup", "segment_schedule": "3.0", "val_segment": 3.0},
    "--config phase11.json --codes_dir codes_phase11 --device 0": {
        "recipe": "phase11-fast", "cache_dir": "codes_phase11/train", "data_dir": "", "segment_schedule":
        "1.0,2.0,3.0,4.0", "audio_48k_dir": "targets/train"},
    "--config CONFIGS/phase11_decoder_48khz.json --codes_dir codes_phase11": {
        "recipe": "phase11-warmup", "cache_dir": "codes_phase11/train", "data_dir": ""},
    "--recipe phase11-fast --device 0 --batch_size 32 --epochs 15 --warmup_epochs 1 --limit 5000": {
        "limit": 5000, "heads": "48k", "main_lr": 1e-4, "cache_dir": "codes/train"},
    "--config CONFIGS/phase12_dual_head.json --codes_dir codes_phase11": {"cache_dir": "codes_phase11/train"},
}  # fmt: skip


@pytest.mark.parametrize("command", TRAINER)
def test_the_trainer_understands(command, capsys):
    argv = shlex.split(command.replace("CONFIGS", str(CONFIGS)))
    with pytest.raises(SystemExit):
        T.parse_args([*argv, "--print_config", "json"])
    said = json.loads(capsys.readouterr().out)
    for name, value in TRAINER[command].items():
        assert said[name]["value"] == value, name
    T.parse_args(argv)  # and nothing is missing


def test_batches_are_rounded_down_and_the_last_range_goes_on(capsys):
    for recipe, batches in (
        ("phase12", [192, 192, 96, 96, 57, 57, 43]),
        ("phase10", [96, 96, 48, 48, 28, 28, 21]),
    ):
        with pytest.raises(SystemExit):
            T.parse_args(["--recipe", recipe, "--epochs", "17", "--print_schedule", "3447109"])
        lines = capsys.readouterr().out.splitlines()
        found = [
            int(line.partition("batch ")[2].partition(",")[0]) for line in lines if line.startswith("epoch")
        ]
        assert found == [*batches, *batches[-1:] * 10]


def test_the_data_programs_take_the_older_flags(tmp_path):
    cache = run("cache_codes.py", *shlex.split(
        "--pretrained_model none --data_dir nowhere --output_dir codes_phase11/train --segment_length 4.0 "
        "--batch_size 32 --device 0"), code=1)  # fmt: skip
    assert "audio folder nowhere does not exist" in cache.stderr  # every flag was understood
    shutil.copytree(ROOT / "assets/speech", tmp_path / "X")
    split = run("prepare_dataset.py", *shlex.split("--input_dir X --train_ratio 0.95 --output_dir Y"))
    assert (tmp_path / "Y/train/audio").is_dir() and "training" in split.stdout
