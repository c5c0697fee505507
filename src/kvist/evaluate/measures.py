"""What a task tells of its values: statistics with their words, what methods are compared by, and figures as data.

A task measures, per item, values by name. Everything that is printed or drawn of them is declared here in the task's
own words, so that the command line and the report need not know the task.
"""

from collections.abc import Callable, Mapping
from typing import Any, Literal, NamedTuple

import numpy as np

from kvist.evaluate.statistics import Estimate, mean

Values = Mapping[str, list]
Numbers = Callable[[Values], list[float]]


class Statistic(NamedTuple):
    """A number of all items. needs: values without which there is none; made: from values and a seed, an estimate, a
    number, or None for nothing.

    word, why: its column in a report, and what explains it; "" for none. where: in the "table" of the task, in a table
    "apart" that shows how numbers are spread, or "beside" others in the main table of a model. share: said in percent.
    null: per item, what is tested against zero. bound: the setting that ends counting: such a number says "never".
    """

    needs: tuple[str, ...]
    made: Callable[[Values, int], Estimate | float | None]
    word: str = ""
    why: str = ""
    where: tuple[Literal["table", "apart", "beside"], ...] = ("table",)
    share: bool = False
    null: Numbers | None = None
    bound: str = ""


class Compared(NamedTuple):
    """By which number per item methods are compared: from these values; whether less is better; in words."""

    needs: tuple[str, ...]
    numbers: Numbers
    lower: bool
    words: str


class Section(NamedTuple):
    """A part of the report's page: its anchor, its title, and a sentence below."""

    id: str
    title: str
    why: str = ""


class Curves(NamedTuple):
    """A line per method, of lists per item: means of `bucket` (a setting) consecutive places each, from the setting
    `start` on. xlabel: may hold {bucket}."""

    values: str
    xlabel: str
    start: str = ""


class Dots(NamedTuple):
    """A dot per method, kind and model, with intervals, on a logarithmic axis. kinds: numbers per item by name.
    paired: two kinds, tested against each other; band: what the exact cache and rounding do is drawn below."""

    id: str
    title: str
    needs: tuple[str, ...]
    kinds: Mapping[str, Numbers]
    unit: str
    caption: str
    paired: bool = False
    band: bool = False


class Maps(NamedTuple):
    """A small map per method: mean `score` by `length` and `depth`, where items have a depth."""


Figure = Curves | Dots | Maps


def grid(values: Values) -> tuple[list[int], list[float | None], np.ndarray]:
    """Lengths, depths, and the mean score at each (depths, lengths); NaN where nothing was asked."""
    found: dict[tuple, list[float]] = {}
    for length, depth, score in zip(values["length"], values["depth"], values["score"], strict=True):
        found.setdefault((depth, length), []).append(score)
    lengths = sorted({length for _, length in found})
    depths = sorted({depth for depth, _ in found}, key=lambda depth: -1 if depth is None else depth)
    return lengths, depths, np.array([[np.mean(found.get((d, n), [np.nan])) for n in lengths] for d in depths])


def average(name: str, word: str = "", why: str = "", **more: Any) -> Statistic:
    """The mean of one value over items."""
    return Statistic((name,), lambda values, seed: mean(values[name], seed), word, why, **more)


def column(name: str) -> Numbers:
    """One value as it is."""
    return lambda values: [float(x) for x in values[name]]


def _likelihood(values: Values) -> list[float]:
    return [nll / tokens for nll, tokens in zip(values["nll"], values["tokens"], strict=True)]


COMMON = {"score": average("score"), "kl": average("kl", "KL, nats", "mean over tokens, from the exact cache")}
SCORE = Compared(("score",), column("score"), False, "a mean score")
KL = Compared(("kl",), column("kl"), True, "KL")
LIKELIHOOD = Compared(("nll", "tokens"), _likelihood, True, "a log-perplexity")
