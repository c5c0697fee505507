"""Queries meet keys, and scores become weights: what packed and loose tokens share in Triton decode attention."""

import triton
import triton.language as tl

from kvist.kernels.triton.tiles import angles, decoded, first_of, hadamard, second_of, slice_channels

LOG2E = tl.constexpr(1.4426950408889634)
NONE = tl.constexpr(-1e30)  # the maximum of no scores: finite, so that differences are numbers


@triton.jit
def soften(s, seen, top, total, SOFTCAP: tl.constexpr):
    """Scores (T, M) to weights 2^(s - top'), with the new maximum (M,), the sums (T, M) not yet added up over T, and
    what old sums fade by (M,)."""
    if SOFTCAP > 0:
        nat = s / (SOFTCAP * LOG2E)
        s = (1.0 - 2.0 / (tl.exp(2.0 * nat) + 1.0)) * (SOFTCAP * LOG2E)
    s = tl.where(seen, s, float("-inf"))
    new = tl.maximum(top, tl.max(s, 0))
    fade = tl.exp2(top - new)
    weights = tl.exp2(s - new[None, :])
    return weights, new, total * fade[None, :] + weights, fade


@triton.jit
def _turned(q, base, head_columns, real, F: tl.constexpr, d):
    """Rows d (N,) of the block Hadamard matrix times the queries (N, M), fp32."""
    channel = tl.arange(0, F.padded)
    inside = real[None, :] & (channel < F.dim)[:, None]
    whole = tl.load(q + base + head_columns[None, :] * F.dim + channel[:, None], mask=inside, other=0.0).to(tl.float32)
    return tl.dot(hadamard(d[:, None], channel[None, :], F.hadamard), whole, input_precision="tf32x3")


@triton.jit
def _query(q, base, columns, real, d, turned: tl.constexpr, F: tl.constexpr):
    """Channels d (N,) of the queries, (N, M), fp32; `turned`: in the space of the packed keys."""
    if turned and F.hadamard > 0:
        found = _turned(q, base, columns, real, F, d)
    else:
        inside = real[None, :] & (d < F.dim)[:, None]
        found = tl.load(q + base + columns[None, :] * F.dim + d[:, None], mask=inside, other=0.0).to(tl.float32)
    return found


@triton.jit
def packed_query(q, base, columns, real, F: tl.constexpr, FOLDED: tl.constexpr, P2: tl.constexpr, REST: tl.constexpr):
    """The queries as packed keys meet them: slices for `folded_scores`, or what `_dense_scores` takes."""
    found = ()
    if FOLDED:
        for j in tl.static_range(F.dim * F.low // 8 // F.block):
            for i in tl.static_range(16 // F.low):
                found = found + (_query(q, base, columns, real, slice_channels(j, i, F), True, F),)
    elif F.pairs == 0:
        found = found + (_query(q, base, columns, real, tl.arange(0, F.padded), True, F),)
    else:
        pair = tl.arange(0, P2)
        found = found + (_query(q, base, columns, real, first_of(pair, F), True, F),)
        found = found + (_query(q, base, columns, real, second_of(pair, F), True, F),)
        if 2 * F.pairs < F.dim:
            found = found + (_query(q, base, columns, real, 2 * F.pairs + tl.arange(0, REST), True, F),)
    return found


@triton.jit
def peak(q):
    """The largest size of any part of the queries (M,), 1 where all are 0."""
    high = tl.max(tl.abs(q[0]), 0)
    for i in tl.static_range(1, len(q)):
        high = tl.maximum(high, tl.max(tl.abs(q[i]), 0))
    return tl.where(high > 0, high, 1.0)


@triton.jit
def scaled(q, factor):
    found = ()
    for i in tl.static_range(len(q)):
        found = found + (q[i] * factor[None, :],)
    return found


@triton.jit
def dense_scores(K, q, r, page, slot, position, ok, head, F: tl.constexpr):
    """q·k (T, M) of packed keys decoded one by one; q: all channels, or the first and second of each rotated pair and
    the rest, times r."""
    if F.pairs == 0:
        x = decoded(K, page, slot, ok, head, tl.arange(0, F.padded), F)
        s = tl.dot(x.to(tl.float16), (q[0] * r).to(tl.float16))
    else:
        pair = tl.arange(0, q[0].shape[0])
        a = decoded(K, page, slot, ok, head, first_of(pair, F), F)
        b = decoded(K, page, slot, ok, head, second_of(pair, F), F)
        cos, sin = angles(K, position[:, None], pair[None, :], F)
        s = tl.dot((a * cos - b * sin).to(tl.float16), (q[0] * r).to(tl.float16))
        s = tl.dot((b * cos + a * sin).to(tl.float16), (q[1] * r).to(tl.float16), s)
        if 2 * F.pairs < F.dim:
            x = decoded(K, page, slot, ok, head, 2 * F.pairs + tl.arange(0, q[2].shape[0]), F)
            s = tl.dot(x.to(tl.float16), (q[2] * r).to(tl.float16), s)
    return s / r
