"""cache_codes.py --import: caches of the older schema, made by stock SNAC as the older scripts made them."""

import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import soundfile as sf
import torch
from conftest import call, make_snac, parquet_rows, refused, voice

import cache_codes
from snac48.cache import STAMP_COLUMNS


@pytest.fixture(scope="module")
def recordings(tmp_path_factory):
    """40 recordings of 24 kHz: no resampling, so that every script gives the encoder the same samples."""
    root = tmp_path_factory.mktemp("old") / "audio"
    for i in range(40):
        path = root / f"s{i % 4}" / f"{i:02d}.wav"
        path.parent.mkdir(parents=True, exist_ok=True)
        sf.write(path, voice(1.0 + 0.01 * i, 24000, i), 24000)
    return root


def encoded(model, x, padded=True) -> list:
    """Codes of stock SNAC; not padded: encoder and quantizer themselves, on the whole coarse codes."""
    audio = torch.from_numpy(x)[None, None]
    if padded:
        return [c.numpy() for c in model.encode(audio)]
    return [c.numpy() for c in model.quantizer(model.encoder(audio[..., : len(x) // 2048 * 2048]))[1]]


def old_cache(
    folder, recordings, model, unpadded=(), foreign=(), form="flat", root="/mnt/data/combine/train"
):
    """Shards of 15 rows without our metadata; paths absolute, of another machine, or relative (root "")."""
    folder.mkdir()
    other = make_snac(seed=7)
    files = sorted(recordings.rglob("*.wav"), reverse=True)
    for n, first in enumerate(range(0, len(files), 15)):
        columns = {}
        for path in files[first : first + 15]:
            rel, (x, _) = path.relative_to(recordings).as_posix(), sf.read(path, dtype="float32")
            codes = encoded(other if rel in foreign else model, x, rel not in unpadded)
            row = {"file_path": f"{root}/{rel}" if root else rel, "audio_length": len(x)}
            for k, c in enumerate(codes):
                row[f"codes_scale_{k}"] = c.reshape(-1).tolist() if form == "flat" else c.tolist()
                row |= {f"shape_scale_{k}": list(c.shape)} if form == "flat" else {}
            for key, value in row.items():
                columns.setdefault(key, []).append(value)
        pq.write_table(pa.table(columns), folder / f"codes_batch_gpu{n % 2}_{n}.parquet")
    return folder


def codes_of(cache) -> list[dict]:
    """Its rows, without what tells their recordings from others: an import does not know that."""
    return [{k: v for k, v in row.items() if k not in STAMP_COLUMNS} for row in parquet_rows(cache)]


def flags(recordings, out, snac_dir) -> tuple:
    folders = ("--data_dir", recordings, "--output_dir", out, "--pretrained_model", snac_dir)
    return (*folders, "--device", "cpu", "--num_workers", 0, "--min_seconds", 0.1)


@pytest.fixture(scope="module")
def anew(recordings, snac_dir, tmp_path_factory):
    out = tmp_path_factory.mktemp("anew")
    assert call(cache_codes, *flags(recordings, out, snac_dir)) == 0
    return out


@pytest.mark.parametrize(
    ("form", "root"), [("flat", "/mnt/data/combine/train"), ("nested", ""), ("flat", "data/audio")]
)
def test_an_import_is_the_cache_made_anew(recordings, snac, snac_dir, anew, tmp_path, capsys, form, root):
    old = old_cache(tmp_path / "old", recordings, snac, form=form, root=root)
    args = (*flags(recordings, tmp_path / "c", snac_dir), "--import", old, "--import_sample", 9)
    assert call(cache_codes, *args) == 0
    assert "9 of 9 rows agree" in capsys.readouterr().out
    for path in anew.glob("*.parquet"):  # the same files: the same index, the same order, the same losses
        imported, encoded = pq.read_table(tmp_path / "c" / path.name), pq.read_table(path)
        assert imported.equals(encoded.select(imported.column_names))
        lacks = set(encoded.column_names) - set(imported.column_names)
        assert lacks == set(STAMP_COLUMNS)  # what the recordings were is not known of all
        own = encoded.schema.metadata
        assert imported.schema.metadata == {k: v for k, v in own.items() if k != b"encoding"}  # not known
    for name in ("metadata.json", "skipped.jsonl"):
        assert (tmp_path / "c" / name).read_text() == (anew / name).read_text()
    assert "not empty" in refused(cache_codes, *args)
    assert call(cache_codes, *flags(recordings, tmp_path / "c", snac_dir)) == 0  # nothing is left to do
    assert len(parquet_rows(tmp_path / "c")) == 40
    assert {p.name for p in tmp_path.iterdir()} == {"old", "c"}  # nothing temporary stays


def test_both_splits_of_an_older_folder(recordings, snac, snac_dir, tmp_path, monkeypatch):
    """Conventional places: what lies in codes_phase11 goes to codes, from the recordings in corpus."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("DATA_ROOT", raising=False)
    (tmp_path / "codes_phase11").mkdir()
    for split, part in (("train", "s0"), ("valid", "s1")):
        (tmp_path / "corpus" / split).mkdir(parents=True)
        (tmp_path / "corpus" / split / "audio").symlink_to(recordings / part)
        old_cache(tmp_path / "codes_phase11" / split.replace("valid", "val"), recordings / part, snac)
    model = ("--pretrained_model", snac_dir, "--num_workers", 0)
    assert "--import codes_phase11/train" in refused(cache_codes, *model)  # they would be mixed
    assert call(cache_codes, "--import", "codes_phase11", *model) == 0
    assert [len(parquet_rows(tmp_path / "codes" / split)) for split in ("train", "val")] == [10, 10]
    assert "one split" in refused(cache_codes, "--import", "codes_phase11", "--data_dir", "corpus", *model)


def test_wrong_rows_are_named_and_encoded_afterwards(recordings, snac, snac_dir, anew, tmp_path, capsys):
    rels = sorted(p.relative_to(recordings).as_posix() for p in recordings.rglob("*.wav"))
    unpadded, foreign = set(rels[3::9]), set(rels[5::10])
    assert not unpadded & foreign
    old = old_cache(tmp_path / "old", recordings, snac, unpadded, foreign)
    args = (*flags(recordings, tmp_path / "c", snac_dir), "--import", old)
    told = refused(cache_codes, *args, "--import_sample", 30)
    assert "sampled rows are not this model's" in told and "--import_sample -1" in told
    assert "codes of another model" in told and not (tmp_path / "c").exists()
    assert call(cache_codes, *args, "--import_sample", -1) == 0
    skipped = {r["file_path"]: r["reason"] for r in map(json.loads, open(tmp_path / "c" / "skipped.jsonl"))}
    without = {rel for rel, why in skipped.items() if "without padding" in why}
    assert without == unpadded and set(skipped) - without == foreign
    by_path = {r["file_path"]: r for r in codes_of(anew)}
    kept = codes_of(tmp_path / "c")
    assert {r["file_path"] for r in kept} == set(rels) - set(skipped)
    assert all(r == by_path[r["file_path"]] for r in kept)
    counts = json.loads((tmp_path / "c" / "metadata.json").read_text())
    assert counts["rows"] == len(kept) and counts["skipped"] == len(skipped)
    assert f"{len(skipped)} files of {recordings} are not in it" in capsys.readouterr().out
    assert call(cache_codes, *flags(recordings, tmp_path / "c", snac_dir)) == 0
    assert {r["file_path"]: r for r in codes_of(tmp_path / "c")} == by_path
    assert json.loads((tmp_path / "c" / "metadata.json").read_text())["rows"] == 40


def test_what_is_no_older_cache_is_refused(recordings, snac, snac_dir, anew, tmp_path):
    args = flags(recordings, tmp_path / "c", snac_dir)
    assert "needs no import" in refused(cache_codes, *args, "--import", anew)
    assert "holds no codes_batch" in refused(cache_codes, *args, "--import", recordings)
    old = old_cache(tmp_path / "old", recordings, snac)
    assert "cache that does not say which model" in refused(cache_codes, *flags(recordings, old, snac_dir))
    two = old_cache(tmp_path / "two", recordings, snac)
    for path in two.glob("*.parquet"):
        pq.write_table(pq.read_table(path).drop_columns(["codes_scale_2"]), path)
    assert "is no cache of the older schema" in refused(cache_codes, *args, "--import", two)
    assert np.all([not p.name.startswith(".") for p in tmp_path.iterdir()]) and not (tmp_path / "c").exists()
