"""The plain baselines: everything exact, and per-token integers without any window."""

from kvist.coding import Codec, Grouping, Raw
from kvist.methods.parts import per_token
from kvist.methods.registry import method
from kvist.plan import LayerPlan, Recipe, Side
from kvist.retention import Immediate, KeepAll


@method("the model's own precision")
def exact() -> Recipe:
    """Every token as it came: bit-identical to transformers' own cache, in storage that grows in place."""
    side = Side(codec=Codec(levels=Raw(), grouping=Grouping(along="channels")), retention=KeepAll())
    return Recipe(name="exact", paper=exact.paper, layers=(LayerPlan(key=side, value=side),))


@method("per-token integers, no window")
def int8(group: int = 0) -> Recipe:
    """8-bit integers; one scale and offset per token and head (or per `group` channels)."""
    return _integers("int8", 8, group)


@method("per-token integers, no window")
def int4(group: int = 0) -> Recipe:
    """4-bit integers; one scale and offset per token and head (or per `group` channels)."""
    return _integers("int4", 4, group)


def _integers(name: str, bits: int, group: int) -> Recipe:
    side = Side(codec=per_token(bits, group or None), retention=Immediate())
    return Recipe(name=name, paper=int8.paper, layers=(LayerPlan(key=side, value=side),))
