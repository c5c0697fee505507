"""Decode steps that the device drives: what a CUDA graph replays, and the numbers it is given before each replay.

Which tokens are packed when is integer arithmetic on the host (`retention`), and needs nothing from the device. So the
host plans a step ahead of the device, writes a few integers per row and layer, in one copy, into a tensor that the
kernels read, and the same launches serve every step. What a replay cannot do is done before it: room is made for all
steps at the start; new pages enter the tables; pins, which change once per window, are copied.
"""

from collections.abc import Sequence
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from kvist.cache import step
from kvist.cache.handle import Handle
from kvist.cache.rows import Rows
from kvist.cache.store import Store
from kvist.cache.track import Track
from kvist.kernels.choose import choose
from kvist.kernels.contract import Decode, Operation, Request, Stored


class Steps:
    """All layers of a cache, one token per row and call. rows: of that cache; room: tokens that may come."""

    @torch.inference_mode(False)  # what is stored must be writable outside inference mode, too
    @torch.no_grad()
    def __init__(self, layers: Sequence[Store], rows: Rows, room: int):
        self.rows, self.left, self.storing = rows, room, False
        for layer in layers:
            _check(layer)
        most = [_make_room(layer, room) for layer in layers]
        first = layers[0]
        width = first.batch_size * (step.DUE + step.STATE)
        self.numbers = torch.zeros(len(layers), width, dtype=torch.int32, device=first.device)
        self.layers = {id(layer): CapturedLayer(layer, self.numbers[i], most[i]) for i, layer in enumerate(layers)}
        self._send([layer.idle() for layer in self.layers.values()])

    def update(self, layer: Store, keys: Tensor, values: Tensor) -> tuple[Handle, Handle]:
        """What `layer` does with a step's keys and values."""
        if not self.storing or keys.shape[2] != 1:
            raise ValueError("decode steps of this cache are captured: take steps, or close() before other calls")
        return self.layers[id(layer)].update(keys, values)

    @torch.inference_mode(False)
    @torch.no_grad()
    def plan(self) -> None:
        """Move every layer's numbers one token on, and send them to the device."""
        if not self.left:
            raise ValueError("there is no room for another step; capture again with more tokens")
        self.left -= 1
        self.rows.extend(self.rows.batch, 1, None)
        self._send([layer.advance() for layer in self.layers.values()])

    def _send(self, numbers: list) -> None:
        """In one copy; from pageable memory, which is read before the call returns, so that nobody waits."""
        self.numbers.copy_(torch.tensor(numbers, dtype=torch.int32), non_blocking=True)


class CapturedLayer:
    """One layer whose storage stays where it is: pools, rings and tables that kernels address by numbers on the device.

    It is also the view that its handles read. `numbers` (B·14,) int32 is its part of what `Steps` sends.
    """

    def __init__(self, layer: Store, numbers: Tensor, most: tuple[int, int]):
        self.layer, self.most = layer, most
        self.due, self.state = (
            x.view(layer.batch_size, -1)
            for x in numbers.split_with_sizes([layer.batch_size * step.DUE, layer.batch_size * step.STATE])
        )
        self.dtype, self.device = layer.dtype, layer.device
        self.tables = tuple(table.clone() for table in step.tables(layer))
        self.constants = step.constants(layer)
        self._marks = layer.skip(), step.pinned(layer)  # what the layer said last
        self.skip, self.pinned = (None if x is None else x.clone() for x in self._marks)
        shifts = (layer.rows.shift(row) or 0 for row in range(layer.batch_size))
        self.origins = [shift + layer.plan.sinks for shift in shifts]
        self.counters: Tensor | None = None

    def shape(self, side: int) -> tuple[int, int, int, int]:
        shape = self.layer.shape
        return self.layer.batch_size, shape.heads, self.layer.slots, (shape.key_dim, shape.value_dim)[side]

    def dense(self, side: int) -> Tensor:
        raise RuntimeError("a captured step reads packed data only; attach the model (kvist.attach) before capturing")

    def advance(self) -> list[int]:
        """The numbers of the next step; host-side state moves on to what holds after it."""
        layer = self.layer
        before = [[(len(pages), pages[-1:]) for pages in track.pool.tables] for track in layer.tracks]
        move = step.advance(layer)
        for track, table, ends in zip(layer.tracks, self.tables, before, strict=True):
            for row, (pages, (length, last)) in enumerate(zip(track.pool.tables, ends, strict=True)):
                kept = length if last == pages[length - 1 : length] else length - 1  # a shared page became its own
                for index in range(kept, len(pages)):
                    table[row, index] = pages[index]
        self._mark()
        return move.due + step.states(move.after, self.origins)

    def idle(self) -> list[int]:
        """The numbers of a step that stores nothing."""
        nothing = [-1, *[0] * (step.DUE - 1)] * self.layer.batch_size
        return nothing + step.states(self.layer.stand, self.origins)

    def _mark(self) -> None:
        """Pins and the mask of slots that the packed read leaves out, where they changed."""
        if self.pinned is None:
            return
        skip, pinned = self.layer.skip(), step.pinned(self.layer)
        if skip is self._marks[0] and pinned is self._marks[1]:
            return
        assert self.skip is not None and skip is not None and pinned is not None
        self.skip.copy_(skip)
        self.pinned.copy_(pinned)
        self._marks = skip, pinned

    def update(self, keys: Tensor, values: Tensor) -> tuple[Handle, Handle]:
        """Store a step's keys and values (B, H, 1, D), pack what `advance` said; handles of what is stored then."""
        step.launch(self.layer, (keys, values), self.tables, self.constants, self.due, self.most)
        return Handle(self, 0), Handle(self, 1)

    def attend(self, query: Tensor, scale: float, *, mask=None, causal=True, softcap=None, sink=None) -> Tensor:
        """See `View.attend`; one query per row, which sees everything."""
        layer = self.layer
        group = query.shape[1] // layer.shape.heads
        request = replace(
            _request(layer), group=group, queries=query.shape[2], dtype=query.dtype, hidden=mask is not None
        )
        choice = choose(Operation.STEP, request)
        if choice.run is None:
            raise ValueError(f"this step cannot be captured: {'; '.join(choice.reasons)}")
        if self.counters is None:
            self.counters = step.counters(layer, query.shape[1], query.shape[2])
        call = Decode(self.state, self.counters, layer.page, scale, softcap, self.skip, self.pinned, sink)
        parts = zip(layer.tracks, self.tables, self.constants, strict=True)
        sides = (Stored(track.pool.arrays, table, constants) for track, table, constants in parts)
        return choice.run(query, *sides, *map(step.exact, layer.tracks), call)


def _request(layer: Store) -> Request:
    return replace(layer.request, batch=layer.batch_size, gaps=layer.stand.gaps)


def _check(layer: Store) -> None:
    """Refuse what only ordinary updates can do."""
    request = _request(layer)
    reasons = [reason for what in (Operation.STEP, Operation.STORE) for reason in choose(what, request).reasons]
    if not layer.plan.packs:
        reasons.append("a layer packs nothing")
    if min(layer.lengths) < layer.plan.sinks:
        reasons.append(f"a row holds fewer than its {layer.plan.sinks} sinks")
    if any(layer.rows.shift(row) is None for row in range(layer.batch_size)):
        reasons.append("a row's positions have gaps")
    if reasons:
        raise ValueError(f"decode steps of this cache cannot be captured: {'; '.join(dict.fromkeys(reasons))}")


def _ahead(track: Track, layer: Store, row: int, room: int) -> tuple[int, int, int]:
    """The frontier of a row after `room` more tokens, the most that wait on the way, and the most packed at once."""
    state, length = track.states[row], layer.behind(row)
    decided, frontier, waiting, packed = state.decided, state.frontier, 0, 0
    for n in range(length + layer.settled, length + room + 1):  # a rule may not be asked twice at one length
        floor = partial(layer.maps[row].floor, granule=track.codec.granule)
        prompt = layer.updates == 1 and n == length
        decided, new = track.side.target(decided, frontier, n, prompt, floor)
        waiting = max(waiting, n + 1 - frontier)  # what is packed is read from the ring in the launch that adds a token
        frontier, packed = new, max(packed, new - frontier)
    return frontier, waiting, packed


def _make_room(layer: Store, room: int) -> tuple[int, int]:
    """Pools, page tables and rings that `room` more tokens do not outgrow; the most tokens that a step packs of keys
    and of values."""
    rows, ahead = range(layer.batch_size), []
    for track in layer.tracks:
        found = [_ahead(track, layer, row, room) for row in rows]
        ahead.append(found)
        more = sum(track.pool.missing(row, frontier) for row, (frontier, _, _) in zip(rows, found, strict=True))
        shared = sum(track.pool.shared_tail(row, track.states[row].frontier) for row in rows)
        track.pool.resize(track.pool.in_use + more + shared)
    layer.reserve = max(layer.reserve, max(layer.lengths) + room)
    layer.fit(max(waiting for found in ahead for _, waiting, _ in found))
    keys, values = (max(packed for _, _, packed in found) for found in ahead)
    return keys, values
