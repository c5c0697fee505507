"""What a task is, and how tasks are run: item by item for all contenders, at once on disk, never twice."""

import platform
from collections.abc import Callable, Iterator, Sequence
from itertools import groupby
from typing import Any, NamedTuple, Protocol

import torch
import transformers

from kvist import __version__
from kvist.evaluate.contenders import Contender, check
from kvist.evaluate.results import Cell, Results, Row, cell_of
from kvist.models.adapter import describe, fingerprint

Tick = Callable[[str, int, int], None]


class Measured(NamedTuple):
    """What one contender (its number) did on the items that were asked for: allocated bits per cached number, seconds
    of its forward passes, and per name one value per item."""

    contender: int
    bits: float
    seconds: float
    values: dict[str, list]


class Task(Protocol):
    """name, metric: what it is called, and a number that rises when its numbers change their meaning. settings: all
    that decides its items and how they are measured, as JSON. count: of items. batch: items that go through the model
    together, if they are of one kin. recipes_only: whether a contender must be a recipe."""

    @property
    def name(self) -> str: ...

    @property
    def metric(self) -> int: ...

    @property
    def settings(self) -> dict[str, Any]: ...

    @property
    def count(self) -> int: ...

    @property
    def batch(self) -> int: ...

    @property
    def recipes_only(self) -> bool: ...

    def kin(self, item: int) -> Any:
        """What must be equal for items that go through the model together."""
        ...

    def measure(self, model, contenders: Sequence[Contender], items: Sequence[int]) -> Iterator[Measured]:
        """Each contender on these items, in any order; what is exact is computed once for all of them."""
        ...


class Subject(NamedTuple):
    """The model that is measured: its name and fingerprint, the outliers planted in it, and their seed."""

    model: Any
    name: str
    stress: str = "none"
    seed: int = 0

    @classmethod
    def of(cls, model, stress: str = "none", seed: int = 0) -> "Subject":
        return cls(model, f"{describe(model).identity.name}-{fingerprint(model)[:16]}", stress, seed)


def run(
    task: Task,
    subject: Subject,
    contenders: Sequence[Contender],
    results: Results,
    items: Sequence[int] | None = None,
    tick: Tick = lambda what, done, total: None,
) -> list[Cell]:
    """A cell per contender, in their order, of these items (None: all). What `results` has, by whatever name, is not
    measured again; what it has not is added to it batch by batch. `tick` is told how many of all items are done. Raises
    ValueError, before anything is measured, for a contender that does not suit the model or the task."""
    for contender in contenders:
        if task.recipes_only and contender.recipe is None:
            raise ValueError(f"{task.name} needs a recipe, and {contender.name} is none; leave it to other tasks")
        check(contender, subject.model)
    facts = [_facts(task, subject, contender) for contender in contenders]
    cells = [cell_of(each) for each in facts]
    items = range(task.count) if items is None else items
    missing = [
        () if cell in cells[:i] else tuple(n for n in items if n not in results.done(cell))
        for i, cell in enumerate(cells)
    ]
    total = len(items) * len(contenders)
    done = total - sum(map(len, missing))
    tick(task.name, done, total)
    for wanted in dict.fromkeys(missing):
        group = [i for i, items in enumerate(missing) if items == wanted]
        for some in _batches(task, wanted):
            for found in task.measure(subject.model, [contenders[i] for i in group], some):
                facts_ = facts[group[found.contender]]
                results.add(Row(**facts_, bits=found.bits, items=some, values=found.values, seconds=found.seconds))
                done += len(some)
                tick(task.name, done, total)
    return [Cell(results.rows[cell], each.name, items) for cell, each in zip(cells, contenders, strict=True)]


def spread(task: Task, limit: int | None) -> list[int]:
    """At most `limit` of a task's items, evenly over all of them."""
    count = task.count if limit is None else min(limit, task.count)
    return [i * task.count // count for i in range(count)]


def _batches(task: Task, wanted: Sequence[int]) -> Iterator[tuple[int, ...]]:
    for _, kindred in groupby(wanted, task.kin):
        items = tuple(kindred)
        for start in range(0, len(items), task.batch):
            yield items[start : start + task.batch]


def _facts(task: Task, subject: Subject, contender: Contender) -> dict[str, Any]:
    """All of a row but what is measured."""
    return {
        "task": task.name,
        "metric": task.metric,
        "settings": task.settings,
        "model": subject.name,
        "dtype": str(subject.model.dtype).removeprefix("torch."),
        "device": device(subject.model),
        "stress": subject.stress,
        "method": contender.name,
        "recipe": contender.description,
        "digest": contender.digest,
        "part": contender.part,
        "seed": subject.seed,
        "versions": {"kvist": __version__, "torch": torch.__version__, "transformers": transformers.__version__},
    }


def device(model) -> str:
    """What a model runs on, in words."""
    if model.device.type == "cuda":
        return torch.cuda.get_device_name(model.device)
    return f"{model.device.type} ({platform.machine()}, {torch.get_num_threads()} threads)"
