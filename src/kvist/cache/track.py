"""One side of one layer: sinks | packed pages (with pins over them) | a ring of recent tokens.

Positions count real tokens of a row behind its sinks. A position's page slot equals it until a crop cuts a group: the
surviving codes stay, the group is closed, and the next token starts a new one (`SlotMap`).
"""

from collections.abc import Callable, Sequence
from functools import partial
from itertools import pairwise

import torch
from torch import Tensor

from kvist.cache.exact import Exact
from kvist.cache.pages import Pool
from kvist.cache.rows import Rows, SlotMap
from kvist.cache.settle import State
from kvist.kernels.choose import coder
from kvist.kernels.contract import Operation
from kvist.plan import LayerPlan, Side
from kvist.types import Geometry

TILE = 1 << 18  # elements that are encoded at a time: their fp32 copies fit a core's L2 cache


class Track:
    """One side of one layer of a living cache."""

    def __init__(
        self,
        side: Side,
        plan: LayerPlan,
        shape: Geometry,
        dim: int,
        page: int,
        batch: int,
        reserve: int,
        device: torch.device,
        rows: Rows,
    ):
        self.side, self.plan, self.dim, self.batch, self.reserve, self.rows = side, plan, dim, batch, reserve, rows
        self.rule, self.codec = side.retention, side.codec
        self.codec.check(shape.heads, dim)
        dtype = shape.stored(plan.packs)
        specs = self.codec.layout(shape.heads, dim, dtype) if plan.packs else {}
        self.pool = Pool(specs, shape.heads, page, device, batch)
        self.pool.resize(plan.pool(0, batch, page, reserve) if plan.packs else 0)
        self.exact = Exact(batch, shape.heads, dim, plan.sinks, self.rule.most_pins, dtype, device)
        self.states = [State()] * batch  # replaced, never changed: layers share it
        # entries beyond a fixed range, without a slot; scales, offsets and outliers beyond fp16
        self.clipped = torch.zeros((), dtype=torch.long, device=device)

    @property
    def frontiers(self) -> list[int]:
        return [state.frontier for state in self.states]

    def target(self, row: int, length: int, prompt: bool, maps: SlotMap) -> tuple[int, int]:
        """What the rule decides at `length` tokens behind the sinks, and the frontier that follows from it."""
        state = self.states[row]
        floor = partial(maps.floor, granule=self.codec.granule)
        return self.side.target(state.decided, state.frontier, length, prompt, floor)

    def pack(
        self, rows: Sequence[int], decided: int, frontier: int, source: Tensor, maps: Sequence[SlotMap], settled: bool
    ) -> None:
        """Encode positions [current frontier, frontier) of rows in equal state, from source (R, H, T, D), once."""
        start = self.states[rows[0]].frontier
        if frontier > start:
            pieces = [slots.pieces(start, frontier) for slots in maps]
            self.grow(rows, [p[0][2] for p in pieces], [p[-1][2] + p[-1][1] - p[-1][0] for p in pieces])
            for piece in zip(*pieces, strict=True):
                part = source[:, :, piece[0][0] - start : piece[0][1] - start]
                self._encode(rows, part, [slot for _, _, slot in piece], self._at(rows, range(*piece[0][:2])))
        if self.rule.most_pins:
            wanted = [p for p in self.rule.pins(decided) if p < frontier]
            for i, row in enumerate(rows):
                self.exact.pin(row, wanted, start, source[i])
        states = list(self.states)
        for row in rows:
            states[row] = State(decided if settled else states[row].decided, frontier)
        self.states = states

    def grow(self, rows: Sequence[int], starts: Sequence[int], stops: Sequence[int]) -> None:
        need = self.pool.in_use
        for row, start, stop in zip(rows, starts, stops, strict=True):
            need += self.pool.missing(row, stop) + self.pool.shared_tail(row, start)
        if need > self.pool.capacity:
            self.pool.resize(self.plan.pool(need, self.batch, self.pool.page, self.reserve))
        for row, start, stop in zip(rows, starts, stops, strict=True):
            self.pool.extend(row, start, stop)

    def _at(self, rows: Sequence[int], positions: Sequence[int]) -> Tensor | None:
        """What tokens behind the sinks were rotated for, (R, n); None where the codec does not ask."""
        if self.codec.transform.fixed:
            return None
        tokens = torch.as_tensor(positions, device=self.pool.device) + self.plan.sinks
        return torch.stack([self.rows.positions(row, tokens) for row in rows])

    def _encode(self, rows: Sequence[int], source: Tensor, slots: Sequence[int], at: Tensor | None) -> None:
        granule, page = self.codec.granule, self.pool.page
        short = -source.shape[2] % granule
        if short:  # a closed group: its own last token fills it up and changes no range
            source = torch.cat([source, source[:, :, -1:].expand(-1, -1, short, -1)], dim=2)
            at = None if at is None else torch.cat([at, at[:, -1:].expand(-1, short)], dim=1)
        tokens = source.shape[2]
        straight = coder(Operation.PACK, self.codec.traits, self.pool.device)
        if straight is not None and at is None:
            self._encode_straight(straight, rows, source, slots)
            return
        step = max(page, TILE // (source.shape[0] * source.shape[1] * self.dim) // page * page)
        head = -slots[0] % page if len({slot % page for slot in slots}) == 1 else 0
        whole = head + max(0, tokens - head) // page * page
        cuts = sorted({0, min(head, tokens), *range(head + step, whole, step), min(whole, tokens), tokens})
        for a, b in pairwise(cuts):
            arrays = self.codec.encode(source[:, :, a:b], None if at is None else at[:, a:b])
            self.clipped += arrays.pop("clipped", 0)
            if source.dtype != torch.float16:  # whose own numbers all fit
                self.clipped += self.codec.saturated(arrays)
            self.pool.write(rows, [slot + a for slot in slots], arrays)

    def _encode_straight(self, pack: Callable, rows: Sequence[int], source: Tensor, slots: Sequence[int]) -> None:
        """One launch, from the values as they come into the pages."""
        pool, shape = self.pool, source.shape
        table = pool.table(self.plan.table(max(map(len, pool.tables)), pool.page, self.reserve))
        table = table if len(rows) == self.batch else table[list(rows)]
        starts = torch.tensor(slots, dtype=torch.int32, device=pool.device)
        constants = self.codec.constants(shape[1], pool.device)
        turn = self.codec.traits.hadamard
        pack(source, pool.arrays, table, starts, constants, pool.page, turn=turn, clipped=self.clipped)

    def crop(self, row: int, length: int, maps: SlotMap, slots: int) -> None:
        """Forget positions from `length` on; `slots` is the slot at which the packed stretch then ends."""
        decided, frontier = self.states[row]
        if frontier > length:
            self.pool.truncate(row, maps.slot(frontier), slots)
        self.states = list(self.states)
        self.states[row] = State(min(decided, length), min(frontier, length))
        self.exact.pins = list(self.exact.pins)
        self.exact.pins[row] = {p: s for p, s in self.exact.pins[row].items() if p < length}

    def decode(self, row: int, positions: Sequence[int], maps: SlotMap) -> Tensor:
        """Packed tokens of one row at some positions: (H, n, D), each group decoded once."""
        granule = self.codec.granule
        slots = [maps.slot_of(p) for p in positions]
        groups = sorted({slot // granule for slot in slots})
        place = {group: i * granule for i, group in enumerate(groups)}
        index = [place[slot // granule] + slot % granule for slot in slots]
        at = self._at([row], positions)
        if at is not None:  # what else is in these groups is decoded for some position, and left out
            at = at.new_zeros(len(groups) * granule).index_copy_(0, torch.tensor(index, device=at.device), at[0])
        decoded = self.codec.decode(self.pool.entries(row, groups, granule), at)
        run = range(index[0], index[0] + len(index))
        return decoded[:, run.start : run.stop] if index == list(run) else decoded[:, index]

    def fetch(self, row: int, positions: Sequence[int], maps: SlotMap) -> Tensor:
        """Any stored positions of one row, (H, n, D): exact where kept exact, otherwise decoded."""
        exact, frontier, pins = self.exact, self.states[row].frontier, self.exact.pins[row]
        if isinstance(positions, range) and not pins:  # the span between two frontiers, at every step: no indexing
            if positions.start >= frontier:
                return exact.get([row], positions.start, positions.stop)[0]
            if positions.stop <= frontier:
                return self.decode(row, positions, maps)
        wide = torch.promote_types(exact.ring.dtype, torch.float32)  # what is decoded is not rounded again
        out = exact.ring.new_empty(exact.ring.shape[1], len(positions), self.dim, dtype=wide)
        recent = [i for i, p in enumerate(positions) if p >= frontier]
        pinned = [i for i, p in enumerate(positions) if p < frontier and p in pins]
        packed = [i for i, p in enumerate(positions) if p < frontier and p not in pins]
        if recent:
            out[:, recent] = exact.ring[row][:, [positions[i] % exact.capacity for i in recent]].to(wide)
        if pinned:
            out[:, pinned] = exact.pinned[row][:, [pins[positions[i]] for i in pinned]].to(wide)
        if packed:
            out[:, packed] = self.decode(row, [positions[i] for i in packed], maps).to(out.dtype)
        return out

    def select(self, rows: Tensor, order: Sequence[int]) -> None:
        """Row i becomes what row rows[i] was; full pages stay where they are."""
        self.pool.select(order)
        self.exact.select(rows, order)
        self.states = [self.states[row] for row in order]
        self.batch = len(order)

    def to(self, device: torch.device) -> None:
        """Move the storage to another device."""
        self.pool.to(device)
        self.exact.to(device)
        self.clipped = self.clipped.to(device)
