"""Coding (quantize) and decoding (dequantize) on a CPU: to the bit what the reference in `coding` gives.

Encoding takes up to three passes over a tile: outliers are found; the extremes of each group are measured, and
narrowed to fp16; entries are divided, rounded and packed. Decoding takes one. The Hadamard rotation is here
too. See `numba.coding` for what a range is.
"""

from math import prod

import numpy as np
import torch
from numba import njit
from torch import Tensor

from kvist.kernels.contract import PLANES, Constants, Traits, packed_bytes
from kvist.kernels.numba.codes import EXACT, affine, look_up, unpack
from kvist.kernels.numba.coding import butterflies, extremes_along_channels, extremes_along_tokens, to_codes, to_ranges
from kvist.kernels.numba.sparse import clipped, find, overwrite


def rotate(x: Tensor, block: int) -> Tensor:
    """`grid.rotate`."""
    y = x.clone(memory_format=torch.contiguous_format)
    butterflies(y.view(-1, x.shape[-1]).numpy(), block, np.float32(block**-0.5))
    return y


Range = tuple[np.ndarray, np.ndarray]
NOTHING, NO_RANGE = np.empty(0, np.float32), np.empty((0, 0), np.float32)


def _sharing(traits: Traits, tokens: int, dim: int) -> tuple[int, bool]:
    """How many neighbours share a range, and whether along tokens: see the module."""
    if traits.range == "fixed":
        return max(1, tokens), True
    return traits.group or dim, traits.along == "tokens"


def _measure(traits: Traits, x: np.ndarray, entries: np.ndarray) -> tuple[dict[str, Tensor], Range]:
    """Scale and offset of values (N, H, T, D) as they are stored, and as entries are divided with."""
    count, heads, tokens, dim = x.shape
    along_tokens, group = traits.along == "tokens", traits.group or dim
    groups = (tokens // group, dim) if along_tokens else (tokens, -(-dim // group))
    shape = (count, 1 if traits.across_heads else heads, *groups)
    low, high = np.full(shape, np.inf, np.float32), np.full(shape, -np.inf, np.float32)
    (extremes_along_tokens if along_tokens else extremes_along_channels)(x, entries, group, low, high)
    centred = traits.levels == "table"
    steps, bits = np.float32(2 if centred else 2**traits.bits - 1), np.empty((2, *shape), np.uint16)
    to_ranges(low.ravel(), high.ravel(), centred, steps, bits[0].ravel(), bits[1].ravel())
    stored = torch.from_numpy(bits.view(np.float16))
    stored = stored.squeeze(2) if traits.across_heads else stored
    flat = (*shape[:2], groups[0] * groups[1])
    return {"scale": stored[0], "offset": stored[1]}, (high.reshape(flat), low.reshape(flat))


def _escape(traits: Traits, x: np.ndarray, fixed: Range, entries: np.ndarray) -> dict[str, Tensor]:
    """Outliers of values (N, H, T, D) as they are stored; their numbers to `entries` (N, T, slots)."""
    outlier, ends = np.empty(entries.shape, np.uint16), np.empty((*entries.shape[:2], x.shape[1]), np.uint8)
    channel = np.empty(entries.shape, np.uint8 if x.shape[3] <= 256 else np.int16)
    find(x, *fixed, traits.rank == "largest", entries, outlier, channel, ends)
    named = {"outlier": outlier.view(np.float16), "channel": channel, "ends": ends}
    return {name: torch.from_numpy(array) for name, array in named.items()}


def encode(traits: Traits, x: Tensor, constants: Constants, slots: int) -> dict[str, Tensor]:
    """See `choose`: ENCODE."""
    lead, (heads, tokens, dim) = x.shape[:-3], x.shape[-3:]
    count, top, fixed, found = prod(lead), 2**traits.bits - 1, (NO_RANGE, NO_RANGE), {}
    source = x.reshape(count, heads, tokens, dim).contiguous().numpy()
    entries, edges = np.empty((count, tokens, slots), np.int32), NOTHING
    if constants.scale is not None and constants.offset is not None:
        scale = constants.scale.numpy()
        fixed = np.where(scale > 0, scale, np.float32(1.0)), constants.offset.numpy()
    if constants.edges is not None:
        edges = constants.edges.numpy()
    if slots:
        found = _escape(traits, source, fixed, entries)
    if fixed[0].size:
        ranges = fixed[0][None], fixed[1][None]
    else:
        stored, ranges = _measure(traits, source, entries)
        found |= stored
    codes = torch.empty(count, heads, tokens, packed_bytes(dim, traits.bits), dtype=torch.uint8)
    planes, sharing = (*PLANES[traits.bits], 0), _sharing(traits, tokens, dim)
    to_codes(source, *ranges, *sharing, edges, np.float32(top), planes[0], planes[1], codes.numpy())
    arrays = {name: array.view(*lead, *array.shape[1:]) for name, array in {"codes": codes, **found}.items()}
    if fixed[0].size:
        ends = (np.float32(-1), np.float32(1)) if edges.size else (np.float32(0), np.float32(top))
        arrays["clipped"] = torch.tensor(clipped(source, *fixed, *ends, entries))
    return arrays


@njit(**EXACT)
def _decode(codes, scale, offset, group, along_tokens, points, low, high, out):
    """Packed codes (N, H, T, D·bits/8) and their range to values (N, H, T, D)."""
    for n in range(out.shape[0]):
        for h in range(out.shape[1]):
            a, b = min(n, scale.shape[0] - 1), min(h, scale.shape[1] - 1)
            x = out[n, h]
            unpack(codes[n, h], low, high, x)
            look_up(x.reshape(x.size), points)
            affine(x, scale[a, b], offset[a, b], group, along_tokens)


@njit(**EXACT)
def _restore(outlier, channel, ends, out):
    for n in range(out.shape[0]):
        for h in range(out.shape[1]):
            overwrite(out[n, h], h, outlier[n], channel[n], ends[n])


def decode(traits: Traits, arrays: dict[str, Tensor], constants: Constants) -> Tensor:
    """See `choose`: DECODE."""
    codes = arrays["codes"]
    lead, (heads, tokens, size) = codes.shape[:-3], codes.shape[-3:]
    count, dim = prod(lead), size * 8 // traits.bits
    out = torch.empty(count, heads, tokens, dim)
    if constants.scale is not None and constants.offset is not None:
        scale, offset = (x[None].numpy() for x in (constants.scale, constants.offset))
    else:
        stored = (arrays[name].float() for name in ("scale", "offset"))
        shape = count, 1 if traits.across_heads else heads
        scale, offset = (x.reshape(*shape, prod(x.shape[-2:])).contiguous().numpy() for x in stored)
    points = NOTHING if constants.points is None else constants.points.numpy()
    flat = codes.reshape(count, heads, tokens, size).contiguous().numpy()
    planes, sharing = (*PLANES[traits.bits], 0), _sharing(traits, tokens, dim)
    _decode(flat, scale, offset, *sharing, points, planes[0], planes[1], out.numpy())
    if traits.outliers:
        rows = (arrays[name] for name in ("outlier", "channel", "ends"))
        outlier, channel, ends = (a.reshape(count, *a.shape[-2:]).contiguous() for a in rows)
        _restore(outlier.numpy().view(np.uint16), channel.numpy(), ends.numpy(), out.numpy())
    return out.view(*lead, *out.shape[1:])
