"""What a cache stores: measured from its tensors, never computed from a formula."""

from collections import Counter
from dataclasses import asdict, dataclass

from kvist.cache import foreign
from kvist.cache.layer import Layer
from kvist.cache.track import Track
from kvist.units import size


@dataclass(frozen=True)
class Report:
    """Bytes by item, used (holding tokens now) and allocated (room included); tokens counted over rows, per layer.

    items: "codes", "scale", "offset", "outlier", "channel", "ends", "values" in pages; "sinks", "pins", "recent"
    exact; "tables"; "other" for layers that transformers' own cache serves. clipped: numbers that a fixed
    range, or fp16's end for scales, offsets and outliers, had to clip, since the start, cropped tokens included.
    """

    recipe: str
    used: dict[str, int]
    allocated: dict[str, int]
    tokens: int
    packed: float
    exact: float
    elements: int
    exact_bytes: int
    clipped: int

    @property
    def nbytes(self) -> int:
        """Bytes allocated, in all."""
        return sum(self.allocated.values())

    @property
    def bits_per_element(self) -> float:
        """Allocated bits per cached number."""
        return 8 * self.nbytes / self.elements if self.elements else 0.0

    def to_dict(self) -> dict:
        """Plain data, for JSON."""
        totals = {
            "nbytes": self.nbytes,
            "used_bytes": sum(self.used.values()),
            "bits_per_element": self.bits_per_element,
        }
        return asdict(self) | totals

    def __str__(self) -> str:
        lines = [
            f"{self.recipe}: {self.tokens} tokens per layer, {self.packed:.0f} packed and {self.exact:.0f} exact (mean)"
        ]
        lines += [f"  {'item':<10}{'used':>14}{'allocated':>14}"]
        for name, allocated in self.allocated.items():
            lines.append(f"  {name:<10}{size(self.used.get(name, 0)):>14}{size(allocated):>14}")
        lines.append(f"  {'total':<10}{size(sum(self.used.values())):>14}{size(self.nbytes):>14}")
        ratio = self.exact_bytes / self.nbytes if self.nbytes else 0
        lines.append(
            f"  {self.bits_per_element:.2f} bits per element; 16-bit cache {size(self.exact_bytes)} ({ratio:.2f}x)"
        )
        if self.clipped:
            share = self.clipped / self.elements
            lines.append(
                f"  {self.clipped} numbers ({share:.2g} of all) lay beyond their fixed range, or fp16's 65,504, and "
                "were clipped"
            )
        return "\n".join(lines)


def measure(recipe: str, layers: list) -> Report:
    """The report of a cache's layers."""
    used: Counter = Counter()
    allocated: Counter = Counter()
    ours = [layer for layer in layers if isinstance(layer, Layer) and layer.is_initialized]
    packed = exact = elements = exact_bytes = 0
    for layer in ours:
        count = sum(layer.lengths)
        numbers = count * layer.shape.heads * (layer.shape.key_dim + layer.shape.value_dim)
        elements, exact_bytes = elements + numbers, exact_bytes + 2 * numbers
        behind = sum(sum(track.frontiers) for track in layer.tracks) / 2
        packed, exact = packed + behind, exact + count - behind
        for track in layer.tracks:
            _track(layer, track, used, allocated)
        skip = layer.skip()
        if skip is not None:
            allocated["tables"] += skip.nbytes
            used["tables"] += skip.nbytes
    for layer in layers:
        for tensor in () if isinstance(layer, Layer) else foreign.held(layer):
            used["other"] += tensor.nbytes
            allocated["other"] += tensor.nbytes
            elements += tensor.numel()
            exact_bytes += 2 * tensor.numel()
    tokens = max((sum(layer.lengths) for layer in ours), default=0)
    n = max(1, len(ours))
    clipped = sum(int(track.clipped) for layer in ours for track in layer.tracks)
    return Report(recipe, dict(used), dict(+allocated), tokens, packed / n, exact / n, elements, exact_bytes, clipped)


def _track(layer: Layer, track: Track, used: Counter, allocated: Counter) -> None:
    pool, kept = track.pool, track.exact
    slots = {}  # filled slots of each page in use, shared pages once
    for row, table in enumerate(pool.tables):
        filled = layer.maps[row].slot(track.states[row].frontier)
        for i, page in enumerate(table):
            slots[page] = max(slots.get(page, 0), min(pool.page, filled - i * pool.page))
    share = sum(slots.values()) / pool.page
    for name, array in pool.arrays.items():
        allocated[name] += array.nbytes
        used[name] += round(share * pool.specs[name].page_bytes(pool.heads, pool.page))
    if pool.specs:
        allocated["tables"] += pool.table(layer.table_width(track)).nbytes
        used["tables"] += 4 * sum(map(len, pool.tables))
    token = kept.ring.shape[1] * kept.ring.shape[3] * kept.ring.dtype.itemsize
    recent = sum(layer.behind(r) - state.frontier for r, state in enumerate(track.states))
    pins = sum(map(len, kept.pins))
    sinks = sum(min(length, layer.plan.sinks) for length in layer.lengths)
    for name, tensor, count in (
        ("recent", kept.ring, recent),
        ("pins", kept.pinned, pins),
        ("sinks", kept.sinks, sinks),
    ):
        allocated[name] += tensor.nbytes
        used[name] += count * token
