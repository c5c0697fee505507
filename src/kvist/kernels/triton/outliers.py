"""Outliers in Triton: found, and taken out of the ranges. Entries of a token are numbered h·D + d.

A program finds those of a few tokens by bisecting on the number that just as many entries lie below, 32 steps whatever
the number of slots; of entries that equal it, as many as are wanted are counted off. The running count of what was
found is each one's slot, sorted by number as it is. `side.decoded` puts them back.
"""

import triton
import triton.language as tl
from torch import Tensor

from kvist.kernels.contract import Traits
from kvist.kernels.triton.coding import EXACT, narrowed
from kvist.kernels.triton.side import TILE, Side


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


@triton.jit(do_not_specialize=["tiles"])
def find_kernel(S, x, strides, tiles, LARGEST: tl.constexpr, T: tl.constexpr, N: tl.constexpr):
    """A program per tile of tokens and row of x (N, H, T, D): what is stored of its outliers, and which they are."""
    F: tl.constexpr = S.form
    tile, row = tl.program_id(0) % tiles, (tl.program_id(0) // tiles).to(tl.int64)
    t, i = (tile * T + tl.arange(0, T)).to(tl.int64), tl.arange(0, N)
    head, d = (i // F.dim).to(tl.int64), i % F.dim
    inside = (t < S.page)[:, None] & (i < F.heads * F.dim)[None, :]
    at = (row * strides[0] + t * strides[2])[:, None] + (head * strides[1] + d)[None, :]
    value = tl.load(x + at, mask=inside, other=0.0).to(tl.float32)
    rank = value
    if not F.stored:  # in units of the range of their channel
        scale = tl.load(S.constants.scale + i, mask=i < F.heads * F.dim, other=1.0)[None, :]
        offset = tl.load(S.constants.offset + i, mask=i < F.heads * F.dim, other=0.0)[None, :]
        rank = tl.math.div_rn(value - offset, tl.where(scale > 0, scale, 1.0))
    if LARGEST:
        taken = _smallest(_ordered(-tl.abs(rank)), inside, F.slots, True)
    else:
        taken = _smallest(_ordered(rank), inside, F.slots // 2, False)
        taken = taken | _smallest(_ordered(-rank), inside, F.slots // 2, True)
    count = tl.cumsum(taken.to(tl.int32), 1)
    line = row * S.page + t
    slot = line[:, None] * F.slots + count - 1
    tl.store(S.outlier + slot, narrowed(value), mask=taken)
    tl.store(S.channel + slot, tl.broadcast_to(d[None, :], taken.shape), mask=taken)
    tl.store(S.ends + line[:, None] * F.heads + head[None, :], count, mask=inside & (d == F.dim - 1)[None, :])
    where = ((row * F.heads + head)[None, :] * S.page + t[:, None]) * F.dim + d[None, :]
    tl.store(S.escaped + where, taken.to(tl.uint8), mask=inside)


def find(traits: Traits, x: Tensor, stored: Side) -> None:
    """Fill what `stored` has of outliers: those of values (N, H, T, D), and which values they are."""
    count, heads, tokens, dim = x.shape
    n = triton.next_power_of_2(heads * dim)
    tile = max(1, min(TILE // n, triton.next_power_of_2(max(1, tokens))))
    if programs := -(-tokens // tile) * count:
        find_kernel[(programs,)](
            stored, x, x.stride()[:3], -(-tokens // tile), LARGEST=traits.rank == "largest", T=tile, N=n,
            num_warps=max(1, min(16, tile * n // 512)), **EXACT,
        )  # fmt: skip
