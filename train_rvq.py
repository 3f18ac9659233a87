"""Train an autoregressive transformer over codec tokens, and sample from it.

    python train_rvq.py --data CACHE_DIR --amp --fused-optim           one GPU, SNAC tokens (cache_codes.py)
    python train_rvq.py --data "npq_out/*.npq" --amp --fused-optim     one GPU, DAC tokens
    torchrun --nproc_per_node 4 train_rvq.py …                         four; --batch x --accum of all together
    python train_rvq.py --data CACHE_DIR --device cpu --d_model 64 --layers 2 --heads 2 --ctx 64   a small one
    python train_rvq.py generate --checkpoint rvq_ckpts/rvq_7cb_best.pt --frames 120 --output out.wav
    python train_rvq.py tokens info FILE.npq ...     (tokens from-cache, tokens from-dac: --help)

The same command continues a run that stopped or was killed: the place in the data is a function of the step,
so a checkpoint holds no loader or generator state and the weights come out bit-identical (CPU).
Precedence: flag, config, resumed checkpoint (but for data, folder and device), default.
Exit codes: 0 finished, 1 wrong input, 3 stopped by a signal with a checkpoint, 4 diverged, 5 bad files.

Tokens are frames [T, K]: K codebooks of DAC, or the K slots of a coarse SNAC frame (snac48/tokens.py).
--pattern says how the K tokens of a frame depend on each other:

    depth     a temporal transformer over frames, then a small one over the K tokens inside a frame: exact
    parallel  all K at once from the past frames: fast, treats them as independent
    delay     codebook k comes k frames later and sees codebooks 0..k-1 of its own frame: T + K - 1 positions
    flatten   one token a position: exact, T * K positions

Edit here: options, learning rate, loop. Model, loss and what a checkpoint holds (State): snac48/token_lm.py.
"""

import argparse
import contextlib
import itertools
import math
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from snac48 import cli, tokens
from snac48.checkpoint import load_checkpoint, prune, save_checkpoint, set_aside
from snac48.cli import Diverged, Finished, LoaderDied, Stopped, UserError, one_line_errors
from snac48.files import write_json
from snac48.places import check_free, check_place
from snac48.runlog import RunLog, git_sha, human_time, step_line, versions

# ---- options: every default stands here once ----

OPTIONS = {  # flag: (default, help); the type is the default's, text where that is None
    # data
    "--data": ("npq_out/*.npq", "glob of .npq files, or a cache folder of cache_codes.py"),
    "--val-data": (None, "held-out files (default: whole files of --data, 5 % of its windows)"),
    "--npq2": ("mid", "columns of stereo files"),
    "--ctx": (512, "frames a window; a shorter file is one window of its own length"),
    "--step": (0, "frames from window to window; 0 = half of --ctx"),
    "--max_bad_fraction": (0.01, "stop when more of the files are bad"),
    "--num_workers": (2, "loader processes; 0 = load in the training process"),
    "--persistent-workers": (False, "keep loader processes from epoch to epoch"),
    "--prefetch": (6, "batches each loader process prepares ahead"),
    # schedule
    "--batch": (6, "windows a forward pass"),
    "--accum": (6, "forward passes an optimiser step"),
    "--epochs": (250, "passes over the training windows"),
    "--lr": (2e-4, "peak learning rate"),
    "--warmup-ratio": (0.01, "part of all steps with rising rate"),
    "--eta-min-ratio": (0.05, "last rate of the cosine / peak rate"),
    "--weight-decay": (0.02, "of tensors with 2 dimensions or more"),
    "--ema": (0.999, "decay of the averaged weights; 0 = off"),
    "--grad-clip": (1.0, "gradient norm limit; 0 = off"),
    "--outlier-skip-factor": (5.0, "skip a step whose loss is this many times the running loss and at "
                              "least 1 nat above it; 0 = off; non-finite steps are always skipped"),
    "--label-smoothing": (0.05, "in training only; validation is plain"),
    "--cb-weights": ("auto", "loss weights: auto = 1 + alpha k / (K - 1), uniform, or w0,w1,…"),
    "--cb-weights-auto-alpha": (0.5, "alpha of the line above"),
    "--seed": (42, "decides the split, the order, dropout and samples"),
    # model
    "--pattern": ("depth", "how the tokens of a frame depend on each other"),
    "--d_model": (768, "width"),
    "--layers": (16, "of the transformer over frames"),
    "--heads": (12, "of attention"),
    "--depth_layers": (4, "of the transformer inside a frame (depth pattern)"),
    "--depth_d_model": (0, "its width; 0 = half as many heads of the same size"),
    "--dropout": (0.1, "in both"),
    # machine
    "--device": ("", "GPU number or cpu (default: a GPU where there is one, else the CPU)"),
    "--amp": (False, "bf16 autocast"),
    "--fused-optim": (False, "fused AdamW"),
    "--compile": (False, "torch.compile of the model"),
    # validation and samples, with EMA weights
    "--val-every": (1, "epochs"),
    "--eval-audio-every": (5, "epochs; 0 = off"),
    "--eval-frames": (1290, "frames a sample; 1290 = 15 s of DAC"),
    "--eval-temperature": (1.1, "0 = the most likely token"),
    "--eval-top-k": (0, "0 = off"),
    "--eval-top-p": (0.0, "0 = off"),
    "--eval-outdir": ("rvq_eval", "where samples are written"),
    "--eval-on-cpu": (False, "decode samples on the CPU"),
    "--eval-decoder": ("auto", "what speaks the samples: a checkpoint of train_dual_head.py (SNAC; auto: "
                       "none), a folder or hub id@revision of a DacModel (DAC; auto: "
                       "descript/dac_44khz); none = tokens"),
    # files
    "--save_dir": ("rvq_ckpts", "checkpoints, metrics.jsonl, training.log; one run a folder"),
    "--tag": ("", "in the checkpoints' names: rvq_{K}cb_{tag}_latest.pt"),
    "--archive-every": (10, "epochs; 0 = off"),
    "--keep-archived": (20, "epoch archives kept, and as many best ones"),
    "--save-every-steps": (1000, "0 = only after epochs"),
    "--log-lr-steps": (50, "steps from log line to log line"),
    "--quiet": (False, "no line per step on stdout and in the log; metrics.jsonl has them all the same"),
    "--resume": (None, "continue from this checkpoint; without a name: from the latest, and fail where "
                 "there is none (default: from the latest where there is one)"),
    "--no-resume": (False, "start anew even where a latest checkpoint exists"),
    "--ignore-arch": (False, "build what the flags say, not what the checkpoint holds; take over the "
                      "tensors that fit and start at step 0"),
    "--config": (None, "JSON of these options (names with underscores, // comments)"),
}  # fmt: skip

DEFAULTS = {flag[2:].replace("-", "_"): default for flag, (default, _) in OPTIONS.items()}
KINDS = {name: str if default is None else type(default) for name, default in DEFAULTS.items()}
CHOICES = {"npq2": ("mid", "both"), "pattern": ("depth", "parallel", "delay", "flatten")}
FLAGS = dict(zip(DEFAULTS, OPTIONS))
# what a resumed checkpoint does not decide: where data and run lie, and how this start is meant
OF_THE_START = ("data", "val_data", "npq2", "save_dir", "tag", "device", "config", "resume", "no_resume",
                "ignore_arch")  # fmt: skip


def new_parser(prog: str, text: str) -> argparse.ArgumentParser:
    kind = argparse.RawDescriptionHelpFormatter
    p = argparse.ArgumentParser(prog=prog, description=text, allow_abbrev=False, formatter_class=kind)
    one_line_errors(p)
    return p


def training_parser() -> argparse.ArgumentParser:
    p = new_parser("train_rvq.py", __doc__)
    for name, (flag, (default, text)) in zip(DEFAULTS, OPTIONS.items()):
        shown = "off" if default is False else "none" if default in (None, "") else default
        text += "" if "(default" in text else f" (default: {shown})"
        kw = {"default": argparse.SUPPRESS, "help": text.replace("%", "%%")}
        if isinstance(default, bool):
            kw["action"] = "store_true" if name == "no_resume" else argparse.BooleanOptionalAction
        else:
            kw |= {"type": KINDS[name], "choices": CHOICES.get(name)}
        p.add_argument(flag, **kw | ({"nargs": "?", "const": "auto"} if name == "resume" else {}))
    return p


def typed(values: dict, where: str) -> dict:
    """Options of a config or a checkpoint, each as its own type. Raises UserError beginning with `where`."""
    values = {k: cli.as_type(KINDS[k], v, f"{where}: {k}") for k, v in values.items() if v is not None}
    for name in CHOICES.keys() & values.keys():
        if values[name] not in CHOICES[name]:
            raise UserError(f"{where}: {name} is {values[name]!r}, not one of {CHOICES[name]}")
    return values


def parse_training(argv: list[str]) -> dict:
    """What the flags and the config give; a flag wins. Raises UserError for values no run can use."""
    flags = vars(training_parser().parse_args(argv))
    path = flags.get("config")
    config = typed(cli.read_config(path, DEFAULTS), f"config {path}") if path else {}
    source = lambda name: "a flag" if name in flags else f"config {path}" if name in config else None
    with cli.told_where_from(source):
        args = settle(config | flags)
        read = [folder for folder in (args.data, args.val_data) if folder and Path(folder).is_dir()]
        check_place(args.save_dir, "--save_dir", read)
        check_place(args.eval_outdir, "--eval-outdir", read)
    return config | flags


def settle(given: dict, saved: dict | None = None) -> argparse.Namespace:
    """The value of every option. saved: the options of the checkpoint that is resumed."""
    kept = {k: v for k, v in (saved or {}).items() if k in DEFAULTS and k not in OF_THE_START}
    if "ctx" in given:
        kept.pop("step", None)  # it was half of another ctx
    args = argparse.Namespace(**DEFAULTS | typed(kept, "the resumed checkpoint") | given)
    cli.within_bounds(vars(args), FLAGS, "train_rvq")
    args.step = args.step or max(1, args.ctx // 2)
    if args.d_model % args.heads or args.d_model // args.heads % 2:
        raise UserError(f"--d_model {args.d_model} must be --heads {args.heads} times an even number")
    tokens.architecture(args, [])
    tokens.codebook_weights(args.cb_weights, 0.0, 1 + args.cb_weights.count(","))
    return args


def generate_parser() -> argparse.ArgumentParser:
    p = new_parser("train_rvq.py generate", "Sample tokens (EMA weights).")
    p.add_argument("--checkpoint", required=True, help="of a training (required)")
    p.add_argument("--output", required=True, help="NAME.npq, .parquet (SNAC) or .wav (decoded) (required)")
    p.add_argument("--prompt", help=".npq, or .parquet of a cache (its row --prompt-row) (default: none)")
    p.add_argument("--prompt-row", type=int, default=0, help="of a .parquet (default: 0)")
    p.add_argument("--prompt-frames", type=int, default=0, help="first frames used; 0 = all (default: 0)")
    p.add_argument("--overwrite", action="store_true", help="replace --output (default: no)")
    p.add_argument("--device", default="", help=OPTIONS["--device"][1])
    p.add_argument("--seed", type=int, default=DEFAULTS["seed"], help="of the choices (default: %(default)s)")
    for name in ("frames", "temperature", "top-k", "top-p", "decoder"):  # as the samples in training
        default, text = OPTIONS[f"--eval-{name}"]
        p.add_argument(f"--{name}", type=type(default), default=default, help=f"{text} (default: {default})")
    return p


def tokens_parser() -> argparse.ArgumentParser:
    p = new_parser("train_rvq.py tokens", "Read, check and write token files (.npq).")
    commands = p.add_subparsers(dest="command", required=True)
    one = commands.add_parser("info", help="check every token of .npq files and print what they hold")
    one.add_argument("files", nargs="+")
    one = commands.add_parser("from-cache", help="parquet cache -> one .npq an utterance")
    one.add_argument("cache_dir")
    one.add_argument("output_dir")
    one = commands.add_parser("from-dac", help="codes [K, T] saved with numpy -> .npq")
    one.add_argument("codes")
    one.add_argument("output")
    one.add_argument("--fps", type=float, default=44100 / 512, help="frames/s (default: DAC 44.1 kHz)")
    one.add_argument("--codebook_size", type=int, default=1024, help="entries (default: %(default)s)")
    for name in ("from-cache", "from-dac"):
        commands.choices[name].add_argument("--overwrite", action="store_true", help="replace (default: no)")
    return p


if __name__ == "__main__":  # before torch is imported: --help and a wrong option answer at once
    PARSE = {"generate": generate_parser, "tokens": tokens_parser}
    JOB = sys.argv[1] if len(sys.argv) > 1 else "train"
    if JOB in PARSE:
        GIVEN = cli.guarded(cli.read_flags, PARSE[JOB](), sys.argv[2:])
    else:
        GIVEN = cli.guarded(parse_training, sys.argv[1:])
        cli.stop_at_once()

import torch
from torch import nn

from snac48 import token_lm
from snac48.ranks import Ranks, fingerprint, join
from snac48.token_lm import State, find_resume, load_decoder, mean, objective, plain_ce, sample, summary

# ---- learning rate ----


def lr_at(step: int, total: int, peak: float, warmup_ratio: float, eta_min_ratio: float) -> float:
    """Linear warm-up, then cosine from peak to peak * eta_min_ratio at the last step."""
    warm = int(warmup_ratio * total)
    if step < warm:
        return peak * (step + 1) / warm
    part = (step - warm) / max(1, total - 1 - warm)
    low = peak * eta_min_ratio
    return low + (peak - low) * 0.5 * (1 + math.cos(math.pi * min(1.0, part)))


# ---- what a run is: Run never changes, State is what a checkpoint holds ----


@dataclass(frozen=True)
class Run:
    args: argparse.Namespace
    ranks: Ranks
    log: RunLog
    stem: str  # of the checkpoints' names
    train_set: tokens.Windows
    val_set: tokens.Windows
    loader: torch.utils.data.DataLoader  # int32 [B, T, K]; feed() lists the windows in its batch_sampler
    plan: list  # what decides which windows a step sees; a resume compares it
    weights: torch.Tensor  # of the codebooks in the loss, [K]
    forward: nn.Module  # State.model; of several processes in DDP, with --compile compiled
    stop: cli.StopFlag
    per_epoch: int  # optimiser steps
    total: int

    @property
    def device(self) -> torch.device:
        return self.ranks.device

    def epoch_of(self, step: int) -> int:
        """The epoch that a run's step number `step` (from 1) belongs to."""
        return math.ceil(step / self.per_epoch)


# ---- the start ----


def start(given: dict) -> tuple[Run, State]:
    """Data, model and optimiser: at step 0, or where the checkpoint in --save_dir is."""
    args = settle(given)
    ranks = join(args.device)
    device = ranks.device
    if device.type == "cuda":
        torch.backends.cuda.matmul.fp32_precision = "tf32"
    with ranks.in_turn("data"):
        corpus = tokens.Corpus(args.data, args.npq2)
        held_out = tokens.Corpus(args.val_data, args.npq2) if args.val_data else None
    if held_out and (held_out.vocab != corpus.vocab or held_out.source != corpus.source):
        raise UserError(f"--val-data {args.val_data} holds other tokens than --data {args.data}")
    stem = f"rvq_{corpus.K}cb" + (f"_{args.tag}" if args.tag else "")
    log = RunLog(args.save_dir, quiet=ranks.rank > 0, alone=True)
    log.say(f"device {device}" + (f", {ranks.world} processes" if ranks.world > 1 else ""))
    report_bad(args, corpus, log)
    saved = None if args.no_resume else find_resume(log.dir, stem, args, corpus, log.say)
    if saved and not args.ignore_arch:
        args = settle(given, saved["args"])
    train_set, val_set = tokens.split_windows(corpus, held_out, args.ctx, args.step, args.seed)
    plan = [len(train_set), len(val_set), args.batch, args.accum, args.ctx, args.step, args.seed]
    data = fingerprint(train_set.table, val_set.table, corpus.source.get("weights_sha256", ""))
    ranks.agree(args, saved, {"the plan": plan, "the data": data})
    state, fresh = token_lm.open_state(args, tokens.architecture(args, corpus.vocab), saved, device, log.say)
    loader = tokens.make_loader(train_set, device.type == "cuda", args)
    weights = tokens.codebook_weights(args.cb_weights, args.cb_weights_auto_alpha, corpus.K)
    weights = torch.tensor(weights, device=device)
    forward = ranks.in_step(state.model)
    forward = torch.compile(forward) if args.compile else forward
    steps = tokens.steps_per_epoch(len(train_set), args.batch, args.accum)
    if not fresh and saved["plan"] != plan:
        epoch = saved["epoch"] + (saved["global_step"] % saved["per_epoch"] == 0)
        state.begin_epoch(epoch, (epoch - 1) * steps)
        pairs = zip(("windows", "held out", "batch", "accum", "ctx", "step", "seed"), saved["plan"], plan)
        what = ", ".join(f"{name} {old} -> {new}" for name, old, new in pairs if old != new)
        what += ": weights, EMA, optimizer and best are kept, the windows are new"
        log.say(f"warning: {what}; continuing at the start of epoch {epoch}")
        if epoch > args.epochs:
            raise UserError(f"the checkpoint has finished its {epoch - 1} epochs: give more by --epochs")
    for kind in ("epoch", "best") if ranks.rank == 0 else ():  # of an earlier run, perhaps
        set_aside(log.dir, f"{stem}_{kind}_e*__*.pt", (state.step, 0), log.say)
    stop, total = cli.StopFlag(), steps * args.epochs  # from here on a signal is answered with a checkpoint
    run = Run(args, ranks, log, stem, train_set, val_set, loader, plan, weights, forward, stop, steps, total)
    announce(run, state, "start" if fresh else "resume")
    return run, state


def report_bad(args, corpus: tokens.Corpus, log: RunLog) -> None:
    for name, why in corpus.bad[:20]:
        log.say(f"skipped {name}: {why}")
    if corpus.bad_fraction > args.max_bad_fraction:
        name, why = corpus.bad[0]
        what = f"{len(corpus.bad)} bad files or rows in --data {args.data}, e.g. {name}: {why}"
        raise UserError(f"{what}; mend them or raise --max_bad_fraction", cli.EXIT_BAD_INPUT)


def announce(run: Run, state: State, event: str) -> None:
    """Provenance first: options, versions, sizes."""
    args, corpus, arch = run.args, run.train_set.corpus, state.model.arch
    if run.ranks.rank == 0:
        write_json(Path(args.save_dir) / "args.json", vars(args))
    params = sum(p.numel() for p in state.model.parameters())
    where = {"step": state.step, "total_steps": run.total, "epochs": args.epochs}
    made_by = {"args": vars(args), "git_sha": git_sha(), "versions": versions(), "device": str(run.device)}
    sizes = {"parameters": params, "windows": len(run.train_set), "val_windows": len(run.val_set)}
    run.log.metric(event=event, **where, **made_by, arch=arch, **sizes, skipped=len(corpus.bad))
    run.log.say(
        f"{event}{f' at step {state.step}' if event == 'resume' else ''}: {params / 1e6:.1f} M parameters, "
        f"K {corpus.K}, {corpus.fps:.2f} frames/s, {arch['pattern']}; "
        f"{len(run.train_set.files)} files, {len(run.train_set)} windows, {run.per_epoch} steps an epoch; "
        f"held out {len(run.val_set.files)} and {len(run.val_set)}"
    )


# ---- the loop ----

SKIPS_IN_A_ROW = 20  # then the run is declared diverged

ENDINGS = {  # exception: (reason in metrics.jsonl or no line, exit code, is latest.pt written, sentence)
    Finished: ("finished", cli.EXIT_OK, False, "finished at step {step}/{total}, best val {best}"),
    Stopped: ("stopped", cli.EXIT_STOPPED, True, "stopped at step {step}/{total}, best val {best}; the same "
              "command continues"),
    Diverged: ("diverged", cli.EXIT_DIVERGED, True, f"{SKIPS_IN_A_ROW} steps in a row were non-finite or "
               "outliers; checkpoint saved, lower --lr or look at doctor.py"),
    torch.OutOfMemoryError: ("", cli.EXIT_ERROR, False, "out of GPU memory ({why}); lower --batch and raise "
                             "--accum, or lower --ctx"),
    LoaderDied: ("", cli.EXIT_ERROR, False, "a data loader process died ({why}): lower --num-workers"),
    OSError: ("", cli.EXIT_ERROR, False, "{file} could not be written: {why}; free some space, then run the "
              "same command again"),
}  # fmt: skip


def train(run: Run, state: State) -> None:
    """From where `state` is to the end, which is an exception: one of ENDINGS."""
    for epoch in range(state.closed + 1, run.args.epochs + 1):  # the first may have all its steps behind it
        for passes, frames, pace in feed(run, state, epoch):
            check_stop(run)
            norm, ce = train_step(run, state, passes, frames)
            log_step(run, state, epoch, pace, norm, ce)
            save_if_due(run, state, epoch)
        close_epoch(run, state, epoch)
    raise Finished


def start_and_train(given: dict) -> int:
    """The exit code. Saves, logs and says what ENDINGS tells; an ending that is an error is a UserError."""
    run = state = None
    try:
        run, state = start(given)
        train(run, state)
    except tuple(ENDINGS) as e:
        if isinstance(e, OSError) and e.errno not in cli.NO_ROOM:
            raise
        ending = e
    reason, code, saves, sentence = next(how for kind, how in ENDINGS.items() if isinstance(ending, kind))
    facts = {"why": cli.first_line(ending)}
    if isinstance(ending, OSError):
        facts = {"why": ending.strerror, "file": ending.filename or "a file"}
    if run and saves:  # an ending that all ranks come to
        save(run, state, "latest")
        run.ranks.barrier()  # torchrun would end rank 0 in its writing soon after another one has left
    if run and reason:
        losses = {"val_loss": state.val_loss, "best_val_loss": state.best}
        run.log.metric(event="end", reason=reason, step=state.step, total_steps=run.total, **losses)
        best = None if state.best is None else round(state.best, 4)
        facts |= {"step": state.step, "total": run.total, "best": best}
    if code not in (cli.EXIT_OK, cli.EXIT_STOPPED):
        raise UserError(sentence.format(**facts), code)
    run.log.say(sentence.format(**facts))
    return code


def check_stop(run: Run) -> None:
    """Raises Stopped when any rank got a signal; every rank calls it, so that all leave at the same step."""
    if run.ranks.reduce_sum([float(bool(run.stop))])[0]:
        raise Stopped


def feed(run: Run, state: State, epoch: int):
    """For each step of the epoch that is still to do: (this rank's forward passes, frames with a token in
    them over all ranks, pace).

    Passes are int32 [B, T, K], -1 where there is no token; a rank without a window has one pass that counts
    nothing. pace: when this process began the epoch (s), and how many steps and frames all have done with
    this one.
    """
    args, lengths, ranks = run.args, run.train_set.table[:, 2], run.ranks
    order = tokens.epoch_order(len(run.train_set), args.seed, epoch)
    todo = range(state.step - (epoch - 1) * run.per_epoch, run.per_epoch)
    windows = [tokens.step_windows(order, lengths, s, args.batch, args.accum) for s in todo]
    steps = [tokens.passes_of(own, args.batch, ranks.rank, ranks.world) for own in windows]
    lists, stop = [own.tolist() for step in steps for own in step], run.stop if ranks.world == 1 else None
    nothing = torch.full((1, 1, run.train_set.corpus.K), -1, dtype=torch.int32)
    passes, began, so_far = tokens.loaded(run.loader, lists, stop), time.time(), 0
    for n, step in enumerate(steps, 1):
        frames = int(lengths[windows[n - 1]].sum())
        so_far += frames
        yield list(itertools.islice(passes, len(step))) or [nothing], frames, (began, n, so_far)


def train_step(run: Run, state: State, passes: list, frames: int) -> tuple[float, list[float]]:
    """One optimiser step, or none where the guard says so. Raises Diverged when it has said so too often.

    Returns the gradient's norm before clipping and the plain cross-entropy of each codebook in nats.
    """
    args, model, device, world = run.args, state.model, run.device, run.ranks.world
    # dropout too is a function of the step, on each rank another
    torch.manual_seed(args.seed * 1_000_003 + state.step + (run.ranks.rank << 40))
    lr = lr_at(state.step, run.total, args.lr, args.warmup_ratio, args.eta_min_ratio)
    for group in state.optimizer.param_groups:
        group["lr"] = lr
    model.train()
    loss, ce = torch.zeros((), device=device), torch.zeros(model.K, device=device)
    for i, codes in enumerate(passes, 1):
        codes = codes.to(device, non_blocking=True)
        with run.ranks.own_gradients(run.forward, last=i == len(passes)):
            with torch.autocast(device.type, torch.bfloat16, enabled=args.amp):
                rest = model.sizes, run.weights, args.label_smoothing, frames
                part, nll = objective(run.forward, codes, *rest)
            (part * world).backward()  # DDP averages over ranks
        loss += part.detach()
        ce += nll
    norm = nn.utils.clip_grad_norm_(model.parameters(), args.grad_clip or float("inf")).item()
    told = run.ranks.reduce_sum(torch.cat([loss[None], ce]))  # a CPU-GPU sync point, once a step
    state.train_loss, ce = told[0].item(), (told[1:] / frames).tolist()
    why = state.guard.reason(state.train_loss, norm)
    if why is None:
        state.optimizer.step()
        state.rows.append([state.train_loss, *ce])
        if state.ema:
            decay = min(args.ema, (1 + state.step) / (10 + state.step))  # early averages follow closely
            with torch.no_grad():
                torch._foreach_lerp_(list(state.ema.parameters()), list(model.parameters()), 1 - decay)
    state.optimizer.zero_grad(set_to_none=True)
    state.step += 1
    if why:
        guard, where = state.guard, {"step": state.step, "epoch": run.epoch_of(state.step)}
        counts = {"skipped": guard.skipped, "in_a_row": guard.in_a_row}
        run.log.metric(event="skip", **where, reason=why, loss=state.train_loss, grad_norm=norm, **counts)
        what = f"{why} (loss {state.train_loss:.4g}, gradient {norm:.4g}), skipped; {guard.in_a_row} in a row"
        run.log.say(f"step {state.step}: {what}")
        if guard.in_a_row >= SKIPS_IN_A_ROW:
            raise Diverged
    return norm, ce


def log_step(run: Run, state: State, epoch: int, pace: tuple, grad_norm: float, ce: list[float]) -> None:
    """Losses are means since the last line; the gradient's norm and the rate are this step's."""
    args, step, total, corpus = run.args, state.step, run.total, run.train_set.corpus
    if step % args.log_lr_steps and step % run.per_epoch and step != 1:
        if sys.stderr.isatty():
            done = f"{step % run.per_epoch}/{run.per_epoch}"
            print(f"\r{done} loss {state.train_loss:.3f} ", end="", file=sys.stderr, flush=True)
        return
    began, steps_so_far, frames_so_far = pace
    spent = time.time() - began
    rate, left = frames_so_far / spent, (total - step) * spent / steps_so_far
    flops = state.model.flops_per_frame(min(args.ctx, int(corpus.lengths.max())))
    peak, speed = token_lm.peak_flops(run.device), round(rate * corpus.K, 1)
    mfu = rate * flops / peak if peak else None
    loss, *ce = mean(state.rows[state.logged :]) or (state.train_loss, *ce)  # all skipped: the last one's
    state.logged, numbers = len(state.rows), summary(ce, corpus.fps)
    phase = "warmup" if step <= int(args.warmup_ratio * total) else "train"
    where = {"step": step, "total_steps": total, "epoch": epoch, "epochs": args.epochs, "phase": phase}
    lr = state.optimizer.param_groups[0]["lr"]
    speeds = {"tokens_per_s": speed, "mfu": mfu, "eta_s": round(left, 1), "skipped": state.guard.skipped}
    run.log.metric(**where, loss=loss, lr=lr, grad_norm=grad_norm, **speeds, **numbers)
    if not args.quiet:
        shown = {"loss": loss, "ppl": numbers["ppl"], "bits/s": numbers["bits_per_s"], "lr": lr}
        shown |= {"tok/s": round(speed), "eta": human_time(left)} | ({"mfu": mfu} if mfu else {})
        run.log.say(step_line(step, total, epoch, args.epochs, phase, shown))


def save_if_due(run: Run, state: State, epoch: int) -> None:
    every = run.args.save_every_steps
    if every and state.step % every == 0 and state.step % run.per_epoch:  # the epoch's end saves by itself
        save(run, state, "latest")


def save(run: Run, state: State, name: str) -> None:
    """Rank 0 writes rvq_…_NAME.pt. The resume contract: whoever reads checkpoints reads these keys."""
    if run.ranks.rank > 0:
        return
    began, epoch, corpus = time.time(), run.epoch_of(state.step), run.train_set.corpus
    path = Path(run.args.save_dir) / f"{run.stem}_{name}.pt"
    saved = {"kind": "rvq", **state.state_dict(), "lr": state.optimizer.param_groups[0]["lr"]}
    saved |= {"epoch": epoch, "per_epoch": run.per_epoch, "plan": run.plan, "arch": state.model.arch}
    saved |= {"source": {**corpus.source, "fps": corpus.fps}, "args": vars(run.args), "versions": versions()}
    save_checkpoint(path, saved)
    spent = round(time.time() - began, 3)
    run.log.metric(event="checkpoint", step=state.step, epoch=epoch, path=path.name, seconds=spent)


def archive(run: Run, state: State, epoch: int, kind: str) -> None:
    """Write rvq_…_KIND_eEPOCH__TIME.pt beside the latest one, and delete the oldest of that kind."""
    save(run, state, f"{kind}_e{epoch:04d}__{time.strftime('%Y%m%d_%H%M%S')}")
    if run.ranks.rank == 0:
        prune(Path(run.args.save_dir).glob(f"{run.stem}_{kind}_e*__*.pt"), run.args.keep_archived)


def close_epoch(run: Run, state: State, epoch: int) -> None:
    """What follows an epoch's last step; repeated whole when a stop or a kill came in between."""
    args, values, words = run.args, {}, ""
    if epoch % args.val_every == 0 or epoch == args.epochs:
        values, words = validate_and_keep(run, state, epoch)
    loss = (mean(state.rows) or [math.nan])[0]  # nan: every step of the epoch was skipped
    spent, epoch_spent = state.spent()
    values |= {"train_loss": loss, "epoch_s": round(epoch_spent, 1), "elapsed_s": round(spent, 1)}
    run.log.metric(event="val" if words else "epoch", step=state.step, epoch=epoch, **values)
    clocks = f"took {human_time(epoch_spent)}, in all {human_time(spent)}"
    run.log.say(f"epoch {epoch}/{args.epochs} train {loss:.4f}{words}; {clocks}")
    if args.eval_audio_every and epoch % args.eval_audio_every == 0:
        with contextlib.suppress(Stopped):  # which the next line tells all
            listen(run, state, epoch)
        check_stop(run)
    if args.archive_every and epoch % args.archive_every == 0:
        archive(run, state, epoch, "epoch")
    state.begin_epoch(epoch + 1, state.step)
    save(run, state, "latest")


def validate_and_keep(run: Run, state: State, epoch: int) -> tuple[dict, str]:
    """Plain cross-entropy of the held-out windows (EMA weights), as numbers and in words; keeps the best."""
    args, model = run.args, state.ema or state.model
    poll = lambda: check_stop(run)
    ce = plain_ce(model, run.val_set, args.batch, run.device, args.amp, poll, run.ranks)
    loss = state.val_loss = sum(ce) / len(ce)
    better = math.isfinite(loss) and (state.best is None or loss < state.best)
    if better:
        state.best = loss
        save(run, state, "best")
        archive(run, state, epoch, "best")
    numbers = summary(ce, run.train_set.corpus.fps)
    return {"val_loss": loss, "best_val_loss": state.best, **numbers}, (
        f" val {loss:.4f} ppl {numbers['ppl']:.1f} bits/frame {numbers['bits_per_frame']:.2f} bits/s "
        f"{numbers['bits_per_s']:.1f} ce {' '.join(f'{c:.3f}' for c in ce)}{' best' if better else ''}"
    )


def listen(run: Run, state: State, epoch: int) -> None:
    """Sample with EMA weights, on rank 0: tokens always, audio when the decoder loads; it must not end a run.
    Raises Stopped when this rank got a signal."""
    if run.ranks.rank > 0:
        return
    args, corpus = run.args, run.train_set.corpus
    filters = (args.eval_temperature, args.eval_top_k, args.eval_top_p)
    model, poll = state.ema or state.model, lambda *_: run.stop.check()
    frames = sample(model, args.eval_frames, None, 1, *filters, args.seed, poll)[0].cpu().numpy()
    name = Path(args.eval_outdir) / f"{run.stem}_e{epoch:04d}"
    name.parent.mkdir(parents=True, exist_ok=True)
    tokens.write_npq(f"{name}.npq", frames, corpus.vocab, corpus.fps)
    try:
        speak = load_decoder(corpus.source, args.eval_decoder, "cpu" if args.eval_on_cpu else run.device)
        if speak:
            token_lm.write_wav(f"{name}.wav", *speak(frames))
        run.log.say(f"sample: {name}.{'wav' if speak else 'npq (no decoder)'}")
    except UserError as e:
        run.log.say(f"warning: sample {name}.npq not decoded: {e}")


# ---- generate ----


def generate(args) -> int:
    out = Path(args.output)
    check_free([out], [args.prompt or "", args.checkpoint], args.overwrite, "--output")
    saved = load_checkpoint(args.checkpoint)
    device = cli.pick_device(args.device)
    model = token_lm.build(saved, "ema", device)
    source = dict(saved["source"])
    fps = source.pop("fps")
    write = token_lm.frames_writer(out, source, model.vocab, fps, args.decoder, device)
    prompt = None
    if args.prompt:
        frames = tokens.read_prompt(args.prompt, args.prompt_row, source, model.vocab)
        prompt = torch.from_numpy(np.array(frames[: args.prompt_frames or None], dtype=np.int64))[None]
    began, filters = time.time(), (args.temperature, args.top_k, args.top_p)
    codes = sample(model, args.frames, prompt, 1, *filters, args.seed)
    frames, spent = codes[0].cpu().numpy(), time.time() - began
    out.parent.mkdir(parents=True, exist_ok=True)
    write(frames)
    speed = f"{args.frames / fps / spent:.2f} x real time, {args.frames * model.K / spent:.0f} tokens/s"
    print(f"{out}: {len(frames)} frames = {len(frames) / fps:.2f} s; {speed} on {device}")
    return cli.EXIT_OK


# ---- token files ----


def token_files(args) -> int:
    """`tokens info | from-cache | from-dac`: the exit code, 1 when a file was refused."""
    code = cli.EXIT_OK
    try:
        if args.command == "from-dac":
            check_free([args.output], [args.codes], args.overwrite, "output")
            tokens.npq_from_dac(np.load(args.codes), args.output, args.fps, args.codebook_size)
        elif args.command == "from-cache":
            check_free(Path(args.output_dir).glob("**/*.npq"), [], args.overwrite, "output_dir")
            cache = tokens.npq_from_cache(args.cache_dir, args.output_dir)
            for name, reason in cache.bad:
                print(f"skipped {name}: {reason}")
            print(f"{len(cache.lengths)} files in {args.output_dir}")
    except (tokens.NpqError, OSError, ValueError) as e:
        raise UserError(f"{getattr(args, 'codes', '')} {e}".strip()) from None
    for path in args.files if args.command == "info" else []:
        try:
            print(f"{path}: {tokens.open_npq(path, 'both')}")
        except tokens.NpqError as e:
            print(f"{path}: refused: {e}")
            code = cli.EXIT_ERROR
    return code


if __name__ == "__main__":
    cli.main_guard({"generate": generate, "tokens": token_files}.get(JOB, start_and_train), GIVEN)
