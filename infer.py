"""Speech or SNAC codes in, 24 and 48 kHz speech out.

    python infer.py --checkpoint C/best_model.pt --input talk.wav --output talk_48k.wav
    python infer.py --checkpoint C --input corpus/ --output out/ --sample_rate both   # a folder, recursively
    python infer.py --checkpoint C --input codes/val --output out/                    # a cache
    python infer.py --checkpoint C --input codes/val --output - --stream | aplay -f S16_LE -r 48000
    python infer.py --checkpoint C --export exported/ --push OWNER/NAME                # for servers, the hub

In Python:

    tts = load_dual_head("best_model.pt", device="cuda:0")      # or an exported folder, or hub-id@COMMIT
    audio_24k, audio_48k = tts.decode(codes)                    # codes: [K] of [B, T_k]
    for audio_24k, audio_48k in tts.stream(chunks_of_codes):    # as a language model produces them
        ...

Long files are decoded in pieces that carry the state of every convolution, and noise is a function of
position: the samples are those of one pass.
"""

import argparse
import contextlib
import os
import shlex
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from snac48.cli import (
    EXIT_BAD_INPUT,
    EXIT_STOPPED,
    StopFlag,
    UserError,
    guarded,
    main_guard,
    pick_device,
    read_flags,
    warn,
)
from snac48.places import ALLOW_LINKS, check_free, check_place


def parse_args(argv=None):
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = p.add_argument
    add("--checkpoint", required=True, help="checkpoint, exported folder, or hub id@COMMIT")
    add("--input", help="audio file, folder, cache of cache_codes.py, or one .parquet of it")
    add("--allow_links", **ALLOW_LINKS)
    add("--output", help="wav file for one input file, else a folder; - = raw 16-bit PCM to stdout")
    add("--overwrite", action="store_true", help="replace wavs, exports and, by --push, models that exist")
    add("--sample_rate", choices=("24000", "48000", "both"), default="48000", help="which heads speak")
    add("--device", default="", help="GPU number or cpu (default: a GPU where there is one, else the CPU)")
    add("--pretrained_model", default="", help="where the encoder is (default: where the training found it)")
    add("--chunk_seconds", type=float, default=20.0, help="decoded at once; any value, same samples")
    add("--stream", action="store_true", help="small chunks (0.5 s), written as soon as they exist")
    add("--noise_seed", type=int, default=0, help="seed of the decoder's noise")
    add("--export", metavar="DIR", help="write weights, config, code and model card for load_dual_head")
    add("--half", action="store_true", help="--export of a codec: float16 weights")
    add("--push", metavar="ID", help="send the --export to the model hub, as OWNER/NAME, private")
    add("--public", action="store_true", help="--push: for everybody to see")
    add("--export_onnx", metavar="FILE", help="write an ONNX graph: codes of any length, noise -> audio")
    add("--onnx_stream", action="store_true", help="--export_onnx: one piece of a stream, with its state")
    add("--onnx_weights", choices=("fp32", "fp16", "int8"), default="fp32", help="how FILE stores them")
    args = read_flags(p, argv)
    if not (args.export or args.export_onnx) and not (args.input and args.output):
        p.error("--input and --output are required (or --export DIR, --export_onnx FILE)")
    if args.output == "-" and args.sample_rate == "both":
        p.error("--output - takes one --sample_rate")
    if args.push and not args.export:
        p.error("--push ID sends the folder of --export DIR")
    check_outputs(args)
    return args


def check_outputs(args) -> None:
    """Raises UserError for places that can't be written, and for those of what is read or exists."""
    if args.export:
        names = ("config.json", "model.safetensors", "encoder.safetensors", "pytorch_model.bin")
        made = [Path(args.export, name) for name in names]
        check_free(made, [args.checkpoint], args.overwrite, "--export")
    elif args.export_onnx:
        check_free([args.export_onnx], [args.checkpoint], args.overwrite, "--export_onnx")
    elif args.output != "-" and Path(args.input).is_dir():
        check_place(args.output, "--output", [args.input])
    elif args.output != "-" and args.sample_rate != "both" and not args.input.endswith(".parquet"):
        check_free([args.output], [args.input], args.overwrite, "--output")


if __name__ == "__main__":  # before torch is imported: --help and a misspelt flag answer at once
    ARGS = guarded(parse_args)

import soundfile as sf
import torch

from snac48 import onnx_graphs, publish
from snac48.audio import (
    AudioError,
    allow_links,
    find_audio,
    read_audio,
    resample,
    resampled_length,
    resolve_inside,
)
from snac48.cache import SHARDS, CodeIndex, shard_rows
from snac48.decoder import HEADS, DualHead, load_dual_head
from snac48.files import atomic_file
from snac48.jobs import printable
from snac48.runlog import show
from snac48.serving import pcm16

# ---- files ----


@dataclass
class Utterance:
    """What is to be spoken: codes [K] of [1, T_k] of a source of n samples at `rate` Hz, or why not."""

    path: str
    codes: list | None = None
    n: int = 0
    rate: int = 24000
    error: str = ""


def utterances(tts: DualHead, source: str):
    """Yield the utterances of an audio file, a folder, a cache or one .parquet file of a cache (or of what
    train_rvq.py generate has written). Raises UserError."""
    path = Path(source)
    if not path.exists():
        raise UserError(f"--input {source} does not exist")
    if path.suffix == ".parquet" or any(path.glob(SHARDS)):
        yield from from_cache(tts, path)
    elif path.is_dir():
        yield from from_audio(tts, path, find_audio(path))
    else:
        yield from from_audio(tts, path.parent, [path.name], (path.resolve().parent,))


def from_cache(tts: DualHead, path: Path):
    if path.is_dir():
        index = CodeIndex(str(path))
        geometry, rows = index.geometry, index.rows()
    else:
        geometry, rows = shard_rows(path)
    differs = tts.geometry.difference(geometry)
    if differs:
        raise UserError(f"cache {path} was made by another model ({differs})")
    for rel, codes, n in rows:
        yield Utterance(rel, [torch.from_numpy(c)[None] for c in codes], n, geometry.sampling_rate)


def from_audio(tts: DualHead, root: Path, files: list[str], allowed: tuple = ()):
    for rel in files:
        try:
            samples, rate = read_audio(resolve_inside(root, rel, allowed))
        except AudioError as e:
            yield Utterance(rel, error=str(e))
            continue
        audio = torch.from_numpy(resample(samples, rate, tts.geometry.sampling_rate))
        yield Utterance(rel, tts.encode(audio[None, None]), len(samples), rate)


def wav_name(rel: str, folder: str, taken: dict) -> str:
    """a/b.mp3 -> folder/a/b.wav, or folder/a/b.mp3.wav where a/b.ogg has taken that."""
    name = os.path.splitext(rel)[0] + ".wav"
    return os.path.join(folder, name if taken.setdefault(name, rel) == rel else rel + ".wav")


def write_pieces(pieces, paths: dict, left: dict) -> None:
    """Write pieces, tuples over HEADS, as they come: to the heads' wav files (whole or not at all), or raw
    PCM to stdout where there are none. left: {head: samples to write}."""
    with contextlib.ExitStack() as stack:
        wavs = {}
        for head, path in paths.items():
            path.parent.mkdir(parents=True, exist_ok=True)
            raw = stack.enter_context(atomic_file(path))
            wav = sf.SoundFile(raw, "w", HEADS[head].rate, 1, "PCM_16", format="WAV")
            wavs[head] = stack.enter_context(wav)
        for piece in pieces:
            for head, x in zip(HEADS, piece):
                if x is None:
                    continue
                x = x[0, 0, : left[head]].float().cpu()
                left[head] -= len(x)
                if wavs:
                    wavs[head].write(x.numpy())
                else:
                    sys.stdout.buffer.write(pcm16(x))
                    sys.stdout.buffer.flush()


def speak(tts: DualHead, args, stop: StopFlag) -> int:
    """Decode all of --input into --output; returns the exit code."""
    heads = [name for name, head in HEADS.items() if args.sample_rate in (str(head.rate), "both")]
    absent = [HEADS[name].rate for name in heads if name not in tts.heads]
    if absent:
        raise UserError(f"{args.checkpoint} has no {absent[0]} Hz head: --sample_rate {tts.rates[0]}")
    one_file = Path(args.input).is_file() and not args.input.endswith(".parquet")
    bad, count, seconds, began, taken, paths = 0, 0, 0.0, time.time(), {}, {}
    for u in utterances(tts, args.input):
        if stop:
            warn(f"stopped by {stop.signal} after {count} files")
            return EXIT_STOPPED
        if u.error and one_file:
            raise UserError(f"{args.input}: {u.error}")
        if u.error:
            bad += 1
            warn(f"bad file {u.path}: {u.error}")
            continue
        paths = {}
        if args.output != "-":
            name = args.output if one_file else wav_name(u.path, args.output, taken)
            stem = name.removesuffix(".wav")
            paths = {h: Path(f"{stem}_{h}.wav" if len(heads) > 1 else name) for h in heads}
            check_free(paths.values(), [args.input], args.overwrite, "--output")
        lengths = {h: resampled_length(u.n, u.rate, HEADS[h].rate) for h in heads}
        pieces = tts.stream([u.codes], 0.5 if args.stream else args.chunk_seconds, args.noise_seed, heads)
        write_pieces(pieces, paths, lengths)
        count += 1
        spoken = resampled_length(u.n, u.rate, tts.geometry.sampling_rate) / tts.geometry.sampling_rate
        seconds += spoken
        if paths:
            show(printable(f"{u.path} -> {', '.join(map(str, paths.values()))} ({spoken:.2f} s)") + "\n")
    spent = time.time() - began
    rtf = f" (rtf {spent / seconds:.3f})" if seconds else ""
    left_out = f"; {bad} bad files left out" if bad else ""
    warn(f"{count} files, {seconds:.1f} s of audio in {spent:.1f} s{rtf}{left_out}")
    if paths:
        show(printable(f"listen: aplay {shlex.quote(str(list(paths.values())[-1]))}, or any player") + "\n")
    return EXIT_BAD_INPUT if bad else 0


def main(args) -> int:
    allow_links(args.allow_links)
    if args.export:
        print(publish.export(args.checkpoint, args.export, args.half, args.pretrained_model))
        if args.push:
            print(publish.push(args.export, args.push, args.public, args.overwrite))
        return 0
    stop = StopFlag()
    device = pick_device("cpu" if args.export_onnx else args.device)
    tts = load_dual_head(args.checkpoint, device, args.pretrained_model)
    if args.export_onnx:
        print(onnx_graphs.export(tts, args.export_onnx, args.onnx_stream, args.onnx_weights))
        return 0
    warn(f"{args.checkpoint} on {device}")  # to stderr: stdout may carry samples
    return speak(tts, args, stop)


if __name__ == "__main__":
    main_guard(main, ARGS)
