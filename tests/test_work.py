"""Files shared among processes by claims."""

import json

import pytest

import snac48.work
from snac48.cli import UserError
from snac48.runlog import RunLog
from snac48.work import Progress, SharedWork, share, share_of_cores


def test_two_claims_at_once(tmp_path):
    """SharedWork for a program that reads ahead: claims are kept, given back and committed one by one."""
    work = SharedWork(tmp_path, [f"{i}" for i in range(6)], 2, {}, print)
    assert work.claim(0) and work.claim(1) and not work.claim(0)
    work.commit(0, {"rows": []})
    assert work.still_ours(1) and work.unfinished() == [1, 2]
    work.release(1)
    assert work.claim(1) and work.claim(2)
    work.release()
    assert work.claims == {} and not list((tmp_path / "work").glob("unit_000002*.claim"))
    work.close()


def test_a_unit_that_another_has_taken_over_is_not_given_back(tmp_path):
    """We slept, generation 1 works: without our generation 0 the unit would seem free."""
    work = SharedWork(tmp_path, ["a"], 1, {}, print)
    assert work.claim(0)
    (tmp_path / "work" / "unit_000000.0001.claim").write_text("{}")
    assert not work.still_ours(0)
    work.release()
    assert work.claims == {} and (tmp_path / "work" / "unit_000000.0000.claim").exists()
    work.close()


def test_units_follow_the_number_of_files_and_a_begun_folder_keeps_its_own(tmp_path):
    """360 files were one unit of 1,000, so that a second process found nothing to do."""
    files = [f"{i:05d}" for i in range(360)]
    for folder, given, units in (("a", None, 72), ("a", None, 72), ("b", 1000, 1), ("b", None, 1)):
        work = SharedWork(tmp_path / folder, files, given, {}, print)
        assert len(work.units) == units
        work.close()
    assert [share(n, 1000) for n in (1, 64, 55_419, 3_447_109)] == [1, 1, 865, 1000]
    with pytest.raises(UserError, match="unit_size: 1000 then, 7 now"):
        SharedWork(tmp_path / "b", files, 7, {}, print)


def test_progress_inside_a_unit(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(snac48.work, "PROGRESS_S", 0.0)
    progress = Progress(RunLog(tmp_path, "x.log"), "cache", {0: 2, 1: 3, 2: 4}, worker="gpu0")
    progress.at(1)
    progress.add(2.5)
    progress.add(None)
    progress.left(4)  # of the last unit
    progress.left(0)
    lines = capsys.readouterr().out.splitlines()
    assert [line[: line.index("/9 files") if "/9" in line else None] for line in lines] == [
        "cache 3", "cache 4", "4 files are with other processes: waiting for them", "cache 9"]  # fmt: skip
    assert "4/9 files  skipped 1  " in (tmp_path / "x.log").read_text()
    metrics = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [(m["step"], m["total_steps"], m["worker"]) for m in metrics] == [
        (3, 9, "gpu0"), (4, 9, "gpu0"), (9, 9, "gpu0")]  # fmt: skip


def test_decoders_share_the_cores_of_this_process_among_its_gpus(monkeypatch):
    import torch

    monkeypatch.setattr(snac48.work.os, "sched_getaffinity", lambda pid: set(range(48)))
    for gpus, wanted in ((1, 48), (8, 6), (64, 1)):
        monkeypatch.setattr(torch.cuda, "device_count", lambda gpus=gpus: gpus)
        assert share_of_cores("cuda") == wanted
    assert share_of_cores("cpu") == 1
