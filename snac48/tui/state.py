"""What the records of one run add up to: curves, validations, where it is, what went wrong."""

import math
from array import array
from bisect import bisect_left
from collections import deque
from itertools import pairwise

from .parse import NOT_CURVES, counted, number
from .text import clean

CURVES = 64  # per run
POINTS = 1 << 18  # per curve; beyond, groups of 8 keep their lowest and highest
LASTING = ("epochs", "total_steps", "recipe", "kind")  # true of a whole run
REASONS = {0: "finished", 3: "stopped", 4: "diverged", 5: "bad input"}  # by exit code, where none is given


class Series:
    """One curve: x ascending, y finite."""

    def __init__(self, points=()):
        self.xs, self.ys = array("I", [x for x, _ in points]), array("f", [y for _, y in points])

    def cut(self, x: int) -> None:
        i = bisect_left(self.xs, x)
        del self.xs[i:], self.ys[i:]

    def thin(self) -> None:
        kept = []
        for i in range(0, len(self.xs), 8):
            group = self.ys[i : i + 8]
            kept += sorted({i + group.index(min(group)), i + group.index(max(group))})
        self.xs, self.ys = (array(a.typecode, [a[i] for i in kept]) for a in (self.xs, self.ys))


class RunState:
    """What the records of one run add up to. Steps that come again (resume, restart) replace the old ones."""

    LATEST = ("epoch", "epochs", "total_steps", "segment_length", "loss", "loss_24k", "loss_48k",
              "lr", "eta_s", "audio_s_per_s", "ppl", "bits_per_s", "skipped")  # fmt: skip

    def __init__(self):
        self.raw: dict = {}  # the latest value of every key, as it came
        self.line: dict = {}  # the latest step line alone: what is only in `raw` is older
        self.by_epoch = False  # x counts epochs: there are no step lines
        self.block: dict = {}  # the summary of an epoch whose further lines follow
        self.series: dict[str, Series] = {}
        self.vals: list[dict] = []
        self.marks: list[tuple] = []  # (step, phase, segment_length) where these changed
        self.bad = array("I")  # steps whose loss was not finite
        self.skips, self.skip_reason = 0, None
        self.recent: deque = deque(maxlen=50)  # per step line "", "nan" or "skip"
        self.pace: deque = deque(maxlen=20)  # (t, step)
        self.window: deque = deque(maxlen=20)  # losses, for the divergence alarm
        self.lowest: dict = {}  # (phase, segment_length) -> lowest median of 20 losses
        self.step: int | None = None
        self.end: dict | None = None
        self.records = 0

    def feed(self, r: dict) -> None:
        self.records += 1
        event, step = r.get("event"), counted(r.get("step"))
        if event is None or (event == "bar" and "epoch" not in self.raw):
            self.raw.update(r if None not in r.values() else {k: v for k, v in r.items() if v is not None})
            if step is not None:
                if self.by_epoch:  # steps after all: they are another x axis
                    self.by_epoch, self.step, self.series, self.marks = False, None, {}, []
                self.line = r
                self.point(step, r)
        elif event in ("start", "resume"):
            self.begin(r, step)
        elif event == "end":
            reason = r.get("reason") or REASONS.get(r.get("code"), f"exit code {r.get('code')}")
            self.end = r | {"reason": clean(reason)}
        elif event == "skip":
            self.skips, self.skip_reason = self.skips + 1, clean(r.get("reason"))
            self.recent.append("skip")
        elif event == "val":
            self.validation(r, step)
        elif event == "usage":  # of the codebooks, over an epoch
            self.draw(step or 0, r)
        elif event == "epoch":
            self.summary(r)
        elif event == "more":
            self.more(r)

    def begin(self, r: dict, step: int | None) -> None:
        """A start or resume at `step`: nothing that came later is true any more."""
        self.end, self.line = None, {}
        for q in (self.window, self.recent, self.pace):
            q.clear()
        self.raw = {k: v for k, v in self.raw.items() if k in LASTING}
        self.raw |= {k: r[k] for k in (*LASTING, "phase") if r.get(k) is not None}
        if step is not None:
            self.rewind(step + (r["event"] == "resume"))
            self.step = step

    def validation(self, r: dict, step: int | None) -> None:
        if number(r.get("train_loss")) is not None:  # of the epoch, on the same line
            self.summary({k: r[k] for k in ("epoch", "epochs", "lr") if k in r} | {"loss": r["train_loss"]})
        x = next((x for x in (step, self.step, counted(r.get("epoch"))) if x is not None), 0)
        self.vals = [v for v in self.vals if v["step"] < x]  # validated again after a resume
        r = {"loss": r.get("val_loss"), **r}  # rvq's name for it
        values = {k: n for k, v in r.items() if k not in NOT_CURVES and (n := number(v)) is not None}
        # losses that were the lowest so far, as the trainer counts (a decoder that is fed more than
        # codes is never the best); None: it doesn't say
        best = r["best"] if isinstance(r.get("best"), list) else None
        self.block = {**values, "step": x, "epoch": counted(r.get("epoch")), "best": best}
        self.vals.append(self.block)

    def summary(self, r: dict) -> None:
        """`[Train]` of older logs: a point only where there are no step lines."""
        self.block = {}
        if self.step is None or self.by_epoch:
            self.by_epoch = True
            self.raw |= r
            self.block = self.line = r
            self.point(counted(r.get("epoch")) or 0, r)

    def more(self, r: dict) -> None:
        """Further numbers of the summary before, of a validation or of an epoch."""
        values = {k: v for k, v in r.items() if k != "event"}
        self.block |= values
        if self.block is self.line:
            self.raw |= values
            self.draw(self.step, values)

    @property
    def latest(self) -> dict:
        """The latest values that are shown: numbers, and the phase's name."""
        found = {k: n for k in self.LATEST if (n := number(self.raw.get(k))) is not None}
        if self.raw.get("phase") is not None:
            found["phase"] = clean(self.raw["phase"])[:24]
        return found

    @property
    def older(self) -> dict:
        """{key: step} of the latest values that the newest step line doesn't have."""
        found = {k: self.series.get(k) for k in self.latest if k not in self.line}
        return {k: s.xs[-1] for k, s in found.items() if s and s.xs and s.xs[-1] != self.step}

    def point(self, step: int, r: dict) -> None:
        if self.step is not None and step < self.step:
            self.rewind(step)
        self.step, self.end = step, None
        mark = (str(self.raw.get("phase") or "")[:24], number(self.raw.get("segment_length")))
        if not self.marks or self.marks[-1][1:] != mark:
            self.marks.append((step, *mark))
            self.window.clear()
        bad = self.draw(step, r)
        self.recent.append("nan" if bad else "")
        if bad:
            self.bad.append(step)
            del self.bad[:-5000]
        names = ("loss", "loss_48k", "loss_24k")
        if mark[0] == "adversarial":  # there the total rises as the discriminators learn
            names = names[1:]
        loss = next((r[k] for k in names if k in r), None)
        if isinstance(loss, (float, int)) and math.isfinite(loss):
            self.window.append(loss)
            if self.records % 5 == 0 and len(self.window) == 20:
                key = self.marks[-1][1:]
                self.lowest[key] = min(self.lowest.get(key, math.inf), sorted(self.window)[10])
        if (t := number(r.get("t"))) is not None:
            self.pace.append((t, step))

    def draw(self, step: int, r: dict) -> bool:
        """Add the numbers of a record to their curves. True when a loss among them is not finite."""
        bad, series = False, self.series
        for key, y in r.items():  # runs for every line of a long history: kept lean
            if (type(y) is not float and type(y) is not int) or key in NOT_CURVES:
                continue
            if not -3e38 < y < 3e38:
                bad |= "loss" in key
            elif key in series or len(series) < CURVES:
                s = series.get(key) or series.setdefault(key, Series())
                s.xs.append(step)
                s.ys.append(y)
                if len(s.xs) > POINTS:
                    s.thin()
        return bad

    def rewind(self, step: int) -> None:
        """Forget what lies at `step` or later: it was trained again."""
        for s in self.series.values():
            s.cut(step)
        self.vals = [v for v in self.vals if v["step"] < step]
        self.marks = [m for m in self.marks if m[0] < step]
        self.bad = array("I", [b for b in self.bad if b < step])
        if self.step is not None and self.step >= step:
            self.step = max((s.xs[-1] for s in self.series.values() if s.xs), default=None)

    @property
    def judged(self) -> str:
        """What validations are compared by: the 48 kHz head, else `loss`, else the 24 kHz head."""
        known = {k for v in self.vals for k in v}
        return next((k for k in ("loss_48k", "loss", "loss_24k") if k in known), "loss")

    def best(self, key: str = "") -> dict | None:
        """The validation of the lowest `key`, of those that the trainer counts where it says so."""
        key = key or self.judged
        found = [v for v in self.vals if math.isfinite(v.get(key, math.nan))]
        found = [v for v in found if v["best"] is None or key in v["best"]] or found
        return min(found, key=lambda v: v[key], default=None)

    def val_series(self, key: str) -> Series:
        return Series([(v["step"], v[key]) for v in self.vals if math.isfinite(v.get(key, math.nan))])

    def usual_gap(self) -> float | None:
        """Median seconds between step lines; a clock set back is left out."""
        gaps = sorted(b - a for (a, _), (b, _) in pairwise(self.pace) if b > a)
        return gaps[len(gaps) // 2] if gaps else None

    def usual_pace(self) -> float | None:
        """Median seconds of a step between the latest step lines."""
        paces = sorted((b - a) / (n - m) for (a, m), (b, n) in pairwise(self.pace) if b > a and n > m)
        return paces[len(paces) // 2] if paces else None
