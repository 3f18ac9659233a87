"""How sure a mean over clips is: bootstrap confidence intervals, and which paired differences are real.

Clips are resampled, not trainings: an interval says how far the mean would move with other clips of the same
speakers and rooms, not with another seed of the training.
"""

import functools

import numpy as np

RESAMPLES = 2000
COVERED = 0.95
FEWEST = 6  # clips that a real difference needs: of five, all on one side, a sign test still says p = 0.06


@functools.lru_cache(maxsize=2)
def drawn(n: int):
    """How often each of n clips stands in each resample: float32 [RESAMPLES, n]. The same for every system,
    which is what makes differences paired."""
    rng = np.random.default_rng(n)
    return rng.multinomial(n, np.full(n, 1 / n), RESAMPLES).astype(np.float32)


def columns(rows: list[dict]) -> dict:
    """[{metric: value}] a clip -> {metric: float64 [n]}, NaN where a clip lacks the metric."""
    names = dict.fromkeys(name for row in rows for name in row)
    return {name: np.array([row.get(name, np.nan) for row in rows], np.float64) for name in names}


def means(rows: list[dict]) -> dict:
    """{metric: its mean over the clips that have it}."""
    return {name: float(np.nanmean(values)) for name, values in columns(rows).items()}


def interval(values) -> list[float]:
    """[low, high] of the mean of float [n], NaN left out: 95 % percentile bootstrap (Efron 1979)."""
    values = values[~np.isnan(values)]
    found = drawn(len(values)) @ values / len(values)
    return np.quantile(found, [(1 - COVERED) / 2, (1 + COVERED) / 2]).tolist()


def intervals(rows: list[dict]) -> dict:
    """{metric: [low, high] of its mean}, of those that two clips or more have."""
    found = columns(rows).items()
    return {name: interval(values) for name, values in found if (~np.isnan(values)).sum() > 1}


def differences(ours: list[dict], theirs: list[dict]) -> dict:
    """{metric: {mean, low, high, real}} of ours - theirs, the same clips in the same order; of metrics that
    both have. real: the interval leaves 0 out, of at least FEWEST clips."""
    a, b, found = columns(ours), columns(theirs), {}
    for name in a:
        gap = a[name] - b.get(name, np.nan)
        clips = int((~np.isnan(gap)).sum())
        if clips:
            low, high = interval(gap)
            real = clips >= FEWEST and (low > 0 or high < 0)
            found[name] = {"mean": float(np.nanmean(gap)), "low": low, "high": high, "real": real}
    return found
