"""A picture of a throughput report: speed and memory against the batch."""

from pathlib import Path

from kvist.atomic import replacing

MARKERS = "osD^vPX<>*hp"


def draw(report: dict, path: str | Path) -> None:
    """tokens/s, and peak and cache bytes, of each contender against the batch, as a PNG; with the limit of memory."""
    from matplotlib import colormaps
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(13, 5.2), layout="constrained")
    FigureCanvasAgg(figure)
    left, right = figure.subplots(1, 2)
    names = list(dict.fromkeys(row["contender"] for row in report["rows"]))
    for i, name in enumerate(names):
        rows = [row for row in report["rows"] if row["contender"] == name and "tokens/s" in row]
        look = {"color": colormaps["turbo"](0.05 + 0.9 * i / max(1, len(names) - 1)), "marker": MARKERS[i % 12]}
        batches = [row["batch"] for row in rows]
        left.plot(batches, [row["tokens/s"] for row in rows], label=name, **look)
        known = [row for row in rows if row["peak bytes"] is not None]
        right.plot([row["batch"] for row in known], [row["peak bytes"] / 2**20 for row in known], **look)
        right.plot(batches, [row["cache bytes"] / 2**20 for row in rows], **look, linestyle=":", markersize=3)
    right.axhline(report["settings"]["memory bytes"] / 2**20, color="grey", linestyle="--", linewidth=1)
    left.set_ylabel("tokens/s")
    left.set_title("generated tokens/s, prefill included", fontsize="medium")
    right.set_ylabel("MiB")
    right.set_title("peak beyond the weights (solid), cache (dotted), limit (dashed)", fontsize="medium")
    for axes in (left, right):
        axes.set_xlabel("batch")
        axes.set_xscale("log", base=2)
        axes.xaxis.set_major_formatter(lambda x, _: f"{x:g}")
        axes.set_yscale("log")
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
    figure.legend(loc="outside right center", frameon=False)
    figure.suptitle(report["title"])
    with replacing(path) as scratch:
        figure.savefig(scratch, dpi=130, format="png")
