"""Train an autoregressive transformer over codec tokens, and sample from it.

    python train_rvq.py --data CACHE_DIR --amp --fused-optim           one GPU, SNAC tokens (cache_codes.py)
    python train_rvq.py --data "npq_out/*.npq" --amp --fused-optim     one GPU, DAC tokens
    python train_rvq.py --data CACHE_DIR --device cpu --d_model 64 --layers 2 --heads 2 --ctx 64   a small one
    python train_rvq.py generate --checkpoint rvq_ckpts/rvq_7cb_best.pt --frames 120 --output out.wav

The same command continues a run that stopped or was killed: the place in the data is a function of the step,
so a checkpoint holds no loader or generator state and the weights come out bit-identical (CPU).

Tokens are frames [T, K]: K codebooks of DAC, or the K slots of a coarse SNAC frame (npq.py). --pattern says
how the K tokens of a frame depend on each other:

    depth     a temporal transformer over frames, then a small one over the K tokens inside a frame: exact
    parallel  all K at once from the past frames: fast, treats them as independent
    delay     codebook k comes k frames later and sees codebooks 0..k-1 of its own frame: T + K - 1 positions
    flatten   one token a position: exact, T * K positions

Edit here: the model is token_lm.py.
Don't touch: the keys in `save()`, the resume contract; doctor.py reads them too.
"""

from __future__ import annotations

import argparse
import difflib
import json
import math
import re
import sys
import time
from pathlib import Path

from snac48.checkpoint import load_checkpoint, save_checkpoint
from snac48.cli import (
    EXIT_BAD_INPUT,
    EXIT_DIVERGED,
    EXIT_STOPPED,
    Parser,
    StopFlag,
    UserError,
    ignore_stop_signals,
    main_guard,
    pick_device,
    stop_at_once,
)
from snac48.files import atomic_file, write_json
from snac48.runlog import RunLog, git_sha, human_time, step_line, versions
from snac48.tokens import Corpus, NpqError, codes_from_frames, open_npq, read_shard, write_cache, write_npq

DAC_REPO = "descript/dac_44khz@c1bc521685adf9cfe247bc39a5ca58917eda1ac4"
SKIPS_IN_A_ROW = 20  # then the run is declared diverged


# ---- flags ----

# fmt: off

def training_parser() -> argparse.ArgumentParser:
    p = Parser(prog="train_rvq.py", description=__doc__, allow_abbrev=False)

    def flag(name, default=None, help="", **kw):
        if default is not None and default != "" and not isinstance(default, bool):
            help += f" (default {default})"
        if "choices" not in kw:
            kind = str if default is None else type(default)
            kw |= {"action": "store_true"} if default is False else {"type": kind}
        p.add_argument(name, default=default, help=help, **kw)

    flag("--config", help="JSON of flags (names with underscores, // comments); flags given here win")
    # data
    flag("--data", "npq_out/*.npq", "glob of .npq files, or a cache folder of cache_codes.py")
    flag("--val-data", help="held-out files; without it whole files of --data, 5 %% of its windows")
    flag("--npq2", "mid", "columns of stereo files", choices=["mid", "both"])
    flag("--ctx", 1280, "frames a window; a shorter file is one window of its own length")
    flag("--step", 0, "frames from window to window; 0 = ctx // 2")
    flag("--max_bad_fraction", 0.01, "stop when more of the files are bad")
    flag("--num_workers", 2, "loader processes; 0 = load in the training process")
    flag("--persistent-workers", False, "keep loader processes from epoch to epoch")
    flag("--prefetch", 6, "batches each loader process prepares ahead")
    # schedule
    flag("--batch", 4, "windows a forward pass")
    flag("--accum", 6, "forward passes an optimiser step")
    flag("--epochs", 350)
    flag("--lr", 2e-4, "peak learning rate")
    flag("--warmup-ratio", 0.01, "part of all steps with rising rate")
    flag("--eta-min-ratio", 0.05, "last rate of the cosine / peak rate")
    flag("--weight-decay", 0.02, "of tensors with 2 dimensions or more")
    flag("--ema", 0.999, "decay of the averaged weights; 0 = off")
    flag("--grad-clip", 1.0, "gradient norm limit; 0 = off")
    flag("--outlier-skip-factor", 5.0, "skip a step whose loss is this many times the running loss and at "
         "least 1 nat above it; 0 = off; non-finite steps are always skipped")
    flag("--label-smoothing", 0.05, "in training only; validation is plain")
    flag("--cb-weights", "auto", "loss weights: auto = 1 + alpha k / (K - 1), uniform, or w0,w1,…")
    flag("--cb-weights-auto-alpha", 0.5)
    flag("--seed", 42)
    # model
    flag("--pattern", "depth", choices=["depth", "parallel", "delay", "flatten"])
    flag("--d_model", 768)
    flag("--layers", 16)
    flag("--heads", 12)
    flag("--depth_layers", 4, "of the transformer inside a frame (depth pattern)")
    flag("--depth_d_model", 0, "its width; 0 = half as many heads of the same size")
    flag("--dropout", 0.1)
    # machine
    flag("--device", help="cpu or a GPU number; without it the first GPU where there is one")
    flag("--amp", False, "bf16 autocast")
    flag("--fused-optim", False, "fused AdamW")
    flag("--compile", False, "torch.compile of the model")
    # validation and samples, with EMA weights
    flag("--val-every", 1, "epochs")
    flag("--eval-audio-every", 5, "epochs; 0 = off")
    flag("--eval-frames", 1290, "frames a sample; 1290 = 15 s of DAC")
    flag("--eval-temperature", 1.1, "0 = the most likely token")
    flag("--eval-top-k", 0, "0 = off")
    flag("--eval-top-p", 0.0, "0 = off")
    flag("--eval-outdir", "rvq_eval")
    flag("--eval-on-cpu", False, "decode samples on the CPU")
    flag("--eval-decoder", "auto", "what speaks the samples: a checkpoint of train_dual_head.py (SNAC; auto: "
         "none), a folder or hub id@revision of a DacModel (DAC; auto: descript/dac_44khz); none = tokens")
    # files
    flag("--save_dir", "rvq_ckpts", "checkpoints, metrics.jsonl, training.log; one run a folder")
    flag("--tag", "", "in the checkpoints' names: rvq_{K}cb_{tag}_latest.pt")
    flag("--archive-every", 10, "epochs; 0 = off")
    flag("--keep-archived", 20, "epoch archives kept, and as many best ones")
    flag("--save-every-steps", 1000, "0 = only after epochs")
    flag("--log-lr-steps", 50, "steps from log line to log line")
    flag("--quiet", False, "no line per step on stdout and in the log; metrics.jsonl has them all the same")
    flag("--resume", help="continue from this checkpoint; without a name: from the latest, and fail "
         "where there is none. Without the flag: from the latest where there is one", nargs="?", const="auto")
    flag("--no-resume", False, "start anew even where a latest checkpoint exists")
    flag("--ignore-arch", False, "build what the flags say, not what the checkpoint holds; take over the "
         "tensors that fit and start at step 0")
    return p


def generate_parser() -> argparse.ArgumentParser:
    p = Parser(prog="train_rvq.py generate", allow_abbrev=False,
               description="Sample tokens from a checkpoint (EMA weights).")
    same = training_parser().get_default  # one default for one thing
    p.add_argument("--checkpoint", required=True)
    p.add_argument("--output", required=True, help="out.npq, out.parquet (SNAC) or out.wav (decoded)")
    p.add_argument("--frames", type=int, default=same("eval_frames"), help="new frames (default %(default)s)")
    p.add_argument("--prompt", help=".npq file, or .parquet of a cache (its row --prompt-row)")
    p.add_argument("--prompt-row", type=int, default=0)
    p.add_argument("--prompt-frames", type=int, default=0, help="first frames of the prompt used; 0 = all")
    p.add_argument("--temperature", type=float, default=same("eval_temperature"), help="default %(default)s")
    p.add_argument("--top-k", type=int, default=same("eval_top_k"), help="0 = off")
    p.add_argument("--top-p", type=float, default=same("eval_top_p"), help="0 = off")
    p.add_argument("--seed", type=int, default=same("seed"))
    p.add_argument("--device")
    p.add_argument("--decoder", default=same("eval_decoder"), help="as --eval-decoder; for out.wav")
    return p

# fmt: on


def read_config(path: str, parser: argparse.ArgumentParser) -> dict:
    """JSON of flags with // comments; an unknown key is an error that names the nearest known one."""
    try:
        text = Path(path).read_text(encoding="utf-8")
        config = json.loads(re.sub(r'("(?:\\.|[^"\\])*")|//[^\n]*', lambda m: m[1] or "", text))
    except (OSError, ValueError) as e:
        raise UserError(f"--config {path} cannot be read: {e}") from None
    known = {a.dest: a for a in parser._actions if a.dest not in ("help", "config")}
    for key, value in config.items():
        if key not in known:
            near = difflib.get_close_matches(key, known, 1)
            raise UserError(
                f"--config {path}: unknown key {key!r}" + (f"; did you mean {near[0]!r}?" if near else "")
            )
        kind = type(known[key].default)
        fits = isinstance(
            value, (int, float) if kind is float else str if known[key].default is None else kind
        )
        if not fits or (isinstance(value, bool) and kind is not bool):
            raise UserError(f"--config {path}: {key} is {value!r}; it must be of type {kind.__name__}")
        if known[key].choices and value not in known[key].choices:
            raise UserError(f"--config {path}: {key} is {value!r}, not one of {known[key].choices}")
    return config


def parse_training(argv: list[str]) -> argparse.Namespace:
    """Flag > config > default. Raises UserError for values no run can use."""
    parser = training_parser()
    args = parser.parse_args(argv)
    if args.config:
        parser.set_defaults(**read_config(args.config, parser))
        args = parser.parse_args(argv)
    args.step = args.step or max(1, args.ctx // 2)
    for name in ("ctx", "step", "batch", "accum", "epochs", "d_model", "layers", "heads", "depth_layers",
                 "val_every", "eval_frames", "keep_archived", "log_lr_steps", "prefetch"):  # fmt: skip
        if getattr(args, name) < 1:
            raise UserError(f"{name} is {getattr(args, name)}; it must be at least 1")
    if args.d_model % args.heads or args.d_model // args.heads % 2:
        raise UserError(f"--d_model {args.d_model} must be --heads {args.heads} times an even number")
    return args


if __name__ == "__main__" and {"-h", "--help"} & set(
    sys.argv
):  # help without the seconds torch takes to import
    (generate_parser() if sys.argv[1] == "generate" else training_parser()).parse_args(["--help"])

if __name__ == "__main__" and sys.argv[1:2] != ["generate"]:
    stop_at_once()

import numpy as np
import torch
from torch import nn

from snac48.codec import load_weights
from snac48.token_lm import TokenLM, build, sample, token_losses

# ---- arithmetic of a run ----


def window_counts(lengths: np.ndarray, ctx: int, step: int) -> np.ndarray:
    """Windows per file: floor((T - ctx) / step) + 1; a file shorter than ctx is one window of its length."""
    return np.where(lengths >= ctx, (lengths - ctx) // step + 1, 1)


def window_table(lengths: np.ndarray, files: np.ndarray, ctx: int, step: int) -> np.ndarray:
    """int64 [windows, 3]: file, first frame, frames."""
    counts = window_counts(lengths[files], ctx, step)
    owner = np.repeat(files, counts)
    number = np.arange(len(owner)) - np.repeat(np.cumsum(counts) - counts, counts)
    start = number * step
    return np.stack([owner, start, np.minimum(ctx, lengths[owner] - start)], axis=1)


def split_files(counts: np.ndarray, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """(train, val) file numbers: whole files, shuffled by the seed, up to int(0.05 * windows) windows.

    By file because windows of one file overlap: a split over windows would validate on training frames.
    """
    if len(counts) < 2:
        raise UserError("one file cannot be split by file: give more files, or --val-data")
    order = np.random.default_rng([seed, 1]).permutation(len(counts))
    n = int((np.cumsum(counts[order]) <= int(0.05 * counts.sum())).sum())
    if n == 0:  # every file is larger than the share: hold out the smallest
        order = np.roll(order, -int(np.argmin(counts[order])))
        n = 1
    return np.sort(order[n:]), np.sort(order[:n])


def steps_per_epoch(windows: int, batch: int, accum: int) -> int:
    """floor(ceil(windows / batch) / accum); the left-over batches join the epoch's last step."""
    return max(1, math.ceil(windows / batch) // accum)


def step_batches(
    order: np.ndarray, lengths: np.ndarray, step: int, batch: int, accum: int
) -> list[np.ndarray]:
    """The forward passes of one optimiser step: windows of similar length together, so little is padded."""
    last = step + 1 == steps_per_epoch(len(order), batch, accum)
    own = order[step * batch * accum : None if last else (step + 1) * batch * accum]
    own = own[np.argsort(-lengths[own], kind="stable")]
    return [own[i : i + batch] for i in range(0, len(own), batch)]


def epoch_order(windows: int, seed: int, epoch: int) -> np.ndarray:
    return np.random.default_rng([seed, 2, epoch]).permutation(windows)


def lr_at(step: int, total: int, peak: float, warmup_ratio: float, eta_min_ratio: float) -> float:
    """Linear warm-up, then cosine from peak to peak * eta_min_ratio at the last step."""
    warm = int(warmup_ratio * total)
    if step < warm:
        return peak * (step + 1) / warm
    part = (step - warm) / max(1, total - 1 - warm)
    low = peak * eta_min_ratio
    return low + (peak - low) * 0.5 * (1 + math.cos(math.pi * min(1.0, part)))


def codebook_weights(text: str, alpha: float, K: int) -> list[float]:
    """auto: w_k = 1 + alpha * k / (K - 1); uniform: 1; or a comma-separated list of K numbers."""
    if text == "auto":
        return [1 + alpha * k / max(1, K - 1) for k in range(K)]
    if text == "uniform":
        return [1.0] * K
    try:
        weights = [float(w) for w in text.split(",")]
    except ValueError:
        raise UserError(f"--cb-weights {text!r} is neither auto, uniform nor a list of numbers") from None
    if len(weights) != K or min(weights) < 0 or sum(weights) <= 0:
        raise UserError(f"--cb-weights needs {K} numbers of at least 0, got {text!r}")
    return weights


class StepGuard:
    """Which steps to skip. The running loss takes in accepted losses only: no NaN can poison it."""

    def __init__(self, factor: float):
        self.factor, self.running, self.skipped, self.in_a_row = factor, None, 0, 0

    def reason(self, loss: float, grad_norm: float) -> str | None:
        """Why this step must be skipped, or None; counts both."""
        why = None
        if not (math.isfinite(loss) and math.isfinite(grad_norm)):
            why = "non-finite"
        elif self.running is not None and self.factor:
            why = "outlier" if loss > max(self.factor * self.running, self.running + 1) else None
        if why:
            self.skipped += 1
            self.in_a_row += 1
        else:
            self.running = loss if self.running is None else 0.98 * self.running + 0.02 * loss
            self.in_a_row = 0
        return why


# ---- data ----


class Windows(torch.utils.data.Dataset):
    def __init__(self, corpus: Corpus, table: np.ndarray):
        self.corpus, self.table = corpus, table

    def __len__(self):
        return len(self.table)

    def __getitem__(self, i) -> np.ndarray:
        return self.corpus.read(*map(int, self.table[i]))


def pad_batch(items: list[np.ndarray]) -> torch.Tensor:
    """[T_i, K] each -> int32 [B, max T, K]; -1 beyond a window's end: masked out of inputs and loss."""
    out = np.full((len(items), max(map(len, items)), items[0].shape[1]), -1, dtype=np.int32)
    for row, item in zip(out, items):
        row[: len(item)] = item
    return torch.from_numpy(out)


class EpochBatches:
    """Batch sampler: the forward passes of an epoch from a given step on."""

    def __init__(self, windows: Windows, args):
        self.windows, self.args, self.epoch, self.first = windows, args, 0, 0
        self.steps = steps_per_epoch(len(windows), args.batch, args.accum)

    def step(self, s: int) -> list[np.ndarray]:
        if getattr(self, "ordered", None) != self.epoch:
            self.order, self.ordered = epoch_order(len(self.windows), self.args.seed, self.epoch), self.epoch
        return step_batches(self.order, self.windows.table[:, 2], s, self.args.batch, self.args.accum)

    def __iter__(self):
        for s in range(self.first, self.steps):
            for own in self.step(s):
                yield own.tolist()


# ---- loss ----


def objective(model, codes, weights, smoothing: float, frames: int):
    """(loss to minimise, summed plain cross-entropy [K]) of one forward pass.

    frames: of the whole optimiser step, so that the passes' losses add up to the step's mean.
    """
    logits = model(codes)
    plain = model._orig_mod if hasattr(model, "_orig_mod") else model
    nll, flat = token_losses(logits, codes, plain.sizes)
    valid = codes >= 0
    mixed = torch.where(valid, (1 - smoothing) * nll + smoothing * flat, 0.0).sum((0, 1))
    return (mixed * weights).sum() / (frames * weights.sum()), torch.where(valid, nll, 0.0).sum(
        (0, 1)
    ).detach()


@torch.no_grad()
def plain_ce(model, dataset: Windows, batch: int, device, amp: bool, poll=lambda: None) -> list[float]:
    """Mean cross-entropy of each codebook in nats, no smoothing, no weights, no dropout."""
    model.eval()
    total, frames = torch.zeros(model.K, dtype=torch.float64), 0
    order = np.argsort(-dataset.table[:, 2], kind="stable")
    for i in range(0, len(order), batch):
        poll()
        codes = pad_batch([dataset[j] for j in order[i : i + batch]]).to(device)
        with torch.autocast(device.type, torch.bfloat16, enabled=amp):
            logits = model(codes)
        nll = token_losses(logits, codes, model.sizes)[0]
        total += torch.where(codes >= 0, nll, 0.0).double().sum((0, 1)).cpu()
        frames += int((codes[..., 0] >= 0).sum())
    return (total / frames).tolist()


def summary(ce: list[float], fps: float) -> dict:
    """val ppl = exp(mean CE); bits from plain CE summed over the codebooks."""
    bits = sum(ce) / math.log(2)
    ppl = math.exp(min(700.0, sum(ce) / len(ce)))
    return {"ppl": ppl, "bits_per_frame": bits, "bits_per_s": bits * fps, "ce": [round(c, 5) for c in ce]}


# ---- speaking the tokens ----


def load_decoder(source: dict, name: str, device):
    """A function frames int64 [T, K] -> (samples float32 [n], rate), or None for `none`.

    SNAC: the 48 kHz head of the dual-head checkpoint `name`; DAC: transformers' DacModel, a folder or hub
    id@revision.
    Raises UserError with the reason when it cannot be loaded.
    """
    if name == "none" or (name == "auto" and source["kind"] == "snac"):
        return None
    try:
        if source["kind"] == "snac":
            from snac48.decoder import load_dual_head

            decoder = load_dual_head(name, device)
            if decoder.geometry.weights_sha256 != source["weights_sha256"]:
                raise UserError(f"the decoder {name} speaks the codes of another codec, not of these "
                                "tokens'; give its own")  # fmt: skip

            def speak(frames):
                codes = [
                    torch.from_numpy(c).long()[None] for c in codes_from_frames(frames, source["vq_strides"])
                ]
                return decoder.decode(codes)[1].detach().float().cpu().reshape(-1).numpy(), 48000

            return speak
        from transformers import DacModel

        repo, _, revision = (DAC_REPO if name == "auto" else name).partition("@")
        dac = DacModel.from_pretrained(repo, revision=revision or None).eval().to(device)
    except (ImportError, OSError, ValueError) as e:
        raise UserError(f"the decoder {name} cannot be loaded: {str(e).splitlines()[0]}; name a folder "
                        "with --eval-decoder (generate: --decoder), none: tokens only") from None  # fmt: skip
    have = (dac.config.n_codebooks, dac.config.codebook_size)

    def speak(frames):
        if frames.shape[1] > have[0] or frames.max() >= have[1]:
            raise UserError(
                f"{frames.shape[1]} codebooks with token {frames.max()} do not fit this DAC: {have}"
            )
        with torch.no_grad():
            audio = dac.decode(audio_codes=torch.from_numpy(frames.T[None]).to(device)).audio_values
        return audio.float().cpu().reshape(-1).numpy(), dac.config.sampling_rate

    return speak


def write_wav(path: Path, samples: np.ndarray, rate: int) -> None:
    import soundfile

    with atomic_file(path) as f:
        soundfile.write(f, np.clip(samples, -1, 1), rate, subtype="PCM_16", format="WAV")


# ---- checkpoints ----


def find_resume(args, stem: str, say) -> dict | None:
    """The state to continue from, or None; a damaged latest falls back to the newest good archive."""
    folder, latest = Path(args.save_dir), Path(args.save_dir) / f"{stem}_latest.pt"
    if args.resume and args.resume != "auto":
        return load_checkpoint(args.resume)
    if args.no_resume or not latest.exists():
        if args.resume:
            raise UserError(f"--resume: {latest} does not exist")
        return None
    older = [*folder.glob(f"{stem}_epoch_e*.pt"), *folder.glob(f"{stem}_best*.pt")]
    for path in [latest, *sorted(older, key=lambda p: p.stat().st_mtime, reverse=True)]:
        try:
            return load_checkpoint(path)
        except UserError as e:
            say(f"warning: {e}")
    raise UserError(f"no readable checkpoint for {latest}; --no-resume starts anew")


def prune(folder: Path, pattern: str, keep: int) -> None:
    """Delete the oldest archives beyond `keep`; names sort by epoch, then by time."""
    for path in sorted(folder.glob(pattern))[: -keep or None]:
        path.unlink(missing_ok=True)


# ---- training ----


def peak_flops(device) -> float | None:
    """Dense bf16 peak of the GPU by its name (vendors' data sheets); None where unknown."""
    table = {"B200": 2250e12, "H200": 989e12, "H100": 989e12, "A100": 312e12, "L40S": 362e12, "4090": 165e12,
             "3090": 71e12, "L4": 121e12, "A10": 125e12}  # fmt: skip
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else ""
    return next((flops for key, flops in table.items() if key in name), None)


def architecture(args, corpus: Corpus) -> dict:
    size = args.d_model // args.heads
    wide = args.depth_d_model or max(1, args.heads // 2) * size
    if wide % size:
        raise UserError(f"--depth_d_model {wide} must be a multiple of the head size {size}")
    return {"pattern": args.pattern, "vocab": corpus.vocab, "d_model": args.d_model, "layers": args.layers,
            "heads": args.heads, "depth_layers": args.depth_layers, "depth_d_model": wide,
            "dropout": args.dropout, "ctx": args.ctx}  # fmt: skip


class Stopped(Exception):
    """A signal came during validation or sampling; the checkpoint's `closed` says that they are still due."""


def train(args) -> int:
    device = pick_device(args.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    if device.type == "cuda":
        torch.backends.cuda.matmul.fp32_precision = "tf32"
    corpus = Corpus(args.data, args.npq2)
    K = corpus.K
    held_out = Corpus(args.val_data, args.npq2) if args.val_data else corpus
    if held_out.vocab != corpus.vocab or held_out.source != corpus.source:
        raise UserError(f"--val-data {args.val_data} holds other tokens than --data {args.data}")
    stem = f"rvq_{K}cb" + (f"_{args.tag}" if args.tag else "")
    folder = Path(args.save_dir)
    log = RunLog(folder)
    for name, why in corpus.bad[:20]:
        log.say(f"skipped {name}: {why}")
    if corpus.bad_fraction > args.max_bad_fraction:
        name, why = corpus.bad[0]
        raise UserError(f"{len(corpus.bad)} bad files or rows in --data {args.data}, e.g. {name}: {why}; "
                        "mend them or raise --max_bad_fraction", EXIT_BAD_INPUT)  # fmt: skip

    # data
    counts = window_counts(corpus.lengths, args.ctx, args.step)
    if args.val_data:
        own, val = np.arange(len(corpus.lengths)), np.arange(len(held_out.lengths))
    else:
        own, val = split_files(counts, args.seed)
    train_set = Windows(corpus, window_table(corpus.lengths, own, args.ctx, args.step))
    val_set = Windows(held_out, window_table(held_out.lengths, val, args.ctx, args.step))
    batches = EpochBatches(train_set, args)
    per_epoch, total = batches.steps, batches.steps * args.epochs
    ahead = {"prefetch_factor": args.prefetch, "persistent_workers": args.persistent_workers}
    loader = torch.utils.data.DataLoader(train_set, batch_sampler=batches, collate_fn=pad_batch,
                                         num_workers=args.num_workers, pin_memory=device.type == "cuda",
                                         worker_init_fn=ignore_stop_signals,
                                         **(ahead if args.num_workers else {}))  # fmt: skip

    # model, optimiser, where to begin
    arch, best = architecture(args, corpus), None
    step = closed = 0  # optimiser steps done; epochs validated and archived
    plan = [len(train_set), len(val_set), args.batch, args.accum, args.ctx, args.step, args.seed]
    guard = StepGuard(args.outlier_skip_factor)
    state = find_resume(args, stem, log.say)
    if state and (state.get("kind") != "rvq" or state["arch"]["vocab"] != corpus.vocab):
        raise UserError(
            f"the checkpoint in {folder} is no model of these tokens; use another --save_dir or --tag"
        )
    if state and any(state["source"].get(k) != corpus.source.get(k) for k in ("kind", "weights_sha256")):
        raise UserError(
            f"the checkpoint in {folder} was trained on tokens of another codec; use another --save_dir"
        )
    if state and not args.ignore_arch:
        differ = {k: v for k, v in state["arch"].items() if k not in ("ctx", "dropout") and arch[k] != v}
        if differ:
            log.say(f"architecture from the checkpoint: {differ} (--ignore-arch takes the flags')")
        arch = {**state["arch"], "ctx": args.ctx, "dropout": args.dropout}
    torch.manual_seed(args.seed)
    model = TokenLM(arch)
    fresh = state is None or (args.ignore_arch and {**state["arch"], "ctx": 0} != {**arch, "ctx": 0})
    if state and fresh:
        have = model.state_dict()
        fits = {k: v for k, v in (state.get("ema") or state["model"]).items()
                if k in have and have[k].shape == v.shape}  # fmt: skip
        model.load_state_dict(fits, strict=False)
        log.say(f"--ignore-arch: {len(fits)} of {len(have)} tensors taken over, the rest new; at step 0")
    elif state:
        load_weights(model, state["model"], f"the checkpoint in {folder}")
    model.to(device)
    ema = None
    if args.ema:
        ema = TokenLM(arch).to(device).requires_grad_(False)
        load_weights(
            ema, (not fresh and state.get("ema")) or model.state_dict(), f"the checkpoint in {folder}"
        )
    groups = [{"params": [p for p in model.parameters() if p.ndim >= 2], "weight_decay": args.weight_decay},
              {"params": [p for p in model.parameters() if p.ndim < 2], "weight_decay": 0.0}]  # fmt: skip
    optimizer = torch.optim.AdamW(groups, lr=args.lr, betas=(0.9, 0.95), fused=args.fused_optim or None)
    if not fresh:
        optimizer.load_state_dict(state["optimizer"])
        for group, decay in zip(optimizer.param_groups, (args.weight_decay, 0.0)):
            group["weight_decay"], group["fused"] = decay, args.fused_optim or None
        step, closed, best = state["global_step"], state["closed"], state["best"]
        guard.running, guard.skipped = state["guard"]["running"], state["guard"]["skipped"]
        if state["plan"] != plan:
            epoch = state["epoch"] if state["global_step"] % state["per_epoch"] else state["epoch"] + 1
            step, closed = (epoch - 1) * per_epoch, epoch - 1
            log.say(f"warning: windows, batch, accum, ctx, step or seed changed ({state['plan']} -> {plan}): "
                    f"continuing at the start of epoch {epoch}")  # fmt: skip
    run_model = torch.compile(model) if args.compile else model
    weights = torch.tensor(codebook_weights(args.cb_weights, args.cb_weights_auto_alpha, K), device=device)
    write_json(folder / "args.json", vars(args))
    params = sum(p.numel() for p in model.parameters())
    log.metric(event="start" if fresh else "resume", step=step, total_steps=total, epochs=args.epochs,
               args=vars(args), git_sha=git_sha(), versions=versions(), device=str(device), arch=arch,
               parameters=params, windows=len(train_set), val_windows=len(val_set),
               skipped=len(corpus.bad))  # fmt: skip
    log.say(f"{'start' if fresh else f'resume at step {step}'}: {params / 1e6:.1f} M parameters, K {K}, "
            f"{corpus.fps:.2f} frames/s, {arch['pattern']} on {device}; {len(own)} files, {len(train_set)} "
            f"windows, {per_epoch} steps an epoch; held out {len(val)} and {len(val_set)}")  # fmt: skip

    stop = StopFlag()  # from here on a signal is answered with a checkpoint
    val_loss = train_loss = None
    pace, peak = None, peak_flops(device)
    flops = model.flops_per_frame(min(args.ctx, int(corpus.lengths.max())))

    def save(name: str, epoch: int) -> None:
        """The resume contract: whoever reads checkpoints reads these keys."""
        began = time.time()
        save_checkpoint(folder / name, {
            "kind": "rvq", "model": model.state_dict(), "ema": ema.state_dict() if ema else None,
            "optimizer": optimizer.state_dict(), "epoch": epoch, "global_step": step,
            "per_epoch": per_epoch, "closed": closed, "lr": optimizer.param_groups[0]["lr"],
            "best": best, "val_loss": val_loss, "train_loss": train_loss,
            "guard": {"running": guard.running, "skipped": guard.skipped},
            "arch": arch, "plan": plan,
            "source": {**corpus.source, "fps": corpus.fps}, "args": vars(args), "versions": versions(),
        })  # fmt: skip
        spent = round(time.time() - began, 3)
        log.metric(event="checkpoint", step=step, epoch=epoch, path=name, seconds=spent)

    def poll(*_) -> None:
        if stop:
            raise Stopped

    def validate(epoch: int) -> None:
        nonlocal val_loss, best
        ce = plain_ce(ema or model, val_set, args.batch, device, args.amp, poll)
        val_loss = sum(ce) / K
        stamp = time.strftime("%Y%m%d_%H%M%S")
        better = math.isfinite(val_loss) and (best is None or val_loss < best)
        if better:
            best = val_loss
            save(f"{stem}_best.pt", epoch)
            save(f"{stem}_best_e{epoch:04d}__{stamp}.pt", epoch)
            prune(folder, f"{stem}_best_e*__*.pt", args.keep_archived)
        numbers = summary(ce, corpus.fps)
        log.metric(event="val", step=step, epoch=epoch, val_loss=val_loss, best_val_loss=best, **numbers)
        log.say(f"epoch {epoch}/{args.epochs} val {val_loss:.4f} ppl {numbers['ppl']:.1f} bits/frame "
                f"{numbers['bits_per_frame']:.2f} bits/s {numbers['bits_per_s']:.1f} ce "
                f"{' '.join(f'{c:.3f}' for c in ce)}{' best' if better else ''}")  # fmt: skip

    def listen(epoch: int) -> None:
        """Sample with EMA weights: tokens always, audio when the decoder loads; it must not end a run."""
        out = Path(args.eval_outdir)
        out.mkdir(parents=True, exist_ok=True)
        frames = sample(ema or model, args.eval_frames, None, 1, args.eval_temperature, args.eval_top_k,
                        args.eval_top_p, args.seed, poll)[0].cpu().numpy()  # fmt: skip
        name = out / f"{stem}_e{epoch:04d}"
        write_npq(f"{name}.npq", frames, corpus.vocab, corpus.fps)
        try:
            speak = load_decoder(corpus.source, args.eval_decoder, "cpu" if args.eval_on_cpu else device)
            if speak:
                write_wav(Path(f"{name}.wav"), *speak(frames))
            log.say(f"sample: {name}.{'wav' if speak else 'npq (no decoder)'}")
        except UserError as e:
            log.say(f"warning: sample {name}.npq not decoded: {e}")

    def close(epoch: int) -> None:
        """What follows an epoch's last step; repeated whole when a stop or a kill came in between."""
        if epoch % args.val_every == 0 or epoch == args.epochs:
            validate(epoch)
        if args.eval_audio_every and epoch % args.eval_audio_every == 0:
            listen(epoch)
        if args.archive_every and epoch % args.archive_every == 0:
            save(f"{stem}_epoch_e{epoch:04d}__{time.strftime('%Y%m%d_%H%M%S')}.pt", epoch)
            prune(folder, f"{stem}_epoch_e*__*.pt", args.keep_archived)

    # ---- the loop ----

    reason = "finished"
    while True:
        epoch = step // per_epoch
        if step % per_epoch == 0 and closed < epoch:
            try:
                close(epoch)
                closed = epoch
            except Stopped:
                reason = "stopped"
            save(f"{stem}_latest.pt", epoch)
        if step >= total or reason == "stopped":
            break
        epoch += 1
        batches.epoch, batches.first = epoch, step % per_epoch
        feed = iter(loader)
        clock, tokens = time.time(), 0
        for s in range(batches.first, per_epoch):
            own = batches.step(s)
            frames = int(train_set.table[np.concatenate(own), 2].sum())
            torch.manual_seed(args.seed * 1_000_003 + step)  # dropout too is a function of the step
            lr = lr_at(step, total, args.lr, args.warmup_ratio, args.eta_min_ratio)
            for group in optimizer.param_groups:
                group["lr"] = lr
            model.train()
            loss, ce = torch.zeros((), device=device), torch.zeros(K, device=device)
            for _ in own:
                codes = next(feed).to(device, non_blocking=True)
                with torch.autocast(device.type, torch.bfloat16, enabled=args.amp):
                    part, nll = objective(run_model, codes, weights, args.label_smoothing, frames)
                part.backward()
                loss += part.detach()
                ce += nll
            norm = nn.utils.clip_grad_norm_(model.parameters(), args.grad_clip or float("inf"))
            train_loss = loss.item()  # a CPU-GPU sync point, once a step
            why = guard.reason(train_loss, norm.item())
            if why is None:
                optimizer.step()
                if ema:
                    decay = min(args.ema, (1 + step) / (10 + step))  # early averages follow closely
                    with torch.no_grad():
                        torch._foreach_lerp_(list(ema.parameters()), list(model.parameters()), 1 - decay)
            optimizer.zero_grad(set_to_none=True)
            step += 1
            tokens += frames * K
            if why:
                log.metric(event="skip", step=step, epoch=epoch, reason=why, loss=train_loss,
                           grad_norm=norm.item(), skipped=guard.skipped, in_a_row=guard.in_a_row)  # fmt: skip
                log.say(f"step {step}: {why} (loss {train_loss:.4g}, gradient {norm.item():.4g}), skipped; "
                        f"{guard.in_a_row} in a row")  # fmt: skip
            if guard.in_a_row >= SKIPS_IN_A_ROW:
                reason = "diverged"
            elif step % args.log_lr_steps == 0 or s + 1 == per_epoch or step == 1:
                spent = time.time() - clock
                rate = tokens / spent
                pace = spent / (s + 1 - batches.first)
                numbers = summary((ce / frames).tolist(), corpus.fps)
                phase = "warmup" if step <= int(args.warmup_ratio * total) else "train"
                mfu = rate / K * flops / peak if peak else None
                left = (total - step) * pace
                log.metric(step=step, total_steps=total, epoch=epoch, epochs=args.epochs, phase=phase,
                           loss=train_loss, lr=lr, grad_norm=norm.item(), tokens_per_s=round(rate, 1),
                           mfu=mfu, eta_s=round(left, 1), skipped=guard.skipped, **numbers)  # fmt: skip
                if not args.quiet:
                    shown = {"loss": train_loss, "ppl": numbers["ppl"], "bits/s": numbers["bits_per_s"],
                             "lr": lr, "tok/s": round(rate), "eta": human_time(left)}  # fmt: skip
                    shown |= {"mfu": mfu} if mfu else {}
                    log.say(step_line(step, total, epoch, args.epochs, phase, shown))
            elif sys.stderr.isatty():
                sys.stderr.write(f"\r{s + 1}/{per_epoch} loss {train_loss:.3f} ")
                sys.stderr.flush()
            if stop and reason != "diverged":
                reason = "stopped"
            if reason != "finished":
                save(f"{stem}_latest.pt", epoch)
                break
            if args.save_every_steps and step % args.save_every_steps == 0 and s + 1 < per_epoch:
                save(f"{stem}_latest.pt", epoch)
        if reason == "diverged":
            break
    log.metric(
        event="end", reason=reason, step=step, total_steps=total, val_loss=val_loss, best_val_loss=best
    )
    if reason == "diverged":
        raise UserError(f"{SKIPS_IN_A_ROW} steps in a row were non-finite or outliers; checkpoint saved, "
                        "lower --lr or look at doctor.py", EXIT_DIVERGED)  # fmt: skip
    log.say(f"{reason} at step {step}/{total}, best val {best if best is None else round(best, 4)}"
            + ("; the same command continues" if reason == "stopped" else ""))  # fmt: skip
    return EXIT_STOPPED if reason == "stopped" else 0


# ---- generate ----


def read_prompt(args, source: dict, vocab: list[int]):
    """--prompt FILE -> codes int64 [1, P, K]. Raises UserError when its tokens are not the model's."""
    try:
        if args.prompt.endswith(".parquet"):
            made_by, rows = read_shard(args.prompt)
            if not 0 <= args.prompt_row < len(rows):
                raise NpqError(f"row {args.prompt_row} of {len(rows)}")
            tokens, sizes = rows[args.prompt_row], [made_by["codebook_size"]] * rows[0].shape[1]
            if source.get("weights_sha256") != made_by["weights_sha256"]:
                raise NpqError("it was encoded with another model than this checkpoint's tokens")
        else:
            one = open_npq(args.prompt, "both" if len(vocab) != len(open_npq(args.prompt).vocab) else "mid")
            tokens, sizes = one.tokens(), one.vocab
    except (NpqError, OSError) as e:
        raise UserError(f"--prompt {args.prompt}: {e}") from None
    if sizes != vocab:
        raise UserError(f"--prompt {args.prompt}: vocabulary {sizes} is not the model's {vocab}")
    return torch.from_numpy(np.array(tokens[: args.prompt_frames or None], dtype=np.int64))[None]


def generate(args) -> int:
    out = Path(args.output)
    if out.suffix not in (".npq", ".parquet", ".wav"):
        raise UserError(f"--output {out}: the suffix must be .npq, .parquet or .wav")
    if args.frames < 1:
        raise UserError("--frames must be at least 1")
    state = load_checkpoint(args.checkpoint)
    device = pick_device(args.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    model = build(state, "ema", device)
    source, vocab = dict(state["source"]), model.vocab
    fps = source.pop("fps")
    if out.suffix == ".parquet" and source["kind"] != "snac":
        raise UserError(
            "--output .parquet is the format of a SNAC cache; these are DAC tokens, use .npq or .wav"
        )
    speak = load_decoder(source, args.decoder, device) if out.suffix == ".wav" else None
    if out.suffix == ".wav" and speak is None:
        raise UserError("--output .wav of SNAC tokens needs --decoder, a checkpoint of train_dual_head.py")
    prompt = read_prompt(args, source, vocab) if args.prompt else None
    began = time.time()
    codes = sample(model, args.frames, prompt, 1, args.temperature, args.top_k, args.top_p, args.seed)
    frames, spent = codes[0].cpu().numpy(), time.time() - began
    out.parent.mkdir(parents=True, exist_ok=True)
    if out.suffix == ".npq":
        write_npq(out, frames, vocab, fps)
    elif out.suffix == ".parquet":
        write_cache(out, {out.with_suffix(".wav").name: frames}, source)
    else:
        write_wav(out, *speak(frames))
    print(f"{out}: {len(frames)} frames = {len(frames) / fps:.2f} s; {args.frames / fps / spent:.2f} x real "
          f"time, {args.frames * len(vocab) / spent:.0f} tokens/s on {device}")  # fmt: skip
    return 0


def main() -> int:
    if sys.argv[1:2] == ["generate"]:
        return generate(generate_parser().parse_args(sys.argv[2:]))
    args = parse_training(sys.argv[1:])
    try:
        return train(args)
    except torch.OutOfMemoryError as e:
        raise UserError(f"out of GPU memory ({str(e).splitlines()[0]}); lower --batch and raise --accum, or "
                        "lower --ctx") from None  # fmt: skip


if __name__ == "__main__":
    main_guard(main)
