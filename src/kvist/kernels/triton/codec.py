"""Coding (quantize), decoding (dequantize) and rotating in Triton: to the bit what the reference in `coding` gives.

A program codes a tile of tokens of one head; where one range spans all heads, a tile of all of them.
"""

from math import prod

import torch
import triton
import triton.language as tl
from torch import Tensor

from kvist.kernels.contract import Constants, Traits, packed_bytes
from kvist.kernels.guard import on_its_device
from kvist.kernels.triton.coding import EXACT, butterflies, warps
from kvist.kernels.triton.outliers import find
from kvist.kernels.triton.pack import code_tile
from kvist.kernels.triton.side import TILE, Form, Side, Tokens, coding, constant, decoded, entry_of, side, tokens_at


@triton.jit(do_not_specialize=["tiles", "width"])
def encode_kernel(S, source, strides, tokens, tiles, starts, width):
    """A program per tile of tokens, part of the channels, head (one for all where a range spans them) and row. Into
    arrays as long as `source` or, where there is a page table, into the slots of a row from its start on."""
    F: tl.constexpr = S.form
    heads: tl.constexpr = 1 if F.across else F.heads
    i = tl.program_id(0)
    tile, i = i % tiles, i // tiles
    first, i = i % F.pieces * F.part, i // F.pieces
    head, row = i % heads, (i // heads).to(tl.int64)
    t = tl.arange(0, F.tile)
    slot = (tile * F.step + t).to(tl.int64)
    real = (t < F.step) & (slot < tokens)
    start = row * strides[0] + slot * strides[2]
    if S.table is not None:
        at = tokens_at(S, row, width, slot + tl.load(starts + row), real, head)
    else:
        at = Tokens(row, slot, real, head)
    code_tile(S, source, start, strides[1], at, first)


@triton.jit(do_not_specialize=["tiles"])
def decode_kernel(S, out, tiles):
    """A program per tile of tokens, head and row: codes to values (N, H, T, D), fp32."""
    F: tl.constexpr = S.form
    i = tl.program_id(0)
    tile, i = i % tiles, i // tiles
    head, row = i % F.heads, (i // F.heads).to(tl.int64)
    t = (tile * F.tile + tl.arange(0, F.tile)).to(tl.int64)
    d = tl.arange(0, F.padded)
    at = Tokens(row, t, t < S.page, head)
    seen = at.ok[:, None] & (d < F.dim)[None, :]
    tl.store(out + entry_of(S, at)[:, None] * F.dim + d[None, :], decoded(S, at, d), mask=seen)


def _laid_out(traits: Traits, x: Tensor) -> Tensor:
    """Values (N, H, T, D) as a kernel reads them: the channels of a token lie together."""
    tokens = x.shape[2]
    if tokens % (traits.group if traits.along == "tokens" else 1):
        raise ValueError(f"{tokens} tokens are not whole groups of {traits.group}: encode them when a group is full")
    return x if x.stride(3) == 1 else x.contiguous()


def _encode(form: Form, into: Side, source: Tensor, starts: Tensor | None = None) -> None:
    """One launch. starts: the first slot of each row, where `into` has a page table."""
    count, heads, tokens, _ = source.shape
    tiles, width = -(-tokens // form.step), 0 if into.table is None else into.table.shape[1]
    if programs := tiles * form.pieces * (1 if form.across else heads) * count:
        encode_kernel[(programs,)](
            into, source, source.stride()[:3], tokens, tiles, starts, width,
            num_warps=warps(form), **EXACT,
        )  # fmt: skip


@on_its_device
def encode(traits: Traits, x: Tensor, constants: Constants, slots: int, turn: bool = False) -> dict[str, Tensor]:
    """See `choose`: ENCODE. x may be of any float type and strides; with `turn` it is given before its Hadamard
    rotation, which is done on the way."""
    lead, (heads, tokens, dim), count = x.shape[:-3], x.shape[-3:], prod(x.shape[:-3])
    if turn and traits.hadamard and slots:
        x, turn = rotate(x, dim & -dim), False
    source = _laid_out(traits, x.reshape(count, heads, tokens, dim))
    form = coding(traits, dim, heads, tokens, slots, turn)

    def new(*shape: int, dtype: torch.dtype) -> Tensor:
        return torch.empty(count, *shape, dtype=dtype, device=x.device)

    arrays = {"codes": new(heads, tokens, packed_bytes(dim, traits.bits), dtype=torch.uint8)}
    shape = (heads, tokens // form.group, dim) if form.along_tokens else (heads, tokens, form.groups)
    for name in ("scale", "offset")[: form.stored * (1 if form.symmetric else 2)]:
        arrays[name] = new(*((tokens, 1) if form.across else shape), dtype=torch.float16)
    escaped = new(heads, tokens, dim, dtype=torch.uint8) if slots else None
    clipped = None if form.stored else torch.zeros((), dtype=torch.int64, device=x.device)
    if slots:
        arrays["outlier"] = new(tokens, slots, dtype=torch.float16)
        arrays["channel"] = new(tokens, slots, dtype=torch.uint8 if dim <= 256 else torch.int16)
        arrays["ends"] = new(tokens, heads, dtype=torch.uint8)
    into = side(form, arrays, constants, tokens, torch.int32, escaped=escaped, clipped=clipped)
    if slots:
        find(traits, source, into)
    _encode(form, into, source)
    arrays = {name: array.view(*lead, *array.shape[1:]) for name, array in arrays.items()}
    return arrays if clipped is None else arrays | {"clipped": clipped}


@on_its_device
def encode_pages(
    traits: Traits, x: Tensor, arrays: dict[str, Tensor], table: Tensor, starts: Tensor, constants: Constants,
    page: int, turn: bool = False, clipped: Tensor | None = None,
) -> None:  # fmt: skip
    """`encode`, straight into the pages of a pool: token i of row r of x (B, H, T, D) into page slot starts[r] + i, by
    page tables (B, width) int32 and starts (B,) int32, whole groups. clipped: int64, is added to."""
    if traits.outliers:
        raise ValueError("outliers are found before anything is packed: use `encode`, and write what it returns")
    source, form = _laid_out(traits, x), coding(traits, x.shape[3], x.shape[1], x.shape[2], turn=turn)
    if clipped is None and not form.stored:
        clipped = torch.empty((), dtype=torch.int64, device=x.device)  # added to, and never read
    into = side(form, arrays, constants, constant(page), torch.int32, clipped=clipped, table=table)
    _encode(form, into, source, starts)


@on_its_device
def decode(traits: Traits, arrays: dict[str, Tensor], constants: Constants) -> Tensor:
    """See `choose`: DECODE."""
    lead, (heads, tokens, size) = arrays["codes"].shape[:-3], arrays["codes"].shape[-3:]
    count, dim = prod(lead), size * 8 // traits.bits
    flat = {name: array.contiguous() for name, array in arrays.items()}
    out = torch.empty(*lead, heads, tokens, dim, dtype=torch.float32, device=flat["codes"].device)
    slots = flat["channel"].shape[-1] if "channel" in flat else 0
    form = coding(traits, dim, heads, TILE, slots, whole=True)
    tiles = -(-tokens // form.tile)
    if programs := tiles * heads * count:
        decode_kernel[(programs,)](side(form, flat, constants, tokens), out, tiles, num_warps=warps(form), **EXACT)
    return out


@triton.jit
def rotate_kernel(x, out, rows, F: tl.constexpr, BLOCK: tl.constexpr):
    """A program per tile of rows (N, D), in fp32."""
    row = (tl.program_id(0) * F.tile + tl.arange(0, F.tile)).to(tl.int64)
    d = tl.arange(0, F.padded)
    at, mask = row[:, None] * F.dim + d[None, :], (row < rows)[:, None] & (d < F.dim)[None, :]
    tl.store(out + at, butterflies(tl.load(x + at, mask=mask, other=0.0).to(tl.float32), BLOCK), mask=mask)


@on_its_device
def rotate(x: Tensor, block: int) -> Tensor:
    """`grid.rotate`; x may be of any float type."""
    x, dim = x.contiguous(), x.shape[-1]
    out, rows = torch.empty_like(x, dtype=torch.float32), x.numel() // dim
    form = coding(Traits("uniform", 8, "channels", 0, False, "minmax"), dim, 1, rows)
    if rows:
        rotate_kernel[(-(-rows // form.tile),)](x, out, rows, form, block, num_warps=warps(form), **EXACT)
    return out
