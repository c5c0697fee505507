"""`kvist demo`: a model reads a document, and answers questions about it under several methods."""

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kvist.cli import files
from kvist.cli.options import command
from kvist.cli.show import Bars, Printed, table
from kvist.flags import argument, flag

SHOWN = ("exact", "kivi:4", "kvquant:3", "hadamard:4")  # whose answers are printed


@dataclass(frozen=True)
class Reading:
    """Who reads what, under which methods, and is asked how much."""

    model: str = argument("smollm2", "smollm2, or a model's folder, GGUF file or name.")
    method: tuple[str, ...] = flag((), "Compare these only, with the exact cache; repeatable.", "-m")
    bundled: bool = flag(False, "kvist's own 6M-parameter model, on documents of its own kind.")
    document: Path | None = flag(None, "A text file, read instead of a page of kvist's docs.", "-d")
    questions: int | None = flag(None, "Facts to ask for.  [default: 12; 120 if --bundled]", "-n", least=1)
    out: Path = flag(Path("out/demo"), "Folder for demo.png and results.json.", "-o")
    seed: int = flag(0, "Of the facts: which, and where they stand.")


@command
def demo(reading: Reading, printed: Printed) -> None:
    """A model reads a document with facts planted in it, once; each method stores that, and is asked: the answers one
    above the other, a table, a picture. On the CPU.

    Example: kvist demo --method kivi:2 --method 'kivi k=2 v=4'
    """
    began = time.perf_counter()
    from kvist.demo import choice
    from kvist.demo.chat import PAGE
    from kvist.demo.measure import measure
    from kvist.demo.model import BUNDLED
    from kvist.demo.outcome import summary, write

    name = BUNDLED if reading.bundled else reading.model
    if name == BUNDLED and reading.document:
        raise ValueError("--bundled brings its own documents: the model was trained on them; leave --document out")
    methods = choice.methods(name, reading.method)
    files.check_folder(reading.out)
    text = files.read(reading.document or PAGE, "the document")
    with Bars() as bars:
        bars.show("model and kernels loaded", 0, 1)
        loaded, tokenizer, kept = _load(name)
        documents = choice.read(name, tokenizer, text, reading.questions, reading.seed)
        bars.show("model and kernels loaded", 1, 1)
        results = measure(loaded, tokenizer, documents, methods, bars.show)
    data: dict[str, Any] = summary(name, documents, results, reading.seed, (loaded.dtype, kept)) | {
        "seconds": time.perf_counter() - began
    }
    written = write(data, reading.out)
    named = ("exact", *reading.method) if reading.method else SHOWN
    shown = [row for row in data["results"] if row["method"] in named]
    wrote = (f"wrote {file}" for file in written)
    printed.say(data | {"files": written}, *_answers(data["open"], shown), _table(data), *wrote)


def _load(name: str):
    """Model and tokenizer on the CPU in fp32, which is exact and what most processors multiply fastest; and the type of
    the saved weights, in which methods that pack keep the tokens that wait."""
    from kvist.cli.models import load, read_config
    from kvist.demo.model import BUNDLED, bundled
    from kvist.models.precision import keep

    folder = str(bundled()) if name == BUNDLED else name
    model, tokenizer = load(folder, "cpu", "float32")
    saved: Any = read_config(folder).dtype or model.dtype
    keep(model, saved)
    return model, tokenizer, saved


def _answers(question: str, rows: list[dict]) -> list[str]:
    """The open question, and the methods' answers one above the other."""
    width = max(len(row["method"]) for row in rows)
    said = [f"  {row['method']:<{width}}  {(row['answer'].splitlines() or ['(nothing)'])[0]}" for row in rows]
    return [f"\nAsked, after the document: {question}\n", *said, ""]


def _table(data: dict):
    lengths = " to ".join(dict.fromkeys(f"{data[name]:,}" for name in ("shortest", "longest")))
    many = "a document" if data["documents"] == 1 else f"{data['documents']} documents"
    made = table(
        f"{data['model']} in {data['dtype']}: {many} of {lengths} tokens, {data['questions']} planted facts; "
        f"{data['seconds']:.0f} s in all",
        *("method", "bits used", "at 8K", "at 32K", "cache MiB", "KL, nats", "top-1", "found", "tokens/s"),
        caption=data["caption"],
    )
    for row in data["results"]:
        kl = "0" if row["kl"] < 1e-9 else f"{row['kl']:.2g}" if row["kl"] < 0.01 else f"{row['kl']:.3f}"
        bits = [f"{n:.2f}" for n in (row["used_bits"], *row["billed"].values())]
        speed, found = f"{row['tokens_per_second']:.1f}", f"{row['right']} of {row['asked']}"
        made.add_row(row["method"], *bits, f"{row['nbytes'] / 2**20:.1f}", kl, f"{row['agreement']:.1%}", found, speed)
    return made
