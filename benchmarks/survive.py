"""Kill programs with -9 at random moments, inside their writes too, damage what they left, fail their disks,
and start them again: is the result that of a run that was never disturbed?

    OMP_NUM_THREADS=1 python benchmarks/survive.py --kills 50 --seed 1                       # train
    OMP_NUM_THREADS=1 python benchmarks/survive.py --kills 20 --seed 1 --programs adversarial
    OMP_NUM_THREADS=1 python benchmarks/survive.py --kills 200 --programs train,train2,rvq,cache,precompute

Makes tiny speech and a tiny codec and runs each program unbroken, then again and again: every life is ended
at a random moment, every third one while a file is being written. train: train_dual_head.py; train2: the same
as two processes, of which torchrun, one rank or all are killed; adversarial: with discriminators at the end;
rvq: train_rvq.py; cache: cache_codes.py, every second time two of it on one folder; precompute:
precompute_48k.py, likewise.

Between lives: the newest checkpoint is damaged (a bit flipped, truncated, emptied), or the clock is set back
(all files lie a day in the future). In lives (benchmarks/faults.c, preloaded): a disk that is full, an input
that cannot be read (EIO); or the processes are stopped (SIGSTOP) before the kill. What ends by itself must
say why in one sentence. Compares weights, averages and optimiser of the last checkpoint and the samples that
the committed steps saw; codes row by row; targets byte by byte. Nothing may be there twice, missing or left
over. Exit code 1 where anything differs.
"""

import argparse
import collections
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
import pyarrow.parquet as pq
import soundfile as sf
from conftest import make_snac, save_snac, voice

from snac48.checkpoint import load_checkpoint

EPOCHS = 6
ADVERSARIAL = ("--adv_weight", "1", "--adv_epochs", "2", "--disc_width", "1", "--heads", "48k")


# ---- data and commands ----


def prepare(folder: Path) -> None:
    for i in range(15):
        (folder / "audio").mkdir(parents=True, exist_ok=True)
        sf.write(folder / "audio" / f"{i:02d}.wav", voice(0.5 + 0.1 * i, 48000, i), 48000)
    save_snac(make_snac(), folder / "codec")
    subprocess.run(cache_command(folder, folder / "codes"), check=True, stdout=subprocess.DEVNULL)


def script(name: str, **flags) -> list[str]:
    return [sys.executable, str(ROOT / name), *(x for k, v in flags.items() for x in (f"--{k}", str(v)))]


def cache_command(folder: Path, out: Path) -> list[str]:
    return script("cache_codes.py", data_dir=folder / "audio", output_dir=out, device="cpu", num_workers=0,
                  pretrained_model=folder / "codec", min_seconds=0.1, rows_per_file=2)  # fmt: skip


def precompute_command(folder: Path, out: Path) -> list[str]:
    return script(
        "precompute_48k.py", input_dir=folder / "audio", output_dir=out, device="cpu", num_workers=1
    )


def rvq_command(folder: Path, out: Path) -> list[str]:
    flags = {
        "data": folder / "codes",
        "save_dir": out,
        "device": "cpu",
        "num_workers": 0,
        "ctx": 12,
        "batch": 2,
    }
    flags |= {"accum": 2, "epochs": 4, "d_model": 16, "layers": 1, "heads": 2, "depth_layers": 1, "step": 2}
    flags |= {"eval-audio-every": 0, "eval-decoder": "none", "archive-every": 0, "save-every-steps": 2}
    return script("train_rvq.py", **flags)


def command(folder: Path, out: Path, *more: str) -> list[str]:
    return [sys.executable, str(ROOT / "train_dual_head.py"), "--cache_dir", str(folder / "codes"),
            "--val_cache_dir", str(folder / "codes"), "--audio_48k_dir", str(folder / "audio"),
            "--val_audio_48k_dir", str(folder / "audio"), "--pretrained_model", str(folder / "codec"),
            "--output_dir", str(out), "--device", "cpu", "--epochs", str(EPOCHS), "--warmup_epochs", "2",
            "--epoch_ranges", f"1-3,4-{EPOCHS}", "--segment_schedule", "0.3,0.5",
            "--batch_multiplier", "1.0,1.0",
            "--batch_size", "4", "--val_segment", "0.3", "--val_limit", "2", "--num_workers", "0",
            "--save_every_batches", "1", "--ema", "0.9", "--sample_log", "--log_every", "1",
            "--main_lr", "1e-3", "--target_kind", "recordings",
            "--deterministic", "--resume", "auto", *more]  # fmt: skip


def two_processes(folder: Path, out: Path) -> list[str]:
    return [sys.executable, "-m", "snac48.torchrun", "--nproc_per_node", "2", "--standalone",
            "--signals_to_handle", "SIGTERM,SIGINT,SIGUSR1", *command(folder, out)[1:]]  # fmt: skip


# ---- what must be equal ----


def differences(one: Path, other: Path) -> list[str]:
    found = []
    x, y = (load_checkpoint(p / f"checkpoint_epoch{EPOCHS}.pt") for p in (one, other))
    pairs = [("", x, y)]
    if "adversarial" in x:
        pairs.append(("adversarial ", x["adversarial"], y["adversarial"]))
    for whose, a, b in pairs:
        for part in ("model",) if whose else ("model", "ema"):
            found += [f"{whose}{part} {k}" for k in a[part] if not torch.equal(a[part][k], b[part][k])]
        found += optimizer_differences(whose, a["optimizer"], b["optimizer"])
    if x["best"] != y["best"]:
        found.append("best")
    return found


def optimizer_differences(whose: str, a: dict, b: dict) -> list[str]:
    theirs = b["state"]
    same = lambda i, k, v: torch.equal(torch.as_tensor(v), torch.as_tensor(theirs[i][k]))
    states = a["state"].items()
    return [f"{whose}optimizer {i} {k}" for i, s in states for k, v in s.items() if not same(i, k, v)]


def check_samples(out: Path, rows: int) -> list[str]:
    """What is wrong in the committed sample logs of all ranks: every row once an epoch."""
    epochs: dict[str, list[int]] = {}
    for path in out.glob("samples.rank*.log"):
        for line in path.read_text().splitlines():
            _, epoch, *seen = line.split()
            epochs.setdefault(epoch, []).extend(map(int, seen))
    wanted = {str(e): list(range(rows)) for e in range(1, EPOCHS + 1)}
    return [] if {e: sorted(r) for e, r in epochs.items()} == wanted else [f"samples {epochs}"]


def train_differences(one: Path, other: Path) -> list[str]:
    return differences(one, other) + check_samples(other, 15)


def rvq_differences(one: Path, other: Path) -> list[str]:
    x, y = (load_checkpoint(next(p.glob("rvq_*_latest.pt"))) for p in (one, other))
    tensors = [(k, v, y["model"][k]) for k, v in x["model"].items()]
    tensors += [(f"ema {k}", v, y["ema"][k]) for k, v in (x.get("ema") or {}).items()]
    found = [name for name, a, b in tensors if not torch.equal(a, b)]
    found += optimizer_differences("", x["optimizer"], y["optimizer"])
    return found + ["step"] * (x["global_step"] != y["global_step"])


def cache_differences(one: Path, other: Path) -> list[str]:
    def rows(folder: Path) -> list[dict]:
        tables = (pq.read_table(p).to_pylist() for p in sorted(folder.glob("*.parquet")))
        return sorted((r for t in tables for r in t), key=lambda r: r["file_path"])

    x, y = rows(one), rows(other)
    if [r["file_path"] for r in x] != [r["file_path"] for r in y]:
        return [f"{len(x)} rows there, {len(y)} here"]
    told = [json.loads((p / "metadata.json").read_text())["rows"] for p in (one, other)]
    return [r["file_path"] for r, s in zip(x, y) if r != s] + ["metadata.json"] * (told[0] != told[1])


def target_differences(one: Path, other: Path) -> list[str]:
    def content(folder: Path) -> dict:
        rows = sorted((folder / "manifest.jsonl").read_text().splitlines())
        return {p.name: p.read_bytes() for p in folder.glob("*.wav")} | {"manifest.jsonl": rows}

    x, y = content(one), content(other)
    return [name for name in x.keys() | y.keys() if x.get(name) != y.get(name)]


@dataclass
class Program:
    argv: object  # (folder, output folder) -> command
    differences: object  # (unbroken output, the other) -> phrases
    written: str = ".*.pt.*.tmp"  # glob of its half-written files
    checkpoints: str = ""  # glob of those that may be damaged
    processes: int = 1  # of it at work at once, every second run
    env: dict = field(default_factory=dict)


CHECKPOINTS = "checkpoint_*.pt"
PROGRAMS = {
    "train": Program(command, train_differences, checkpoints=CHECKPOINTS),
    "train2": Program(two_processes, train_differences, checkpoints=CHECKPOINTS),
    "adversarial": Program(
        lambda folder, out: command(folder, out, *ADVERSARIAL), train_differences, checkpoints=CHECKPOINTS
    ),
    "rvq": Program(rvq_command, rvq_differences),
    "cache": Program(cache_command, cache_differences, ".*.parquet.*.tmp", processes=2),
    "precompute": Program(precompute_command, target_differences, ".*.wav.*.tmp", processes=2),
}


# ---- one life ----


def one_life(argv: list[str], out: Path, seconds: float, in_write: bool, least=0, written=".*.pt.*.tmp"):
    """(exit code, whether a half-written file was left, stderr) of a run killed after that long, in_write:
    while it writes a file, when there are `least` whole checkpoints."""
    with tempfile.TemporaryFile("w+") as errors:
        process = subprocess.Popen(argv, stdout=subprocess.DEVNULL, stderr=errors, env=environment())
        began = time.time()
        while process.poll() is None:
            late = time.time() - began > seconds and len(list(out.glob(CHECKPOINTS))) >= least
            if late and (not in_write or any(out.glob(written))):
                process.kill()
                process.wait()
            time.sleep(0 if late else 0.01)
        errors.seek(0)
        return process.returncode, any(out.glob(".*.pt.*.tmp")), errors.read()


def environment(**more) -> dict:
    return {**os.environ, "PYTHONPATH": str(ROOT)} | more


def members(mark: str) -> list[int]:
    """The living processes that carry SURVIVE=mark, of whatever session."""
    found = []
    for name in filter(str.isdigit, os.listdir("/proc")):
        try:
            carries = f"SURVIVE={mark}\0".encode() in Path(f"/proc/{name}/environ").read_bytes() + b"\0"
            alive = Path(f"/proc/{name}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
        except OSError:
            continue
        found += [int(name)] * (carries and alive)
    return found


def end(mark: str, first: list[subprocess.Popen], how: str, rng: random.Random) -> float:
    """Kill -9: those that we started, one of all, or all. Returns how long the others outlived them."""
    victims = members(mark)
    if how == "stop":
        for pid in victims:
            os.kill(pid, signal.SIGSTOP)
        time.sleep(rng.uniform(0.1, 1.5))
    chosen = {"one": [rng.choice(victims)] if victims else [], "all": victims}.get(
        how, [p.pid for p in first]
    )
    for pid in chosen:
        try:
            os.kill(pid, signal.SIGKILL)
        except ProcessLookupError:
            continue
    began = time.time()
    for pid in members(mark) if how == "stop" else ():  # the kernel ends those that have lost their parent
        os.kill(pid, signal.SIGCONT)
    while members(mark) and time.time() - began < 120:
        time.sleep(0.05)
    for process in first:
        process.poll()
    return time.time() - began


def damage(out: Path, how: str) -> None:
    newest = max(out.glob(CHECKPOINTS), key=lambda p: p.stat().st_mtime)
    data, stat = bytearray(newest.read_bytes()), newest.stat()
    if how == "bit":
        data[len(data) // 3] ^= 4
    newest.write_bytes({"bit": data, "truncated": data[: len(data) // 2], "empty": b""}[how])
    os.utime(newest, ns=(stat.st_atime_ns, stat.st_mtime_ns))


def set_clock_back(out: Path) -> None:
    for path in out.rglob("*"):
        stat = path.lstat()
        os.utime(path, (stat.st_atime + 86400, stat.st_mtime + 86400), follow_symlinks=False)


class Trial:
    """One program against one unbroken run of it."""

    def __init__(self, name: str, folder: Path, rng: random.Random, shim: Path | None):
        self.name, self.program, self.folder, self.rng, self.shim = name, PROGRAMS[name], folder, rng, shim
        self.whole, self.out = folder / f"{name}.whole", folder / f"{name}.killed"
        self.counts, self.wrong, self.longest, self.serial = collections.Counter(), [], 0.0, 0
        began = time.time()
        argv = self.program.argv(folder, self.whole)
        done = subprocess.run(argv, capture_output=True, text=True, env=environment())
        if done.returncode:
            raise SystemExit(f"{name} unbroken: {done.stderr[-2000:]}")
        self.length = time.time() - began

    def run(self, kills: int) -> None:
        """Runs that finish start over, until the kills are spent."""
        while self.counts["kills"] < kills:
            shutil.rmtree(self.out, ignore_errors=True)
            self.counts["runs"] += 1
            while not self.life(last=self.counts["kills"] >= kills):
                pass
            self.wrong += [f"{self.name}: {what}" for what in self.program.differences(self.whole, self.out)]
            self.wrong += [f"{self.name}: left over {p.name}" for p in self.out.rglob("*.tmp")]

    def fault(self, last: bool) -> str:
        if last:
            return ""
        n, kinds = self.counts["kills"] + self.counts["faults"], ["full", "eio", "clock", "damage"]
        return self.rng.choice(kinds) if n % 4 == 3 else "write" if n % 3 == 2 else "kill"

    def life(self, last: bool) -> bool:
        """Whether the run has finished."""
        fault, env = self.fault(last), {}
        if fault == "clock":
            set_clock_back(self.out)
        if fault == "damage" and self.program.checkpoints and len(list(self.out.glob(CHECKPOINTS))) > 1:
            damage(self.out, self.rng.choice(("bit", "truncated", "empty")))
            self.counts["damaged"] += 1
        if fault in ("full", "eio") and self.shim:
            env = {"LD_PRELOAD": str(self.shim), "FAULT_DIR": str(self.out)}
            env["FAULT_FULL_AFTER"] = str(self.rng.randrange(100, 200_000))
            if fault == "eio":
                env = {"LD_PRELOAD": str(self.shim), "FAULT_DIR": str(self.folder / "audio")}
                env["FAULT_EIO_AFTER"] = str(self.rng.randrange(200))
        self.serial += 1
        mark = f"{os.getpid()}.{self.name}.{self.serial}"
        env = environment(SURVIVE=mark, **env)
        number = self.program.processes if self.counts["runs"] % 2 else 1
        errors = tempfile.TemporaryFile("w+")
        how = {"env": env, "stdout": subprocess.DEVNULL, "stderr": errors}
        first = [subprocess.Popen(self.program.argv(self.folder, self.out), **how) for _ in range(number)]
        killed = self.wait(mark, first, fault, last)
        errors.seek(0)
        return self.judge(first, fault, killed, errors.read())

    def wait(self, mark: str, first: list, fault: str, last: bool) -> bool:
        """Until they end, or are killed: which it was."""
        began, limit = time.time(), self.rng.uniform(0.3, 1.1) * self.length
        while any(p.poll() is None for p in first):
            late = not last and fault not in ("full", "eio") and time.time() - began > limit
            if late and (fault != "write" or any(self.out.rglob(self.program.written))):
                who = self.rng.choice(("first", "one", "all", "stop"))
                self.counts["in a write"] += any(self.out.rglob(self.program.written))
                self.longest = max(self.longest, end(mark, first, who, self.rng))
                for process in first:
                    process.wait()
                self.counts["kills"] += 1
                self.counts[f"killed: {who}"] += 1
                if left := members(mark):
                    self.wrong.append(f"{self.name}: {len(left)} processes outlived {who} by two minutes")
                return True
            if time.time() - began > 20 * self.length + 120:
                self.wrong.append(f"{self.name}: hangs after {fault or 'a start'}")
                end(mark, first, "all", self.rng)
            time.sleep(0.005 if late else 0.02)
        return False

    def judge(self, first: list, fault: str, killed: bool, said: str) -> bool:
        codes = [p.returncode for p in first]
        if killed:
            return False
        if fault in ("full", "eio", "clock", "damage"):
            self.counts["faults"] += 1
            self.counts[f"fault: {fault}"] += 1
        if not any(codes):
            return True
        if "Traceback" in said or (": error: " not in said and not {3, 5} & set(codes)):
            self.wrong.append(f"{self.name}: {codes} after {fault or 'a start'}: {said[-600:]}")
        if fault not in ("full", "eio"):
            self.counts["refused or ended"] += 1
            if self.counts["refused or ended"] > 20:
                raise SystemExit(f"{self.name} does not go on: {said[-2000:]}")
        return False


# ---- all ----


def build_shim(folder: Path) -> Path | None:
    """faults.c as a library; None where there is no compiler."""
    shim = folder / "faults.so"
    argv = ["cc", "-O1", "-shared", "-fPIC", "-o", str(shim), str(ROOT / "benchmarks/faults.c"), "-ldl"]
    if not shutil.which("cc"):
        print("no cc: the disks do not fail", flush=True)
        return None
    subprocess.run(argv, check=True)
    return shim


def main() -> int:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--kills", type=int, default=50, help="of all programs together")
    p.add_argument("--seed", type=int, default=1)
    p.add_argument("--programs", default="train", help=f"of {', '.join(PROGRAMS)}")
    p.add_argument("--no_faults", action="store_true", help="kills and damage alone, the disks are well")
    args = p.parse_args()
    names = args.programs.split(",")
    folder, wrong, kills = Path(tempfile.mkdtemp(prefix="survive")), [], 0
    prepare(folder)
    shim = None if args.no_faults else build_shim(folder)
    for i, name in enumerate(names):
        trial = Trial(name, folder, random.Random(args.seed + i), shim)
        trial.run(args.kills // len(names) + (i < args.kills % len(names)))
        counted = ", ".join(f"{k} {n}" for k, n in sorted(trial.counts.items()))
        result = (
            f"{len(trial.wrong)} wrong, first {trial.wrong[0]}"
            if trial.wrong
            else "equal to the unbroken run"
        )
        outlived = f"others outlived the killed by {trial.longest:.1f} s at most"
        print(f"{name} ({trial.length:.0f} s unbroken): {counted}; {outlived}: {result}", flush=True)
        wrong += trial.wrong
        kills += trial.counts["kills"]
    print(f"{kills} kills, {len(wrong)} wrong")
    shutil.rmtree(folder)
    return bool(wrong)


if __name__ == "__main__":
    sys.exit(main())
