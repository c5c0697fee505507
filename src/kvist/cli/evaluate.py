"""`kvist eval`: how good a method is on text."""

from functools import partial
from pathlib import Path
from typing import Annotated

import typer

from kvist.cli.show import Bars, Json, dump, put, table

app = typer.Typer(no_args_is_help=True, rich_markup_mode=None, help="Measure quality: perplexity and divergence.")


@app.callback()
def evaluate() -> None:
    """Measure quality: perplexity and divergence."""


@app.command()
def ppl(
    model: Annotated[str, typer.Argument(help="A model's folder, or its name on the Hugging Face Hub.")],
    method: Annotated[
        list[str] | None,
        typer.Option("--method", "-m", help="A method, or a recipe's JSON file; repeatable.  [default: kivi:2]"),
    ] = None,
    mode: Annotated[
        str,
        typer.Option(help="simulated: all tokens quantized in one pass, as published; stored: what a cache holds."),
    ] = "stored",
    data: Annotated[str, typer.Option(help="A text file (also .xz), or wikitext2 or c4.")] = "wikitext2",
    data_dir: Annotated[
        Path | None, typer.Option(help="The folder where --data's name is looked up, instead of the hub.")
    ] = None,
    split: Annotated[str, typer.Option(help="test, valid or train: which of a name's texts.")] = "test",
    seqlen: Annotated[int, typer.Option(min=2, help="Tokens per window.")] = 2048,
    windows: Annotated[int, typer.Option("--windows", "-n", min=0, help="The first N windows; 0: all.")] = 0,
    batch: Annotated[int, typer.Option(min=1, help="Windows that go through the model together.")] = 1,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1 …")] = "auto",
    dtype: Annotated[str, typer.Option(help="auto (as saved), float32, float16 or bfloat16.")] = "auto",
    seed: Annotated[int, typer.Option(help="Of the intervals' draws.")] = 0,
    out: Annotated[
        Path | None, typer.Option("--out", "-o", help="A file of JSON lines, one per method and window; gone on from.")
    ] = None,
    json: Json = False,
) -> None:
    """Perplexity and KL divergence from the exact cache, on windows of text, with 95 % bootstrap intervals.

    Differences are to the first method, over the same windows. Examples: kvist eval ppl ./my-model -m kivi:2 -m int4
    --data book.txt; kvist eval ppl ./my-model -m 'kvquant artifact=DIR' --mode simulated --windows 32 --out ppl.jsonl
    """
    from kvist.methods import parse

    if mode not in ("simulated", "stored"):
        raise ValueError(f"--mode is 'simulated' or 'stored', found {mode!r}")
    methods = list(dict.fromkeys(method or ["kivi:2"]))
    recipes = {text: parse(text) for text in dict.fromkeys(["exact", *methods])}

    from kvist.calibrate import text
    from kvist.evaluate.results import Results, summary

    results, documents = Results(out), text.texts(data, data_dir, split)

    from kvist.cli.models import load
    from kvist.evaluate import collect

    loaded, tokenizer = load(model, device, dtype)
    longest = getattr(loaded.config.get_text_config(decoder=True), "max_position_embeddings", None)
    if longest and seqlen > longest:
        raise ValueError(f"{model} knows {longest} positions, found --seqlen {seqlen}; give {longest} or less")
    ids = text.windows(tokenizer, documents, seqlen, windows or None)
    if len(ids) < windows:
        raise ValueError(f"{data} has {len(ids)} windows of {seqlen} tokens, found --windows {windows}; give 0 for all")
    about = {"source": data, "data": text.digest(documents), "seqlen": seqlen, "mode": mode}
    chosen = collect.Text(ids, data, about["data"])
    with Bars() as bars:
        tick = partial(bars.show, "windows × methods")
        kept = collect.collect(loaded, chosen, recipes, mode, results, batch, tick)
    found = summary(kept, methods[0], seed)
    if json:
        return dump({"model": model, "dtype": str(loaded.dtype).removeprefix("torch."), **about, "results": found})
    put(_table(found, model, data, about, methods[0]))
    return None


def _table(found: list[dict], model: str, data: str, about: dict, first: str):
    bits = "that a packed token takes" if about["mode"] == "simulated" else "allocated by the cache"
    made = table(
        f"{model} on {data}, {found[0]['windows']} × {about['seqlen']} tokens, {about['mode']}",
        *("method", "bits", "perplexity [95 %]", "KL, nats [95 %]", "same first choice", "log-ppl − first's [95 %]"),
        caption=f"bits: per element, {bits}; intervals: bootstrap over windows; differences: paired, to {first}.",
    )
    for row in found:
        ppl, kl, change = (_said(row[name]) for name in ("perplexity", "kl", "log_perplexity_difference"))
        made.add_row(row["method"], f"{row['bits']:.2f}", ppl, kl, f"{row['agreement']:.1%}", change)
    return made


def _said(estimate: dict) -> str:
    from kvist.evaluate.statistics import Estimate

    return str(Estimate(**estimate))
