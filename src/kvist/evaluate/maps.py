"""Right answers by length and depth, as heat maps side by side, in one PNG."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from kvist.atomic import replacing
from kvist.evaluate.results import Cell

ACROSS = 4
NOTHING = "--plot draws answers by length and depth; ask for needle, passkey or a task like them"


def grid(cell: Cell) -> tuple[list[int], list[float | None], np.ndarray]:
    """Lengths, depths, and the mean score at each (depths, lengths); NaN where nothing was asked."""
    lengths, depths = (
        sorted(set(cell.values[name]), key=lambda x: -1 if x is None else x) for name in ("length", "depth")
    )
    found = np.full((len(depths), len(lengths)), np.nan)
    for i, depth in enumerate(depths):
        for j, length in enumerate(lengths):
            triples = zip(cell.values["score"], cell.values["depth"], cell.values["length"], strict=True)
            scores = [score for score, d, n in triples if (d, n) == (depth, length)]
            found[i, j] = np.mean(scores) if scores else np.nan
    return lengths, depths, found


def draw(measured: Sequence[tuple[str, Sequence[Cell]]], path: Path) -> None:
    """Maps of every task that has lengths, a row of panels per task. ValueError where no task has."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    panels = [(task, cell) for task, cells in measured for cell in cells if "length" in cell.values]
    if not panels:
        raise ValueError(NOTHING)
    rows = -(-len(panels) // ACROSS)
    figure = Figure(figsize=(3.2 * min(ACROSS, len(panels)) + 0.8, 2.6 * rows + 0.3), layout="constrained")
    FigureCanvasAgg(figure)
    every = figure.subplots(rows, min(ACROSS, len(panels)), squeeze=False)
    for ax, (task, cell) in zip(every.flat, panels, strict=False):
        lengths, depths, scores = grid(cell)
        ax.imshow(scores, vmin=0, vmax=1, cmap="viridis", aspect="auto", interpolation="nearest")
        for (i, j), score in np.ndenumerate(scores):
            if not np.isnan(score):
                ax.text(j, i, f"{score:.0%}", ha="center", va="center", fontsize=7, color="w" if score < 0.6 else "k")
        ax.set_title(f"{task}, {cell.method}, {cell.bits:.2f} bits", fontsize=9)
        ax.set_xticks(range(len(lengths)), [f"{n:,}" for n in lengths], fontsize=7)
        ax.set_yticks(range(len(depths)), ["any" if d is None else f"{d:.0%}" for d in depths], fontsize=7)
        ax.set_xlabel("tokens", fontsize=8)
        ax.set_ylabel("depth", fontsize=8)
    for ax in every.flat[len(panels) :]:
        ax.set_axis_off()
    figure.colorbar(every.flat[0].images[0], ax=every, label="share of what is expected", fraction=0.03)
    with replacing(path) as scratch:
        figure.savefig(scratch, dpi=110, format="png")
