"""Where each row's real tokens sit among the slots that transformers counts: integers only.

A slot may be padding. A row's tokens are numbered without gaps; a run says that `count` tokens from `token` on sit in
consecutive slots from `slot` on, and were rotated for consecutive positions from `position` on. Left padding is one run
that starts late.
"""

from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor


class Run(NamedTuple):
    slot: int
    token: int
    count: int
    position: int


class Rows:
    """The runs of every row of a batch, shared by all layers of a cache."""

    def __init__(self) -> None:
        self.slots = 0
        self.runs: list[list[Run]] = []
        self.announced = 0  # counts changes: what was planned for other slots is planned again
        self.shared: dict[tuple, object] = {}  # what layers have in common, see `share`

    @property
    def batch(self) -> int:
        return len(self.runs)

    def extend(self, batch: int, slots: int, real: Tensor | None, positions: Tensor | None = None) -> None:
        """Announce the next `slots` slots; real (B, slots), bool, or None where every one is a token; positions
        (B, slots), or None where they are the numbers of the slots."""
        if not self.runs:
            self.runs = [[] for _ in range(batch)]
        self.check(batch)
        flags = None if real is None or bool(real.all()) else real.tolist()
        given = None if positions is None or _consecutive(positions) else positions.tolist()
        first = None if positions is None else positions[:, 0].tolist()
        for row, runs in enumerate(self.runs):
            pieces = [(0, slots)] if flags is None else _stretches(flags[row])
            if given is not None:
                pieces = [piece for stretch in pieces for piece in _climbs(given[row], *stretch)]
            for start, count in pieces:
                position = self.slots + start if first is None else first[row] + start
                position = position if given is None else given[row][start]
                self._append(runs, self.slots + start, count, position)
        self.slots += slots
        self._changed()

    def check(self, batch: int) -> None:
        """Refuse another batch than the one that is stored."""
        if self.runs and batch != self.batch:
            raise ValueError(
                f"this cache holds {self.batch} rows, found a batch of {batch}; use reset() or a new cache"
            )

    @staticmethod
    def _append(runs: list[Run], slot: int, count: int, position: int) -> None:
        last = runs[-1] if runs else Run(0, 0, 0, 0)
        if runs and (last.slot + last.count, last.position + last.count) == (slot, position):
            runs[-1] = last._replace(count=last.count + count)
        else:
            runs.append(Run(slot, last.token + last.count, count, position))

    def crop(self, slots: int) -> None:
        """Forget all slots from `slots` on."""
        for runs in self.runs:
            while runs and runs[-1].slot >= slots:
                runs.pop()
            if runs and runs[-1].slot + runs[-1].count > slots:
                runs[-1] = runs[-1]._replace(count=slots - runs[-1].slot)
        self.slots = min(self.slots, slots)
        self._changed()

    def select(self, rows: Sequence[int]) -> None:
        """Row i becomes what row rows[i] was."""
        self.runs = [list(self.runs[row]) for row in rows]
        self._changed()

    def _changed(self) -> None:
        self.announced += 1
        self.shared.clear()

    def share(self, key: tuple, make: Callable):
        """What was first made for `key` since these rows changed last."""
        if key not in self.shared:
            self.shared[key] = make()
        return self.shared[key]

    def tokens(self, row: int, slots: int) -> int:
        """Real tokens among the first `slots` slots of a row."""
        return sum(min(run.count, max(0, slots - run.slot)) for run in self.runs[row])

    def columns(self, row: int, start: int, stop: int) -> list[tuple[int, int]]:
        """(offset, count) of the stretches of real tokens among slots [start, stop), offsets from `start`."""
        found = []
        for run in self.runs[row]:
            first, last = max(run.slot, start), min(run.slot + run.count, stop)
            if last > first:
                found.append((first - start, last - first))
        return found

    def dense(self, slots: int) -> bool:
        """Whether every one of the first `slots` slots is a token, in every row."""
        return bool(self.runs) and all(self.tokens(row, slots) == slots for row in range(self.batch))

    def slot_of(self, row: int, device: torch.device) -> Tensor:
        """The slot of each token of a row, (tokens,) int64."""
        runs = [torch.arange(run.slot, run.slot + run.count, device=device) for run in self.runs[row]]
        return torch.cat(runs) if runs else torch.empty(0, dtype=torch.long, device=device)

    def shift(self, row: int) -> int | None:
        """What a row's positions are ahead of its tokens' numbers; None if that changes on the way."""
        shifts = {run.position - run.token for run in self.runs[row]}
        return shifts.pop() if len(shifts) == 1 else 0 if not shifts else None

    def positions(self, row: int, tokens: Tensor) -> Tensor:
        """The positions that some tokens of a row were rotated for; any number for a token -1."""
        shift = self.shift(row)
        if shift is not None:
            return tokens + shift
        runs = self.runs[row]
        starts, shifts = torch.tensor([(run.token, run.position - run.token) for run in runs], device=tokens.device).T
        which = torch.searchsorted(starts.contiguous(), tokens, right=True) - 1
        return tokens + shifts[which.clamp_min(0)]

    def next_positions(self) -> list[int]:
        """The position after the last token of each row."""
        return [runs[-1].position + runs[-1].count if runs else 0 for runs in self.runs]


class SlotMap:
    """From positions of one row to page slots: runs (position, slot), both ascending, slots on whole groups."""

    def __init__(self, runs: Sequence[tuple[int, int]] = ((0, 0),)):
        self.runs = [tuple(run) for run in runs]

    def slot(self, position: int) -> int:
        """The slot of a position, or the end slot of a stretch that ends there."""
        start, slot = next(run for run in reversed(self.runs) if run[0] < position or run[0] == 0)
        return slot + position - start

    def slot_of(self, position: int) -> int:
        """The slot that holds the token at a position."""
        start, slot = next(run for run in reversed(self.runs) if run[0] <= position)
        return slot + position - start

    def floor(self, position: int, granule: int) -> int:
        """The last position <= `position` at which a group of `granule` may end."""
        start = next(run[0] for run in reversed(self.runs) if run[0] <= position)
        return start + (position - start) // granule * granule

    def pieces(self, start: int, stop: int) -> list[tuple[int, int, int]]:
        """(start, stop, slot) of positions [start, stop), cut where a new group was started."""
        found = []
        for i, (first, slot) in enumerate(self.runs):
            last = self.runs[i + 1][0] if i + 1 < len(self.runs) else stop
            a, b = max(first, start), min(last, stop)
            if b > a:
                found.append((a, b, slot + a - first))
        return found

    def cut(self, position: int, granule: int) -> None:
        """Close the group that `position` falls into, and start a new one for it."""
        slot = self.slot(position)
        self.forget(position)
        if slot % granule and self.runs[-1][0] < position:
            self.runs.append((position, -(-slot // granule) * granule))

    def forget(self, position: int) -> None:
        """Drop the runs that start behind `position`."""
        while self.runs[-1][0] > position:
            self.runs.pop()

    def holes(self) -> list[tuple[int, int]]:
        """Slot ranges that hold no token."""
        return [
            (slot + after - start, next_slot)
            for (start, slot), (after, next_slot) in zip(self.runs, self.runs[1:], strict=False)
        ]


def _consecutive(positions: Tensor) -> bool:
    return bool((positions[:, 1:] - positions[:, :-1] == 1).all())


def _climbs(positions: Sequence[int], start: int, count: int) -> list[tuple[int, int]]:
    """(start, count) of the parts of a stretch in which each position is one above the last."""
    cuts = [i for i in range(start + 1, start + count) if positions[i] != positions[i - 1] + 1]
    return [(a, b - a) for a, b in pairwise([start, *cuts, start + count])]


def _stretches(flags: Sequence[bool]) -> list[tuple[int, int]]:
    """(start, count) of the runs of true values."""
    found, start = [], None
    for i, flag in enumerate([*flags, False]):
        if flag and start is None:
            start = i
        elif not flag and start is not None:
            found.append((start, i - start))
            start = None
    return found
