"""210 bad inputs from one seed: parquet shards, wav files, checkpoints (tests/test_fuzz.py runs them all).

A case says what must become of it: "bad" is refused or counted under a reason; "good" is read; "either" is a
flip that may hit a byte without meaning. No case may crash a program, vanish uncounted or run code.
"""

import io
import json
import os
import pickle
import struct
import sys
import zipfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from snac48.cache import STAMP_COLUMNS

WAVS, SHARDS, CHECKPOINTS = 70, 90, 50


@dataclass
class Case:
    name: str
    data: object  # the file's bytes, or a function that makes it at a path
    expect: str = "bad"  # bad | good | either

    def write(self, path: Path) -> Path:
        if callable(self.data):
            self.data(path)
        else:
            path.write_bytes(self.data)
        return path


def spoil(rng, data: bytes, first: int = 0, last: int | None = None) -> bytes:
    """One bit of data[first:last] flipped."""
    at = int(rng.integers(first, last or len(data)))
    return data[:at] + bytes([data[at] ^ (1 << int(rng.integers(8)))]) + data[at + 1 :]


def fill(cases: list[Case], count: int, more) -> list[Case]:
    """`count` cases: those listed, then more() ones; fewer than listed is a mistake of whoever added one."""
    assert len(cases) <= count, (len(cases), count)
    while len(cases) < count:
        cases.append(more(len(cases)))
    names = [c.name for c in cases]
    assert len(set(names)) == count, sorted(n for n in names if names.count(n) > 1)
    return cases


# ---- wav ----


def wav(x, rate=24000, bits=16, channels=1, tag=1, **lies) -> bytes:
    """A RIFF file of samples x. lies: rate, channels, bits, tag, align, data, riff as its header says."""
    kind = {16: "<i2", 24: None, 32: "<f4"}[bits]
    scaled = x if bits == 32 else np.rint(np.clip(x, -1, 1) * 32767)
    body = np.asarray(scaled).astype(kind).tobytes()
    said = {"tag": 3 if bits == 32 else tag, "channels": channels, "rate": rate, "bits": bits,
            "align": channels * bits // 8, "data": len(body), "riff": 36 + len(body)} | lies  # fmt: skip
    second = said["rate"] * said["align"] & 0xFFFFFFFF
    fmt = struct.pack("<HHIIHH", said["tag"], said["channels"], said["rate"], second, said["align"],
                      said["bits"])  # fmt: skip
    head = b"RIFF" + struct.pack("<I", said["riff"]) + b"WAVEfmt " + struct.pack("<I", 16) + fmt
    return head + b"data" + struct.pack("<I", said["data"]) + body


def wavs(seed: int) -> list[Case]:
    rng = np.random.default_rng([seed, 1])
    x = (0.2 * np.sin(np.arange(28000) * 0.05) + 0.02 * rng.standard_normal(28000)).astype(np.float32)
    whole = wav(x)
    cases = [Case(f"truncated_{i}", whole[: int(rng.integers(1, len(whole) - 1))]) for i in range(10)]
    cases += [
        Case("header_claims_one_more", wav(x, data=2 * len(x) + 2)),
        Case("header_claims_double", wav(x, data=4 * len(x))),
        Case("header_claims_2_gib", wav(x, data=0x7FFE0000)),
        Case("header_claims_less", wav(x, data=2 * 26000), "good"),
        Case("header_claims_nothing", wav(x, data=0), "either"),
        Case("header_of_a_stream", wav(x, data=0xFFFFFFFF, riff=0xFFFFFFFF), "good"),
        Case("riff_size_lies", wav(x, riff=12), "either"),
        Case("zero_samples", wav(x[:0])),
        Case("one_sample", wav(x[:1])),
        Case("one_byte_of_a_sample", wav(x[:1])[:-1]),
        Case("text", b"this is not audio, only its name says so\n" * 50),
        Case("html", b"<!doctype html><title>404</title>" * 9),
        Case("empty", b""),
        Case("only_riff", b"RIFF"),
        Case("riff_of_something_else", b"RIFF\x24\0\0\0AVI " + bytes(40)),
        Case("no_fmt_chunk", whole[:12] + whole[36:]),
        Case("no_data_chunk", whole[:36]),
        Case("endless_list_chunk", whole[:36] + b"LIST\xff\xff\xff\xff" + whole[36:]),
        Case("fmt_of_four_bytes", whole[:16] + struct.pack("<I", 4) + whole[20:24] + whole[36:]),
        Case("random_bytes", rng.bytes(5000)),
        Case("zeros", bytes(50000)),
        Case("link_to_itself", lambda p: p.symlink_to(p.name)),
        Case("dangling_link", lambda p: p.symlink_to("nothing_here")),
        Case("link_out_of_the_root", lambda p: p.symlink_to(np.__file__)),
        Case("pipe", os.mkfifo),
    ]
    cases += [Case(f"rate_{r}", wav(x, rate=r)) for r in (0, 1, 3, 2**31 - 1, 2**31, 2**32 - 1)]
    cases += [Case(f"good_rate_{r}", wav(x, rate=r), "good") for r in (8000, 16000)]
    cases += [Case(f"channels_{n}", wav(x, channels=n, align=2 * n & 0xFFFF)) for n in (0, 2000, 65535)]
    for n in (0, 1, 7, 17, 64, 65535):
        cases.append(Case(f"bits_{n}", whole[:34] + struct.pack("<H", n) + whole[36:], "either"))
    cases += [Case(f"tag_{n}", wav(x, tag=n), "either") for n in (0, 2, 0x55, 0xFFFE)]
    for i, value in enumerate((np.nan, np.inf, -np.inf)):
        y = x.copy()
        y[int(rng.integers(len(y)))] = value
        cases.append(Case(f"not_finite_{i}", wav(y, bits=32)))
    cases.append(Case("all_nan", wav(np.full(28000, np.nan, np.float32), bits=32)))
    cases.append(Case("deafening", wav(x * 1e30, bits=32), "either"))
    return fill(cases, WAVS, lambda i: Case(f"flip_{i}", spoil(rng, whole, 0, 44), "either"))


# ---- parquet ----


def shards(seed: int, table, escaping: str) -> list[Case]:
    """Spoiled copies of a good shard `table`; escaping: path of a link in the audio root that leaves it."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    rng = np.random.default_rng([seed, 2])

    def packed(t) -> bytes:
        out = io.BytesIO()
        pq.write_table(t, out, write_page_checksum=True)
        return out.getvalue()

    def row(name, column, value, expect="bad") -> Case:
        """One row's value replaced."""
        rows = table.to_pylist()
        r = rows[int(rng.integers(len(rows)))]
        r[column] = value(r[column]) if callable(value) else value
        schema = table.schema
        wide = "int64" if column.startswith("codes") else None
        if wide:
            at = schema.get_field_index(column)
            schema = schema.set(at, pa.field(column, pa.list_(pa.int64())))
        return Case(name, packed(pa.Table.from_pylist(rows, schema)), expect)

    def column(name, key, array, expect="bad") -> Case:
        at = table.schema.get_field_index(key)
        return Case(name, packed(table.set_column(at, key, array)), expect)

    def meta(name, value) -> Case:
        if isinstance(value, dict):
            value = json.dumps(json.loads(table.schema.metadata[b"snac"]) | value)
        rest = {k: v for k, v in table.schema.metadata.items() if k != b"snac"}
        return Case(name, packed(table.replace_schema_metadata(rest | ({"snac": value} if value else {}))))

    def put(value):
        return lambda codes: [*codes[:-1], value]

    whole, n = packed(table), table.num_rows
    codes = table["codes_scale_1"].to_pylist()
    cases = [Case(f"truncated_{i}", whole[: int(rng.integers(0, len(whole)))]) for i in range(8)]
    cases += [Case(f"flipped_page_{i}", spoil(rng, whole, 4, 2000), "either") for i in range(4)]
    cases += [
        Case("empty", b""),
        Case("text", b"file_path,audio_length\n"),
        Case("magic_only", b"PAR1PAR1"),
        Case("random_bytes", b"PAR1" + rng.bytes(3000) + b"PAR1"),
        Case("no_rows", packed(table.slice(0, 0))),
        *(  # older caches have no stamps
            Case(f"without_{c}", packed(table.drop_columns([c])), "good" if c in STAMP_COLUMNS else "bad")
            for c in table.column_names
        ),
        column("codes_are_fractions", "codes_scale_1", pa.array([[v + 0.5 for v in c] for c in codes])),
        column("codes_are_text", "codes_scale_1", pa.array([["x" for _ in c] for c in codes])),
        column("codes_are_numbers", "codes_scale_1", pa.array([c[0] for c in codes])),
        column("codes_are_lists_of_lists", "codes_scale_1", pa.array([[c] for c in codes])),
        column("codes_are_records", "codes_scale_1", pa.array([{"a": c} for c in codes])),
        column("codes_are_nothing", "codes_scale_1", pa.nulls(n)),
        column("codes_are_large_lists", "codes_scale_1", pa.array(codes, pa.large_list(pa.int32())), "good"),
        column("codes_are_bools", "codes_scale_1", pa.array([[v > 9 for v in c] for c in codes]), "either"),
        column("paths_are_numbers", "file_path", pa.array(range(n))),
        column("paths_are_bytes", "file_path", pa.array([b"a/\xff.wav"] * n)),
        column("paths_are_nothing", "file_path", pa.nulls(n)),
        column("lengths_are_text", "audio_length", pa.array(["long"] * n)),
        column("lengths_are_fractions", "audio_length", pa.array([0.5 + i for i in range(n)])),
        column("lengths_are_nan", "audio_length", pa.array([float("nan")] * n)),
        row("code_negative", "codes_scale_0", put(-1)),
        row("code_very_negative", "codes_scale_2", put(-(2**40))),
        row("code_one_too_large", "codes_scale_1", put(64)),
        row("code_of_40_bits", "codes_scale_0", put(2**40)),
        row("code_65536", "codes_scale_2", put(65536)),
        row("code_null", "codes_scale_1", put(None)),
        row("scale_0_one_short", "codes_scale_0", lambda c: c[:-1]),
        row("scale_1_one_short", "codes_scale_1", lambda c: c[:-1]),
        row("scale_2_one_more", "codes_scale_2", lambda c: [*c, 1]),
        row("scale_2_empty", "codes_scale_2", []),
        row("scale_0_empty", "codes_scale_0", []),
        row("scale_0_null", "codes_scale_0", None),
        *(row(f"length_{v}", "audio_length", v) for v in (0, -5, 10**9, 2**62, 1, None)),
        *(row(f"path_{i}", "file_path", v) for i, v in enumerate([
            "/etc/passwd", "../x.wav", "a/../../x.wav", "a/..", "..", "", None, "a\0b.wav", "\\\\host\\x.wav",
            "C:\\x.wav", "x/" * 3000 + "y.wav", "y" * 300 + ".wav", "not/there.wav", ".", escaping])),
        meta("no_metadata", None),
        meta("metadata_is_no_json", "{"),
        meta("metadata_is_a_list", "[1, 2]"),
        meta("metadata_is_empty", "{}"),
        meta("strides_are_zero", {"vq_strides": [4, 0, 1]}),
        meta("strides_are_empty", {"vq_strides": []}),
        meta("hop_is_negative", {"hop_length": -512}),
        meta("codebook_is_text", {"codebook_size": "many"}),
        meta("another_key", {"surprise": 1}),
    ]  # fmt: skip
    return fill(
        cases, SHARDS, lambda i: Case(f"flip_{i}", spoil(rng, whole), "either"))  # fmt: skip


# ---- checkpoints ----


class Call:
    """Pickles as a call of function(*args): what weights_only=True must refuse."""

    def __init__(self, function, *args):
        self.call = function, args

    def __reduce__(self):
        return self.call


def checkpoints(seed: int, good: Path, marker: Path) -> list[Case]:
    """Spoiled copies of the checkpoint `good`; whatever would run code makes the file `marker`."""
    import subprocess

    import torch

    rng = np.random.default_rng([seed, 3])
    whole = good.read_bytes()
    touch = f"open({str(marker)!r}, 'w')"

    def packed(state) -> bytes:
        out, limit = io.BytesIO(), sys.getrecursionlimit()
        sys.setrecursionlimit(100_000)  # very_deep
        torch.save(state, out)
        sys.setrecursionlimit(limit)
        return out.getvalue()

    def changed(name, change, expect="bad") -> Case:
        state = torch.load(good, weights_only=True)
        change(state)
        return Case(name, packed(state), expect)

    def put(*path, value) -> Case:
        def change(state):
            for key in path[:-1]:
                state = state[key]
            old = state[path[-1]]
            state[path[-1]] = value(old) if callable(value) else value

        shown = value.__name__ if callable(value) else str(value)[:12]
        return changed("_".join(map(str, path)) + "=" + shown.replace("/", ""), change)

    def without(*path) -> Case:
        def change(state):
            for key in path[:-1]:
                state = state[key]
            del state[path[-1]]

        return changed("without_" + "_".join(map(str, path)), change)

    state = torch.load(good, weights_only=True)
    weight = next(k for k, v in state["model"].items() if v.ndim == 3)
    moment = next(i for i, s in state["optimizer"]["state"].items() if s["exp_avg"].ndim == 3)
    directory = whole.rfind(b"PK\x01\x02", 0, whole.find(b"PK\x01\x02") + 4)

    def sparse(w):
        return w.to_sparse()

    def csr(w):
        return w.reshape(w.shape[0], -1).to_sparse_csr()

    def meta(w):
        return w.to("meta")

    def nested(w):
        return torch.nested.nested_tensor([w[0], w[0]])

    def half(w):
        return w.half()

    def turned(w):
        return w.transpose(0, 1).contiguous()

    def vast(w):
        return torch.zeros(1).expand(2**40)

    def listed(w):
        return w.tolist()

    def own_pickle() -> bytes:
        """The good archive with a pickle of ours in it and a right CRC."""
        out = io.BytesIO()
        with zipfile.ZipFile(good) as z, zipfile.ZipFile(out, "w") as new:
            for info in z.infolist():
                body = z.read(info)
                if info.filename.endswith("data.pkl"):
                    body = pickle.dumps({"model": Call(eval, touch)}, protocol=2)
                new.writestr(info.filename, body)
        return out.getvalue()

    def bomb() -> bytes:
        out = io.BytesIO()
        with zipfile.ZipFile(good) as z, zipfile.ZipFile(out, "w", zipfile.ZIP_DEFLATED) as new:
            for info in z.infolist():
                new.writestr(info.filename, z.read(info))
        return out.getvalue()

    def script(path):
        torch.jit.script(torch.nn.Linear(2, 2)).save(str(path))

    circle: dict = {}
    circle["again"] = circle
    deep: list = []
    for _ in range(3000):
        deep = [deep]
    cases = [Case(f"truncated_{i}", whole[: int(rng.integers(1, len(whole)))]) for i in range(3)]
    cases += [
        Case(f"flipped_weights_{i}", spoil(rng, whole, len(whole) // 3, len(whole) // 2)) for i in range(2)
    ]
    cases += [
        Case("empty", b""),
        Case("text", b"no checkpoint"),
        Case("runs_eval", packed({"model": Call(eval, touch)})),
        Case("runs_shell", packed(state | {"versions": Call(os.system, f"touch '{marker}'")})),
        Case("runs_process", packed({"model": Call(subprocess.check_call, ["touch", str(marker)])})),
        Case("runs_as_plain_pickle", pickle.dumps({"model": Call(eval, touch)})),
        Case("runs_in_the_good_archive", own_pickle()),
        Case("torchscript", script),
        Case("compressed", bomb()),
        Case("a_list", packed([1, 2])),
        Case("a_tensor", packed(torch.zeros(3))),
        Case("a_circle", packed(state | {"versions": circle}), "either"),
        Case("very_deep", packed(state | {"versions": deep}), "either"),
        *(put("model", weight, value=f) for f in (sparse, csr, meta, nested, half, turned, vast, listed)),
        without("model", weight),
        without("model"),
        without("optimizer"),
        without("codes"),
        without("guard"),
        without("scheduler"),
        without("validated_epoch"),
        without("optimizer", "param_groups"),
        put("optimizer", "state", moment, "exp_avg", value=turned),
        put("optimizer", "state", moment, "exp_avg_sq", value=listed),
        without("optimizer", "state", moment, "exp_avg"),
        put("ema", weight, value=turned),
        without("ema", weight),
        put("global_step", value="seven"),
        put("global_step", value=-1),
        put("global_step", value=10**9),
        put("phase", value="coffee"),
        put("args", value=[1]),
        put("geometry", value={"hop_length": 512}),
        put("best", value=0.5),
    ]
    return fill(cases, CHECKPOINTS,
                lambda i: Case(f"flip_in_directory_{i}", spoil(rng, whole, directory), "either"))  # fmt: skip
