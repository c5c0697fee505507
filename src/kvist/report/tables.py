"""Tables as plain data: the same cells go into the page, the Markdown and the JSON."""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import NamedTuple

from kvist.evaluate.measures import COMMON, Statistic
from kvist.evaluate.registry import kind_of
from kvist.evaluate.statistics import Estimate
from kvist.report.load import EXACT, Group, Place
from kvist.report.look import interval, look, number, percent, spread
from kvist.report.study import KL, SCORE, Contrast, Line, Study, floor_of, to_nothing

MARKS = {"better": "▼", "worse": "▲", "=": "="}
UP = {"better": "▲", "worse": "▼", "=": "="}  # where more is better


class Field(NamedTuple):
    """A cell of a table: what stands in it, its interval, a verdict in a word, and words that explain it."""

    text: str = ""
    small: str = ""
    verdict: str = ""
    title: str = ""
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


class Column(NamedTuple):
    """A head, what explains it, and a cell per method."""

    head: str
    why: str
    of: Callable[[str], Field]


Lines = Mapping[str, Line]


def main(study: Study, place: Place) -> Table | None:
    """Methods of a place by rising bits: all that matters in one line each. None where only answers were measured."""
    group, recall = study.divergence(place), study.recall(place)
    if group is None:
        return None
    lines, used = study.table(place), [group, *([recall] if recall else [])]
    to, nearest = "ratio of KL; ▼ really lower, ▲ really higher, = not shown to differ", "ratio of KL to that of "
    columns = [*_first(lines), _strip(lines, floor_of(group)), _told(lines, group, KL, COMMON[KL])]
    columns.append(Column(f"to {study.baseline}", to, _ratio(lines, True)))
    columns.append(Column("to best cheaper", nearest + "the best method with fewer bits", _ratio(lines)))
    columns += [_told(lines, group, *each) for each in _shown(group, lines, "table")]
    columns += [_answers(study, recall, "right; ▼ really below the exact cache, = not shown")] if recall else []
    for other in study.fullest(place):
        known = study.lines(other)
        for name, each in _shown(other, known, "beside"):
            tests = to_nothing(other, each.null, study.seed) if each.null else {}
            columns.append(_told(known, other, name, each, tests))
            used += [other] if other not in used else []
    caption = " ".join(f"{study.titles[each.number]}: {each.whole.items} items ({each.about})." for each in used)
    return _table(f"table-{group.number}", str(place), columns, lines, caption, used)


def scores(study: Study, place: Place) -> Table | None:
    """Answers to all tasks that have them, each against the exact cache."""
    groups = study.scored(place)
    if not groups:
        return None
    known = [study.lines(group, SCORE) for group in groups]
    lines = {name: line for each in reversed(known) for name, line in each.items()}
    lines = dict(sorted(lines.items(), key=lambda pair: (pair[1].bits, pair[0])))
    columns = [Column("method", "", method), _first(lines)[1]]
    columns += [_answers(study, group, f"{group.whole.items} items: {group.about}") for group in groups]
    told = "; ".join(f"{study.titles[group.number]}: {group.whole.items} items" for group in groups)
    return _table(f"scores-{groups[0].number}", str(place), columns, lines, f"Mean score in percent; {told}.", groups)


def apart(study: Study, group: Group) -> Table | None:
    """How a task's numbers are spread over tokens, and whether they are where tokens are packed."""
    lines = {name: line for name, line in study.lines(group).items() if name != EXACT}
    told = _shown(group, lines, "apart")
    if not told:
        return None
    told.insert(1, (KL, COMMON[KL]._replace(word="mean", why="")))
    columns = [Column("method", "", method), _first(lines)[1], *(_told(lines, group, *each) for each in told)]
    caption = f"KL in nats, {group.whole.items} windows ({group.about})."
    return _table(f"uneven-{group.number}", f"Where, and how unevenly: {group.place}", columns, lines, caption, [group])


def others(study: Study, place: Place) -> Iterator[Table]:
    """What tasks without answers measured, and in other ways than the main table's."""
    for group in study.groups:
        if group.place != place or group.scored or group is study.divergence(place):
            continue
        lines = study.lines(group)
        told = _shown(group, lines, "table")
        if told:
            told += [(KL, COMMON[KL])] if any(KL in line.statistics for line in lines.values()) else []
            columns = [*_first(lines), *(_told(lines, group, *each) for each in told)]
            columns.append(Column(f"to {study.baseline}", "paired", lambda m, all=lines: _marked(all[m].baseline)))
            columns.append(Column("to best cheaper", "paired", lambda m, all=lines: _marked(all[m].cheaper)))
            title, caption = f"{study.titles[group.number]}: {place}", f"{group.whole.items} items ({group.about})."
            yield _table(f"table-{group.number}", title, columns, lines, caption, [group])


def method(name: str, frontier: bool = False) -> Field:
    """A method's name in its colour."""
    return Field(name, verdict="frontier" if frontier else "", colour="" if name == EXACT else look(name).colour)


def _table(id_: str, title: str, columns: Sequence[Column], lines: Lines, caption: str, groups) -> Table:
    rows = [[column.of(name) for column in columns] for name in lines]
    heads = [(column.head, column.why) for column in columns]
    return Table(id_, title, heads, rows, caption, tuple(group.number for group in groups))


def _shown(group: Group, lines: Lines, where: str) -> list[tuple[str, Statistic]]:
    """A task's own statistics that are told at a place, if any method has them."""
    known = {name for line in lines.values() for name, found in line.statistics.items() if found is not None}
    told = [(name, each) for name, each in kind_of(group.task).statistics.items() if name in known and each.word]
    return [(name, each) for name, each in told if where in each.where]


def _first(lines: Lines) -> list[Column]:
    names = Column("method", "● nothing cheaper is as good", lambda name: method(name, lines[name].frontier))
    bits = "allocated per cached number, measured from the storage"
    return [names, Column("bits", bits, lambda name: Field(f"{lines[name].bits:.2f}"))]


def _told(lines: Lines, group: Group, name: str, told: Statistic, tests: Mapping[str, Contrast] = {}) -> Column:
    """A statistic, as it is read; that texts never part is no number."""
    most = group.settings.get(told.bound)

    def of(method: str) -> Field:
        found = lines[method].statistics.get(name) if method in lines else None
        if isinstance(found, Estimate) and most and found.value >= most:
            return Field("never", f"in {most}")
        if not isinstance(found, Estimate):
            return Field(number(found))
        text, small = (percent(found), spread(found)) if told.share else (number(found.value), interval(found))
        return _marked(tests.get(method), text, small)

    return Column(told.word, told.why, of)


def _strip(lines: Lines, floor: float | None) -> Column:
    """Where divergences lie on a logarithmic axis."""
    known = [line.of(KL).value for line in lines.values() if line.of(KL).value > 0]
    low, high = min([*known, floor or 1.0], default=1e-6) / 1.5, max(known, default=1.0) * 1.5

    def at(x: float | None) -> float:
        return math.log(min(max(x or 0.0, low), high) / low) / math.log(high / low)

    def of(name: str) -> Field:
        value, *ends = lines[name].of(KL)
        first, last = (value if end is None else end for end in ends)
        band = at(floor) if floor else 0.0
        return Field(colour=look(name).colour, strip=(at(value), at(first), at(last), band)) if value > 0 else Field()

    return Column("", "KL on a logarithmic axis; the band is rounding", of)


def _ratio(lines: Lines, base: bool = False) -> Callable[[str], Field]:
    """How many times the other's divergence, and whether the difference is real."""

    def of(name: str) -> Field:
        contrast, value = lines[name].baseline if base else lines[name].cheaper, lines[name].of(KL).value
        other = value - contrast.difference.value if contrast else 0.0
        return _marked(contrast, f"{number(value / other)}×" if other > 0 else "")

    return of


def _answers(study: Study, group: Group, why: str) -> Column:
    lines, against = study.lines(group, SCORE), study.against_exact(group)

    def of(name: str) -> Field:
        score = lines[name].of(SCORE) if name in lines else None
        return _marked(against.get(name), percent(score), spread(score), UP) if score else Field()

    return Column(f"{study.titles[group.number]}, %", why, of)


def _marked(contrast: Contrast | None, text: str = "", small: str = "", marks: Mapping[str, str] = MARKS) -> Field:
    """A number behind its verdict."""
    if contrast is None:
        return Field(text, small)
    return Field(f"{marks[contrast.verdict]} {text}".strip(), small, contrast.verdict, contrast.words)
