"""What precompute_48k.py costs around SIDON; that any number of processes, killed or not, write the same.

python benchmarks/precompute.py processes FOLDER     # a folder of recordings, through the stand-in for SIDON
python benchmarks/precompute.py cpu FOLDER           # CPU milliseconds an audio second, stage by stage
python benchmarks/precompute.py memory               # two 2-hour files: peak memory of all processes
"""

import argparse
import hashlib
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

os.environ["OPENBLAS_NUM_THREADS"] = os.environ["OMP_NUM_THREADS"] = "1"  # before numpy starts its threads

import numpy as np
import soundfile as sf

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from snac48.audio import Spool, audio_blocks, find_audio


def command(source: Path, out: Path, modules: Path, workers: int, *more) -> list[str]:
    args = ["--input_dir", source, "--output_dir", out, "--sidon_dir", modules, "--device", "cpu"]
    script = [sys.executable, "-W", "ignore", ROOT / "precompute_48k.py"]
    return [str(a) for a in [*script, *args, "--num_workers", workers, *more]]


def digest(out: Path) -> str:
    whole = hashlib.sha256()
    for path in sorted(out.rglob("*.wav")):
        whole.update(str(path.relative_to(out)).encode() + hashlib.sha256(path.read_bytes()).digest())
    return whole.hexdigest()[:16]


def report(name: str, out: Path, files: int, seconds: float) -> None:
    rows = [json.loads(line) for line in (out / "manifest.jsonl").read_text().splitlines()]
    summary = json.loads((out / "summary.json").read_text())
    once = len({r["path"] for r in rows}) == len(rows) and len(rows) + summary["skipped"] == files
    wavs = len(list(out.rglob("*.wav")))
    cells = [name, len(rows), summary["skipped"], wavs, "yes" if once else "NO", digest(out)]
    print("|", *(f"{c} |" for c in cells), f"{summary['seconds'] / seconds:.0f} |", flush=True)


def processes(source: Path, work: Path, modules: Path, files: int) -> None:
    print("| processes | rows | skipped | wavs | every file once | SHA-256 of all wavs | audio-s/s |")
    print("|---|---|---|---|---|---|---|")
    quiet = {"stdout": subprocess.DEVNULL}
    for count in (1, 2, 4):
        out = work / f"out{count}"
        start = time.monotonic()
        running = [subprocess.Popen(command(source, out, modules, 1), **quiet) for _ in range(count)]
        assert [p.wait() for p in running] == [0] * count
        report(str(count), out, files, time.monotonic() - start)
        if count > 1:
            shutil.rmtree(out)
    out = work / "killed"
    start = time.monotonic()
    running = [subprocess.Popen(command(source, out, modules, 1), **quiet) for _ in range(3)]
    for _ in range(2):
        victim = subprocess.Popen(command(source, out, modules, 1), **quiet)
        while victim.poll() is None:  # until it is in the middle of a unit
            claims = [json.loads(p.read_text())["pid"] for p in (out / "work").glob("*.claim")]
            if victim.pid in claims:
                break
            time.sleep(0.02)
        time.sleep(0.3)
        victim.send_signal(signal.SIGKILL)
        assert victim.wait() == -signal.SIGKILL
    running.append(subprocess.Popen(command(source, out, modules, 1), **quiet))
    assert [p.wait() for p in running] == [0] * 4
    report("4, one of them killed -9 twice", out, files, time.monotonic() - start)


def write(restored, target: Path, rate: int) -> None:
    """As precompute_48k.py does."""
    spool = Spool(target.parent)
    with spool.file:
        for piece in restored:
            spool.add(piece)
        spool.save(target, rate, restored.measured()["scale"])


def cpu(source: Path, work: Path, modules: Path, files: list[str]) -> None:
    """Stages in this process, over the same files; CPU time, not the clock, so a shared machine will do."""
    import torch

    from snac48.sidon import NOTHING, RATE, Fbank, HighPass, Restored, Sidon, SincResampler, front_end

    torch.set_num_threads(1)
    sidon = Sidon(modules)
    within = ["of it high-pass", "of it resampling", "of it mel features"]
    spent = dict.fromkeys(["decode", "front end", *within, "SIDON (the stand-in)", "compare and write"], 0.0)
    total = 0.0

    def timed(stage, function, *args):
        start = time.process_time()
        result = function(*args)
        spent[stage] += time.process_time() - start
        return result

    for rel in files:
        blocks = timed("decode", lambda rel=rel: list(audio_blocks(source / rel, 5.0)))
        rate, pieces = blocks[0][1], [x for x, _ in blocks]
        total += sum(map(len, pieces)) / rate
        features, source_seen = timed("front end", front_end, lambda p=pieces: iter(p), rate)
        high_pass, to_16k, fbank = HighPass(rate), SincResampler(rate, 16000), Fbank()
        passed = timed("of it high-pass", lambda p=pieces, h=high_pass: [h(x) for x in p])
        x16 = timed("of it resampling", lambda p=passed, r=to_16k: [*map(r, p), r(NOTHING, True)])
        timed("of it mel features", lambda x=x16, f=fbank: [*map(f, x), f.features()])
        waves = timed("SIDON (the stand-in)", lambda f=features: [w[0] for w in sidon.stream(f[None])])
        timed("compare and write", write, Restored(source_seen, waves), work / "out.wav", RATE)
    print(f"{len(files)} files, {total:.0f} s of audio")
    print("| stage | CPU ms an audio second |\n|---|---|")
    for stage, seconds in spent.items():
        print(f"| {stage} | {1000 * seconds / total:.2f} |")
    around = sum(spent[k] for k in ("decode", "front end", "compare and write")) / total
    print(f"| **everything but SIDON** | **{1000 * around:.2f}** |")
    print(f"cores for 1,000 x real time: {1000 * around:.1f}")


def memory(work: Path, modules: Path) -> None:
    print("| 2-hour file | minutes | peak MB, largest process | samples right |\n|---|---|---|---|")
    rng = np.random.default_rng(0)
    noise = (0.05 * rng.standard_normal(480000)).astype(np.float32)
    for name, rate, channels in (("16 kHz through SIDON", 16000, 1), ("44.1 kHz stereo kept", 44100, 2)):
        source = work / name.split()[0]
        source.mkdir()
        with sf.SoundFile(source / "long.wav", "w", rate, channels, "PCM_16") as f:
            left = 7200 * rate
            while left:
                x = noise[: min(left, len(noise))]
                f.write(np.stack([x] * channels, axis=1))
                left -= len(x)
        out = work / (source.name + "_out")
        start = time.monotonic()
        more = ["--native_rate", 44100] if rate == 44100 else []
        # a shell of its own, so that the peak is of this run and not of the one before
        code = "import resource, subprocess, sys; r = subprocess.call(sys.argv[1:], stdout=2); "
        code += "print(r, resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss)"
        args = [sys.executable, "-c", code, *command(source, out, modules, 1, *more)]
        done = subprocess.run(args, capture_output=True, text=True)
        status, peak = map(int, done.stdout.split())
        assert status == 0, done.stderr
        right = sf.info(out / "long.wav").frames == 7200 * 48000
        minutes = (time.monotonic() - start) / 60
        print(f"| {name} | {minutes:.1f} | {peak / 1024:.0f} | {'yes' if right else 'NO'} |", flush=True)
        shutil.rmtree(out)
        shutil.rmtree(source)


def torchaudio_beside_ours() -> None:
    """On a CPU-only torch its extension does not load, so its place is taken by a stub that says so."""
    import types

    import torch

    from snac48.sidon import NOTHING, HighPass, SincResampler

    torch.set_num_threads(1)
    stub = types.ModuleType("torchaudio._extension")
    stub._IS_TORCHAUDIO_EXT_AVAILABLE, stub.fail_if_no_align = False, lambda f: f
    sys.modules["torchaudio._extension"] = stub
    import torchaudio.functional as reference

    seconds, rate = 5, 22050
    x = (0.1 * np.random.default_rng(0).standard_normal(seconds * rate)).astype(np.float32)
    wave = torch.from_numpy(x)[None]

    def measure(name, theirs, ours):
        start = time.process_time()
        a = theirs()
        middle = time.process_time()
        b = ours()
        spent = [1000 * t / seconds for t in (middle - start, time.process_time() - middle)]
        error = np.abs(a[0].numpy() - b).max()
        print(f"| {name} | {spent[0]:.2f} | {spent[1]:.2f} | {spent[0] / spent[1]:.0f} | {error:.1g} |")

    HighPass(rate)(x)
    print("| 22.05 kHz | torchaudio, CPU ms an audio second | ours | ratio | largest difference |")
    print("|---|---|---|---|---|")
    measure("high-pass", lambda: reference.highpass_biquad(wave, rate, 50.0), lambda: HighPass(rate)(x))
    down = SincResampler(rate, 16000)
    ours = lambda: np.concatenate([down(x), down(NOTHING, last=True)])
    measure("to 16 kHz", lambda: reference.resample(wave, rate, 16000), ours)


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("what", choices=["processes", "cpu", "memory", "torchaudio"])
    p.add_argument("folder", type=Path, nargs="?", help="recordings")
    p.add_argument("--limit", type=int, default=300, help="files that `cpu` measures")
    args = p.parse_args()
    from helpers import standin

    with tempfile.TemporaryDirectory() as temporary:
        work = Path(temporary)
        modules = standin.build(work / "sidon")
        if args.what == "memory":
            memory(work, modules)
        elif args.what == "torchaudio":
            torchaudio_beside_ours()
        elif args.folder is None:
            p.error(f"{args.what} needs a folder of recordings")
        elif args.what == "processes":
            processes(args.folder, work, modules, len(find_audio(args.folder)))
        else:
            cpu(args.folder, work, modules, find_audio(args.folder)[: args.limit])
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    print(f"(this script itself: {peak:.0f} MB)", file=sys.stderr)


if __name__ == "__main__":
    main()
