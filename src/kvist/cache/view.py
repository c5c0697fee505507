"""What attention sees of a layer at one update: packed pages, loose exact tokens, and perhaps the chunk just given.

A view lives as long as the layer's forward pass. It reads pages tile by tile, so that what it allocates does not grow
with the context; only `dense`, the way for strangers, builds the whole tensor.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from kvist.cache import step
from kvist.cache.handle import Undifferentiated
from kvist.cache.loose import Loose, loose
from kvist.cache.schedule import Move
from kvist.cache.store import Store
from kvist.cache.visible import QUERIES, Look, attend_tiled
from kvist.kernels.choose import choose
from kvist.kernels.contract import Decode, Operation, Partial, Request
from kvist.kernels.reference.attend import merge

CPU_TILE, GPU_TILE = 1 << 15, 1 << 22  # elements per side decoded at a time in a decode step
PROMPT_TILE = 1 << 18


class View:
    """See the module. move: the step that has just been taken by a kernel, if it was."""

    def __init__(self, store: Store, chunk: tuple[Tensor, Tensor] | None, slots: int, move: Move | None = None):
        self.store, self.chunk, self.slots, self.move = store, chunk, slots, move
        self.rows, self.dtype, self.device = store.rows, store.dtype, store.device
        self.stand = move.after if move else store.stand
        self._loose: list[Loose] | None = None
        self._version = store.version
        if chunk:  # the append that follows writes into the rings
            self._skip = store.skip()
            self._loose = [Loose(*(x.clone() for x in part)) for part in loose(store)]
            self._version += 1

    @property
    def past(self) -> int:
        """Slots before the chunk."""
        return self.slots - (self.chunk[0].shape[2] if self.chunk else 0)

    @property
    def lengths(self) -> list[int]:
        return self.stand.lengths

    @property
    def limits(self) -> list[int]:
        """Per row, the packed slots that both sides have."""
        return self.stand.limits

    @property
    def skip(self) -> Tensor | None:
        return self._skip if self.chunk else self.store.skip()

    @classmethod
    def before(cls, store: Store, keys: Tensor, values: Tensor) -> View:
        """The layer as it is, and a chunk that is about to be appended and is to be seen exact."""
        return cls(store, (keys, values), store.slots + keys.shape[2])

    @classmethod
    def after(cls, store: Store) -> View:
        """The layer as it is stored."""
        return cls(store, None, store.slots)

    def shape(self, side: int) -> tuple[int, int, int, int]:
        shape = self.store.shape
        return len(self.stand.lengths), shape.heads, self.slots, shape.value_dim if side else shape.key_dim

    def _check(self) -> None:
        if self._version != self.store.version:
            raise RuntimeError("this view of the cache is out of date: the cache was changed after it was handed out")

    @property
    def loose(self) -> list[Loose]:
        self._check()
        if self._loose is None:
            self._loose = loose(self.store)
        return self._loose

    def attend(
        self,
        query: Tensor,
        scale: float,
        *,
        mask: Tensor | None = None,
        causal: bool = True,
        softcap: float | None = None,
        sink: Tensor | None = None,
    ) -> Tensor:
        """Attention of queries (B, Hq, M, D) over everything, (B, Hq, M, D) in the query's type.

        `causal`: the queries are the last M slots. Otherwise `mask`, bool or additive, broadcast to
        (B, 1 or Hq, M, slots), says what is visible; None is everything. `sink` (Hq,) is a logit per head that takes
        part in the softmax and has no value (GPT-OSS).
        """
        out = self._whole(query, scale, softcap, sink, mask) if self.move is not None else None
        if out is None:
            with torch.no_grad():
                plain = mask is None and (causal or query.shape[2] == 1)
                out = self._step(query, scale, softcap, sink) if plain else None
                if out is None:
                    out = self._attend(query, scale, mask, causal, softcap, sink).to(query.dtype)
        return Undifferentiated.apply(out, query) if torch.is_grad_enabled() and query.requires_grad else out

    def _whole(
        self, query: Tensor, scale: float, softcap: float | None, sink: Tensor | None, mask: Tensor | None
    ) -> Tensor | None:
        """Causal attention of the step just taken, in one call on a CPU; None where no kernel serves it."""
        store, move, many = self.store, self.move, query.shape[2]
        if move is None or many not in (1, move.slots) or self.device.type != "cpu":
            return None
        if mask is not None:
            look = Look(scale, softcap, mask, None, self.rows, self.slots, self.lengths)
            if many > 1 or look.biased or not look.plain(chunked=False):
                return None
        asked = *move.after.asked, ("dtype", query.dtype), ("queries", many)
        choice = store.choices.get((Operation.WHOLE, asked)) or step.chosen(store, Operation.WHOLE, asked)
        if choice.run is None or store.bound is None:
            return None
        if self._version != store.version:
            self._check()
        see = move.see if many == move.slots else move.last
        return store.bound[1].attend(query, see, scale, softcap, sink)

    def _step(self, query: Tensor, scale: float, softcap: float | None, sink: Tensor | None) -> Tensor | None:
        """Causal attention in one launch; None where no kernel serves it."""
        store, origins = self.store, self.stand.origins()
        fast = choose(Operation.STEP, self._request(query, origins)).run
        if fast is None or origins is None:
            return None
        self._check()
        call = Decode(
            state=step.state(store, origins),
            counters=step.counters(store, query.shape[1], query.shape[2]),
            page=store.page,
            scale=scale,
            softcap=softcap,
            skip=self.skip,
            pinned=step.pinned(store),
            sink=sink,
        )
        return fast(query, *step.stored(store), *map(step.exact, store.tracks), call)

    def _request(self, query: Tensor, origins: list[int] | None, look: Look | None = None) -> Request:
        """What is asked of kernels: the layer, queries, and what `look` hides from them."""
        return replace(
            self.store.request,
            batch=query.shape[0],
            group=query.shape[1] // self.store.shape.heads,
            queries=query.shape[2],
            dtype=query.dtype,
            gaps=self.stand.gaps,
            shifted=origins is None,
            padded=query.shape[2] > 1 and not self.rows.dense(self.slots),
            hidden=look is not None and not look.plain(self.chunk is not None),
            chunk=self.chunk is not None,
        )

    def _attend(
        self,
        query: Tensor,
        scale: float,
        mask: Tensor | None,
        causal: bool,
        softcap: float | None,
        sink: Tensor | None,
    ) -> Tensor:
        parts, q = self.loose, query.float()
        horizon = self._horizon(query.shape[2]) if causal and query.shape[2] > 1 else None
        look = Look(scale, softcap, mask, horizon, self.rows, self.slots, self.lengths)
        partials = [attend_tiled(q, *part, look) for part in parts]
        if any(self.limits):
            partials.append(self._packed_part(q, look))
        if self.chunk is not None:
            partials.append(self._chunk_part(q, look))
        if sink is not None:
            lse = sink.float().view(1, -1, 1).expand(q.shape[:3])
            partials.append(Partial(torch.zeros_like(partials[0].out), lse))
        return merge(partials).out

    def _horizon(self, queries: int) -> Tensor:
        """The number of the last token that each query may see, (B, M)."""
        start = self.slots - queries
        if self.rows.dense(self.slots):
            return torch.arange(start, self.slots, device=self.device).expand(len(self.lengths), -1)
        queried = torch.arange(start, self.slots, device=self.device)
        rows = range(len(self.lengths))
        ends = [torch.searchsorted(self.rows.slot_of(row, self.device), queried, right=True) for row in rows]
        return torch.stack(ends) - 1

    def _packed_part(self, q: Tensor, look: Look) -> Partial:
        key, value = self.store.key, self.store.value
        q, origins = key.codec.transform.forward(q) if key.codec.transform.fixed else q, self.stand.origins()
        fast = choose(Operation.PAGES, self._request(q, origins, look)).run
        if fast is not None:
            stored = step.stored(self.store)
            origins = None if key.codec.transform.fixed else origins
            part = fast(q, *stored, self.limits, self.skip, self.store.page, look.scale, look.softcap, origins)
        else:
            part = self._packed_tiles(q, look)
        return Partial(value.codec.transform.inverse(part.out), part.lse)

    def _packed_tiles(self, q: Tensor, look: Look) -> Partial:
        """The reference: decode some pages, attend, merge."""
        value_dim = self.store.shape.value_dim
        running = Partial(q.new_zeros(*q.shape[:3], value_dim), q.new_full(q.shape[:3], -torch.inf))
        for keys, values, tokens in self.tiles(q.shape[2]):
            running = merge([running, attend_tiled(q, keys, values, tokens, look)])
        return running

    def tiles(self, queries: int):
        """Keys and values (fp32, transformed space) of some pages of all rows, and their token numbers (-1: none)."""
        store = self.store
        budget = PROMPT_TILE if queries > 1 else CPU_TILE if self.device.type == "cpu" else GPU_TILE
        shape = store.shape
        many = max(1, budget // (store.page * shape.heads * max(shape.key_dim, shape.value_dim) * len(self.lengths)))
        pages = -(-max(self.limits) // store.page)
        tables = step.tables(store)
        for first in range(0, pages, many):
            last = min(first + many, pages)
            tokens = self._tokens(first * store.page, last * store.page)
            at = torch.stack([self.rows.positions(row, line) for row, line in enumerate(tokens)])
            keys, values = (
                track.codec.decode(track.pool.gather(table[:, first:last]), at, inverse=False)
                for track, table in zip(store.tracks, tables, strict=True)
            )
            yield keys, values, tokens

    def _tokens(self, start: int, stop: int) -> Tensor:
        """Token numbers of packed slots [start, stop), (B, n); -1 where a slot holds none, or one kept exact."""
        slots = torch.arange(start, stop, device=self.device)
        tokens = torch.full((len(self.limits), stop - start), -1, device=self.device)
        for row, (limit, maps) in enumerate(zip(self.limits, self.stand.maps, strict=True)):
            if len(maps.runs) == 1:
                tokens[row] = torch.where(slots < limit, slots, -1)
                continue
            for first, last, slot in maps.pieces(0, self.stand.ends[row][0]):
                shift = first - slot
                here = (slots >= slot) & (slots < slot + last - first)
                tokens[row] = torch.where(here, slots + shift, tokens[row])
        if self.skip is not None:
            tokens = tokens.masked_fill(self.skip[:, start:stop], -1)
        return torch.where(tokens >= 0, tokens + self.store.plan.sinks, -1)

    def _chunk_part(self, q: Tensor, look: Look) -> Partial:
        assert self.chunk is not None
        keys, values = self.chunk
        start = [self.rows.tokens(row, self.past) for row in range(len(self.lengths))]
        tokens = torch.full((len(start), keys.shape[2]), -1, device=self.device)
        for row, first in enumerate(start):
            for offset, count in self.rows.columns(row, self.past, self.slots):
                tokens[row, offset : offset + count] = torch.arange(first, first + count, device=self.device)
                first += count
        out, lse = torch.zeros(*q.shape[:3], values.shape[-1], device=self.device), q.new_full(q.shape[:3], -torch.inf)
        for start in range(0, keys.shape[2], QUERIES):
            part = slice(start, start + QUERIES)
            first = start if look.horizon is not None else 0  # causal: seen by the queries of its own column and after
            new = attend_tiled(q[:, :, first:], keys[:, :, part], values[:, :, part], tokens[:, part], look, first)
            out[:, :, first:], lse[:, :, first:] = merge([Partial(out[:, :, first:], lse[:, :, first:]), new])
        return Partial(out, lse)

    @torch.no_grad()
    def dense(self, side: int) -> Tensor:
        """Keys or values of all slots, (B, H, slots, D), padding as zeros."""
        store = self.store
        if not store.packs and not store.plan.sinks:
            ring = (store.value if side else store.key).exact.ring
            if self.move.full if self.move else self.rows.dense(self.slots):
                return ring[:, :, : self.slots]
            if self.move and store.whole and store.bound:
                return store.bound[1].spread(ring, side, self.move.runs, self.slots)
        parts = self.loose
        out = torch.zeros(self.shape(side), dtype=self.dtype, device=self.device)
        codec = self.store.tracks[side].codec
        for *sides, tokens in self.tiles(PROMPT_TILE) if any(self.limits) else ():
            x = sides[side]
            self._place(out, codec.transform.inverse(x) if codec.transform.fixed else x, tokens)
        for part in parts:
            self._place(out, part[side], part.tokens)
        if self.chunk is not None:
            for row in range(len(self.lengths)):
                for offset, count in self.rows.columns(row, self.past, self.slots):
                    at = slice(self.past + offset, self.past + offset + count)
                    out[row, :, at] = self.chunk[side][row, :, offset : offset + count]
        return out

    def _place(self, out: Tensor, x: Tensor, tokens: Tensor) -> None:
        for row in range(tokens.shape[0]):
            real = (tokens[row] >= 0).nonzero().squeeze(-1)
            where = tokens[row, real]
            if not self.rows.dense(self.slots):
                where = self.rows.slot_of(row, self.device)[where]
            out[row, :, where] = x[row, :, real].to(out.dtype)
