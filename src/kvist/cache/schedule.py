"""What becomes of rows at a step: whole numbers only, decided once for all layers in the same state.

A `Stand` says where the rows of a layer are; layers of one plan that were given the same tokens share one object. A
`Move` takes a stand to the next one: what is due to be packed, where new tokens go. Nothing here is ever changed.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from itertools import chain

import numpy as np
import torch
from torch import Tensor

from kvist.cache.rows import Rows, SlotMap
from kvist.cache.settle import Pins, Settled, State, settle
from kvist.kernels.contract import Due, See, Write
from kvist.kernels.reference.rotary import angles
from kvist.plan import LayerPlan, Side
from kvist.types import HOLD

NO_PAGES, NO_PINS, NO_SKIP = np.zeros((0, 4), np.int64), np.zeros((1, 0, 4), np.int64), np.zeros((1, 0), np.bool_)


class Stand:
    """Where the rows of a layer stand. lengths: tokens, sinks included; states and pins: of keys and of values; ready:
    nothing is due at these lengths; prompt: there was one update so far."""

    def __init__(
        self, plan: LayerPlan, rows: Rows, lengths: list[int], maps: list[SlotMap], states: Sequence[list[State]],
        pins: Sequence[list[Pins]], flags: tuple[bool, bool],
    ):  # fmt: skip
        self.plan, self.rows, self.lengths, self.maps, self.states, self.pins = plan, rows, lengths, maps, states, pins
        self.ready, self.prompt = flags
        self._move: tuple[int, Move] | None = None

    def behind(self, row: int) -> int:
        """Tokens of a row behind its sinks."""
        return max(0, self.lengths[row] - self.plan.sinks)

    @cached_property
    def settled(self) -> tuple[Settled, Settled]:
        """What the rules allow to be packed now, of keys and of values: see `settle`."""
        sides = zip(self.plan.sides, self.states, self.pins, strict=True)
        if self.ready or not self.plan.packs:
            return tuple(Settled(states, pins, [], []) for _, states, pins in sides)  # pyright: ignore[reportReturnType]
        behind = [self.behind(row) for row in range(len(self.lengths))]
        return tuple(settle(*side, behind, self.maps, self.prompt) for side in sides)  # pyright: ignore[reportReturnType]

    @cached_property
    def ends(self) -> list[tuple[int, int]]:
        """Per row, the lower and the higher of the two frontiers."""
        pairs = zip(*self.states, strict=True)
        return [(k, v) if k < v else (v, k) for (_, k), (_, v) in pairs]

    @cached_property
    def limits(self) -> list[int]:
        """Per row, the packed slots that both sides have."""
        return [maps.slot(low) for maps, (low, _) in zip(self.maps, self.ends, strict=True)]

    @property
    def waiting(self) -> int:
        """The most tokens that a ring must hold."""
        return max(self.behind(row) - low for row, (low, _) in enumerate(self.ends))

    @cached_property
    def gaps(self) -> bool:
        """Whether some slot is not its position, after a deep crop."""
        return any(len(maps.runs) > 1 for maps in self.maps)

    @cached_property
    def pinned(self) -> list[list[tuple[int, int, int, int]]]:
        """Per row, what either side keeps exact though packed: see `contract.See`."""
        found = []
        for maps, keys, values in zip(self.maps, *self.pins, strict=True):
            both = sorted(keys.keys() | values.keys())
            found.append([(p, keys.get(p, -1), values.get(p, -1), maps.slot_of(p)) for p in both])
        return found

    @cached_property
    def asked(self) -> tuple[tuple[str, bool], ...]:
        """Fields of a request that depend on where rows stand."""
        return ("gaps", self.gaps), ("shifted", self.origins() is None)

    def keep(self, other: Stand) -> None:
        """Pins and holes are those of another stand: what was made of them there is not made again."""
        for name in ("pinned", "_apart", "gaps"):
            if name in vars(other):
                vars(self)[name] = vars(other)[name]

    def move(self, slots: int) -> Move:
        """What the next `slots` slots, which were announced, bring to a layer that holds all the slots before them."""
        if self._move is None or self._move[0] != self.rows.announced:
            self._move = self.rows.announced, Move(self, slots)
        return self._move[1]

    def origins(self) -> list[int] | None:
        """The position of page slot 0 of each row, where that of slot i is i more; None where it is not so. Zeros where
        nobody asks."""
        if self.plan.key.codec.transform.fixed:
            return [0] * len(self.lengths)
        shifts = [self.rows.shift(row) for row in range(len(self.lengths))]
        found = [shift + self.plan.sinks for shift in shifts if shift is not None]
        return found if len(found) == len(shifts) and not self.gaps else None

    def look(self, before: Sequence[int], counts: Sequence[int], horizon: np.ndarray) -> See:
        """What attention is told: see `contract.See`."""
        origins, sinks, batch = self.origins() or [0] * len(self.lengths), self.plan.sinks, len(self.lengths)
        rows = np.empty((batch, 8), np.int64)
        rows[:, 0], rows[:, 1] = before, counts
        rows[:, 2] = [min(length, sinks) for length in self.lengths]
        rows[:, 3] = [self.behind(row) for row in range(batch)]
        for column, states in enumerate(self.states, start=4):
            rows[:, column] = [frontier for _, frontier in states]
        rows[:, 6], rows[:, 7] = self.limits, origins
        span = [
            (row, a, b - a, slot)
            for row, (low, high) in enumerate(self.ends)
            if high > low
            for a, b, slot in self.maps[row].pieces(low, high)
        ]
        return See(rows, horizon, table(span) if span else NO_PAGES, *self._apart, sum(self.lengths))

    @cached_property
    def _apart(self) -> tuple[np.ndarray, np.ndarray]:
        """Slots that the packed read leaves out, and what is kept exact though packed."""
        if not (self.gaps or any(self.pinned)):
            return NO_SKIP, NO_PINS
        most = max(map(len, self.pinned))
        lines = [[*line, *[(-1, -1, -1, 0)] * (most - len(line))] for line in self.pinned]
        left_out = [
            [*(slot for line in lines for slot in line[3:]), *chain(*(range(*hole) for hole in maps.holes()))]
            for lines, maps in zip(self.pinned, self.maps, strict=True)
        ]
        skip = np.zeros((len(lines), 1 + max(map(max, filter(None, left_out)))), np.bool_)
        for row, slots in enumerate(left_out):
            skip[row, slots] = True
        return skip, np.array(lines, np.int64) if most else NO_PINS


class Move:
    """A step from one stand to the next. counts: new tokens of each row; after: where rows stand then."""

    def __init__(self, stand: Stand, slots: int):
        self.before, self.slots, rows = stand, slots, range(len(stand.lengths))
        self.columns = [stand.rows.columns(row, stand.rows.slots - slots, stand.rows.slots) for row in rows]
        self.counts = [sum(count for _, count in stretches) for stretches in self.columns]
        lengths = [length + count for length, count in zip(stand.lengths, self.counts, strict=True)]
        keys, values = self.settled = stand.settled
        states, pins = (keys.states, values.states), (keys.pins, values.pins)
        self.after = Stand(stand.plan, stand.rows, lengths, stand.maps, states, pins, (False, False))
        if all(a is b for a, b in zip(pins, stand.pins, strict=True)):
            self.after.keep(stand)
        self.packs = any(settled.pieces for settled in self.settled)
        self.room = max(self.after.waiting, stand.waiting)
        self._tensors: dict[tuple, Tensor] = {}

    @cached_property
    def rings(self) -> dict[int, tuple[int, int]]:
        """By the tokens for which room is set aside: the least capacity that this step needs of a ring, and that of one
        which is not to be made again soon. Filled by `ring`."""
        return {}

    def ring(self, reserve: int) -> tuple[int, int]:
        """See `rings`."""
        plan = self.before.plan
        self.rings[reserve] = plan.ring(self.room, reserve), plan.ring(self.room + HOLD, reserve)
        return self.rings[reserve]

    @cached_property
    def see(self) -> See:
        """What attention of this step is told."""
        before = self.before.lengths
        if self.slots == 1:
            horizon = np.array(self.after.lengths, np.int64)[:, None] - 1
        else:
            real = np.zeros((len(before), self.slots), np.int64)
            for row, stretches in enumerate(self.columns):
                for start, count in stretches:
                    real[row, start : start + count] = 1
            horizon = np.array(before)[:, None] + real.cumsum(1) - 1
        return self.after.look(before, self.counts, horizon)

    @property
    def last(self) -> See:
        """The same for a single query that sees everything."""
        return self.see._replace(horizon=np.array(self.after.lengths, np.int64)[:, None])

    @cached_property
    def full(self) -> bool:
        """Whether every slot so far is a token, in every row."""
        return self.before.rows.dense(self.before.rows.slots)

    @cached_property
    def runs(self) -> np.ndarray:
        """Where tokens sit among the slots: (n, 4), row, first slot, first token, count."""
        rows = self.before.rows.runs
        return table([(i, run.slot, run.token, run.count) for i, runs in enumerate(rows) for run in runs])

    @cached_property
    def write(self) -> Write:
        """What storing is told."""
        columns = np.zeros((len(self.counts), self.slots), np.int64)
        for row, stretches in enumerate(self.columns):
            numbers = list(chain.from_iterable(range(start, start + count) for start, count in stretches))
            columns[row, : len(numbers)] = numbers
        return Write(self.see.rows, columns, *map(self._due, self.before.plan.sides, self.settled))

    def _due(self, side: Side, settled: Settled) -> Due:
        pieces, copies = (table(x, n) for x, n in ((settled.pieces, 4), (settled.copies, 3)))
        if side.codec.transform.fixed or not settled.pieces:
            return Due(pieces, copies, *(np.empty((0, 0), np.float32),) * 2)
        at = [
            self.before.rows.positions(row, torch.arange(position, position + count) + side.retention.sinks)
            for row, position, count, _ in settled.pieces
        ]
        transform = side.codec.transform
        cos, sin = angles(torch.cat(at), transform.table(torch.device("cpu")))
        return Due(pieces, copies, (cos / transform.scaling).numpy(), (-sin / transform.scaling).numpy())

    @cached_property
    def due(self) -> list[int]:
        """What STORE is told of rows that get one token each, as numbers: see `triton.step`."""
        numbers = []
        first = [[(0, 0)] * len(self.counts) for _ in self.settled]
        for ranges, settled in zip(first, self.settled, strict=True):
            for row, position, count, _ in settled.pieces:
                ranges[row] = position, count
        for row, (keys, values) in enumerate(zip(*first, strict=True)):
            numbers += [self.before.behind(row), *keys, *values, 0]
        return numbers

    def on(self, device: torch.device) -> Tensor:
        """`due` as a tensor (B, 6), int32, which layers in the same state share.

        Copied from pageable memory, which is read before the call returns, so that nobody waits for the device.
        """
        if device not in self._tensors:
            made = torch.tensor(self.due, dtype=torch.int32).view(len(self.counts), -1)
            self._tensors[device] = made.to(device, non_blocking=True)
        return self._tensors[device]


def table(lines: Sequence, width: int = 4) -> np.ndarray:
    """Lines of whole numbers as an array."""
    return np.array(lines, np.int64) if len(lines) else np.zeros((0, width), np.int64)
