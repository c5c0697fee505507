"""The points of a table: fitted to data by exact k-means, or given by a formula; and their Q-Norm."""

from collections.abc import Sequence

import numpy as np
import torch

from kvist.calibrate.histogram import Histogram

TAIL = (1 / 32 + 1 / 30) / 2  # probability beyond the outermost points of NormalFloat
STEPS = 255  # steps of a grid, between its 256 places
FLAT = 1e-13  # a variance below this share of the mean square is rounding


def normal_float(bits: int) -> tuple[float, ...]:
    """The 2^bits points of NormalFloat, ascending from -1 to 1: quantiles of the normal distribution at even
    probabilities, one more above zero than below, each half scaled to end at ±1 (a baseline of KVQuant's).

    Raises ValueError for bits outside 2..5.
    """
    if not 2 <= bits <= 5:
        raise ValueError(f"NormalFloat has 2 to 5 bits, found {bits}")
    half = 2 ** (bits - 1)
    below = torch.special.ndtri(torch.linspace(TAIL, 0.5, half, dtype=torch.float64))[:-1]
    above = torch.special.ndtri(torch.linspace(0.5, 1 - TAIL, half + 1, dtype=torch.float64))[1:]
    return (*(below / -below[0]).tolist(), 0.0, *(above / above[-1]).tolist())


def evenly(bits: int) -> tuple[float, ...]:
    """2^bits evenly spaced points, ascending from -1 to 1: the integer baseline. ValueError for bits outside 1..8."""
    if not 1 <= bits <= 8:
        raise ValueError(f"an even table has 1 to 8 bits, found {bits}")
    return tuple(np.linspace(-1, 1, 2**bits).tolist())


def kmeans(values: np.ndarray, weights: np.ndarray, k: int) -> tuple[float, ...]:
    """The k ascending points of least Σ w·(v - nearest point)², exactly (KVQuant section 3.3, equation 3).

    values, weights: (n,), in any order; equal values are joined. In one dimension the best clusters are runs of the
    sorted values, so dynamic programming over their ends finds the optimum; Lloyd's iteration finds a local one.
    Values of weight zero do not count, unless all weights are zero: then all count alike. With fewer distinct values
    than k, each value is a point and the widest gap is halved until there are k; a single value is repeated.
    Raises ValueError when there are no values, or where one is not finite, or a weight is negative.
    """
    values, weights = _distinct(values, weights)
    if k < 1:
        raise ValueError(f"k-means needs at least one point, found k={k}")
    if len(values) <= k:
        return tuple(_spread(values.tolist(), k))
    ends = _partition(values, weights, k)
    near = values[ends]  # sums are taken from each run's first value: nothing cancels
    offsets = values - np.repeat(near, np.diff(ends, append=len(values)))
    points = near + np.add.reduceat(weights * offsets, ends) / np.add.reduceat(weights, ends)
    return tuple(np.maximum.accumulate(points).tolist())


def _distinct(values: np.ndarray, weights: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Sorted distinct values of positive weight, and their weights, the largest 1."""
    values, weights = np.asarray(values, np.float64), np.asarray(weights, np.float64)
    if values.ndim != 1 or values.shape != weights.shape or not len(values):
        found = f"{values.shape} and {weights.shape}"
        raise ValueError(f"k-means needs values and weights of one shape (n,), n at least 1, found {found}")
    if not (np.isfinite(values).all() and np.isfinite(weights).all() and (weights >= 0).all()):
        raise ValueError("k-means needs finite values and finite weights of at least 0")
    top = weights.max()
    weights = weights / top if top > 0 else np.ones_like(weights)
    values, which = np.unique(values, return_inverse=True)
    weights = np.bincount(which, weights)
    counted = weights > np.finfo(np.float64).tiny  # smaller ones have lost digits
    return values[counted], weights[counted] / weights.max()


def _spread(points: list[float], k: int) -> list[float]:
    while len(points) < k:
        gap = int(np.argmax(np.diff(points))) if len(points) > 1 else 0
        points.insert(gap + 1, (points[gap] + points[min(gap + 1, len(points) - 1)]) / 2)
    return points


def _partition(values: np.ndarray, weights: np.ndarray, k: int) -> np.ndarray:
    """The first index of each of the k non-empty runs of least inertia; k < n.

    best[j] after m rounds is the least inertia of the first j values in m runs. The last run's best start does not
    move back as j grows, so each round asks for every second j between two that are known: O(k·n·log n) in all.
    """
    n = len(values)
    values = values - np.average(values, weights=weights)  # small numbers cancel less
    sums = [np.concatenate(([0.0], np.cumsum(weights * values**power))) for power in range(3)]

    def inertia(start: np.ndarray | int, stop: np.ndarray) -> np.ndarray:
        w, wv, wvv = (s[stop] - s[start] for s in sums)
        return np.maximum(wvv - wv * wv / np.maximum(w, np.finfo(np.float64).tiny), 0)

    best = np.concatenate(([0.0], inertia(0, np.arange(1, n + 1))))
    starts = np.zeros((k + 1, n + 1), dtype=np.int64)
    for m in range(2, k + 1):
        # j = m-1+row, row in 1..rows; its last run may start at m-1+s, s in 0..row-1
        rows = n - m + 1
        size = 1 << rows.bit_length()
        chosen = np.full(size + 1, rows - 1)  # what a row not yet asked, or past the end, allows
        chosen[0] = 0
        new = np.full(n + 1, np.inf)
        step = size // 2
        while step:
            row = np.arange(step, rows + 1, 2 * step)
            low, high = chosen[row - step], np.minimum(chosen[row + step], row - 1)
            length = high - low + 1
            first = np.cumsum(length) - length
            s = np.arange(length.sum()) - np.repeat(first - low, length)
            total = best[m - 1 + s] + inertia(m - 1 + s, np.repeat(m - 1 + row, length))
            least = np.minimum.reduceat(total, first)
            hits = np.flatnonzero(total == np.repeat(least, length))
            chosen[row] = s[hits[np.searchsorted(hits, first)]]
            new[m - 1 + row] = least
            step //= 2
        best = new
        starts[m, m : n + 1] = m - 1 + chosen[1 : rows + 1]
    ends = [n]
    for m in range(k, 0, -1):
        ends.append(int(starts[m, ends[-1]]))
    return np.array(ends[:0:-1])


def fit(histogram: Histogram, bits: int) -> tuple[float, ...]:
    """The 2^bits points in [-1, 1] of least weighted error over what the histogram holds (`kmeans` of its bins; the
    variance inside a bin belongs to no choice). Without weights above zero, counts. ValueError when it is empty."""
    if not histogram.count:
        raise ValueError("a table is fitted to values, found an empty histogram; calibrate on more text")
    return kmeans(*histogram.centroids, 2**bits)


def to_grid(points: Sequence[float]) -> tuple[float, ...]:
    """The points, each moved to the nearest of 256 even places lo + (hi - lo)·k/255 between the first and the last.

    The first and last stay. Where two would meet, they take neighbouring places: the result ascends strictly, unless
    all points are equal, and those are returned as they are. Raises ValueError for points that do not ascend, and for
    more than 256.
    """
    p = np.asarray(points, np.float64)
    if p.ndim != 1 or not 2 <= len(p) <= STEPS + 1 or not np.isfinite(p).all() or (np.diff(p) < 0).any():
        raise ValueError(f"a grid takes 2 to {STEPS + 1} ascending points, found {tuple(points)}")
    low, high = p[0], p[-1]
    if low == high:
        return tuple(p.tolist())
    rank = np.arange(len(p))
    place = np.rint((p - low) / (high - low) * STEPS)
    # place - rank that never falls is a place that always rises; the cap leaves room for those that follow
    place = np.minimum(np.maximum.accumulate(place - rank), STEPS + 1 - len(p)) + rank
    moved = low + (high - low) * place / STEPS
    moved[-1] = high
    return tuple(moved.tolist())


def q_norm(histogram: Histogram, points: Sequence[float], weighted: bool = True) -> tuple[float, float]:
    """Scale and offset which, applied to `points` on reading, give quantised values the mean and (population)
    standard deviation of the originals (KVQuant's Q-Norm). The codes stay those of `points`: the nearest one, the lower
    on a tie. Where a bin's values part is known up to their spread within it (`_below`).

    weighted: moments under the weights that the points were fitted with; published without. (1, 0) where either
    deviation is zero. Raises ValueError when the histogram is empty.
    """
    count, total, squares = histogram.weighted_moments if weighted else histogram.moments
    held = count > 0
    if not held.any():
        raise ValueError("Q-Norm compares values, found an empty histogram; calibrate on more text")
    count, total, squares = count[held], total[held], squares[held]
    ladder = np.asarray(points, np.float64)
    below = _below((ladder[1:] + ladder[:-1]) / 2, total / count, squares / count)
    given = np.diff(count @ below, prepend=0, append=count.sum())  # the weight of each point
    mean, deviation = _moments(count, total, squares)
    rough_mean, rough_deviation = _moments(given, given * ladder, given * ladder**2)
    if deviation == 0 or rough_deviation == 0:
        return 1.0, 0.0
    scale = deviation / rough_deviation
    return scale, mean - rough_mean * scale


def _below(edges: np.ndarray, mean: np.ndarray, square: np.ndarray) -> np.ndarray:
    """The share of each bin's values at or below each edge, (bins, edges), from their mean and mean square: even over
    as wide a stretch about the mean as gives their variance, or all at the mean."""
    variance = square - mean**2
    half = np.sqrt(3 * np.where(variance > FLAT * square, variance, 0))[:, None]
    distance = edges - mean[:, None]
    inside = np.divide(distance + half, 2 * half, out=np.zeros_like(distance), where=half > 0)
    return np.where(half > 0, inside.clip(0, 1), distance >= 0)


def _moments(count: np.ndarray, total: np.ndarray, squares: np.ndarray) -> tuple[float, float]:
    n = count.sum()
    mean = total.sum() / n
    variance = (squares - 2 * mean * total + mean * mean * count).sum() / n
    return float(mean), float(np.sqrt(variance)) if variance > FLAT * squares.sum() / n else 0.0
