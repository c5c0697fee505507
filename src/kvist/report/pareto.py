"""Quality against stored bits: the picture to look at first."""

from collections.abc import Sequence
from typing import NamedTuple

from kvist.evaluate.statistics import Estimate
from kvist.report.canvas import BAND, FAINT, PAPER, SOFT, blank, plain_ticks, style
from kvist.report.look import look, order

WIDTH, HEIGHT = 6.0, 4.6


class Panel(NamedTuple):
    """title; unit: of y; points: a method, its bits and its estimate, lower is better; floor: y up to which nothing is
    known (rounding, for KL) or what the exact cache itself does; note: what the floor is; log: y."""

    title: str
    unit: str
    points: Sequence[tuple[str, float, Estimate]]
    floor: Estimate | None
    note: str
    log: bool


def draw(rows: Sequence[Sequence[Panel]]):
    """Panels in rows (a quality each) and columns (a condition each), with the frontier of each as a line."""
    columns = max(map(len, rows))
    with style():
        # qualities of one condition stand side by side
        high, wide = (1, len(rows)) if columns == 1 else (len(rows), columns)
        figure = blank(WIDTH * wide, HEIGHT * high)
        every = figure.subplots(high, wide, squeeze=False).reshape(len(rows), columns)
        for axes, panels in zip(every, rows, strict=True):
            for ax, panel in zip(axes, panels, strict=False):
                _frame(ax, panel)
            for ax in axes[len(panels) :]:
                ax.set_axis_off()
            _share(axes[: len(panels)], panels)
        figure.canvas.draw()  # so that places on it are known
        for axes, panels in zip(every, rows, strict=True):
            for ax, panel in zip(axes, panels, strict=False):
                _label(ax, panel)
        figure.set_layout_engine("none")
    return figure


def frontier(points: Sequence[tuple[str, float, Estimate]]) -> list[tuple[str, float, Estimate]]:
    """Those that are better than all cheaper ones, by rising bits."""
    found: list[tuple[str, float, Estimate]] = []
    for point in sorted(points, key=lambda point: (point[1], point[2].value)):
        if not found or point[2].value < found[-1][2].value:
            found.append(point)
    return found


def _frame(ax, panel: Panel) -> None:
    ax.set_title(panel.title)
    ax.set_xlabel("allocated bits per cached number")
    ax.set_ylabel(panel.unit)
    if panel.log:
        ax.set_yscale("log")
    best = frontier(panel.points)
    ax.plot([x for _, x, _ in best], [y.value for *_, y in best], color=FAINT, linewidth=5, alpha=0.55, zorder=1)
    families: dict[str, list] = {}
    for name, x, y in sorted(panel.points, key=lambda point: order(point[0])):
        seen = look(name)
        if seen.digit:
            families.setdefault(seen.family, []).append((x, y.value))
        low, high = (y.value, y.value) if y.low is None or y.high is None else (y.low, y.high)
        ax.plot([x, x], [low, high], color=seen.colour, linewidth=1.1, zorder=3)
        size = 9.5 if seen.digit else 6
        face = seen.colour if seen.digit else PAPER
        ax.plot([x], [y.value], "o", ms=size, mfc=face, mec=seen.colour, mew=1.3, zorder=4)
        if seen.digit:
            ax.annotate(
                seen.digit, (x, y.value), ha="center", va="center_baseline", fontsize=7, color="white", zorder=5
            )
    for family, line in families.items():
        xs, ys = zip(*line, strict=True)
        ax.plot(xs, ys, color=look(f"{family}:2").colour, linewidth=0.9, alpha=0.6, zorder=2)


def _share(axes, panels: Sequence[Panel]) -> None:
    """The same scale for all conditions of a quality; the band of what is not known below all points."""
    values = [y for panel in panels for *_, y in panel.points]
    floors = [panel.floor for panel in panels if panel.floor is not None]
    high = max(y.high if y.high is not None else y.value for y in values)
    low = min([y.value for y in values if y.value > 0] + [f.value for f in floors if f.value > 0], default=1e-6)
    bits = [x for panel in panels for _, x, _ in panel.points]
    pad = 0.06 * (max(bits) - min(bits)) + 0.1
    for ax, panel in zip(axes, panels, strict=True):
        bottom, top = (low / 1.8, high * 1.4) if panel.log else (-0.04 * high, 1.07 * high + 0.01)
        ax.set_ylim(bottom, top)
        if panel.log:
            plain_ticks(ax.yaxis)
        ax.set_xlim(min(bits) - pad, max(bits) + 2.2 * pad)
        if panel.floor is None:
            continue
        first, last = panel.floor.low, panel.floor.high
        first = bottom if panel.log or first is None else first
        last = panel.floor.value if last is None or panel.log else last
        ax.axhspan(first, last, color=BAND, zorder=0, linewidth=0)
        ax.axhline(panel.floor.value, color=FAINT, linewidth=0.8, linestyle=(0, (3, 2)), zorder=0)
        at = panel.floor.value
        ax.annotate(
            panel.note,
            (0.995, at),
            (0, -2 if panel.log else 3),
            xycoords=("axes fraction", "data"),
            textcoords="offset points",
            ha="right",
            va="top" if panel.log else "bottom",
            fontsize=7.5,
            color=SOFT,
        )


def _label(ax, panel: Panel) -> None:
    """A family's name beside the one of its points with most room, a variant's beside itself; greedy, in pixels."""
    from matplotlib.transforms import Bbox

    scale = ax.figure.dpi / 72
    at = {name: ax.transData.transform((x, y.value)) for name, x, y in panel.points}
    taken = [Bbox.from_bounds(x - 6 * scale, y - 6 * scale, 12 * scale, 12 * scale) for x, y in at.values()]
    for _, x, y in panel.points:
        if y.low is not None:
            ends = ax.transData.transform([(x, max(y.low, 1e-12) if panel.log else y.low), (x, y.high)])
            taken.append(Bbox([ends[0] - scale, ends[1] + scale]))
    taken += [note.get_window_extent() for note in ax.texts if note.get_text() == panel.note]
    frame = ax.get_window_extent()
    wanted: dict[str, list[str]] = {}
    for name in at:
        seen = look(name)
        wanted.setdefault(seen.family if seen.digit else name, []).append(name)
    # variants have one place each, so they choose first
    for label, names in sorted(wanted.items(), key=lambda pair: (len(pair[1]), pair[0])):
        best = None
        for name in names:
            for ha, va, dx, dy in PLACES:
                text = ax.annotate(
                    label, at[name], (dx, dy), xycoords="figure pixels", textcoords="offset points", ha=ha, va=va,
                    fontsize=8, color=look(name).colour, annotation_clip=False,
                )  # fmt: skip
                box = text.get_window_extent()
                cost = sum(_overlap(box, other) for other in taken)
                cost += 3 * (box.width * box.height - _overlap(box, frame)) + 0.02 * (abs(dx) + abs(dy)) * box.height
                if best is None or cost < best[0]:
                    if best:
                        best[1].remove()
                    best = (cost, text, box, name)
                else:
                    text.remove()
        assert best is not None
        _, text, box, name = best
        taken.append(box)
        point = next((x, y.value) for each, x, y in panel.points if each == name)
        text.xy, text.xycoords = point, "data"
        if abs(text.xyann[0]) > 12 or abs(text.xyann[1]) > 12:
            _lead(ax, text, box, at[name], look(name).colour)


def _lead(ax, text, box, start, colour: str) -> None:
    """A hair from a label that had to move away to its point."""
    end = (min(max(start[0], box.x0), box.x1), min(max(start[1], box.y0), box.y1))
    (x0, y0), (x1, y1) = ax.transData.inverted().transform([start, end])
    ax.plot([x0, x1], [y0, y1], color=colour, linewidth=0.6, alpha=0.7, zorder=2, scalex=False, scaley=False)


def _overlap(a, b) -> float:
    wide = min(a.x1, b.x1) - max(a.x0, b.x0)
    high = min(a.y1, b.y1) - max(a.y0, b.y0)
    return wide * high if wide > 0 and high > 0 else 0.0


# alignment and offset in points: near first, then farther away
PLACES = [("left", "center", 8, 0), ("right", "center", -8, 0), ("center", "bottom", 0, 7), ("center", "top", 0, -7)]
PLACES += [("left", "bottom", 6, 4), ("left", "top", 6, -4), ("right", "bottom", -6, 4), ("right", "top", -6, -4)]
PLACES += [(ha, va, x, y) for x, ha in ((20, "left"), (-20, "right")) for y, va in ((16, "bottom"), (-16, "top"))]
PLACES += [("center", "bottom", 0, 20), ("center", "top", 0, -20), ("left", "bottom", 24, 34), ("left", "top", 24, -34)]
PLACES += [("right", "bottom", -24, 34), ("right", "top", -24, -34)]
