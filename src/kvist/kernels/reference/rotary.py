"""Rotation of pairs of channels by angles that grow with the position; the reference."""

import torch
from torch import Tensor


def angles(at: Tensor, frequencies: Tensor) -> tuple[Tensor, Tensor]:
    """cos and sin (..., T, F), fp32, of positions (..., T) times frequencies (F,), rounded as transformers does."""
    product = at.float().unsqueeze(-1) * frequencies
    return product.cos(), product.sin()


def turn(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> Tensor:
    """x (..., T, D), fp32, its first 2F channels turned: pair i, channels (i, i + F) or (2i, 2i + 1), by angle i.

    cos, sin broadcast to (..., T, F). The other channels stay.
    """
    pairs = cos.shape[-1]
    turned = x[..., : 2 * pairs]
    if interleaved:
        a, b = turned.unflatten(-1, (pairs, 2)).unbind(-1)
    else:
        a, b = turned[..., :pairs], turned[..., pairs:]
    a, b = a * cos - b * sin, b * cos + a * sin
    turned = torch.stack([a, b], -1).flatten(-2) if interleaved else torch.cat([a, b], -1)
    return torch.cat([turned, x[..., 2 * pairs :]], -1) if x.shape[-1] > 2 * pairs else turned
