"""Rules that fill the table: by rank of a score, by position in the model, or at random. Plain numbers."""

import math
import random
import re
from collections.abc import Sequence

from kvist.allocation.table import WIDTHS, Allocation

TIERS = (1, 2, 3, 4, 8)
Pair = tuple[int, int]  # bits of keys, bits of values
HIGH, LOW = (3, 4), (2, 2)  # KVmix section 4


def top(
    scores_k: Sequence[float], scores_v: Sequence[float], share: float = 0.2, high: Pair = HIGH, low: Pair = LOW
) -> Allocation:
    """round(share·N) of N layers, at least one, get the high width, ranked for keys and values apart; of equal scores
    the earlier layer goes first (KVmix section 3.3)."""
    if not 0 <= share <= 1:
        raise ValueError(f"the share of layers with more bits must be between 0 and 1, found {share}")
    count = max(1, round(share * len(scores_k)))
    return _ranked(scores_k, scores_v, count, high, low, ratios="paper", note=f"top {count} by score")


def reference(scores_k: Sequence[float], scores_v: Sequence[float], high: Pair = HIGH, low: Pair = LOW) -> Allocation:
    """As the published code counts: two tiers of ⌊N/10⌋ layers, both with the high width. 6 of 32 layers, 4 of 28, and
    none below ten. It takes the published code's window ratios along."""
    count = 2 * (len(scores_k) // 10)
    note = f"top {count} by score, counted as in the published code"
    return _ranked(scores_k, scores_v, count, high, low, ratios="reference", note=note)


def plain(layers: int, base: int = 2) -> Allocation:
    """Without any score: values have `base` bits and keys one tier more; the first and the last layer have one tier
    more on both sides. Tiers are 1, 2, 3, 4 and 8 bits; there is none above 8."""
    if base not in TIERS:
        raise ValueError(f"the base must be one of {TIERS} bits, found {base}")

    def up(steps: int) -> int:
        return TIERS[min(TIERS.index(base) + steps, len(TIERS) - 1)]

    ends = [int(i in (0, layers - 1)) for i in range(layers)]
    note = "keys one tier above values, first and last layer one tier up"
    return Allocation(k=tuple(up(1 + end) for end in ends), v=tuple(up(end) for end in ends), note=note)


def shuffled(allocation: Allocation, seed: int) -> Allocation:
    """The same widths on random layers, keys and values independently."""
    draw = random.Random(seed)
    sides = {side: tuple(draw.sample(x, len(x))) for side, x in (("k", allocation.k), ("v", allocation.v))}
    words = f"; {allocation.note}" if allocation.note else ""
    return allocation.model_copy(update=sides | {"note": f"random layers, seed {seed}{words}"})


def parse_widths(text: str) -> Pair:
    """Bits of keys and of values from "k3v4"."""
    found = re.fullmatch(r"k(\d+)v(\d+)", text.strip())
    bits = (int(found[1]), int(found[2])) if found else (0, 0)
    if not set(bits) <= set(WIDTHS):
        raise ValueError(f"expected bits of keys and values such as k3v4, each one of {WIDTHS}, found {text!r}")
    return bits


def parse_share(text: str | float) -> float:
    """A share from "20%" or 0.2."""
    try:
        share = float(text.rstrip("%")) / 100 if isinstance(text, str) and text.endswith("%") else float(text)
    except ValueError:
        share = -1.0
    if not 0 <= share <= 1:
        raise ValueError(f"expected a share such as 20% or 0.2, found {text!r}")
    return share


def _ranked(scores_k, scores_v, count: int, high: Pair, low: Pair, **fields) -> Allocation:
    if len(scores_k) != len(scores_v):
        raise ValueError(f"expected a score of each layer's keys and values, found {len(scores_k)} and {len(scores_v)}")
    if not all(math.isfinite(score) for score in (*scores_k, *scores_v)):
        raise ValueError("expected scores that are numbers, found one that is infinite or none; profile anew")
    sides = {}
    for side, scores, more, less in (("k", scores_k, high[0], low[0]), ("v", scores_v, high[1], low[1])):
        first = sorted(range(len(scores)), key=lambda layer: -scores[layer])[:count]
        sides[side] = tuple(more if layer in first else less for layer in range(len(scores)))
    return Allocation(**sides, **fields)
