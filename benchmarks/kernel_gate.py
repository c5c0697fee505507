"""Nothing is timed before it is right: decode attention against fp32 attention over the decoded cache.

How far off it may be is measured, too: some times as far as attention in fp16 is over the same cache. Over long random
contexts outputs are means near zero, and every kernel with fp16 operands is off by more of the largest.

The gate of a method goes through lengths, sizes of numbers, grouped queries, and every configuration that a kernel may
choose; a shape that is timed is checked once more on the very storage that is timed.
"""

import math
import sys
from collections.abc import Callable, Iterator, Sequence
from functools import partial

import torch
from torch import Tensor

from benchmarks.kernel_storage import Shape, filled, kernel, queries, step
from kvist.cache import step as steps
from kvist.cache.layer import Layer
from kvist.cache.view import View
from kvist.kernels.contract import Decode, Partial
from kvist.kernels.reference.attend import attend, merge

TOLERANCE = 2e-3  # of the largest output, which nothing needs to beat
FACTOR = 4.0  # times the error of fp16 attention, where that is more
GROUPS = (1, 4, 7)  # query heads per KV head
SIZES = (1e-4, 1e-2, 1.0, 1e3)  # standard deviations of keys and values
FINE = 1e-3  # below, an output in fp16 is itself too coarse for the tolerance: it is asked for in fp32
PACKED = 192  # tokens after which every method of the house has packed some
FAR = 1 << 20  # a position whose angles fp32 knows to 0.03 rad: what is off by that is noted, and no reason to fail
DISTANT = "positions beyond 2^20"
SPAN = 1 << 15  # tokens of all rows that the reference decodes at a time


def lengths(page: int) -> tuple[int, ...]:
    """One token; a page; pages full; one of them partly filled."""
    return 1, page, PACKED + 4 * page, PACKED + 4 * page + 37


def limit(half: float) -> float:
    """The error that is allowed where fp16 attention over the same numbers has `half`."""
    return max(TOLERANCE, FACTOR * half)


def rounded(q: Tensor, k: Tensor, v: Tensor, scale: float, visible: Tensor | None = None) -> Partial:
    """`attend` as a kernel with fp16 operands does it: queries, keys, values and weights are halves, sums fp32."""
    q, k, v = (x.half().float() for x in (q, k, v))
    batch, heads, queries, dim = q.shape
    scores = (q.view(batch, k.shape[1], -1, dim) @ k.transpose(-1, -2)).view(batch, heads, queries, -1) * scale
    scores = scores if visible is None else scores.masked_fill(~visible, -torch.inf)
    top = scores.amax(-1, keepdim=True).clamp_min(-1e30)
    weights = (scores - top).exp().half().float()
    total = weights.sum(-1, keepdim=True)
    out = (weights.view(batch, k.shape[1], -1, weights.shape[-1]) @ v).view(batch, heads, queries, -1)
    return Partial(out / total.clamp_min(1e-30), (top + total.log()).squeeze(-1))


def error(found: Tensor, expected: Tensor) -> float:
    """The largest difference, in units of the largest output; infinite where a number is none."""
    worst = float((found.float() - expected).abs().max() / expected.abs().max().clamp_min(1e-30))
    return worst if math.isfinite(worst) else math.inf


def over_dense(layer: Layer, query: Tensor, scale: float, part: Callable[..., Partial] = attend) -> Tensor:
    """fp32 attention over the whole decoded cache, rows without padding. part: how parts are attended to."""
    view = View.after(layer)
    view.dtype = torch.float32  # what the decoder says, not rounded to the model's type
    return part(query.float(), view.dense(0), view.dense(1), scale).out


def over_tiles(layer: Layer, query: Tensor, scale: float, part: Callable[..., Partial] = attend) -> Tensor:
    """The same a few pages at a time, for caches that are too large to decode whole; padding is none of its tokens."""
    view, q = View.after(layer), query.float()
    key, value = (track.codec.transform for track in layer.tracks)
    turned = key.forward(q) if key.fixed else q
    found = Partial(torch.zeros_like(q), q.new_full(q.shape[:3], -torch.inf))
    for tile in view.tiles(1) if any(view.limits) else ():
        found = merge([found, _real(part, turned, *tile, scale)])
    found = Partial(value.inverse(found.out), found.lse)
    return merge([found, *(_real(part, q, *tile, scale) for tile in view.loose)]).out


def _real(part: Callable, q: Tensor, keys: Tensor, values: Tensor, tokens: Tensor, scale: float) -> Partial:
    """Attention over the tokens that are some: where the number is -1, keys and values hold anything."""
    none = tokens < 0
    return part(q, keys, values.masked_fill(none[:, None, :, None], 0), scale, ~none[:, None, None])


def over_tensors(
    query: Tensor, keys: Tensor, values: Tensor, scale: float, part: Callable[..., Partial] = attend
) -> Tensor:
    """fp32 attention over plain tensors (B, H, N, D) of any float type, a part of the tokens at a time."""
    q, span = query.float(), max(1, SPAN // query.shape[0])
    parts = (part(q, k, v, scale) for k, v in zip(keys.split(span, 2), values.split(span, 2), strict=True))
    found = next(parts)
    for each in parts:
        found = merge([found, each])
    return found.out


def configurations(function: Callable | None) -> list:
    """All that a kernel may choose, as its module says."""
    module = sys.modules[getattr(function, "func", function).__module__] if function else None
    return list(getattr(module, "configurations", list)())


def launched(layer: Layer, query: Tensor, scale: float, configuration: object) -> Tensor:
    """A decode step in a configuration of the caller's choice."""
    view, function = View.after(layer), kernel(layer).run
    assert function is not None
    key, value = layer.tracks
    origins = [0] * layer.batch_size if key.codec.transform.fixed else view.stand.origins()
    assert origins is not None  # rows without gaps
    call = Decode(
        state=steps.state(layer, origins),
        counters=steps.counters(layer, query.shape[1], 1),
        page=layer.page,
        scale=scale,
        skip=view.skip,
        pinned=steps.pinned(layer),
    )
    sides = (*steps.stored(layer), steps.exact(key), steps.exact(value))
    return function(query, *sides, call, configuration=configuration)


def cases(
    method: str, device: torch.device, toy: bool, dim: int
) -> Iterator[tuple[str, Callable[[], tuple[float, float]]]]:
    """Every check of a method by name; called, it gives its error and the one that is allowed."""

    def check(shape: Shape, size: float, attend: Callable[[Layer, Tensor, float], Tensor], position: int = 0):
        layer = filled(method, shape, device, size, position=position)
        query, scale = queries(shape, device, size), shape.dim**-0.5
        query = query.float() if size < FINE else query
        expected = over_dense(layer, query, scale)
        half = error(over_dense(layer, query, scale, rounded), expected)
        return error(attend(layer, query, scale), expected), limit(half)

    def shape(group: int, length: int, batch: int = 1, heads: int = 2) -> Shape:
        return Shape(heads * group, heads, length, batch, dim)

    page = filled(method, shape(1, 1), device).page
    heads = 1 if toy else 2
    for length in lengths(page):
        yield f"{length} tokens", partial(check, shape(1 if toy else 4, length, heads=heads), 1.0, step)
    most = lengths(page)[-1]
    for group in GROUPS:
        yield f"{group} queries per head", partial(check, shape(group, most, 2 - toy, heads), 1.0, step)
    for size in SIZES:
        yield f"numbers of about {size:g}", partial(check, shape(1 if toy else 4, most, heads=heads), size, step)
    empty = filled(method, shape(1, 1), device)
    if not empty.key.codec.transform.fixed:
        yield DISTANT, partial(check, shape(1 if toy else 4, most, heads=heads), 1.0, step, FAR)
    for made in configurations(kernel(empty).run):
        forced = partial(launched, configuration=made)
        yield f"configuration {tuple(made)}", partial(check, shape(1 if toy else 4, most, heads=heads), 1.0, forced)


def gate(
    method: str,
    device: torch.device,
    toy: bool = False,
    dim: int = 128,
    note: Callable[[dict], None] = lambda found: None,
) -> dict:
    """All checks of a method: how many, the largest error and where, the kernel that served; "failed" with the reason
    where one is above the tolerance or raises. note: told after every check; until the last one it is "unfinished"."""
    found: dict = {"method": method, "kernel": "", "checks": 0, "error": 0.0, "at": ""}
    name = "a first token"
    try:
        found["kernel"] = kernel(filled(method, Shape(1, 1, 1, 1, dim), device)).name
        for name, check in cases(method, device, toy, dim):
            e, most = check()
            if name == DISTANT:
                found["error far"] = e
                continue
            found["checks"] += 1
            if e >= found["error"]:
                found |= {"error": e, "at": name}
            if not e <= most and "failed" not in found:
                found["failed"] = f"{name}: error {e:.1e} of the largest output, at most {most:.1e} are allowed"
            note(found | {"unfinished": True})
    except Exception as reason:
        return found | {"failed": f"{name}: {first_line(reason)}"}
    return found


def first_line(reason: BaseException) -> str:
    """An exception in a line."""
    lines: Sequence[str] = f"{type(reason).__name__}: {reason}".splitlines()
    return lines[0][:300]
