"""Scores as lines of JSON that a later run goes on from, and what they come to per method."""

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path

from pydantic import ValidationError

from kvist.evaluate.perplexity import Mode
from kvist.evaluate.statistics import Estimate, difference, mean, perplexity
from kvist.plan import Recipe
from kvist.types import Part

KEY = ("model", "dtype", "recipe", "mode", "data", "seqlen", "window")
Key = tuple[str | int, ...]


class Row(Part):
    """One method on one window. model: its name and a fingerprint of its weights; recipe and data: hashes; nll: nats,
    summed over `tokens`; kl and agreement: means over them; bits: per element; seconds: of the forward pass."""

    model: str
    dtype: str
    method: str
    recipe: str
    mode: Mode
    source: str
    data: str
    seqlen: int
    window: int
    tokens: int
    nll: float
    kl: float
    agreement: float
    bits: float
    seconds: float
    versions: dict[str, str] = {}

    @property
    def key(self) -> Key:
        """What was measured, whatever it was called: rows of equal keys are the same measurement."""
        return self.key_of(self.__dict__)

    @staticmethod
    def key_of(facts: Mapping) -> Key:
        return tuple(facts[name] for name in KEY)


def recipe_digest(recipe: Recipe) -> str:
    """A hash of a recipe's JSON, fitted tables included. `prefill` does not count: the mode says what it is."""
    text = recipe.model_copy(update={"prefill": "stored"}).model_dump_json()
    return hashlib.blake2b(text.encode(), digest_size=8).hexdigest()


class Results:
    """Rows by key, kept in a file of JSON lines where one is given. A row is written as soon as it is added; a line
    torn by an interruption is dropped when the file is opened again."""

    def __init__(self, path: str | Path | None = None):
        self.path = None if path is None else Path(path)
        self.rows: dict[Key, Row] = {}
        if self.path is None:
            return
        if not self.path.parent.is_dir():
            raise ValueError(f"expected a folder to write {self.path.name} into, found none at {self.path.parent}")
        if self.path.is_dir():
            raise ValueError(f"expected a file for the results, found a folder at {self.path}")
        if self.path.exists():
            self._read(self.path)

    def _read(self, path: Path) -> None:
        data = path.read_bytes()
        whole = data.rfind(b"\n") + 1
        for number, line in enumerate(data[:whole].splitlines(), start=1):
            try:
                row = Row.model_validate_json(line)
            except ValidationError:
                raise ValueError(f"line {number} of {path} is no result of `kvist eval`; give another --out") from None
            self.rows[row.key] = row
        if whole < len(data):
            if not data[whole:].startswith(b'{"model"'[: len(data) - whole]):
                raise ValueError(f"{path} is no file of results; give another --out")
            os.truncate(path, whole)

    def add(self, row: Row) -> None:
        """Keep a row, and append it to the file, whole."""
        self.rows[row.key] = row
        if self.path is not None:
            with self.path.open("a") as file:
                file.write(json.dumps(row.model_dump(), ensure_ascii=False) + "\n")


def summary(contenders: Mapping[str, Sequence[Row]], first: str, seed: int = 0) -> list[dict]:
    """Per contender (its rows by its name): perplexity, KL and the differences of log-perplexity and KL from the one
    named `first`, each an `Estimate` over the windows that all of them have; top-1 agreement and bits, their means.
    Raises ValueError where there is no such window."""
    common = set.intersection(*({row.window for row in rows} for rows in contenders.values()))
    if not common:
        raise ValueError("no window was measured with every method")
    by_name = {
        name: sorted((row for row in rows if row.window in common), key=lambda row: row.window)
        for name, rows in contenders.items()
    }
    base = by_name[first]
    found = []
    for name, rows in by_name.items():
        logs, base_logs = ([r.nll / r.tokens for r in some] for some in (rows, base))
        own: dict[str, object] = {"method": name, "mode": rows[0].mode, "windows": len(rows)}
        own["perplexity"] = perplexity([r.nll for r in rows], [r.tokens for r in rows], seed)
        own["kl"] = mean([r.kl for r in rows], seed)
        own["agreement"] = sum(r.agreement for r in rows) / len(rows)
        own["bits"] = sum(r.bits for r in rows) / len(rows)
        own["log_perplexity_difference"] = difference(logs, base_logs, seed)
        own["kl_difference"] = difference([r.kl for r in rows], [r.kl for r in base], seed)
        found.append({k: v._asdict() if isinstance(v, Estimate) else v for k, v in own.items()})
    return found
