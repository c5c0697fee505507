"""Attention over packed pages on a CPU: one page and KV head at a time, decoded into the first-level cache.

Compiled by numba, run without the interpreter's lock on Python threads. Per page: codes to numbers, scores of all
queries of the head, an online softmax, the weighted values. Every loop runs over neighbouring bytes at one shift,
which is what the planar order of `bits` is for. It reads packed bytes only, and allocates nothing that depends on the
context.
"""

import math
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from itertools import count
from typing import cast

import numpy as np
import torch
from numba import njit
from torch import Tensor

from kvist.kernels.attend import Partial
from kvist.kernels.bits import PLANES

PIECE = 32  # pages: long enough to make handing it out cheap, short enough to share the work evenly
_FAST = {"nogil": True, "cache": True, "error_model": "numpy", "fastmath": {"contract", "reassoc", "nsz", "arcp"}}


@njit(**_FAST)
def _widen(halves, scratch):
    """fp16 (a, b), as its bits in uint16 and finite, to fp32 (a, b) at the start of `scratch` (n,)."""
    count = halves.size
    half, out = halves.reshape(count), scratch[:count]
    bits = out.view(np.int32)
    for i in range(count):
        bits[i] = (np.int32(half[i]) & np.int32(0x7FFF)) << np.int32(13)
    for i in range(count):
        sign = np.float32(1.0) - np.float32(half[i] >> 15) * np.float32(2.0)
        out[i] = out[i] * np.float32(2.0**112) * sign
    return out.reshape(halves.shape)


@njit(**_FAST)
def _unpack(codes, low, high, x):
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


@njit(**_FAST)
def _affine(x, scale, offset, group):
    """x (T, D) becomes x·scale + offset, numbers (T, G) shared by `group` neighbouring channels."""
    dim = x.shape[1]
    for t in range(x.shape[0]):
        for g in range((dim + group - 1) // group):
            part, s, o = x[t, g * group : min((g + 1) * group, dim)], scale[t, g], offset[t, g]
            for d in range(part.shape[0]):
                part[d] = part[d] * s + o


@njit(**_FAST)
def _dots(q, x, scores):
    """scores (R, T) = q (R, D) · x (T, D)."""
    rows, tokens, dim = q.shape[0], x.shape[0], x.shape[1]
    for r in range(0, rows - 3, 4):
        q0, q1, q2, q3 = q[r], q[r + 1], q[r + 2], q[r + 3]
        for t in range(tokens):
            y = x[t]
            a0, a1, a2, a3 = np.float32(0), np.float32(0), np.float32(0), np.float32(0)
            for d in range(dim):
                a0 += q0[d] * y[d]
                a1 += q1[d] * y[d]
                a2 += q2[d] * y[d]
                a3 += q3[d] * y[d]
            scores[r, t], scores[r + 1, t], scores[r + 2, t], scores[r + 3, t] = a0, a1, a2, a3
    for r in range(rows // 4 * 4, rows):
        q0 = q[r]
        for t in range(tokens):
            y = x[t]
            a0 = np.float32(0)
            for d in range(dim):
                a0 += q0[d] * y[d]
            scores[r, t] = a0


@njit(**_FAST)
def _weigh(weights, x, out):
    """out (R, D) += weights (R, T) · x (T, D)."""
    tokens = x.shape[0]
    for t in range(0, tokens - 3, 4):
        x0, x1, x2, x3 = x[t], x[t + 1], x[t + 2], x[t + 3]
        for r in range(out.shape[0]):
            o, w0, w1, w2, w3 = out[r], weights[r, t], weights[r, t + 1], weights[r, t + 2], weights[r, t + 3]
            for d in range(o.shape[0]):
                o[d] += w0 * x0[d] + w1 * x1[d] + w2 * x2[d] + w3 * x3[d]
    for t in range(tokens // 4 * 4, tokens):
        x0 = x[t]
        for r in range(out.shape[0]):
            o, w0 = out[r], weights[r, t]
            for d in range(o.shape[0]):
                o[d] += w0 * x0[d]


@njit(**_FAST)
def _exponentials(x, top, power):
    """x (n,) becomes exp(x - top), to 2e-7·(1 + top - x) of itself; 0 where x - top < -87. `power` (n,) is scratch."""
    powers = power.view(np.int32)
    for i in range(x.shape[0]):
        y = max((x[i] - top) * np.float32(1.4426950408889634), np.float32(-126.0))
        whole = np.floor(y)
        f = y - whole
        p = np.float32(2.161291542e-04)
        p = p * f + np.float32(1.246784629e-03)
        p = p * f + np.float32(9.675451586e-03)
        p = p * f + np.float32(5.548528061e-02)
        p = p * f + np.float32(2.402293056e-01)
        p = p * f + np.float32(6.931470444e-01)
        p = p * f + np.float32(1.0)
        powers[i] = (np.int32(whole) + np.int32(127)) << np.int32(23)
        x[i] = p if y > np.float32(-126.0) else np.float32(0.0)
    for i in range(x.shape[0]):
        x[i] *= power[i]


@njit(**_FAST)
def _key_scores(q, codes, scale, offset, low, high, group, along_tokens, x, numbers, folded, scores):
    """scores (R, T) of one page of keys, T tokens."""
    tokens, dim = x.shape
    _unpack(codes[:tokens], low, high, x)
    if not along_tokens:
        _affine(x, _widen(scale[:tokens], numbers[0]), _widen(offset[:tokens], numbers[1]), group)
        _dots(q, x, scores)
        return
    groups = (tokens + group - 1) // group  # one scale per channel of a group: folded into the query
    scales, offsets = _widen(scale[:groups], numbers[0]), _widen(offset[:groups], numbers[1])
    for g in range(groups):
        first, last = g * group, min((g + 1) * group, tokens)
        s, o = scales[g], offsets[g]
        for r in range(q.shape[0]):
            for d in range(dim):
                folded[r, d] = q[r, d] * s[d]
        _dots(folded, x[first:last], scores[:, first:last])
        for r in range(q.shape[0]):
            base = np.float32(0)
            for d in range(dim):
                base += q[r, d] * o[d]
            for t in range(first, last):
                scores[r, t] += base


@njit(**_FAST)
def _attend(
    q, k_codes, k_scale, k_offset, k_table, k_low, k_high, k_group, along_tokens,
    v_codes, v_scale, v_offset, v_table, v_low, v_high, v_group,
    limits, skip, skips, scale, softcap, items, out, lse,
):  # fmt: skip
    """For each item (row, head, first page, last page): out (item, R, Dv) normalised, and lse (item, R)."""
    rows, dim, page = q.shape[2], q.shape[3], v_codes.shape[2]
    keys, values = np.empty((page, dim), np.float32), np.empty((page, out.shape[2]), np.float32)
    numbers = np.empty((2, page * max(dim, out.shape[2])), np.float32)
    folded, scores = np.empty((rows, dim), np.float32), np.empty((rows, page), np.float32)
    power = np.empty(page, np.float32)
    top, total = np.empty(rows, np.float32), np.empty(rows, np.float32)
    for item in range(items.shape[0]):
        b, head, first, last = items[item]
        acc = out[item]
        acc[:] = np.float32(0.0)
        top[:] = np.float32(-np.inf)
        total[:] = np.float32(0.0)
        for p in range(first, last):
            n = min(page, limits[b] - p * page)
            kp, vp = k_table[b, p], v_table[b, p]
            _key_scores(
                q[b, head], k_codes[kp, head], k_scale[kp, head], k_offset[kp, head], k_low, k_high, k_group,
                along_tokens, keys[:n], numbers, folded, scores,
            )  # fmt: skip
            for r in range(rows):
                high, line = top[r], scores[r, :n]
                for t in range(n):
                    line[t] *= scale
                if softcap > 0:
                    for t in range(n):
                        line[t] = np.float32(math.tanh(line[t] / softcap) * softcap)
                if skips:
                    for t in range(n):
                        if skip[b, p * page + t]:
                            line[t] = np.float32(-np.inf)
                for t in range(n):
                    high = max(high, line[t])
                if high == -np.inf:
                    line[:] = np.float32(0.0)
                    continue
                _exponentials(line, high, power[:n])
                fade = np.float32(math.exp(top[r] - high))
                weight = total[r] * fade
                for t in range(n):
                    weight += line[t]
                total[r], top[r] = weight, high
                acc[r] *= fade
            _unpack(v_codes[vp, head, :n], v_low, v_high, values[:n])
            scales = _widen(v_scale[vp, head, :n], numbers[0])
            offsets = _widen(v_offset[vp, head, :n], numbers[1])
            _affine(values[:n], scales, offsets, v_group)
            _weigh(scores, values[:n], acc)
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
    key, value, q: Tensor, keys: dict, values: dict, tables: tuple, limits, skip, page, scale, softcap
) -> Partial:
    """See `choose.packed_attention`. key and value are their Traits."""
    batch, heads, queries, dim = q.shape
    kv_heads, value_dim = keys["codes"].shape[1], values["codes"].shape[-1] * 8 // value.bits
    grouped = q.reshape(batch, kv_heads, -1, dim).numpy()
    work = _split(limits, kv_heads, page, torch.get_num_threads())
    out = np.zeros((len(work), grouped.shape[2], value_dim), np.float32)
    lse = np.empty(out.shape[:2], np.float32)
    no_skip = np.zeros((1, 1), np.bool_)
    call = (
        grouped, keys["codes"].numpy(), *_halves(keys), tables[0].numpy(), *_planes(key.bits), key.group or dim,
        key.along == "tokens", values["codes"].numpy(), *_halves(values), tables[1].numpy(), *_planes(value.bits),
        value.group or value_dim, np.array(limits), no_skip if skip is None else skip.numpy(), skip is not None,
        np.float32(scale), np.float32(softcap or 0.0),
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
    cells, place = batch * kv_heads, torch.from_numpy(work[:, 0] * kv_heads + work[:, 1])
    if len(work) == cells and bool((place == torch.arange(cells)).all()):
        return Partial(out.view(batch, heads, queries, dim), lse.view(batch, heads, queries))
    top = torch.full((cells, lse.shape[1]), -torch.inf).scatter_reduce_(0, place[:, None].expand_as(lse), lse, "amax")
    weights = (lse - top[place]).exp().nan_to_num_(0.0)
    norm = torch.zeros_like(top).index_add_(0, place, weights)
    total = torch.zeros(cells, *out.shape[1:]).index_add_(0, place, out * weights.unsqueeze(-1))
    total /= torch.where(norm > 0, norm, 1.0).unsqueeze(-1)
    return Partial(total.view(batch, heads, queries, dim), (top + norm.log()).view(batch, heads, queries))


def _halves(arrays: dict[str, Tensor]) -> tuple[np.ndarray, np.ndarray]:
    scale, offset = (arrays[name].view(torch.int16).numpy().view(np.uint16) for name in ("scale", "offset"))
    return scale, offset


def _planes(bits: int) -> tuple[int, int]:
    low, high = (*PLANES[bits], 0)[:2]
    return low, high
