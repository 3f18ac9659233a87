"""What bf16 does to a trained decoder: losses and distances of the validation slices in fp32 and in bf16.

./launch.sh demo && python benchmarks/precision.py demo/run/best_model.pt demo/codes/valid demo/targets/valid
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import torch

from snac48.data import CachedCodesDataset, to_device
from snac48.decoder import load_dual_head
from snac48.losses import distances, head_losses

checkpoint, codes, targets = sys.argv[1:4]
model = load_dual_head(checkpoint).model
data = CachedCodesDataset(codes, targets, 2.0, seed=42, fixed=True)
batch = to_device(data[list(range(len(data)))], "cpu")
means = []
for bf16 in (False, True):
    model.set_noise(batch["noise_key"])
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=bf16):
        audio = model(batch["codes"])
    found = distances(audio, batch) | head_losses(audio, batch, {"l1": 1.0, "stft": 1.0})
    means.append({name: float(v.double().mean()) for name, v in found.items()})
for name, exact in means[0].items():
    print(
        f"{name:12} fp32 {exact:.4f}  bf16 {means[1][name]:.4f}  {100 * (means[1][name] / exact - 1):+.3f} %"
    )
