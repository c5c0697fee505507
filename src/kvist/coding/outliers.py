"""Which entries escape the ladder."""

from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor

from kvist.types import Part


class NoOutliers(Part):
    kind: Literal["none"] = "none"
    slots: Literal[0] = 0


class Slots(Part):
    """A fixed number of exact entries per token, over all heads (KVQuant section 3.4, capped): the `slots`/2 lowest
    and the `slots`/2 highest values. Stored in fp16 with their channel, sorted by channel."""

    kind: Literal["slots"] = "slots"
    slots: int = Field(ge=2, multiple_of=2)

    def find(self, x: Tensor) -> Tensor:
        """Channels (..., T, slots), int64, ascending and distinct, of the entries of x (..., T, H·D) that escape."""
        channels = x.argsort(dim=-1, stable=True)
        half = self.slots // 2
        return torch.cat([channels[..., :half], channels[..., -half:]], -1).sort(-1).values


Outliers = Annotated[NoOutliers | Slots, Field(discriminator="kind")]
