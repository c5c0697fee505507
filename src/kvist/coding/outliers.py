"""Which entries escape the ladder."""

import math
from typing import Annotated, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor

from kvist.types import Part

MOST = 254  # slots per token: their numbers fit a byte


class NoOutliers(Part):
    kind: Literal["none"] = "none"

    def count(self, channels: int) -> int:
        return 0


class Slots(Part):
    """Dense-and-sparse: a fixed number of exact entries per token, over all heads (KVQuant section 3.4), in fp16 with
    their channel, sorted by channel. Every slot is used: an entry that a threshold would have kept dense is kept exact
    where there is room.

    Given as `slots`, or as a `share` of the channels of all heads: then share/2, rounded up, on each side, as
    published. rank "sides": the lowest and the highest half; "largest": the largest magnitudes, for numbers that were
    normalised by a fixed range.
    """

    kind: Literal["slots"] = "slots"
    slots: int = Field(default=0, ge=0, le=MOST, multiple_of=2)
    share: float = Field(default=0.0, ge=0, lt=0.5)
    rank: Literal["sides", "largest"] = "sides"

    @model_validator(mode="after")
    def _check(self) -> "Slots":
        if (self.slots > 0) == (self.share > 0):
            raise ValueError("give outliers either as a number of slots or as a share of the channels")
        return self

    def count(self, channels: int) -> int:
        """Slots per token of `channels` channels."""
        slots = self.slots or 2 * math.ceil(round(self.share * channels / 2, 6))
        if slots > min(MOST, channels):
            raise ValueError(
                f"{slots} outliers per token of {channels} channels are too many: at most {min(MOST, channels)}"
            )
        return slots

    def find(self, x: Tensor) -> Tensor:
        """Channels (..., T, slots), int64, ascending and distinct, of the entries of x (..., T, H·D) that escape.
        Equal entries escape in the order of their channels: the first of the lowest, the last of the highest."""
        slots = self.count(x.shape[-1])
        channels = (x.abs() if self.rank == "largest" else x).argsort(dim=-1, stable=True)
        low = 0 if self.rank == "largest" else slots // 2
        return torch.cat([channels[..., :low], channels[..., x.shape[-1] - slots + low :]], -1).sort(-1).values


Outliers = Annotated[NoOutliers | Slots, Field(discriminator="kind")]
