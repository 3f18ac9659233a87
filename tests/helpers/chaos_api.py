"""Cases of the Python API, exports and codecs: what a caller may hand in that nobody can mean."""

import functools
import json
import math
import tempfile
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch
from conftest import make_snac, save_snac
from safetensors.torch import load_file, save_file

from helpers.chaos import Case
from helpers.decoders import opened
from snac48.codec import file_hash, load_snac
from snac48.decoder import DualHead, DualHeadDecoder, load_dual_head

PER = (1, 2, 4)


@functools.cache
def tts() -> DualHead:
    made = opened()
    made.snac = make_snac()
    return made


def codes(n=3, batch=1, dtype=torch.int64) -> list:
    return [torch.ones(batch, n * f, dtype=dtype) for f in PER]


def having(k: int, value, at=(0, -1), n=3) -> list:
    made = codes(n)
    made[k][at] = value
    return made


def bad_codes() -> list[tuple[str, object, str]]:
    """(name, codes, what a person must be told)."""
    one = codes()
    found = [(f"code {v} in scale {k}", having(k, v), rf"codes\[{k}\] holds {v}: .* 0 to 63")
             for k in range(3) for v in (-1, 64, 4096, 2**40, -(2**63))]  # fmt: skip
    found += [
        (f"{name} in scale {k}", [*one[:k], bad, *one[k + 1 :]], words)
        for k in range(3)
        for name, bad, words in (
            ("a step too few", one[k][:, :-1], "scales don't match|none to decode"),
            ("a step too many", torch.cat([one[k], one[k][:, :1]], 1), "scales don't match"),
            ("another batch", one[k].repeat(2, 1), "scales don't match"),
            ("one dimension", one[k][0], "got shapes"),
            ("three dimensions", one[k][None], "got shapes"),
            ("floats", one[k].float(), "float32 values: integer numbers"),
            ("half floats", one[k].half(), "float16 values"),
            ("NaN", one[k] * math.nan, "float32 values"),
            ("booleans", one[k].bool(), "bool values"),
            ("complex numbers", one[k].to(torch.complex64), "complex64 values"),
            ("numpy floats", one[k].double().numpy(), "float64 values"),
            ("numpy objects", one[k].numpy().astype(object), "array of object"),
            ("numpy strings", one[k].numpy().astype(str), "array of <U"),
            ("a list", one[k].tolist(), "is a list: give a tensor"),
            ("None", None, "is a NoneType"),
            ("a sparse tensor", one[k].to_sparse(), "sparse"),
        )
    ]
    found += [
        ("no scales", [], "list of 3 scales"),
        ("two scales", one[:2], "got 2 scales"),
        ("four scales", [*one, one[2]], "got 4 scales"),
        ("one tensor", one[0], "list of 3 scales .* got Tensor"),
        ("a dictionary", dict(enumerate(one)), "got dict"),
        ("None", None, "got NoneType"),
        ("a string", "codes", "got str"),
        ("a number", 7, "got int"),
        ("fine to coarse", one[::-1], "scales don't match"),
        ("all of one length", [one[0]] * 3, "scales don't match"),
        ("no streams", [c[:0] for c in one], "codes of 0 streams"),
        ("one dimension each", [c[0] for c in one], "got shapes"),
        ("0 steps", [c[:, :0] for c in one], "0 coarse steps, none to decode"),
    ]
    return found


def bad_calls() -> list[tuple[str, object, str]]:
    """(name, function, words): everything but the codes themselves."""
    decode = lambda **how: lambda: tts().decode(codes(), **how)
    stream = lambda **how: lambda: tts().open_stream(**how)
    encode = lambda audio: lambda: tts().encode(audio)
    calls = [(f"decode {name}", decode(**how), words) for name, how, words in (
        ("unknown head", {"heads": ["44k"]}, r"\['44k'\]: .*\['24k', '48k'\]"),
        ("a head's name alone", {"heads": "48k"}, "give a list"),
        ("no heads", {"heads": []}, "give a list"),
        ("a negative chunk", {"chunk_seconds": -1}, "chunk_seconds -1"),
        ("a NaN chunk", {"chunk_seconds": math.nan}, "chunk_seconds nan"),
        ("an infinite chunk", {"chunk_seconds": math.inf}, "chunk_seconds inf"),
        ("a chunk of text", {"chunk_seconds": "1"}, "chunk_seconds '1'"),
        ("a seed of 70 bits", {"noise_seed": 1 << 70}, "integer of 64 bits"),
        ("a seed of text", {"noise_seed": "a"}, "integer of 64 bits"),
        ("a fractional seed", {"noise_seed": 0.5}, "integer of 64 bits"),
        ("two seeds for one stream", {"noise_seed": [1, 2]}, "list of 1"),
    )]  # fmt: skip
    calls += [(f"open_stream {name}", stream(**how), words) for name, how, words in (
        ("batch 0", {"batch": 0}, "batch 0"),
        ("a negative batch", {"batch": -3}, "batch -3"),
        ("a fractional batch", {"batch": 1.5}, "batch 1.5"),
        ("a batch of text", {"batch": "many"}, "batch 'many'"),
        ("a boolean batch", {"batch": True}, "batch True"),
        ("a billion streams", {"batch": 10**9}, "batch 1000000000"),
        ("unknown head", {"heads": ["96k"]}, "96k"),
        ("seeds of another batch", {"batch": 2, "noise_seed": [1]}, "list of 2"),
    )]  # fmt: skip
    push = lambda batch, given, rows: lambda: tts().open_stream(batch).push(given, rows)
    calls += [(f"push {name}", push(*how), words) for name, how, words in (
        ("codes of another batch", (2, codes(), None), "codes of 1 streams: there are 2"),
        ("a row that isn't there", (2, codes(), [2]), r"rows \[2\] are not"),
        ("a negative row", (2, codes(), [-1]), r"rows \[-1\] are not"),
        ("a row twice", (2, codes(batch=2), [1, 1]), "name a stream twice"),
        ("rows of text", (2, codes(), ["a"]), r"rows \['a'\] are not"),
        ("a row alone, not a list", (2, codes(), 1), "rows 1 are not a list"),
        ("more rows than codes", (2, codes(), [0, 1]), "codes of 1 streams: there are 2"),
    )]  # fmt: skip
    calls += [("push all at different positions", uneven, "say which"),
              ("stream of changing batch", lambda: list(tts().stream([codes(), codes(batch=2)])), "follow"),
              ("stream of nothing", lambda: list(tts().stream([])), "no codes"),
              ("stream of None", lambda: list(tts().stream([None])), "got NoneType")]  # fmt: skip
    loud = torch.zeros(1, 1, 4096)
    calls += [(f"encode {name}", encode(audio), words) for name, audio, words in (
        ("one dimension", loud[0, 0], r"\[B, 1, N\]"),
        ("two dimensions", loud[0], r"\[B, 1, N\]"),
        ("stereo", loud.repeat(1, 2, 1), r"\[B, 1, N\]"),
        ("nothing", loud[..., :0], "at least one sample"),
        ("no clips", loud[:0], "at least one sample"),
        ("16-bit samples", loud.to(torch.int16), "int16 values: floating"),
        ("numpy 16-bit samples", loud.numpy().astype(np.int16), "int64 values|int16"),
        ("NaN", loud * math.nan, "NaN"),
        ("infinity", loud + math.inf, "NaN or infinite"),
        ("a list", [0.0] * 4096, "is a list"),
        ("None", None, "is a NoneType"),
        ("a path", "talk.wav", "is a str"),
        ("complex samples", loud.to(torch.complex64), "complex64"),
    )]  # fmt: skip
    return calls


def uneven():
    stream = tts().open_stream(2)
    stream.push(codes(), [0])
    stream.push(codes(batch=2))


# ---- exports and codecs ----


@functools.cache
def good(what: str) -> dict:
    """{name: bytes} of the files of a good export or codec."""
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        if what == "codec":
            save_snac(make_snac(), folder)
        else:
            state = DualHeadDecoder(make_snac()).state_dict()
            save_file({k: v.contiguous().clone() for k, v in state.items()}, folder / "model.safetensors")
            describe(folder, tts().config, asdict(tts().geometry))
        return {p.name: p.read_bytes() for p in folder.iterdir()}


def put(what: str, folder: Path) -> Path:
    for name, data in good(what).items():
        (folder / name).write_bytes(data)
    return folder


def describe(folder: Path, config: dict, geometry: dict) -> None:
    made = {"model_config": config, "geometry": geometry}
    made["weights_sha256"] = file_hash(folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(made))


def change_config(part: str, **changes):
    def change(folder):
        made = json.loads((folder / "config.json").read_text())
        made[part] |= changes
        (folder / "config.json").write_text(json.dumps(made))

    return change


def change_weights(key: str, edit, honest=True):
    """edit(tensor) -> tensor, or None: without it. honest: config.json knows the new file."""

    def change(folder):
        state, made = (
            load_file(folder / "model.safetensors"),
            json.loads((folder / "config.json").read_text()),
        )
        name = next(k for k in state if key in k)
        new = edit(state.pop(name))
        save_file(state if new is None else state | {name: new.contiguous()}, folder / "model.safetensors")
        if honest:
            describe(folder, made["model_config"], made["geometry"])

    return change


def change_file(name: str, edit):
    """edit(bytes) -> bytes, or None: without it."""

    def change(folder):
        data = edit((folder / name).read_bytes())
        (folder / name).unlink() if data is None else (folder / name).write_bytes(data)

    return change


def bad_exports() -> list[tuple[str, object, str]]:
    nan = lambda x: x.index_fill(0, torch.tensor([0]), math.nan)
    weights, config = "model.safetensors", "config.json"
    made = [(f"NaN in {key}", change_weights(key, nan), "NaN or infinite weights, first in")
            for key in ("trunk", "head_24k", "head_48k", "codebook", "alpha", "bias")]  # fmt: skip
    made += [(f"{name} of {key}", change_weights(key, edit), words)
             for key in ("trunk", "head_48k", "codebook")
             for name, edit, words in (
                 ("infinity", lambda x: x / 0, "NaN or infinite"),
                 ("half floats", lambda x: x.half(), "don't fit this model"),
                 ("another shape", lambda x: x.flatten()[:1], "don't fit|describes no model"),
                 ("nothing", lambda x: None, "don't fit|describes no model|lacks"))]  # fmt: skip
    made += [(f"geometry with {k} {v}", change_config("geometry", **{k: v}), words) for k, v, words in (
        ("sampling_rate", 16000, "geometry says sampling_rate 16000"), ("hop_length", 256, "hop_length 256"),
        ("vq_strides", [8, 4, 2], "vq_strides"), ("vq_strides", [], "describes no codec"),
        ("vq_strides", [4, 3, 1], "describes no codec"), ("vq_strides", None, "describes no codec"),
        ("codebook_size", 4096, "codebook_size 4096"), ("codebook_size", 0, "describes no codec"),
        ("codebook_size", -64, "describes no codec"), ("hop_length", "512", "describes no codec"),
        ("hop_length", 1e308, "describes no codec"), ("unknown", 1, "describes no codec"))]  # fmt: skip
    made += [(f"model with {k} {v}", change_config("model_config", **{k: v}), words) for k, v, words in (
        ("decoder_dim", 128, "don't fit"), ("decoder_dim", 10**9, "don't fit|describes no model"),
        ("decoder_dim", 0, "don't fit|describes no model"), ("decoder_dim", "64", "describes no model"),
        ("decoder_rates", [8, 8, 4, 4], "hop_length"), ("decoder_rates", [], "hop_length|no model"),
        ("vq_strides", [2, 1], "vq_strides"), ("codebook_size", 32, "codebook_size"),
        ("sampling_rate", 44100, "sampling_rate"), ("noise", False, "don't fit"),
        ("attn_window_size", 8, "don't fit|describes no model"), ("depthwise", False, "don't fit"),
        ("codebook_dim", None, "describes no model"), ("made_up", 1, "describes no model"))]  # fmt: skip
    made += [(f"{name}: {what}", change_file(name, edit), words)
             for name, words in ((weights, "cannot be read|is no dual-head|not the file"),
                                 (config, "cannot be read"))
             for what, edit in (("empty", lambda b: b""), ("cut to half", lambda b: b[: len(b) // 2]),
                                ("its last byte lost", lambda b: b[:-1]),
                                ("gone", lambda b: None),
                                ("zeros", lambda b: bytes(len(b))),
                                ("text", lambda b: b"hello"))]  # fmt: skip
    flip = lambda b: b[:-3] + bytes([b[-3] ^ 1]) + b[-2:]
    made += [("one bit of a weight", change_file(weights, flip), "SHA-256"),
             ("weights of another model", change_weights("trunk", lambda x: x + 1, False), "SHA-256"),
             ("a list as config", change_file(config, lambda b: b"[]"), "cannot be read"),
             ("a number as config", change_file(config, lambda b: b"3"), "cannot be read"),
             ("no geometry", change_file(config, lambda b: b'{"model_config": {}}'), "cannot be read"),
             ("a list as model", change_file(config, lambda b: b'{"model_config": [], "geometry": {}}'),
              "describes no")]  # fmt: skip
    return made


def open_export(change, folder: Path):
    change(put("export", folder))
    load_dual_head(folder)


def bad_codecs() -> list[tuple[str, object, str]]:
    def edited(key, edit):
        def change(folder):
            state = torch.load(folder / "pytorch_model.bin")
            name = next(k for k in state if k.startswith(key))
            state[name] = edit(state[name])
            torch.save(state, folder / "pytorch_model.bin")

        return change

    nan = lambda x: x.index_fill(0, torch.tensor([0]), math.nan)
    made = [(f"NaN in {key}", edited(key, nan), "NaN or infinite weights")
            for key in ("encoder", "decoder", "quantizer.quantizers.1.codebook")]  # fmt: skip
    made += [("codebook of one entry", edited("quantizer.quantizers.2.codebook", torch.zeros_like),
              "all entries of codebook 2")]  # fmt: skip
    made += [(f"{name}: {what}", change_file(name, edit), "could not be loaded|lacks")
             for name in ("pytorch_model.bin", "config.json")
             for what, edit in (("empty", lambda b: b""), ("cut to half", lambda b: b[: len(b) // 2]),
                                ("gone", lambda b: None), ("zeros", lambda b: bytes(len(b))))]  # fmt: skip
    return made


def open_codec(change, folder: Path):
    change(put("codec", folder))
    load_snac(str(folder))


def cases(seed: int) -> list[Case]:
    """All of them, whatever the seed: they are quick."""
    made = [
        Case("api", f"decode: {name}", lambda _, c=c: tts().decode(c), words)
        for name, c, words in bad_codes()
    ]
    pushes = [
        Case("api", f"push: {name}", lambda _, c=c: tts().open_stream().push(c), words)
        for name, c, words in bad_codes()
        if "0 steps" not in name  # nothing new is nothing wrong
    ]
    made += pushes + [Case("api", name, lambda _, f=f: f(), words) for name, f, words in bad_calls()]
    for group, table, opening in (
        ("export", bad_exports(), open_export),
        ("codec", bad_codecs(), open_codec),
    ):
        made += [Case(group, n, lambda d, c=c, o=opening: o(c, d), words) for n, c, words in table]
    return made
