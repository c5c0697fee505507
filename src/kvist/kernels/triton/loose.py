"""Decode attention to what is not packed on both sides: sinks, recent tokens, the span between frontiers, pins."""

import triton
import triton.language as tl

from kvist.kernels.triton.scores import LOG2E, NONE, dense_scores, packed_query, peak, scaled, soften
from kvist.kernels.triton.tiles import decoded, hadamard
from kvist.kernels.triton.unpack import PLAIN


@triton.jit
def _exact(source, at, ok, d, F: tl.constexpr):
    inside = ok[:, None] & (d < F.dim)[None, :]
    return tl.load(source + at[:, None] * F.dim + d[None, :], mask=inside, other=0.0).to(tl.float32)


@triton.jit
def _loose_rows(E, kind, b, head, index, ok, d, sinks, capacity, pins, F: tl.constexpr):
    """Exact tokens (T, N), in their own type, at index (T,) of the sinks (kind 0), the ring (1) or the pins (2); of any
    other kind 0."""
    line = (b * F.heads + head).to(tl.int64)
    x = _exact(E[1], line * capacity + index, ok & (kind == 1), d, F)
    if sinks > 0:
        x += _exact(E[0], line * sinks + index, ok & (kind == 0), d, F)
    if pins > 0:
        x += _exact(E[2], line * pins + index, ok & (kind == 2), d, F)
    own = E[1].dtype.element_ty
    return x if own == tl.bfloat16 and PLAIN else x.to(own)  # the interpreter multiplies bf16 as if it were integers


@triton.jit
def loose_part(
    q, out, K, V, EK, EV, state, skip, pinned, b, head, base, at, columns, real, first, scale,
    k_width, v_width, skip_width, sinks, capacity, k_pins, v_pins, pins,
    KF: tl.constexpr, VF: tl.constexpr, QUERIES: tl.constexpr, M: tl.constexpr, LT: tl.constexpr,
    P2: tl.constexpr, REST: tl.constexpr, SOFTCAP: tl.constexpr, SKIPS: tl.constexpr,
):  # fmt: skip
    """Attention over LT loose tokens from number `first` on, its sums to `out` at `at`; the maximum of the scores and
    the sum of the weights (M,). They are numbered: sinks, then positions from the lower frontier on, then pins."""
    held, kf = tl.load(state + b * 8), tl.load(state + b * 8 + 1)
    vf, behind = tl.load(state + b * 8 + 2), tl.load(state + b * 8 + 3)
    origin = tl.load(state + b * 8 + 4)
    top = tl.full([M], NONE, tl.float32)
    total = tl.full([LT, M], 0.0, tl.float32)
    low = tl.minimum(kf, vf)
    i = first + tl.arange(0, LT)
    position = low + i - held
    span = held + behind - low
    pin = i - span
    is_sink, is_span, is_pin = i < held, (i >= held) & (i < span), (i >= span) & (pin < pins)
    if SKIPS:  # pins come by themselves
        hidden = tl.load(skip + b.to(tl.int64) * skip_width + position, mask=is_span & (position < skip_width), other=0)
        is_span = is_span & ((hidden == 0) | (position >= tl.maximum(kf, vf)))
    pin_k, pin_v = i * 0 - 1, i * 0 - 1
    if pins > 0:
        line = pinned + (b * pins + pin) * 4
        position = tl.where(is_pin, tl.load(line, mask=is_pin, other=-1), position)
        pin_k, pin_v = tl.load(line + 1, mask=is_pin, other=-1), tl.load(line + 2, mask=is_pin, other=-1)
        is_pin = is_pin & (position >= 0)
    slot = position % capacity
    k_kind = tl.where(is_sink, 0, tl.where(pin_k >= 0, 2, tl.where(position >= kf, 1, 3)))
    v_kind = tl.where(is_sink, 0, tl.where(pin_v >= 0, 2, tl.where(position >= vf, 1, 3)))
    k_index = tl.where(is_sink, i, tl.where(pin_k >= 0, pin_k, slot))
    v_index = tl.where(is_sink, i, tl.where(pin_v >= 0, pin_v, slot))
    ok = is_sink | is_span | is_pin
    number = tl.where(is_sink, i, position + sinks)
    horizon = held + behind - QUERIES + columns % QUERIES
    d = tl.arange(0, KF.padded)
    x = _loose_rows(EK, k_kind, b, head, k_index, ok, d, sinks, capacity, k_pins, KF)
    inside = real[None, :] & (d < KF.dim)[:, None]
    plain = tl.load(q + base + columns[None, :] * KF.dim + d[:, None], mask=inside, other=0.0)
    if plain.dtype == x.dtype and x.dtype != tl.float32:
        s = tl.dot(x, plain)
    else:
        s = tl.dot(x.to(tl.float32), plain.to(tl.float32), input_precision="tf32x3")
    k_packed, v_packed = ok & (k_kind == 3), ok & (v_kind == 3)
    slot = tl.where(k_packed | v_packed, position % KF.page, 0)
    index = tl.where(k_packed | v_packed, position // KF.page, 0)
    if tl.max(k_packed.to(tl.int32)) > 0:
        turned = packed_query(q, base, columns, real, KF, False, P2, REST)
        high = peak(turned)
        page = tl.load(K.table + b * k_width + index, mask=k_packed, other=0).to(tl.int64)
        extra = dense_scores(K, scaled(turned, 1.0 / high), 1024.0, page, slot, position + origin, k_packed, head, KF)
        s += extra * high[None, :]
    seen = ok[:, None] & (number[:, None] <= horizon[None, :])
    weights, top, total, _ = soften(s * (scale * LOG2E), seen, top, total, SOFTCAP)
    d = tl.arange(0, VF.padded)
    x = _loose_rows(EV, v_kind, b, head, v_index, ok, d, sinks, capacity, v_pins, VF)
    if x.dtype == tl.float32:
        acc = tl.dot(tl.trans(x), weights, input_precision="tf32x3")
    else:
        rounded = weights.to(x.dtype)
        acc = tl.dot(tl.trans(x), rounded)
        acc = tl.dot(tl.trans(x), (weights - rounded.to(tl.float32)).to(x.dtype), acc)
    if tl.max(v_packed.to(tl.int32)) > 0:
        page = tl.load(V.table + b * v_width + index, mask=v_packed, other=0).to(tl.int64)
        packed = decoded(V, page, slot, v_packed, head, d, VF)
        extra = tl.dot(tl.trans(packed).to(tl.float16), tl.where(v_packed[:, None], weights, 0.0).to(tl.float16))
        if VF.hadamard > 0:
            turn = hadamard(d[:, None], d[None, :], VF.hadamard)
            extra = tl.dot(turn, extra, input_precision="tf32x3")
        acc += extra
    inside = real[None, :] & (d < VF.dim)[:, None]
    tl.store(out + at + columns[None, :] * VF.dim + d[:, None], acc, mask=inside)
    return top, tl.sum(total, 0)
