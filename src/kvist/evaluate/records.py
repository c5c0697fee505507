"""Documents of a benchmark, from lines of JSON in a folder of data or rows of a dataset on the Hugging Face hub, and
prompts made of them: special tokens, chat templates, a middle left out, and where the question begins."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from kvist.evaluate.definitions import harness_datasets
from kvist.evaluate.generation import Prompt
from kvist.text import digest as digest_of
from kvist.text import encode


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
    return digest_of([json.dumps(each, sort_keys=True, ensure_ascii=False, default=str) for each in documents])


def first(documents: list, limit: int | None) -> list:
    """At most `limit` of them. ValueError for none."""
    if limit is not None and limit < 1:
        raise ValueError(f"a limit is at least 1, found {limit}")
    return documents[:limit]


def tokens(tokenizer, text: str) -> list[int]:
    """With the tokenizer's special tokens, unless the text begins with one, as a chat template's does."""
    begin = tokenizer.bos_token
    return encode(tokenizer, text, special=not (begin and text.startswith(begin)))


def chatted(tokenizer, messages: Sequence[dict[str, str]], add_generation_prompt: bool = True) -> str:
    """Messages (role, content) through the model's chat template, up to where it answers."""
    need_template(tokenizer)
    return tokenizer.apply_chat_template(list(messages), tokenize=False, add_generation_prompt=add_generation_prompt)


def need_template(tokenizer) -> None:
    """ValueError for a model without a chat template."""
    if not getattr(tokenizer, "chat_template", None):
        name = getattr(tokenizer, "name_or_path", "") or "the model"
        raise ValueError(f"expected a chat template in the tokenizer of {name}, found none; leave --chat out")


def split(tokenizer, text: str, question: str, most: int, stops: Sequence[str], ids: list[int] | None = None) -> Prompt:
    """A prompt of a text, or of its `ids`: from where `question` stands last in it, it is read from what is stored.
    The tokens are those of the whole text; the cut lies as many tokens before the end as the question takes alone."""
    ids = tokens(tokenizer, text) if ids is None else ids
    if len(ids) < 2:
        raise ValueError(f"expected a prompt of at least 2 tokens, found {text!r}")
    at = text.rfind(question.strip())
    tail = text[at:] if question.strip() and at >= 0 else question
    asked = min(max(1, len(encode(tokenizer, tail))), len(ids) - 1)
    return Prompt(tuple(ids[:-asked]), tuple(ids[-asked:]), most, tuple(stops))


def without_middle(ids: list[int], room: int) -> list[int]:
    """At most `room` tokens: the first and the last half of them, as LongBench does. ValueError for less than 2."""
    if len(ids) <= room:
        return ids
    if room < 2:
        raise ValueError(
            f"expected room for a prompt of at least 2 tokens, found {room}; the model is too short for it"
        )
    half = room // 2
    return ids[:half] + ids[-half:]


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
