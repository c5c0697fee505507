"""How methods look and numbers read, everywhere on the page: a colour per family, a digit for its bits."""

import math
import re
from typing import NamedTuple

from kvist.evaluate.statistics import Estimate
from kvist.report.load import EXACT

# as light as dark: they are read on white and on black
FAMILIES = {
    "kivi": "#2b7bba",
    "kvquant": "#d1603d",
    "kvmix": "#2f9e77",
    "logquant": "#c2559d",
    "partial-logquant": "#e08fc4",
    "streaming": "#b8860b",
    "partial-streaming": "#d9b44a",
    "hadamard": "#7a63c7",
    "int": "#8a8f98",
    "quanto": "#5aa9b8",
    "hqq": "#3f7f93",
    "sinks": "#a0694b",
}
OTHERS = ("#6b8e23", "#9b4f4f", "#4f6d9b", "#8f6bb0", "#5f8f6b", "#b0763a")
INK = "#1d2329"
PLAIN = re.compile(r"(?:QuantizedCache )?([a-z][a-z-]*?):?(\d+)(?: \(control\))?")


class Style(NamedTuple):
    """family, its colour; digit: the bits in a plain name such as "kivi:2", or "" for a variant of its family; label:
    what a variant is called beside its family."""

    family: str
    colour: str
    digit: str
    label: str


def look(method: str) -> Style:
    """Of a method's name. The same name looks the same in all figures."""
    plain = PLAIN.fullmatch(method)
    family = plain[1] if plain else re.split(r"[:,\s(=]", method.removeprefix("QuantizedCache "))[0]
    if not plain and (bits := re.fullmatch(r"(int)\d+", family)):
        family = bits[1]
    if family == EXACT:
        return Style(family, INK, "", EXACT)
    colour = FAMILIES.get(family) or OTHERS[sum(family.encode()) % len(OTHERS)]
    return Style(family, colour, plain[2] if plain else "", method.removeprefix("QuantizedCache "))


def order(method: str) -> tuple:
    """Families in the order of the list, bits rising, variants last."""
    seen = look(method)
    known = list(FAMILIES)
    place = known.index(seen.family) if seen.family in known else len(known)
    return place, seen.family, not seen.digit, int(seen.digit or 0), method


def number(x: float | None) -> str:
    """Two or three digits; nothing for what is not known."""
    if x is None or math.isnan(x):
        return ""
    small = f"{x:.1e}".replace("e-0", "e-") if x else "0"
    text = small if abs(x) < 1e-3 else f"{x:#.3g}".rstrip(".") if abs(x) < 999.5 else f"{x:,.0f}"
    return text.replace("-", "−")


def interval(estimate: Estimate) -> str:
    """Its ends, or nothing."""
    return "" if estimate.low is None else f"[{number(estimate.low)}, {number(estimate.high)}]"


def percent(estimate: Estimate) -> str:
    return f"{100 * estimate.value:.1f}"


def spread(estimate: Estimate) -> str:
    """Ends of a share, in percent."""
    return "" if estimate.low is None else f"[{100 * estimate.low:.0f}, {100 * (estimate.high or 0):.0f}]"
