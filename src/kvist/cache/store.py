"""What a layer stores: a key track and a value track, how many tokens each row has, and what an update does to them.

No word of transformers: `layer` puts its protocol on top; views, steps, files and reports read what is here.
"""

from collections import defaultdict
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor

from kvist.cache.rows import Rows, SlotMap
from kvist.cache.schedule import Move, Stand
from kvist.cache.track import Track
from kvist.kernels.choose import Choice
from kvist.kernels.contract import Request
from kvist.plan import LayerPlan
from kvist.types import HOLD, Geometry


class Store:
    """The storage of one layer. It is made on the device of the first keys; before, there is none of it.

    lengths: tokens of each row, its sinks included; maps: where each row's positions lie in its pages; slots: what
    transformers counts, padding included; updates: since the last time it was empty; settled: whether what the rules
    allow at this length is packed. Lists of numbers are replaced, never changed: layers in the same state share them.
    """

    def __init__(self, plan: LayerPlan, page: int, reserve: int, rows: Rows):
        self.plan, self.page, self.reserve, self.rows = plan, page, reserve, rows
        self.packs = plan.packs
        self.exact: torch.dtype | None = None  # see `Geometry`; set before the first update
        self.version = 0  # counts changes, so that a view knows when it is out of date
        self.made = False
        self.clear()

    def clear(self) -> None:
        """Forget everything and free the storage."""
        if self.made:
            del self.key, self.value
        self.made, self.settled = False, True
        self.slots = self.updates = 0
        self.version += 1
        self.counters: Tensor | None = None
        self.choices: dict[tuple, Choice] = {}  # see `step.chosen`
        self.bound: tuple[int, Any] | None = None  # see `step.bind`
        self.whole: bool | None = None  # whether a CPU's kernel takes its steps; None: not asked yet
        self.standing: Stand | None = None  # of `stand`, while it is known
        self._apart: dict[str, tuple[tuple, Tensor]] = {}
        self.lengths: list[int] = []
        self.maps: list[SlotMap] = []

    def make(self, keys: Tensor, values: Tensor) -> None:
        """Storage for keys and values (B, H, T, D) of these shapes, types and device; nothing is stored yet."""
        batch, heads, _, key_dim = keys.shape
        self.shape = Geometry(heads, key_dim, values.shape[-1], keys.dtype, self.exact)
        self.device, self.dtype = keys.device, keys.dtype
        sides = zip(self.plan.sides, (key_dim, self.shape.value_dim), strict=True)
        self.key, self.value = (
            Track(side, self.plan, self.shape, dim, self.page, batch, self.reserve, self.device, self.rows)
            for side, dim in sides
        )
        self.lengths, self.maps = [0] * batch, [SlotMap() for _ in range(batch)]
        self.bounded = all(side.window() is not None for side in self.plan.sides)
        self.fit(0)
        self.made = True

    def to(self, device: torch.device) -> None:
        """Move the storage, as a cache loaded from a file must when its model sits on another device."""
        if device != self.device:
            for track in self.tracks:
                track.to(device)
            self.device, self._apart, self.choices, self.whole = device, {}, {}, None

    @property
    def request(self) -> Request:
        """What this storage asks of kernels; a call adds what it knows."""
        return self.plan.request(self.shape, self.page, self.device)

    @property
    def tracks(self) -> tuple[Track, Track]:
        return self.key, self.value

    @property
    def batch_size(self) -> int:
        return len(self.lengths)

    def behind(self, row: int) -> int:
        """Tokens of a row behind its sinks."""
        return max(0, self.lengths[row] - self.plan.sinks)

    def check(self, keys: Tensor, values: Tensor) -> None:
        if keys.shape[:3] != values.shape[:3]:
            raise ValueError(
                f"keys {tuple(keys.shape)} and values {tuple(values.shape)} differ in batch, heads or tokens: this is "
                "not ordinary attention (compressed latents?) and kvist does not store it"
            )
        if not self.made:
            return
        shape, sizes = self.shape, (len(self.lengths), self.shape.heads, self.shape.key_dim, self.shape.value_dim)
        if (*keys.shape[:2], keys.shape[3], values.shape[3]) != sizes or keys.dtype != shape.dtype:
            found = Geometry(keys.shape[1], keys.shape[3], values.shape[3], keys.dtype, self.exact)
            raise ValueError(
                f"this cache holds a batch of {self.batch_size}, {self.shape}; found {keys.shape[0]}, {found}"
            )

    def kept(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values as they are stored while exact. What a narrower type cannot hold goes to its end."""
        stored = self.shape.stored(self.plan.packs)
        if keys.dtype == stored:
            return keys.detach(), values.detach()
        most = torch.finfo(stored).max
        if most < torch.finfo(keys.dtype).max:
            for track, x in zip(self.tracks, (keys, values), strict=True):
                track.clipped += (x.abs() > most).sum()
            keys, values = keys.clamp(-most, most), values.clamp(-most, most)
        return keys.detach().to(stored), values.detach().to(stored)

    @property
    def stand(self) -> Stand:
        """Where the rows stand; layers of equal plans in the same state share it."""
        if self.standing is None:
            states, pins = (self.key.states, self.value.states), (self.key.exact.pins, self.value.exact.pins)
            flags = self.settled, self.updates == 1
            pinned = tuple(tuple(row.items()) for side in pins for row in side) if self.plan.pinned else ()
            runs = tuple(tuple(maps.runs) for maps in self.maps)
            key = (self.plan.schedule, tuple(self.lengths), runs, *map(tuple, states), pinned, flags)
            make = partial(Stand, self.plan, self.rows, self.lengths, self.maps, states, pins, flags)
            self.standing = self.rows.share(key, make)
        return self.standing

    def moved_on(self, move: Move) -> None:
        """A step was taken: what was due is packed, and its tokens are stored."""
        after = self.standing = move.after
        self.lengths = after.lengths
        (self.key.states, self.value.states), pins = after.states, after.pins
        self.key.exact.pins, self.value.exact.pins = pins
        self.slots, self.updates, self.settled = self.slots + move.slots, self.updates + 1, False
        self.version += 1

    def settle(self) -> None:
        """Pack what the rules allow at the present length. Called before an update; harmless at other times."""
        if self.settled:
            return
        due = self.stand.settled
        self.settled = True
        for track, settled in zip(self.tracks, due, strict=True) if self.plan.packs else ():
            for rows in self.alike(track):
                decided, frontier = settled.states[rows[0]]
                source = track.exact.get(rows, track.states[rows[0]].frontier, frontier)
                track.pack(rows, decided, frontier, source, [self.maps[r] for r in rows], settled=True)
        self.fit(self.waiting(), shrink=True)
        self.changed()

    def append(self, keys: Tensor, values: Tensor, columns: list, counts: list[int]) -> None:
        sinks, maps = self.plan.sinks, self.maps
        work = []
        for track, x in zip(self.tracks, (keys, values), strict=True):
            for rows in self.alike(track, columns):
                first = rows[0]
                new = _pick(x, rows, columns[first])
                old, behind = self.behind(first), max(0, self.lengths[first] + counts[first] - sinks)
                into_sinks = min(counts[first], max(0, sinks - self.lengths[first]))
                if into_sinks:
                    at = self.lengths[first]
                    track.exact.sinks[rows, :, at : at + into_sinks] = new[:, :, :into_sinks]
                    new = new[:, :, into_sinks:]
                decided = frontier = track.states[first].frontier
                if counts[first] > HOLD and self.plan.packs:
                    decided, frontier = track.target(first, behind - HOLD, self.updates == 0, maps[first])
                work.append((track, rows, new, old, behind, decided, frontier))
        self.fit(max((behind - frontier for *_, behind, _, frontier in work), default=0))
        for track, rows, new, old, behind, decided, frontier in work:
            start = track.states[rows[0]].frontier
            if frontier > start:
                waiting = track.exact.get(rows, start, min(old, frontier))
                source = torch.cat([waiting, new[:, :, : frontier - old]], dim=2) if old > start else new
                track.pack(
                    rows, decided, frontier, source[:, :, : frontier - start], [maps[r] for r in rows], settled=False
                )
            keep = max(old, frontier)
            if behind > keep:
                track.exact.put(rows, keep, new[:, :, keep - old :])
        self.lengths = [length + count for length, count in zip(self.lengths, counts, strict=True)]

    def alike(self, track: Track, columns: list | None = None) -> Iterator[list[int]]:
        """Rows in groups that are in the same state, so that one call serves a whole group."""
        groups = defaultdict(list)
        for row, state in enumerate(track.states):
            new = tuple(columns[row]) if columns else ()
            groups[self.lengths[row], state.decided, state.frontier, tuple(self.maps[row].runs), new].append(row)
        return iter(list(groups.values()))

    def waiting(self) -> int:
        return max(self.behind(r) - min(t.states[r].frontier for t in self.tracks) for r in range(self.batch_size))

    def fit(self, waiting: int, shrink: bool = False) -> None:
        """Rings that hold `waiting` tokens. A window without a bound gives room back when it is less than half used."""
        capacity, now = self.plan.ring(waiting, self.reserve), self.key.exact.capacity
        if capacity > now or (shrink and 2 * self.plan.ring(waiting + HOLD, self.reserve) <= now):
            if capacity < now:
                capacity = self.plan.ring(waiting + HOLD, self.reserve)
            for track in self.tracks:
                track.exact.resize(capacity, track.frontiers, [self.behind(r) for r in range(self.batch_size)])

    @torch.inference_mode(False)
    @torch.no_grad()
    def crop(self, tokens_to_remove: int) -> None:
        """Forget the last k slots, k given as -k. Up to `HOLD` tokens of the last update leave no trace; deeper, the
        surviving codes stay, the group they belong to is closed, and a new one starts."""
        kept = max(0, self.slots - abs(tokens_to_remove))
        if kept == self.slots or not self.made:
            return
        self.maps = [SlotMap(maps.runs) for maps in self.maps]
        self.lengths = [self.rows.tokens(row, kept) for row in range(self.batch_size)]
        for row in range(self.batch_size):
            length, maps = self.behind(row), self.maps[row]
            slots = maps.slot(length)
            ends = [(track, track.states[row].frontier > length) for track in self.tracks]
            cut = any(deep and maps.floor(length, track.codec.granule) != length for track, deep in ends)
            for track, _ in ends:
                track.crop(row, length, maps, slots)
            if cut:
                maps.cut(length, self.plan.granule)
            elif any(deep for _, deep in ends):
                maps.forget(length)
        self.slots = kept
        self.changed()
        if not any(self.lengths):
            self.updates = 0

    @torch.inference_mode(False)
    @torch.no_grad()
    def select(self, indices: Tensor) -> None:
        """Row i becomes what row indices[i] was."""
        if not self.made:
            return
        order = indices.tolist()
        rows = indices.to(self.device)
        for track in self.tracks:
            track.select(rows, order)
        self.lengths = [self.lengths[r] for r in order]
        self.maps = [SlotMap(self.maps[r].runs) for r in order]
        self.changed()

    def changed(self) -> None:
        self.version += 1
        self.standing = None

    def table_width(self, track: Track) -> int:
        """Entries per row of a track's page table."""
        return self.plan.table(max(map(len, track.pool.tables)), self.page, self.reserve)

    def skip(self) -> Tensor | None:
        """Page slots that the packed read leaves out, (B, width·page) bool: pins and holes. None where none are."""
        if not (self.plan.pinned or self.stand.gaps):
            return None
        return self.apart("skip", Store._skip, max(map(self.table_width, self.tracks)))

    def _skip(self) -> Tensor:
        skip = torch.zeros(self.batch_size, max(map(self.table_width, self.tracks)) * self.page, dtype=torch.bool)
        for row, maps in enumerate(self.maps):
            for start, stop in maps.holes():
                skip[row, start:stop] = True
            if self.stand.pinned[row]:
                skip[row, [slot for *_, slot in self.stand.pinned[row]]] = True
        return skip

    def apart(self, name: str, make: Callable[["Store"], Tensor], *more) -> Tensor:
        """What is made of pins and holes, and of what `more` tells, on the layer's device; made again where these
        changed."""
        now = (*self.stand.pins, self.stand.maps, *more)
        if name in self._apart:
            before, made = self._apart[name]
            if all(a is b or a == b for a, b in zip(before, now, strict=True)):
                return made
        made = make(self).to(self.device, non_blocking=True)
        self._apart[name] = now, made
        return made


def _pick(x: Tensor, rows: list[int], columns: list[tuple[int, int]]) -> Tensor:
    """Some rows of x (B, H, T, D), and of those the columns that hold tokens."""
    if len(rows) < x.shape[0]:
        x = x[rows]
    if len(columns) == 1:
        start, count = columns[0]
        return x[:, :, start : start + count]
    return torch.cat([x[:, :, start : start + count] for start, count in columns] or [x[:, :, :0]], dim=2)
