"""`kvist eval`: how good methods are, measured the same way, with what they store."""

from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal

from kvist.cli import files
from kvist.cli.options import MODEL, Where, command
from kvist.cli.show import Bars, Printed, table
from kvist.evaluate.settings import Settings
from kvist.flags import argument, flag

FILE = "results.jsonl"


@dataclass(frozen=True)
class Asked:
    """What is measured, and what is kept of it."""

    model: str | None = argument(None, f"{MODEL} Or bundled: the one that comes with kvist.")
    method: tuple[str, ...] = flag(
        ("kivi:2",),
        "A method, a recipe's JSON file, or quanto:BITS, hqq:BITS (transformers' QuantizedCache); repeatable.",
        "-m",
    )
    tasks: str = flag("fidelity", "Names with commas between, with options of their own: 'needle depths=3,ppl'.", "-t")
    list_tasks: bool = flag(False, "Print the tasks with their options.")
    parts: str = flag("both", "both, keys, values: which sides are coded; several with commas.")
    stress: Literal["none", "mild", "strong"] = flag(
        "none", "Outliers planted in the model first: none, mild or strong."
    )
    floor: bool = flag(True, "Measure the noise floor beside fidelity: other precision, batch 1.")
    limit: int | None = flag(None, "At most so many items of each task.", least=1)
    out: Path | None = flag(None, f"A folder; rows go to {FILE} in it, and a later run goes on.", "-o")
    plot: Path | None = flag(None, "A PNG file for maps of right answers, length by depth.")
    rescore: Path | None = flag(None, "Score the stored predictions of this folder again, and leave.")


@command
def evaluate(asked: Asked, settings: Settings, where: Where, printed: Printed) -> None:
    """Measure quality: divergence, perplexity, drift while decoding, recall, GSM8K, LongBench, lm-eval's tasks.

    Every number has a 95 % bootstrap interval; differences are to the first method, over the same items. `kvist report`
    draws what --out holds. Examples: kvist eval bundled -m kivi:2 -m int4 --tasks fidelity,needle --data book.txt;
    kvist eval ./my-model -m 'kvquant artifact=DIR' -t ppl --lengths 8K,32K --out results
    """
    if asked.list_tasks:
        return _tasks()
    if asked.rescore:
        return _rescore(asked.rescore, printed)
    if asked.model is None:
        raise ValueError("expected a model's folder, its name on the Hugging Face Hub, or 'bundled', found none")
    files.check_plot(asked.plot)

    from kvist.evaluate import suite
    from kvist.evaluate.contenders import contender, parted
    from kvist.evaluate.results import Results
    from kvist.evaluate.task import Subject, run, spread

    named = list(dict.fromkeys(["exact", *asked.method]))
    contenders = parted([contender(text, _recipes(asked.model)) for text in named], asked.parts.split(","))
    wanted, seed, found = suite.asked(asked.tasks, vars(settings)), settings.seed, []
    if asked.plot and not any(each.kind.rescored and "depths" in vars(each.options) for each in wanted):
        raise ValueError("--plot draws answers by length and depth; ask for needle, passkey or a task like them")
    results = Results(files.folder(asked.out) / FILE if asked.out else None)
    texts = suite.documents(wanted)
    model, tokenizer = _loaded(asked.model, where, asked.stress, seed)
    subject, made = Subject.of(model, asked.stress, seed), suite.tasks(wanted, texts, model, tokenizer)
    with Bars() as bars:
        for task in made:
            some = contenders + (suite.floors(task, model) if asked.floor else [])
            cells = run(task, subject, some, results, spread(task, asked.limit), bars.show)
            found.append((task, cells))
    if asked.plot:
        _draw(found, asked.plot)
    first = named[min(1, len(named) - 1)]
    told = [
        {"task": t.name, "settings": t.settings, "results": suite.summary(cells, first, seed)} for t, cells in found
    ]
    about = {"model": asked.model, "measured": subject.name, "stress": asked.stress, "first": first}
    printed.say(about | {"tasks": told}, *(_table(one, asked, first) for one in told))


def _draw(found, path: Path) -> None:
    """Maps of right answers, of every task that has them."""
    from kvist.report.canvas import png
    from kvist.report.plots import maps

    every = [(task.name, cell) for task, cells in found for cell in cells if "length" in cell.values]
    panels = [(f"{name}, {c.method}, {c.bits:.2f} bits", c.method, c.values) for name, c in every]
    png(maps(panels, across=4), path)


def _tasks() -> None:
    from dataclasses import fields

    from kvist.evaluate.registry import kinds

    for kind in kinds().values():
        print(f"{kind.title:<20}{kind.words}")
        print(f"{'':<20}  {', '.join(each.name.replace('_', '-') for each in fields(kind.options))}")


def _rescore(folder: Path, printed: Printed) -> None:
    """Scores of stored predictions by the present rules, in place."""
    from kvist.evaluate.suite import rescore

    changed = rescore(folder / FILE)
    told = f"{changed.rows} rows with predictions, {changed.changed} of {changed.items} scores changed"
    printed.say(changed._asdict(), told)


def _recipes(model: str):
    """What makes recipes of texts: for the demo's models, the artefacts that come with them do for kvquant."""
    from kvist.demo.model import fitted, recipe
    from kvist.methods import parse

    return partial(recipe, name=model) if fitted(model) else parse


def _loaded(model: str, where: Where, stress: str, seed: int):
    """The model and its tokenizer; outliers are planted in fp32 and rounded afterwards."""
    from kvist.cli.models import load, precision, read_config
    from kvist.demo.model import BUNDLED, bundled

    name = str(bundled()) if model == BUNDLED else model
    if stress == "none":
        return load(name, where.device, where.dtype)
    from kvist.models.inject import inject, rounded

    kind = precision(where.dtype)
    kind = (read_config(name).dtype or precision("float32")) if kind == "auto" else kind
    loaded, tokenizer = load(name, where.device, "float32")
    return rounded(inject(loaded, stress, seed), kind), tokenizer  # pyright: ignore[reportArgumentType]


def _table(one: dict, asked: Asked, first: str):
    """A row per contender, a column per statistic: the first, and differences, with their intervals."""
    rows, settings = one["results"], one["settings"]
    columns = [name for name in rows[0] if isinstance(rows[0][name], dict | float) and name != "bits"]
    planted = "" if asked.stress == "none" else f", {asked.stress} outliers planted"
    about = ", ".join(f"{name} {value}" for name, value in settings.items() if value not in (None, [], ""))
    made = table(
        f"{one['task']}: {asked.model}{planted}, {rows[0]['items']} items",
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
