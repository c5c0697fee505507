"""The angles by which decode attention turns keys on a GPU, as it forms them."""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from kvist.kernels.triton.tiles import angles


class Pairs(NamedTuple):
    pairs: int
    scaling: float = 1.0


@triton.jit
def angles_kernel(frequencies, at, cos, sin, F: tl.constexpr, N: tl.constexpr):
    """A program per position: cos and sin (positions, pairs)."""
    i, pair = tl.program_id(0), tl.arange(0, N)
    c, s = angles(frequencies, tl.load(at + i), pair, F)
    tl.store(cos + i * F.pairs + pair, c, mask=pair < F.pairs)
    tl.store(sin + i * F.pairs + pair, s, mask=pair < F.pairs)


def formed(at: Tensor, frequencies: Tensor) -> tuple[Tensor, Tensor]:
    """cos and sin (T, F) of positions (T,) int64 times frequencies (F,), fp32."""
    cos, sin = (torch.empty(len(at), len(frequencies), device=at.device) for _ in range(2))
    sizes = Pairs(len(frequencies)), triton.next_power_of_2(len(frequencies))
    angles_kernel[(len(at),)](frequencies, at, cos, sin, *sizes)
    return cos, sin
