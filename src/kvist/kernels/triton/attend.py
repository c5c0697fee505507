"""Decode attention in one launch (split-KV): packed pages, the exact tokens beside them, their merge. Triton.

Programs share the tokens of a row and KV head: `splits` of them read packed pages, the others a few loose tokens each:
sinks, recent ones, those that one side alone has packed (decoded here), and pins. Each leaves its part, attention with
the maximum and the sum of its weights; the last to arrive merges them in order. Scores are in units of log 2.

Nothing is read on the host: lengths, frontiers and page tables are tensors on the device, and the counters end at 0, so
that a CUDA graph can replay the launch.
"""

import triton
import triton.language as tl

from kvist.kernels.triton.loose import loose_part
from kvist.kernels.triton.scores import LOG2E, NONE, dense_scores, packed_query, peak, scaled, soften
from kvist.kernels.triton.tiles import decoded, folded_scores, hadamard, slice_channels, value_unit, weigh_folded

# Numbers that change as a context grows: a kernel compiled for one must serve the next.
CHANGING = ["k_width", "v_width", "skip_width", "sinks", "capacity", "k_pins", "v_pins", "pins", "loose", "parts"]
SHARE = tl.constexpr(2)  # pages that are worth a program, and a part to merge
AT_ONCE = tl.constexpr(8)  # parts that are merged at a time


@triton.jit
def _store_packed(out, at, acc, constant, r, columns, real, F: tl.constexpr):
    """The sums of folded values, per slice, to `out` (M, D) at `at`."""
    fields: tl.constexpr = 8 // F.low
    for j in tl.static_range(F.dim * F.low // 8 // F.block):
        for i in tl.static_range(2 * fields):
            d = slice_channels(j, i, F)
            power = 2.0 ** (24 - F.low * (i % fields))
            shift = constant[((i % fields) * (F.dim * F.low // 8) + j * F.block) // F.group]
            x = acc[j * 2 * fields + i] * (power / r) + tl.sum(shift, 0)[None, :]
            tl.store(out + at + columns[None, :] * F.dim + d[:, None], x, mask=real[None, :])


@triton.jit
def _packed_part(
    q, out, K, V, skip, b, head, base, at, columns, real, limit, origin, first, last, scale,
    k_width, v_width, skip_width, KF: tl.constexpr, VF: tl.constexpr, M: tl.constexpr, T: tl.constexpr,
    P2: tl.constexpr, REST: tl.constexpr, SOFTCAP: tl.constexpr, SKIPS: tl.constexpr,
):  # fmt: skip
    """Attention over the packed tokens below `limit` of pages [first, last), its sums to `out` at `at`; the maximum of
    the scores and the sum of the weights (M,)."""
    top = tl.full([M], NONE, tl.float32)
    total = tl.full([T, M], 0.0, tl.float32)  # added up over the tokens of a tile at the end
    query = packed_query(q, base, columns, real, KF, KF.folded, P2, REST)
    largest = peak(query)
    query = scaled(query, 1.0 / largest)
    factor = largest * (scale * LOG2E)
    r = 1.0
    acc, constant = (), ()
    if VF.folded:
        for _ in tl.static_range(VF.dim * VF.low // 8 // VF.block * (16 // VF.low)):
            acc = acc + (tl.full([VF.block // 2, M], 0.0, tl.float32),)
        for _ in tl.static_range((VF.dim + VF.group - 1) // VF.group):
            constant = constant + (tl.full([T, M], 0.0, tl.float32),)
    else:
        acc = acc + (tl.full([VF.padded, M], 0.0, tl.float32),)
    tiles: tl.constexpr = KF.page // T
    for tile in range(first * tiles, tl.minimum(last * tiles, (limit + T - 1) // T)):
        index = tile // tiles
        slot = (tile % tiles) * T + tl.arange(0, T)
        position = index * KF.page + slot
        ok = position < limit
        if SKIPS:
            ok = ok & (tl.load(skip + b.to(tl.int64) * skip_width + position, mask=ok, other=1) == 0)
        k_page = tl.load(K.table + b * k_width + index).to(tl.int64)
        v_page = tl.load(V.table + b * v_width + index).to(tl.int64)
        if KF.folded:
            s = folded_scores(K, query, k_page, slot, ok, head, KF)
        else:
            s = dense_scores(K, query, 1024.0, k_page, slot, position + origin, ok, head, KF)
        weights, top, total, fade = soften(s * factor[None, :], ok[:, None], top, total, SOFTCAP)
        if VF.folded:
            new = value_unit(V, v_page, slot, ok, head, VF)
            faded = ()
            for i in tl.static_range(len(acc)):
                faded = faded + (acc[i] * (fade * (new / r))[None, :],)
            kept = ()
            for i in tl.static_range(len(constant)):
                kept = kept + (constant[i] * fade[None, :],)
            r = new
            acc, constant = weigh_folded(V, weights, r, faded, kept, v_page, slot, ok, head, VF)
        else:
            x = decoded(V, v_page, slot, ok, head, tl.arange(0, VF.padded), VF)
            acc = (tl.dot(tl.trans(x).to(tl.float16), weights.to(tl.float16), acc[0] * fade[None, :]),)
    if VF.folded:
        _store_packed(out, at, acc, constant, r, columns, real, VF)
    else:
        d = tl.arange(0, VF.padded)
        inside = real[None, :] & (d < VF.dim)[:, None]
        tl.store(out + at + columns[None, :] * VF.dim + d[:, None], acc[0], mask=inside)
    return top, tl.sum(total, 0)


@triton.jit(do_not_specialize=CHANGING)
def decode_kernel(
    q, out, part_out, part_top, part_total, counters, K, V, EK, EV, state, skip, pinned, logits,
    scale, k_width, v_width, skip_width, sinks, capacity, k_pins, v_pins, pins, loose, parts,
    KF: tl.constexpr, VF: tl.constexpr, HEADS: tl.constexpr, QUERIES: tl.constexpr, ROWS: tl.constexpr,
    M: tl.constexpr, T: tl.constexpr, LT: tl.constexpr, P2: tl.constexpr, REST: tl.constexpr, SOFTCAP: tl.constexpr,
    SKIPS: tl.constexpr, SINK: tl.constexpr, MR: tl.constexpr,
):  # fmt: skip
    """q (B, H·ROWS, D), out (B, H·ROWS, Dv) with ROWS = group·QUERIES rows per KV head, in blocks of M columns.

    Grid (parts, B·H, blocks): the first `loose` parts are of loose tokens, the others share the pages, each at least
    SHARE of them, so that a short context leaves the rest idle. state (B, 8): sinks held, frontier of keys and of
    values, tokens behind the sinks, position of slot 0. part_out (B·H, blocks, parts, M, Dv), part_top and part_total
    (…, M): see the module. MR: rows of a block that are merged.
    """
    part, cell, block = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    b, head = cell // HEADS, cell % HEADS
    columns = block * M + tl.arange(0, M)
    real = columns < ROWS
    base = cell.to(tl.int64) * ROWS * KF.dim
    kf, vf, origin = tl.load(state + b * 8 + 1), tl.load(state + b * 8 + 2), tl.load(state + b * 8 + 4)
    place = (cell * tl.num_programs(2) + block).to(tl.int64) * parts + part
    at = place * M * VF.dim - block * M * VF.dim
    limit = tl.minimum(kf, vf)
    pages = (limit + KF.page - 1) // KF.page
    share = tl.maximum((pages + parts - loose - 1) // (parts - loose), SHARE)
    if part < loose:
        top, total = loose_part(
            q, part_out, K, V, EK, EV, state, skip, pinned, b, head, base, at, columns, real, part * LT,
            scale, k_width, v_width, skip_width, sinks, capacity, k_pins, v_pins, pins,
            KF, VF, QUERIES, M, LT, P2, REST, SOFTCAP, SKIPS,
        )  # fmt: skip
        tl.store(part_top + place * M + tl.arange(0, M), top)
        tl.store(part_total + place * M + tl.arange(0, M), total)
    elif (part - loose) * share < pages:
        first = (part - loose) * share
        top, total = _packed_part(
            q, part_out, K, V, skip, b, head, base, at, columns, real, limit, origin, first,
            tl.minimum(first + share, pages), scale, k_width, v_width, skip_width,
            KF, VF, M, T, P2, REST, SOFTCAP, SKIPS,
        )  # fmt: skip
        tl.store(part_top + place * M + tl.arange(0, M), top)
        tl.store(part_total + place * M + tl.arange(0, M), total)
    tl.debug_barrier()  # all threads' parts are written before the arrival is told
    counter = counters + cell * tl.num_programs(2) + block
    if tl.atomic_add(counter, 1, sem="acq_rel") == parts - 1:
        tl.store(counter, 0)
        _merge(out, part_out, part_top, part_total, logits, place - part, cell, block, head, loose,
               loose + (pages + share - 1) // share, VF, ROWS, QUERIES, M, MR, SINK)  # fmt: skip


@triton.jit
def _merge(
    out, part_out, part_top, part_total, logits, place, cell, block, head, loose, used, VF: tl.constexpr,
    ROWS: tl.constexpr, QUERIES: tl.constexpr, M: tl.constexpr, MR: tl.constexpr, SINK: tl.constexpr,
):  # fmt: skip
    """The first `used` parts of a cell, in order, to its rows of `out`."""
    m, d, number = tl.arange(0, MR), tl.arange(0, VF.padded), tl.arange(0, 32)
    columns = block * M + m
    real = columns < ROWS
    top = tl.full([MR], NONE, tl.float32)
    for start in range(0, used, 32):
        line = (place + start + number)[:, None] * M + m[None, :]
        tops = tl.load(part_top + line, mask=(start + number < used)[:, None], other=NONE)
        top = tl.maximum(top, tl.max(tops, 0))
    total = tl.full([MR], 0.0, tl.float32)
    if SINK:
        logit = tl.load(logits + head * (ROWS // QUERIES) + columns // QUERIES, mask=real, other=0.0) * LOG2E
        top = tl.maximum(top, logit)
        total = tl.exp2(logit - top)
    inside = (d < VF.dim)[:, None] & real[None, :]
    packed = tl.full([VF.padded, MR], 0.0, tl.float32)
    exact = tl.full([VF.padded, MR], 0.0, tl.float32)
    for start in range(0, used, AT_ONCE):
        for i in tl.static_range(AT_ONCE):  # loads that do not wait for each other
            part = place + start + i
            here = start + i + m * 0 < used
            weight = tl.exp2(tl.load(part_top + part * M + m, mask=here, other=NONE) - top)
            total += tl.load(part_total + part * M + m, mask=here, other=0.0) * weight
            at = (part * M + m[None, :]) * VF.dim + d[:, None]
            x = tl.load(part_out + at, mask=inside & here[None, :], other=0.0)
            if VF.hadamard > 0:
                packed += tl.where(start + i < loose, 0.0, x) * weight[None, :]
                exact += tl.where(start + i < loose, x, 0.0) * weight[None, :]
            else:
                exact += x * weight[None, :]
    if VF.hadamard > 0:
        exact += tl.dot(hadamard(d[:, None], d[None, :], VF.hadamard), packed, input_precision="tf32x3")
    exact = exact / tl.where(total > 0, total, 1.0)[None, :]
    at = cell.to(tl.int64) * ROWS * VF.dim
    tl.store(out + at + columns[None, :] * VF.dim + d[:, None], exact.to(out.dtype.element_ty), mask=inside)
