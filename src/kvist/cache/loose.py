"""The residual tokens of a layer, those not packed on both sides, gathered for attention: exact ones, in any order.

Softmax attention does not care about order, so the rings are used as they lie; only what one side has packed and the
other has not, at most a window of tokens, is decoded.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from kvist.cache.store import Store


class Loose(NamedTuple):
    """Some tokens that are at hand as tensors: keys, values (B, H, N, D) and tokens (B, N) int64, the number of each
    token in its row, -1 where there is none; keys and values may hold anything there."""

    keys: Tensor
    values: Tensor
    tokens: Tensor


def loose(store: Store) -> list[Loose]:
    """All tokens of a layer but those packed on both sides and not pinned, each once."""
    parts = [Loose(store.key.exact.ring, store.value.exact.ring, _ring_tokens(store))]
    odd = [_odd(store, row) for row in range(store.batch_size)]
    if any(odd):
        parts.append(_fetched(store, odd))
    if store.plan.sinks:
        numbers = torch.arange(store.plan.sinks, device=store.device)
        lengths = torch.tensor(store.lengths, device=store.device).unsqueeze(-1)
        tokens = torch.where(numbers < lengths, numbers, -1)
        parts.append(Loose(store.key.exact.sinks, store.value.exact.sinks, tokens))
    return parts


def _ring_tokens(store: Store) -> Tensor:
    """Token numbers in the slots of the rings, (B, capacity); -1 where the slot holds none that both sides keep."""
    capacity, sinks = store.key.exact.capacity, store.plan.sinks
    slots = torch.arange(capacity, device=store.device)
    behind = torch.tensor([store.behind(r) for r in range(store.batch_size)], device=store.device).unsqueeze(-1)
    from_ = [max(k, v) for k, v in zip(store.key.frontiers, store.value.frontiers, strict=True)]
    positions = behind - 1 - (behind - 1 - slots) % capacity
    return torch.where(positions >= torch.tensor(from_, device=store.device).unsqueeze(-1), positions + sinks, -1)


def _odd(store: Store, row: int) -> Sequence[int]:
    """Positions that are neither packed on both sides nor recent on both: pins, and the span between the frontiers."""
    low, high = sorted(track.states[row].frontier for track in store.tracks)
    pins = {p for track in store.tracks for p in track.exact.pins[row] if p < low}
    return [*sorted(pins), *range(low, high)] if pins else range(low, high)


def _fetched(store: Store, odd: list[Sequence[int]]) -> Loose:
    most = max(map(len, odd))
    tokens = torch.full((len(odd), most), -1, device=store.device)
    sides = []
    for track in store.tracks:
        size = (len(odd), store.shape.heads, most, track.dim)
        side = torch.zeros(size, dtype=store.dtype, device=store.device)
        for row, positions in enumerate(odd):
            side[row, :, : len(positions)] = track.fetch(row, positions, store.maps[row])
            tokens[row, : len(positions)] = torch.tensor(positions, device=store.device) + store.plan.sinks
        sides.append(side)
    keys, values = sides
    return Loose(keys, values, tokens)
