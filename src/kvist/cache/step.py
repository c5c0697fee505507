"""What a layer tells the kernel that does a whole decode step: its state as integers on the device.

The integers are known on the host, from which they go to the device once per step: layers whose state is the same share
one tensor.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from kvist.kernels.contract import Exact

if TYPE_CHECKING:
    from kvist.cache.layer import Layer
    from kvist.cache.track import Track

DUE, STATE = 6, 8  # numbers per row, for STORE and for `contract.Decode`
KEPT = 8  # states that are remembered: as many as a recipe has different layers, usually
BLOCK = 16  # query rows that share a counter


def on_device(layer: Layer, numbers: tuple[int, ...], width: int) -> Tensor:
    """Numbers as a tensor (n / width, width), int32; those of a layer in the same state are given again.

    Copied from pageable memory, which is read before the call returns, so that nobody waits for the device.
    """
    memo = layer.rows.on_device
    if (numbers, width, layer.device) not in memo:
        while len(memo) >= KEPT:
            memo.pop(next(iter(memo)))
        memo[numbers, width, layer.device] = (
            torch.tensor(numbers, dtype=torch.int32).view(-1, width).to(layer.device, non_blocking=True)
        )
    return memo[numbers, width, layer.device]


def state(layer: Layer, origins: list[int]) -> Tensor:
    """See `contract.Decode`."""
    return on_device(layer, tuple(states(layer, origins)), STATE)


def states(layer: Layer, origins: list[int]) -> list[int]:
    """The numbers of all rows: see `contract.Decode`."""
    numbers = []
    for row, origin in enumerate(origins):
        frontiers = (track.states[row].frontier for track in layer.tracks)
        numbers += [min(layer.lengths[row], layer.plan.sinks), *frontiers, layer.behind(row), origin, 0, 0, 0]
    return numbers


def advance(layer: Layer) -> list[int]:
    """Move every row of a layer one token on: what STORE is to pack and where the token goes, as numbers.
    The host's side is then as if it were done: pages are taken, pins kept, frontiers moved."""
    due = []
    for row in range(layer.batch_size):
        packs = [0] * 4 if layer.settled else [n for track in layer.tracks for n in _settle(layer, track, row)]
        due += [layer.behind(row), *packs, 0]
        layer.lengths[row] += 1
    layer.slots, layer.updates, layer.settled = layer.slots + 1, layer.updates + 1, False
    layer._changed()
    return due


def _settle(layer: Layer, track: Track, row: int) -> tuple[int, int]:
    """What is packed of a row before its next token: first position and count."""
    state = track.states[row]
    start = state.frontier
    decided, frontier = track.target(row, layer.behind(row), layer.updates == 1, layer.maps[row])
    if frontier > start:
        track._grow([row], [start], [frontier])
    if track.rule.most_pins and decided != state.decided:
        wanted = [p for p in track.rule.pins(decided) if p < frontier]
        track.exact.pin(row, wanted, start, track.exact.get([row], start, frontier)[0])
    state.decided, state.frontier = decided, frontier
    return start, frontier - start


def advanceable(layer: Layer) -> bool:
    """Whether one more token per row is a step of this kind: it goes into a ring, at its position's slot."""
    return layer.plan.packs and min(layer.lengths) >= layer.plan.sinks and all(len(m.runs) == 1 for m in layer.maps)


def exact(track: Track) -> Exact:
    """The exact tokens of a side, as they lie."""
    return Exact(track.exact.sinks, track.exact.ring, track.exact.pinned)


def pinned(layer: Layer) -> Tensor | None:
    """Positions that either side keeps exact though packed, (B, P, 4): see `contract.Decode`. None: never any."""
    if not layer.plan.pinned:
        return None
    now = [pins for track in layer.tracks for pins in track.exact.pins]
    seen, made = layer.pinned
    old = made is None or made.device != layer.device or len(seen) != len(now)
    if made is None or old or any(a is not b for a, b in zip(seen, now, strict=True)):
        made = _pinned(layer).to(layer.device, non_blocking=True)
        layer.pinned = now, made  # dictionaries of pins are replaced, never changed
    return made


def _pinned(layer: Layer) -> Tensor:
    rows = []
    for row in range(layer.batch_size):
        keys, values = (track.exact.pins[row] for track in layer.tracks)
        rows.append([(p, keys.get(p, -1), values.get(p, -1), 0) for p in sorted(keys.keys() | values.keys())])
    most = sum(side.retention.most_pins for side in layer.plan.sides)
    padded = [line + [(-1, -1, -1, 0)] * (most - len(line)) for line in rows]
    return torch.tensor(padded, dtype=torch.int32)


def counters(layer: Layer, q_heads: int, queries: int) -> Tensor:
    """Zeros that a launch leaves as zeros."""
    blocks = -(-(q_heads // layer.shape.heads * queries) // BLOCK)
    wanted = layer.batch_size * layer.shape.heads * blocks
    if layer.counters is None or layer.counters.numel() < wanted or layer.counters.device != layer.device:
        layer.counters = torch.zeros(wanted, dtype=torch.int32, device=layer.device)
    return layer.counters
