"""Which choice for each layer keeps to a budget with the least loss: a multiple-choice knapsack. Plain numbers.

Layers are told apart only by their choices; losses add up over layers, and so do bytes.
"""

import math
from collections.abc import Sequence
from itertools import pairwise
from typing import NamedTuple

import numpy as np

Array = np.ndarray
MOST = 1 << 17  # states: what choices of equal merit and of unrelated sizes would exceed


class Choice(NamedTuple):
    """One way to store a layer: bits of keys and values, bytes, and the loss to expect."""

    k: int
    v: int
    nbytes: int
    loss: float


Layers = Sequence[Sequence[Choice]]


class Impossible(ValueError):
    """A budget below the least possible, `least` bytes."""

    def __init__(self, least: int, budget: int):
        super().__init__(f"the budget of {budget} bytes is impossible: the least possible is {least} bytes")
        self.least = least


def greedy(layers: Layers, budget: int) -> list[int]:
    """The index of a choice per layer: from the fewest bytes on, steps along the lower convex hull of each layer are
    taken in the order of the loss they save per byte; what is left is filled the same way with any choice that fits.
    Raises Impossible."""
    hulls = [_hull(choices) for choices in _checked(layers, budget)]
    chosen = [hull[0] for hull in hulls]
    left = budget - sum(choices[i].nbytes for choices, i in zip(layers, chosen, strict=True))
    steps = sorted(
        ((_rate(layers[n][a], layers[n][b]), n, b) for n, hull in enumerate(hulls) for a, b in pairwise(hull)),
        key=lambda step: -step[0],
    )
    stuck: set[int] = set()
    for _, n, b in steps:
        more = layers[n][b].nbytes - layers[n][chosen[n]].nbytes
        if n in stuck or more > left:
            stuck.add(n)
        else:
            chosen[n], left = b, left - more
    while True:
        fits = [
            (_rate(layers[n][now], choice), n, i)
            for n, now in enumerate(chosen)
            for i, choice in enumerate(layers[n])
            if choice.loss < layers[n][now].loss and choice.nbytes - layers[n][now].nbytes <= left
        ]
        if not fits:
            return chosen
        _, n, i = max(fits, key=lambda fit: fit[0])
        left -= layers[n][i].nbytes - layers[n][chosen[n]].nbytes
        chosen[n] = i


def exact(layers: Layers, budget: int) -> list[int]:
    """The index of the choice per layer with the least summed loss among all that keep to `budget` bytes, and of those
    one with the fewest bytes. Raises Impossible.

    Layer by layer, states (bytes, loss) are kept that no other state beats in both and that could still end better
    than `greedy` does: the rest of the layers is bounded from below by mixing its choices freely. Measured losses leave
    some dozens; more than MOST are refused by ValueError.
    """
    known = sum(choices[i].loss for choices, i in zip(layers, greedy(layers, budget), strict=True))
    known += 1e-9 * sum(max(abs(choice.loss) for choice in choices) for choices in layers)  # rounding of the sums
    rests = _rests(layers)
    nbytes, loss, steps = np.zeros(1, np.int64), np.zeros(1), []
    for choices, (sizes, losses) in zip(layers, rests[1:], strict=True):
        nbytes = np.add.outer(nbytes, np.array([choice.nbytes for choice in choices], np.int64)).ravel()
        loss = np.add.outer(loss, np.array([choice.loss for choice in choices])).ravel()
        left = budget - nbytes
        best = loss + np.interp(left, sizes, losses)
        hopeful = np.flatnonzero((left >= sizes[0]) & (best <= known))
        kept = hopeful[_unbeaten(nbytes[hopeful], loss[hopeful])]
        if len(kept) > MOST:
            raise ValueError("too many choices save the same loss per byte to compare them all; use the greedy solver")
        nbytes, loss = nbytes[kept], loss[kept]
        steps.append(kept)
    chosen, state = [], len(loss) - 1  # of unbeaten states the one with the most bytes has the least loss
    for choices, kept in zip(reversed(layers), reversed(steps), strict=True):
        state, choice = divmod(int(kept[state]), len(choices))
        chosen.append(choice)
    return chosen[::-1]


def _checked(layers: Layers, budget: int) -> Layers:
    for i, choices in enumerate(layers):
        if not choices or not all(math.isfinite(choice.loss) and choice.nbytes >= 0 for choice in choices):
            raise ValueError(f"layer {i} needs choices with at least 0 bytes and a finite loss, found {list(choices)}")
    least = sum(min(choice.nbytes for choice in choices) for choices in layers)
    if least > budget:
        raise Impossible(least, budget)
    return layers


def _rate(a: Choice, b: Choice) -> float:
    """Loss saved per byte from a to b."""
    more = b.nbytes - a.nbytes
    return (a.loss - b.loss) / more if more > 0 else math.inf


def _unbeaten(nbytes: Array, loss: Array) -> Array:
    """Indices of what is less lossy than all that has as few bytes, ascending in bytes."""
    order = np.lexsort((loss, nbytes))
    least = np.minimum.accumulate(loss[order])
    return order[np.concatenate([[True], least[1:] < least[:-1]])] if len(order) else order


def _hull(choices: Sequence[Choice]) -> list[int]:
    """Indices of the choices on the lower convex hull of (bytes, loss), from the fewest bytes to the least loss."""
    hull: list[int] = []
    sizes, losses = np.array([c.nbytes for c in choices], np.int64), np.array([float(c.loss) for c in choices])
    for i in _unbeaten(sizes, losses).tolist():
        while len(hull) > 1 and _rate(choices[hull[-2]], choices[hull[-1]]) <= _rate(choices[hull[-1]], choices[i]):
            hull.pop()
        hull.append(i)
    return hull


def _rests(layers: Layers) -> list[tuple[Array, Array]]:
    """For the layers from n on, n from 0 to their number: the least loss for given bytes if choices may be mixed, as
    the corners of a convex line."""
    least_bytes, start, steps = 0, 0.0, []
    found = [(np.zeros(1), np.zeros(1))]
    for choices in reversed(layers):
        hull = _hull(choices)
        least_bytes, start = least_bytes + choices[hull[0]].nbytes, start + choices[hull[0]].loss
        steps += [(choices[b].nbytes - choices[a].nbytes, choices[b].loss - choices[a].loss) for a, b in pairwise(hull)]
        steps.sort(key=lambda step: step[1] / step[0])
        corners = np.cumsum([(least_bytes, start), *steps], axis=0)
        found.append((corners[:, 0], corners[:, 1]))
    return found[::-1]
