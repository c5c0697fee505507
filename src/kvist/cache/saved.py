"""What a saved cache says of itself, and what must be true of it before a kernel trusts it.

Kernels read pages, rings and tables without asking whether a page is there. So every number in a file's header is held
against the rules that made it: a row's frontier against its length, its pages against its frontier, every array against
the shape that follows from all of these; and what arrays hold is finite, in the range that it indexes.
"""

from collections.abc import Sequence
from itertools import pairwise
from typing import Annotated, Any, Literal

import torch
from pydantic import Field, StrictBool
from torch import Tensor

from kvist.cache.rows import Run, SlotMap
from kvist.cache.store import Store
from kvist.cache.track import Track
from kvist.plan import Recipe, Side
from kvist.types import MOST_TOKENS, Geometry, Part, Size

Count = Annotated[int, Field(strict=True, ge=0, lt=1 << 31)]
Slots = Annotated[int, Field(strict=True, ge=0, le=MOST_TOKENS)]  # padding among them
Pairs = tuple[tuple[Count, Count], ...]
Shapes = dict[str, tuple[tuple[int, ...], torch.dtype]]


class SavedTrack(Part):
    """One side of one layer, per row: what its rule decided and its frontier, its pages, its pins as (position,
    place). capacity: of the ring; clipped: see the report."""

    states: Pairs
    tables: tuple[tuple[Count, ...], ...]
    pins: tuple[Pairs, ...]
    capacity: Count
    clipped: Annotated[int, Field(strict=True, ge=0, lt=1 << 62)]


class SavedLayer(Part):
    """A layer of kvist. shape: heads, sizes of key and value, type of exact tokens; per row: its length, and its slot
    map as (position, slot)."""

    shape: tuple[Size, Size, Size, Literal["float32", "float16", "bfloat16", "float64"]]
    slots: Slots
    updates: Count
    settled: StrictBool
    lengths: tuple[Count, ...] = Field(min_length=1)
    maps: tuple[Pairs, ...]
    tracks: tuple[SavedTrack, SavedTrack]

    @property
    def geometry(self) -> Geometry:
        heads, key_dim, value_dim, dtype = self.shape
        return Geometry(heads, key_dim, value_dim, getattr(torch, dtype))


class Header(Part):
    """A saved cache. Layers are `SavedLayer`s as plain data, {"empty": true}, or what other layers wrote."""

    format: Literal[3]
    model: str
    weights: str
    recipe: Recipe
    reserve: Annotated[int, Field(strict=True, ge=0, le=MOST_TOKENS)]
    slots: Slots
    runs: tuple[tuple[tuple[Count, Count, Count, Count], ...], ...]
    layers: tuple[dict[str, Any], ...]

    def rows(self) -> list[list[Run]]:
        """The runs of every row: ascending, without gaps between tokens, within the slots. Raises ValueError."""
        found = [[Run(*run) for run in runs] for runs in self.runs]
        for row, runs in enumerate(found):
            token = slot = 0
            for run in runs:
                if run.token != token or run.slot < slot or not run.count:
                    raise ValueError(f"row {row} has tokens that do not follow each other")
                token, slot = token + run.count, run.slot + run.count
            if slot > self.slots:
                raise ValueError(f"row {row} has tokens behind its {self.slots} slots")
        return found


def check(store: Store, saved: SavedLayer) -> Shapes:
    """Hold a saved layer against an empty one of the same recipe, whose rows are known; returns the arrays that must be
    in the file, by name. Raises ValueError."""
    batch = len(saved.lengths)
    per_row = [saved.maps, *(x for t in saved.tracks for x in (t.states, t.tables, t.pins))]
    if any(len(rows) != batch for rows in per_row) or batch != store.rows.batch:
        raise ValueError(f"its parts are of different numbers of rows, {store.rows.batch} were stored")
    for row, length in enumerate(saved.lengths):
        if saved.slots != store.rows.slots or length != store.rows.tokens(row, saved.slots):
            raise ValueError(f"row {row} has {length} tokens in {saved.slots} slots, which is not what was stored")
        _check_map(saved.maps[row], max(0, length - store.plan.sinks), store.plan.granule, row)
    behind = [max(0, length - store.plan.sinks) for length in saved.lengths]
    frontiers = [[frontier for _, frontier in track.states] for track in saved.tracks]
    for side, track in zip(store.plan.sides, saved.tracks, strict=True):
        _check_rows(side, store, saved, track, behind)
    waiting = max(n - min(pair) for n, *pair in zip(behind, *frontiers, strict=True))
    sizes = {track.capacity for track in saved.tracks}
    bound = store.plan.ring(0, store.reserve) if _windowed(store) else None
    if len(sizes) > 1 or min(sizes) < waiting or (bound is not None and sizes != {bound}):
        raise ValueError(f"rings of {sorted(sizes)} tokens do not hold the {waiting} that wait")
    return _arrays(store, saved, behind)


def capacity(store: Store, saved: SavedLayer, waiting: int) -> int:
    """Tokens of each ring: those of the file, but not more than the next update would keep of it."""
    most = 2 * store.plan.ring(waiting, store.reserve)
    return saved.tracks[0].capacity if _windowed(store) else min(saved.tracks[0].capacity, most)


def check_numbers(track: Track, tensors: dict[str, Tensor]) -> None:
    """Every number of a track's arrays is finite, and what says a place among others is one of them. Raises
    ValueError."""
    for name, x in tensors.items():
        if x.is_floating_point() and not x.isfinite().all():
            raise ValueError(f"{name} has numbers that are not finite")
    if "pages.channel" in tensors:
        channel, ends = tensors["pages.channel"], tensors["pages.ends"].int()
        if channel.numel() and not (0 <= int(channel.min()) <= int(channel.max()) < track.dim):
            raise ValueError(f"outliers lie beyond the {track.dim} channels of a head")
        slots = channel.shape[-1]
        if ends.numel() and ((ends.diff(dim=-1) < 0).any() or (ends > slots).any()):
            raise ValueError(f"outliers of the heads are not in order among {slots} slots")


def held(track: Track, maps: Sequence[SlotMap], pages: Sequence[int]) -> Tensor:
    """Which slots of some pages hold tokens, or fill up their group: (pages, tokens of a page), bool."""
    pool, granule = track.pool, track.codec.granule
    order, mask = {page: i for i, page in enumerate(pages)}, torch.zeros(len(pages), pool.page, dtype=torch.bool)
    for row, state in enumerate(track.states):
        flags = torch.zeros(len(pool.tables[row]) * pool.page, dtype=torch.bool)
        for start, stop, slot in maps[row].pieces(0, state.frontier):
            flags[slot : slot + -(-(stop - start) // granule) * granule] = True
        if len(flags):
            mask[[order[page] for page in pool.tables[row]]] |= flags.view(-1, pool.page)
    return mask


def _windowed(store: Store) -> bool:
    return all(side.window() is not None for side in store.plan.sides)


def _check_map(runs: Pairs, behind: int, granule: int, row: int) -> None:
    """A row's slots: they start at 0, and a new group starts only where a crop cut one."""
    for (start, slot), (after, next_slot) in pairwise(runs):
        end = slot + after - start
        if after <= start or not end % granule or next_slot != -(-end // granule) * granule:
            raise ValueError(f"row {row} has slots that do not follow each other")
    if not runs or runs[0] != (0, 0) or runs[-1][0] > behind:
        raise ValueError(f"row {row} has slots for tokens that it does not hold")


def _check_rows(side: Side, store: Store, saved: SavedLayer, track: SavedTrack, behind: list[int]) -> None:
    most = side.retention.most_pins
    for row, ((decided, frontier), table, pins) in enumerate(zip(track.states, track.tables, track.pins, strict=True)):
        maps = SlotMap(saved.maps[row])
        ends_group = frontier == 0 or maps.floor(frontier, side.codec.granule) == frontier
        if max(decided, frontier) > behind[row] or not ends_group or (frontier and not store.plan.packs):
            raise ValueError(f"row {row} of {behind[row]} tokens cannot be packed up to {frontier}")
        if len(table) != -(-maps.slot(frontier) // store.page) or len(set(table)) != len(table):
            raise ValueError(f"row {row} has {len(table)} pages for {frontier} packed tokens")
        positions, places = [p for p, _ in pins], [place for _, place in pins]
        twice = len(set(places)) != len(places) or any(a >= b for a, b in pairwise(positions))
        if twice or any(p >= frontier for p in positions) or any(place >= most for place in places):
            raise ValueError(f"row {row} keeps tokens exact that are not packed, or has no room for them")
    used = {page for table in track.tables for page in table}
    if used != set(range(len(used))):
        raise ValueError(f"its {len(used)} pages are not numbered one by one")


def _arrays(store: Store, saved: SavedLayer, behind: list[int]) -> Shapes:
    shape, batch, plan = saved.geometry, len(saved.lengths), store.plan
    found: Shapes = {}
    for name, side, track, dim in zip(
        ("key.", "value."), plan.sides, saved.tracks, (shape.key_dim, shape.value_dim), strict=True
    ):
        waiting = max(n - frontier for n, (_, frontier) in zip(behind, track.states, strict=True))
        counts = {"sinks": plan.sinks, "pinned": side.retention.most_pins, "ring": waiting}
        found |= {name + kind: ((batch, shape.heads, n, dim), shape.dtype) for kind, n in counts.items()}
        pages = len({page for table in track.tables for page in table})
        specs = side.codec.layout(shape.heads, dim, shape.dtype) if plan.packs else {}
        for array, spec in specs.items():
            found[f"{name}pages.{array}"] = ((pages, *spec.page_shape(shape.heads, store.page)), spec.dtype)
    return found
