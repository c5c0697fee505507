"""One stored side (keys or values) as Triton kernels are told of it, and its one decoder (dequantize): tokens of pages
to numbers.

A kernel takes a side as one tuple, `Side`: pointers, with the constants of its compilation as one of them. Triton
compiles for what lies in a tuple, too: None is no argument, and an integer of another divisibility is another kernel.
So numbers that change as a context grows stay outside, among the arguments that are not specialised on.
"""

from dataclasses import dataclass
from functools import cache
from typing import NamedTuple

import numpy as np
import torch
import triton
import triton.language as tl
from torch import Tensor

from kvist.kernels.contract import PLANES, Constants, Exact, Traits
from kvist.kernels.triton.unpack import PLAIN

TILE = 4096  # values that a program codes at a time
LANES = 32  # tokens: a tile that is multiplied as it lies, by one warp


@dataclass(frozen=True, eq=False)
class Form:
    """What is known of a side when a kernel is compiled for it.

    low, high: bits of its planes (see `contract.PLANES`), 0 where nothing is coded; dim: channels of a head, padded: up
    to a power of two; group: neighbours that share a range, groups: such ranges along a head; along_tokens: these
    neighbours are tokens of one channel; across: one range spans all heads; stored: ranges lie beside the codes, and
    are not fixed; symmetric: no offsets (zero points) are stored, they are `shift` scales; steps: what the difference
    of extremes is divided by; levels: points of a table (codebook), 0 for uniform ones; slots: outliers of a token;
    pairs: channels whose rotary embedding was undone, two by two, neighbours if `interleaved`; scaling: of this
    embedding; pair_tile, rest_tile: they and all others, as many as are multiplied at a time; hadamard: size of the
    blocks that a head is rotated by, 0: none; folded: codes are multiplied as they lie, `block` bytes of a token at a
    time.

    Of coding alone: tile: tokens per program, up to a power of two, and step: from one tile to the next; part: channels
    of each run of D/8 that a program handles, up to a power of two, pieces: programs that share them; even: one does
    all, with no room left over.
    """

    low: int
    high: int
    dim: int
    padded: int
    heads: int
    group: int
    groups: int
    along_tokens: bool
    across: bool
    stored: bool
    symmetric: bool
    shift: float
    steps: float
    levels: int
    slots: int
    pairs: int
    pair_tile: int
    rest_tile: int
    interleaved: bool
    scaling: float
    hadamard: int
    block: int
    folded: bool
    tile: int = 0
    step: int = 0
    part: int = 0
    pieces: int = 0
    even: bool = False


# Launches look kernels up by their forms: equal ones are one object, and compared as such, which is quick.
_made = cache(Form)


class Side(NamedTuple):
    """A side as a kernel takes it. None where there is nothing of a kind.

    form: a `Form`; page: tokens of a page, or of a row of arrays that are no pages; words: `codes` as wider integers;
    escaped: which values outlier slots took, uint8; clipped: counts entries beyond fixed ranges; table: of pages (block
    table). The others as in `contract`.
    """

    form: object
    page: object
    codes: Tensor
    words: Tensor | None
    scale: Tensor | None
    offset: Tensor | None
    outlier: Tensor | None
    channel: Tensor | None
    ends: Tensor | None
    constants: Constants
    escaped: Tensor | None = None
    clipped: Tensor | None = None
    table: Tensor | None = None
    exact: Exact | None = None


@cache
def form_of(
    traits: Traits, dim: int, heads: int, slots: int = 0, pairs: int = 0, scaling: float = 1.0, values: bool = False
) -> Form:
    """A side as kernels are compiled for it. slots: of outliers per token; pairs: rotated ones of channels, and the
    scaling of their rotation; values: they are weighed, and not met by queries."""
    raw, table, stored = traits.levels == "raw", traits.levels == "table", traits.range != "fixed"
    low, high = (0, 0) if raw else (*PLANES[traits.bits], 0)[:2]
    along = traits.along == "tokens" and not raw
    padded, size, group = triton.next_power_of_2(dim), dim * low // 8, traits.group or dim
    block = min(group, size) if stored and not along else size
    pairs = pairs if traits.rotary else 0
    steps = 2.0 if table else float(2**traits.bits - 1)
    aligned = not along or group % LANES == 0  # a tile lies within one group of tokens
    whole = aligned and (along or not stored or group % max(1, block) == 0)
    even = padded == dim and low and not high and block >= 32 and size % block == 0
    plain = traits.levels == "uniform" and not traits.outliers and not traits.rotary
    return _made(
        low=low, high=high, dim=dim, padded=padded, heads=heads, group=group, groups=-(-dim // group),
        along_tokens=along, across=traits.across_heads and stored and not raw, stored=stored,
        symmetric=traits.range == "absmax", shift=0.0 if table or raw else _shift(steps), steps=steps,
        levels=2**traits.bits if table else 0, slots=slots if traits.outliers else 0, pairs=pairs,
        pair_tile=max(16, triton.next_power_of_2(max(1, pairs))),
        rest_tile=max(16, triton.next_power_of_2(max(1, dim - 2 * pairs))),
        interleaved=traits.rotary == "interleaved", scaling=scaling, hadamard=dim & -dim if traits.hadamard else 0,
        block=block, folded=bool(even and whole and plain and not (values and (along or not stored))),
    )  # fmt: skip


def _shift(steps: float) -> float:
    """The offset of symmetric levels in scales, as `Codec` forms it from a range of -1 to 1."""
    return (np.float32(-1.0) / (np.float32(2.0) / np.float32(steps))).item()


@cache
def coding(
    traits: Traits, dim: int, heads: int, tokens: int, slots: int = 0, turn: bool = False, whole: bool = False
) -> Form:
    """A side as kernels that code are compiled for it. tokens: the most at a time; turn: rotate them first; whole: a
    program decodes all channels of a token, of any group."""
    form, eighth = form_of(traits, dim, heads, slots), dim // 8
    part, hadamard = triton.next_power_of_2(eighth), form.hadamard if turn else 0
    if form.along_tokens and not whole:
        step = form.group
        tile = triton.next_power_of_2(step)
        while not hadamard and part > 16 and tile * part * 8 > 4 * TILE:
            part //= 2
    else:
        tile = step = max(1, min(TILE // (8 * part), triton.next_power_of_2(max(1, tokens))))
    how = {"tile": tile, "step": step, "part": part, "pieces": -(-eighth // part), "even": 8 * part == dim}
    return _made(**vars(form) | {"hadamard": hadamard} | how)


@cache
def constant(x: object) -> object:
    """What a kernel knows of a tuple when it is compiled. Triton's interpreter looks into no `constexpr`, but leaves
    objects as they are."""
    return x if PLAIN else tl.constexpr(x)


def side(form: Form, arrays: dict[str, Tensor], constants: Constants, page: object, word=torch.int16, **more) -> Side:
    """What a kernel is given of a side. word: the integers that it takes several bytes of codes as."""
    codes = arrays["codes"] if "codes" in arrays else arrays["values"]
    wide = codes.dtype == torch.uint8 and codes.shape[-1] % word.itemsize == 0
    stored = (arrays.get(name) for name in ("scale", "offset", "outlier", "channel", "ends"))
    return Side(constant(form), page, codes, codes.view(word) if wide else None, *stored, constants, **more)


class Tokens(NamedTuple):
    """Tokens (T,) of one head within a kernel: their pages, int64, or one for all; their slots; which there are."""

    page: object
    slot: object
    ok: object
    head: object


@triton.jit
def tokens_at(S, row, width, slot, ok, head):
    """Tokens by their slots in a row of pages, through its page table (block table) of so many columns."""
    page = tl.load(S.table + row * width + slot // S.page, mask=ok, other=0).to(tl.int64)
    return Tokens(page, slot % S.page, ok, head)


@triton.jit
def entry_of(S, at):
    """The number of each token of a head among all that are stored."""
    return (at.page * S.form.heads + at.head) * S.page + at.slot


@triton.jit
def ranges_of(S, at):
    """Where the stored ranges of each token begin."""
    F: tl.constexpr = S.form
    if F.along_tokens:
        return ((at.page * F.heads + at.head) * (S.page // F.group) + at.slot // F.group) * F.dim
    elif F.across:
        return at.page * S.page + at.slot
    else:
        return entry_of(S, at) * F.groups


@triton.jit
def offset_of(S, where, mask, scale):
    """The offsets (zero points) that belong to some scales."""
    return scale * S.form.shift if S.form.symmetric else tl.load(S.offset + where, mask=mask, other=0.0).to(tl.float32)


@triton.jit
def fixed_range(S, head, d):
    """Scale and offset (1, N) of channels d (N,) where they are the same for all tokens."""
    where, inside = (head * S.form.dim + d)[None, :], (d < S.form.dim)[None, :]
    scale = tl.load(S.constants.scale + where, mask=inside, other=0.0)
    return scale, tl.load(S.constants.offset + where, mask=inside, other=0.0)


@triton.jit
def _code(S, at, d, seen):
    """Codes (T, N), int32, put together from their planes."""
    F: tl.constexpr = S.form
    wide: tl.constexpr = F.dim * F.low // 8
    thin: tl.constexpr = F.dim * F.high // 8
    start = S.codes + entry_of(S, at)[:, None] * (wide + thin)
    byte = tl.load(start + (d % wide)[None, :], mask=seen, other=0).to(tl.int32)
    code = (byte >> (d // wide * F.low)[None, :]) & ((1 << F.low) - 1)
    if F.high > 0:
        byte = tl.load(start + wide + (d % thin)[None, :], mask=seen, other=0).to(tl.int32)
        code = code | (((byte >> (d // thin * F.high)[None, :]) & ((1 << F.high) - 1)) << F.low)
    return code


@triton.jit
def _with_outliers(S, at, d, x):
    """The outliers of one head over values (T, N): those of token t lie in slots [ends[t, head - 1], ends[t, head])."""
    F: tl.constexpr = S.form
    line = at.page * S.page + at.slot
    ends = S.ends + line * F.heads + at.head
    first = tl.load(ends - 1, mask=at.ok & (at.head + line * 0 > 0), other=0).to(tl.int32)
    last = tl.minimum(tl.load(ends, mask=at.ok, other=0).to(tl.int32), F.slots)
    for i in range(0, tl.max(last - first)):
        take = at.ok & (first + i < last)
        slot = line * F.slots + first + i
        channel = tl.load(S.channel + slot, mask=take, other=0).to(tl.int32)
        outlier = tl.load(S.outlier + slot, mask=take, other=0.0).to(tl.float32)
        x = tl.where(take[:, None] & (channel[:, None] == d[None, :]), outlier[:, None], x)
    return x


@triton.jit
def decoded(S, at, d):
    """Tokens at channels d (N,), fp32 (T, N), in the space that they are stored in; 0 where there are none."""
    F: tl.constexpr = S.form
    seen = at.ok[:, None] & (d < F.dim)[None, :]
    if F.low == 0:
        return tl.load(S.codes + entry_of(S, at)[:, None] * F.dim + d[None, :], mask=seen, other=0.0).to(tl.float32)
    else:
        code = _code(S, at, d, seen)
        x = tl.load(S.constants.points + code, mask=seen, other=0.0) if F.levels > 0 else code.to(tl.float32)
        if F.stored:
            column = d if F.along_tokens else d * 0 if F.across else d // F.group
            where = ranges_of(S, at)[:, None] + column[None, :]
            scale = tl.load(S.scale + where, mask=seen, other=0.0).to(tl.float32)
            offset = offset_of(S, where, seen, scale)
        else:
            scale, offset = fixed_range(S, at.head, d)
        x = x * scale + offset
        if F.slots > 0:
            x = _with_outliers(S, at, d, x)
        return tl.where(seen, x, 0.0)
