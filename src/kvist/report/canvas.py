"""Figures as SVG that takes the page's colours and fonts, or as PNG."""

import io
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.resources import as_file, files
from pathlib import Path
from xml.etree import ElementTree

from kvist.atomic import replacing
from kvist.report.look import INK

# colours of a figure that a page replaces by its own, in the light and in the dark
GRID, FAINT, SOFT, PAPER, BAND = "#e4e7eb", "#c4cad2", "#5b636d", "#fffffe", "#eceef1"
FONT = "DejaVu Sans"
PAGE = {INK: "currentColor", GRID: "var(--grid)", FAINT: "var(--faint)", SOFT: "var(--soft)", PAPER: "var(--paper)"}
PAGE |= {BAND: "var(--band)", f"'{FONT}', sans-serif": "var(--sans)", f"'{FONT}'": "var(--sans)"}
SVG = "http://www.w3.org/2000/svg"
ElementTree.register_namespace("", SVG)
ElementTree.register_namespace("xlink", "http://www.w3.org/1999/xlink")


@contextmanager
def style() -> Iterator[None]:
    """All that is drawn and saved within looks alike."""
    from matplotlib import rc_context

    with as_file(files("kvist.report") / "report.mplstyle") as path, rc_context(fname=path):
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
    with style():
        figure.savefig(out, format="svg", metadata={"Date": None, "Creator": None, "Format": None, "Type": None})
    root = ElementTree.fromstring(out.getvalue())
    wide = float(root.attrib.pop("width").removesuffix("pt")) * 4 / 3  # as wide as the page allows, never wider
    root.attrib.pop("height")
    root.set("style", f"width:100%;max-width:{wide:.0f}px;height:auto")
    for group in root.iter(f"{{{SVG}}}g"):
        group.attrib.pop("id", None)  # nothing refers to groups, and a page has many figures
    for path in root.iter(f"{{{SVG}}}path"):
        path.set("d", " ".join(map(_short, path.get("d", "").split())))
    for parent in list(root.iter()):
        for child in list(parent):
            if child.tag.endswith("metadata"):
                parent.remove(child)
            else:
                child.tail = None
        parent.text = parent.text if parent.text and parent.text.strip() else None
    text = ElementTree.tostring(root, encoding="unicode")
    for ours, theirs in PAGE.items():
        text = text.replace(ours, theirs)
    return text


def png(figure, path: str | Path, dpi: int = 150) -> None:
    """As a file, on white, whole or not at all."""
    with style(), replacing(path) as scratch:
        figure.savefig(scratch, format="png", dpi=dpi, facecolor="white")


def plain_ticks(axis) -> None:
    """Numbers of a logarithmic axis as they are said, 0.01 and no power; more on a short one. Its ends are known."""
    from matplotlib.ticker import LogLocator, NullFormatter

    low, high = axis.get_view_interval()
    axis.set_major_locator(LogLocator(subs=(1, 2, 5) if high / low < 30 else (1,), numticks=9))
    axis.set_major_formatter(lambda x, _: f"{x:g}" if x >= 1e-4 else f"{x:.0e}".replace("e-0", "e−"))
    axis.set_minor_formatter(NullFormatter())


def _short(word: str) -> str:
    """A number of a path with two digits; its letters as they are."""
    try:
        return f"{float(word):.2f}"
    except ValueError:
        return word
