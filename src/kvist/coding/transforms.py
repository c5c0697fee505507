"""In which space a tensor is measured."""

from functools import lru_cache
from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor

from kvist.kernels.grid import hadamard
from kvist.types import Part


class Identity(Part):
    kind: Literal["identity"] = "identity"

    def forward(self, x: Tensor) -> Tensor:
        return x

    inverse = forward


@lru_cache(maxsize=32)
def _matrix(size: int, device: torch.device) -> Tensor:
    return hadamard(size, device)


class Hadamard(Part):
    """Each head rotated by the orthonormal Hadamard matrix of the largest power of two that divides its size, block by
    block (QuaRot section 4). Symmetric, so forward = inverse; orthogonal, so ⟨q, k⟩ = ⟨Hq, Hk⟩: attention rotates the
    query and the output, never the stored tokens."""

    kind: Literal["hadamard"] = "hadamard"

    def forward(self, x: Tensor) -> Tensor:
        """Values (..., D) to fp32 (..., D) in the other space."""
        block = x.shape[-1] & -x.shape[-1]
        return (x.float().unflatten(-1, (-1, block)) @ _matrix(block, x.device)).flatten(-2)

    inverse = forward


Transform = Annotated[Identity | Hadamard, Field(discriminator="kind")]
