"""Documents of a benchmark: lines of JSON in a folder of data, or rows of a dataset on the Hugging Face hub."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from kvist.calibrate import text
from kvist.evaluate.definitions import harness_datasets


def read(folder: str | Path, places: Sequence[str], columns: Sequence[str]) -> list[dict[str, Any]]:
    """The documents of the first of these places in a folder that is a file: JSON lines. ValueError where there is
    none, or a line is no document with these columns."""
    paths = [Path(folder) / place for place in places]
    path = next((path for path in paths if path.is_file()), None)
    if path is None:
        raise ValueError(f"expected {' or '.join(places)} in {folder}, found none; give another --data-dir")
    try:
        lines = path.read_text(encoding="utf-8").split("\n")  # alone: other separators may stand inside a JSON string
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "it is not text in UTF-8"
        raise ValueError(f"{path} cannot be read: {reason}") from None
    found = [_document(line, number, path, columns) for number, line in enumerate(lines, 1) if line.strip()]
    if not found:
        raise ValueError(f"expected a document per line in {path}, found none")
    return found


def fetch(dataset: str, name: str | None, split: str, columns: Sequence[str]) -> list[dict[str, Any]]:
    """The rows of a split on the Hugging Face hub. ValueError where they cannot be had, or lack a column."""
    library = harness_datasets()
    try:
        rows = [dict(row) for row in library.load_dataset(dataset, name, split=split)]
    except Exception as error:  # the library and the hub's client raise many kinds
        reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
        raise ValueError(
            f"{dataset} ({name}, {split}) cannot be fetched from the Hugging Face hub: {reason}; give --data-dir"
        ) from error
    for number, row in enumerate(rows, 1):
        _check(row, f"row {number} of {dataset} ({name}, {split})", columns)
    if not rows:
        raise ValueError(f"expected documents in {dataset} ({name}, {split}), found none")
    return rows


def digest(documents: Sequence[dict]) -> str:
    """A hash of documents and their order."""
    return text.digest([json.dumps(each, sort_keys=True, ensure_ascii=False, default=str) for each in documents])


def first(documents: list, limit: int | None) -> list:
    """At most `limit` of them. ValueError for none."""
    if limit is not None and limit < 1:
        raise ValueError(f"a limit is at least 1, found {limit}")
    return documents[:limit]


def _document(line: str, number: int, path: Path, columns: Sequence[str]) -> dict[str, Any]:
    try:
        found = json.loads(line)
    except ValueError:
        raise ValueError(f"line {number} of {path} is no JSON; expected a document with {_listed(columns)}") from None
    return _check(found, f"line {number} of {path}", columns)


def _check(found: Any, where: str, columns: Sequence[str]) -> dict[str, Any]:
    """A column's alternatives are separated by a bar."""
    if not isinstance(found, dict):
        raise ValueError(f"{where} is no document: expected JSON with {_listed(columns)}")
    for column in columns:
        if not any(name in found for name in column.split("|")):
            raise ValueError(
                f"{where} has no {_listed([column])}: expected {_listed(columns)}, found {_listed(list(found))}"
            )
    return found


def _listed(columns: Sequence[str]) -> str:
    return ", ".join(" or ".join(map(repr, column.split("|"))) for column in columns) or "nothing"
