"""The README's picture and sounds: one clip of the demo by base SNAC, by our 48 kHz head, and as recorded.

    ./launch.sh demo
    python assets/draw_spectrograms.py demo/comparison_samples/018 assets/demo

Reads the clip's three wavs that evaluate.py wrote; writes spectrograms.png and the sounds as FLAC (lossless).
Levels are dB re full scale: a sine of amplitude 1 peaks at 0.
"""

import sys
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
import soundfile as sf
from PIL import Image

PANELS = {"base_snac_sinc48": "base SNAC + sinc", "ours_48k": "ours: 48 kHz head", "original": "recording"}
clip, folder = Path(sys.argv[1]), Path(sys.argv[2])
fig, axes = plt.subplots(1, 3, figsize=(9, 3.4), sharey=True, layout="constrained")
fig.suptitle(
    "“Side left”, a speaker unheard in training; left and middle from the same SNAC tokens", fontsize=10
)
for axis, (system, title) in zip(axes, PANELS.items()):
    x, rate = sf.read(f"{clip}_{system}.wav")
    sf.write(folder / f"{system}.flac", x, rate, subtype="PCM_16")
    frames = np.lib.stride_tricks.sliding_window_view(np.pad(x, 512), 1024)[::128] * np.hanning(1024)
    level = 20 * np.log10(np.abs(np.fft.rfft(frames)).T * 2 / np.hanning(1024).sum() + 1e-6)  # [bins, frames]
    extent = (0, len(x) / rate, 0, rate / 2000)
    image = axis.imshow(level, "magma", aspect="auto", origin="lower", extent=extent, vmin=-100, vmax=-20)
    axis.set_title(title, fontsize=10)
    axis.set(xlabel="seconds", ylim=(0, 24), yticks=range(0, 25, 4))
axes[0].set_ylabel("kHz")
fig.colorbar(image, ax=axes, label="dB re full scale", pad=0.01)
fig.savefig(folder / "spectrograms.png", dpi=120)
Image.open(folder / "spectrograms.png").quantize(96).save(folder / "spectrograms.png", optimize=True)
