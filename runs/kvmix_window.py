"""How many tokens KVmix's window really keeps exact: runs/kvmix-window.json and docs/kvmix-window.png.

    python runs/kvmix_window.py

A living layer is given a prompt and then token after token; counted is what its tracks hold exact, step by step.
"""

import json
from pathlib import Path

import torch

from kvist.atomic import replacing
from kvist.cache.layer import Layer
from kvist.cache.report import measure
from kvist.cache.rows import Rows
from kvist.methods import get

PROMPT, STEPS = 4096, 512
SHOWN = (0, 1, 2, 3, 4, 8, 16, 32, 64, 128, 256, 512)
WIDTHS = {2: 0.1, 4: 0.2}  # bits: the paper's ratio
HERE = Path(__file__).parent


def curve(bits: int, of: str) -> tuple[list[int], int]:
    """Exact tokens of the keys after the prompt and after each step, and the bytes allocated in the end."""
    recipe, rows = get("kvmix", bits=bits, ratio_of=of), Rows()
    layer = Layer(recipe.layers[0], recipe.page, recipe.prefill, 0, rows)
    found = []
    for count in (PROMPT, *[1] * STEPS):
        rows.extend(1, count, None)
        x = torch.randn(1, 1, count, 8)
        layer.update(x, x)
        found.append(layer.lengths[0] - layer.tracks[0].frontiers[0])
    return found, measure("kvmix", [layer]).nbytes


def draw(curves: list[dict], path: Path) -> None:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 4), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    for row in curves:
        style = "-" if row["ratio of"] == "waiting" else "--"
        words = (
            f"{row['ratio']:.0%} of what waits (published)" if style == "-" else f"{row['ratio']:.0%} of the context"
        )
        axes.plot(range(STEPS + 1), row["exact tokens"], style, label=words)
    axes.set_yscale("log")
    axes.set_xscale("symlog", linthresh=1)
    axes.set_xlim(0, STEPS)
    axes.set_xlabel(f"tokens written after a prompt of {PROMPT:,}")
    axes.set_ylabel("exact tokens of the keys")
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)
    with replacing(path) as scratch:
        figure.savefig(scratch, dpi=110, format="png")


def main() -> None:
    curves = []
    for bits, ratio in WIDTHS.items():
        for of in ("waiting", "context"):
            tokens, nbytes = curve(bits, of)
            row = {"bits": bits, "ratio": ratio, "ratio of": of, "exact tokens": tokens, "bytes in the end": nbytes}
            curves.append(row)
    draw(curves, HERE.parent / "docs" / "kvmix-window.png")
    for row in curves:
        last = row["exact tokens"][-64:]
        row["of the last 64 steps"] = [min(last), max(last)]
        row["exact tokens"] = {str(step): row["exact tokens"][step] for step in SHOWN}
    with replacing(HERE / "kvmix-window.json") as scratch:
        scratch.write_text(json.dumps({"prompt": PROMPT, "rows": curves}, indent=1) + "\n")


if __name__ == "__main__":
    main()
