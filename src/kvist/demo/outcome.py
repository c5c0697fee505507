"""What the demo leaves behind: results.json and a picture of fidelity and answers against bytes, each whole or not."""

from dataclasses import asdict
from pathlib import Path

import torch
import transformers

from kvist import __version__
from kvist.atomic import replacing, write_json
from kvist.demo.documents import Document
from kvist.demo.measure import ANSWER, BASELINE, ROOM, STEP, Result

CAPTION = (
    "Bits per number of the cache: used, those that hold tokens now; at 8K and 32K, what the method allocates for a "
    f"text of that length, by its bill. MiB: all that is allocated, with room for {ROOM} more tokens. Used bits and "
    "MiB are counted from the tensors. KL and top-1: {scored} tokens behind the rest of the document, "
    f"{STEP} at a time: how far the distribution of the next token is from {BASELINE}'s, and how often both put the "
    "same token first. Found: each token of the answer is the model's first choice; with so few facts, one or two "
    "more or less say nothing. Tokens/s: one row, median of "
    f"{ANSWER} steps, the methods in turns. {BASELINE} is transformers' own cache, in {{dtype}} as the model computes "
    "({half:.1f} MiB in 16 bits); methods that pack keep the tokens that wait in {kept}. "
    f"{BASELINE}'s own KL is rounding: the same tokens at once, or {STEP} at a time."
)
MARKERS = "osD^vPX<>*hp"
TYPES = {torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16"}
LEAST = 1e-6  # nats: a KL below is rounding in fp32, and drawn as none


def summary(
    model: str, documents: list[Document], results: list[Result], seed: int, dtypes: tuple[torch.dtype, torch.dtype]
) -> dict:
    """Everything that is known about one run, as plain data. dtypes: what the model computes in, and what tokens that
    wait are kept in."""
    lengths = [len(document.ids) for document in documents]
    scored = sum(document.scored - 1 for document in documents)
    first, (computed, kept) = results[0], (TYPES.get(each, str(each)) for each in dtypes)
    half = first.nbytes * 16 / first.bits_per_element / 2**20 if first.bits_per_element else 0.0
    return {
        "kvist": __version__,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "threads": torch.get_num_threads(),
        "model": model,
        "dtype": computed,
        "seed": seed,
        "documents": len(documents),
        "questions": sum(len(document.questions) for document in documents),
        "shortest": min(lengths),
        "longest": max(lengths),
        "open": documents[0].open.text.strip(),
        "caption": CAPTION.format(scored=scored, half=half, dtype=computed, kept=kept),
        "results": [asdict(result) for result in results],
    }


def write(data: dict, folder: Path) -> list[str]:
    """results.json, and demo.png where matplotlib is installed; returns what was written."""
    folder.mkdir(parents=True, exist_ok=True)
    results, picture = folder / "results.json", folder / "demo.png"
    write_json(results, data)
    try:
        import matplotlib  # noqa: F401
    except ModuleNotFoundError:
        return [str(results)]
    with replacing(picture) as scratch:
        draw(data, scratch)
    return [str(results), str(picture)]


def draw(data: dict, path: Path) -> None:
    """KL divergence, and the share of facts found, against the cache's size; one legend, in the order of size."""
    from matplotlib import colormaps
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 4.8), layout="constrained")
    FigureCanvasAgg(figure)
    left, right = figure.subplots(1, 2)
    rows = sorted(data["results"], key=lambda row: row["nbytes"])
    floor = min((row["kl"] for row in rows if row["kl"] > LEAST), default=1e-3) / 4
    for i, row in enumerate(rows):
        size = row["nbytes"] / 2**20
        colour = colormaps["turbo"](0.05 + 0.9 * i / max(1, len(rows) - 1))
        look = {"color": colour, "marker": MARKERS[i % len(MARKERS)], "s": 70, "alpha": 0.85, "linewidths": 0}
        left.scatter([size], [max(row["kl"], floor)], label=f"{row['method']}  ({row['used_bits']:.1f} bits)", **look)
        right.scatter([size], [row["right"]], **look)
        if row["kl"] <= LEAST < rows[i - 1]["kl"]:
            left.annotate("rounding", (size, floor), (6, 8), textcoords="offset points", ha="right")
    left.set_title("how far from the model's own cache", loc="left", fontsize="medium")
    left.set_ylabel("KL divergence, nats (lower is better)")
    left.set_yscale("log")
    left.set_ylim(bottom=floor / 2)
    right.set_title(f"facts found, of {data['questions']}", loc="left", fontsize="medium")
    right.set_ylim(-0.03 * data["questions"], 1.03 * data["questions"])
    for axes in (left, right):
        axes.set_xlabel("cache, MiB (allocated)")
        axes.set_xlim(0, 1.08 * rows[-1]["nbytes"] / 2**20)
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
    figure.legend(loc="outside right center", frameon=False, title="by size: used bits per number")
    many = "one document of" if data["documents"] == 1 else f"{data['documents']} documents of up to"
    figure.suptitle(f"{data['model']} reads {many} {data['longest']:,} tokens: one model, a cache per method")
    figure.savefig(path, dpi=130, format="png")
