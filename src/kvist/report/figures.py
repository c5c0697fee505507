"""The figures of a report: what is drawn, from which groups of rows.

What a task wants drawn it says itself (`kvist.evaluate.measures`); figures across tasks are made here.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np

from kvist.bench.reports import Report
from kvist.evaluate.measures import Curves, Dots, Maps, Section
from kvist.evaluate.registry import Kind, kind_of, kinds
from kvist.evaluate.statistics import Estimate, mean, means
from kvist.report import canvas, plots
from kvist.report.load import EXACT, Group, Place
from kvist.report.look import look
from kvist.report.plots import Column, Panel
from kvist.report.study import KL, SCORE, Study, floor_of, judged

MOST_SIZES = 4  # columns of dots
PARETO, SPEED = Section("pareto", "Quality against stored bits"), Section("speed", "Memory and speed")
Drawn = Sequence[tuple[Column, Group]]


class Figure(NamedTuple):
    """id: its anchor; section; title; body: SVG; caption: the page has more words for each `kind` of figure; groups:
    numbers of those it is drawn from; file: of a benchmark that it is drawn from instead."""

    id: str
    section: Section
    title: str
    body: str
    caption: str
    kind: str
    groups: tuple[int, ...] = ()
    file: str = ""


def figures(study: Study) -> list[Figure]:
    """All that its results can show."""
    found = [*_pareto(study)]
    for kind in kinds().values():
        known = [group for group in study.groups if kind_of(group.task) is kind]
        for wanted in kind.figures if kind.section else ():
            found += _WANTED[type(wanted)](study, kind, wanted, known)
    return [*found, *_sides(study), *_memory(study), *_cost(study), *_benches(study.benches)]


def frontier(study: Study, places: Sequence[Place]) -> tuple[Any, tuple[int, ...]]:
    """The Pareto plot of a model's conditions, as a figure of matplotlib, and the groups behind it."""
    bases = [group for place in places if (group := study.divergence(place))]
    recalls = [group for place in places if (group := study.recall(place))]
    rows = [[_divergence(study, group) for group in bases], [_missed(study, group) for group in recalls]]
    kept = [row for panels in rows if (row := [panel for panel in panels if panel.points])]
    return plots.frontiers(kept) if kept else None, _numbers((*bases, *recalls))


def _divergence(study: Study, group: Group) -> Panel:
    known = [line for name, line in study.lines(group, KL).items() if name != EXACT and line.of(KL).value > 0]
    points = [(line.method, line.bits, line.of(KL), line.frontier) for line in known]
    floor = floor_of(group)
    band, unit = floor and Estimate.alone(floor), "KL from the exact cache, nats"
    return Panel(f"{group.place}: {group.task}", unit, points, band, "what rounding alone does", True)


def _missed(study: Study, group: Group) -> Panel:
    lines = study.lines(group, SCORE)
    ends = {name: [None if end is None else 1 - end for end in line.of(SCORE)] for name, line in lines.items()}
    missed = {name: Estimate(value or 0.0, low, high) for name, (value, high, low) in ends.items()}
    points = [(name, line.bits, missed[name], line.frontier) for name, line in lines.items() if name != EXACT]
    floor = missed.get(EXACT)
    return Panel(f"{group.place}: {group.task}", "share of answers missed", points, floor, "exact cache", False)


def _pareto(study: Study) -> Iterator[Figure]:
    for i, places in enumerate(study.models, 1):
        figure, used = frontier(study, places)
        if figure is not None:
            title = f"{places[0].name} ({places[0].dtype})"
            yield Figure(f"pareto-{i}", PARETO, title, canvas.svg(figure), "", "pareto", used)


def _maps(study: Study, kind: Kind, wanted: Maps, known: Sequence[Group]) -> Iterator[Figure]:
    for group in known:
        entries, against = group.whole.methods, study.against_exact(group)
        values = {entry.method: entry.cell.values for entry in entries}
        if not all(SCORE in each and any(d is not None for d in each.get("depth", ())) for each in values.values()):
            continue  # no more to draw than a mean per length
        panels, score = [], {name: float(np.mean(each[SCORE])) for name, each in values.items()}
        for name in sorted(score, key=lambda name: (name != EXACT, -score[name])):
            label, worse = look(name).label, name in against and against[name].verdict == "worse"
            label = label if len(label) < 18 else label[:17] + "…"
            panels.append((f"{label}  {100 * score[name]:.0f}{' ↓' if worse else ''}", name, values[name]))
        title, caption = (
            f"{study.titles[group.number]}: {group.place}",
            f"{group.whole.items} questions ({group.about}).",
        )
        yield _figure("map", kind, group, title, plots.maps(panels, 7), caption)


def _curves(study: Study, kind: Kind, wanted: Curves, known: Sequence[Group]) -> Iterator[Figure]:
    for group in _fullest(study, known):
        every = {e.method: e.cell.values.get(wanted.values) for e in group.whole.methods if e.method != EXACT}
        curves = {name: each for name, each in every.items() if each}
        length = min((len(curve) for each in curves.values() for curve in each), default=0)
        if length < 2:
            continue
        lines = {name: means([curve[:length] for curve in each], study.seed) for name, each in curves.items()}
        bucket, start = group.settings.get("bucket", 1), group.settings.get(wanted.start) or 0
        x = [start + (i + 0.5) * bucket for i in range(length)]
        figure = plots.curves(x, lines, floor_of(group), wanted.xlabel.format(bucket=bucket))
        caption = f"{group.whole.items} windows ({group.about})."
        yield _figure("curves", kind, group, str(group.place), figure, caption)


def _dotted(study: Study, kind: Kind, wanted: Dots, known: Sequence[Group]) -> Iterator[Figure]:
    drawn: list[tuple[Column, Group]] = []
    for group in _fullest(study, known):
        cells = {e.method: e.cell.values for e in group.whole.methods if set(wanted.needs) <= e.cell.values.keys()}
        numbers = {m: {name: each(values) for name, each in wanted.kinds.items()} for m, values in cells.items()}
        numbers = {method: own for method, own in numbers.items() if all(own.values())}
        exact, base = numbers.pop(EXACT, {}), study.divergence(group.place)
        floor = max([*map(np.mean, exact.values()), (base and floor_of(base)) or 0.0]) if wanted.band else 0.0
        pairs = {method: ("", *own.values()) for method, own in numbers.items()} if wanted.paired else {}
        real = [name for name, each in judged(pairs, study.seed).items() if each.verdict != "="]
        values = {m: {kind: mean(x, study.seed) for kind, x in own.items()} for m, own in numbers.items()}
        if values:
            drawn.append((Column(str(group.place), values, float(floor) or None, real), group))
    assert kind.section
    yield from _dots(wanted.id, kind.section, wanted.title, drawn, wanted.unit, wanted.caption)


def _sides(study: Study) -> Iterator[Figure]:
    """Divergence with keys or values coded alone."""
    drawn: list[tuple[Column, Group]] = []
    for group in (group for place in study.places if (group := study.one(place, "fidelity"))):
        values: dict[str, dict[str, Estimate]] = {}
        for entry in group.parted.methods:
            values.setdefault(entry.cell.first.method, {})[entry.part] = mean(entry.cell.values[KL], study.seed)
        if values:
            drawn.append((Column(str(group.place), values, floor_of(group)), group))
    section = kind_of("fidelity").section
    yield from _dots("sides", section or PARETO, "Keys and values alone", drawn, "KL, nats")


def _memory(study: Study) -> Iterator[Figure]:
    for i, (place, *_) in enumerate(study.models, 1):
        base, bits = study.divergence(place), dict[int, dict[str, list[float]]]()
        groups = [*([base] if base else []), *study.scored(place)]
        for row in (row for group in groups for entry in group.whole.methods for row in entry.cell.rows):
            lengths = set(row.values.get("length", [row.settings.get("seqlen")]))
            if len(lengths) == 1 and None not in lengths:
                bits.setdefault(lengths.pop(), {}).setdefault(row.method, []).append(row.bits)
        mean_of = {n: {m: {"": Estimate.alone(float(np.mean(x)))} for m, x in each.items()} for n, each in bits.items()}
        known = {n: mean_of[n] for n in sorted(bits)[-MOST_SIZES:]}
        if known:
            figure = plots.dots([Column(f"{n:,} tokens", x) for n, x in known.items()], "bits per cached number", False)
            title = f"Stored bits: {place.name} ({place.dtype})"
            yield Figure(f"memory-{i}", SPEED, title, canvas.svg(figure), "", "memory", _numbers(groups))


def _cost(study: Study) -> Iterator[Figure]:
    drawn: list[tuple[Column, Group]] = []
    for group in (group for place in study.places if (group := study.divergence(place))):
        rows = {entry.method: entry.cell.rows for entry in group.whole.methods}
        if all("tokens" in some[0].values for some in rows.values()):
            ms = {m: [1000 * row.seconds / sum(row.values["tokens"]) for row in some] for m, some in rows.items()}
            values = {method: {"": mean(each, study.seed)} for method, each in ms.items()}
            drawn.append((Column(str(group.place), values), group))
    yield from _dots("cost", SPEED, "Time per scored token", drawn, "ms per token")


def _benches(benches: Sequence[tuple[str, Report]]) -> Iterator[Figure]:
    """What `kvist bench` measured and says how to draw."""
    for i, (file, report) in enumerate(benches, 1):
        found, seen = report.drawn, report.look
        if not found or not seen:
            continue
        sizes = sorted(found)
        if len(sizes) > MOST_SIZES:
            sizes = [sizes[round(i * (len(sizes) - 1) / (MOST_SIZES - 1))] for i in range(MOST_SIZES)]
        columns = [
            Column(seen.size.format(n), {m: {"": Estimate(*ends)} for m, ends in found[n].items()}) for n in sizes
        ]
        last = found[sizes[-1]]  # the longest, or the largest batch, decides who stands above
        methods = sorted(last, key=lambda name: last[name][0] if seen.lower else -last[name][0])
        methods += [n for n in dict.fromkeys(n for n_ in sizes for n in found[n_]) if n not in last]
        machine = ", ".join(f"{name} {value}".removeprefix("processor ") for name, value in report.machine.items())
        body = canvas.svg(plots.dots(columns, seen.unit, seen.lower, methods))
        caption = f"{report.title.rstrip('.')}. {seen.words} {machine}."
        yield Figure(f"bench-{i}", SPEED, report.title.partition(":")[0] or file, body, caption, "bench", file=file)


def _figure(what: str, kind: Kind, group: Group, title: str, figure: Any, caption: str) -> Figure:
    """Of one group of a task."""
    assert kind.section
    id_ = f"{kind.section.id if what == 'curves' else what}-{group.number}"
    return Figure(id_, kind.section, title, canvas.svg(figure), caption, what, (group.number,))


def _dots(id_: str, section: Section, title: str, drawn: Drawn, unit: str, caption: str = "") -> Iterator[Figure]:
    """Conditions side by side, if there are any."""
    if drawn:
        body = canvas.svg(plots.dots([column for column, _ in drawn], unit))
        yield Figure(id_, section, title, body, caption, id_, _numbers(group for _, group in drawn))


def _fullest(study: Study, known: Sequence[Group]) -> Iterator[Group]:
    """Of these groups the fullest of each place."""
    for place in study.places:
        yield from [group for group in study.of(place) if group in known][:1]


def _numbers(groups: Iterable[Group]) -> tuple[int, ...]:
    return tuple(group.number for group in groups)


_WANTED: dict[type, Callable[..., Iterator[Figure]]] = {Maps: _maps, Curves: _curves, Dots: _dotted}
