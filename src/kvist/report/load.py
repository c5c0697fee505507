"""Rows of results files, grouped: what was measured together can be compared."""

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import groupby
from pathlib import Path
from typing import Any, NamedTuple

from kvist.evaluate.results import Cell, Row, contents, rows_of

FLOOR = "floor: "
EXACT = "exact"


class Place(NamedTuple):
    """A model, its precision, and the outliers planted in it."""

    model: str
    dtype: str
    stress: str

    @property
    def name(self) -> str:
        """The model without its fingerprint."""
        return self.model.rpartition("-")[0] or self.model

    @property
    def condition(self) -> str:
        return "as trained" if self.stress == "none" else f"{self.stress} outliers planted"

    def __str__(self) -> str:
        return f"{self.name}, {self.condition}"


@dataclass(frozen=True)
class Entry:
    """One contender on one task: its cell, and the lines of files that it was read from."""

    cell: Cell
    lines: tuple[tuple[str, int], ...]

    @property
    def method(self) -> str:
        return self.cell.method

    @property
    def part(self) -> str:
        return self.cell.first.part

    @property
    def floor(self) -> bool:
        return self.method.startswith(FLOOR)

    @property
    def source(self) -> str:
        """As "file:3-10, other:4"."""
        found = []
        for file, lines in groupby(self.lines, lambda line: line[0]):
            runs = groupby(enumerate(number for _, number in lines), lambda pair: pair[1] - pair[0])
            spans = [(run[0][1], run[-1][1]) for run in (list(each) for _, each in runs)]
            found.append(f"{file}:" + ",".join(f"{a}" if a == b else f"{a}-{b}" for a, b in spans))
        return ", ".join(found)

    def among(self, items: Iterable[int]) -> "Entry":
        return replace(self, cell=self.cell.among(items))


@dataclass(frozen=True)
class Group:
    """All contenders on one task in one place, measured the same way. `number` names it on a page."""

    number: int
    place: Place
    task: str
    settings: dict[str, Any]
    entries: tuple[Entry, ...]

    @cached_property
    def whole(self) -> "Group":
        """Both sides coded, or nothing: over the items that all of these have. ValueError where there are none."""
        return self._common([entry for entry in self.entries if entry.part == "both"])

    @cached_property
    def parted(self) -> "Group":
        """Contenders with a side alone, beside the same with both: over the items that all of these have."""
        alone = {entry.cell.first.method for entry in self.entries if entry.part != "both"}
        return self._common([entry for entry in self.entries if entry.cell.first.method in alone])

    @property
    def methods(self) -> list[Entry]:
        return [entry for entry in self.entries if not entry.floor]

    @property
    def items(self) -> int:
        return len(self.entries[0].cell.items) if self.entries else 0

    @property
    def scored(self) -> bool:
        return all("score" in entry.cell.values for entry in self.entries)

    @property
    def about(self) -> str:
        """Its settings in words."""
        known = {name: value for name, value in self.settings.items() if value not in (None, [], "", False)}
        return ", ".join(f"{name} {_short(value)}" for name, value in known.items())

    def same(self, other: "Group") -> bool:
        """Whether groups of different files measure the same items the same way."""
        mine, theirs = ((g.place, g.task, g.settings, g.entries[0].cell.first.metric) for g in (self, other))
        return mine == theirs

    def _common(self, entries: Sequence[Entry]) -> "Group":
        if not entries:
            return replace(self, entries=())
        common = set.intersection(*(set(entry.cell.items) for entry in entries))
        if not common:
            raise ValueError(
                f"{self.task} ({self.place}): no item was measured with every method; finish the run with `kvist eval`"
            )
        return replace(self, entries=tuple(entry.among(common) for entry in entries))


def load(source: str | Path) -> list[Group]:
    """Groups of all results files in a folder, or of one file, places and tasks in the order of their first rows.
    Raises ValueError where there is none, or a line is no row."""
    source = Path(source)
    if not source.exists():
        raise ValueError(f"expected a folder with results of `kvist eval --out`, found nothing at {source}")
    files = sorted([*source.glob("*.jsonl"), *source.glob("*.jsonl.xz")]) if source.is_dir() else [source]
    found: dict[str, dict[tuple[str, str], list[tuple[Row, str, int]]]] = {}
    for file in files:
        # the last line is empty, or torn: a run may be writing it
        for number, row in rows_of(contents(file).split(b"\n")[:-1], file, "take the file away"):
            kind = json.dumps([row.model, row.dtype, row.stress, row.task, row.metric, row.settings], sort_keys=True)
            found.setdefault(kind, {}).setdefault((row.digest, row.part), []).append((row, file.name, number))
    if not found:
        raise ValueError(f"no results in {source}: expected .jsonl files as `kvist eval --out {source}` writes them")
    groups = [_group(number, list(cells.values())) for number, cells in enumerate(found.values(), 1)]
    places = list(dict.fromkeys(group.place for group in groups))
    names = list(dict.fromkeys(place.name for place in places))
    return sorted(groups, key=lambda group: (names.index(group.place.name), places.index(group.place)))


def titles(groups: Sequence[Group]) -> dict[int, str]:
    """By number, a name for each group: its task, and what tells it from others of the same task in its place."""
    found = {}
    for group in groups:
        others = [each.settings for each in groups if (each.place, each.task) == (group.place, group.task)]
        told = [name for name, value in group.settings.items() if any(each.get(name) != value for each in others)]
        words = [f"{name} {_short(group.settings[name])}" for name in told if name != "data"]
        found[group.number] = ", ".join([group.task, *words])
    return found


def _group(number: int, cells: Sequence[Sequence[tuple[Row, str, int]]]) -> Group:
    first = cells[0][0][0]
    names = [(rows[0][0].method, rows[0][0].part) for rows in cells]
    entries = []
    for rows in cells:
        row = rows[0][0]
        twice = names.count((row.method, row.part)) > 1
        cell = Cell([each for each, _, _ in rows], f"{row.method} ({row.digest[:6]})" if twice else None)
        entries.append(Entry(cell, tuple((file, line) for _, file, line in rows)))
    place = Place(first.model, first.dtype, first.stress)
    return Group(number, place, first.task, first.settings, tuple(entries))


def _short(value) -> str:
    if isinstance(value, list):
        return " ".join(map(_short, value))
    return f"{value:,}" if isinstance(value, int) and value >= 10_000 else f"{value}"
