"""The host's side of Triton decode attention: what a launch is given, and how it is shaped.

See `attend` for the kernel, and STEP in `choose` for what it takes.
"""

from typing import NamedTuple

import torch
import triton
from torch import Tensor

from kvist.kernels.contract import Decode, Exact, Stored, Traits
from kvist.kernels.guard import on_its_device
from kvist.kernels.triton.attend import Parts, decode_kernel
from kvist.kernels.triton.loose import LOOSE
from kvist.kernels.triton.scores import Call, Shape
from kvist.kernels.triton.side import LANES, Form, Side, constant, form_of, side

COLUMNS = 16  # query rows per program at most
WAVES = 8  # programs per multiprocessor that a launch aims for


class Configuration(NamedTuple):
    """How a launch is compiled. tile: tokens multiplied at a time. Of 64 and more, Triton 3.6 makes `wgmma`, and some
    of these it gets wrong."""

    tile: int
    warps: int
    stages: int


# One warp needs no barriers; decoding wants registers.
FOLDED, DENSE = Configuration(LANES, 1, 2), Configuration(32, 4, 2)


def configurations() -> list[Configuration]:
    """All that may be chosen: each must be right before it may be fast."""
    return [FOLDED, DENSE]


def _side(traits: Traits, stored: Stored, exact: Exact, page: int, values: bool = False) -> tuple[Side, Form]:
    """A side as it is attended to."""
    arrays, constants, (_, heads, _, dim) = stored.arrays, stored.constants, exact.ring.shape
    slots = arrays["channel"].shape[-1] if "channel" in arrays else 0
    pairs = 0 if constants.frequencies is None else len(constants.frequencies)
    form = form_of(traits, dim, heads, slots, pairs, float(constants.scaling), values)
    sinks, pinned = (x if x.numel() else None for x in (exact.sinks, exact.pinned))
    more = {"table": stored.table, "exact": Exact(sinks, exact.ring, pinned)}
    return side(form, arrays, constants, constant(page), **more), form


def splits_for(cells: int, pages: int, device: torch.device) -> int:
    """Programs that share a row's pages; the lengths are on the device and are not asked."""
    if device.type != "cuda":
        return max(1, min(3, pages))
    many = WAVES * torch.cuda.get_device_properties(device).multi_processor_count
    return max(1, min(pages, -(-many // cells)))


@on_its_device
def decode(
    key: Traits, value: Traits, q: Tensor, k: Stored, v: Stored, k_exact: Exact, v_exact: Exact, call: Decode,
    configuration: Configuration | None = None, splits: int = 0,
) -> Tensor:  # fmt: skip
    """See `choose`: STEP. splits: 0 lets the device's size decide."""
    batch, q_heads, queries, _ = q.shape
    sinks, capacity, pins = (x.shape[2] for x in k_exact)
    heads, value_dim = k_exact.ring.shape[1], v_exact.ring.shape[3]
    rows = q_heads // heads * queries
    m = min(COLUMNS, max(8, triton.next_power_of_2(rows)))
    blocks = -(-rows // m)
    most = 0 if call.pinned is None else call.pinned.shape[1]
    width = min(k.table.shape[1], v.table.shape[1])
    splits = splits or splits_for(batch * heads * blocks, max(1, width), q.device)
    parts = splits + -(-(sinks + capacity + most) // LOOSE.value)
    cells = batch * heads * blocks * parts * m
    scratch = torch.empty(cells * (value_dim + 2), dtype=torch.float32, device=q.device)
    top, total, sums = scratch.split([cells, cells, cells * value_dim])
    out = torch.empty(batch, q_heads, queries, value_dim, dtype=q.dtype, device=q.device)
    K, k_form = _side(key, k, k_exact, call.page)
    V, v_form = _side(value, v, v_exact, call.page, values=True)
    config = configuration or (FOLDED if k_form.folded and v_form.folded else DENSE)
    merged = m if v_form.hadamard else min(m, triton.next_power_of_2(rows))
    skip = None if call.skip is None else call.skip.view(torch.uint8)
    logits = None if call.sink is None else call.sink.float()
    numbers = call.scale, sinks, most, pins, v_exact.pinned.shape[2]
    decode_kernel[parts, batch * heads, blocks](
        Call(q.contiguous(), out, call.state, skip, call.pinned, logits, *numbers),
        Parts(sums, top, total, call.counters), K, V,
        capacity, k.table.shape[1], v.table.shape[1], 0 if skip is None else skip.shape[1],
        C=Shape(rows, queries, m, merged, min(config.tile, call.page), float(call.softcap or 0.0)),
        num_warps=config.warps, num_stages=config.stages,
    )  # fmt: skip
    return out
