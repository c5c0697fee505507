"""`kvist demo`: a model reads a document, and answers questions about it under several methods."""

import time
from pathlib import Path
from typing import Annotated

import typer

from kvist.cli.show import Bars, Json, dump, put, table

SHOWN = ("exact", "kivi:4", "kvquant:3", "hadamard:4")  # whose answers are printed
METHODS = (*SHOWN[:1], "int8", "int4", "hadamard:4", "kivi:4", "kvquant:4", "kvquant:3", "kivi:2")
BUNDLED_QUESTIONS, QUESTIONS = 120, 12


def demo(
    model: Annotated[str, typer.Argument(help="smollm2, or a model's folder, GGUF file or name.")] = "smollm2",
    method: Annotated[
        list[str] | None, typer.Option("--method", "-m", help="Compare these only, with the exact cache; repeatable.")
    ] = None,
    bundled: Annotated[
        bool, typer.Option("--bundled", help="kvist's own 6M-parameter model, on documents of its own kind.")
    ] = False,
    document: Annotated[
        Path | None, typer.Option("--document", "-d", help="A text file, read instead of a page of kvist's docs.")
    ] = None,
    questions: Annotated[
        int | None, typer.Option("--questions", "-n", min=1, help="Facts to ask for.  [default: 12; 120 if --bundled]")
    ] = None,
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder for demo.png and results.json.")] = Path("out/demo"),
    seed: Annotated[int, typer.Option(help="Of the facts: which, and where they stand.")] = 0,
    json: Json = False,
) -> None:
    """A model reads a document with facts planted in it, once; each method stores that, and is asked: the answers one
    above the other, a table, a picture. On the CPU.

    Example: kvist demo --method kivi:2 --method 'kivi k=2 v=4'
    """
    began = time.perf_counter()
    from kvist.demo.model import BUNDLED

    name = BUNDLED if bundled or model == BUNDLED else model
    if name == BUNDLED and document:
        raise ValueError("--bundled brings its own documents: the model was trained on them; leave --document out")
    methods = _methods(name, method)
    if out.exists() and not out.is_dir():
        raise ValueError(f"--out is a folder, found a file at {out}")
    text = _text(document)
    with Bars() as bars:
        bars.show("model and kernels loaded", 0, 1)
        loaded, tokenizer, kept = _load(name)
        documents = _documents(name, tokenizer, text, questions, seed)
        bars.show("model and kernels loaded", 1, 1)

        from kvist.demo.measure import measure
        from kvist.demo.outcome import summary, write

        results = measure(loaded, tokenizer, documents, methods, bars.show)
    dtypes = (_type(loaded.dtype), _type(kept))
    data = summary(name, documents, results, seed, dtypes) | {"seconds": time.perf_counter() - began}
    files = write(data, out)
    if json:
        return dump(data | {"files": files})
    shown = [row for row in data["results"] if row["method"] in (["exact", *method] if method else SHOWN)]
    _say_answers(data["open"], shown)
    put(_table(data))
    print("\n".join(f"wrote {file}" for file in files))
    return None


def _methods(name: str, chosen: list[str] | None):
    """Names and recipes, the baseline and `exact` first; by default those that need no tables, or have them."""
    from kvist.demo.measure import BASELINE
    from kvist.demo.model import fitted, recipe
    from kvist.methods import parse

    default = [text for text in METHODS if fitted(name) or not parse(text).needs]
    texts = dict.fromkeys(["exact", *(chosen or default)])
    return [(BASELINE, None), *((text, recipe(text, name)) for text in texts)]


def _text(document: Path | None) -> str:
    from kvist.demo.chat import PAGE

    try:
        return (document or PAGE).read_text()
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "it is not text in UTF-8"
        raise ValueError(f"the document {document} cannot be read: {reason}") from None


def _load(name: str):
    """Model and tokenizer on the CPU in fp32, which is exact and what most processors multiply fastest; and the type of
    the saved weights, in which methods that pack keep the tokens that wait."""
    from kvist.cli.models import load, read_config
    from kvist.demo.model import BUNDLED, bundled
    from kvist.models.precision import keep

    folder = str(bundled()) if name == BUNDLED else name
    model, tokenizer = load(folder, "cpu", "float32")
    saved = read_config(folder).dtype or model.dtype
    keep(model, saved)
    return model, tokenizer, saved


def _documents(name: str, tokenizer, text: str, questions: int | None, seed: int):
    from kvist.demo import chat
    from kvist.demo import documents as own
    from kvist.demo.model import BUNDLED

    if name == BUNDLED:
        return own.documents(tokenizer, questions or BUNDLED_QUESTIONS, seed)
    return [chat.document(tokenizer, text, questions or QUESTIONS, seed)]


def _type(dtype) -> str:
    return {"float32": "fp32", "float16": "fp16", "bfloat16": "bf16"}.get(
        name := str(dtype).removeprefix("torch."), name
    )


def _say_answers(question: str, rows: list[dict]) -> None:
    """The open question, and the methods' answers one above the other."""
    width = max(len(row["method"]) for row in rows)
    print(f"\nAsked, after the document: {question}\n")
    for row in rows:
        print(f"  {row['method']:<{width}}  {(row['answer'].splitlines() or ['(nothing)'])[0]}")
    print()


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
