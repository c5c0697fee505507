"""Two methods, or two runs of one: in a sentence per task, whether they differ."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from kvist.evaluate.measures import Compared
from kvist.evaluate.statistics import Estimate, difference, holm, mean, paired_p
from kvist.report.contrast import ALPHA, compared, number, primary, said_p
from kvist.report.load import EXACT, FLOOR, Entry, Group, load, titles
from kvist.report.look import interval
from kvist.report.look import number as said
from kvist.report.verdict import TOO_FEW


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
        x, y = self.means
        known = f"{said(x.value)} against {said(y.value)}, difference {said(self.difference.value)}"
        known = f"{known} {interval(self.difference)}".rstrip() + f", p {_p(self.p)}"
        where = f"{self.task} ({self.place}, {self.items} items): "
        if not self.real:
            few = f"; {self.items} items are too few to show one" if self.items < TOO_FEW else ""
            return f"{where}no difference between {self.a} and {self.b} is shown ({self.by.words}: {known}){few}."
        way = "lower" if self.difference.value < 0 else "higher"
        good = "better" if (way == "lower") == self.by.lower else "worse"
        return (
            f"{where}{self.a} is really {good} than {self.b}: {self.by.words} that is {way} ({known}), "
            f"at {self.bits[0]:.2f} against {self.bits[1]:.2f} bits."
        )

    @property
    def data(self) -> dict[str, Any]:
        """As JSON."""
        found = {name: getattr(self, name) for name in ("task", "place", "a", "b", "statistic", "items", "p", "real")}
        numbers = {"bits": list(self.bits), "means": [each._asdict() for each in self.means]}
        return found | numbers | {"difference": self.difference._asdict(), "sentence": self.sentence}


def methods(a: str, b: str, source: str | Path, seed: int = 0) -> list[Comparison]:
    """Two methods of one folder or file, on every task that has both. Raises ValueError for an unknown method, or
    where no item was measured with both."""
    groups = load(source)
    names = list(dict.fromkeys(entry.method for group in groups for entry in group.entries if entry.part == "both"))
    for name in (a, b):
        if name not in names:
            raise ValueError(f"expected one of {', '.join(names)}, found {name!r}; {source} has no such method")
    if a == b:
        raise ValueError(f"a comparison is between two methods, found {a!r} twice")
    named, pairs = titles(groups), []
    for group in groups:
        known = {entry.method: entry for entry in group.entries if entry.part == "both"}
        if a in known and b in known:
            pairs.append((group, named[group.number], known[a], known[b]))
    return _compared(pairs, f"{a} and {b}", seed)


def runs(a: str | Path, b: str | Path, seed: int = 0) -> list[Comparison]:
    """Two results files or folders: the one method of each, or else every method that both have, run against run.
    Raises ValueError where there is nothing to pair."""
    first, second = load(a), load(b)
    only = [_only(groups) for groups in (first, second)]
    names, pairs = titles(first), []
    for group in first:
        other = next((each for each in second if _same(group, each)), None)
        if other is None:
            continue
        known = {(entry.method, entry.part): entry for entry in other.entries}
        if only[0] and only[1]:
            mine = {(entry.method, entry.part): entry for entry in group.entries}
            both = [((only[0], "both"), (only[1], "both"))]
        else:
            mine = {(e.method, e.part): e for e in group.entries if e.method != EXACT and not e.floor}
            both = [(key, key) for key in mine]
        pairs += [(group, names[group.number], mine[x], known[y]) for x, y in both if x in mine and y in known]
    short = (Path(a).name, Path(b).name)
    return _compared(pairs, f"{a} and {b}", seed, short if short[0] != short[1] else (str(a), str(b)))


def _compared(
    pairs: Sequence[tuple[Group, str, Entry, Entry]], what: str, seed: int, files: tuple[str, str] | None = None
) -> list[Comparison]:
    found = []
    for group, title, a, b in pairs:
        common = set(a.cell.items) & set(b.cell.items)
        name = primary(group)
        if not common or name is None:
            continue
        x, y = (number(entry.among(common), name) for entry in (a, b))
        means, change, p = (mean(x, seed), mean(y, seed)), difference(x, y, seed), paired_p(x, y, seed)
        bits, place = (a.cell.bits, b.cell.bits), str(group.place)
        first, second = _named(a, b, files)
        by = compared(a, name)
        found.append(Comparison(title, place, first, second, bits, name, by, len(x), means, change, p))
    if not found:
        raise ValueError(f"{what} were measured on no common item of any task; run `kvist eval` with both")
    return [each._replace(p=p) for each, p in zip(found, holm([each.p for each in found]), strict=True)]


def _named(a: Entry, b: Entry, files: tuple[str, str] | None) -> list[str]:
    names = [each.method if each.part == "both" else f"{each.method}, {each.part} only" for each in (a, b)]
    return names if files is None else [f"{name} ({file})" for name, file in zip(names, files, strict=True)]


def _only(groups: Sequence[Group]) -> str | None:
    """The one method beside the exact cache and the floors, if it is one."""
    names = {entry.method for group in groups for entry in group.entries}
    others = [name for name in names if name != EXACT and not name.startswith(FLOOR)]
    return others[0] if len(others) == 1 else None


def _same(a: Group, b: Group) -> bool:
    """Whether two groups of different files measure the same items the same way."""
    metrics = [each.entries[0].cell.first.metric for each in (a, b)]
    return metrics[0] == metrics[1] and (a.place, a.task, a.settings) == (b.place, b.task, b.settings)


def _p(p: float) -> str:
    return said_p(p) if p < 0.001 else f"= {said_p(p)}"
