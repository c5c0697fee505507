"""Decode attention to what is not packed on both sides: sinks, recent tokens, the span between frontiers, pins."""

import triton
import triton.language as tl

from kvist.kernels.triton.scores import LOG2E, NONE, dense_scores, exact_query, packed_query, soften
from kvist.kernels.triton.side import decoded, tokens_at
from kvist.kernels.triton.tiles import hadamard
from kvist.kernels.triton.unpack import PLAIN

LOOSE = tl.constexpr(32)  # tokens per program
SINK, RING, PIN, PACKED, NOWHERE = (tl.constexpr(kind) for kind in range(5))  # where a side keeps a loose token


@triton.jit
def _kept(pointer, line, pitch, index, ok, d, F: tl.constexpr):
    """Tokens at `index` (T,) of a head's `pitch` tokens, fp32 (T, N), 0 where they are not `ok`."""
    inside = ok[:, None] & (d < F.dim)[None, :]
    at = line * pitch + index
    return tl.load(pointer + at[:, None] * F.dim + d[None, :], mask=inside, other=0.0).to(tl.float32)


@triton.jit
def _whereabouts(i, ok, is_sink, pin, position, frontier, capacity):
    """Where a side keeps loose tokens (T,), and the number of each there. pin: its slot among the pins, or -1."""
    kind = tl.where(is_sink, SINK, tl.where(pin >= 0, PIN, tl.where(position >= frontier, RING, PACKED)))
    return tl.where(ok, kind, NOWHERE), tl.where(is_sink, i, tl.where(pin >= 0, pin, position % capacity))


@triton.jit
def _loose_rows(S, place, kind, index, d, capacity, sinks, pins):
    """Exact tokens (T, N), in their own type, at `index` (T,) of sinks, ring or pins; others are 0."""
    F: tl.constexpr = S.form
    line = (place.b * F.heads + place.head).to(tl.int64)
    x = _kept(S.exact.ring, line, capacity, index, kind == RING, d, F)
    if S.exact.sinks is not None:
        x += _kept(S.exact.sinks, line, sinks, index, kind == SINK, d, F)
    if S.exact.pinned is not None:
        x += _kept(S.exact.pinned, line, pins, index, kind == PIN, d, F)
    own = S.exact.ring.dtype.element_ty
    return x if own == tl.bfloat16 and PLAIN else x.to(own)  # the interpreter multiplies bf16 as if it were integers


@triton.jit
def loose_part(call, K, V, widths, place, first, out, C: tl.constexpr):
    """Attention over LOOSE loose tokens from number `first` on, its sums to `out`; the maximum of the scores and the
    sum of the weights (M,). They are numbered: sinks, then positions from the lower frontier on, then pins."""
    state = call.state + place.b * 8
    held, kf, vf = tl.load(state), tl.load(state + 1), tl.load(state + 2)
    behind, origin = tl.load(state + 3), tl.load(state + 4)
    top = tl.full([C.columns], NONE, tl.float32)
    total = tl.full([LOOSE, C.columns], 0.0, tl.float32)
    low = tl.minimum(kf, vf)
    i = first + tl.arange(0, LOOSE)
    position = low + i - held
    span = held + behind - low
    is_sink, is_span, is_pin = i < held, (i >= held) & (i < span), (i >= span) & (i - span < call.pins)
    if call.skip is not None:  # pins come by themselves
        line = call.skip + place.b.to(tl.int64) * widths.skip + position
        hidden = tl.load(line, mask=is_span & (position < widths.skip), other=0)
        is_span = is_span & ((hidden == 0) | (position >= tl.maximum(kf, vf)))
    pin_k, pin_v = i * 0 - 1, i * 0 - 1
    if call.pinned is not None:
        line = call.pinned + (place.b * call.pins + i - span) * 4
        position = tl.where(is_pin, tl.load(line, mask=is_pin, other=-1), position)
        pin_k, pin_v = tl.load(line + 1, mask=is_pin, other=-1), tl.load(line + 2, mask=is_pin, other=-1)
        is_pin = is_pin & (position >= 0)
    ok = is_sink | is_span | is_pin
    k_kind, k_index = _whereabouts(i, ok, is_sink, pin_k, position, kf, widths.capacity)
    v_kind, v_index = _whereabouts(i, ok, is_sink, pin_v, position, vf, widths.capacity)
    k_packed, v_packed = k_kind == PACKED, v_kind == PACKED
    x = _loose_rows(K, place, k_kind, k_index, tl.arange(0, K.form.padded), widths.capacity, call.sinks, call.k_pins)
    plain = exact_query(call.q, place, tl.arange(0, K.form.padded), K.form)
    if plain.dtype == x.dtype and x.dtype != tl.float32:
        s = tl.dot(x, plain)
    else:
        s = tl.dot(x.to(tl.float32), plain.to(tl.float32), input_precision="tf32x3")
    if tl.max(k_packed.to(tl.int32)) > 0:
        stored, peak = packed_query(call.q, place, K.form, False)
        at = tokens_at(K, place.b, widths.k, position, k_packed, place.head)
        s += dense_scores(K, stored, at, position + origin) * peak[None, :]
    number = tl.where(is_sink, i, position + call.sinks)
    horizon = held + behind - C.queries + place.columns % C.queries
    seen = ok[:, None] & (number[:, None] <= horizon[None, :])
    weights, top, total, _ = soften(s * (call.scale * LOG2E), seen, top, total, C.softcap)
    d = tl.arange(0, V.form.padded)
    x = _loose_rows(V, place, v_kind, v_index, d, widths.capacity, call.sinks, call.v_pins)
    if x.dtype == tl.float32:
        acc = tl.dot(tl.trans(x), weights, input_precision="tf32x3")
    else:  # weights as two numbers of half precision, lest they are rounded more than values are
        rounded = weights.to(x.dtype)
        acc = tl.dot(tl.trans(x), rounded)
        acc = tl.dot(tl.trans(x), (weights - rounded.to(tl.float32)).to(x.dtype), acc)
    if tl.max(v_packed.to(tl.int32)) > 0:
        packed = decoded(V, tokens_at(V, place.b, widths.v, position, v_packed, place.head), d)
        extra = tl.dot(tl.trans(packed).to(tl.float16), tl.where(v_packed[:, None], weights, 0.0).to(tl.float16))
        if V.form.hadamard > 0:
            turn = hadamard(d[:, None], d[None, :], V.form.hadamard)
            extra = tl.dot(turn, extra, input_precision="tf32x3")
        acc += extra
    inside = place.real[None, :] & (d < V.form.dim)[:, None]
    tl.store(out + place.sums + place.columns[None, :] * V.form.dim + d[:, None], acc, mask=inside)
    return top, tl.sum(total, 0)
