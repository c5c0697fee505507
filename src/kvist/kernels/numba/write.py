"""What a step does to what a layer stores, on a CPU, in one call: pack what is due, keep pins, store the new tokens.

Packed are the same bits that `numba.codec` gives: by the same loops, a group of tokens of all heads at a time.
"""

import math

import numpy as np
from numba import carray, njit

from kvist.kernels.contract import BEFORE, NEW
from kvist.kernels.numba.codes import EXACT
from kvist.kernels.numba.coding import butterflies, extremes_along_channels, extremes_along_tokens, to_codes, to_ranges
from kvist.kernels.numba.layout import EACH, HALF, KEPT, SIDE, coder_of, kept_of, load, pointer, side_of
from kvist.kernels.numba.sparse import clipped, find

END = 0x7BFF  # the largest of fp16: what lay beyond it was clipped


@njit(**EXACT)
def _unrotate(x, interleaved, cos, sin):
    """x (D,), in place: see `reference.rotary.turn`, whose products and sums these are."""
    pairs = cos.shape[0]
    for i in range(pairs):
        a, b = (2 * i, 2 * i + 1) if interleaved else (i, i + pairs)
        x[a], x[b] = x[a] * cos[i] - x[b] * sin[i], x[b] * cos[i] + x[a] * sin[i]


@njit(**EXACT)
def _gather(kept, row, position, count, due, first, coder, turn, x):
    """Tokens of a row's ring to x (1, H, T, D), fp32 in the space in which they are packed; the last fills up."""
    for t in range(x.shape[2]):
        token = min(t, count - 1)
        for h in range(x.shape[1]):
            load(kept.ring[row, h, (position + token) % kept.ring.shape[2]], kept.kind, x[0, h, t])
            if coder.rotary:
                _unrotate(x[0, h, t], coder.rotary == 2, due.cos[first + token], due.sin[first + token])
    if turn:
        butterflies(x.reshape(x.size // x.shape[3], x.shape[3]), turn, np.float32(1.0 / math.sqrt(turn)))


@njit(**EXACT)
def _ends(halves):
    """How many fp16 numbers, as their bits, lie at fp16's end."""
    count = 0
    for half in halves:
        count += (half & 0x7FFF) == END
    return count


@njit(**EXACT)
def _put_outliers(x, side, coder, page, entry, entries, saturates):
    """The outliers of x (1, H, T, D) into a page, their numbers to entries (1, T, slots)."""
    tokens, heads = x.shape[2], x.shape[1]
    outlier = np.empty(entries.shape, np.uint16)
    channel = np.empty(entries.shape, side.channel.dtype)
    ends = np.empty((1, tokens, heads), np.uint8)
    find(x, coder.scale, side.fixed_offset, coder.largest, entries, outlier, channel, ends)
    side.outlier[page, entry : entry + tokens] = outlier[0]
    side.channel[page, entry : entry + tokens] = channel[0]
    side.ends[page, entry : entry + tokens] = ends[0]
    return _ends(outlier.ravel()) if saturates else 0


@njit(**EXACT)
def _group(x, side, coder, page, entry, saturates):
    """Encode tokens x (1, H, T, D) into a page from `entry` on."""
    heads, tokens, dim = x.shape[1], x.shape[2], x.shape[3]
    entries = np.empty((1, tokens, side.channel.shape[2]), np.int32)
    beyond = 0
    if entries.shape[2]:
        beyond += _put_outliers(x, side, coder, page, entry, entries, saturates)
    group, along = side.group, side.along_tokens
    if coder.scale.shape[0]:
        group = tokens
        scale, offset = coder.scale.reshape(1, heads, dim), side.fixed_offset.reshape(1, heads, dim)
        low, high = (np.float32(-1.0), np.float32(1.0)) if coder.edges.shape[0] else (np.float32(0.0), coder.top)
        beyond += clipped(x, coder.scale, side.fixed_offset, low, high, entries)
    else:
        shared = side.scale.shape[1]
        first, count = (tokens // group, dim) if along else (tokens, (dim + group - 1) // group)
        least = np.full((1, shared, first, count), np.inf, np.float32)
        most = np.full((1, shared, first, count), -np.inf, np.float32)
        if along:
            extremes_along_tokens(x, entries, group, least, most)
        else:
            extremes_along_channels(x, entries, group, least, most)
        bits = np.empty((2, shared, first * count), np.uint16)
        to_ranges(least.ravel(), most.ravel(), coder.centred, coder.steps, bits[0].ravel(), bits[1].ravel())
        at = (entry // group if along else entry) * count
        side.scale[page, :, at : at + first * count] = bits[0]
        side.offset[page, :, at : at + first * count] = bits[1]
        if saturates:
            beyond += _ends(bits.ravel())
        scale, offset = most.reshape(1, shared, first * count), least.reshape(1, shared, first * count)
    made = np.empty((1, heads, tokens, side.codes.shape[3]), np.uint8)
    to_codes(x, scale, offset, group, along, coder.edges, coder.top, side.low, side.high, made)
    side.codes[page, :, entry : entry + tokens] = made[0]
    return beyond


@njit(**EXACT)
def _pack(side, coder, kept, due, page):
    """All pieces that are due of one side."""
    heads, words = kept.ring.shape[1], kept.ring.shape[3]
    dim, done = words // 2 if kept.kind == 0 else words, 0
    x = np.empty((1, heads, coder.granule, dim), np.float32)
    for i in range(due.pieces.shape[0]):
        row, position, count, slot = due.pieces[i]
        for t in range(0, count, coder.granule):
            at = slot + t
            where, entry = side.table[row, at // page], at % page
            if side.raw.shape[0]:
                side.raw[where, :, entry] = kept.ring[row, :, (position + t) % kept.ring.shape[2]]
                continue
            _gather(kept, row, position + t, count - t, due, done + t, coder, side.turn, x)
            coder.clipped[0] += _group(x, side, coder, where, entry, kept.kind != HALF)
        done += count


@njit(**EXACT)
def put(new, side, coder, kept, due, rows, columns, page):
    """A step of one side: new tokens, words (B, H, M, n) in the type of the exact ones. See `contract.Write`."""
    _pack(side, coder, kept, due, page)
    capacity, sinks = kept.ring.shape[2], kept.sinks.shape[2]
    for i in range(due.pins.shape[0]):
        row, position, slot = due.pins[i]
        kept.pinned[row, :, slot] = kept.ring[row, :, position % capacity]
    for row in range(rows.shape[0]):
        for i in range(rows[row, NEW]):
            number, column = rows[row, BEFORE] + i, columns[row, i]
            if number < sinks:
                kept.sinks[row, :, number] = new[row, :, column]
            else:
                kept.ring[row, :, (number - sinks) % capacity] = new[row, :, column]


@njit(**EXACT)
def spread(flat, runs, slots, out):
    """The tokens of a ring that holds all of them, to the address of (B, H, slots, D), zeros where none is; flat: of
    one side; runs (n, 4): row, first slot, first token, count."""
    kept = kept_of(flat[SIDE:])
    batch, heads, _, words = kept.ring.shape
    answer = carray(pointer(out), (batch, heads, slots, words), np.int16)
    for row in range(batch):
        for head in range(heads):
            into, source, done = answer[row, head].ravel(), kept.ring[row, head].ravel(), 0
            for i in range(runs.shape[0]):
                if runs[i, 0] == row:
                    slot, token, count = runs[i, 1] * words, runs[i, 2] * words, runs[i, 3] * words
                    into[done:slot] = 0
                    into[slot : slot + count] = source[token : token + count]
                    done = slot + count
            into[done:] = 0


@njit(**EXACT)
def store(keys, values, many, flat, write, page):
    """Both sides of a step; keys, values: addresses of `many` new tokens per row (B, H, M, D); flat: `Side`, `Kept` and
    `Coder` of keys, and of values, see `numba.layout`."""
    for i in range(2):
        f, address, due = (flat[:EACH], keys, write.keys) if i == 0 else (flat[EACH:], values, write.values)
        side, kept, coder = side_of(f), kept_of(f[SIDE:]), coder_of(f[SIDE + KEPT :])
        batch, heads, _, words = kept.ring.shape
        new = carray(pointer(address), (batch, heads, many, words), np.int16)
        put(new, side, coder, kept, due, write.rows, write.columns, page)
