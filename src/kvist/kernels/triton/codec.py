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
from kvist.kernels.triton.coding import (
    EXACT,
    TILE,
    Coding,
    butterflies,
    coding,
    compiled,
    kinds,
    parts,
    pointers,
    warps,
)
from kvist.kernels.triton.outliers import escape, restore
from kvist.kernels.triton.pack import code_tile


@triton.jit
def _encode(
    P, source, tokens, tiles, row_stride, stride, token_stride, table, starts, width, PAGE: tl.constexpr,
    C: tl.constexpr,
):  # fmt: skip
    pieces: tl.constexpr = (C.dim // 8 + C.part - 1) // C.part
    heads: tl.constexpr = 1 if C.across else C.heads
    step: tl.constexpr = C.group if C.along_tokens else C.tile
    i = tl.program_id(0)
    tile, i = i % tiles, i // tiles
    first, i = i % pieces * C.part, i // pieces
    head, row = i % heads, (i // heads).to(tl.int64)
    t = tl.arange(0, C.tile)
    slot = (tile * step + t).to(tl.int64)
    real = (t < step) & (slot < tokens)
    at = row * row_stride + slot * token_stride
    if PAGE > 0:
        slot += tl.load(starts + row)
        held = tl.load(table + row * width + slot // PAGE, mask=real, other=0).to(tl.int64)
        code_tile(P, source, at, stride, real, held, slot % PAGE, PAGE, head, first, C)
    else:
        code_tile(P, source, at, stride, real, row + slot * 0, slot, tokens, head, first, C)


@triton.jit
def encode_kernel(P, source, tokens, tiles, row_stride, stride, token_stride, C: tl.constexpr):
    """A program per tile of tokens, part of the channels, head (one for all where a range spans them) and row."""
    _encode(P, source, tokens, tiles, row_stride, stride, token_stride, source, source, 0, 0, C)


@triton.jit
def pages_kernel(
    P, source, tokens, tiles, row_stride, stride, token_stride, table, starts, width, PAGE: tl.constexpr,
    C: tl.constexpr,
):  # fmt: skip
    """The same, into slots of pages: those of a row from its start on."""
    _encode(P, source, tokens, tiles, row_stride, stride, token_stride, table, starts, width, PAGE, C)


@triton.jit
def decode_kernel(P, out, tokens, tiles, C: tl.constexpr):
    """A program per tile of tokens, head and row: codes to values (N, H, T, D), fp32."""
    i = tl.program_id(0)
    tile, i = i % tiles, i // tiles
    head, row = i % C.heads, (i // C.heads).to(tl.int64)
    t = (tile * C.tile + tl.arange(0, C.tile)).to(tl.int64)
    d = tl.arange(0, 8 * C.part)
    seen = (t < tokens)[:, None] & (d < C.dim)[None, :]
    entry = (row * C.heads + head) * tokens + t
    size: tl.constexpr = C.dim // 8 * (C.low + C.high)
    wide: tl.constexpr = C.dim // 8 * C.low
    codes = tl.load(P.codes + entry[:, None] * size + (d % wide)[None, :], mask=seen, other=0).to(tl.int32)
    codes = (codes >> (d // wide * C.low)[None, :]) & ((1 << C.low) - 1)
    if C.high > 0:
        thin: tl.constexpr = C.dim // 8 * C.high
        byte = tl.load(P.codes + entry[:, None] * size + wide + (d % thin)[None, :], mask=seen, other=0).to(tl.int32)
        codes = codes | (((byte >> (d // thin * C.high)[None, :]) & ((1 << C.high) - 1)) << C.low)
    point = tl.load(P.points + codes, mask=seen, other=0.0) if C.levels > 0 else codes.to(tl.float32)
    if C.stored:
        if C.along_tokens:
            where = (entry // C.group)[:, None] * C.dim + d[None, :]
        elif C.across:
            where = (row * tokens + t)[:, None] + d[None, :] * 0
        else:
            where = entry[:, None] * ((C.dim + C.group - 1) // C.group) + (d // C.group)[None, :]
        scale = tl.load(P.scale + where, mask=seen, other=0.0).to(tl.float32)
        offset = scale * C.shift
        if not C.symmetric:
            offset = tl.load(P.offset + where, mask=seen, other=0.0).to(tl.float32)
    else:
        where = (head * C.dim + d)[None, :]
        scale = tl.load(P.fixed_scale + where, mask=(d < C.dim)[None, :], other=0.0)
        offset = tl.load(P.fixed_offset + where, mask=(d < C.dim)[None, :], other=0.0)
    tl.store(out + entry[:, None] * C.dim + d[None, :], point * scale + offset, mask=seen)


def _launch(traits: Traits, x: Tensor, turn: bool) -> tuple[Tensor, Coding, int, int]:
    """Values (N, H, T, D) as a kernel reads them, their coding, and how many tiles of tokens and programs there are."""
    count, heads, tokens, dim = x.shape
    if tokens % (traits.group if traits.along == "tokens" else 1):
        raise ValueError(f"{tokens} tokens are not whole groups of {traits.group}: encode them when a group is full")
    source, c = x if x.stride(3) == 1 else x.contiguous(), coding(traits, dim, heads, tokens, turn)
    tiles = -(-tokens // (c.group if c.along_tokens else c.tile))
    return source, c, tiles, tiles * parts(c) * (1 if c.across else heads) * count


@on_its_device
def encode(traits: Traits, x: Tensor, constants: Constants, slots: int, turn: bool = False) -> dict[str, Tensor]:
    """See `choose`: ENCODE. x may be of any float type and strides; with `turn` it is given before its Hadamard
    rotation, which is done on the way."""
    lead, (heads, tokens, dim) = x.shape[:-3], x.shape[-3:]
    count, device, found, escaped = prod(lead), x.device, {}, None
    if turn and traits.hadamard and slots:
        x, turn = rotate(x, dim & -dim), False
    source, c, tiles, programs = _launch(traits, x.reshape(count, heads, tokens, dim), turn)
    size = packed_bytes(dim, traits.bits)
    arrays = {"codes": torch.empty(count, heads, tokens, size, dtype=torch.uint8, device=device)}
    shape = (heads, tokens // c.group, dim) if c.along_tokens else (heads, tokens, -(-dim // c.group))
    for name in ("scale", "offset")[: c.stored * (1 if c.symmetric else 2)]:
        numbers = (tokens, 1) if c.across else shape
        arrays[name] = torch.empty(count, *numbers, dtype=torch.float16, device=device)
    if slots:
        found, escaped = escape(traits, source, constants, slots)
    clipped = None if c.stored else torch.zeros((), dtype=torch.int64, device=device)
    if programs:
        encode_kernel[(programs,)](
            pointers(arrays, constants, escaped, clipped), source, tokens, tiles, *source.stride()[:3],
            C=c, num_warps=warps(c), **EXACT,
        )  # fmt: skip
    arrays = {name: array.view(*lead, *array.shape[1:]) for name, array in (arrays | found).items()}
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
    source, c, tiles, programs = _launch(traits, x, turn)
    if clipped is None and not c.stored:
        clipped = torch.empty((), dtype=torch.int64, device=x.device)  # added to, and never read
    if programs:
        pages_kernel[(programs,)](
            pointers(arrays, constants, None, clipped), source, x.shape[2], tiles, *source.stride()[:3],
            table, starts, table.shape[1], PAGE=page, C=c, num_warps=warps(c), **EXACT,
        )  # fmt: skip


@on_its_device
def decode(traits: Traits, arrays: dict[str, Tensor], constants: Constants) -> Tensor:
    """See `choose`: DECODE."""
    lead, (heads, tokens, size) = arrays["codes"].shape[:-3], arrays["codes"].shape[-3:]
    count, dim = prod(lead), size * 8 // traits.bits
    flat = {name: array.contiguous() for name, array in arrays.items()}
    out = torch.empty(*lead, heads, tokens, dim, dtype=torch.float32, device=flat["codes"].device)
    c = coding(traits, dim, heads, tokens)
    c = c._replace(tile=max(1, TILE // (8 * triton.next_power_of_2(dim // 8))), part=triton.next_power_of_2(dim // 8))
    tiles = -(-tokens // c.tile)
    if programs := tiles * heads * count:
        decode_kernel[(programs,)](
            pointers(flat, constants, None, None), out, tokens, tiles, C=c, num_warps=warps(c), **EXACT
        )
        if traits.outliers:
            restore(flat, out)
    return out


@triton.jit
def rotate_kernel(x, out, rows, C: tl.constexpr):
    """A program per tile of rows (N, D), in fp32."""
    row = (tl.program_id(0) * C.tile + tl.arange(0, C.tile)).to(tl.int64)
    d = tl.arange(0, 8 * C.part)
    at, mask = row[:, None] * C.dim + d[None, :], (row < rows)[:, None] & (d < C.dim)[None, :]
    tl.store(out + at, butterflies(tl.load(x + at, mask=mask, other=0.0).to(tl.float32), C.hadamard), mask=mask)


@on_its_device
def rotate(x: Tensor, block: int) -> Tensor:
    """`grid.rotate`; x may be of any float type."""
    x, dim = x.contiguous(), x.shape[-1]
    out, rows = torch.empty_like(x, dtype=torch.float32), x.numel() // dim
    c = coding(Traits("uniform", 8, "channels", 0, False, "minmax"), dim, 1, rows)._replace(hadamard=block)
    if rows:
        rotate_kernel[(-(-rows // c.tile),)](x, out, rows, C=c, num_warps=warps(c), **EXACT)
    return out


def compile_encoder(arch: int, c: Coding, dtype: str = "fp16"):
    """The encoder for `sm_arch`, without a GPU. dtype: of the values, in Triton's words."""
    types, strides = {"P": kinds(True), "source": f"*{dtype}"}, ("row_stride", "stride", "token_stride")
    return compiled(encode_kernel, arch, types, {"C": c}, warps(c), strides)
