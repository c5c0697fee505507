"""KIVI (Liu et al., ICML 2024, arXiv 2402.02750). Keys have outlier channels, so they share a range along tokens,
channel by channel; values have none, so they share it along channels, token by token; the newest tokens stay exact.
Keys wait for a whole block of R, values slide: exactly the newest R are exact."""

from typing import Literal

from kvist.methods.parts import Width, check_group, per_channel, per_token, width
from kvist.methods.registry import method
from kvist.plan import LayerPlan, Recipe, Side
from kvist.retention import Block, Sliding


@method("KIVI, arXiv 2402.02750")
def kivi(
    bits: int = 2,
    k: Width = None,
    v: Width = None,
    group: int = 32,
    recent: int = 128,
    values: Literal["sliding", "block"] = "sliding",
    sinks: int = 0,
) -> Recipe:
    """Tuning-free asymmetric rounding: keys per channel, values per token, a recent window exact."""
    check_group(group, recent)
    if values not in ("sliding", "block"):
        raise ValueError(f"values must be 'sliding' (as published) or 'block', found {values!r}")
    blocks = Block(size=recent, sinks=sinks)
    slides = Sliding(size=recent, sinks=sinks) if values == "sliding" else blocks
    plan = LayerPlan(
        key=Side(codec=per_channel(width(k, bits), group), retention=blocks),
        value=Side(codec=per_token(width(v, bits), group), retention=slides),
    )
    return Recipe(name="kivi", paper=kivi.paper, layers=(plan,))
