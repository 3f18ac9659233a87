"""Train SNAC decoders: from the same codes, 24 kHz (the pretrained head) and 48 kHz (a new head). One script,
five recipes.

    python train_dual_head.py --codes_dir codes --audio_48k_dir targets/train --val_audio_48k_dir targets/val
    torchrun --nproc_per_node 4 train_dual_head.py ...same flags...        # batch sizes are over all GPUs
    python train_dual_head.py --device cpu --pretrained_model assets/codec --batch_size 6 ...     # tiny, CPU
    python train_dual_head.py --resume auto --output_dir checkpoints/phase12_dual_head            # go on
    python train_dual_head.py --recipe phase10 --data_dir corpus/train/audio --val_data_dir corpus/valid/audio
    python train_dual_head.py --recipe phase11-fast --print_schedule 100000    # epochs, batches, rates; stops

phase12 (default): both heads. phase11-standard, -warmup, -fast: the 48 kHz head alone. phase10: the 24 kHz
codec, its decoder or all of it (--no-freeze_encoder --no-freeze_vq), also --from_scratch MODEL_CONFIG.json.
Reads a cache of cache_codes.py (--cache_dir) or recordings (--data_dir: encoder and SIDON on the fly), and
48 kHz targets (of precompute_48k.py, or real 48 kHz recordings); writes into --output_dir: checkpoints,
args.json, baseline_metrics.json, metrics.jsonl (one object a line), training.log. Values: flag > --config >
--recipe. Exit codes: 0 finished, 1 wrong input, 3 stopped by a signal with a checkpoint, 4 diverged, 5 bad
input.

Edit freely. Don't touch without reading the comments beside them: the cache schema (CodeIndex), the sample
order and noise (functions of seed, epoch, index: the resume contract), the checkpoint's keys.
"""

from __future__ import annotations

import argparse
import contextlib
import difflib
import json
import math
import os
import re
import sys
import time
import warnings
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from snac48 import DEFAULT_MODEL
from snac48.checkpoint import OURS, check_ours, load_checkpoint, save_checkpoint
from snac48.cli import (
    EXIT_BAD_INPUT,
    EXIT_DIVERGED,
    EXIT_STOPPED,
    Parser,
    StopFlag,
    UserError,
    first_line,
    guarded,
    ignore_stop_signals,
    main_guard,
    pick_device,
    stop_at_once,
)
from snac48.files import read_json, write_json
from snac48.runlog import RunLog, git_sha, human_time, step_line, versions

# ---- options: every default stands here once ----

OPTIONS = {  # name: (default, help); the type is the default's
    "data": {
        "data_dir": ("", "recordings to encode on the fly, instead of --cache_dir; several: A,B"),
        "val_data_dir": ("", "the same for validation"),
        "codes_dir": ("", "cache folder holding train/ and val/ (instead of --cache_dir and "
                          "--val_cache_dir)"),
        "cache_dir": ("", "training codes of cache_codes.py"),
        "val_cache_dir": ("", "validation codes"),
        "audio_48k_dir": ("", "48 kHz targets of the training codes: precompute_48k.py's output, or real "
                              "recordings"),
        "val_audio_48k_dir": ("", "48 kHz targets of the validation codes"),
        "audio_24k_dir": ("", "originals of any rate for the 24 kHz target (default: the cache's "
                              "data_dir; rows of kind copied take both from the 48 kHz file)"),
        "val_audio_24k_dir": ("", "the same for validation"),
        "upsampler": ("", "with --data_dir and without --audio_48k_dir, 48 kHz targets of recordings below "
                          "--native_rate: sidon (restored at every step: precompute_48k.py does it once) or "
                          "sinc"),
        "sidon_dir": ("", "folder with SIDON's files (default: the hub at the pinned revision)"),
        "native_rate": (48000, "recordings of --data_dir at this rate or above are their own target"),
        "min_envelope_corr": (0.9, "SIDON's output below this is unfaithful"),
        "limit": (-1, "only the first N rows of the cache (-1 = all)"),
        "val_limit": (-1, "only the first N validation rows (-1 = all)"),
        "num_workers": (4, "data loader processes a GPU (0 = in this process)"),
        "max_bad_fraction": (0.01, "stop when more rows or files than this are bad; fewer are counted and "
                                   "left out"),
        "include_unfaithful": (False, "train also on unfaithful rows"),
    },
    "model": {
        "pretrained_model": (DEFAULT_MODEL, "SNAC folder, hub id or hub id@COMMIT"),
        "heads": ("both", "heads to train: both, 24k or 48k"),
        "freeze_encoder": (True, "keep the encoder (codes stay valid)"),
        "freeze_vq": (True, "keep the quantizers (codes stay valid)"),
        "from_scratch": ("", "JSON of SNAC's arguments: train a new codec instead of a pretrained one"),
        "phase10_checkpoint": ("", "take trunk and 24 kHz head from this checkpoint of phase10"),
        "init": ("interpolate", "start of the 48 kHz head: interpolate, average, first or random"),
    },
    "run": {
        "output_dir": ("checkpoints/phase12_dual_head", "run directory"),
        "device": ("0", "GPU number or cpu; under torchrun each process takes its LOCAL_RANK"),
        "resume": ("", "checkpoint file, run directory, or auto (newest good one in --output_dir, else "
                       "start)"),
        "seed": (42, "decides sample order, crops, noise and random initialisation"),
        "log_every": (10, "steps between log lines"),
        "save_every": (1, "epochs between epoch checkpoints"),
        "save_every_batches": (5000, "steps between step checkpoints (-1 = off)"),
        "save_every_minutes": (30.0, "minutes between time checkpoints (-1 = off)"),
        "keep_checkpoints": (3, "step and time checkpoints kept; epoch and best ones stay (-1 = all)"),
        "sample_log": (False, "write step, epoch and rows of every step to samples.rankN.log"),
        "monitor_24k_every": (10, "steps between 24 kHz losses while the trunk is frozen"),
    },
    "schedule": {
        "epochs": (15, "epochs, warmup included"),
        "feature_epochs": (0, "first epochs of --from_scratch: encoder and decoder learn log-mel features"),
        "warmup_epochs": (1, "first epochs that train the 48 kHz head only"),
        "batch_size": (96, "utterances a step over all GPUs, before the multiplier"),
        "eval_batch_size": (16, "utterances a validation batch"),
        "accum_steps": (1, "micro-batches a step: same result, less memory"),
        "segment_schedule": ("1.0,2.0,3.0,4.0", "segment seconds of each epoch range"),
        "batch_multiplier": ("2.0,1.0,0.6,0.45", "factor on --batch_size of each epoch range"),
        "epoch_ranges": ("1-2,3-4,5-6,7-15", "epochs of each entry of the two lists above"),
        "val_segment": (2.0, "validation segment in seconds, one value for the whole run"),
    },
    "optimiser": {
        "lr": (2e-4, "rate before the main phase: of the 48 kHz head (constant), or of --feature_epochs"),
        "main_lr": (5e-5, "rate of trunk and 48 kHz head (onecycle: its peak)"),
        "lr_24k_final_conv": (1e-5, "the same of the 24 kHz head beside a 48 kHz one"),
        "scheduler": ("onecycle", "main phase: onecycle, cosine (from the rate down) or constant"),
        "lr_min_ratio": (0.1, "end of cosine as a share of its start"),
        "weight_decay": (0.01, "AdamW"),
        "adam_betas": ("0.9,0.999", "AdamW"),
        "grad_clip": (1.0, "gradient norm limit"),
        "outlier_factor": (50.0, "skip a step whose gradient norm exceeds this multiple of the running "
                                 "one (-1 = off)"),
        "ema": (0.0, "decay of averaged weights used for validation and best_* (0 = off)"),
    },
    "loss": {
        "loss_weight_24k": (0.3, "weight of loss_24k"),
        "loss_weight_48k": (1.0, "weight of loss_48k"),
        "l1_weight": (1.0, "waveform L1 in either loss"),
        "stft_weight": (1.0, "multi-resolution STFT in either loss"),
        "mel_weight": (0.0, "log-mel L1 in either loss"),
        "commitment_weight": (0.25, "latents to their codebook entries, where the encoder trains"),
        "codebook_weight": (1.0, "codebook entries to their latents, where the quantizers train"),
        "n_ffts": ("1024,2048,4096", "STFT sizes; hop is a quarter"),
        "stft": ("magnitude", "magnitude (plus log-magnitude) or complex (real + imaginary L1)"),
    },
    "speed": {
        "bf16": (False, "bf16 autocast of the decoder (losses stay fp32)"),
        "tf32": (False, "TF32 matrix products on CUDA"),
        "compile": (False, "torch.compile the decoder"),
        "deterministic": (False, "deterministic kernels: bit-identical reruns, slower on CUDA"),
    },
}  # fmt: skip
DEFAULTS = {name: default for group in OPTIONS.values() for name, (default, _) in group.items()}
CHOICES = {
    "init": ("interpolate", "average", "first", "random"),
    "stft": ("magnitude", "complex"),
    "heads": ("both", "24k", "48k"),
    "scheduler": ("onecycle", "cosine", "constant"),
    "upsampler": ("", "sidon", "sinc"),
}
PHASE11 = {"heads": "48k", "batch_size": 32, "segment_schedule": "4.0", "batch_multiplier": "1.0",
           "epoch_ranges": "1-15", "n_ffts": "1024,2048,4096,8192", "main_lr": 1e-5,
           "scheduler": "constant"}  # fmt: skip
RECIPES = {  # what differs from DEFAULTS
    "phase10": {
        "heads": "24k",
        "epochs": 10,
        "warmup_epochs": 0,
        "batch_size": 48,
        "epoch_ranges": "1-2,3-4,5-6,7-10",
        "main_lr": 1.5e-5,
        "scheduler": "cosine",
        "output_dir": "checkpoints/phase10",
    },
    "phase11-standard": PHASE11
    | {"init": "random", "warmup_epochs": 0, "output_dir": "checkpoints/phase11_standard"},
    "phase11-warmup": PHASE11 | {"warmup_epochs": 3, "lr": 5e-5, "output_dir": "checkpoints/phase11_warmup"},
    "phase11-fast": PHASE11
    | {
        "lr": 5e-5,
        "main_lr": 1e-4,
        "scheduler": "onecycle",
        "segment_schedule": "1.0,2.0,3.0,4.0",
        "batch_multiplier": "1.0,1.0,1.0,1.0",
        "epoch_ranges": "1-3,4-6,7-9,10-15",
        "output_dir": "checkpoints/phase11_fast",
    },
    "phase12": {},
}
RAW_RECIPES = ("phase10", "phase11-standard", "phase11-warmup")  # "train_data" of their configs: recordings

# Keys of the older JSON configs -> our names. None: a note to the reader, no effect on training.
CONFIG_KEYS = {
    "recipe": "recipe",
    "train_data": "cache_dir",  # data_dir for RAW_RECIPES
    "val_data": "val_cache_dir",
    "audio_48khz_train_dir": "audio_48k_dir",
    "audio_48khz_val_dir": "val_audio_48k_dir",
    "num_epochs": "epochs",
    "learning_rate": "main_lr",
    "warmup_learning_rate": "lr",
    "random_seed": "seed",
    "segment_length": "val_segment",
    "experiment_name": None,
    "description": None,
    "curriculum": "curriculum",
}


def read_config(path: str, recipe: str = "") -> dict:
    """A JSON config (`//` comments allowed) as option values, "recipe" among them. An unknown key is an
    error naming the nearest one."""
    try:
        text = Path(path).read_text(encoding="utf-8")
    except OSError as e:
        raise UserError(f"config {path} cannot be read: {e.strerror}") from None
    text = re.sub(r'("(?:\\.|[^"\\])*")|//[^\n]*', lambda m: m.group(1) or "", text)
    try:
        config = json.loads(text)
    except ValueError as e:
        raise UserError(f"config {path} is not JSON: {e}") from None
    if not isinstance(config, dict):
        raise UserError(f"config {path} must be one JSON object")
    known = {k: k for k in DEFAULTS} | CONFIG_KEYS
    recipe = recipe or config.get("recipe", "phase12")
    if recipe in RAW_RECIPES:
        known |= {"train_data": "data_dir", "val_data": "val_data_dir"}
    values = {}
    for key, value in config.items():
        if key not in known:
            near = difflib.get_close_matches(key, known, 1, 0)
            raise UserError(f"config {path}: unknown key {key!r}; did you mean {near[0]!r}?")
        name = known[key]
        if name == "curriculum":
            values["epoch_ranges"] = ",".join(f"{c['epochs'][0]}-{c['epochs'][1]}" for c in value)
            values["segment_schedule"] = ",".join(str(c["length"]) for c in value)
            values["batch_multiplier"] = ",".join(str(c["batch_multiplier"]) for c in value)
        elif name == "recipe":
            values[name] = value
        elif name:
            values[name] = convert(name, value, f"config {path}: {key}")
    return values


def convert(name: str, value, where: str):
    """`value` as the type of the option's default, or a UserError."""
    kind = type(DEFAULTS[name])
    if isinstance(value, list) and kind is str:
        value = ",".join(str(v) for v in value)
    try:
        if kind is bool:
            if not isinstance(value, bool):
                raise ValueError
            return value
        if isinstance(value, bool) or (kind is int and float(value) != int(value)):
            raise ValueError
        return kind(value)
    except (TypeError, ValueError):
        raise UserError(f"{where} must be {kind.__name__}, not {value!r}") from None


SKIPS_IN_A_ROW = 20  # non-finite or outlier steps; then the run is declared diverged
TO_RESUME = (*OURS, "optimizer", "scheduler", "ema", "validated_epoch", "phase", "guard", "best")


def find_resume(value: str, output_dir: str) -> Path | None:
    """--resume as a file: itself; a folder or auto: the newest checkpoint_*.pt whose content verifies."""
    if value != "auto" and not Path(value).is_dir():
        if not Path(value).is_file():
            raise UserError(f"--resume {value} does not exist")
        return Path(value)
    folder = Path(output_dir if value == "auto" else value)
    found = sorted(folder.glob("checkpoint_*.pt"), key=lambda p: p.stat().st_mtime, reverse=True)
    for path in found:
        try:
            check_ours(load_checkpoint(path), path, TO_RESUME)
            return path
        except UserError as e:
            print(f"warning: {e}; falling back to the one before", file=sys.stderr, flush=True)
    if value != "auto":
        raise UserError(f"--resume {value}: no usable checkpoint_*.pt in that folder")
    return None


def parse_args(argv=None) -> tuple[argparse.Namespace, dict]:
    """(resolved options, origin of each value: default | recipe | checkpoint | config | flag)."""
    p = Parser(description=__doc__)
    p.add_argument("--recipe", choices=sorted(RECIPES), help="(default: phase12)")
    p.add_argument("--config", default="", help="JSON file with values of these options or the older keys")
    p.add_argument(
        "--print_config", action="store_true", help="print every value, where it came from, and stop"
    )
    p.add_argument(
        "--print_schedule", type=int, metavar="ROWS", help="print the epochs of that many rows, and stop"
    )
    for group, options in OPTIONS.items():
        g = p.add_argument_group(group)
        for name, (default, text) in options.items():
            kw = {"default": argparse.SUPPRESS, "help": f"{text} (default: {default!r})".replace("%", "%%")}
            if isinstance(default, bool):
                g.add_argument(f"--{name}", action=argparse.BooleanOptionalAction, **kw)
            else:
                g.add_argument(f"--{name}", type=type(default), choices=CHOICES.get(name), **kw)
    typed = vars(p.parse_args(argv))
    flags = {k: typed.pop(k) for k in ("recipe", "config", "print_config", "print_schedule")}
    config = read_config(flags["config"], flags["recipe"]) if flags["config"] else {}
    recipe, saved = flags["recipe"] or config.pop("recipe", ""), {}
    config.pop("recipe", None)
    if recipe and recipe not in RECIPES:
        raise UserError(f"unknown recipe {recipe!r}; known are {', '.join(sorted(RECIPES))}")
    if typed.get("resume"):
        places = DEFAULTS | RECIPES[recipe or "phase12"] | config | typed
        ckpt = find_resume(typed["resume"], places["output_dir"])
        typed["resume"] = str(ckpt) if ckpt else ""
        if ckpt:  # a resumed run keeps its values unless a flag says otherwise
            state = load_checkpoint(ckpt)
            check_ours(state, ckpt, TO_RESUME)
            if recipe not in ("", state["args"].get("recipe", "phase12")):
                raise UserError(f"{ckpt} is of recipe {state['args'].get('recipe')}, not {recipe}")
            recipe = state["args"].get("recipe", "phase12")
            if recipe not in RECIPES:
                raise UserError(f"{ckpt} is of an unknown recipe, {recipe!r}")
            kept = {k: v for k, v in state["args"].items() if k in DEFAULTS and k != "resume"}
            saved = {k: convert(k, v, f"{ckpt}: {k}") for k, v in kept.items()}
    recipe = recipe or "phase12"
    layers = [("default", DEFAULTS), ("recipe", RECIPES[recipe]), ("checkpoint", saved)]
    layers += [("config", config), ("flag", typed)]
    values, origin = {}, {}
    for source, layer in layers:
        values.update(layer)
        origin.update(dict.fromkeys(layer, source))
    if values["codes_dir"]:
        codes = Path(values["codes_dir"])
        val = codes / ("valid" if (codes / "valid").is_dir() and not (codes / "val").exists() else "val")
        values["cache_dir"] = values["cache_dir"] or str(codes / "train")
        values["val_cache_dir"] = values["val_cache_dir"] or str(val)
    args = argparse.Namespace(recipe=recipe, **values)
    if flags["print_config"]:
        print(f"{'recipe':22} {recipe!r}")
        for name, value in values.items():
            print(f"{name:22} {value!r:36} {origin[name]}")
        sys.exit(0)
    check_schedule(args)
    if flags["print_schedule"]:
        print("\n".join(plan_lines(args, make_plan(args, flags["print_schedule"]))))
        sys.exit(0)
    check_data(args)
    held = sorted(Path(args.output_dir).glob("checkpoint_*.pt"), key=lambda p: p.stat().st_mtime)
    if held and not args.resume and os.environ.get("RANK", "0") == "0":
        what = "is damaged" if "resume" in typed else "would be overwritten"
        raise UserError(f"{args.output_dir} holds a run whose {held[-1].name} {what}: go on with it by "
                        "--resume auto, or name another --output_dir")  # fmt: skip
    return args, origin


def trains_codec(args) -> bool:
    """Whether encoder or quantizers are trained: codes then change at every step."""
    return bool(args.from_scratch) or not (args.freeze_encoder and args.freeze_vq)


def check_schedule(args) -> None:
    """Raises UserError for values that cannot be, or that contradict each other."""
    for name, allowed in CHOICES.items():
        if getattr(args, name) not in allowed:
            raise UserError(f"{name} must be one of {', '.join(allowed)}, not {getattr(args, name)!r}")
    for name in ("epochs", "batch_size", "eval_batch_size", "accum_steps", "log_every", "monitor_24k_every"):
        if getattr(args, name) < 1:
            raise UserError(f"--{name} must be at least 1")
    if args.keep_checkpoints == 0:  # it would delete the one just written
        raise UserError("--keep_checkpoints must be at least 1, or -1 for all")
    if args.heads == "24k" and args.warmup_epochs:
        raise UserError("--warmup_epochs trains the 48 kHz head alone, which --heads 24k does not have: "
                        "--warmup_epochs 0")  # fmt: skip
    if trains_codec(args) and args.heads != "24k":
        raise UserError("encoder and quantizers train with --recipe phase10 only (--heads 24k): a 48 kHz "
                        "head needs codes that stay")  # fmt: skip
    if args.from_scratch and not args.feature_epochs and (args.freeze_encoder or args.freeze_vq):
        raise UserError("--from_scratch needs --no-freeze_encoder --no-freeze_vq, or --feature_epochs")
    if args.feature_epochs and not args.from_scratch:
        raise UserError("--feature_epochs belongs to --from_scratch")
    if args.phase10_checkpoint and args.heads == "24k":
        raise UserError(
            "--phase10_checkpoint is the trunk of another recipe; to go on with phase10 use --resume"
        )
    curriculum(args)  # raises on a malformed schedule


def check_data(args) -> None:
    """Raises UserError where a folder that the recipe needs is not named."""
    if args.data_dir and args.cache_dir:
        raise UserError("--data_dir encodes recordings, --cache_dir has their codes: give one of them")
    if trains_codec(args) and not args.data_dir:
        raise UserError("a codec that is trained itself needs recordings: --data_dir and --val_data_dir")
    raw = args.data_dir or (args.recipe in RAW_RECIPES and not args.cache_dir)
    needed = ["data_dir", "val_data_dir"] if raw else ["cache_dir", "val_cache_dir"]
    if args.heads != "24k" and not raw:
        needed += ["audio_48k_dir", "val_audio_48k_dir"]
    for name in needed:
        if not getattr(args, name):
            raise UserError(f"--{name} is missing: it names the {OPTIONS['data'][name][1].split(' (')[0]}")


# ---- schedule: pure functions of the options and the number of rows ----


def curriculum(args) -> list[tuple[float, int]]:
    """[(segment seconds, batch size over all GPUs)] for epochs 1 … --epochs."""
    try:
        segments = [float(v) for v in args.segment_schedule.split(",")]
        factors = [float(v) for v in args.batch_multiplier.split(",")]
        ranges = [tuple(int(n) for n in (r.split("-") * 2)[:2]) for r in args.epoch_ranges.split(",")]
    except ValueError:
        raise UserError('--segment_schedule "1.0,2.0", --batch_multiplier "2.0,1.0" and --epoch_ranges "1-2" '
                        "must be comma-separated lists") from None  # fmt: skip
    if not len(segments) == len(factors) == len(ranges):
        raise UserError(f"--segment_schedule has {len(segments)} entries, --batch_multiplier {len(factors)}, "
                        f"--epoch_ranges {len(ranges)}: they must be equally many")  # fmt: skip
    found = []
    for epoch in range(1, args.epochs + 1):
        hits = [i for i, (a, b) in enumerate(ranges) if a <= epoch <= b]
        if len(hits) != 1:
            raise UserError(f"epoch {epoch} is in {len(hits)} of the --epoch_ranges {args.epoch_ranges}")
        found.append((segments[hits[0]], max(1, int(args.batch_size * factors[hits[0]] + 1e-9))))
    return found


@dataclass(frozen=True)
class Epoch:
    number: int  # from 1
    phase: str  # features | warmup | main
    segment: float  # seconds
    batch: int  # utterances a step over all GPUs
    first_step: int  # global step before its first step
    steps: int


def make_plan(args, rows: int) -> list[Epoch]:
    plan, step = [], 0
    for i, (segment, batch) in enumerate(curriculum(args)):
        late = i - args.feature_epochs
        phase = "features" if late < 0 else "warmup" if late < args.warmup_epochs else "main"
        steps = math.ceil(rows / batch)  # the last batch may be smaller: every row once an epoch
        plan.append(Epoch(i + 1, phase, segment, batch, step, steps))
        step += steps
    return plan


def one_cycle(step: int, total: int, peak: float, rise=0.3, div=25.0, final_div=1e4) -> float:
    """Rate at `step` of 0 … total-1: cosine from peak/div up to peak, then down to peak/div/final_div.

    The formula of torch.optim.lr_scheduler.OneCycleLR (Smith & Topin 2018), as a function: nothing to
    restore.
    """
    top, end = max(rise * total - 1, 0), total - 1
    if step <= top and top > 0:
        lo, hi, x = peak / div, peak, step / top
    else:
        lo, hi, x = peak, peak / div / final_div, (step - top) / max(end - top, 1e-9)
    return hi + (lo - hi) / 2 * (1 + math.cos(math.pi * x))


def cosine(step: int, total: int, start: float, end_ratio: float) -> float:
    """Rate at `step` of 0 … total-1: half a cosine from start down to start * end_ratio."""
    end = start * end_ratio
    return end + (start - end) / 2 * (1 + math.cos(math.pi * step / max(total - 1, 1)))


def groups_of(args, phase: str) -> list[str]:
    """Parts of the model that train in this phase."""
    if phase == "warmup":
        return ["head_48k"]
    heads = {"24k": ["head_24k"], "48k": ["head_48k"], "both": ["head_48k", "head_24k"]}[args.heads]
    codec = ["encoder"]  # it learns the features, whatever is frozen afterwards
    if phase == "main":
        frozen = {"encoder": args.freeze_encoder, "quantizer": args.freeze_vq}
        codec = [name for name in frozen if not frozen[name]]
    if not trains_codec(args):
        codec = []
    return ["trunk", *heads, *codec]


def rates_at(args, plan: list[Epoch], step: int) -> dict[str, float]:
    """Learning rate of every trained group at global step `step` (0-based: the rate of the next update)."""
    phase = next((e.phase for e in plan if e.first_step <= step < e.first_step + e.steps), plan[-1].phase)
    groups = groups_of(args, phase)
    if phase == "warmup":
        return dict.fromkeys(groups, args.lr)
    first = next(e.first_step for e in plan if e.phase == phase)
    total = sum(e.steps for e in plan if e.phase == phase)
    shape = {
        "onecycle": lambda rate: one_cycle(step - first, total, rate),
        "cosine": lambda rate: cosine(step - first, total, rate, args.lr_min_ratio),
        "constant": lambda rate: rate,
    }[args.scheduler]
    if phase == "features":
        return dict.fromkeys(groups, shape(args.lr) * min(1.0, (step + 1) / 100))
    own = {"head_24k": args.lr_24k_final_conv} if args.heads == "both" else {}
    return {group: shape(own.get(group, args.main_lr)) for group in groups}


def plan_lines(args, plan: list[Epoch]) -> list[str]:
    """One line an epoch: phase, segment, batch, steps, and every group's rate at its first and last step."""
    lines = []
    for e in plan:
        first, last = (rates_at(args, plan, e.first_step + n) for n in (0, e.steps - 1))
        rates = ", ".join(f"{g} {first[g]:.3g} to {last[g]:.3g}" for g in first)
        lines.append(
            f"epoch {e.number}: {e.phase}, {e.segment:g} s, batch {e.batch}, {e.steps} steps, {rates}"
        )
    return lines


def judge_norm(value: float, usual: float | None, factor: float) -> tuple[bool, float | None]:
    """(skip this step?, running gradient norm afterwards). factor: -1 skips only what is not finite.

    The running norm is a geometric mean. An outlier moves it too, and faster, so that a lasting change of
    scale is accepted within a few steps; NaN and infinity never enter it.
    """
    if not math.isfinite(value):
        return True, usual
    if usual is None or value <= 0:
        return False, usual or (value or None)
    outlier = factor > 0 and value > factor * usual
    weight = 0.2 if outlier else 0.02
    return outlier, math.exp((1 - weight) * math.log(usual) + weight * math.log(value))


def epoch_order(seed: int, epoch: int, rows: int):
    """The rows of one epoch in their order: int64 [rows], a function of (seed, epoch) alone."""
    import numpy as np

    return np.random.default_rng([seed, epoch]).permutation(rows)


if __name__ == "__main__":  # before torch is imported: --help and a misspelt flag answer at once
    stop_at_once()
    ARGS, ORIGIN = guarded(parse_args)

import numpy as np
import torch
import torch.distributed as dist
from torch import nn
from tqdm import tqdm

from snac48.codebooks import FullCodec, restart_dead_entries, start_from_features, usage
from snac48.codec import (
    Geometry,
    align_samples,
    encode,
    encode_context,
    geometry_of,
    load_snac,
    load_weights,
    model_config,
    new_snac,
    weights_hash,
)
from snac48.data import CachedCodesDataset, RawAudioDataset, collate
from snac48.decoder import DualHeadDecoder
from snac48.losses import head_losses, lsd, masked


def batches(order, epoch: Epoch, first_step: int, rank: int, world: int, accum: int) -> list[list[int]]:
    """Dataset indices of this rank's micro-batches from global step `first_step` to the end of the epoch.

    Every step has `accum` micro-batches; the split of a batch over ranks and micro-batches changes no result.
    """
    found = []
    for step in range(first_step - epoch.first_step, epoch.steps):
        batch = order[step * epoch.batch : (step + 1) * epoch.batch]
        mine = batch[rank::world]
        for part in np.array_split(mine, accum):
            found.append([int(i) for i in part] or [~int(batch[0])])  # ~i: a masked filler
    return found


# ---- the run ----


class TooManyBadFiles(UserError):
    """More than --max_bad_fraction of the recordings could not be read."""


class Trainer:
    """Model, optimiser and position of one run; `train()` goes from the current step to the end."""

    def __init__(self, args):
        self.args = args
        self.rank, self.world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
        device = args.device
        if self.world > 1 and device != "cpu":
            device = os.environ["LOCAL_RANK"]
        self.device = pick_device(device)
        if self.device.type == "cuda":
            torch.cuda.set_device(self.device)
        if self.world > 1 and not dist.is_initialized():
            dist.init_process_group("nccl" if self.device.type == "cuda" else "gloo")
        if args.tf32:
            torch.backends.cuda.matmul.fp32_precision = "tf32"
            torch.backends.cudnn.conv.fp32_precision = "tf32"
        if args.deterministic:
            os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
            torch.use_deterministic_algorithms(True)
        torch.manual_seed(args.seed)
        snac = new_snac(args.from_scratch) if args.from_scratch else load_snac(args.pretrained_model)
        self.geometry = geometry_of(snac, args.from_scratch or args.pretrained_model)
        self.config = model_config(snac)
        self.data, self.val = self.open_data(snac, ""), self.open_data(snac, "val_")
        self.plan = make_plan(args, len(self.data))
        self.full = trains_codec(args)
        if args.from_scratch and not args.resume:
            start_from_features(snac, self.some_speech(12 * self.geometry.codebook_size), args.seed)
        if args.phase10_checkpoint and not args.resume:
            take_phase10(snac, args.phase10_checkpoint, self.geometry)
        self.model = DualHeadDecoder(snac, args.init, None, args.heads, args.heads == "24k").to(self.device)
        self.codec = FullCodec(self.model, align_samples(snac)) if self.full else None
        self.snac = snac.to(self.device).requires_grad_(False) if args.data_dir and not self.full else None
        self.model.requires_grad_(False)
        self.step, self.validated, self.skipped, self.in_a_row, self.norm = 0, -1, 0, 0, None
        self.best = {"loss": math.inf}
        if args.heads == "both":
            self.best |= {"loss_24k": math.inf, "loss_48k": math.inf}
        self.baseline: dict = {}
        self.phase, self.optimizer, self.ema = None, None, None
        self.bad_files: dict[str, str] = {}
        self.unfaithful: set[str] = set()
        self.left_out: set[str] = set()
        sizes = [len(self.geometry.vq_strides), self.geometry.codebook_size]
        self.counts = torch.zeros(2, *sizes, dtype=torch.int64)  # codes [this epoch, since restarts]
        if args.resume:
            self.restore(Path(args.resume))
        else:
            self.enter_phase(self.plan[0].phase)
        self.sidon = None
        if args.upsampler == "sidon" and args.data_dir and args.heads != "24k" and not args.audio_48k_dir:
            from snac48.sidon import Sidon

            self.sidon = Sidon(args.sidon_dir or None, device=self.device)
        self.log = RunLog(args.output_dir, quiet=self.rank > 0)  # last: a mistake above leaves no folder
        self.stop = StopFlag()  # from here on a signal is answered with a checkpoint

    def open_data(self, snac, prefix: str):
        """The dataset of --cache_dir or --data_dir (prefix "") or of their val_ twins."""
        a, fixed = self.args, prefix == "val_"
        at = lambda name: getattr(a, prefix + name)
        audio_48k_dir = "" if a.heads == "24k" else at("audio_48k_dir")
        limit = a.val_limit if fixed else a.limit
        shared = {"seed": a.seed, "fixed": fixed, "include_unfaithful": a.include_unfaithful,
                  "max_bad_fraction": a.max_bad_fraction}  # fmt: skip
        if a.data_dir:
            return RawAudioDataset(
                at("data_dir").split(","), a.val_segment, limit, geometry=self.geometry,
                context=encode_context(snac), align=align_samples(snac), audio_48k_dir=audio_48k_dir,
                want_48k=a.heads != "24k", upsampler=a.upsampler, native_rate=a.native_rate, **shared,
            )  # fmt: skip
        data = CachedCodesDataset(
            at("cache_dir"), audio_48k_dir, a.val_segment, limit, audio_24k_dir=at("audio_24k_dir"), **shared
        )
        differs = self.geometry.difference(data.geometry)
        if differs:
            raise UserError(f"cache {at('cache_dir')} was made by another model "
                            f"({data.geometry.pretrained_model}: {differs}); make it anew with "
                            f"--pretrained_model {a.pretrained_model}")  # fmt: skip
        return data

    # -- phases: optimiser and wrapping are built once a phase --

    def enter_phase(self, phase: str) -> None:
        """Freeze, build the optimiser and wrap for DDP."""
        self.phase = phase
        groups = groups_of(self.args, phase)
        self.model.requires_grad_(False)
        for group in groups:
            getattr(self.model, group).requires_grad_(True)
        self.model.trunk_frozen = "trunk" not in groups
        b1, b2 = (float(v) for v in self.args.adam_betas.split(","))
        self.optimizer = torch.optim.AdamW(
            [part for g in groups for part in self.parameters_of(g)],
            lr=0.0, betas=(b1, b2), weight_decay=self.args.weight_decay, fused=self.device.type == "cuda",
        )  # fmt: skip
        self.wrapped = self.model
        if self.full:
            self.codec.from_features = phase == "features"
            self.wrapped = self.codec
        if self.world > 1:
            ids = [self.device.index] if self.device.type == "cuda" else None
            self.wrapped = nn.parallel.DistributedDataParallel(self.wrapped, device_ids=ids)
        if self.args.compile:
            self.wrapped = torch.compile(self.wrapped)
        self.norm = None  # the running gradient norm of another set of parameters

    def parameters_of(self, group: str) -> list[dict]:
        """Parameter groups of AdamW; from scratch Snake's alpha gets a tenth of the rate, because 1/alpha
        explodes when a large step takes it near 0."""
        named = [(k, p) for k, p in getattr(self.model, group).named_parameters() if p.requires_grad]
        if not self.args.from_scratch:
            return [{"params": [p for _, p in named], "name": group, "share": 1.0}]
        parts = [([p for k, p in named if k.endswith("alpha") == small], 0.1 if small else 1.0)
                 for small in (False, True)]  # fmt: skip
        return [{"params": params, "name": group, "share": share} for params, share in parts if params]

    def some_speech(self, coarse_codes: int):
        """Segments of the training data in the order of epoch 0, about that many coarse codes: [B, 1, N]."""
        n = math.ceil(coarse_codes / self.data.coarse_len)
        rows = [int(i) for i in epoch_order(self.args.seed, 0, len(self.data))[:n]]
        loader = self.loader(self.data, [rows[i : i + 64] for i in range(0, len(rows), 64)])
        parts = []
        for batch in loader:
            parts.append(batch["audio_24k"][batch["valid_24k"] == batch["audio_24k"].shape[-1]])
        speech = torch.cat(parts)  # whole segments only: padding would teach silence
        if not len(speech):
            raise UserError("--from_scratch found no recording as long as the validation segment; lower "
                            "--val_segment")  # fmt: skip
        return speech

    # -- one step --

    def to_device(self, batch):
        """Tensors on the device; recordings encoded and restored where the dataset left that to us."""
        move = lambda v: v.to(self.device, non_blocking=True) if torch.is_tensor(v) else v
        batch = {k: [move(c) for c in v] if k == "codes" else move(v) for k, v in batch.items()}
        if self.snac is not None:
            batch["codes"] = self.encode(batch["encode"], batch["encode_at"], batch["audio_24k"].shape[-1])
        for i, (audio, rate, first) in batch["sources"].items():
            self.restore_48k(batch, i, audio, rate, first)
        return batch

    @torch.no_grad()
    def encode(self, spans, places, samples: int):
        """Codes of slices of `samples` 24 kHz samples each: spans [m_b], cut at places (first, number) in
        coarse codes -> codes [K] of [B, T_k], -1 past the end."""
        g, lengths = self.geometry, {}
        for b, span in enumerate(spans):
            lengths.setdefault(len(span), []).append(b)
        coarse = samples // g.coarse_samples
        per = [g.frames_per_coarse(k) for k in range(len(g.vq_strides))]
        out = [torch.full((len(spans), coarse * f), -1, device=self.device) for f in per]
        for rows in lengths.values():  # only equal lengths share a batch: padding would change last frames
            codes = encode(self.snac, torch.stack([spans[b] for b in rows])[:, None].to(self.device))
            for k, f in enumerate(per):
                for b, row in zip(rows, codes[k]):
                    first, n = places[b]
                    out[k][b, : n * f] = row[first * f : (first + n) * f]
        return out

    def restore_48k(self, batch, i: int, audio, rate: int, first: int) -> None:
        """The 48 kHz target of item i by SIDON, from its whole recording; an unfaithful one is masked."""
        restored, info = self.sidon.upsample(audio, rate)
        target = batch["audio_48k"][i, 0]
        part = torch.from_numpy(restored[first : first + target.shape[-1]]).to(self.device)
        target[: len(part)] = part
        target[2 * int(batch["valid_24k"][i]) :] = 0
        if info["envelope_corr"] < self.args.min_envelope_corr and not self.args.include_unfaithful:
            batch["valid_24k"][i] = 0
            name = batch["names"][i]
            if name not in self.unfaithful:
                self.unfaithful.add(name)
                self.log.metric(event="unfaithful", file_path=name, envelope_corr=info["envelope_corr"])

    def autocast(self):
        on = self.args.bf16
        return torch.autocast(self.device.type, torch.bfloat16) if on else contextlib.nullcontext()

    def train_step(self, micro_batches, size: int) -> tuple[dict, float, bool]:
        """One optimiser step over `size` utterances on all ranks. (sums of each loss on this rank,
        gradient norm).

        Each item counts 1/size whatever rank and micro-batch it lies in. A step whose norm is no
        number, or an outlier, changes nothing.
        """
        a, warm = self.args, self.phase == "warmup"
        rates = rates_at(a, self.plan, self.step)
        for group in self.optimizer.param_groups:
            group["lr"] = rates[group["name"]] * group["share"]
        self.optimizer.zero_grad(set_to_none=True)
        sums: dict = {}
        seen, total = [], 0.0
        for i, batch in enumerate(micro_batches):
            self.note_bad(batch)
            batch = self.to_device(batch)
            watch_24k = not warm or self.step % a.monitor_24k_every == 0
            last = i == len(micro_batches) - 1
            sync = contextlib.nullcontext() if last or self.world == 1 else self.wrapped.no_sync()
            with sync:
                losses = self.forward(self.wrapped, batch, watch_24k)
                loss = losses["loss_48k"] * a.loss_weight_48k if warm else losses["loss"]
                (loss.sum() * (self.world / size)).backward()  # DDP averages over ranks
            total = total + loss.detach().sum()
            if self.full:
                seen.append((self.outputs[2], batch["valid_24k"]))
            for k, v in losses.items():
                sums[k] = sums.get(k, 0) + v.detach().sum()
        norm = nn.utils.clip_grad_norm_(self.model.parameters(), a.grad_clip)
        # a loss of NaN can have finite gradients (|x| at NaN), and on one rank only: all skip or none
        total = total.double().reshape(1)
        if self.world > 1:
            dist.all_reduce(total)
        value = float(norm + 0 * total)  # CPU-GPU sync point
        outlier, self.norm = judge_norm(value, self.norm, a.outlier_factor)
        if outlier:
            self.skipped += 1
            self.in_a_row += 1
            return sums, value, False
        self.in_a_row = 0
        self.optimizer.step()
        if a.ema > 0:
            if self.ema is None:
                self.ema = {k: v.detach().clone() for k, v in self.model.named_parameters()}
            current = [p.detach() for _, p in self.model.named_parameters()]
            torch._foreach_lerp_(list(self.ema.values()), current, 1 - a.ema)
        if self.full and self.phase == "main":
            self.note_codes(seen)
        return sums, value, True

    def forward(self, module, batch, output_24k: bool = True) -> dict:
        """Every loss of each item [B]; `loss` is their weighted sum, where all of its parts were computed."""
        a, found = self.args, None
        self.model.set_noise(batch["noise_key"])
        with self.autocast():
            if self.full:
                audio_24k, found = module(batch["audio_24k"])
                audio_48k = None
            else:
                audio_24k, audio_48k = module(batch["codes"], output_24k, True)
        if audio_24k is not None and self.phase == "warmup":
            audio_24k = audio_24k.detach()  # monitored, not trained
        losses = head_losses(audio_24k, audio_48k, batch, a)
        if a.heads != "both":
            losses["loss"] = losses[f"loss_{a.heads}"]
        elif audio_24k is not None:
            losses["loss"] = a.loss_weight_24k * losses["loss_24k"] + a.loss_weight_48k * losses["loss_48k"]
        weights = {"commitment": a.commitment_weight, "codebook": a.codebook_weight, "features": 1.0}
        for name in set(weights) & set(found or ()):
            losses[name] = found[name] * (batch["valid_24k"] > 0)
            losses["loss"] = losses["loss"] + weights[name] * losses[name]
        self.outputs = (audio_24k, audio_48k, found)
        return losses

    def note_samples(self, epoch: int, rows: list[int]) -> None:
        """A line a step in --sample_log; what no checkpoint has seen is cut off on resume."""
        if self.args.sample_log:
            with open(Path(self.args.output_dir) / f"samples.rank{self.rank}.log", "a") as f:
                f.write(f"{self.step} {epoch} {' '.join(map(str, rows))}\n")

    def note_codes(self, seen) -> None:
        """Count the codes of a step over all ranks, seen: [(found, valid)] of its micro-batches; restart
        entries that 10 x codebook_size codes in a row passed by (by chance that happens to one in e^10 of
        equally likely ones)."""
        g, size = self.geometry, self.geometry.codebook_size
        counts = torch.zeros_like(self.counts[0])
        for found, valid in seen:
            for k, codes in enumerate(found["codes"]):
                length = -(-valid // (g.hop_length * g.vq_strides[k]))
                real = torch.arange(codes.shape[1], device=codes.device) < length[:, None]
                counts[k] += torch.bincount(codes[real], minlength=size).cpu()
        if self.world > 1:
            shared = counts.to(self.device)
            dist.all_reduce(shared)
            counts = shared.cpu()
        self.counts += counts
        for k, vq in enumerate(self.model.quantizer.quantizers):
            if self.args.freeze_vq or self.counts[1, k].sum() < 10 * size:
                continue
            generator = torch.Generator().manual_seed(self.args.seed + 1000003 * self.step + k)
            latents = seen[-1][0]["latents"][k]
            n = restart_dead_entries(vq, self.counts[1, k], latents, self.optimizer, generator)
            if self.world > 1:
                dist.broadcast(vq.codebook.weight.data, 0)
            self.log.metric(event="restart", codebook=k, entries=n, step=self.step)
            self.counts[1, k] = 0

    def report_codes(self, epoch: int) -> None:
        """Log usage and perplexity of every codebook over the epoch's training codes, and count anew."""
        found = {f"{name}_{k}": v for k, c in enumerate(self.counts[0]) for name, v in usage(c).items()}
        self.log.say(f"codes of epoch {epoch}: " + ", ".join(
            f"codebook {k} {100 * found[f'usage_{k}']:.1f} % used, perplexity {found[f'perplexity_{k}']:.0f}"
            for k in range(len(self.counts[0]))))  # fmt: skip
        self.log.metric(event="usage", epoch=epoch, step=self.step, **found)
        self.counts[0] = 0

    def note_bad(self, batch) -> None:
        """Name once in the log, and count, files that could not be read (`stop_asked` judges how many are too
        many) and those that are left out of the loss."""
        for name, reason in batch["left_out"]:
            if name not in self.left_out:
                self.left_out.add(name)
                self.log.say(f"left out {name}: {reason}")
                self.log.metric(event="left_out", file_path=name, reason=reason, step=self.step)
        for name, reason in batch["bad"]:
            if name not in self.bad_files:
                self.bad_files[name] = reason
                self.log.say(f"bad file {name}: {reason}")
                self.log.metric(event="bad_file", file_path=name, reason=reason, step=self.step)

    def all_sum(self, sums: dict) -> dict:
        """Sums over ranks as floats (one CPU-GPU sync)."""
        values = torch.stack([torch.as_tensor(v, dtype=torch.float64, device="cpu") for v in sums.values()])
        if self.world > 1:
            values = values.to(self.device)
            dist.all_reduce(values)
        return dict(zip(sums, values.tolist()))

    def stop_asked(self) -> bool:
        """Whether any rank got a signal; raises, on all ranks, when too many files are bad. Every rank calls
        it before every batch, so that all leave the loop at the same one."""
        found = [float(bool(self.stop)), len(self.bad_files)]
        if self.world > 1:
            shared = torch.tensor(found, device=self.device)
            dist.all_reduce(shared)
            found = shared.tolist()
        limit = self.args.max_bad_fraction * (len(self.data) + len(self.val))
        if found[1] > limit and self.world > 1:  # two ranks may have met the same file
            every: list = [None] * self.world
            dist.all_gather_object(every, self.bad_files)
            self.bad_files = {name: why for part in every for name, why in part.items()}
        if len(self.bad_files) > limit:
            name, reason = next(iter(self.bad_files.items()))
            raise TooManyBadFiles(
                f"{len(self.bad_files)} files could not be read, first {name} ({reason}): more than "
                f"--max_bad_fraction {self.args.max_bad_fraction:g}; mend them or raise it, then "
                "--resume auto",
                EXIT_BAD_INPUT,
            )
        return found[0] > 0

    # -- validation: fixed crops, fixed noise, one segment length --

    @torch.no_grad()
    def validate(self) -> dict | None:
        """Means over the validation rows of every loss and of LSD; None when a stop was asked for
        meanwhile."""
        a = self.args
        mine = list(range(self.rank, len(self.val), self.world))
        share, size = math.ceil(len(self.val) / self.world), a.eval_batch_size
        # as many batches on every rank: ~0 is a masked filler
        loader = self.loader(self.val, [mine[i : i + size] or [~0] for i in range(0, share, size)])
        sums: dict[str, float] = {}
        with self.averaged_weights():
            self.model.eval()
            for batch in loader:
                if self.stop_asked():
                    return None
                self.note_bad(batch)
                batch = self.to_device(batch)
                found = self.forward(self.codec or self.model, batch)
                for name, audio, factor in (("24k", self.outputs[0], 1), ("48k", self.outputs[1], 2)):
                    if audio is None:
                        continue
                    valid, target = factor * batch["valid_24k"], batch[f"audio_{name}"][:, 0]
                    pred = masked(audio[:, 0].float(), valid)
                    found[f"lsd_{name}"] = lsd(pred, target, valid, factor * 24000) * (valid > 0)
                    if factor == 2:
                        found["lsd_12_24k"] = lsd(pred, target, valid, 48000, 12000) * (valid > 0)
                found["count"] = (batch["valid_24k"] > 0).double()
                for k, v in found.items():
                    sums[k] = sums.get(k, 0.0) + float(v.double().sum())
            self.model.train()
        if self.stop_asked():
            return None
        total = self.all_sum(sums)
        count = max(total.pop("count", 0), 1)
        result = {k: v / count for k, v in total.items()}
        if self.full:
            result["loss"] = result["loss_24k"]  # what is heard; commitment and the like are means to it
        return result

    @contextlib.contextmanager
    def averaged_weights(self):
        """The EMA weights in the model for the time of the block (no-op without --ema)."""
        if self.ema is None:
            yield
            return
        own = {k: v.detach().clone() for k, v in self.model.named_parameters()}
        self.set_parameters(self.ema)
        try:
            yield
        finally:
            self.set_parameters(own)

    @torch.no_grad()
    def set_parameters(self, values) -> None:
        for k, p in self.model.named_parameters():
            p.copy_(values[k])

    def loader(self, data, index_lists):
        return torch.utils.data.DataLoader(
            data, batch_sampler=index_lists, collate_fn=collate, num_workers=self.args.num_workers,
            worker_init_fn=ignore_stop_signals,
            pin_memory=self.device.type == "cuda", prefetch_factor=4 if self.args.num_workers else None,
        )  # fmt: skip

    # -- checkpoints --

    def state(self) -> dict:
        epoch = self.epoch_of_step().number
        return {
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scheduler": {
                "plan": [asdict(e) for e in self.plan],
                "rates": rates_at(self.args, self.plan, self.step),
            },
            "ema": self.ema,
            "epoch": epoch,
            "global_step": self.step,
            "validated_epoch": self.validated,
            "phase": self.phase,
            "segment_length": self.plan[epoch - 1].segment,
            "args": vars(self.args),
            "geometry": asdict(self.current_geometry()) | {"vq_strides": list(self.geometry.vq_strides)},
            "codes": self.counts.clone(),
            "model_config": self.config,
            "rng": {"seed": self.args.seed},  # order, crops and noise are functions of it: no generator state
            "guard": {"norm": self.norm, "skipped": self.skipped, "in_a_row": self.in_a_row},
            "best": self.best,
            "versions": versions() | {"git": git_sha()},
        }

    def current_geometry(self) -> Geometry:
        """The geometry of the codes that this model makes now."""
        if not self.full:
            return self.geometry
        return replace(self.geometry, weights_sha256=weights_hash(self.model.state_dict()))

    def save(self, name: str, prune: str = "") -> None:
        """Write output_dir/name; then delete all but the newest --keep_checkpoints that match the glob
        `prune`."""
        if self.rank == 0:
            folder = Path(self.args.output_dir)
            save_checkpoint(folder / name, self.state())
            self.log.metric(event="checkpoint", step=self.step, path=name)
            keep = self.args.keep_checkpoints
            old = sorted(folder.glob(prune), key=lambda p: p.stat().st_mtime) if prune and keep >= 0 else []
            for path in old[: max(len(old) - keep, 0)]:
                path.unlink()

    def restore(self, path: Path) -> None:
        """Continue from a checkpoint: model, optimiser, phase, position, best. Raises UserError if it
        doesn't fit."""
        saved = load_checkpoint(path)
        check_fits(saved, path, self.geometry, TO_RESUME, codes_change=self.full)
        try:
            self.take_over(saved, path)
        except (AttributeError, IndexError, KeyError, RuntimeError, TypeError, ValueError) as e:
            raise UserError(
                f"{path} can't be resumed: malformed ({type(e).__name__}: {first_line(e)})"
            ) from None

    def take_over(self, saved: dict, path) -> None:
        if saved["scheduler"]["plan"] != [asdict(e) for e in self.plan]:
            raise UserError(f"{path} belongs to a run with another schedule or number of rows "
                            f"({sum(e['steps'] for e in saved['scheduler']['plan'])} steps there, "
                            f"{self.plan[-1].first_step + self.plan[-1].steps} here): resume it with its "
                            "own flags and data")  # fmt: skip
        load_weights(self.model, saved["model"], path)
        self.step, self.validated = saved["global_step"], saved["validated_epoch"]
        if not 0 <= self.step <= self.plan[-1].first_step + self.plan[-1].steps:
            raise ValueError(f"global_step {self.step} is outside the schedule")
        if saved["phase"] not in {e.phase for e in self.plan}:
            raise ValueError(f"phase {saved['phase']!r} is not in the schedule")
        self.best = {k: float(saved["best"][k]) for k in self.best}
        self.enter_phase(saved["phase"])
        self.optimizer.load_state_dict(saved["optimizer"])
        for parameter, moments in self.optimizer.state.items():
            if any(moments[k].shape != parameter.shape for k in ("exp_avg", "exp_avg_sq")):
                raise ValueError("the optimiser's moments have other shapes than the weights")
        if saved["ema"] is not None:
            shapes = {k: p.shape for k, p in self.model.named_parameters()}
            if {k: v.shape for k, v in saved["ema"].items()} != shapes:
                raise ValueError("the averaged weights differ from the model's in name or shape")
            self.ema = {k: v.to(self.device) for k, v in saved["ema"].items()}
        self.counts = saved["codes"].cpu()
        if self.rank == 0:
            self.cut_sample_logs(Path(self.args.output_dir))
        baseline = Path(self.args.output_dir) / "baseline_metrics.json"
        self.baseline = read_json(baseline) if baseline.is_file() else {}
        guard = saved["guard"]
        self.norm, self.skipped, self.in_a_row = guard["norm"], guard["skipped"], guard["in_a_row"]

    def cut_sample_logs(self, folder: Path) -> None:
        """Drop the steps after the checkpoint: they come again."""
        for path in folder.glob("samples.rank*.log"):
            lines = path.read_text().splitlines(keepends=True)
            kept = [x for x in lines if x.endswith("\n") and int(x.split()[0]) <= self.step]
            path.write_text("".join(kept))

    # -- the loop --

    def train(self) -> int:
        """From the current step to the end: the exit code. Raises UserError when too many files are bad."""
        try:
            return self.run_epochs()
        except TooManyBadFiles:
            if self.step > 0:  # before that there is nothing to lose, and the folder stays free
                self.save_step()
            self.end("too many bad files", EXIT_BAD_INPUT)
            raise

    def run_epochs(self) -> int:
        a, log, total = self.args, self.log, self.plan[-1].first_step + self.plan[-1].steps
        self.announce(total)
        last_save = time.time()
        # the start is judged too, so that "improved by" has a base
        if self.validated < 0 and not self.validate_and_keep(0):
            return self.stop_with_checkpoint()
        for epoch in self.plan:
            end = epoch.first_step + epoch.steps
            if self.step >= end and self.validated >= epoch.number:
                continue
            if self.phase != epoch.phase and self.step < end:
                self.enter_phase(epoch.phase)
            self.data.set_segment_length(epoch.segment)
            self.data.set_epoch(epoch.number)
            order = epoch_order(a.seed, epoch.number, len(self.data))
            lists = (
                batches(order, epoch, self.step, self.rank, self.world, a.accum_steps)
                if self.step < end
                else []
            )
            feed = iter(self.loader(self.data, lists)) if lists else None
            title = f"epoch {epoch.number}/{a.epochs} {epoch.phase} {epoch.segment:g} s"
            hide = None if self.rank == 0 else True  # None: shown on a terminal only
            bar = tqdm(
                total=epoch.steps, initial=self.step - epoch.first_step, desc=title, disable=hide, leave=False
            )
            window, items, seconds, since = {}, {}, 0.0, time.time()
            while self.step < end:
                if self.stop_asked():
                    return self.stop_with_checkpoint()
                size = min(epoch.batch, len(order) - (self.step - epoch.first_step) * epoch.batch)
                parts = [next(feed) for _ in range(a.accum_steps)]
                rows = [row for part in parts for row in part["rows"]]
                sums, norm, done = self.train_step(parts, size)
                self.step += 1
                bar.update()
                seconds += (
                    size * self.data.coarse_len * self.geometry.coarse_samples / self.geometry.sampling_rate
                )
                if not done:
                    why = f"gradient norm {norm:.3g}, usually {self.norm or 0:.3g}"
                    log.say(f"step {self.step} skipped: {why} ({self.skipped} skipped so far)")
                    log.metric(event="skip", step=self.step, reason=why, skipped=self.skipped)
                    if self.in_a_row >= SKIPS_IN_A_ROW:
                        self.save_before_skips(epoch)
                        return self.end("diverged", EXIT_DIVERGED)
                else:
                    self.note_samples(epoch.number, rows)
                    for k, v in sums.items():
                        window[k], items[k] = window.get(k, 0) + v, items.get(k, 0) + size
                if self.step % a.log_every == 0 or self.step == end:
                    means = {k: v / items[k] for k, v in self.all_sum(window).items()} if window else {}
                    speed = seconds / max(time.time() - since, 1e-9)
                    self.report(epoch, total, means, norm, speed)
                    bar.set_postfix({k: f"{v:.3f}" for k, v in means.items() if k.startswith("loss")})
                    window, items, seconds, since = {}, {}, 0.0, time.time()
                if a.save_every_batches > 0 and self.step % a.save_every_batches == 0:
                    self.save_step()
                if a.save_every_minutes > 0 and time.time() - last_save > 60 * a.save_every_minutes:
                    stamp = time.strftime("%Y%m%d_%H%M%S")
                    self.save(
                        f"checkpoint_epoch{epoch.number}_time_{stamp}.pt", "checkpoint_epoch*_time_*.pt"
                    )
                    last_save = time.time()
            bar.close()
            if self.counts[0].any():
                self.report_codes(epoch.number)
            if not self.validate_and_keep(epoch.number):
                return self.stop_with_checkpoint()
            if epoch.number % a.save_every == 0 or epoch.number == a.epochs:
                self.save(f"checkpoint_epoch{epoch.number}.pt")
        return self.end("finished", 0)

    def announce(self, total: int) -> None:
        """Provenance first: arguments, versions, geometry, plan, and what was left out."""
        a, log = self.args, self.log
        if self.rank == 0:
            write_json(Path(a.output_dir) / "args.json",
                       {"args": vars(a), "git": git_sha(), "versions": versions(), "world": self.world,
                        "geometry": asdict(self.geometry), "model_config": self.config,
                        "plan": [asdict(e) for e in self.plan]})  # fmt: skip
        event = "resume" if self.step else "start"
        log.say(
            f"{event}: recipe {a.recipe}, {len(self.data)} rows ({len(self.val)} validation), {total} steps, "
            f"from step {self.step}, {self.world} process(es) on {self.device}, init {a.init}"
        )
        for which, data in (("training", self.data), ("validation", self.val)):
            for reason, n in data.left_out.items():
                log.say(f"  left out of {which}: {n} rows, {reason}")
        for line in plan_lines(a, self.plan):
            log.say("  " + line)
        log.metric(event=event, kind="train", recipe=a.recipe, step=self.step, total_steps=total,
                   epochs=a.epochs, rows=len(self.data), val_rows=len(self.val), git=git_sha())  # fmt: skip
        self.began, self.began_step = time.time(), self.step

    def report(self, epoch, total, means, norm, speed) -> None:
        rates = rates_at(self.args, self.plan, self.step - 1)
        pace = (time.time() - self.began) / max(self.step - self.began_step, 1)
        # steps of later epochs are as long as their segments: scale the pace by audio still to come
        todo = sum((min(e.first_step + e.steps, total) - max(e.first_step, self.step)) * e.segment * e.batch
                   for e in self.plan if e.first_step + e.steps > self.step)  # fmt: skip
        eta = pace * todo / (epoch.segment * epoch.batch)
        shown = {"loss": means.get("loss"), "24k": means.get("loss_24k"), "48k": means.get("loss_48k")}
        rate = rates.get("head_48k", rates.get("head_24k"))
        self.log.say(step_line(self.step, total, epoch.number, self.args.epochs, epoch.phase,
                               {k: v for k, v in shown.items() if v is not None}
                               | {"lr": rate, "norm": norm, "audio-s/s": speed,
                                  "eta": human_time(eta)}))  # fmt: skip
        self.log.metric(step=self.step, total_steps=total, epoch=epoch.number, epochs=self.args.epochs,
                        phase=epoch.phase, segment_length=epoch.segment, batch_size=epoch.batch, **means,
                        lr=rate, **{f"lr_{k}": v for k, v in rates.items()}, grad_norm=norm,
                        skipped=self.skipped, audio_s_per_s=speed, eta_s=eta)  # fmt: skip

    def validate_and_keep(self, epoch: int) -> bool:
        """Validate, log, and write best_model*.pt where it is the best. False when a stop was asked for."""
        result = self.validate()
        if result is None:
            return False
        self.validated = epoch
        if epoch == 0:
            self.baseline = result
            if self.rank == 0:
                write_json(Path(self.args.output_dir) / "baseline_metrics.json", result)
        # a decoder that is fed true features is no codec yet: it is never the best
        judged = self.best if self.phase in ("warmup", "main") else {}
        better = [k for k in judged if result[k] < self.best[k]]
        self.best.update({k: result[k] for k in better})
        gain = 100 * (1 - result["loss"] / self.baseline["loss"]) if self.baseline.get("loss") else 0.0
        self.log.say(f"validation after epoch {epoch} (step {self.step}): "
                     + " ".join(f"{k} {v:.4f}" for k, v in result.items())
                     + (f" ({gain:+.1f} % against the start)" if epoch else "")
                     + (f" best: {', '.join(better)}" if better else ""))  # fmt: skip
        self.log.metric(
            event="val", step=self.step, epoch=epoch, best=better, improved_percent=gain, **result
        )
        with self.averaged_weights():
            for k in better:
                self.save(k.replace("loss", "best_model") + ".pt")
        return True

    def epoch_of_step(self) -> Epoch:
        """The epoch that the last step belongs to."""
        return next(e for e in self.plan if self.step <= e.first_step + e.steps)

    def save_step(self) -> None:
        number = self.epoch_of_step().number
        self.save(f"checkpoint_epoch{number}_iter{self.step}.pt", "checkpoint_epoch*_iter*.pt")

    def stop_with_checkpoint(self) -> int:
        self.save_step()
        return self.end("stopped", EXIT_STOPPED)

    def save_before_skips(self, epoch) -> None:
        """A checkpoint from before the skipped steps (of this epoch): they changed no weight, so only the
        position goes back, and a resumed run repeats them."""
        now = self.step, self.skipped, self.in_a_row
        self.step = max(self.step - self.in_a_row, epoch.first_step)
        self.skipped, self.in_a_row = self.skipped - (now[0] - self.step), 0
        self.save_step()
        self.step, self.skipped, self.in_a_row = now

    def end(self, reason: str, code: int) -> int:
        spent = time.time() - self.began
        memory = (
            f", peak GPU memory {torch.cuda.max_memory_allocated() / 2**30:.1f} GiB"
            if self.device.type == "cuda"
            else ""
        )
        self.log.say(f"{reason} at step {self.step} after {human_time(spent)}{memory}; {self.skipped} "
                     f"steps skipped, {len(self.bad_files)} bad files"
                     + (f", {len(self.left_out)} left out as too loud" if self.left_out else "")
                     + (f", {len(self.unfaithful)} unfaithful" if self.unfaithful else ""))  # fmt: skip
        if reason == "stopped":
            self.log.say(f"go on with: --resume auto --output_dir {self.args.output_dir}")
        if reason == "diverged":
            self.log.say(
                f"{SKIPS_IN_A_ROW} steps in a row were skipped; --resume auto repeats them from a checkpoint "
                "from before: give a lower --main_lr with it"
            )
        self.log.metric(event="end", reason=reason, code=code, step=self.step, skipped=self.skipped,
                        bad_files=len(self.bad_files), seconds=round(spent, 1))  # fmt: skip
        if self.world > 1:
            dist.destroy_process_group()
        return code


# ---- checkpoints: what fits what ----


def check_fits(saved: dict, path, geometry: Geometry, keys=OURS, codes_change: bool = False) -> None:
    """Raises UserError unless the checkpoint is ours and its geometry and codec weights are the model's
    (codes_change: the codec itself trains, its weights may differ)."""
    check_ours(saved, path, keys)
    theirs = Geometry.from_json(json.dumps(saved["geometry"], default=str), str(path))
    if codes_change:
        theirs = replace(theirs, weights_sha256=geometry.weights_sha256)
    differs = geometry.difference(theirs)
    if differs:
        raise UserError(f"{path} was trained on another model ({theirs.pretrained_model}: {differs}); "
                        "give that one as --pretrained_model")  # fmt: skip


def take_phase10(snac, path: str, geometry: Geometry) -> None:
    """Put trunk and 24 kHz head of a phase10 checkpoint into `snac`, whose codes they must have been made
    for."""
    saved = load_checkpoint(path)
    check_ours(saved, path)
    theirs = Geometry.from_json(json.dumps(saved["geometry"]))
    if geometry.difference(theirs):
        raise UserError(
            f"--phase10_checkpoint {path} has another encoder than the cache "
            f"({geometry.difference(theirs)}): write it out (infer.py --checkpoint {path} --export DIR), "
            "cache the codes with --pretrained_model DIR, and train on those"
        )
    model = DualHeadDecoder(snac, heads="24k", with_encoder=True)  # shares its modules with snac
    load_weights(model, saved["model"], path)


def main() -> int:
    warnings.filterwarnings("ignore", "This DataLoader will create")  # every epoch, 300 characters
    try:
        return Trainer(ARGS).train()
    except torch.OutOfMemoryError as e:
        raise UserError(
            f"GPU out of memory ({str(e).splitlines()[0]}): raise --accum_steps (same result in smaller "
            "pieces), lower --batch_size, or use --bf16; then --resume auto"
        ) from None
    except RuntimeError as e:
        if not str(e).startswith("DataLoader worker"):
            raise
        raise UserError(f"a data loader process died ({first_line(e)}): most likely the memory ran out; "
                        "lower --num_workers, then --resume auto") from None  # fmt: skip


if __name__ == "__main__":
    main_guard(main)
