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
        """Values (..., D) to fp32 (..., D) in the other space: sums and differences in a fixed order, so that a token
        gives the same bits whatever comes with it (a matrix product would not)."""
        dim = x.shape[-1]
        block = dim & -dim
        y = (x.float().movedim(-1, 0) * block**-0.5).contiguous()  # a new tensor: what follows works in place
        half = 1
        while half < block:
            low, high = y.view(dim // (2 * half), 2, half, x.numel() // dim).unbind(1)
            total = low + high
            torch.sub(low, high, out=high)
            low.copy_(total)
            half *= 2
        return y.movedim(0, -1).contiguous()

    def inverse(self, x: Tensor) -> Tensor:
        """The same map as `forward`, as a matrix product: its last bit depends on the shape."""
        block = x.shape[-1] & -x.shape[-1]
        return (x.float().unflatten(-1, (-1, block)) @ _matrix(block, x.device)).flatten(-2)


Transform = Annotated[Identity | Hadamard, Field(discriminator="kind")]
