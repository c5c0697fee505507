"""One side of a layer as the compiled loops take it: arrays as they lie, in tuples that are made once.

Tokens that are stored as they came (exact ones, and sides of raw levels) are seen as words of 16 bits, so that one
compiled version serves every type; `Kept.kind` and `Side.kind` say which it is. An array is empty where there is
nothing of its kind.
"""

from itertools import chain
from math import prod
from typing import NamedTuple

import numpy as np
import torch
from numba import carray, njit, types
from numba.core import cgutils
from numba.extending import intrinsic
from torch import Tensor

from kvist.kernels.contract import PLANES, Constants, Exact, Stored, Traits
from kvist.kernels.numba.codes import EXACT, half

FLOAT, HALF, BRAIN = 0, 1, 2  # fp32; fp16 and bf16 as their bits
KINDS = {torch.float32: FLOAT, torch.float16: HALF, torch.bfloat16: BRAIN}
WORDS = {FLOAT: 2, HALF: 1, BRAIN: 1}  # words per number
NOTHING, NO_FIXED, NO_HALVES = np.empty(0, np.float32), np.empty((0, 0), np.float32), np.empty((0, 1, 0), np.uint16)
NO_CODES, NO_WORDS = np.empty((0, 0, 0, 0), np.uint8), np.empty((0, 0, 0, 0), np.int16)
NO_OUTLIERS = np.empty((0, 0, 0), np.uint16), np.empty((0, 0, 0), np.uint8), np.empty((0, 0, 0), np.uint8)
INLINE = {**EXACT, "inline": "always"}
STYLES = {"": 0, "half": 1, "interleaved": 2}


class Side(NamedTuple):
    """What is needed to read packed tokens.

    scale and offset (pages, heads or 1, numbers) are fp16 as its bits; `fixed_` ones (H, D) are those of fixed ranges,
    which are shared along tokens by groups as long as the page. raw (pages, H, page, words): tokens of a side that is
    not coded. turn: block of the Hadamard rotation in whose space they lie, 0 for none.
    """

    codes: np.ndarray
    table: np.ndarray
    low: int
    high: int
    points: np.ndarray
    scale: np.ndarray
    offset: np.ndarray
    fixed_scale: np.ndarray
    fixed_offset: np.ndarray
    group: int
    along_tokens: bool
    outlier: np.ndarray
    channel: np.ndarray
    ends: np.ndarray
    raw: np.ndarray
    kind: int
    turn: int


class Coder(NamedTuple):
    """What is needed besides to pack. scale (H, D): of fixed ranges, 1 where a channel has none; centred: offsets are
    the middle of a range; rotary: see `STYLES`; clipped (1,) counts entries beyond what fp16 or a fixed range holds."""

    edges: np.ndarray
    scale: np.ndarray
    granule: int
    centred: bool
    steps: np.float32
    top: np.float32
    largest: bool
    rotary: int
    clipped: np.ndarray


class Kept(NamedTuple):
    """Exact tokens: sinks, ring, pinned (B, H, N, words); see `contract.Exact`."""

    sinks: np.ndarray
    ring: np.ndarray
    pinned: np.ndarray
    kind: int


def side(traits: Traits, stored: Stored, page: int) -> Side:
    """A side of a layer, for reading. Its arrays must stay where they are. ValueError for what it cannot say."""
    arrays, (_, points, scale, offset, _, _), table = stored.arrays, stored.constants, stored.table.numpy()
    if "codes" not in arrays:
        raw, kind = (words(arrays["values"]), KINDS[arrays["values"].dtype]) if arrays else (NO_WORDS, FLOAT)
        empty = NO_HALVES, NO_HALVES, NO_FIXED, NO_FIXED
        return Side(NO_CODES, table, 0, 0, NOTHING, *empty, 1, False, *NO_OUTLIERS, raw, kind, 0)
    codes, fixed, outliers = arrays["codes"].numpy(), (NO_FIXED, NO_FIXED), NO_OUTLIERS
    pages, heads, _, size = codes.shape
    dim = size * 8 // traits.bits
    sharing, stores = (traits.group or dim, traits.along == "tokens"), (NO_HALVES, NO_HALVES)
    if scale is not None and offset is not None:
        fixed, sharing = (scale.numpy(), offset.numpy()), (page, True)
    else:
        flat = pages, 1 if traits.across_heads else heads, prod(arrays["scale"].shape[-2:])
        stores = _halves(arrays["scale"]).reshape(flat), _halves(arrays["offset"]).reshape(flat)
    if traits.outliers:
        if arrays["channel"].dtype != torch.uint8:
            raise ValueError(f"outliers of heads of more than 256 are not read here; found heads of {dim}")
        outliers = _halves(arrays["outlier"]), arrays["channel"].numpy(), arrays["ends"].numpy()
    planes, levels = (*PLANES[traits.bits], 0), NOTHING if points is None else points.numpy()
    block = dim & -dim if traits.hadamard else 0
    return Side(
        codes, table, planes[0], planes[1], levels, *stores, *fixed, *sharing, *outliers, NO_WORDS, FLOAT, block
    )


def coder(traits: Traits, constants: Constants, clipped: Tensor) -> Coder:
    """The same side, for packing."""
    edges, scale = (NOTHING if x is None else x.numpy() for x in (constants.edges, constants.scale))
    fixed = NO_FIXED if constants.scale is None else np.where(scale > 0, scale, np.float32(1.0))
    granule = traits.group if traits.along == "tokens" and traits.levels != "raw" else 1
    centred, top = traits.levels == "table", np.float32(2 ** min(traits.bits, 8) - 1)
    steps = np.float32(2.0) if centred else top
    largest, style = traits.rank == "largest", STYLES[traits.rotary]
    return Coder(edges, fixed, granule, centred, steps, top, largest, style, clipped.view(1).numpy())


def kept(exact: Exact) -> Kept:
    """The exact tokens of a side."""
    return Kept(*map(words, exact), KINDS[exact.ring.dtype])


def words(x: Tensor) -> np.ndarray:
    """A tensor of any of the types as words of 16 bits, in place; the last dimension must be contiguous."""
    return x.detach().view(torch.int16).numpy()


def _halves(array: Tensor) -> np.ndarray:
    return array.numpy().view(np.uint16)


def flat(*parts: Side | Coder | Kept) -> np.ndarray:
    """Addresses, shapes and numbers of some parts, one after the other: handing over a hundred arrays one by one takes
    a compiled function longer than a step of a small layer. Whoever keeps it keeps the arrays."""
    numbers: list[int] = []
    for value in chain(*parts):
        numbers += [value.ctypes.data, *value.shape] if isinstance(value, np.ndarray) else [int(value)]
    return np.array(numbers, np.int64)


@intrinsic
def pointer(context, address):
    """A whole number as an address."""

    def generate(context, builder, signature, arguments):
        return builder.inttoptr(arguments[0], cgutils.voidptr_t)

    return types.voidptr(address), generate


@njit(**INLINE)
def side_of(f):
    """The `Side` at the start of `flat` numbers."""
    return Side(
        carray(pointer(f[0]), (f[1], f[2], f[3], f[4]), np.uint8), carray(pointer(f[5]), (f[6], f[7]), np.int32),
        f[8], f[9], carray(pointer(f[10]), (f[11],), np.float32),
        carray(pointer(f[12]), (f[13], f[14], f[15]), np.uint16),
        carray(pointer(f[16]), (f[17], f[18], f[19]), np.uint16),
        carray(pointer(f[20]), (f[21], f[22]), np.float32), carray(pointer(f[23]), (f[24], f[25]), np.float32),
        f[26], f[27] != 0, carray(pointer(f[28]), (f[29], f[30], f[31]), np.uint16),
        carray(pointer(f[32]), (f[33], f[34], f[35]), np.uint8),
        carray(pointer(f[36]), (f[37], f[38], f[39]), np.uint8),
        carray(pointer(f[40]), (f[41], f[42], f[43], f[44]), np.int16), f[45], f[46],
    )  # fmt: skip


@njit(**INLINE)
def kept_of(f):
    """The `Kept` at the start of `flat` numbers."""
    return Kept(
        carray(pointer(f[0]), (f[1], f[2], f[3], f[4]), np.int16),
        carray(pointer(f[5]), (f[6], f[7], f[8], f[9]), np.int16),
        carray(pointer(f[10]), (f[11], f[12], f[13], f[14]), np.int16), f[15],
    )  # fmt: skip


@njit(**INLINE)
def coder_of(f):
    """The `Coder` at the start of `flat` numbers."""
    return Coder(
        carray(pointer(f[0]), (f[1],), np.float32), carray(pointer(f[2]), (f[3], f[4]), np.float32), f[5],
        f[6] != 0, np.float32(f[7]), np.float32(f[8]), f[9] != 0, f[10], carray(pointer(f[11]), (f[12],), np.int64),
    )  # fmt: skip


SIDE, KEPT, CODER = 47, 16, 13  # numbers of each
EACH = SIDE + KEPT + CODER
HEADS = 7  # where a `Kept` says how many heads its ring has


@njit(**EXACT)
def load(source, kind, out):
    """One token, words (n,), to fp32 (D,)."""
    if kind == FLOAT:
        out[:] = source.view(np.float32)
        return
    bits = out.view(np.int32)
    if kind == BRAIN:
        for d in range(out.shape[0]):
            bits[d] = np.int32(source[d]) << np.int32(16)
        return
    infinite = False
    for d in range(out.shape[0]):
        infinite |= (source[d] & 0x7C00) == 0x7C00
        bits[d] = (np.int32(source[d]) & np.int32(0x7FFF)) << np.int32(13)
    for d in range(out.shape[0]):
        sign = np.float32(1.0) - np.float32((np.int32(source[d]) >> 15) & 1) * np.float32(2.0)
        out[d] *= np.float32(2.0**112) * sign
    if infinite:
        for d in range(out.shape[0]):
            if (source[d] & 0x7C00) == 0x7C00:
                out[d] = np.float32(np.nan) if source[d] & 0x3FF else np.float32(np.inf) * np.sign(out[d])


@njit(**EXACT)
def save(x, kind, out):
    """fp32 (D,) to words (n,), rounded to the nearest."""
    if kind == FLOAT:
        out.view(np.float32)[:] = x
        return
    bits = x.view(np.int32)
    for d in range(x.shape[0]):
        if x[d] != x[d]:
            out[d] = np.int16(0x7FC0) if kind == BRAIN else np.int16(0x7E00)
        elif kind == BRAIN:
            out[d] = np.int16((bits[d] + np.int32(0x7FFF) + ((bits[d] >> np.int32(16)) & np.int32(1))) >> np.int32(16))
        else:
            out[d] = np.int16(half(x[d]))
