"""Curves in braille: lowest and highest per column, so that a spike of one step survives."""

import math
from bisect import bisect_left, bisect_right

from .text import packed, short

DOTS = ((0x01, 0x08), (0x02, 0x10), (0x04, 0x20), (0x40, 0x80))


def columns(xs, ys, x0: float, x1: float, n: int, log: bool = False) -> list[tuple | None]:
    """(lowest, highest, mean) of the points in each of n equal parts of [x0, x1]; None where none."""
    found, i, width = [], bisect_left(xs, x0), (x1 - x0) / n
    for c in range(n):
        j = bisect_right(xs, x1, i) if c == n - 1 else bisect_left(xs, x0 + (c + 1) * width, i)
        part, i = ys[i:j], j
        if part and log and min(part) <= 0:  # no place on a logarithmic axis
            part = [v for v in part if v > 0]
        found.append((min(part), max(part), sum(part) / len(part)) if part else None)
    return found


def smoothed(cols: list, window: float) -> list:
    """Mean over `window` (a share of the visible width), centred."""
    k = max(1, round(window * len(cols) / 2))
    out = []
    for c, col in enumerate(cols):
        near = [p[2] for p in cols[max(0, c - k) : c + k + 1] if p]
        out.append(col and (sum(near) / len(near),) * 3)
    return out


def raster(layers: list, width: int, height: int, y0: float, y1: float, log: bool = False) -> list[list]:
    """[(columns, style)] -> height rows of width (character, style); a later layer covers an earlier one."""
    f, top = math.log10 if log else float, 4 * height - 1
    low = f(y0)
    scale = top / ((f(y1) - low) or 1)
    rows = [[(" ", "")] * width for _ in range(height)]
    for cols, style in layers:
        bits: dict = {}

        def bar(c, a, b, bits=bits):
            for d in range(top - b, top - a + 1):
                bits[d // 4, c // 2] = bits.get((d // 4, c // 2), 0x2800) | DOTS[d % 4][c % 2]

        before = None
        for c, col in enumerate(cols):
            if col is None:
                continue
            a, b, mid = (min(max(round((f(v) - low) * scale), 0), top) for v in col)
            if before:
                pc, pa, pb, start = at = before
                at = start
                for k in range(pc + 1, c):  # a gap: a straight line
                    to = round(start + (mid - start) * (k - pc) / (c - pc))
                    bar(k, min(at, to), max(at, to))
                    at = pa = pb = to
                bar(c, min(a, pb), max(b, pa))
            else:
                bar(c, a, b)
            before = (c, a, b, mid)
        for (r, c), value in bits.items():
            rows[r][c] = (chr(value), style)
    return rows


def boundaries(marks, rows: list[list], axis: list, x0: float, x1: float) -> None:
    """Draw vertical lines at [(x, label)] into `rows`, and their labels into `axis` where there is room."""
    w = len(axis)
    for x, label in marks:
        if x0 < x < x1:
            c = min(int((x - x0) / (x1 - x0) * w), w - 1)
            for row in rows:
                row[c] = ("┊", "dim") if row[c][0] == " " else row[c]
            if all(a == " " for a in axis[max(0, c - 1) : c + len(label) + 1]) and c + len(label) < w:
                axis[c : c + len(label)] = label


def plot(curves, width, height, span=(0, 1), log=False, smooth=0.0, marks=(), bad=(), best=None,
         limits=None, ends=()) -> list:  # fmt: skip
    """`height` lines of `width`: canvas and x axis. curves: [(Series, style, dotted, letter at its end)].

    span: x range. marks: [(x, label)] vertical lines. bad: x of non-finite values. best: (x, y).
    limits: y range, else that of the values. ends: words below the x axis' ends, else its numbers.
    """
    (x0, x1), (w, h) = span, (max(2, width - 8), max(1, height - 1))
    x1 = max(x1, x0 + 1)
    layers, values = [], []
    for s, style, _, _ in curves:
        cols = columns(s.xs, s.ys, x0, x1, 2 * w, log)
        seen = [c for c in cols if c]
        values += [c[0] for c in seen] + [c[1] for c in seen]
        if smooth and len(seen) > 20:
            layers += [(cols, "dim"), (smoothed(cols, smooth), style)]
        else:
            layers.append((cols, style))
    if not values:
        why = "no positive value for a log axis" if log and any(c[0].xs for c in curves) else "no points yet"
        return [[(f"{'':8}{why}"[:width] if i == h // 2 else "", "dim")] for i in range(h + 1)]
    y0, y1 = limits or (min(values), max(values))
    if y0 == y1:
        y0, y1 = (y0 / 1.1, y1 * 1.1) if log else (y0 - (abs(y0) * 0.1 or 1), y1 + (abs(y1) * 0.1 or 1))
    rows = raster(layers, w, h, y0, y1, log)

    def put(x, y, sign, style):
        if x0 <= x <= x1 and (y > 0 or not log):
            share = math.log10(y / y0) / math.log10(y1 / y0) if log else (y - y0) / (y1 - y0)
            dot = min(max(round(share * (4 * h - 1)), 0), 4 * h - 1)  # as `raster` places it
            row = rows[(4 * h - 1 - dot) // 4]
            row[min(int((x - x0) / (x1 - x0) * w), w - 1)] = (sign, style)

    axis = [" "] * w
    for text, end in zip(ends or (short(x0), short(x1)), (0, w)):
        axis[max(0, end - len(text)) : max(0, end - len(text)) + len(text)] = text[:w]
    boundaries(marks, rows, axis, x0, x1)
    for x in bad:
        put(x, y0, "×", "bold red")
    for s, style, dotted, letter in curves:
        lo, hi = bisect_left(s.xs, x0), bisect_right(s.xs, x1)
        for i in range(lo, hi) if dotted and hi - lo <= w // 2 else ():
            put(s.xs[i], s.ys[i], "•", style)
        if letter and hi > lo:
            put(s.xs[hi - 1], s.ys[hi - 1], letter, style + " bold reverse")
    if best:
        put(*best, "★", "bold yellow")
    labels = {0: y1, h - 1: y0}
    if h >= 5:
        labels[h // 2] = y0 * (y1 / y0) ** 0.5 if log else (y0 + y1) / 2
    names = (short(labels[i]) if i in labels else "" for i in range(h))
    lines = [[(f"{name:>7}│", "dim"), *packed(row)] for name, row in zip(names, rows)]
    return [*lines, [(" " * 7 + "└" + "".join(axis)[:w], "dim")]]
