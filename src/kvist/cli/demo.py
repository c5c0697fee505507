"""`kvist demo`: the bundled model answers questions under every method."""

from pathlib import Path
from typing import Annotated

import typer

from kvist.cli.methods import options
from kvist.cli.show import Json, console, dump, put, table

VARIANTS = ("hadamard:2", "kivi:4", "kvquant:2", "kvquant:3", "kvquant:4")  # beside every method at its defaults


def demo(
    method: Annotated[
        list[str] | None, typer.Option("--method", "-m", help="Compare these only, with the exact cache; repeatable.")
    ] = None,
    questions: Annotated[int, typer.Option("--questions", "-n", min=1, help="How many questions are asked.")] = 120,
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder for demo.png and results.json.")] = Path("out/demo"),
    seed: Annotated[int, typer.Option(help="Seed of the documents, their facts and the questions.")] = 0,
    json: Json = False,
) -> None:
    """The bundled model reads documents with planted facts and answers questions, under every method: one table.

    Example: kvist demo --method kivi:2 --method 'kivi k=2 v=4' --questions 24
    """
    from kvist.demo.model import recipe
    from kvist.methods import get, names

    every = [_with_bits(name) for name in names() if not get(name).needs]
    texts = list(dict.fromkeys(["exact", *(method or sorted([*every, *VARIANTS]))]))
    recipes = [(text, recipe(text)) for text in texts]
    if out.exists() and not out.is_dir():
        raise ValueError(f"--out is a folder, found a file at {out}")

    from kvist.demo import documents as made
    from kvist.demo.measure import measure
    from kvist.demo.model import load
    from kvist.demo.outcome import summary, write

    model, tokenizer = load()
    documents = made.documents(tokenizer, questions, seed)
    results = _with_progress(len(documents) * len(recipes), lambda tick: measure(model, documents, recipes, tick))
    data = summary(documents, results, seed)
    files = write(data, out)
    if json:
        return dump(data | {"files": files})
    put(_table(data))
    print("\n".join(f"wrote {file}" for file in files))
    return None


def _with_bits(name: str) -> str:
    """A method at its defaults, with its bits in the name where they are an option."""
    bits = options(name).get("bits")
    return f"{name}:{bits}" if bits else name


def _with_progress(steps: int, work):
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console(stderr=True), transient=True) as progress:
        task = progress.add_task("documents × methods", total=steps)
        return work(lambda: progress.advance(task))


def _table(data: dict):
    made = table(
        f"The bundled model, {data['documents']} documents of {data['shortest']} to {data['longest']} tokens, "
        f"{data['questions']} questions",
        *("method", "bits per element", "cache KiB", "KL to exact, nats", "answers right", "tokens/s"),
        caption=data["caption"],
    )
    for row in data["results"]:
        right = f"{row['right']} of {row['asked']}"
        kl = "0" if row["kl"] == 0 else f"{row['kl']:.2g}" if row["kl"] < 0.01 else f"{row['kl']:.3f}"
        bits, kib = f"{row['bits_per_element']:.2f}", f"{row['nbytes'] / 1024:.0f}"
        made.add_row(row["method"], bits, kib, kl, right, f"{row['tokens_per_second']:.0f}")
    return made
