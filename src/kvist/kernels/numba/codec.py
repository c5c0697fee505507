"""Coding (quantize) and decoding (dequantize) on a CPU: to the bit what the reference in `coding` gives.

Encoding takes up to three passes over a tile: outliers are found; the extremes of each group are measured, and
narrowed to fp16; entries are divided, rounded and packed. Decoding takes one. The Hadamard rotation is here
too.

A range is a scale and an offset (N or 1, H or 1, entries·numbers), fp32; it is shared by `group` neighbours along
tokens or along channels. Fixed ranges are shared along tokens by all of them.
"""

from math import prod

import numpy as np
import torch
from numba import njit
from torch import Tensor

from kvist.kernels.contract import PLANES, Constants, Traits, packed_bytes
from kvist.kernels.numba.codes import EXACT, affine, half, look_up, number, pack, unpack
from kvist.kernels.numba.sparse import clipped, find, overwrite

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
def _extremes_along_tokens(x, entries, group, low, high):
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
def _extremes_along_channels(x, entries, group, low, high):
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
def _settle(low, high, centred, steps, scale, offset):
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
def _codes(x, scale, offset, group, along_tokens, edges, top, low, high, out):
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
def _butterflies(x, block, scale):
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


def rotate(x: Tensor, block: int) -> Tensor:
    """`grid.rotate`."""
    y = x.clone(memory_format=torch.contiguous_format)
    _butterflies(y.view(-1, x.shape[-1]).numpy(), block, np.float32(block**-0.5))
    return y


Range = tuple[np.ndarray, np.ndarray]
NOTHING, NO_RANGE = np.empty(0, np.float32), np.empty((0, 0), np.float32)


def _sharing(traits: Traits, tokens: int, dim: int) -> tuple[int, bool]:
    """How many neighbours share a range, and whether along tokens: see the module."""
    if traits.range == "fixed":
        return max(1, tokens), True
    return traits.group or dim, traits.along == "tokens"


def _measure(traits: Traits, x: np.ndarray, entries: np.ndarray) -> tuple[dict[str, Tensor], Range]:
    """Scale and offset of values (N, H, T, D) as they are stored, and as entries are divided with."""
    count, heads, tokens, dim = x.shape
    along_tokens, group = traits.along == "tokens", traits.group or dim
    groups = (tokens // group, dim) if along_tokens else (tokens, -(-dim // group))
    shape = (count, 1 if traits.across_heads else heads, *groups)
    low, high = np.full(shape, np.inf, np.float32), np.full(shape, -np.inf, np.float32)
    (_extremes_along_tokens if along_tokens else _extremes_along_channels)(x, entries, group, low, high)
    centred = traits.levels == "table"
    steps, bits = np.float32(2 if centred else 2**traits.bits - 1), np.empty((2, *shape), np.uint16)
    _settle(low.ravel(), high.ravel(), centred, steps, bits[0].ravel(), bits[1].ravel())
    stored = torch.from_numpy(bits.view(np.float16))
    stored = stored.squeeze(2) if traits.across_heads else stored
    flat = (*shape[:2], groups[0] * groups[1])
    return {"scale": stored[0], "offset": stored[1]}, (high.reshape(flat), low.reshape(flat))


def _escape(traits: Traits, x: np.ndarray, fixed: Range, entries: np.ndarray) -> dict[str, Tensor]:
    """Outliers of values (N, H, T, D) as they are stored; their numbers to `entries` (N, T, slots)."""
    outlier, ends = np.empty(entries.shape, np.uint16), np.empty((*entries.shape[:2], x.shape[1]), np.uint8)
    channel = np.empty(entries.shape, np.uint8 if x.shape[3] <= 256 else np.int16)
    find(x, *fixed, traits.rank == "largest", entries, outlier, channel, ends)
    named = {"outlier": outlier.view(np.float16), "channel": channel, "ends": ends}
    return {name: torch.from_numpy(array) for name, array in named.items()}


def encode(traits: Traits, x: Tensor, constants: Constants, slots: int) -> dict[str, Tensor]:
    """See `choose`: ENCODE."""
    lead, (heads, tokens, dim) = x.shape[:-3], x.shape[-3:]
    count, top, fixed, found = prod(lead), 2**traits.bits - 1, (NO_RANGE, NO_RANGE), {}
    source = x.reshape(count, heads, tokens, dim).contiguous().numpy()
    entries, edges = np.empty((count, tokens, slots), np.int32), NOTHING
    if constants.scale is not None and constants.offset is not None:
        scale = constants.scale.numpy()
        fixed = np.where(scale > 0, scale, np.float32(1.0)), constants.offset.numpy()
    if constants.edges is not None:
        edges = constants.edges.numpy()
    if slots:
        found = _escape(traits, source, fixed, entries)
    if fixed[0].size:
        ranges = fixed[0][None], fixed[1][None]
    else:
        stored, ranges = _measure(traits, source, entries)
        found |= stored
    codes = torch.empty(count, heads, tokens, packed_bytes(dim, traits.bits), dtype=torch.uint8)
    planes, sharing = (*PLANES[traits.bits], 0), _sharing(traits, tokens, dim)
    _codes(source, *ranges, *sharing, edges, np.float32(top), planes[0], planes[1], codes.numpy())
    arrays = {name: array.view(*lead, *array.shape[1:]) for name, array in {"codes": codes, **found}.items()}
    if fixed[0].size:
        ends = (np.float32(-1), np.float32(1)) if edges.size else (np.float32(0), np.float32(top))
        arrays["clipped"] = torch.tensor(clipped(source, *fixed, *ends, entries))
    return arrays


@njit(**EXACT)
def _decode(codes, scale, offset, group, along_tokens, points, low, high, out):
    """Packed codes (N, H, T, D·bits/8) and their range to values (N, H, T, D)."""
    for n in range(out.shape[0]):
        for h in range(out.shape[1]):
            a, b = min(n, scale.shape[0] - 1), min(h, scale.shape[1] - 1)
            x = out[n, h]
            unpack(codes[n, h], low, high, x)
            look_up(x.reshape(x.size), points)
            affine(x, scale[a, b], offset[a, b], group, along_tokens)


@njit(**EXACT)
def _restore(outlier, channel, ends, out):
    for n in range(out.shape[0]):
        for h in range(out.shape[1]):
            overwrite(out[n, h], h, outlier[n], channel[n], ends[n])


def decode(traits: Traits, arrays: dict[str, Tensor], constants: Constants) -> Tensor:
    """See `choose`: DECODE."""
    codes = arrays["codes"]
    lead, (heads, tokens, size) = codes.shape[:-3], codes.shape[-3:]
    count, dim = prod(lead), size * 8 // traits.bits
    out = torch.empty(count, heads, tokens, dim)
    if constants.scale is not None and constants.offset is not None:
        scale, offset = (x[None].numpy() for x in (constants.scale, constants.offset))
    else:
        stored = (arrays[name].float() for name in ("scale", "offset"))
        shape = count, 1 if traits.across_heads else heads
        scale, offset = (x.reshape(*shape, prod(x.shape[-2:])).contiguous().numpy() for x in stored)
    points = NOTHING if constants.points is None else constants.points.numpy()
    flat = codes.reshape(count, heads, tokens, size).contiguous().numpy()
    planes, sharing = (*PLANES[traits.bits], 0), _sharing(traits, tokens, dim)
    _decode(flat, scale, offset, *sharing, points, planes[0], planes[1], out.numpy())
    if traits.outliers:
        rows = (arrays[name] for name in ("outlier", "channel", "ends"))
        outlier, channel, ends = (a.reshape(count, *a.shape[-2:]).contiguous() for a in rows)
        _restore(outlier.numpy().view(np.uint16), channel.numpy(), ends.numpy(), out.numpy())
    return out.view(*lead, *out.shape[1:])
