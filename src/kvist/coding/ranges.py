"""How the scale of a group is found."""

from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor

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

    `low` and `high` have heads·dim entries, head-major.
    """

    kind: Literal["fixed"] = "fixed"
    stored: Literal[0] = 0
    low: tuple[float, ...]
    high: tuple[float, ...]

    def table(self, heads: int, device: torch.device) -> tuple[Tensor, Tensor]:
        """Lowest and highest value, each (H, 1, D) fp32."""
        low, high = (torch.tensor(x, device=device).view(heads, 1, -1) for x in (self.low, self.high))
        return low, high


Range = Annotated[MinMax | AbsMax | Fixed, Field(discriminator="kind")]
