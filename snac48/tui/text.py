"""Numbers and lines as text. A line is a list of (text, style); styles are those of Rich."""

import math
import re

from ..runlog import human_time

# a log must not drive the terminal, nor turn the direction of what follows
MARKS = (0x61C, 0x200E, 0x200F, *range(0x2028, 0x202F), *range(0x2066, 0x206A))
CONTROL = dict.fromkeys([*range(32), *range(127, 160), *MARKS, *range(0xD800, 0xE000)], "·") | {9: " "}
ESCAPES = re.compile(r"\x1b(?:\[[0-9;?]*[ -/]*[@-~]|\][^\x07\x1b]*(?:\x07|\x1b\\)?|.)")


def clean(text) -> str:
    return ESCAPES.sub("", str(text)).translate(CONTROL)


def short(value) -> str:
    """At most about 7 characters: 0.4712, 1.2e-05, NaN, – for unknown."""
    if value is None:
        return "–"
    if not isinstance(value, (int, float)):
        return clean(value)
    if not math.isfinite(value):
        return "NaN" if math.isnan(value) else ("Inf" if value > 0 else "-Inf")
    if value == int(value) and abs(value) < 1e7:
        return str(int(value))
    return f"{value:.4g}" if 1e-3 <= abs(value) < 1e4 else f"{value:.1e}"


def human_size(n) -> str:
    if n is None:
        return "N/A"
    for unit in ("B", "K", "M", "G"):
        if abs(n) < 1000:
            return f"{n:.0f}{unit}" if unit in "BK" or abs(n) >= 100 else f"{n:.1f}{unit}"
        n /= 1000
    return f"{n:.1f}T"


def duration(seconds) -> str:
    if seconds is None or not math.isfinite(seconds):
        return "–"
    days = f"{int(seconds // 86400)}d{int(seconds % 86400 // 3600):02d}h"
    return days if seconds >= 360000 else human_time(seconds)


def percent(value) -> str:
    return "N/A" if value is None else f"{value:.0f}%"


def gauge(share, width: int) -> list:
    if share is None:
        return [("·" * width, "dim")]
    full = round(min(max(share, 0), 1) * width)
    return [("█" * full, "red" if share > 0.95 else "green"), ("░" * (width - full), "dim")]


def fit(line: list, width: int) -> list:
    """Cut or pad a line to `width` characters."""
    out, left = [], width
    for text, style in line:
        if left > 0:
            out.append((text[:left], style))
            left -= len(text)
    return [*out, (" " * left, "")] if left > 0 else out


def packed(cells: list[tuple]) -> list:
    """Neighbours of one style joined."""
    out: list = []
    for text, style in cells:
        if out and out[-1][1] == style:
            out[-1] = (out[-1][0] + text, style)
        else:
            out.append((text, style))
    return out


def wrapped(parts: list, width: int, most: int) -> list:
    """Parts of a legend on as many lines as they need, `most` at most."""
    lines, used = [[]], 0
    for text, style in parts:
        if used and used + len(text) > width:
            lines.append([])
            used = 0
        lines[-1].append((text, style))
        used += len(text)
    return [fit(line, width) for line in lines[:most]]
