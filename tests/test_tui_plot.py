"""tui/plot.py: curves in braille."""

import time

import pytest
from helpers.fleet import plain

from snac48.tui.plot import plot
from snac48.tui.state import Series


def series(xs, ys) -> Series:
    return Series(list(zip(xs, ys)))


def test_a_spike_of_one_step_in_200_000_is_seen():
    xs, ys = range(200_000), [1.0] * 200_000
    ys[123_456] = 50.0
    lines = plain(plot([(series(xs, ys), "", False, "")], 80, 20, (0, 199_999)))
    assert "50│" in lines[0] and any(ord(c) > 0x2800 for c in lines[0][8:])
    at = next(i for i, c in enumerate(lines[0][8:]) if ord(c) > 0x2800)
    assert at == 123_456 * 72 // 200_000
    start = time.perf_counter()
    plot([(series(xs, ys), "", False, "")], 120, 30, (0, 199_999), smooth=0.05)
    assert time.perf_counter() - start < 0.5  # benchmarks/bench_monitor.py has the real figure


@pytest.mark.parametrize("size", [(20, 6), (10, 3), (80, 20), (300, 90)])
@pytest.mark.parametrize("ys", [[], [1.0], [0.0, 0.0], [-1.0, 0.0], [0.0, 1.0], [1e-30, 1e30], [3.0] * 500])
@pytest.mark.parametrize("log", [False, True])
def test_plots_of_any_values_keep_their_size(size, ys, log):
    xs = range(len(ys))
    for smooth in (0, 0.05):
        lines = plot(
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
    lines = plain(plot([(series(xs, ys), "", False, "")], 40, 9, (0, 3), log=True))
    assert "100│" in lines[0] and "0.01│" in lines[7] and "1│" in lines[4]


@pytest.mark.parametrize("log", [False, True])
@pytest.mark.parametrize("size", [(60, 12), (48, 7), (110, 30)])
def test_the_star_lies_on_its_point(size, log):
    for n in range(40):
        xs, ys = [0, 37, 61, 200], [2.0, 1.0 + n / 50, 1.5, 1.0]
        bare = plain(plot([(series(xs, ys), "", False, "")], *size, (0, 200), log))
        for x, y in zip(xs, ys):
            starred = plain(plot([(series(xs, ys), "", False, "")], *size, (0, 200), log, best=(x, y)))
            (at,) = [(r, c) for r, line in enumerate(starred) for c, char in enumerate(line) if char == "★"]
            drawn = [r for r, line in enumerate(bare[:-1]) if ord(line[at[1]]) > 0x2800]
            assert at[0] in drawn, (n, x, y)
            if y == max(ys):
                assert at[0] == 0
            if y == min(ys):
                assert at[0] == len(bare) - 2


def test_the_star_stands_where_a_lone_point_would():
    s = series([0, 50, 100], [0.0, 0.43, 1.0])
    for y in (0.1, 0.43, 0.5, 0.87):
        dot = plain(plot([(s, "", False, ""), (series([50], [y]), "", False, "")], 60, 9, (0, 100)))
        base = plain(plot([(s, "", False, "")], 60, 9, (0, 100)))
        star = plain(plot([(s, "", False, "")], 60, 9, (0, 100), best=(50, y)))
        (row,) = [r for r, line in enumerate(star) if "★" in line]
        changed = [r for r in range(8) if dot[r] != base[r]] or [row]
        assert changed == [row]
