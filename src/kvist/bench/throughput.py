"""`kvist bench throughput`: whole generations at batch sizes that double until memory ends, against transformers' own
caches. Generated tokens/s, time to the first token, bytes of the cache, and the most bytes that a run held."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from rich.console import Console

from kvist.bench import memory, shapes
from kvist.bench.generation import Lengths, Racer, contenders, measure
from kvist.bench.presets import Preset, compare, differences
from kvist.bench.reports import Throughput
from kvist.bench.table import machine, show
from kvist.plan import Recipe

SHARE = 0.8  # of what is free, unless --memory says more or less
MIB, GIB = 2**20, 2**30
SPEEDS = ("tokens/s", "decode tokens/s", "prefill tokens/s", "first token s")


@dataclass(frozen=True)
class Race:
    """What is run: lengths; batches of 1, 2, 4 … until `most`, or until a run is predicted to hold more than `limit`
    bytes beyond the weights (None: 80 % of what is free); measured rounds of each, and the seed of the prompts."""

    lengths: Lengths
    limit: int | None = None
    most: int | None = None
    rounds: int = 1
    seed: int = 0


def run(
    model,
    methods: dict[str, Recipe],
    name: str,
    race: Race,
    preset: Preset | None = None,
    out: str | Path | None = None,
    as_json: bool = False,
    plot: str | Path | None = None,
) -> dict:
    """A race of `methods` and transformers' own caches on a model. Printed, drawn, and kept in `out` after every run.

    Raises ValueError where no contender can run, or the model has fewer positions. What fails is a row that says so.
    """
    lengths, free = race.lengths, memory.free(model.device)
    _check(model, name, lengths, race.limit, free)
    limit = int(SHARE * free) if race.limit is None else race.limit
    racers, dtype = contenders(model, methods, lengths), str(model.dtype).removeprefix("torch.")
    chunks = f", prompts in chunks of {lengths.chunk}" if lengths.chunk else ""
    report: dict = {
        "bench": "throughput",
        "title": f"{name}: {lengths.prompt} + {lengths.new} tokens{chunks}, {dtype}, {model.device.type}",
        "machine": machine(),
        "settings": {
            "model": name,
            "layers": model.config.get_text_config(decoder=True).num_hidden_layers,
            "dtype": dtype,
            "device": torch.cuda.get_device_name(model.device) if model.device.type == "cuda" else "cpu",
            "prompt tokens": lengths.prompt,
            "new tokens": lengths.new,
            "prefill chunk": lengths.chunk,
            "rounds": race.rounds,
            "seed": race.seed,
            "memory bytes": limit,
            "largest batch": race.most,
            "weights bytes": shapes.nbytes(model),
            "methods": {name: recipe.model_dump(mode="json") for name, recipe in methods.items()},
        },
        "rows": [],
    }

    def keep(row: dict) -> None:
        report["rows"].append(row)
        _write(report, out)

    try:
        _race(model, racers, replace(race, limit=limit), keep)
    except KeyboardInterrupt:
        report["interrupted"] = True
        raise
    finally:
        report["largest"] = [_largest(racer, limit) for racer in racers]
        if preset:
            claims = compare(preset.claims, report)
            report["published"] = {"claims": claims, "differs": differences(preset, report["settings"])}
        _write(report, out)
    _print(report, as_json)
    if plot:
        from kvist.bench.plot import draw

        draw(report, plot)
    return report


def _check(model, name: str, lengths: Lengths, limit: int | None, free: int) -> None:
    longest = getattr(model.config.get_text_config(decoder=True), "max_position_embeddings", None)
    if longest and lengths.total > longest:
        raise ValueError(
            f"{name} knows {longest} positions, found {lengths.prompt} tokens of prompt and {lengths.new} new ones; "
            f"give {longest} or less in all"
        )
    if limit and limit > free:
        raise ValueError(
            f"--memory is {limit / GIB:.2f} GiB but only {free / GIB:.2f} GiB are free beside the weights; give less, "
            f"or leave it out for {SHARE:.0%} of that"
        )


def _race(model, racers: list[Racer], race: Race, keep: Callable[[dict], None]) -> None:
    """Batch by batch, all racers that still run. `race.limit` is known."""
    assert race.limit is not None
    aside, batch, lengths, limit = Console(stderr=True), 1, race.lengths, race.limit
    while any(racer.running for racer in racers) and batch <= (race.most or batch):
        for racer in (racer for racer in racers if racer.running):
            expected = racer.predict(model, batch, lengths)
            row = {"contender": racer.name, "method": racer.method, "batch": batch, "predicted bytes": expected}
            row["predicted by"] = "arithmetic and peaks" if racer.peaks else "arithmetic alone"
            room = min(limit, memory.free(model.device))
            if expected > room:
                racer.running, racer.ended_by_memory = False, True
                keep(row | {"not run": f"about {expected / GIB:.2f} GiB needed, {room / GIB:.2f} GiB to use"})
                continue
            try:
                with aside.status(f"{racer.name}, batch {batch}: about {expected / GIB:.2f} GiB"):
                    row |= measure(model, racer, batch, lengths, race.rounds, race.seed)
            except Exception as error:
                racer.running = False
                racer.ended_by_memory = isinstance(error, torch.OutOfMemoryError | MemoryError)
                keep(row | {"failed": f"{type(error).__name__}: {error}".splitlines()[0]})
                continue
            racer.largest = batch
            if row["peak bytes"] is not None:
                racer.peaks.append((batch, row["peak bytes"]))
            keep(row)
        if not any(racer.largest or not racer.ended_by_memory for racer in racers):
            least = min(racer.predict(model, 1, lengths) for racer in racers)
            raise ValueError(
                f"{limit / GIB:.3f} GiB of memory are too few for a batch of 1, which needs about "
                f"{least / GIB:.3f} GiB beside the weights; give more --memory, or fewer tokens"
            )
        batch *= 2


def _write(report: dict, out: str | Path | None) -> None:
    if any("tokens/s" in row for row in report["rows"]):
        Throughput.model_validate(report).save(out)


def _largest(racer: Racer, limit: int) -> dict:
    return {
        "contender": racer.name,
        "measured": racer.largest,
        "by the line through the peaks": racer.by_the_line(limit),
        "ended by memory": racer.ended_by_memory,
    }


def _print(report: dict, as_json: bool) -> None:
    if as_json:
        return show(report, as_json)
    rows = []
    for row in report["rows"]:
        shown = {name: row.get(name) for name in ("contender", "batch", *SPEEDS)}
        for kind in ("cache", "peak", "predicted"):
            nbytes = row.get(f"{kind} bytes")
            shown[f"{kind} MiB"] = None if nbytes is None else nbytes / MIB
        if "tokens/s" not in row:
            shown["note"] = "not run: too large" if "not run" in row else f"failed: {row['failed'][:60]}"
        elif row["peak bytes"] is None:
            shown["note"] = "the system tells no peak"
        rows.append(shown)
    show(report | {"rows": rows}, as_json)
    return print("\n".join(sentences(report)))


def sentences(report: dict) -> list[str]:
    """What the table cannot say."""
    settings = report["settings"]
    lines = [
        f"tokens/s: generated, prefill included; decode: after the first token. {settings['rounds']} run(s) after a "
        f"warm-up, greedy, no early stop. Peak: beyond the weights' {settings['weights bytes'] / GIB:.2f} GiB, at most "
        f"{settings['memory bytes'] / GIB:.2f} GiB.",
    ]
    for entry in report["largest"]:
        line, why = entry["by the line through the peaks"], "" if entry["ended by memory"] else ", memory was not full"
        said = f"; about {line} by the line through its measured peaks" if line else ""
        lines.append(f"largest batch of {entry['contender']}: {entry['measured']} measured{why}{said}")
    for claim in report.get("published", {}).get("claims", ()):
        ours = (f"{'not reached' if x is None else f'{x:.2f}x'} ({name})" for name, x in claim["ours"].items())
        lines.append(f"published: {claim['published']}; here: {', '.join(ours)}")
    return [*lines, *([report["published"]["differs"]] if "published" in report else [])]
