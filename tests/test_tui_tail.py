"""tui/tail.py: files that grow, and the log a person scrolls."""

import time

from snac48.tui.tail import LONGEST, Pager, Tailer


def test_half_written_line_waits(tmp_path):
    path = tmp_path / "a"
    path.write_bytes(b'{"step": 1}\n{"st')
    t = Tailer(path)
    assert t.poll() == ['{"step": 1}']
    with open(path, "ab") as f:
        f.write(b'ep": 2}\n')
    assert t.poll() == ['{"step": 2}'] and t.poll() == []


def test_rotation_loses_nothing(tmp_path):
    path = tmp_path / "a"
    path.write_text("one\n")
    t = Tailer(path)
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
    t = Tailer(path)
    assert t.poll() == ["one", "two"]
    path.write_text("3\n")
    assert t.poll() == ["3"]
    path.write_text("longer than before\nand more\n")  # same inode, past our position between two looks
    assert t.poll() == ["longer than before", "and more"]


def test_missing_then_there(tmp_path):
    t = Tailer(tmp_path / "a")
    assert t.poll() == []
    (tmp_path / "a").write_text("x\n")
    assert t.poll() == ["x"]


def test_ten_megabyte_line_is_skipped_and_cheap(tmp_path):
    path = tmp_path / "a"
    path.write_text("one\n")
    t = Tailer(path)
    t.poll()
    with open(path, "a") as f:
        f.write("x" * (10 << 20) + "\ntwo\n")
    got = []
    for _ in range(5):
        got += t.poll()
        assert len(t.partial) <= LONGEST
    assert got == ["two"]


def test_carriage_returns_and_bytes_that_are_not_utf8(tmp_path):
    path = tmp_path / "a"
    path.write_bytes(b"\rbar 1\rbar 2\r\n\xff\xfe caf\xe9\nend\n")
    assert Tailer(path).poll() == ["bar 1", "bar 2", "\ufffd\ufffd caf\ufffd", "end"]


def pager_at(tmp_path, n=1000):
    path = tmp_path / "log"
    path.write_text("".join(f"line {i}\n" for i in range(n)))
    return path, Pager(path)


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
