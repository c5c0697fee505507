"""What was measured, as lines of JSON that a later run goes on from.

A row is one contender on some items of one task. It carries all that decides its numbers; rows that agree in that are
parts of one cell, whatever run they come from.
"""

import hashlib
import json
import math
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

from pydantic import (
    ConfigDict,
    Field,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveInt,
    TypeAdapter,
    ValidationError,
    model_validator,
)

from kvist import stranger
from kvist.plan import Recipe
from kvist.types import Part

MOST_BYTES = 1 << 28  # of a file of results
IDENTITY = ("task", "metric", "settings", "model", "dtype", "stress", "digest", "part")

Divergence = Annotated[float, Field(ge=-1e-3, lt=1e9)]  # rounding may leave it below 0
Among = Annotated[list[Divergence | None], Field(min_length=2, max_length=2)]  # tokens, their mean
VALUES = {  # what a report reads, by name
    name: TypeAdapter(list[kind], config=ConfigDict(allow_inf_nan=False))
    for name, kind in {
        "kl": Divergence,
        "kl_max": Divergence,
        "nll": NonNegativeFloat,
        "tokens": PositiveInt,
        "agreement": Annotated[float, Field(ge=0, le=1)],
        **dict.fromkeys(("score", "strict", "flexible"), float | bool),
        "prediction": str,
        **dict.fromkeys(("expected", "classes"), list[str]),
        "kl_curve": list[Divergence],
        "kl_counts": dict[Annotated[str, Field(pattern=r"^-?\d{1,3}$")], PositiveInt],
        "kl_at_once": list[Annotated[list[Divergence], Field(min_length=3, max_length=3)]],
        "first_mismatch": NonNegativeInt,
        **dict.fromkeys(("inside", "beyond", "last"), Among),
        **{f"kl_{name}": Divergence for name in ("padding", "batch", "chunk")},
        **{f"shift_{name}": float for name in ("padding", "batch", "chunk")},
        "length": PositiveInt,
        "depth": Annotated[float, Field(ge=0, le=1)] | None,
    }.items()
}


class Row(Part):
    """One contender on some items of one task.

    task, metric: its name, and the version of what it measures. settings: what decides the items and how they are
    measured (data's hash, lengths, seeds, mode). model: its name and a fingerprint of its weights; stress: outliers
    planted in it, or "none". method: what the contender was called; recipe: its JSON, fitted tables by their hash;
    digest: a hash of all of it; part: "both", or the one side that is coded. bits: allocated bits per cached number,
    mean over the items, measured from the storage. items: their numbers; values: per name a value per item. seconds:
    of the forward passes, over all items. seed: of planted outliers; that of questions stands in the settings.
    """

    task: str
    metric: int
    settings: dict[str, Any]
    model: str
    dtype: str
    device: str
    stress: str
    method: str
    recipe: dict[str, Any]
    digest: str
    part: str
    bits: float = Field(ge=0)
    items: tuple[NonNegativeInt, ...]
    values: dict[str, list]
    seconds: float = Field(ge=0)
    seed: int = 0
    versions: dict[str, str] = {}

    @model_validator(mode="after")
    def _one_each(self) -> "Row":
        for name, values in self.values.items():
            if len(values) != len(self.items):
                raise ValueError(f"{name} has {len(values)} values for {len(self.items)} items")
            if name in VALUES:
                try:
                    VALUES[name].validate_python(values, strict=True)
                except ValidationError as error:
                    raise ValueError(f"{name}.{stranger.said(error)}") from None
        return self

    @property
    def cell(self) -> str:
        """What was measured, as text: rows of equal cells are parts of the same measurement."""
        return cell_of(self.__dict__)

    @classmethod
    def read(cls, line: bytes) -> "Row":
        """The row of a line. Raises ValueError with the reason where it is none."""
        try:
            return cls.model_validate(stranger.parse(line))
        except ValidationError as error:
            raise ValueError(stranger.said(error)) from None

    @property
    def line(self) -> str:
        """As a line of a file."""
        return json.dumps(self.model_dump(), ensure_ascii=False) + "\n"


class Cell:
    """All that is known of one contender on one task: rows of equal identity, their items in order. `method`: what it
    is called, by its first row if not otherwise; `items`: these of them alone; `bits`: mean over the items."""

    def __init__(self, rows: Sequence[Row], method: str | None = None, items: Iterable[int] | None = None):
        self.rows, self.first = list(rows), rows[0]
        self.method = method or self.first.method
        at: dict[int, tuple[Row, int]] = {}
        for row in rows:
            for i, item in enumerate(row.items):
                at.setdefault(item, (row, i))
        self.items = sorted(at if items is None else at.keys() & set(items))
        names = self.first.values
        for row in rows:
            if row.values.keys() != names.keys():
                odd = ", ".join(sorted(row.values.keys() ^ names.keys()))
                raise ValueError(f"rows of {row.method} on {row.task} differ in what they measured: {odd}")
        self.values = {name: [at[item][0].values[name][at[item][1]] for item in self.items] for name in names}
        self.bits = sum(at[item][0].bits for item in self.items) / len(self.items) if self.items else math.nan

    def among(self, items: Iterable[int]) -> "Cell":
        """Some of its items."""
        return Cell(self.rows, self.method, set(self.items) & set(items))


def cell_of(facts: Mapping) -> str:
    """Of a row's fields by name: their identity as text."""
    return json.dumps([facts[name] for name in IDENTITY], sort_keys=True)


def digest_of(recipe: Recipe) -> str:
    """A hash of a recipe's JSON, fitted tables included. `prefill` does not count: the settings say what it is."""
    text = recipe.model_copy(update={"prefill": "stored"}).model_dump_json()
    return hashlib.blake2b(text.encode(), digest_size=8).hexdigest()


def described(recipe: Recipe) -> dict:
    """A recipe's JSON in which long lists of numbers, fitted to a model, are replaced by their hash."""

    def short(x: Any) -> Any:
        if isinstance(x, dict):
            return {name: short(part) for name, part in x.items()}
        if isinstance(x, list | tuple):
            text = json.dumps(x)
            if len(text) > 400 and not any(isinstance(part, dict) for part in x):
                return f"{len(x)} numbers, {hashlib.blake2b(text.encode(), digest_size=8).hexdigest()}"
            return [short(part) for part in x]
        return x

    made = short(recipe.model_dump(mode="json"))
    layers = made["layers"]
    if len(layers) > 1 and all(layer == layers[0] for layer in layers):
        made["layers"] = layers[:1]
    return made


def contents(path: Path) -> bytes:
    """Of a results file, which may be compressed. ValueError where it cannot be read, or is too large."""
    try:
        data = stranger.read(path, MOST_BYTES)
        return stranger.unpack(data, MOST_BYTES) if path.suffix == ".xz" else data
    except ValueError as error:
        raise ValueError(f"the results {path} cannot be read: {error}; take the file away") from None


def rows_of(lines: Iterable[bytes], path: Path, advice: str) -> Iterator[tuple[int, Row]]:
    """Rows of a file's lines, with their numbers. ValueError, with advice, for a line that is no row."""
    for number, line in enumerate(lines, start=1):
        try:
            yield number, Row.read(line)
        except ValueError as error:
            raise ValueError(f"line {number} of {path} is no result of `kvist eval`: {error}; {advice}") from None


class Results:
    """Rows by cell, kept in a file of JSON lines where one is given. A row is written as soon as it is added; a line
    torn by an interruption is dropped when the file is opened again."""

    def __init__(self, path: str | Path | None = None):
        self.path = None if path is None else Path(path)
        self.rows: dict[str, list[Row]] = {}
        if self.path is None:
            return
        if not self.path.parent.is_dir():
            raise ValueError(f"expected a folder to write {self.path.name} into, found none at {self.path.parent}")
        if self.path.exists():
            self._read(self.path)

    def _read(self, path: Path) -> None:
        try:
            data = stranger.read(path, MOST_BYTES)
        except ValueError as error:
            raise ValueError(f"expected a file of results at {path}: {error}; give another --out") from None
        whole = data.rfind(b"\n") + 1
        for _, row in rows_of(data[:whole].splitlines(), path, "give another --out"):
            self.rows.setdefault(row.cell, []).append(row)
        if whole < len(data):
            if not data[whole:].startswith(b'{"task"'[: len(data) - whole]):
                raise ValueError(f"{path} is no file of results; give another --out")
            os.truncate(path, whole)

    def add(self, row: Row) -> None:
        """Keep a row, and append it to the file, whole or not at all: what a full disk cut is cut off again."""
        if self.path is not None:
            line = row.line.encode()
            with self.path.open("ab", buffering=0) as file:  # closing a file writes again what a buffer is left with
                before = file.tell()
                try:
                    while line:
                        line = line[file.write(line) :]
                except OSError as error:
                    os.truncate(self.path, before)
                    reason = error.strerror or str(error)
                    raise OSError(
                        f"{self.path} could not be written: {reason}; what was measured before is kept, and the same "
                        "command goes on from there"
                    ) from None
        self.rows.setdefault(row.cell, []).append(row)

    def done(self, cell: str) -> set[int]:
        """Items of a cell that are known."""
        return {item for row in self.rows.get(cell, ()) for item in row.items}

    def cells(self) -> list[Cell]:
        """All cells, in the order in which they were begun."""
        return [Cell(rows) for rows in self.rows.values()]
