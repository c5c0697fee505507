"""How the scale and offset (zero point) of a group are found."""

import math
from functools import cached_property
from typing import Annotated, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor

from kvist.kernels.reference.grid import narrow
from kvist.types import Part


def _extremes(groups: Tensor, without: Tensor | None) -> tuple[Tensor, Tensor]:
    if without is None:
        return groups.amin(-1), groups.amax(-1)
    low = groups.masked_fill(without, torch.inf).amin(-1)
    high = groups.masked_fill(without, -torch.inf).amax(-1)
    nothing = without.all(-1)
    return low.masked_fill(nothing, 0), high.masked_fill(nothing, 0)


class MinMax(Part):
    """The smallest and the largest member."""

    kind: Literal["minmax"] = "minmax"
    stored: Literal[2] = 2

    def measure(self, groups: Tensor, without: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Lowest and highest value of each group (..., g), members in the mask `without` left out."""
        return _extremes(groups, without)


class AbsMax(Part):
    """Plus and minus the largest magnitude; the offset follows from the scale and is not stored."""

    kind: Literal["absmax"] = "absmax"
    stored: Literal[1] = 1

    def measure(self, groups: Tensor, without: Tensor | None = None) -> tuple[Tensor, Tensor]:
        low, high = _extremes(groups, without)
        top = torch.maximum(-low, high).clamp_min(0)
        return -top, top


class Fixed(Part):
    """Set beforehand, per channel of each head (KVQuant section 3.1): nothing is stored beside the codes.

    `low` and `high` have heads·dim entries, head-major; none before they are fitted.
    """

    kind: Literal["fixed"] = "fixed"
    stored: Literal[0] = 0
    low: tuple[float, ...] = ()
    high: tuple[float, ...] = ()

    @model_validator(mode="after")
    def _check(self) -> "Fixed":
        if len(self.low) != len(self.high):
            raise ValueError(f"low and high must be as many, found {len(self.low)} and {len(self.high)}")
        if not all(math.isfinite(a) and math.isfinite(b) and a <= b for a, b in zip(self.low, self.high, strict=True)):
            raise ValueError("fixed ranges must be finite, with low <= high in every channel")
        return self

    @property
    def fitted(self) -> bool:
        return len(self.low) > 0

    @cached_property
    def _on(self) -> dict[tuple, tuple[Tensor, Tensor]]:
        return {}

    def affine(self, ladder, heads: int, device: torch.device) -> tuple[Tensor, Tensor]:
        """Scale and offset (H, 1, D) that put the ends of `ladder` on low and high: fp32 numbers that fp16 holds."""
        key = ladder.kind, ladder.bits, heads, device
        if key not in self._on:
            ends = (narrow(torch.tensor(x, dtype=torch.float32)) for x in (self.low, self.high))
            scale, offset = ladder.affine(*(x.float().view(heads, 1, -1) for x in ends))
            self._on[key] = narrow(scale).float().to(device), narrow(offset).float().to(device)
        return self._on[key]


Range = Annotated[MinMax | AbsMax | Fixed, Field(discriminator="kind")]
