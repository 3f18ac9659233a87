"""What values an option may have: one table for the flags and configs of all scripts.

An interval as mathematics writes it: [1, 100] with its ends, (0, 1] without the first one; before `or`, a
value besides that switches something off. Its type is the option's own (--help); of a list, every number must
lie in it. What options must be to each other: `check` in schedule.py, and beside the flags of each script.
A script may not have a number without a row here: `wrong` raises KeyError.
"""

import functools
import math
import re

COUNT, MANY, RATE, WEIGHT, SHARE = "[1, 1e9]", "[0, 1e9]", "(0, 10]", "[0, 1e6]", "[0, 1]"
ALL_OR = "-1 or [1, 1e12]"  # how many; -1 = all
OFF_OR = "-1 or [0, 1e12]"  # -1 and 0 = off
SECONDS, CLIP, EPOCHS, BATCH, SEED = "(0, 3600]", "(0, 1e6]", "[0, 10000]", "[1, 65536]", "[0, 4294967295]"

BOUNDS = {
    # data
    "limit": ALL_OR, "val_limit": ALL_OR, "native_rate": "[1, 1e6]", "min_envelope_corr": "[-1, 1]",
    "num_workers": "[0, 1024]", "max_bad_fraction": SHARE, "verify_rows": "[0, 1e9]",
    "start_idx": "[0, 1e12]", "end_idx": OFF_OR, "batch_slack": "[0, 3600]", "test_samples": COUNT,
    "rows_per_file": COUNT, "min_seconds": "[0, 86400]", "import_sample": ALL_OR, "train_ratio": "(0, 1)",
    # a training of the decoder
    "pitch_features": "[0, 4096]", "seed": SEED, "log_every": COUNT, "save_every": COUNT,
    "save_every_batches": OFF_OR, "save_every_minutes": OFF_OR, "keep_checkpoints": ALL_OR,
    "monitor_24k_every": COUNT, "epochs": "[1, 10000]", "feature_epochs": EPOCHS, "warmup_epochs": EPOCHS,
    "batch_size": BATCH, "eval_batch_size": BATCH, "accum_steps": "[1, 65536]",
    "segment_schedule": "(0, 600]", "batch_multiplier": "(0, 1000]", "val_segment": "(0, 600]",
    "lr": RATE, "main_lr": RATE, "lr_24k_final_conv": RATE, "lr_min_ratio": SHARE, "weight_decay": "[0, 10]",
    "adam_betas": "[0, 1)", "grad_clip": CLIP, "outlier_factor": "-1 or (1, 1e9]", "ema": "[0, 1)",
    "n_ffts": "[16, 65536]", "adv_epochs": "-1 or [1, 10000]", "adv_lr": RATE,
    "adv_lr_trunk": "[0, 10]", "disc_lr": RATE, "adv_betas": "[0, 1)", "disc_alone": "[0, 1)",
    "disc_young": SHARE, "young_clip": CLIP, "disc_clip": CLIP, "disc_width": "[1, 4096]",
    "print_schedule": "[1, 1e12]", "print_memory": "(0, 1e6]",
    # a training of the language model
    "ctx": "[1, 1e6]", "step": "[0, 1e6]", "prefetch": "[1, 10000]", "batch": BATCH, "accum": BATCH,
    "warmup_ratio": SHARE, "eta_min_ratio": SHARE, "outlier_skip_factor": "0 or (1, 1e9]",
    "label_smoothing": "[0, 1)", "cb_weights_auto_alpha": "[-1, 1000]", "d_model": "[2, 65536]",
    "layers": "[1, 1000]", "heads": "[1, 1024]", "depth_layers": "[1, 1000]", "depth_d_model": "[0, 65536]",
    "dropout": "[0, 1)", "val_every": COUNT, "eval_audio_every": MANY, "eval_frames": COUNT,
    "eval_temperature": "[0, 1000]", "eval_top_k": MANY, "eval_top_p": SHARE, "archive_every": MANY,
    "keep_archived": COUNT, "save_every_steps": MANY, "log_lr_steps": COUNT,
    "frames": COUNT, "temperature": "[0, 1000]", "top_k": MANY, "top_p": SHARE, "prompt_row": MANY,
    "prompt_frames": MANY, "fps": "(0, 1e6]", "codebook_size": "[2, 65536]",
    # what a trained decoder is used for
    "chunk_seconds": SECONDS, "noise_seed": SEED, "segment_length": SECONDS, "num_samples": ALL_OR,
    "min_rate": "[1, 1e6]", "max_samples_saved": OFF_OR, "probe_windows": COUNT, "jump": WEIGHT,
    "stride": CLIP,
    # the monitor
    "refresh_s": "[0.05, 3600]", "stall_s": "(0, 1e9]", "diverge": "(1, 1e9]", "disk_gb": "[0, 1e9]",
}  # fmt: skip
LISTS = {"segment_schedule": float, "batch_multiplier": float, "n_ffts": int, "adam_betas": float,
         "adv_betas": float, "print_memory": float}  # fmt: skip
OWN = {"train_rvq": {"grad_clip": "[0, 1e6]"}}  # where a script means something else by a name: 0 = off


def wrong(name: str, value, script: str = "") -> str | None:
    """What a value of an option must be instead, in words; None where it may be that. value: a number, or a
    list of them."""
    other, low, after, high, before = bound(row(name, script))
    for x in value if isinstance(value, list) else [value]:
        above = x > low if after else x >= low  # nan is neither
        below = x < high if before else x <= high
        if x != other and not (above and below):
            return words(other, low, after, high, before)


def row(name: str, script: str = "") -> str:
    """The interval of an option. Weights of losses, NAME_weight and loss_weight_HEAD, have one in common."""
    if name.endswith("_weight") or name.startswith("loss_weight_"):
        return WEIGHT
    return OWN.get(script, {}).get(name) or BOUNDS[name]


@functools.cache
def bound(text: str) -> tuple[float, float, bool, float, bool]:
    """`-1 or (0, 1]` -> (value besides or nan, lowest, not itself?, highest, not itself?)."""
    other, first, low, high, last = re.fullmatch(
        r"(?:(.+) or )?([\[(])(.+), (.+)([\])])", text
    ).groups(math.nan)  # fmt: skip
    return float(other), float(low), first == "(", float(high), last == ")"


def words(other: float, low: float, after: bool, high: float, before: bool) -> str:
    besides = "" if math.isnan(other) else f"{other:g}, or "
    if not after and not before:
        return f"{besides}from {low:.12g} to {high:.12g}"
    first, last = "above" if after else "at least", "below" if before else "at most"
    return f"{besides}{first} {low:g} and {last} {high:g}"
