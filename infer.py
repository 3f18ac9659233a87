"""Speech or SNAC codes in, 24 and 48 kHz speech out.

    python infer.py --checkpoint C/best_model.pt --input talk.wav --output talk_48k.wav
    python infer.py --checkpoint C --input corpus/ --output out/ --sample_rate both   # a folder, recursively
    python infer.py --checkpoint C --input codes/val --output out/                    # a cache
    python infer.py --checkpoint C --input codes/val --output - --stream | aplay -f S16_LE -r 48000
    python infer.py --checkpoint C --export exported/                                 # safetensors + config

In Python:

    tts = load_dual_head("best_model.pt", device="cuda:0")      # or an exported folder, or hub-id@COMMIT
    audio_24k, audio_48k = tts.decode(codes)                    # codes: [K] of [B, T_k]
    for audio_24k, audio_48k in tts.stream(chunks_of_codes):    # as a language model produces them
        ...

Long files are decoded in chunks; each sees as many neighbouring latent frames as the decoder can reach,
and noise is a function of position, so the samples are those of one pass.
"""

from __future__ import annotations

import functools
import sys
import tempfile
import time
from pathlib import Path

from snac48.checkpoint import load_checkpoint
from snac48.cli import EXIT_BAD_INPUT, EXIT_STOPPED, Parser, StopFlag, UserError, guarded, main_guard
from snac48.files import atomic_file, write_json


def parse_args(argv=None):
    p = Parser(description=__doc__)
    p.add_argument("--checkpoint", required=True, help="checkpoint, exported folder, or hub id@COMMIT")
    p.add_argument("--input", help="audio file, folder, cache of cache_codes.py, or one .parquet of it")
    p.add_argument(
        "--output", help="wav file for one input file, else a folder; - = raw 16-bit PCM to stdout"
    )
    p.add_argument("--sample_rate", choices=("24000", "48000", "both"), default="48000")
    p.add_argument("--device", default="0", help="GPU number or cpu")
    p.add_argument("--pretrained_model", default="", help="where the encoder is (default: as recorded)")
    p.add_argument(
        "--chunk_seconds", type=float, default=20.0, help="decoded at once; any value, same samples"
    )
    p.add_argument(
        "--stream", action="store_true", help="small chunks (0.5 s), written as soon as they exist"
    )
    p.add_argument("--noise_seed", type=int, default=0, help="seed of the decoder's noise")
    p.add_argument("--export", metavar="DIR", help="write model.safetensors + config.json for load_dual_head")
    p.add_argument("--half", action="store_true", help="--export of a codec: float16 weights")
    p.add_argument("--export_onnx", metavar="FILE", help="write an ONNX graph: codes of any length -> audio")
    args = p.parse_args(argv)
    if not (args.export or args.export_onnx) and not (args.input and args.output):
        p.error("--input and --output are required (or --export DIR, --export_onnx FILE)")
    if args.output == "-" and args.sample_rate == "both":
        p.error("--output - takes one --sample_rate")
    return args


if __name__ == "__main__":  # before torch is imported: --help and a misspelt flag answer at once
    ARGS = guarded(parse_args)

import numpy as np
import soundfile as sf
import torch

from snac48.audio import (
    AudioError,
    find_audio,
    link_roots,
    read_audio,
    resample,
    resampled_length,
    resolve_inside,
    target_names,
)
from snac48.cache import CodeIndex
from snac48.checkpoint import check_ours
from snac48.decoder import DualHead, load_dual_head

# ---- the model, ready to decode ----


def export(checkpoint: str, folder: str, half: bool = False) -> None:
    """Write model.safetensors (weights of quantizer, trunk and heads) and config.json; a codec of phase10 as
    SNAC's own pytorch_model.bin and config.json, for --pretrained_model.

    half: a codec's weights as float16, which SNAC.from_pretrained casts back; weights that came as float16
    and have not changed (a frozen encoder's) are stored so anyway: caches made with them stay valid.
    """
    from safetensors.torch import save_file

    saved = load_checkpoint(checkpoint)
    check_ours(saved, checkpoint)
    out, state = Path(folder), saved["model"]
    out.mkdir(parents=True, exist_ok=True)
    if any(k.startswith("encoder.") for k in state):
        layers = 1 + max(int(k.split(".")[1]) for k in state if k.startswith("trunk."))

        def name(key: str) -> str:
            part, _, rest = key.partition(".")
            if part == "trunk":
                return f"decoder.model.{rest}"
            at, _, rest = rest.partition(".") if part == "head_24k" else ("", "", rest)
            return f"decoder.model.{layers + int(at)}.{rest}" if at else key

        def stored(key: str, v):
            exact = torch.equal(v.half().float(), v.float())
            if half and not exact and key.endswith("weight.original1"):
                # the direction of a weight-normed row at length 1: a shorter one could become 0 and have none
                v = torch.nn.functional.normalize(v.flatten(1), eps=1e-30).view_as(v)
            return (v.half() if half or exact else v).clone()

        torch.save({name(k): stored(k, v) for k, v in state.items()}, out / "pytorch_model.bin")
        write_json(out / "config.json", saved["model_config"])
        print(f"wrote a SNAC codec into {folder}; open it with --pretrained_model {folder}")
        return
    save_file({k: v.contiguous().clone() for k, v in state.items()}, out / "model.safetensors")
    write_json(out / "config.json", {"model_config": saved["model_config"], "geometry": saved["geometry"]})
    print(f"wrote {folder}/model.safetensors and {folder}/config.json; open with load_dual_head({folder!r})")


class OnnxGraph(torch.nn.Module):
    """(noise_scale, codes_0, …) -> the heads that are there. ONNX has no position-keyed noise: fresh noise
    times noise_scale (1 as trained, 0 for comparisons)."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, noise_scale, *codes):
        for block, _ in self.model.noises:
            block.forward = functools.partial(self.noisy, block, noise_scale)
        return tuple(x for x in self.model(list(codes)) if x is not None)

    @staticmethod
    def noisy(block, noise_scale, x):
        return x + noise_scale * torch.randn((x.shape[0], 1, x.shape[2])) * block.linear(x)


def export_onnx(tts: DualHead, path: str) -> None:
    """Write the decoder as ONNX with dynamic batch and length, and compare it with PyTorch in onnxruntime."""
    try:
        import onnxruntime
        import onnxscript  # noqa: F401
    except ImportError as e:
        raise UserError(f"--export_onnx needs {e.name}: pip install onnx onnxscript onnxruntime") from None
    graph, per = (
        OnnxGraph(tts.model),
        [tts.geometry.frames_per_coarse(k) for k in range(len(tts.geometry.vq_strides))],
    )
    sample = lambda b, n: [torch.randint(tts.geometry.codebook_size, (b, n * f)) for f in per]
    silent, free = torch.tensor(0.0), torch.export.Dim.DYNAMIC
    heads = [f"audio_{r // 1000}k" for r in tts.rates]
    names = ["noise_scale", *(f"codes_{k}" for k in range(len(per)))]
    program = torch.onnx.export(
        graph,
        (silent, *sample(2, 5)),
        dynamo=True,
        verbose=False,
        input_names=names,
        output_names=heads,
        dynamic_shapes=(None, tuple({0: free, 1: free} for _ in per)),
    )
    with atomic_file(path) as f:
        f.write(program.model_proto.SerializeToString())
    session, worst = onnxruntime.InferenceSession(path), 0.0
    for batch, length in ((1, 3), (3, 17)):  # other sizes than the traced one
        codes = sample(batch, length)
        given = dict(zip(names, [np.zeros((), np.float32), *(c.numpy() for c in codes)]))
        with torch.inference_mode():
            wanted = graph(silent, *codes)
        worst = max(
            [worst, *(float(np.abs(a - b.numpy()).max()) for a, b in zip(session.run(heads, given), wanted))]
        )
    if not worst < 1e-3:
        raise UserError(f"{path} computes something else than PyTorch (difference {worst:.2g})")
    print(
        f"wrote {path}: {', '.join(names)} -> {', '.join(heads)}; largest difference from PyTorch {worst:.1e}"
    )


# ---- files ----


def inputs_of(tts: DualHead, source: str):
    """Yield (relative path, codes, samples at 24 kHz, samples at 48 kHz), or (relative path, reason,
    None, None)."""
    path = Path(source)
    if not path.exists():
        raise UserError(f"--input {source} does not exist")
    if path.suffix == ".parquet":  # one file of a cache, or what train_rvq.py generate has written
        with tempfile.TemporaryDirectory() as folder:
            (Path(folder) / "codes_batch_gpu0_0.parquet").symlink_to(path.resolve())
            yield from inputs_of(tts, folder)
        return
    if path.is_dir() and list(path.glob("codes_batch_gpu*_*.parquet")):
        index = CodeIndex(source)
        differs = tts.geometry.difference(index.geometry)
        if differs:
            raise UserError(f"cache {source} was made by another model ({differs})")
        for row in range(len(index)):
            codes = [torch.from_numpy(c)[None] for c in index.slice(row, 0, index.coarse(row))]
            n = int(index.lengths[row])
            yield index.path(row), codes, n, 2 * n
        return
    root, files = (path, find_audio(path)) if path.is_dir() else (path.parent, [path.name])
    allowed = link_roots(root) if path.is_dir() else (path.resolve().parent,)
    rate_24k = tts.geometry.sampling_rate
    for rel in files:
        try:
            samples, rate = read_audio(resolve_inside(root, rel, allowed))
        except AudioError as e:
            yield rel, str(e), None, None
            continue
        audio = resample(samples, rate, rate_24k)
        codes = tts.encode(torch.from_numpy(audio)[None, None])
        yield rel, codes, len(audio), resampled_length(len(samples), rate, 2 * rate_24k)


def main() -> int:
    args = ARGS
    if args.export:
        export(args.checkpoint, args.export, args.half)
        return 0
    stop = StopFlag()
    tts = load_dual_head(args.checkpoint, "cpu" if args.export_onnx else args.device, args.pretrained_model)
    if args.export_onnx:
        export_onnx(tts, args.export_onnx)
        return 0
    rates = {"24000": (24000,), "48000": (48000,), "both": (24000, 48000)}[args.sample_rate]
    one_file = Path(args.input).is_file() and not args.input.endswith(".parquet")
    absent = [r for r in rates if r not in tts.rates]
    if absent:
        raise UserError(f"{args.checkpoint} has no {absent[0]} Hz head: --sample_rate {tts.rates[0]}")
    names = None if one_file or args.output == "-" else {}
    bad, count, seconds, began = [], 0, 0.0, time.time()
    for rel, codes, n_24k, n_48k in inputs_of(tts, args.input):
        if stop:
            print(f"stopped by {stop.signal} after {count} files", file=sys.stderr)
            return EXIT_STOPPED
        if n_24k is None:
            if one_file:
                raise UserError(f"{args.input}: {codes}")
            bad.append(rel)
            print(f"bad file {rel}: {codes}", file=sys.stderr)
            continue
        length = {24000: n_24k, 48000: n_48k}
        pieces = tts.stream([codes], 0.5 if args.stream else args.chunk_seconds, args.noise_seed,
                            24000 in rates, 48000 in rates)  # fmt: skip
        paths = {}
        if args.output != "-":
            name = args.output if one_file else str(Path(args.output) / target_names([rel])[rel])
            if names is not None:  # a.mp3 and a.ogg must not overwrite each other
                name = name if names.setdefault(name, rel) == rel else str(Path(args.output) / (rel + ".wav"))
            stem = name[: -len(".wav")] if name.endswith(".wav") else name
            paths = {r: Path(f"{stem}_{r // 1000}k.wav" if len(rates) > 1 else name) for r in rates}
        write_pieces(pieces, paths, rates, length)
        count += 1
        seconds += n_24k / 24000
        if args.output != "-":
            print(f"{rel} -> {', '.join(str(p) for p in paths.values())} ({n_24k / 24000:.2f} s)", flush=True)
    spent = time.time() - began
    print(f"{count} files, {seconds:.1f} s of audio in {spent:.1f} s ({seconds / max(spent, 1e-9):.1f}x "
          "real time)"
          + (f"; {len(bad)} bad files left out" if bad else ""), file=sys.stderr)  # fmt: skip
    return EXIT_BAD_INPUT if bad else 0


def write_pieces(pieces, paths: dict, rates, length: dict) -> None:
    """Write pieces as they come, cut at `length`: to wav files (whole or not at all), or raw PCM to
    stdout."""
    import contextlib

    with contextlib.ExitStack() as stack:
        outs = {}
        for rate, path in paths.items():
            path.parent.mkdir(parents=True, exist_ok=True)
            raw = stack.enter_context(atomic_file(path))
            outs[rate] = stack.enter_context(sf.SoundFile(raw, "w", rate, 1, "PCM_16", format="WAV"))
        left = dict(length)
        for audio_24k, audio_48k in pieces:
            for rate, x in ((24000, audio_24k), (48000, audio_48k)):
                if x is None or rate not in rates:
                    continue
                x = x[0, 0, : left[rate]].float().cpu().numpy()
                left[rate] -= len(x)
                if outs:
                    outs[rate].write(x)
                else:
                    sys.stdout.buffer.write(
                        np.clip(np.rint(x * 32767), -32768, 32767).astype("<i2").tobytes()
                    )
                    sys.stdout.buffer.flush()


if __name__ == "__main__":
    main_guard(main)
