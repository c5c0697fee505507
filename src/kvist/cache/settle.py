"""What may be packed of one side, row by row: whole numbers only, by the retention rules."""

from collections.abc import Sequence
from functools import partial
from typing import NamedTuple

from kvist.cache.rows import SlotMap
from kvist.plan import Side

Pins = dict[int, int]  # positions of a row that are kept exact though packed, and their slots


class State(NamedTuple):
    """One row of one side. decided: what the retention rule said, before the last update; frontier: what is packed."""

    decided: int = 0
    frontier: int = 0


class Piece(NamedTuple):
    """Tokens of a row that are packed together: first position, how many, the page slot of the first."""

    row: int
    position: int
    count: int
    slot: int


class Settled(NamedTuple):
    """What settling does to one side: states and pins of all rows after it, pieces to pack, and what is copied to be
    kept exact: (row, position, slot among the pinned)."""

    states: list[State]
    pins: list[Pins]
    pieces: list[Piece]
    copies: list[tuple[int, int, int]]


def pin(have: Pins, wanted: Sequence[int], start: int, stop: int, room: int) -> tuple[Pins, Pins]:
    """The pins of a row when just `wanted` are kept, of those it has and positions [start, stop) that are being packed;
    and those among them that are new."""
    kept = {p: have[p] for p in wanted if p in have}
    fresh = [p for p in wanted if p not in kept and start <= p < stop]
    if fresh:
        used = set(kept.values())
        new = dict(zip(fresh, (slot for slot in range(room) if slot not in used), strict=False))
        return dict(sorted((kept | new).items())), new
    return kept, {}


def settle(
    side: Side, states: list[State], pins: list[Pins], behind: list[int], maps: list[SlotMap], prompt: bool
) -> Settled:
    """What the rules allow to be packed now of one side, at lengths `behind` the sinks."""
    after = Settled([], [], [], [])
    for row, (state, have, slots) in enumerate(zip(states, pins, maps, strict=True)):
        floor = partial(slots.floor, granule=side.codec.granule)
        new = State(*side.target(state.decided, state.frontier, behind[row], prompt, floor))
        if new.frontier > state.frontier:
            pieces = slots.pieces(state.frontier, new.frontier)
            after.pieces.extend(Piece(row, a, b - a, slot) for a, b, slot in pieces)
        if side.retention.most_pins:
            wanted = [p for p in side.retention.pins(new.decided) if p < new.frontier]
            kept, fresh = pin(have, wanted, state.frontier, new.frontier, side.retention.most_pins)
            after.copies.extend((row, position, slot) for position, slot in fresh.items())
            have = have if kept == have else kept
        after.states.append(new)
        after.pins.append(have)
    same = all(a is b for a, b in zip(after.pins, pins, strict=True))
    return after._replace(pins=pins) if same else after
