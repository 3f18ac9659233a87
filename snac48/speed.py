"""Speed by device: what a training switches on where it runs, with the reason, and what a step takes of
memory.

Options that are None (bf16, tf32, compile, num_workers, accum_steps) are decided here; a flag decides itself;
--plain turns all of it off.
"""

import math
import os
import weakref
from dataclasses import dataclass, field

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from . import kernels, schedule
from .adversarial import Adversary
from .losses import head_losses
from .work import share_of_cores

SHORT_STEP = 30.0  # seconds of audio a GPU below which launching kernels takes longer than computing them
MARGIN = 0.8  # share of the free memory that a step may fill: fragments, libraries' workspaces
SURELY = 1e9  # bytes a second of audio that no step takes: where that fits, nothing is measured
MOST_WORKERS = 16


@dataclass
class Speed:
    """What was decided; `told`: lines for the log."""

    bf16: bool
    compile: bool
    num_workers: int
    accum_steps: int = 1
    told: list[str] = field(default_factory=list)


def settle(args, device: torch.device, plan) -> Speed:
    """Decide what `args` leaves open for this device, and set the switches of torch and of our kernels."""
    gpu = device.type == "cuda"
    able = gpu and torch.cuda.is_bf16_supported(including_emulation=False)
    longest = max(e.batch * e.segment for e in plan) / int(os.environ.get("WORLD_SIZE", 1))
    workers = min(share_of_cores(device.type), MOST_WORKERS)
    told = [
        f"device: {torch.cuda.get_device_name(device) if gpu else f'CPU, {torch.get_num_threads()} threads'}"
    ]
    rules = {  # option: (what is best here, why)
        "bf16": (able, "this GPU computes in it" if able else "this GPU cannot" if gpu else "fp32 on a CPU"),
        "tf32": (gpu, "matrix products keep 10 bits" if gpu else "a matter of GPUs"),
        "compile": (gpu and longest < SHORT_STEP, f"{longest:.0f} s of audio a step and process"),
        "num_workers": (workers, "cores / GPUs" if gpu else "the CPU is for the training"),
    }
    found = {}
    for name, (best, why) in rules.items():
        given = getattr(args, name)
        found[name] = (
            given if given is not None else best if not args.plain or name == "num_workers" else False
        )
        reason = "asked for" if given is not None else "--plain" if args.plain else why
        told.append(f"{name} {found[name]} ({reason})")
    args.bf16, args.tf32 = found["bf16"], found["tf32"]  # they change the numbers: a resumed run keeps them
    if args.tf32:
        torch.backends.cuda.matmul.fp32_precision = "tf32"
        torch.backends.cudnn.conv.fp32_precision = "tf32"
    if args.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)
    elif gpu and not args.plain:
        torch.backends.cudnn.benchmark = True
        told.append("cudnn.benchmark True (not --deterministic)")
    if found["compile"]:
        kernels.allow_recompiles()
    kernels.use_plain(args.plain)
    told.append(f"Snake: {kernels.prepare(device.type)}")
    return Speed(args.bf16, found["compile"], found["num_workers"], told=told)


# ---- memory ----


class Live(TorchDispatchMode):
    """Counts the bytes of tensors made inside the block: `now` and, at their highest, `peak`."""

    def __init__(self):
        super().__init__()
        self.now = self.peak = 0
        self.known = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for x in tree_leaves(out):
            if isinstance(x, torch.Tensor) and x.untyped_storage()._cdata not in self.known:
                storage = x.untyped_storage()
                self.known.add(storage._cdata)
                weakref.finalize(storage, self.forget, storage._cdata, storage.nbytes())
                self.now += storage.nbytes()
                self.peak = max(self.peak, self.now)
        return out

    def forget(self, key, size) -> None:
        self.known.discard(key)
        self.now -= size


def bytes_a_second(model, geometry, args, bf16: bool, codec=None, lengths=(1.0, 2.0)) -> tuple[float, float]:
    """(bytes that a step of the main phase takes for each second of audio, bytes besides), counted on steps
    of two lengths in seconds. codec: the FullCodec where that trains."""
    device, flags = next(model.parameters()).device, [(p, p.requires_grad) for p in model.parameters()]
    frozen, model.trunk_frozen = model.trunk_frozen, False
    model.requires_grad_(False)
    for group in schedule.groups_of(args, "main"):
        getattr(model, group).requires_grad_(True)
    peaks, adversary = [], Adversary(args, device, bf16) if args.adv_weight > 0 else None
    for seconds in lengths:
        coarse = geometry.coarse_len(seconds)
        n = coarse * geometry.coarse_samples
        codes = [torch.zeros(1, coarse * f, dtype=torch.int64, device=device) for f in geometry.per_coarse]
        batch = {"audio_24k": torch.zeros(1, 1, n, device=device), "noise_key": codes[0][:, 0]}
        batch |= {
            "audio_48k": torch.zeros(1, 1, 2 * n, device=device),
            "valid_24k": torch.tensor([n]).to(device),
        }
        batch["phase_true"] = torch.zeros(1, dtype=torch.bool, device=device)
        if adversary:
            adversary.begin({"disc": 0.0})
        with Live() as live:
            model.set_noise(batch["noise_key"])
            with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
                audio = codec(batch["audio_24k"])[0] if codec else model(codes)
            weights = {"l1": args.l1_weight, "stft": args.stft_weight, "mel": args.mel_weight}
            how = {"n_ffts": schedule.fft_sizes(args), "stft": args.stft, "mel": args.mel}
            losses = head_losses(audio, batch, weights, **how)
            if adversary:
                losses |= adversary.losses(audio, batch, 1)
            minimised = ("loss", "adv", "feat")
            sum(v.sum() for name, v in losses.items() if name.startswith(minimised)).backward()
        del audio, losses
        model.zero_grad(set_to_none=True)
        peaks.append((live.peak, n / geometry.sampling_rate))
    for p, flag in flags:
        p.requires_grad_(flag)
    model.trunk_frozen = frozen
    (low, short), (high, long) = peaks
    slope = (high - low) / (long - short)
    kept = [*model.parameters(), *(adversary.nets.parameters() if adversary else ())]
    held = sum(p.numel() for p in kept) * 4 * 3  # weights and AdamW's moments
    return slope, low - slope * short + held


def free_memory(device: torch.device) -> float:
    """Bytes that this process may still take."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0] + torch.cuda.memory_reserved(device)
    try:
        with open("/proc/meminfo") as f:
            known = dict(line.split(":") for line in f)
        return 1024 * float(known["MemAvailable"].split()[0])
    except (OSError, KeyError):
        return math.inf


def accum_for(plan, world: int, free: float, a_second: float, besides: float) -> int:
    """The fewest micro-batches a step with which every epoch's fit into `free` bytes; with one utterance in
    each it is as small as it gets."""
    accum = 1
    for epoch in plan:
        each = math.ceil(epoch.batch / world)
        room = max(1, int((MARGIN * free - besides) / (a_second * epoch.segment)))  # utterances that fit
        accum = max(accum, math.ceil(each / room))
    return accum


def settle_accum(speed: Speed, args, plan, ranks, model, geometry, codec=None) -> None:
    """Set speed.accum_steps, on all ranks the largest that one of them needs, and say why."""
    free = free_memory(ranks.device)
    largest = max(e.segment * math.ceil(e.batch / ranks.world) for e in plan)
    if args.accum_steps is not None or args.plain:
        speed.accum_steps, why = args.accum_steps or 1, "asked for" if args.accum_steps else "--plain"
    elif MARGIN * free > SURELY * largest:
        why = f"{largest:.0f} s of audio fit by far"
    else:
        a_second, besides = bytes_a_second(model, geometry, args, speed.bf16, codec)
        speed.accum_steps = accum_for(plan, ranks.world, free, a_second, besides)
        why = f"{a_second / 1e6:.0f} MB a second of audio, {largest:.0f} s a step, {free / 1e9:.1f} GB free"
    each = [speed.accum_steps * (r == ranks.rank) for r in range(ranks.world)]
    speed.accum_steps = int(max(ranks.reduce_sum(each)))
    speed.told.append(f"accum_steps {speed.accum_steps} ({why})")


def memory_plan(cards, model, geometry, args, plan, codec=None) -> list[str]:
    """How cards of so many GB take the steps of `plan`, as a table: micro-batches a step and GB of each."""
    gpus, rows = (1, 2, 4, 8), []
    for name, bf16 in (("bf16", True), ("fp32", False)):
        a_second, besides = bytes_a_second(model, geometry, args, bf16, codec)
        rows.append(f"{name}: {a_second / 1e6:.0f} MB a second of audio, {besides / 1e9:.1f} GB besides")
        rows.append("  card    " + "".join(f"{n} GPU{'s' * (n > 1)}".ljust(15) for n in gpus).rstrip())
        for card in cards:
            cells = []
            for world in gpus:
                accum = accum_for(plan, world, 1e9 * card, a_second, besides)
                most = max(e.segment * math.ceil(math.ceil(e.batch / world) / accum) for e in plan)
                need = (besides + a_second * most) / 1e9
                cells.append(f"{accum} x {need:.1f} GB" if need < MARGIN * card else "too small")
            rows.append(f"  {f'{card:g} GB':8}" + "".join(cell.ljust(15) for cell in cells).rstrip())
    return [*rows, f"(accum_steps x memory of one; {100 * MARGIN:.0f} % of a card are used)"]
