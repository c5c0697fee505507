"""Codes to numbers and back, for the compiled CPU kernels: planes of bits, tables of points, fp16.

Every loop runs over neighbouring bytes at one shift, which is what the planar order of `bits` is for. Decoder and
attention share what is here; numba does not notice when a helper in another file changes, so delete `__pycache__` of
this folder after an edit.
"""

import numpy as np
from numba import njit
from numba.np.unsafe.ndarray import to_fixed_tuple

# No fast-math, for what must equal the reference; said outright, since numba lets a callee inherit its caller's.
EXACT = {"nogil": True, "cache": True, "error_model": "numpy", "fastmath": False}
FAST = {**EXACT, "fastmath": {"contract", "reassoc", "nsz", "arcp"}}


@njit(**EXACT)
def half(x):
    """fp32 to fp16, as its bits: the nearest, halves to even; beyond its range saturated, as `grid.narrow`."""
    sign = (np.float32(x).view(np.int32) >> np.int32(16)) & np.int32(0x8000)
    y = np.float32(min(abs(x), np.float32(65504.0)))
    if y < np.float32(2.0**-14):  # below the normal numbers steps are 2^-24, those of numbers from 1/2 to 1
        bits = np.float32(y + np.float32(0.5)).view(np.int32) - np.int32(0x3F000000)
    else:
        bits = y.view(np.int32) - np.int32(112 << 23)
        bits = (bits + np.int32(0xFFF) + ((bits >> np.int32(13)) & np.int32(1))) >> np.int32(13)
    return np.uint16(bits | sign)


@njit(**EXACT)
def number(half):
    """fp16, as its bits and finite, to fp32."""
    bits = np.int32(half)
    magnitude = np.int32((bits & np.int32(0x7FFF)) << np.int32(13)).view(np.float32) * np.float32(2.0**112)
    return -magnitude if bits & 0x8000 else magnitude


@njit(**EXACT)
def widen(half, scratch):
    """fp16 (n,), as its bits in uint16 and finite, to fp32 at the start of `scratch`, which is returned."""
    out = scratch[: half.shape[0]]
    bits = out.view(np.int32)
    for i in range(half.shape[0]):
        bits[i] = (np.int32(half[i]) & np.int32(0x7FFF)) << np.int32(13)
    for i in range(half.shape[0]):
        sign = np.float32(1.0) - np.float32(half[i] >> 15) * np.float32(2.0)
        out[i] = out[i] * np.float32(2.0**112) * sign
    return out


@njit(**EXACT)
def unpack(codes, low, high, x):
    """Codes (T, bytes) to numbers (T, D): a plane of `low` bits, and one of `high` bits above it, or none (0)."""
    tokens, dim = codes.shape[0], x.shape[1]
    size, mask = dim * low // 8, np.int32((1 << low) - 1)
    for s in range(8 // low):
        shift = np.int32(s * low)
        for t in range(tokens):
            source, out = codes[t, :size], x[t, s * size : (s + 1) * size]
            for w in range(out.shape[0]):
                out[w] = np.float32((np.int32(source[w]) >> shift) & mask)
    if high:
        weight, rest, mask = np.float32(1 << low), dim * high // 8, np.int32((1 << high) - 1)
        for s in range(8 // high):
            shift = np.int32(s * high)
            for t in range(tokens):
                source, out = codes[t, size:], x[t, s * rest : (s + 1) * rest]
                for w in range(out.shape[0]):
                    out[w] += weight * np.float32((np.int32(source[w]) >> shift) & mask)


@njit(**EXACT)
def pack(levels, low, high, out):
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


@njit(**EXACT)
def _of_two(c, p):
    return p[1] if c & 1 else p[0]


@njit(**EXACT)
def _of_four(c, p):
    low, high = _of_two(c, p[:2]), _of_two(c, p[2:])
    return high if c & 2 else low


@njit(**EXACT)
def _of_eight(c, p):
    low, high = _of_four(c, p[:4]), _of_four(c, p[4:])
    return high if c & 4 else low


@njit(**EXACT)
def _of_sixteen(c, p):
    low, high = _of_eight(c, p[:8]), _of_eight(c, p[8:])
    return high if c & 8 else low


@njit(**EXACT)
def look_up(x, points):
    """Codes (n,), as fp32, become the points they name; no points: they stay.

    A tree of selects on the bits of the code, which becomes vector blends: three times the speed of gathers at 4 bits.
    """
    if points.shape[0] == 2:
        p2 = to_fixed_tuple(points, 2)  # pyright: ignore[reportCallIssue]
        for i in range(x.shape[0]):
            x[i] = _of_two(np.int32(x[i]), p2)
    elif points.shape[0] == 4:
        p4 = to_fixed_tuple(points, 4)  # pyright: ignore[reportCallIssue]
        for i in range(x.shape[0]):
            x[i] = _of_four(np.int32(x[i]), p4)
    elif points.shape[0] == 8:
        p8 = to_fixed_tuple(points, 8)  # pyright: ignore[reportCallIssue]
        for i in range(x.shape[0]):
            x[i] = _of_eight(np.int32(x[i]), p8)
    elif points.shape[0] == 16:
        p16 = to_fixed_tuple(points, 16)  # pyright: ignore[reportCallIssue]
        for i in range(x.shape[0]):
            x[i] = _of_sixteen(np.int32(x[i]), p16)
    elif points.shape[0]:
        for i in range(x.shape[0]):
            x[i] = points[np.int32(x[i])]


@njit(**EXACT)
def affine(x, scale, offset, group, along_tokens):
    """x (T, D) becomes x·scale + offset: numbers (T·G,) shared by `group` neighbouring channels, or (T/group·D,) shared
    by `group` tokens."""
    tokens, dim = x.shape
    if along_tokens:
        for t in range(tokens):
            first = t // group * dim
            row, s, o = x[t], scale[first : first + dim], offset[first : first + dim]
            for d in range(dim):
                row[d] = row[d] * s[d] + o[d]
        return
    groups = (dim + group - 1) // group
    for t in range(tokens):
        for g in range(groups):
            part = x[t, g * group : min((g + 1) * group, dim)]
            a, b = scale[t * groups + g], offset[t * groups + g]
            for d in range(part.shape[0]):
                part[d] = part[d] * a + b
