"""monitor.py: pure parts first, then the window itself by Textual's Pilot; snapshots at 80x24 and 120x40.

Snapshots lie in tests/monitor_snapshots; UPDATE_SNAPSHOTS=1 rewrites them (look at the diff).
"""

import asyncio
import json
import math
import os
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent), str(HERE)]
from helpers import fake_runs as fake  # noqa: E402

from snac48.tui import views as m  # noqa: E402

SNAPSHOTS = HERE / "monitor_snapshots"
SCHEMA = (
    "name",
    "kind",
    "state",
    "pid",
    "epoch",
    "epochs",
    "step",
    "phase",
    "segment_length",
    "loss",
    "loss_24k",
    "loss_48k",
    "val_loss_24k",
    "val_loss_48k",
    "best_val_loss_48k",
    "best_epoch",
    "lr",
    "eta_s",
    "alerts",
    "log",
)


def state_of(records) -> m.RunState:
    s = m.RunState()
    for r in records:
        s.feed(m.parse_line(json.dumps(fake.finite_json(r))))
    return s


def plain(lines) -> list[str]:
    return ["".join(t for t, _ in line) for line in lines]


def fleet_at(root: Path, proc=None, now=fake.NOW, mono=lambda: 1e6, nvml=None, **limits) -> m.Fleet:
    limits = m.Limits(**({"disk_gb": 0.0} | limits))
    return m.Fleet(
        root / "logs",
        (),
        limits,
        nvml or fake.FakeNvml(broken=("nvmlInit",)),
        proc.folder if proc else "/proc",
        lambda: now,
        mono,
    )


def one(root: Path, records=(), pid=7, state="R", ticks=5000, log="", kind="train",
        **kwargs) -> tuple[m.Fleet, m.Run]:  # fmt: skip
    """A fleet of one run in a /proc of our own, polled once."""
    proc = fake.FakeProc(root / "proc")
    if state:
        proc.add(pid, state, ticks)
    proc.folder.mkdir(parents=True, exist_ok=True)
    fake.add_run(root, f"{kind}_gpu0", kind, [0], pid, records=records, log=log)
    fleet = fleet_at(root, proc, **kwargs)
    fleet.poll()
    return fleet, fleet.runs[f"{kind}_gpu0"]


def alarms(run) -> str:
    return " | ".join(("!" if loud else "") + text for loud, text in run.alarms)


# ---- parser ----


@pytest.mark.parametrize(
    "line, want",
    [
        ('{"t": 1, "step": 3, "loss": "NaN", "loss_48k": "Infinity"}', {"step": 3, "loss_48k": math.inf}),
        (
            "2026-01-02 03:04 step 120/3000 epoch 2/15 main loss 1.234 24k 0.61 48k 0.5 lr 5e-05 eta 1:02:03",
            {
                "step": 120,
                "total_steps": 3000,
                "epoch": 2,
                "epochs": 15,
                "phase": "main",
                "loss": 1.234,
                "loss_24k": 0.61,
                "loss_48k": 0.5,
                "lr": 5e-5,
                "eta_s": 3723.0,
            },
        ),
        ("step 1/2 epoch 1/1 main loss nan 48k inf", {"step": 1, "loss_48k": math.inf}),
        (
            "Epoch 4:  45%|####5  | 450/1000 [01:23<02:34, 5it/s, loss=0.5123, 24k=0.61, 48k=0.5, lr=5e-05]",
            {
                "step": 3450,
                "total_steps": None,
                "epoch": 4,
                "loss": 0.5123,
                "loss_24k": 0.61,
                "loss_48k": 0.5,
                "lr": 5e-5,
            },
        ),
        ("Epoch 2/3: 50%|## | 5/10 [00:10<00:10, loss=1]", {"step": 15, "total_steps": 30, "eta_s": 30.0}),
        ("files: 50%|## | 5/10 [00:10<00:20, 1it/s]", {"step": 5, "total_steps": 10, "eta_s": 20.0}),
        (
            "Epoch 4 [Train]: Loss=0.61, 24kHz=0.60, 48kHz=0.50",
            {"event": "epoch", "epoch": 4, "loss_48k": 0.5},
        ),
        (
            "Epoch 4 [Val]: Loss=0.65, 24kHz=0.63, 48kHz=0.52",
            {"event": "val", "loss": 0.65, "loss_24k": 0.63},
        ),
    ],
)
def test_lines_of_every_kind(line, want):
    got = m.parse_line(line)
    assert {k: got.get(k) for k in want} == want


@pytest.mark.parametrize(
    "line", ["", "hello", "{", '{"a": ', "[1]", '"x"', "{" * 5000, "step 1 of 2", "\x00\xff"]
)
def test_other_text_is_no_record(line):
    assert m.parse_line(line) is None


def test_odd_values_are_harmless():
    odd = [
        {"step": True},
        {"step": -1},
        {"step": 2**40, "loss": 1},
        {"step": 1, "loss": None},
        {"step": "x"},
        {"step": 2, "loss": [1], "ce": {"a": 1}},
        {"event": "val"},
        {"event": "val", "loss_48k": "x"},
        {"event": 3},
        {"step": 3, "loss": 1e300},
        {"step": 4, "phase": {"a": 1}, "epoch": "y"},
        {"event": "skip"},
        {},
    ]
    s = state_of(odd)
    assert s.step == 4 and s.bad.tolist() == [3]
    run = m.Run("x", None)
    run.state = s
    run.judge(0, m.Limits())
    json.dumps(m.finite_json(run.row()), allow_nan=False)


def test_control_characters_do_not_reach_the_terminal():
    assert m.clean("a\x1b[2Jb\x1b]0;title\x07c\x9bd\x00") == "abc·d·"


# ---- state ----


def test_resume_replaces_overlapping_steps():
    records = fake.train_records(500)
    again = [{"event": "resume", "step": 300, "t": fake.NOW}]
    again += [fake.train_record(s, seed=9) for s in range(305, 405, 5)]
    s = state_of(records + again)
    xs = s.series["loss_48k"].xs.tolist()
    assert xs == sorted(set(xs)) and xs[-1] == s.step == 400
    assert s.series["loss_48k"].ys[-1] == pytest.approx(fake.train_record(400, seed=9)["loss_48k"])
    assert [v["step"] for v in s.vals] == [200]  # the one at 400 belongs to steps that were trained again
    assert s.end is None
    s = state_of([*records, again[0]])  # before its first step line
    assert s.step == 300 and s.series["loss"].xs[-1] == 300


def test_a_fresh_start_in_the_same_directory_forgets_the_old_run():
    s = state_of([*fake.train_records(500), {"event": "end", "reason": "finished"}, *fake.train_records(50)])
    assert s.step == 50 and s.vals == [] and s.series["loss"].xs[0] == 1 and s.end is None


@pytest.mark.parametrize("chunk", [m.CHUNK, 4000])
def test_history_read_in_pieces_equals_history_read_whole(tmp_path, monkeypatch, chunk):
    monkeypatch.setattr(m, "CHUNK", chunk)
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


@pytest.mark.parametrize("chunk", [m.CHUNK, 2000])  # 2000: every validation straddles an edge sooner or later
def test_a_single_look_knows_the_best_of_a_long_run(tmp_path, monkeypatch, chunk):
    monkeypatch.setattr(m, "CHUNK", chunk)
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


def test_spikes_survive_thinning():
    s = m.RunState()
    for x in range(m.POINTS + 5000):
        s.draw(x, {"loss": 99.0 if x == 77777 else 1.0})
    s = s.series["loss"]
    assert len(s.xs) < m.POINTS and max(s.ys) == 99 and s.xs[s.ys.index(99.0)] == 77777


def test_clock_going_back():
    records = [fake.train_record(s) | {"t": 1000.0 - s} for s in range(1, 100)]
    s = state_of(records)
    assert len(s.series["loss"].xs) == 99 and s.usual_gap() is None


def test_boundaries_of_the_curriculum():
    run = m.Run("x", None)
    run.state = state_of(fake.train_records(1480))
    assert m.boundaries(run) == [(205, "main"), (405, "2s"), (805, "3s"), (1205, "4s")]


# ---- files ----


def test_half_written_line_waits(tmp_path):
    path = tmp_path / "a"
    path.write_bytes(b'{"step": 1}\n{"st')
    t = m.Tailer(path)
    assert t.poll() == ['{"step": 1}']
    with open(path, "ab") as f:
        f.write(b'ep": 2}\n')
    assert t.poll() == ['{"step": 2}'] and t.poll() == []


def test_rotation_loses_nothing(tmp_path):
    path = tmp_path / "a"
    path.write_text("one\n")
    t = m.Tailer(path)
    assert t.poll() == ["one"]
    with open(path, "a") as f:
        f.write("two\n")
    path.rename(tmp_path / "a.1")
    assert t.poll() == ["two"]  # the new file is not there yet
    path.write_text("three\n")
    assert t.poll() == ["three"]


def test_truncation_and_regrowth(tmp_path):
    path = tmp_path / "a"
    path.write_text("one\ntwo\n")
    t = m.Tailer(path)
    assert t.poll() == ["one", "two"]
    path.write_text("3\n")
    assert t.poll() == ["3"]
    path.write_text("longer than before\nand more\n")  # same inode, past our position between two looks
    assert t.poll() == ["longer than before", "and more"]


def test_missing_then_there(tmp_path):
    t = m.Tailer(tmp_path / "a")
    assert t.poll() == []
    (tmp_path / "a").write_text("x\n")
    assert t.poll() == ["x"]


def test_ten_megabyte_line_is_skipped_and_cheap(tmp_path):
    path = tmp_path / "a"
    path.write_text("one\n")
    t = m.Tailer(path)
    t.poll()
    with open(path, "a") as f:
        f.write("x" * (10 << 20) + "\ntwo\n")
    got = []
    for _ in range(5):
        got += t.poll()
        assert len(t.partial) <= m.LONGEST
    assert got == ["two"]


def test_carriage_returns_and_bytes_that_are_not_utf8(tmp_path):
    path = tmp_path / "a"
    path.write_bytes(b"\rbar 1\rbar 2\r\n\xff\xfe caf\xe9\nend\n")
    assert m.Tailer(path).poll() == ["bar 1", "bar 2", "\ufffd\ufffd caf\ufffd", "end"]


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


# ---- the log a person scrolls ----


def pager_at(tmp_path, n=1000):
    path = tmp_path / "log"
    path.write_text("".join(f"line {i}\n" for i in range(n)))
    return path, m.Pager(path)


def test_a_reader_who_scrolled_up_is_not_yanked(tmp_path):
    path, p = pager_at(tmp_path)
    assert p.page(10) == [f"line {i}" for i in range(990, 1000)]
    p.scroll(-20, 10)
    before = p.page(10)
    assert before == [f"line {i}" for i in range(970, 980)] and p.new == 0
    with open(path, "a") as f:
        f.write("new 1\nnew 2\nnew 3\n")
    assert p.page(10) == before and p.new == 3
    p.scroll(10**9, 10)
    p.scroll(10**9, 10)
    for _ in range(5):
        p.scroll(500, 10)
    assert p.top is None and p.page(10)[-1] == "new 3" and p.new == 0


def test_scrolling_up_and_down_visits_every_line(tmp_path):
    _, p = pager_at(tmp_path, 200)
    p.page(10)
    for _ in range(30):
        p.scroll(-7, 10)
    assert p.page(10) == [f"line {i}" for i in range(10)]
    p.scroll(25, 10)
    assert p.page(10)[0] == "line 25"


def test_pager_survives_truncation_and_giant_lines(tmp_path):
    path, p = pager_at(tmp_path)
    p.page(10)
    p.scroll(-100, 10)
    path.write_text("short\n")
    assert p.page(10) == ["short"]
    path.write_bytes(b"a\n" + b"z" * (10 << 20) + b"\rlast bar\nb\xff\n")
    start = time.perf_counter()
    assert p.page(3)[-1] == "b\ufffd"
    for _ in range(50):
        p.scroll(-5, 10)
        p.page(10)
    assert time.perf_counter() - start < 2
    path.unlink()
    assert p.page(10) == []


# ---- processes ----


def test_states_from_proc(tmp_path):
    proc = fake.FakeProc(tmp_path)
    for pid, state in ((1, "R"), (2, "S"), (3, "D"), (4, "Z"), (5, "X")):
        proc.add(pid, state, ticks=100 + pid)
    file = tmp_path / "a.pid"
    for pid, want in ((1, "RUNNING"), (2, "RUNNING"), (3, "RUNNING"), (4, "DEAD"), (5, "DEAD"), (6, "DEAD")):
        file.write_text(f"{pid} {100 + pid} python train.py\n")
        assert m.job_status(file, tmp_path) == (want, pid)
    file.write_text("1 999 python train.py\n")
    assert m.job_status(file, tmp_path) == ("STALE_PID", 1)
    for junk in ("", "x", "1", "-5 3"):
        file.write_text(junk)
        assert m.job_status(file, tmp_path)[0] in ("DEAD", "STALE_PID")
    assert m.job_status(tmp_path / "none", tmp_path) == (None, None)


def test_kill_minus_9_and_zombie_for_real(tmp_path):
    p = fake.real_process(tmp_path, "train_gpu0")
    file = tmp_path / "logs" / "train_gpu0.pid"
    try:
        assert m.job_status(file) == ("RUNNING", p.pid)
        p.kill()
        deadline = time.time() + 5
        while m.process_stat(p.pid)[0] != "Z" and time.time() < deadline:
            time.sleep(0.01)
        assert m.process_stat(p.pid)[0] == "Z" and m.job_status(file) == ("DEAD", p.pid)
    finally:
        p.kill()
        p.wait()
    assert m.job_status(file) == ("DEAD", p.pid)


def test_reused_pid_for_real(tmp_path):
    p = fake.real_process(tmp_path, "train_gpu0")
    try:
        file = tmp_path / "logs" / "train_gpu0.pid"
        pid, ticks, *rest = file.read_text().split()
        file.write_text(f"{pid} {int(ticks) - 1} {' '.join(rest)}\n")
        assert m.job_status(file) == ("STALE_PID", p.pid)
    finally:
        p.kill()
        p.wait()


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
    assert (run.shown_state, run.state.step, m.done(run)) == ("FINISHED", 21, "33%")
    lines[-1]["code"] = 3
    _, run = one(tmp_path / "b", [{"t": fake.NOW, **r} for r in lines], state=None)
    assert alarms(run) == "STOPPED at step 21: resume continues it"
    lines = [
        *fake.rvq_records(),
        {"event": "val", "step": 1431, "epoch": 4, "val_loss": 2.55, "ppl": 16.0, "ce": [1]},
    ]
    _, run = one(tmp_path / "c", lines)
    assert m.best_text(run) == "2.55@4" and run.row()["best_epoch"] == 4
    (tmp_path / "somewhere").mkdir()
    (tmp_path / "somewhere" / "metrics.jsonl").write_text(fake.dump(lines))
    fleet = m.Fleet(tmp_path / "none", [tmp_path / "somewhere"])
    fleet.poll()
    assert fleet.runs["somewhere"].kind == "rvq"


# ---- alarms ----


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
    run.judge(1e6, m.Limits())
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
    monkeypatch.setattr(m.shutil, "disk_usage", lambda p: SimpleNamespace(used=95, free=10**9, total=10**11))
    _, run = one(tmp_path / "a", fake.train_records(300), disk_gb=5.0)
    assert "!DISK: 1.0G free, 5G wanted" in alarms(run)
    _, run = one(tmp_path / "b", fake.train_records(300), disk_gb=0.5)
    assert run.alarms == []


# ---- GPUs ----


def test_nvml_dying_on_any_call_never_raises():
    whole = fake.FakeNvml([(3, 7, 10**9)])
    m.GpuSampler(whole).sample()
    for n in range(1, whole.calls + 2):
        clock = [100.0]
        nvml = fake.FakeNvml([(3, 7, 10**9)], dies_at=n)
        sampler = m.GpuSampler(nvml, lambda c=clock: c[0])
        gpus = sampler.sample()
        if n <= whole.calls:
            assert sampler.error == "GPU is lost"
        json.dumps(gpus)
        sampler.sample()
        nvml.dies_at = 10**9  # the driver is back
        clock[0] += 31
        assert len(sampler.sample()) == 4 and sampler.error is None


def test_one_broken_value_leaves_the_others():
    for name in (
        "Name",
        "UtilizationRates",
        "MemoryInfo",
        "PowerUsage",
        "Temperature",
        "ComputeRunningProcesses",
    ):
        sampler = m.GpuSampler(fake.FakeNvml(broken=(f"nvmlDeviceGet{name}",)))
        (gpu, *_) = sampler.sample()
        assert sum(v is None for v in gpu.values()) == {"MemoryInfo": 2, "ComputeRunningProcesses": 0}.get(
            name, 1
        )


def test_no_nvml(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "pynvml", None)
    sampler = m.GpuSampler()
    assert sampler.sample() == [] and sampler.error
    monkeypatch.setattr(m.os.path, "exists", lambda p: True)  # a driver, but no Python package
    sampler = m.GpuSampler()
    assert sampler.sample() == [] and "not installed" in sampler.error
    fleet, _ = one(tmp_path, fake.train_records(10))
    assert "N/A (GPU is lost)" in "\n".join(plain(m.draw(fleet, m.Ui(view="system"), 80, 24)))


def test_gpu_memory_of_a_run_by_its_session(tmp_path):
    fleet, run = one(
        tmp_path, fake.train_records(10), nvml=fake.FakeNvml([(0, 555, 38 * 10**9), (1, 8, None)])
    )
    assert m.gpu_text(fleet, run) == "0 80% 40.0G*"  # pid 555 is not known to /proc: the whole GPU's
    fake.FakeProc(tmp_path / "proc").add(555, session=7)
    fleet.poll()
    assert m.gpu_text(fleet, run) == "0 80% 38.0G"
    assert fleet.report()["system"]["gpus"][0]["processes"] == [
        {"pid": 555, "mem": 38 * 10**9, "run": "train_gpu0"}
    ]


# ---- plots ----


def series(xs, ys) -> m.Series:
    return m.Series(list(zip(xs, ys)))


def test_a_spike_of_one_step_in_200_000_is_seen():
    xs, ys = range(200_000), [1.0] * 200_000
    ys[123_456] = 50.0
    lines = plain(m.plot([(series(xs, ys), "", False, "")], 80, 20, (0, 199_999)))
    assert "50│" in lines[0] and any(ord(c) > 0x2800 for c in lines[0][8:])
    at = next(i for i, c in enumerate(lines[0][8:]) if ord(c) > 0x2800)
    assert at == 123_456 * 72 // 200_000
    start = time.perf_counter()
    m.plot([(series(xs, ys), "", False, "")], 120, 30, (0, 199_999), smooth=0.05)
    assert time.perf_counter() - start < 0.5  # benchmarks/bench_monitor.py has the real figure


@pytest.mark.parametrize("size", [(20, 6), (10, 3), (80, 20), (300, 90)])
@pytest.mark.parametrize("ys", [[], [1.0], [0.0, 0.0], [-1.0, 0.0], [0.0, 1.0], [1e-30, 1e30], [3.0] * 500])
@pytest.mark.parametrize("log", [False, True])
def test_plots_of_any_values_keep_their_size(size, ys, log):
    xs = range(len(ys))
    for smooth in (0, 0.05):
        lines = m.plot(
            [(series(xs, ys), "red", True, "a")],
            *size,
            (0, max(1, len(ys) - 1)),
            log,
            smooth,
            [(0, "a"), (1, "b")],
            [0, 1],
            (0, 0.0),
        )
        assert len(lines) == size[1]
        assert all(len(t) <= size[0] for t in plain(lines))


def test_log_axis_leaves_out_zero():
    xs, ys = range(4), [0.0, 0.01, 1.0, 100.0]
    lines = plain(m.plot([(series(xs, ys), "", False, "")], 40, 9, (0, 3), log=True))
    assert "100│" in lines[0] and "0.01│" in lines[7] and "1│" in lines[4]


def test_best_and_boundaries_and_bad_steps_are_drawn(tmp_path):
    r = fake.train_records(1480)
    r[50] |= {"loss_48k": math.nan}
    fleet, _ = one(tmp_path, r)
    text = "\n".join(plain(m.draw(fleet, m.Ui(view="run"), 120, 40)))
    assert "★" in text and "┊" in text and "×" in text and "best 0.47@6" in text and "4s" in text
    zoomed = "\n".join(plain(m.draw(fleet, m.Ui(view="run", zoom=3), 120, 40)))
    assert "└1295" in zoomed


def run_text(fleet, width=120, height=40, **ui) -> str:
    return "\n".join(plain(m.draw(fleet, m.Ui(view="run", **ui), width, height)))


def test_rvq_draws_a_curve_for_every_codebook(tmp_path):
    fleet, run = one(tmp_path, fake.rvq_records(), kind="rvq")
    assert run.kind == "rvq"
    titles = [title for title, *_ in m.panels_of(run)]
    assert titles == ["loss", "cross-entropy", "lr", "ppl", "cross-entropy val", "bits/s"]
    ce = [run.state.series[f"ce_{k}"].ys[-1] for k in range(3)]
    assert "cross-entropy " + " ".join(f"{k} {c:.4g}" for k, c in enumerate(ce)) in run_text(fleet)
    for panel in (2, 5):  # alone, large: every curve ends in its codebook's number
        lines = m.panel(run, m.Ui(), 80, 20, m.panels_of(run)[panel - 1])
        ends = {text: style for line in lines[1:] for text, style in line if text in ("0", "1", "2")}
        assert len(ends) == len(set(ends.values())) == 3
    many, run = one(tmp_path / "many", fake.rvq_records(codebooks=12), kind="rvq")
    text = run_text(many, 80, 24, panel=2)
    assert all(f" {c} " in text for c in "0123456789ab")  # a legend of two lines
    assert "f: 2 more" in run_text(many, 80, 24)


def test_a_run_of_one_head_has_no_empty_panels(tmp_path):
    for head, other in (("24k", "48k"), ("48k", "24k")):
        fleet, run = one(tmp_path / head, fake.one_head_records(head))
        titles = [title for title, *_ in m.panels_of(run)]
        both = {"24k": ["codes used", "perplexity", "codec"], "48k": []}[head]
        assert titles == [f"{head[:2]} kHz", "lr", "LSD val", *both, "audio s/s"]
        for view in m.VIEWS:
            for metric in range(8):
                text = "\n".join(plain(m.draw(fleet, m.Ui(view=view, metric=metric), 120, 40)))
                assert "no points yet" not in text and (view in ("overview", "help") or other not in text)
        best = run.state.best()
        assert best["epoch"] == 6 and m.best_text(run) == {"24k": "0.42@6", "48k": "0.47@6"}[head]
        row = run.row()
        assert row[f"loss_{other}"] is row[f"val_loss_{other}"] is None and row["best_epoch"] == 6
        assert row["best_val_loss_48k"] == (best["loss_48k"] if head == "48k" else None)
        assert "best val " + {"24k": "loss 0.42", "48k": "48k 0.47"}[head] in run_text(fleet)
    assert "codes used 0 1 1 0.9 2 0.8" in run_text(one(tmp_path / "x", fake.one_head_records("24k"))[0])


@pytest.mark.parametrize("phase", ["features", "autoencoder"])
def test_the_trainer_says_which_validations_count(tmp_path, phase):
    """In a phase whose decoder is fed more than codes a validation may be low, but is never the best."""
    first = [{"step": s, "epoch": 1, "phase": phase, "loss": 1.0, "features": 1.0} for s in range(1, 9)]
    val = {"event": "val", "loss_24k": 0.1, "loss": 0.1, "best": []}
    fleet, run = one(tmp_path, [{"event": "start", "step": 0}, val | {"step": 0, "epoch": 0}, *first])
    assert phase in run_text(fleet, 80, 24) and m.panels_of(run)[0][0] == "24 kHz"
    for r in (
        val | {"step": 8, "epoch": 1, "loss": 0.05},
        val | {"step": 20, "epoch": 2, "loss": 0.5, "best": ["loss"]},
    ):
        run.state.feed(r)
    assert m.best_text(run) == "0.5@2"


# ---- --once, --json ----


def run_monitor(*args, cwd, **kwargs):
    code = "import sys, monitor; sys.argv[0] = 'monitor.py'\n" + (
        "try: monitor.main_guard(monitor.main)\nfinally: print('textual' in sys.modules, file=sys.stderr)"
    )
    env = {**os.environ, "PYTHONPATH": str(HERE.parent), "LOG_DIR": "logs"}
    return subprocess.run(
        [sys.executable, "-c", code, *args],
        cwd=cwd,
        capture_output=True,
        text=True,
        env=env,
        stdin=subprocess.DEVNULL,
        **kwargs,
    )


def test_json_schema_without_textual(tmp_path):
    fake.fleet_of_every_kind(tmp_path)
    p = run_monitor("--json", cwd=tmp_path)
    assert p.returncode == 0 and p.stderr == "False\n"
    report = json.loads(p.stdout, parse_constant=lambda c: pytest.fail(f"{c} is not JSON"))
    assert set(report) == {"runs", "system"} and len(report["runs"]) == 8
    assert set(report["system"]) == {"cpu_percent", "ram_used", "ram_total", "disk_free", "gpus"}
    for run in report["runs"]:
        assert tuple(run) == SCHEMA and run["state"] in ("RUNNING", "FINISHED", "DEAD", "STALE_PID", None)
    runs = {r["name"]: r for r in report["runs"]}
    assert runs["train_gpu1"]["state"] == "FINISHED" and runs["train_gpu1"]["best_epoch"] == 6
    assert runs["train_gpu2"]["loss_48k"] in ("Infinity", pytest.approx(0.7, abs=0.2))
    assert runs["train_gpu0"]["state"] == "DEAD" and "OutOfMemoryError" in runs["train_gpu0"]["alerts"][0]
    assert runs["phase10_old"]["state"] is None and runs["phase10_old"]["val_loss_48k"] == 0.52


def test_once_is_text_without_textual(tmp_path):
    fake.fleet_of_every_kind(tmp_path)
    p = run_monitor("--once", cwd=tmp_path)
    assert p.returncode == 0 and p.stderr == "False\n"
    assert "train_gpu0: DEAD at step 700: torch.OutOfMemoryError" in p.stdout and "RAM" in p.stdout


def test_empty_and_wrong_places_say_what_to_do(tmp_path):
    p = run_monitor("--once", cwd=tmp_path)
    assert p.returncode == 0 and "launch.sh train" in p.stdout
    assert json.loads(run_monitor("--json", cwd=tmp_path).stdout)["runs"] == []
    p = run_monitor("--once", "nothing.log", cwd=tmp_path)
    assert p.returncode == 1 and "does not exist" in p.stderr and "Traceback" not in p.stderr
    p = run_monitor(cwd=tmp_path)
    assert p.returncode == 1 and "--once" in p.stderr


def test_files_named_on_the_command_line(tmp_path):
    run_dir = fake.add_run(tmp_path, "somewhere", "train", [0], records=fake.train_records(50))
    (tmp_path / "x.log").write_text(fake.human(fake.train_records(60)))
    p = run_monitor("--json", "--log_dir", "none", str(run_dir), "x.log", cwd=tmp_path)
    runs = {r["name"]: r["step"] for r in json.loads(p.stdout)["runs"]}
    assert runs == {"somewhere": 50, "x": 60}


def test_help_is_fast(tmp_path):
    start = time.perf_counter()
    p = run_monitor("--help", cwd=tmp_path)
    assert p.returncode == 0 and p.stderr == "False\n" and time.perf_counter() - start < 1


# ---- the window ----


@pytest.fixture
def steady(tmp_path, monkeypatch):
    """A fleet whose every figure is fixed, for snapshots."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TZ", "UTC")
    time.tzset()
    proc = fake.fleet_of_every_kind(Path("."))
    proc.add(999, session=103)
    monkeypatch.setattr(m, "memory", lambda: (12 * 10**9, 64 * 10**9))
    ticks = iter(range(10**9))
    monkeypatch.setattr(m, "cpu_ticks", lambda: (1000 * (i := next(ticks)), 625 * i))
    monkeypatch.setattr(m.os, "cpu_count", lambda: 16)
    monkeypatch.setattr(m.os, "getloadavg", lambda: (3.2, 0, 0))
    usage = SimpleNamespace(used=6 * 10**11, free=4 * 10**11, total=10**12)
    monkeypatch.setattr(m.shutil, "disk_usage", lambda p: usage)
    nvml = fake.FakeNvml([(3, 999, 38 * 10**9), (2, 102, 10**9), (0, 777, 2 * 10**9)])
    fleet = fleet_at(Path("."), proc, nvml=nvml)
    fleet.poll()
    while fleet.load_older(1):
        pass
    fleet.poll()
    return fleet


def window(fleet, script, ui=None, size=(80, 24), launcher=Path("launch.sh"), refresh_s=1.0):
    """Run `script(app, pilot)` inside the app; returns the app."""

    async def go():
        app = m.make_app(fleet, ui or m.Ui(), launcher, refresh_s)
        async with app.run_test(size=size) as pilot:
            await pilot.pause()
            await script(app, pilot)
        return app

    return asyncio.run(go())


def screen(app) -> list[str]:
    return [app.pane.render_line(y).text for y in range(app.pane.size.height)]


@pytest.mark.parametrize("size", [(80, 24), (120, 40)])
def test_snapshot_of_every_view(steady, size):
    async def script(app, pilot):
        for key, view in zip(("1", "2", "3", "4", "5", "question_mark"), m.VIEWS):
            await pilot.press(key)
            await pilot.pause()
            text = "\n".join(line.rstrip() for line in screen(app)) + "\n"
            assert len(screen(app)) == size[1] and all(len(x) == size[0] for x in screen(app))
            path = SNAPSHOTS / f"{view}_{size[0]}x{size[1]}.txt"
            if os.environ.get("UPDATE_SNAPSHOTS"):
                path.parent.mkdir(exist_ok=True)
                path.write_text(text, encoding="utf-8")
            assert text == path.read_text(encoding="utf-8"), f"{view}: UPDATE_SNAPSHOTS=1 rewrites {path}"

    window(steady, script, m.Ui(selected="train_gpu3"), size)


def test_a_new_user_finds_the_four_things_on_the_screen(steady):
    """Best validation and its epoch, ETA, which run is dead and why, GPU memory of a run."""
    text = "\n".join(plain(m.draw(steady, m.Ui(selected="train_gpu3"), 80, 24)))
    assert "best val 48k 0.47 at epoch 6" in text and "ETA 0:50:40" in text and "GPU 3 83% 38.0G" in text
    assert "train_gpu0: DEAD at step 700: torch.OutOfMemoryError: CUDA out of memory." in text


def test_keys(steady):
    async def script(app, pilot):
        ui = app.ui
        await pilot.press("home", "down", "down")
        assert ui.selected == "precompute_gpu1"
        await pilot.press("end", "up", "space", "2", "s", "l", "plus", "plus", "left", "f")
        assert ui.selected == "train_gpu2" and ui.marked == {"train_gpu2"} and ui.view == "run"
        assert (ui.smooth, ui.log, ui.zoom, ui.panel) == (3, True, 2, 1) and ui.back > 0
        await pilot.press("minus", "0", "3", "m")
        assert (ui.zoom, ui.back, ui.view, ui.metric) == (0, 0, "overlay", 1)
        assert "train_gpu2" in "\n".join(screen(app)) and "train_gpu1" not in "\n".join(screen(app)[3:])
        await pilot.press("question_mark", "down", "pagedown")
        assert "Help" in screen(app)[0]

    window(steady, script)


def test_mouse(steady):
    async def script(app, pilot):
        row = next(y for y, line in enumerate(screen(app)) if "rvq_gpu0" in line)
        await pilot.click(offset=(10, row))
        assert app.ui.selected == "rvq_gpu0"
        await pilot.click(offset=(15, 0))
        assert app.ui.view == "run"
        await pilot.click(offset=(50, 12))
        assert app.ui.panel == 2
        await pilot.click(offset=(5, 12))
        assert app.ui.panel == 0

    window(steady, script)


@pytest.mark.parametrize("size", [(20, 8), (40, 10), (79, 23), (300, 80), (10, 3)])
def test_any_size_of_terminal(steady, size):
    async def script(app, pilot):
        for key in "12345?":
            await pilot.press("question_mark" if key == "?" else key)
            await pilot.press("f", "down")
        await pilot.resize_terminal(80, 24)
        await pilot.pause()

    window(steady, script, size=size)


def test_no_runs_at_all(tmp_path):
    fleet = fleet_at(tmp_path)
    fleet.poll()

    async def script(app, pilot):
        await pilot.press("2", "3", "4", "up", "home", "space", "f", "x", "5", "1")
        assert "No runs in" in screen(app)[2]

    window(fleet, script)


def fake_launcher(tmp_path, code=0) -> Path:
    path = tmp_path / "launch.sh"
    path.write_text(f'#!/bin/sh\necho "$LOG_DIR $@" >> {tmp_path}/calls\necho "did $1"\nexit {code}\n')
    path.chmod(0o755)
    return path


async def until(pilot, condition):
    deadline = time.monotonic() + 10
    while not condition() and time.monotonic() < deadline:
        await pilot.pause(0.02)
    assert condition()


def test_stop_resume_and_start_ask_first(steady, tmp_path):
    launcher, calls = fake_launcher(tmp_path), tmp_path / "calls"

    async def script(app, pilot):
        await pilot.press("x")
        await pilot.pause()
        assert len(app.screen_stack) == 2
        await pilot.press("n")
        await pilot.pause()
        assert len(app.screen_stack) == 1 and not calls.exists()
        await pilot.press("x", "y")
        await until(pilot, lambda: "done: did stop" in screen(app)[-1])
        await pilot.press("r")
        assert "running already" in screen(app)[-1]
        await pilot.press("up", "up", "up", "r", "y")  # train_gpu0 is dead
        await until(pilot, lambda: "done: did resume" in screen(app)[-1])
        await pilot.press("n", *" --limit 5", "enter", "y")
        await until(pilot, lambda: "done: did train" in screen(app)[-1])

    window(steady, script, m.Ui(selected="train_gpu3"), launcher=launcher)
    logs = tmp_path / "logs"
    assert (
        calls.read_text() == f"{logs} stop train_gpu3\n{logs} resume train_gpu0\n{logs} train 0 --limit 5\n"
    )


def test_a_launcher_that_fails_is_told(steady, tmp_path):
    async def script(app, pilot):
        await pilot.press("x", "y")
        await until(pilot, lambda: "FAILED (exit 3)" in screen(app)[-1])

    window(steady, script, m.Ui(selected="train_gpu3"), launcher=fake_launcher(tmp_path, 3))


def test_readonly_forbids_all_three(steady, tmp_path):
    async def script(app, pilot):
        for key, action in (("x", "stop"), ("r", "resume"), ("n", "start")):
            await pilot.press(key)
            assert len(app.screen_stack) == 1 and f"--readonly: {action} is off" in screen(app)[-1]

    window(steady, script, m.Ui(readonly=True), launcher=fake_launcher(tmp_path))
    assert not (tmp_path / "calls").exists()


def test_the_log_view_of_the_app_does_not_yank(steady):
    async def script(app, pilot):
        await pilot.press("4", "pageup")
        before = screen(app)[3:-1]
        with open("logs/train_gpu3.log", "a") as f:
            f.write("".join(f"fresh {i}\n" for i in range(7)))
        await until(pilot, lambda: "7 new lines" in screen(app)[2])
        assert screen(app)[3:-1] == before
        await pilot.press("G")
        assert "fresh 6" in screen(app)[-2]

    window(steady, script, m.Ui(selected="train_gpu3"), refresh_s=0.05)


def test_new_lines_arrive_and_alarms_ring(steady, monkeypatch):
    rung = []

    async def script(app, pilot):
        monkeypatch.setattr(app, "bell", lambda: rung.append(1))
        await until(pilot, lambda: app.heard)
        rung.clear()
        with open("runs/train_gpu3/metrics.jsonl", "a") as f:
            f.write(fake.dump([fake.train_record(1485) | {"loss_48k": math.nan}]))
        await until(pilot, lambda: rung)
        assert "1485/3000" in "\n".join(screen(app)) and "train_gpu3: NaN loss" in "\n".join(screen(app))
        await pilot.pause(0.3)
        assert len(rung) == 1

    window(steady, script, m.Ui(selected="train_gpu3"), refresh_s=0.05)


def test_an_error_while_reading_keeps_the_window(steady, monkeypatch):
    async def script(app, pilot):
        monkeypatch.setattr(steady, "find", lambda: 1 / 0)
        await until(pilot, lambda: "reading failed: ZeroDivisionError" in screen(app)[-1])

    window(steady, script, refresh_s=0.05)


def test_sixteen_colours_and_no_colour(steady, monkeypatch):
    def colours(app):
        strips = [s for y in range(24) for s in app.pane.render_lines(app.pane.region.reset_offset)[y]]
        return {c.type.name for s in strips if s.style for c in (s.style.color, s.style.bgcolor) if c}

    async def script(app, pilot):
        for key in "12345":
            await pilot.press(key)
            found.update(colours(app))
            bold.extend(
                s.style.reverse for s in app.pane.render_lines(app.pane.region.reset_offset)[1] if s.style
            )

    found, bold = set(), []
    window(steady, script)
    assert found <= {"STANDARD", "DEFAULT"} and "STANDARD" in found
    found, bold = set(), []
    monkeypatch.setenv("NO_COLOR", "1")
    window(steady, script)
    assert found <= {"DEFAULT"} and any(bold)  # the alarm still stands out
