"""`kvist compare`: in a sentence, whether a difference is real."""

from dataclasses import dataclass
from pathlib import Path

from kvist.cli.options import command
from kvist.cli.show import Printed
from kvist.flags import argument, flag


@dataclass(frozen=True)
class Pair:
    """Two methods, or two runs."""

    a: str = argument(..., "A method with --results; else a results file or folder.", metavar="A")
    b: str = argument(..., "The other one.", metavar="B")
    results: Path | None = flag(None, "A folder or file of `kvist eval --out`.", "-r", metavar="DIR")
    seed: int = flag(0, "Of intervals and tests.")


@command
def compare(pair: Pair, printed: Printed) -> None:
    """Say whether two methods differ, or two runs of the same methods, on the same items of each task.

    Answers that are right or wrong: McNemar's exact test; other numbers: flipped signs of paired differences. p are
    corrected by Holm for the number of tasks. Examples: kvist compare kivi:2 int4 --results results;
    kvist compare before/results.jsonl after/results.jsonl
    """
    from kvist.report.sentences import methods, runs

    a, b, results = pair.a, pair.b, pair.results
    if results is None and not (Path(a).exists() and Path(b).exists()):
        raise ValueError(
            f"expected two results files, or two methods and --results DIR, found {a} and {b} without --results"
        )
    found = runs(a, b, pair.seed) if results is None else methods(a, b, results, pair.seed)
    printed.say([each.data for each in found], *(each.sentence for each in found))
