"""Values to codes within a Triton kernel: what comes before they are packed (see `pack`), and how rounding is exact.

Channels are handled in an order that makes planar packing a sum: as 8 runs of D/8 channels, so that a field of a byte,
of any width, is a run or several. Divisions are exact and nothing is fused (`EXACT`), or the codes would differ from
the reference's.
"""

import triton
import triton.language as tl

from kvist.kernels.triton.side import Form, entry_of
from kvist.kernels.triton.unpack import PLAIN

EXACT = {"enable_fp_fusion": False}


def warps(form: Form) -> int:
    """For about 32 values per thread."""
    return max(1, min(16, form.tile * form.part * 8 // 1024))


@triton.jit
def channels(first, F: tl.constexpr):
    """The channel (8·part,) of every column, when each run of D/8 starts at its channel `first`; which are channels."""
    c = tl.arange(0, 8 * F.part)
    if F.even:
        return c, c < F.dim
    else:
        w = first + c % F.part
        return c // F.part * (F.dim // 8) + w, w < F.dim // 8


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
def tokens_of(source, start, real, d, inside, F: tl.constexpr):
    """Values (T, N), fp32, of tokens that begin at `start` (T,) of `source`; 0 where there are none."""
    if F.hadamard > 0:
        n = tl.arange(0, 8 * F.part)
        x = tl.load(source + start[:, None] + n[None, :], mask=real[:, None] & (n < F.dim)[None, :], other=0.0)
        x = butterflies(x.to(tl.float32), F.hadamard)
        if not F.even:
            x = tl.gather(x, tl.broadcast_to(tl.minimum(d, F.dim - 1)[None, :], (F.tile, 8 * F.part)), 1)
        return x
    else:
        x = tl.load(source + start[:, None] + d[None, :], mask=real[:, None] & inside[None, :], other=0.0)
        return x.to(tl.float32)


@triton.jit
def members(S, at, d, inside):
    """Which values (T, N) a range is measured of: those of tokens that no outlier slot took."""
    member = at.ok[:, None] & inside[None, :]
    if S.escaped is not None:
        where = entry_of(S, at)[:, None] * S.form.dim + d[None, :]
        member = member & (tl.load(S.escaped + where, mask=member, other=0) == 0)
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
def extremes(S, x, member, AXIS: tl.constexpr):
    """The least and the largest of the values that a range is measured of."""
    F: tl.constexpr = S.form
    if S.escaped is not None or not F.even or (F.along_tokens and F.tile != F.group):
        return _within(x, member, AXIS)
    else:  # none is left out, or else a whole token, whose ranges are not stored
        return tl.min(x, AXIS), tl.max(x, AXIS)


@triton.jit
def settled(S, low, high, where, mask):
    """Extremes to scale and offset (zero point): stored as fp16 where `mask`, and returned as values are divided with,
    fp32. A group without members has those of 0."""
    F: tl.constexpr = S.form
    nothing = low > high
    low, high = tl.where(nothing, 0.0, low), tl.where(nothing, 0.0, high)
    if F.symmetric:
        high = tl.maximum(tl.maximum(-low, high), 0.0)
        low = -high
    narrow = narrowed(quotient(tl.minimum(high - low, 65504.0 * F.steps), tl.full(low.shape, F.steps, tl.float32)))
    tl.store(S.scale + where, narrow, mask=mask)
    scale = narrow.to(tl.float32)
    if F.symmetric:
        offset = scale * F.shift
    else:
        narrow = narrowed((high + low) * 0.5 if F.levels > 0 else low)
        tl.store(S.offset + where, narrow, mask=mask)
        offset = narrow.to(tl.float32)
    return scale, offset


@triton.jit
def measured(S, at, x, member, d, inside):
    """Scale and offset of tokens, stored at their entries, to broadcast against their values (T, N)."""
    F: tl.constexpr = S.form
    T: tl.constexpr = x.shape[0]
    N: tl.constexpr = x.shape[1]
    groups: tl.constexpr = F.groups
    entry = entry_of(S, at)
    if F.along_tokens:
        low, high = extremes(S, x, member, 0)
        line = tl.min(tl.where(at.ok, entry, 1 << 62)) // F.group
        scale, offset = settled(S, low, high, line * F.dim + d, inside)
        scales, offsets = scale[None, :], offset[None, :]
    elif groups == 1:
        low, high = extremes(S, x, member, 1)
        scale, offset = settled(S, low, high, entry, at.ok)
        scales, offsets = scale[:, None], offset[:, None]
    elif F.even and F.dim == groups * F.group and (F.group & (F.group - 1)) == 0:
        split: tl.constexpr = (T, groups, F.group)
        low, high = extremes(S, tl.reshape(x, split), tl.reshape(member, split), 2)
        where = entry[:, None] * groups + tl.arange(0, groups)[None, :]
        scale, offset = settled(S, low, high, where, tl.broadcast_to(at.ok[:, None], (T, groups)))
        scales = tl.reshape(tl.broadcast_to(scale[:, :, None], split), (T, N))
        offsets = tl.reshape(tl.broadcast_to(offset[:, :, None], split), (T, N))
    else:  # groups that no reshaping cuts out: one after the other
        scales, offsets = tl.zeros([T, N], tl.float32), tl.zeros([T, N], tl.float32)
        for g in tl.static_range(groups):
            here = (d // F.group == g)[None, :]
            low, high = _within(x, member & here, 1)
            scale, offset = settled(S, low, high, entry * groups + g, at.ok)
            scales, offsets = tl.where(here, scale[:, None], scales), tl.where(here, offset[:, None], offsets)
    return scales, offsets
