"""Grouped min-max rounding and its inverse on a CPU: to the bit what the reference in `coding` gives.

Encoding takes two passes over a tile. The first finds the extremes of each group; torch narrows them to fp16; the
second divides, rounds and packs. Decoding takes one. The Hadamard rotation is here too.
"""

import numpy as np
import torch
from numba import njit
from torch import Tensor

from kvist.kernels.bits import PLANES, packed_bytes
from kvist.kernels.grid import narrow

_EXACT = {"nogil": True, "cache": True, "error_model": "numpy"}  # no fast-math: codes must equal the reference's


@njit(**_EXACT)
def _extremes_along_tokens(x, group, low, high):
    """x (N, T, D) to the extremes of `group` neighbouring tokens, (N, T/g, D)."""
    for n in range(x.shape[0]):
        for g in range(low.shape[1]):
            lo, hi = low[n, g], high[n, g]
            lo[:] = x[n, g * group]
            hi[:] = lo
            for t in range(g * group + 1, (g + 1) * group):
                y = x[n, t]
                for d in range(y.shape[0]):
                    lo[d] = min(lo[d], y[d])
                    hi[d] = max(hi[d], y[d])


@njit(**_EXACT)
def _extremes_along_channels(x, group, low, high):
    """x (N, T, D) to the extremes of `group` neighbouring channels, (N, T, G); the last group may be shorter."""
    dim = x.shape[2]
    for n in range(x.shape[0]):
        for t in range(x.shape[1]):
            for g in range(low.shape[2]):
                y = x[n, t, g * group : min((g + 1) * group, dim)]
                lo = hi = y[0]
                for d in range(y.shape[0]):
                    lo, hi = min(lo, y[d]), max(hi, y[d])
                low[n, t, g], high[n, t, g] = lo, hi


@njit(**_EXACT)
def _pack(levels, low, high, out):
    """One row of whole numbers (D,), as fp32, to bytes: a plane of `low` bits, and one of `high` bits or none (0)."""
    size = levels.shape[0] * low // 8
    for s in range(8 // low):
        part, shift, mask = levels[s * size : (s + 1) * size], np.int32(s * low), np.int32((1 << low) - 1)
        plane = out[:size]
        for w in range(size):
            byte = (np.int32(part[w]) & mask) << shift
            plane[w] = np.uint8(byte) if s == 0 else plane[w] | np.uint8(byte)
    if high:
        rest, mask, down = levels.shape[0] * high // 8, np.int32((1 << high) - 1), np.int32(low)
        for s in range(8 // high):
            part, shift, plane = levels[s * rest : (s + 1) * rest], np.int32(s * high), out[size:]
            for w in range(rest):
                byte = ((np.int32(part[w]) >> down) & mask) << shift
                plane[w] = np.uint8(byte) if s == 0 else plane[w] | np.uint8(byte)


@njit(**_EXACT)
def _codes(x, scale, offset, group, along_tokens, top, low, high, out):
    """x (N, T, D), fp32 scale and offset, to packed codes (N, T, D·bits/8)."""
    dim = x.shape[2]
    levels = np.empty(dim, np.float32)
    for n in range(x.shape[0]):
        for t in range(x.shape[1]):
            y = x[n, t]
            if along_tokens:
                s, o = scale[n, t // group], offset[n, t // group]
                for d in range(dim):
                    levels[d] = min(max(np.rint((y[d] - o[d]) / s[d]), np.float32(0.0)), top)
            else:
                for g in range(scale.shape[2]):
                    a, b = g * group, min((g + 1) * group, dim)
                    part, into, s1, o1 = y[a:b], levels[a:b], scale[n, t, g], offset[n, t, g]
                    for d in range(b - a):
                        into[d] = min(max(np.rint((part[d] - o1) / s1), np.float32(0.0)), top)
            _pack(levels, low, high, out[n, t])


@njit(**_EXACT)
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


def encode(traits, x: Tensor) -> dict[str, Tensor]:
    """Values (..., H, T, D), fp32, to the arrays of `Codec.layout`. `traits` are those of the codec."""
    lead, (tokens, dim) = x.shape[:-2], x.shape[-2:]
    source = x.reshape(-1, tokens, dim).contiguous().numpy()
    along_tokens, group = traits.along == "tokens", traits.group or dim
    groups = (tokens // group, dim) if along_tokens else (tokens, -(-dim // group))
    low, high = (torch.empty(source.shape[0], *groups) for _ in range(2))
    (_extremes_along_tokens if along_tokens else _extremes_along_channels)(source, group, low.numpy(), high.numpy())
    top = 2**traits.bits - 1
    scale, offset = narrow((high - low) / top), narrow(low)
    divisor = scale.float()
    divisor.masked_fill_(divisor == 0, 1.0)
    codes = torch.empty(source.shape[0], tokens, packed_bytes(dim, traits.bits), dtype=torch.uint8)
    low_bits, high_bits = (*PLANES[traits.bits], 0)[:2]
    numbers = (divisor.numpy(), offset.float().numpy(), group, along_tokens, np.float32(top))
    _codes(source, *numbers, low_bits, high_bits, codes.numpy())
    named = {"codes": codes, "scale": scale, "offset": offset}
    return {name: array.view(*lead, *array.shape[1:]) for name, array in named.items()}


@njit(**_EXACT)
def _decode(codes, scale, offset, group, along_tokens, low, high, out):
    """Packed codes (N, T, D·bits/8), fp32 scale and offset, to values (N, T, D)."""
    dim = out.shape[2]
    size, rest = dim * low // 8, dim * high // 8
    for n in range(out.shape[0]):
        for t in range(out.shape[1]):
            row, source = out[n, t], codes[n, t]
            for s in range(8 // low):
                part, shift, mask = row[s * size : (s + 1) * size], np.int32(s * low), np.int32((1 << low) - 1)
                for w in range(size):
                    part[w] = np.float32((np.int32(source[w]) >> shift) & mask)
            if high:
                upper, mask, weight = source[size:], np.int32((1 << high) - 1), np.float32(1 << low)
                for s in range(8 // high):
                    part, shift = row[s * rest : (s + 1) * rest], np.int32(s * high)
                    for w in range(rest):
                        part[w] += weight * np.float32((np.int32(upper[w]) >> shift) & mask)
            if along_tokens:
                a, b = scale[n, t // group], offset[n, t // group]
                for d in range(dim):
                    row[d] = row[d] * a[d] + b[d]
            else:
                for g in range(scale.shape[2]):
                    part, a1, b1 = row[g * group : min((g + 1) * group, dim)], scale[n, t, g], offset[n, t, g]
                    for d in range(part.shape[0]):
                        part[d] = part[d] * a1 + b1


def decode(traits, arrays: dict[str, Tensor]) -> Tensor:
    """The arrays of `Codec.layout` to values (..., H, T, D), fp32, in the transformed space."""
    codes = arrays["codes"]
    lead, (tokens, size) = codes.shape[:-2], codes.shape[-2:]
    dim = size * 8 // traits.bits
    flat = codes.reshape(-1, tokens, size).contiguous()
    out = torch.empty(flat.shape[0], tokens, dim)
    scale, offset = (arrays[n].reshape(-1, *arrays[n].shape[-2:]).float().contiguous() for n in ("scale", "offset"))
    low, high = (*PLANES[traits.bits], 0)[:2]
    numbers = (scale.numpy(), offset.numpy(), traits.group or dim, traits.along == "tokens", low, high)
    _decode(flat.numpy(), *numbers, out.numpy())
    return out.view(*lead, tokens, dim)
