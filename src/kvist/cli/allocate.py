"""`kvist allocate`: bits per layer and side, from a profile."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from kvist.cli import files
from kvist.cli.options import command
from kvist.cli.profile import parse_choices
from kvist.cli.show import Printed, table
from kvist.flags import argument, flag
from kvist.units import parse_count, parse_size, size


@dataclass(frozen=True)
class Wanted:
    """From which profile, for which method, and where the allocation goes."""

    profile: Path = argument(..., "What `kvist profile` wrote.")
    out: Path = flag(..., "The JSON file that the allocation is written to.", "-o")
    method: str = flag("kvmix", "The method that will use it; its bytes are counted.", "-m")
    top: str | None = flag(None, "Share of layers that get --high, at least one.  [default: 20%]")
    high: str | None = flag(None, "Bits of the layers that score highest.  [default: k3v4]")
    low: str | None = flag(None, "Bits of the others.  [default: k2v2]")
    score: Literal["gradient-norm", "loss-change"] | None = flag(
        None, "gradient-norm (as published) or loss-change.  [default: the first; of a budget, the second]"
    )
    reference: bool = flag(False, "Layers and windows as the published code has them.", "--reference/--no-reference")
    choices: tuple[int, ...] = flag(
        (), "Widths to choose from.  [default: those profiled, without 1 bit]", parse=parse_choices
    )
    solver: str | None = flag(None, "exact (knapsack) or greedy.  [default: exact]")
    plot: Path | None = flag(None, "Also draw bits and scores to this PNG file.")


@dataclass(frozen=True)
class Bound:
    """What the cache may take, and of how many tokens."""

    budget: float | None = flag(None, "Stored bits per element, everything counted.")
    cache_memory: str | None = flag(None, "The size that the cache may have, such as 10GiB.")
    context: int = flag("32K", "Tokens per row that bytes are counted for.", parse=parse_count)
    batch: int = flag(1, "Rows that bytes are counted for.", least=1)

    @property
    def given(self) -> bool:
        return self.budget is not None or self.cache_memory is not None


@command
def allocate(wanted: Wanted, bound: Bound, printed: Printed) -> None:
    """Choose bits for the keys and values of each layer: by rank (--top), or as a budget of stored bytes allows.

    Examples: kvist allocate profile.json --top 20% --high k3v4 --low k2v2 --out alloc.json;
    kvist allocate profile.json --budget 3.5 --method kivi --out alloc.json;
    kvist allocate profile.json --cache-memory 10GiB --context 128K --batch 1 --out alloc.json
    """
    method, out, plot, score = wanted.method, wanted.out, wanted.plot, wanted.score
    files.check_plot(plot)
    files.check_json(out)
    _consistent(wanted, bound)

    from kvist.calibrate.budget import elements, nbytes
    from kvist.calibrate.profile import Profile
    from kvist.methods import parse

    found, length, batch = Profile.load(wanted.profile), bound.context, bound.batch
    made = _solved(found, wanted, bound) if bound.given else _ranked(found, wanted)
    recipe = parse(method, allocation=made)  # before the file is there: not every method has all widths
    made.save(out)
    taken = nbytes(recipe, found.model, length, batch)
    bits = 8 * taken / elements(found.model, length, batch)
    if plot:
        from kvist.calibrate.draw import draw

        draw(found, plot, made)
    used = "loss-change" if bound.given else score or "gradient-norm"
    unstable = [sentence for sentence in found.unstable if f"by {used}" in sentence]
    facts = {"method": method, "context": length, "batch": batch, "nbytes": taken, "bits_per_element": bits}
    data = {"allocation": str(out)} | made.model_dump(mode="json") | facts | {"unstable": unstable}
    printed.warn(*unstable)
    took = f"{bits:.2f} stored bits per element, {size(taken)} for {batch} × {length} tokens of a 16-bit model"
    printed.say(data, _table(found, made), took, f"use it by --method '{method}' --allocation {out}")


def _consistent(wanted: Wanted, bound: Bound) -> None:
    """Refuse options that contradict each other, or would say nothing."""
    ways = (wanted.top, wanted.reference or None, bound.budget, bound.cache_memory)
    if sum(each is not None for each in ways) > 1:
        raise ValueError("give one of --top, --reference, --budget and --cache-memory")
    idle = ("high", "low") if bound.given else ("choices", "solver")
    if useless := [f"--{name}" for name in idle if getattr(wanted, name) not in (None, ())]:
        without = "--budget or --cache-memory, which weigh all widths" if bound.given else "--top, which ranks layers"
        raise ValueError(f"{' and '.join(useless)} would say nothing with {without}; leave it out")
    if bound.given and wanted.score == "gradient-norm":
        raise ValueError("gradient norms do not say what a bit buys; a budget needs --score loss-change")


def _ranked(found, wanted: Wanted):
    """By rank of a score."""
    from kvist.allocation import rules
    from kvist.calibrate.budget import ranked

    share = rules.parse_share("20%" if wanted.top is None else wanted.top)
    high = rules.parse_widths("k3v4" if wanted.high is None else wanted.high)
    low = rules.parse_widths("k2v2" if wanted.low is None else wanted.low)
    return ranked(found, wanted.score or "gradient-norm", share, high, low, wanted.method, wanted.reference)


def _solved(found, wanted: Wanted, bound: Bound):
    """As stored bytes allow. ValueError with the nearest that is possible where nothing fits."""
    from kvist.calibrate.budget import Impossible, changes_of, solved

    limit, choices = _limit(found, bound), wanted.choices
    try:
        solver = wanted.solver or "exact"
        return solved(found, wanted.method, limit, bound.context, bound.batch, choices, solver)
    except Impossible as error:
        tried = changes_of(found, wanted.method).choices
        narrower = "" if choices or 1 not in tried else f", or allow 1 bit by --choices {','.join(map(str, tried))}"
        raise ValueError(_impossible(found, bound, error.least) + narrower) from None


def _limit(found, bound: Bound) -> int:
    """Bytes."""
    from kvist.calibrate.budget import elements

    if bound.cache_memory is not None:
        return parse_size(bound.cache_memory)
    assert bound.budget is not None
    if not 0 < bound.budget <= 32:
        raise ValueError(f"--budget is in stored bits per element, such as 2.5, found {bound.budget}")
    return int(bound.budget * elements(found.model, bound.context, bound.batch) / 8)


def _impossible(found, bound: Bound, least: int) -> str:
    """The nearest that is possible, in the unit that was asked for, rounded up."""
    from math import ceil

    from kvist.calibrate.budget import elements

    where, memory = f"{bound.batch} × {bound.context} tokens", bound.cache_memory
    if memory is not None:
        nearest = ceil(least / 2**20)
        return f"--cache-memory {memory} holds no cache of {where}: the least is {nearest}MiB; give that or more"
    nearest = ceil(800 * least / elements(found.model, bound.context, bound.batch)) / 100
    return f"--budget {bound.budget} is impossible: at {where} the least is {nearest} stored bits; give that or more"


def _table(found, made):
    columns = ("layer", "key bits", "value bits", "|dL/dWk|", "|dL/dWv|")
    shown = table(f"{found.model.name}: {made.note}", *columns)
    for layer, (k, v) in enumerate(zip(made.k, made.v, strict=True)):
        shown.add_row(str(layer), str(k), str(v), *(f"{found.norms(side)[layer]:.3g}" for side in ("k", "v")))
    mean = [f"{sum(bits) / len(bits):.2f}" for bits in (made.k, made.v)]
    shown.add_row("mean", *mean, "", "")
    return shown
