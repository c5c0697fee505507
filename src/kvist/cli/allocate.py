"""`kvist allocate`: bits per layer and side, from a profile."""

from pathlib import Path
from typing import Annotated

import typer

from kvist.cli.show import Json, check_plot, console, dump, parse_choices, put, table
from kvist.units import parse_count, parse_size, size


def allocate(
    profile: Annotated[Path, typer.Argument(help="What `kvist profile` wrote.")],
    out: Annotated[Path, typer.Option("--out", "-o", help="The JSON file that the allocation is written to.")],
    method: Annotated[
        str, typer.Option("--method", "-m", help="The method that will use it; its bytes are counted.")
    ] = "kvmix",
    top: Annotated[
        str | None, typer.Option(help="Share of layers that get --high, at least one.  [default: 20%]")
    ] = None,
    high: Annotated[str | None, typer.Option(help="Bits of the layers that score highest.  [default: k3v4]")] = None,
    low: Annotated[str | None, typer.Option(help="Bits of the others.  [default: k2v2]")] = None,
    score: Annotated[
        str | None,
        typer.Option(
            help="gradient-norm (as published) or loss-change.  [default: the first; of a budget, the second]"
        ),
    ] = None,
    reference: Annotated[bool, typer.Option(help="Layers and windows as the published code has them.")] = False,
    budget: Annotated[float | None, typer.Option(help="Stored bits per element, everything counted.")] = None,
    cache_memory: Annotated[str | None, typer.Option(help="The size that the cache may have, such as 10GiB.")] = None,
    context: Annotated[str, typer.Option(help="Tokens per row that bytes are counted for.")] = "32K",
    batch: Annotated[int, typer.Option(min=1, help="Rows that bytes are counted for.")] = 1,
    choices: Annotated[
        str | None, typer.Option(help="Widths to choose from.  [default: those profiled, without 1 bit]")
    ] = None,
    solver: Annotated[str | None, typer.Option(help="exact (knapsack) or greedy.  [default: exact]")] = None,
    plot: Annotated[Path | None, typer.Option(help="Also draw bits and scores to this PNG file.")] = None,
    json: Json = False,
) -> None:
    """Choose bits for the keys and values of each layer: by rank (--top), or as a budget of stored bytes allows.

    Examples: kvist allocate profile.json --top 20% --high k3v4 --low k2v2 --out alloc.json;
    kvist allocate profile.json --budget 3.5 --method kivi --out alloc.json;
    kvist allocate profile.json --cache-memory 10GiB --context 128K --batch 1 --out alloc.json
    """
    check_plot(plot)
    if not out.parent.is_dir() or out.is_dir():
        raise ValueError(f"--out is a JSON file in a folder that is there, found {out}")
    if sum((top is not None, reference, budget is not None, cache_memory is not None)) > 1:
        raise ValueError("give one of --top, --reference, --budget and --cache-memory")
    bound = budget is not None or cache_memory is not None
    idle = {"--high": high, "--low": low} if bound else {"--choices": choices, "--solver": solver}
    if useless := [option for option, value in idle.items() if value is not None]:
        without = "--budget or --cache-memory, which weigh all widths" if bound else "--top, which ranks layers"
        raise ValueError(f"{' and '.join(useless)} would say nothing with {without}; leave it out")
    if score not in (None, "gradient-norm", "loss-change"):
        raise ValueError(f"--score is gradient-norm or loss-change, found {score!r}")
    if bound and score == "gradient-norm":
        raise ValueError("gradient norms do not say what a bit buys; a budget needs --score loss-change")

    from kvist.allocation import rules
    from kvist.calibrate import budget as bytes_
    from kvist.calibrate.profile import Profile
    from kvist.methods import parse

    found, length = Profile.load(profile), parse_count(context)
    if bound:
        limit = _limit(found, budget, cache_memory, length, batch)
        try:
            made = bytes_.solved(found, method, limit, length, batch, parse_choices(choices), solver or "exact")
        except bytes_.Impossible as error:
            tried = bytes_.changes_of(found, method).choices
            narrower = "" if choices or 1 not in tried else f", or allow 1 bit by --choices {','.join(map(str, tried))}"
            nearest = _impossible(found, budget, cache_memory, error.least, length, batch)
            raise ValueError(nearest + narrower) from None
    else:
        share = rules.parse_share("20%" if top is None else top)
        pair = rules.parse_widths("k3v4" if high is None else high), rules.parse_widths("k2v2" if low is None else low)
        made = bytes_.ranked(found, score or "gradient-norm", share, *pair, method, reference)
    recipe = parse(method, allocation=made)  # before the file is there: not every method has all widths
    made.save(out)
    nbytes = bytes_.nbytes(recipe, found.model, length, batch)
    bits = 8 * nbytes / bytes_.elements(found.model, length, batch)
    if plot:
        from kvist.calibrate.draw import draw

        draw(found, plot, made)
    used = "loss-change" if bound else score or "gradient-norm"
    unstable = [sentence for sentence in found.unstable if f"by {used}" in sentence]
    if json:
        facts = {"method": method, "context": length, "batch": batch, "nbytes": nbytes, "bits_per_element": bits}
        facts["unstable"] = unstable
        return dump({"allocation": str(out)} | made.model_dump(mode="json") | facts)
    put(_table(found, made, method))
    for sentence in unstable:
        console(stderr=True).print(sentence)
    print(f"{bits:.2f} stored bits per element, {size(nbytes)} for {batch} × {length} tokens of a 16-bit model")
    print(f"use it by --method '{method}' --allocation {out}")
    return None


def _limit(found, budget: float | None, cache_memory: str | None, length: int, batch: int) -> int:
    from kvist.calibrate.budget import elements

    if cache_memory is not None:
        return parse_size(cache_memory)
    assert budget is not None
    if not 0 < budget <= 32:
        raise ValueError(f"--budget is in stored bits per element, such as 2.5, found {budget}")
    return int(budget * elements(found.model, length, batch) / 8)


def _impossible(found, budget: float | None, cache_memory: str | None, least: int, length: int, batch: int) -> str:
    """The nearest that is possible, in the unit that was asked for, rounded up."""
    from math import ceil

    from kvist.calibrate.budget import elements

    where = f"{batch} × {length} tokens"
    if cache_memory is not None:
        nearest = ceil(least / 2**20)
        return f"--cache-memory {cache_memory} holds no cache of {where}: the least is {nearest}MiB; give that or more"
    nearest = ceil(800 * least / elements(found.model, length, batch)) / 100
    return f"--budget {budget} is impossible: at {where} the least is {nearest} stored bits; give that or more"


def _table(found, made, method: str):
    columns = ("layer", "key bits", "value bits", "|dL/dWk|", "|dL/dWv|")
    shown = table(f"{found.model.name}: {made.note}", *columns)
    for layer, (k, v) in enumerate(zip(made.k, made.v, strict=True)):
        shown.add_row(str(layer), str(k), str(v), *(f"{found.norms(side)[layer]:.3g}" for side in ("k", "v")))
    mean = [f"{sum(bits) / len(bits):.2f}" for bits in (made.k, made.v)]
    shown.add_row("mean", *mean, "", "")
    return shown
