"""Tasks by name. A task's file registers it with all that others need to know; nothing else is edited.

Third parties add a task by the entry-point group `kvist.tasks`: a module that uses `@task`.
"""

import importlib
import pkgutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, make_dataclass
from functools import cache
from importlib.metadata import entry_points
from typing import Any, NamedTuple

from kvist.evaluate import tasks
from kvist.evaluate.measures import COMMON, KL, LIKELIHOOD, SCORE, Compared, Figure, Section, Statistic
from kvist.evaluate.results import Cell
from kvist.evaluate.statistics import Estimate
from kvist.evaluate.task import Task

NOTHING = make_dataclass("Options", ())
COMPARED = {"score": SCORE, "kl": KL, "log_perplexity": LIKELIHOOD}  # the telling ones first


class Source(NamedTuple):
    """What a task is made for: a tokenizer; longest: positions that the model knows; documents: the text that its
    options name, where they name one; of: what stands behind a colon in the task's name."""

    tokenizer: Any
    longest: int
    documents: Sequence[str] = ()
    of: str = ""


Maker = Callable[[Any, Source], Sequence[Task]]


@dataclass(frozen=True)
class Kind:
    """A registered task.

    words: a line for `--list-tasks`. make: tasks of its options and a source. options: a dataclass, every field with a
    default; one that inherits `FromText` is given that text. statistics, beside the mean score and KL, and `compared`:
    what is told of its values, the telling ones first. section, figures: of the report. rescored: values with scores of
    their predictions, by the present rules. suffix: what may stand behind a colon in its name, in words; bare: whether
    it may be left out. floors: whether what quantizes nothing is measured beside it.
    """

    name: str
    words: str
    make: Maker
    options: type = NOTHING
    statistics: Mapping[str, Statistic] = field(default_factory=dict)
    compared: Mapping[str, Compared] = field(default_factory=lambda: COMPARED)
    section: Section | None = None
    figures: tuple[Figure, ...] = ()
    rescored: Callable[[dict, dict[str, list]], dict[str, list]] | None = None
    suffix: str = ""
    bare: bool = True
    floors: bool = False

    @property
    def title(self) -> str:
        """Its name as a list shows it."""
        return self.name if self.bare else f"{self.name}:{self.suffix}"

    @property
    def told(self) -> dict[str, Statistic]:
        """All its statistics, those that every task may have first."""
        return COMMON | dict(self.statistics)

    def tell(self, cell: Cell, seed: int = 0) -> dict[str, Estimate | float | None]:
        """The statistics of a cell whose values it has, in order; an older row may lack some."""
        known = {name: each for name, each in self.told.items() if set(each.needs) <= cell.values.keys()}
        return {name: each.made(cell.values, seed) for name, each in known.items()}

    def numbers(self, cell: Cell) -> dict[str, list[float]]:
        """Per item, each number that methods are compared by."""
        known = {name: each for name, each in self.compared.items() if set(each.needs) <= cell.values.keys()}
        return {name: each.numbers(cell.values) for name, each in known.items()}


KINDS: dict[str, Kind] = {}


def task(name: str, words: str, **more) -> Callable[[Maker], Maker]:
    """Register the function below, which makes tasks of options and a source, as `Kind` says."""

    def register(make: Maker) -> Maker:
        KINDS[name] = Kind(name, words, make, **more)
        return make

    return register


def kinds() -> dict[str, Kind]:
    """All tasks by name, in alphabetical order."""
    _discover()
    return dict(sorted(KINDS.items()))


def kind_of(cell_or_name: Cell | str) -> Kind:
    """The task of a cell, or of a name such as "longbench:qasper"; one that tells means alone for a name that is not
    registered here."""
    _discover()
    name = cell_or_name if isinstance(cell_or_name, str) else cell_or_name.first.task
    return KINDS.get(name) or KINDS.get(name.partition(":")[0]) or Kind(name, "", _unknown)


def sections() -> Iterator[Section]:
    """Of tasks, in the order of their names."""
    yield from dict.fromkeys(kind.section for kind in kinds().values() if kind.section)


@cache
def _discover() -> None:
    for module in pkgutil.iter_modules(tasks.__path__):
        importlib.import_module(f"{tasks.__name__}.{module.name}")
    for entry in entry_points(group="kvist.tasks"):
        entry.load()


def _unknown(options: Any, source: Source) -> list[Task]:
    raise ValueError("results of a task that is not registered can be read, not measured again")
