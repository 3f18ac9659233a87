"""Are several processes one training? And how much faster?

    OMP_NUM_THREADS=1 python benchmarks/ranks.py                          # tiny, on the CPU, a few minutes
    python benchmarks/ranks.py --gpus 0,1,2,3 --only speed -- --codes_dir codes --epochs 1 --limit 20000

Trains a tiny codec's decoder by launch.sh as one process, then as two "machines" of two processes each (gloo,
two torchruns on this machine), with the same global batch, then the second way again with a stop in the
middle and a resume. Prints whether every step saw the same rows, and the largest difference of a weight and
of a loss. Then audio seconds a second of one process and of all of --gpus, in alternation. Flags behind --
are the training's that is measured. Exit code 1 where anything differs.
"""

import argparse
import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]
import survive

from snac48.checkpoint import load_checkpoint

# At rates as of a real training Adam turns the rounding of tiny gradients into steps of their own: two orders
# of summation are then as far apart as that, whatever the number of processes.
RATES = ["--lr", "1e-5", "--main_lr", "1e-5", "--lr_24k_final_conv", "1e-5"]


def tiny_flags(folder: Path, out: Path) -> list[str]:
    """Of a run of 24 steps in 6 epochs over 15 utterances, but for device and resume."""
    flags = survive.command(folder, out)[2:]
    for flag in ("--device", "--resume"):
        at = flags.index(flag)
        flags[at : at + 2] = []
    return flags + RATES


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def launch(gpus: str, flags: list[str], logs: Path, script="train", **env) -> subprocess.Popen:
    """launch.sh in the foreground, with logs in a folder of its own."""
    env = os.environ | {"LOG_DIR": str(logs), "VENV": sys.prefix, "FOREGROUND": "1", "START_WATCH": "0"} | env
    command = [str(ROOT / "launch.sh"), script, gpus, *flags]
    return subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def two_machines(flags: list[list[str]], logs: Path, script="train") -> list[subprocess.Popen]:
    """Two processes on each of two "machines"; flags of each."""
    env = {"NNODES": "2", "MASTER": f"127.0.0.1:{free_port()}"}
    return [launch("cpu,cpu", flags[k], logs, script, NODE_RANK=str(k), **env) for k in (0, 1)]


def finished(jobs: list[subprocess.Popen], codes=(0,), seconds=300) -> list[str]:
    """What they printed, when they have ended with one of these codes."""
    said = [job.communicate(timeout=seconds)[0] for job in jobs]
    for job, text in zip(jobs, said):
        assert job.returncode in codes, f"exit code {job.returncode}\n{text}"
    return said


def rows_seen(out: Path) -> dict[int, list[int]]:
    """{step: rows of all ranks} of the committed sample logs."""
    seen: dict[int, list[int]] = {}
    for path in out.glob("samples.rank*.log"):
        for line in path.read_text().splitlines():
            step, _, *rows = map(int, line.split())
            seen.setdefault(step, []).extend(row for row in rows if row >= 0)
    return {step: sorted(rows) for step, rows in seen.items()}


def losses(out: Path) -> dict[int, float]:
    lines = map(json.loads, (out / "metrics.jsonl").read_text().splitlines())
    return {m["step"]: m["loss_48k"] for m in lines if "event" not in m}


def compare(a: Path, b: Path) -> tuple[bool, float, float]:
    """(the same rows in every step, largest difference of a weight, and of a loss relative to it)."""
    x, y = (load_checkpoint(out / f"checkpoint_epoch{survive.EPOCHS}.pt")["model"] for out in (a, b))
    weights = max(float((x[k] - y[k]).abs().max()) for k in x)
    p, q = losses(a), losses(b)
    apart = max(abs(p[step] - q[step]) / p[step] for step in p) if p.keys() == q.keys() else float("inf")
    return rows_seen(a) == rows_seen(b), weights, apart


def stop_at(jobs: list[subprocess.Popen], out: Path, step: int) -> list[str]:
    """SIGTERM to the first machine's launcher after that step; all processes stop."""
    while not (out / "metrics.jsonl").exists() or max(losses(out), default=0) < step:
        assert all(job.poll() is None for job in jobs), [job.communicate()[0] for job in jobs]
        time.sleep(0.05)
    jobs[0].terminate()
    return finished(jobs, codes=(3,))


def equality(folder: Path) -> bool:
    one, two, stopped, logs = (folder / name for name in ("one", "two", "stopped", "logs"))
    finished([launch("cpu", tiny_flags(folder, one), logs)])
    finished(two_machines([tiny_flags(folder, two)] * 2, logs))
    stop_at(two_machines([tiny_flags(folder, stopped)] * 2, logs), stopped, 9)
    kept = sorted(path.name for path in stopped.glob("checkpoint_*.pt"))
    finished(two_machines([tiny_flags(folder, stopped)] * 2, logs))
    good = True
    for what, out in (("2 x 2 processes", two), (f"stopped ({kept[-1]}) and resumed", stopped)):
        rows, weights, apart = compare(one, out)
        print(f"{what} against one: rows {'equal' if rows else 'DIFFER'}, weights to {weights:.1e}, losses "
              f"to {apart:.1e} of their value", flush=True)  # fmt: skip
        good = good and rows and weights <= 1e-6 and apart <= 1e-5
    return good


def speed(gpus: str, flags: list[str], folder: Path, number: int) -> float:
    """Audio seconds a second: the median of the main phase's lines."""
    out = folder / f"speed{number}"
    said = finished([launch(gpus, [*flags, "--output_dir", str(out)], folder / "logs")], seconds=None)
    lines = map(json.loads, (out / "metrics.jsonl").read_text().splitlines())
    found = [m["audio_s_per_s"] for m in lines if "event" not in m and m["phase"] == "main"]
    assert found, said
    return median(found)


def main() -> int:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--gpus", default="cpu,cpu", help="of the measurement")
    p.add_argument("--repeats", type=int, default=3, help="of it, in alternation")
    p.add_argument("--only", choices=("equality", "speed"), help="(default: both)")
    p.add_argument("flags", nargs="*", help="of the training that is measured (default: the tiny one)")
    args = p.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="ranks"))
    survive.prepare(folder)
    good = args.only == "speed" or equality(folder)
    if args.only != "equality":
        tiny = [*tiny_flags(folder, folder / "x"), "--batch_size", "8", "--segment_schedule", "1.0,1.0"]
        first, found = args.gpus.partition(",")[0], []
        for n in range(args.repeats):
            pair = [speed(g, args.flags or tiny, folder, 2 * n + i) for i, g in enumerate((first, args.gpus))]
            found.append(pair)
        one, all_ = (median(column) for column in zip(*found))
        ratio = median(b / a for a, b in found)
        print(f"audio-s/s: {one:.2f} on {first}, {all_:.2f} on {args.gpus}: {ratio:.2f} times", flush=True)
    shutil.rmtree(folder)
    return not good


if __name__ == "__main__":
    sys.exit(main())
