"""Figures across all places: a column of dots for each."""

from collections.abc import Iterator

import numpy as np

from kvist.evaluate.results import Cell
from kvist.evaluate.statistics import Estimate, mean
from kvist.report import canvas, dots
from kvist.report.drift import AT_ONCE, STREAMED, accumulated, ends, last_step, probed
from kvist.report.figure import ROUNDING, Figure, floor_of
from kvist.report.load import EXACT
from kvist.report.speed import figures as speeds
from kvist.report.study import Study

MOST_SIZES = 4
SIDES = (dots.Kind("both"), dots.Kind("keys", "#2b7bba", "^"), dots.Kind("values", "#d1603d", "s"))
FACTORS = (
    dots.Kind("padding", "#2b7bba", "o"),
    dots.Kind("batch", "#d1603d", "s"),
    dots.Kind("chunk", "#2f9e77", "^"),
)


def at_once(study: Study) -> Iterator[Figure]:
    known = [(place, study.one(place, "horizon")) for place in study.places]
    known = [(place, group) for place, group in known if group and any(probed(e.cell) for e in group.whole.methods)]
    if not known:
        return
    columns, steps = [], set()
    for place, group in known:
        entries = [entry for entry in group.whole.methods if entry.method != EXACT and probed(entry.cell)]
        steps |= {last_step(entry.cell) for entry in entries}
        real = [name for name, each in accumulated(group, study.seed).items() if each.verdict != "="]
        values = {entry.method: ends(entry.cell, study.seed) for entry in entries}
        columns.append(dots.Column(str(place), values, None, real))
    kinds = (dots.Kind(STREAMED), dots.Kind(AT_ONCE, hollow=True))
    said = " or ".join(f"{step:,}" for step in sorted(steps))
    caption = (
        f"After {said} decoded tokens: history quantized as it was produced (filled), and the same history quantized "
        "at once (hollow); whiskers: 95 % bootstrap. A strong line: the difference is real (paired, Holm-corrected in "
        "its column)."
    )
    yield _dots("at-once", "horizon", "What has accumulated", columns, kinds, "KL, nats", known, caption)


def sides(study: Study) -> Iterator[Figure]:
    columns, known = [], []
    for place in study.places:
        for group in study.of(place, "fidelity")[:1]:
            if not group.parted.entries:
                continue
            values: dict[str, dict[str, Estimate]] = {}
            for entry in group.parted.methods:
                values.setdefault(entry.cell.first.method, {})[entry.part] = mean(entry.cell.values["kl"], study.seed)
            floor = floor_of(group)
            columns.append(dots.Column(str(place), values, (0.0, floor) if floor else None))
            known.append((place, group))
    if columns:
        caption = (
            "KL with both sides coded, with keys alone and with values alone; the other side as it comes. Grey band: "
        )
        yield _dots(
            "sides",
            "position",
            "Keys and values alone",
            columns,
            SIDES,
            "KL, nats",
            known,
            caption + ROUNDING + "; whiskers: 95 % bootstrap.",
        )


def memory(study: Study) -> Iterator[Figure]:
    for i, places in enumerate(study.models, 1):
        place, bits = places[0], {}
        base = study.divergence(place)
        known = [(place, group) for group in [*([base] if base else []), *study.scored(place)]]
        for _, group in known:
            for entry in group.whole.methods:
                for row in entry.cell.rows:
                    lengths = set(row.values.get("length", [row.settings.get("seqlen")]))
                    if len(lengths) == 1 and None not in lengths:
                        bits.setdefault(lengths.pop(), {}).setdefault(entry.method, []).append(row.bits)
        sizes = sorted(bits)[-MOST_SIZES:]
        columns = [
            dots.Column(
                f"{size:,} tokens",
                {name: {"bits": Estimate(float(np.mean(found)), None, None)} for name, found in bits[size].items()},
            )
            for size in sizes
        ]
        if columns:
            caption = (
                "Allocated bits per cached number after contexts of so many tokens, counted from the tensors: exact "
                "windows, tables and spare room weigh less in longer ones."
            )
            kinds, title = (dots.Kind("bits"),), f"Stored bits: {place.name} ({place.dtype})"
            yield _dots(f"memory-{i}", "speed", title, columns, kinds, "bits per cached number", known, caption, False)


def speed(study: Study) -> Iterator[Figure]:
    columns, known = [], []
    for place in study.places:
        group = study.divergence(place)
        if group is None or not all("tokens" in entry.cell.values for entry in group.whole.methods):
            continue
        values = {entry.method: {"ms": _milliseconds(entry.cell, study.seed)} for entry in group.whole.methods}
        columns.append(dots.Column(str(place), values))
        known.append((place, group))
    if columns:
        caption = (
            "Seconds of the evaluation's own forward passes over scored tokens; intervals over batches of items. It is "
            "what this evaluation cost, several tokens at a time, and not the speed of generation."
        )
        kinds, every = (dots.Kind("ms"),), [each["ms"].value for column in columns for each in column.values.values()]
        log = max(every) > 8 * min(every) > 0
        yield _dots("cost", "speed", "Time per scored token", columns, kinds, "ms per token", known, caption, log)


def _milliseconds(cell: Cell, seed: int) -> Estimate:
    per_row = [1000 * row.seconds / sum(row.values["tokens"]) for row in cell.rows]
    return mean(per_row, seed)


def nuisance(study: Study) -> Iterator[Figure]:
    columns, known = [], []
    for place in study.places:
        group = study.one(place, "nuisance")
        if group is None:
            continue
        values = {
            entry.method: {kind.name: mean(entry.cell.values[f"kl_{kind.name}"], study.seed) for kind in FACTORS}
            for entry in group.whole.methods
            if all(f"kl_{kind.name}" in entry.cell.values for kind in FACTORS)
        }
        exact = values.pop(EXACT, {})
        floor = max([each.value for each in exact.values()], default=0.0)
        base = study.one(place, "fidelity")
        floor = max(floor, (floor_of(base) or 0.0) if base else 0.0)
        if values:
            columns.append(dots.Column(str(place), values, (0.0, floor) if floor > 0 else None))
            known.append((place, group))
    if columns:
        caption = (
            "KL between a method's own distributions with and without padding on the left, another row in the batch, "
            "and other chunks of the prompt. Grey band: what the same does to the exact cache, and "
            "rounding; whiskers: 95 % bootstrap."
        )
        yield _dots("factors", "nuisance", "What should change nothing", columns, FACTORS, "KL, nats", known, caption)


def _dots(id_: str, section: str, title: str, columns, kinds, unit: str, known, caption: str, log=True) -> Figure:
    """Methods by their first known value, the best above."""

    def place(method: str) -> float:
        found = [column.values[method] for column in columns if method in column.values]
        return next(iter(found[0].values())).value

    methods = sorted(dict.fromkeys(name for column in columns for name in column.values), key=place)
    figure = dots.draw(methods, columns, kinds, unit, log)
    used = tuple(group.number for _, group in known)
    with canvas.style():
        return Figure(id_, section, title, canvas.svg(figure), caption, used)


def benches(study: Study) -> Iterator[Figure]:
    for id_, title, body, caption, file in speeds(study.benches):
        yield Figure(id_, "speed", title, body, caption, (), file)
