"""What kernels and those who call them agree on: types alone, nothing that computes.

Backends (`reference`, `numba`, `triton`, `cuda`) know this file and nothing of each other; `choose` stands above them.
"""

from dataclasses import dataclass
from enum import StrEnum
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

MOST_CELLS = 65535  # rows times KV heads of one launch
MOST_QUERIES = 8  # of a decode step: one token, or what speculative decoding checks at a time

# A code of b bits is stored as planes of these widths, so that no code straddles a byte; see `reference.bits`.
PLANES: dict[int, tuple[int, ...]] = {1: (1,), 2: (2,), 3: (2, 1), 4: (4,), 5: (4, 1), 8: (8,)}
RUN = 8  # codes: the shortest run that fills whole bytes at every width


def packed_bytes(n: int, bits: int) -> int:
    """Bytes that n codes of `bits` bits take; n is a multiple of 8."""
    return n * bits // 8


@dataclass(frozen=True)
class Traits:
    """How one side is stored (quantized), as plain data: what a kernel may ask. `group` 0 is the whole head; `rank` and
    `rotary` are empty where there are no outliers and nothing was unrotated; `hadamard`: stored in the space of its
    rotation."""

    levels: str
    bits: int
    along: str
    group: int
    across_heads: bool
    range: str
    outliers: bool = False
    rank: str = ""
    rotary: str = ""
    hadamard: bool = False


class Constants(NamedTuple):
    """Numbers of a side that are the same for all its tokens; None where there are none.

    edges (2^b - 1,) between the points of a table (a codebook), points (2^b,) on reading; scale and offset (H, D) of
    fixed ranges; frequencies (F,) of the rotary embedding that was undone, and its scaling. All fp32.
    """

    edges: Tensor | None
    points: Tensor | None
    scale: Tensor | None
    offset: Tensor | None
    frequencies: Tensor | None
    scaling: float


class Partial(NamedTuple):
    """Attention over some of the tokens: out (B, Hq, M, D) fp32, normalised; lse (B, Hq, M) fp32, natural log."""

    out: Tensor
    lse: Tensor


class Stored(NamedTuple):
    """One side of the packed pages: its pool arrays, page tables (block tables) (B, pages) int32, and constants."""

    arrays: dict[str, Tensor]
    table: Tensor
    constants: Constants


class Exact(NamedTuple):
    """The exact tokens of one side: sinks (B, H, S, D); ring (B, H, C, D), position p behind the sinks in slot p mod C;
    pinned (B, H, P, D), or 0 slots of them."""

    sinks: Tensor
    ring: Tensor
    pinned: Tensor


class Decode(NamedTuple):
    """What else a decode step says. Tensors are on the device.

    state (B, 8) int32: sinks held, frontier of keys and of values, tokens behind the sinks, the position that page slot
    0 was rotated for, and unused ones. A packed token's slot is its position behind the sinks. skip (B, slots) bool:
    slots that the packed read leaves out. pinned (B, P, 4) int32: position (-1: none), its slot among the pinned keys
    and among the pinned values (-1: read the packed one), unused. counters: int32, one per row, KV head and block of 16
    query rows, all 0 before and after. sink (Hq,): a logit per head without a value.
    """

    state: Tensor
    counters: Tensor
    page: int
    scale: float
    softcap: float | None = None
    skip: Tensor | None = None
    pinned: Tensor | None = None
    sink: Tensor | None = None


class See(NamedTuple):
    """What attention of a step is told of rows, the same for all layers in the same state: whole numbers, numpy arrays.

    rows (B, 8) int64, by column: see `BEFORE` to `ORIGIN`. horizon (B, M): the number of the last token that a query
    sees. span (n, 4): row, first position, count, first slot of tokens that one side has packed and the other has not.
    skip (B, slots), bool: slots that the packed read leaves out, no slots where there are none. pinned (B, P, 4):
    position (-1: none, and none behind it), its slot among pinned keys and among pinned values (-1: not pinned there),
    its page slot. tokens: those of all rows.
    """

    rows: np.ndarray
    horizon: np.ndarray
    span: np.ndarray
    skip: np.ndarray
    pinned: np.ndarray
    tokens: int


# Columns of `See.rows`: tokens held before a step; new ones; sinks held after it; tokens behind the sinks; the
# frontier of keys and of values, both as positions; packed slots that both sides have; the position that page slot 0
# was rotated for.
BEFORE, NEW, HELD, BEHIND, KEYS, VALUES, LIMIT, ORIGIN = range(8)


class Due(NamedTuple):
    """What a step does to one side before its tokens come: pieces (n, 4) int64, row, first position, count and first
    slot of tokens to pack; a count that fills no group closes it. pins (n, 3): row, position in the ring, slot among
    the pinned. cos, sin (tokens of all pieces, F), fp32: the turn that undoes the rotary embedding; none: nothing to
    undo."""

    pieces: np.ndarray
    pins: np.ndarray
    cos: np.ndarray
    sin: np.ndarray


class Write(NamedTuple):
    """What storing of a step is told: rows as in `See`; columns (B, M): the column of each new token of a row."""

    rows: np.ndarray
    columns: np.ndarray
    keys: Due
    values: Due


class Storage(NamedTuple):
    """All that a layer stores, keys and values, as it lies; clipped: see `Operation.STORE`."""

    stored: tuple[Stored, Stored]
    exact: tuple[Exact, Exact]
    clipped: tuple[Tensor, Tensor]
    page: int


class Operation(StrEnum):
    """What a kernel can be asked for; `choose` says what each takes and returns."""

    ENCODE = "encode"
    DECODE = "decode"
    ROTATE = "rotate"
    PACK = "pack into pages"
    STORE = "store a token"
    PAGES = "attend to pages"
    EXACT = "attend to exact tokens"
    STEP = "decode step"
    WHOLE = "steps of a layer"


@dataclass(frozen=True)
class Request:
    """Everything by which a backend decides whether it serves; what is left out is not known, and refuses nothing.

    device: its type; capability: of a GPU, (major, minor); interpreted: Triton's kernels run on a CPU. sides: the
    traits of keys and values, or of the one side that is coded. dims: their head sizes. batch, heads: rows and KV heads
    of a launch; group: query heads per KV head; queries: per row. dtype: of queries; kept: of exact tokens. page:
    tokens. pinned: packed tokens may be left out; gaps: slots are not positions, after a deep crop; shifted: positions
    of a row are not consecutive; padded: rows hold padding; hidden: a query does not see every packed token; biased:
    scores have a bias, or a mask per head; chunk: tokens of this update are not stored yet.
    """

    device: str
    sides: tuple[Traits, ...] = ()
    capability: tuple[int, int] | None = None
    interpreted: bool = False
    dims: tuple[int, ...] = ()
    batch: int = 1
    heads: int = 1
    group: int = 1
    queries: int = 1
    dtype: torch.dtype | None = None
    kept: torch.dtype | None = None
    page: int = 0
    pinned: bool = False
    gaps: bool = False
    shifted: bool = False
    padded: bool = False
    hidden: bool = False
    biased: bool = False
    chunk: bool = False

    @property
    def rows(self) -> int:
        """Query rows per KV head."""
        return self.group * self.queries

    def named(self) -> list[tuple[str, Traits]]:
        """The sides by name; one alone is what values there are."""
        return list(zip(("keys", "values")[-len(self.sides) :], self.sides, strict=True)) if self.sides else []
