"""A table of widths per layer and side (mixed precision), as JSON that a person can read and edit."""

from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from pydantic import Field, StrictInt, ValidationError, model_validator

from kvist import stranger
from kvist.atomic import write_json
from kvist.types import MOST_LAYERS, ModelIdentity, Part

WIDTHS = (1, 2, 3, 4, 8, 16)


class Allocation(Part):
    """Bits of keys and of values, one entry per attention layer that kvist serves; a single entry is for all layers.

    model: what it was made for, None for any model with as many layers. ratios: the window ratios that `kvmix` takes
    with it, those of the paper or of the published code. note: how it was made, for people.
    """

    k: tuple[StrictInt, ...] = Field(max_length=MOST_LAYERS)  # a width that JSON gives as true or "3" is a slip
    v: tuple[StrictInt, ...] = Field(max_length=MOST_LAYERS)
    model: ModelIdentity | None = None
    ratios: Literal["paper", "reference"] = "paper"
    note: str = ""

    @model_validator(mode="after")
    def _check(self) -> "Allocation":
        if len(self.k) != len(self.v) or not self.k:
            raise ValueError(f"k and v must list as many layers, found {len(self.k)} and {len(self.v)}")
        for side, widths in (("k", self.k), ("v", self.v)):
            for layer, bits in enumerate(widths):
                if bits not in WIDTHS:
                    raise ValueError(f"bits must be one of {WIDTHS}, found {bits} in {side} of layer {layer}")
        if self.model and self.model.layers != len(self.k):
            raise ValueError(f"{self.model.name} has {self.model.layers} layers to serve, found {len(self.k)} widths")
        return self

    @classmethod
    def of(cls, k: int | Sequence[int], v: int | Sequence[int], **fields) -> "Allocation":
        """From widths per layer, or one width for all layers; a single number is repeated as often as needed."""
        layers = max(len(x) if isinstance(x, Sequence) else 1 for x in (k, v))
        k, v = (tuple(x) if isinstance(x, Sequence) else (x,) * layers for x in (k, v))
        return cls(k=k, v=v, **fields)

    def save(self, path: str | Path) -> None:
        """Write the allocation as JSON, the widths of a side on one line."""
        write_json(path, self.model_dump(mode="json", exclude_none=True))

    @classmethod
    def load(cls, path: str | Path) -> "Allocation":
        """Read what `save` wrote, or {"k": [...], "v": [...]} by hand. Raises ValueError in one sentence."""
        try:
            data = stranger.read_json(path)
        except ValueError as error:
            raise ValueError(f"expected an allocation's JSON file at {path}: {error}") from None
        try:
            return cls.model_validate(data)
        except ValidationError as error:
            raise ValueError(
                f'{path} is not an allocation such as {{"k": [3, 2], "v": [4, 2]}}: {stranger.said(error)}'
            ) from None

    def __str__(self) -> str:
        """Mean bits of codes, as the paper writes them: k2.19v2.38."""
        return "".join(f"{side}{sum(x) / len(x):.2f}" for side, x in (("k", self.k), ("v", self.v)))
