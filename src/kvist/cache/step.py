"""Steps of a layer by kernels: up to 32 new tokens per row are stored, and what is due is packed, in one call.

What is done is decided by `schedule`, once for all layers in the same state; here it is done to one of them. On a CPU
the kernel knows the layer's storage (`Operation.WHOLE`); on a GPU it is told where everything lies (`STORE`).
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from kvist.cache.schedule import Move, Stand
from kvist.cache.store import Store
from kvist.cache.track import Track
from kvist.kernels.choose import Choice, choose
from kvist.kernels.contract import Constants, Exact, Operation, Storage, Stored

DUE, STATE = 6, 8  # numbers per row, for STORE and for `contract.Decode`
BLOCK = 16  # query rows that share a counter
Tables = tuple[Tensor, ...]


def take(store: Store, move: Move, keys: Tensor, values: Tensor) -> bool:
    """Store new keys and values (B, H, M, D), of at most `HOLD` slots, by a kernel; False where none does that."""
    if store.whole is None:
        store.whole = store.device.type == "cpu" and chosen(store, Operation.WHOLE, ()).run is not None
    if not store.whole:
        return _launched(store, move, (keys, values))
    if keys.dtype != store.key.exact.ring.dtype:
        keys, values = store.kept(keys, values)
    (least, roomy), capacity = move.rings.get(store.reserve) or move.ring(store.reserve), store.key.exact.ring.shape[2]
    if least > capacity or (not store.bounded and 2 * roomy <= capacity):
        store.fit(move.room, shrink=True)
    if move.packs:
        take_pages(store, move)
    key, value = store.key, store.value
    if store.bound is None or store.bound[0] != key.pool.moved + value.pool.moved + key.exact.moved + value.exact.moved:
        bind(store)
    store.bound[1].store(keys, values, move.write)  # pyright: ignore[reportOptionalSubscript]
    store.moved_on(move)
    return True


def _launched(store: Store, move: Move, new: tuple[Tensor, Tensor]) -> bool:
    """By STORE, which takes one token per row, at its position's slot."""
    if chosen(store, Operation.STORE, ()).run is None or move.slots > 1:
        return False
    if not advanceable(store) or not all(move.counts):
        return False
    new = store.kept(*new)
    store.fit(store.stand.waiting + 1)  # what is packed is read from the ring in the same launch
    take_pages(store, move)
    keep_pins(store, move)
    most = (store.key.exact.capacity,) * 2
    launch(store, new, tables(store), constants(store), move.on(store.device), most)
    store.moved_on(move)
    return True


def take_pages(store: Store, move: Move) -> None:
    """Pages for what is due."""
    for track, settled in zip((store.key, store.value), move.settled, strict=True):
        pool = track.pool
        for row, _, count, slot in settled.pieces:  # few steps need new ones
            pages = pool.tables[row]
            if slot + count > len(pages) * pool.page or (slot % pool.page and pool.refs[pages[slot // pool.page]] > 1):
                track.grow([row], [slot], [slot + count])


def keep_pins(store: Store, move: Move) -> None:
    """Copy from the rings what is to be kept exact, before it is packed."""
    for track, settled in zip(store.tracks, move.settled, strict=True):
        if settled.copies:
            rows, positions, slots = torch.tensor(settled.copies, device=store.device).T
            exact = track.exact
            exact.pinned[rows, :, slots] = exact.ring[rows, :, positions % exact.capacity]


def chosen(store: Store, operation: Operation, said: tuple) -> Choice:
    """What serves an operation on a layer; `said`: pairs of fields of the request that a call knows. Remembered, as
    asking costs more than answering."""
    asked = operation, said
    if asked not in store.choices:
        store.choices[asked] = choose(operation, replace(store.request, **dict(said)))
    return store.choices[asked]


def bind(store: Store) -> None:
    """What takes a layer's steps on a CPU, made anew where storage moved; see `choose`: WHOLE."""
    run = chosen(store, Operation.WHOLE, ()).run
    assert run is not None  # whoever asks for it asked before
    key, value = store.tracks
    parts = stored(store), (exact(key), exact(value)), (key.clipped, value.clipped)
    made = run(Storage(*parts, store.page))
    store.bound = key.pool.moved + value.pool.moved + key.exact.moved + value.exact.moved, made


def state(store: Store, origins: list[int]) -> Tensor:
    """See `contract.Decode`; layers in the same state share it."""
    return store.rows.share((store.stand, tuple(origins), store.device), lambda: _state(store, origins))


def _state(store: Store, origins: list[int]) -> Tensor:
    # from pageable memory, which is read before the call returns, so that nobody waits for the device
    numbers = torch.tensor(states(store.stand, origins), dtype=torch.int32).view(-1, STATE)
    return numbers.to(store.device, non_blocking=True)


def states(stand: Stand, origins: list[int]) -> list[int]:
    """The numbers of all rows: see `contract.Decode`."""
    numbers = []
    for row, origin in enumerate(origins):
        frontiers = (side[row].frontier for side in stand.states)
        numbers += [min(stand.lengths[row], stand.plan.sinks), *frontiers, stand.behind(row), origin, 0, 0, 0]
    return numbers


def advance(store: Store) -> Move:
    """Move the host's side of a layer on by one token per row, which were announced, as if STORE were done: pages are
    taken, pins kept, frontiers moved."""
    move = store.stand.move(1)
    take_pages(store, move)
    keep_pins(store, move)
    store.moved_on(move)
    return move


def launch(
    store: Store, new: tuple[Tensor, Tensor], held: Tables, numbers: tuple[Constants, ...], due: Tensor,
    most: tuple[int, int],
) -> None:  # fmt: skip
    """The launch alone: STORE, over page tables `held`. most: tokens of each side that `due` may name."""
    run = chosen(store, Operation.STORE, ()).run
    assert run is not None  # whoever plans a step asked before
    rings = tuple(track.exact.ring for track in store.tracks)
    pools = tuple(track.pool.arrays for track in store.tracks)
    clipped = tuple(track.clipped for track in store.tracks)
    run(*new, rings, pools, held, numbers, due, store.page, most, clipped)


def tables(store: Store) -> Tables:
    """The page tables (block tables) of both sides, (B, width) int32."""
    return tuple(track.pool.table(store.table_width(track)) for track in store.tracks)


def constants(store: Store) -> tuple[Constants, ...]:
    """Numbers of both sides that are the same for all tokens."""
    return tuple(track.codec.constants(store.shape.heads, store.device) for track in store.tracks)


def stored(store: Store) -> tuple[Stored, ...]:
    """The packed pages of both sides, as kernels read them."""
    sides = zip(store.tracks, tables(store), constants(store), strict=True)
    return tuple(Stored(track.pool.arrays, table, numbers) for track, table, numbers in sides)


def advanceable(store: Store) -> bool:
    """Whether one more token per row is a step that STORE can do: it goes into a ring, at its position's slot."""
    return store.plan.packs and min(store.lengths) >= store.plan.sinks and not store.stand.gaps


def exact(track: Track) -> Exact:
    """The exact tokens of a side, as they lie."""
    return Exact(track.exact.sinks, track.exact.ring, track.exact.pinned)


def pinned(store: Store) -> Tensor | None:
    """Positions that either side keeps exact though packed, (B, P, 4): see `contract.Decode`. None: never any."""
    if not store.plan.pinned:
        return None
    return store.apart("pinned", _pinned)


def _pinned(store: Store) -> Tensor:
    most = sum(side.retention.most_pins for side in store.plan.sides)
    lines = [[(*line[:3], 0) for line in row] + [(-1, -1, -1, 0)] * (most - len(row)) for row in store.stand.pinned]
    return torch.tensor(lines, dtype=torch.int32)


def counters(store: Store, q_heads: int, queries: int) -> Tensor:
    """Zeros that a launch leaves as zeros."""
    blocks = -(-(q_heads // store.shape.heads * queries) // BLOCK)
    wanted = store.batch_size * store.shape.heads * blocks
    if store.counters is None or store.counters.numel() < wanted or store.counters.device != store.device:
        store.counters = torch.zeros(wanted, dtype=torch.int32, device=store.device)
    return store.counters
