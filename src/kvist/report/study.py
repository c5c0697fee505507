"""Everything a report knows: groups of results by place, and which differences are real: of every method from a
baseline, from the best cheaper one, and from exact."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

import numpy as np

from kvist.bench.reports import Report, read_beside
from kvist.evaluate.measures import Compared, Numbers
from kvist.evaluate.registry import kind_of
from kvist.evaluate.statistics import Estimate, difference, holm, paired_p
from kvist.report.load import EXACT, Entry, Group, Place, load, titles

DIVERGENT = ("fidelity", "ppl", "horizon")
RECALL = ("needle", "passkey")
ALPHA = 0.05
KL, SCORE = "kl", "score"


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


def lines(group: Group, baseline: str, seed: int = 0, name: str = KL) -> dict[str, Line]:
    """The methods of a group by rising bits, compared by `name`. What is exact by definition is not compared."""
    entries = sorted(group.whole.methods, key=lambda entry: (entry.cell.bits, entry.method))
    kind, known = kind_of(group.task), {entry.method: entry for entry in entries}
    sign = 1 if kind.compared[name].lower else -1
    value = {entry.method: sign * float(np.mean(numbers(entry, name))) for entry in entries}
    cheaper: dict[str, str | None] = {}
    for i, entry in enumerate(entries):
        cheaper[entry.method] = min((e.method for e in entries[:i]), key=lambda m: value[m], default=None)
    compared = [entry for entry in entries if entry.method != EXACT]
    based = [(e, known[baseline]) for e in compared if e.method != baseline and baseline in known]
    to_base = contrasts(based, name, seed)
    to_cheaper = contrasts([(e, known[cheaper[e.method]]) for e in compared if cheaper[e.method]], name, seed)
    return {
        entry.method: Line(
            entry,
            kind.tell(entry.cell, seed),
            (than := cheaper[entry.method]) is None or value[entry.method] < value[than],
            to_base.get(entry.method),
            to_cheaper.get(entry.method),
        )
        for entry in entries
    }


def contrasts(pairs: Sequence[tuple[Entry, Entry]], name: str, seed: int = 0) -> dict[str, Contrast]:
    """By the first method of each pair, how it differs from the second; all are one family of tests."""
    lower = compared(pairs[0][0], name).lower if pairs else True
    return judged({a.method: (b.method, numbers(a, name), numbers(b, name)) for a, b in pairs}, seed, lower)


def judged(pairs: Mapping[str, tuple[str, Sequence, Sequence]], seed=0, lower: bool = True) -> dict[str, Contrast]:
    """The same of numbers per item, its own and those of what it is compared with, of which less is better, or more."""
    found, ps = {}, holm([paired_p(a, b, seed) for _, a, b in pairs.values()])
    for p, (method, (against, a, b)) in zip(ps, pairs.items(), strict=True):
        change = difference(a, b, seed)
        word = "=" if p >= ALPHA or change.value == 0 else "better" if (change.value < 0) == lower else "worse"
        found[method] = Contrast(against, change, p, word)
    return found


def to_exact(group: Group, seed: int = 0) -> dict[str, Contrast]:
    """Each method's answers against those of the exact cache; empty where that was not measured."""
    known = {entry.method: entry for entry in group.whole.methods}
    exact = known.pop(EXACT, None)
    return contrasts([(entry, exact) for entry in known.values()], SCORE, seed) if exact else {}


def to_nothing(group: Group, numbers: Numbers, seed: int = 0) -> dict[str, Contrast]:
    """By method, whether these numbers per item are really above zero ("worse")."""
    known = {entry.method: numbers(entry.cell.values) for entry in group.whole.methods if entry.method != EXACT}
    return judged({method: ("none", each, [0.0] * len(each)) for method, each in known.items() if each}, seed)


def compared(entry: Entry, name: str) -> Compared:
    """What methods are compared by on a task."""
    return kind_of(entry.cell).compared[name]


def numbers(entry: Entry, name: str) -> list[float]:
    """It per item."""
    return compared(entry, name).numbers(entry.cell.values)


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


@dataclass
class Study:
    """Groups by place; baseline: the method that others are compared with; made: tables, kept."""

    groups: list[Group]
    baseline: str
    seed: int = 0
    benches: list[tuple[str, Report]] = field(default_factory=list)
    made: dict = field(default_factory=dict, repr=False)

    @cached_property
    def titles(self) -> dict[int, str]:
        return titles(self.groups)

    @cached_property
    def places(self) -> list[Place]:
        return list(dict.fromkeys(group.place for group in self.groups))

    @property
    def models(self) -> list[list[Place]]:
        """Places of one model and precision together; planted outliers change its fingerprint, not its name."""
        kinds = dict.fromkeys((place.name, place.dtype) for place in self.places)
        return [[place for place in self.places if (place.name, place.dtype) == kind] for kind in kinds]

    @cached_property
    def methods(self) -> list[str]:
        names = [entry.method for group in self.groups for entry in group.whole.methods]
        return list(dict.fromkeys(names))

    def of(self, place: Place, task: str | None = None) -> list[Group]:
        """Groups of a place, those with most contenders and items first."""
        found = [group for group in self.groups if group.place == place and task in (None, group.task)]
        return sorted(found, key=lambda group: (-len(group.whole.entries), -group.whole.items))

    def one(self, place: Place, *tasks: str) -> Group | None:
        """The fullest group of the first of these tasks that was measured there."""
        return next((group for task in tasks for group in self.of(place, task)), None)

    def fullest(self, place: Place) -> list[Group]:
        """The fullest group of each task that was measured there."""
        return list({group.task: group for group in reversed(self.of(place))}.values())[::-1]

    def divergence(self, place: Place) -> Group | None:
        return self.one(place, *DIVERGENT)

    def recall(self, place: Place) -> Group | None:
        """The task whose answers stand beside divergence: a needle where there is one."""
        scored = [group for group in self.of(place) if group.scored]
        return self.one(place, *RECALL) or (scored[0] if scored else None)

    def scored(self, place: Place) -> list[Group]:
        """All groups with answers, in the order of measuring."""
        return [group for group in self.groups if group.place == place and group.scored]

    def lines(self, group: Group, name: str | None = None) -> dict[str, Line]:
        """The table of a group, compared by a name or by what its task puts first; made once."""
        name = name or primary(group)
        if (group.number, name) not in self.made:
            self.made[group.number, name] = lines(group, self.baseline, self.seed, name) if name else {}
        return self.made[group.number, name]

    def against_exact(self, group: Group) -> dict[str, Contrast]:
        """Each method's answers of a group against those of the exact cache; made once."""
        if (group.number, EXACT) not in self.made:
            self.made[group.number, EXACT] = to_exact(group, self.seed)
        return self.made[group.number, EXACT]

    def table(self, place: Place) -> dict[str, Line]:
        """Methods of a place by rising bits: by divergence, or by answers where that alone was measured."""
        base, recall = self.divergence(place), self.recall(place)
        return self.lines(base, KL) if base else self.lines(recall) if recall else {}


def read(source: str | Path, baseline: str | None = None, seed: int = 0) -> Study:
    """A study of a folder. Raises ValueError where there is nothing to compare."""
    study = Study(load(source), "", seed)
    for group in study.groups:
        _ = group.parted  # refuses now what cannot be compared
    names = [name for name in study.methods if name != EXACT]
    if len(study.methods) < 2:
        found = ", ".join(study.methods) or "none"
        raise ValueError(
            f"a report compares methods, found {found} alone in {source}; `kvist eval -m` measures another"
        )
    if baseline is not None and baseline not in study.methods:
        raise ValueError(f"--baseline is one of {', '.join(study.methods)}, found {baseline!r}")
    study.baseline = baseline or names[0]
    study.benches = read_beside(Path(source)) if Path(source).is_dir() else []
    return study
