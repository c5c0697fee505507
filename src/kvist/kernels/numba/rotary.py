"""Rotary embedding inside attention on a CPU: keys lie before their rotation, and are scored as if rotated.

A key at position p + t and a query score like the key turned by t alone and the query turned back by p. So a page's
keys turn by a small table, t < page, that all pages share, and the query once per page. Angles are formed in fp64:
p·f in fp32 is off by some thousandths of a radian at position 100,000.
"""

import math
from functools import lru_cache

import numpy as np
from numba import njit

from kvist.kernels.numba.codes import FAST


@lru_cache(64)
def turns(frequencies: bytes, page: int, scaling: float) -> tuple[np.ndarray, np.ndarray]:
    """scaling·cos and scaling·sin (page, F), fp32, of the angles t·f; frequencies (F,) as the bytes of fp32 numbers."""
    angles = np.arange(page)[:, None] * np.frombuffer(frequencies, np.float32).astype(np.float64)
    return (scaling * np.cos(angles)).astype(np.float32), (scaling * np.sin(angles)).astype(np.float32)


@njit(**FAST)
def phase(frequencies, position, cos, sin):
    """cos and sin (F,), fp64, of the angles position·f; frequencies (F,), fp32."""
    for i in range(frequencies.shape[0]):
        angle = np.float64(frequencies[i]) * position
        cos[i], sin[i] = math.cos(angle), math.sin(angle)


@njit(**FAST)
def advance(cos, sin, by_cos, by_sin):
    """cos and sin (F,) of some angles, in place, to those of the angles plus others."""
    for i in range(cos.shape[0]):
        c, s = cos[i], sin[i]
        cos[i], sin[i] = c * by_cos[i] - s * by_sin[i], s * by_cos[i] + c * by_sin[i]


@njit(**FAST)
def turn_back(q, cos, sin, out):
    """out (R, D) = q (R, D), pair i, channels (i, i + F), turned by minus angle i; the other channels stay."""
    pairs = cos.shape[0]
    for r in range(q.shape[0]):
        out[r] = q[r]
        a, b, into_a, into_b = q[r, :pairs], q[r, pairs : 2 * pairs], out[r, :pairs], out[r, pairs : 2 * pairs]
        for i in range(pairs):
            c, s = np.float32(cos[i]), np.float32(sin[i])
            into_a[i] = a[i] * c + b[i] * s
            into_b[i] = b[i] * c - a[i] * s


@njit(**FAST)
def turn(x, cos, sin):
    """x (T, D), in place: pair i of token t, channels (i, i + F), times (cos, sin)[t, i]; the other channels stay."""
    pairs = cos.shape[1]
    for t in range(x.shape[0]):
        a, b, c, s = x[t, :pairs], x[t, pairs : 2 * pairs], cos[t], sin[t]
        for i in range(pairs):
            a[i], b[i] = a[i] * c[i] - b[i] * s[i], b[i] * c[i] + a[i] * s[i]
