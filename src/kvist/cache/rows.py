"""Where each row's real tokens sit among the slots that transformers counts: integers only.

A slot may be padding. A row's tokens are numbered without gaps; a run says that `count` tokens from `token` on sit in
consecutive slots from `slot` on. Left padding is one run that starts late.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor


class Run(NamedTuple):
    slot: int
    token: int
    count: int


class Rows:
    """The runs of every row of a batch, shared by all layers of a cache."""

    def __init__(self) -> None:
        self.slots = 0
        self.runs: list[list[Run]] = []

    @property
    def batch(self) -> int:
        return len(self.runs)

    def extend(self, batch: int, slots: int, real: Tensor | None) -> None:
        """Announce the next `slots` slots; real (B, slots), bool, or None where every one is a token."""
        if not self.runs:
            self.runs = [[] for _ in range(batch)]
        self.check(batch)
        flags = None if real is None or bool(real.all()) else real.tolist()
        for row, runs in enumerate(self.runs):
            pieces = [(0, slots)] if flags is None else _stretches(flags[row])
            for start, count in pieces:
                self._append(runs, self.slots + start, count)
        self.slots += slots

    def check(self, batch: int) -> None:
        """Refuse another batch than the one that is stored."""
        if self.runs and batch != self.batch:
            raise ValueError(
                f"this cache holds {self.batch} rows, found a batch of {batch}; use reset() or a new cache"
            )

    @staticmethod
    def _append(runs: list[Run], slot: int, count: int) -> None:
        token = runs[-1].token + runs[-1].count if runs else 0
        if runs and runs[-1].slot + runs[-1].count == slot:
            runs[-1] = runs[-1]._replace(count=runs[-1].count + count)
        else:
            runs.append(Run(slot, token, count))

    def crop(self, slots: int) -> None:
        """Forget all slots from `slots` on."""
        for runs in self.runs:
            while runs and runs[-1].slot >= slots:
                runs.pop()
            if runs and runs[-1].slot + runs[-1].count > slots:
                runs[-1] = runs[-1]._replace(count=slots - runs[-1].slot)
        self.slots = min(self.slots, slots)

    def select(self, rows: Sequence[int]) -> None:
        """Row i becomes what row rows[i] was."""
        self.runs = [list(self.runs[row]) for row in rows]

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
        return all(len(runs) == 1 and runs[0].slot == 0 and runs[0].count >= slots for runs in self.runs)

    def slot_of(self, row: int, device: torch.device) -> Tensor:
        """The slot of each token of a row, (tokens,) int64."""
        runs = [torch.arange(run.slot, run.slot + run.count, device=device) for run in self.runs[row]]
        return torch.cat(runs) if runs else torch.empty(0, dtype=torch.long, device=device)


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
