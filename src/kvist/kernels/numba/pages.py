"""Packed tokens in attention on a CPU: codes to numbers, scores of a page, weights of an online softmax.

A page of one head is decoded into the first-level cache. A range that is shared along tokens is folded into the queries
instead.
"""

import math

import numpy as np
from numba import njit

from kvist.kernels.numba.codes import FAST, affine, look_up, unpack, widen
from kvist.kernels.numba.coding import butterflies
from kvist.kernels.numba.dense import dots, exponentials
from kvist.kernels.numba.layout import load
from kvist.kernels.numba.rotary import turn, turn_back
from kvist.kernels.numba.sparse import overwrite

INLINE = {**FAST, "inline": "always"}  # a call that hands over a `Side` counts references to all its arrays


@njit(**INLINE)
def _ranges(side, page, head, scratch):
    """Scale and offset of a page, as `affine` takes them."""
    if side.fixed_scale.shape[0]:
        return side.fixed_scale[head], side.fixed_offset[head]
    shared = min(head, side.scale.shape[1] - 1)
    return widen(side.scale[page, shared], scratch[0]), widen(side.offset[page, shared], scratch[1])


@njit(**INLINE)
def read(side, page, head, plain, scratch, x):
    """The first tokens of a page and head to x (T, D); `plain`: as levels, before their range."""
    if side.raw.shape[0]:
        for t in range(x.shape[0]):
            load(side.raw[page, head, t], side.kind, x[t])
        return
    unpack(side.codes[page, head, : x.shape[0]], side.low, side.high, x)
    if side.points.shape[0]:
        look_up(x.reshape(x.size), side.points)
    if not plain:
        scale, offset = _ranges(side, page, head, scratch)
        affine(x, scale, offset, side.group, side.along_tokens)
        if side.channel.shape[2]:
            overwrite(x, head, side.outlier[page], side.channel[page], side.ends[page])


@njit(**FAST)
def read_token(side, page, head, token, scratch, x):
    """One token of a page and head to x (1, D), rotated back where it lies rotated (`Side.turn`)."""
    if side.raw.shape[0]:
        load(side.raw[page, head, token], side.kind, x[0])
        return
    dim = x.shape[1]
    unpack(side.codes[page, head, token : token + 1], side.low, side.high, x)
    if side.points.shape[0]:
        look_up(x.reshape(x.size), side.points)
    scale, offset = _ranges(side, page, head, scratch)
    numbers = dim if side.along_tokens else (dim + side.group - 1) // side.group
    first = token // side.group * dim if side.along_tokens else token * numbers
    affine(x, scale[first : first + numbers], offset[first : first + numbers], side.group, side.along_tokens)
    if side.channel.shape[2]:
        here = slice(token, token + 1)
        overwrite(x, head, side.outlier[page, here], side.channel[page, here], side.ends[page, here])
    if side.turn:
        butterflies(x, side.turn, np.float32(1.0 / math.sqrt(side.turn)))


@njit(**INLINE)
def _folded_scores(q, side, page, head, x, scratch, folded, scores):
    """scores (R, T) of queries (R, D) and keys, given as levels (T, D): their range, shared along tokens, is folded
    into the queries."""
    tokens, dim = x.shape
    scales, offsets = _ranges(side, page, head, scratch)
    for g in range((tokens + side.group - 1) // side.group):
        first, last = g * side.group, min((g + 1) * side.group, tokens)
        s, o = scales[g * dim : (g + 1) * dim], offsets[g * dim : (g + 1) * dim]
        for r in range(q.shape[0]):
            for d in range(dim):
                folded[r, d] = q[r, d] * s[d]
        dots(folded, x[first:last], scores[:, first:last])
        for r in range(q.shape[0]):
            base = np.float32(0)
            for d in range(dim):
                base += q[r, d] * o[d]
            for t in range(first, last):
                scores[r, t] += base


@njit(**INLINE)
def score_page(q, side, page, head, x, scratch, folded, turns, angles, scores):
    """scores (R, T) of queries (R, D) and the first tokens of a page, which come to lie in x (T, D). turns, angles: see
    `numba.rotary.turns` and the angles of the page's first token; without any, keys lie as queries do."""
    n, pairs = x.shape[0], angles.shape[1]
    fold = side.along_tokens and not pairs and not side.channel.shape[2] and side.codes.shape[0]
    read(side, page, head, fold, scratch, x)
    if fold:
        _folded_scores(q, side, page, head, x, scratch, folded, scores)
    elif pairs:
        turn(x, turns[0, :n], turns[1, :n])
        turn_back(q, angles[0], angles[1], folded)
        dots(folded, x, scores[:, :n])
    else:
        dots(q, x, scores[:, :n])


@njit(**FAST)
def cap(scores, softcap):
    """Scores (R, T) through a soft cap, before any of them is hidden."""
    for r in range(scores.shape[0]):
        for t in range(scores.shape[1]):
            scores[r, t] = np.float32(math.tanh(scores[r, t] / softcap) * softcap)


@njit(**FAST)
def soften(scores, tokens, power, top, total, packed, exact):
    """The first tokens of scores (R, page) to weights exp(score - top), with the running top and total (R,) and the
    sums of packed and of exact values (R, D)."""
    for r in range(scores.shape[0]):
        high, line = top[r], scores[r, :tokens]
        for t in range(tokens):
            high = max(high, line[t])
        if high == -np.inf:
            line[:] = np.float32(0.0)
            continue
        exponentials(line, high, power[:tokens])
        fade = np.float32(math.exp(top[r] - high))
        weight = total[r] * fade
        for t in range(tokens):
            weight += line[t]
        total[r], top[r] = weight, high
        if fade != np.float32(1.0):
            packed[r] *= fade
            exact[r] *= fade


@njit(**FAST)
def hide(scores, first, skip):
    """Scores (R, T) of tokens before `first`, and of those in the mask `skip` (T,) or all of none, become -inf."""
    for r in range(scores.shape[0]):
        line = scores[r]
        for t in range(first):
            line[t] = np.float32(-np.inf)
        for t in range(skip.shape[0]):
            if skip[t]:
                line[t] = np.float32(-np.inf)
