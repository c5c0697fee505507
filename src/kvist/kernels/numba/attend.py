"""Attention of a step on a CPU, over all that a layer stores, in one call: sinks | packed pages | pins | ring.

Compiled by numba, run without the interpreter's lock. The work of one row and head is cut into runs of pages, which
threads draw from a counter; whoever finishes the last piece of a row and head merges them, in their order. Nothing is
allocated that depends on the context, and only packed bytes are read.
"""

import math

import numpy as np
from llvmlite import ir
from numba import carray, njit, types
from numba.extending import intrinsic
from numba.np.arrayobj import make_array

from kvist.kernels.contract import BEHIND, HELD, KEYS, LIMIT, ORIGIN, VALUES
from kvist.kernels.numba.codes import FAST
from kvist.kernels.numba.coding import butterflies
from kvist.kernels.numba.dense import dots, weigh
from kvist.kernels.numba.layout import EACH, FLOAT, SIDE, kept_of, load, pointer, save, side_of
from kvist.kernels.numba.pages import cap, hide, read, read_token, score_page, soften
from kvist.kernels.numba.rotary import phase

PAGES, SPAN, PINS, SINKS, RING, OVER = 0, 1, 2, 3, 4, 5  # where the tokens of a piece of work lie, in this order
INLINE = {**FAST, "inline": "always"}


@intrinsic
def _draw(context, counter):
    """Add one to the first number of an int64 array, at once for all threads; what it was before."""

    def generate(context, builder, signature, arguments):
        array = make_array(signature.args[0])(context, builder, arguments[0])
        return builder.atomic_rmw("add", array.data, ir.Constant(ir.IntType(64), 1), "seq_cst")

    return types.int64(counter), generate


@njit(**FAST)
def _pieces(limit, page, run):
    """Into how many runs of pages a row and head is cut."""
    pages = (limit + page - 1) // page
    return max(1, (pages + run - 1) // run)


@njit(**FAST)
def _queries(q, kind, scale, row, head, out):
    """The queries of a row and KV head, words (B, Hq, M, n), to out (R, D), fp32, times `scale`."""
    many = q.shape[2]
    for r in range(out.shape[0]):
        load(q[row, head * (out.shape[0] // many) + r // many, r % many], kind, out[r])
        out[r] *= scale


@njit(**FAST)
def _blind(scores, number, horizon):
    """Scores (R, T) of tokens, the first being `number`, that a query does not see become -inf."""
    many = horizon.shape[0]
    for r in range(scores.shape[0]):
        for t in range(max(0, horizon[r % many] + 1 - number), scores.shape[1]):
            scores[r, t] = np.float32(-np.inf)


@njit(**INLINE)
def _exact(kept, row, head, sinks, first, out):
    """Exact tokens from a sink on, or from a position on, which do not cross the ring's end, (n, D), fp32: as they lie,
    or in `out`, where they are of another type."""
    count, at = out.shape[0], first if sinks else first % kept.ring.shape[2]
    source = kept.sinks[row, head, at : at + count] if sinks else kept.ring[row, head, at : at + count]
    if kept.kind == FLOAT:
        return source.view(np.float32)
    for t in range(count):
        load(source[t], kept.kind, out[t])
    return out


@njit(**FAST)
def _pinned(lines, row, first, kept, side, frontier, where, page, head, scratch, out):
    """Pins from line `first` on, lines (P, 4), to out (n, D), fp32; how many there are. `where`: the column of lines
    that says where this side has them; those that it does not pin are in its ring or packed."""
    count = 0
    while first + count < lines.shape[0] and count < page and lines[first + count, 0] >= 0:
        position, slot = lines[first + count, 0], lines[first + count, 3]
        pin = lines[first + count, where]
        if pin >= 0:
            load(kept.pinned[row, head, pin], kept.kind, out[count])
        elif position >= frontier:
            load(kept.ring[row, head, position % kept.ring.shape[2]], kept.kind, out[count])
        else:
            read_token(side, side.table[row, slot // page], head, slot % page, scratch, out[count : count + 1])
        count += 1
    return count


@njit(**FAST)
def _clear(x, first, skip):
    """Zeros for tokens that nobody reads: there, raw memory may hold anything."""
    x[:first] = np.float32(0.0)
    for t in range(skip.shape[0]):
        if skip[t]:
            x[t] = np.float32(0.0)


@njit(**FAST)
def _finish(acc, top, total, sink, row, head, many, kind, out, lse):
    """Sums (R, D) to the output, words (B, M, Hq, n), with a logit without a value per query head, or none."""
    group = acc.shape[0] // many
    for r in range(acc.shape[0]):
        query = head * group + r // many
        if sink.shape[0] and sink[query] > -np.inf:
            high = max(top[r], sink[query])
            fade = np.float32(math.exp(top[r] - high))
            total[r] = total[r] * fade + np.float32(math.exp(sink[query] - high))
            acc[r] *= fade
            top[r] = high
        acc[r] *= np.float32(1.0) / total[r] if total[r] > 0 else np.float32(0.0)
        save(acc[r], kind, out[row, r % many, query])
        if lse.shape[0]:
            lse[row, query, r % many] = top[r] + np.float32(math.log(total[r])) if total[r] > 0 else -np.inf


@njit(**FAST)
def _merge(work, first, last, acc, top, total):
    """Pieces [first, last) of work (n, R, D + 2), sums beside top and total, to one."""
    dim = acc.shape[1]
    for r in range(acc.shape[0]):
        high = np.float32(-np.inf)
        for i in range(first, last):
            high = max(high, work[i, r, dim])
        acc[r] = np.float32(0.0)
        top[r], total[r] = high, np.float32(0.0)
        for i in range(first, last):
            if work[i, r, dim] > -np.inf:
                fade = np.float32(math.exp(work[i, r, dim] - high))
                total[r] += work[i, r, dim + 1] * fade
                acc[r] += work[i, r, :dim] * fade


@njit(**FAST)
def attend(q, shape, numbers, flat, turning, see, room, sink, out, lse):
    """Draw pieces until none is left.

    q: the address of queries (B, Hq, M, D); shape: Hq, M and their `KINDS`; numbers: the scale of scores, a soft cap
    or 0, tokens per page, pages per piece; flat: see `numba.write.store`; turning: frequencies, and turns within a page
    (2, page, F); see: `contract.See`; room: a counter (1,) and one per piece, int64, zeros, and work, see `_merge`,
    used where a row and head is cut; sink (Hq,) or none; out: the address of (B, M, Hq, Dv) in the queries' type; lse
    (B, Hq, M) or none.
    """
    scale, softcap, page, run = np.float32(numbers[0]), np.float32(numbers[1]), numbers[2], numbers[3]
    frequencies, turns = turning
    counter, done, work = room
    key, value = side_of(flat), side_of(flat[EACH:])
    kept = kept_of(flat[SIDE:]), kept_of(flat[EACH + SIDE :])
    batch, heads, _, words = kept[0].ring.shape
    many, kind, size, own = shape[1], shape[2], 2 if shape[2] == FLOAT else 1, 2 if kept[0].kind == FLOAT else 1
    rows, dim, value_dim = shape[0] // heads * many, words // own, kept[1].ring.shape[3] // own
    asked = carray(pointer(q), (batch, shape[0], many, dim * size), np.int16)
    answer = carray(pointer(out), (batch, many, shape[0], value_dim * size), np.int16)
    x, y = np.empty((page, dim), np.float32), np.zeros((page, value_dim), np.float32)
    scratch = np.empty((2, page * max(dim, value_dim)), np.float32)
    raw, turned = np.empty((rows, dim), np.float32), np.empty((rows, dim), np.float32)
    folded = np.empty((rows, dim), np.float32)
    scores, power = np.empty((rows, page), np.float32), np.empty(page, np.float32)
    packed, acc = np.empty((rows, value_dim), np.float32), np.empty((rows, value_dim), np.float32)
    top, total = np.empty(rows, np.float32), np.empty(rows, np.float32)
    angles = np.empty((2, frequencies.shape[0]))
    while True:
        piece = _draw(counter)
        row, part = 0, piece
        while row < batch and part >= heads * _pieces(see.rows[row, LIMIT], page, run):
            part -= heads * _pieces(see.rows[row, LIMIT], page, run)
            row += 1
        if row == batch:
            return
        line, cut = see.rows[row], _pieces(see.rows[row, LIMIT], page, run)
        head, part = part // cut, part % cut
        _queries(asked, kind, scale, row, head, raw)
        turned[:] = raw
        if key.turn:
            butterflies(turned, key.turn, np.float32(1.0 / math.sqrt(key.turn)))
        top[:], total[:] = np.float32(-np.inf), np.float32(0.0)
        packed[:], acc[:] = np.float32(0.0), np.float32(0.0)
        skip = see.skip[row] if see.skip.shape[1] else see.skip[0]
        high = max(line[KEYS], line[VALUES])
        stage, at, within = PAGES, part * run, 0
        stop = min(at + run, (line[LIMIT] + page - 1) // page)
        while stage != OVER:
            # which tokens come next: [first, n) of a page, or of scratch, from `number` on; `p`: the page
            p, first, n, number = 0, 0, 0, 0
            if stage == PAGES and at < stop:
                p, n, at = at, min(page, line[LIMIT] - at * page), at + 1
            elif stage == SPAN and at < see.span.shape[0]:
                if see.span[at, 0] != row:
                    at += 1
                    continue
                slot = see.span[at, 3] + within
                p, first, number = slot // page, slot % page, see.span[at, 1] + within
                capacity = kept[0].ring.shape[2]
                n = min(page, first + see.span[at, 2] - within, first + capacity - number % capacity)
                within += n - first
                if within == see.span[at, 2]:
                    at, within = at + 1, 0
            elif stage == PINS and at < see.pinned.shape[1]:
                number, n = at, min(page, see.pinned.shape[1] - at)
                at += n
            elif stage == SINKS and at < line[HELD]:
                number, n = at, min(page, line[HELD] - at)
                at += n
            elif stage == RING and at < line[BEHIND]:
                capacity = kept[0].ring.shape[2]
                number, n = at, min(page, line[BEHIND] - at, capacity - at % capacity)
                at += n
            else:
                stage = stage + 1 if part == cut - 1 else OVER
                at, within = high if stage == RING else 0, 0
                continue
            keys_packed = stage == PAGES or (stage == SPAN and line[KEYS] > line[VALUES])
            values_packed = stage == PAGES or (stage == SPAN and line[KEYS] < line[VALUES])
            if keys_packed:
                if frequencies.shape[0]:
                    phase(frequencies, line[ORIGIN] + p * page, angles[0], angles[1])
                found = key.table[row, p]
                score_page(turned, key, found, head, x[:n], scratch, folded, turns, angles, scores)
            else:
                if stage == PINS:
                    n = _pinned(see.pinned[row], row, number, kept[0], key, line[KEYS], 1, page, head, scratch, x)
                    tokens = x[:n]
                else:
                    tokens = _exact(kept[0], row, head, stage == SINKS, number, x[first:n])
                dots(raw, tokens, scores[:, first:n])
            if softcap > 0:
                cap(scores[:, first:n], softcap)
            if stage <= SPAN:
                if first or skip.shape[0]:
                    hide(scores, first, skip[p * page : p * page + n])
            elif stage != PINS and many > 1:
                ahead = 0 if stage == SINKS else kept[0].sinks.shape[2]
                _blind(scores[:, :n], number + ahead, see.horizon[row])
            soften(scores, n, power, top, total, packed, acc)
            if values_packed:
                read(value, value.table[row, p], head, False, scratch, y[:n])
                if value.raw.shape[0]:
                    _clear(y, first, skip[p * page : p * page + n])
                weigh(scores[:, :n], y[:n], packed)
            else:
                if stage == PINS:
                    _pinned(see.pinned[row], row, number, kept[1], value, line[VALUES], 2, page, head, scratch, y)
                    tokens = y[:n]
                else:
                    tokens = _exact(kept[1], row, head, stage == SINKS, number, y[first:n])
                weigh(scores[:, first:n], tokens, acc)
        if value.turn:
            butterflies(packed, value.turn, np.float32(1.0 / math.sqrt(value.turn)))
        acc += packed
        if cut > 1:
            work[piece, :, :value_dim] = acc
            work[piece, :, value_dim], work[piece, :, value_dim + 1] = top, total
            if _draw(done[piece - part : piece - part + 1]) < cut - 1:
                continue
            _merge(work, piece - part, piece - part + cut, acc, top, total)
        _finish(acc, top, total, sink, row, head, many, kind, answer, lse)
