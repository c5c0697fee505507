"""`kvist compare`: in a sentence, whether a difference is real."""

from pathlib import Path
from typing import Annotated

import typer

from kvist.cli.show import Json, dump


def compare(
    a: Annotated[str, typer.Argument(metavar="A", help="A method with --results; else a results file or folder.")],
    b: Annotated[str, typer.Argument(metavar="B", help="The other one.")],
    results: Annotated[
        Path | None, typer.Option("--results", "-r", metavar="DIR", help="A folder or file of `kvist eval --out`.")
    ] = None,
    seed: Annotated[int, typer.Option(help="Of intervals and tests.")] = 0,
    json: Json = False,
) -> None:
    """Say whether two methods differ, or two runs of the same methods, on the same items of each task.

    Answers that are right or wrong: McNemar's exact test; other numbers: flipped signs of paired differences. p are
    corrected by Holm for the number of tasks. Examples: kvist compare kivi:2 int4 --results results;
    kvist compare before/results.jsonl after/results.jsonl
    """
    from kvist.report.sentences import methods, runs

    if results is None and not (Path(a).exists() and Path(b).exists()):
        raise ValueError(
            f"expected two results files, or two methods and --results DIR, found {a} and {b} without --results"
        )
    found = runs(a, b, seed) if results is None else methods(a, b, results, seed)
    if json:
        return dump([each.data for each in found])
    print(*(each.sentence for each in found), sep="\n")
    return None
