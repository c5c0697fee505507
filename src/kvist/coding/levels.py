"""Where a normalised value can sit: the ladder of quantization levels."""

import math
from functools import cached_property
from typing import Annotated, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor

from kvist.kernels.reference.grid import round_to
from kvist.types import Part


class Uniform(Part):
    """An integer grid, 2^b evenly spaced points: offset + scale·code, offset the lowest point (KIVI section 3; KVmix
    section 3.3)."""

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

    def beyond(self, u: Tensor) -> Tensor:
        """Which normalised values lie outside the range of the ladder, and are clipped to its ends."""
        return (u < 0) | (u > 2**self.bits - 1)


class Table(Part):
    """A codebook (nuq): 2^b points in [-1, 1], anywhere (KVQuant section 3.3). `read`, when given, are the points used
    on reading instead (its Q-Norm moves reconstruction points and keeps decision boundaries). No points before they are
    fitted."""

    kind: Literal["table"] = "table"
    bits: Literal[1, 2, 3, 4, 5]
    points: tuple[float, ...] = ()
    read: tuple[float, ...] | None = None

    @model_validator(mode="after")
    def _check(self) -> "Table":
        for points in (self.points, self.read or self.points):
            if points and len(points) != 2**self.bits:
                raise ValueError(f"a table of {self.bits} bits has {2**self.bits} points, found {len(points)}")
            if not all(map(math.isfinite, points)) or list(points) != sorted(points):
                raise ValueError("the points of a table must be finite and ascend")
        return self

    @property
    def fitted(self) -> bool:
        return len(self.points) > 0

    @property
    def grid(self) -> tuple[int, ...] | None:
        """The points as steps of 256 between the first and the last, so that a byte per point looks them up; None if
        they lie elsewhere."""
        low, high = self.points[0], self.points[-1]
        if not high > low:
            return None
        exact = [(p - low) / (high - low) * 255 for p in self.points]
        steps = tuple(round(x) for x in exact)
        return steps if all(abs(a - b) < 255e-6 for a, b in zip(exact, steps, strict=True)) else None

    def affine(self, low: Tensor, high: Tensor) -> tuple[Tensor, Tensor]:
        return (high - low) / 2, (high + low) / 2

    @cached_property
    def _on(self) -> dict[torch.device, tuple[Tensor, Tensor]]:
        return {}

    def tables(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """The boundaries between points (2^b - 1,) and the points on reading (2^b,), fp32."""
        if device not in self._on:
            points = torch.tensor(self.points, dtype=torch.float32)
            read = torch.tensor(self.read or self.points, dtype=torch.float32, device=device)
            self._on[device] = ((points[1:] + points[:-1]) / 2).to(device), read
        return self._on[device]

    def index(self, u: Tensor) -> Tensor:
        """Codes (uint8) of normalised values: the nearest point, the lower one of two."""
        return torch.bucketize(u.contiguous(), self.tables(u.device)[0]).to(torch.uint8)

    def point(self, codes: Tensor) -> Tensor:
        return self.tables(codes.device)[1][codes.int()]

    def beyond(self, u: Tensor) -> Tensor:
        return u.abs() > 1


class Raw(Part):
    """No ladder: values kept as they came, in the model's own type. One side of a layer may be exact this way."""

    kind: Literal["raw"] = "raw"
    bits: Literal[16] = 16


Levels = Annotated[Uniform | Table | Raw, Field(discriminator="kind")]
