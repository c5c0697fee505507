"""Means over windows and how far they may be off: 95 % bootstrap intervals.

Windows are drawn anew, with replacement, and the statistic is computed for each draw; the interval spans the middle
95 % of the draws. One window has no interval.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

DRAWS = 4000
LEVEL = 0.95


class Estimate(NamedTuple):
    """A number and the ends of its interval; None where there is but one window."""

    value: float
    low: float | None
    high: float | None

    def __str__(self) -> str:
        if self.low is None or self.high is None:
            return f"{self.value:.3g}"
        return f"{self.value:.3g} [{self.low:.3g}, {self.high:.3g}]"


def mean(values: Sequence[float], seed: int = 0, draws: int = DRAWS) -> Estimate:
    """The mean over windows."""
    x = _array(values)
    return _estimate(x.mean(), x[_drawn(len(x), seed, draws)].mean(-1))


def perplexity(nll: Sequence[float], tokens: Sequence[int], seed: int = 0, draws: int = DRAWS) -> Estimate:
    """exp of the mean negative log-likelihood per scored token, from sums per window and their numbers of tokens."""
    x, n = _array(nll), _array(tokens)
    if len(x) != len(n):
        raise ValueError(f"each window has a sum and a number of tokens, found {len(x)} and {len(n)}")
    drawn = _drawn(len(x), seed, draws)
    return _estimate(np.exp(x.sum() / n.sum()), np.exp(x[drawn].sum(-1) / n[drawn].sum(-1)))


def difference(a: Sequence[float], b: Sequence[float], seed: int = 0, draws: int = DRAWS) -> Estimate:
    """The mean of a - b over the same windows. What is hard for both cancels, so it is known better than either."""
    if len(a) != len(b):
        raise ValueError(f"a paired difference needs the same windows, found {len(a)} and {len(b)}")
    return mean(_array(a) - _array(b), seed, draws)  # pyright: ignore[reportArgumentType]


def _array(values) -> np.ndarray:
    x = np.asarray(values, np.float64)
    if x.ndim != 1 or not len(x):
        raise ValueError(f"expected a number per window, found an array of shape {x.shape}")
    return x


def _drawn(count: int, seed: int, draws: int) -> np.ndarray:
    """Indices (draws, count). Equal seeds draw equal windows, so intervals of contenders are comparable."""
    return np.random.default_rng(seed).integers(count, size=(draws if count > 1 else 0, count))


def _estimate(value, drawn: np.ndarray) -> Estimate:
    if not len(drawn):
        return Estimate(float(value), None, None)
    low, high = np.quantile(drawn, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return Estimate(float(value), float(low), float(high))
