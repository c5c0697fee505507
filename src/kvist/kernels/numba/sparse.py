"""Outliers on a CPU: found, written over the dense part, counted. Entries of a token are numbered h·D + d.

Those of a token lie together, sorted by number: head h owns slots [ends[h-1], ends[h]), each with its channel within
the head.
"""

import numpy as np
from numba import njit

from kvist.kernels.numba.codes import EXACT, half, number

CHUNK = 32  # entries that one comparison passes over


@njit(**EXACT)
def _smallest(keys, late, found, best):
    """The numbers of the smallest keys (n,), as many as `found` has room for; of equal keys the first, or with `late`
    the last. `best` is scratch as long as `found`.

    One scan with a sorted buffer: a chunk with nothing below the buffer's last is passed over.
    """
    room, kept = found.shape[0], 0
    if room == 0:
        return
    for start in range(0, keys.shape[0], CHUNK):
        part, hits = keys[start : start + CHUNK], np.int32(0)
        if kept == room:
            limit = best[room - 1]
            for j in range(part.shape[0]):
                hits += np.int32(part[j] <= limit)
            if hits == 0:
                continue
        for j in range(part.shape[0]):
            key = part[j]
            if kept < room:
                kept += 1
            elif not (key < best[room - 1] or (late and key == best[room - 1])):
                continue
            i = kept - 1
            while i > 0 and (key < best[i - 1] or (late and key == best[i - 1])):
                best[i], found[i] = best[i - 1], found[i - 1]
                i -= 1
            best[i], found[i] = key, start + j


@njit(**EXACT)
def _sort(numbers):
    for i in range(1, numbers.shape[0]):
        number, j = numbers[i], i
        while j > 0 and numbers[j - 1] > number:
            numbers[j] = numbers[j - 1]
            j -= 1
        numbers[j] = number


@njit(**EXACT)
def find(x, scale, offset, largest, entries, outlier, channel, ends):
    """The outliers of x (N, H, T, D): entries (N, T, slots), int32 and ascending; what is stored of them, outlier, fp16
    bits, and channel (N, T, slots), ends (N, T, H).

    Ranked as they are or, given scale and offset (H, D), as (x - offset) / scale: the lowest and the highest half, or
    the `largest` magnitudes. Of equal entries the first are lowest, the last highest.
    """
    heads, dim, slots = x.shape[1], x.shape[3], entries.shape[2]
    keys, best = np.empty(heads * dim, np.float32), np.empty(slots, np.float32)
    for n in range(x.shape[0]):
        for t in range(x.shape[2]):
            for h in range(heads):
                part, y = keys[h * dim : (h + 1) * dim], x[n, h, t]
                if scale.shape[0]:
                    s, o = scale[h], offset[h]
                    for d in range(dim):
                        part[d] = (y[d] - o[d]) / s[d]
                else:
                    for d in range(dim):
                        part[d] = y[d]
            found, low = entries[n, t], 0 if largest else slots // 2
            _smallest(keys, False, found[:low], best[:low])
            for c in range(keys.shape[0]):
                keys[c] = -abs(keys[c]) if largest else -keys[c]
            _smallest(keys, True, found[low:], best[low:])
            _sort(found)
            ends[n, t] = 0
            for i in range(slots):
                h, d = found[i] // dim, found[i] % dim
                outlier[n, t, i], channel[n, t, i] = half(x[n, h, t, d]), d
                for later in range(h, heads):
                    ends[n, t, later] += 1


@njit(**EXACT)
def clipped(x, scale, offset, low, high, entries):
    """How many of x (N, H, T, D) lie outside [low, high] as (x - offset) / scale, scale and offset (H, D), and are not
    among `entries` (N, T, slots)."""
    count, dim = 0, x.shape[3]
    for n in range(x.shape[0]):
        for h in range(x.shape[1]):
            s, o = scale[h], offset[h]
            for t in range(x.shape[2]):
                y, here = x[n, h, t], np.int32(0)
                for d in range(dim):
                    u = (y[d] - o[d]) / s[d]
                    here += np.int32((u < low) | (u > high))
                count += here
        for t in range(entries.shape[1]):
            for c in entries[n, t]:
                h, d = c // dim, c % dim
                u = (x[n, h, t, d] - offset[h, d]) / scale[h, d]
                count -= (u < low) | (u > high)
    return count


@njit(**EXACT)
def overwrite(x, head, outlier, channel, ends):
    """The outliers of one head into x (T, D): outlier, as fp16 bits, and channel (T, slots), ends (T, H)."""
    dim, slots = x.shape[1], channel.shape[1]
    for t in range(x.shape[0]):
        first, last = ends[t, head - 1] if head else 0, min(np.int64(ends[t, head]), slots)
        for i in range(first, last):
            d = np.int64(channel[t, i])
            if 0 <= d < dim:  # a damaged file must not write elsewhere
                x[t, d] = number(outlier[t, i])
