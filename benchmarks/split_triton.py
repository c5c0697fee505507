"""Split-KV flash decoding over contiguous keys and values of half precision: the fp16 kernel that ours must beat.

Nothing is left out that makes it slower: query rows of a group share a KV head's tile, tiles go to the tensor cores as
they come, and as many programs as fill the device share a row's tokens. A second launch merges them.
"""

# pyright: reportArgumentType=false, reportCallIssue=false, reportIndexIssue=false, reportAttributeAccessIssue=false
# (Triton's language is not Python to a type checker)

import torch
import triton
import triton.language as tl
from torch import Tensor

TILE = 64  # tokens at a time
WAVES = 4  # programs per multiprocessor that a launch aims for
NONE = tl.constexpr(-1e30)
LOG2E = 1.4426950408889634


@triton.jit
def split_kernel(
    q, k, v, part_out, part_top, part_total, length, share, scale,
    ROWS: tl.constexpr, M: tl.constexpr, D: tl.constexpr, P: tl.constexpr, T: tl.constexpr,
):  # fmt: skip
    """q (cells, ROWS, D), k and v (cells, length, D); program (split, cell) serves `share` tokens, whole tiles of them.
    part_out (cells, splits, M, P), part_top and part_total (cells, splits, M), scores in units of log 2."""
    split, cell = tl.program_id(0), tl.program_id(1)
    rows, d, t = tl.arange(0, M), tl.arange(0, P), tl.arange(0, T)
    wide = (d < D)[None, :]
    base = cell.to(tl.int64) * length
    x = tl.load(q + (cell * ROWS + rows)[:, None] * D + d[None, :], mask=(rows < ROWS)[:, None] & wide, other=0.0)
    top = tl.full([M], NONE, tl.float32)
    total = tl.full([M], 0.0, tl.float32)
    acc = tl.full([M, P], 0.0, tl.float32)
    for start in range(split * share, tl.minimum(split * share + share, length), T):
        real = start + t < length
        at = (base + start + t)[:, None] * D + d[None, :]
        keys = tl.load(k + at, mask=real[:, None] & wide, other=0.0)
        values = tl.load(v + at, mask=real[:, None] & wide, other=0.0)
        s = tl.where(real[None, :], tl.dot(x, tl.trans(keys)) * scale, NONE)
        new = tl.maximum(top, tl.max(s, 1))
        weights = tl.exp2(s - new[:, None])
        fade = tl.exp2(top - new)
        total = total * fade + tl.sum(weights, 1)
        acc = tl.dot(weights.to(values.dtype), values, acc * fade[:, None])
        top = new
    place = (cell * tl.num_programs(0) + split).to(tl.int64) * M + rows
    tl.store(part_top + place, top)
    tl.store(part_total + place, total)
    tl.store(part_out + place[:, None] * P + d[None, :], acc)


@triton.jit
def merge_kernel(
    part_out, part_top, part_total, out, splits,
    ROWS: tl.constexpr, M: tl.constexpr, D: tl.constexpr, P: tl.constexpr, S: tl.constexpr,
):  # fmt: skip
    """All parts of one query row to its output; S: splits, up to a power of two."""
    row, cell = tl.program_id(0), tl.program_id(1)
    s, d = tl.arange(0, S), tl.arange(0, P)
    here = s < splits
    place = (cell.to(tl.int64) * splits + s) * M + row
    tops = tl.load(part_top + place, mask=here, other=NONE)
    weights = tl.exp2(tops - tl.max(tops, 0))
    total = tl.sum(tl.load(part_total + place, mask=here, other=0.0) * weights, 0)
    x = tl.load(part_out + place[:, None] * P + d[None, :], mask=here[:, None], other=0.0)
    x = tl.sum(x * weights[:, None], 0) / total
    tl.store(out + (cell.to(tl.int64) * ROWS + row) * D + d, x.to(out.dtype.element_ty), mask=d < D)


def splits_for(cells: int, tiles: int, device: torch.device) -> int:
    """Programs that share the tokens of a cell."""
    if device.type != "cuda":
        return min(3, tiles)
    wanted = WAVES * torch.cuda.get_device_properties(device).multi_processor_count
    return max(1, min(tiles, 128, -(-wanted // cells)))


def attend(q: Tensor, keys: Tensor, values: Tensor, scale: float) -> Tensor:
    """One query per row, (B, Hq, 1, D), over contiguous keys and values (B, Hk, N, D) of the same half precision."""
    batch, heads, length, dim = keys.shape
    rows, cells = q.shape[1] // heads, batch * heads
    tiles = -(-length // TILE)
    splits = splits_for(cells, tiles, q.device)
    share = -(-tiles // splits) * TILE
    splits = -(-length // share)
    m, p = max(16, triton.next_power_of_2(rows)), max(16, triton.next_power_of_2(dim))
    part = torch.empty(cells * splits * m * p, dtype=torch.float32, device=q.device)
    top, total = torch.empty(2, cells * splits * m, dtype=torch.float32, device=q.device).unbind()
    out = torch.empty_like(q)
    shape = {"ROWS": rows, "M": m, "D": dim, "P": p}
    split_kernel[splits, cells](
        q, keys, values, part, top, total, length, share, scale * LOG2E, T=TILE, num_warps=4, num_stages=3, **shape
    )
    merge_kernel[rows, cells](part, top, total, out, splits, S=triton.next_power_of_2(splits), num_warps=4, **shape)
    return out
