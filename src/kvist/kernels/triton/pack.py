"""Values of one side coded (quantized) and packed within a Triton kernel: the one encoder, a tile of tokens at a time.

Words of four bytes are formed first, within a thread, and their bits put together then: few exchanges between threads.
"""

import triton
import triton.language as tl

from kvist.kernels.triton.coding import channels, extremes, measured, members, quotient, settled, tokens_of
from kvist.kernels.triton.side import Tokens, entry_of, fixed_range, ranges_of


@triton.jit
def _halved(u, edges, HALF: tl.constexpr):
    """One step of a binary search: HALF where u lies above the middle edge, and the edges still in question."""
    above, rest = u > edges[HALF - 1], ()
    for i in tl.static_range(HALF - 1):
        rest = rest + (tl.where(above, edges[HALF + i], edges[i]),)
    return tl.where(above, HALF, 0), rest


@triton.jit
def _looked_up(S, u):
    """How many of the ascending edges of a table (codebook) lie below u, int32."""
    F: tl.constexpr = S.form
    edges = ()
    for i in tl.static_range(F.levels - 1):
        edges = edges + (tl.load(S.constants.edges + i),)
    codes = tl.zeros(u.shape, tl.int32)
    for i in tl.static_range(F.low + F.high):
        step, edges = _halved(u, edges, F.levels >> (i + 1))
        codes += step
    return codes


@triton.jit
def _rounded(u):
    """u from 0 to 255 to the nearest integer, halves to even: at 2^23 neighbouring numbers are 1 apart, so that adding
    rounds, and leaves the integer in the low byte."""
    return (u + 8388608.0).to(tl.int32, bitcast=True) & 255


@triton.jit
def _plane(S, at, codes, first, PLANE: tl.constexpr, LOW: tl.constexpr):
    """The bits of codes (T, N) from LOW up, as a plane of PLANE bits of the bytes of their tokens."""
    F: tl.constexpr = S.form
    eighth: tl.constexpr = F.dim // 8
    runs: tl.constexpr = 8 // PLANE
    unit: tl.constexpr = 4 if eighth % 4 == 0 else 1  # bytes that are stored together
    columns: tl.constexpr = F.part * PLANE // unit
    x = (codes >> LOW) & ((1 << PLANE) - 1) if F.high > 0 else codes
    if unit > 1:
        x = tl.reshape(x, (F.tile, 2 * F.part, 4)) << (tl.arange(0, 4) * 8)[None, None, :]
        x = tl.sum(x, 2)
    if runs > 1:
        x = tl.sum(tl.reshape(x, (F.tile, runs, columns)) << (tl.arange(0, runs) * PLANE)[None, :, None], 1)
    where = tl.arange(0, columns)
    mask = at.ok[:, None]
    if not F.even:
        run, w = where // (F.part // unit), first // unit + where % (F.part // unit)
        where, mask = run * (eighth // unit) + w, mask & (w < eighth // unit)[None, :]
    where = entry_of(S, at)[:, None] * (eighth * (F.low + F.high) // unit) + (LOW * eighth // unit + where)[None, :]
    if unit > 1:
        tl.store(S.words + where, x, mask=mask)
    else:
        tl.store(S.codes + where, x.to(tl.uint8), mask=mask)


@triton.jit
def _coded(S, at, x, member, scale, offset, first):
    """Values (T, N) divided, rounded and packed at their entries; scale and offset broadcast against them."""
    F: tl.constexpr = S.form
    scale = tl.where(scale > 0, scale, 1.0)
    # `quotient` is exact for some thousand scales: values are cut off beyond all levels, where their codes are the same
    low, high = (scale * -1024.0, scale * 1024.0) if F.levels > 0 or not F.stored else (scale * 0.0, scale * F.steps)
    u = quotient(tl.minimum(tl.maximum(x - offset, low), high), scale)
    if not F.stored:
        beyond = tl.abs(u) > 1.0 if F.levels > 0 else (u < 0.0) | (u > F.steps)
        count = tl.sum(tl.sum((beyond & member).to(tl.int32), 1), 0)
        tl.atomic_add(S.clipped, count.to(tl.int64), sem="relaxed")
        u = u if F.levels > 0 else tl.minimum(tl.maximum(u, 0.0), F.steps)
    codes = _looked_up(S, u) if F.levels > 0 else _rounded(u)
    _plane(S, at, codes, first, F.low, 0)
    if F.high > 0:
        _plane(S, at, codes, first, F.high, F.low)


@triton.jit
def _across(S, source, start, stride, at, first):
    """`code_tile` where one range spans all heads: they are read twice, to be measured and to be coded."""
    F: tl.constexpr = S.form
    d, inside = channels(first, F)
    low, high = tl.full([F.tile], float("inf"), tl.float32), tl.full([F.tile], float("-inf"), tl.float32)
    for head in range(0, F.heads):
        here = Tokens(at.page, at.slot, at.ok, head)
        x = tokens_of(source, start + tl.cast(head, tl.int64) * stride, at.ok, d, inside, F)
        least, most = extremes(S, x, members(S, here, d, inside), 1)
        low, high = tl.minimum(low, least), tl.maximum(high, most)
    scale, offset = settled(S, low, high, ranges_of(S, at), at.ok)
    for head in range(0, F.heads):
        here = Tokens(at.page, at.slot, at.ok, head)
        x = tokens_of(source, start + tl.cast(head, tl.int64) * stride, at.ok, d, inside, F)
        _coded(S, here, x, at.ok[:, None] & inside[None, :], scale[:, None], offset[:, None], first)


@triton.jit
def code_tile(S, source, start, stride, at, first):
    """Codes tokens of a head, or of all where one range spans them; from channel `first` of each run. Their values
    begin at `start` (T,) of `source`, for the first head; heads are `stride` apart."""
    F: tl.constexpr = S.form
    if F.across:
        _across(S, source, start, stride, at, first)
    else:
        d, inside = channels(first, F)
        x = tokens_of(source, start + at.head.to(tl.int64) * stride, at.ok, d, inside, F)
        if F.low == 0:
            where = entry_of(S, at)[:, None] * F.dim + d[None, :]
            tl.store(S.codes + where, x, mask=at.ok[:, None] & inside[None, :])
        else:
            member = members(S, at, d, inside)
            if F.stored:
                scale, offset = measured(S, at, x, member, d, inside)
            else:
                scale, offset = fixed_range(S, at.head, d)
            _coded(S, at, x, member, scale, offset, first)
