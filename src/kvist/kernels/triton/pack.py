"""Values of one side coded and packed within a Triton kernel: the whole way of a tile of tokens.

Words of four bytes are formed first, within a thread, and their bits put together then: few exchanges between threads.
"""

import triton
import triton.language as tl

from kvist.kernels.triton.coding import channels, extremes, measured, members, quotient, settled, tokens_of


@triton.jit
def _halved(u, edges, HALF: tl.constexpr):
    """One step of a binary search: HALF where u lies above the middle edge, and the edges still in question."""
    above, rest = u > edges[HALF - 1], ()
    for i in tl.static_range(HALF - 1):
        rest = rest + (tl.where(above, edges[HALF + i], edges[i]),)
    return tl.where(above, HALF, 0), rest


@triton.jit
def _looked_up(P, u, C: tl.constexpr):
    """How many of the ascending edges lie below u, int32."""
    edges = ()
    for i in tl.static_range(C.levels - 1):
        edges = edges + (tl.load(P.edges + i),)
    codes = tl.zeros(u.shape, tl.int32)
    for i in tl.static_range(C.low + C.high):
        step, edges = _halved(u, edges, C.levels >> (i + 1))
        codes += step
    return codes


@triton.jit
def _rounded(u):
    """u from 0 to 255 to the nearest integer, halves to even: at 2^23 neighbouring numbers are 1 apart, so that adding
    rounds, and leaves the integer in the low byte."""
    return (u + 8388608.0).to(tl.int32, bitcast=True) & 255


@triton.jit
def _plane(P, codes, real, entry, first, PLANE: tl.constexpr, LOW: tl.constexpr, C: tl.constexpr):
    """The bits of codes (T, N) from LOW up, as a plane of PLANE bits of the bytes of their tokens."""
    eighth: tl.constexpr = C.dim // 8
    runs: tl.constexpr = 8 // PLANE
    unit: tl.constexpr = 4 if eighth % 4 == 0 else 1  # bytes that are stored together
    columns: tl.constexpr = C.part * PLANE // unit
    x = (codes >> LOW) & ((1 << PLANE) - 1) if C.high > 0 else codes
    if unit > 1:
        x = tl.reshape(x, (C.tile, 2 * C.part, 4)) << (tl.arange(0, 4) * 8)[None, None, :]
        x = tl.sum(x, 2)
    if runs > 1:
        x = tl.sum(tl.reshape(x, (C.tile, runs, columns)) << (tl.arange(0, runs) * PLANE)[None, :, None], 1)
    where = tl.arange(0, columns)
    mask = real[:, None]
    if not C.even:
        run, w = where // (C.part // unit), first // unit + where % (C.part // unit)
        where, mask = run * (eighth // unit) + w, mask & (w < eighth // unit)[None, :]
    where = entry[:, None] * (eighth * (C.low + C.high) // unit) + (LOW * eighth // unit + where)[None, :]
    if unit > 1:
        tl.store(P.words + where, x, mask=mask)
    else:
        tl.store(P.codes + where, x.to(tl.uint8), mask=mask)


@triton.jit
def coded(P, x, member, scale, offset, real, entry, first, C: tl.constexpr):
    """Values (T, N) divided, rounded and packed at their entries (T,); scale and offset broadcast against them."""
    scale = tl.where(scale > 0, scale, 1.0)
    # beyond its ends a ladder does not ask how far, and the bounds are exact
    low, high = (scale * -1024.0, scale * 1024.0) if C.levels > 0 or not C.stored else (scale * 0.0, scale * C.steps)
    u = quotient(tl.minimum(tl.maximum(x - offset, low), high), scale)
    if not C.stored:
        beyond = tl.abs(u) > 1.0 if C.levels > 0 else (u < 0.0) | (u > C.steps)
        count = tl.sum(tl.sum((beyond & member).to(tl.int32), 1), 0)
        tl.atomic_add(P.clipped, count.to(tl.int64), sem="relaxed")
        u = u if C.levels > 0 else tl.minimum(tl.maximum(u, 0.0), C.steps)
    codes = _looked_up(P, u, C) if C.levels > 0 else _rounded(u)
    _plane(P, codes, real, entry, first, C.low, 0, C)
    if C.high > 0:
        _plane(P, codes, real, entry, first, C.high, C.low, C)


@triton.jit
def code_tile(P, source, at, stride, real, page, slot, span, head, first, C: tl.constexpr):
    """Codes tokens (T,), those that are `real`, of a head, or of all where one range spans them; from channel `first`
    of each run. They start at `at` in the first head of `source`, heads being `stride` apart, and go to slots `slot` of
    pages `page`, int64, of `span` tokens."""
    d, inside = channels(first, C)
    if C.across:
        entry, start = page * C.heads * span + slot, at
        low, high = tl.full([C.tile], float("inf"), tl.float32), tl.full([C.tile], float("-inf"), tl.float32)
        for _ in range(0, C.heads):
            x = tokens_of(source, at, real, d, inside, C)
            least, most = extremes(x, members(P, entry, real, d, inside, C), 1, C)
            low, high = tl.minimum(low, least), tl.maximum(high, most)
            at, entry = at + stride, entry + span
        scale, offset = settled(P, low, high, page * span + slot, real, C)
        at, entry = start, page * C.heads * span + slot
        for _ in range(0, C.heads):
            x = tokens_of(source, at, real, d, inside, C)
            coded(P, x, real[:, None] & inside[None, :], scale[:, None], offset[:, None], real, entry, first, C)
            at, entry = at + stride, entry + span
    else:
        entry = (page * C.heads + head) * span + slot
        x = tokens_of(source, at + head.to(tl.int64) * stride, real, d, inside, C)
        if C.low == 0:
            tl.store(P.codes + entry[:, None] * C.dim + d[None, :], x, mask=real[:, None] & inside[None, :])
        else:
            member = members(P, entry, real, d, inside, C)
            if C.stored:
                scale, offset = measured(P, x, member, real, d, inside, entry, C)
            else:
                where = (head * C.dim + d)[None, :]
                scale = tl.load(P.fixed_scale + where, mask=inside[None, :], other=0.0)
                offset = tl.load(P.fixed_offset + where, mask=inside[None, :], other=0.0)
            coded(P, x, member, scale, offset, real, entry, first, C)
