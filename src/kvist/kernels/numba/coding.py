"""The loops of coding (quantize) on a CPU: extremes of groups, ranges, codes, and the Hadamard rotation.

A range is a scale and an offset (N or 1, H or 1, entries·numbers), fp32; it is shared by `group` neighbours along
tokens or along channels. Fixed ranges are shared along tokens by all of them.
"""

import numpy as np
from numba import njit

from kvist.kernels.numba.codes import EXACT, half, number, pack

_MEASURE = {**EXACT, "fastmath": {"nnan", "nsz", "reassoc"}}  # the smallest of numbers is exact in any order


@njit(**_MEASURE)
def _least(x):
    least = np.float32(np.inf)
    for i in range(x.shape[0]):
        least = min(least, x[i])
    return least


@njit(**EXACT)
def _without(x, head, entries, below, above):
    """One token of one head (D,) to below, x, and above, -x; the outliers `entries` (slots,) are infinite in both."""
    first, dim = head * x.shape[0], x.shape[0]
    for d in range(dim):
        below[d], above[d] = x[d], -x[d]
    for c in entries:
        if first <= c < first + dim:
            below[c - first], above[c - first] = np.float32(np.inf), np.float32(np.inf)


@njit(**EXACT)
def extremes_along_tokens(x, entries, group, low, high):
    """x (N, H, T, D) to the extremes of `group` neighbouring tokens, (N, H, T/g, D), without the outliers `entries`
    (N, T, slots)."""
    dim = x.shape[3]
    below, above = np.empty(dim, np.float32), np.empty(dim, np.float32)
    for n in range(x.shape[0]):
        for h in range(x.shape[1]):
            for g in range(low.shape[2]):
                lo, hi = low[n, h, g], high[n, h, g]
                for t in range(g * group, (g + 1) * group):
                    y = x[n, h, t]
                    if entries.shape[2]:
                        _without(y, h, entries[n, t], below, above)
                        for d in range(dim):
                            lo[d], hi[d] = min(lo[d], below[d]), max(hi[d], -above[d])
                    else:
                        for d in range(dim):
                            lo[d], hi[d] = min(lo[d], y[d]), max(hi[d], y[d])


@njit(**EXACT)
def extremes_along_channels(x, entries, group, low, high):
    """x (N, H, T, D) to the extremes of `group` neighbouring channels, (N, H, T, G), or over all heads, (N, 1, T, 1),
    without the outliers `entries` (N, T, slots). The last group may be shorter."""
    heads, tokens, dim = x.shape[1:]
    below, above = np.empty(dim, np.float32), np.empty(dim, np.float32)
    for n in range(x.shape[0]):
        for t in range(tokens):
            for h in range(heads):
                into = min(h, low.shape[1] - 1)
                lows, highs, y = low[n, into, t], high[n, into, t], x[n, h, t]
                if entries.shape[2]:
                    _without(y, h, entries[n, t], below, above)
                for g in range(lows.shape[0]):
                    first, last = g * group, min((g + 1) * group, dim)
                    if entries.shape[2]:
                        lows[g] = min(lows[g], _least(below[first:last]))
                        highs[g] = max(highs[g], -_least(above[first:last]))
                        continue
                    part = y[first:last]
                    lo, hi = lows[g], highs[g]
                    for d in range(part.shape[0]):
                        lo, hi = min(lo, part[d]), max(hi, part[d])
                    lows[g], highs[g] = lo, hi


@njit(**EXACT)
def to_ranges(low, high, centred, steps, scale, offset):
    """Extremes (n,) to scale and offset, fp16 bits, as the `affine` of their levels forms them: (high - low) / steps,
    and low or, `centred`, the middle; 0 where a group has no members but outliers. In place: low becomes the offset,
    high what is divided by, the scale or 1."""
    for i in range(low.shape[0]):
        if low[i] > high[i]:
            low[i], high[i] = np.float32(0.0), np.float32(0.0)
        scale[i] = half((high[i] - low[i]) / steps)
        offset[i] = half((high[i] + low[i]) / steps if centred else low[i])
        low[i], high[i] = number(offset[i]), number(scale[i])
        if not high[i] > 0:
            high[i] = np.float32(1.0)


@njit(**EXACT)
def _normalise(x, scale, offset, group, along_tokens, token, u):
    """u (D,) = (x - offset) / scale of one token (D,)."""
    dim = x.shape[0]
    if along_tokens:
        first = token // group * dim
        s, o = scale[first : first + dim], offset[first : first + dim]
        for d in range(dim):
            u[d] = (x[d] - o[d]) / s[d]
        return
    groups = (dim + group - 1) // group
    for g in range(groups):
        part, into = x[g * group : min((g + 1) * group, dim)], u[g * group : min((g + 1) * group, dim)]
        a, b = scale[token * groups + g], offset[token * groups + g]
        for d in range(part.shape[0]):
            into[d] = (part[d] - b) / a


@njit(**EXACT)
def to_codes(x, scale, offset, group, along_tokens, edges, top, low, high, out):
    """x (N, H, T, D) and its range to packed codes (N, H, T, D·bits/8)."""
    dim = x.shape[3]
    u, levels = np.empty(dim, np.float32), np.empty(dim, np.float32)
    for n in range(x.shape[0]):
        for h in range(x.shape[1]):
            a, b = min(n, scale.shape[0] - 1), min(h, scale.shape[1] - 1)
            for t in range(x.shape[2]):
                _normalise(x[n, h, t], scale[a, b], offset[a, b], group, along_tokens, t, u)
                if edges.shape[0]:
                    levels[:] = np.float32(0.0)
                    for edge in edges:
                        for d in range(dim):
                            levels[d] += np.float32(0.0) if u[d] <= edge else np.float32(1.0)
                else:
                    for d in range(dim):
                        levels[d] = min(max(np.rint(u[d]), np.float32(0.0)), top)
                pack(levels, low, high, out[n, h, t])


@njit(**EXACT)
def butterflies(x, block, scale):
    """x (N, D), in place: see `grid.rotate`, whose order of sums and differences this is."""
    for n in range(x.shape[0]):
        for first in range(0, x.shape[1], block):
            row = x[n, first : first + block]
            for d in range(block):
                row[d] *= scale
            half = 1
            while half < block:
                for i in range(0, block, 2 * half):
                    low, high = row[i : i + half], row[i + half : i + 2 * half]
                    for j in range(half):
                        a, b = low[j], high[j]
                        low[j], high[j] = a + b, a - b
                half *= 2
