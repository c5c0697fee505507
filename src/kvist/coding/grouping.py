"""Who shares a scale (group size, per channel, per token): a run of neighbours along tokens or along channels."""

from typing import Literal

import torch.nn.functional as F
from pydantic import Field, model_validator
from torch import Tensor

from kvist.kernels.contract import RUN
from kvist.types import MOST_TOKENS, Part


class Grouping(Part):
    """A partition of (heads, tokens, channels) into runs of `size` neighbours along one direction.

    `size` None is the whole extent: one group per token and head or, with `across_heads`, one per token. Along tokens
    a group belongs to one channel and needs `size` tokens together. The last group along channels may be shorter.
    """

    along: Literal["tokens", "channels"]
    size: int | None = Field(default=None, le=MOST_TOKENS)
    across_heads: bool = False

    @model_validator(mode="after")
    def _check(self) -> "Grouping":
        if self.along == "tokens" and (self.size is None or self.across_heads):
            raise ValueError("groups along tokens need a size and cannot span heads")
        if self.across_heads and self.size is not None:
            raise ValueError("a group across heads is the whole token: give it no size")
        if self.size is not None and (self.size < RUN or self.size % RUN):
            raise ValueError(f"a group must be a multiple of {RUN} long, found {self.size}")
        return self

    @property
    def granule(self) -> int:
        """Tokens that must be encoded together."""
        return self.size if self.along == "tokens" and self.size else 1

    def count(self, dim: int) -> int:
        """Groups per token and head along channels of `dim`."""
        return -(-dim // (self.size or dim))

    def split(self, x: Tensor) -> Tensor:
        """(..., H, T, D) to groups in the last dimension.

        Along tokens (..., H, T/g, D, g); along channels (..., H, T, G, g), a short last group filled up by its own
        last element, which changes no range; across heads (..., T, 1, H·D).
        """
        if self.along == "tokens":
            return x.unflatten(-2, (-1, self.granule)).transpose(-1, -2)
        if self.across_heads:
            return x.movedim(-3, -2).flatten(-2).unsqueeze(-2)
        dim = x.shape[-1]
        groups, size = self.count(dim), self.size or dim
        missing = groups * size - dim
        if missing:
            x = F.pad(x.flatten(0, -3), (0, missing), mode="replicate").unflatten(0, x.shape[:-2])
        return x.unflatten(-1, (groups, size))

    def spread(self, scale: Tensor, dim: int) -> Tensor:
        """A number per group, to a shape that broadcasts against (..., H, T/granule, ·, ·) values of `join`-ed layout.

        Along tokens (..., H, T/g, D) becomes (..., H, T/g, 1, D); along channels (..., H, T, G) becomes
        (..., H, T, D); across heads (..., T, 1) becomes (..., 1, T, 1).
        """
        if self.along == "tokens":
            return scale.unsqueeze(-2)
        if self.across_heads:
            return scale.unsqueeze(-3)
        if scale.shape[-1] == 1 or self.size is None:
            return scale
        return scale.repeat_interleave(self.size, dim=-1)[..., :dim]
