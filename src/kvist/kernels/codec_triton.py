"""Coding and decoding in Triton: to the bit what the reference in `coding` gives.

A program codes a tile of tokens of one head; where one range spans all heads, a tile of all of them. Channels are
handled in an order that makes planar packing a sum: as 8 runs of D/8 channels, so that every field of a byte, of any
width, is a run or several. Divisions are exact and nothing is fused, or the codes would differ from the reference's.
"""

from math import prod
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from kvist.kernels.bits import PLANES, packed_bytes
from kvist.kernels.choose import Constants, Traits

TILE = 4096  # values per program
EXACT = {"enable_fp_fusion": False}


class Coding(NamedTuple):
    """What is known of one side when a kernel is compiled.

    low, high: bits of its planes, 0 where nothing is coded; tile: tokens per program; part: channels of each run of D/8
    that a program handles, up to a power of two; even: all of them, with no room left over; group: neighbours that
    share a range; steps: what the difference of extremes is divided by; shift: the offset in scales, of symmetric
    ranges; levels: points of a table, 0 for uniform ones; hadamard: size of the blocks that tokens are rotated by.
    """

    low: int
    high: int
    dim: int
    heads: int
    tile: int
    part: int
    even: bool
    group: int
    along_tokens: bool
    across: bool
    stored: bool
    symmetric: bool
    steps: float
    shift: float
    levels: int
    hadamard: int
    outliers: bool


class Arrays(NamedTuple):
    """Pointers of one side. Those that a coding has no use for point anywhere."""

    codes: object
    scale: object
    offset: object
    edges: object
    points: object
    fixed_scale: object
    fixed_offset: object
    escaped: object
    clipped: object


def coding(traits: Traits, dim: int, heads: int, tokens: int, turn: bool = False) -> Coding:
    """One side as a kernel is compiled for it. tokens: the most that are coded at a time; turn: rotate them first."""
    raw, table, symmetric = traits.levels == "raw", traits.levels == "table", traits.range == "absmax"
    low, high = (0, 0) if raw else (*PLANES[traits.bits], 0)[:2]
    group, part = traits.group or dim, triton.next_power_of_2(dim // 8)
    hadamard = dim & -dim if turn and traits.hadamard else 0
    if traits.along == "tokens" and not raw:
        tile = triton.next_power_of_2(group)
        while not hadamard and part > 16 and tile * part * 8 > 4 * TILE:
            part //= 2
    else:
        tile = max(1, min(TILE // (8 * part), triton.next_power_of_2(max(1, tokens))))
    steps = 2.0 if table else float(2**traits.bits - 1)
    unit = torch.tensor(2.0) / steps
    return Coding(
        low=low, high=high, dim=dim, heads=heads, tile=tile, part=part, even=8 * part == dim, group=group,
        along_tokens=traits.along == "tokens" and not raw, across=traits.across_heads, stored=traits.range != "fixed",
        symmetric=symmetric, steps=steps, shift=(torch.tensor(0.0 if table else -1.0) / unit).item(),
        levels=2**traits.bits if table else 0, hadamard=hadamard, outliers=traits.outliers,
    )  # fmt: skip


def warps(c: Coding) -> int:
    """For about 32 values per thread."""
    return max(1, min(16, c.tile * c.part * 8 // 1024))


def parts(c: Coding) -> int:
    """Programs that share the channels of a tile of tokens."""
    return -(-(c.dim // 8) // c.part)


@triton.jit
def channels(first, C: tl.constexpr):
    """The channel (8·part,) of every column, when each run of D/8 starts at its channel `first`; which are channels."""
    c = tl.arange(0, 8 * C.part)
    if C.even:
        return c, c < C.dim
    w = first + c % C.part
    return c // C.part * (C.dim // 8) + w, w < C.dim // 8


@triton.jit
def butterflies(x, BLOCK: tl.constexpr):
    """fp32 (T, N), each `BLOCK` of it rotated: see `grid.rotate`, whose sums and differences these are."""
    T: tl.constexpr = x.shape[0]
    N: tl.constexpr = x.shape[1]
    x = x * (BLOCK**-0.5)
    for i in tl.static_range(20):
        half: tl.constexpr = 1 << i
        if half < BLOCK:
            pairs = tl.reshape(x, (T, N // (2 * half), 2, half))
            second = (tl.arange(0, 2) == 1)[None, None, :, None]
            total = tl.expand_dims(tl.sum(pairs, 2), 2)
            difference = tl.expand_dims(tl.sum(tl.where(second, -pairs, pairs), 2), 2)
            x = tl.reshape(tl.where(second, difference, total), (T, N))
    return x


@triton.jit
def tokens_of(source, at, real, d, inside, C: tl.constexpr):
    """Values (T, N), fp32, of tokens that start at `at` (T,) of `source`; 0 where there are none."""
    if C.hadamard > 0:
        n = tl.arange(0, 8 * C.part)
        x = tl.load(source + at[:, None] + n[None, :], mask=real[:, None] & (n < C.dim)[None, :], other=0.0)
        x = butterflies(x.to(tl.float32), C.hadamard)
        if C.even:
            return x
        return tl.gather(x, tl.broadcast_to(tl.minimum(d, C.dim - 1)[None, :], (C.tile, 8 * C.part)), 1)
    return tl.load(source + at[:, None] + d[None, :], mask=real[:, None] & inside[None, :], other=0.0).to(tl.float32)


@triton.jit
def narrowed(x):
    """fp16, as scales and offsets are stored: see `grid.narrow`."""
    return tl.minimum(tl.maximum(x, -65504.0), 65504.0).to(tl.float16)


@triton.jit
def ranged(low, high, C: tl.constexpr):
    """Extremes to scale and offset, fp16; of a group without members those of 0."""
    nothing = low > high
    low, high = tl.where(nothing, 0.0, low), tl.where(nothing, 0.0, high)
    if C.symmetric:
        high = tl.maximum(tl.maximum(-low, high), 0.0)
        low = -high
    scale = narrowed(tl.math.div_rn(high - low, C.steps))
    return scale, narrowed(tl.math.div_rn(high + low, 2.0) if C.levels > 0 else low)


@triton.jit
def applied(scale, offset, C: tl.constexpr):
    """Stored scale and offset as values are divided with, fp32."""
    s = scale.to(tl.float32)
    return s, s * C.shift if C.symmetric else offset.to(tl.float32)


@triton.jit
def member_extremes(x, member, axis: tl.constexpr):
    return tl.min(tl.where(member, x, float("inf")), axis), tl.max(tl.where(member, x, float("-inf")), axis)


@triton.jit
def measured(P, x, member, real, d, inside, entry, C: tl.constexpr):
    """Scale and offset of the tokens of one head, stored at their entries (T,) and spread to where they are applied."""
    if C.along_tokens:
        scale, offset = ranged(*member_extremes(x, member, 0), C)
        where = tl.min(entry) // C.group * C.dim + d
        tl.store(P.scale + where, scale, mask=inside)
        if not C.symmetric:
            tl.store(P.offset + where, offset, mask=inside)
        scale, offset = applied(scale, offset, C)
        return scale[None, :], offset[None, :]
    groups: tl.constexpr = (C.dim + C.group - 1) // C.group
    T: tl.constexpr = x.shape[0]
    N: tl.constexpr = x.shape[1]
    if C.even and N % C.group == 0 and (C.group & (C.group - 1)) == 0:
        split: tl.constexpr = (T, groups, C.group)
        low, high = member_extremes(tl.reshape(x, split), tl.reshape(member, split), 2)
        scale, offset = ranged(low, high, C)
        where = entry[:, None] * groups + tl.arange(0, groups)[None, :]
        tl.store(P.scale + where, scale, mask=real[:, None])
        if not C.symmetric:
            tl.store(P.offset + where, offset, mask=real[:, None])
        scale, offset = applied(scale, offset, C)
        scale = tl.reshape(tl.broadcast_to(scale[:, :, None], split), (T, N))
        return scale, tl.reshape(tl.broadcast_to(offset[:, :, None], split), (T, N))
    scales, offsets = tl.zeros([T, N], tl.float32), tl.zeros([T, N], tl.float32)
    for g in tl.static_range(groups):
        here = (d // C.group == g)[None, :]
        scale, offset = ranged(*member_extremes(x, member & here, 1), C)
        tl.store(P.scale + entry * groups + g, scale, mask=real)
        if not C.symmetric:
            tl.store(P.offset + entry * groups + g, offset, mask=real)
        scale, offset = applied(scale, offset, C)
        scales, offsets = tl.where(here, scale[:, None], scales), tl.where(here, offset[:, None], offsets)
    return scales, offsets


@triton.jit
def measured_across(P, source, at, stride, real, d, inside, entry, row, C: tl.constexpr):
    """`measured` of whole tokens: one scale and one offset for all heads, at rows (T,)."""
    low, high = tl.full([C.tile], float("inf"), tl.float32), tl.full([C.tile], float("-inf"), tl.float32)
    for h in range(0, C.heads):
        x = tokens_of(source, at + tl.cast(h, tl.int64) * stride, real, d, inside, C)
        least, most = member_extremes(x, members(P, entry(h), real, d, inside, C), 1)
        low, high = tl.minimum(low, least), tl.maximum(high, most)
    scale, offset = ranged(low, high, C)
    tl.store(P.scale + row, scale, mask=real)
    if not C.symmetric:
        tl.store(P.offset + row, offset, mask=real)
    scale, offset = applied(scale, offset, C)
    return scale[:, None], offset[:, None]
