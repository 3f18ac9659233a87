"""Train the dual-head decoder: from the same SNAC codes, 24 kHz (the pretrained head) and 48 kHz (a new
head).

    python train_dual_head.py --codes_dir codes --audio_48k_dir targets/train --val_audio_48k_dir targets/val
    torchrun --nproc_per_node 4 train_dual_head.py ...same flags...        # batch sizes are over all GPUs
    python train_dual_head.py --device cpu --pretrained_model assets/codec --batch_size 6 ...     # tiny, CPU
    python train_dual_head.py --resume auto --output_dir checkpoints/phase12_dual_head            # go on

Reads a cache of cache_codes.py and 48 kHz targets (of precompute_48k.py, or real 48 kHz recordings);
writes into --output_dir: checkpoints, args.json, metrics.jsonl (one object a line), training.log. Values:
flag > --config > --recipe. Exit codes: 0 finished, 1 wrong input, 3 stopped by a signal with a
checkpoint, 4 diverged, 5 bad input.

Edit freely. Don't touch without reading SPEC-like comments beside them: the cache schema (CodeIndex), the
sample order and noise (functions of seed, epoch, index: the resume contract), the checkpoint's keys.
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
from dataclasses import asdict, dataclass
from pathlib import Path

from cache_codes import DEFAULT_MODEL, Geometry, geometry_of, load_snac
from runlog import (
    EXIT_BAD_INPUT,
    EXIT_DIVERGED,
    EXIT_STOPPED,
    RunLog,
    StopFlag,
    UserError,
    check_zip,
    git_sha,
    guarded,
    human_time,
    ignore_stop_signals,
    load_checkpoint,
    main_guard,
    pick_device,
    save_checkpoint,
    step_line,
    versions,
    write_json,
)

# ---- options: every default stands here once ----

OPTIONS = {  # name: (default, help); the type is the default's
    "data": {
        "codes_dir": ("", "cache folder holding train/ and val/ (instead of --cache_dir and "
                          "--val_cache_dir)"),
        "cache_dir": ("", "training codes of cache_codes.py"),
        "val_cache_dir": ("", "validation codes"),
        "audio_48k_dir": ("", "48 kHz targets of the training codes: precompute_48k.py's output, or real "
                              "recordings"),
        "val_audio_48k_dir": ("", "48 kHz targets of the validation codes"),
        "audio_24k_dir": ("", "originals of any rate for the 24 kHz target (default: the cache's "
                              "data_dir; rows "
                              "of kind copied take both from the 48 kHz file)"),
        "val_audio_24k_dir": ("", "the same for validation"),
        "limit": (-1, "only the first N rows of the cache (-1 = all)"),
        "val_limit": (-1, "only the first N validation rows (-1 = all)"),
        "num_workers": (4, "data loader processes a GPU (0 = in this process)"),
        "max_bad_fraction": (0.01, "stop when more rows or files than this are bad; fewer are counted and "
                                   "left out"),
        "include_unfaithful": (False, "train also on rows the targets' manifest lists as unfaithful"),
    },
    "model": {
        "pretrained_model": (DEFAULT_MODEL, "SNAC folder, hub id or hub id@COMMIT"),
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
        "monitor_24k_every": (10, "steps between 24 kHz losses while the trunk is frozen"),
    },
    "schedule": {
        "epochs": (15, "epochs, warmup included"),
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
        "lr": (2e-4, "warmup rate of the 48 kHz head, constant"),
        "main_lr": (5e-5, "OneCycle peak of trunk and 48 kHz head"),
        "lr_24k_final_conv": (1e-5, "OneCycle peak of the 24 kHz head"),
        "weight_decay": (0.01, "AdamW"),
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
CHOICES = {"init": ("interpolate", "average", "first", "random"), "stft": ("magnitude", "complex")}
RECIPES = {"phase12": {}}  # what differs from DEFAULTS

# Keys of the older JSON configs -> our names. None: kept in args.json, no effect on training.
CONFIG_KEYS = {
    "train_data": "cache_dir",
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


def read_config(path: str) -> dict:
    """A JSON config (`//` comments allowed) as option values. An unknown key is an error naming the
    nearest one."""
    try:
        text = Path(path).read_text(encoding="utf-8")
    except OSError as e:
        raise UserError(f"config {path} cannot be read: {e.strerror}") from None
    text = re.sub(r'("(?:\\.|[^"\\])*")|//[^\n]*', lambda m: m.group(1) or "", text)
    try:
        config = json.loads(text)
    except ValueError as e:
        raise UserError(f"config {path} is not JSON: {e}") from None
    known = {k: k for k in DEFAULTS} | CONFIG_KEYS
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


def find_resume(value: str, output_dir: str) -> Path | None:
    """--resume as a file: itself; a folder or auto: the newest checkpoint_*.pt whose content verifies."""
    if value != "auto" and not Path(value).is_dir():
        if not Path(value).is_file():
            raise UserError(f"--resume {value} does not exist")
        return Path(value)
    folder = Path(output_dir if value == "auto" else value)
    found = sorted(folder.glob("checkpoint_*.pt"), key=lambda p: p.stat().st_mtime, reverse=True)
    for path in found:
        reason = check_zip(path)
        if reason is None:
            return path
        print(
            f"warning: {path} is damaged ({reason}); falling back to the one before",
            file=sys.stderr,
            flush=True,
        )
    if value != "auto":
        raise UserError(f"--resume {value}: no usable checkpoint_*.pt in that folder")
    return None


def parse_args(argv=None) -> tuple[argparse.Namespace, dict]:
    """(resolved options, origin of each value: default | recipe | config | checkpoint | flag)."""
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--recipe", choices=sorted(RECIPES), default="phase12", help="(default: phase12)")
    p.add_argument("--config", default="", help="JSON file with values of these options or the older keys")
    p.add_argument(
        "--print_config", action="store_true", help="print every value, where it came from, and stop"
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
    recipe, config, show = typed.pop("recipe"), typed.pop("config"), typed.pop("print_config")
    layers = [("default", DEFAULTS), ("recipe", RECIPES[recipe])]
    if typed.get("resume"):
        ckpt = find_resume(typed["resume"], typed.get("output_dir", DEFAULTS["output_dir"]))
        typed["resume"] = str(ckpt) if ckpt else ""
        if ckpt:  # a resumed run keeps its values unless a flag says otherwise
            saved = load_checkpoint(ckpt)["args"]
            layers.append(("checkpoint", {k: v for k, v in saved.items() if k in DEFAULTS and k != "resume"}))
    if config:
        layers.append(("config", read_config(config)))
    layers.append(("flag", typed))
    values, origin = {}, {}
    for source, layer in layers:
        values.update(layer)
        origin.update(dict.fromkeys(layer, source))
    if values["codes_dir"]:
        for name, sub in (("cache_dir", "train"), ("val_cache_dir", "val")):
            values[name] = values[name] or str(Path(values["codes_dir"]) / sub)
    args = argparse.Namespace(recipe=recipe, **values)
    check_args(args)
    if show:
        for name, value in values.items():
            print(f"{name:22} {value!r:36} {origin[name]}")
        sys.exit(0)
    return args, origin


def check_args(args) -> None:
    for name, allowed in CHOICES.items():
        if getattr(args, name) not in allowed:
            raise UserError(f"{name} must be one of {', '.join(allowed)}, not {getattr(args, name)!r}")
    for name in ("epochs", "batch_size", "eval_batch_size", "accum_steps", "log_every", "monitor_24k_every"):
        if getattr(args, name) < 1:
            raise UserError(f"--{name} must be at least 1")
    for name in ("cache_dir", "audio_48k_dir", "val_cache_dir", "val_audio_48k_dir"):
        if not getattr(args, name):
            raise UserError(f"--{name} is missing: it names the {OPTIONS['data'][name][1].split(' (')[0]}")
    curriculum(args)  # raises on a malformed schedule


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
    phase: str  # warmup | main
    segment: float  # seconds
    batch: int  # utterances a step over all GPUs
    first_step: int  # global step before its first step
    steps: int


def make_plan(args, rows: int) -> list[Epoch]:
    plan, step = [], 0
    for i, (segment, batch) in enumerate(curriculum(args)):
        phase = "warmup" if i < args.warmup_epochs else "main"
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


def rates_at(args, plan: list[Epoch], step: int) -> dict[str, float]:
    """Learning rate of every trained group at global step `step` (0-based: the rate of the next update)."""
    warm = sum(e.steps for e in plan if e.phase == "warmup")
    if step < warm:
        return {"head_48k": args.lr}
    total = sum(e.steps for e in plan) - warm
    peaks = {"trunk": args.main_lr, "head_48k": args.main_lr, "head_24k": args.lr_24k_final_conv}
    return {group: one_cycle(step - warm, total, peak) for group, peak in peaks.items()}


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
    ARGS, ORIGIN = guarded(parse_args)

import numpy as np  # noqa: E402
import torch  # noqa: E402
import torch.distributed as dist  # noqa: E402
from torch import nn  # noqa: E402
from tqdm import tqdm  # noqa: E402

from dataset import CachedCodesDataset, collate  # noqa: E402
from dual_head import DualHeadDecoder, head_losses, lsd, masked, model_config  # noqa: E402


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


class Trainer:
    """Model, optimiser and position of one run; `train()` goes from the current step to the end."""

    def __init__(self, args):
        self.args = args
        self.stop = StopFlag()
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
        snac = load_snac(args.pretrained_model)
        self.geometry = geometry_of(snac, args.pretrained_model)
        self.config = model_config(snac)
        self.data = self.open_data(
            args.cache_dir, args.audio_48k_dir, args.audio_24k_dir, args.limit, fixed=False
        )
        self.val = self.open_data(args.val_cache_dir, args.val_audio_48k_dir, args.val_audio_24k_dir,
                                  args.val_limit, fixed=True)  # fmt: skip
        self.plan = make_plan(args, len(self.data))
        self.model = DualHeadDecoder(snac, args.init).to(self.device)
        self.model.quantizer.eval()
        self.step, self.validated, self.skipped, self.in_a_row, self.norm = 0, -1, 0, 0, None
        self.best = {"loss": math.inf, "loss_24k": math.inf, "loss_48k": math.inf}
        self.phase, self.optimizer, self.ema = None, None, None
        self.bad_files: dict[str, str] = {}
        if args.resume:
            self.restore(Path(args.resume))
        else:
            self.enter_phase(self.plan[0].phase)
        self.log = RunLog(args.output_dir, quiet=self.rank > 0)

    def open_data(self, cache_dir, audio_48k_dir, audio_24k_dir, limit, fixed):
        a = self.args
        data = CachedCodesDataset(
            cache_dir, audio_48k_dir, a.val_segment, limit, audio_24k_dir=audio_24k_dir, seed=a.seed,
            fixed=fixed, include_unfaithful=a.include_unfaithful, max_bad_fraction=a.max_bad_fraction,
        )  # fmt: skip
        differs = self.geometry.difference(data.index.geometry)
        if differs:
            raise UserError(f"cache {cache_dir} was made by another model "
                            f"({data.index.geometry.pretrained_model}: "
                            f"{differs}); make it anew with --pretrained_model "
                            f"{a.pretrained_model}")  # fmt: skip
        return data

    # -- phases: optimiser and wrapping are built once a phase --

    def enter_phase(self, phase: str) -> None:
        """Freeze, build the optimiser and wrap for DDP: warmup trains head_48k only, main everything."""
        warm = phase == "warmup"
        self.phase = phase
        self.model.trunk.requires_grad_(not warm)
        self.model.head_24k.requires_grad_(not warm)
        self.model.trunk_frozen = warm
        groups = ("head_48k",) if warm else ("trunk", "head_48k", "head_24k")
        self.optimizer = torch.optim.AdamW(
            [{"params": list(getattr(self.model, g).parameters()), "name": g} for g in groups],
            lr=0.0, betas=(0.9, 0.999), weight_decay=self.args.weight_decay, fused=self.device.type == "cuda",
        )  # fmt: skip
        self.wrapped = self.model
        if self.world > 1:
            ids = [self.device.index] if self.device.type == "cuda" else None
            self.wrapped = nn.parallel.DistributedDataParallel(self.model, device_ids=ids)
        if self.args.compile:
            self.wrapped = torch.compile(self.wrapped)
        self.norm = None  # the running gradient norm of another set of parameters

    # -- one step --

    def to_device(self, batch):
        move = lambda v: v.to(self.device, non_blocking=True)  # noqa: E731
        return {
            k: [move(c) for c in v] if k == "codes" else v if k == "bad" else move(v)
            for k, v in batch.items()
        }

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
            group["lr"] = rates[group["name"]]
        self.optimizer.zero_grad(set_to_none=True)
        sums: dict = {}
        for i, batch in enumerate(micro_batches):
            self.note_bad(batch["bad"])
            batch = self.to_device(batch)
            watch_24k = not warm or self.step % a.monitor_24k_every == 0
            last = i == len(micro_batches) - 1
            sync = contextlib.nullcontext() if last or self.world == 1 else self.wrapped.no_sync()
            with sync:
                self.model.set_noise(batch["noise_key"])
                with self.autocast():
                    audio_24k, audio_48k = self.wrapped(batch["codes"], watch_24k, True)
                if warm and watch_24k:
                    audio_24k = audio_24k.detach()  # monitored, not trained
                losses = head_losses(audio_24k, audio_48k, batch, a)
                loss = a.loss_weight_48k * losses["loss_48k"]
                if "loss_24k" in losses:
                    losses["loss"] = loss + a.loss_weight_24k * losses["loss_24k"]
                    loss = loss if warm else losses["loss"]
                (loss.sum() * (self.world / size)).backward()  # DDP averages over ranks
            for k, v in losses.items():
                sums[k] = sums.get(k, 0) + v.detach().sum()
        norm = nn.utils.clip_grad_norm_(self.model.parameters(), a.grad_clip)
        value = float(norm)  # CPU-GPU sync point; the same on every rank, so all skip or none
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
        return sums, value, True

    def note_bad(self, bad) -> None:
        """Quarantine files that could not be read: named once in the log, counted, and a reason to stop
        if many."""
        for name, reason in bad:
            if name not in self.bad_files:
                self.bad_files[name] = reason
                self.log.say(f"bad file {name}: {reason}")
                self.log.metric(event="bad_file", file_path=name, reason=reason, step=self.step)
        if len(self.bad_files) > self.args.max_bad_fraction * (len(self.data) + len(self.val)):
            name, reason = next(iter(self.bad_files.items()))
            raise UserError(f"{len(self.bad_files)} files could not be read, first {name} ({reason}): "
                            "more than "
                            f"--max_bad_fraction {self.args.max_bad_fraction:g}", EXIT_BAD_INPUT)  # fmt: skip

    def all_sum(self, sums: dict) -> dict:
        """Sums over ranks as floats (one CPU-GPU sync)."""
        values = torch.stack([torch.as_tensor(v, dtype=torch.float64, device="cpu") for v in sums.values()])
        if self.world > 1:
            values = values.to(self.device)
            dist.all_reduce(values)
        return dict(zip(sums, values.tolist()))

    def stop_asked(self) -> bool:
        """Whether any rank got a signal (all ranks must leave the loop at the same step)."""
        if self.world == 1:
            return bool(self.stop)
        flag = torch.tensor(float(bool(self.stop)), device=self.device)
        dist.all_reduce(flag, dist.ReduceOp.MAX)
        return bool(flag)

    # -- validation: fixed crops, fixed noise, one segment length --

    @torch.no_grad()
    def validate(self) -> dict | None:
        """Means over the validation rows of every loss and of LSD; None when a stop was asked for
        meanwhile."""
        a = self.args
        mine = list(range(self.rank, len(self.val), self.world))
        loader = self.loader(
            self.val, [mine[i : i + a.eval_batch_size] for i in range(0, len(mine), a.eval_batch_size)]
        )
        sums = dict.fromkeys(("l1_24k", "stft_24k", "loss_24k", "l1_48k", "stft_48k", "loss_48k", "lsd_48k",
                              "lsd_12_24k", "count"), 0.0)  # fmt: skip
        with self.averaged_weights():
            self.model.eval()
            for batch in loader:
                if self.world == 1 and self.stop:
                    return None
                self.note_bad(batch["bad"])
                batch = self.to_device(batch)
                self.model.set_noise(batch["noise_key"])
                with self.autocast():
                    audio_24k, audio_48k = self.model(batch["codes"])
                found = head_losses(audio_24k, audio_48k, batch, a)
                valid = 2 * batch["valid_24k"]
                pred, target = masked(audio_48k[:, 0].float(), valid), batch["audio_48k"][:, 0]
                found["lsd_48k"] = lsd(pred, target, valid, 48000) * (valid > 0)
                found["lsd_12_24k"] = lsd(pred, target, valid, 48000, 12000) * (valid > 0)
                found["count"] = (valid > 0).double()
                for k, v in found.items():
                    sums[k] += float(v.double().sum())
            self.model.train()
        total = self.all_sum(sums)
        count = max(total.pop("count"), 1)
        result = {k: v / count for k, v in total.items()}
        result["loss"] = a.loss_weight_24k * result["loss_24k"] + a.loss_weight_48k * result["loss_48k"]
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
        epoch = next((e.number for e in self.plan if self.step < e.first_step + e.steps), self.args.epochs)
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
            "geometry": asdict(self.geometry) | {"vq_strides": list(self.geometry.vq_strides)},
            "model_config": self.config,
            "rng": {"seed": self.args.seed},  # order, crops and noise are functions of it: no generator state
            "guard": {"norm": self.norm, "skipped": self.skipped, "in_a_row": self.in_a_row},
            "best": self.best,
            "versions": versions() | {"git": git_sha()},
        }

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
        check_fits(saved, path, self.geometry)
        if saved["scheduler"]["plan"] != [asdict(e) for e in self.plan]:
            raise UserError(f"{path} belongs to a run with another schedule or number of rows "
                            f"({sum(e['steps'] for e in saved['scheduler']['plan'])} steps there, "
                            f"{self.plan[-1].first_step + self.plan[-1].steps} here): resume it with its "
                            "own flags and data")  # fmt: skip
        load_weights(self.model, saved["model"], path)
        self.step, self.validated, self.best = saved["global_step"], saved["validated_epoch"], saved["best"]
        self.enter_phase(saved["phase"])
        self.optimizer.load_state_dict(saved["optimizer"])
        self.ema = saved["ema"] and {k: v.to(self.device) for k, v in saved["ema"].items()}
        guard = saved["guard"]
        self.norm, self.skipped, self.in_a_row = guard["norm"], guard["skipped"], guard["in_a_row"]

    # -- the loop --

    def train(self) -> int:
        a, log, total = self.args, self.log, self.plan[-1].first_step + self.plan[-1].steps
        self.announce(total)
        last_save = time.time()
        if self.validated < 0 and not self.validate_and_keep(
            0
        ):  # the start, so that "improved by" has a base
            return self.stop_with_checkpoint(self.plan[0])
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
                    return self.stop_with_checkpoint(epoch)
                size = min(epoch.batch, len(order) - (self.step - epoch.first_step) * epoch.batch)
                sums, norm, done = self.train_step([next(feed) for _ in range(a.accum_steps)], size)
                self.step += 1
                bar.update()
                seconds += (
                    size * self.data.coarse_len * self.geometry.coarse_samples / self.geometry.sampling_rate
                )
                if not done:
                    why = f"gradient norm {norm:.3g}, usually {self.norm or 0:.3g}"
                    log.say(f"step {self.step} skipped: {why} ({self.skipped} skipped so far)")
                    log.metric(event="skip", step=self.step, reason=why, skipped=self.skipped)
                    if self.in_a_row >= 20:
                        return self.end("diverged", EXIT_DIVERGED)
                else:
                    for k, v in sums.items():
                        window[k], items[k] = window.get(k, 0) + v, items.get(k, 0) + size
                if self.step % a.log_every == 0 or self.step == end:
                    means = {k: v / items[k] for k, v in self.all_sum(window).items()} if window else {}
                    speed = seconds / max(time.time() - since, 1e-9)
                    self.report(epoch, total, means, norm, speed)
                    bar.set_postfix({k: f"{v:.3f}" for k, v in means.items() if k.startswith("loss")})
                    window, items, seconds, since = {}, {}, 0.0, time.time()
                if a.save_every_batches > 0 and self.step % a.save_every_batches == 0:
                    self.save(
                        f"checkpoint_epoch{epoch.number}_iter{self.step}.pt", "checkpoint_epoch*_iter*.pt"
                    )
                if a.save_every_minutes > 0 and time.time() - last_save > 60 * a.save_every_minutes:
                    stamp = time.strftime("%Y%m%d_%H%M%S")
                    self.save(
                        f"checkpoint_epoch{epoch.number}_time_{stamp}.pt", "checkpoint_epoch*_time_*.pt"
                    )
                    last_save = time.time()
            bar.close()
            if not self.validate_and_keep(epoch.number):
                return self.stop_with_checkpoint(epoch)
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
        log.say(f"{event}: recipe {a.recipe}, {len(self.data)} rows ({len(self.val)} validation), {total} "
                "steps, "
                f"from step {self.step}, {self.world} process(es) on {self.device}, init "
                f"{a.init}")  # fmt: skip
        for which, data in (("training", self.data), ("validation", self.val)):
            for reason, n in data.left_out.items():
                log.say(f"  left out of {which}: {n} rows, {reason}")
        for e in self.plan:
            log.say(f"  epoch {e.number}: {e.phase}, {e.segment:g} s, batch {e.batch}, {e.steps} steps")
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
        self.log.say(step_line(self.step, total, epoch.number, self.args.epochs, epoch.phase,
                               {k: v for k, v in shown.items() if v is not None}
                               | {"lr": rates["head_48k"], "norm": norm, "audio-s/s": speed,
                                  "eta": human_time(eta)}))  # fmt: skip
        self.log.metric(step=self.step, total_steps=total, epoch=epoch.number, epochs=self.args.epochs,
                        phase=epoch.phase, segment_length=epoch.segment, batch_size=epoch.batch, **means,
                        lr=rates["head_48k"], **{f"lr_{k}": v for k, v in rates.items()}, grad_norm=norm,
                        skipped=self.skipped, audio_s_per_s=speed, eta_s=eta)  # fmt: skip

    def validate_and_keep(self, epoch: int) -> bool:
        """Validate, log, and write best_model*.pt where it is the best. False when a stop was asked for."""
        result = self.validate()
        if result is None:
            return False
        self.validated = epoch
        names = {"loss": "best_model.pt", "loss_24k": "best_model_24k.pt", "loss_48k": "best_model_48k.pt"}
        better = [k for k in names if result[k] < self.best[k]]
        self.best.update({k: result[k] for k in better})
        self.log.say(f"validation after epoch {epoch} (step {self.step}): "
                     + " ".join(f"{k} {v:.4f}" for k, v in result.items())
                     + (f" best: {', '.join(better)}" if better else ""))  # fmt: skip
        self.log.metric(event="val", step=self.step, epoch=epoch, best=better, **result)
        with self.averaged_weights():
            for k in better:
                self.save(names[k])
        return True

    def stop_with_checkpoint(self, epoch) -> int:
        self.save(f"checkpoint_epoch{epoch.number}_iter{self.step}.pt", "checkpoint_epoch*_iter*.pt")
        return self.end("stopped", EXIT_STOPPED)

    def end(self, reason: str, code: int) -> int:
        spent = time.time() - self.began
        memory = (
            f", peak GPU memory {torch.cuda.max_memory_allocated() / 2**30:.1f} GiB"
            if self.device.type == "cuda"
            else ""
        )
        self.log.say(f"{reason} at step {self.step} after {human_time(spent)}{memory}; {self.skipped} "
                     "steps skipped, "
                     f"{len(self.bad_files)} bad files")  # fmt: skip
        if reason == "stopped":
            self.log.say(f"go on with: --resume auto --output_dir {self.args.output_dir}")
        if reason == "diverged":
            self.log.say(
                "20 steps in a row were skipped: resume from an earlier checkpoint with a lower --main_lr"
            )
        self.log.metric(event="end", reason=reason, code=code, step=self.step, skipped=self.skipped,
                        bad_files=len(self.bad_files), seconds=round(spent, 1))  # fmt: skip
        if self.world > 1:
            dist.destroy_process_group()
        return code


# ---- checkpoints: what fits what ----


def check_ours(saved: dict, path) -> None:
    """Raises UserError unless `saved` has what every checkpoint of this script has."""
    missing = [k for k in ("model", "geometry", "model_config", "args", "global_step") if k not in saved]
    if missing:
        raise UserError(f"{path} is not a checkpoint of train_dual_head.py: it lacks {', '.join(missing)}")


def check_fits(saved: dict, path, geometry: Geometry) -> None:
    """Raises UserError unless the checkpoint is ours and its geometry and codec weights are the model's."""
    check_ours(saved, path)
    theirs = Geometry.from_json(json.dumps(saved["geometry"]))
    differs = geometry.difference(theirs)
    if differs:
        raise UserError(f"{path} was trained on another model ({theirs.pretrained_model}: {differs}); "
                        "give that one "
                        "as --pretrained_model")  # fmt: skip


def load_weights(model, state: dict, path) -> None:
    """load_state_dict after checking keys, shapes and dtypes: one sentence instead of a page."""
    own = model.state_dict()
    wrong = sorted(set(own) ^ set(state))
    wrong += [
        k for k in own if k in state and (own[k].shape != state[k].shape or own[k].dtype != state[k].dtype)
    ]
    if wrong:
        raise UserError(f"weights in {path} don't fit this model: {len(wrong)} tensors differ in name, "
                        "shape or dtype, "
                        f"first {wrong[0]}")  # fmt: skip
    model.load_state_dict(state)


def main() -> int:
    try:
        return Trainer(ARGS).train()
    except torch.OutOfMemoryError as e:
        raise UserError(f"GPU out of memory ({str(e).splitlines()[0]}): raise --accum_steps (same result "
                        "in smaller "
                        "pieces), lower --batch_size, or use --bf16; then --resume "
                        "auto") from None  # fmt: skip


if __name__ == "__main__":
    main_guard(main)
