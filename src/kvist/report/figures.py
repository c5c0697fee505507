"""The figures of a report: what is drawn, in which words, from which groups of rows.

What a task wants drawn it says itself (`kvist.evaluate.measures`); figures across tasks are made here.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import numpy as np

from kvist.bench.reports import Decode, Report, Throughput
from kvist.evaluate.measures import Curves, Dots, Maps, Section
from kvist.evaluate.registry import Kind, kind_of, kinds
from kvist.evaluate.results import Cell
from kvist.evaluate.statistics import Estimate, mean, means
from kvist.report import canvas, plots
from kvist.report.contrast import KL, SCORE, Pair, floor_of, judged
from kvist.report.load import EXACT, Entry, Group, Place
from kvist.report.look import look
from kvist.report.plots import Column, Panel
from kvist.report.study import Study

ROUNDING = "what rounding alone does"
MOST_SIZES = 4  # columns of dots
PARETO, SPEED = Section("pareto", "Quality against stored bits"), Section("speed", "Memory and speed")
Drawn = tuple[Column, Group]


class Figure(NamedTuple):
    """id: its anchor; section; title; body: SVG; caption; groups: numbers of those it is drawn from; file: of a
    benchmark that it is drawn from instead."""

    id: str
    section: Section
    title: str
    body: str
    caption: str
    groups: tuple[int, ...]
    file: str = ""


def figures(study: Study) -> list[Figure]:
    """All that its results can show."""
    found = [*_pareto(study)]
    for kind in kinds().values():
        if kind.section is None:
            continue
        known = [group for group in study.groups if kind_of(group.task) is kind]
        for wanted in kind.figures:
            found += _WANTED[type(wanted)](study, kind, wanted, known)
    return [*found, *_sides(study), *_memory(study), *_cost(study), *_benches(study.benches)]


def frontier(study: Study, places: Sequence[Place]):
    """The Pareto plot of a model's conditions, as a figure of matplotlib, and the groups behind it."""
    bases = [group for place in places if (group := study.divergence(place))]
    recalls = [group for place in places if (group := study.recall(place))]
    rows = [[_divergence(study, group) for group in bases], [_missed(study, group) for group in recalls]]
    kept = [row for panels in rows if (row := [panel for panel in panels if panel.points])]
    used = tuple(group.number for group in (*bases, *recalls))
    return (plots.frontiers(kept), used) if kept else (None, ())


def maps(cells: Sequence[tuple[str, str, Cell]], across: int = 7):
    """Maps of right answers, each below its title in the colour of its method."""
    names = ("length", "depth", SCORE)
    found = [plots.shares(*(cell.values[n] for n in names), title=title, method=name) for title, name, cell in cells]
    return plots.maps(found, across)


def _divergence(study: Study, group: Group) -> Panel:
    points = [(line.method, line.bits, line.of(KL)) for line in study.lines(group, KL)]
    points = [point for point in points if point[0] != EXACT and point[2].value > 0]
    floor = floor_of(group)
    band = None if floor is None else _alone(floor)
    return Panel(f"{group.place}: {group.task}", "KL from the exact cache, nats", points, band, ROUNDING, True)


def _missed(study: Study, group: Group) -> Panel:
    found = {line.method: (line.bits, line.of(SCORE)) for line in study.lines(group, SCORE)}
    missed = {name: _flipped(x) for name, (_, x) in found.items()}
    points = [(name, bits, missed[name]) for name, (bits, _) in found.items() if name != EXACT]
    floor = missed.get(EXACT)
    return Panel(f"{group.place}: {group.task}", "share of answers missed", points, floor, "exact cache", False)


def _pareto(study: Study) -> Iterator[Figure]:
    caption = (
        "Digits are the bits of the codes, joined per family; rings are variants, named beside them. The grey band "
        "joins what nothing cheaper beats. Whiskers: 95 % bootstrap intervals. Lower and farther left is better."
    )
    for i, places in enumerate(study.models, 1):
        figure, used = frontier(study, places)
        if figure is not None:
            title = f"{places[0].name} ({places[0].dtype})"
            yield Figure(f"pareto-{i}", PARETO, title, canvas.svg(figure), caption, used)


def _maps(study: Study, kind: Kind, wanted: Maps, known: Sequence[Group]) -> Iterator[Figure]:
    for group in known:
        whole, against = group.whole, study.against_exact(group)
        if not all({"length", "depth", SCORE} <= e.cell.values.keys() for e in whole.methods):
            continue
        if all(depth is None for depth in whole.methods[0].cell.values["depth"]):
            continue  # no more to draw than a mean per length
        score = {entry.method: float(np.mean(entry.cell.values[SCORE])) for entry in whole.methods}
        worse = {name for name, each in against.items() if each.verdict == "worse"}
        entries = sorted(whole.methods, key=lambda e: (e.method != EXACT, -score[e.method]))
        cells = []
        for entry in entries:
            label, mark = look(entry.method).label, " ↓" if entry.method in worse else ""
            label = label if len(label) < 18 else label[:17] + "…"
            cells.append((f"{label}  {100 * score[entry.method]:.0f}{mark}", entry.method, entry.cell))
        caption = (
            f"{whole.items} questions ({group.about}). In each cell: % right. Depth of the fact in % from above, "
            "tokens of context below; beside the name the mean, ↓ where it is really below that of the exact cache "
            "(paired, Holm-corrected)."
        )
        title = f"{study.titles[group.number]}: {group.place}"
        assert kind.section
        yield Figure(f"map-{group.number}", kind.section, title, canvas.svg(maps(cells)), caption, (group.number,))


def _curves(study: Study, kind: Kind, wanted: Curves, known: Sequence[Group]) -> Iterator[Figure]:
    for group in (g for place in study.places for g in study.of(place) if g in known and g is study.one(place, g.task)):
        entries = [e for e in group.whole.methods if e.method != EXACT and wanted.values in e.cell.values]
        length = min((len(curve) for e in entries for curve in e.cell.values[wanted.values]), default=0)
        if length < 2:
            continue
        lines = {
            e.method: means([curve[:length] for curve in e.cell.values[wanted.values]], study.seed) for e in entries
        }
        bucket, start = group.settings.get("bucket", 1), group.settings.get(wanted.start) or 0
        x = [start + (i + 0.5) * bucket for i in range(length)]
        figure = plots.curves(x, lines, floor_of(group), wanted.xlabel.format(bucket=bucket))
        caption = (
            f"{group.whole.items} windows ({group.about}). A panel per family, digits: bits of the codes; other "
            "families in grey; shaded: 95 % bootstrap intervals."
        )
        assert kind.section
        id_ = f"{kind.section.id}-{group.number}"
        yield Figure(id_, kind.section, str(group.place), canvas.svg(figure), caption, (group.number,))


def _wanted(study: Study, kind: Kind, wanted: Dots, known: Sequence[Group]) -> Iterator[Figure]:
    drawn: list[Drawn] = []
    for place in study.places:
        group = next((group for group in study.of(place) if group in known), None)
        entries = group.whole.methods if group else []
        numbers = {
            e.method: {name: each(e.cell.values) for name, each in wanted.kinds.items()}
            for e in entries
            if set(wanted.needs) <= e.cell.values.keys()
        }
        numbers = {method: own for method, own in numbers.items() if all(own.values())}
        exact, floor, real = numbers.pop(EXACT, {}), 0.0, []
        if group is None or not numbers:
            continue
        if wanted.band:
            base = study.divergence(place)
            floor = max([*(float(np.mean(x)) for x in exact.values()), (floor_of(base) or 0.0) if base else 0.0])
        if wanted.paired:
            pairs = [Pair(method, "", *own.values()) for method, own in numbers.items()]
            real = [name for name, each in judged(pairs, study.seed).items() if each.verdict != "="]
        values = {m: {kind: mean(x, study.seed) for kind, x in own.items()} for m, own in numbers.items()}
        drawn.append((Column(str(place), values, floor or None, real), group))
    if drawn and kind.section:
        yield _dots(wanted.id, kind.section, wanted.title, drawn, wanted.unit, wanted.caption)


def _sides(study: Study) -> Iterator[Figure]:
    """Divergence with keys or values coded alone."""
    drawn: list[Drawn] = []
    for group in (group for place in study.places if (group := study.one(place, "fidelity"))):
        values: dict[str, dict[str, Estimate]] = {}
        for entry in group.parted.methods:
            values.setdefault(entry.cell.first.method, {})[entry.part] = mean(entry.cell.values[KL], study.seed)
        if values:
            drawn.append((Column(str(group.place), values, floor_of(group)), group))
    caption = (
        "KL with both sides coded, with keys alone and with values alone; the other side as it comes. Grey band: "
        f"{ROUNDING}; whiskers: 95 % bootstrap."
    )
    section = kind_of("fidelity").section
    if drawn and section:
        yield _dots("sides", section, "Keys and values alone", drawn, "KL, nats", caption)


def _memory(study: Study) -> Iterator[Figure]:
    caption = (
        "Allocated bits per cached number after contexts of so many tokens, counted from the tensors: exact windows, "
        "tables and spare room weigh less in longer ones."
    )
    for i, (place, *_) in enumerate(study.models, 1):
        base, bits = study.divergence(place), dict[int, dict[str, list[float]]]()
        groups = [*([base] if base else []), *study.scored(place)]
        for entry in (entry for group in groups for entry in group.whole.methods):
            for row in entry.cell.rows:
                lengths = set(row.values.get("length", [row.settings.get("seqlen")]))
                if len(lengths) == 1 and None not in lengths:
                    bits.setdefault(lengths.pop(), {}).setdefault(entry.method, []).append(row.bits)
        columns = [
            Column(f"{size:,} tokens", {m: {"": _alone(float(np.mean(x)))} for m, x in bits[size].items()})
            for size in sorted(bits)[-MOST_SIZES:]
        ]
        if columns:
            title, used = f"Stored bits: {place.name} ({place.dtype})", tuple(group.number for group in groups)
            body = canvas.svg(plots.dots(columns, "bits per cached number", log=False))
            yield Figure(f"memory-{i}", SPEED, title, body, caption, used)


def _cost(study: Study) -> Iterator[Figure]:
    def milliseconds(entry: Entry) -> Estimate:
        return mean([1000 * row.seconds / sum(row.values["tokens"]) for row in entry.cell.rows], study.seed)

    bases = [group for place in study.places if (group := study.divergence(place))]
    bases = [group for group in bases if all("tokens" in entry.cell.values for entry in group.whole.methods)]
    drawn = [
        (Column(str(group.place), {e.method: {"": milliseconds(e)} for e in group.whole.methods}), group)
        for group in bases
    ]
    caption = (
        "Seconds of the evaluation's own forward passes over scored tokens; intervals over batches of items. It is "
        "what this evaluation cost, several tokens at a time, and not the speed of generation."
    )
    if drawn:
        yield _dots("cost", SPEED, "Time per scored token", drawn, "ms per token", caption)


def _benches(benches: Sequence[tuple[str, Report]]) -> Iterator[Figure]:
    """What `kvist bench decode` and `kvist bench throughput` measured."""
    for i, (file, report) in enumerate(benches, 1):
        if isinstance(report, Decode):
            known = [row for row in report.rows if row.median_ms]
            rows = [(row.tokens, row.contender, Estimate(row.median_ms, row.p10_ms, row.p90_ms)) for row in known]
            words, unit = "{:,} tokens", "ms per decode step (whiskers: 10 % and 90 % of the steps)"
            said, log = "Median of the steps.", True
        elif isinstance(report, Throughput):
            rows = [(row.batch, row.contender, _alone(row.speed)) for row in report.rows if row.speed]
            words, unit = "batch {}", "generated tokens/s, prefill included"
            said, log = "One run each, no interval.", False
        else:
            continue
        sizes = sorted({size for size, *_ in rows})
        if len(sizes) > MOST_SIZES:
            sizes = [sizes[round(i * (len(sizes) - 1) / (MOST_SIZES - 1))] for i in range(MOST_SIZES)]
        columns = [
            Column(words.format(size), {n.removeprefix("kvist "): {"": x} for s, n, x in rows if s == size})
            for size in sizes
        ]
        if columns:
            last = columns[-1].values  # the longest, or the largest batch, decides who stands above
            methods = sorted(last, key=lambda name: last[name][""].value, reverse=not log)
            methods += [n for n in dict.fromkeys(n for column in columns for n in column.values) if n not in last]
            body = canvas.svg(plots.dots(columns, unit, log, methods))
            machine = ", ".join(f"{name} {value}".removeprefix("processor ") for name, value in report.machine.items())
            caption = f"{report.title.rstrip('.')}. {said} {machine}."
            yield Figure(f"bench-{i}", SPEED, report.title.partition(":")[0] or file, body, caption, (), file)


def _flipped(x: Estimate) -> Estimate:
    """Of what is missing to 1."""
    ends = (x.high, x.low)
    return Estimate(1 - x.value, *(None if end is None else 1 - end for end in ends))


def _alone(x: float) -> Estimate:
    """A number without an interval."""
    return Estimate(x, None, None)


def _dots(id_: str, section: Section, title: str, drawn: Sequence[Drawn], unit: str, caption: str) -> Figure:
    """Conditions side by side."""
    body = canvas.svg(plots.dots([column for column, _ in drawn], unit))
    return Figure(id_, section, title, body, caption, tuple(group.number for _, group in drawn))


_WANTED: dict[type, Callable[[Study, Kind, object, Sequence[Group]], Iterator[Figure]]] = {
    Maps: _maps,
    Curves: _curves,
    Dots: _wanted,
}  # pyright: ignore[reportAssignmentType]
