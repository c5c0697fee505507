"""Figures as SVG that takes the page's colours and fonts, or as PNG."""

import io
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from kvist.atomic import replacing
from kvist.report.look import INK

# colours of a figure that a page replaces by its own, in the light and in the dark
GRID, FAINT, SOFT, PAPER, BAND = "#e4e7eb", "#c4cad2", "#5b636d", "#fffffe", "#eceef1"
VARIABLES = {
    INK: "currentColor",
    GRID: "var(--grid)",
    FAINT: "var(--faint)",
    SOFT: "var(--soft)",
    PAPER: "var(--paper)",
    BAND: "var(--band)",
}
STYLE = {
    "svg.fonttype": "none",
    "svg.hashsalt": "kvist",
    "font.family": "sans-serif",
    "font.sans-serif": ["DejaVu Sans"],
    "font.size": 8.5,
    "text.color": INK,
    "axes.edgecolor": FAINT,
    "axes.labelcolor": SOFT,
    "axes.labelsize": 8.5,
    "axes.titlesize": 9.5,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.titlecolor": INK,
    "axes.facecolor": "none",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.linewidth": 0.8,
    "axes.axisbelow": True,
    "axes.unicode_minus": True,
    "xtick.color": FAINT,
    "ytick.color": FAINT,
    "xtick.labelcolor": SOFT,
    "ytick.labelcolor": SOFT,
    "xtick.labelsize": 8,
    "ytick.labelsize": 8,
    "xtick.minor.size": 0,
    "ytick.minor.size": 0,
    "xtick.major.size": 3,
    "ytick.major.size": 3,
    "grid.color": GRID,
    "grid.linewidth": 0.6,
    "axes.grid": True,
    "figure.facecolor": "none",
    "lines.solid_capstyle": "round",
    "path.simplify": True,
    "text.parse_math": False,  # a name may hold a dollar
}


@contextmanager
def style() -> Iterator[None]:
    """All that is drawn and saved within looks alike."""
    from matplotlib import rc_context

    with rc_context(STYLE):  # pyright: ignore[reportArgumentType]
        yield


def blank(width: float, height: float):
    """A figure of so many inches that lays itself out, with nothing in it."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def svg(figure) -> str:
    """To put into a page: text is text, ink and paper are the page's, and nothing is loaded from anywhere."""
    out = io.StringIO()
    figure.savefig(out, format="svg", metadata={"Date": None, "Creator": None, "Format": None, "Type": None})
    text = out.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>\s*", "", text, flags=re.DOTALL)
    text = re.sub(r"<!--.*?-->\s*", "", text, flags=re.DOTALL)
    text = re.sub(r' xmlns:xlink="[^"]*"', "", text).replace("xlink:href", "href")
    text = re.sub(r' id="[a-zA-Z]+[\w.]*_\d+"', "", text)  # of groups that nothing refers to
    text = re.sub(r"'DejaVu Sans'(, sans-serif)?", "var(--sans)", text)
    text = re.sub(r"<[^>]*>", lambda tag: re.sub(r"(\d+\.\d{2})\d+", r"\1", tag[0]), text)  # labels keep their digits
    for colour, variable in VARIABLES.items():
        text = text.replace(colour, variable)
    size = re.search(r'width="([\d.]+)pt" height="([\d.]+)pt"', text)
    assert size, "matplotlib writes the size of a figure in points"
    # as wide as the page allows, never wider than drawn
    wide = f'style="width:100%;max-width:{float(size[1]) * 4 / 3:.0f}px;height:auto"'
    text = text.replace(size[0], wide, 1)
    text = re.sub(r">\s*\n\s*<", "><", text.replace(" \nL ", "L").replace("M ", "M")).strip()
    while (less := re.sub(r"<g></g>|<g/>", "", text)) != text:
        text = less
    return text


def png(figure, path: str | Path, dpi: int = 150) -> None:
    """As a file, on white, whole or not at all."""
    with replacing(path) as scratch:
        figure.savefig(scratch, format="png", dpi=dpi, facecolor="white")


def plain_ticks(axis) -> None:
    """Numbers of a logarithmic axis as they are said, 0.01 and no power; more on a short one. Its ends are known."""
    from matplotlib.ticker import LogLocator, NullFormatter

    low, high = axis.get_view_interval()
    axis.set_major_locator(LogLocator(subs=(1, 2, 5) if high / low < 30 else (1,), numticks=9))
    axis.set_major_formatter(lambda x, _: f"{x:g}" if x >= 1e-4 else f"{x:.0e}".replace("e-0", "e−"))
    axis.set_minor_formatter(NullFormatter())
