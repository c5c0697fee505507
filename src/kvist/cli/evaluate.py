"""`kvist eval`: how good methods are, measured the same way, with what they store."""

from functools import partial
from pathlib import Path
from typing import Annotated

import typer

from kvist.cli.show import MODEL, Bars, Json, check_plot, dump, put, table
from kvist.units import parse_count

FILE = "results.jsonl"
STRESS = ("none", "mild", "strong")


def evaluate(
    model: Annotated[
        str | None,
        typer.Argument(help=f"{MODEL} Or bundled: the one that comes with kvist."),
    ] = None,
    method: Annotated[
        list[str] | None,
        typer.Option(
            "--method",
            "-m",
            help="A method, a recipe's JSON file, or quanto:BITS, hqq:BITS (transformers' QuantizedCache); repeatable. "
            "[default: kivi:2]",
        ),
    ] = None,
    tasks: Annotated[
        str,
        typer.Option(
            "--tasks", "-t", help="Names with commas between, with options of their own: 'needle depths=3,ppl'."
        ),
    ] = "fidelity",
    list_tasks: Annotated[bool, typer.Option("--list-tasks", help="Print the tasks with their options.")] = False,
    data: Annotated[str, typer.Option(help="A text file (also .xz), or wikitext2 or c4.")] = "wikitext2",
    data_dir: Annotated[
        Path | None, typer.Option(help="The folder where names of data are looked up, instead of the hub.")
    ] = None,
    split: Annotated[str, typer.Option(help="test, valid or train: which of a name's texts.")] = "test",
    mode: Annotated[
        str | None,
        typer.Option(
            help="stored: what a living cache holds; simulated: all tokens in one pass, as published.  "
            "[default: stored; lm-eval: simulated]"
        ),
    ] = None,
    windows: Annotated[int, typer.Option("--windows", "-n", min=0, help="The first N windows; 0: all.")] = 16,
    seqlen: Annotated[
        str | None, typer.Option(help="Tokens per window.  [default: 2048, horizon 1500, or the model's most]")
    ] = None,
    prompt: Annotated[
        int | None, typer.Option(min=0, help="Tokens of a window that are read exactly before others are scored.")
    ] = None,
    step: Annotated[
        int | None,
        typer.Option(min=1, help="Tokens per update while decoding; 1 is true decoding.  [default: 32; ppl: whole]"),
    ] = None,
    lengths: Annotated[
        str | None, typer.Option(help="Of contexts, 1K,2K; for ppl, windows of which the last 256 tokens are scored.")
    ] = None,
    depths: Annotated[int, typer.Option(min=1, help="How many depths of a planted fact.")] = 5,
    samples: Annotated[int, typer.Option(min=1, help="Questions per length and depth.")] = 4,
    limit: Annotated[int | None, typer.Option(min=1, help="At most so many items of each task.")] = None,
    parts: Annotated[
        str, typer.Option(help="both, keys, values: which sides are coded; several with commas.")
    ] = "both",
    stress: Annotated[str, typer.Option(help="Outliers planted in the model first: none, mild or strong.")] = "none",
    prefill: Annotated[
        str, typer.Option(help="Of questions' contexts: exact, as published; stored, read from what is stored.")
    ] = "exact",
    chunk: Annotated[int, typer.Option(min=1, help="A longer prompt is read in chunks of so many tokens.")] = 8192,
    batch: Annotated[int, typer.Option(min=1, help="Items that go through the model together.")] = 8,
    floor: Annotated[
        bool, typer.Option(help="Measure the noise floor beside fidelity: other precision, batch 1.")
    ] = True,
    shots: Annotated[
        int | None, typer.Option(min=0, help="Examples before a question.  [default: gsm8k 5; lm-eval: the task's]")
    ] = None,
    chat: Annotated[bool, typer.Option("--chat", help="Questions go through the model's chat template.")] = False,
    tasks_dir: Annotated[Path | None, typer.Option(help="A folder with definitions for lm-eval of your own.")] = None,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1 …")] = "auto",
    dtype: Annotated[
        str, typer.Option(help="auto (as saved; CPUs: what is fast), float32, float16 or bfloat16.")
    ] = "auto",
    seed: Annotated[int, typer.Option(help="Of questions, planted outliers and intervals.")] = 0,
    out: Annotated[
        Path | None, typer.Option("--out", "-o", help=f"A folder; rows go to {FILE} in it, and a later run goes on.")
    ] = None,
    plot: Annotated[Path | None, typer.Option(help="A PNG file for maps of right answers, length by depth.")] = None,
    rescore: Annotated[
        Path | None, typer.Option(help="Score the stored predictions of this folder again, and leave.")
    ] = None,
    json: Json = False,
) -> None:
    """Measure quality: divergence, perplexity, drift while decoding, recall, GSM8K, LongBench, lm-eval's tasks.

    Every number has a 95 % bootstrap interval; differences are to the first method, over the same items. `kvist report`
    draws what --out holds. Examples: kvist eval bundled -m kivi:2 -m int4 --tasks fidelity,needle --data book.txt;
    kvist eval ./my-model -m 'kvquant artifact=DIR' -t ppl --lengths 8K,32K --out results
    """
    if list_tasks:
        return _tasks()
    if rescore:
        return _rescore(rescore, json)
    if model is None:
        raise ValueError("expected a model's folder, its name on the Hugging Face Hub, or 'bundled', found none")
    if stress not in STRESS:
        raise ValueError(f"--stress is {', '.join(STRESS)}, found {stress!r}")
    for name, value, choices in (("mode", mode, ("stored", "simulated")), ("prefill", prefill, ("exact", "stored"))):
        if value not in (None, *choices):
            raise ValueError(f"--{name} is {' or '.join(choices)}, found {value!r}")
    check_plot(plot)

    from kvist.evaluate import suite
    from kvist.evaluate.contenders import contender, parted

    named = list(dict.fromkeys(["exact", *(method or ["kivi:2"])]))
    contenders = parted([contender(text, _recipes(model)) for text in named], parts.split(","))

    from kvist.evaluate.task import Place, run, spread

    given = {
        "data": data,
        "data_dir": data_dir,
        "split": split,
        "mode": mode,
        "windows": windows,
        "seqlen": parse_count(seqlen) if seqlen else None,
        "prompt": prompt,
        "step": step,
        "lengths": tuple(map(parse_count, lengths.split(","))) if lengths else None,
        "depths": depths,
        "samples": samples,
        "prefill": prefill,
        "chunk": chunk,
        "batch": batch,
        "shots": shots,
        "chat": chat,
        "tasks_dir": tasks_dir,
        "seed": seed,
    }
    wanted = suite.asked(tasks, given)
    if plot and not any(each.kind.rescored and "depths" in vars(each.options) for each in wanted):
        raise ValueError("--plot draws answers by length and depth; ask for needle, passkey or a task like them")
    results = _results(out)
    texts = suite.documents(wanted)
    loaded, tokenizer = _loaded(model, device, dtype, stress, seed)
    place, found = Place.of(loaded, stress, seed), []
    made = suite.tasks(wanted, texts, loaded, tokenizer)
    with Bars() as bars:
        for task in made:
            some = contenders + (suite.floors(task, loaded) if floor else [])
            cells = run(task, place, some, results, spread(task, limit), bars.show)
            found.append((task, cells))
    if plot:
        from kvist.report.canvas import png
        from kvist.report.plots import maps

        every = [(task.name, cell) for task, cells in found for cell in cells if "length" in cell.values]
        panels = [(f"{name}, {c.method}, {c.bits:.2f} bits", c.method, c.values) for name, c in every]
        png(maps(panels, across=4), plot)
    first = named[min(1, len(named) - 1)]
    told = [
        {"task": task.name, "settings": task.settings, "results": suite.summary(cells, first, seed)}
        for task, cells in found
    ]
    if json:
        return dump({"model": model, "measured": place.name, "stress": stress, "first": first, "tasks": told})
    for one in told:
        put(_table(one, model, stress, first))
    return None


def _tasks() -> None:
    from dataclasses import fields

    from kvist.evaluate.registry import kinds

    for kind in kinds().values():
        print(f"{kind.title:<20}{kind.words}")
        print(f"{'':<20}  {', '.join(each.name.replace('_', '-') for each in fields(kind.options))}")


def _rescore(folder: Path, json: bool) -> None:
    """Scores of stored predictions by the present rules, in place."""
    from kvist.evaluate.suite import rescore

    changed = rescore(folder / FILE)
    if json:
        return dump(changed._asdict())
    print(f"{changed.rows} rows with predictions, {changed.changed} of {changed.items} scores changed")
    return None


def _recipes(model: str):
    """What makes recipes of texts: for the demo's models, the artefacts that come with them do for kvquant."""
    from kvist.demo.model import fitted, recipe
    from kvist.methods import parse

    return partial(recipe, name=model) if fitted(model) else parse


def _results(out: Path | None):
    from kvist.evaluate.results import Results

    if out is None:
        return Results()
    if out.exists() and not out.is_dir():
        raise ValueError(f"--out is a folder, found a file at {out}")
    if not out.parent.is_dir():
        raise ValueError(f"expected a folder to make {out.name} in, found none at {out.parent}")
    out.mkdir(exist_ok=True)
    return Results(out / FILE)


def _loaded(model: str, device: str, dtype: str, stress: str, seed: int):
    """The model and its tokenizer; outliers are planted in fp32 and rounded afterwards."""
    from kvist.cli.models import load, precision, read_config
    from kvist.demo.model import BUNDLED, bundled

    name = str(bundled()) if model == BUNDLED else model
    if stress == "none":
        return load(name, device, dtype)
    from kvist.models.inject import inject, rounded

    kind = precision(dtype)
    kind = (read_config(name).dtype or precision("float32")) if kind == "auto" else kind
    loaded, tokenizer = load(name, device, "float32")
    return rounded(inject(loaded, stress, seed), kind), tokenizer  # pyright: ignore[reportArgumentType]


def _table(one: dict, model: str, stress: str, first: str):
    """A row per contender, a column per statistic: the first, and differences, with their intervals."""
    rows, settings = one["results"], one["settings"]
    columns = [name for name in rows[0] if isinstance(rows[0][name], dict | float) and name != "bits"]
    planted = "" if stress == "none" else f", {stress} outliers planted"
    about = ", ".join(f"{name} {value}" for name, value in settings.items() if value not in (None, [], ""))
    made = table(
        f"{one['task']}: {model}{planted}, {rows[0]['items']} items",
        *("method", "bits", *(name.replace("_", " ") for name in columns)),
        caption=f"{about}. [95 %]: bootstrap over items, of all numbers in --json; differences: paired, to {first}; "
        "bits: allocated per cached number.",
    )
    for row in rows:
        name = row["method"] if row["part"] == "both" else f"{row['method']}, {row['part']} only"
        cells = [_said(row.get(column), i == 0 or "difference" in column) for i, column in enumerate(columns)]
        made.add_row(name, f"{row['bits']:.2f}", *cells)
    return made


def _said(value, interval: bool) -> str:
    from kvist.evaluate.statistics import Estimate

    if isinstance(value, dict) and interval:
        return str(Estimate(**value))
    value = value["value"] if isinstance(value, dict) else value
    return "" if value is None else f"{value:.3g}"
