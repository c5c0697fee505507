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
from kvist.kernels.numba.layout import KINDS, NO_WORDS, NOTHING, Kept, coder, kept, side, words
from kvist.kernels.numba.rotary import turns
from kvist.kernels.numba.attend import attend
from kvist.kernels.numba.write import store

SMALL = 1 << 19  # numbers of a layer that one thread reads before another has woken up
NO_LSE, WHOLE_ROWS = np.empty((0, 0, 0), np.float32), 1 << 40


class Own(threading.local):
    """Room of a thread that calls: a counter, and what pieces of work leave; grows with what is asked, not with steps."""

    def __init__(self) -> None:
        self.counter, self.done = np.zeros(1, np.int64), np.zeros(1, np.int64)
        self.work = np.empty((1, 0, 0), np.float32)

    def room(self, pieces: int, rows: int, width: int) -> None:
        self.counter[0] = 0
        if self.work.shape[0] < pieces or self.work.shape[1:] != (rows, width):
            self.work = np.empty((pieces, rows, width), np.float32)
        if len(self.done) < pieces:
            self.done = np.zeros(pieces, np.int64)
        else:
            self.done[:pieces] = 0


own = Own()


class Bound:
    """The storage of a layer, as long as it stays where it is. See `choose`: WHOLE."""

    def __init__(self, key: Traits, value: Traits, storage: Storage):
        stored, traits, self.page = storage.stored, (key, value), storage.page
        self.sides = tuple(side(t, s, self.page) for t, s in zip(traits, stored, strict=True))
        self.kept = tuple(map(kept, storage.exact))
        clipped = zip(traits, stored, storage.clipped, strict=True)
        self.coders = tuple(coder(t, s.constants, c) for t, s, c in clipped)
        self.turning = _turning(key, stored[0], self.page)
        _, self.heads, _, self.dim = storage.exact[0].ring.shape
        self.value_dim = storage.exact[1].ring.shape[3]

    def __deepcopy__(self, memo: dict) -> None:
        """A copy of a cache has storage of its own, and binds that."""

    def store(self, keys: Tensor, values: Tensor, write: Write) -> None:
        """Pack what is due, then keep new keys and values (B, H, M, D), which are of the exact tokens' type."""
        new = words(keys.contiguous()), words(values.contiguous())
        cast(Callable, store)(new, *self.sides, self.coders, self.kept, write, self.page)

    def attend(
        self, queries: Tensor, see: See, scale: float, softcap: float | None = None, sink: Tensor | None = None
    ) -> Tensor:
        """Attention of queries (B, Hq, M, D) over everything, (B, Hq, M, Dv) in their type."""
        batch, heads, many, _ = queries.shape
        out = torch.empty(batch, many, heads, self.value_dim, dtype=queries.dtype)
        logits = NOTHING if sink is None else sink.detach().float().numpy()
        numbers = scale, softcap or 0.0, self.page
        call = self.sides, self.kept, self.turning, see
        run(words(queries.contiguous()), KINDS[queries.dtype], numbers, call, logits, words(out), NO_LSE)
        return out.transpose(1, 2)


def attend_pages(
    key: Traits, value: Traits, q: Tensor, k: Stored, v: Stored, limits, skip, page, scale, softcap, origins
) -> Partial:
    """See `choose`: PAGES. key and value are their Traits."""
    (batch, heads, many, dim), sides = q.shape, (side(key, k, page), side(value, v, page))
    kv_heads, value_dim = sides[1].codes.shape[1], sides[1].codes.shape[-1] * 8 // value.bits
    rows = np.zeros((batch, 8), np.int64)
    rows[:, LIMIT], rows[:, ORIGIN] = limits, 0 if origins is None else origins
    none = np.zeros((0, 4), np.int64)
    see = See(
        rows, np.zeros((batch, many), np.int64), none, NO_SKIP if skip is None else skip.numpy(), none[None], sum(limits)
    )
    out, lse = torch.empty(batch, many, heads, value_dim), torch.empty(batch, heads, many)
    empty = tuple(Kept(*(np.empty((batch, kv_heads, 0, 2 * n), np.int16),) * 3, 0) for n in (dim, value_dim))
    plain = tuple(s._replace(turn=0) for s in sides)  # queries and output are in the space of the pages
    call = plain, empty, _turning(key, k, page), see
    run(words(q.contiguous()), KINDS[q.dtype], (scale, softcap or 0.0, page), call, NOTHING, words(out), lse.numpy())
    return Partial(out.transpose(1, 2), lse)


def _turning(key: Traits, stored: Stored, page: int) -> tuple[np.ndarray, np.ndarray]:
    """Frequencies and turns within a page, of keys that are packed before their rotary embedding."""
    constants = stored.constants
    frequencies = constants.frequencies.numpy() if key.rotary and constants.frequencies is not None else NOTHING
    return frequencies, _turns(frequencies.tobytes(), page, constants.scaling)


@lru_cache(64)
def _turns(frequencies: bytes, page: int, scaling: float) -> np.ndarray:
    return np.stack(turns(frequencies, page, scaling))


def run(q: np.ndarray, kind: int, numbers: tuple, call: tuple, sink: np.ndarray, out: np.ndarray, lse: np.ndarray) -> None:
    """One call where the work is small; otherwise all threads draw pieces until none is left: one that shares its core
    with somebody else draws fewer."""
    (key, value), held, turning, see = call
    (scale, softcap, page), heads = numbers, held[0].ring.shape[1]
    width = out.shape[3] // (2 if kind == 0 else 1)
    threads = torch.get_num_threads() if see.tokens * heads * width > SMALL else 1
    cells, length = heads * len(see.rows), WHOLE_ROWS
    pieces = cells
    if threads > 1:
        pages = see.rows[:, LIMIT].max() // page + 1
        if cells < 4 * threads or len(see.rows) > 1:
            length = max(4, int(pages * cells) // (8 * threads))
            pieces = int((np.maximum(1, -(-(-(-see.rows[:, LIMIT] // page)) // length))).sum()) * heads
    own.room(pieces, q.shape[1] // heads * q.shape[2] if pieces > cells else 0, width + 2)
    numbers = np.float32(scale), np.float32(softcap), page, length
    work = cast(Callable, attend)
    arguments = q, kind, numbers, key, value, held, turning, see, own.counter, own.work, own.done, sink, out, lse
    if threads == 1:
        work(*arguments)
        return
    others = [_threads(threads - 1).submit(work, *arguments) for _ in range(threads - 1)]
    work(*arguments)
    for other in others:
        other.result()


@cache
def _threads(count: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(count, thread_name_prefix="kvist")


NO_SKIP = np.zeros((1, 0), np.bool_)
