"""Stored predictions scored again by the present rules."""

from pathlib import Path

from kvist.atomic import replacing
from kvist.evaluate.questions import KINDS
from kvist.evaluate.results import Results, Row
from kvist.evaluate.tasks import gsm8k, longbench, recall

RULES = dict.fromkeys(KINDS, recall.rescored) | {"gsm8k": gsm8k.rescored, "longbench": longbench.rescored}


def rescore(path: Path) -> dict[str, int]:
    """Every row of a results file that holds predictions, in place, whole or not at all. Returns how many rows and
    items it looked at and how many scores changed. ValueError where there are none."""
    if not path.is_file():
        raise ValueError(
            f"expected {path.name} in {path.parent}, found none; `kvist eval --out {path.parent}` makes one"
        )
    found, lines = {"rows": 0, "items": 0, "changed": 0}, []
    for rows in Results(path).rows.values():
        for row in rows:
            lines.append(_again(row, found) if "prediction" in row.values else row)
    if not found["rows"]:
        raise ValueError(f"no row of {path} holds predictions; tasks that write answers do")
    with replacing(path) as scratch:
        scratch.write_text("".join(row.line for row in lines))
    return found


def _again(row: Row, found: dict[str, int]) -> Row:
    values = RULES[row.task.partition(":")[0]](row.settings, row.values)
    found["rows"] += 1
    found["items"] += len(row.items)
    found["changed"] += sum(a != b for a, b in zip(values["score"], row.values["score"], strict=True))
    return row.model_copy(update={"values": values})
