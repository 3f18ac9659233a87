"""The cache of codes, read back: index, single shards, and what is refused or left out."""

import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import parquet_rows

from snac48.cache import CodeIndex, shard_rows
from snac48.cli import UserError
from snac48.codec import slice_at


def test_index_reads_back_the_parquet(cache_dir):
    index = CodeIndex(str(cache_dir))
    rows = parquet_rows(cache_dir)
    assert len(index) == len(rows)
    for i, row in enumerate(rows):
        assert index.path(i) == row["file_path"] and index.lengths[i] == row["audio_length"]
        for k, codes in enumerate(index.slice(i, 0, index.coarse(i))):
            assert codes.tolist() == row[f"codes_scale_{k}"]
        at = slice_at(2, 5, 512, (4, 2, 1))
        for k, codes in enumerate(index.slice(i, 2, 5)):
            a = at["scale_start"][k]
            assert codes.tolist() == row[f"codes_scale_{k}"][a : a + at["scale_len"][k]]


def test_index_refuses_what_is_not_a_cache(cache_dir, snac_dir, tmp_path):
    with pytest.raises(UserError, match="holds no codes_batch"):
        CodeIndex(str(tmp_path))
    with pytest.raises(UserError, match="does not exist"):
        CodeIndex(str(tmp_path / "nowhere"))
    shard = next(cache_dir.glob("*_0.parquet"))
    bad = tmp_path / "corrupt"
    bad.mkdir()
    (bad / shard.name).write_bytes(shard.read_bytes()[:-500])
    with pytest.raises(UserError, match="corrupt"):
        CodeIndex(str(bad))
    mixed = tmp_path / "mixed"
    mixed.mkdir()
    table = pq.read_table(shard)
    pq.write_table(table, mixed / "codes_batch_gpu0_0.parquet")
    meta = json.loads(table.schema.metadata[b"snac"]) | {"weights_sha256": "other"}
    pq.write_table(
        table.replace_schema_metadata({"snac": json.dumps(meta)}), mixed / "codes_batch_gpu0_1.parquet"
    )
    with pytest.raises(UserError, match="mixes models"):
        CodeIndex(str(mixed))


def test_malformed_rows_are_quarantined_by_reason(cache_dir, tmp_path):
    shard = next(cache_dir.glob("*_0.parquet"))
    table = pq.read_table(shard)
    rows = table.to_pylist()
    rows[0]["codes_scale_0"][0] = 64  # = codebook size
    rows[1]["file_path"] = "../../etc/passwd.wav"
    rows[2]["codes_scale_2"] = rows[2]["codes_scale_2"][:-1]
    rows[3]["audio_length"] = 10**9
    pq.write_table(pa.Table.from_pylist(rows, table.schema), tmp_path / shard.name)
    index = CodeIndex(str(tmp_path))
    assert len(index) == 1 and index.path(0) == rows[4]["file_path"]
    assert sum(index.bad.values()) == 4 and len(index.bad) == 4
    assert len(open(index.folder / "bad_rows.jsonl").readlines()) == 4


def test_one_shard_is_read_as_the_index_reads_it(cache_dir, tmp_path):
    """infer.py takes a single .parquet, wherever it lies and whatever it is called."""
    index, shard = CodeIndex(str(cache_dir)), tmp_path / "talk.parquet"
    shard.write_bytes((cache_dir / "codes_batch_gpu0_1.parquet").read_bytes())
    geometry, rows = shard_rows(shard)
    assert geometry == index.geometry
    for i, (path, codes, n) in enumerate(rows, 5):  # five rows a shard
        assert (path, n) == (index.path(i), index.lengths[i])
        for a, b in zip(codes, index.slice(i, 0, index.coarse(i)), strict=True):
            np.testing.assert_array_equal(a, b)
    assert i == 9 and [p.name for p in tmp_path.iterdir()] == ["talk.parquet"]
    shard.write_bytes(shard.read_bytes()[:-500])
    with pytest.raises(UserError, match="corrupt"):
        shard_rows(shard)
