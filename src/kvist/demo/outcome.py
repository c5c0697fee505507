"""What the demo leaves behind: results.json and a picture of quality against bytes, each whole or not at all."""

import json
import os
import tempfile
from dataclasses import asdict
from pathlib import Path

import torch
import transformers

from kvist import __version__
from kvist.demo.documents import Document
from kvist.demo.measure import ROOM, SPEED_TOKENS, Result

CAPTION = (
    "Model kvist-6m (ours, in the wheel) in bf16 on the CPU, so that an exact number takes 16 bits. Bits per element "
    "and KiB: allocated, measured from the tensors after each document, mean; windows, tables and room for "
    f"{ROOM} more tokens included. KL: mean over the answers' tokens, the answer given. Right: each token of the answer "
    "is the model's first choice. tokens/s: one row, attention on packed pages, median of "
    f"{SPEED_TOKENS} decode steps after the first document."
)


def summary(documents: list[Document], results: list[Result], seed: int) -> dict:
    """Everything that is known about one run, as plain data."""
    lengths = [len(document.ids) for document in documents]
    return {
        "kvist": __version__,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "threads": torch.get_num_threads(),
        "seed": seed,
        "documents": len(documents),
        "questions": sum(len(document.questions) for document in documents),
        "shortest": min(lengths),
        "longest": max(lengths),
        "caption": CAPTION,
        "results": [asdict(result) for result in results],
    }


def write(data: dict, folder: Path) -> list[str]:
    """results.json, and demo.png where matplotlib is installed; returns what was written."""
    folder.mkdir(parents=True, exist_ok=True)
    results = folder / "results.json"
    _whole(results, lambda path: path.write_text(json.dumps(data, indent=2, ensure_ascii=False) + "\n"))
    try:
        import matplotlib  # noqa: F401
    except ModuleNotFoundError:
        return [str(results)]
    picture = folder / "demo.png"
    _whole(picture, lambda path: draw(data, path))
    return [str(results), str(picture)]


def _whole(path: Path, fill) -> None:
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=path.stem, suffix=".part" + path.suffix)
    os.close(handle)
    scratch = Path(name)
    try:
        fill(scratch)
        scratch.chmod(0o644)
        scratch.replace(path)
    finally:
        scratch.unlink(missing_ok=True)


def draw(data: dict, path: Path) -> None:
    """Share of answers right, and KL divergence, against the cache's size."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 5.4), layout="constrained")
    FigureCanvasAgg(figure)
    left, right = figure.subplots(1, 2)
    rows = data["results"]
    floor = min((row["kl"] for row in rows if row["kl"] > 0), default=1e-3) / 4
    share = [(row["nbytes"] / 1024, 100 * row["right"] / row["asked"], row["method"]) for row in rows]
    nats = [(row["nbytes"] / 1024, max(row["kl"], floor), row["method"]) for row in rows]
    for axes, points, label in (
        (left, share, "answers right, %"),
        (right, nats, "KL to the exact cache, nats (lower is better)"),
    ):
        axes.set_xlabel("cache, KiB per document (allocated)")
        axes.set_ylabel(label)
        axes.set_xlim(0, 1.12 * max(x for x, _, _ in points))
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
    left.set_ylim(-5, 108)
    right.set_yscale("log")
    right.set_ylim(floor / 2, 4 * max(y for _, y, _ in nats))
    _label(figure, left, share)
    _label(
        figure,
        right,
        [(x, y, f"{name} (0)" if row["kl"] == 0 else name) for (x, y, name), row in zip(nats, rows, strict=True)],
    )
    asked = f"{data['questions']} questions about {data['documents']} documents of up to {data['longest']} tokens"
    figure.suptitle(f"{asked}: one model, a cache per method")
    figure.savefig(path, dpi=130, format="png")


def _label(figure, axes, points: list[tuple[float, float, str]]) -> None:
    """Dots with their names beside them, each at the first of some places where it covers no other name and no dot."""
    colours = [f"C{i % 10}" for i in range(len(points))]
    for (x, y, _), colour in zip(points, colours, strict=True):
        axes.plot([x], [y], "o", color=colour, markersize=7)
    figure.canvas.draw()
    renderer = figure.canvas.get_renderer()
    dots = [axes.transData.transform((x, y)) for x, y, _ in points]
    reach = figure.dpi / 72
    taken: list = []
    places = [
        (side * dx, dy)
        for dx in (8, 24, 44, 70)
        for dy in (-4, 8, -16, 20, -28, 32, -40, 44, -54, 58)
        for side in (1, -1)
    ]
    for (x, y, name), colour in zip(points, colours, strict=True):
        for dx, dy in places:
            text = axes.annotate(
                name,
                (x, y),
                (dx, dy),
                textcoords="offset points",
                fontsize=9,
                color=colour,
                ha="left" if dx > 0 else "right",
                arrowprops={"arrowstyle": "-", "color": colour, "lw": 0.6, "shrinkB": 4}
                if abs(dx) + abs(dy) > 14
                else None,
            )
            box = (
                text.get_tightbbox(renderer)
                if abs(dx) + abs(dy) <= 14
                else type(text).get_window_extent(text, renderer)
            )
            words = box.padded(1.5 * reach)
            inside = (
                axes.bbox.x0 < words.x0
                and words.x1 < axes.bbox.x1
                and axes.bbox.y0 < words.y0
                and words.y1 < axes.bbox.y1
            )
            clear = not any(words.overlaps(other) for other in taken) and not any(words.contains(*dot) for dot in dots)
            if inside and clear:
                taken.append(words)
                break
            text.remove()
        else:
            axes.annotate(name, (x, y), (8, -4), textcoords="offset points", fontsize=9, color=colour)
