"""Token files, caches, toy models and small runs for the tests of tokens, token_lm and train_rvq."""

import json
import struct

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch

import train_rvq
from snac48 import token_lm, tokens
from snac48.checkpoint import load_checkpoint

PATTERNS = ["depth", "parallel", "delay", "flatten"]
META = {"pretrained_model": "toy", "weights_sha256": "0" * 64, "sampling_rate": 24000, "hop_length": 512}
META |= {"vq_strides": [4, 2, 1], "codebook_size": 16}


# ---- token files and caches ----


def random_tokens(T=20, K=3, V=16, seed=0):
    return np.random.default_rng(seed).integers(0, V, (T, K))


def legacy(layout, tok, vocab, fps=86.13, kbps=8.0, magic=b"NPQ1"):
    """The v0 writers, for tests only: nobody should write these again."""
    T, K = tok.shape
    vocab = struct.pack(f"<{K}i", *vocab)
    if layout == "A":
        head = magic + struct.pack("<iffi", K, fps, kbps, T) + vocab
    else:
        head = magic + struct.pack("<if", K, fps) + vocab + struct.pack("<i", T)
    return head + tok.astype("<u2").tobytes()


def write_npq2(path, mid, side, vocab, fps, kbps, dtype):
    """NPQ2 (stereo mid/side), which we only read: mid [T, k_mid], side [T, k_side], vocab of M then S."""
    head = struct.pack("<HBHHffI", 1, 1, mid.shape[1], side.shape[1], fps, kbps, len(mid))
    data = np.concatenate([mid, side], 1).astype(tokens.DTYPES[dtype])
    path.write_bytes(b"NPQ2" + head + struct.pack(f"<{len(vocab)}IB", *vocab, dtype) + data.tobytes())


def frames_from_codes(codes, vq_strides):
    """SNAC codes, one array [T_k] a scale -> frames [T_0, K]; the inverse of codes_from_frames."""
    columns = tokens.slot_columns(vq_strides)
    out = np.empty((len(codes[0]), sum(map(len, columns))), np.asarray(codes[0]).dtype)
    for k, cols in enumerate(columns):
        out[:, cols] = np.asarray(codes[k]).reshape(len(out), len(cols))
    return out


def make_cache(folder, rows, meta=META, shard=0):
    """A shard as SPEC 5 says, written with pyarrow alone. rows: {path: [codes of each scale]}."""
    folder.mkdir(parents=True, exist_ok=True)
    table = {"file_path": list(rows), "audio_length": [len(c[-1]) * 512 for c in rows.values()]}
    for k in range(3):
        table[f"codes_scale_{k}"] = pa.array([list(c[k]) for c in rows.values()], pa.list_(pa.int16()))
    table = pa.table(table).replace_schema_metadata({"snac": json.dumps(meta)})
    pq.write_table(table, folder / f"codes_batch_gpu0_{shard}.parquet")


def speech(T, seed, V=16):
    rng = np.random.default_rng(seed)
    return [rng.integers(0, V, T * n) for n in (1, 2, 4)]


def make_npqs(folder, files=24, T=12, K=3, V=16):
    folder.mkdir(parents=True, exist_ok=True)
    for i in range(files):
        rng = np.random.default_rng(i)
        tok = (rng.integers(0, V, (T + i % 3, 1)) + 3 * np.arange(K)) % V
        tokens.write_npq(folder / f"{i:03d}.npq", tok, [V] * K, 86.13)
    return str(folder / "*.npq")


# ---- toy models ----


def toy(pattern, vocab=(11,) * 4, ctx=16, d=32, layers=2, scale=None, seed=0):
    torch.manual_seed(seed)
    arch = {"pattern": pattern, "vocab": list(vocab), "d_model": d, "layers": layers, "heads": 2}
    model = token_lm.TokenLM(arch | {"depth_layers": 2, "depth_d_model": d, "dropout": 0.0, "ctx": ctx})
    if scale:  # at initialisation logits hardly depend on the input: make them
        with torch.no_grad():
            for p in model.parameters():
                p.copy_(torch.randn_like(p) * scale)
    return model.eval()


def codes_like(model, B, T, seed=0):
    g = torch.Generator().manual_seed(seed)
    return torch.stack([torch.randint(0, v, (B, T), generator=g) for v in model.vocab], -1)


# ---- small runs ----


SMALL = {"device": "cpu", "num_workers": 0, "ctx": 12, "batch": 2, "accum": 2, "epochs": 3, "lr": 3e-3}
SMALL |= {"d_model": 16, "layers": 1, "heads": 2, "depth_layers": 1, "log-lr-steps": 1}
SMALL |= {"eval-audio-every": 0, "eval-decoder": "none", "archive-every": 1}


def command(tmp, data, *extra, run="run"):
    places = {"data": data, "save_dir": tmp / run, "eval-outdir": tmp / "eval"}
    return [*(f"--{name}={value}" for name, value in (places | SMALL).items()), *extra]


def metrics(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def options(argv):
    """Every option of a command line, as at the start of a run."""
    return train_rvq.settle(train_rvq.parse_training(argv))


def run_here(argv):
    return train_rvq.start_and_train(train_rvq.parse_training(argv))


def latest(tmp, run="run", stem="rvq_3cb"):
    return load_checkpoint(tmp / run / f"{stem}_latest.pt")


def same(a, b):
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    return len(a) == len(b) and all(map(same, a, b)) if isinstance(a, list) else a == b


def assert_same_ends(tmp):
    """The runs `whole` and `run` have come to the same: weights, averages, moments, counts and losses."""
    a, b = latest(tmp, "whole"), latest(tmp)
    keys = {"model", "ema", "optimizer", "global_step", "closed", "best", "guard", "val_loss", "train_loss"}
    assert not [k for k in keys if not same(a[k], b[k])]
