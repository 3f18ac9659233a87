"""Run directories, logs, a /proc and an NVML as launch.sh and the trainers leave them.

python tests/helpers/fake_runs.py DIR    a fleet of every kind of run in DIR/logs, with real processes, and
                                         live writers: then `python monitor.py --log_dir DIR/logs`
"""

import json
import math
import random
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

ROOT = Path(__file__).resolve().parent.parent.parent
sys.path.insert(0, str(ROOT))
from snac48.files import finite_json
from snac48.runlog import step_line

NOW = 1_700_000_000.0
SEGMENTS = ((1, 2, 1.0), (3, 4, 2.0), (5, 6, 3.0), (7, 15, 4.0))


def train_record(
    step: int, total: int = 3000, epochs: int = 15, seed: int = 0, t: float | None = None
) -> dict:
    """A step line as the trainer writes it; the losses fall with noise."""
    rng = random.Random(seed * 1_000_003 + step)
    epoch = min(epochs, 1 + (step - 1) * epochs // total)
    segment = next(s for a, b, s in SEGMENTS if a <= epoch <= b)
    x = step / total
    l48 = 0.45 + 1.6 * math.exp(-6 * x) * (1 + 0.02 * seed) + 0.05 * rng.random()
    l24 = 0.40 + 0.5 * math.exp(-4 * x) + 0.04 * rng.random()
    lr = 2e-4 if epoch == 1 else 5e-5 * (0.04 + 0.96 * math.sin(math.pi * min(1, x)) ** 2)
    return {
        "t": (NOW - 2 * (total - step)) if t is None else t,
        "step": step,
        "total_steps": total,
        "epoch": epoch,
        "epochs": epochs,
        "phase": "warmup" if epoch == 1 else "main",
        "segment_length": segment,
        "loss": 0.3 * l24 + l48,
        "loss_24k": l24,
        "loss_48k": l48,
        "lr": lr,
        "audio_s_per_s": 812.5,
        "eta_s": 2.0 * (total - step),
    }


def val_record(step: int, epoch: int, seed: int = 0) -> dict:
    r = train_record(step, seed=seed)
    bump = 0.03 * abs(epoch - 6)  # best at epoch 6
    return {
        "t": r["t"],
        "event": "val",
        "step": step,
        "epoch": epoch,
        "loss": 0.7 + bump,
        "loss_24k": 0.42 + bump,
        "loss_48k": 0.47 + bump,
        "l1_24k": 0.02,
        "stft_24k": 0.4,
        "l1_48k": 0.02,
        "stft_48k": 0.45,
        "lsd_48k": 0.9 + bump,
        "lsd_12_24k": 1.2 + bump,
    }


def dump(records) -> str:
    return "".join(json.dumps(finite_json(r)) + "\n" for r in records)


def train_records(
    upto: int, total: int = 3000, seed: int = 0, every: int = 5, recipe: str = "phase12"
) -> list[dict]:
    out = [{"t": NOW - 2 * total - 5, "event": "start", "kind": "train", "recipe": recipe, "step": 0,
            "total_steps": total, "epochs": 15}]  # fmt: skip
    for step in range(1, upto + 1):
        if step % every == 0 or step == 1:
            out.append(train_record(step, total, seed=seed))
        if step % (total // 15) == 0:
            out.append(val_record(step, step // (total // 15), seed))
            out.append({"t": out[-1]["t"], "event": "checkpoint", "step": step})
    return out


class FakeProc:
    """A /proc of our own: PID -> state letter, session, start ticks."""

    def __init__(self, folder: Path):
        self.folder = folder

    def add(self, pid: int, state: str = "R", ticks: int = 5000, session: int | None = None) -> None:
        d = self.folder / str(pid)
        d.mkdir(parents=True, exist_ok=True)
        rest = " ".join(["0"] * 15)
        session = pid if session is None else session
        (d / "stat").write_text(f"{pid} (py (thon) x) {state} 1 {pid} {session} {rest} {ticks} 0 0\n")

    def remove(self, pid: int) -> None:
        (self.folder / str(pid) / "stat").unlink()


class FakeNvml:
    """Two GPUs; every call counts, and from call `dies_at` on each raises."""

    class NVMLError(Exception):
        pass

    def __init__(self, processes=(), dies_at: int = 10**9, broken=()):
        self.processes, self.dies_at, self.broken, self.calls = processes, dies_at, broken, 0
        self.up = False

    def __getattr__(self, name):
        if not name.startswith("nvml"):
            raise AttributeError(name)

        def call(*args):
            self.calls += 1
            if self.calls >= self.dies_at or name in self.broken:
                self.up &= self.calls < self.dies_at
                raise self.NVMLError("GPU is lost")
            self.up |= name == "nvmlInit"
            if not self.up:
                raise self.NVMLError("Uninitialized")
            i = args[0] if args else 0
            return {
                "nvmlInit": None,
                "nvmlDeviceGetCount": 4,
                "nvmlDeviceGetHandleByIndex": i,
                "nvmlDeviceGetName": b"NVIDIA A100-SXM4-80GB",
                "nvmlDeviceGetUtilizationRates": SimpleNamespace(gpu=80 + i),
                "nvmlDeviceGetMemoryInfo": SimpleNamespace(used=(40 + i) * 10**9, total=80 * 10**9),
                "nvmlDeviceGetPowerUsage": 301_000,
                "nvmlDeviceGetTemperature": 61,
                "nvmlDeviceGetComputeRunningProcesses": [
                    SimpleNamespace(pid=pid, usedGpuMemory=mem)
                    for gpu, pid, mem in self.processes
                    if gpu == i
                ],
            }[name]

        return call


def add_run(root: Path, name: str, kind: str, gpus, pid=None, ticks=5000, records=(), log: str = "") -> Path:
    logs, run_dir = root / "logs", root / "runs" / name
    logs.mkdir(parents=True, exist_ok=True)
    run_dir.mkdir(parents=True, exist_ok=True)
    (logs / f"{name}.json").write_text(
        json.dumps(
            {
                "name": name,
                "kind": kind,
                "gpus": gpus,
                "command": ["python"],
                "run_dir": str(run_dir),
                "started": NOW - 7000,
            }
        )
    )
    if pid:
        (logs / f"{name}.pid").write_text(f"{pid} {ticks} python {kind}.py\n")
    (logs / f"{name}.log").write_text(log)
    if records:
        (run_dir / "metrics.jsonl").write_text(dump(records))
    return run_dir


def human(records) -> str:
    lines = []
    for r in records:
        if r.get("step") and "loss_24k" in r and "event" not in r:
            values = {"loss": r["loss"], "24k": r["loss_24k"], "48k": r["loss_48k"], "lr": r["lr"]}
            lines.append(step_line(r["step"], r["total_steps"], r["epoch"], r["epochs"], r["phase"], values))
    return "\n".join(lines) + "\n"


def file_records(phase: str, n: int = 400, total: int = 1000) -> list[dict]:
    return [
        {
            "t": NOW - (n - i),
            "step": i,
            "total_steps": total,
            "phase": phase,
            "audio_s_per_s": 5000 + i % 50,
            "eta_s": float(total - i),
            "skipped": i // 150,
        }
        for i in range(1, n)
    ]


def rvq_records(n: int = 1438, codebooks: int = 3) -> list[dict]:
    """As train_rvq.py writes them: a cross-entropy for each codebook, the later the higher."""
    out = []
    for i in range(1, n, 10):
        ce = [2 + k / 2 + (6 - k / 2) * math.exp(-i / 300) for k in range(codebooks)]
        loss = sum(ce) / codebooks
        sums = {"ppl": math.exp(loss), "bits_per_s": 900 - i / 10, "ce": ce}
        epoch = 1 + i // 400
        out.append({"t": NOW - 1.5 * (n - i), "step": i, "total_steps": 4 * n, "epoch": epoch, "epochs": 350,
                    "phase": "train", "loss": loss, "lr": 2e-4, "eta_s": 9000.0, **sums})  # fmt: skip
        if i // 400 > (i - 10) // 400:
            out.append({"event": "val", "step": i, "epoch": epoch - 1, "val_loss": loss + 0.1, **sums})
    return out


def one_head_records(head: str, upto: int = 1480) -> list[dict]:
    """phase11 ("48k") or phase10 ("24k", the full codec): one head, its loss the loss, codebooks counted."""
    other, out = {"24k": "48k", "48k": "24k"}[head], []
    for r in train_records(upto, recipe="phase10" if head == "24k" else "phase11-fast"):
        r = {
            k: v for k, v in r.items() if not k.endswith(other) and not (head == "24k" and k == "lsd_12_24k")
        }
        if f"loss_{head}" in r:
            r["loss"] = r[f"loss_{head}"]
        if r.get("event") == "val":
            r |= {"best": ["loss", f"loss_{head}"] if r["epoch"] <= 6 else [], f"lsd_{head}": 1.0}
        out.append(r)
        if head == "24k" and r.get("event") == "val":
            books = {f"usage_{k}": 1 - 0.1 * k for k in range(3)} | {
                f"perplexity_{k}": 900.0 for k in range(3)
            }
            out.append({"event": "usage", "step": r["step"], "epoch": r["epoch"], **books})
        elif head == "24k" and "loss" in r:
            r |= {"phase": "features" if r["epoch"] == 1 else "main", "commitment": 0.02, "codebook": 0.02}
    return out


def older_log(epochs: int = 5, batches: int = 40, best: int = 4) -> str:
    """The log of an older training of both heads: banners, tqdm bars, blocks of several lines."""
    text, lowest = "PHASE 1: WARMUP\n" + "=" * 60 + "\n", math.inf
    for e in range(1, epochs + 1):
        text += "PHASE 2: MAIN TRAINING\n" if e == 2 else ""
        for what, n in (("Train", batches), ("Val", 8)):
            for i in range(0, n + 1, 2):
                loss = 2 / e - i / 1000
                at, left = (f"{x // 240:02d}:{x // 4 % 60:02d}" for x in (i, n - i))
                text += f"\rEpoch {e}/{epochs} [{what}]: {100 * i // n}%|##   | {i}/{n} [{at}<{left}, "
                text += f"4.00it/s, loss={loss:.4f}, 24k=0.6, 48k={loss:.4f}, lr=5e-05]"
            bump = (what == "Train") + 0.1 * abs(e - best)
            text += f"\nEpoch {e} [{what}]:\n  24kHz: Loss={0.85 + bump:.4f} (L1=0.0200, STFT=0.7000)\n"
            text += f"  48kHz: Loss={0.95 + bump:.4f} (L1=0.0300, STFT=0.8000)\n"
            if what == "Val" and 0.95 + bump < lowest:
                lowest = 0.95 + bump
                text += "  → New best 48kHz model!\n"
    return text


def fleet_of_every_kind(root: Path) -> FakeProc:
    """Eight runs: fine, dead of OOM, finished, NaN, caching, precomputing, RVQ, and a log of old."""
    proc = FakeProc(root / "proc")
    for pid in (103, 102, 110, 111, 112):
        proc.add(pid)
    r = train_records(1480)
    add_run(root, "train_gpu3", "train", [3], 103, records=r, log=human(r))
    r = train_records(700, seed=1)
    oom = 'Traceback (most recent call last):\n  File "train_dual_head.py", line 1, in <module>\n'
    oom += "torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 2.00 GiB\n"
    add_run(root, "train_gpu0", "train", [0], 100, records=r, log=human(r) + oom)
    r = [
        *train_records(3000, seed=2, recipe="phase11-fast"),
        {"t": NOW, "event": "end", "reason": "finished", "step": 3000},
    ]
    add_run(root, "train_gpu1", "train", [1], 101, records=r, log=human(r))
    r = train_records(900, seed=3)
    r[-1] |= {"loss": math.nan, "loss_48k": math.inf}
    r.append({"t": NOW, "event": "skip", "step": 901, "reason": "non-finite loss"})
    add_run(root, "train_gpu2", "train", [2], 102, records=r, log=human(r))
    add_run(root, "cache_gpu0", "cache", [0], 110, records=file_records("cache"))
    add_run(root, "precompute_gpu1", "precompute", [1], 111, records=file_records("precompute"))
    add_run(root, "rvq_gpu0", "rvq", [0], 112, records=rvq_records())
    old = "".join(
        f"\rEpoch 4/10:  {i // 10}%|###   | {i}/1000 [00:10<00:30,  loss={1 - i / 2000:.4f}, 24k=0.61, "
        f"48k=0.50, lr=5.00e-05]"
        for i in range(0, 1001, 50)
    )
    old += "\nEpoch 4 [Train]: Loss=0.6100, 24kHz=0.6000, 48kHz=0.5000\n"
    old += "Epoch 4 [Val]: Loss=0.6500, 24kHz=0.6300, 48kHz=0.5200\n"
    (root / "logs" / "phase10_old.log").write_text(old)
    return proc


def real_process(root: Path, name: str, seconds: int = 3600) -> subprocess.Popen:
    """A sleeping process in a session of its own, with the PID file launch.sh would have written."""
    p = subprocess.Popen(["sleep", str(seconds)], start_new_session=True)
    ticks = Path(f"/proc/{p.pid}/stat").read_text().rsplit(")", 1)[1].split()[19]
    (root / "logs").mkdir(parents=True, exist_ok=True)
    (root / "logs" / f"{name}.pid").write_text(f"{p.pid} {ticks} sleep {seconds}\n")
    return p


if __name__ == "__main__":
    here = Path(sys.argv[1])
    fleet_of_every_kind(here)
    live = [
        real_process(here, n)
        for n in ("train_gpu3", "train_gpu2", "cache_gpu0", "precompute_gpu1", "rvq_gpu0")
    ]
    files = [open(here / "runs" / f"train_gpu{g}" / "metrics.jsonl", "a") for g in (3, 2)]
    logs = [open(here / "logs" / f"train_gpu{g}.log", "a") for g in (3, 2)]
    try:
        for step in range(1481, 3001):
            for f, log, seed in zip(files, logs, (0, 3)):
                r = train_record(step - 580 * (seed == 3), seed=seed, t=time.time())
                f.write(dump([r]))
                log.write(human([r]))
                f.flush()
                log.flush()
            time.sleep(1)
    finally:
        for p in live:
            p.kill()
            p.wait()
