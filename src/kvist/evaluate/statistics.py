"""Means over windows and how far they may be off: 95 % bootstrap intervals.

Windows are drawn anew, with replacement, and the statistic is computed for each draw; the interval spans the middle
95 % of the draws. One window has no interval.

Whether two methods differ is a paired test over the same items: McNemar's exact test for answers that are right or
wrong, flipped signs of the differences for all other numbers. Holm's correction keeps the chance of any false
discovery among several tests below 5 %.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

DRAWS = 4000
FLIPS = 20_000
LEVEL = 0.95
BLOCK = 1000  # draws at a time


class Estimate(NamedTuple):
    """A number and the ends of its interval; None where there is but one window."""

    value: float
    low: float | None
    high: float | None

    @classmethod
    def alone(cls, value: float) -> "Estimate":
        """Without an interval."""
        return cls(value, None, None)

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


def means(rows: Sequence[Sequence[float]], seed: int = 0, draws: int = DRAWS) -> list[Estimate]:
    """The mean over windows of each place of a curve: `rows` has a curve per window, all of a length."""
    x = np.asarray(rows, np.float64)
    if x.ndim != 2 or not x.size:
        raise ValueError(f"expected a curve per window, found an array of shape {x.shape}")
    drawn = _drawn(len(x), seed, draws)
    # how often each window is drawn, so that a draw is a product of matrices
    times = np.stack([np.bincount(draw, minlength=len(x)) for draw in drawn]) if len(drawn) else np.empty((0, len(x)))
    found = times @ x / len(x)
    return [_estimate(x[:, k].mean(), found[:, k]) for k in range(x.shape[1])]


def paired_p(a: Sequence[float], b: Sequence[float], seed: int = 0) -> float:
    """The two-sided p of no difference on the same items: McNemar's where all are 0 or 1, else by flipped signs."""
    if len(a) != len(b):
        raise ValueError(f"a paired test needs the same items, found {len(a)} and {len(b)}")
    right_or_wrong = {*a, *b} <= {0, 1}
    return mcnemar(a, b) if right_or_wrong else flipped(_array(a) - _array(b), seed)  # pyright: ignore


def mcnemar(a: Sequence[float], b: Sequence[float]) -> float:
    """Exact two-sided p that items right in only one of the two (1: right, 0: wrong) are as often right in either."""
    only_a = sum(x > y for x, y in zip(a, b, strict=True))
    only_b = sum(x < y for x, y in zip(a, b, strict=True))
    n, least = only_a + only_b, min(only_a, only_b)
    return min(1.0, 2 * sum(math.comb(n, k) for k in range(least + 1)) / 2**n)


def flipped(differences: Sequence[float], seed: int = 0, draws: int = FLIPS) -> float:
    """Two-sided p that paired differences are as often positive as negative, at their sizes: the share of flips of
    their signs whose sum is as far from zero. All flips of a few; `draws` random ones of more."""
    x = _array(differences)
    n, least = len(x), abs(x.sum()) - 1e-9 * np.abs(x).sum()
    if not x.any():
        return 1.0
    if 2**n <= draws:
        signs = 1 - 2 * (np.arange(2**n)[:, None] >> np.arange(n) & 1)
        return float(np.mean(np.abs(signs @ x) >= least))
    random, far = np.random.default_rng(seed), 0
    for start in range(0, draws, BLOCK):
        signs = 1.0 - 2.0 * random.integers(2, size=(min(BLOCK, draws - start), n), dtype=np.int8)
        far += int(np.sum(np.abs(signs @ x) >= least))
    return (1 + far) / (1 + draws)


def holm(ps: Sequence[float]) -> list[float]:
    """p corrected for being among several: any below 0.05 is real, with a chance of 5 % that one of them is not."""
    found, most = [0.0] * len(ps), 0.0
    for rank, i in enumerate(sorted(range(len(ps)), key=lambda i: ps[i])):
        most = max(most, min(1.0, ps[i] * (len(ps) - rank)))
        found[i] = most
    return found


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
