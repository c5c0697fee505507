"""Divergence along a text: a small panel per family, the others behind it in grey."""

import math
from collections.abc import Sequence
from typing import NamedTuple

from kvist.evaluate.statistics import Estimate
from kvist.report.canvas import BAND, FAINT, SOFT, blank, plain_ticks, style
from kvist.report.look import look, order

ACROSS, WIDTH, HEIGHT = 6, 2.05, 1.75
LEAST = 1e-12  # nothing smaller is drawn on a logarithmic axis


class Curve(NamedTuple):
    """A method's estimates at each x."""

    method: str
    at: Sequence[Estimate]


def draw(x: Sequence[float], curves: Sequence[Curve], floor: float | None, xlabel: str, note: str = "rounding"):
    """KL against x, 95 % intervals shaded; below `floor` lies what rounding alone does."""
    families: dict[str, list[Curve]] = {}
    for curve in sorted(curves, key=lambda curve: order(curve.method)):
        families.setdefault(look(curve.method).family, []).append(curve)
    rows = -(-len(families) // ACROSS)
    across = -(-len(families) // rows)
    values = [y.value for curve in curves for y in curve.at if y.value > LEAST]
    low, high = min(values, default=LEAST) / 1.5, max(values, default=1.0) * 2
    low = min(low, floor / 1.5) if floor else low
    with style():
        figure = blank(WIDTH * across + 0.4, HEIGHT * rows + 0.3)
        every = figure.subplots(rows, across, squeeze=False, sharex=True, sharey=True)
        for ax, (family, own) in zip(every.flat, families.items(), strict=False):
            ax.set_yscale("log")
            ax.set_ylim(low, high)
            ax.set_xlim(min(0, *x), x[-1] + 0.14 * (x[-1] - min(0, *x)))
            plain_ticks(ax.yaxis)
            ax.xaxis.set_major_formatter(lambda v, _: f"{v:,.0f}")
            ax.locator_params(axis="x", nbins=4)
            if floor:
                ax.axhspan(low, floor, color=BAND, zorder=0, linewidth=0)
            ax.set_title(family, color=look(own[0].method).colour)
            # one line with gaps: the page stays small
            behind = [_positive(curve.at) for curve in curves if curve not in own]
            across_x, across_y = ([*x, math.nan] * len(behind), [y for ys in behind for y in (*ys, math.nan)])
            ax.plot(across_x, across_y, color=FAINT, linewidth=0.6, alpha=0.6, zorder=1)
            for curve in own:
                _own(ax, x, curve)
            _name(ax, x, own, low, high)
        for ax in every.flat[len(families) :]:
            ax.set_axis_off()
        if floor:
            every[0, 0].annotate(
                note, (x[0], floor), (0, 1), textcoords="offset points", va="bottom", fontsize=7, color=SOFT
            )
        for ax in [*every[-1], *every.flat[max(0, len(families) - across) : len(families)]]:
            ax.tick_params(labelbottom=True)
        figure.supxlabel(xlabel, fontsize=8.5, color=SOFT)
        figure.supylabel("KL from the exact cache, nats", fontsize=8.5, color=SOFT)
        figure.canvas.draw()
    return figure


def _own(ax, x, curve: Curve) -> None:
    seen, ys = look(curve.method), _positive(curve.at)
    bounds = [(max(y.low or LEAST, LEAST), max(y.high or LEAST, LEAST)) for y in curve.at if y.low is not None]
    if len(bounds) == len(ys):
        ax.fill_between(x, *zip(*bounds, strict=True), color=seen.colour, alpha=0.18, linewidth=0, zorder=2)
    dash = "-" if seen.digit else (0, (3, 1.5))
    marker = "o" if len(x) < 8 else None
    ax.plot(x, ys, color=seen.colour, linewidth=1.4, linestyle=dash, marker=marker, ms=2.5, zorder=3)


def _name(ax, x, own: Sequence[Curve], low: float, high: float) -> None:
    """Bits at the lines' ends; a variant's words inside the panel, below the title."""
    room = 0.085 * math.log(high / low)
    ends = sorted((math.log(max(curve.at[-1].value, LEAST)), curve) for curve in own if look(curve.method).digit)
    last = -math.inf
    for y, curve in ends:
        y = max(y, last + room)
        last = y
        seen = look(curve.method)
        ax.annotate(
            seen.digit, (x[-1], math.exp(y)), (4, 0), textcoords="offset points", va="center_baseline", fontsize=8,
            color=seen.colour, fontweight="bold",
        )  # fmt: skip
    words = [curve for curve in own if not look(curve.method).digit]
    if words:
        said = ", ".join(
            look(curve.method).label.removeprefix(look(curve.method).family).strip(" ,:") for curve in words
        )
        said = said or "all"
        said = said if len(said) < 34 else said[:32] + "…"
        ax.text(0.98, 0.97, f"- -  {said}", transform=ax.transAxes, ha="right", va="top", fontsize=7, color=SOFT)


def _positive(at: Sequence[Estimate]) -> list[float]:
    return [max(y.value, LEAST) for y in at]
