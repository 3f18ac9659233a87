"""The listening page of an evaluation: index.html beside the wavs, opened from disk, without a server.

A page that was opened from disk may read no file, but it may run scripts: the samples of clip NNN lie, as
base64, in audio/NNN.js, which calls clip(NNN, {system: [rate, samples]}). What the page does stands in
listening.html.
"""

import base64
import json
from pathlib import Path

import numpy as np
import soundfile as sf

from .files import atomic_file, finite_json
from .measures import METRICS

TEMPLATE = Path(__file__).with_name("listening.html")


def wav_name(system: str) -> str:
    return system.replace(":", "_").replace("/", "_")


class ListeningPage:
    """folder: of index.html, NNN_SYSTEM.wav and audio/NNN.js. clips: what has been added."""

    def __init__(self, folder: str):
        self.folder, self.clips = Path(folder), []

    @property
    def systems(self) -> list[str]:
        """Every system of any clip, in the order in which they came."""
        return list(dict.fromkeys(name for clip in self.clips for name in clip["wavs"]))

    def add(self, name: str, signals: dict, metrics: dict) -> None:
        """Write a clip's wavs and samples. signals: {system: (float [N], rate)}, all of the
        same length in seconds; metrics: {system: {metric: value}}."""
        number, wavs, samples = f"{len(self.clips):03d}", {}, {}
        (self.folder / "audio").mkdir(parents=True, exist_ok=True)
        for system, (audio, rate) in signals.items():
            wavs[system] = f"{number}_{wav_name(system)}.wav"
            pcm = np.clip(np.rint(audio * 32768), -32768, 32767).astype("<i2")
            sf.write(self.folder / wavs[system], pcm, rate, subtype="PCM_16")
            samples[system] = [rate, base64.b64encode(pcm.tobytes()).decode()]
        with atomic_file(self.folder / "audio" / f"{number}.js", "w", encoding="utf-8") as f:
            f.write(f"clip({len(self.clips)}, {as_script(samples)});\n")
        self.clips.append({"name": name, "file": f"audio/{number}.js", "wavs": wavs, "metrics": metrics})

    def save(self, results: dict) -> Path:
        """Write index.html and return its path. results: the JSON of evaluate.py."""
        data = {"systems": self.systems, "clips": self.clips, "metrics": METRICS, "results": results}
        page = TEMPLATE.read_text(encoding="utf-8").replace("/*DATA*/", as_script(data))
        with atomic_file(self.folder / "index.html", "w", encoding="utf-8") as f:
            f.write(page)
        return self.folder / "index.html"


def as_script(value) -> str:
    """JSON that may stand inside <script>: a name of a file can't end it."""
    return json.dumps(finite_json(value), separators=(",", ":")).replace("<", "\\u003c")
