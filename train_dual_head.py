"""Train SNAC decoders: from the same codes, 24 kHz (the pretrained head) and 48 kHz (a new head). One script,
six recipes.

    python train_dual_head.py --codes_dir codes --audio_48k_dir targets/train --val_audio_48k_dir targets/val
    torchrun --nproc_per_node 4 train_dual_head.py ...same flags...        # --batch_size counts all GPUs
    python train_dual_head.py --device cpu --pretrained_model assets/codec --batch_size 6 ...     # tiny, CPU
    python train_dual_head.py --resume auto --output_dir checkpoints/phase12_dual_head            # go on
    python train_dual_head.py --recipe phase10 --data_dir corpus/train/audio --val_data_dir corpus/valid/audio
    python train_dual_head.py --recipe phase11-fast --print_schedule 100000    # epochs, batches, rates; stops
    python train_dual_head.py --print_memory 24,80,141            # what GPUs of so many GB take of it; stops

phase12 (default): both heads; phase12-gan: with discriminators, from a finished run. phase11-standard,
-warmup, -fast: the 48 kHz head alone. phase10: the 24 kHz codec, its decoder or all of it
(--no-freeze_encoder --no-freeze_vq), also --from_scratch MODEL_CONFIG.json.
Reads a cache of cache_codes.py (--cache_dir) or recordings (--data_dir: encoder and SIDON on the fly), and
48 kHz targets (of precompute_48k.py, or real 48 kHz recordings); writes into --output_dir: checkpoints,
args.json, baseline_metrics.json, metrics.jsonl (one object a line), training.log. Precedence: flag, config,
resumed checkpoint, recipe, default. Exit codes: 0 finished; 1 an error that one sentence explains; 2 unknown
flag; 3 stopped by a signal, checkpoint written; 4 diverged; 5 too many bad files.

Edit freely. Below, in this order: options, recipes, `train` (the loop), what it calls. A loss term is an
entry of TERMS (snac48/losses.py), a rate's shape one of SHAPES (snac48/schedule.py), a start of the head one
of STARTS (snac48/starts.py). Don't touch lightly: State (snac48/training.py), the resume contract.
"""

import argparse
import math
import sys
import time
import warnings
from collections import Counter
from dataclasses import dataclass

from snac48 import DEFAULT_MODEL, cli, schedule
from snac48.checkpoint import RESUMED, find_resume, refuse_overwriting, require
from snac48.cli import Diverged, Finished, LoaderDied, Stopped, TooManyBadFiles, UserError
from snac48.files import write_json
from snac48.places import RAW_RECIPES, check_run_place, check_training, settle
from snac48.runlog import hold_begun, human_time

# ---- options: every default stands here once ----

OPTIONS = {  # name: (default, help[, type]); the type is the default's; None: by device, see snac48/speed.py
    "data": {
        "data_root": ("", "where corpus/, codes/ and targets/ lie (default: DATA_ROOT, else here)"),
        "allow_links": ("", "folders, DIR:DIR, that links in the data may lead to"),
        "data_dir": ("", "recordings to encode on the fly, instead of --cache_dir; several: A,B"),
        "val_data_dir": ("", "the same for validation"),
        "codes_dir": ("", "cache folder holding train/ and val/ (for --cache_dir and --val_cache_dir)"),
        "cache_dir": ("", "training codes of cache_codes.py"),
        "val_cache_dir": ("", "validation codes"),
        "audio_48k_dir": ("", "48 kHz targets of the training codes: precompute_48k.py's output, or real "
                              "recordings"),
        "val_audio_48k_dir": ("", "48 kHz targets of the validation codes"),
        "audio_24k_dir": ("", "where the 24 kHz target is read, any rate (default: the 48 kHz file where "
                              "that is the unrestored recording, else the cache's data_dir)"),
        "val_audio_24k_dir": ("", "the same for validation"),
        "upsampler": ("", "with --data_dir and without --audio_48k_dir, 48 kHz targets of recordings below "
                          "--native_rate: sidon (restored at every step: precompute_48k.py does it once) or "
                          "sinc"),
        "sidon_dir": ("", "folder with SIDON's files (default: the hub at the pinned revision)"),
        "native_rate": (48000, "recordings of --data_dir at this rate or above are their own target"),
        "min_envelope_corr": (0.9, "--upsampler sidon: below this envelope correlation it is unfaithful"),
        "limit": (-1, "only the first N usable rows or recordings (-1 = all)"),
        "val_limit": (-1, "only the first N validation rows (-1 = all)"),
        "num_workers": (None, "data loader processes a GPU (0 = in this process)", int),
        "verify_rows": (64, "rows of either split that are proven before the first step: their codes and "
                            "targets are the recording's (0 = off)"),
        "max_bad_fraction": (0.01, "stop when a larger share of rows or files is bad; fewer are left out"),
        "target_kind": ("", "what 48 kHz folders without a manifest hold: sidon or recordings"),
        "include_unfaithful": (False, "train also on unfaithful rows"),
    },
    "model": {
        "pretrained_model": ("", "SNAC folder, hub id or hub id@COMMIT (default: what the cache names, else "
                                 f"{DEFAULT_MODEL})"),
        "heads": ("both", "heads to train: both, 24k or 48k"),
        "freeze_encoder": (True, "keep the encoder (codes stay valid)"),
        "freeze_vq": (True, "keep the quantizers (codes stay valid)"),
        "from_scratch": ("", "JSON of SNAC's arguments: train a new codec instead of a pretrained one"),
        "pitch_features": (0, "--from_scratch: samples a latent frame of the voice's fundamental, which "
                              "latents begin with (0 = none; 16 for pitch up to 375 Hz)"),
        "phase10_checkpoint": ("", "take trunk and 24 kHz head from this checkpoint of phase10"),
        "start_checkpoint": ("", "start from trunk and heads of this checkpoint, of a finished run"),
        "init": ("interpolate", "start of the 48 kHz head: interpolate, average, first or random"),
    },
    "run": {
        "output_dir": ("checkpoints/phase12_dual_head", "run directory"),
        "device": ("", "GPU number or cpu (default: a GPU where there is one); torchrun sets its own"),
        "resume": ("", "checkpoint file, run directory, or auto (newest good one of --output_dir, if any)"),
        "seed": (42, "decides sample order, crops, noise and random initialisation"),
        "log_every": (10, "steps between log lines"),
        "save_every": (1, "epochs between epoch checkpoints"),
        "save_every_batches": (5000, "steps between checkpoint_epoch*_iter*.pt (-1 = off)"),
        "save_every_minutes": (30.0, "minutes between time checkpoints (-1 = off)"),
        "keep_checkpoints": (3, "step checkpoints kept, and as many by time; the others stay (-1 = all)"),
        "sample_log": (False, "write step, epoch and rows of every step to samples.rankN.log"),
        "monitor_24k_every": (10, "steps between 24 kHz losses while the trunk is frozen"),
    },
    "schedule": {
        "epochs": (15, "epochs, warmup included"),
        "feature_epochs": (0, "first epochs of --from_scratch: encoder and decoder learn log-mel features"),
        "warmup_epochs": (1, "first epochs that train the 48 kHz head only"),
        "batch_size": (96, "utterances a step over all GPUs, before the multiplier"),
        "eval_batch_size": (16, "utterances a validation batch of each process"),
        "accum_steps": (None, "micro-batches a step: same result, less memory", int),
        "segment_schedule": ("1.0,2.0,3.0,4.0", "segment seconds of each epoch range"),
        "batch_multiplier": ("2.0,1.0,0.6,0.45", "factor on --batch_size of each epoch range"),
        "epoch_ranges": ("1-2,3-4,5-6,7-15", "epochs of each entry of the two lists above"),
        "val_segment": (2.0, "validation segment in seconds, one value for the whole run"),
    },
    "optimiser": {
        "lr": (2e-4, "rate before the main phase: of the 48 kHz head (constant), or of --feature_epochs"),
        "main_lr": (5e-5, "main phase: rate of all that trains (onecycle: its peak)"),
        "lr_24k_final_conv": (1e-5, "the same of the whole 24 kHz head, where both heads train"),
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
        "loss_weight_24k": (0.3, "weight of loss_24k where both heads train"),
        "loss_weight_48k": (1.0, "weight of loss_48k where both heads train"),
        "l1_weight": (1.0, "waveform L1 in either loss"),
        "stft_weight": (1.0, "multi-resolution STFT in either loss"),
        "mel_weight": (0.0, "log-mel L1 in either loss"),
        "lasting_weight": (0.0, "log-magnitude difference that lasts: seam, comb, level, in either loss"),
        "mel": ("single", "single (80 bands) or multi (sum over seven scales, as DAC's)"),
        "commitment_weight": (0.25, "latents to their codebook entries, where the encoder trains"),
        "codebook_weight": (1.0, "codebook entries to their latents, where the quantizers train"),
        "n_ffts": ("1024,2048,4096", "STFT sizes; hop is a quarter"),
        "stft": ("magnitude", "magnitude (plus log-magnitude) or complex (real + imaginary L1)"),
    },
    "adversarial": {
        "adv_weight": (0.0, "of what discriminators say, in the last phase (0 = no such phase)"),
        "feat_weight": (2.0, "of feature matching, L1 between what they see in target and audio"),
        "adv_epochs": (-1, "how many of the last epochs are adversarial (-1 = all after the warmup)"),
        "adv_lr": (1e-4, "rate of the heads there (of two, the 24 kHz one's is --lr_24k_final_conv)"),
        "adv_lr_trunk": (2e-5, "rate of the trunk there, once it opens (0 = frozen)"),
        "disc_lr": (1e-4, "rate of the discriminators"),
        "adv_betas": ("0.8,0.99", "AdamW there, of both sides"),
        "disc_alone": (0.01, "first share of that phase's steps that trains the discriminators alone"),
        "disc_young": (0.2, "first share of its steps with a closed trunk and --young_clip"),
        "young_clip": (0.1, "gradient norm limit of the decoder while the discriminators are young"),
        "disc_clip": (10.0, "gradient norm limit of the discriminators"),
        "disc_width": (32, "channels of their first layers"),
    },
    "speed": {
        "bf16": (None, "bf16 autocast of the decoder (waveforms, quantizers and losses stay fp32)", bool),
        "tf32": (None, "TF32 matrix products on CUDA", bool),
        "compile": (None, "torch.compile the decoder", bool),
        "plain": (False, "none of what makes it fast: fp32, plain formulas of Snake, no compilation"),
        "deterministic": (False, "deterministic kernels: bit-identical reruns, slower on CUDA"),
    },
}  # fmt: skip
DEFAULTS = {name: row[0] for group in OPTIONS.values() for name, row in group.items()}
TYPES = {
    name: row[2] if row[0] is None else type(row[0]) for g in OPTIONS.values() for name, row in g.items()
}
CHOICES = {
    "init": ("interpolate", "average", "first", "random"),
    "stft": ("magnitude", "complex"),
    "mel": ("single", "multi"),
    "heads": ("both", *schedule.HEAD_NAMES),
    "scheduler": tuple(schedule.SHAPES),
    "upsampler": ("", "sidon", "sinc"),
    "target_kind": ("", "sidon", "recordings"),
}
PHASE11 = {"heads": "48k", "batch_size": 32, "segment_schedule": "4.0", "batch_multiplier": "1.0",
           "epoch_ranges": "1-15", "n_ffts": "1024,2048,4096,8192", "main_lr": 1e-5,
           "scheduler": "constant"}  # fmt: skip
PHASE11_FAST = {"lr": 5e-5, "main_lr": 1e-4, "scheduler": "onecycle", "segment_schedule": "1.0,2.0,3.0,4.0",
                "batch_multiplier": "1.0,1.0,1.0,1.0", "epoch_ranges": "1-3,4-6,7-9,10-15"}  # fmt: skip
RECIPES = {  # what differs from DEFAULTS
    "phase10": {"heads": "24k", "epochs": 10, "warmup_epochs": 0, "batch_size": 48, "main_lr": 1.5e-5,
                "epoch_ranges": "1-2,3-4,5-6,7-10", "scheduler": "cosine",
                "output_dir": "checkpoints/phase10"},
    "phase11-standard": PHASE11 | {"init": "random", "warmup_epochs": 0,
                                   "output_dir": "checkpoints/phase11_standard"},
    "phase11-warmup": PHASE11 | {"warmup_epochs": 3, "lr": 5e-5, "output_dir": "checkpoints/phase11_warmup"},
    "phase11-fast": PHASE11 | PHASE11_FAST | {"output_dir": "checkpoints/phase11_fast"},
    "phase12": {},
    "phase12-gan": {"epochs": 10, "warmup_epochs": 0, "batch_size": 64, "segment_schedule": "0.4,0.8",
                    "batch_multiplier": "1.0,0.5", "epoch_ranges": "1-5,6-10", "scheduler": "cosine",
                    "adv_weight": 1.0, "mel_weight": 15.0, "mel": "multi",
                    "output_dir": "checkpoints/phase12_gan"},
}  # fmt: skip

SKIPS_IN_A_ROW = 20  # non-finite or outlier steps; then the run is declared diverged

# Keys of the older JSON configs -> our names. None: a note to the reader, no effect on training.
CONFIG_KEYS = {
    "recipe": "recipe", "curriculum": "curriculum", "experiment_name": None, "description": None,
    "train_data": "cache_dir", "val_data": "val_cache_dir",  # data_dir, val_data_dir for RAW_RECIPES
    "audio_48khz_train_dir": "audio_48k_dir", "audio_48khz_val_dir": "val_audio_48k_dir",
    "num_epochs": "epochs", "learning_rate": "main_lr", "warmup_learning_rate": "lr",
    "random_seed": "seed", "segment_length": "val_segment",
}  # fmt: skip


def recipe_of(config: dict, path: str, cached: bool) -> str:
    """Guess the recipe of an older config, which lacks the key `recipe`, from its other keys.

    cached: whether a cache was given as a flag. Raises UserError where the keys don't tell.
    """
    if "audio_48khz_train_dir" in config:
        if {"curriculum", "lr_24k_final_conv"} & set(config):
            return "phase12"
        if cached:
            return "phase11-fast"
        return "phase11-warmup" if config.get("warmup_epochs") else "phase11-standard"
    if {"freeze_encoder", "freeze_vq"} & set(config):
        return "phase10"
    if "train_data" not in config:  # it overrides a few values of the default recipe
        return "phase12"
    raise UserError(f"config {path} does not tell its recipe: give --recipe ({', '.join(sorted(RECIPES))})")


def config_values(path: str, recipe: str = "", cached: bool = False) -> dict:
    """A JSON config as option values, "recipe" among them."""
    known = {k: k for k in DEFAULTS} | CONFIG_KEYS
    config = cli.read_config(path, known)
    if not isinstance(config.get("recipe", ""), str):
        raise UserError(f"config {path}: recipe must be str, not {config['recipe']!r:.200}")
    recipe = recipe or config.get("recipe") or recipe_of(config, path, cached)
    values = {"recipe": recipe}
    if recipe in RAW_RECIPES:
        known |= {"train_data": "data_dir", "val_data": "val_data_dir"}
    fixed = recipe in ("phase11-standard", "phase11-warmup") and "curriculum" not in config
    if fixed and "segment_length" in config:  # one segment for training and validation
        values["segment_schedule"] = str(config["segment_length"])
    given = {}  # option: the key that gives it
    for key, value in config.items():
        where, name = f"config {path}: {key}", known[key]
        if name in (None, "recipe"):
            continue
        if name == "curriculum":
            found = schedule.of_stages(value, where)
        else:
            found = {name: typed_value(name, value, where)}
        for name in found.keys() & given.keys():
            raise UserError(f"config {path}: {given[name]!r} and {key!r} both give --{name}: leave one out")
        given |= dict.fromkeys(found, key)
        values |= found
    return values


def typed_value(name: str, value, where: str):
    """A config's or checkpoint's value of an option; null where that means: by device."""
    return None if value is None and DEFAULTS[name] is None else cli.as_type(TYPES[name], value, where)


def flag_parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    cli.one_line_errors(p)
    p.add_argument("--recipe", choices=sorted(RECIPES), help="(default: phase12)")
    p.add_argument("--config", default="", help="JSON file with values of these options or the older keys")
    p.add_argument(
        "--print_config",
        nargs="?",
        const="text",
        choices=("text", "json"),
        help="print every value, where it came from, and stop",
    )
    p.add_argument("--print_schedule", type=int, metavar="ROWS", help="print the epochs of ROWS rows; stop")
    p.add_argument(
        "--print_memory", metavar="GB,GB", help="print how cards of so many GB take these options; stop"
    )
    for group, options in OPTIONS.items():
        g = p.add_argument_group(group)
        for name, (default, text, *_) in options.items():
            shown = "by device" if default is None else repr(default)
            kw = {"default": argparse.SUPPRESS, "help": f"{text} (default: {shown})".replace("%", "%%")}
            if TYPES[name] is bool:
                g.add_argument(f"--{name}", action=argparse.BooleanOptionalAction, **kw)
            else:
                g.add_argument(f"--{name}", type=TYPES[name], choices=CHOICES.get(name), **kw)
    return p


def parse_args(argv=None) -> tuple[argparse.Namespace, dict, dict | None]:
    """(options, origin of each: default | recipe | checkpoint | config | flag, content of the checkpoint to
    resume from or None). Precedence: flag, config, resumed checkpoint, recipe, default."""
    typed = vars(flag_parser().parse_args(argv))
    flags = {k: typed.pop(k) for k in ("recipe", "config", "print_config", "print_schedule", "print_memory")}
    cached = bool(typed.get("codes_dir") or typed.get("cache_dir"))
    config = config_values(flags["config"], flags["recipe"], cached) if flags["config"] else {}
    recipe, kept, saved = flags["recipe"] or config.get("recipe", ""), {}, None
    config.pop("recipe", None)
    if recipe and recipe not in RECIPES:
        raise UserError(f"unknown recipe {recipe!r}; known are {', '.join(sorted(RECIPES))}")
    if typed.get("resume"):
        places = DEFAULTS | RECIPES[recipe or "phase12"] | config | typed
        check = lambda content, path: require(content, path, RESUMED)
        where = places["output_dir"], "checkpoint_*.pt"
        if not flags["print_config"]:
            hold_begun(where[0])  # before the newest is chosen: nobody may write a newer one
        typed["resume"], saved = find_resume(typed["resume"], *where, check)
        if not saved:
            cli.warn(f"no checkpoint in {places['output_dir']}: starting at step 0")
    if saved:  # a resumed run keeps its values unless a flag says otherwise
        recipe, kept = values_of(saved, typed["resume"], recipe)
    recipe = recipe or "phase12"
    layers = {"default": DEFAULTS, "recipe": RECIPES[recipe], "checkpoint": kept}
    values, origin = cli.layered(layers | {"config": config, "flag": typed})
    values = {"recipe": recipe, **values}
    settle(values, origin)
    args = argparse.Namespace(**values)
    told = {"flag": "a flag", "config": f"config {flags['config']}", "checkpoint": typed.get("resume")}
    told["recipe"] = f"recipe {recipe}"
    with cli.told_where_from(lambda name: told.get(origin.get(name, "flag" if name in flags else ""))):
        check_values(args, flags)
    if flags["print_config"]:
        print(cli.config_text(vars(args), origin, flags["print_config"]))
        sys.exit(0)
    if flags["print_schedule"]:
        print("\n".join(schedule.plan_lines(args, schedule.make_plan(args, flags["print_schedule"]))))
        sys.exit(0)
    if flags["print_memory"]:
        from snac48.training import memory_lines  # torch is needed to count

        print("\n".join(memory_lines(args, cli.numbers(float, flags["print_memory"], "--print_memory"))))
        sys.exit(0)
    check_training(args)
    check_run_place(args)
    refuse_overwriting(args, "resume" in typed)
    return args, origin, saved


def values_of(saved: dict, path: str, recipe: str) -> tuple[str, dict]:
    """(recipe, option values) that a checkpoint was trained with."""
    own = saved["args"].get("recipe", "phase12")
    if recipe not in ("", own):
        raise UserError(f"{path} is of recipe {own}, not {recipe}")
    if own not in RECIPES:
        raise UserError(f"{path} is of an unknown recipe, {own!r}")
    kept = {k: v for k, v in saved["args"].items() if k in DEFAULTS and k != "resume"}
    return own, {k: typed_value(k, v, f"{path}: {k}") for k, v in kept.items()}


def check_values(args, flags: dict) -> None:
    """Raises UserError for values that cannot be, or that contradict each other."""
    for name, allowed in CHOICES.items():
        if getattr(args, name) not in allowed:
            raise UserError(f"--{name} must be one of {', '.join(allowed)}, not {getattr(args, name)!r}")
    cli.within_bounds(vars(args) | flags)
    schedule.check(args)


if __name__ == "__main__":  # before torch is imported: --help and a misspelt flag answer at once
    cli.stop_at_once()
    ARGS, _, SAVED = cli.guarded(parse_args)

import torch
import torch.distributed as dist
from torch import nn
from tqdm import tqdm

from snac48 import training
from snac48.data import Filler, batches
from snac48.decoder import HEADS
from snac48.losses import asked, distances, head_losses, weighted
from snac48.training import Run, State, announce, enter_phase, open_run, prepare, report, save, save_if_due

# ---- the loop ----


def train(run: Run, state: State) -> None:
    """From the state's step to the last one. Always leaves by an exception: see ENDINGS."""
    announce(run, state)
    if state.validated < 0:  # the start is judged too, so that "improved by" has a base
        validate_and_keep(run, state, None)
    for epoch in remaining(run, state):
        progress = Progress(run, state, epoch)
        for batch in feed(run, state, epoch):
            check_stop(run, state)
            result = train_step(run, state, batch)
            log_step(run, state, epoch, progress, result)
            save_if_due(run, state, epoch)
        progress.bar.close()
        validate_and_keep(run, state, epoch)
        if epoch.number % run.args.save_every == 0 or epoch.number == run.args.epochs:
            save(run, state, f"checkpoint_epoch{epoch.number}.pt")
    raise Finished


def remaining(run: Run, state: State):
    """The epochs with steps or a validation to do, each with its phase entered."""
    for epoch in run.plan:
        if state.step < epoch.first_step + epoch.steps:
            enter_phase(run, state, epoch.phase)
        elif state.validated >= epoch.number:
            continue
        run.data.set_segment_length(epoch.segment)
        run.data.set_epoch(epoch.number)
        yield epoch


@dataclass(frozen=True)
class StepBatch:
    parts: list[dict]  # micro-batches of this rank
    size: int  # utterances over all ranks


def feed(run: Run, state: State, epoch: schedule.Epoch):
    """The batches of the epoch's remaining steps."""
    if state.step >= epoch.first_step + epoch.steps:
        return
    accum, order = run.speed.accum_steps, schedule.epoch_order(run.args.seed, epoch.number, len(run.data))
    parts = iter(run.loader(run.data, batches(order, epoch, state.step, run.rank, run.world, accum)))
    for done in range(state.step - epoch.first_step, epoch.steps):
        size = min(epoch.batch, len(order) - done * epoch.batch)
        yield StepBatch([next(parts) for _ in range(accum)], size)


def check_stop(run: Run, state: State) -> None:
    """Raises Stopped when any rank got a signal, TooManyBadFiles when too many are bad. Every rank calls it
    before every batch, so that all leave the loop at the same one; what the last step summed is not asked
    for again."""
    signalled, fresh = state.noted or run.reduce_sum(flags_of(run, state))
    state.noted = None
    limit = run.args.max_bad_fraction * (len(run.data) + len(run.val))
    if state.shared + fresh > limit and fresh and run.world > 1:  # two ranks may have met the same file
        every: list = [None] * run.world
        dist.all_gather_object(every, state.bad_files)
        state.bad_files = {name: why for part in every for name, why in part.items()}
        state.shared = len(state.bad_files)
    if len(state.bad_files) > limit:
        name, reason = next(iter(state.bad_files.items()))
        raise TooManyBadFiles(f"{len(state.bad_files)} files could not be read, first {name} ({reason})")
    if signalled:
        raise Stopped


def flags_of(run: Run, state: State) -> list[float]:
    """Of this rank: whether it got a signal, and how many bad files it alone knows."""
    return [float(bool(run.stop)), float(len(state.bad_files) - state.shared)]


# ---- one step ----


def losses_of(run: Run, state: State, module, batch: dict, heads=None, size=0):
    """(losses: {name: [B]}, with `loss`, their total, if heads is None; audio of each of HEADS; codes and
    latents, both empty unless the codec trains). size: of the step, where discriminators judge and learn."""
    a, extra, codes, latents = run.args, {}, [], []
    state.model.set_noise(batch["noise_key"])
    with torch.autocast(run.device.type, torch.bfloat16, enabled=a.bf16):
        if run.full:
            audio, extra, codes, latents = module(batch["audio_24k"])
        else:
            audio = module(batch["codes"], heads)
    losses = head_losses(audio, batch, **asked(a, run.geometry))
    losses |= {name: value * (batch["valid_24k"] > 0) for name, value in extra.items()}
    if size:
        losses |= state.adversary.losses(audio, batch, size)
    if heads is None:
        losses["loss"] = weighted(losses, schedule.total_weights(a, state.phase, size > 0))
    return losses, audio, codes, latents


@dataclass(frozen=True)
class StepResult:
    sums: dict  # of each loss over this rank's items
    norm: float  # of the gradient, before clipping
    done: bool  # False: skipped, the weights are as before
    size: int  # utterances over all ranks


def train_step(run: Run, state: State, batch: StepBatch) -> StepResult:
    """One optimiser step over `batch.size` utterances on all ranks. Each item counts 1/size whatever rank and
    micro-batch it lies in. A step whose norm is no number, or an outlier, changes nothing."""
    a, warm, adversary = run.args, state.phase == "warmup", state.adversary
    rates = schedule.rates_at(a, run.plan, state.step)
    for group in state.optimizer.param_groups:
        group["lr"] = rates[group["name"]] * group["share"]
    state.optimizer.zero_grad(set_to_none=True)
    if adversary:
        adversary.begin(rates)
    minimised, heads = schedule.total_weights(a, state.phase, adversary is not None), None
    if warm:  # the pretrained head is frozen: watched now and then
        new = [name for name in run.heads if HEADS[name].factor > 1]
        minimised = {f"loss_{name}": minimised[f"loss_{name}"] for name in new}
        heads = new if len(new) < len(run.heads) and state.step % a.monitor_24k_every else None
    sums, seen, total = Counter(), [], 0.0
    for i, part in enumerate(batch.parts):
        part = prepare(run, state, part)
        last = i == len(batch.parts) - 1
        with run.ranks.own_gradients(state.wrapped, last):
            size = batch.size if adversary else 0
            losses, _, codes, latents = losses_of(run, state, state.wrapped, part, heads, size)
            loss = weighted(losses, minimised).sum()
            (loss * (run.world / batch.size)).backward()  # DDP averages over ranks
        total = total + loss.detach()
        sums.update({k: v.detach().sum() for k, v in losses.items()})
        seen.append((codes, latents, part["valid_24k"]))
    clip = schedule.clip_at(a, run.plan, state.step)
    norm = nn.utils.clip_grad_norm_(state.model.parameters(), clip)
    # a loss of NaN can have finite gradients (|x| at NaN), and on one rank only: all skip or none
    flags = torch.tensor(flags_of(run, state)).to(run.device, non_blocking=True)
    theirs = adversary.norm(run.ranks) / run.world if adversary else torch.zeros_like(norm)
    summed = run.reduce_sum(torch.cat([torch.stack([norm / run.world, 0 * total, theirs]), flags]).double())
    value, nothing, theirs, *flags = summed.tolist()  # the step's one CPU-GPU sync point
    value, state.noted = value + nothing, flags if run.world > 1 else None
    outlier, state.norm = schedule.judge_norm(value, state.norm, a.outlier_factor)
    state.step += 1
    if outlier:
        state.skipped, state.in_a_row = state.skipped + 1, state.in_a_row + 1
        return StepResult(sums, value, False, batch.size)
    state.in_a_row = 0
    state.optimizer.step()
    if adversary and not adversary.step(theirs):  # the decoder's step stays
        training.note_disc_skip(run, state)
    if a.ema > 0:
        training.average_weights(state, a.ema)
    if run.full and state.phase != "features":
        training.note_codes(run, state, seen)
    if run.samples:
        rows = [row for part in batch.parts for row in part["rows"]]
        run.samples.add(state.step, state.epoch(run).number, rows)
    return StepResult(sums, value, True, batch.size)


# ---- validation: fixed crops, fixed noise, one segment length ----


@torch.no_grad()
def validate(run: Run, state: State) -> dict:
    """Means over the validation rows of every loss and of LSD. Raises what check_stop raises."""
    mine = list(range(run.rank, len(run.val), run.world))
    share, size = math.ceil(len(run.val) / run.world), run.args.eval_batch_size
    lists = [mine[i : i + size] or [Filler(0)] for i in range(0, share, size)]  # as many on every rank
    sums = Counter(count=0.0)
    with training.averaged_weights(state):
        state.model.eval()
        for batch in run.loader(run.val, lists):
            check_stop(run, state)
            batch = prepare(run, state, batch)
            found, audio, *_ = losses_of(run, state, state.codec or state.model, batch)
            found |= distances(audio, batch)
            sums.update({k: float(v.double().sum()) for k, v in found.items()})
            sums["count"] += float((batch["valid_24k"] > 0).sum())
        state.model.train()
    check_stop(run, state)
    total = dict(zip(sums, run.reduce_sum(list(sums.values()))))
    count = max(total.pop("count"), 1)
    result = {k: v / count for k, v in total.items()}
    if run.full:
        result["loss"] = result["loss_24k"]  # what is heard; commitment and the like are means to it
    return result


def validate_and_keep(run: Run, state: State, epoch: schedule.Epoch | None) -> None:
    """Validate, log, and write best_model*.pt where it is the best; epoch: None for the start."""
    training.report_codes(run, state, epoch)
    result, number = validate(run, state), epoch.number if epoch else 0
    state.validated = number
    if number == 0:
        state.baseline = result
        if run.rank == 0:
            write_json(run.folder / "baseline_metrics.json", result)
    # a decoder that is fed true features is no codec yet: it is never the best
    judged = state.best if state.phase != "features" else {}
    # the losses of a validation prefer what is blurred: of an adversarial phase the newest weights count
    newest = state.phase == "adversarial" and number > 0
    better = [k for k in judged if newest or result[k] < state.best[k]]
    state.best.update({k: result[k] for k in better})
    gain = 100 * (1 - result["loss"] / state.baseline["loss"]) if state.baseline.get("loss") else 0.0
    run.log.say(
        f"validation after epoch {number} (step {state.step}): "
        + " ".join(f"{k} {v:.4f}" for k, v in result.items())
        + (f" ({gain:+.1f} % against the start)" if epoch else "")
        + (f" best: {', '.join(better)}" if better else "")
    )
    run.log.metric(event="val", step=state.step, epoch=number, best=better, improved_percent=gain, **result)
    with training.averaged_weights(state):
        for k in better:
            save(run, state, k.replace("loss", "best_model") + ".pt")


# ---- what a step says ----


class Progress:
    """Since the last log line: sums of the losses, audio seconds, wall-clock; and the bar of a terminal."""

    def __init__(self, run: Run, state: State, epoch: schedule.Epoch):
        title = f"epoch {epoch.number}/{run.args.epochs} {epoch.phase} {epoch.segment:g} s"
        hide = None if run.rank == 0 else True  # None: shown on a terminal only
        self.bar = tqdm(
            total=epoch.steps, initial=state.step - epoch.first_step, desc=title, disable=hide, leave=False
        )
        self.clear()

    def clear(self) -> None:
        self.sums, self.items, self.seconds, self.since = Counter(), Counter(), 0.0, time.time()
        self.steps = 0


def log_step(run: Run, state: State, epoch: schedule.Epoch, progress: Progress, result: StepResult) -> None:
    """A line for a skipped step; the means since the last line every --log_every steps. Raises Diverged."""
    progress.bar.update()
    progress.steps += 1
    samples = result.size * run.data.coarse_len * run.geometry.coarse_samples
    progress.seconds += samples / run.geometry.sampling_rate
    if result.done:
        progress.sums.update(result.sums)
        progress.items.update(dict.fromkeys(result.sums, result.size))
    else:
        why = f"gradient norm {result.norm:.3g}, usually {state.norm or 0:.3g}"
        run.log.say(f"step {state.step} skipped: {why} ({state.skipped} skipped so far)")
        run.log.metric(event="skip", step=state.step, reason=why, skipped=state.skipped)
        if state.in_a_row >= SKIPS_IN_A_ROW:
            raise Diverged
    first = state.step == state.first_step + 1  # a start shows at once where it is
    if state.step % run.args.log_every and state.step < epoch.first_step + epoch.steps and not first:
        return
    spent = max(time.time() - progress.since, 1e-9)
    state.paces.append(spent / (progress.steps * epoch.segment * epoch.batch))
    sums = run.reduce_sum([float(v) for v in progress.sums.values()]) if progress.sums else []
    means = {k: v / progress.items[k] for k, v in zip(progress.sums, sums)}
    report(run, state, epoch, means, result.norm, progress.seconds / spent)
    progress.bar.set_postfix({k: f"{v:.3f}" for k, v in means.items() if k.startswith("loss")})
    progress.clear()


# ---- endings ----


# exception: (reason in the log, exit code, checkpoint, what to do; an error where the code is 1 or 5)
ENDINGS = {
    Finished: ("finished", 0, None, ""),
    Stopped: ("stopped", cli.EXIT_STOPPED, training.save_step,
              "go on with: --resume auto --output_dir {args.output_dir}"),
    Diverged: ("diverged", cli.EXIT_DIVERGED, training.save_before_skips,
               f"{SKIPS_IN_A_ROW} steps in a row were skipped; --resume auto repeats them from a checkpoint "
               "from before: give a lower rate with it, --main_lr or before the main phase --lr"),
    TooManyBadFiles: ("too many bad files", cli.EXIT_BAD_INPUT, training.save_begun,
                      "{error}: more than --max_bad_fraction {args.max_bad_fraction:g}; mend them or raise "
                      "it, then --resume auto"),
    torch.OutOfMemoryError: ("out of GPU memory", cli.EXIT_ERROR, None,
                             "GPU out of memory ({error}): raise --accum_steps (same result in smaller "
                             "pieces) or lower --batch_size, then --resume auto"),
    LoaderDied: ("a data loader process died", cli.EXIT_ERROR, None,
                 "a data loader process died ({error}): most likely the memory ran out; lower "
                 "--num_workers, then --resume auto"),
}  # fmt: skip


def end(run: Run, state: State, ending: BaseException) -> int:
    """Checkpoint, closing lines and exit code of an ending. Raises UserError where it is an error."""
    reason, code, keep, advice = next(row for kind, row in ENDINGS.items() if isinstance(ending, kind))
    advice = advice.format(args=run.args, error=cli.first_line(ending))
    if keep:  # an ending that all ranks come to
        keep(run, state)
        run.ranks.barrier()  # torchrun would end rank 0 in its writing soon after another one has left
    spent, gpu = time.time() - run.began, run.device.type == "cuda"
    memory = f", peak GPU memory {torch.cuda.max_memory_allocated() / 2**30:.1f} GiB" if gpu else ""
    run.log.say(
        f"{reason} at step {state.step} after {human_time(spent)}{memory}; {state.skipped} "
        f"steps skipped, {len(state.bad_files)} bad files"
        + (f", {len(state.left_out)} left out as too loud" if state.left_out else "")
        + (f", {len(state.unfaithful)} unfaithful" if state.unfaithful else "")
    )
    run.log.metric(
        event="end",
        reason=reason,
        code=code,
        step=state.step,
        skipped=state.skipped,
        bad_files=len(state.bad_files),
        seconds=round(spent, 1),
    )
    if code in (cli.EXIT_ERROR, cli.EXIT_BAD_INPUT):
        raise UserError(advice, code) from None
    if advice:
        run.log.say(advice)
    if run.world > 1:
        dist.destroy_process_group()
    return code


def main(args, saved: dict | None = None) -> int:
    warnings.filterwarnings("ignore", "This DataLoader will create")  # every epoch, 300 characters
    run, state = open_run(args, saved)
    try:
        train(run, state)
    except tuple(ENDINGS) as ending:
        return end(run, state, ending)


if __name__ == "__main__":
    cli.main_guard(main, ARGS, SAVED)
