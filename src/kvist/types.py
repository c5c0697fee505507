"""The words every room shares: shapes by name, array kinds, and what a model tells about itself."""

from dataclasses import dataclass
from typing import Literal

import torch
from pydantic import BaseModel, ConfigDict

HOLD = 32  # tokens of the last update that stay exact until the next one, so that `crop(-k)`, k <= 32, is exact
GROWTH = 1.25
MIN_PAGE = 64  # tokens
POOL_STEP = 8  # pages


class Part(BaseModel):
    """A frozen description: equal by value, saved as JSON, refusing unknown fields."""

    model_config = ConfigDict(frozen=True, extra="forbid")


@dataclass(frozen=True)
class ArraySpec:
    """One stored array of one side of one layer.

    kind "head": (pages, heads, page/stride, *shape); kind "rows": (pages, page/stride, *shape), one for all heads.
    `stride` is the number of tokens that one entry describes.
    """

    kind: Literal["head", "rows"]
    stride: int
    shape: tuple[int, ...]
    dtype: torch.dtype

    def page_shape(self, heads: int, page: int) -> tuple[int, ...]:
        entries = (page // self.stride, *self.shape)
        return (heads, *entries) if self.kind == "head" else entries

    def page_bytes(self, heads: int, page: int) -> int:
        return torch.Size(self.page_shape(heads, page)).numel() * self.dtype.itemsize


@dataclass(frozen=True)
class Geometry:
    """The shape of one layer's cache: KV heads, head sizes of key and value, storage type of exact tokens."""

    heads: int
    key_dim: int
    value_dim: int
    dtype: torch.dtype


def ladder(n: int, step: int) -> int:
    """The capacity given to n entries: the first rung >= n of a ladder that grows by 1.25 in multiples of `step`.

    It depends on n alone, never on how n was reached; so a bill can be written before anything is stored.
    """
    rung = step
    while rung < n:
        rung = max(rung + step, -(-int(rung * GROWTH) // step) * step)
    return rung
