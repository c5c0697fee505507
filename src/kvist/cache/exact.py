"""The exact tokens of one side of one layer: attention sinks, a ring of recent tokens (residual window), and pins."""

from collections.abc import Sequence

import torch
from torch import Tensor

from kvist.cache.settle import pin


class Exact:
    """Tokens as they are stored while exact. Position p behind the sinks sits in ring slot p mod capacity; pins are
    packed tokens kept exact as well, by position."""

    def __init__(
        self, batch: int, heads: int, dim: int, sinks: int, pins: int, dtype: torch.dtype, device: torch.device
    ):
        self.sinks, self.pinned, self.ring = (
            torch.empty(batch, heads, tokens, dim, dtype=dtype, device=device) for tokens in (sinks, pins, 0)
        )
        self.pins: list[dict[int, int]] = [{} for _ in range(batch)]  # replaced, never changed: layers share it
        self.moved = 0  # counts the times that tensors were replaced

    @property
    def capacity(self) -> int:
        return self.ring.shape[2]

    @torch.inference_mode(False)  # what is stored must be writable outside inference mode, too
    @torch.no_grad()
    def resize(self, capacity: int, starts: Sequence[int], stops: Sequence[int]) -> None:
        """A ring of another capacity that still holds positions [starts[r], stops[r]) of every row."""
        old, before = self.ring, self.capacity
        batch, heads, _, dim = old.shape
        self.ring = old.new_empty(batch, heads, capacity, dim)
        self.moved += 1
        for row, (start, stop) in enumerate(zip(starts, stops, strict=True)):
            if stop > start:
                positions = torch.arange(start, stop, device=old.device)
                self.ring[row, :, positions % capacity] = old[row, :, positions % before]

    def put(self, rows: Sequence[int], start: int, x: Tensor) -> None:
        """Positions [start, start + T) of some rows, from x (R, H, T, D); T is at most the capacity."""
        count, where = x.shape[2], start % self.capacity if self.capacity else 0
        everyone = len(rows) == self.ring.shape[0]
        for row, source in [(slice(None), x)] if everyone else [(r, x[i]) for i, r in enumerate(rows)]:
            head = min(count, self.capacity - where)
            self.ring[row][..., where : where + head, :] = source[..., :head, :]
            if head < count:
                self.ring[row][..., : count - head, :] = source[..., head:, :]

    def get(self, rows: Sequence[int], start: int, stop: int) -> Tensor:
        """Positions [start, stop) of some rows, (R, H, T, D)."""
        if stop <= start:
            return self.ring[list(rows), :, :0]
        slots = torch.arange(start, stop, device=self.ring.device) % self.capacity
        ring = self.ring if len(rows) == self.ring.shape[0] else self.ring[list(rows)]
        return ring[:, :, slots]

    def pin(self, row: int, wanted: Sequence[int], start: int, source: Tensor) -> None:
        """Keep just the `wanted` positions: those kept so far, and those in [start, start + T) of source (H, T, D)."""
        kept, new = pin(self.pins[row], wanted, start, start + source.shape[1], self.pinned.shape[2])
        if new:
            self.pinned[row, :, list(new.values())] = source[:, [p - start for p in new]]
        self.pins = [kept if i == row else pins for i, pins in enumerate(self.pins)]

    def select(self, rows: Tensor, order: Sequence[int]) -> None:
        """Row i becomes what row rows[i] was."""
        self.sinks, self.pinned, self.ring = (x.index_select(0, rows) for x in (self.sinks, self.pinned, self.ring))
        self.pins = [self.pins[row] for row in order]
        self.moved += 1

    def to(self, device: torch.device) -> None:
        """Move the storage to another device."""
        self.sinks, self.pinned, self.ring = (x.to(device) for x in (self.sinks, self.pinned, self.ring))
        self.moved += 1
