"""Panels: which curves a run has, and axes with them. A new metric is one entry of PANELS."""

import math
from itertools import pairwise

from .plot import plot
from .runs import Run
from .text import clean, fit, short, wrapped

PANELS = {  # kind -> (title, training curves, validation curves); ce_* is one curve for each codebook
    "train": (("48 kHz", "loss_48k", "loss_48k"), ("24 kHz", "loss_24k", "loss_24k"), ("lr", "lr", ""),
              ("discriminators", "disc_48k disc_24k", ""), ("adversarial", "adv_48k adv_24k", ""),
              ("feature matching", "feat_48k feat_24k", ""),
              ("LSD val", "", "lsd_48k lsd_12_24k lsd_24k"), ("codes used", "usage_*", ""),
              ("perplexity", "perplexity_*", ""), ("codec", "commitment codebook features", ""),
              ("audio s/s", "audio_s_per_s", "")),
    "rvq": (("loss", "loss", "loss"), ("cross-entropy", "ce_*", ""), ("lr", "lr", ""), ("ppl", "ppl", "ppl"),
            ("cross-entropy val", "", "ce_*"), ("bits/s", "bits_per_s", "bits_per_s")),
    "cache": (("audio s/s", "audio_s_per_s", ""), ("skipped", "skipped", "")),
}  # fmt: skip
COLOURS = ("cyan", "yellow", "magenta", "green", "blue", "red", "white")
SMOOTH = (0.0, 0.02, 0.05, 0.15)  # windows, as shares of the visible width
SIGNS = "0123456789abcdefghijklmnopqrstuvwxyz"  # one character a codebook


def keys_of(names: str, present) -> list[tuple]:
    """[(key, label, sign at the curve's end)] of those present; `ce_*` stands for ce_0, ce_1, …"""
    found = []
    for name in names.split():
        if name.endswith("*"):
            books = ((name[:-1] + str(k), c) for k, c in enumerate(SIGNS))
            found += [(key, c, c) for key, c in books if key in present]
        elif name in present:
            found.append((name, name.removeprefix("lsd_"), ""))
    return found


def panels_of(run: Run) -> list[tuple]:
    """What this run has curves for, one head or two, codebooks or none: (title, training, validation)."""
    s, kind = run.state, {"precompute": "cache", None: "train"}.get(run.kind, run.kind)
    curves, vals = {k for k, c in s.series.items() if c.xs}, {k for v in s.vals for k in v}
    found = [(title, keys_of(train, curves), keys_of(val, vals)) for title, train, val in PANELS[kind]]
    found = [p for p in found if p[1] or p[2]]
    if kind == "train" and not {"loss_24k", "loss_48k"} & (curves | vals):
        found.insert(0, ("loss", keys_of("loss", curves), keys_of("loss", vals)))
    return found or [("no numbers yet", [], [])]


def visible(ui, first: float, last: float) -> tuple[float, float]:
    """x range shown: zoom and pan, kept inside the run."""
    span = (last - first) / 2**ui.zoom
    x1 = last - ui.back * (last - first)
    return max(first, x1 - span), x1


def boundaries(run: Run) -> list[tuple[int, str]]:
    """Where the phase or the segment length changes (the first entry is the run's beginning)."""
    found = []
    for (_, p0, l0), (step, p1, l1) in pairwise(run.state.marks):
        found.append((step, " ".join([f"{short(l1)}s"] * (l1 != l0) + [clean(p1)] * (p1 != p0))))
    return found


def panel(run: Run, ui, width: int, height: int, spec: tuple) -> list:
    """One set of axes. Its title is the legend: each curve's latest value, the best of the validations."""
    (title, train, val), s = spec, run.state
    curves, head, best = [], [(title, "bold")], None
    for i, (key, label, sign) in enumerate(train):
        c, style = s.series[key], COLOURS[i % len(COLOURS)]
        curves.append((c, style, title in ("codes used", "perplexity"), sign))  # those come once an epoch
        head.append((f" {label + ' ' if len(train) > 1 else ''}{short(s.latest.get(key, c.ys[-1]))}", style))
    for i, (key, label, sign) in enumerate(val, len(train)):
        c, style = s.val_series(key), COLOURS[i % len(COLOURS)]
        if c.xs:
            curves.append((c, style, not sign, sign))
            head.append((f" {'val' if train else label} {short(c.ys[-1])}", style))
            if not sign:
                at = s.best(key)
                head.append((f" best {short(at[key])}@{short(at['epoch'])}", "bold yellow"))
                best = best or (at["step"], c.ys[c.xs.index(at["step"])])
    edges = [v["step"] for v in s.vals] + [x for c in s.series.values() if c.xs for x in (c.xs[0], c.xs[-1])]
    span = visible(ui, min(edges, default=0), max(edges, default=1))
    smooth = 0 if title == "lr" else SMOOTH[ui.smooth]
    bad = s.bad if any("loss" in key for key, _, _ in train) else ()
    top = wrapped(head, width, max(1, height // 6))
    rest = height - len(top)
    return top + plot(curves, width, rest, span, ui.log, smooth, boundaries(run), bad, best)


def layout(n: int, width: int, height: int) -> tuple[int, int]:
    """(across, down) of n panels: two by two (below one another where narrow), as many as have room."""
    across = 1 if n == 1 or width < 70 else 2
    return across, max(1, min(math.ceil(n / across), height // 6))


def grid(run: Run, ui, width: int, height: int, y0: int, specs: list) -> list:
    (across, down), lines = layout(len(specs), width, height), []
    w = width // across
    for d in range(down):
        h, row = height // down + (d < height % down), specs[d * across : (d + 1) * across]
        blocks = [panel(run, ui, w - (across > 1), h, spec) for spec in row]
        for y in range(h):
            for a in range(len(row)):
                ui.zones.append((y0 + len(lines), a * w, (a + 1) * w, "focus", d * across + a + 1))
            lines.append([part for b in blocks for part in (*fit(b[y], w - (across > 1)), (" ", ""))])
    return lines
