"""Attention over packed pages on a CPU: one page and KV head at a time, decoded into the first-level cache.

Compiled by numba, run without the interpreter's lock on Python threads. Per page: codes to numbers, outliers over
them, keys turned to their positions, scores of all queries of the head, an online softmax, the weighted values. It
reads packed bytes only, and allocates nothing that depends on the context.
"""

import math
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from itertools import count
from typing import NamedTuple, cast

import numpy as np
import torch
from numba import njit
from torch import Tensor

from kvist.kernels.contract import PLANES, Partial, Stored, Traits
from kvist.kernels.numba.codes import FAST, affine, look_up, unpack, widen
from kvist.kernels.numba.dense import dots, exponentials, weigh
from kvist.kernels.numba.rotary import advance, phase, turn, turn_back, turns
from kvist.kernels.numba.sparse import overwrite

INLINE = {**FAST, "inline": "always"}  # a call that hands over a `Side` counts references to all its arrays
PIECE = 32  # pages: long enough to make handing it out cheap, short enough to share the work evenly


class Side(NamedTuple):
    """What the loops read of one side; an array is empty where there is nothing of its kind.

    scale and offset (pages, heads or 1, numbers) are fp16 as its bits, `fixed_` ones (H, D) are those of
    fixed ranges, which are shared along tokens by groups as long as the page.
    """

    codes: np.ndarray
    table: np.ndarray
    low: int
    high: int
    points: np.ndarray
    scale: np.ndarray
    offset: np.ndarray
    fixed_scale: np.ndarray
    fixed_offset: np.ndarray
    group: int
    along_tokens: bool
    outlier: np.ndarray
    channel: np.ndarray
    ends: np.ndarray


@njit(**INLINE)
def _ranges(side, page, head, scratch):
    """Scale and offset of a page, as `affine` takes them."""
    if side.fixed_scale.shape[0]:
        return side.fixed_scale[head], side.fixed_offset[head]
    shared = min(head, side.scale.shape[1] - 1)
    return widen(side.scale[page, shared], scratch[0]), widen(side.offset[page, shared], scratch[1])


@njit(**INLINE)
def _read(side, page, head, plain, scratch, x):
    """The first tokens of a page and head to x (T, D); `plain`: as levels, before their range."""
    unpack(side.codes[page, head, : x.shape[0]], side.low, side.high, x)
    if side.points.shape[0]:
        look_up(x.reshape(x.size), side.points)
    if not plain:
        scale, offset = _ranges(side, page, head, scratch)
        affine(x, scale, offset, side.group, side.along_tokens)
        if side.channel.shape[2]:
            overwrite(x, head, side.outlier[page], side.channel[page], side.ends[page])


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
def _soften(scores, tokens, scale, softcap, skip, skips, top, total, power, acc):
    """The first tokens of raw scores (R, page) to weights exp(score - top), with the running top and total (R,) and the
    sums acc (R, D)."""
    for r in range(scores.shape[0]):
        high, line = top[r], scores[r, :tokens]
        for t in range(tokens):
            line[t] *= scale
        if softcap > 0:
            for t in range(tokens):
                line[t] = np.float32(math.tanh(line[t] / softcap) * softcap)
        if skips:
            for t in range(tokens):
                if skip[t]:
                    line[t] = np.float32(-np.inf)
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
        acc[r] *= fade


@njit(**FAST)
def _attend(q, key, value, frequencies, cos, sin, origins, limits, skip, skips, scale, softcap, items, out, lse):
    """For each item (row, head, first page, last page): out (item, R, Dv) normalised, and lse (item, R).

    cos and sin (page, F): see `numba.rotary.turns`; row b's page slot 0 is at position origins[b].
    """
    rows, dim, page = q.shape[2], q.shape[3], value.codes.shape[2]
    keys, values = np.empty((page, dim), np.float32), np.empty((page, out.shape[2]), np.float32)
    scratch = np.empty((2, page * max(dim, out.shape[2])), np.float32)
    folded, scores = np.empty((rows, dim), np.float32), np.empty((rows, page), np.float32)
    power = np.empty(page, np.float32)
    top, total = np.empty(rows, np.float32), np.empty(rows, np.float32)
    pairs = frequencies.shape[0]
    at, step = np.empty((2, pairs)), np.empty((2, pairs))
    phase(frequencies, page, step[0], step[1])
    fold = key.along_tokens and not pairs and not key.channel.shape[2]
    for item in range(items.shape[0]):
        b, head, first, last = items[item]
        acc = out[item]
        acc[:] = np.float32(0.0)
        top[:] = np.float32(-np.inf)
        total[:] = np.float32(0.0)
        phase(frequencies, origins[b] + first * page, at[0], at[1])
        for p in range(first, last):
            n = min(page, limits[b] - p * page)
            x, y = keys[:n], values[:n]
            _read(key, key.table[b, p], head, fold, scratch, x)
            if fold:
                _folded_scores(q[b, head], key, key.table[b, p], head, x, scratch, folded, scores)
            elif pairs:
                turn(x, cos[:n], sin[:n])
                turn_back(q[b, head], at[0], at[1], folded)
                dots(folded, x, scores)
                advance(at[0], at[1], step[0], step[1])
            else:
                dots(q[b, head], x, scores)
            here = skip[b, p * page :] if skips else skip[0]
            _soften(scores, n, scale, softcap, here, skips, top, total, power, acc)
            _read(value, value.table[b, p], head, False, scratch, y)
            weigh(scores, y, acc)
        for r in range(rows):
            lse[item, r] = top[r] + np.float32(math.log(total[r])) if total[r] > 0 else np.float32(-np.inf)
            acc[r] *= np.float32(1.0) / total[r] if total[r] > 0 else np.float32(0.0)


@cache
def _threads(count: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(count, thread_name_prefix="kvist")


def _split(limits: list[int], heads: int, page: int, threads: int) -> np.ndarray:
    """Work as (row, head, first page, last page): whole rows for one thread, otherwise pieces that threads draw."""
    items = []
    for row, limit in enumerate(limits):
        pages = -(-limit // page)
        step = PIECE if threads > 1 else max(1, pages)
        items += [(row, h, a, min(a + step, pages)) for h in range(heads) for a in range(0, pages, step)]
    return np.array(items, np.int64).reshape(-1, 4)


def attend_pages(
    key: Traits, value: Traits, q: Tensor, k: Stored, v: Stored, limits, skip, page, scale, softcap, origins
) -> Partial:
    """See `choose`: PAGES. key and value are their Traits."""
    batch, heads, queries, dim = q.shape
    sides = _side(key, k, page), _side(value, v, page)
    kv_heads, value_dim = sides[1].codes.shape[1], sides[1].codes.shape[-1] * 8 // value.bits
    grouped = q.reshape(batch, kv_heads, -1, dim).numpy()
    work = _split(limits, kv_heads, page, torch.get_num_threads())
    out = np.zeros((len(work), grouped.shape[2], value_dim), np.float32)
    lse = np.empty(out.shape[:2], np.float32)
    frequencies = k.constants.frequencies.numpy() if key.rotary and k.constants.frequencies is not None else NOTHING
    call = (
        grouped, *sides, frequencies, *turns(frequencies.tobytes(), page, k.constants.scaling),
        np.array([0] * batch if origins is None else origins), np.array(limits),
        NO_SKIP if skip is None else skip.numpy(), skip is not None, np.float32(scale), np.float32(softcap or 0.0),
    )  # fmt: skip
    _spread(call, work, out, lse)
    return _join(work, torch.from_numpy(out), torch.from_numpy(lse), (batch, kv_heads, heads, queries, value_dim))


def _spread(call: tuple, work: np.ndarray, out: np.ndarray, lse: np.ndarray) -> None:
    """All threads draw pieces until none is left: one that shares its core with somebody else draws fewer."""
    run, drawn = cast(Callable, _attend), count()

    def draw() -> None:
        while (i := next(drawn)) < len(work):
            run(*call, work[i : i + 1], out[i : i + 1], lse[i : i + 1])

    threads = max(1, min(torch.get_num_threads(), len(work)))
    waiting = [_threads(threads - 1).submit(draw) for _ in range(threads - 1)]
    draw()
    for future in waiting:
        future.result()


def _join(work: np.ndarray, out: Tensor, lse: Tensor, shape: tuple[int, ...]) -> Partial:
    """Merge the parts that one row and head was cut into; rows without pages see nothing."""
    batch, kv_heads, heads, queries, dim = shape
    cells, places = batch * kv_heads, work[:, 0] * kv_heads + work[:, 1]
    if len(work) == cells and (places == np.arange(cells)).all():
        return Partial(out.view(batch, heads, queries, dim), lse.view(batch, heads, queries))
    place = torch.from_numpy(places)
    top = torch.full((cells, lse.shape[1]), -torch.inf).scatter_reduce_(0, place[:, None].expand_as(lse), lse, "amax")
    weights = (lse - top[place]).exp().nan_to_num_(0.0)
    norm = torch.zeros_like(top).index_add_(0, place, weights)
    total = torch.zeros(cells, *out.shape[1:]).index_add_(0, place, out * weights.unsqueeze(-1))
    total /= torch.where(norm > 0, norm, 1.0).unsqueeze(-1)
    return Partial(total.view(batch, heads, queries, dim), (top + norm.log()).view(batch, heads, queries))


NOTHING, NO_SKIP = np.empty(0, np.float32), np.zeros((1, 1), np.bool_)
NO_HALVES, NO_FIXED = np.empty((0, 1, 0), np.uint16), np.empty((0, 0), np.float32)
NO_OUTLIERS = np.empty((0, 0, 0), np.uint16), np.empty((0, 0, 0), np.uint8), np.empty((0, 0, 0), np.uint8)


def _side(traits: Traits, stored: Stored, page: int) -> Side:
    arrays, (_, points, scale, offset, _, _) = stored.arrays, stored.constants
    codes, fixed = arrays["codes"].numpy(), (NO_FIXED, NO_FIXED)
    pages, heads, _, size = codes.shape
    sharing = traits.group or size * 8 // traits.bits, traits.along == "tokens"
    stores, outliers = (NO_HALVES, NO_HALVES), NO_OUTLIERS
    if scale is not None and offset is not None:
        fixed, sharing = (scale.numpy(), offset.numpy()), (page, True)
    else:
        flat = pages, 1 if traits.across_heads else heads, -1
        stores = _halves(arrays["scale"]).reshape(flat), _halves(arrays["offset"]).reshape(flat)
    if traits.outliers:
        outliers = _halves(arrays["outlier"]), arrays["channel"].numpy(), arrays["ends"].numpy()
    planes, table = (*PLANES[traits.bits], 0), NOTHING if points is None else points.numpy()
    return Side(codes, stored.table.numpy(), planes[0], planes[1], table, *stores, *fixed, *sharing, *outliers)


def _halves(array: Tensor) -> np.ndarray:
    return array.numpy().view(np.uint16)
