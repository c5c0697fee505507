"""Nothing is timed before it is right: decode attention against fp32 attention over the decoded cache.

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
from kvist.kernels.attend import Partial, attend, merge
from kvist.kernels.choose import Decode

TOLERANCE = 2e-3  # of the largest output
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


def error(found: Tensor, expected: Tensor) -> float:
    """The largest difference, in units of the largest output; infinite where a number is none."""
    worst = float((found.float() - expected).abs().max() / expected.abs().max().clamp_min(1e-30))
    return worst if math.isfinite(worst) else math.inf


def over_dense(layer: Layer, query: Tensor, scale: float) -> Tensor:
    """fp32 attention over the whole decoded cache, rows without padding."""
    view = View.after(layer)
    view.dtype = torch.float32  # what the decoder says, not rounded to the model's type
    return attend(query, view.dense(0), view.dense(1), scale).out


def over_tiles(layer: Layer, query: Tensor, scale: float) -> Tensor:
    """The same a few pages at a time, for caches that are too large to decode whole; padding is none of its tokens."""
    view, q = View.after(layer), query.float()
    key, value = (track.codec.transform for track in layer.tracks)
    turned = key.forward(q) if key.fixed else q
    found = Partial(torch.zeros_like(q), q.new_full(q.shape[:3], -torch.inf))
    for part in view._tiles(1) if any(view.limits) else ():
        found = merge([found, _real(turned, *part, scale)])
    found = Partial(value.inverse(found.out), found.lse)
    return merge([found, *(_real(q, *part, scale) for part in view.loose)]).out


def _real(q: Tensor, keys: Tensor, values: Tensor, tokens: Tensor, scale: float) -> Partial:
    """Attention over the tokens that are some: where the number is -1, keys and values hold anything."""
    none = tokens < 0
    return attend(q, keys, values.masked_fill(none[:, None, :, None], 0), scale, ~none[:, None, None])


def over_tensors(query: Tensor, keys: Tensor, values: Tensor, scale: float) -> Tensor:
    """fp32 attention over plain tensors (B, H, N, D) of any float type, a part of the tokens at a time."""
    q, span = query.float(), max(1, SPAN // query.shape[0])
    parts = (attend(q, k, v, scale) for k, v in zip(keys.split(span, 2), values.split(span, 2), strict=True))
    found = next(parts)
    for part in parts:
        found = merge([found, part])
    return found.out


def configurations(function: Callable | None) -> list:
    """All that a kernel may choose, as its module says."""
    module = sys.modules[getattr(function, "func", function).__module__] if function else None
    return list(getattr(module, "configurations", list)())


def launched(layer: Layer, query: Tensor, scale: float, configuration: object) -> Tensor:
    """A decode step in a configuration of the caller's choice."""
    view, function = View.after(layer), kernel(layer)[1]
    assert function is not None
    key, value = layer.tracks
    origins = [0] * layer.batch_size if key.codec.transform.fixed else view._origins()
    assert origins is not None  # rows without gaps
    call = Decode(
        state=steps.state(layer, origins),
        counters=steps.counters(layer, query.shape[1], 1),
        page=layer.page,
        scale=scale,
        skip=view.skip,
        pinned=steps.pinned(layer),
    )
    sides = (view._stored(key), view._stored(value), steps.exact(key), steps.exact(value))
    return function(query, *sides, call, configuration=configuration)


def cases(method: str, device: torch.device, toy: bool, dim: int) -> Iterator[tuple[str, Callable[[], float]]]:
    """Every check of a method by name; called, it gives its error."""

    def check(shape: Shape, size: float, attend: Callable[[Layer, Tensor, float], Tensor], position: int = 0) -> float:
        layer = filled(method, shape, device, size, position=position)
        query, scale = queries(shape, device, size), shape.dim**-0.5
        query = query.float() if size < FINE else query
        return error(attend(layer, query, scale), over_dense(layer, query, scale))

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
    _, function, _ = kernel(empty)
    for made in configurations(function):
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
        found["kernel"] = kernel(filled(method, Shape(1, 1, 1, 1, dim), device))[0]
        for name, check in cases(method, device, toy, dim):
            e = check()
            if name == DISTANT:
                found["error far"] = e
                continue
            found["checks"] += 1
            if e >= found["error"]:
                found |= {"error": e, "at": name}
            note(found | {"unfinished": True})
    except Exception as reason:
        return found | {"failed": f"{name}: {first_line(reason)}"}
    if found["error"] > TOLERANCE:
        e, where = found["error"], found["at"]
        found["failed"] = f"{where}: error {e:.1e} of the largest output, at most {TOLERANCE} are allowed"
    return found


def first_line(reason: BaseException) -> str:
    """An exception in a line."""
    lines: Sequence[str] = f"{type(reason).__name__}: {reason}".splitlines()
    return lines[0][:300]
