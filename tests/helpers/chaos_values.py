"""Cases of values that nobody can mean, of outputs over inputs, of what is the newest, of places."""

import json
import os
import subprocess
import sys
from functools import partial
from pathlib import Path

import numpy as np
import torch
from conftest import ROOT

import train_dual_head
import train_rvq
from helpers import scene
from helpers.chaos import Case, unchanged
from snac48 import bounds
from snac48.checkpoint import RESUMED, find_resume, prune, require, save_checkpoint
from snac48.cli import guarded

# ---- flags and configs ----

ALONE = {  # script: numbers among its flags; and what else it must be given
    "cache_codes": ("batch_size rows_per_file min_seconds limit num_workers max_bad_fraction "
                    "import_sample", ()),
    "precompute_48k": ("limit start_idx native_rate num_workers batch_size batch_slack min_envelope_corr "
                       "max_bad_fraction test_samples", ()),
    "prepare_dataset": ("train_ratio seed", ("--input_dir", ".")),
    "infer": ("chunk_seconds noise_seed", ("--checkpoint", "x", "--input", "y", "--output", "z")),
    "evaluate": ("segment_length num_samples min_rate seed max_samples_saved",
                 ("--checkpoint", "x", "--data_dirs", ".")),
    "doctor": ("probe-windows jump stride", ()),
    "monitor": ("refresh_s stall_s diverge disk_gb", ("--once",)),
    "train_rvq generate": ("prompt-row prompt-frames seed frames temperature top-k top-p",
                           ("--checkpoint", "x", "--output", "y")),
}  # fmt: skip
DUAL = [name for name, kind in train_dual_head.TYPES.items() if kind in (int, float) or name in bounds.LISTS]
RVQ = [name for name, kind in train_rvq.KINDS.items() if kind in (int, float)]
NEVER = ["nan", "inf", "-inf", "-1e30", "1e30", "-7", "1e999", "99999999999999999999"]
NO_NUMBER = ["abc", "", "0x10", "1,5", "[1]", "1e", "--", "NaN%"]


def bad(rng, name: str, script: str = "") -> str:
    """A value that the option can't have: beyond an end, no number, or of huge size."""
    other, low, after, high, before = bounds.bound(bounds.row(name, script))
    ends = [low if after else low - 1 if low - 1 != other else low - 3, high if before else 10 * high]
    return str(rng.choice([*NEVER, *(f"{end:g}" for end in ends), *NO_NUMBER]))


def flag(script: str, name: str, value: str, rest: tuple) -> Case:
    words = rf"--{name} must be|argument --{name}: (invalid|expected)|--{name} '.*' must be"
    run = lambda folder: scene.program(script, *rest, f"--{name}={value}")
    return Case("flags", f"{script} --{name} {value}", run, words)


def config(script: str, name: str, value, spelled: str) -> Case:
    def run(folder: Path):
        (folder / "c.json").write_text(json.dumps({name: value}))
        return scene.program(script, "--config", folder / "c.json")

    return Case("configs", f"{script} {name}: {value!r:.40}", run, rf"({spelled}|{name}) .*must be|--{name}")


def values(rng) -> list[Case]:
    found = []
    for script, (names, rest) in ALONE.items():
        for name in names.split():
            found.append(flag(script, name, bad(rng, name.replace("-", "_")), rest))
    for name in DUAL:
        found.append(flag("train_dual_head", name, bad(rng, name), ()))
    for name in RVQ:
        spelled = train_rvq.FLAGS[name][2:]
        found.append(flag("train_rvq", spelled, bad(rng, name, "train_rvq"), ()))
    wrong = [float("nan"), float("-inf"), -(10**30), 10**400, [], {}, True, None, "abc", [[1]], {"a": 1}]
    for script, names in (("train_dual_head", DUAL), ("train_rvq", RVQ)):
        for name in names:
            value = wrong[int(rng.integers(len(wrong)))]
            if value is None:  # of rvq's: as left out; of those by device likewise
                value = "null"
            spelled = train_rvq.FLAGS[name] if script == "train_rvq" else f"--{name}"
            found.append(config(script, name, value, spelled))
    return found


TEXTS = {  # what a config may be instead of one
    "twice": (b'{"epochs": 3, "epochs": 4}', "stands there twice"),
    "two names": (b'{"epochs": 3, "num_epochs": 4}', "both give --epochs"),
    "curriculum and ranges": (b'{"recipe": "phase12", "epoch_ranges": "1-15", "curriculum": [{"epochs": '
                              b'[1, 15], "length": 1, "batch_multiplier": 1}]}', "both give --epoch_ranges"),
    "utf-16": ('{"epochs": 3}'.encode("utf-16"), "not UTF-8"),
    "utf-16 without mark": ('{"epochs": 3}'.encode("utf-16-le"), "not UTF-8"),
    "utf-32": ('{"epochs": 3}'.encode("utf-32"), "not UTF-8"),
    "latin-1": ('{"description": "Stra\xdfe"}'.encode("latin-1"), "not UTF-8"),
    "deep": (b"[" * 100_000, "nested too deeply"),
    "deep objects": (b'{"a":' * 100_000, "nested too deeply"),
    "list": (b"[]", "one JSON object"),
    "text": (b'"epochs"', "one JSON object"),
    "empty": (b"", "is not JSON"),
    "nul": (b"\0" * 100, "not UTF-8"),
    "cut": (b'{"epochs": 3', "is not JSON"),
    "long number": (b'{"epochs": ' + b"9" * 5000 + b"}", "not JSON|must be"),
    "recipe a list": (b'{"recipe": ["phase12"]}', "recipe must be str"),
    "recipe a number": (b'{"recipe": 12}', "recipe must be str"),
    "recipe unknown": (b'{"recipe": "phase13"}', "unknown recipe"),
    "recipe an object": (b'{"recipe": {"name": "phase12"}}', "recipe must be str"),
    **{f"curriculum {text[:20]}": (b'{"recipe": "phase12", "curriculum": %s}' % text.encode(), "of stages")
       for text in ("3", "[]", "{}", '"x"', "[3]", "[[1, 2]]", "null", '[{"epochs": [1, 2]}]',
                    '[{"epochs": [1], "length": 1, "batch_multiplier": 1}]',
                    '[{"epochs": "1-2", "length": 1, "batch_multiplier": 1}]',
                    '[{"epochs": [1, 2], "length": "1", "batch_multiplier": 1}]',
                    '[{"epochs": [1, 2], "length": true, "batch_multiplier": null}]')},
    **{f"curriculum of {text[:30]}": (b'{"recipe": "phase12", "curriculum": [%s]}' % text.encode(), words)
       for text, words in (('{"epochs": [1, 15], "length": NaN, "batch_multiplier": 1}', "--segment_s"),
                           ('{"epochs": [1, 15], "length": -1, "batch_multiplier": 1}', "--segment_s"),
                           ('{"epochs": [1, 15], "length": 1, "batch_multiplier": 0}', "--batch_m"),
                           ('{"epochs": [-1, 15], "length": 1, "batch_multiplier": 1}', "--epoch_ranges"),
                           ('{"epochs": [9, 1], "length": 1, "batch_multiplier": 1}', "epoch 1 is in 0"))},
}  # fmt: skip

RELATIONS = {  # flags that contradict each other or leave nothing to train
    "no head counts": ("--loss_weight_48k 0 --loss_weight_24k 0", "would train nothing"),
    "no term counts": ("--l1_weight 0 --stft_weight 0", "would train nothing"),
    "warmup of nothing": ("--loss_weight_48k 0", "would train nothing"),
    "pieces of nothing": ("--accum_steps 60000", "--accum_steps 60000 would cut"),
    "no adversarial epoch": ("--adv_weight 1 --warmup_epochs 15", "has no epoch"),
    "more adversarial epochs": ("--adv_weight 1 --adv_epochs 99", "more than --epochs"),
    "features only": ("--recipe phase10 --from_scratch x --feature_epochs 10", "leave none"),
    "ranges overlap": ("--epoch_ranges 1-5,3-9,10-11,12-15", "epoch 3 is in 2"),
    "ranges leave a gap": ("--epoch_ranges 1-2,4-5,6-7,8-15", "epoch 3 is in 0"),
    "ranges of three ends": ("--epoch_ranges 1-2-3,4,5,6-15", "must be ranges"),
    "lists of two lengths": ("--segment_schedule 1,2", "equally many"),
    "three betas": ("--adam_betas 0.9,0.9,0.9", "two numbers"),
    "schedule of no rows": ("--print_schedule 0", "--print_schedule must be"),
    "schedule of minus rows": ("--print_schedule=-5", "--print_schedule must be"),
    "cards of nothing": ("--print_memory 0,nan", "--print_memory must be"),
    "epochs without end": ("--epochs 1000000000", "--epochs must be"),
}


def texts_and_relations(rng) -> list[Case]:
    def text(data: bytes, script: str, folder: Path):
        (folder / "c.json").write_bytes(data)
        return scene.program(script, "--config", folder / "c.json")

    found = []
    for name, (data, words) in TEXTS.items():
        found.append(Case("texts", name, partial(text, data, "train_dual_head"), words))
        if "curriculum" not in name and "recipe" not in name and name != "two names":
            about = words.replace("|must be", "|must be|unknown key") if name == "latin-1" else words
            found.append(Case("texts", f"rvq {name}", partial(text, data, "train_rvq"), about))
    for name, (argv, words) in RELATIONS.items():
        run = lambda folder, argv=argv: scene.program("train_dual_head", *argv.split())
        found.append(Case("relations", name, run, words))
    return found


# ---- outputs over inputs ----


def over(name: str, words: str):
    """Marks a function(user's folder, other folder) as a case: the user's files stay as they are."""

    def mark(function):
        def run(folder: Path):
            user = scene.copy(scene.recordings(), folder / "user")
            (folder / "else").mkdir()
            with unchanged(user):
                return function(user, folder / "else")

        OVER.append(Case("outputs over inputs", name, run, words))
        return function

    return mark


OVER: list[Case] = []
best = lambda: scene.run() / "best_model.pt"
infer = lambda *argv: scene.program("infer", "--checkpoint", best(), "--device", "cpu", *argv)
evaluate = lambda user, *argv: scene.program(
    "evaluate", "--checkpoint", best(), "--data_dirs", user, "--device", "cpu",
    "--pretrained_model", scene.codec(), *argv)  # fmt: skip


@over("infer onto its file", "is what is read")
def _(user, other):
    return infer("--input", user / "utt1.wav", "--output", user / "utt1.wav")


@over("infer onto its file, --overwrite", "is what is read")
def _(user, other):
    return infer("--input", user / "utt1.wav", "--output", user / "utt1.wav", "--overwrite")


@over("infer onto its file by a link", "is what is read")
def _(user, other):
    (other / "link.wav").symlink_to(user / "utt1.wav")
    return infer("--input", user / "utt1.wav", "--output", other / "link.wav", "--overwrite")


@over("infer onto another recording", "exists: --overwrite")
def _(user, other):
    return infer("--input", user / "utt1.wav", "--output", user / "utt2.wav")


@over("infer into its folder", "is, or lies inside")
def _(user, other):
    return infer("--input", user, "--output", user)


@over("infer into a folder of its folder", "is, or lies inside")
def _(user, other):
    return infer("--input", user, "--output", user / "out", "--overwrite")


@over("infer of a cache over recordings", "exists: --overwrite")
def _(user, other):
    return infer("--input", scene.codes(), "--output", user)


@over("infer of two heads over a file", "exists: --overwrite")
def _(user, other):
    (user / "x_24k.wav").write_bytes(b"a recording")
    try:
        return infer("--input", user / "utt1.wav", "--output", user / "x.wav", "--sample_rate", "both")
    finally:
        (user / "x_24k.wav").rename(other / "kept")
        assert (other / "kept").read_bytes() == b"a recording"


@over("infer to a folder as to a file", "is a folder: name a file")
def _(user, other):
    return infer("--input", user / "utt1.wav", "--output", other)


@over("export over a codec", "exists: --overwrite")
def _(user, other):
    codec = scene.copy(scene.codec(), other / "codec")
    with unchanged(codec):
        return infer("--export", codec)


@over("evaluate, samples into the recordings", "--samples_dir .* is, or lies inside")
def _(user, other):
    return evaluate(user, "--samples_dir", user, "--output", other / "r.json")


@over("evaluate, samples below the recordings", "--samples_dir .* is, or lies inside")
def _(user, other):
    return evaluate(user, "--samples_dir", user / "listen", "--output", other / "r.json", "--overwrite")


@over("evaluate, samples among other files", "of no evaluation")
def _(user, other):
    return evaluate(scene.recordings(), "--samples_dir", user, "--output", other / "r.json")


@over("evaluate, results over a recording", "exists: --overwrite")
def _(user, other):
    return evaluate(scene.recordings(), "--samples_dir", other / "s", "--output", user / "utt1.wav")


@over("evaluate, tables over notes", "exists: --overwrite")
def _(user, other):
    (other / "notes.md").write_text("mine")
    with unchanged(other):
        return evaluate(user, "--samples_dir", other / "s", "--output", other / "notes.json")


@over("precompute onto its input", "the same folder|lies inside")
def _(user, other):
    return scene.program("precompute_48k", "--input_dir", user, "--output_dir", user, "--upsampler", "sinc")


@over("precompute inside its input", "lies inside")
def _(user, other):
    return scene.program("precompute_48k", "--input_dir", user, "--output_dir", user / "x")


@over("cache onto its input", "the same folder")
def _(user, other):
    return scene.program("cache_codes", "--data_dir", user, "--output_dir", f"{user}/../user")


@over("prepare over a data set's manifest", "holds manifest.json")
def _(user, other):
    (other / "manifest.json").write_text("[]")
    with unchanged(other):
        return scene.program("prepare_dataset", "--input_dir", user, "--output_dir", other)


@over("prepare over a split", "holds train")
def _(user, other):
    (other / "train").mkdir()
    return scene.program("prepare_dataset", "--input_dir", user, "--output_dir", other)


@over("training into its recordings", "--output_dir .* is, or lies inside")
def _(user, other):
    flags = scene.training_flags(user)
    return scene.program(
        "train_dual_head", *[str(user) if f == str(scene.recordings()) else f for f in flags]
    )


@over("training into its cache", "--output_dir .* is, or lies inside")
def _(user, other):
    with unchanged(scene.codes()):
        return scene.program("train_dual_head", *scene.training_flags(scene.codes() / "run"))


@over("language model into its cache", "--save_dir .* is, or lies inside")
def _(user, other):
    with unchanged(scene.codes()):
        return scene.program("train_rvq", "--data", scene.codes(), "--save_dir", scene.codes())


@over("doctor's table over a checkpoint", "is what is read")
def _(user, other):
    (other / "c.pt").write_bytes(b"x")
    with unchanged(other):
        return scene.program("doctor", "--ckpts", other / "c.pt", "--csv", other / "c.pt", "--overwrite")


@over("doctor's table over a file", "exists: --overwrite")
def _(user, other):
    return scene.program("doctor", "--ckpts", ROOT / "README.md", "--csv", user / "utt1.wav")


@over("generate over a recording", "exists: --overwrite")
def _(user, other):
    return scene.program("train_rvq generate", "--checkpoint", "x", "--output", user / "utt1.wav")


@over("tokens over a recording", "exists: --overwrite")
def _(user, other):
    np.save(other / "c.npy", np.zeros((3, 4), int))
    return scene.program("train_rvq tokens", "from-dac", other / "c.npy", user / "utt1.wav")


@over("training over a run", "would be overwritten: name another --output_dir")
def _(user, other):
    run = scene.copy(scene.run(), other / "run")
    with unchanged(run):
        return scene.program("train_dual_head", *scene.training_flags(run))


@over("training over the best of an earlier run", "holds best_model.*of an earlier run with other options")
def _(user, other):
    run = scene.copy(scene.run(), other / "run")
    for path in run.glob("checkpoint_*"):
        path.unlink()
    with unchanged(run):
        return scene.program("train_dual_head", *scene.training_flags(run, "--seed", 7, "--resume", "auto"))


@over("training over a run, resumed from elsewhere", "holds a run of its own")
def _(user, other):
    run, theirs = scene.copy(scene.run(), other / "run"), scene.run() / "checkpoint_epoch1.pt"
    with unchanged(run):
        return scene.program("train_dual_head", *scene.training_flags(run, "--resume", theirs))


@over("a finished run of another length", "it is finished: begin a new run in another --output_dir")
def _(user, other):
    run = scene.copy(scene.run(), other / "run")
    with unchanged(run):
        return scene.program(
            "train_dual_head",
            *scene.training_flags(run, "--resume", "auto", "--epochs", 3, "--epoch_ranges", "1-3"),
        )


# ---- what is the newest ----


def made(folder: Path, rng, steps: list[int], times: str) -> None:
    """Checkpoints of these steps, named and dated so that neither name nor date tells which is the newest."""
    folder.mkdir()
    kinds = ("epoch{}", "epoch1_iter{}", "epoch9_time_20{}0101_000000", "epoch{}0")
    for i, step in enumerate(steps):
        path = folder / f"checkpoint_{kinds[int(rng.integers(len(kinds)))].format(10 + i)}.pt"
        state = dict.fromkeys(RESUMED, 1) | {"global_step": step, "validated_epoch": 0, "args": {}}
        save_checkpoint(path, state)
        stamp = {"one time": 10**9, "backwards": 10**9 - step, "random": int(rng.integers(10**9))}[times]
        os.utime(path, (stamp, stamp))


def newest(rng) -> list[Case]:
    def auto(seed: int, times: str, folder: Path):
        rng = np.random.default_rng(seed)
        steps = [int(s) for s in rng.permutation(40)[:5] + 1]
        made(folder / "run", rng, steps, times)
        _, saved = find_resume("auto", str(folder / "run"), "checkpoint_*.pt", partial(require, keys=RESUMED))
        return f"{'the newest' if saved['global_step'] == max(steps) else 'an older one'}"

    def pruned(seed: int, times: str, folder: Path):
        rng = np.random.default_rng(seed)
        steps = [int(s) for s in rng.permutation(40)[:6] + 1]
        made(folder / "run", rng, steps, times)
        prune((folder / "run").glob("checkpoint_*.pt"), 2)
        left = [torch.load(p, weights_only=True)["global_step"] for p in (folder / "run").iterdir()]
        return f"{'the newest' if sorted(left) == sorted(steps)[-2:] else 'other ones'}"

    found = []
    for times in ("one time", "backwards", "random"):
        for n in range(4):
            seed = int(rng.integers(2**31))
            found.append(Case("the newest", f"auto, {times} {n}", partial(auto, seed, times), "^the newest"))
            found.append(
                Case("the newest", f"prune, {times} {n}", partial(pruned, seed, times), "^the newest")
            )
    return found


# ---- places ----

WRITES = {  # script: [(flag, what else it must be given)]
    "train_dual_head": [("output_dir", lambda: ["--cache_dir", "a", "--val_cache_dir", "b", "--audio_48k_dir",
                                                "c", "--val_audio_48k_dir", "d"])],
    "train_rvq": [("save_dir", lambda: []), ("eval-outdir", lambda: [])],
    "cache_codes": [("output_dir", lambda: ["--data_dir", scene.recordings()])],
    "precompute_48k": [("output_dir", lambda: ["--input_dir", scene.recordings()])],
    "prepare_dataset": [("output_dir", lambda: ["--input_dir", scene.recordings()])],
    "infer": [("output", lambda: ["--checkpoint", "x", "--input", scene.recordings()]),
              ("output", lambda: ["--checkpoint", "x", "--input", scene.recordings() / "utt1.wav"]),
              ("export", lambda: ["--checkpoint", "x"]), ("export_onnx", lambda: ["--checkpoint", "x"])],
    "evaluate": [("output", lambda: ["--checkpoint", "x", "--data_dirs", scene.recordings()]),
                 ("samples_dir", lambda: ["--checkpoint", "x", "--data_dirs", scene.recordings()])],
    "doctor": [("csv", lambda: ["--ckpts", ROOT / "README.md"])],
    "train_rvq generate": [("output", lambda: ["--checkpoint", "x"])],
}  # fmt: skip
IMPOSSIBLE = {"proc": "/proc/nowhere/x.out", "sys": "/sys/x.out", "a file": "{file}/x.out", "long": "y" * 300,
              "a broken link": "{link}/x.out"}  # fmt: skip


def places(rng) -> list[Case]:
    def run(script: str, flag: str, rest, place: str, folder: Path):
        (folder / "file").write_text("x")
        (folder / "link").symlink_to("/nowhere/at/all")
        place = place.format(file=folder / "file", link=folder / "link")
        with unchanged(scene.recordings()):
            return scene.program(script, *rest(), f"--{flag}", place)

    found = []
    for script, flags in WRITES.items():
        for number, (flag, rest) in enumerate(flags):
            for what, place in IMPOSSIBLE.items():
                name, words = f"{script} --{flag} {number} in {what}", "can't be (written|made)"
                found.append(Case("places", name, partial(run, script, flag, rest, place), words))
    return found


# ---- streams and memory ----


def shell(command: str, folder: Path) -> str:
    """What a shell command with $PY and $ROOT says, and its exit code."""
    env = os.environ | {"PY": sys.executable, "ROOT": str(ROOT)}
    done = subprocess.run(["bash", "-c", command], cwd=folder, env=env, capture_output=True, timeout=50)
    return f"{(done.stdout + done.stderr).decode(errors='replace')}\nexit {done.returncode}"


STREAMS = {  # how a program is started, and what it must end with
    "ASCII help": ("LC_ALL=C PYTHONUTF8=0 PYTHONIOENCODING=ascii $PY $ROOT/{}.py --help",
                   "usage: (?s:.*)\nexit 0$"),
    "help without stdout": ("$PY $ROOT/{}.py --help >&-", "^\nexit 0$"),
    "mistake without stderr": ("$PY $ROOT/{}.py --no_such_flag 2>&-", "^\nexit 2$"),
    "mistake without streams": ("$PY $ROOT/{}.py --no_such_flag <&- >&- 2>&-", "^\nexit 2$"),
}  # fmt: skip


def streams(rng) -> list[Case]:
    found = []
    for script in sorted(p.stem for p in ROOT.glob("*.py")):
        name = str(rng.choice(list(STREAMS)))
        command, words = STREAMS[name]
        run = partial(shell, command.format(script))
        found.append(Case("slow: streams", f"{script}: {name}", run, words))
    memory = {
        "torch": lambda: torch.empty(1 << 50),
        "numpy": lambda: np.zeros(1 << 55),
        "python": lambda: bytearray(1 << 60),
    }
    for name, take in memory.items():
        run = lambda folder, take=take: guarded(take)
        found.append(Case("memory", name, run, "the memory is exhausted .*--batch_size"))
    return found


def cases(seed: int) -> list[Case]:
    rng = np.random.default_rng([seed, 14])
    return [*values(rng), *texts_and_relations(rng), *OVER, *newest(rng), *places(rng), *streams(rng)]
