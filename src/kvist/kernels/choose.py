"""(operation, traits, device) to an implementation, or to the reasons why only the reference serves."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

import torch


@dataclass(frozen=True)
class Traits:
    """How one side is stored, as plain data: what a kernel may ask. `group` 0 is the whole head."""

    levels: str
    bits: int
    along: str
    group: int
    across_heads: bool
    range: str
    outliers: int


@cache
def packed_attention(key: Traits, value: Traits, device: torch.device) -> tuple[Callable | None, tuple[str, ...]]:
    """The fast attention over packed pages and (), or None and the reasons why there is none."""
    return None, ("no fast kernel is available",)
