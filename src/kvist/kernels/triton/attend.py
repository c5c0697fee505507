"""Decode attention in one launch (split-KV): packed pages, the exact tokens beside them, their merge. Triton.

Programs share the tokens of a row and KV head: `splits` of them read packed pages, the others a few loose tokens each:
sinks, recent ones, those that one side alone has packed (decoded here), and pins. Each leaves its part, attention with
the maximum and the sum of its weights; the last to arrive merges them in order. Scores are in units of log 2.

Nothing is read on the host: lengths, frontiers and page tables are tensors on the device, and the counters end at 0, so
that a CUDA graph can replay the launch.
"""

from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from kvist.kernels.triton.loose import LOOSE, loose_part
from kvist.kernels.triton.scores import LOG2E, NONE, Place, Widths, dense_scores, packed_query, soften
from kvist.kernels.triton.side import Tokens, decoded
from kvist.kernels.triton.tiles import folded_scores, hadamard, slice_channels, slice_group, value_unit, weigh_folded

SHARE = tl.constexpr(2)  # pages that are worth a program, and a part to merge
AT_ONCE = tl.constexpr(8)  # parts that are merged at a time


class Parts(NamedTuple):
    """What programs leave for the last of them: out (B·H, blocks, parts, M, Dv), not yet divided; the maximum of the
    scores and the sum of the weights (…, M); how many have arrived, see `contract.Decode`."""

    out: Tensor
    top: Tensor
    total: Tensor
    counters: Tensor


@triton.jit
def _store_folded(out, place, acc, constant, r, F: tl.constexpr):
    """The sums of folded values, per slice, to `out`."""
    for j in tl.static_range(F.dim * F.low // 8 // F.block):
        for i in tl.static_range(16 // F.low):
            d = slice_channels(j, i, F)
            power = 2.0 ** (24 - F.low * (i % (8 // F.low)))
            shift = constant[slice_group(j, i, F)]
            x = acc[j * (16 // F.low) + i] * (power / r) + tl.sum(shift, 0)[None, :]
            tl.store(out + place.sums + place.columns[None, :] * F.dim + d[:, None], x, mask=place.real[None, :])


@triton.jit
def _packed_part(call, K, V, widths, place, first, last, out, C: tl.constexpr):
    """Attention over the tokens that both sides have packed, of pages [first, last), its sums to `out`; the maximum of
    the scores and the sum of the weights (M,)."""
    M: tl.constexpr = C.columns
    T: tl.constexpr = C.tile
    VF: tl.constexpr = V.form
    groups: tl.constexpr = VF.groups
    state = call.state + place.b * 8
    limit, origin = tl.minimum(tl.load(state + 1), tl.load(state + 2)), tl.load(state + 4)
    top = tl.full([M], NONE, tl.float32)
    total = tl.full([T, M], 0.0, tl.float32)  # added up over the tokens of a tile at the end
    query, factor = packed_query(call.q, place, K.form, K.form.folded)
    factor = factor * (call.scale * LOG2E)
    r = 1.0
    acc, constant = (), ()
    if VF.folded:
        for _ in tl.static_range(VF.dim * VF.low // 8 // VF.block * (16 // VF.low)):
            acc = acc + (tl.full([VF.block // 2, M], 0.0, tl.float32),)
        for _ in tl.static_range(groups):
            constant = constant + (tl.full([T, M], 0.0, tl.float32),)
    else:
        acc = acc + (tl.full([VF.padded, M], 0.0, tl.float32),)
    tiles: tl.constexpr = K.page // T
    for tile in range(first * tiles, tl.minimum(last * tiles, (limit + T - 1) // T)):
        index = tile // tiles
        slot = (tile % tiles) * T + tl.arange(0, T)
        position = index * K.page + slot
        ok = position < limit
        if call.skip is not None:
            line = call.skip + place.b.to(tl.int64) * widths.skip + position
            ok = ok & (tl.load(line, mask=ok, other=1) == 0)
        k_at = Tokens(tl.load(K.table + place.b * widths.k + index).to(tl.int64), slot, ok, place.head)
        v_at = Tokens(tl.load(V.table + place.b * widths.v + index).to(tl.int64), slot, ok, place.head)
        s = folded_scores(K, query, k_at) if K.form.folded else dense_scores(K, query, k_at, position + origin)
        weights, top, total, fade = soften(s * factor[None, :], ok[:, None], top, total, C.softcap)
        if VF.folded:
            new = value_unit(V, v_at)
            faded, kept = (), ()
            for i in tl.static_range(len(acc)):
                faded = faded + (acc[i] * (fade * (new / r))[None, :],)
            for i in tl.static_range(len(constant)):
                kept = kept + (constant[i] * fade[None, :],)
            r = new
            acc, constant = weigh_folded(V, weights, r, faded, kept, v_at)
        else:
            x = decoded(V, v_at, tl.arange(0, VF.padded))
            acc = (tl.dot(tl.trans(x).to(tl.float16), weights.to(tl.float16), acc[0] * fade[None, :]),)
    if VF.folded:
        _store_folded(out, place, acc, constant, r, VF)
    else:
        d = tl.arange(0, VF.padded)
        inside = place.real[None, :] & (d < VF.dim)[:, None]
        tl.store(out + place.sums + place.columns[None, :] * VF.dim + d[:, None], acc[0], mask=inside)
    return top, tl.sum(total, 0)


@triton.jit(do_not_specialize=["capacity", "k_width", "v_width", "skip_width"])
def decode_kernel(call, parts, K, V, capacity, k_width, v_width, skip_width, C: tl.constexpr):
    """A `Call` of the sides K and V, in `Parts`; see `Widths` for what changes, and `Shape` for C.

    Grid (parts, B·H, blocks of query rows): the first parts are of loose tokens, the others share the pages, each at
    least SHARE of them, so that a short context leaves the rest idle.
    """
    part, cell, block = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    M: tl.constexpr = C.columns
    widths = Widths(capacity, k_width, v_width, skip_width)
    b, head = cell // K.form.heads, cell % K.form.heads
    columns = block * M + tl.arange(0, M)
    line = (cell * tl.num_programs(2) + block).to(tl.int64) * tl.num_programs(0) + part
    base, sums = cell.to(tl.int64) * C.rows * K.form.dim, (line * M - block * M) * V.form.dim
    place = Place(b, head, columns, columns < C.rows, base, sums)
    limit = tl.minimum(tl.load(call.state + b * 8 + 1), tl.load(call.state + b * 8 + 2))
    loose = (call.sinks + capacity + call.pins + LOOSE - 1) // LOOSE
    pages, splits = (limit + K.page - 1) // K.page, tl.num_programs(0) - loose
    share = tl.maximum((pages + splits - 1) // splits, SHARE)
    first = (part - loose) * share
    if part < loose:
        top, total = loose_part(call, K, V, widths, place, part * LOOSE, parts.out, C)
        tl.store(parts.top + line * M + tl.arange(0, M), top)
        tl.store(parts.total + line * M + tl.arange(0, M), total)
    elif first < pages:
        last = tl.minimum(first + share, pages)
        top, total = _packed_part(call, K, V, widths, place, first, last, parts.out, C)
        tl.store(parts.top + line * M + tl.arange(0, M), top)
        tl.store(parts.total + line * M + tl.arange(0, M), total)
    tl.debug_barrier()  # all threads' parts are written before the arrival is told
    counter = parts.counters + cell * tl.num_programs(2) + block
    if tl.atomic_add(counter, 1, sem="acq_rel") == tl.num_programs(0) - 1:
        tl.store(counter, 0)
        _merge(call, parts, V, cell, block, loose, loose + (pages + share - 1) // share, C)


@triton.jit
def _merge(call, parts, V, cell, block, loose, used, C: tl.constexpr):
    """The first `used` parts of a cell, in order, to its rows of the output."""
    F: tl.constexpr = V.form
    M: tl.constexpr = C.columns
    m, d, number = tl.arange(0, C.merged), tl.arange(0, F.padded), tl.arange(0, 32)
    columns = block * M + m
    real = columns < C.rows
    place = (cell * tl.num_programs(2) + block).to(tl.int64) * tl.num_programs(0)
    top = tl.full([C.merged], NONE, tl.float32)
    for start in range(0, used, 32):
        line = (place + start + number)[:, None] * M + m[None, :]
        tops = tl.load(parts.top + line, mask=(start + number < used)[:, None], other=NONE)
        top = tl.maximum(top, tl.max(tops, 0))
    total = tl.full([C.merged], 0.0, tl.float32)
    if call.logits is not None:
        q_head = cell % F.heads * (C.rows // C.queries) + columns // C.queries
        logit = tl.load(call.logits + q_head, mask=real, other=0.0) * LOG2E
        top = tl.maximum(top, logit)
        total = tl.exp2(logit - top)
    inside = (d < F.dim)[:, None] & real[None, :]
    packed = tl.full([F.padded, C.merged], 0.0, tl.float32)
    exact = tl.full([F.padded, C.merged], 0.0, tl.float32)
    for start in range(0, used, AT_ONCE):
        for i in tl.static_range(AT_ONCE):  # loads that do not wait for each other
            part = place + start + i
            here = start + i + m * 0 < used
            weight = tl.exp2(tl.load(parts.top + part * M + m, mask=here, other=NONE) - top)
            total += tl.load(parts.total + part * M + m, mask=here, other=0.0) * weight
            at = (part * M + m[None, :]) * F.dim + d[:, None]
            x = tl.load(parts.out + at, mask=inside & here[None, :], other=0.0)
            if F.hadamard > 0:
                packed += tl.where(start + i < loose, 0.0, x) * weight[None, :]
                exact += tl.where(start + i < loose, x, 0.0) * weight[None, :]
            else:
                exact += x * weight[None, :]
    if F.hadamard > 0:
        exact += tl.dot(hadamard(d[:, None], d[None, :], F.hadamard), packed, input_precision="tf32x3")
    exact = exact / tl.where(total > 0, total, 1.0)[None, :]
    at = cell.to(tl.int64) * C.rows * F.dim
    tl.store(call.out + at + columns[None, :] * F.dim + d[:, None], exact.to(call.out.dtype.element_ty), mask=inside)
