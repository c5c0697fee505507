"""Values to codes within a Triton kernel: what every kernel that codes shares, and how it is told what to do.

Channels are handled in an order that makes planar packing a sum: as 8 runs of D/8 channels, so that a field of a byte,
of any width, is a run or several. Divisions are exact and nothing is fused (`EXACT`), or the codes would differ from
the reference's.
"""

from functools import cache
from typing import NamedTuple

import numpy as np
import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from kvist.kernels.contract import PLANES, Constants, Traits
from kvist.kernels.triton.unpack import PLAIN

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
    """Pointers of one side; `words` is `codes` as 32-bit numbers. Those that a coding has no use for point anywhere."""

    codes: object
    words: object
    scale: object
    offset: object
    edges: object
    points: object
    fixed_scale: object
    fixed_offset: object
    escaped: object
    clipped: object


@cache
def _shift(steps: float) -> float:
    """The offset of symmetric levels in scales, as `Codec` forms it from a range of -1 to 1."""
    return (np.float32(-1.0) / (np.float32(2.0) / np.float32(steps))).item()


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
    stored = traits.range != "fixed"
    return Coding(
        low=low, high=high, dim=dim, heads=heads, tile=tile, part=part, even=8 * part == dim, group=group,
        along_tokens=traits.along == "tokens" and not raw, across=traits.across_heads and stored and not raw,
        stored=stored, symmetric=symmetric, steps=steps, shift=0.0 if table else _shift(steps),
        levels=2**traits.bits if table else 0, hadamard=hadamard, outliers=traits.outliers,
    )  # fmt: skip


def warps(c: Coding) -> int:
    """For about 32 values per thread."""
    return max(1, min(16, c.tile * c.part * 8 // 1024))


def parts(c: Coding) -> int:
    """Programs that share the channels of a tile of tokens."""
    return -(-(c.dim // 8) // c.part)


def pointers(arrays: dict[str, Tensor], constants: Constants, escaped: Tensor | None, clipped: Tensor | None) -> Arrays:
    """What a kernel is given of one side."""
    none = arrays["codes"] if "codes" in arrays else arrays["values"]
    words = none.view(torch.int32) if none.dtype == torch.uint8 and none.shape[-1] % 4 == 0 else none
    found = (arrays.get("scale"), arrays.get("offset"), *constants[:4], escaped, clipped)
    return Arrays(none, words, *(none if x is None else x for x in found))


def kinds(coded: bool, dtype: str = "fp16") -> Arrays:
    """Types of `Arrays`, in Triton's words; dtype: that of exact values."""
    return Arrays("*u8" if coded else f"*{dtype}", "*i32", "*fp16", "*fp16", *("*fp32",) * 4, "*u8", "*i64")


def compiled(kernel, arch: int, types: dict, fixed: dict, warps: int, aligned: tuple[str, ...] = ()):
    """A kernel for `sm_arch`, without a GPU: what Triton's `compile` returns. types: of its arguments, those
    of tuples as tuples; i32 where none is given. aligned: the numbers that are multiples of 16, as all pointers are."""
    names, attributes = kernel.arg_names, {}
    signature = {name: types.get(name, "constexpr" if name in fixed else "i32") for name in names}
    for i, name in enumerate(names):
        kind = signature[name]
        parts = {(i, j): x for j, x in enumerate(kind)} if isinstance(kind, tuple) else {(i,): kind}
        wanted = {at for at, x in parts.items() if x.startswith("*") or name in aligned}
        attributes |= {at: [["tt.divisibility", 16]] for at in wanted}
    source = ASTSource(kernel, signature, {(names.index(name),): x for name, x in fixed.items()}, attributes)
    return triton.compile(source, target=GPUTarget("cuda", arch, 32), options={"num_warps": warps, **EXACT})


@triton.jit
def channels(first, C: tl.constexpr):
    """The channel (8·part,) of every column, when each run of D/8 starts at its channel `first`; which are channels."""
    c = tl.arange(0, 8 * C.part)
    if C.even:
        return c, c < C.dim
    else:
        w = first + c % C.part
        return c // C.part * (C.dim // 8) + w, w < C.dim // 8


@triton.jit
def _butterfly(x, HALF: tl.constexpr):
    pairs = tl.reshape(x, (x.shape[0], x.shape[1] // (2 * HALF), 2, HALF))
    bits = pairs.to(tl.int32, bitcast=True)
    other = (tl.expand_dims(tl.sum(bits, 2), 2) - bits).to(tl.float32, bitcast=True)  # one exchange, whatever is summed
    second = (tl.arange(0, 2) == 1)[None, None, :, None]
    return tl.reshape(other + tl.where(second, -pairs, pairs), x.shape)


@triton.jit
def butterflies(x, BLOCK: tl.constexpr):
    """fp32 (T, N), each `BLOCK` of it rotated: see `grid.rotate`, whose sums and differences these are."""
    x = x * (BLOCK**-0.5)
    for i in tl.static_range(10):
        if (1 << i) < BLOCK:
            x = _butterfly(x, 1 << i)
    return x


@triton.jit
def tokens_of(source, at, real, d, inside, C: tl.constexpr):
    """Values (T, N), fp32, of tokens that start at `at` (T,) of `source`; 0 where there are none."""
    if C.hadamard > 0:
        n = tl.arange(0, 8 * C.part)
        x = tl.load(source + at[:, None] + n[None, :], mask=real[:, None] & (n < C.dim)[None, :], other=0.0)
        x = butterflies(x.to(tl.float32), C.hadamard)
        if not C.even:
            x = tl.gather(x, tl.broadcast_to(tl.minimum(d, C.dim - 1)[None, :], (C.tile, 8 * C.part)), 1)
        return x
    else:
        x = tl.load(source + at[:, None] + d[None, :], mask=real[:, None] & inside[None, :], other=0.0)
        return x.to(tl.float32)


@triton.jit
def members(P, entry, real, d, inside, C: tl.constexpr):
    """Which values (T, N) a range is measured of: those of tokens that no outlier slot took."""
    member = real[:, None] & inside[None, :]
    if C.outliers:
        escaped = tl.load(P.escaped + entry[:, None] * C.dim + d[None, :], mask=member, other=0)
        member = member & (escaped == 0)
    return member


@triton.jit
def narrowed(x):
    """fp16, as scales and offsets are stored: see `grid.narrow`."""
    return tl.minimum(tl.maximum(x, -65504.0), 65504.0).to(tl.float16)


@triton.jit
def quotient(a, scale):
    """a / scale, correctly rounded, where scale has few bits, as fp16 has, and |a| is at most some thousand scales.

    The remainder of a first guess is exact, and corrects it: what is left of the error is far less than the distance of
    such a quotient from the middle of two numbers. A division of any two numbers takes branches and twice as long. The
    interpreter knows no fused multiply-add: there it divides.
    """
    if PLAIN:
        return tl.math.div_rn(a, scale)
    else:
        inverse = 1.0 / scale
        q = a * inverse
        return tl.fma(tl.fma(-q, scale, a), inverse, q)


@triton.jit
def _within(x, member, AXIS: tl.constexpr):
    return tl.min(tl.where(member, x, float("inf")), AXIS), tl.max(tl.where(member, x, float("-inf")), AXIS)


@triton.jit
def extremes(x, member, AXIS: tl.constexpr, C: tl.constexpr):
    """Of members; where all are, nothing is asked: of tokens that are none, nothing is stored."""
    if C.outliers or not C.even or (C.along_tokens and C.tile != C.group):
        return _within(x, member, AXIS)
    else:
        return tl.min(x, AXIS), tl.max(x, AXIS)


@triton.jit
def settled(P, low, high, where, mask, C: tl.constexpr):
    """Extremes to scale and offset: stored as fp16 where `mask`, and returned as values are divided with, fp32. A group
    without members has those of 0."""
    nothing = low > high
    low, high = tl.where(nothing, 0.0, low), tl.where(nothing, 0.0, high)
    if C.symmetric:
        high = tl.maximum(tl.maximum(-low, high), 0.0)
        low = -high
    narrow = narrowed(quotient(tl.minimum(high - low, 65504.0 * C.steps), tl.full(low.shape, C.steps, tl.float32)))
    tl.store(P.scale + where, narrow, mask=mask)
    scale = narrow.to(tl.float32)
    if C.symmetric:
        offset = scale * C.shift
    else:
        narrow = narrowed((high + low) * 0.5 if C.levels > 0 else low)
        tl.store(P.offset + where, narrow, mask=mask)
        offset = narrow.to(tl.float32)
    return scale, offset


@triton.jit
def measured(P, x, member, real, d, inside, entry, C: tl.constexpr):
    """Scale and offset of tokens of one head, stored at their entries (T,), to broadcast against them (T, N)."""
    T: tl.constexpr = x.shape[0]
    N: tl.constexpr = x.shape[1]
    groups: tl.constexpr = (C.dim + C.group - 1) // C.group
    if C.along_tokens:
        low, high = extremes(x, member, 0, C)
        entry = tl.min(tl.where(real, entry, 1 << 62)) // C.group
        scale, offset = settled(P, low, high, entry * C.dim + d, inside, C)
        scales, offsets = scale[None, :], offset[None, :]
    elif groups == 1:
        low, high = extremes(x, member, 1, C)
        scale, offset = settled(P, low, high, entry, real, C)
        scales, offsets = scale[:, None], offset[:, None]
    elif C.even and C.dim == groups * C.group and (C.group & (C.group - 1)) == 0:
        split: tl.constexpr = (T, groups, C.group)
        low, high = extremes(tl.reshape(x, split), tl.reshape(member, split), 2, C)
        where = entry[:, None] * groups + tl.arange(0, groups)[None, :]
        scale, offset = settled(P, low, high, where, tl.broadcast_to(real[:, None], (T, groups)), C)
        scales = tl.reshape(tl.broadcast_to(scale[:, :, None], split), (T, N))
        offsets = tl.reshape(tl.broadcast_to(offset[:, :, None], split), (T, N))
    else:
        scales, offsets = tl.zeros([T, N], tl.float32), tl.zeros([T, N], tl.float32)
        for g in tl.static_range(groups):
            here = (d // C.group == g)[None, :]
            low, high = _within(x, member & here, 1)
            scale, offset = settled(P, low, high, entry * groups + g, real, C)
            scales, offsets = tl.where(here, scale[:, None], scales), tl.where(here, offset[:, None], offsets)
    return scales, offsets
