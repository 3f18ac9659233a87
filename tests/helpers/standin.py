"""A stand-in for SIDON: two TorchScript modules of its interface and file names, whose right answer is known.

Features -> energy envelope -> wave. The extractor puts the log energies of the two mel frames of a frame
into the latents; the decoder smooths them over 21 latent frames (SIDON's receptive field, +-10), interpolates
between the mel frames, where they lie, and modulates a carrier that repeats every frame. Fed at pad 40 its
output's envelope is the input's, with no delay.
"""

import math
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

GAIN = 0.01


class Extractor(nn.Module):
    """[B, T, 160] -> {last_hidden_state: [B, T, 1024]}: channels 0 and 1 hold two mel frames' energies,

    smoothed over +-2 feature frames, so that a chunk without context shows.
    """

    def __init__(self, width: int = 1024):
        super().__init__()
        self.width = width
        self.register_buffer("kernel", torch.tensor([[[0.05, 0.05, 0.8, 0.05, 0.05]]]))

    def forward(self, input_features: Tensor) -> dict[str, Tensor]:
        b, t, _ = input_features.shape
        energy = input_features.reshape(b, t, 2, 80).mean(dim=3).transpose(1, 2)  # [B, 2, T]
        energy = torch.nn.functional.conv1d(energy.reshape(b * 2, 1, t), self.kernel, padding=2)
        energy = energy.reshape(b, 2, t).transpose(1, 2)  # [B, T, 2]
        rest = torch.zeros(b, t, self.width - 2, device=energy.device)
        return {"last_hidden_state": torch.cat([energy, rest], dim=2)}


class Decoder(nn.Module):
    """[B, 1024, T] -> [B, 1, 960 T (- lost)]"""

    def __init__(self, lost: int = 0):
        super().__init__()
        self.lost = lost
        carrier = torch.cos(2 * math.pi * 1000 * torch.arange(960) / 48000)  # 20 periods a frame
        kernel = torch.full((19,), 0.05)  # the ramp below reaches one frame further
        kernel[9] = 1.0
        self.register_buffer("carrier", carrier)
        self.register_buffer("kernel", kernel[None, None])
        self.register_buffer("gain", torch.tensor(GAIN))
        # mel frame i (pad 40) is centred on 160 (i + 1) samples at 16 kHz = 480 (i + 1) at 48 kHz
        self.register_buffer("ramp", torch.arange(480) / 480)

    def forward(self, latents: Tensor) -> Tensor:
        b, _, t = latents.shape
        level = torch.exp(1.5 * latents[:, :2])  # [B, 2, T]
        level = torch.nn.functional.conv1d(level.reshape(b * 2, 1, t), self.kernel, padding=9).reshape(
            b, 2, t
        )
        level = level.transpose(1, 2).reshape(b, 2 * t)  # [B, 2 T] at 100 Hz
        before = torch.cat([level[:, :1], level[:, :-1]], dim=1)
        envelope = before[:, :, None] + (level - before)[:, :, None] * self.ramp  # [B, 2 T, 480]
        wave = envelope.reshape(b, t, 960) * self.carrier * self.gain
        return torch.tanh(wave.reshape(b, 1, 960 * t))[:, :, : 960 * t - self.lost]


def build(folder: Path, device: str = "cpu", extractor: nn.Module | None = None, lost: int = 0) -> Path:
    """Write feature_extractor_{device}.pt and decoder_{device}.pt."""
    folder.mkdir(parents=True, exist_ok=True)
    torch.jit.script((extractor or Extractor()).eval()).save(str(folder / f"feature_extractor_{device}.pt"))
    torch.jit.script(Decoder(lost).eval()).save(str(folder / f"decoder_{device}.pt"))
    return folder


def buzz(rate: int, seconds: float, seed: int = 0, floor: float = 0.01):
    """80 ms bursts of a flat-envelope buzz at random times: (float32 samples, the bursts' centres in s)."""
    rng = np.random.default_rng(seed)
    t = np.arange(round(rate * seconds)) / rate
    top = min(79, rate // 200 - 2)
    period = t[: rate // 50] if rate % 50 == 0 else t
    carrier = sum(np.cos(2 * np.pi * 100 * k * period + np.pi * k * k / top) for k in range(2, top)) / 11
    carrier = np.resize(carrier, len(t))
    centres = np.arange(0.5, seconds - 0.4, 0.5)
    centres = centres + rng.uniform(-0.1, 0.1, len(centres))
    envelope = np.full(len(t), floor)
    for c in centres:
        at = slice(max(0, round((c - 0.25) * rate)), round((c + 0.25) * rate))
        envelope[at] += rng.uniform(0.3, 1) * np.exp(-0.5 * ((t[at] - c) / 0.04) ** 2)
    return (0.1 * envelope * carrier).astype(np.float32), centres
