"""Which differences are real: every method against a baseline, against the best cheaper one, against exact."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from kvist.evaluate.measures import Compared, Numbers
from kvist.evaluate.registry import kind_of
from kvist.evaluate.statistics import Estimate, difference, holm, paired_p
from kvist.report.load import EXACT, Entry, Group

ALPHA = 0.05
KL, SCORE = "kl", "score"


class Pair(NamedTuple):
    """A method, what it is compared with, and a number per item of each."""

    method: str
    against: str
    a: Sequence[float]
    b: Sequence[float]


class Contrast(NamedTuple):
    """A paired difference to another method on the same items. p: corrected by Holm for those tested beside it;
    verdict: "better", "worse" or "=", which says only that no difference was shown."""

    against: str
    difference: Estimate
    p: float
    verdict: str

    @property
    def words(self) -> str:
        """All of it, for a tooltip."""
        return f"{self.difference} against {self.against}, p {said_p(self.p)}"


@dataclass(frozen=True)
class Line:
    """A method in a table: its statistics, whether nothing cheaper is as good, and its contrasts."""

    entry: Entry
    statistics: dict[str, Estimate | float | None]
    frontier: bool = False
    baseline: Contrast | None = None
    cheaper: Contrast | None = None

    @property
    def method(self) -> str:
        return self.entry.method

    @property
    def bits(self) -> float:
        return self.entry.cell.bits

    def of(self, name: str) -> Estimate:
        """A statistic that has an interval."""
        found = self.statistics[name]
        assert isinstance(found, Estimate)
        return found


def lines(group: Group, baseline: str, seed: int = 0, name: str = KL) -> list[Line]:
    """The methods of a group by rising bits, compared by `name`. What is exact by definition is not compared."""
    entries = sorted(group.whole.methods, key=lambda entry: (entry.cell.bits, entry.method))
    kind, known = kind_of(group.task), {entry.method: entry for entry in entries}
    sign = 1 if kind.compared[name].lower else -1
    value = {entry.method: sign * float(np.mean(number(entry, name))) for entry in entries}
    cheaper, best = {}, None
    for entry in entries:
        cheaper[entry.method] = best
        if best is None or value[entry.method] < value[best]:
            best = entry.method
    compared = [entry for entry in entries if entry.method != EXACT]
    based = [(e, known[baseline]) for e in compared if e.method != baseline and baseline in known]
    to_base = contrasts(based, name, seed)
    to_cheaper = contrasts([(e, known[cheaper[e.method]]) for e in compared if cheaper[e.method]], name, seed)
    return [
        Line(
            entry,
            kind.tell(entry.cell, seed),
            (than := cheaper[entry.method]) is None or value[entry.method] < value[than],
            to_base.get(entry.method),
            to_cheaper.get(entry.method),
        )
        for entry in entries
    ]


def contrasts(pairs: Sequence[tuple[Entry, Entry]], name: str, seed: int = 0) -> dict[str, Contrast]:
    """By the first method of each pair, how it differs from the second; all are one family of tests."""
    lower = compared(pairs[0][0], name).lower if pairs else True
    return judged([Pair(a.method, b.method, number(a, name), number(b, name)) for a, b in pairs], seed, lower)


def judged(pairs: Sequence[Pair], seed: int = 0, lower: bool = True) -> dict[str, Contrast]:
    """The same of numbers per item, of which less is better, or more."""
    found = {}
    ps = holm([paired_p(pair.a, pair.b, seed) for pair in pairs])
    for pair, p in zip(pairs, ps, strict=True):
        change = difference(pair.a, pair.b, seed)
        found[pair.method] = Contrast(pair.against, change, p, verdict(lower, change.value, p))
    return found


def to_exact(group: Group, seed: int = 0) -> dict[str, Contrast]:
    """Each method's answers against those of the exact cache; empty where that was not measured."""
    exact, others = group.whole.exact, [entry for entry in group.whole.methods if entry.method != EXACT]
    return contrasts([(entry, exact) for entry in others], SCORE, seed) if exact else {}


def to_nothing(group: Group, numbers: Numbers, seed: int = 0) -> dict[str, Contrast]:
    """By method, whether these numbers per item are really above zero ("worse")."""
    known = {entry.method: numbers(entry.cell.values) for entry in group.whole.methods if entry.method != EXACT}
    return judged([Pair(method, "none", each, [0.0] * len(each)) for method, each in known.items() if each], seed)


def verdict(lower: bool, change: float, p: float) -> str:
    """In a word."""
    if p >= ALPHA or change == 0:
        return "="
    return "better" if (change < 0) == lower else "worse"


def number(entry: Entry, name: str) -> list[float]:
    """Per item, what methods are compared by."""
    return compared(entry, name).numbers(entry.cell.values)


def compared(entry: Entry, name: str) -> Compared:
    return kind_of(entry.cell).compared[name]


def said_p(p: float) -> str:
    return "< 0.001" if p < 0.001 else f"{p:.2g}"


def primary(group: Group) -> str | None:
    """What methods are compared by on a task, the first that its rows have; None where there is none."""
    return next(iter(kind_of(group.task).numbers(group.entries[0].cell)), None)


def floor_of(group: Group) -> float | None:
    """The largest divergence of what quantizes nothing, the exact cache among it: smaller ones are not known."""
    nothing = [entry for entry in group.whole.entries if entry.floor or entry.method == EXACT]
    known = [np.mean(entry.cell.values[KL]) for entry in nothing if KL in entry.cell.values]
    return float(max(known)) if known and max(known) > 0 else None
