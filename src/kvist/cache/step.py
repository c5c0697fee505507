"""What a layer tells the kernel that does a whole decode step: its state as integers on the device.

The integers are known on the host, from which they go to the device once per step: layers whose state is the same share
one tensor.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from kvist.kernels.choose import Exact

if TYPE_CHECKING:
    from kvist.cache.layer import Layer
    from kvist.cache.track import Track

STATE = 8  # numbers per row
KEPT = 8  # states that are remembered: as many as a recipe has different layers, usually
BLOCK = 16  # query rows that share a counter


def state(layer: Layer, origins: list[int]) -> Tensor:
    """See `choose.Decode`."""
    held = [min(length, layer.plan.sinks) for length in layer.lengths]
    behind = [layer.behind(row) for row in range(layer.batch_size)]
    lines = zip(held, layer.key.frontiers, layer.value.frontiers, behind, origins, strict=True)
    numbers = tuple(line + (0,) * (STATE - len(line)) for line in lines)
    memo = layer.rows.on_device
    if (numbers, layer.device) not in memo:
        while len(memo) >= KEPT:
            memo.pop(next(iter(memo)))
        memo[numbers, layer.device] = torch.tensor(numbers, dtype=torch.int32, device=layer.device)
    return memo[numbers, layer.device]


def exact(track: Track) -> Exact:
    """The exact tokens of a side, as they lie."""
    return Exact(track.exact.sinks, track.exact.ring, track.exact.pinned)


def pinned(layer: Layer) -> Tensor | None:
    """Positions that either side keeps exact though packed, (B, P, 4): see `choose.Decode`. None: never any."""
    if not layer.plan.pinned:
        return None
    rows = []
    for row in range(layer.batch_size):
        keys, values = (track.exact.pins[row] for track in layer.tracks)
        rows.append([(p, keys.get(p, -1), values.get(p, -1), 0) for p in sorted(keys.keys() | values.keys())])
    most = sum(side.retention.most_pins for side in layer.plan.sides)
    padded = [line + [(-1, -1, -1, 0)] * (most - len(line)) for line in rows]
    return torch.tensor(padded, dtype=torch.int32, device=layer.device)


def counters(layer: Layer, q_heads: int, queries: int) -> Tensor:
    """Zeros that a launch leaves as zeros."""
    blocks = -(-(q_heads // layer.shape.heads * queries) // BLOCK)
    wanted = layer.batch_size * layer.shape.heads * blocks
    if layer.counters is None or layer.counters.numel() < wanted or layer.counters.device != layer.device:
        layer.counters = torch.zeros(wanted, dtype=torch.int32, device=layer.device)
    return layer.counters
