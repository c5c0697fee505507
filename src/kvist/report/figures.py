"""The figures of a report: what is drawn, in which words, from which groups of rows."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np

from kvist.evaluate.statistics import Estimate, means
from kvist.report import across, canvas, curves, maps, pareto
from kvist.report.contrast import Contrast
from kvist.report.figure import ROUNDING, Figure, floor_of
from kvist.report.load import EXACT, Group, Place
from kvist.report.study import Study


def figures(study: Study) -> list[Figure]:
    """All that its results can show, in the order of reading."""
    return [figure for make in _MADE for figure in make(study)]


def frontier(study: Study, places: Sequence[Place]):
    """The Pareto plot of a model's conditions, as a figure of matplotlib, and the groups behind it."""
    rows: dict[str, list[pareto.Panel]] = {"kl": [], "recall": []}
    used = []
    for place in places:
        base, recall = study.divergence(place), study.recall(place)
        if base:
            rows["kl"].append(_divergence_panel(study, base))
            used.append(base.number)
        if recall:
            rows["recall"].append(_recall_panel(study, recall))
            used.append(recall.number)
    rows = {name: [panel for panel in panels if panel.points] for name, panels in rows.items()}
    kept = [panels for panels in rows.values() if panels]
    return (pareto.draw(kept), tuple(used)) if kept else (None, ())


def _divergence_panel(study: Study, group: Group) -> pareto.Panel:
    points = [(line.method, line.bits, line.of("kl")) for line in study.lines(group, "kl")]
    points = [point for point in points if point[0] != EXACT and point[2].value > 0]
    floor = floor_of(group)
    band = None if floor is None else Estimate(floor, None, None)
    title = f"{group.place}: {group.task}"
    return pareto.Panel(title, "KL from the exact cache, nats", points, band, ROUNDING, True)


def _recall_panel(study: Study, group: Group) -> pareto.Panel:
    points, floor = [], None
    for line in study.lines(group, "score"):
        score = line.of("score")
        low, high = (None if end is None else 1 - end for end in (score.high, score.low))
        missed = Estimate(1 - score.value, low, high)
        if line.method == EXACT:
            floor = missed
        else:
            points.append((line.method, line.bits, missed))
    return pareto.Panel(f"{group.place}: {group.task}", "share of answers missed", points, floor, "exact cache", False)


def _pareto(study: Study) -> Iterator[Figure]:
    for i, places in enumerate(study.models, 1):
        figure, used = frontier(study, places)
        if figure is None:
            continue
        caption = (
            "Digits are the bits of the codes, joined per family; rings are variants, named beside them. The grey band "
            "joins what nothing cheaper beats. Whiskers: 95 % bootstrap intervals. Lower and farther left is better."
        )
        with canvas.style():
            yield Figure(
                f"pareto-{i}", "pareto", f"{places[0].name} ({places[0].dtype})", canvas.svg(figure), caption, used
            )


def _maps(study: Study) -> Iterator[Figure]:
    for group in study.groups:
        whole = group.whole
        if not group.scored or not maps.deep(whole.methods):
            continue
        against = study.exact_contrasts(group)
        entries = sorted(whole.methods, key=lambda e: (e.method != EXACT, -np.mean(e.cell.values["score"])))
        body = "".join(maps.draw(entry, _mark(against.get(entry.method))) for entry in entries)
        caption = (
            f"{whole.items} questions ({group.about}). In each cell: % right. Depth of the fact in % from above, "
            "tokens of context below; beside the name the mean, ↓ where it is really below that of the exact cache "
            "(paired, Holm-corrected)."
        )
        title = f"{study.titles[group.number]}: {group.place}"
        body = f'<div class="maps">{body}</div>{maps.scale()}'
        yield Figure(f"map-{group.number}", "maps", title, body, caption, (group.number,))


def _positions(study: Study) -> Iterator[Figure]:
    for place in study.places:
        group = study.one(place, "fidelity")
        if group:
            start, bucket = group.settings.get("prompt") or 0, group.settings.get("bucket", 1)
            yield from _curves(
                study, group, "position", f"position in the window, means of {bucket} tokens", start, bucket
            )


def _horizon(study: Study) -> Iterator[Figure]:
    for place in study.places:
        group = study.one(place, "horizon")
        if group:
            bucket = group.settings.get("bucket", 1)
            yield from _curves(study, group, "horizon", f"decode step, means of {bucket} steps", 0, bucket)


def _curves(study: Study, group: Group, section: str, xlabel: str, start: int, bucket: int) -> Iterator[Figure]:
    whole = group.whole
    entries = [entry for entry in whole.methods if entry.method != EXACT and "kl_curve" in entry.cell.values]
    length = min((len(curve) for entry in entries for curve in entry.cell.values["kl_curve"]), default=0)
    if length < 2:
        return
    found = []
    for entry in entries:
        cut = [curve[:length] for curve in entry.cell.values["kl_curve"]]
        found.append(curves.Curve(entry.method, means(cut, study.seed)))
    x = [start + (i + 0.5) * bucket for i in range(length)]
    figure = curves.draw(x, found, floor_of(group), xlabel)
    caption = (
        f"{whole.items} windows ({group.about}). A panel per family, digits: bits of the codes; other families in "
        "grey; shaded: 95 % bootstrap intervals."
    )
    with canvas.style():
        yield Figure(
            f"{section}-{group.number}", section, str(group.place), canvas.svg(figure), caption, (group.number,)
        )


def _mark(contrast: Contrast | None) -> str:
    return " ↓" if contrast and contrast.verdict == "worse" else ""


_MADE: tuple[Callable[[Study], Any], ...] = (
    _pareto, _maps, _positions, across.sides, _horizon, across.at_once,
    across.memory, across.speed, across.benches, across.nuisance,
)  # fmt: skip
