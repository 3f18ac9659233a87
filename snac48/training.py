"""What a decoder training is made of: Run, what never changes after the start, and State, what does.

State is the resume contract. To resume one more value: a field, a key in state_dict(), a line in _take_over()
(after enter_phase; `saved.get` for older files). Options are restored by values_of in train_dual_head.py.
Order, crops, noise and rates are functions of (seed, epoch, row, step): no generator or loader to restore.
"""

import contextlib
import json
import math
import time
from collections import deque
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from statistics import median_low

import numpy as np
import torch
import torch.distributed as dist
from torch import nn

from . import DEFAULT_MODEL, codec, schedule
from .adversarial import Adversary
from .audio import allow_links
from .cache import recorded_model
from .checkpoint import load_checkpoint, prune, require, restore_optimizer, save_checkpoint, set_aside
from .cli import StopFlag, UserError, first_line
from .codebooks import FullCodec, count_codes, restart_dead_entries, start_from_features, usage
from .data import (
    CachedCodesDataset,
    RawAudioDataset,
    check_room,
    encode_spans,
    loader,
    restore_targets,
    to_device,
)
from .decoder import DualHeadDecoder, taps_of
from .files import read_json, write_json
from .layers import fold_frozen
from .ranks import Ranks, fingerprint, join
from .runlog import RunLog, SampleLog, git_sha, human_time, step_line, versions
from .schedule import Epoch
from .speed import Speed, memory_plan, settle, settle_accum
from .starts import start_head

# ---- the run ----


@dataclass
class Run:
    """What never changes after the start; `data` alone is told epoch and segment length."""

    args: object  # every option of train_dual_head.py by name
    ranks: Ranks
    geometry: codec.Geometry
    config: dict  # SNAC's arguments
    data: CachedCodesDataset | RawAudioDataset
    val: CachedCodesDataset | RawAudioDataset
    plan: list[Epoch]
    speed: Speed
    snac: nn.Module | None = None  # encodes recordings on the fly
    sidon: object = None  # restores them
    log: RunLog | None = None  # opened last: a mistake before leaves no folder
    samples: SampleLog | None = None
    stop: StopFlag | None = None
    began: float = field(default_factory=time.time)

    @property
    def rank(self) -> int:
        return self.ranks.rank

    @property
    def world(self) -> int:
        return self.ranks.world

    @property
    def device(self) -> torch.device:
        return self.ranks.device

    @property
    def folder(self) -> Path:
        return Path(self.args.output_dir)

    @property
    def heads(self) -> tuple[str, ...]:
        return schedule.chosen_heads(self.args.heads)

    @property
    def total(self) -> int:
        """Steps of the whole run."""
        return self.plan[-1].first_step + self.plan[-1].steps

    @property
    def full(self) -> bool:
        """Whether the codec itself trains: codes then change at every step."""
        return schedule.trains_codec(self.args)

    def loader(self, data, index_lists):
        stop = self.stop if self.world == 1 else None  # of several processes all leave at the same batch
        return loader(data, index_lists, self.speed.num_workers, self.device.type == "cuda", stop)

    def reduce_sum(self, values):
        return self.ranks.reduce_sum(values)


def open_run(args, saved: dict | None) -> "tuple[Run, State]":
    """Load codec and data, build the model; saved: the checkpoint to go on from. Raises UserError."""
    allow_links(args.allow_links)
    ranks = join(args.device)
    torch.manual_seed(args.seed)
    snac, geometry = open_codec(args)
    with ranks.in_turn("data"):
        data, val = (open_data(args, snac, geometry, prefix) for prefix in ("", "val_"))
    plan = schedule.make_plan(args, len(data))
    speed, device = settle(args, ranks.device, plan), ranks.device
    run = Run(args, ranks, geometry, codec.model_config(snac), data, val, plan, speed)
    facts = {"the number of steps": run.total, "the codec": geometry.weights_sha256}
    facts |= {"the training data": mark_of(data), "the validation data": mark_of(val)}
    ranks.agree(args, saved, facts)
    if args.from_scratch and not saved:
        start_from_features(
            snac, some_speech(run, 12 * geometry.codebook_size), args.seed, args.pitch_features
        )
    if args.phase10_checkpoint and not saved:
        take_phase10(snac, args.phase10_checkpoint, geometry)
    begun = saved or (start_of(args, geometry) if args.start_checkpoint else None)
    taps = taps_of(begun["model"]) if begun else None
    model = DualHeadDecoder(snac, run.heads, taps, with_encoder=args.heads == "24k")
    if begun and not saved:
        codec.load_weights(model, begun["model"], args.start_checkpoint)
    elif "48k" in run.heads and not saved:
        start_head(model, snac, args.init)
    if args.data_dir and not run.full:
        # before enter_phase opens what it shares with the model
        run.snac = snac.to(device).requires_grad_(False)
    state = State(model.to(device), full_codec(model, snac, args) if run.full else None)
    state.codes = torch.zeros(2, len(geometry.vq_strides), geometry.codebook_size, dtype=torch.int64)
    each = [f"loss_{name}" for name in run.heads if len(run.heads) > 1]
    state.best = dict.fromkeys(["loss", *each], math.inf)
    settle_accum(speed, args, plan, ranks, model, geometry, state.codec)
    check_room(data, plan, speed.num_workers, ranks.world * (speed.accum_steps or 1))
    if saved:
        state.load_state_dict(run, saved)
    else:
        enter_phase(run, state, run.plan[0].phase)
    if args.upsampler == "sidon" and args.data_dir and args.heads != "24k" and not args.audio_48k_dir:
        from .sidon import Sidon

        run.sidon = Sidon(args.sidon_dir or None, device=device)
    run.log = RunLog(args.output_dir, quiet=ranks.rank > 0, alone=True)
    if saved:
        leave_behind(run, state)
    if args.sample_log:
        run.samples = SampleLog(run.folder, ranks.rank, state.step)
    run.stop = StopFlag()  # from here on a signal is answered with a checkpoint
    return run, state


def open_codec(args):
    """(SNAC, its geometry) that --from_scratch, --pretrained_model or the cache names. Raises UserError."""
    if not args.pretrained_model:
        args.pretrained_model = recorded_model(args.cache_dir) if args.cache_dir else DEFAULT_MODEL
    snac = codec.new_snac(args.from_scratch) if args.from_scratch else codec.load_snac(args.pretrained_model)
    return snac, codec.geometry_of(snac, args.from_scratch or args.pretrained_model)


def full_codec(model, snac, args) -> FullCodec:
    return FullCodec(model, codec.align_samples(snac), args.pitch_features)


def memory_lines(args, cards: list[float]) -> list[str]:
    """How GPUs of so many GB take the schedule of `args`, counted with its codec."""
    snac, geometry = open_codec(args)
    model = DualHeadDecoder(snac, schedule.chosen_heads(args.heads), with_encoder=args.heads == "24k")
    whole = full_codec(model, snac, args) if schedule.trains_codec(args) else None
    return memory_plan(cards, model, geometry, args, schedule.make_plan(args, 10**9), whole)


def mark_of(data) -> str:
    """Of a dataset: how many rows, and a fingerprint of which, of a thousand paths, and of the targets."""
    rows, kinds = data.rows, np.asarray(data.targets.kinds) if data.targets else b""
    paths = [data.path(int(row)) for row in rows[:: 1 + len(rows) // 1000]]
    return f"{len(rows)} rows {fingerprint(rows, kinds, *paths)}"


def open_data(args, snac, geometry: codec.Geometry, prefix: str):
    """The dataset of --cache_dir or --data_dir (prefix "") or of their val_ twins."""
    fixed, at = prefix == "val_", lambda name: getattr(args, prefix + name)
    targets = "" if args.heads == "24k" else at("audio_48k_dir")
    limit = args.val_limit if fixed else args.limit
    shared = {"seed": args.seed, "fixed": fixed, "include_unfaithful": args.include_unfaithful,
              "max_bad_fraction": args.max_bad_fraction, "target_kind": args.target_kind}  # fmt: skip
    if args.data_dir:
        return RawAudioDataset(
            at("data_dir").split(","),
            args.val_segment,
            limit,
            audio_48k_dir=targets,
            geometry=geometry,
            context=codec.encode_context(snac),
            align=codec.align_samples(snac),
            upsampler=args.upsampler,
            heads=schedule.chosen_heads(args.heads),
            native_rate=args.native_rate,
            **shared,
        )
    data = CachedCodesDataset(
        at("cache_dir"), targets, args.val_segment, limit, audio_24k_dir=at("audio_24k_dir"), **shared
    )
    if differs := geometry.difference(data.geometry):
        raise UserError(
            f"cache {at('cache_dir')} was made by another model "
            f"({data.geometry.pretrained_model}: {differs}); make it anew with "
            f"--pretrained_model {args.pretrained_model}"
        )
    return data


def some_speech(run: Run, coarse_codes: int):
    """Segments of the training data in the order of epoch 0, about that many coarse codes: [B, 1, N]."""
    n = math.ceil(coarse_codes / run.data.coarse_len)
    rows = [int(i) for i in schedule.epoch_order(run.args.seed, 0, len(run.data))[:n]]
    parts = []
    for batch in run.loader(run.data, [rows[i : i + 64] for i in range(0, len(rows), 64)]):
        parts.append(batch["audio_24k"][batch["valid_24k"] == batch["audio_24k"].shape[-1]])
    speech = torch.cat(parts)  # whole segments only: padding would teach silence
    if not len(speech):
        raise UserError(
            "--from_scratch found no recording as long as the validation segment; lower --val_segment"
        )
    return speech


def start_of(args, geometry: codec.Geometry) -> dict:
    """The content of --start_checkpoint, a run with the same heads on the same codec. Raises UserError."""
    path = args.start_checkpoint
    saved = require(load_checkpoint(path), path)
    if differs := geometry.difference(codec.Geometry.from_json(json.dumps(saved["geometry"]))):
        raise UserError(f"--start_checkpoint {path} belongs to another codec than the data ({differs})")
    parts = {key.partition(".")[0] for key in saved["model"]}
    heads = [name for name in schedule.HEAD_NAMES if f"head_{name}" in parts]
    if heads != list(schedule.chosen_heads(args.heads)):
        choice = "both" if len(heads) > 1 else "".join(heads)
        raise UserError(f"--start_checkpoint {path} has heads {' and '.join(heads)}: give --heads {choice}")
    return saved


def take_phase10(snac, path: str, geometry: codec.Geometry) -> None:
    """Put trunk and 24 kHz head of a phase10 checkpoint of the same encoder into `snac`."""
    saved = require(load_checkpoint(path), path)
    if differs := geometry.difference(codec.Geometry.from_json(json.dumps(saved["geometry"]))):
        raise UserError(
            f"--phase10_checkpoint {path} has another encoder than the cache ({differs}): write "
            f"it out (infer.py --checkpoint {path} --export DIR), cache the codes with "
            "--pretrained_model DIR, and train on those"
        )
    model = DualHeadDecoder(snac, ("24k",), with_encoder=True)  # shares its modules with snac
    codec.load_weights(model, saved["model"], path)


# ---- the state ----


@dataclass
class State:
    """What changes while a run goes on."""

    model: DualHeadDecoder
    codec: FullCodec | None  # model with encoder and quantizers in training, where the codec trains
    phase: str = ""  # features | warmup | main | adversarial
    step: int = 0  # optimiser steps done or skipped
    validated: int = -1  # last epoch that was validated; 0: the start
    optimizer: torch.optim.Optimizer | None = None
    adversary: Adversary | None = None  # discriminators and their optimiser, in the adversarial phase
    ema: dict | None = None  # averaged weights by name
    best: dict = field(default_factory=dict)  # lowest validation losses by name
    norm: float | None = None  # running gradient norm of this phase
    skipped: int = 0
    in_a_row: int = 0  # skipped steps since the last good one
    codes: torch.Tensor | None = (
        None  # int64 [2, K, size]: uses of each entry [this epoch, since its last restart]
    )
    # not resumed: derived, read from the folder, or found anew
    wrapped: nn.Module | None = None  # model or codec as it is called in training: DDP, compiled
    baseline: dict = field(default_factory=dict)  # baseline_metrics.json
    first_step: int = 0  # where this process began
    noted: list | None = (
        None  # [ranks that got a signal, bad files not shared yet] as the last step summed them
    )
    shared: int = 0  # of bad_files: those that all ranks know
    saved_at: float = field(default_factory=time.monotonic)  # the last checkpoint by the clock
    paces: deque = field(default_factory=lambda: deque(maxlen=20))  # seconds a second of audio, latest lines
    bad_files: dict[str, str] = field(default_factory=dict)  # name: reason
    left_out: dict[str, str] = field(default_factory=dict)  # likewise
    unfaithful: set[str] = field(default_factory=set)

    def state_dict(self, run: Run) -> dict:
        """What a checkpoint holds: all that is resumed, and what readers of the file want to know."""
        epoch, geometry, plan = self.epoch(run), run.geometry, [asdict(e) for e in run.plan]
        if run.full:
            geometry = replace(geometry, weights_sha256=codec.weights_hash(self.model.state_dict()))
        theirs = {"adversarial": self.adversary.state_dict()} if self.adversary else {}
        return theirs | {
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scheduler": {"plan": plan, "rates": schedule.rates_at(run.args, run.plan, self.step)},
            "ema": self.ema,
            "epoch": epoch.number,
            "global_step": self.step,
            "validated_epoch": self.validated,
            "phase": self.phase,
            "segment_length": epoch.segment,
            "args": vars(run.args),
            "geometry": asdict(geometry) | {"vq_strides": list(geometry.vq_strides)},
            "codes": self.codes.clone(),
            "model_config": run.config,
            "rng": {"seed": run.args.seed},  # order, crops and noise are functions of it: no generator state
            "guard": {"norm": self.norm, "skipped": self.skipped, "in_a_row": self.in_a_row},
            "best": self.best,
            "versions": versions() | {"git": git_sha()},
        }

    def load_state_dict(self, run: Run, saved: dict) -> None:
        """Go on from `saved`, the content of run.args.resume. Raises UserError if it doesn't fit."""
        path = run.args.resume
        theirs = codec.Geometry.from_json(json.dumps(saved["geometry"], default=str), str(path))
        if run.full:  # the codec itself trains: its weights may differ
            theirs = replace(theirs, weights_sha256=run.geometry.weights_sha256)
        if differs := run.geometry.difference(theirs):
            raise UserError(
                f"{path} was trained on another model ({theirs.pretrained_model}: {differs}); "
                "give that one as --pretrained_model"
            )
        try:
            self._take_over(run, saved, path)
        except (AttributeError, IndexError, KeyError, RuntimeError, TypeError, ValueError) as e:
            reason = f"{type(e).__name__}: {first_line(e)}"
            raise UserError(f"{path} can't be resumed: malformed ({reason})") from None

    def _take_over(self, run: Run, saved: dict, path) -> None:
        """Set the fields from `saved`."""
        if saved["scheduler"]["plan"] != [asdict(e) for e in run.plan]:
            steps = sum(e["steps"] for e in saved["scheduler"]["plan"])
            todo = "resume it with its own flags and data, or begin a new run in another --output_dir"
            if saved["global_step"] >= steps:
                todo = "it is finished: begin a new run in another --output_dir, from its weights by "
                todo += f"--start_checkpoint {Path(path).parent}/best_model.pt"
            raise UserError(
                f"{path} belongs to a run with another schedule or number of rows ({steps} steps there, "
                f"{run.total} here): {todo}"
            )
        codec.load_weights(self.model, saved["model"], path)
        self.step = self.first_step = saved["global_step"]
        self.validated = saved["validated_epoch"]
        if not 0 <= self.step <= run.total:
            raise ValueError(f"global_step {self.step} is outside the schedule")
        if saved["phase"] not in {e.phase for e in run.plan}:
            raise ValueError(f"phase {saved['phase']!r} is not in the schedule")
        self.best = {k: float(saved["best"][k]) for k in self.best}
        enter_phase(run, self, saved["phase"])
        restore_optimizer(self.optimizer, saved["optimizer"])
        if self.adversary:
            self.adversary.load_state_dict(saved["adversarial"])
        optimizers = [self.optimizer, *([self.adversary.optimizer] if self.adversary else [])]
        for parameter, moments in (item for o in optimizers for item in o.state.items()):
            if any(moments[k].shape != parameter.shape for k in ("exp_avg", "exp_avg_sq")):
                raise ValueError("the optimiser's moments have other shapes than the weights")
        if saved["ema"] is not None:
            shapes = {k: p.shape for k, p in self.model.named_parameters()}
            if {k: v.shape for k, v in saved["ema"].items()} != shapes:
                raise ValueError("the averaged weights differ from the model's in name or shape")
            self.ema = {k: v.to(run.device) for k, v in saved["ema"].items()}
        self.codes = saved["codes"].cpu()
        baseline = run.folder / "baseline_metrics.json"
        self.baseline = read_json(baseline) if baseline.is_file() else {}
        guard = saved["guard"]
        self.norm, self.skipped, self.in_a_row = guard["norm"], guard["skipped"], guard["in_a_row"]

    def epoch(self, run: Run) -> Epoch:
        """The epoch that the last step belongs to."""
        return next(e for e in run.plan if self.step <= e.first_step + e.steps)


# ---- phases: optimiser and wrapping are built once a phase ----


def enter_phase(run: Run, state: State, phase: str) -> None:
    """Freeze, build the optimiser, wrap for DDP and compile; a no-op where the state is in that phase."""
    if state.phase == phase:
        return
    state.phase, args, groups = phase, run.args, schedule.groups_of(run.args, phase)
    state.model.requires_grad_(False)
    for group in groups:
        getattr(state.model, group).requires_grad_(True)
    state.model.trunk_frozen = "trunk" not in groups
    fold_frozen(state.model)
    state.optimizer = torch.optim.AdamW(
        [part for g in groups for part in parameters_of(state.model, g, bool(args.from_scratch))],
        lr=0.0,
        betas=schedule.adam_betas(args, "adv_betas" if phase == "adversarial" else "adam_betas"),
        weight_decay=args.weight_decay,
        fused=not args.plain,  # one pass over weights and moments
    )
    state.adversary = Adversary(args, run.device, run.speed.bf16) if phase == "adversarial" else None
    state.wrapped = state.codec or state.model
    if state.codec:
        state.codec.from_features = phase == "features"
    state.wrapped = run.ranks.in_step(state.wrapped)
    if run.speed.compile:
        state.wrapped = torch.compile(state.wrapped)
    state.norm = None  # the running gradient norm of another set of parameters


def parameters_of(model, group: str, from_scratch: bool) -> list[dict]:
    """Parameter groups of AdamW; from scratch Snake's alpha gets a tenth of the rate, because 1/alpha
    explodes when a large step takes it near 0."""
    parts = {1.0: [], 0.1: []}  # by their share of the rate
    for name, p in getattr(model, group).named_parameters():
        parts[0.1 if from_scratch and name.endswith("alpha") else 1.0].append(p)
    return [{"params": params, "name": group, "share": share} for share, params in parts.items() if params]


# ---- weights: averaged, saved ----


@contextlib.contextmanager
def averaged_weights(state: State):
    """The EMA weights in the model for the time of the block (no-op without --ema)."""
    if state.ema is None:
        yield
        return
    used = {k: p.detach() for k, p in state.model.named_parameters()}
    own = {k: p.clone() for k, p in used.items()}
    torch._foreach_copy_(list(used.values()), [state.ema[k] for k in used])
    try:
        yield
    finally:
        torch._foreach_copy_(list(used.values()), list(own.values()))


@torch.no_grad()
def average_weights(state: State, decay: float) -> None:
    """One step of the moving average, which begins at the first step's weights."""
    if state.ema is None:
        state.ema = {k: v.detach().clone() for k, v in state.model.named_parameters()}
    current = [p.detach() for p in state.model.parameters()]
    torch._foreach_lerp_(list(state.ema.values()), current, 1 - decay)


def save(run: Run, state: State, name: str, pruned: str = "") -> None:
    """Write output_dir/name, then delete all but the newest --keep_checkpoints of the glob `pruned`."""
    if run.rank == 0:
        save_checkpoint(run.folder / name, state.state_dict(run))
        run.log.metric(event="checkpoint", step=state.step, path=name)
        if pruned:
            prune(run.folder.glob(pruned), run.args.keep_checkpoints)


def save_if_due(run: Run, state: State, epoch: Epoch) -> None:
    """A checkpoint every --save_every_batches steps, and one every --save_every_minutes."""
    a = run.args
    if a.save_every_batches > 0 and state.step % a.save_every_batches == 0:
        save_step(run, state)
    if a.save_every_minutes > 0 and time.monotonic() - state.saved_at > 60 * a.save_every_minutes:
        stamp = time.strftime("%Y%m%d_%H%M%S")
        save(run, state, f"checkpoint_epoch{epoch.number}_time_{stamp}.pt", "checkpoint_epoch*_time_*.pt")
        state.saved_at = time.monotonic()


def save_step(run: Run, state: State) -> None:
    number = state.epoch(run).number
    save(run, state, f"checkpoint_epoch{number}_iter{state.step}.pt", "checkpoint_epoch*_iter*.pt")


def save_begun(run: Run, state: State) -> None:
    if state.step > 0:  # before that there is nothing to lose, and the folder stays free
        save_step(run, state)


def save_before_skips(run: Run, state: State) -> None:
    """A checkpoint from before the skipped steps of this epoch: they changed no weight, so only the position
    goes back, and a resumed run repeats them."""
    first, now = state.epoch(run).first_step, (state.step, state.skipped, state.in_a_row)
    state.step = max(state.step - state.in_a_row, first)
    state.skipped, state.in_a_row = state.skipped - (now[0] - state.step), 0
    save_step(run, state)
    leave_behind(run, state)
    state.step, state.skipped, state.in_a_row = now


def leave_behind(run: Run, state: State) -> None:
    """Put checkpoints of later steps than the one that the run goes on from out of its way."""
    if run.rank == 0:
        set_aside(run.folder, "checkpoint_*.pt", (state.step, state.validated), run.log.say)


# ---- what is noted on the way ----


def announce(run: Run, state: State) -> None:
    """Provenance first: arguments, versions, geometry, plan, and what was left out."""
    a, log, event = run.args, run.log, "resume" if state.step else "start"
    if run.rank == 0:
        write_json(
            run.folder / "args.json",
            {
                "args": vars(a),
                "git": git_sha(),
                "versions": versions(),
                "world": run.world,
                "geometry": asdict(run.geometry),
                "model_config": run.config,
                "plan": [asdict(e) for e in run.plan],
            },
        )
    log.say(
        f"{event}: recipe {a.recipe}, {len(run.data)} rows ({len(run.val)} validation), {run.total} "
        f"steps, from step {state.step}, {run.world} process(es) on {run.device}, "
        f"init {a.init}"
    )
    for which, data in (("training", run.data), ("validation", run.val)):
        for reason, n in data.left_out.items():
            log.say(f"  left out of {which}: {n} rows, {reason}")
    for line in [*run.speed.told, *schedule.plan_lines(a, run.plan)]:
        log.say("  " + line)
    if any(float(factor) * a.batch_size % 1 for factor in a.batch_multiplier.split(",")):
        log.say("  batch sizes are rounded down")
    log.metric(
        event=event,
        kind="train",
        recipe=a.recipe,
        step=state.step,
        total_steps=run.total,
        epochs=a.epochs,
        rows=len(run.data),
        val_rows=len(run.val),
        git=git_sha(),
    )


def prepare(run: Run, state: State, batch: dict) -> dict:
    """The batch on the device, recordings encoded and restored where the dataset left that to us. Files that
    could not be read, are left out of the loss, or are unfaithful: named once, counted in the state."""
    for event, known in (("left_out", state.left_out), ("bad_file", state.bad_files)):
        for name, reason in batch[event]:
            if name not in known:
                known[name] = reason
                run.log.say(f"{event.replace('_', ' ')} {name}: {reason}")
                run.log.metric(event=event, file_path=name, reason=reason, step=state.step)
    known = {"all_phase_true": bool(batch["phase_true"].all())}  # while it lies on the CPU
    batch = to_device(batch | known, run.device)
    if run.snac is not None:
        spans, places, n = batch["encode"], batch["encode_at"], batch["audio_24k"].shape[-1]
        batch["codes"] = encode_spans(run.snac, spans, places, n, run.geometry, run.device)
    lowest = -math.inf if run.args.include_unfaithful else run.args.min_envelope_corr
    for name, corr in restore_targets(batch, run.sidon, lowest):
        if name not in state.unfaithful:
            state.unfaithful.add(name)
            run.log.metric(event="unfaithful", file_path=name, envelope_corr=corr)
    return batch


def note_disc_skip(run: Run, state: State) -> None:
    """Log a step that the discriminators alone have skipped."""
    skipped = state.adversary.skipped
    why = f"gradient norm of the discriminators {state.adversary.last_norm:.3g}"
    run.log.say(f"step {state.step}: {why}, they skip it ({skipped} skipped so far)")
    run.log.metric(event="skip", step=state.step, reason=why, disc_skipped=skipped)


def note_codes(run: Run, state: State, seen: list) -> None:
    """Count the codes of a step over all ranks, seen: [(codes, latents, valid)] of its micro-batches; restart
    entries unused over the last 10 x codebook_size codes (an equally likely one stays so with probability
    e^-10)."""
    counts, step = sum(count_codes(codes, valid, run.geometry) for codes, _, valid in seen), state.step - 1
    state.codes += run.reduce_sum(counts)
    for k, vq in enumerate(state.model.quantizer.quantizers):
        if run.args.freeze_vq or state.codes[1, k].sum() < 10 * run.geometry.codebook_size:
            continue
        generator = torch.Generator().manual_seed(run.args.seed + 1000003 * step + k)
        n = restart_dead_entries(vq, state.codes[1, k], seen[-1][1][k], state.optimizer, generator)
        if run.world > 1:
            dist.broadcast(vq.codebook.weight.data, 0)
        run.log.metric(event="restart", codebook=k, entries=n, step=step)
        state.codes[1, k] = 0


def report_codes(run: Run, state: State, epoch: Epoch | None) -> None:
    """Log usage and perplexity of every codebook over the epoch's training codes, and count anew."""
    if not epoch or not state.codes[0].any():
        return
    found = {f"{name}_{k}": v for k, c in enumerate(state.codes[0]) for name, v in usage(c).items()}
    run.log.say(
        f"codes of epoch {epoch.number}: "
        + ", ".join(
            f"codebook {k} {100 * found[f'usage_{k}']:.1f} % used, perplexity {found[f'perplexity_{k}']:.0f}"
            for k in range(len(state.codes[0]))
        )
    )
    run.log.metric(event="usage", epoch=epoch.number, step=state.step, **found)
    state.codes[0] = 0


def report(run: Run, state: State, epoch: Epoch, means: dict, norm: float, speed: float) -> None:
    """Write a step's line to the log and to metrics.jsonl; another number goes into run.log.metric below."""
    a, rates = run.args, schedule.rates_at(run.args, run.plan, state.step - 1)
    # steps of later epochs are as long as their segments: count the audio still to come
    todo = sum(
        (e.first_step + e.steps - max(e.first_step, state.step)) * e.segment * e.batch
        for e in run.plan
        if e.first_step + e.steps > state.step
    )
    eta, rate = median_low(state.paces) * todo, rates.get("head_48k", rates.get("head_24k"))
    names = {"loss": "loss", "24k": "loss_24k", "48k": "loss_48k"}
    names |= {name: name for name in means if name.startswith("disc_")}
    shown = {k: means[name] for k, name in names.items() if name in means} | {
        "lr": rate,
        "norm": norm,
        "audio-s/s": speed,
        "eta": human_time(eta),
    }
    run.log.say(step_line(state.step, run.total, epoch.number, a.epochs, epoch.phase, shown))
    run.log.metric(
        step=state.step,
        total_steps=run.total,
        epoch=epoch.number,
        epochs=a.epochs,
        phase=epoch.phase,
        segment_length=epoch.segment,
        batch_size=epoch.batch,
        **means,
        lr=rate,
        **{f"lr_{k}": v for k, v in rates.items()},
        grad_norm=norm,
        skipped=state.skipped,
        **(state.adversary.numbers() if state.adversary else {}),
        audio_s_per_s=speed,
        eta_s=eta,
    )
