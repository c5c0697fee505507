"""`kvist bench`: measurements; each one is a function of kvist.bench."""

from pathlib import Path
from typing import Annotated

import typer

from kvist.cli.show import Json

app = typer.Typer(no_args_is_help=True, rich_markup_mode=None, help="Measure speed and memory.")


@app.callback()
def bench() -> None:
    """Measure speed and memory."""


@app.command()
def decode(
    length: Annotated[
        list[int] | None, typer.Option("--length", "-n", min=1, help="Tokens in the cache; repeatable.")
    ] = None,
    method: Annotated[list[str] | None, typer.Option("--method", "-m", help="A method of ours; repeatable.")] = None,
    steps: Annotated[int, typer.Option(min=1, help="Measured steps of each contender.")] = 40,
    threads: Annotated[int, typer.Option(min=0, help="Threads of torch; 0 leaves them as they are.")] = 0,
    seed: Annotated[int, typer.Option(help="Seed of the random keys and values.")] = 0,
    out: Annotated[Path | None, typer.Option(help="File for the results, as JSON.")] = None,
    json: Json = False,
) -> None:
    """One decode step against transformers' own caches: medians and ratios of interleaved runs.

    Example: kvist bench decode --length 4096 --method kivi:2 --method 'kivi k=2 v=4'
    """
    from kvist.bench import decode as measured
    from kvist.methods import parse

    for text in method or ():
        parse(text)
    chosen = {"lengths": length, "methods": method}
    measured.run(
        **{k: v for k, v in chosen.items() if v}, steps=steps, threads=threads, seed=seed, out=out, as_json=json
    )


@app.command()
def encode(
    method: Annotated[list[str] | None, typer.Option("--method", "-m", help="A method of ours; repeatable.")] = None,
    rounds: Annotated[int, typer.Option(min=1, help="Measured rounds.")] = 15,
    out: Annotated[Path | None, typer.Option(help="File for the results, as JSON.")] = None,
    json: Json = False,
) -> None:
    """Bulk encoding on one core in MB/s of 16-bit input, and microseconds for a page of 64 tokens.

    Example: kvist bench encode --method kivi:2
    """
    from kvist.bench import encode as measured

    measured.run(**({"methods": method} if method else {}), rounds=rounds, out=out, as_json=json)
