"""What a layer tells the kernel that does a whole decode step: its state as integers on the device.

The integers are known on the host, from which they go to the device once per step: layers whose state is the same share
one tensor.
"""

import torch
from torch import Tensor

from kvist.cache.store import Store
from kvist.cache.track import Track
from kvist.kernels.choose import choose
from kvist.kernels.contract import Constants, Exact, Operation, Stored

DUE, STATE = 6, 8  # numbers per row, for STORE and for `contract.Decode`
KEPT = 8  # states that are remembered: as many as a recipe has different layers, usually
BLOCK = 16  # query rows that share a counter


def on_device(store: Store, numbers: tuple[int, ...], width: int) -> Tensor:
    """Numbers as a tensor (n / width, width), int32; those of a layer in the same state are given again.

    Copied from pageable memory, which is read before the call returns, so that nobody waits for the device.
    """
    memo = store.rows.on_device
    if (numbers, width, store.device) not in memo:
        while len(memo) >= KEPT:
            memo.pop(next(iter(memo)))
        memo[numbers, width, store.device] = (
            torch.tensor(numbers, dtype=torch.int32).view(-1, width).to(store.device, non_blocking=True)
        )
    return memo[numbers, width, store.device]


def state(store: Store, origins: list[int]) -> Tensor:
    """See `contract.Decode`."""
    return on_device(store, tuple(states(store, origins)), STATE)


def states(store: Store, origins: list[int]) -> list[int]:
    """The numbers of all rows: see `contract.Decode`."""
    numbers = []
    for row, origin in enumerate(origins):
        frontiers = (track.states[row].frontier for track in store.tracks)
        numbers += [min(store.lengths[row], store.plan.sinks), *frontiers, store.behind(row), origin, 0, 0, 0]
    return numbers


def advance(store: Store) -> list[int]:
    """Move every row of a layer one token on: what STORE is to pack and where the token goes, as numbers.
    The host's side is then as if it were done: pages are taken, pins kept, frontiers moved."""
    due = []
    for row in range(store.batch_size):
        packs = [0] * 4 if store.settled else [n for track in store.tracks for n in _settle(store, track, row)]
        due += [store.behind(row), *packs, 0]
        store.lengths[row] += 1
    store.slots, store.updates, store.settled = store.slots + 1, store.updates + 1, False
    store.changed()
    return due


def _settle(store: Store, track: Track, row: int) -> tuple[int, int]:
    """What is packed of a row before its next token: first position and count."""
    state = track.states[row]
    start = state.frontier
    decided, frontier = store.due(track, row)
    if frontier > start:
        track.grow([row], [start], [frontier])
    if track.rule.most_pins and decided != state.decided:
        wanted = [p for p in track.rule.pins(decided) if p < frontier]
        track.exact.pin(row, wanted, start, track.exact.get([row], start, frontier)[0])
    state.decided, state.frontier = decided, frontier
    return start, frontier - start


Tables = tuple[Tensor, ...]


def write(store: Store, new: tuple[Tensor, Tensor]) -> bool:
    """Store one token per row, keys and values (B, H, 1, D), in one launch, which also packs what is due; False where
    no kernel does that."""
    if choose(Operation.STORE, store.request).run is None or not advanceable(store):
        return False
    store.fit(store.waiting() + 1)  # before frontiers move: what is packed now is read from the ring
    due = on_device(store, tuple(advance(store)), DUE)
    launch(store, new, tables(store), constants(store), due, (store.key.exact.capacity,) * 2)
    return True


def launch(
    store: Store, new: tuple[Tensor, Tensor], held: Tables, numbers: tuple[Constants, ...], due: Tensor,
    most: tuple[int, int],
) -> None:  # fmt: skip
    """The launch alone: STORE, over page tables `held`. most: tokens of each side that `due` may name."""
    run = choose(Operation.STORE, store.request).run
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
    """Whether one more token per row is a step of this kind: it goes into a ring, at its position's slot."""
    return store.plan.packs and min(store.lengths) >= store.plan.sinks and all(len(m.runs) == 1 for m in store.maps)


def exact(track: Track) -> Exact:
    """The exact tokens of a side, as they lie."""
    return Exact(track.exact.sinks, track.exact.ring, track.exact.pinned)


def pinned(store: Store) -> Tensor | None:
    """Positions that either side keeps exact though packed, (B, P, 4): see `contract.Decode`. None: never any."""
    if not store.plan.pinned:
        return None
    now = [pins for track in store.tracks for pins in track.exact.pins]
    seen, made = store.pinned
    old = made is None or made.device != store.device or len(seen) != len(now)
    if made is None or old or any(a is not b for a, b in zip(seen, now, strict=True)):
        made = _pinned(store).to(store.device, non_blocking=True)
        store.pinned = now, made  # dictionaries of pins are replaced, never changed
    return made


def _pinned(store: Store) -> Tensor:
    rows = []
    for row in range(store.batch_size):
        keys, values = (track.exact.pins[row] for track in store.tracks)
        rows.append([(p, keys.get(p, -1), values.get(p, -1), 0) for p in sorted(keys.keys() | values.keys())])
    most = sum(side.retention.most_pins for side in store.plan.sides)
    padded = [line + [(-1, -1, -1, 0)] * (most - len(line)) for line in rows]
    return torch.tensor(padded, dtype=torch.int32)


def counters(store: Store, q_heads: int, queries: int) -> Tensor:
    """Zeros that a launch leaves as zeros."""
    blocks = -(-(q_heads // store.shape.heads * queries) // BLOCK)
    wanted = store.batch_size * store.shape.heads * blocks
    if store.counters is None or store.counters.numel() < wanted or store.counters.device != store.device:
        store.counters = torch.zeros(wanted, dtype=torch.int32, device=store.device)
    return store.counters
