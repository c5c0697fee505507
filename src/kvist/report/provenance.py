"""Where each number comes from: cells, the lines of files that hold their rows, and the recipes behind them."""

from typing import Any

from kvist.report.load import Group
from kvist.report.look import number
from kvist.report.study import Study
from kvist.report.tables import Field, Table, method


def behind(study: Study, group: Group) -> Table:
    """The rows behind figures: each cell with its numbers, and the lines of the files where they stand."""
    entries = group.entries
    columns = [
        ("method", ""),
        ("part", "sides that are coded"),
        ("items", ""),
        ("bits", ""),
        ("mean", "over its items"),
    ]
    columns += [("rows", "file:lines"), ("recipe", ""), ("measured with", "")]
    rows = []
    for entry in entries:
        first = entry.cell.first
        versions = " ".join(f"{name} {value}" for name, value in first.versions.items())
        name = next((n for n in ("score", "kl") if n in entry.cell.values), None)
        value = entry.cell.values[name] if name else []
        said = f"{name} {number(sum(value) / len(value))}" if name else ""
        rows.append(
            [
                method(entry.method),
                Field(entry.part),
                Field(str(len(entry.cell.items))),
                Field(f"{entry.cell.bits:.3f}"),
                Field(said),
                Field(entry.source),
                Field(first.digest, link=recipe_id(first.digest)),
                Field(f"{versions}; {first.device}"),
            ]
        )
    caption = f"{group.place.model}, {group.place.dtype}, stress {group.place.stress}. {group.about}"
    title = f"{study.titles[group.number]}: {group.place}"
    return Table(f"rows-{group.number}", title, columns, rows, [False] * len(rows), caption, (group.number,))


def recipes(study: Study) -> list[dict[str, Any]]:
    """Each recipe once: its digest and JSON, and what it was called."""
    found: dict[str, dict] = {}
    for group in study.groups:
        for entry in group.entries:
            first = entry.cell.first
            known = {"id": recipe_id(first.digest), "digest": first.digest, "method": entry.method, "part": entry.part}
            found.setdefault(first.digest, known | {"recipe": first.recipe})
    return list(found.values())


def recipe_id(digest: str) -> str:
    return "recipe-" + "".join(c if c.isalnum() else "-" for c in digest)
