"""The words every room shares: shapes by name, array kinds, and what a model tells about itself."""

from dataclasses import dataclass
from typing import Annotated, Literal, Self

import torch
from pydantic import BaseModel, ConfigDict, Field

HOLD = 32  # tokens of the last update that stay exact until the next one, so that `crop(-k)`, k <= 32, is exact
GROWTH = 1.25
MIN_PAGE = 64  # tokens
POOL_STEP = 8  # pages
MOST_TOKENS = 1 << 24  # in a window, a group, a reserve: beyond any context
MOST_LAYERS = 1024
ATTACHED = "kvist"  # how the name of an attention begins that reads packed data


class Part(BaseModel):
    """A frozen description: equal by value, saved as JSON, refusing unknown fields.

    A part may keep tensors that it made of its fields (a cached property); they are no part of its value.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    def _value(self) -> tuple:
        return tuple(getattr(self, name) for name in type(self).model_fields)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Part) and type(self) is type(other) and self._value() == other._value()

    def __hash__(self) -> int:
        return hash(self._value())

    def model_copy(self, *, update=None, deep=False) -> Self:
        copied = super().model_copy(update=update, deep=deep)
        for name in vars(copied).keys() - type(self).model_fields.keys():
            vars(copied).pop(name)  # made of the fields before the update
        return copied


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
    """The shape of one layer's cache: KV heads, head sizes of key and value, the type that keys and values come in, and
    the one in which a layer that packs stores its exact tokens; None: as they come."""

    heads: int
    key_dim: int
    value_dim: int
    dtype: torch.dtype
    exact: torch.dtype | None = None

    def stored(self, packs: bool) -> torch.dtype:
        """The storage type of exact tokens in a layer that packs, or that does not."""
        return self.exact if packs and self.exact else self.dtype


Size = Annotated[int, Field(gt=0, le=1 << 16)]


class ModelIdentity(Part):
    """The model that something was fitted to. config: a hash of what shapes its keys and values; layers: those that
    kvist serves."""

    name: str
    kind: str
    config: str
    layers: Annotated[int, Field(gt=0, le=MOST_LAYERS)]
    heads: Size
    key_dim: Size
    value_dim: Size

    def check(self, found: "ModelIdentity") -> None:
        """Refuse another model, whatever its weights; a fine-tuned one has the same config."""
        names = {"kind": "a {} model", "layers": "{} layers", "heads": "{} KV heads", "key_dim": "heads of {}"}
        for field, words in names.items():
            mine, other = getattr(self, field), getattr(found, field)
            if mine != other:
                words = words.format(mine) + ", this model has " + words.format(other)
                raise ValueError(f"it was made for {self.name}: {words}; calibrate or profile this model instead")
        if self.config != found.config:
            raise ValueError(
                f"it was made for {self.name}, whose config differs in what shapes keys and values; "
                "calibrate or profile this model instead"
            )


def grown(n: int, step: int) -> int:
    """The capacity given to n entries: the first >= n of a row that grows by 1.25 in multiples of `step`.

    It depends on n alone, never on how n was reached; so a bill can be written before anything is stored.
    """
    rung = step
    while rung < n:
        rung = max(rung + step, -(-int(rung * GROWTH) // step) * step)
    return rung
