"""A layer whose storage the compiled loops know: steps of it take one call to store and one to attend."""

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import cache, lru_cache
from typing import cast

import numpy as np
import torch
from torch import Tensor

from kvist.kernels.contract import LIMIT, ORIGIN, Partial, See, Storage, Stored, Traits, Write
from kvist.kernels.numba.attend import attend
from kvist.kernels.numba.layout import EACH, HEADS, KINDS, NOTHING, SIDE, Kept, coder, flat, kept, side
from kvist.kernels.numba.rotary import turns
from kvist.kernels.numba.write import spread, store

compiled_attend, compiled_store = cast(Callable, attend), cast(Callable, store)
SMALL = 1 << 19  # numbers of a layer that one thread reads before another has woken up
NO_LSE, WHOLE_ROWS = np.empty((0, 0, 0), np.float32), 1 << 40


class Own(threading.local):
    """Room of a calling thread: a counter, and what pieces of work leave; it grows with what is asked alone."""

    def __init__(self) -> None:
        self.counter, self.done = np.zeros(1, np.int64), np.zeros(1, np.int64)
        self.work = np.empty((1, 0, 0), np.float32)
        self.alone = self.counter, self.done, self.work

    def room(self, pieces: int, rows: int, width: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        self.counter[0] = 0
        if self.work.shape[0] < pieces or self.work.shape[1:] != (rows, width):
            self.work = np.empty((pieces, rows, width), np.float32)
        if len(self.done) < pieces:
            self.done = np.zeros(pieces, np.int64)
        else:
            self.done[:pieces] = 0
        return self.counter, self.done, self.work


own = Own()


class Bound:
    """The storage of a layer, as long as it stays where it is. See `choose`: WHOLE."""

    def __init__(self, key: Traits, value: Traits, storage: Storage):
        stored, traits, self.page = storage.stored, (key, value), storage.page
        self.parts = [
            part
            for t, s, e, c in zip(traits, stored, storage.exact, storage.clipped, strict=True)
            for part in (side(t, s, self.page), kept(e), coder(t, s.constants, c))
        ]
        self.flat = flat(*self.parts)
        self.turning = _turning(key, stored[0], self.page)
        _, self.heads, _, self.dim = storage.exact[0].ring.shape
        self.value_dim = storage.exact[1].ring.shape[3]
        self.width = self.heads * self.value_dim

    def store(self, keys: Tensor, values: Tensor, write: Write) -> None:
        """Pack what is due, then keep new keys and values (B, H, M, D), which are of the exact tokens' type."""
        keys, values = keys.contiguous(), values.contiguous()
        compiled_store(keys.data_ptr(), values.data_ptr(), keys.shape[2], self.flat, write, self.page)

    def spread(self, ring: Tensor, side: int, runs: np.ndarray, slots: int) -> Tensor:
        """All keys (side 0) or values of a layer that packs nothing, (B, H, slots, D), zeros where no token is; `ring`:
        where they lie, tokens of each row in their order; runs: see `numba.write.spread`."""
        out = torch.empty((*ring.shape[:2], slots, ring.shape[3]), dtype=ring.dtype)
        cast(Callable, spread)(self.flat[side * EACH : (side + 1) * EACH], runs, slots, out.data_ptr())
        return out

    def attend(
        self, queries: Tensor, see: See, scale: float, softcap: float | None = None, sink: Tensor | None = None
    ) -> Tensor:
        """Attention of queries (B, Hq, M, D) over everything, (B, Hq, M, Dv) in their type."""
        batch, heads, many, _ = queries.shape
        out = torch.empty((batch, many, heads, self.value_dim), dtype=queries.dtype)
        logits = NOTHING if sink is None else sink.detach().float().numpy()
        call = self.flat, self.turning, see, logits, NO_LSE
        queries, numbers = queries.contiguous(), (float(scale), float(softcap or 0.0), self.page)
        if see.tokens * self.width > SMALL:
            spread_out(queries, numbers, call, out)
        else:
            alone(queries, numbers, call, out)
        return out.transpose(1, 2)


def attend_pages(
    key: Traits, value: Traits, q: Tensor, k: Stored, v: Stored, limits, skip, page, scale, softcap, origins
) -> Partial:
    """See `choose`: PAGES. key and value are their Traits."""
    (batch, heads, many, dim), sides = q.shape, (side(key, k, page), side(value, v, page))
    kv_heads, value_dim = sides[1].codes.shape[1], sides[1].codes.shape[-1] * 8 // value.bits
    rows = np.zeros((batch, 8), np.int64)
    rows[:, LIMIT], rows[:, ORIGIN] = limits, 0 if origins is None else origins
    none, hidden = np.zeros((0, 4), np.int64), NO_SKIP if skip is None else skip.numpy()
    see = See(rows, np.zeros((batch, many), np.int64), none, hidden, none[None], sum(limits))
    out, lse = torch.empty(batch, many, heads, value_dim), torch.empty(batch, heads, many)
    empty = tuple(Kept(*(np.empty((batch, kv_heads, 0, 2 * n), np.int16),) * 3, 0) for n in (dim, value_dim))
    blank = coder(key, k.constants, torch.zeros((), dtype=torch.long))
    # queries and output are in the space of the pages: nothing is to be rotated
    parts = [part for s, e in zip(sides, empty, strict=True) for part in (s._replace(turn=0), e, blank)]
    call = flat(*parts), _turning(key, k, page), see, NOTHING, lse.numpy()
    spread_out(q.contiguous(), (float(scale), float(softcap or 0.0), page), call, out)
    return Partial(out.transpose(1, 2), lse)


def _turning(key: Traits, stored: Stored, page: int) -> tuple[np.ndarray, np.ndarray]:
    """Frequencies and turns within a page, of keys that are packed before their rotary embedding."""
    constants = stored.constants
    frequencies = constants.frequencies.numpy() if key.rotary and constants.frequencies is not None else NOTHING
    return frequencies, _turns(frequencies.tobytes(), page, constants.scaling)


@lru_cache(64)
def _turns(frequencies: bytes, page: int, scaling: float) -> np.ndarray:
    return np.stack(turns(frequencies, page, scaling))


def alone(q: Tensor, numbers: tuple[float, float, int], call: tuple, out: Tensor) -> None:
    """One call, which does all. numbers: scale, soft cap, page; call: see `numba.attend.attend`."""
    (addresses, turning, see, sink, lse), shape, room = call, (q.shape[1], q.shape[2], KINDS[q.dtype]), own.alone
    room[0][0], size = 0, (*numbers, WHOLE_ROWS)
    compiled_attend(q.data_ptr(), shape, size, addresses, turning, see, room, sink, out.data_ptr(), lse)


def spread_out(q: Tensor, numbers: tuple[float, float, int], call: tuple, out: Tensor) -> None:
    """The same by all threads, which draw pieces until none is left: one that shares its core with somebody else draws
    fewer."""
    if (threads := torch.get_num_threads()) == 1:
        return alone(q, numbers, call, out)
    (addresses, turning, see, sink, lse), shape = call, (q.shape[1], q.shape[2], KINDS[q.dtype])
    heads, limits, page = int(addresses[SIDE + HEADS]), see.rows[:, LIMIT], numbers[2]
    pages = -(-limits // page)
    length = max(4, int(pages.sum()) * heads // (8 * threads))
    pieces = int(np.maximum(1, -(-pages // length)).sum()) * heads
    room = own.room(pieces, shape[0] // heads * shape[1], out.shape[3] + 2)
    size = *numbers, length
    arguments = q.data_ptr(), shape, size, addresses, turning, see, room, sink, out.data_ptr(), lse
    others = [_threads(threads - 1).submit(compiled_attend, *arguments) for _ in range(threads - 1)]
    compiled_attend(*arguments)
    for other in others:
        other.result()


@cache
def _threads(count: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(count, thread_name_prefix="kvist")


NO_SKIP = np.zeros((1, 0), np.bool_)
