"""Grouped scale-and-round (quantize) and its inverse (dequantize). The reference: every fast version must give the same
codes."""

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


def rotate(x: Tensor, block: int) -> Tensor:
    """fp32 (..., D), each `block` of it times the orthonormal Hadamard matrix of size `block`, a power of two.

    Sums and differences in a fixed order, so that a token gives the same bits whatever comes with it; a matrix product
    would not.
    """
    dim = x.shape[-1]
    y = (x.movedim(-1, 0) * block**-0.5).contiguous()  # a new tensor: what follows works in place
    half = 1
    while half < block:
        low, high = y.view(dim // (2 * half), 2, half, x.numel() // dim).unbind(1)
        total = low + high
        torch.sub(low, high, out=high)
        low.copy_(total)
        half *= 2
    return y.movedim(0, -1).contiguous()
