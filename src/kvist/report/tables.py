"""Tables as plain data: the same cells go into the page, the Markdown and the JSON."""

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from kvist.evaluate.measures import COMMON, Statistic
from kvist.evaluate.registry import kind_of
from kvist.evaluate.statistics import Estimate
from kvist.report.contrast import KL, SCORE, Contrast, Line, floor_of
from kvist.report.load import EXACT, Group, Place
from kvist.report.look import interval, look, number, percent, spread
from kvist.report.study import Study

MARKS = {"better": "▼", "worse": "▲", "=": "="}
UP = {"better": "▲", "worse": "▼", "=": "="}  # where more is better
BITS = ("bits", "allocated per cached number, measured from the storage")


class Field(NamedTuple):
    """A cell of a table: what stands in it, its interval, a verdict in a word, words that explain it, and an id to go
    to."""

    text: str = ""
    small: str = ""
    verdict: str = ""
    title: str = ""
    link: str = ""
    colour: str = ""
    strip: tuple[float, float, float, float] | None = None  # value, low, high, floor as shares of a logarithmic axis


class Table(NamedTuple):
    """id; title; names of columns, each with an explanation; rows of fields; caption; groups behind it."""

    id: str
    title: str
    columns: Sequence[tuple[str, str]]
    rows: Sequence[Sequence[Field]]
    caption: str
    groups: tuple[int, ...]

    @property
    def plain(self) -> list[list[str]]:
        """Heads and rows as Markdown's cells; columns of pictures are left out."""
        kept = [i for i, (name, _) in enumerate(self.columns) if name]
        rows = [[self.columns[i][0] for i in kept]]
        for name, *fields in self.rows:
            cells = [f"`{name.text}`" + (" ●" if name.verdict == "frontier" else "")]
            rows.append(cells + [" ".join(filter(None, fields[i - 1][:2])) for i in kept[1:]])
        return [[cell.replace("|", "\\|").replace("\n", " ") for cell in row] for row in rows]


def main(study: Study, place: Place) -> Table | None:
    """Methods of a place by rising bits: all that matters in one line each. None where only answers were measured."""
    group, recall = study.divergence(place), study.recall(place)
    if group is None:
        return None
    lines, floor = study.table(place), floor_of(group)
    known = [line.of(KL).value for line in lines if line.of(KL).value > 0]
    ends = (min([*known, floor or 1.0], default=1e-6) / 1.5, max(known, default=1.0) * 1.5)
    columns = [
        ("method", "● nothing cheaper is as good"),
        BITS,
        ("", "KL on a logarithmic axis; the band is rounding"),
        ("KL, nats", COMMON[KL].why),
        (f"to {study.baseline}", "ratio of KL; ▼ really lower, ▲ really higher, = not shown to differ"),
        ("to best cheaper", "ratio of KL to that of the best method with fewer bits"),
    ]
    rows = [_compared(study, line, _strip(line, floor, ends)) for line in lines]
    used = [group, *([recall] if recall else [])]
    _add(columns, rows, lines, group, _shown(group, lines, "table"), {})
    if recall:
        columns.append((f"{study.titles[recall.number]}, %", "right; ▼ really below the exact cache, = not shown"))
        scored = {line.method: line for line in study.lines(recall, SCORE)}
        for row, line in zip(rows, lines, strict=True):
            row.append(_score(scored.get(line.method), study.against_exact(recall).get(line.method)))
    for other in study.fullest(place):
        beside = _shown(other, study.lines(other), "beside")
        if beside:
            tests = {n: study.above_nothing(other, each.null) for n, each in beside.items() if each.null}
            found = {line.method: line for line in study.lines(other)}
            _add(columns, rows, [found.get(line.method) for line in lines], other, beside, tests)
            used.append(other)
    caption = " ".join(f"{study.titles[each.number]}: {each.whole.items} items ({each.about})." for each in used)
    return Table(f"table-{group.number}", str(place), columns, rows, caption, _numbers(used))


def scores(study: Study, place: Place) -> Table | None:
    """Answers to all tasks that have them, each against the exact cache."""
    groups = study.scored(place)
    if not groups:
        return None
    found = [{line.method: line for line in study.lines(group, SCORE)} for group in groups]
    bits = {name: line.bits for known in reversed(found) for name, line in known.items()}
    rows = [
        [
            method(name),
            Field(f"{bits[name]:.2f}"),
            *(_score(f.get(name), study.against_exact(g).get(name)) for f, g in zip(found, groups, strict=True)),
        ]
        for name in sorted(bits, key=lambda name: (bits[name], name))
    ]
    columns = [("method", ""), ("bits", "allocated per cached number, of the first task")]
    columns += [(f"{study.titles[group.number]}, %", f"{group.whole.items} items: {group.about}") for group in groups]
    told = "; ".join(f"{study.titles[group.number]}: {group.whole.items} items" for group in groups)
    caption = f"Mean score in percent; {told}."
    return Table(f"scores-{groups[0].number}", str(place), columns, rows, caption, _numbers(groups))


def apart(study: Study, group: Group) -> Table | None:
    """How a task's numbers are spread over tokens, and whether they are where tokens are packed."""
    lines = [line for line in study.lines(group) if line.method != EXACT]
    known = _shown(group, lines, "apart")
    if not known:
        return None
    first = next(iter(known))
    known = {first: known[first], KL: COMMON[KL]._replace(word="mean", why="")} | known
    columns, rows = [("method", ""), BITS], [[method(line.method), Field(f"{line.bits:.2f}")] for line in lines]
    _add(columns, rows, lines, group, known, {})
    caption = f"KL in nats, {group.whole.items} windows ({group.about})."
    title = f"Where, and how unevenly: {group.place}"
    return Table(f"uneven-{group.number}", title, columns, rows, caption, (group.number,))


def others(study: Study, place: Place) -> list[Table]:
    """What tasks without answers measured, and in other ways than the main table's."""
    found = []
    for group in study.groups:
        if group.place != place or group.scored or group is study.divergence(place):
            continue
        lines = study.lines(group)
        known = _shown(group, lines, "table")
        if not known:
            continue
        known |= {KL: COMMON[KL]} if KL in lines[0].statistics else {}
        columns, rows = [("method", ""), BITS], [_compared(study, line)[:2] for line in lines]
        _add(columns, rows, lines, group, known, {})
        columns += [(f"to {study.baseline}", "paired"), ("to best cheaper", "paired")]
        for row, line in zip(rows, lines, strict=True):
            row += [_marked("", "", line.baseline, MARKS), _marked("", "", line.cheaper, MARKS)]
        caption = f"{group.whole.items} items ({group.about})."
        title = f"{study.titles[group.number]}: {place}"
        found.append(Table(f"table-{group.number}", title, columns, rows, caption, (group.number,)))
    return found


def behind(study: Study, group: Group) -> Table:
    """The rows behind figures: each cell with its numbers, and the lines of the files where they stand."""
    columns = [
        ("method", ""),
        ("part", "sides that are coded"),
        ("items", ""),
        ("bits", ""),
        ("mean", "over its items"),
    ]
    columns += [("rows", "file:lines"), ("recipe", ""), ("measured with", "")]
    rows = []
    for entry in group.entries:
        cell, first = entry.cell, entry.cell.first
        name = next((n for n in (SCORE, KL) if n in cell.values), None)
        said = f"{name} {number(sum(cell.values[name]) / len(cell.items))}" if name else ""
        texts = [entry.part, str(len(cell.items)), f"{cell.bits:.3f}", said, entry.source]
        versions = " ".join(f"{name} {value}" for name, value in first.versions.items())
        link = Field(first.digest, link=recipe_id(first.digest))
        rows.append([method(entry.method), *map(Field, texts), link, Field(f"{versions}; {first.device}")])
    caption = f"{group.place.model}, {group.place.dtype}, stress {group.place.stress}. {group.about}"
    title = f"{study.titles[group.number]}: {group.place}"
    return Table(f"rows-{group.number}", title, columns, rows, caption, (group.number,))


def recipes(study: Study) -> list[dict[str, Any]]:
    """Each recipe once: its digest and JSON, and what it was called."""
    found: dict[str, dict] = {}
    for entry in (entry for group in study.groups for entry in group.entries):
        first = entry.cell.first
        known = {"id": recipe_id(first.digest), "digest": first.digest, "method": entry.method, "part": entry.part}
        found.setdefault(first.digest, known | {"recipe": first.recipe})
    return list(found.values())


def recipe_id(digest: str) -> str:
    return "recipe-" + "".join(c if c.isalnum() else "-" for c in digest)


def method(name: str, frontier: bool = False) -> Field:
    """A method's name in its colour."""
    return Field(name, verdict="frontier" if frontier else "", colour="" if name == EXACT else look(name).colour)


def _numbers(groups: Sequence[Group]) -> tuple[int, ...]:
    return tuple(dict.fromkeys(group.number for group in groups))


def _shown(group: Group, lines: Sequence[Line], where: str) -> dict[str, Statistic]:
    """A task's own statistics that are told at a place, if any method has them."""
    told = {name: each for name, each in kind_of(group.task).statistics.items() if each.word and where in each.where}
    return {name: each for name, each in told.items() if any(line.statistics.get(name) is not None for line in lines)}


def _add(
    columns: list, rows: Sequence[list], lines: Sequence[Line | None], group: Group,
    told: Mapping[str, Statistic], tests: Mapping[str, dict[str, Contrast]],
) -> None:  # fmt: skip
    """A column per statistic. tests: verdicts by statistic and method."""
    for name, each in told.items():
        columns.append((each.word, each.why))
        for row, line in zip(rows, lines, strict=True):
            field = _said(line.statistics.get(name), each, group) if line else Field()
            contrast = tests.get(name, {}).get(line.method) if line else None
            row.append(_marked(field.text, field.small, contrast, MARKS))


def _compared(study: Study, line: Line, strip: Field | None = None) -> list[Field]:
    """A line's first columns, the same in all tables that compare by KL."""
    fields = [method(line.method, line.frontier), Field(f"{line.bits:.2f}")]
    if strip is None:
        return fields
    base = Field(title="what others are compared with") if line.method == study.baseline else None
    fields += [strip, _said(line.of(KL), COMMON[KL]), base or _ratio(line, line.baseline), _ratio(line, line.cheaper)]
    return fields


def _strip(line: Line, floor: float | None, ends: tuple[float, float]) -> Field:
    """Where a divergence lies on a logarithmic axis."""

    def at(x: float | None) -> float:
        inside = min(max(x or 0.0, ends[0]), ends[1])
        return math.log(inside / ends[0]) / math.log(ends[1] / ends[0])

    value, low, high = line.of(KL)
    if value <= 0:
        return Field()
    low, high = (value, value) if low is None else (low, high)
    return Field(colour=look(line.method).colour, strip=(at(value), at(low), at(high), at(floor) if floor else 0.0))


def _ratio(line: Line, contrast: Contrast | None) -> Field:
    """How many times the other's divergence, and whether the difference is real."""
    if contrast is None:
        return Field()
    value = line.of(KL).value
    other = value - contrast.difference.value
    return _marked(f"{number(value / other)}×" if other > 0 else "", "", contrast, MARKS)


def _said(found: Estimate | float | None, told: Statistic, group: Group | None = None) -> Field:
    """A statistic as it is read; that texts never part is no number."""
    most = group.settings.get(told.bound) if group and told.bound else None
    if isinstance(found, Estimate):
        if most and found.value >= most:
            return Field("never", f"in {most}")
        return Field(percent(found), spread(found)) if told.share else Field(number(found.value), interval(found))
    return Field(number(found))


def _score(line: Line | None, contrast: Contrast | None) -> Field:
    score = line and line.statistics.get(SCORE)
    return _marked(percent(score), spread(score), contrast, UP) if isinstance(score, Estimate) else Field()


def _marked(text: str, small: str, contrast: Contrast | None, marks: dict[str, str]) -> Field:
    """A number behind its verdict."""
    if contrast is None:
        return Field(text, small)
    return Field(f"{marks[contrast.verdict]} {text}".strip(), small, contrast.verdict, contrast.words)
