"""Outliers in Triton: found, taken out of the ranges, put back. Entries of a token are numbered h·D + d.

A program finds those of a few tokens by bisecting on the number that just as many entries lie below, 32 steps whatever
the number of slots; of entries that equal it, as many as are wanted are counted off. The running count of what was
found is each one's slot, sorted by number as it is.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from kvist.kernels.contract import Constants, Traits
from kvist.kernels.triton.coding import EXACT, TILE


@triton.jit
def _ordered(x):
    """fp32 to int32 that compare the same; both zeros are one."""
    bits = tl.where(x == 0.0, 0.0, x).to(tl.int32, bitcast=True)
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


@triton.jit
def _smallest(keys, inside, room, LATE: tl.constexpr):
    """Which of keys (T, N) are the `room` smallest of each token; of equal ones the first or, LATE, the last."""
    low = tl.full([keys.shape[0]], -2147483648, tl.int32)
    high = tl.full([keys.shape[0]], 2147483647, tl.int32)
    for _ in range(0, 32):
        middle = (low & high) + ((low ^ high) >> 1)
        enough = tl.sum(((keys <= middle[:, None]) & inside).to(tl.int32), 1) >= room
        low, high = tl.where(enough, low, middle + 1), tl.where(enough, middle, high)
    below, equal = (keys < high[:, None]) & inside, (keys == high[:, None]) & inside
    wanted = room - tl.sum(below.to(tl.int32), 1)
    number = tl.cumsum(equal.to(tl.int32), 1)
    if LATE:  # the last of them, first to last
        number = (tl.sum(equal.to(tl.int32), 1) + 1)[:, None] - number
    return below | (equal & (number <= wanted[:, None]))


@triton.jit
def find_kernel(
    x, fixed_scale, fixed_offset, outlier, channel, ends, escaped, tokens, tiles, row_stride, stride, token_stride,
    HEADS: tl.constexpr, DIM: tl.constexpr, SLOTS: tl.constexpr, FIXED: tl.constexpr, LARGEST: tl.constexpr,
    T: tl.constexpr, N: tl.constexpr,
):  # fmt: skip
    """A program per tile of tokens and row of x (N, H, T, D): what is stored of its outliers, and which they are."""
    tile, row = tl.program_id(0) % tiles, (tl.program_id(0) // tiles).to(tl.int64)
    t, i = (tile * T + tl.arange(0, T)).to(tl.int64), tl.arange(0, N)
    head, d = (i // DIM).to(tl.int64), i % DIM
    inside = (t < tokens)[:, None] & (i < HEADS * DIM)[None, :]
    at = (row * row_stride + t * token_stride)[:, None] + (head * stride + d)[None, :]
    value = tl.load(x + at, mask=inside, other=0.0).to(tl.float32)
    rank = value
    if FIXED:
        scale = tl.load(fixed_scale + i, mask=i < HEADS * DIM, other=1.0)[None, :]
        offset = tl.load(fixed_offset + i, mask=i < HEADS * DIM, other=0.0)[None, :]
        rank = tl.math.div_rn(value - offset, tl.where(scale > 0, scale, 1.0))
    if LARGEST:
        found = _smallest(_ordered(-tl.abs(rank)), inside, SLOTS, True)
    else:
        found = _smallest(_ordered(rank), inside, SLOTS // 2, False)
        found = found | _smallest(_ordered(-rank), inside, SLOTS // 2, True)
    count = tl.cumsum(found.to(tl.int32), 1)
    line = row * tokens + t
    slot = line[:, None] * SLOTS + count - 1
    narrow = tl.minimum(tl.maximum(value, -65504.0), 65504.0).to(tl.float16)
    tl.store(outlier + slot, narrow, mask=found)
    tl.store(channel + slot, tl.broadcast_to(d[None, :], found.shape), mask=found)
    tl.store(ends + line[:, None] * HEADS + head[None, :], count, mask=inside & (d == DIM - 1)[None, :])
    where = ((row * HEADS + head)[None, :] * tokens + t[:, None]) * DIM + d[None, :]
    tl.store(escaped + where, found.to(tl.uint8), mask=inside)


@triton.jit
def restore_kernel(
    outlier, channel, ends, out, tokens, HEADS: tl.constexpr, DIM: tl.constexpr, SLOTS: tl.constexpr, S: tl.constexpr
):
    """A program per token of out (N, H, T, D): its outliers over what was decoded."""
    line = tl.program_id(0).to(tl.int64)
    row, t, slot = line // tokens, line % tokens, tl.arange(0, S)
    head = tl.zeros([S], tl.int64)
    for h in range(0, HEADS):
        head += (tl.load(ends + line * HEADS + h).to(tl.int32) <= slot).to(tl.int64)
    taken = slot < SLOTS
    d = tl.load(channel + line * SLOTS + slot, mask=taken, other=0).to(tl.int32)
    value = tl.load(outlier + line * SLOTS + slot, mask=taken, other=0.0).to(tl.float32)
    inside = taken & (head < HEADS) & (d >= 0) & (d < DIM)  # a damaged file must not write elsewhere
    tl.store(out + ((row * HEADS + head) * tokens + t) * DIM + d, value, mask=inside)


def escape(traits: Traits, x: Tensor, constants: Constants, slots: int) -> tuple[dict[str, Tensor], Tensor]:
    """Outliers of values (N, H, T, D) as they are stored, and which values they are, uint8 (N, H, T, D)."""
    (count, heads, tokens, dim), device = x.shape, x.device
    kind = torch.uint8 if dim <= 256 else torch.int16
    outlier = torch.empty(count, tokens, slots, dtype=torch.float16, device=device)
    channel = torch.empty(count, tokens, slots, dtype=kind, device=device)
    ends = torch.empty(count, tokens, heads, dtype=torch.uint8, device=device)
    escaped = torch.empty(count, heads, tokens, dim, dtype=torch.uint8, device=device)
    fixed = constants.scale is not None
    n = triton.next_power_of_2(heads * dim)
    tile = max(1, min(TILE // n, triton.next_power_of_2(max(1, tokens))))
    tiles = -(-tokens // tile)
    if tiles * count:
        find_kernel[(tiles * count,)](
            x, constants.scale if fixed else x, constants.offset if fixed else x, outlier, channel, ends, escaped,
            tokens, tiles, *x.stride()[:3], HEADS=heads, DIM=dim, SLOTS=slots, FIXED=fixed,
            LARGEST=traits.rank == "largest", T=tile, N=n, num_warps=max(1, min(16, tile * n // 512)), **EXACT,
        )  # fmt: skip
    return {"outlier": outlier, "channel": channel, "ends": ends}, escaped


def restore(arrays: dict[str, Tensor], out: Tensor) -> None:
    """The outliers that arrays hold over decoded values (..., H, T, D)."""
    (heads, tokens, dim), slots = out.shape[-3:], arrays["channel"].shape[-1]
    restore_kernel[(out.numel() // (heads * dim),)](
        arrays["outlier"], arrays["channel"], arrays["ends"], out, tokens,
        HEADS=heads, DIM=dim, SLOTS=slots, S=triton.next_power_of_2(slots), num_warps=1,
    )  # fmt: skip
