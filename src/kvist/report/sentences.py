"""What the numbers say, in sentences: of a study, and of two methods or two runs of one."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from kvist.evaluate.measures import Compared
from kvist.evaluate.registry import kind_of
from kvist.evaluate.statistics import Estimate, difference, holm, mean, paired_p
from kvist.report.load import EXACT, Place, load, titles
from kvist.report.look import interval, number
from kvist.report.study import ALPHA, KL, SCORE, Study, compared, numbers, primary, said_p, to_nothing

FEW = 5  # names in a sentence of the header
TOO_FEW = 6  # items: no flip of fewer signs has a p below 5 %


def verdict(study: Study) -> list[str]:
    """Three sentences on all of it: what was compared, who is on the frontier, what outliers and answers change."""
    found = [measured(study), frontier(study, study.places[0], True)]
    found.append(stressed(study) or answered(study, study.places[0]))
    return [sentence for sentence in found if sentence]


def measured(study: Study) -> str:
    """How many methods, where, on what."""
    others = [name for name in study.methods if name != EXACT]
    models = _listed(list(dict.fromkeys(place.name for place in study.places)))
    conditions = _listed(list(dict.fromkeys(place.condition for place in study.places)))
    tasks = _listed(list(dict.fromkeys(group.task for group in study.groups)))
    beside = " beside the exact cache" if EXACT in study.methods else ""
    return f"{len(others)} method{'s' * (len(others) != 1)}{beside}, on {models}, {conditions}: {tasks}."


def frontier(study: Study, place: Place, named: bool = False) -> str:
    """The methods that nothing cheaper matches, and which of these steps are real."""
    rows = [line for line in study.table(place).values() if line.frontier and line.method != EXACT]
    group = study.divergence(place) or study.recall(place)
    if group is None or not rows:
        return ""
    if study.divergence(place):
        word, said = "KL", [f"KL {number(line.of(KL).value)}" for line in rows]
    else:
        word, said = "answers", [f"{100 * line.of(SCORE).value:.0f} % right" for line in rows]
    steps = [f"{line.method} ({line.bits:.2g} bits, {each})" for line, each in zip(rows, said, strict=True)]
    if named and len(steps) > FEW:
        steps = [f"{len(steps)} methods, from {steps[0]} to {steps[-1]}"]
    tested = [line.cheaper for line in rows if line.cheaper]
    real = sum(each.verdict == "better" for each in tested)
    where = f"On {place}, " if named else ""
    # a first letter alone: names of methods stay as they are
    lead = f"{where}the frontier of {word} against stored bits runs over {_listed(steps)}"
    if not tested:
        end = ""
    elif group.whole.items < TOO_FEW:
        end = f"; {group.whole.items} items are too few to show whether a step is real"
    elif real == len(tested):
        end = "; each step is a real improvement" if len(tested) > 1 else "; the step is a real improvement"
    else:
        end = f"; {real} of its {len(tested)} steps {'is a real improvement' if real == 1 else 'are real improvements'}"
    return (lead if named else lead[0].upper() + lead[1:]) + end + "."


def stressed(study: Study) -> str:
    """Which methods planted outliers hurt most and least."""
    for places in study.models:
        plain = next((place for place in places if place.stress == "none"), None)
        strong = next((place for place in reversed(places) if place.stress != "none"), None)
        if plain is None or strong is None or not (study.divergence(plain) and study.divergence(strong)):
            continue
        before, after = (
            {line.method: line.of(KL).value for line in study.table(each).values()} for each in (plain, strong)
        )
        ratio = {m: after[m] / before[m] for m in after if before.get(m) and m != EXACT}
        if len(ratio) < 2:
            continue
        most, least = max(ratio, key=lambda m: ratio[m]), min(ratio, key=lambda m: ratio[m])
        return (
            f"With {strong.condition} in {strong.name}, divergence changes most for {most} "
            f"({number(ratio[most])} times) and least for {least} ({number(ratio[least])} times)."
        )
    return ""


def answered(study: Study, place: Place) -> str:
    """The cheapest method whose answers are not shown to be worse than those of the exact cache."""
    group = study.recall(place)
    against = study.against_exact(group) if group else {}
    if group is None or not against:
        return ""
    # an interval that reaches zero, too: correcting for many tests must not make methods equal
    fair = {name for name, each in against.items() if each.verdict != "worse" and (each.difference.high or 0) >= 0}
    good = [line for line in study.lines(group, SCORE).values() if line.method in fair]
    if not good:
        return f"{study.titles[group.number]}: every method answers really worse than the exact cache."
    first = good[0]
    change = against[first.method].difference
    return (
        f"{study.titles[group.number]}: {first.method} at {first.bits:.2g} bits is the cheapest that is not shown to "
        f"answer worse than the exact cache (difference {points(change)})."
    )


def notes(study: Study, place: Place) -> list[str]:
    """Sentences of one place: its frontier, its answers, what accumulates."""
    found = [frontier(study, place), answered(study, place)]
    for group in study.fullest(place):
        for told in kind_of(group.task).statistics.values():
            grows = to_nothing(group, told.null, study.seed) if told.null and study.lines(group) else {}
            real = [m for m in study.table(place) if m in grows and grows[m].verdict == "worse"]
            words = _listed(real) if 0 < len(real) <= 6 else f"{len(real)} of {len(grows)} methods"
            if grows:
                found.append(f"Divergence really grows with each decode step for {words if real else 'none'}.")
    return [sentence for sentence in found if sentence]


def points(change: Estimate) -> str:
    """A difference of shares, in percentage points."""
    ends = "" if change.low is None else f" [{100 * change.low:+.1f}, {100 * (change.high or 0):+.1f}]"
    return f"{100 * change.value:+.1f}{ends} points".replace("-", "−")


def _listed(words: list[str]) -> str:
    return words[0] if len(words) == 1 else ", ".join(words[:-1]) + " and " + words[-1] if words else "nothing"


class Comparison(NamedTuple):
    """Two contenders on the common items of one task; p is corrected for the number of comparisons beside it."""

    task: str
    place: str
    a: str
    b: str
    bits: tuple[float, float]
    statistic: str
    by: Compared
    items: int
    means: tuple[Estimate, Estimate]
    difference: Estimate
    p: float

    @property
    def real(self) -> bool:
        return self.p < ALPHA

    @property
    def sentence(self) -> str:
        """What was found, and whether it is real."""
        x, y, change = (number(each.value) for each in (*self.means, self.difference))
        known = f"{x} against {y}, difference {change} {interval(self.difference)}".rstrip()
        known += f", p {said_p(self.p)}" if self.p < 0.001 else f", p = {said_p(self.p)}"
        where = f"{self.task} ({self.place}, {self.items} items): "
        if not self.real:
            few = f"; {self.items} items are too few to show one" if self.items < TOO_FEW else ""
            return f"{where}no difference between {self.a} and {self.b} is shown ({self.by.words}: {known}){few}."
        lower, bits = self.difference.value < 0, "{:.2f} against {:.2f} bits".format(*self.bits)
        good, way = "better" if lower == self.by.lower else "worse", "lower" if lower else "higher"
        said = f"{where}{self.a} is really {good} than {self.b}: {self.by.words} that is {way} ({known})"
        return f"{said}, at {bits}."

    @property
    def data(self) -> dict[str, Any]:
        """As JSON."""
        named = {"means": [each._asdict() for each in self.means], "difference": self.difference._asdict()}
        found = self._asdict() | named | {"real": self.real, "sentence": self.sentence}
        return {name: value for name, value in found.items() if name != "by"}


def methods(a: str, b: str, source: str | Path, seed: int = 0) -> list[Comparison]:
    """Two methods of one folder or file, on every task that has both. Raises ValueError for an unknown method, or
    where no item was measured with both."""
    groups = load(source)
    known = [{e.method: e for e in group.entries if e.part == "both"} for group in groups]
    names = list(dict.fromkeys(name for entries in known for name in entries))
    for name in (a, b):
        if name not in names:
            raise ValueError(f"expected one of {', '.join(names)}, found {name!r}; {source} has no such method")
    if a == b:
        raise ValueError(f"a comparison is between two methods, found {a!r} twice")
    pairs = [(g, each[a], each[b]) for g, each in zip(groups, known, strict=True) if a in each and b in each]
    return _compared(pairs, titles(groups), f"{a} and {b}", seed)


def runs(a: str | Path, b: str | Path, seed: int = 0) -> list[Comparison]:
    """Two results files or folders: the one method of each, or else every method that both have, run against run.
    Raises ValueError where there is nothing to pair."""
    first, second = load(a), load(b)
    every = [
        {e.method for g in groups for e in g.entries if e.method != EXACT and not e.floor} for groups in (first, second)
    ]
    alone, pairs = [(names.pop(), "both") for names in every] if {1} == set(map(len, every)) else [], []
    for group, other in ((x, y) for x in first for y in second if x.same(y)):
        mine, theirs = ({(e.method, e.part): e for e in each.entries} for each in (group, other))
        both = [alone] if alone else [(key, key) for key, e in mine.items() if e.method != EXACT and not e.floor]
        pairs += [(group, mine[x], theirs[y]) for x, y in both if x in mine and y in theirs]
    names = [Path(a).name, Path(b).name]
    return _compared(pairs, titles(first), f"{a} and {b}", seed, names if names[0] != names[1] else [str(a), str(b)])


def _compared(pairs, titles: dict[int, str], what: str, seed: int, files: Sequence[str] = ()) -> list[Comparison]:
    """Of groups with two entries each, those with common items."""
    found = []
    for group, *both in pairs:
        common, name = set.intersection(*(set(e.cell.items) for e in both)), primary(group)
        if not common or name is None:
            continue
        x, y = (numbers(entry.among(common), name) for entry in both)
        names = [e.method if e.part == "both" else f"{e.method}, {e.part} only" for e in both]
        names = [f"{name} ({file})" for name, file in zip(names, files, strict=True)] if files else names
        bits, means, place = (both[0].cell.bits, both[1].cell.bits), (mean(x, seed), mean(y, seed)), str(group.place)
        facts = (titles[group.number], place, *names, bits, name, compared(both[0], name), len(x), means)
        found.append(Comparison(*facts, difference(x, y, seed), paired_p(x, y, seed)))
    if not found:
        raise ValueError(f"{what} were measured on no common item of any task; run `kvist eval` with both")
    return [each._replace(p=p) for each, p in zip(found, holm([each.p for each in found]), strict=True)]
