"""In which space a tensor is measured (rotated, pre-RoPE). `fixed`: the same map at every position, so that attention
may apply it to the query (keys) or the output (values) instead of to what is stored."""

from functools import cached_property
from typing import Annotated, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from kvist.kernels.choose import choose, place
from kvist.kernels.contract import Operation, Request
from kvist.kernels.reference.grid import rotate
from kvist.kernels.reference.rotary import angles, turn
from kvist.types import Part


class Identity(Part):
    kind: Literal["identity"] = "identity"
    fixed: ClassVar[bool] = True

    def forward(self, x: Tensor, at: Tensor | None = None) -> Tensor:
        return x

    def same(self, other: "Unrotate") -> bool:
        return True

    inverse = forward


class Hadamard(Part):
    """Each head rotated by the orthonormal Hadamard matrix of the largest power of two that divides its size, block by
    block (QuaRot section 4). Symmetric, so forward = inverse; orthogonal, so ⟨q, k⟩ = ⟨Hq, Hk⟩: attention rotates the
    query and the output, never the stored tokens."""

    kind: Literal["hadamard"] = "hadamard"
    fixed: ClassVar[bool] = True

    def forward(self, x: Tensor, at: Tensor | None = None) -> Tensor:
        """Values (..., D) to fp32 (..., D) in the other space; a token's bits do not depend on what comes with it."""
        fast = choose(Operation.ROTATE, Request(**place(x.device))).run
        return (fast or rotate)(x.float(), x.shape[-1] & -x.shape[-1])

    inverse = forward

    def same(self, other: "Unrotate") -> bool:
        return True


class Unrotate(Part):
    """Keys before their rotary embedding (KVQuant section 3.2): channels keep their own ranges there, which rotation
    mixes. Rotated keys come in and go out; `at` is the position that each was rotated for.

    frequencies: radians per position of each rotated pair of channels. scaling: the factor that a model's rotary
    embedding multiplies by (YaRN). style: pair i is channels (i, i + F), or (2i, 2i + 1); rotated channels come first.
    """

    kind: Literal["unrotate"] = "unrotate"
    fixed: ClassVar[bool] = False
    frequencies: tuple[float, ...] = ()
    scaling: float = Field(default=1.0, gt=0)
    style: Literal["half", "interleaved"] = "half"

    @property
    def fitted(self) -> bool:
        return len(self.frequencies) > 0

    def same(self, other: "Unrotate") -> bool:
        """Whether it undoes what `other` does, up to rounding."""
        mine, theirs = (torch.tensor((*x.frequencies, x.scaling)) for x in (self, other))
        return self.style == other.style and mine.shape == theirs.shape and torch.allclose(mine, theirs, rtol=1e-5)

    @cached_property
    def _on(self) -> dict[torch.device, Tensor]:
        return {}

    def table(self, device: torch.device) -> Tensor:
        """The frequencies (F,), fp32."""
        if device not in self._on:
            self._on[device] = torch.tensor(self.frequencies, dtype=torch.float32, device=device)
        return self._on[device]

    def forward(self, x: Tensor, at: Tensor | None = None) -> Tensor:
        """Rotated keys (..., H, T, D) at positions (..., T) to keys before rotation, fp32."""
        assert at is not None
        cos, sin = angles(at.unsqueeze(-2), self.table(x.device))
        return turn(x.float(), cos / self.scaling, -sin / self.scaling, self.style == "interleaved")

    def inverse(self, x: Tensor, at: Tensor | None = None) -> Tensor:
        assert at is not None
        cos, sin = angles(at.unsqueeze(-2), self.table(x.device))
        return turn(x.float(), cos * self.scaling, sin * self.scaling, self.style == "interleaved")


Transform = Annotated[Identity | Hadamard | Unrotate, Field(discriminator="kind")]
