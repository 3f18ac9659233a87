"""What a codec does to speech it has never seen, and how many entries of its codebooks speech uses.

    python assets/measure_codec.py --codec assets/codec --held_out split/valid/audio \\
        --speech split/train/audio

Prints and writes report.json into --output_dir (default: the codec): mean LSD (AP-BWE's) and log-mel distance
(natural log of 80 mel bands, Hann 1024) of decode(encode(clip)) over the first 6 s of every held-out file, of
the codec and of the same one with fresh weights; per codebook the entries used and their perplexity, over the
held-out clips and --minutes of --speech; and whether the codec keeps the pitch, by pYIN
(pip install -r requirements-evaluate.txt): correlation of F0 over the frames of all clips that have voice in
both (f0_corr) and its mean over clips of 10 such frames at least (f0_corr_in_clips), and the share in % of
the frames that have voice in one alone (voicing_error).

    pip install pocketsphinx==5.1.1
    python assets/measure_codec.py --codec assets/codec --words /usr/share/sounds/alsa

Counts the words that a recogniser (its own English model, a grammar of nothing but these words) hears in
recordings named after what they say (Front_Left.wav), before and after decode(encode(recording)).
"""

import argparse
import json
import sys
import tempfile
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from snac48.audio import AudioError, find_audio, link_roots, read_audio, resample, resolve_inside
from snac48.cli import UserError, main_guard, one_line_errors
from snac48.codebooks import usage
from snac48.codec import load_snac, new_snac
from snac48.files import read_json, write_json
from snac48.losses import lsd, mel_filters, spectrum
from snac48.measures import load_pitch, pitch_distances


def clips(folder: str, seconds: float, limit_minutes: float = 1e9, seed: int = 0):
    """Yield the first `seconds` of the recordings of a folder, in the seed's order, at 24 kHz: [1, 1, N]."""
    allowed, total, files = link_roots(folder), 0, find_audio(folder)
    for i in np.random.default_rng(seed).permutation(len(files)):
        try:
            x = resample(*read_audio(resolve_inside(folder, files[i], allowed)), 24000)
        except AudioError as e:
            print(f"left out {files[i]}: {e}")
            continue
        if total > limit_minutes * 60 * 24000:
            return
        total += len(x[: int(seconds * 24000)])
        yield torch.from_numpy(x[: int(seconds * 24000)])[None, None]


@torch.no_grad()
def through(model, held_out) -> tuple[list, list]:
    """(decode(encode(clip)), codes) of every clip."""
    torch.manual_seed(0)  # the NoiseBlocks draw fresh noise
    codes = [model.encode(x) for x in held_out]
    return [model.decode(c)[..., : x.shape[-1]] for c, x in zip(codes, held_out, strict=True)], codes


def distances(heard, held_out) -> dict:
    """{lsd, log_mel}: means over the clips."""
    rows, filters = [], mel_filters(24000, 1024)
    for y, x in zip(heard, held_out, strict=True):
        a, b = ((filters @ spectrum(s[0], 1024, 256)[0].abs()).clamp(min=1e-2).log() for s in (y, x))
        d = lsd(y[0], x[0], torch.tensor([x.shape[-1]]), 24000)
        rows.append((float(d), float((a - b).abs().mean())))
    means = np.mean(rows, 0)
    return {"lsd": round(float(means[0]), 4), "log_mel": round(float(means[1]), 4)}


def pitch(heard, held_out) -> dict:
    """{f0_corr, f0_corr_in_clips, voicing_error}, see above. Raises UserError where librosa is missing."""
    f0 = load_pitch()
    pairs = [(f0(y[0, 0]), f0(x[0, 0])) for y, x in zip(heard, held_out, strict=True)]
    rows = [pitch_distances(*pair) for pair in pairs]
    of_all = pitch_distances(*map(np.concatenate, zip(*pairs, strict=True)))
    in_clips = np.mean([row["f0_corr"] for row in rows if "f0_corr" in row])
    found = {
        "f0_corr": of_all["f0_corr"],
        "f0_corr_in_clips": in_clips,
        "voicing_error": of_all["voicing_error"],
    }
    return {name: round(float(value), 4) for name, value in found.items()}


def books_of(codes, size: int) -> list[dict]:
    """Of each codebook: tokens counted, share of entries met, perplexity."""
    books = []
    for k in range(len(codes[0])):
        tokens = torch.cat([c[k].flatten() for c in codes])
        found = usage(torch.bincount(tokens, minlength=size))
        books.append({"tokens": len(tokens), **{n: round(v, 4) for n, v in found.items()}})
    return books


@torch.no_grad()
def recognised(model, folder: str) -> dict:
    """{original, codec, of}: words heard at their place in the recordings Word_Word.wav of a folder."""
    try:
        from pocketsphinx import Decoder
    except ImportError:
        raise UserError("--words needs a recogniser: pip install pocketsphinx==5.1.1") from None
    files = [f for f in sorted(Path(folder).glob("[A-Z]*_[A-Z]*.wav")) if "Noise" not in f.name]
    if not files:
        raise UserError(f"{folder} holds no Word_Word.wav (Debian: the package alsa-utils)")
    said = [f.stem.lower().split("_") for f in files]
    places = " ".join(f"({' | '.join(sorted(set(words)))})" for words in zip(*said, strict=True))
    found = {"original": 0, "codec": 0, "of": sum(map(len, said))}
    with tempfile.NamedTemporaryFile("w", suffix=".gram") as grammar:
        grammar.write(f"#JSGF V1.0;\ngrammar words;\npublic <said> = {places};\n")
        grammar.flush()
        for file, words in zip(files, said, strict=True):
            x = resample(*read_audio(file), 24000)
            torch.manual_seed(0)
            spoken = model.decode(model.encode(torch.from_numpy(x)[None, None]))[0, 0].numpy()
            for name, y in (("original", x), ("codec", spoken)):
                y = resample(y, 24000, 16000)
                y = np.pad(y * (0.1 / max(float(y.std()), 1e-6)), 4800)
                decoder = Decoder(samprate=16000, jsgf=grammar.name, loglevel="FATAL")
                decoder.start_utt()
                decoder.process_raw((np.clip(y, -1, 1) * 32767).astype("<i2").tobytes(), full_utt=True)
                decoder.end_utt()
                heard = decoder.hyp().hypstr.split() if decoder.hyp() else []
                found[name] += sum(a == b for a, b in zip(words, heard))
    return found


def main() -> int:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    one_line_errors(p)
    p.add_argument("--codec", required=True, help="SNAC folder")
    p.add_argument("--held_out", default="", help="recordings the codec has not seen")
    p.add_argument("--speech", default="", help="more speech, to count entries on")
    p.add_argument("--words", default="", help="instead: recordings named after their words")
    p.add_argument("--minutes", type=float, default=45, help="how much of it")
    p.add_argument("--output_dir", default="", help="where report.json goes (default: --codec)")
    args = p.parse_args()
    model = load_snac(args.codec)
    if args.words:
        print(json.dumps(recognised(model, args.words)))
        return 0
    if not (args.held_out and args.speech):
        raise UserError("name --held_out and --speech, or --words")
    held_out = list(clips(args.held_out, 6.0))
    torch.manual_seed(0)
    fresh = new_snac(str(Path(args.codec) / "config.json"))
    found = []
    for each in (fresh, model):
        heard, codes = through(each, held_out)
        found.append(distances(heard, held_out) | {"codebooks": books_of(codes, model.codebook_size)})
    found[1] |= pitch(heard, held_out)
    with torch.no_grad():
        codes += [model.encode(x) for x in clips(args.speech, 30.0, args.minutes)]
    report = {"config": read_json(Path(args.codec) / "config.json"), "held_out_clips": len(held_out),
              "held_out_seconds": round(sum(x.shape[-1] for x in held_out) / 24000, 1),
              "fresh_weights": found[0], "codec": found[1],
              "with_speech": books_of(codes, model.codebook_size)}  # fmt: skip
    write_json(Path(args.output_dir or args.codec) / "report.json", report)
    print(json.dumps(report, indent=1))
    return 0


if __name__ == "__main__":
    main_guard(main)
