"""Everything a report knows: groups of results, which method others are compared with, what benchmarks left."""

from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

from kvist import stranger
from kvist.report.contrast import Contrast, Line, lines, primary, to_exact
from kvist.report.drift import growing
from kvist.report.load import EXACT, Group, Place, load, titles

DIVERGENT = ("fidelity", "ppl", "horizon")
RECALL = ("needle", "passkey")


@dataclass(frozen=True)
class Row:
    """A method in the table of a place: its line, and what other tasks say of it."""

    line: Line
    recall: Line | None
    to_exact: Contrast | None
    horizon: Line | None
    growth: Contrast | None


@dataclass
class Study:
    """Groups by place; `baseline`: the method that others are compared with."""

    groups: list[Group]
    baseline: str
    seed: int = 0
    benches: list[tuple[str, dict]] = field(default_factory=list)
    gates: list[dict] = field(default_factory=list)

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
        """The table of a group, made once."""
        name = name or primary(group) or ""
        if (group.number, name) not in self._lines:
            self._lines[group.number, name] = lines(group, self.baseline, self.seed, name) if name else []
        return self._lines[group.number, name]

    @cached_property
    def _lines(self) -> dict[tuple[int, str], list[Line]]:
        return {}

    def exact_contrasts(self, group: Group) -> dict[str, Contrast]:
        """Each method's answers against those of the exact cache."""
        if group.number not in self._contrasts:
            self._contrasts[group.number] = to_exact(group, "score", self.seed)
        return self._contrasts[group.number]

    @cached_property
    def _contrasts(self) -> dict[int, dict[str, Contrast]]:
        return {}

    def table(self, place: Place) -> list[Row]:
        """Methods of a place by rising bits, with all that is known of them."""
        base, recall, horizon = self.divergence(place), self.recall(place), self.one(place, "horizon")
        chosen = self.lines(base, "kl") if base else self.lines(recall) if recall else []
        recalled = {line.method: line for line in self.lines(recall, "score")} if recall else {}
        streamed = {line.method: line for line in self.lines(horizon, "kl")} if horizon else {}
        against = self.exact_contrasts(recall) if recall else {}
        grows = growing(horizon, self.seed) if horizon else {}
        return [
            Row(
                line,
                recalled.get(line.method),
                against.get(line.method),
                streamed.get(line.method),
                grows.get(line.method),
            )
            for line in chosen
        ]


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
    if Path(source).is_dir():
        study.benches, study.gates = beside(Path(source))
    return study


def beside(folder: Path) -> tuple[list[tuple[str, dict]], list[dict]]:
    """Reports of `kvist bench decode` and `kvist bench throughput` in a folder, and checks of the methods."""
    benches, gates = [], []
    for path in sorted(folder.glob("*.json")):
        try:
            data = stranger.read_json(path)
        except ValueError:
            continue  # nothing of ours
        if _all(data, {"gate", "holds", "found"}):
            gates += data
        elif isinstance(data, dict) and (_some(data, {"tokens", "median ms"}) or _some(data, {"batch", "tokens/s"})):
            benches.append((path.name, data))
    return benches, gates


def _all(data, names: set[str]) -> bool:
    return isinstance(data, list) and bool(data) and all(isinstance(x, dict) and names <= x.keys() for x in data)


def _some(data: dict, names: set[str]) -> bool:
    rows = data.get("rows")
    return isinstance(rows, list) and any(isinstance(row, dict) and names <= row.keys() for row in rows)
