"""The token language model: four ways to factor a frame of K tokens, its loss, sampling, what a checkpoint
holds, and speaking.

train_rvq.py trains and samples it, doctor.py probes it. Tokens are frames [B, T, K]; -1 means "no token".
"""

import copy
import math
import time
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from .checkpoint import load_checkpoint, newest_good, refuse_best, restore_optimizer
from .cli import UserError, first_line
from .codec import load_weights
from .decoder import load_dual_head
from .files import atomic_file
from .tokens import Corpus, Windows, codes_from_frames, pad_batch, write_cache, write_npq

DAC_REPO = "descript/dac_44khz@c1bc521685adf9cfe247bc39a5ca58917eda1ac4"

# ---- model ----


class Block(nn.Module):
    """Pre-norm causal attention (rotary positions) and GELU MLP."""

    def __init__(self, d: int, heads: int, dropout: float, layers: int):
        super().__init__()
        self.heads, self.dropout = heads, nn.Dropout(dropout)
        self.norm1, self.norm2 = nn.RMSNorm(d, eps=1e-6), nn.RMSNorm(d, eps=1e-6)
        self.qkv, self.out = nn.Linear(d, 3 * d, bias=False), nn.Linear(d, d, bias=False)
        self.up, self.down = nn.Linear(d, 4 * d, bias=False), nn.Linear(4 * d, d, bias=False)
        low = 0.02 / math.sqrt(2 * layers)
        for layer, std in ((self.qkv, 0.02), (self.up, 0.02), (self.out, low), (self.down, low)):
            nn.init.normal_(layer.weight, std=std)

    def forward(self, x, rope, cache=None, at: int = 0):
        B, S, d = x.shape
        qkv = self.qkv(self.norm1(x)).view(B, S, 3, self.heads, -1)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)  # [B, H, S, d/H]
        q, k = rotate(q, rope), rotate(k, rope)
        if cache is not None:  # filled from position 0 at once, then one position at a time
            cache[0][:, :, at : at + S], cache[1][:, :, at : at + S] = k, v
            k, v = cache[0][:, :, : at + S], cache[1][:, :, : at + S]
        attend = short_attention if q.is_cuda and 1 < S <= SHORT else F.scaled_dot_product_attention
        y = attend(q, k, v, is_causal=S > 1)
        x = x + self.dropout(self.out(y.transpose(1, 2).reshape(B, S, d)))
        return x + self.dropout(self.down(F.gelu(self.up(self.norm2(x)))))


SHORT = 16  # positions


def short_attention(q, k, v, is_causal: bool):
    """scaled_dot_product_attention(q, k, v) for a few positions: q, k, v [B, H, S, D].

    The depth transformer attends over K = 7 or 9 tokens. A flash kernel fills a tile of 64 or 128 positions
    for each head of each frame; two batched products and a softmax touch only what is there. For a GPU: on a
    CPU torch's own kernel is faster at these sizes, too.
    """
    B, H, S, D = q.shape
    hidden = torch.zeros(S, S, dtype=q.dtype, device=q.device)
    if is_causal:
        hidden = torch.full_like(hidden, float("-inf")).triu(1)
    q, k, v = (x.reshape(B * H, S, D) for x in (q, k, v))
    scores = torch.baddbmm(hidden.expand(B * H, S, S), q, k.transpose(1, 2), alpha=D**-0.5)
    return (scores.softmax(-1).to(v.dtype) @ v).view(B, H, S, D)


def rotate(x, rope):
    """Rotary positions: x [B, H, S, D], rope (cos, sin) [S, D/2]."""
    cos, sin = (r.to(x.dtype) for r in rope)
    a, b = x.chunk(2, -1)
    return torch.cat([a * cos - b * sin, a * sin + b * cos], -1)


class Transformer(nn.Module):
    def __init__(self, d: int, layers: int, heads: int, dropout: float, positions: int):
        super().__init__()
        self.blocks = nn.ModuleList(Block(d, heads, dropout, layers) for _ in range(layers))
        self.norm, self.dropout = nn.RMSNorm(d, eps=1e-6), nn.Dropout(dropout)
        self.shape = (heads, positions, d // heads)
        angle = torch.arange(positions)[:, None] * 10000.0 ** (-torch.arange(0, d // heads, 2) / (d // heads))
        self.register_buffer("cos", angle.cos(), persistent=False)
        self.register_buffer("sin", angle.sin(), persistent=False)

    def new_cache(self, batch: int) -> list:
        new = lambda: self.norm.weight.new_empty(batch, *self.shape)
        return [(new(), new()) for _ in self.blocks]

    def forward(self, x, caches=None, at: int = 0):
        """x: [B, S, d] at positions at .. at + S."""
        rope = self.cos[at : at + x.shape[1]], self.sin[at : at + x.shape[1]]
        x = self.dropout(x)
        for i, block in enumerate(self.blocks):
            x = block(x, rope, caches[i] if caches else None, at)
        return self.norm(x)


class TokenLM(nn.Module):
    """logits[:, t, k] of token (t, k) given what the pattern lets it see; `arch`: the dict in checkpoints."""

    def __init__(self, arch: dict):
        super().__init__()
        self.arch, self.pattern, self.vocab = arch, arch["pattern"], arch["vocab"]
        d, self.K = arch["d_model"], len(arch["vocab"])
        positions = self.positions(arch["ctx"])
        self.temporal = Transformer(d, arch["layers"], arch["heads"], arch["dropout"], positions)
        rows = sum(self.vocab) + self.K  # the last K rows stand for "no token here"
        self.embedding = nn.Embedding(rows, d)
        self.start = nn.Parameter(torch.randn(d) * 0.02)
        wide = d
        if self.pattern == "depth":
            wide = arch["depth_d_model"]
            heads = wide // (d // arch["heads"])
            self.depth = Transformer(wide, arch["depth_layers"], heads, arch["dropout"], self.K)
            self.depth_in = nn.Linear(d, wide, bias=False)
            self.depth_embedding = nn.Embedding(rows, wide)
            nn.init.normal_(self.depth_embedding.weight, std=0.02)
        nn.init.normal_(self.embedding.weight, std=0.02)
        # logits start at std 0.1: the first loss is ln V + 0.005
        self.out = nn.Parameter(torch.randn(self.K, max(self.vocab), wide) * 0.1 / math.sqrt(wide))
        sizes = torch.tensor(self.vocab)
        self.register_buffer("sizes", sizes, persistent=False)
        self.register_buffer("offsets", sizes.cumsum(0) - sizes, persistent=False)

    def positions(self, T: int) -> int:
        return {"delay": T + self.K - 1, "flatten": T * self.K}.get(self.pattern, T)

    def rows(self, codes):
        """Embedding rows of codes [..., K]: -1 becomes that codebook's "no token"."""
        empty = sum(self.vocab) + torch.arange(self.K, device=codes.device)
        return torch.where(codes >= 0, codes + self.offsets, empty)

    def inputs(self, codes, first: int, last: int):
        """codes [B, T, K] -> what positions first .. last hold: [B, last - first, d]."""
        B, T, K = codes.shape
        if self.pattern == "flatten":
            return self.embedding(self.rows(codes).view(B, T * K)[:, first:last])
        if self.pattern == "delay":  # position s holds codebook k of frame s - k
            late = codes.new_full((B, T + K - 1, K), -1)
            for k in range(K):
                late[:, k : k + T, k] = codes[:, :, k]
            codes = late
        return self.embedding(self.rows(codes[:, first:last])).sum(2)

    def forward(self, codes):
        """codes [B, T, K], -1 where there is none -> logits [B, T, K, max V] in fp32."""
        B, T, K = codes.shape
        codes = codes.long()
        x = self.inputs(codes, 0, self.positions(T) - 1)
        h = self.temporal(torch.cat([self.start.to(x.dtype).expand(B, 1, -1), x], 1))  # [B, positions, d]
        if self.pattern == "depth":
            inner = self.depth_embedding(self.rows(codes)[:, :, :-1])  # [B, T, K - 1, wide]
            x = torch.cat([self.depth_in(h)[:, :, None].to(inner.dtype), inner], 2)
            h = self.depth(x.view(B * T, K, -1)).view(B, T, K, -1)
        elif self.pattern == "flatten":
            h = h.view(B, T, K, -1)
        elif self.pattern == "delay":
            h = torch.stack([h[:, k : k + T] for k in range(K)], 2)
        else:
            h = h[:, :, None].expand(B, T, K, -1)
        logits = torch.einsum("btkd,kvd->btkv", h, self.out).float()
        if min(self.vocab) < max(self.vocab):  # -inf beyond a codebook's own vocabulary
            beyond = torch.arange(logits.shape[-1], device=logits.device) >= self.sizes[:, None]
            logits = logits.masked_fill(beyond, float("-inf"))
        return logits

    def flops_per_frame(self, T: int) -> float:
        """Forward + backward: 6 per weight and position it is used at, 6 L d T for causal attention."""

        def cost(net, length):
            weights = sum(p.numel() for p in net.parameters())
            return 6 * weights + 6 * len(net.blocks) * net.norm.weight.numel() * length

        total = self.positions(T) / T * cost(self.temporal, self.positions(T)) + 6 * self.out.numel()
        return total + (self.K * cost(self.depth, self.K) if self.pattern == "depth" else 0)


def peak_flops(device) -> float | None:
    """Dense bf16 peak of the GPU by its name (vendors' data sheets); None where unknown."""
    table = {"B200": 2250e12, "H200": 989e12, "H100": 989e12, "A100": 312e12, "L40S": 362e12, "4090": 165e12,
             "3090": 71e12, "L4": 121e12, "A10": 125e12}  # fmt: skip
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else ""
    return next((flops for key, flops in table.items() if key in name), None)


# ---- loss ----


def token_losses(logits, codes, sizes):
    """fp32 [B, T, K] in nats, 0 for -1: (cross-entropy, cross-entropy against the uniform distribution)."""
    lse = logits.logsumexp(-1)
    nll = lse - logits.gather(-1, codes.long().clamp(min=0)[..., None])[..., 0]
    flat = lse - torch.where(logits.isinf(), 0.0, logits).sum(-1) / sizes
    return torch.where(codes >= 0, nll, 0.0), torch.where(codes >= 0, flat, 0.0)


def objective(model, codes, sizes, weights, smoothing: float, frames: int):
    """(loss to minimise, summed plain cross-entropy [K]) of one forward pass over codes [B, T, K].

    model: a TokenLM, perhaps wrapped; sizes: its own. frames: of the whole optimiser step, over all ranks, so
    that the passes' losses add up to the step's mean.
    """
    logits = model(codes)
    nll, flat = token_losses(logits, codes, sizes)
    mixed = ((1 - smoothing) * nll + smoothing * flat).sum((0, 1))
    return (mixed * weights).sum() / (frames * weights.sum()), nll.sum((0, 1)).detach()


@torch.no_grad()
def plain_ce(
    model, dataset: Windows, batch: int, device, amp: bool, poll=lambda: None, ranks=None
) -> list[float]:
    """Mean cross-entropy of each codebook in nats, no smoothing, no weights, no dropout.

    poll: called before every batch; what it raises ends the measurement. ranks: share the work with these.
    """
    model.eval()
    sums = torch.zeros(model.K + 1, dtype=torch.float64)  # of each codebook; frames
    order = np.argsort(-dataset.table[:, 2], kind="stable")
    rank, world = (ranks.rank, ranks.world) if ranks else (0, 1)
    for i in range(0, len(order), world * batch):  # as many turns for every rank
        poll()
        if not len(own := order[i : i + world * batch][rank::world]):
            continue
        codes = pad_batch([dataset[j] for j in own]).to(device)
        with torch.autocast(device.type, torch.bfloat16, enabled=amp):
            logits = model(codes)
        sums[:-1] += token_losses(logits, codes, model.sizes)[0].double().sum((0, 1)).cpu()
        sums[-1] += int((codes[..., 0] >= 0).sum())
    sums = ranks.reduce_sum(sums) if ranks else sums
    return (sums[:-1] / sums[-1]).tolist()


def summary(ce: list[float], fps: float) -> dict:
    """Perplexity exp(mean CE); bits from the plain CE of each codebook, summed."""
    bits = sum(ce) / math.log(2)
    ppl = math.exp(min(700.0, sum(ce) / len(ce)))
    return {"ppl": ppl, "bits_per_frame": bits, "bits_per_s": bits * fps, "ce": [round(c, 5) for c in ce]}


# ---- sampling ----


def pick(logits, temperature: float, top_k: int, top_p: float, generator):
    """logits [B, V] -> token [B]; temperature 0 takes the most likely, top_k and top_p 0 are off."""
    if temperature <= 0:
        return logits.argmax(-1)
    logits = logits / temperature
    if 0 < top_k < logits.shape[-1]:
        logits = logits.masked_fill(logits < logits.topk(top_k)[0][:, -1:], float("-inf"))
    probs = logits.softmax(-1)
    if 0 < top_p < 1:  # the smallest set of most likely tokens that holds top_p
        ranked, index = probs.sort(descending=True)
        ranked = ranked.masked_fill(ranked.cumsum(-1) - ranked >= top_p, 0)
        probs = torch.zeros_like(probs).scatter(-1, index, ranked)
    # torch.multinomial(probs, 1) in its own arithmetic, without its checks: they wait for the GPU
    return (probs / torch.empty_like(probs).exponential_(generator=generator)).argmax(-1)


@torch.no_grad()
def sample(model, frames, prompt=None, batch=1, temperature=1.0, top_k=0, top_p=0.0, seed=0, on_logits=None):
    """prompt [B, P, K] or None -> codes int64 [B, P + frames, K], with cached keys and values.

    Past ctx frames the window is restarted on its last half, as windows start in training.
    on_logits(t, k, logits [B, V], window start): called for every token sampled (tests).
    Nothing here waits for a GPU: which tokens are chosen already is noted on the CPU.
    """
    model.eval()
    device, K, ctx, pattern = model.out.device, model.K, model.arch["ctx"], model.pattern
    generator = torch.Generator(device).manual_seed(seed)
    prompt = torch.empty(batch, 0, K) if prompt is None else prompt
    codes = F.pad(prompt.to(device, torch.long), (0, 0, 0, frames), value=-1)  # -1: to be chosen
    P, total = prompt.shape[1], codes.shape[1]
    chosen = np.repeat(np.arange(total)[:, None] < P, K, 1)  # [total, K]
    keep = min(max(ctx // 2, K), ctx - 1)
    if pattern == "delay" and ctx <= K:
        raise UserError(f"the delay pattern needs a --ctx above its {K} codebooks")

    def choose(t, k, logits):
        if not chosen[t, k]:
            chosen[t, k] = True
            logits = logits.float()
            logits[:, model.vocab[k] :] = float("-inf")
            if on_logits:
                on_logits(t, k, logits, t0)
            codes[:, t, k] = pick(logits, temperature, top_k, top_p, generator)
        return codes[:, t, k]

    t0 = P - keep if ctx <= P else 0
    while True:
        n = min(ctx, total - t0)
        window = codes[:, t0 : t0 + n]  # a view: tokens chosen appear in it
        known = int(chosen[t0 : t0 + n].all(1).sum())  # complete frames
        j = known * K if pattern == "flatten" else known
        last = model.positions(n) - 1
        if t0 + n < total:  # frames beyond this window exist: do not pretend that they are missing
            last = (n - 1) * (K if pattern == "flatten" else 1)
        caches = model.temporal.new_cache(len(codes))
        start = model.start.expand(len(codes), 1, -1)
        h = model.temporal(torch.cat([start, model.inputs(window, 0, j)], 1), caches)[:, -1]
        while True:
            if pattern == "flatten":
                choose(t0 + j // K, j % K, h @ model.out[j % K].T)
            elif pattern == "depth":
                inner, x = model.depth.new_cache(len(codes)), model.depth_in(h)[:, None]
                for k in range(K):
                    token = choose(t0 + j, k, model.depth(x, inner, k)[:, -1] @ model.out[k].T)
                    x = model.depth_embedding(token[:, None] + model.offsets[k])
            else:
                late = 1 if pattern == "delay" else 0
                for k in range(K):
                    if 0 <= j - late * k < n:
                        choose(t0 + j - late * k, k, h @ model.out[k].T)
            if j == last:
                break
            h = model.temporal(model.inputs(window, j, j + 1), caches, j + 1)[:, -1]
            j += 1
        if t0 + n == total:
            return codes
        t0 += n - keep


# ---- training: the resume contract ----


class StepGuard:
    """Which steps to skip. The running loss takes in accepted losses only: no NaN can poison it."""

    def __init__(self, factor: float):
        self.factor, self.running, self.skipped, self.in_a_row = factor, None, 0, 0

    def reason(self, loss: float, grad_norm: float) -> str | None:
        """Why this step must be skipped, or None; counts both."""
        known = self.running is not None
        if not (math.isfinite(loss) and math.isfinite(grad_norm)):
            why = "non-finite"
        elif known and self.factor and loss > max(self.factor * self.running, self.running + 1):
            why = "outlier"
        else:
            self.running = 0.98 * self.running + 0.02 * loss if known else loss
            self.in_a_row = 0
            return None
        self.skipped += 1
        self.in_a_row += 1
        return why


def mean(rows: list[list[float]]) -> list[float]:
    """Of each column; [] where there are no rows."""
    return [sum(column) / len(rows) for column in zip(*rows)]


@dataclass
class State:
    """The resume contract: what isn't in state_dict() isn't resumed."""

    model: TokenLM
    ema: TokenLM | None  # averaged weights
    optimizer: torch.optim.AdamW
    guard: StepGuard
    step: int = 0  # optimiser steps done
    closed: int = 0  # epochs validated, sampled and archived
    best: float | None = None
    val_loss: float | None = None
    train_loss: float | None = None  # of the last step
    # loss and ce of each codebook at the steps of this epoch that were not skipped; how many the log has told
    rows: list[list[float]] = field(default_factory=list)
    logged: int = 0
    # when run and epoch began, set back by what was spent on them before a resume
    began: list[float] = field(default_factory=lambda: [time.time()] * 2)

    def begin_epoch(self, epoch: int, step: int) -> None:
        self.step, self.closed, self.began[1] = step, epoch - 1, time.time()
        self.rows, self.logged = [], 0

    def spent(self) -> list[float]:
        """Wall-clock of the run and of the epoch in seconds, those before a resume included."""
        return [time.time() - began for began in self.began]

    def state_dict(self) -> dict:
        weights = {"model": self.model.state_dict(), "ema": self.ema and self.ema.state_dict()}
        guard = {"running": self.guard.running, "skipped": self.guard.skipped}
        counts = {"global_step": self.step, "closed": self.closed, "spent": self.spent()}
        losses = {"best": self.best, "val_loss": self.val_loss, "train_loss": self.train_loss}
        losses |= {"rows": self.rows, "logged": self.logged}
        return weights | {"optimizer": self.optimizer.state_dict(), "guard": guard} | counts | losses

    def load_state_dict(self, saved: dict) -> None:
        load_weights(self.model, saved["model"], "the resumed checkpoint")
        if self.ema:  # the checkpoint may come from a run without
            load_weights(self.ema, saved["ema"] or saved["model"], "the resumed checkpoint")
        restore_optimizer(self.optimizer, saved["optimizer"])
        self.guard.running, self.guard.skipped = saved["guard"]["running"], saved["guard"]["skipped"]
        self.step, self.closed, self.best = saved["global_step"], saved["closed"], saved["best"]
        self.val_loss, self.train_loss = saved["val_loss"], saved["train_loss"]
        self.rows, self.logged = saved.get("rows", []), saved.get("logged", 0)  # older ones have none
        self.began = [time.time() - spent for spent in saved.get("spent", (0, 0))]


def new_state(model: TokenLM, args) -> State:
    """A start at step 0. args: ema, lr, weight_decay, fused_optim and outlier_skip_factor of train_rvq.py."""
    ema = copy.deepcopy(model).requires_grad_(False) if args.ema else None
    matrices = {"params": [p for p in model.parameters() if p.ndim >= 2], "weight_decay": args.weight_decay}
    vectors = {"params": [p for p in model.parameters() if p.ndim < 2], "weight_decay": 0.0}
    fused = args.fused_optim or None
    optimizer = torch.optim.AdamW([matrices, vectors], args.lr, betas=(0.9, 0.95), fused=fused)
    return State(model, ema, optimizer, StepGuard(args.outlier_skip_factor))


def open_state(args, arch: dict, saved: dict | None, device, say) -> tuple[State, bool]:
    """(as `saved` left it, False), or (new, True). args: as for new_state, ignore_arch and seed. arch: as the
    options ask for; of it `saved` decides all but ctx and dropout, unless ignore_arch. say: takes a line."""
    if saved and not args.ignore_arch:
        held = {k: v for k, v in saved["arch"].items() if k not in ("ctx", "dropout")}
        differ = {k: v for k, v in held.items() if arch[k] != v}
        if differ:
            say(f"architecture from the checkpoint: {differ} (--ignore-arch takes the flags')")
        arch |= held
    fresh = saved is None or (args.ignore_arch and saved["arch"] | {"ctx": 0} != arch | {"ctx": 0})
    torch.manual_seed(args.seed)
    model = TokenLM(arch)
    if saved and fresh:
        say(f"--ignore-arch: {take_over(model, saved)}; at step 0")
    state = new_state(model.to(device), args)
    if not fresh:
        state.load_state_dict(saved)
    return state, fresh


# ---- from a checkpoint ----

KEYS = ("model", "ema", "optimizer", "guard", "epoch", "global_step", "per_epoch", "closed", "best",
        "val_loss", "train_loss", "arch", "plan", "source", "args")  # fmt: skip


def check_ours(saved: dict, path) -> None:
    """Raises UserError unless `saved` has what a checkpoint of train_rvq.py has."""
    missing = [k for k in KEYS if k not in saved]
    if saved.get("kind") != "rvq" or missing:
        what = f"it lacks {', '.join(missing)}" if missing else f"its kind is {saved.get('kind')!r}"
        raise UserError(f"{path} is not a checkpoint of train_rvq.py: {what}")


def find_resume(folder: Path, stem: str, args, corpus: Corpus, say) -> dict | None:
    """The checkpoint to continue from, or None; a damaged latest falls back to the newest good archive.

    args.resume: a file; `auto`: the latest of this folder must be there; None: it may. Raises UserError where
    the folder holds the best of a run of other options and nothing to go on from.
    """
    resume, latest = args.resume, folder / f"{stem}_latest.pt"
    if resume and resume != "auto":
        check_ours(saved := load_checkpoint(resume), resume)
    elif not latest.exists():
        if resume:
            raise UserError(f"--resume: {latest} does not exist")
        refuse_best(sorted(folder.glob(f"{stem}_best*.pt")), vars(args), "--save_dir or --tag")
        return None
    else:
        older = [*folder.glob(f"{stem}_epoch_e*.pt"), *folder.glob(f"{stem}_best*.pt")]
        good = newest_good([latest], check_ours, say) or newest_good(older, check_ours, say)
        if not good:
            raise UserError(f"no readable checkpoint for {latest}; --no-resume starts anew")
        saved = good[1]
    found = f"the checkpoint in {folder}"
    if saved["arch"]["vocab"] != corpus.vocab:
        raise UserError(f"{found} is no model of these tokens; use another --save_dir or --tag")
    if any(saved["source"].get(k) != corpus.source.get(k) for k in ("kind", "weights_sha256")):
        raise UserError(f"{found} was trained on tokens of another codec; use another --save_dir")
    return saved


def take_over(model: TokenLM, saved: dict) -> str:
    """Put those weights of another architecture (EMA ones) that fit into `model`; how many did."""
    have, theirs = model.state_dict(), saved["ema"] or saved["model"]
    fits = {k: v for k, v in theirs.items() if k in have and have[k].shape == v.shape}
    model.load_state_dict(fits, strict=False)
    return f"{len(fits)} of {len(have)} tensors taken over, the rest new"


def build(state: dict, which: str = "ema", device="cpu") -> TokenLM:
    """The model of a checkpoint, evaluation mode; which: `ema` or `model` weights. Raises UserError."""
    check_ours(state, "this")
    model = TokenLM(state["arch"])
    load_weights(model, state.get(which) or state["model"], "the checkpoint")
    return model.to(device).eval()


# ---- speaking the tokens ----


def write_wav(path: str | Path, samples: np.ndarray, rate: int) -> None:
    """16-bit PCM, atomically. samples: float32 [n]."""
    import soundfile

    with atomic_file(path) as f:
        soundfile.write(f, np.clip(samples, -1, 1), rate, subtype="PCM_16", format="WAV")


def frames_writer(path: Path, source: dict, vocab: list[int], fps: float, decoder: str, device):
    """A function that writes frames int64 [T, K] to `path`: .npq, .parquet (SNAC) or .wav (decoded)."""
    if path.suffix == ".npq":
        return lambda frames: write_npq(path, frames, vocab, fps)
    if path.suffix == ".parquet":
        if source["kind"] != "snac":
            what = "--output .parquet is the format of a SNAC cache"
            raise UserError(f"{what}; these are DAC tokens, use .npq or .wav")
        return lambda frames: write_cache(path, {path.with_suffix(".wav").name: frames}, source)
    if path.suffix != ".wav":
        raise UserError(f"--output {path}: the suffix must be .npq, .parquet or .wav")
    speak = load_decoder(source, decoder, device)
    if speak is None:
        raise UserError("--output .wav of SNAC tokens needs --decoder, a checkpoint of train_dual_head.py")
    return lambda frames: write_wav(path, *speak(frames))


def load_decoder(source: dict, name: str, device):
    """A function frames int64 [T, K] -> (samples float32 [n], rate in Hz), or None for `none`.

    SNAC: the 48 kHz head of the dual-head checkpoint `name` (auto: none). DAC: transformers' DacModel, a
    folder or hub id@revision (auto: DAC_REPO). Raises UserError with the reason when it cannot be loaded.
    """
    if name == "none" or (name == "auto" and source["kind"] == "snac"):
        return None
    try:
        if source["kind"] == "snac":
            return snac_decoder(source, name, device)
        return dac_decoder(DAC_REPO if name == "auto" else name, device)
    except (ImportError, OSError, ValueError) as e:
        hint = "name a folder with --eval-decoder (generate: --decoder), none: tokens only"
        raise UserError(f"the decoder {name} cannot be loaded: {first_line(e)}; {hint}") from None


def snac_decoder(source: dict, path: str, device):
    decoder = load_dual_head(path, device)
    if decoder.geometry.weights_sha256 != source["weights_sha256"]:
        found = f"the decoder {path} speaks the codes of another codec"
        raise UserError(f"{found}, not of these tokens'; give its own")

    def speak(frames):
        codes = [torch.from_numpy(c).long()[None] for c in codes_from_frames(frames, source["vq_strides"])]
        return decoder.decode(codes)[1].detach().float().cpu().reshape(-1).numpy(), 48000

    return speak


def dac_decoder(name: str, device):
    from transformers import DacModel

    repo, _, revision = name.partition("@")
    dac = DacModel.from_pretrained(repo, revision=revision or None).eval().to(device)
    have = (dac.config.n_codebooks, dac.config.codebook_size)

    def speak(frames):
        if frames.shape[1] > have[0] or frames.max() >= have[1]:
            found = f"{frames.shape[1]} codebooks with token {frames.max()}"
            raise UserError(f"{found} do not fit this DAC: {have}")
        with torch.no_grad():
            audio = dac.decode(audio_codes=torch.from_numpy(frames.T[None]).to(device)).audio_values
        return audio.float().cpu().reshape(-1).numpy(), dac.config.sampling_rate

    return speak
