"""Where a normalised value can sit: the ladder of points."""

from typing import Annotated, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor

from kvist.kernels.grid import round_to
from kvist.types import Part


class Uniform(Part):
    """2^b evenly spaced points: offset + scale·code, offset the lowest point (KIVI section 3; KVmix section 3.3)."""

    kind: Literal["uniform"] = "uniform"
    bits: Literal[1, 2, 3, 4, 8]

    def affine(self, low: Tensor, high: Tensor) -> tuple[Tensor, Tensor]:
        """Scale and offset that put the lowest and highest point on `low` and `high`."""
        return (high - low) / (2**self.bits - 1), low

    def index(self, u: Tensor) -> Tensor:
        """Codes (uint8) of normalised values: the nearest point, halves to even."""
        return round_to(u, 2**self.bits - 1)

    def point(self, codes: Tensor) -> Tensor:
        """Normalised values (fp32) of codes."""
        return codes.float()


class Table(Part):
    """2^b points in [-1, 1], anywhere (KVQuant section 3.3). `read`, when given, are the points used on reading
    instead (its Q-Norm moves reconstruction points and keeps decision boundaries)."""

    kind: Literal["table"] = "table"
    bits: Literal[1, 2, 3, 4]
    points: tuple[float, ...]
    read: tuple[float, ...] | None = None

    @model_validator(mode="after")
    def _check(self) -> "Table":
        for points in (self.points, self.read or self.points):
            if len(points) != 2**self.bits:
                raise ValueError(f"a table of {self.bits} bits has {2**self.bits} points, found {len(points)}")
        if list(self.points) != sorted(self.points):
            raise ValueError("the points of a table must ascend")
        return self

    def affine(self, low: Tensor, high: Tensor) -> tuple[Tensor, Tensor]:
        return (high - low) / 2, (high + low) / 2

    def index(self, u: Tensor) -> Tensor:
        points = torch.tensor(self.points, device=u.device)
        return torch.bucketize(u, (points[1:] + points[:-1]) / 2).to(torch.uint8)

    def point(self, codes: Tensor) -> Tensor:
        return torch.tensor(self.read or self.points, device=codes.device)[codes.int()]


class Raw(Part):
    """No ladder: values kept as they came, in the model's own type. One side of a layer may be exact this way."""

    kind: Literal["raw"] = "raw"
    bits: Literal[16] = 16


Levels = Annotated[Uniform | Table | Raw, Field(discriminator="kind")]
