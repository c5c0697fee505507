"""The tokens of a layer that are not packed on both sides, gathered for attention: exact ones, in any order.

Softmax attention does not care about order, so the rings are used as they lie; only what one side has packed and the
other has not, at most a window of tokens, is decoded.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

if TYPE_CHECKING:
    from kvist.cache.layer import Layer


class Loose(NamedTuple):
    """Some tokens that are at hand as tensors: keys, values (B, H, N, D) and tokens (B, N) int64, the number of each
    token in its row, -1 where there is none; keys and values may hold anything there."""

    keys: Tensor
    values: Tensor
    tokens: Tensor


def loose(layer: Layer) -> list[Loose]:
    """All tokens of a layer but those packed on both sides and not pinned, each once."""
    parts = [Loose(layer.key.exact.ring, layer.value.exact.ring, _ring_tokens(layer))]
    odd = [_odd(layer, row) for row in range(layer.batch_size)]
    if any(odd):
        parts.append(_fetched(layer, odd))
    if layer.plan.sinks:
        numbers = torch.arange(layer.plan.sinks, device=layer.device)
        lengths = torch.tensor(layer.lengths, device=layer.device).unsqueeze(-1)
        tokens = torch.where(numbers < lengths, numbers, -1)
        parts.append(Loose(layer.key.exact.sinks, layer.value.exact.sinks, tokens))
    return parts


def _ring_tokens(layer: Layer) -> Tensor:
    """Token numbers in the slots of the rings, (B, capacity); -1 where the slot holds none that both sides keep."""
    capacity, sinks = layer.key.exact.capacity, layer.plan.sinks
    slots = torch.arange(capacity, device=layer.device)
    behind = torch.tensor([layer.behind(r) for r in range(layer.batch_size)], device=layer.device).unsqueeze(-1)
    from_ = [max(k, v) for k, v in zip(layer.key.frontiers, layer.value.frontiers, strict=True)]
    positions = behind - 1 - (behind - 1 - slots) % capacity
    return torch.where(positions >= torch.tensor(from_, device=layer.device).unsqueeze(-1), positions + sinks, -1)


def _odd(layer: Layer, row: int) -> Sequence[int]:
    """Positions that are neither packed on both sides nor recent on both: pins, and the span between the frontiers."""
    low, high = sorted(track.states[row].frontier for track in layer.tracks)
    pins = {p for track in layer.tracks for p in track.exact.pins[row] if p < low}
    return [*sorted(pins), *range(low, high)] if pins else range(low, high)


def _fetched(layer: Layer, odd: list[Sequence[int]]) -> Loose:
    most = max(map(len, odd))
    tokens = torch.full((len(odd), most), -1, device=layer.device)
    sides = []
    for track in layer.tracks:
        size = (len(odd), layer.shape.heads, most, track.dim)
        side = torch.zeros(size, dtype=layer.dtype, device=layer.device)
        for row, positions in enumerate(odd):
            side[row, :, : len(positions)] = track.fetch(row, positions, layer.maps[row])
            tokens[row, : len(positions)] = torch.tensor(positions, device=layer.device) + layer.plan.sinks
        sides.append(side)
    keys, values = sides
    return Loose(keys, values, tokens)
