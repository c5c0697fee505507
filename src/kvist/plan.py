"""The sentence: what each side of each layer does, its name, its JSON, and its bill.

A recipe is plain data. The same few integers that size the living cache write its bill, so that the bill can be
checked to the byte.
"""

from collections import Counter
from collections.abc import Callable, Sequence
from functools import cached_property
from pathlib import Path
from typing import Literal

import torch
from pydantic import Field, ValidationError, model_validator

from kvist import stranger
from kvist.atomic import replacing
from kvist.coding import Codec
from kvist.kernels.choose import place
from kvist.kernels.contract import Request
from kvist.retention import KeepAll, Retention
from kvist.types import HOLD, MIN_PAGE, MOST_LAYERS, POOL_STEP, Geometry, ModelIdentity, Part, grown

FORMAT = 1
TABLE_STEP = 16  # entries
RING_STEP = 64  # tokens, of a window that has no bound


class Side(Part):
    """Keys or values of one layer: how tokens are coded, and which tokens wait."""

    codec: Codec
    retention: Retention

    @property
    def packs(self) -> bool:
        return not isinstance(self.retention, KeepAll)

    def round(self, frontier: int) -> int:
        """`frontier` down to whole groups."""
        return frontier // self.codec.granule * self.codec.granule

    def frontier_after(self, length: int) -> int:
        """Tokens behind the sinks that are packed after one update of `length` tokens on an empty cache."""
        if length <= HOLD:
            return 0
        return self.target(0, 0, max(0, length - self.retention.sinks - HOLD), True, self.round)[1]

    def target(
        self, decided: int, frontier: int, length: int, prompt: bool, floor: Callable[[int], int]
    ) -> tuple[int, int]:
        """What the rule decides at `length` tokens behind the sinks, and the frontier that follows from it: `floor`
        gives the last position at which a group may end. Never less than before."""
        decided = self.retention.advance(decided, length, prompt) if length > 0 else decided
        return decided, max(frontier, floor(decided))

    def window(self) -> int | None:
        """Tokens that its ring must hold at most; None if that depends on the length."""
        most = self.retention.most
        return None if most is None else most + self.codec.granule - 1 + HOLD


class LayerPlan(Part):
    """The two sides of one layer. They share sinks, page slots and the capacity of their rings."""

    key: Side
    value: Side

    @model_validator(mode="after")
    def _check(self) -> "LayerPlan":
        if self.key.retention.sinks != self.value.retention.sinks:
            raise ValueError("keys and values of a layer must have the same number of sinks")
        if self.key.packs != self.value.packs:
            raise ValueError("either both sides of a layer are packed or neither; use 16 bits for an exact side")
        if not self.value.codec.transform.fixed:
            raise ValueError("values have no rotary embedding to undo")
        return self

    @property
    def sides(self) -> tuple[Side, Side]:
        return self.key, self.value

    @property
    def sinks(self) -> int:
        return self.key.retention.sinks

    @property
    def packs(self) -> bool:
        return self.key.packs

    @property
    def pinned(self) -> bool:
        """Whether packed tokens may be kept exact as well."""
        return any(side.retention.most_pins for side in self.sides)

    @cached_property
    def schedule(self) -> tuple:
        """All that says when tokens are packed, and for what positions: layers that share it take the same steps."""
        rotary = self.key.codec.transform if not self.key.codec.transform.fixed else None
        return *((side.retention, side.codec.granule) for side in self.sides), rotary

    @property
    def granule(self) -> int:
        return max(side.codec.granule for side in self.sides)

    @property
    def page(self) -> int:
        """The shortest page, in tokens, that this layer asks for."""
        return max(MIN_PAGE, self.granule)

    def request(self, shape: Geometry, page: int, device: torch.device) -> Request:
        """What attention asks of kernels about a layer of this plan; a call adds what it knows."""
        return Request(
            sides=(self.key.codec.traits, self.value.codec.traits),
            dims=(shape.key_dim, shape.value_dim),
            heads=shape.heads,
            kept=shape.stored(self.packs),
            page=page,
            pinned=self.pinned,
            **place(device),
        )

    def ring(self, waiting: int, reserve: int = 0) -> int:
        """Tokens that each ring is given when `waiting` tokens must fit."""
        windows = [window for side in self.sides if (window := side.window()) is not None]
        if len(windows) == len(self.sides):
            return max(windows)
        room = 0 if self.packs else max(0, reserve - self.sinks)
        return room if waiting <= room else grown(waiting, RING_STEP)

    def pool(self, pages: int, batch: int, page: int, reserve: int = 0) -> int:
        """Pages that a pool is given when `pages` of them are in use."""
        room = batch * -(-max(0, reserve - self.sinks) // page) if self.packs else 0
        return room if pages <= room else grown(pages, POOL_STEP)

    def bill(self, shape: Geometry, page: int, length: int, batch: int = 1, reserve: int = 0) -> Counter:
        """Bytes allocated, by item, after one update of `length` tokens per row on an empty cache."""
        items: Counter = Counter()
        behind = max(0, length - self.sinks)
        frontiers = [side.frontier_after(length) for side in self.sides]
        ring, widest = self.ring(behind - min(frontiers), reserve), 0
        for side, frontier, dim in zip(self.sides, frontiers, (shape.key_dim, shape.value_dim), strict=True):
            token = batch * shape.heads * dim * shape.stored(self.packs).itemsize
            items["recent"] += ring * token
            items["sinks"] += self.sinks * token
            items["pins"] += side.retention.most_pins * token
            if not self.packs:
                continue
            pages = -(-frontier // page)
            room = self.pool(batch * pages, batch, page, reserve)
            for name, spec in side.codec.layout(shape.heads, dim, shape.stored(self.packs)).items():
                items[name] += room * spec.page_bytes(shape.heads, page)
            width = self.table(pages, page, reserve)
            widest = max(widest, width)
            items["tables"] += batch * 4 * width
        items["tables"] += batch * widest * page if self.pinned else 0
        return +items

    def table(self, pages: int, page: int, reserve: int = 0) -> int:
        """Entries that a row of a page table is given when `pages` of them are in use."""
        room = -(-max(0, reserve - self.sinks) // page)
        return room if pages <= room else grown(pages, TABLE_STEP)


Shapes = Geometry | Sequence[Geometry]  # one for all layers, or one of each


class Recipe(Part):
    """A method with its settings: one plan for all layers, or one per attention layer that kvist serves. `model`: what
    it was fitted to, if it was."""

    name: str
    paper: str = ""
    model: ModelIdentity | None = None
    layers: tuple[LayerPlan, ...] = Field(min_length=1, max_length=MOST_LAYERS)
    prefill: Literal["exact", "stored"] = "exact"
    format: Literal[1] = FORMAT

    @model_validator(mode="after")
    def _fits(self) -> "Recipe":
        for granule in {side.codec.granule for plan in self.layers for side in plan.sides}:
            if self.page % granule:
                raise ValueError(f"groups of {granule} tokens do not fill pages of {self.page}; use 32, 64 or 128")
        return self

    @property
    def needs(self) -> tuple[str, ...]:
        """What must be fitted before the recipe can be used; nothing for most."""
        codecs = [side.codec for plan in self.layers for side in plan.sides]
        return tuple(sorted({words for codec in codecs for words in codec.unfitted}))

    @property
    def rotary(self) -> bool:
        """Whether positions must be known to read what is stored."""
        return any(not side.codec.transform.fixed for plan in self.layers for side in plan.sides)

    @property
    def page(self) -> int:
        """Tokens per page, the same for all layers."""
        return max(plan.page for plan in self.layers)

    def for_layers(self, count: int) -> tuple[LayerPlan, ...]:
        """A plan for each of `count` layers."""
        if len(self.layers) == 1:
            return self.layers * count
        if len(self.layers) != count:
            raise ValueError(
                f"the recipe {self.name!r} describes {len(self.layers)} layers but the model has {count} attention "
                f"layers to serve; give one setting for all layers or {count} of them"
            )
        return self.layers

    def bill(self, shape: Shapes, layers: int, length: int, batch: int = 1, reserve: int = 0) -> Counter:
        """Bytes allocated, by item, after a prompt of `length` tokens per row, over all layers. shape: of each layer,
        or one for all."""
        total: Counter = Counter()
        shapes = [shape] * layers if isinstance(shape, Geometry) else shape
        for plan, own in zip(self.for_layers(layers), shapes, strict=True):
            total += plan.bill(own, self.page, length, batch, reserve)
        return total

    def bits_per_element(self, shape: Geometry, layers: int, length: int, reserved: bool = True) -> float:
        """Allocated bits per cached number, mean of keys and values, after a prompt of `length` tokens."""
        nbytes = self.bill(shape, layers, length, reserve=length if reserved else 0).total()
        return 8 * nbytes / (layers * length * shape.heads * (shape.key_dim + shape.value_dim))

    @property
    def chunking(self) -> str | None:
        """Why cutting a sequence into other updates may pack other tokens; None if it cannot."""
        rules = [side.retention for plan in self.layers for side in plan.sides]
        return "; ".join(sorted({reason for rule in rules if (reason := rule.chunking)})) or None

    def save(self, path: str | Path) -> None:
        """Write the recipe as JSON."""
        with replacing(path) as scratch:
            scratch.write_text(self.model_dump_json(indent=2) + "\n")

    @classmethod
    def load(cls, path: str | Path) -> "Recipe":
        """Read a recipe's JSON file. Raises ValueError in one sentence."""
        try:
            data = stranger.read_json(path)
        except ValueError as error:
            raise ValueError(
                f"expected a recipe's JSON file at {path}: {error}; `kvist show METHOD --json` prints a valid one"
            ) from None
        try:
            return cls.model_validate(data)
        except ValidationError as error:
            raise ValueError(
                f"{path} is not a recipe: {stranger.said(error)}; `kvist show METHOD --json` prints a valid one"
            ) from None

    def __str__(self) -> str:
        parts = []
        for plan in self.layers:
            sides = (f"{name}: {_sentence(side)}" for name, side in zip(("keys", "values"), plan.sides, strict=True))
            parts.append("; ".join(sides))
        if len(set(parts)) == 1:  # layers may still differ in fitted numbers
            return f"{self.name}: {parts[0]}"
        return f"{self.name}: " + "\n  ".join(f"layer {i}: {part}" for i, part in enumerate(parts))


def _sentence(side: Side) -> str:
    rule = side.retention
    words = ", ".join(f"{k} {v}" for k, v in rule.model_dump(exclude={"kind", "sinks"}).items())
    sinks = f", {rule.sinks} sinks" if rule.sinks else ""
    kept = "all tokens" if rule.kind == "all" else "none" if rule.kind == "none" else f"{rule.kind} ({words})"
    return f"{side.codec}; exact: {kept}{sinks}"
