"""What a figure is, and what is drawn below all others: rounding."""

from typing import NamedTuple

import numpy as np

from kvist.report.load import EXACT, Group

ROUNDING = "what rounding alone does"


class Figure(NamedTuple):
    """id: its anchor; section; title; body: SVG; caption; groups: numbers of those it is drawn from; file: of a
    benchmark that it is drawn from instead."""

    id: str
    section: str
    title: str
    body: str
    caption: str
    groups: tuple[int, ...]
    file: str = ""


def floor_of(group: Group) -> float | None:
    """The largest divergence of what quantizes nothing, the exact cache among it: smaller ones are not known."""
    nothing = [entry for entry in group.whole.entries if entry.floor or entry.method == EXACT]
    known = [np.mean(entry.cell.values["kl"]) for entry in nothing if "kl" in entry.cell.values]
    return float(max(known)) if known and max(known) > 0 else None
