"""What the demo leaves behind: results.json and a picture of quality against bytes, each whole or not at all."""

import json
from dataclasses import asdict
from pathlib import Path

import torch
import transformers

from kvist import __version__
from kvist.atomic import replacing
from kvist.demo.documents import Document
from kvist.demo.measure import ROOM, SPEED_TOKENS, Result

CAPTION = (
    "Model kvist-6m (ours, in the wheel) in bf16 on the CPU, so that an exact number takes 16 bits. Bits per element "
    "and KiB: allocated, measured from the tensors after each document, mean; windows, tables and room for "
    f"{ROOM} more tokens included. KL: mean over the answers' tokens, the answer given. Right: each token of the "
    "answer is the model's first choice. tokens/s: one row, attention on packed pages, median of "
    f"{SPEED_TOKENS} decode steps after each document."
)
MARKERS = "osD^vPX<>*hp"


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
    with replacing(results) as scratch:
        scratch.write_text(json.dumps(data, indent=2, ensure_ascii=False) + "\n")
    try:
        import matplotlib  # noqa: F401
    except ModuleNotFoundError:
        return [str(results)]
    picture = folder / "demo.png"
    with replacing(picture) as scratch:
        draw(data, scratch)
    return [str(results), str(picture)]


def draw(data: dict, path: Path) -> None:
    """Share of answers right, and KL divergence, against the cache's size; one legend, in the order of size."""
    from matplotlib import colormaps
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(13, 5.2), layout="constrained")
    FigureCanvasAgg(figure)
    left, right = figure.subplots(1, 2)
    rows = sorted(data["results"], key=lambda row: row["nbytes"])
    floor = min((row["kl"] for row in rows if row["kl"] > 0), default=1e-3) / 4
    for i, row in enumerate(rows):
        size, share = row["nbytes"] / 1024, 100 * row["right"] / row["asked"]
        colour = colormaps["turbo"](0.05 + 0.9 * i / max(1, len(rows) - 1))
        look = {"color": colour, "marker": MARKERS[i % len(MARKERS)], "s": 70, "alpha": 0.85, "linewidths": 0}
        left.scatter([size], [share], label=f"{row['method']}  ({row['bits_per_element']:.1f} bits)", **look)
        right.scatter([size], [max(row["kl"], floor)], **look)
        if row["kl"] == 0:
            right.annotate("0, by definition", (size, floor), (-8, 8), textcoords="offset points", ha="right")
    left.set_ylabel("answers right, %")
    left.set_ylim(-3, 103)
    right.set_ylabel("KL to the exact cache, nats (lower is better)")
    right.set_yscale("log")
    right.set_ylim(bottom=floor / 2)
    for axes in (left, right):
        axes.set_xlabel("cache, KiB per document (allocated)")
        axes.set_xlim(0, 1.08 * rows[-1]["nbytes"] / 1024)
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
    figure.legend(loc="outside right center", frameon=False, title="by size: allocated bits per element")
    asked = f"{data['questions']} questions about {data['documents']} documents of up to {data['longest']} tokens"
    figure.suptitle(f"{asked}: one model, a cache per method")
    figure.savefig(path, dpi=130, format="png")
