"""Make tests/fixtures/before with the programs of commit 26daf45: what people have on their disks from then.

    git clone . /tmp/old && git -C /tmp/old checkout 26daf45
    .venv/bin/python tests/helpers/make_fixtures.py /tmp/old tests/fixtures/before

Everything is made by its own scripts and launcher; three things are changed
afterwards so that any machine can use it: the working folder in text files becomes @HERE@, process numbers
become one that cannot exist, and the cache shards' times are fixed (their index is keyed by them).
"""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

OLD, OUT = Path(sys.argv[1]).resolve(), Path(sys.argv[2]).resolve()
HERE = Path("/tmp/snac48-before")  # recorded in checkpoints and parquet files: gone where the tests run
SHARD_TIME = 1_700_000_000
DEAD_PID = 999_999_999  # above every kernel's pid_max
CHECKPOINT = "checkpoint_epoch2_iter3.pt"
sys.path[:0] = [str(OLD), str(OLD / "tests")]

import numpy as np
import soundfile as sf
from conftest import TINY, make_snac, save_snac, voice

SMALL = {"encoder_dim": 2, "decoder_dim": 32}  # TINY's rates and codebooks with fewer channels
RECORDINGS = {  # name: (seconds, Hz); below 44.1 kHz the target is restored by the stand-in for SIDON
    "train/a.flac": (1.0, 48000),
    "train/b.wav": (0.7, 48000),
    "train/c.ogg": (1.1, 44100),
    "train/d.wav": (0.9, 24000),
    "train/e.flac": (0.8, 22050),
    "train/f.ogg": (1.0, 48000),
    "val/g.flac": (0.9, 48000),
    "val/h.wav": (0.8, 24000),
}
# Loaded by every process: SIGTERM after the log line of step $STOP_AT.
SITE = """
import os, signal
if os.environ.get("STOP_AT"):
    import runlog
    metric = runlog.RunLog.metric
    def stop_at(self, **values):
        metric(self, **values)
        if "event" not in values and str(values.get("step")) == os.environ["STOP_AT"]:
            os.kill(os.getpid(), signal.SIGTERM)
    runlog.RunLog.metric = stop_at
"""


def run(*command, code=0, **env):
    env |= {"OMP_NUM_THREADS": "1", "PYTHONHASHSEED": "0", "LOG_DIR": str(HERE / "jobs"), "VENV": sys.prefix,
            "PYTHONPATH": f"{HERE / 'site'}:{OLD}"}  # fmt: skip
    env = os.environ | env
    done = subprocess.run([str(c) for c in command], cwd=OLD, env=env, capture_output=True, text=True)
    assert done.returncode == code, f"{command}: exit {done.returncode}\n{done.stdout}\n{done.stderr}"
    return done.stdout


def script(name, *args, **kw):
    return run(sys.executable, OLD / name, *args, **kw)


def launch(kind, *args, **kw):
    return run(OLD / "launch.sh", kind, "cpu", *args, **kw)


def lines(run_dir):
    return (HERE / run_dir / "metrics.jsonl").read_text().splitlines(keepends=True)


def keep_following(name, start, *args):
    """The lines that a resumed copy of run `name` adds to metrics.jsonl -> expected/NAME.jsonl."""
    copy = HERE / "resumed" / name
    shutil.copytree(HERE / name, copy)
    script(start, *args)
    added = lines(copy)[len(lines(name)) :]
    assert '"resume"' in added[0] and '"finished"' in added[-1], added
    (HERE / "expected" / f"{name}.jsonl").write_text("".join(added))
    for rows in copy.glob("samples.*.log"):
        shutil.copy(rows, HERE / "expected")


def recordings_and_caches():
    for i, (name, (seconds, rate)) in enumerate(RECORDINGS.items()):
        (HERE / "audio" / name).parent.mkdir(parents=True, exist_ok=True)
        sf.write(HERE / "audio" / name, 0.5 * voice(seconds, rate, i), rate)
    save_snac(make_snac(**SMALL), HERE / "snac", TINY | SMALL)
    from helpers import standin

    standin.build(HERE / "sidon")
    for part in ("train", "val"):
        for kind, name, flags in (
            ("cache", "cache_codes.py",
             ["--data_dir", HERE / "audio" / part, "--output_dir", HERE / "cache" / part, "--num_workers", 0,
              "--pretrained_model", HERE / "snac", "--rows_per_file", 4, "--min_seconds", 0.5]),
            ("precompute", "precompute_48k.py",
             ["--input_dir", HERE / "audio" / part, "--output_dir", HERE / "targets" / part,
              "--num_workers", 0, "--native_rate", 44100, "--sidon_dir", HERE / "sidon"]),
        ):  # fmt: skip
            launch(kind, *flags) if part == "train" else script(name, "--device", "cpu", *flags)
        for shard in (HERE / "cache" / part).glob("*.parquet"):
            os.utime(shard, (SHARD_TIME, SHARD_TIME))


# Of all three decoder runs: 2 + 3 + 3 steps; a resumed one keeps them by its checkpoint.
SHORT = ["--num_workers", 0, "--log_every", 1, "--epochs", 3, "--epoch_ranges", "1-1,2-3", "--batch_size", 2,
         "--segment_schedule", "0.3,0.5", "--batch_multiplier", "2.0,1.0", "--val_segment", 0.5, "--n_ffts",
         "512,1024", "--main_lr", 5e-4]  # fmt: skip
CACHES = ["--cache_dir", HERE / "cache/train", "--val_cache_dir", HERE / "cache/val", "--audio_48k_dir",
          HERE / "targets/train", "--val_audio_48k_dir", HERE / "targets/val"]  # fmt: skip
ORIGINALS = ["--audio_24k_dir", HERE / "audio/train", "--val_audio_24k_dir", HERE / "audio/val"]
AUDIO = ["--data_dir", HERE / "audio/train", "--val_data_dir", HERE / "audio/val"]


def decoder_runs():
    """Stopped in the middle of epoch 2, with one checkpoint each."""
    runs = {
        "phase12": [*CACHES, "--ema", 0.9],
        "phase11_fast": [*CACHES, "--recipe", "phase11-fast", "--sample_log", *ORIGINALS],
        "full_codec": [*AUDIO, "--recipe", "phase10", "--no-freeze_encoder", "--no-freeze_vq"],
    }
    for name, flags in runs.items():
        flags = [*flags, "--pretrained_model", HERE / "snac", "--output_dir", HERE / name, *SHORT]
        if name == "phase12":
            launch("train", *flags, code=3, STOP_AT="3")
        else:
            script("train_dual_head.py", "--device", "cpu", *flags, code=3, STOP_AT="3")
        for path in (HERE / name).glob("*.pt"):
            if path.name != CHECKPOINT:
                path.unlink()
        copy = HERE / "resumed" / name
        where = ["--resume", copy / CHECKPOINT, "--output_dir", copy, "--device", "cpu"]
        keep_following(name, "train_dual_head.py", *where)


def exports():
    import infer

    for run_dir, out in (("phase12", "exported_dual"), ("full_codec", "exported_codec")):
        script("infer.py", "--checkpoint", HERE / run_dir / CHECKPOINT, "--export", HERE / out)
    tts = infer.load_dual_head(HERE / "exported_dual")
    from dataset import CodeIndex

    index = CodeIndex(HERE / "cache/val")
    codes = [infer.torch.from_numpy(c)[None] for c in index.slice(0, 0, 6)]
    low, high = tts.decode(codes, noise_seed=0)
    kept = {"audio_24k": low[0, 0].numpy(), "audio_48k": high[0, 0].numpy()}
    kept |= {f"codes_{k}": c[0].numpy() for k, c in enumerate(codes)}
    np.savez_compressed(HERE / "expected/decoded.npz", **kept)
    script("cache_codes.py", "--data_dir", HERE / "audio/val", "--output_dir", HERE / "resumed/codes",
           "--pretrained_model", HERE / "exported_codec", "--min_seconds", 0.5, "--num_workers", 0,
           "--device", "cpu")  # fmt: skip
    index = CodeIndex(HERE / "resumed/codes")
    rows = {index.path(r): index.codes[index.offsets[r] : index.offsets[r + 1]] for r in range(len(index))}
    np.savez_compressed(HERE / "expected/codec_codes.npz", **rows)


def language_model():
    flags = ["--data", HERE / "cache/train", "--val-data", HERE / "cache/val", "--ctx", 8, "--batch", 2,
             "--accum", 1, "--epochs", 3, "--d_model", 16, "--layers", 2, "--heads", 2, "--depth_layers", 1,
             "--num_workers", 0, "--lr", "3e-3", "--log-lr-steps", 1, "--eval-audio-every", 0,
             "--eval-decoder", "none", "--archive-every", 0]  # fmt: skip
    launch("rvq", *flags, "--save_dir", HERE / "rvq", code=3, STOP_AT="8")
    for path in (HERE / "rvq").glob("*_best*.pt"):
        path.unlink()
    script("train_rvq.py", "generate", "--checkpoint", HERE / "rvq/rvq_7cb_latest.pt", "--frames", 120,
           "--seed", 5, "--prompt", HERE / "cache/val/codes_batch_gpu0_0.parquet", "--prompt-frames", 4,
           "--device", "cpu", "--output", HERE / "expected/tokens.npq")  # fmt: skip
    keep_following("rvq", "train_rvq.py", *flags, "--save_dir", HERE / "resumed/rvq", "--device", "cpu")


def older_logs():
    """A run that ran out of memory, and a log of the scripts before ours: a tqdm bar and epoch summaries."""
    import fake_runs

    records = fake_runs.train_records(60, seed=1)
    log = (
        fake_runs.human(records) + "torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 2.00 GiB\n"
    )
    fake_runs.add_run(HERE, "train_gpu0", "train", [0], DEAD_PID, records=records, log=log)
    bar = "".join(f"\rEpoch 4/10:  {i // 10}%|###   | {i}/1000 [00:10<00:30,  loss={1 - i / 2000:.4f}, "
                  "24k=0.61, 48k=0.50, lr=5.00e-05]" for i in range(0, 1001, 50))  # fmt: skip
    bar += "\nEpoch 4 [Train]: Loss=0.6100, 24kHz=0.6000, 48kHz=0.5000\n"
    bar += "Epoch 4 [Val]: Loss=0.6500, 24kHz=0.6300, 48kHz=0.5200\n"
    (HERE / "logs/phase10_old.log").write_text(bar)
    for path in (HERE / "logs").iterdir():
        path.rename(HERE / "jobs" / path.name)
    (HERE / "logs").rmdir()


def make_portable():
    for path in (HERE / "jobs").glob("*.lock"):
        path.unlink()
    for path in HERE.rglob("*"):
        if path.suffix in (".json", ".jsonl", ".log", ".pid"):
            path.write_bytes(path.read_bytes().replace(str(HERE).encode(), b"@HERE@"))


def main():
    shutil.rmtree(HERE, ignore_errors=True)
    for name in ("site", "expected", "jobs"):
        (HERE / name).mkdir(parents=True)
    (HERE / "site/sitecustomize.py").write_text(SITE)
    recordings_and_caches()
    decoder_runs()
    exports()
    language_model()
    older_logs()
    for path in (HERE / "jobs").glob("*.pid"):  # before the monitor looks: the machine's pids come again
        path.write_text(f"{DEAD_PID} {path.read_text().split(' ', 1)[1]}")
    runs = [HERE / "phase11_fast", HERE / "full_codec"]
    shown = script("monitor.py", "--json", "--log_dir", HERE / "jobs", *runs)
    rows = [{k: v for k, v in row.items() if k not in ("pid", "log")} for row in json.loads(shown)["runs"]]
    (HERE / "expected/monitor.json").write_text(json.dumps(rows, indent=1) + "\n")
    for name in ("site", "sidon", "resumed"):
        shutil.rmtree(HERE / name)
    make_portable()
    for path in [p for p in OUT.glob("*") if p.name != "README.md"]:
        shutil.rmtree(path)
    shutil.copytree(HERE, OUT, dirs_exist_ok=True)
    shutil.rmtree(HERE)


main()
