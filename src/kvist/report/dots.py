"""A line per method, a column per condition: dots with whiskers that are compared down and across."""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

from kvist.evaluate.statistics import Estimate
from kvist.report.canvas import BAND, FAINT, PAPER, SOFT, blank, plain_ticks, style
from kvist.report.look import INK, look

WIDTH, LINE = 2.75, 0.205
LEAST = 1e-12


class Kind(NamedTuple):
    """How one kind of dot looks; colour "" is that of the method."""

    name: str
    colour: str = ""
    marker: str = "o"
    hollow: bool = False


class Column(NamedTuple):
    """title; values: per method and kind of dot an estimate; band: the x of what nothing does, or None; real: methods
    whose dots are joined by a strong line, others by a faint one."""

    title: str
    values: Mapping[str, Mapping[str, Estimate]]
    band: tuple[float, float] | None = None
    real: Sequence[str] = ()


def draw(methods: Sequence[str], columns: Sequence[Column], kinds: Sequence[Kind], xlabel: str, log: bool = True):
    """Methods from above, all columns on one scale."""
    known = [
        estimate for column in columns for dots in column.values.values() for estimate in dots.values() if estimate
    ]
    values = [y for each in known for y in each if y is not None and (y > LEAST or not log)]
    with style():
        figure = blank(1.6 + WIDTH * len(columns), LINE * len(methods) + 0.95)
        every = figure.subplots(1, len(columns), squeeze=False, sharey=True)[0]
        for ax, column in zip(every, columns, strict=True):
            if log:
                ax.set_xscale("log")
                low, high = min(values, default=0.1), max(values, default=1.0)
                bands = [x for each in columns if each.band for x in each.band if x > LEAST]
                ax.set_xlim(min([low, *bands]) / 1.4, max([high, *bands]) * 1.4)
                plain_ticks(ax.xaxis)
            else:
                low, high = min([0.0, *values]), max([0.0, *values])
                pad = 0.06 * (high - low) or 1.0
                ax.set_xlim(low - (pad if low < 0 else 0), high + pad)
                ax.locator_params(axis="x", nbins=4)
            if column.band:
                left = column.band[0] if column.band[0] > LEAST or not log else ax.get_xlim()[0]
                ax.axvspan(left, column.band[1], color=BAND, zorder=0, linewidth=0)
            if not log and low < 0:
                ax.axvline(0, color=FAINT, linewidth=1, zorder=1)
            ax.set_title(column.title)
            ax.grid(axis="y", linewidth=0.4)
            for row, method in enumerate(methods):
                _dots(ax, row, method, column, kinds, log)
            ax.set_ylim(len(methods) - 0.4, -0.9)
            ax.tick_params(axis="y", length=0)
            ax.spines["left"].set_visible(False)
        every[0].set_yticks(range(len(methods)), methods)
        for label, method in zip(every[0].get_yticklabels(), methods, strict=True):
            label.set_color(look(method).colour)
        _legend(figure, kinds)
        figure.supxlabel(xlabel, fontsize=8.5, color=SOFT)
        figure.canvas.draw()
    return figure


def _dots(ax, row: int, method: str, column: Column, kinds: Sequence[Kind], log: bool) -> None:
    dots = column.values.get(method, {})
    shown = [(kind, dots[kind.name]) for kind in kinds if kind.name in dots]
    shown = [(kind, each) for kind, each in shown if not log or each.value > LEAST]
    if len(shown) > 1:
        strong = method in column.real
        ends = [each.value for _, each in shown]
        ax.plot(
            [min(ends), max(ends)], [row, row], color=look(method).colour if strong else FAINT,
            linewidth=2.2 if strong else 1, zorder=1, alpha=0.8,
        )  # fmt: skip
    for i, (kind, each) in enumerate(shown):
        colour = kind.colour or look(method).colour
        y = row + 0.16 * (i - (len(shown) - 1) / 2) if len(shown) > 2 else row
        if each.low is not None and each.high is not None:
            low = max(each.low, LEAST) if log else each.low
            ax.plot([low, each.high], [y, y], color=colour, linewidth=1, zorder=2)
        face = PAPER if kind.hollow else colour
        ax.plot([each.value], [y], kind.marker, ms=4.6, mfc=face, mec=colour, mew=1.1, zorder=3)


def _legend(figure, kinds: Sequence[Kind]) -> None:
    if len(kinds) < 2:
        return
    from matplotlib.lines import Line2D

    handles = [
        Line2D([], [], linestyle="", marker=kind.marker, ms=5, mec=kind.colour or INK, label=kind.name,
               mfc=PAPER if kind.hollow else kind.colour or INK)
        for kind in kinds
    ]  # fmt: skip
    figure.legend(handles=handles, loc="outside upper right", ncols=len(kinds), frameon=False, fontsize=8.5)
