"""Which tokens wait in full precision (residual window, attention sinks): integers only.

A rule sees a row of tokens behind its sinks, numbered from 0. `advance` says how far packing may go; `pins` says which
packed tokens are kept exact as well. The cache calls `advance` once per update, with the length *before* it, and
rounds the answer down to whole groups.
"""

from functools import lru_cache
from typing import Annotated, Literal

from pydantic import Field

from kvist.types import MOST_TOKENS, Part

Tokens = Annotated[int, Field(gt=0, le=MOST_TOKENS)]


class Rule(Part):
    """What all rules share. `sinks` first tokens are never packed and never numbered."""

    sinks: int = Field(default=0, ge=0, le=MOST_TOKENS)

    @property
    def chunking(self) -> str | None:
        """Why cutting a sequence differently may pack other tokens; None if it cannot."""
        return None

    @property
    def most(self) -> int | None:
        """The most tokens left unpacked once settled; None if that grows with the length."""
        return None

    @property
    def most_pins(self) -> int:
        return 0

    def pins(self, frontier: int) -> tuple[int, ...]:
        """Tokens behind `frontier` that are kept exact too, ascending."""
        return ()


class KeepAll(Rule):
    """Nothing is ever packed."""

    kind: Literal["all"] = "all"

    def advance(self, frontier: int, length: int, prompt: bool) -> int:
        return 0


class Immediate(Rule):
    """Everything is packed at once."""

    kind: Literal["none"] = "none"

    @property
    def most(self) -> int:
        return 0

    def advance(self, frontier: int, length: int, prompt: bool) -> int:
        return length


class Block(Rule):
    """Whole blocks are packed when complete: between 0 and size-1 wait (KIVI section 4.2, keys)."""

    kind: Literal["block"] = "block"
    size: Tokens

    @property
    def most(self) -> int:
        return self.size - 1

    def advance(self, frontier: int, length: int, prompt: bool) -> int:
        return max(frontier, length // self.size * self.size)


class Gather(Rule):
    """All that wait are packed once they are `size`, so that blocks are counted from the end of the prompt, which is
    packed whole unless it is shorter: between 0 and size-1 wait (values of LogQuant's PartialStreamingQuant)."""

    kind: Literal["gather"] = "gather"
    size: Tokens

    @property
    def chunking(self) -> str:
        return "a block begins where the last one was packed, which may be the end of any long update"

    @property
    def most(self) -> int:
        return self.size - 1

    def advance(self, frontier: int, length: int, prompt: bool) -> int:
        return length if length - frontier >= self.size else frontier


class Sliding(Rule):
    """The newest `size` wait, always (KIVI section 4.2, values)."""

    kind: Literal["sliding"] = "sliding"
    size: Tokens

    @property
    def most(self) -> int:
        return self.size

    def advance(self, frontier: int, length: int, prompt: bool) -> int:
        return max(frontier, length - self.size)


class Streaming(Rule):
    """Between W and 2W-1 wait: a prompt leaves W; decoding waits for 2W, then leaves W (LogQuant's StreamingQuant)."""

    kind: Literal["streaming"] = "streaming"
    window: Tokens

    @property
    def chunking(self) -> str:
        return "a prompt leaves W tokens unpacked, decoding lets 2W gather first"

    @property
    def most(self) -> int:
        return 2 * self.window - 1

    def advance(self, frontier: int, length: int, prompt: bool) -> int:
        waits = self.window if prompt else 2 * self.window - 1
        return length - self.window if length - frontier > waits else frontier


@lru_cache(maxsize=256)
def log_pins(window: int, blocks: int) -> tuple[int, ...]:
    """Fold over `blocks` blocks of W: the first whole, then every second of (kept + next block)."""
    kept: tuple[int, ...] = ()
    for block in range(blocks):
        new = tuple(range(block * window, (block + 1) * window))
        kept = (kept + new)[::2] if kept else new
    return kept


class LogSparse(Rule):
    """Blocks of W are packed, all but the newest W to 2W-1 tokens; of the packed, a log-spaced set of W stays exact
    (LogQuant, section 3). A prompt and single tokens come to the same."""

    kind: Literal["log"] = "log"
    window: Tokens

    @property
    def most(self) -> int:
        return 2 * self.window - 1

    @property
    def most_pins(self) -> int:
        return self.window

    def advance(self, frontier: int, length: int, prompt: bool) -> int:
        return max(frontier, (length // self.window - 1) * self.window)

    def pins(self, frontier: int) -> tuple[int, ...]:
        return log_pins(self.window, frontier // self.window)


class Ratio(Rule):
    """Of the m tokens that wait, all but the newest ⌊ratio·m⌋ are packed, in whole groups (KVmix section 3.4). Applied
    at every step to what is left, as published: in steady decoding fewer than group/(1-ratio) tokens wait."""

    kind: Literal["ratio"] = "ratio"
    ratio: float = Field(ge=0, lt=1)
    group: Tokens = 32

    @property
    def chunking(self) -> str:
        return "the share is taken of what waits at each update, not of the context"

    def advance(self, frontier: int, length: int, prompt: bool) -> int:
        waiting = length - frontier
        return frontier + (waiting - int(self.ratio * waiting)) // self.group * self.group


class Share(Rule):
    """The newest ⌊ratio·length⌋ of all tokens wait, and what is short of a whole group: what KVmix's ratio says, taken
    of the whole context. The window grows with the context."""

    kind: Literal["share"] = "share"
    ratio: float = Field(ge=0, lt=1)
    group: Tokens = 32

    def advance(self, frontier: int, length: int, prompt: bool) -> int:
        return max(frontier, (length - int(self.ratio * length)) // self.group * self.group)


Retention = Annotated[
    KeepAll | Immediate | Block | Gather | Sliding | Streaming | LogSparse | Ratio | Share,
    Field(discriminator="kind"),
]
