"""Tables as plain data: the same cells go into the page, the Markdown and the JSON."""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

from kvist.evaluate.statistics import Estimate
from kvist.report.contrast import Contrast, Line
from kvist.report.figures import floor_of
from kvist.report.load import EXACT, Place
from kvist.report.look import interval, look, number, percent, spread
from kvist.report.study import Row, Study

MARKS = {"better": "▼", "worse": "▲", "=": "="}
UP = {"better": "▲", "worse": "▼", "=": "="}  # where more is better


class Field(NamedTuple):
    """A cell of a table: what stands in it, its interval, a verdict in a word, words that explain it, and an id to go
    to."""

    text: str
    small: str = ""
    verdict: str = ""
    title: str = ""
    link: str = ""
    colour: str = ""
    strip: tuple[float, float, float, float] | None = None  # value, low, high, floor as shares of a logarithmic axis


class Table(NamedTuple):
    """id; title; names of columns, each with an explanation; rows of fields; strong: whether a row stands out; caption;
    groups behind it."""

    id: str
    title: str
    columns: Sequence[tuple[str, str]]
    rows: Sequence[Sequence[Field]]
    strong: Sequence[bool]
    caption: str
    groups: tuple[int, ...]


def main(study: Study, place: Place) -> Table | None:
    """Methods of a place by rising bits: all that matters in one line each. None where only answers were measured."""
    group, recall, horizon = study.divergence(place), study.recall(place), study.one(place, "horizon")
    if group is None:
        return None
    rows = study.table(place)
    floor = floor_of(group)
    known = [row.line.of("kl").value for row in rows if row.line.of("kl").value > 0]
    ends = (min([*known, floor or 1.0], default=1e-6) / 1.5, max(known, default=1.0) * 1.5)
    columns = [
        ("method", "● nothing cheaper is as good"),
        ("bits", "allocated per cached number, measured from the storage"),
        ("", "KL on a logarithmic axis; the band is rounding"),
        ("KL, nats", "mean over tokens, from the exact cache"),
        (f"to {study.baseline}", "ratio of KL; ▼ really lower, ▲ really higher, = not shown to differ"),
        ("to best cheaper", "ratio of KL to that of the best method with fewer bits"),
    ]
    optional = ("kl_99.9%", "perplexity", "agreement")
    names = [name for name in optional if name in rows[0].line.statistics]
    columns += [(_WORDS[name], _WHY[name]) for name in names]
    if recall:
        columns.append((f"{study.titles[recall.number]}, %", "right; ▼ really below the exact cache, = not shown"))
    if horizon:
        columns.append(("KL per 1K steps", "growth while decoding; ▲ really grows, = not shown to"))
        if "first_mismatch" in horizon.whole.entries[0].cell.values:
            most = horizon.settings.get("free_steps", "")
            columns.append(("text parts at", f"first greedy token of {most} that differs, mean"))
    strips = [_strip(row.line.method, row.line.of("kl"), floor, ends) for row in rows]
    shown = [_main(study, row, strip, names, recall, horizon) for row, strip in zip(rows, strips, strict=True)]
    caption = f"{group.whole.items} windows ({group.about}). " + (
        f"Answers: {recall.whole.items} questions ({recall.about}). " if recall else ""
    )
    caption += f"Decoding: {horizon.whole.items} windows ({horizon.about}). " if horizon else ""
    groups = tuple(each.number for each in (group, recall, horizon) if each)
    strong = [row.line.frontier for row in rows]
    return Table(f"table-{group.number}", str(place), columns, shown, strong, caption, groups)


def scores(study: Study, place: Place) -> Table | None:
    """Answers to all tasks that have them, each against the exact cache."""
    groups = study.scored(place)
    if not groups:
        return None
    by_group = [{line.method: line for line in study.lines(group, "score")} for group in groups]
    methods = sorted({m for lines in by_group for m in lines}, key=lambda m: _first(by_group, m))
    rows = []
    for name in methods:
        fields = [method(name), Field(f"{_first(by_group, name)[0]:.2f}")]
        for group, lines in zip(groups, by_group, strict=True):
            against = study.exact_contrasts(group)
            fields.append(_score(lines.get(name), against.get(name)))
        rows.append(fields)
    columns = [("method", ""), ("bits", "allocated per cached number, of the first task")]
    columns += [(f"{study.titles[group.number]}, %", f"{group.whole.items} items: {group.about}") for group in groups]
    caption = "Mean score in percent; " + "; ".join(
        f"{study.titles[group.number]}: {group.whole.items} items" for group in groups
    )
    return Table(
        f"scores-{groups[0].number}", str(place), columns, rows, [False] * len(rows), caption + ".",
        tuple(group.number for group in groups),
    )  # fmt: skip


def uneven(study: Study, place: Place) -> Table | None:
    """How divergence is spread over tokens, and whether it is where tokens are packed."""
    group = study.one(place, "fidelity")
    if group is None:
        return None
    lines = [line for line in study.lines(group, "kl") if line.method != EXACT]
    known = [name for name in _SPREAD if any(line.statistics.get(name) is not None for line in lines)]
    if not known:
        return None
    rows = [
        [method(line.method), Field(f"{line.bits:.2f}"), *(_estimate(line.statistics.get(n), n) for n in known)]
        for line in lines
    ]
    columns = [("method", ""), ("bits", "allocated per cached number"), *(_SPREAD[name] for name in known)]
    caption = f"KL in nats, {group.whole.items} windows ({group.about})."
    title = f"Where, and how unevenly: {place}"
    return Table(f"uneven-{group.number}", title, columns, rows, [False] * len(rows), caption, (group.number,))


def others(study: Study, place: Place) -> list[Table]:
    """Divergence and likelihood measured in other ways than that of the main table."""
    main_group = study.divergence(place)
    found = []
    for group in study.groups:
        if group.place != place or group.scored or group is main_group or group.task not in ("fidelity", "ppl"):
            continue
        lines = study.lines(group)
        names = [n for n in ("perplexity", "kl") if n in lines[0].statistics]
        rows = []
        for line in lines:
            fields = [method(line.method, line.frontier), Field(f"{line.bits:.2f}")]
            fields += [_estimate(line.statistics[name], name) for name in names]
            fields += [_judged(line.baseline), _judged(line.cheaper)]
            rows.append(fields)
        columns = [("method", ""), ("bits", "allocated per cached number"), *((_WORDS[n], "") for n in names)]
        columns += [(f"to {study.baseline}", "paired"), ("to best cheaper", "paired")]
        caption = f"{group.whole.items} windows ({group.about})."
        strong = [line.frontier for line in lines]
        title = f"{study.titles[group.number]}: {place}"
        found.append(Table(f"table-{group.number}", title, columns, rows, strong, caption, (group.number,)))
    return found


def method(name: str, frontier: bool = False) -> Field:
    """A method's name in its colour."""
    return Field(name, verdict="frontier" if frontier else "", colour="" if name == EXACT else look(name).colour)


def _main(study: Study, row: Row, strip: Field, names: Sequence[str], recall, horizon) -> list[Field]:
    line, kl = row.line, row.line.of("kl")
    fields = [method(line.method, line.frontier), Field(f"{line.bits:.2f}"), strip, _estimate(kl, "kl")]
    base = Field("", title="what others are compared with") if line.method == study.baseline else None
    fields += [base or _ratio(kl, line.baseline), _ratio(kl, line.cheaper)]
    fields += [_estimate(line.statistics.get(name), name) for name in names]
    if recall:
        fields.append(_score(row.recall, row.to_exact))
    if horizon:
        fields.append(_slope(row))
        if "first_mismatch" in horizon.whole.entries[0].cell.values:
            fields.append(_parting(row, horizon.settings.get("free_steps")))
    return fields


def _strip(name: str, kl: Estimate, floor: float | None, ends: tuple[float, float]) -> Field:
    """Where a value lies on a logarithmic axis."""

    def at(x: float | None) -> float:
        inside = min(max(x or 0.0, ends[0]), ends[1])
        return math.log(inside / ends[0]) / math.log(ends[1] / ends[0])

    if kl.value <= 0:
        return Field("")
    low, high = (kl.value, kl.value) if kl.low is None else (kl.low, kl.high)
    return Field("", colour=look(name).colour, strip=(at(kl.value), at(low), at(high), at(floor) if floor else 0.0))


def _ratio(value: Estimate, contrast: Contrast | None) -> Field:
    """How many times the other's, and whether the difference is real."""
    if contrast is None:
        return Field("")
    other = value.value - contrast.difference.value
    times = f" {number(value.value / other)}×" if other > 0 else ""
    return Field(f"{MARKS[contrast.verdict]}{times}", verdict=contrast.verdict, title=contrast.words)


def _judged(contrast: Contrast | None) -> Field:
    return Field(MARKS[contrast.verdict], verdict=contrast.verdict, title=contrast.words) if contrast else Field("")


def _estimate(found: Any, name: str) -> Field:
    if found is None:
        return Field("")
    if name == "agreement":
        return Field(percent(found), spread(found))
    return Field(number(found.value), interval(found)) if isinstance(found, Estimate) else Field(number(found))


def _score(line: Line | None, contrast: Contrast | None) -> Field:
    score = line and line.statistics.get("score")
    if not isinstance(score, Estimate):
        return Field("")
    return _marked(percent(score), spread(score), contrast, UP)


def _parting(row: Row, most: int | None) -> Field:
    """Where texts part, on average; that they never do is no number."""
    found = row.horizon and row.horizon.statistics.get("first_mismatch")
    if isinstance(found, Estimate) and most and found.value >= most:
        return Field("never", f"in {most}")
    return _estimate(found, "first_mismatch")


def _slope(row: Row) -> Field:
    slope = row.horizon and row.horizon.statistics.get("slope")
    if not isinstance(slope, Estimate):
        return Field("")
    return _marked(number(slope.value), interval(slope), row.growth, MARKS)


def _marked(text: str, small: str, contrast: Contrast | None, marks: dict[str, str]) -> Field:
    """A number behind its verdict."""
    if contrast is None:
        return Field(text, small)
    return Field(f"{marks[contrast.verdict]} {text}", small, contrast.verdict, contrast.words)


def _first(by_group: Sequence[dict[str, Line]], name: str) -> tuple[float, str]:
    """A method's bits on the first task that knows it."""
    return next(lines[name].bits for lines in by_group if name in lines), name


_SPREAD = {
    "kl_median": ("median", "of all scored tokens, from bins of 12 %"),
    "kl": ("mean", ""),
    "kl_99.9%": ("99.9 %", "of all scored tokens, from bins of 12 %"),
    "kl_max": ("largest", "of any scored token"),
    "kl_inside": ("nothing packed", "tokens scored while all was exact still, mean of windows"),
    "kl_beyond": ("packed", "tokens scored when some were packed, mean of windows"),
    "kl_last": ("last quarter", "of the scored tokens, mean of windows"),
}
_WORDS = {"perplexity": "perplexity", "kl": "KL, nats", "agreement": "same first, %", "kl_99.9%": "KL, 99.9 %"}
_WHY = {
    "kl_99.9%": "of all scored tokens, from bins of 12 %",
    "perplexity": "of the scored tokens",
    "agreement": "share of tokens where both put the same one first",
}
