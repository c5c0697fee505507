"""What the kernel benchmark decodes from: shapes by name, and layers of ours filled by ordinary updates."""

import copy
import importlib.util
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from kvist.cache.layer import Layer
from kvist.cache.report import measure
from kvist.cache.rows import Rows
from kvist.cache.settle import State
from kvist.cache.track import Track
from kvist.cache.view import View
from kvist.coding import Fixed
from kvist.kernels.choose import Choice, choose
from kvist.kernels.contract import Decode, Operation
from kvist.methods import parse
from kvist.plan import LayerPlan
from kvist.testing.stand_in import stand_in
from kvist.types import Geometry

CHUNK = 8192  # tokens of all rows that an update brings
WRITTEN = 1 << 16  # tokens of all rows that are coded; further pages of a large shape are copies of theirs


@dataclass(frozen=True)
class Shape:
    """One decode step of one layer. variant: "" is pages in order and rows of one length; "shuffled": pages anywhere;
    "ragged": row i is twice as long as row i - 1, all together as long as ever."""

    query_heads: int
    heads: int
    length: int
    batch: int = 1
    dim: int = 128
    variant: str = ""

    @classmethod
    def parse(cls, text: str) -> "Shape":
        """From '32/8:128K', '32/8:32Kx8' (batch 8) or '32/8:4K@64' (heads of 64). Raises ValueError."""
        found = re.fullmatch(r"(\d+)/(\d+):(\d+)([KM]?)(?:x(\d+))?(?:@(\d+))?", text.strip(), re.IGNORECASE)
        if not found:
            raise ValueError(f"expected a shape such as '32/8:128K', '32/8:32Kx8' or '28/4:4K@64', found {text!r}")
        queries, heads, length, unit, batch, dim = found.groups()
        made = cls(
            int(queries),
            int(heads),
            int(length) * {"": 1, "K": 1 << 10, "M": 1 << 20}[unit.upper()],
            int(batch or 1),
            int(dim or 128),
        )
        if not made.heads or made.query_heads % made.heads or not made.length * made.batch:
            raise ValueError(f"KV heads must divide query heads, and lengths be at least 1; found {text!r}")
        return made

    @property
    def lengths(self) -> list[int]:
        """Tokens of each row."""
        if self.variant != "ragged":
            return [self.length] * self.batch
        total = self.length * self.batch
        found = [max(1, total * 2**i // (2**self.batch - 1)) for i in range(self.batch)]
        return [*found[:-1], total - sum(found[:-1])]

    @property
    def tokens(self) -> int:
        return self.length * self.batch

    @property
    def elements(self) -> int:
        """Cached numbers."""
        return 2 * self.tokens * self.heads * self.dim

    def toy(self) -> "Shape":
        """As much of it as an interpreter can do in a second."""
        heads = min(self.heads, 2)
        return replace(
            self,
            query_heads=self.query_heads // self.heads * heads,
            heads=heads,
            length=min(self.length, 300),
            batch=min(self.batch, 3),
        )

    def __str__(self) -> str:
        length = f"{self.length >> 10}K" if self.length % 1024 == 0 else str(self.length)
        batch, dim = f"x{self.batch}" if self.batch > 1 else "", f"@{self.dim}" if self.dim != 128 else ""
        return f"{self.query_heads}/{self.heads}:{length}{batch}{dim}{' ' if self.variant else ''}{self.variant}"


def filled(
    method: str,
    shape: Shape,
    device: torch.device,
    size: float = 1.0,
    seed: int = 0,
    written: int = WRITTEN,
    position: int = 0,
) -> Layer:
    """A layer of `shape` with random keys and values of standard deviation `size`, fp16. A shape of more than `written`
    tokens, and of rows alike, is continued by copies of its own pages. position: that of the first slot."""
    recipe, rows = stand_in(parse(method), shape.heads, shape.dim), Rows()
    if recipe.needs:
        raise ValueError(f"{method} needs {' and '.join(recipe.needs)}")
    layer = Layer(_resized(recipe.layers[0], size), recipe.page, "stored", shape.length, rows)
    generator, most = torch.Generator(device).manual_seed(seed), max(shape.lengths)
    coded = most
    if shape.tokens > written and len(set(shape.lengths)) == 1:
        unit = math.lcm(recipe.page, 128)  # windows of the methods end there
        rest = max(0, most - max(4 * unit, written // shape.batch)) // unit * unit
        coded = most - rest
    lengths, step = [max(0, coded - (most - n)) for n in shape.lengths], max(1, CHUNK // shape.batch)
    for start in range(0, coded, step):
        count = min(step, coded - start)
        columns = torch.arange(start, start + count)
        real = columns >= coded - torch.tensor(lengths).unsqueeze(-1)  # shorter rows begin with padding
        rows.extend(shape.batch, count, real, (position + columns).expand(shape.batch, -1))
        dims = shape.batch, shape.heads, count, shape.dim
        layer.update(*(size * torch.randn(dims, generator=generator, device=device).half() for _ in range(2)))
    layer.settle()
    if coded < most:
        rows.extend(
            shape.batch, most - coded, None, torch.arange(position + coded, position + most).expand(shape.batch, -1)
        )
        _continue(layer, most - coded)
    if shape.variant == "shuffled":
        for track in layer.tracks:
            _shuffle(track, generator)
    return layer


def _resized(plan: LayerPlan, size: float) -> LayerPlan:
    """A plan whose fixed ranges suit numbers that are `size` times as large."""
    sides = {}
    for name, side in zip(("key", "value"), plan.sides, strict=True):
        found = side.codec.range
        if isinstance(found, Fixed):
            ends = {"low": tuple(size * x for x in found.low), "high": tuple(size * x for x in found.high)}
            codec = side.codec.model_copy(update={"range": found.model_copy(update=ends)})
            side = side.model_copy(update={"codec": codec})
        sides[name] = side
    return plan.model_copy(update=sides)


def _continue(layer: Layer, tokens: int) -> None:
    """Whole pages more in every row, the last ones of what is packed again and again; the same exact tokens follow."""
    for track in layer.tracks:
        pool = track.pool
        for row, state in enumerate(track.states):
            whole = state.frontier // pool.page
            before = list(pool.tables[row])
            pool.resize(pool.in_use + tokens // pool.page)
            pool.extend(row, len(before) * pool.page, (len(before) * pool.page) + tokens)
            new = pool.tables[row][len(before) :]
            pool.tables[row] = before[:whole] + new + before[whole:]  # what is half full stays last
            source = torch.tensor([before[i % whole] for i in range(len(new))], device=pool.device)
            for array in pool.arrays.values():
                array[torch.tensor(new, device=pool.device)] = array[source]
            pool.forget()
        track.states = [State(decided + tokens, frontier + tokens) for decided, frontier in track.states]
        track.exact.ring = track.exact.ring.roll(tokens % track.exact.capacity, dims=2)
        track.exact.moved += 1
    layer.lengths = [length + tokens for length in layer.lengths]
    layer.slots += tokens
    layer.changed()


def _shuffle(track: Track, generator: torch.Generator) -> None:
    """The same pages in other places."""
    pool = track.pool
    place = torch.randperm(pool.capacity, generator=generator, device=pool.device)
    order = place.tolist()
    for name, array in pool.arrays.items():
        moved = torch.empty_like(array)
        moved[place] = array
        pool.arrays[name] = moved
    pool.tables = [[order[page] for page in table] for table in pool.tables]
    pool.free = [order[page] for page in pool.free]
    refs = [0] * pool.capacity
    for page, count in enumerate(pool.refs):
        refs[order[page]] = count
    pool.refs = refs
    pool.forget()


def twins(layer: Layer, count: int) -> list[Layer]:
    """The layer and copies of it, `count` in all, that share no page."""
    fixed = (layer.rows, layer.plan, *layer.plan.sides, *(side.codec for side in layer.plan.sides))
    return [layer] + [copy.deepcopy(layer, {id(x): x for x in fixed}) for _ in range(count - 1)]


def read(layer: Layer) -> int:
    """Bytes that a decode step must read: what is stored and in use, page tables included."""
    return sum(measure("", [layer]).used.values())


def kernel(layer: Layer) -> Choice:
    """What serves a decode step: all of it in one launch, or the part over packed pages."""
    request = replace(layer.request, batch=layer.batch_size)
    choice = choose(Operation.STEP, request)
    return choice if choice.run is not None else choose(Operation.PAGES, request)


def cell(method: str, shape: Shape):
    """The cell of the CUDA kernel that a shape's decode step is of; None where that kernel does not serve it."""
    from kvist.kernels.cuda import attend

    recipe = stand_in(parse(method), shape.heads, shape.dim)
    plan, q = recipe.layers[0], torch.zeros(1, shape.query_heads, 1, shape.dim, dtype=torch.float16)
    geometry = Geometry(shape.heads, shape.dim, shape.dim, q.dtype)
    request = plan.request(geometry, recipe.page, torch.device("cuda"))
    request = replace(request, batch=shape.batch, group=shape.query_heads // shape.heads, dtype=q.dtype)
    if not choose(Operation.STEP, request).name.startswith("cuda"):
        return None
    none = torch.zeros(0, dtype=torch.int32)
    return attend.cell_of(*request.sides, q, shape.heads, Decode(none, none, recipe.page, 1.0))


def compile_ahead(methods: Sequence[str], shapes: Sequence[Shape], device: torch.device) -> None:
    """Compile what these will ask NVRTC for, all at once."""
    if not all(map(importlib.util.find_spec, ("cuda", "cuda.bindings"))):
        return
    from kvist.kernels.cuda import attend

    cells = [cell(method, shape) for method in methods for shape in shapes]
    major, minor = torch.cuda.get_device_capability(device)
    attend.compile_ahead([made for made in cells if made is not None], 10 * major + minor)


def step(layer: Layer, query: Tensor, scale: float) -> Tensor:
    """The decode step that is measured."""
    return View.after(layer).attend(query, scale)


def queries(shape: Shape, device: torch.device, size: float = 1.0, seed: int = 1) -> Tensor:
    """(B, Hq, 1, D), fp16, such that scores of keys of standard deviation `size` are of about 1."""
    dims: Sequence[int] = (shape.batch, shape.query_heads, 1, shape.dim)
    x = torch.randn(dims, generator=torch.Generator(device).manual_seed(seed), device=device)
    return (x.clamp(-4, 4) / size).half()
