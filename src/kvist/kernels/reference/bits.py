"""Small integers to bytes and back: bit packing. The only place that knows the order of codes inside a page.

Order: *planar*. A run of n codes of b bits becomes n·b/8 bytes; byte w holds, from its low bits up, the codes
w, w+W, w+2W, … with W = n·b/8. Neighbouring bytes therefore hold neighbouring codes at the same shift, so that both a
vector unit and a torch expression unpack a whole run with one shift and one mask per field and no shuffles.
Three bits are a plane of two bits followed by a plane of one bit, five bits one of four and one of one: no code
straddles a byte.
"""

import torch
from torch import Tensor

from kvist.kernels.contract import PLANES, RUN, packed_bytes


def pack(codes: Tensor, bits: int) -> Tensor:
    """uint8 codes (..., n) below 2^bits, to bytes (..., n·bits/8)."""
    n = codes.shape[-1]
    if n % RUN:
        raise ValueError(f"a run of codes must be a multiple of {RUN} long, found {n}")
    planes, low = [], 0
    for width in PLANES[bits]:
        field = (codes >> low) & ((1 << width) - 1)
        runs = field.unflatten(-1, (8 // width, n * width // 8)).unbind(-2)
        packed = runs[0]
        for i, run in enumerate(runs[1:], start=1):
            packed = packed | (run << (i * width))
        planes.append(packed)
        low += width
    return planes[0] if len(planes) == 1 else torch.cat(planes, dim=-1)


def unpack(packed: Tensor, bits: int) -> Tensor:
    """The inverse of `pack`: bytes (..., n·bits/8) to uint8 codes (..., n)."""
    n = packed.shape[-1] * 8 // bits
    codes, start, low = torch.zeros((), dtype=torch.uint8, device=packed.device), 0, 0
    for width in PLANES[bits]:
        size = packed_bytes(n, width)
        plane = packed[..., start : start + size]
        mask = (1 << width) - 1
        field = torch.cat([(plane >> shift) & mask for shift in range(0, 8, width)], dim=-1)
        codes = field if low == 0 else codes | (field << low)
        start, low = start + size, low + width
    return codes
