"""The adversarial phase: discriminators with their optimiser beside the decoder's.

    adversary = Adversary(args, device, bf16)        # when the phase begins
    adversary.begin(rates)                           # each step: rates, no gradients yet
    losses |= adversary.losses(audio, batch, size)   # each micro-batch: gradients of theirs, losses of ours
    norm = adversary.norm(ranks)                     # of theirs, summed over the ranks
    adversary.step(norm)                             # False: skipped, the norm is no number

Both sides of a step see the weights from before it, so micro-batches give the step of the whole batch. The
discriminators are not in DDP, which wants one backward a step: they have one for each head and micro-batch.
Their gradients end at the decoder: with them only heads and trunk train (schedule.check).
"""

import math

import torch
from torch import nn

from .checkpoint import restore_optimizer
from .discriminators import Discriminators, adv_loss, disc_loss, feat_loss, views
from .losses import judged
from .schedule import adam_betas, judged_heads


class FiniteGradient(torch.autograd.Function):
    """The audio [B, N] as it is; items whose gradient is not finite get none. So a discriminator that fails
    leaves the decoder to its other losses."""

    @staticmethod
    def forward(ctx, audio):
        return audio.view_as(audio)

    @staticmethod
    def backward(ctx, grad):
        return torch.where(grad.isfinite().all(-1, keepdim=True), grad, 0.0)


class Adversary:
    """The discriminators of each head that counts. Their first weights are a function of the seed alone, so a
    run that is resumed before the phase enters it with the same ones."""

    def __init__(self, args, device, bf16: bool):
        self.bf16, self.clip = bf16, args.disc_clip
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(args.seed)
            nets = {name: Discriminators(args.disc_width) for name in judged_heads(args)}
        self.nets = nn.ModuleDict(nets).to(device)
        self.optimizer = torch.optim.AdamW(
            self.nets.parameters(),
            lr=0.0,
            betas=adam_betas(args, "adv_betas"),
            weight_decay=args.weight_decay,
            fused=not args.plain,
        )
        self.total, self.last_norm, self.skipped = 0.0, math.nan, 0

    # ---- one step ----

    def begin(self, rates: dict) -> None:
        self.total = 0.0
        self.optimizer.param_groups[0]["lr"] = rates["disc"]
        self.optimizer.zero_grad(set_to_none=True)

    def losses(self, audio, batch: dict, size: int) -> dict:
        """disc_*, adv_* and feat_* of each head, fp32 [B]; adds the gradient of disc_* / size to that of the
        discriminators. audio: as for losses.judged. adv_* and feat_* have a gradient to the audio only."""
        found, there = {}, batch["valid_24k"] > 0
        finite = lambda loss: torch.where(there & loss.isfinite(), loss, 0.0)
        for name, x in judged(audio, batch):
            if name not in self.nets:
                continue
            net, (of_audio, of_target, phase_true) = self.nets[name], views(x)
            with torch.autocast(x.audio.device.type, torch.bfloat16, enabled=self.bf16):
                net.requires_grad_(True)
                both = [torch.cat([t, a.detach()]) for t, a in zip(of_target, of_audio)]
                seen = net(*both, torch.cat([phase_true, phase_true]))
                real, fake = ([[layer.chunk(2)[i] for layer in d] for d in seen] for i in (0, 1))
                disc = torch.where(there, disc_loss(real, fake), 0.0)
                (disc.sum() / size).backward()
                net.requires_grad_(False)
                real = [[layer.detach() for layer in d] for d in real]
                fake = net(*map(FiniteGradient.apply, of_audio), phase_true)
                adv, feat = finite(adv_loss(fake)), finite(feat_loss(real, fake))
            self.total = self.total + disc.detach().sum()
            found |= {f"disc_{name}": disc.detach(), f"adv_{name}": adv, f"feat_{name}": feat}
        return found

    def norm(self, ranks) -> torch.Tensor:
        """Of the gradient, summed over all ranks, before it is clipped; no number where the loss is none."""
        parameters = list(self.nets.parameters())
        ranks.sum_gradients(parameters)
        return nn.utils.clip_grad_norm_(parameters, self.clip) + 0 * self.total

    def step(self, norm: float) -> bool:
        """One step of the optimiser; False where `norm` is no number: then nothing changes but the count."""
        self.last_norm = norm
        if not math.isfinite(norm):
            self.skipped += 1
            return False
        self.optimizer.step()
        return True

    def numbers(self) -> dict:
        """For a line of metrics.jsonl."""
        return {"disc_norm": self.last_norm, "disc_skipped": self.skipped}

    # ---- in checkpoints ----

    def state_dict(self) -> dict:
        return {
            "model": self.nets.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "skipped": self.skipped,
        }

    def load_state_dict(self, saved: dict) -> None:
        """Raises what State._take_over may raise of a malformed checkpoint."""
        self.nets.load_state_dict(saved["model"])
        restore_optimizer(self.optimizer, saved["optimizer"])
        self.skipped = saved["skipped"]
