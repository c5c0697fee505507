"""What cells come to: means with intervals, paired differences, in the words of each task."""

from collections.abc import Callable, Mapping, Sequence

import numpy as np

from kvist.evaluate.results import Cell
from kvist.evaluate.statistics import Estimate, difference, mean, perplexity
from kvist.evaluate.tasks.fidelity import BUCKET, quantile

MISMATCH, CURVE = "first_mismatch", "kl_curve"
MEANS = ("score", "strict", "flexible", "kl", "shift", "agreement", MISMATCH)
SKIPPED = 4  # points of a curve


def summary(cells: Sequence[Cell], first: str, seed: int = 0) -> list[dict]:
    """Per cell of one task, over the items that all of them have: method, part, bits, and each statistic as value, low
    and high; `…_difference` is the paired difference from the cell of the method named `first`, with both sides coded
    where that was measured.
    Raises ValueError where there is no such item, or no such cell."""
    common = set.intersection(*(set(cell.items) for cell in cells))
    if not common:
        raise ValueError("no item was measured with every method")
    named = [cell for cell in cells if cell.method == first]
    if not named:
        raise ValueError(f"differences are to {first!r}, which was not measured")
    base = next((cell for cell in named if cell.first.part == "both"), named[0])
    return [_line(cell.among(common), base.among(common), seed) for cell in cells]


def _line(cell: Cell, base: Cell, seed: int) -> dict:
    line: dict[str, object] = {"method": cell.method, "part": cell.first.part, "bits": cell.bits}
    line["items"] = len(cell.items)
    for name, made in statistics(cell, seed).items():
        line[name] = made._asdict() if isinstance(made, Estimate) else made
    for name, values in paired(cell).items():
        line[f"{name}_difference"] = difference(values, paired(base)[name], seed)._asdict()
    return line


def statistics(cell: Cell, seed: int = 0) -> dict[str, Estimate | float | None]:
    """The statistics of one cell, the telling ones first."""
    values, found = cell.values, {}
    for name in values:
        if name.startswith(MEANS) and all(isinstance(x, int | float) for x in values[name]):
            found[name] = mean(values[name], seed)
    for name, made in _MADE.items():
        if name in values:
            found |= made(values, seed)
    return found


def paired(cell: Cell) -> dict[str, list[float]]:
    """Per item, what methods are compared by."""
    values, found = cell.values, {}
    if "nll" in values:
        pairs = zip(values["nll"], values["tokens"], strict=True)
        found["log_perplexity"] = [nll / tokens for nll, tokens in pairs]
    return found | {name: values[name] for name in ("kl", "score") if name in values}


def _perplexity(values: Mapping[str, list], seed: int) -> dict:
    return {"perplexity": perplexity(values["nll"], values["tokens"], seed)}


def _distribution(values: Mapping[str, list], seed: int) -> dict:
    shares = {"kl_median": 0.5, "kl_99.9%": 0.999}
    return {name: quantile(values["kl_counts"], share) for name, share in shares.items()}


def _largest(values: Mapping[str, list], seed: int) -> dict:
    return {"kl_max": max(values["kl_max"])}


def _among(name: str) -> Callable[[Mapping[str, list], int], dict]:
    """The mean of the windows that have such tokens."""

    def made(values: Mapping[str, list], seed: int) -> dict:
        means = [kl for _, kl in values[name] if kl is not None]
        return {f"kl_{name}": mean(means, seed) if means else None}

    return made


def _slope(values: Mapping[str, list], seed: int) -> dict:
    found = slopes(values)
    return {"slope": mean(found, seed)} if found else {}


def slopes(values: Mapping[str, list]) -> list[float]:
    """Divergence gained per 1,000 steps: least squares per window over its curve, behind the first steps, where
    nothing is packed yet. None for curves that are not by decode step, or too short."""
    curves = [curve[SKIPPED:] for curve in values[CURVE]]
    if "kl_at_once" not in values or min(map(len, curves)) < 2:
        return []
    steps = np.arange(min(map(len, curves))) * (BUCKET / 1000)
    return [float(np.polyfit(steps, curve[: len(steps)], 1)[0]) for curve in curves]


_MADE: dict[str, Callable[[Mapping[str, list], int], dict]] = {
    "nll": _perplexity,
    "kl_counts": _distribution,
    "kl_max": _largest,
    "inside": _among("inside"),
    "beyond": _among("beyond"),
    "last": _among("last"),
    CURVE: _slope,
}
