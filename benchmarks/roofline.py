"""A picture of a kernel benchmark: time against bits per cached number, and the time that reading the bytes takes."""

from pathlib import Path

from kvist.atomic import replacing

COLUMNS = 3
LOOK = {"fp16": ("tab:grey", "s"), "fp8": ("tab:brown", "D"), "kvist": ("tab:blue", "o")}


def draw(report: dict, path: str | Path) -> None:
    """A panel per shape, as a PNG: a point per timed contender, labelled, over the floor. Raises ValueError if there
    are no times."""
    rows = [row for row in report["rows"] if "median us" in row and "variant" not in row]
    if not rows:
        raise ValueError("there are no times to draw: expected a report made on a GPU")
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    shapes = list(dict.fromkeys(row["shape"] for row in rows))
    height = -(-len(shapes) // COLUMNS)
    figure = Figure(figsize=(5 * min(COLUMNS, len(shapes)), 4 * height), layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(height, min(COLUMNS, len(shapes)), squeeze=False).flatten()
    for axes, shape in zip(panels, shapes, strict=False):
        _panel(axes, shape, [row for row in rows if row["shape"] == shape], 1e9 * report["read GB/s"])
    for axes in panels[len(shapes) :]:
        axes.set_visible(False)
    figure.suptitle(f"{report['title']}: time of a step; line: bytes at {report['read GB/s']:.0f} GB/s, a plain read")
    with replacing(path) as scratch:
        figure.savefig(scratch, dpi=120, format="png")


def _panel(axes, shape: str, rows: list[dict], copied: float) -> None:
    from matplotlib.ticker import NullLocator

    per_bit = rows[0]["MB"] * 1e6 / rows[0]["bits/element"]  # bytes, of a bit of every cached number
    ends = [min(row["bits/element"] for row in rows) / 1.3, max(row["bits/element"] for row in rows) * 1.3]
    axes.plot(ends, [1e6 * per_bit * bits / copied for bits in ends], color="black", linewidth=1)
    for row in rows:
        colour, marker = LOOK[row["kind"]]
        x, y = row["bits/element"], row["median us"]
        axes.errorbar([x], [y], [[y - row["p10 us"]], [row["p90 us"] - y]], color=colour, marker=marker, markersize=4)
        name = row["contender"].removeprefix("kvist ").removeprefix("torch ")
        axes.annotate(name, (x, y), xytext=(-5, 2), textcoords="offset points", fontsize=7, ha="right")
    axes.set(title=shape, xlabel="bits per cached number", ylabel="µs", xscale="log", yscale="log")
    axes.set(xlim=(ends[0] / 1.6, ends[1]), xticks=[b for b in (1, 2, 4, 8, 16) if ends[0] / 1.6 <= b <= ends[1]])
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_formatter(lambda x, _: f"{x:g}")
    axes.xaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_minor_formatter(lambda x, _: f"{x:g}")
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
