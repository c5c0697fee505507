"""Whole tiles of codes multiplied as they lie, and the matrices and angles by which channels are turned.

Tiles serve uniform levels: codes become operands of a matrix product by a mask alone (`unpack.halves`), and ranges are
folded into what they are multiplied with. There channels come in slices: byte block j, field f, byte parity e of 16-bit
lane l is channel f·W + j·C + 2·l + e, with W bytes per token and C bytes per block. All others: `side.decoded`.
"""

import triton
import triton.language as tl

from kvist.kernels.triton.side import entry_of, offset_of, ranges_of
from kvist.kernels.triton.unpack import halves

TURN = tl.constexpr(0.15915494309189535)  # 1 / 2π


@triton.jit
def channel_of(pair, NUMBER: tl.constexpr, F: tl.constexpr):
    """The first (NUMBER 0) or second channel of each rotated pair; beyond the pairs one that is none."""
    return tl.where(pair < F.pairs, 2 * pair + NUMBER if F.interleaved else pair + NUMBER * F.pairs, F.dim)


@triton.jit
def angles(frequencies, position, pair, F: tl.constexpr):
    """cos and sin of position·frequency, times the scaling of the rotary embedding; shapes broadcast. Whole turns are
    taken off in fp64: in fp32 the product is off by 0.06 radians at position 2^20."""
    frequency = tl.load(frequencies + pair, mask=pair < F.pairs, other=0.0).to(tl.float64)
    turns = position.to(tl.float64) * frequency * TURN
    angle = (turns - tl.floor(turns)).to(tl.float32) * 6.283185307179586
    return tl.cos(angle) * F.scaling, tl.sin(angle) * F.scaling


@triton.jit
def hadamard(i, j, BLOCK: tl.constexpr):
    """Entries (i, j) of the orthonormal block Hadamard matrix, fp32; shapes broadcast."""
    common = i & j & (BLOCK - 1)
    common = common ^ (common >> 4)
    common = common ^ (common >> 2)
    odd = (common ^ (common >> 1)) & 1
    entry = (1 - 2 * odd).to(tl.float32) * (BLOCK**-0.5)
    return tl.where(i // BLOCK == j // BLOCK, entry, 0.0)


@triton.jit
def _unit(peak):
    """The power of two r with 1 <= peak·r < 2, as fp32; peak at least 2^-24, so that r is finite."""
    exponent = tl.maximum(peak, 5.9604644775390625e-08).to(tl.int32, bitcast=True) & 0x7F800000
    return (0x7F000000 - exponent).to(tl.float32, bitcast=True)


@triton.jit
def slice_channels(j: tl.constexpr, i: tl.constexpr, F: tl.constexpr):
    """The channels of number i of `halves` in block j, (C / 2,)."""
    fields: tl.constexpr = 8 // F.low
    first: tl.constexpr = (i % fields) * (F.dim * F.low // 8) + j * F.block + i // fields
    return first + 2 * tl.arange(0, F.block // 2)


@triton.constexpr_function
def slice_group(j, i, F):
    """The group of neighbouring channels in which they lie."""
    return ((i % (8 // F.low)) * (F.dim * F.low // 8) + j * F.block) // F.group


@triton.jit
def _halves_of(S, at, j):
    """Block j of the codes of tokens as fp16 numbers, 16 / bits times (T, C / 2): see `halves`."""
    F: tl.constexpr = S.form
    column = j * (F.block // 2) + tl.arange(0, F.block // 2)
    size: tl.constexpr = F.dim * F.low // 16
    lanes = tl.load(S.words + entry_of(S, at)[:, None] * size + column[None, :], mask=at.ok[:, None], other=0)
    return halves(lanes, F.low)


@triton.jit
def folded_scores(S, q, at):
    """q·k, fp32 (T, M), of a tile of tokens that lies within one page and one group; q: per slice (C / 2, M), fp32, at
    most 1 in size."""
    F: tl.constexpr = S.form
    count: tl.constexpr = 16 // F.low
    blocks: tl.constexpr = F.dim * F.low // 8 // F.block
    total = tl.full([at.slot.shape[0], q[0].shape[1]], 0.0, tl.float32)
    if F.along_tokens or not F.stored:  # a range per channel, the same for all: it goes into the queries
        base = at.head * F.dim
        if F.stored:
            group = tl.max(at.slot // F.group)
            base = ((at.page * F.heads + at.head) * (S.page // F.group) + group) * F.dim
        scales = S.scale if F.stored else S.constants.scale
        offsets = S.offset if F.stored else S.constants.offset
        r = _unit(tl.max(tl.load(scales + base + tl.arange(0, F.dim)).to(tl.float32)))
        constant = tl.full([q[0].shape[1]], 0.0, tl.float32)
        for j in tl.static_range(blocks):
            codes = _halves_of(S, at, j)
            for i in tl.static_range(count):
                d = slice_channels(j, i, F)
                power = 2.0 ** (12 - F.low * (i % (8 // F.low)))
                scale = tl.load(scales + base + d).to(tl.float32)
                offset = scale * F.shift if F.symmetric else tl.load(offsets + base + d).to(tl.float32)
                part = q[j * count + i]
                total = tl.dot(codes[i], (part * (scale * (r * power))[:, None]).to(tl.float16), total)
                constant += part * offset[:, None]
        total = total * (4096.0 / r) + tl.sum(constant, 0)[None, :]
    else:
        for j in tl.static_range(blocks):
            codes = _halves_of(S, at, j)
            for i in tl.static_range(count):
                where = ranges_of(S, at) + slice_group(j, i, F)
                scale = tl.load(S.scale + where, mask=at.ok, other=0.0).to(tl.float32)
                offset = offset_of(S, where, at.ok, scale)
                part = q[j * count + i]
                power = 2.0 ** (12 - F.low * (i % (8 // F.low)))
                raw = tl.dot(codes[i], (part * power).to(tl.float16)) * 4096.0
                total += raw * scale[:, None] + offset[:, None] * tl.sum(part, 0)[None, :]
    return total


@triton.jit
def value_unit(S, at):
    """The power of two by which the scales of a tile of values are brought below 2."""
    groups: tl.constexpr = S.form.groups
    peak = 0.0
    for g in tl.static_range(groups):
        scale = tl.load(S.scale + ranges_of(S, at) + g, mask=at.ok, other=0.0)
        peak = tl.maximum(peak, tl.max(scale.to(tl.float32)))
    return _unit(peak)


@triton.jit
def weigh_folded(S, weights, r, acc, constant, at):
    """The sums acc, per slice (C / 2, M) in units of 2^24 / r, and `constant`, per group (T, M) and not yet added up
    over T, with weights (T, M) times a tile of values added."""
    F: tl.constexpr = S.form
    count: tl.constexpr = 16 // F.low
    groups: tl.constexpr = F.groups
    scaled, shifted, summed = (), (), ()
    for g in tl.static_range(groups):
        where = ranges_of(S, at) + g
        scale = tl.load(S.scale + where, mask=at.ok, other=0.0).to(tl.float32)
        scaled = scaled + ((weights * (scale * r)[:, None]).to(tl.float16),)
        shifted = shifted + (constant[g] + weights * offset_of(S, where, at.ok, scale)[:, None],)
    for j in tl.static_range(F.dim * F.low // 8 // F.block):
        codes = _halves_of(S, at, j)
        for i in tl.static_range(count):
            weighted = scaled[slice_group(j, i, F)]
            summed = summed + (tl.dot(tl.trans(codes[i]), weighted, acc[j * count + i]),)
    return summed, shifted
