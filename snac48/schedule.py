"""When a training does what: epochs, phases, batches and rates, as functions of the options and the step.

Nothing here has a state, so nothing has to be restored: a resumed run asks the same functions.
"""

import math
import re
from dataclasses import dataclass

import numpy as np

from .cli import UserError, numbers

HEAD_NAMES = ("24k", "48k")  # of decoder.HEADS, known without torch; the first is the pretrained one


def chosen_heads(choice: str) -> tuple[str, ...]:
    """The names that --heads means: all of them for both."""
    return HEAD_NAMES if choice == "both" else (choice,)


# ---- epochs ----


def trains_codec(args) -> bool:
    """Whether encoder or quantizers are trained: codes then change at every step."""
    return bool(args.from_scratch) or not (args.freeze_encoder and args.freeze_vq)


def curriculum(args) -> list[tuple[float, int]]:
    """[(segment seconds, batch size over all GPUs)] for epochs 1 … --epochs."""
    segments = numbers(float, args.segment_schedule, "--segment_schedule")
    factors = numbers(float, args.batch_multiplier, "--batch_multiplier")
    if not re.fullmatch(r"\d{1,9}(-\d{1,9})?(,\d{1,9}(-\d{1,9})?)*", args.epoch_ranges, re.ASCII):
        raise UserError(f'--epoch_ranges {args.epoch_ranges!r} must be ranges such as "1-2,3-4"')
    ranges = [tuple(int(n) for n in (r.split("-") * 2)[:2]) for r in args.epoch_ranges.split(",")]
    if not len(segments) == len(factors) == len(ranges):
        raise UserError(
            f"--segment_schedule has {len(segments)} entries, --batch_multiplier {len(factors)}, "
            f"--epoch_ranges {len(ranges)}: they must be equally many"
        )
    found = []
    last = max(range(len(ranges)), key=lambda i: ranges[i][1])
    for epoch in range(1, args.epochs + 1):
        hits = [i for i, (a, b) in enumerate(ranges) if a <= epoch <= b] or [last] * (epoch > ranges[last][1])
        if len(hits) != 1:
            raise UserError(f"epoch {epoch} is in {len(hits)} of the --epoch_ranges {args.epoch_ranges}")
        found.append((segments[hits[0]], max(1, int(args.batch_size * factors[hits[0]] + 1e-9))))
    return found


def of_stages(stages, where: str) -> dict[str, str]:
    """The three lists of --epoch_ranges, --segment_schedule and --batch_multiplier of the older configs'
    curriculum. Raises UserError, beginning with `where`."""
    example = '{"epochs": [1, 2], "length": 1.0, "batch_multiplier": 2.0}'
    number = lambda x, kind=(int, float): isinstance(x, kind) and not isinstance(x, bool)
    for stage in stages if isinstance(stages, list) and stages else [stages]:
        known = stage if isinstance(stage, dict) else {}
        span = known.get("epochs")
        right = isinstance(span, list) and len(span) == 2 and all(number(x, int) for x in span)
        if not right or not all(number(known.get(k)) for k in ("length", "batch_multiplier")):
            raise UserError(f"{where} must be a list of stages such as {example}, not {stage!r:.200}")
    return {
        "epoch_ranges": ",".join(f"{s['epochs'][0]}-{s['epochs'][1]}" for s in stages),
        "segment_schedule": ",".join(str(s["length"]) for s in stages),
        "batch_multiplier": ",".join(str(s["batch_multiplier"]) for s in stages),
    }


@dataclass(frozen=True)
class Epoch:
    number: int  # from 1
    phase: str  # features | warmup | main | adversarial
    segment: float  # seconds
    batch: int  # utterances a step over all GPUs
    first_step: int  # global step before its first step
    steps: int


def make_plan(args, rows: int) -> list[Epoch]:
    plan, step = [], 0
    for i, (segment, batch) in enumerate(curriculum(args)):
        late = i - args.feature_epochs
        phase = "features" if late < 0 else "warmup" if late < args.warmup_epochs else "main"
        if (
            phase == "main"
            and args.adv_weight > 0
            and (args.adv_epochs < 0 or i >= args.epochs - args.adv_epochs)
        ):
            phase = "adversarial"
        steps = math.ceil(rows / batch)  # the last batch may be smaller: every row once an epoch
        plan.append(Epoch(i + 1, phase, segment, batch, step, steps))
        step += steps
    return plan


def fft_sizes(args) -> tuple[int, ...]:
    """--n_ffts as numbers. Raises UserError."""
    return tuple(numbers(int, args.n_ffts, "--n_ffts"))


def adam_betas(args, name: str = "adam_betas") -> tuple[float, float]:
    """--adam_betas or --adv_betas as numbers. Raises UserError."""
    given = getattr(args, name)
    found = numbers(float, given, f"--{name}")
    if len(found) != 2:
        raise UserError(f"--{name} {given!r} must be two numbers from 0 to below 1: 0.9,0.999")
    return found[0], found[1]


def check(args) -> None:
    """Raises UserError for options that are malformed or contradict each other."""
    if args.heads == "24k" and args.warmup_epochs:
        raise UserError(
            "--warmup_epochs trains the 48 kHz head alone, which --heads 24k does not have: --warmup_epochs 0"
        )
    if trains_codec(args) and args.cache_dir:
        raise UserError("a codec that is trained itself needs recordings: --data_dir and --val_data_dir")
    if trains_codec(args) and args.heads != "24k":
        raise UserError(
            "encoder and quantizers train with --recipe phase10 only (--heads 24k): a 48 kHz "
            "head needs codes that stay"
        )
    if args.from_scratch and not args.feature_epochs and (args.freeze_encoder or args.freeze_vq):
        raise UserError("--from_scratch needs --no-freeze_encoder --no-freeze_vq, or --feature_epochs")
    if (args.feature_epochs or args.pitch_features) and not args.from_scratch:
        raise UserError("--feature_epochs and --pitch_features belong to --from_scratch")
    if args.from_scratch and args.feature_epochs >= args.epochs:
        raise UserError(
            f"--feature_epochs {args.feature_epochs} of --epochs {args.epochs} leave none to train the codec"
        )
    if args.phase10_checkpoint and args.heads == "24k":
        raise UserError("--phase10_checkpoint is the trunk of another recipe; phase10 goes on by --resume")
    if args.start_checkpoint and (args.phase10_checkpoint or args.from_scratch):
        raise UserError(
            "--start_checkpoint brings the whole decoder: leave out --phase10_checkpoint, --from_scratch"
        )
    if args.adv_weight > 0 and not (args.freeze_encoder and args.freeze_vq):
        raise UserError(
            "gradients of discriminators harm encoder and quantizers: train these first, then the decoder on "
            "the codes that stay, with --adv_weight and without --no-freeze_encoder and --no-freeze_vq"
        )
    for name in ("adam_betas", "adv_betas"):  # it raises on malformed lists, as make_plan does
        adam_betas(args, name)
    plan = make_plan(args, 1)
    if args.adv_weight > 0 and plan[-1].phase != "adversarial":
        raise UserError(
            f"--adv_weight {args.adv_weight:g} has no epoch: --warmup_epochs {args.warmup_epochs} are all "
            f"of --epochs {args.epochs}"
        )
    if args.adv_epochs > args.epochs:
        raise UserError(f"--adv_epochs {args.adv_epochs} are more than --epochs {args.epochs}")
    if args.accum_steps and args.accum_steps > (most := max(e.batch for e in plan)):
        raise UserError(
            f"--accum_steps {args.accum_steps} would cut a step of {most} utterances at most (--batch_size "
            "times --batch_multiplier) into pieces, some with nothing in them"
        )
    for phase in dict.fromkeys(e.phase for e in plan):
        if idle := trains_nothing(args, phase):
            raise UserError(f"the {phase} phase would train nothing: {idle}")


def trains_nothing(args, phase: str) -> str:
    """Which weights are 0 that together leave nothing to minimise in this phase; "" where something is."""
    apart = ("adv", "feat", "commitment", "codebook")  # the other weights are of TERMS
    terms = [name for name in vars(args) if name.endswith("_weight") and name[:-7] not in apart]
    weights = total_weights(args, phase, phase == "adversarial")
    if phase == "warmup":
        weights = {k: w for k, w in weights.items() if k != f"loss_{HEAD_NAMES[0]}"}
    by_terms = any(w > 0 for k, w in weights.items() if k.startswith("loss_"))
    if any(getattr(args, name) > 0 for name in terms) and by_terms:
        return ""
    if any(w > 0 for k, w in weights.items() if not k.startswith("loss_")):
        return ""
    names = terms if by_terms else [f"loss_weight_{k[5:]}" for k in weights if k.startswith("loss_")]
    return f"{', '.join(f'--{name}' for name in names)} {'are' if len(names) > 1 else 'is'} 0"


# ---- what is minimised ----


def judged_heads(args) -> list[str]:
    """The heads that discriminators judge: all that count in the loss."""
    found = chosen_heads(args.heads)
    return [name for name in found if len(found) == 1 or getattr(args, f"loss_weight_{name}") > 0]


def total_weights(args, phase: str, adversary: bool = False) -> dict[str, float]:
    """The total loss, {loss: weight}: logged and minimised; in warmup train_step takes the new heads'.
    adversary: whether discriminators judge, as they do in training, but not in validation."""
    heads = chosen_heads(args.heads)
    share = {name: getattr(args, f"loss_weight_{name}") if len(heads) > 1 else 1.0 for name in heads}
    found = {f"loss_{name}": weight for name, weight in share.items()}
    for name in judged_heads(args) if adversary else ():
        found[f"adv_{name}"] = share[name] * args.adv_weight
        found[f"feat_{name}"] = share[name] * args.feat_weight
    if not trains_codec(args):
        return found
    if phase == "features":
        return found | {"features": 1.0}
    return found | {"commitment": args.commitment_weight, "codebook": args.codebook_weight}


# ---- rates ----


def one_cycle(step: int, total: int, peak: float, rise=0.3, div=25.0, final_div=1e4) -> float:
    """Rate at `step` of 0 … total-1: cosine from peak/div up to peak, then down to peak/div/final_div. The
    formula of torch.optim.lr_scheduler.OneCycleLR (Smith & Topin 2018), as a function: nothing to restore."""
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


# --scheduler of the main phase: (step of it, its steps, rate of the group, options) -> rate. Add yours here.
SHAPES = {
    "onecycle": lambda step, total, rate, args: one_cycle(step, total, rate),
    "cosine": lambda step, total, rate, args: cosine(step, total, rate, args.lr_min_ratio),
    "constant": lambda step, total, rate, args: rate,
}


def groups_of(args, phase: str) -> list[str]:
    """Parts of the model that train in this phase."""
    if phase == "warmup":
        return [f"head_{name}" for name in chosen_heads(args.heads) if name != HEAD_NAMES[0]]
    heads = [f"head_{name}" for name in reversed(chosen_heads(args.heads))]
    if not trains_codec(args):
        return ["trunk", *heads]
    if phase == "features":  # the encoder learns them, whatever is frozen afterwards
        return ["trunk", *heads, "encoder"]
    frozen = {"encoder": args.freeze_encoder, "quantizer": args.freeze_vq}
    return ["trunk", *heads, *(name for name in frozen if not frozen[name])]


def place_in_phase(plan: list[Epoch], step: int) -> tuple[str, int, int]:
    """(phase, steps of it before, steps of it) at global step `step` (0-based)."""
    phase = next((e.phase for e in plan if e.first_step <= step < e.first_step + e.steps), plan[-1].phase)
    first = next(e.first_step for e in plan if e.phase == phase)
    return phase, step - first, sum(e.steps for e in plan if e.phase == phase)


def rates_at(args, plan: list[Epoch], step: int) -> dict[str, float]:
    """Learning rate of every trained group at global step `step` (0-based: the rate of the next update)."""
    phase, done, total = place_in_phase(plan, step)
    groups = groups_of(args, phase)
    if phase == "warmup":
        return dict.fromkeys(groups, args.lr)
    shape = lambda rate: SHAPES[args.scheduler](done, total, rate, args)
    if phase == "features":
        return dict.fromkeys(groups, shape(args.lr) * min(1.0, (step + 1) / 100))
    own = {"head_24k": args.lr_24k_final_conv} if args.heads == "both" else {}
    if phase == "main":
        return {group: shape(own.get(group, args.main_lr)) for group in groups}
    own |= {"trunk": args.adv_lr_trunk, "disc": args.disc_lr}
    rates = {group: shape(own.get(group, args.adv_lr)) for group in [*groups, "disc"]}
    closed = groups if done < args.disc_alone * total else ["trunk"] if done < args.disc_young * total else []
    return rates | dict.fromkeys(closed, 0.0)


def clip_at(args, plan: list[Epoch], step: int) -> float:
    """Limit of the decoder's gradient norm at global step `step`: hard while the discriminators are young."""
    phase, done, total = place_in_phase(plan, step)
    return args.young_clip if phase == "adversarial" and done < args.disc_young * total else args.grad_clip


def plan_lines(args, plan: list[Epoch]) -> list[str]:
    """One line an epoch: phase, segment, batch, steps, and every group's rate at its first and last step."""
    lines = []
    for e in plan:
        first, last = (rates_at(args, plan, e.first_step + n) for n in (0, e.steps - 1))
        rates = ", ".join(f"{g} {first[g]:.3g} to {last[g]:.3g}" for g in first)
        about = f"{e.phase}, {e.segment:g} s, batch {e.batch}, {e.steps} steps"
        lines.append(f"epoch {e.number}: {about}, {rates}")
    return lines


def judge_norm(value: float, usual: float | None, factor: float) -> tuple[bool, float | None]:
    """(skip this step?, running gradient norm afterwards). factor: -1 skips only what is not finite. The
    running norm is a geometric mean. An outlier moves it too, and faster, so that a lasting change of scale
    is accepted within a few steps; NaN and infinity never enter it."""
    if not math.isfinite(value):
        return True, usual
    if usual is None or value <= 0:
        return False, usual or (value or None)
    outlier = factor > 0 and value > factor * usual
    weight = 0.2 if outlier else 0.02
    return outlier, math.exp((1 - weight) * math.log(usual) + weight * math.log(value))


# ---- order ----


def epoch_order(seed: int, epoch: int, rows: int):
    """The rows of one epoch in their order: int64 [rows], a function of (seed, epoch) alone."""
    return np.random.default_rng([seed, epoch]).permutation(rows)
