"""Every registered method with windows and groups so small that 200 tokens fill several pages."""

from kvist import methods
from kvist.plan import Recipe
from kvist.testing.stand_in import stand_in

# Several settings of a method may be listed; a method that is not listed is tested as it comes.
SMALL = [
    "exact",
    "int8",
    "int4 group=16",
    "hadamard",
    "hadamard k=2 v=3 group=16 recent=32",
    "kivi:2 recent=32",
    "kivi k=1 v=3 recent=32",
    "kivi k=3 v=1 recent=64",
    "kivi k=4 v=8 recent=32 values=block",
    "kivi k=8 v=4 group=64 recent=64",
    "kivi k=16 v=2 recent=32",
    "kivi k=2 v=16 recent=32",
    "kivi:2 recent=48 values=block sinks=5",
    "kivi:2 recent=40 sinks=3",
    "kivi k=3,2 v=2,4 recent=32",
    "streaming window=40",
    "partial-streaming window=40 sinks=3",
    "logquant window=32",
    "logquant window=40 sinks=2 k=4",
    "partial-logquant window=32",
    "kvmix k=3 v=4",
    "kvmix k=3,2 v=4,1",
    "kvmix k=1,4 v=3,2",
    "kvmix:2 ratio_of=context ratio=0.3",
    "kvquant:3",
    "kvquant:2 outliers=12% sinks=3",
    "kvquant:4 outliers=0 recent=40",
    "kvquant k=3,2 v=2,4",
]


def _named() -> list[str]:
    listed = {text.split()[0].split(":")[0] for text in SMALL}
    return SMALL + [name for name in methods.names() if name not in listed]


CASES = _named()
"""Texts of methods with small windows, several per method; one that is not listed comes as it is."""
EACH = [next(text for text in CASES if text.split()[0].split(":")[0] == name) for name in methods.names()]
"""The first case of each method."""


def recipe(text: str, dim: int = 32, **changes) -> Recipe:
    """The recipe of a case, with fields of the recipe changed; what must be fitted is made up for 2 heads of `dim`."""
    return stand_in(Recipe.model_validate(methods.parse(text).model_dump() | changes), 2, dim)
