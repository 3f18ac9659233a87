"""tui/runs.py: files, history, processes and alarms of runs."""

import json
import math
import shutil
import signal
import socket
import subprocess
import sys
import time
from types import SimpleNamespace

import pytest
from helpers import fake_runs as fake
from helpers.fleet import alarms, fleet_at, one, run_text, state_of

from snac48.tui import runs
from snac48.tui.runs import Fleet, Limits
from snac48.tui.text import short
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


@pytest.mark.parametrize("once", [False, True])
def test_a_long_older_log(tmp_path, once):
    (tmp_path / "old.log").write_text(fake.older_log(epochs=5, batches=8000, best=2))
    fleet = Fleet(tmp_path / "none", [tmp_path / "old.log"])
    fleet.poll()
    run = fleet.runs["old"]
    assert run.text.before > 1e6
    while run.load_older(events_only=once):
        pass
    row = run.row()
    assert (row["best_epoch"], row["best_val_loss_48k"], row["step"]) == (2, 0.95, 40000)
    assert [v["epoch"] for v in run.state.vals] == [1, 2, 3, 4, 5] and row["phase"] == "main training"


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


def test_a_total_that_discriminators_raise_is_no_divergence(tmp_path):
    r = [fake.train_record(s) | {"phase": "adversarial"} for s in range(5, 1000, 5)]
    r += [x | {"step": 1000 + x["step"], "loss": 9.0, "loss_48k": 0.5} for x in r[:30]]
    _, run = one(tmp_path, r)
    assert run.alarms == []


def test_an_alarm_where_the_discriminators_win(tmp_path):
    r = fake.train_records(300)
    r += [fake.train_record(s) | {"disc_48k": 0.2, "adv_48k": 4.0} for s in range(305, 405, 5)]
    _, run = one(tmp_path, r)
    assert run.alarms == []
    assert "discriminators 0.2" in run_text(one(tmp_path / "seen", r)[0], 160, 60)
    for s in range(405, 505, 5):
        run.state.feed(fake.train_record(s) | {"disc_48k": 0.01, "adv_48k": 7.9})
    run.judge(1e6, Limits())
    assert alarms(run).startswith("!DISC WINS: disc_48k 0.01")
    run.state.feed(fake.train_record(505))  # another phase: the value is an old one
    run.judge(1e6, Limits())
    assert run.alarms == []


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


# ---- the run directory knows its process ----


def processes(run_dir, *rows):
    for pid, ticks in rows:
        row = {"t": fake.NOW, "host": socket.gethostname(), "pid": pid, "start": ticks, "argv": ["train.py"]}
        with open(run_dir / "processes.jsonl", "a") as f:
            f.write(json.dumps(row) + "\n")


def opened(tmp_path, *files, proc=None):
    clocks = (lambda: fake.NOW, lambda: 1e6)
    fleet = Fleet(tmp_path / "none", files, proc=proc.folder if proc else "/proc", clocks=clocks)
    fleet.poll()
    return fleet


def test_a_run_opened_by_its_folder_knows_its_process(tmp_path):
    run_dir = fake.add_run(tmp_path, "mine", "train", [0], records=fake.train_records(100))
    proc = fake.FakeProc(tmp_path / "proc")
    (run,) = opened(tmp_path, run_dir, proc=proc).runs.values()
    assert run.shown_state is None  # of a time before processes.jsonl
    proc.add(40, ticks=1)
    processes(run_dir, (40, 999), (41, 5000), (42, 5000))
    proc.add(42)
    fleet = opened(tmp_path, run_dir, proc=proc)
    (run,) = fleet.runs.values()
    assert (run.shown_state, run.pid) == ("RUNNING", 42)
    for letter, want in (("T", "PAUSED"), ("S", "RUNNING"), ("Z", "DEAD")):
        proc.add(42, letter)
        fleet.poll()
        assert (run.shown_state, run.pid) == (want, 42)
        if want == "PAUSED":
            assert alarms(run) == "PAUSED at step 100: SIGSTOP holds it; kill -CONT 42 lets it go on"
            assert "1 paused" in run_text(fleet) and run.row()["eta_s"] is None
    proc.add(41)  # the one before is still there: that one writes
    fleet.poll()
    assert (run.shown_state, run.pid) == ("RUNNING", 41)
    text = (run_dir / "processes.jsonl").read_text().replace(socket.gethostname(), "elsewhere")
    (run_dir / "processes.jsonl").write_text(text)
    fleet.poll()
    assert (run.shown_state, run.pid) == (None, None)  # nobody here can tell


def test_what_a_program_writes_is_what_the_monitor_reads(tmp_path):
    code = "import sys, time; sys.path.insert(0, sys.argv.pop(1)); from snac48.runlog import RunLog\n"
    code += "RunLog(sys.argv[1]).metric(step=1, total_steps=2, loss=1.0); time.sleep(60)"
    p = subprocess.Popen([sys.executable, "-c", code, fake.ROOT, tmp_path / "run"])
    try:
        deadline = time.time() + 20
        while not (tmp_path / "run" / "metrics.jsonl").exists() or not fleet_of(tmp_path).state.step:
            assert time.time() < deadline
            time.sleep(0.05)
        run = fleet_of(tmp_path)
        assert (run.shown_state, run.pid) == ("RUNNING", p.pid)
        p.send_signal(signal.SIGSTOP)
        while fleet_of(tmp_path).shown_state != "PAUSED":
            assert time.time() < deadline
    finally:
        p.kill()
        p.wait()
    assert fleet_of(tmp_path).shown_state == "DEAD"


def fleet_of(tmp_path):
    fleet = Fleet(tmp_path / "none", [tmp_path / "run"])
    fleet.poll()
    return fleet.runs["run"]


def test_a_job_gone_on_with_by_hand_is_alive(tmp_path):
    fleet, run = one(tmp_path, fake.train_records(100), state=None)
    assert run.shown_state == "DEAD"
    fake.FakeProc(tmp_path / "proc").add(77)
    processes(run.run_dir, (77, 5000))
    fleet.poll()
    assert (run.shown_state, run.pid) == ("RUNNING", 77)


def test_the_same_run_never_twice(tmp_path):
    run_dir = fake.add_run(tmp_path, "train_gpu0", "train", [0], 7, records=fake.train_records(100))
    (run_dir / "training.log").write_text("x\n")
    link = tmp_path / "link"
    link.symlink_to(run_dir)
    files = (run_dir, run_dir / "training.log", run_dir / "metrics.jsonl", link)
    assert list(opened(tmp_path, *files).runs) == ["train_gpu0"]
    logs = tmp_path / "logs"
    fleet = Fleet(logs, [*files, logs / "train_gpu0.log"])
    fleet.poll()
    assert list(fleet.runs) == ["train_gpu0"] and fleet.runs["train_gpu0"].folder == logs
    job = json.loads((logs / "train_gpu0.json").read_text())  # gone on with on another GPU
    (logs / "train_gpu1.json").write_text(json.dumps(job | {"started": fake.NOW, "gpus": [1]}))
    fleet.poll()
    assert list(fleet.runs) == ["train_gpu1"]
    other = fake.add_run(tmp_path / "b", "train_gpu1", "train", [0], records=fake.train_records(50))
    fleet = Fleet(logs, [other])
    fleet.poll()
    assert sorted(fleet.runs) == ["train_gpu1", "train_gpu1'"]


def test_a_cache_folder_of_several_jobs_shows_the_jobs(tmp_path):
    for i in (0, 1):
        run_dir = fake.add_run(tmp_path, f"cache_gpu{i}", "cache", str(i), 50 + i)
        info = tmp_path / "logs" / f"cache_gpu{i}.json"
        info.write_text(info.read_text().replace(str(run_dir), str(tmp_path / "runs" / "cache_gpu0")))
    (tmp_path / "runs" / "cache_gpu0" / "metrics.jsonl").write_text("")
    fleet = Fleet(tmp_path / "logs", [tmp_path / "runs" / "cache_gpu0"])
    fleet.poll()
    assert sorted(fleet.runs) == ["cache_gpu0", "cache_gpu1"]


# ---- ages, time left ----


def test_after_a_resume_no_value_of_a_lost_step_is_shown(tmp_path):
    r = [
        *fake.train_records(20, every=10),
        {"event": "resume", "step": 10, "epochs": 15, "total_steps": 3000},
    ]
    _, run = one(tmp_path, r)
    row = run.row()
    assert (row["step"], row["epochs"], row["loss"], row["loss_48k"], row["lr"], row["eta_s"]) == (
        10, 15, None, None, None, None)  # fmt: skip
    run.state.feed(fake.train_record(11))
    assert run.row()["loss"] == fake.train_record(11)["loss"]


def test_a_value_of_an_older_step_is_left_out_or_marked(tmp_path):
    r = fake.train_records(100, every=10)
    r[-1] = {k: v for k, v in r[-1].items() if k != "loss_24k"}
    fleet, run = one(tmp_path, r)
    assert run.row()["loss_24k"] is None and run.row()["loss"] == r[-1]["loss"]
    assert f"24k {short(r[-2]['loss_24k'])} (step 90)" in run_text(fleet)


def test_time_left_counts_down_at_the_median_pace(tmp_path):
    clock = [1e6]
    r = [{"event": "start", "step": 0, "total_steps": 1000, "t": fake.NOW}]
    fleet, run = one(tmp_path, r, kind="rvq", mono=lambda: clock[0])
    assert (run.row()["step"], run.state.latest["total_steps"]) == (0, 1000)
    times = [0, 2, 4, 90, 92, 94, 96]  # a validation of 86 s is no step
    with open(run.metrics.path, "a") as f:
        f.write(fake.dump({"step": i, "total_steps": 1000, "t": fake.NOW + t, "eta_s": 9e9, "ppl": 1.0}
                          for i, t in enumerate(times, 1)))  # fmt: skip
    fleet.poll()
    assert run.row()["eta_s"] == 2.0 * 993
    clock[0] += 30
    fleet.poll()
    assert run.row()["eta_s"] == 2.0 * 993 - 30
    clock[0] += 3000
    fleet.poll()
    assert run.row()["eta_s"] == 0
    clock[0] = 1e6
    fleet, run = one(tmp_path / "b", fake.train_records(100), mono=lambda: clock[0])
    clock[0] += 7
    fleet.poll()
    assert run.row()["eta_s"] == 2.0 * 2900 - 7  # a training says itself


def test_a_job_without_metrics_is_told_by_the_exit_code_it_left(tmp_path):
    """A cache of both splits has no run directory of its own."""
    for code, state, word in (("0", "FINISHED", "FINISHED"), ("3", "DEAD", "STOPPED"), ("1", "DEAD", "DEAD")):
        (tmp_path / "cache_cpu.json").write_text('{"name": "cache_cpu", "kind": "cache", "run_dir": null}')
        (tmp_path / "cache_cpu.pid").write_text("999999999 1 python cache_codes.py\n")
        (tmp_path / "cache_cpu.log").write_text("cache 4/4 files\n")
        (tmp_path / "cache_cpu.exit").write_text(f"{code}\n")
        fleet = Fleet(tmp_path)
        fleet.poll()
        (run,) = fleet.runs.values()
        assert (run.shown_state, run.state_word) == (state, word)
        assert any("DEAD" in text for _, text in run.alarms) == (code == "1")
