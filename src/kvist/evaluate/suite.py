"""Tasks by name: from words and options to what is measured, and what that comes to.

A task is written as a method is: its name, then options of its own: `needle depths=3 lengths=1K,2K`. Options that are
said for all tasks go to those that have them.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple, get_origin

from pydantic import TypeAdapter, ValidationError

from kvist import text
from kvist.atomic import replacing
from kvist.evaluate import contenders
from kvist.evaluate.contenders import Contender
from kvist.evaluate.registry import Kind, Source, kind_of, kinds
from kvist.evaluate.results import Cell, Results, Row
from kvist.evaluate.settings import FromText
from kvist.evaluate.statistics import Estimate, difference
from kvist.evaluate.task import Task
from kvist.evaluate.windows import SEQLEN
from kvist.units import parse_counts


@dataclass(frozen=True)
class Asked:
    """A task by name, what stands behind a colon in it, and its options, checked."""

    kind: Kind
    of: str
    options: Any


class Change(NamedTuple):
    """What rescoring did: rows and items it looked at, and scores that changed."""

    rows: int
    items: int
    changed: int


def asked(words: str, given: Mapping[str, Any]) -> list[Asked]:
    """Tasks from words with commas between. What follows a comma and names no task belongs to the one before it: it
    goes on with a list (`lengths=1K,2K`), or names another of lm-eval's. given: options for all of them; None: not
    given. ValueError for a name that nobody knows, and for an option that a task has not."""
    known, found = kinds(), list[str]()
    for word in filter(None, map(str.strip, words.split(","))):
        head = word.split()[0]
        if head.partition(":")[0] not in known and found and any(mark in found[-1] for mark in ":="):
            found[-1] += f",{word}"
        else:
            found.append(word)
    titles = ", ".join(kind.title for kind in known.values())
    if not found:
        raise ValueError(f"expected names of tasks, found none; there are {titles}")
    made = []
    for one in dict.fromkeys(found):
        head, *own = one.split()
        name, _, of = head.partition(":")
        kind = known.get(name)
        if kind is None or head == kind.title != kind.name or (of and not kind.suffix) or (not of and not kind.bare):
            raise ValueError(f"no task is called {head!r}; there are {titles}")
        made.append(Asked(kind, of, _options(kind, own, given)))
    return made


def documents(wanted: Sequence[Asked]) -> list[list[str]]:
    """The text that each task needs, empty for none. ValueError, before a model is loaded, for one that is missing."""
    return [_texts(o.data, o.data_dir, o.split) if isinstance(o := each.options, FromText) else [] for each in wanted]


def tasks(wanted: Sequence[Asked], texts: Sequence[Sequence[str]], model, tokenizer) -> list[Task]:
    """The tasks that were asked for, on their texts, for a model. ValueError for lengths that the model does not know,
    or data that are not there or too short."""
    config = model.config.get_text_config(decoder=True)
    longest = getattr(config, "max_position_embeddings", None) or SEQLEN
    made: list[Task] = []
    for each, own in zip(wanted, texts, strict=True):
        for length in (getattr(each.options, "seqlen", 0), *getattr(each.options, "lengths", ())):
            if length > longest:
                raise ValueError(
                    f"the model knows {longest} positions, found a length of {length}; give {longest} or less"
                )
        made += each.kind.make(each.options, Source(tokenizer, longest, own, each.of))
    return made


def floors(task: Task, model) -> list[Contender]:
    """Contenders that quantize nothing, where a task is measured with them."""
    stored = kind_of(task.name).floors and task.settings.get("mode") == "stored"
    return contenders.floors(model.dtype) if stored else []


def summary(cells: Sequence[Cell], first: str, seed: int = 0) -> list[dict]:
    """Per cell of one task, over the items that all of them have: method, part, bits, and each statistic as value, low
    and high; `…_difference` is the paired difference from the cell of the method named `first`, with both sides coded
    where that was measured.
    Raises ValueError where there is no such item, or no such cell."""
    common = set.intersection(*(set(cell.items) for cell in cells))
    if not common:
        raise ValueError("no item was measured with every method")
    named = [cell for cell in cells if cell.method == first]
    if not named:
        raise ValueError(f"differences are to {first!r}, which was not measured")
    base = next((cell for cell in named if cell.first.part == "both"), named[0]).among(common)
    kind, lines = kind_of(base), []
    for cell in (cell.among(common) for cell in cells):
        line: dict[str, Any] = {"method": cell.method, "part": cell.first.part, "bits": cell.bits}
        line["items"] = len(cell.items)
        for name, made in kind.tell(cell, seed).items():
            line[name] = made._asdict() if isinstance(made, Estimate) else made
        for name, numbers in kind.numbers(cell).items():
            line[f"{name}_difference"] = difference(numbers, kind.numbers(base)[name], seed)._asdict()
        lines.append(line)
    return lines


def rescore(path: Path) -> Change:
    """Score the predictions of a results file again by the present rules, in place, whole or not at all. ValueError
    where there are none."""
    if not path.is_file():
        raise ValueError(
            f"expected {path.name} in {path.parent}, found none; `kvist eval --out {path.parent}` makes one"
        )
    before = [row for rows in Results(path).rows.values() for row in rows]
    after = [_again(row) for row in before]
    looked = [(a, b) for a, b in zip(before, after, strict=True) if a is not b]
    if not looked:
        raise ValueError(f"no row of {path} holds predictions; tasks that write answers do")
    with replacing(path) as scratch:
        scratch.write_text("".join(row.line for row in after))
    changed = [x != y for a, b in looked for x, y in zip(a.values["score"], b.values["score"], strict=True)]
    return Change(len(looked), len(changed), sum(changed))


def _again(row: Row) -> Row:
    again = kind_of(row.task).rescored if {"prediction", "expected"} <= row.values.keys() else None
    return row.model_copy(update={"values": again(row.settings, row.values)}) if again else row


@lru_cache(maxsize=8)
def _texts(data: str, data_dir: Path | None, split: str) -> list[str]:
    return text.texts(data, data_dir, split)


def _options(kind: Kind, own: Sequence[str], given: Mapping[str, Any]) -> Any:
    """A task's options from its own words, and from those given for all tasks that it has."""
    known = {each.name: each for each in fields(kind.options)}
    values = {name: value for name, value in given.items() if name in known and value is not None}
    for word in own:
        name, equals, value = word.partition("=")
        name = name.replace("-", "_")
        if not equals or name not in known:
            raise ValueError(f"{kind.name} has no option {word!r}; it has: {', '.join(known) or 'none'}")
        each = known[name]
        flag = each.metadata.get("flag")
        parse = flag.parse if flag else parse_counts if get_origin(each.type) is tuple else None
        values[name] = parse(value) if parse else value
    try:
        return TypeAdapter(kind.options).validate_python(values)
    except ValidationError as error:
        first = error.errors()[0]
        expected = first.get("ctx", {}).get("expected") or first["msg"][:1].lower() + first["msg"][1:]
        raise ValueError(f"--{first['loc'][0]} is {expected}, found {first['input']!r}") from None
