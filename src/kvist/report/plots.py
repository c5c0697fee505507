"""Four ways to draw: quality against bits, curves in small panels, dots with whiskers, maps of right answers."""

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

import numpy as np

from kvist.evaluate.measures import grid
from kvist.evaluate.statistics import Estimate
from kvist.report.canvas import BAND, FAINT, PAPER, SOFT, blank, plain_ticks, style
from kvist.report.look import INK, look, order

LEAST = 1e-12  # nothing smaller is drawn on a logarithmic axis
STYLES = (("", "o"), ("#2b7bba", "^"), ("#d1603d", "s"), ("#2f9e77", "D"))  # of kinds of dots; "": the method's colour
NOTE = {"fontsize": 7.5, "color": SOFT}


class Panel(NamedTuple):
    """Quality against bits. title; unit: of y, less is better; points: a method, its bits, its estimate, whether it is
    on the frontier; floor: y up to which nothing is known, or what the exact cache does; note: which; log: y."""

    title: str
    unit: str
    points: Sequence[tuple[str, float, Estimate, bool]]
    floor: Estimate | None
    note: str
    log: bool


class Column(NamedTuple):
    """Dots of one condition. title; values: per method and kind of dot an estimate; floor: the x up to which nothing is
    known, or None; real: methods whose dots are joined by a strong line, others by a faint one."""

    title: str
    values: Mapping[str, Mapping[str, Estimate]]
    floor: float | None = None
    real: Sequence[str] = ()


def frontiers(rows: Sequence[Sequence[Panel]]):
    """Panels in rows (a quality each) and columns (a condition each), with the frontier of each as a line."""
    columns = max(map(len, rows))
    # qualities of one condition stand side by side
    high, wide = (1, len(rows)) if columns == 1 else (len(rows), columns)
    with style():
        figure = blank(6.0 * wide, 4.6 * high)
        every = figure.subplots(high, wide, squeeze=False).reshape(len(rows), columns)
        drawn = [(*each, panels) for axes, panels in _filled(every, rows) for each in _filled(axes, panels)]
        for ax, panel, beside in drawn:
            _points(ax, panel)
            _scale(ax, panel, beside)
        figure.canvas.draw()  # so that places on it are known
        figure.set_layout_engine("none")
        for ax, panel, _ in drawn:
            _label(ax, panel)
    return figure


def _filled(axes, panels: Iterable) -> list[tuple]:
    """Axes and what is drawn in each; those that are left are taken away."""
    found = list(zip(axes, panels, strict=False))
    for ax in axes[len(found) :]:
        ax.set_axis_off()
    return found


def _points(ax, panel: Panel) -> None:
    ax.set(title=panel.title, xlabel="allocated bits per cached number", ylabel=panel.unit)
    if panel.log:
        ax.set_yscale("log")
    best = sorted((x, y.value) for _, x, y, frontier in panel.points if frontier)
    ax.plot([x for x, _ in best], [y for _, y in best], color=FAINT, linewidth=5, alpha=0.55, zorder=1)
    families: dict[str, list] = {}
    for name, x, y, _ in sorted(panel.points, key=lambda point: order(point[0])):
        seen = look(name)
        low, high = (y.value, y.value) if y.low is None or y.high is None else (y.low, y.high)
        ax.plot([x, x], [low, high], color=seen.colour, linewidth=1.1, zorder=3)
        size, face = (9.5, seen.colour) if seen.digit else (6, PAPER)
        ax.plot([x], [y.value], "o", ms=size, mfc=face, mec=seen.colour, mew=1.3, zorder=4)
        if seen.digit:
            families.setdefault(seen.colour, []).append((x, y.value))
            middle = {"ha": "center", "va": "center_baseline"}
            ax.annotate(seen.digit, (x, y.value), fontsize=7, color="white", zorder=5, **middle)
    for colour, line in families.items():
        ax.plot(*zip(*line, strict=True), color=colour, linewidth=0.9, alpha=0.6, zorder=2)


def _scale(ax, panel: Panel, beside: Sequence[Panel]) -> None:
    """The same for all conditions of a quality; below, the band of what is not known."""
    every = [(x, y) for each in beside for _, x, y, _ in each.points]
    low = [y.value for _, y in every] + [each.floor.value for each in beside if each.floor]
    high, bits = max(y.value if y.high is None else y.high for _, y in every), [x for x, _ in every]
    pad, least = 0.06 * (max(bits) - min(bits)) + 0.1, min((y for y in low if y > 0), default=1e-6)
    bottom, top = (least / 1.8, high * 1.4) if panel.log else (-0.04 * high, 1.07 * high + 0.01)
    ax.set(ylim=(bottom, top), xlim=(min(bits) - pad, max(bits) + 2.2 * pad))
    if panel.log:
        plain_ticks(ax.yaxis)
    if panel.floor:
        at, first, last = panel.floor
        ax.axhspan(*((bottom, at) if panel.log or first is None else (first, last)), color=BAND, zorder=0, linewidth=0)
        ax.axhline(at, color=FAINT, linewidth=0.8, linestyle=(0, (3, 2)), zorder=0)
        down, where = ("top", -2) if panel.log else ("bottom", 3), ("axes fraction", "data")
        beside_it = {"textcoords": "offset points", "xycoords": where, "ha": "right", "va": down[0]}
        ax.annotate(panel.note, (0.995, at), (0, down[1]), **beside_it, **NOTE)


def _label(ax, panel: Panel) -> None:
    """A family's name beside the loneliest of its points, a variant's beside itself; adjustText finds the room."""
    from adjustText import adjust_text
    from matplotlib.transforms import Bbox

    at = {name: ax.transData.transform((x, y.value)) for name, x, y, _ in panel.points}
    data = {name: (x, y.value) for name, x, y, _ in panel.points}
    room = {name: min((math.dist(at[name], at[other]) for other in at if other != name), default=0) for name in at}
    chosen: dict[str, str] = {}
    for name in sorted(at, key=lambda name: room[name]):
        seen = look(name)
        chosen[seen.family if seen.digit else name] = name
    style = {name: {"fontsize": 8, "color": look(name).colour, "zorder": 6} for name in at}
    texts = [ax.text(*data[name], label, **style[name]) for label, name in chosen.items()]
    boxes = [note.get_window_extent() for note in ax.texts if note.get_text() == panel.note]
    disc = 6 * ax.figure.dpi / 72
    boxes += [Bbox([(x - disc, y - disc), (x + disc, y + disc)]) for x, y in at.values()]
    for _, bits, y, _ in panel.points:
        if y.low is not None and y.high is not None:
            low, high = ax.transData.transform([(bits, max(y.low, LEAST) if panel.log else y.low), (bits, y.high)])
            boxes.append(Bbox([low - 1, high + 1]))
    hair = {"arrowstyle": "-", "linewidth": 0.6, "color": SOFT, "zorder": 2}
    boxes = [box.transformed(ax.transData.inverted()) for box in boxes]
    adjust_text(texts, objects=boxes, ax=ax, expand=(1.1, 1.3), arrowprops=hair, iter_lim=300)


def curves(x: Sequence[float], lines: Mapping[str, Sequence[Estimate]], floor: float | None, xlabel: str):
    """KL of each method against x, 95 % intervals shaded: a small panel per family, the others behind it in grey; below
    `floor` lies what rounding alone does."""
    families: dict[str, list[str]] = {}
    for method in sorted(lines, key=order):
        families.setdefault(look(method).family, []).append(method)
    rows = -(-len(families) // 6)
    across = -(-len(families) // rows)
    values = [y.value for line in lines.values() for y in line if y.value > LEAST]
    low, high = min(values, default=LEAST) / 1.5, max(values, default=1.0) * 2
    low, first = min(low, floor / 1.5) if floor else low, min(0, *x)
    with style():
        figure = blank(2.05 * across + 0.4, 1.75 * rows + 0.3)
        every = figure.subplots(rows, across, squeeze=False, sharex=True, sharey=True)
        for ax, (family, own) in _filled(every.flat, families.items()):
            ax.set(yscale="log", ylim=(low, high), xlim=(first, x[-1] + 0.14 * (x[-1] - first)))
            plain_ticks(ax.yaxis)
            ax.xaxis.set_major_formatter(lambda v, _: f"{v:,.0f}")
            ax.locator_params(axis="x", nbins=4)
            if floor:
                ax.axhspan(low, floor, color=BAND, zorder=0, linewidth=0)
            ax.set_title(family, color=look(own[0]).colour)
            # one line with gaps: the page stays small
            behind = [
                y
                for name in lines
                if name not in own
                for y in (*np.maximum([y.value for y in lines[name]], LEAST), math.nan)
            ]
            ax.plot([*x, math.nan] * (len(lines) - len(own)), behind, color=FAINT, linewidth=0.6, alpha=0.6, zorder=1)
            for method in own:
                colour, digit, line = look(method).colour, look(method).digit, lines[method]
                low_, high_ = ([max(end or LEAST, LEAST) for end in ends] for ends in list(zip(*line, strict=True))[1:])
                ax.fill_between(x, low_, high_, where=[y.low is not None for y in line], color=colour, alpha=0.18, lw=0)
                dash = {"linestyle": "-" if digit else (0, (3, 1.5)), "marker": "o" if len(x) < 8 else None, "ms": 2.5}
                ax.plot(x, np.maximum([y.value for y in line], LEAST), color=colour, linewidth=1.4, zorder=3, **dash)
            _ends(ax, x, {method: lines[method] for method in own}, 0.085 * math.log(high / low))
        if floor:
            every[0, 0].text(x[0], floor, "rounding", va="bottom", **NOTE)
        for ax in every.flat[max(0, len(families) - across) : len(families)]:
            ax.tick_params(labelbottom=True)
        figure.supxlabel(xlabel, fontsize=8.5, color=SOFT)
        figure.supylabel("KL from the exact cache, nats", fontsize=8.5, color=SOFT)
    return figure


def _ends(ax, x, own: Mapping[str, Sequence[Estimate]], room: float) -> None:
    """Bits at the lines' ends, `room` apart; a variant's words inside the panel, below the title."""
    last, words = -math.inf, [look(method) for method in own if not look(method).digit]
    for y, method in sorted((math.log(max(own[m][-1].value, LEAST)), m) for m in own if look(m).digit):
        last, seen = max(y, last + room), look(method)
        bold = {"fontsize": 8, "fontweight": "bold", "color": seen.colour, "va": "center_baseline"}
        ax.annotate(seen.digit, (x[-1], math.exp(last)), (4, 0), textcoords="offset points", **bold)
    if words:
        said = ", ".join(seen.label.removeprefix(seen.family).strip(" ,:") for seen in words) or "all"
        said = said if len(said) < 34 else said[:32] + "…"
        ax.text(0.98, 0.97, f"- -  {said}", transform=ax.transAxes, ha="right", va="top", **NOTE)


def dots(columns: Sequence[Column], xlabel: str, log: bool = True, methods: Sequence[str] = ()):
    """A line per method, in this order or by their first known values, a column per condition, all on one scale: dots
    with whiskers, to be compared down and across."""
    rows = [(name, each) for column in columns for name, each in column.values.items()]
    first = {name: next(iter(each.values())).value for name, each in reversed(rows)}
    methods = methods or sorted(first, key=lambda name: first[name])
    kinds = list(dict.fromkeys(kind for _, each in rows for kind in each))
    values = [column.floor for column in columns if column.floor]
    values += [y for _, row in rows for x in row.values() for y in x if y is not None and (y > LEAST or not log)]
    low, high = min(values, default=0.1), max(values, default=1.0)
    low, high = (low / 1.4, high * 1.4) if log else (min(0, low), high + (0.06 * (high - min(0, low)) or 1.0))
    with style():
        figure = blank(1.6 + 2.75 * len(columns), 0.205 * len(methods) + 0.95)
        axes = figure.subplots(1, len(columns), squeeze=False, sharey=True)[0]
        for ax, column in zip(axes, columns, strict=True):
            ax.set(title=column.title, xscale="log" if log else "linear", xlim=(low, high))
            ax.set_ylim(len(methods) - 0.4, -0.9)
            if log:
                plain_ticks(ax.xaxis)
            else:
                ax.locator_params(axis="x", nbins=4)
            if column.floor:
                ax.axvspan(low, column.floor, color=BAND, zorder=0, linewidth=0)
            ax.grid(axis="y", linewidth=0.4)
            for row, method in enumerate(methods):
                shown = {kind: y for kind in kinds if (y := column.values.get(method, {}).get(kind))}
                shown = {kind: y for kind, y in shown.items() if not log or y.value > LEAST}
                _dots(ax, row, look(method).colour, shown, kinds, method in column.real)
            ax.tick_params(axis="y", length=0)
            ax.spines["left"].set_visible(False)
        axes[0].set_yticks(range(len(methods)), methods)
        for label, method in zip(axes[0].get_yticklabels(), methods, strict=True):
            label.set_color(look(method).colour)
        if len(kinds) > 1:
            for kind in kinds:
                _dot(axes[0], [], [], INK, kinds, kind, label=kind)
            figure.legend(loc="outside upper right", ncols=len(kinds), frameon=False, fontsize=8.5)
        figure.supxlabel(xlabel, fontsize=8.5, color=SOFT)
    return figure


def _dots(ax, row: int, colour: str, shown: Mapping[str, Estimate], kinds: list[str], real: bool) -> None:
    if len(shown) > 1:
        ends, line = [y.value for y in shown.values()], {"linewidth": 2.2, "alpha": 0.8} if real else {"linewidth": 1}
        ax.plot([min(ends), max(ends)], [row, row], color=colour if real else FAINT, zorder=1, **line)
    for i, (kind, found) in enumerate(shown.items()):
        y = row + 0.16 * (i - (len(shown) - 1) / 2) if len(shown) > 2 else row
        edge = _dot(ax, [found.value], [y], colour, kinds, kind)
        if found.low is not None and found.high is not None:
            ax.plot([max(found.low, ax.get_xlim()[0]), found.high], [y, y], linewidth=1, zorder=2, color=edge)


def _dot(ax, x, y, colour: str, kinds: list[str], kind: str, **more) -> str:
    """A dot of its kind, and its colour; the second of two is hollow, of more every one has its own colour."""
    own, marker = STYLES[kinds.index(kind) % len(STYLES)] if len(kinds) > 2 else ("", "o")
    face = PAPER if len(kinds) == 2 and kind == kinds[1] else own or colour
    ax.plot(x, y, marker, ms=4.6, mfc=face, mec=own or colour, mew=1.1, zorder=3, **more)
    return own or colour


def maps(panels: Sequence[tuple[str, str, Mapping[str, list]]], across: int):
    """Small maps side by side: lengths from the left, depths from above, percent right in each cell. panels: a title,
    a method and its values per item."""
    across = min(across, len(panels))
    rows, grids = -(-len(panels) // across), [grid(values) for *_, values in panels]
    with style():
        figure = blank(1.75 * across + 0.3, (0.2 * max(len(depths) for _, depths, _ in grids) + 0.5) * rows)
        every = figure.subplots(rows, across, squeeze=False)
        for ax, ((title, method, _), (lengths, depths, shares)) in _filled(every.flat, zip(panels, grids, strict=True)):
            ax.pcolormesh(shares, vmin=0, vmax=1, cmap="viridis", edgecolors=PAPER, linewidth=0.8)
            for (i, j), share in np.ndenumerate(shares):
                if not np.isnan(share):
                    inside = {"ha": "center", "va": "center_baseline", "color": "#fff" if share < 0.62 else "#222"}
                    ax.text(j + 0.5, i + 0.5, f"{100 * share:.0f}", fontsize=7.5, **inside)
            ax.set_title(title, fontsize=8.5, color=look(method).colour)
            ax.set_xticks(np.arange(len(lengths)) + 0.5, [f"{n:,}" for n in lengths], fontsize=7)
            said = ["any" if depth is None else f"{100 * depth:.0f}" for depth in depths]
            ax.set_yticks(np.arange(len(said)) + 0.5, said, fontsize=7)
            ax.invert_yaxis()
            ax.tick_params(length=0)
            ax.grid(False)
            ax.spines[:].set_visible(False)
    return figure
