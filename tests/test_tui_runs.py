"""tui/runs.py: files, history, processes and alarms of runs."""

import json
import math
import shutil
from types import SimpleNamespace

import pytest
from helpers import fake_runs as fake
from helpers.fleet import alarms, fleet_at, one, run_text, state_of

from snac48.tui import runs
from snac48.tui.runs import Fleet, Limits
from snac48.tui.views import best_text, done


@pytest.mark.parametrize("chunk", [runs.CHUNK, 4000])
def test_history_read_in_pieces_equals_history_read_whole(tmp_path, monkeypatch, chunk):
    monkeypatch.setattr(runs, "CHUNK", chunk)
    records = fake.train_records(5000, total=5000, every=1)
    records[700] |= {"loss": math.nan}
    records += [{"event": "resume", "step": 4500}, *(fake.train_record(s, seed=4) for s in range(4501, 4900))]
    fleet, run = one(tmp_path, records)
    assert run.state.series["loss"].xs[0] > 2000  # at first only the end of the file
    with open(run.metrics.path, "a") as f:
        while run.load_older():  # the run goes on meanwhile
            record = fake.train_record(len(records))
            records.append(record)
            f.write(fake.dump([record]))
            f.flush()
            fleet.poll()
    fleet.poll()
    whole = state_of(records)
    assert run.state.series.keys() == whole.series.keys()
    for key, s in whole.series.items():
        assert run.state.series[key].xs == s.xs and run.state.series[key].ys == s.ys
    for what in ("vals", "marks", "bad", "step", "lowest"):
        assert getattr(run.state, what) == getattr(whole, what), what


def test_a_long_history_comes_in_pieces(tmp_path):
    records = fake.train_records(12000, total=12000, every=1)
    fleet, run = one(tmp_path, records)
    first = run.state.series["loss"].xs[0]
    assert first > 8000 and run.state.best()["step"] > 8000
    while fleet.load_older(1):
        pass
    assert run.state.series["loss"].xs.tolist() == list(range(1, 12001))
    assert len(run.state.vals) == 15 and run.row()["best_epoch"] == 6


@pytest.mark.parametrize("chunk", [runs.CHUNK, 2000])  # 2000: validations straddle edges
def test_a_single_look_knows_the_best_of_a_long_run(tmp_path, monkeypatch, chunk):
    monkeypatch.setattr(runs, "CHUNK", chunk)
    first = [*fake.train_records(9000, total=12000, every=1), {"event": "end", "reason": "diverged"}]
    for v in first:
        if v.get("event") == "val":
            v["loss_48k"] = 0.01  # of an earlier attempt that began anew: not ours
    records = first + fake.train_records(12000, total=12000, every=1)
    _, run = one(tmp_path, records)
    while run.load_older(events_only=True):
        pass
    assert (
        run.row()["best_val_loss_48k"] == 0.47 and run.row()["best_epoch"] == 6 and len(run.state.vals) == 15
    )


def test_a_run_with_all_that_in_its_log(tmp_path):
    bar = b"\rEpoch 1/2: 50%|## | 5/10 [00:10<00:10, loss=0.5, 24k=nan, 48k=0.4]" * 3
    junk = b"\xff\xfe\n" + b"y" * (10 << 20) + b"\n"
    (tmp_path / "logs").mkdir()
    (tmp_path / "logs" / "old.log").write_bytes(junk + bar + b"\n" + b"Epoch 1 [Val]: Loss=0.6, 48kHz=0.5\n")
    fleet = fleet_at(tmp_path)
    fleet.poll()
    run = fleet.runs["old"]
    assert run.shown_state is None and run.state.step == 5 and run.row()["best_val_loss_48k"] == 0.5
    assert run.state.bad.tolist() and math.isnan(run.row()["loss_24k"])
    assert json.loads(json.dumps(fleet.report(), allow_nan=False))["runs"][0]["loss_24k"] == "NaN"


def test_an_older_log_whole(tmp_path):
    (tmp_path / "old.log").write_text(fake.older_log())
    fleet = Fleet(tmp_path / "none", [tmp_path / "old.log"])
    fleet.poll()
    run = fleet.runs["old"]
    s, row = run.state, run.row()
    assert (run.kind, row["epoch"], row["epochs"], row["step"], row["phase"]) == (
        "train", 5, 5, 200, "main training")  # fmt: skip
    assert (row["best_epoch"], row["best_val_loss_48k"], best_text(run)) == (4, 0.95, "0.95@4")
    assert (row["val_loss_24k"], row["val_loss_48k"]) == (0.95, 1.05)
    assert s.best("loss_24k")["epoch"] == 4 and s.vals[0]["l1_24k"] == 0.02 and s.vals[0]["stft_48k"] == 0.8
    assert s.val_series("loss_48k").xs.tolist() == [40, 80, 120, 160, 200]  # after each epoch's batches
    assert len(s.series["loss_48k"].xs) == 105 and [m[0] for m in s.marks] == [0, 40]
    text = run_text(fleet)
    assert "best val 48k 0.95 at epoch 4" in text and "★" in text and "main training" in text


def test_an_older_log_of_a_language_model(tmp_path):
    lines = [f"Epoch {e}/350 | train {5 - e / 10:.4f} | val {4.8 - e / 10 + (e > 3):.4f} | ppl 66.0\n"
             f"  val CE per codebook: 3.1{e}, 3.9, 4.2\n" for e in range(1, 6)]  # fmt: skip
    (tmp_path / "a.log").write_text("".join(lines) + "epoch 350/350 done, best val 4.1\n")
    (tmp_path / "b.log").write_text("".join(
        f"epoch {e}: train_loss={5 - e / 10}, val_loss={4.8 - e / 10}, val_ppl=60.0, lr=2.0e-04\n"
        for e in range(1, 4)))  # fmt: skip
    fleet = Fleet(tmp_path / "none", [tmp_path / "a.log", tmp_path / "b.log"])
    fleet.poll()
    a, b = fleet.runs["a"].state, fleet.runs["b"].state
    assert [v["loss"] for v in a.vals] == pytest.approx([4.7, 4.6, 4.5, 5.4, 5.3]) and a.best()["epoch"] == 3
    assert a.vals[1]["ce_0"] == 3.12 and a.vals[1]["ppl"] == 66.0 and fleet.runs["a"].kind == "rvq"
    assert a.series["loss"].ys.tolist() == pytest.approx([4.9, 4.8, 4.7, 4.6, 4.5])
    assert (
        b.best()["epoch"] == 3
        and b.latest["lr"] == 2e-4
        and b.vals[0]["ppl"] == 60
        and b.series["loss"].xs.tolist() == [1, 2, 3]
    )


def test_finished_stopped_died_and_reused(tmp_path):
    r = fake.train_records(100)
    end = {"t": fake.NOW, "event": "end", "step": 100}
    _, run = one(tmp_path / "a", [*r, end | {"reason": "finished"}], state=None)
    assert run.shown_state == "FINISHED" and run.alarms == [] and run.row()["eta_s"] is None
    _, run = one(tmp_path / "b", [*r, end | {"reason": "stopped", "signal": "SIGTERM"}], state=None)
    assert run.shown_state == "DEAD" and alarms(run) == "STOPPED at step 100 by SIGTERM: resume continues it"
    _, run = one(tmp_path / "c", [*r, end | {"reason": "diverged", "code": 4}], state=None)
    assert alarms(run) == "!DEAD at step 100: diverged (exit code 4)"
    _, run = one(tmp_path / "d", r, state=None, log="step 100/3000 epoch 1/15 main loss 1\n")
    assert alarms(run).startswith("!DEAD at step 100: vanished without a word") and "epoch 1/15" in alarms(
        run
    )
    _, run = one(tmp_path / "e", r, ticks=77)
    assert run.shown_state == "STALE_PID" and "another process" in alarms(run)
    _, run = one(tmp_path / "f", r, state="Z", log="x\nRuntimeError: CUDA error: no kernel image\n")
    assert run.shown_state == "DEAD" and "RuntimeError: CUDA error" in alarms(run)
    _, run = one(tmp_path / "g", [*r, end | {"reason": "finished", "t": fake.NOW - 90000}], state=None)
    assert run.shown_state == "DEAD"  # that end was an earlier attempt's


def test_processes_that_share_a_metrics_file_are_told_apart(tmp_path):
    """cache_gpu0 and cache_gpu1 write into one output folder; gpu0 ends first, gpu1 is killed."""
    proc = fake.FakeProc(tmp_path / "proc")
    proc.folder.mkdir(parents=True)
    shared = [
        {"event": "start", "total_steps": 90, "worker": "gpu0"},
        {"step": 30, "total_steps": 90, "phase": "cache", "audio_s_per_s": 5.0, "worker": "gpu0"},
        {"step": 20, "total_steps": 90, "phase": "cache", "audio_s_per_s": 6.0, "worker": "gpu1"},
        {"event": "end", "reason": "finished", "worker": "gpu0"},
        {"step": 40, "total_steps": 90, "phase": "cache", "audio_s_per_s": 7.0, "worker": "gpu1"},
    ]
    for i in (0, 1):
        run_dir = fake.add_run(tmp_path, f"cache_gpu{i}", "cache", str(i), 50 + i)
        (run_dir / "metrics.jsonl").write_text(fake.dump({"t": fake.NOW, **r} for r in shared))
    fleet = fleet_at(tmp_path, proc)
    fleet.poll()
    a, b = fleet.runs["cache_gpu0"], fleet.runs["cache_gpu1"]
    assert (a.shown_state, a.state.step, a.alarms) == ("FINISHED", 30, [])
    assert (b.shown_state, b.state.step) == ("DEAD", 40) and "vanished" in alarms(b)


def test_precompute_and_rvq_as_they_write(tmp_path):
    lines = [
        {"event": "start", "kind": "precompute", "files": 63, "proc": "vm-7"},
        {"step": 21, "files": 63, "skipped": 1, "audio_s_per_s": 144.9, "proc": "vm-7"},
        {"step": 99, "files": 63, "proc": "vm-8"},
        {"event": "end", "code": 0, "proc": "vm-7", "files": 63},
    ]
    _, run = one(tmp_path / "a", [{"t": fake.NOW, **r} for r in lines], state=None)
    assert (run.shown_state, run.state.step, done(run)) == ("FINISHED", 21, "33%")
    lines[-1]["code"] = 3
    _, run = one(tmp_path / "b", [{"t": fake.NOW, **r} for r in lines], state=None)
    assert alarms(run) == "STOPPED at step 21: resume continues it"
    lines = [
        *fake.rvq_records(),
        {"event": "val", "step": 1431, "epoch": 4, "val_loss": 2.55, "ppl": 16.0, "ce": [1]},
    ]
    _, run = one(tmp_path / "c", lines)
    assert best_text(run) == "2.55@4" and run.row()["best_epoch"] == 4
    (tmp_path / "somewhere").mkdir()
    (tmp_path / "somewhere" / "metrics.jsonl").write_text(fake.dump(lines))
    fleet = Fleet(tmp_path / "none", [tmp_path / "somewhere"])
    fleet.poll()
    assert fleet.runs["somewhere"].kind == "rvq"


def test_a_healthy_run_raises_no_alarm(tmp_path):
    _, run = one(tmp_path, fake.train_records(1480))
    assert run.shown_state == "RUNNING" and run.alarms == []


def test_nan_alarm_comes_and_goes(tmp_path):
    r = fake.train_records(300)
    r[-1] |= {"loss": math.nan}
    _, run = one(tmp_path, r)
    assert "!NaN loss at step" in alarms(run)
    for step in range(305, 605, 5):
        run.state.feed(fake.train_record(step))
    run.judge(1e6, Limits())
    assert run.alarms == [] and len(run.state.bad) == 1


def test_skip_alarm(tmp_path):
    r = [*fake.train_records(300), {"event": "skip", "step": 301, "reason": "outlier", "t": fake.NOW}]
    _, run = one(tmp_path, r)
    assert "SKIP: 1 of the last" in alarms(run) and "outlier" in alarms(run)


def test_divergence_alarm(tmp_path):
    r = fake.train_records(1000)
    r += [fake.train_record(s) | {"loss": 4.0} for s in range(1005, 1105, 5)]
    _, run = one(tmp_path, r)
    assert "!DIVERGING: loss 4 is" in alarms(run)


def test_stall_alarm_and_a_clock_set_back(tmp_path):
    clock = [1e6]
    fleet, run = one(
        tmp_path, fake.train_records(300), now=1.0, mono=lambda: clock[0]
    )  # files "from the future"
    assert run.alarms == []
    clock[0] += 290
    fleet.poll()
    assert run.alarms == []
    clock[0] += 20
    fleet.poll()
    assert "!STALL: no new line for 0:05:10, usually 10.0 s" in alarms(run)
    with open(tmp_path / "runs" / "train_gpu0" / "metrics.jsonl", "a") as f:
        f.write(fake.dump([fake.train_record(305)]))
    fleet.poll()
    assert run.alarms == []


def test_a_slow_run_is_no_stall(tmp_path):
    r = [fake.train_record(s) | {"t": fake.NOW + 100 * s} for s in range(1, 30)]
    clock = [1e6]
    fleet, run = one(tmp_path, r, mono=lambda: clock[0])
    run.grown = clock[0]
    clock[0] += 1900
    fleet.poll()
    assert run.alarms == []
    clock[0] += 200
    fleet.poll()
    assert "STALL" in alarms(run)


def test_disk_alarm(tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda p: SimpleNamespace(used=95, free=10**9, total=10**11))
    _, run = one(tmp_path / "a", fake.train_records(300), disk_gb=5.0)
    assert "!DISK: 1.0G free, 5G wanted" in alarms(run)
    _, run = one(tmp_path / "b", fake.train_records(300), disk_gb=0.5)
    assert run.alarms == []
