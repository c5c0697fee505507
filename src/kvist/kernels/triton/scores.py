"""Queries meet keys, and scores become weights: what packed and loose tokens share in Triton decode attention."""

from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from kvist.kernels.triton.side import decoded
from kvist.kernels.triton.tiles import angles, channel_of, hadamard, slice_channels

LOG2E = tl.constexpr(1.4426950408889634)
NONE = tl.constexpr(-1e30)  # the maximum of no scores: finite, so that differences are numbers


class Call(NamedTuple):
    """What a launch is given beside its sides, of `contract.Decode`. q (B, H·ROWS, D); out (B, H·ROWS, Dv); logits: its
    sink, fp32; sinks, pins: loose tokens of a row that are sinks or pins; k_pins, v_pins: pins that each side keeps."""

    q: Tensor
    out: Tensor
    state: Tensor
    skip: Tensor | None
    pinned: Tensor | None
    logits: Tensor | None
    scale: float
    sinks: int
    pins: int
    k_pins: int
    v_pins: int


class Shape(NamedTuple):
    """What a launch is compiled for beside its sides. rows: of queries per KV head, `queries` of each query head;
    columns: room for rows in a program; merged: as many of them as hold any; tile: packed tokens multiplied at a time;
    softcap: 0 for none."""

    rows: int
    queries: int
    columns: int
    merged: int
    tile: int
    softcap: float


class Place(NamedTuple):
    """Where a program works: row b and KV head; query rows `columns` (M,), those that are `real`; where those of the
    head start in `Call.q`, and those of its sums in `Parts.out`."""

    b: object
    head: object
    columns: object
    real: object
    queries: object
    sums: object


class Widths(NamedTuple):
    """Numbers that change as a context grows: tokens of a ring, columns of the page tables and of the skip mask."""

    capacity: object
    k: object
    v: object
    skip: object


@triton.jit
def soften(s, seen, top, total, SOFTCAP: tl.constexpr):
    """Scores (T, M) to weights 2^(s - top'), with the new maximum (M,), the sums (T, M) not yet added up over T, and
    what old sums fade by (M,): a step of an online softmax."""
    if SOFTCAP > 0:
        nat = s / (SOFTCAP * LOG2E)
        s = (1.0 - 2.0 / (tl.exp(2.0 * nat) + 1.0)) * (SOFTCAP * LOG2E)
    s = tl.where(seen, s, float("-inf"))
    new = tl.maximum(top, tl.max(s, 0))
    fade = tl.exp2(top - new)
    weights = tl.exp2(s - new[None, :])
    return weights, new, total * fade[None, :] + weights, fade


@triton.jit
def exact_query(q, place, d, F: tl.constexpr):
    """Channels d (N,) of the queries as they are given, (N, M), in their own type."""
    inside = place.real[None, :] & (d < F.dim)[:, None]
    return tl.load(q + place.queries + place.columns[None, :] * F.dim + d[:, None], mask=inside, other=0.0)


@triton.jit
def _stored_query(q, place, d, F: tl.constexpr):
    """The same in the space that keys are stored in, fp32."""
    if F.hadamard > 0:  # rows d of the block Hadamard matrix times the queries
        channel = tl.arange(0, F.padded)
        whole = exact_query(q, place, channel, F).to(tl.float32)
        return tl.dot(hadamard(d[:, None], channel[None, :], F.hadamard), whole, input_precision="tf32x3")
    else:
        return exact_query(q, place, d, F).to(tl.float32)


@triton.jit
def packed_query(q, place, F: tl.constexpr, FOLDED: tl.constexpr):
    """The queries as packed keys meet them, slices for `folded_scores` or what `dense_scores` takes, divided by the
    largest of each row; and that (M,), 1 where all are 0."""
    parts = ()
    if FOLDED:
        for j in tl.static_range(F.dim * F.low // 8 // F.block):
            for i in tl.static_range(16 // F.low):
                parts = parts + (_stored_query(q, place, slice_channels(j, i, F), F),)
    elif F.pairs == 0:
        parts = parts + (_stored_query(q, place, tl.arange(0, F.padded), F),)
    else:
        pair = tl.arange(0, F.pair_tile)
        parts = parts + (_stored_query(q, place, channel_of(pair, 0, F), F),)
        parts = parts + (_stored_query(q, place, channel_of(pair, 1, F), F),)
        if 2 * F.pairs < F.dim:
            parts = parts + (_stored_query(q, place, 2 * F.pairs + tl.arange(0, F.rest_tile), F),)
    peak = tl.max(tl.abs(parts[0]), 0)
    for i in tl.static_range(1, len(parts)):
        peak = tl.maximum(peak, tl.max(tl.abs(parts[i]), 0))
    peak = tl.where(peak > 0, peak, 1.0)
    scaled = ()
    for i in tl.static_range(len(parts)):
        scaled = scaled + (parts[i] * (1.0 / peak)[None, :],)
    return scaled, peak


@triton.jit
def dense_scores(S, q, at, position):
    """q·k (T, M) of packed keys decoded one by one; q: all channels, or the first and second of each rotated pair and
    the rest, at most 1 in size: as halves they are 1024 times as large, so that few become subnormal."""
    F: tl.constexpr = S.form
    if F.pairs == 0:
        x = decoded(S, at, tl.arange(0, F.padded))
        s = tl.dot(x.to(tl.float16), (q[0] * 1024.0).to(tl.float16))
    else:
        pair = tl.arange(0, F.pair_tile)
        a = decoded(S, at, channel_of(pair, 0, F))
        b = decoded(S, at, channel_of(pair, 1, F))
        cos, sin = angles(S.constants.frequencies, position[:, None], pair[None, :], F)
        s = tl.dot((a * cos - b * sin).to(tl.float16), (q[0] * 1024.0).to(tl.float16))
        s = tl.dot((b * cos + a * sin).to(tl.float16), (q[1] * 1024.0).to(tl.float16), s)
        if 2 * F.pairs < F.dim:
            x = decoded(S, at, 2 * F.pairs + tl.arange(0, F.rest_tile))
            s = tl.dot(x.to(tl.float16), (q[2] * 1024.0).to(tl.float16), s)
    return s / 1024.0
