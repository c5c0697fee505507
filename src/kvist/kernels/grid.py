"""Grouped scale-and-round and its inverse. The reference; every fast version must give the same codes."""

import torch
from torch import Tensor

FLOAT16_MAX = 65504.0


def narrow(x: Tensor) -> Tensor:
    """To fp16, as scales and offsets are stored: values beyond its range saturate instead of becoming infinite."""
    return x.clamp(-FLOAT16_MAX, FLOAT16_MAX).half()


def normalise(x: Tensor, scale: Tensor, offset: Tensor) -> Tensor:
    """(x - offset) / scale in fp32; a group of equal numbers has scale 0 and gives 0."""
    scale = scale.float()
    return (x - offset.float()) / torch.where(scale > 0, scale, 1.0)


def round_to(u: Tensor, top: int) -> Tensor:
    """The nearest integer in [0, top], halves to even, as uint8."""
    return u.round().clamp_(0, top).to(torch.uint8)


def hadamard(size: int, device: torch.device | str | None = None) -> Tensor:
    """The orthonormal Sylvester-Hadamard matrix (size, size), fp32; symmetric, its own inverse; size is 2^n."""
    matrix = torch.ones(1, 1, device=device)
    while matrix.shape[0] < size:
        matrix = torch.cat([torch.cat([matrix, matrix], 1), torch.cat([matrix, -matrix], 1)], 0)
    return matrix * size**-0.5
