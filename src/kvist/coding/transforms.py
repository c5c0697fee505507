"""In which space a tensor is measured."""

from typing import Annotated, Literal

from pydantic import Field
from torch import Tensor

from kvist.kernels.choose import rotator
from kvist.kernels.grid import rotate
from kvist.types import Part


class Identity(Part):
    kind: Literal["identity"] = "identity"

    def forward(self, x: Tensor) -> Tensor:
        return x

    inverse = forward


class Hadamard(Part):
    """Each head rotated by the orthonormal Hadamard matrix of the largest power of two that divides its size, block by
    block (QuaRot section 4). Symmetric, so forward = inverse; orthogonal, so ⟨q, k⟩ = ⟨Hq, Hk⟩: attention rotates the
    query and the output, never the stored tokens."""

    kind: Literal["hadamard"] = "hadamard"

    def forward(self, x: Tensor) -> Tensor:
        """Values (..., D) to fp32 (..., D) in the other space; a token's bits do not depend on what comes with it."""
        fast, _ = rotator(x.device)
        return (fast or rotate)(x.float(), x.shape[-1] & -x.shape[-1])

    inverse = forward


Transform = Annotated[Identity | Hadamard, Field(discriminator="kind")]
