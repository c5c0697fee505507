"""Which differences are real: every method against a baseline, against the best cheaper one, against exact."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from kvist.evaluate.results import Cell
from kvist.evaluate.statistics import Estimate, difference, holm, paired_p
from kvist.evaluate.summary import paired, statistics
from kvist.report.load import EXACT, Entry, Group

ALPHA = 0.05
LOWER = {"kl", "log_perplexity", "slope"}  # is better


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
    bits: float
    statistics: dict[str, Estimate | float | None]
    frontier: bool = False
    baseline: Contrast | None = None
    cheaper: Contrast | None = None

    @property
    def method(self) -> str:
        return self.entry.method

    def of(self, name: str) -> Estimate:
        """A statistic that has an interval."""
        found = self.statistics[name]
        assert isinstance(found, Estimate)
        return found


def lines(group: Group, baseline: str, seed: int = 0, name: str = "kl") -> list[Line]:
    """The methods of a group by rising bits, compared by `name`. What is exact by definition is not compared."""
    whole = group.whole
    entries = sorted(whole.methods, key=lambda entry: (entry.cell.bits, entry.method))
    value = {entry.method: float(sum(number(entry.cell, name)) / len(entry.cell.items)) for entry in entries}
    known = {entry.method: entry for entry in entries}
    cheaper, best = {}, None
    for entry in entries:
        cheaper[entry.method] = best
        if best is None or _better(name, value[entry.method], value[best]):
            best = entry.method
    compared = [entry for entry in entries if entry.method != EXACT]
    based = [(e, known[baseline]) for e in compared if e.method != baseline and baseline in known]
    to_base = contrasts(based, name, seed)
    to_cheaper = contrasts([(e, known[cheaper[e.method]]) for e in compared if cheaper[e.method]], name, seed)
    return [
        Line(
            entry,
            entry.cell.bits,
            statistics(entry.cell, seed),
            cheaper[entry.method] is None or _better(name, value[entry.method], value[cheaper[entry.method]]),
            to_base.get(entry.method),
            to_cheaper.get(entry.method),
        )
        for entry in entries
    ]


def contrasts(pairs: Sequence[tuple[Entry, Entry]], name: str, seed: int = 0) -> dict[str, Contrast]:
    """By the first method of each pair, how it differs from the second; all are one family of tests."""
    return judged([Pair(a.method, b.method, number(a.cell, name), number(b.cell, name)) for a, b in pairs], name, seed)


def judged(pairs: Sequence[Pair], name: str, seed: int = 0) -> dict[str, Contrast]:
    """The same of numbers per item."""
    found = {}
    ps = holm([paired_p(pair.a, pair.b, seed) for pair in pairs])
    for pair, p in zip(pairs, ps, strict=True):
        change = difference(pair.a, pair.b, seed)
        found[pair.method] = Contrast(pair.against, change, p, verdict(name, change.value, p))
    return found


def to_exact(group: Group, name: str = "score", seed: int = 0) -> dict[str, Contrast]:
    """Each method against the exact cache; empty where that was not measured."""
    exact = group.whole.exact
    if exact is None:
        return {}
    others = [entry for entry in group.whole.methods if entry.method != EXACT]
    return contrasts([(entry, exact) for entry in others], name, seed)


def verdict(name: str, change: float, p: float) -> str:
    """In a word."""
    if p >= ALPHA or change == 0:
        return "="
    return "better" if (change < 0) == (name in LOWER) else "worse"


def number(cell: Cell, name: str) -> list[float]:
    """Per item, what methods are compared by: "kl", "log_perplexity" or "score"."""
    return [float(x) for x in paired(cell)[name]]


def said_p(p: float) -> str:
    return "< 0.001" if p < 0.001 else f"{p:.2g}"


def primary(group: Group) -> str | None:
    """What methods are compared by on a task: answers, else divergence, else likelihood; None where there is none."""
    known = paired(group.entries[0].cell)
    wanted = ("score", "log_perplexity", "kl") if group.task == "ppl" else ("score", "kl", "log_perplexity")
    return next((name for name in wanted if name in known), None)


def _better(name: str, a: float, b: float) -> bool:
    return a < b if name in LOWER else a > b
