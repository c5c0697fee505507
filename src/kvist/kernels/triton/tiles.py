"""What a Triton kernel reads of one side: tokens decoded one by one, or whole tiles of codes multiplied as they lie.

`decoded` serves every recipe. `halves` tiles serve uniform levels: codes become operands of a matrix product by a mask
alone, and ranges are folded into what they are multiplied with. There channels come in slices: byte block j, field f,
byte parity e of 16-bit lane l is channel f·W + j·C + 2·l + e, with W bytes per token and C bytes per block.
"""

from typing import NamedTuple

import triton
import triton.language as tl

from kvist.kernels.triton.unpack import halves

TURN = tl.constexpr(0.15915494309189535)  # 1 / 2π


class Form(NamedTuple):
    """What is known of one side when a kernel is compiled.

    low, high: bits of its planes, 0 where nothing is coded; padded: `dim` up to a power of two; shift: the offset in
    scales where none is stored; pairs: rotated pairs of channels, all others stay; scaling: of the rotary embedding;
    hadamard: size of the blocks that a head is rotated by, 0: none; block: bytes of a block of channels; folded:
    multiplied as it lies.
    """

    low: int
    high: int
    dim: int
    padded: int
    heads: int
    page: int
    group: int
    along_tokens: bool
    across: bool
    stored: bool
    offset: bool
    shift: float
    table: bool
    slots: int
    pairs: int
    scaling: float
    interleaved: bool
    hadamard: int
    block: int
    folded: bool


class Arrays(NamedTuple):
    """Pointers of one side; `lanes` is `codes` as 16-bit numbers. Those that a form has no use for point anywhere."""

    codes: object
    lanes: object
    scale: object
    offset: object
    points: object
    fixed_scale: object
    fixed_offset: object
    outlier: object
    channel: object
    ends: object
    frequencies: object
    table: object


@triton.jit
def offset_of(P, where, mask, scale, F: tl.constexpr):
    """The offsets that belong to some scales."""
    return tl.load(P.offset + where, mask=mask, other=0.0).to(tl.float32) if F.offset else scale * F.shift


@triton.jit
def first_of(pair, F: tl.constexpr):
    """The first channel of each rotated pair; beyond the pairs a channel that is none."""
    return tl.where(pair < F.pairs, 2 * pair if F.interleaved else pair, F.dim)


@triton.jit
def second_of(pair, F: tl.constexpr):
    """The second one."""
    return tl.where(pair < F.pairs, 2 * pair + 1 if F.interleaved else pair + F.pairs, F.dim)


@triton.jit
def decoded(P, page, slot, ok, head, d, F: tl.constexpr):
    """Tokens (T,), by int64 page and slot, at channels d (N,), fp32 (T, N), in the space they are stored in; 0 where a
    token is not `ok`."""
    seen = ok[:, None] & (d < F.dim)[None, :]
    row = (page * F.heads + head) * F.page + slot
    if F.low == 0:
        x = tl.load(P.codes + row[:, None] * F.dim + d[None, :], mask=seen, other=0.0).to(tl.float32)
    else:
        x = _coded(P, page, slot, ok, row, head, d, seen, F)
    return x


@triton.jit
def _coded(P, page, slot, ok, row, head, d, seen, F: tl.constexpr):
    size: tl.constexpr = F.dim * (F.low + F.high) // 8
    wide: tl.constexpr = F.dim * F.low // 8
    at = row[:, None] * size
    byte = tl.load(P.codes + at + (d % wide)[None, :], mask=seen, other=0).to(tl.int32)
    code = (byte >> (d // wide * F.low)[None, :]) & ((1 << F.low) - 1)
    if F.high > 0:
        thin: tl.constexpr = F.dim * F.high // 8
        byte = tl.load(P.codes + at + wide + (d % thin)[None, :], mask=seen, other=0).to(tl.int32)
        code = code | (((byte >> (d // thin * F.high)[None, :]) & ((1 << F.high) - 1)) << F.low)
    x = tl.load(P.points + code, mask=seen, other=0.0) if F.table else code.to(tl.float32)
    if F.stored:
        if F.along_tokens:
            groups: tl.constexpr = F.page // F.group
            where = ((page * F.heads + head) * groups + slot // F.group)[:, None] * F.dim + d[None, :]
        elif F.across:
            where = (page * F.page + slot)[:, None] + d[None, :] * 0
        else:
            where = row[:, None] * ((F.dim + F.group - 1) // F.group) + (d // F.group)[None, :]
        scale = tl.load(P.scale + where, mask=seen, other=0.0).to(tl.float32)
        offset = offset_of(P, where, seen, scale, F)
    else:
        where = (head * F.dim + d)[None, :]
        scale = tl.load(P.fixed_scale + where, mask=(d < F.dim)[None, :], other=0.0)
        offset = tl.load(P.fixed_offset + where, mask=(d < F.dim)[None, :], other=0.0)
    x = x * scale + offset
    if F.slots > 0:
        x = _with_outliers(P, page * F.page + slot, ok, head, d, x, F)
    return tl.where(seen, x, 0.0)


@triton.jit
def _with_outliers(P, line, ok, head, d, x, F: tl.constexpr):
    """The outliers of one head over values (T, N): those of token t lie in slots [ends[t, head - 1], ends[t, head])."""
    first = tl.load(P.ends + line * F.heads + head - 1, mask=ok & (head + line * 0 > 0), other=0).to(tl.int32)
    last = tl.load(P.ends + line * F.heads + head, mask=ok, other=0).to(tl.int32)
    last = tl.minimum(last, F.slots)
    for i in range(0, tl.max(last - first)):
        take = ok & (first + i < last)
        at = line * F.slots + first + i
        channel = tl.load(P.channel + at, mask=take, other=0).to(tl.int32)
        outlier = tl.load(P.outlier + at, mask=take, other=0.0).to(tl.float32)
        x = tl.where(take[:, None] & (channel[:, None] == d[None, :]), outlier[:, None], x)
    return x


@triton.jit
def angles(P, position, pair, F: tl.constexpr):
    """cos and sin of position·frequency, times the scaling of the rotary embedding; shapes broadcast. Whole turns are
    taken off in fp64: in fp32 the product is off by 0.06 radians at position 2^20."""
    frequency = tl.load(P.frequencies + pair, mask=pair < F.pairs, other=0.0).to(tl.float64)
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
def unit(peak):
    """The power of two r with 1 <= peak·r < 2, as fp32; peak at least 2^-24, so that r is finite."""
    exponent = tl.maximum(peak, 5.9604644775390625e-08).to(tl.int32, bitcast=True) & 0x7F800000
    return (0x7F000000 - exponent).to(tl.float32, bitcast=True)


@triton.jit
def slice_channels(j: tl.constexpr, i: tl.constexpr, F: tl.constexpr):
    """The channels of number i of `halves` in block j, (C / 2,)."""
    fields: tl.constexpr = 8 // F.low
    first: tl.constexpr = (i % fields) * (F.dim * F.low // 8) + j * F.block + i // fields
    return first + 2 * tl.arange(0, F.block // 2)


@triton.jit
def lanes_of(P, row, ok, j, F: tl.constexpr):
    """Block j of the codes of tokens (T,), rows of the pool, as int16 (T, C / 2)."""
    column = j * (F.block // 2) + tl.arange(0, F.block // 2)
    size: tl.constexpr = F.dim * F.low // 16
    return tl.load(P.lanes + row[:, None] * size + column[None, :], mask=ok[:, None], other=0)


@triton.jit
def folded_scores(P, q, page, slot, ok, head, F: tl.constexpr):
    """q·k, fp32 (T, M), of a tile of tokens that lies within one page and one group; q: per slice (C / 2, M), fp32, at
    most 1 in size."""
    row = (page * F.heads + head) * F.page + slot
    fields: tl.constexpr = 8 // F.low
    count: tl.constexpr = 2 * fields
    blocks: tl.constexpr = F.dim * F.low // 8 // F.block
    total = tl.zeros([slot.shape[0], q[0].shape[1]], tl.float32)
    if F.along_tokens or not F.stored:
        groups: tl.constexpr = F.page // F.group
        first = tl.max(slot // F.group)
        base = ((page * F.heads + head) * groups + first) * F.dim if F.stored else head * F.dim
        scales = P.scale if F.stored else P.fixed_scale
        offsets = P.offset if F.stored else P.fixed_offset
        r = unit(tl.max(tl.load(scales + base + tl.arange(0, F.dim)).to(tl.float32)))
        constant = tl.zeros([q[0].shape[1]], tl.float32)
        for j in tl.static_range(blocks):
            codes = halves(lanes_of(P, row, ok, j, F), F.low)
            for i in tl.static_range(count):
                d = slice_channels(j, i, F)
                power = 2.0 ** (12 - F.low * (i % fields))
                scale = tl.load(scales + base + d).to(tl.float32)
                offset = tl.load(offsets + base + d).to(tl.float32) if F.offset else scale * F.shift
                part = q[j * count + i]
                total = tl.dot(codes[i], (part * (scale * (r * power))[:, None]).to(tl.float16), total)
                constant += part * offset[:, None]
        total = total * (4096.0 / r) + tl.sum(constant, 0)[None, :]
    else:
        for j in tl.static_range(blocks):
            codes = halves(lanes_of(P, row, ok, j, F), F.low)
            for i in tl.static_range(count):
                where = row if not F.across else page * F.page + slot
                where = where * ((F.dim + F.group - 1) // F.group)
                where += ((i % fields) * (F.dim * F.low // 8) + j * F.block) // F.group
                scale = tl.load(P.scale + where, mask=ok, other=0.0).to(tl.float32)
                offset = offset_of(P, where, ok, scale, F)
                part = q[j * count + i]
                power = 2.0 ** (12 - F.low * (i % fields))
                raw = tl.dot(codes[i], (part * power).to(tl.float16)) * 4096.0
                total += raw * scale[:, None] + offset[:, None] * tl.sum(part, 0)[None, :]
    return total


@triton.jit
def value_unit(P, page, slot, ok, head, F: tl.constexpr):
    """The power of two by which the scales of a tile of values are brought below 2."""
    row = (page * F.heads + head) * F.page + slot if not F.across else page * F.page + slot
    groups: tl.constexpr = (F.dim + F.group - 1) // F.group
    peak = 0.0
    for g in tl.static_range(groups):
        peak = tl.maximum(peak, tl.max(tl.load(P.scale + row * groups + g, mask=ok, other=0.0).to(tl.float32)))
    return unit(peak)


@triton.jit
def weigh_folded(P, weights, r, acc, constant, page, slot, ok, head, F: tl.constexpr):
    """The sums acc, per slice (C / 2, M) in units of 2^24 / r, and `constant`, per group (T, M) and not yet added up
    over T, with weights (T, M) times a tile of values added."""
    row = (page * F.heads + head) * F.page + slot
    fields: tl.constexpr = 8 // F.low
    count: tl.constexpr = 2 * fields
    groups: tl.constexpr = (F.dim + F.group - 1) // F.group
    where = row * groups if not F.across else (page * F.page + slot) * groups
    scaled = ()
    shifted = ()
    for g in tl.static_range(groups):
        scale = tl.load(P.scale + where + g, mask=ok, other=0.0).to(tl.float32)
        offset = offset_of(P, where + g, ok, scale, F)
        scaled = scaled + ((weights * (scale * r)[:, None]).to(tl.float16),)
        shifted = shifted + (constant[g] + weights * offset[:, None],)
    summed = ()
    for j in tl.static_range(F.dim * F.low // 8 // F.block):
        codes = halves(lanes_of(P, row, ok, j, F), F.low)
        for i in tl.static_range(count):
            weighted = scaled[((i % fields) * (F.dim * F.low // 8) + j * F.block) // F.group]
            summed = summed + (tl.dot(tl.trans(codes[i]), weighted, acc[j * count + i]),)
    return summed, shifted
