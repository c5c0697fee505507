"""Everything a report knows: groups of results, which method others are compared with, what benchmarks left."""

from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

from kvist.bench.reports import Report, read_beside
from kvist.evaluate.measures import Numbers
from kvist.report.contrast import KL, Contrast, Line, lines, primary, to_exact, to_nothing
from kvist.report.load import EXACT, Group, Place, load, titles

DIVERGENT = ("fidelity", "ppl", "horizon")
RECALL = ("needle", "passkey")


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

    @cached_property
    def models(self) -> list[list[Place]]:
        """Places of one model and precision together; planted outliers change its fingerprint, not its name."""
        found: dict[tuple[str, str], list[Place]] = {}
        for place in self.places:
            found.setdefault((place.name, place.dtype), []).append(place)
        return list(found.values())

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

    def lines(self, group: Group, name: str | None = None) -> list[Line]:
        """The table of a group, compared by a name or by what its task puts first; made once."""
        name = name or primary(group)
        if (group.number, name) not in self.made:
            self.made[group.number, name] = lines(group, self.baseline, self.seed, name) if name else []
        return self.made[group.number, name]

    def against_exact(self, group: Group) -> dict[str, Contrast]:
        """Each method's answers of a group against those of the exact cache; made once."""
        if (group.number, EXACT) not in self.made:
            self.made[group.number, EXACT] = to_exact(group, self.seed)
        return self.made[group.number, EXACT]

    def above_nothing(self, group: Group, numbers: Numbers) -> dict[str, Contrast]:
        return to_nothing(group, numbers, self.seed)

    def table(self, place: Place) -> list[Line]:
        """Methods of a place by rising bits: by divergence, or by answers where that alone was measured."""
        base, recall = self.divergence(place), self.recall(place)
        return self.lines(base, KL) if base else self.lines(recall) if recall else []


def read(source: str | Path, baseline: str | None = None, seed: int = 0) -> Study:
    """A study of a folder. Raises ValueError where there is nothing to compare."""
    study = Study(load(source), "", seed)
    for group in study.groups:
        _ = group.parted  # refuses now what cannot be compared
    names = [name for name in study.methods if name != EXACT]
    if len(study.methods) < 2:
        found = ", ".join(study.methods) or "none"
        raise ValueError(
            f"a report compares methods, found {found} alone in {source}; measure another with `kvist eval -m`"
        )
    if baseline is not None and baseline not in study.methods:
        raise ValueError(f"--baseline is one of {', '.join(study.methods)}, found {baseline!r}")
    study.baseline = baseline or names[0]
    study.benches = read_beside(Path(source)) if Path(source).is_dir() else []
    return study
