"""train_rvq.py: options, runs that survive, endings, generate, the commands for token files."""

import math
import os
import signal
import subprocess
import sys
import time
import types
from dataclasses import asdict

import numpy as np
import pytest
import soundfile
import torch
from conftest import ROOT, children_cpu, one_sentence, run
from helpers.rvq import (
    META,
    assert_same_ends,
    command,
    latest,
    make_cache,
    make_npqs,
    metrics,
    options,
    run_here,
    speech,
)

import train_rvq
from snac48 import token_lm, tokens
from snac48.cli import UserError
from snac48.codec import geometry_of, load_snac, model_config
from snac48.decoder import DualHeadDecoder
from snac48.starts import start_head

# ---- options ----


def test_the_rate_rises_and_falls():
    lr = [train_rvq.lr_at(s, 1000, 2e-4, 0.01, 0.05) for s in range(1000)]
    assert lr[-1] == pytest.approx(1e-5) and max(lr) == pytest.approx(2e-4) and lr[0] == pytest.approx(2e-5)
    assert lr[:10] == sorted(lr[:10]) and lr[10:] == sorted(lr[10:], reverse=True)


def test_help_is_fast_and_flags_are_the_specified_ones():
    began = children_cpu()
    for argv in (["--help"], ["generate", "--help"], ["tokens", "--help"]):
        assert "--" in run("train_rvq.py", *argv).stdout
    assert children_cpu() - began < 2  # three of them; torch alone takes 2 s each
    d = vars(options([]))
    want = {"data": "npq_out/*.npq", "ctx": 512, "step": 256, "batch": 6, "accum": 6, "epochs": 250,
            "amp": False, "d_model": 768, "layers": 16, "heads": 12, "dropout": 0.1, "lr": 2e-4,
            "weight_decay": 0.02,
            "ema": 0.999, "label_smoothing": 0.05, "cb_weights": "auto", "cb_weights_auto_alpha": 0.5,
            "warmup_ratio": 0.01, "eta_min_ratio": 0.05, "grad_clip": 1.0, "outlier_skip_factor": 5,
            "val_every": 1, "eval_audio_every": 5, "eval_frames": 1290, "eval_temperature": 1.1,
            "eval_outdir": "rvq_eval", "save_dir": "rvq_ckpts", "archive_every": 10, "keep_archived": 20,
            "log_lr_steps": 50, "prefetch": 6, "pattern": "depth"}  # fmt: skip
    assert {k: d[k] for k in want} == want


def test_config_errors_name_the_nearest_key(tmp_path):
    for text, why in (
        ('{"bacth": 4}', "did you mean 'batch'"),
        ('{"batch": 4.5}', "batch must be int"),
        ('{"amp": 1}', "amp must be bool"),
        ('{"pattern": "x"}', "not one of"),
        ('{"cb_weights": "1,x"}', "cb-weights .*must be a comma-separated"),
        ("{", "is not JSON"),
    ):
        (tmp_path / "c.json").write_text(text)
        with pytest.raises(UserError, match=why):
            options(["--config", str(tmp_path / "c.json")])
    (tmp_path / "c.json").write_text('{"data": "http://x/*.npq", // a comment\n "lr": 1}')
    args = options(["--config", str(tmp_path / "c.json")])
    assert args.data == "http://x/*.npq" and args.lr == 1


def test_user_errors_are_one_sentence(tmp_path):
    one_sentence(done := run("train_rvq.py", "--data", tmp_path / "no/*.npq", code=1))
    assert done.stderr.count("\n") == 1


# ---- runs ----


def test_nan_and_outlier_batches_are_skipped_in_a_run(tmp_path, monkeypatch):
    data, real, calls = make_npqs(tmp_path / "npq"), train_rvq.objective, [0]

    def poisoned(model, codes, *rest):
        calls[0] += 1
        loss, ce = real(model, codes, *rest)
        return loss * {11: float("nan"), 21: 1000.0}.get(calls[0], 1.0), ce

    monkeypatch.setattr(train_rvq, "objective", poisoned)
    assert run_here(command(tmp_path, data)) == 0
    lines = metrics(tmp_path / "run")
    skips = [m for m in lines if m.get("event") == "skip"]
    assert [(m["step"], m["reason"]) for m in skips] == [(6, "non-finite"), (11, "outlier")]
    steps = [m for m in lines if "event" not in m]
    assert steps[-1]["step"] == steps[-1]["total_steps"] and steps[-1]["skipped"] == 2
    state = latest(tmp_path)
    assert all(torch.isfinite(v).all() for v in state["model"].values())
    want = {"step", "total_steps", "epoch", "epochs", "phase", "loss", "ppl", "bits_per_s", "ce", "lr",
            "tokens_per_s", "eta_s"}  # fmt: skip
    assert want <= set(steps[0]) and len(steps[0]["ce"]) == 3
    events = [m["event"] for m in lines if "event" in m]
    assert events[0] == "start" and events[-1] == "end" and lines[-1]["reason"] == "finished"
    assert {"checkpoint", "val"} <= set(events)


def test_a_run_that_stays_broken_stops_with_its_own_code(tmp_path, monkeypatch):
    data, real = make_npqs(tmp_path / "npq"), train_rvq.objective
    monkeypatch.setattr(train_rvq, "objective", lambda *a: (real(*a)[0] * float("nan"), real(*a)[1]))
    with pytest.raises(UserError, match="in a row") as e:
        run_here(command(tmp_path, data, "--epochs", "9"))
    assert e.value.code == 4 and metrics(tmp_path / "run")[-1]["reason"] == "diverged"
    assert (tmp_path / "run/rvq_3cb_latest.pt").exists()  # a run that hits NaN still saves, good weights


def test_archives_pruned_ema_validates_and_finished_runs_stay(tmp_path):
    data = make_npqs(tmp_path / "npq")
    assert run_here(command(tmp_path, data, "--epochs", "5", "--keep-archived", "2", "--tag", "x")) == 0
    names = sorted(p.name.split("__")[0] for p in (tmp_path / "run").glob("*.pt"))
    assert [n for n in names if "_epoch_" in n] == ["rvq_3cb_x_epoch_e0004", "rvq_3cb_x_epoch_e0005"]
    assert len([n for n in names if "best_e" in n]) <= 2
    assert {"rvq_3cb_x_latest.pt", "rvq_3cb_x_best.pt"} <= set(names)
    state = latest(tmp_path, stem="rvq_3cb_x")
    _, held = tokens.split_windows(tokens.Corpus(data), None, 12, 6, 42)
    models = (token_lm.build(state, which) for which in ("ema", "model"))
    losses = (token_lm.plain_ce(model, held, 2, torch.device("cpu"), False) for model in models)
    ema, raw = (pytest.approx(np.mean(ce), abs=1e-5) for ce in losses)
    logged = [m for m in metrics(tmp_path / "run") if m.get("event") == "val"][-1]
    assert logged["val_loss"] == ema and logged["val_loss"] != raw
    assert logged["ppl"] == pytest.approx(math.exp(logged["val_loss"]))
    assert run_here(command(tmp_path, data, "--epochs", "5", "--tag", "x")) == 0  # nothing more to do


def test_resume_flags_and_architecture(tmp_path, capsys):
    data = make_npqs(tmp_path / "npq")
    with pytest.raises(UserError, match="does not exist"):
        run_here(command(tmp_path, data, "--resume"))
    run_here(command(tmp_path, data, "--epochs", "1"))
    run_here(command(tmp_path, data, "--epochs", "2", "--d_model", "32", "--pattern", "delay"))
    state = latest(tmp_path)
    assert state["arch"]["d_model"] == 16 and state["arch"]["pattern"] == "depth" and state["epoch"] == 2
    assert "architecture from the checkpoint" in capsys.readouterr().out
    run_here(command(tmp_path, data, "--epochs", "1", "--d_model", "32", "--ignore-arch"))
    assert latest(tmp_path)["arch"]["d_model"] == 32
    assert any((tmp_path / "run/abandoned").glob("rvq_3cb_best_e*.pt"))  # of the model before
    path = tmp_path / "run/rvq_3cb_latest.pt"
    path.write_bytes(path.read_bytes()[:-100])  # damaged: the newest good one takes over
    run_here(command(tmp_path, data, "--epochs", "2"))
    assert "is damaged" in capsys.readouterr().out and latest(tmp_path)["epoch"] == 2
    with pytest.raises(UserError, match="another --save_dir"):
        run_here(command(tmp_path, make_npqs(tmp_path / "other", V=9)))


def wait_for(folder, step, process, seconds=60):
    end = time.time() + seconds
    while time.time() < end and process.poll() is None:
        path = folder / "metrics.jsonl"
        if path.exists() and any(f'"step": {s},' in path.read_text() for s in (step, step + 1, step + 2)):
            return
        time.sleep(0.002)
    raise AssertionError("the run never came to that step: " + process.stdout.read())


def test_kill_9_and_resume_is_bit_identical(tmp_path):
    """Dropout, EMA, accumulation with a left-over last step; killed twice, then stopped by SIGTERM."""
    data = make_npqs(tmp_path / "npq", files=60)
    flags = ["--epochs", "4", "--dropout", "0.2", "--save-every-steps", "3", "--fused-optim"]
    assert run_here(command(tmp_path, data, *flags, run="whole")) == 0
    steps = []
    for at, sig, code in ((8, signal.SIGKILL, -9), (26, signal.SIGKILL, -9), (44, signal.SIGTERM, 3)):
        argv = [sys.executable, ROOT / "train_rvq.py", *command(tmp_path, data, *flags)]
        p = subprocess.Popen(argv, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
        wait_for(tmp_path / "run", at, p)
        p.send_signal(sig)
        out = p.communicate(timeout=60)[0]
        assert p.returncode == code, out
        steps.append(latest(tmp_path)["global_step"])
    assert metrics(tmp_path / "run")[-1]["reason"] == "stopped" and steps == sorted(steps)
    assert run_here(command(tmp_path, data, *flags)) == 0
    assert_same_ends(tmp_path)
    resumed = [m for m in metrics(tmp_path / "run") if m.get("event") == "resume"]
    per_epoch = latest(tmp_path)["per_epoch"]
    assert len(resumed) == 3 and any(m["step"] % per_epoch for m in resumed)  # in mid-epoch, too


def test_held_out_files_of_their_own_and_too_few_files(tmp_path):
    data, other = make_npqs(tmp_path / "npq", files=3), make_npqs(tmp_path / "held", files=2)
    assert run_here(command(tmp_path, data, "--val-data", other, "--epochs", "1")) == 0
    first = metrics(tmp_path / "run")[0]
    assert (first["windows"], first["val_windows"]) == (3, 2)
    with pytest.raises(UserError, match="--val-data"):
        run_here(command(tmp_path, make_npqs(tmp_path / "one", files=1), run="b"))
    with pytest.raises(UserError, match="other tokens"):
        run_here(command(tmp_path, data, "--val-data", make_npqs(tmp_path / "v", files=2, V=9), run="c"))
    (tmp_path / "npq" / "bad.npq").write_bytes(b"NPQ1")
    with pytest.raises(UserError, match=r"bad\.npq") as e:
        run_here(command(tmp_path, data, run="d"))
    assert e.value.code == 5
    assert run_here(command(tmp_path, data, "--max_bad_fraction", "0.5", "--epochs", "1", run="e")) == 0


def test_a_stop_during_validation_loses_nothing(tmp_path, monkeypatch):
    data, real, calls = make_npqs(tmp_path / "npq"), train_rvq.plain_ce, [0]
    workers = ["--num_workers", "1", "--persistent-workers"]  # must not begin with an epoch that has no steps
    assert run_here(command(tmp_path, data, run="whole")) == 0

    def interrupted(*args):
        calls[0] += 1
        if calls[0] == 2:
            os.kill(os.getpid(), signal.SIGTERM)
        return real(*args)

    monkeypatch.setattr(train_rvq, "plain_ce", interrupted)
    assert run_here(command(tmp_path, data)) == 3
    state = latest(tmp_path)
    assert state["global_step"] == 2 * state["per_epoch"] and state["closed"] == 1
    assert run_here(command(tmp_path, data, *workers)) == 0
    for name in ("whole", "run"):
        assert [m["epoch"] for m in metrics(tmp_path / name) if m.get("event") == "val"] == [1, 2, 3]
    assert_same_ends(tmp_path)


def test_workers_amp_and_other_flags_run(tmp_path):
    data = make_npqs(tmp_path / "npq")
    flags = "--epochs 2 --amp --num_workers 2 --persistent-workers --prefetch 2 --quiet --pattern delay"
    flags += " --ema 0 --cb-weights uniform --eval-audio-every 2 --eval-frames 20 --eval-top-k 5"
    assert run_here(command(tmp_path, data, *flags.split())) == 0
    sample = tokens.open_npq(next((tmp_path / "eval").glob("*.npq")))
    assert sample.frames == 20 and sample.vocab == [16] * 3
    assert " step 1/" not in (tmp_path / "run/training.log").read_text()


def test_precedence_is_flag_config_checkpoint_default(tmp_path):
    data = make_npqs(tmp_path / "npq")
    run_here(command(tmp_path, data, "--epochs", "1", "--ema", "0.9", "--label-smoothing", "0.2", "--quiet"))
    (tmp_path / "c.json").write_text('{"label_smoothing": 0.1, "grad_clip": 2}')
    more = ["--config", str(tmp_path / "c.json"), "--grad-clip", "3", "--epochs", "2", "--no-quiet"]
    assert run_here(["--data", data, "--save_dir", str(tmp_path / "run"), "--device", "cpu", *more]) == 0
    found = latest(tmp_path)
    args = found["args"]
    assert (args["grad_clip"], args["label_smoothing"], args["ema"], args["prefetch"]) == (3.0, 0.1, 0.9, 6)
    assert found["epoch"] == 2 and args["ctx"] == 12 and not args["quiet"]
    assert "changed" not in (tmp_path / "run/training.log").read_text()  # windows, batch, seed are the same
    run_here(command(tmp_path, data, "--epochs", "3", "--ctx", "8"))  # --step follows a ctx that is given
    assert latest(tmp_path)["args"]["step"] == 4
    assert "continuing at the start of epoch 3" in (tmp_path / "run/training.log").read_text()


NO_MEMORY = (torch.OutOfMemoryError("CUDA out of memory"), "out of GPU memory .*lower --batch")
NO_ROOM = (OSError(28, "No space left on device", "x.pt"), "x.pt could not be written: No space.*free some")


@pytest.mark.parametrize("error,words", [NO_MEMORY, NO_ROOM, (OSError(5, "Input/output error"), None)])
def test_errors_that_end_a_run(tmp_path, monkeypatch, error, words):
    def fails(*_):
        raise error

    monkeypatch.setattr(train_rvq, "objective", fails)
    with pytest.raises(UserError if words else OSError, match=words) as e:
        run_here(command(tmp_path, make_npqs(tmp_path / "npq")))
    assert not words or e.value.code == 1


# ---- token files, generate and speaking ----


def test_token_file_commands(tmp_path, capsys):
    def token_files(*argv):
        code = train_rvq.token_files(train_rvq.tokens_parser().parse_args([str(a) for a in argv]))
        return code, capsys.readouterr().out

    np.save(tmp_path / "codes.npy", np.arange(27).reshape(1, 9, 3))
    assert token_files("from-dac", tmp_path / "codes.npy", tmp_path / "a.npq")[0] == 0
    (tmp_path / "bad.npq").write_bytes(b"RIFF")
    code, out = token_files("info", tmp_path / "a.npq", tmp_path / "bad.npq")
    assert code == 1 and "NPQ1, 3 frames x 9 at 86.13/s = 0.0 s, vocabulary [1024], 7.75 kbps" in out
    assert "bad.npq: refused: magic" in out
    make_cache(tmp_path / "cache", {"s/a.wav": speech(5, 0), "b.wav": speech(6, 1), "../c.wav": speech(7, 2)})
    code, out = token_files("from-cache", tmp_path / "cache", tmp_path / "npq")
    assert code == 0 and "1 rows: unsafe path" in out and "2 files in" in out
    assert tokens.open_npq(tmp_path / "npq/s/a.npq").frames == 5
    with pytest.raises(UserError, match="none"):
        token_files("from-dac", tmp_path / "none.npy", tmp_path / "c.npq")


@pytest.fixture(scope="module")
def snac_run(tmp_path_factory):
    tmp = tmp_path_factory.mktemp("snac")
    make_cache(tmp / "cache", {f"{i}.wav": speech(10, i) for i in range(24)})
    run_here(command(tmp, str(tmp / "cache"), "--epochs", "1"))
    return tmp


def generate(tmp, out, *extra):
    argv = [f"--checkpoint={tmp / 'run/rvq_7cb_latest.pt'}", f"--output={tmp / out}", "--frames=20", *extra]
    return train_rvq.generate(train_rvq.generate_parser().parse_args(argv))


def test_generate_npq_and_parquet_with_prompts(snac_run):
    tmp = snac_run
    assert generate(tmp, "a.npq") == 0
    assert generate(tmp, "b.parquet", "--temperature", "0.9", "--top-p", "0.9") == 0
    a = tokens.open_npq(tmp / "a.npq")
    assert a.frames == 20 and a.vocab == [16] * 7 and a.fps == pytest.approx(11.71875)
    source, rows = tokens.read_shard(tmp / "b.parquet")
    assert source["weights_sha256"] == META["weights_sha256"] and rows[0].shape == (20, 7)
    prompt = str(tmp / "cache/codes_batch_gpu0_0.parquet")
    assert generate(tmp, "c.npq", "--prompt", prompt, "--prompt-row", "3", "--prompt-frames", "4") == 0
    want = tokens.read_shard(prompt)[1][3][:4]
    assert np.array_equal(tokens.open_npq(tmp / "c.npq").tokens()[:4], want)
    assert generate(tmp, "d.npq", "--prompt", str(tmp / "a.npq")) == 0
    assert tokens.open_npq(tmp / "d.npq").frames == 40
    tokens.write_npq(tmp / "other.npq", np.zeros((20, 3), int), [16] * 3, 86.0)
    for name, why in ((str(tmp / "other.npq"), "vocabulary"), ("none.npq", "cannot be read")):
        with pytest.raises(UserError, match=why):
            generate(tmp, "e.npq", "--prompt", name)
    with pytest.raises(UserError, match="suffix"):
        generate(tmp, "e.mp3")


def test_generate_wav_through_the_dual_head(snac_run, monkeypatch):
    """The call infer.py answers: K LongTensors [1, T_k] in, (24 kHz, 48 kHz) out, 48 kHz written."""
    seen = {}

    class Decoder:
        geometry = types.SimpleNamespace(weights_sha256=META["weights_sha256"])

        def decode(self, codes):
            seen["codes"] = codes
            return torch.zeros(1, 1, 20 * 2048), torch.full((1, 1, 20 * 4096), 0.5)

    speaker = lambda path, device: seen.setdefault("path", path) and Decoder()
    monkeypatch.setattr("snac48.token_lm.load_dual_head", speaker)
    assert generate(snac_run, "a.wav", "--decoder", "our.pt") == 0
    audio, rate = soundfile.read(snac_run / "a.wav")
    assert rate == 48000 and len(audio) == 20 * 4096 and abs(audio.mean() - 0.5) < 1e-3
    assert [tuple(c.shape) for c in seen["codes"]] == [(1, 20), (1, 40), (1, 80)] and seen["path"] == "our.pt"
    assert all(c.dtype == torch.long for c in seen["codes"])


def test_dac_samples_are_spoken_by_dacmodel(tmp_path):
    from transformers import DacConfig, DacModel

    torch.manual_seed(0)
    sizes = {"encoder_hidden_size": 8, "decoder_hidden_size": 32, "hidden_size": 32, "codebook_dim": 4}
    ratios = {"downsampling_ratios": [2, 4], "upsampling_ratios": [4, 2]}
    config = DacConfig(n_codebooks=3, codebook_size=16, **sizes, **ratios)
    dac = DacModel(config)
    dac.save_pretrained(tmp_path / "dac")
    data = make_npqs(tmp_path / "npq")
    flags = ["--epochs", "1", "--eval-audio-every", "1", "--eval-frames", "30", "--eval-on-cpu"]
    assert run_here(command(tmp_path, data, *flags, "--eval-decoder", str(tmp_path / "dac"))) == 0
    audio, rate = soundfile.read(tmp_path / "eval/rvq_3cb_e0001.wav")
    frames = tokens.open_npq(tmp_path / "eval/rvq_3cb_e0001.npq").tokens().astype(np.int64)
    with torch.no_grad():
        want = dac.eval().decode(audio_codes=torch.from_numpy(frames.T[None])).audio_values.flatten().numpy()
    assert rate == config.sampling_rate and len(audio) == len(want)
    assert np.abs(audio - want.clip(-1, 1)).max() < 1e-3
    # a decoder that is not there is said, tokens are kept, the run goes on
    assert run_here(command(tmp_path, data, *flags, "--eval-decoder", str(tmp_path / "none"), run="b")) == 0
    assert "not decoded" in (tmp_path / "b/training.log").read_text()


def test_the_circle_closes(cache_dir, snac_dir, tmp_path):
    """Real codes of cache_codes.py -> model -> sampled codes -> infer.py -> 48 kHz, by both ways the same."""
    snac = load_snac(str(snac_dir))
    model = DualHeadDecoder(snac)
    start_head(model, snac, "first")
    geometry = asdict(geometry_of(snac, str(snac_dir)))
    geometry["vq_strides"] = list(geometry["vq_strides"])
    state = {"model": model.state_dict(), "model_config": model_config(snac), "geometry": geometry}
    state |= {"args": {}, "global_step": 0}
    torch.save(state, tmp_path / "dual.pt")
    assert run_here(command(tmp_path, str(cache_dir), "--epochs", "1")) == 0
    assert generate(tmp_path, "out.wav", "--decoder", str(tmp_path / "dual.pt")) == 0
    assert generate(tmp_path, "out.parquet") == 0
    files = ["--input", tmp_path / "out.parquet", "--output", tmp_path / "wavs"]
    run("infer.py", "--checkpoint", tmp_path / "dual.pt", *files, "--device", "cpu")
    ours, rate = soundfile.read(tmp_path / "out.wav")
    theirs, _ = soundfile.read(next((tmp_path / "wavs").rglob("*.wav")))
    assert rate == 48000 and len(ours) == len(theirs) == 20 * 2048 * 2
    assert np.abs(ours).max() > 1e-3 and np.abs(ours - theirs).max() < 1e-3
    state["geometry"]["weights_sha256"] = "f" * 64
    torch.save(state, tmp_path / "other.pt")
    with pytest.raises(UserError, match="another codec"):
        generate(tmp_path, "other.wav", "--decoder", str(tmp_path / "other.pt"))
    with pytest.raises(UserError, match=r"out.wav exists: --overwrite replaces it"):
        generate(tmp_path, "out.wav")
