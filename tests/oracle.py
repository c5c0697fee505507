"""An independent dense oracle: what a kvist cache must hold, said in the plainest way.

A transformers cache of ordinary tensors, one per row, layer and side. It replays the update boundaries and stores
decode(encode(x)) at the moments that the contract names. Of kvist it uses the recipe (plain data) and the codec, which
has tests of its own; retention, padding, crops and beams are written here again from the specification:

- At the start of an update the rule is applied to the length before it. An update of more than 32 tokens packs at once
  what the rule would decide had its last 32 tokens not come. A rule's first application, when exactly one update was
  made on the empty cache, is its prompt form.
- Frontiers are rounded down to whole groups, counted from where a group was last started.
- Sinks are exact and belong to no range; pins are packed and exact as well; padding is stored nowhere.
- Cropping tokens that nothing has packed leaves no trace. A deeper crop keeps the decoded values of what survives,
  closes the short group, and the next token starts a new one.
- prefill "exact": the tokens of an update of more than 32 are attended exact, with the past as stored before it;
  "stored": everything as stored after it. Shorter updates pack nothing, so the two are the same there.
"""

import copy
from itertools import pairwise

import torch
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin

from kvist.models.hooks import watch

HELD = 32


def published_log(window: int, count: int) -> list[int]:
    """LogQuant's list of exact old positions once `count` whole windows went through it, as its recurrence says."""
    log: list[int] = []
    for block in range(count):
        oldest = list(range(block * window, (block + 1) * window))
        log = [p for rank, p in enumerate(log + oldest) if rank % 2 == 0] if log else oldest
    return log


def decide(rule, decided: int, length: int, prompt: bool) -> int:
    """How far a rule lets packing go, at `length` tokens behind the sinks, `decided` being its last word."""
    waiting = length - decided
    match rule.kind:
        case "all":
            return 0
        case "none":
            return max(decided, length)
        case "block":  # whole blocks, counted from the first token
            while (decided // rule.size + 1) * rule.size <= length:
                decided = (decided // rule.size + 1) * rule.size
            return decided
        case "sliding":
            return decided + max(0, waiting - rule.size)
        case "streaming":  # a prompt leaves W; later 2W gather, then W are left
            full = waiting > rule.window if prompt else waiting >= 2 * rule.window
            return length - rule.window if full else decided
        case "log":  # blocks, counted from the first token, as long as a whole one is left behind them
            while (decided // rule.window + 2) * rule.window <= length:
                decided = (decided // rule.window + 1) * rule.window
            return decided
        case "gather":
            return decided if waiting < rule.size else length
        case "ratio":
            packable = waiting - int(rule.ratio * waiting)
            return decided + packable // rule.group * rule.group
        case "share":  # group by group, as long as the share of all tokens is left
            while (decided // rule.group + 1) * rule.group <= length - int(rule.ratio * length):
                decided = (decided // rule.group + 1) * rule.group
            return decided
    raise AssertionError(f"the oracle does not know the rule {rule.kind!r}")


class Stream:
    """Keys or values of one row of one layer: tensors (H, n, D) of all its tokens, and what is known of each."""

    def __init__(self, side, empty: Tensor):
        self.side, self.raw, self.decoded = side, empty, empty
        self.frontier = self.decided = 0
        self.pinned: set[int] = set()
        self.at: list[int] = []  # the position that each token was rotated for

    def twin(self) -> "Stream":
        """A stream that goes its own way from here; tensors are replaced, never written."""
        twin = copy.copy(self)
        twin.pinned, twin.at = set(self.pinned), list(self.at)
        return twin

    def behind(self) -> int:
        return max(0, self.raw.shape[1] - self.side.retention.sinks)

    def floor(self, position: int, starts: list[int]) -> int:
        """The last place at or before `position` where a group may end."""
        start = max(s for s in starts if s <= position)
        return start + (position - start) // self.side.codec.granule * self.side.codec.granule

    def apply(self, length: int, prompt: bool, starts: list[int], final: bool) -> None:
        """The rule at `length`: pack what it allows. Not `final`: a part of an update whose end is still held."""
        rule = self.side.retention
        if length <= 0 or rule.kind == "all":
            return
        decided = decide(rule, self.decided, length, prompt)
        before, self.frontier = self.frontier, max(self.frontier, self.floor(decided, starts))
        edges = sorted({before, self.frontier, *(s for s in starts if before < s < self.frontier)})
        for a, b in pairwise(edges):
            self._encode(a + rule.sinks, b + rule.sinks)
        if rule.kind == "log" and (final or self.frontier > before):
            wanted = published_log(rule.window, decided // rule.window)
            available = self.pinned | set(range(before, self.frontier))
            self.pinned = {p for p in wanted if p < self.frontier and p in available}
        if final:
            self.decided = decided

    def _encode(self, first: int, last: int) -> None:
        codec, x = self.side.codec, self.raw[:, first:last]
        missing = -x.shape[1] % codec.granule
        full = torch.cat([x, x[:, -1:].expand(-1, missing, -1)], 1)
        at = torch.tensor(self.at[first:last] + [0] * missing)
        decoded = codec.decode(codec.encode(full, at), at)[:, : x.shape[1]].to(x.dtype)
        self.decoded = torch.cat([self.decoded[:, :first], decoded, self.decoded[:, last:]], 1)

    def append(self, x: Tensor, at: list[int]) -> None:
        self.at += at
        self.raw, self.decoded = (torch.cat([old, x], 1) for old in (self.raw, self.decoded))

    def crop(self, tokens: int) -> None:
        self.raw, self.decoded, self.at = self.raw[:, :tokens], self.decoded[:, :tokens], self.at[:tokens]
        length = self.behind()
        self.frontier, self.decided = min(self.frontier, length), min(self.decided, length)
        self.pinned = {p for p in self.pinned if p < length}

    def packed(self) -> Tensor:
        """Which tokens are not exact, (n,)."""
        sinks = self.side.retention.sinks
        packed = torch.zeros(self.raw.shape[1], dtype=torch.bool)
        packed[sinks : sinks + self.frontier] = True
        packed[[sinks + p for p in self.pinned]] = False
        return packed

    def read(self) -> Tensor:
        """All tokens as attention sees them, (H, n, D)."""
        return torch.where(self.packed()[:, None], self.decoded, self.raw)


class Row:
    """One row of one layer: two streams, which of its slots hold tokens, and where groups were started."""

    def __init__(self, plan, keys: Tensor, values: Tensor):
        self.streams = [Stream(plan.key, keys[:, :0]), Stream(plan.value, values[:, :0])]
        self.real: list[bool] = []
        self.starts = [0]

    def twin(self) -> "Row":
        twin = copy.copy(self)
        twin.streams = [stream.twin() for stream in self.streams]
        twin.real, twin.starts = list(self.real), list(self.starts)
        return twin

    def crop(self, slots: int) -> None:
        self.real = self.real[:slots]
        tokens, deep, cut = sum(self.real), False, False
        for stream in self.streams:
            length = max(0, tokens - stream.side.retention.sinks)
            if stream.frontier > length:
                deep, cut = True, cut or stream.floor(length, self.starts) != length
        for stream in self.streams:
            stream.crop(tokens)
        if deep:
            length = self.streams[0].behind()
            self.starts = [s for s in self.starts if s <= length] + ([length] if cut else [])


class OracleLayer(CacheLayerMixin):
    """transformers' layer protocol over plain rows."""

    is_croppable = True

    def __init__(self, plan, parent: "OracleCache"):
        super().__init__()
        self.plan, self.parent = plan, parent
        self.reset()

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        self.rows = [Row(self.plan, k, v) for k, v in zip(key_states, value_states, strict=True)]
        self.is_initialized = True

    def reset(self) -> None:
        self.rows: list[Row] = []
        self.updates = self.slots = 0
        self.is_initialized = False

    def update(self, key_states: Tensor, value_states: Tensor, *args, **kwargs) -> tuple[Tensor, Tensor]:
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        given = [self.parent.rounded(x) for x in (key_states, value_states)]
        new = self.parent.real(len(self.rows), self.slots, key_states.shape[2])
        at = self.parent.positions(len(self.rows), self.slots, key_states.shape[2])
        for row in self.rows:
            for stream in row.streams:
                stream.apply(stream.behind(), self.updates == 1, row.starts, final=True)
        long = self.parent.prefill == "exact" and max(map(sum, new)) > HELD
        past = self.read() if long else ()
        for i, row in enumerate(self.rows):
            row.real += new[i]
            for stream, x in zip(row.streams, given, strict=True):
                stream.append(
                    x[i][:, torch.tensor(new[i], dtype=torch.bool)],
                    [p for p, r in zip(at[i], new[i], strict=True) if r],
                )
                if sum(new[i]) > HELD:
                    stream.apply(stream.behind() - HELD, self.updates == 0, row.starts, final=False)
        self.updates, self.slots = self.updates + 1, self.slots + key_states.shape[2]
        if long:
            seen = torch.tensor(new)[:, None, :, None]
            return tuple(torch.cat([p, x.masked_fill(~seen, 0)], 2) for p, x in zip(past, given, strict=True))
        return self.read()

    def read(self) -> tuple[Tensor, Tensor]:
        """Keys and values of all slots, (B, H, slots, D), zeros at padding."""
        sides = [[], []]
        for row in self.rows:
            real = torch.tensor(row.real, dtype=torch.bool)
            for stream, rows in zip(row.streams, sides, strict=True):
                tokens = stream.read()
                if len(row.real) > tokens.shape[1]:  # there is padding
                    full = tokens.new_zeros(tokens.shape[0], len(row.real), tokens.shape[2])
                    full[:, real] = tokens
                    tokens = full
                rows.append(tokens)
        return torch.stack(sides[0]), torch.stack(sides[1])

    def misturned(self) -> Tensor:
        """The angles by which packed keys would be turned further had no product of a position and a frequency been
        rounded to fp32, as transformers rounds it: (B, slots, F), fp64; F is 0 where keys are stored as rotated."""
        frequencies = torch.tensor(getattr(self.plan.key.codec.transform, "frequencies", ()), dtype=torch.float32)
        angles = torch.zeros(len(self.rows), self.slots, len(frequencies), dtype=torch.float64)
        for row, into in zip(self.rows, angles, strict=True):
            at = torch.tensor(row.streams[0].at)[:, None]
            further = at.double() * frequencies.double() - (at.float() * frequencies).double()
            into[torch.tensor(row.real, dtype=torch.bool)] = further * row.streams[0].packed()[:, None]
        return angles

    def crop(self, tokens_to_remove: int) -> None:
        self.slots = max(0, self.slots - abs(tokens_to_remove))
        for row in self.rows:
            row.crop(self.slots)
        if not any(sum(row.real) for row in self.rows):
            self.updates = 0

    def batch_select_indices(self, indices: Tensor) -> None:
        self.rows = [self.rows[i].twin() for i in indices.tolist()] if self.rows else []

    reorder_cache = batch_select_indices

    def batch_repeat_interleave(self, repeats: int) -> None:
        self.rows = [row.twin() for row in self.rows for _ in range(repeats)]

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.slots + query_length, 0

    def get_seq_length(self) -> int:
        return self.slots

    def get_max_length(self) -> int:
        return -1


class OracleCache(Cache):
    """The oracle of a recipe over `layers` layers.

    mask (B, slots): which of the first slots are tokens; slots beyond it are. A batch that is a multiple of B repeats
    its rows, as beams do. bits: round what is stored to so many significant bits, to learn how far rounding carries.
    With a model, positions are those that its forward is given; otherwise the numbers of the slots.
    """

    def __init__(self, recipe, layers: int, mask: Tensor | None = None, bits: int | None = None, model=None):
        self.prefill, self.mask, self.bits = recipe.prefill, None if mask is None else mask.bool(), bits
        super().__init__(layers=[OracleLayer(plan, self) for plan in recipe.for_layers(layers)])
        self.given: tuple[int, Tensor] | None = None
        if model is not None:
            watch(model, self, "told")

    def told(self, batch: int, slots: int, mask: Tensor | None, positions: Tensor | None) -> None:
        """The forward that comes was given these position ids (1 or B, slots), or none."""
        self.given = None if positions is None else (self.layers[0].slots, positions.expand(batch, -1))

    def positions(self, batch: int, first: int, count: int) -> list[list[int]]:
        """The positions of the slots [first, first + count)."""
        if self.given and self.given[0] == first:
            return self.given[1].tolist()
        return [list(range(first, first + count))] * batch

    def real(self, batch: int, first: int, count: int) -> list[list[bool]]:
        """Which of the slots [first, first + count) are tokens."""
        if self.mask is None:
            return [[True] * count for _ in range(batch)]
        if len(self.mask) != batch:
            self.mask = self.mask.repeat_interleave(batch // len(self.mask), 0)
        known = self.mask[:, first : first + count].tolist()
        return [row + [True] * (count - len(row)) for row in known]

    def rounded(self, x: Tensor) -> Tensor:
        if self.bits is None:
            return x
        fraction, exponent = torch.frexp(x)
        return torch.ldexp((fraction * 2**self.bits).round() / 2**self.bits, exponent)

    def batch_select_indices(self, indices: Tensor) -> None:
        super().batch_select_indices(indices)
        self.mask = None if self.mask is None else self.mask[indices]

    def reorder_cache(self, beam_idx: Tensor) -> None:
        super().reorder_cache(beam_idx)
        self.mask = None if self.mask is None else self.mask[beam_idx]

    def batch_repeat_interleave(self, repeats: int) -> None:
        super().batch_repeat_interleave(repeats)
        self.mask = None if self.mask is None else self.mask.repeat_interleave(repeats, 0)
