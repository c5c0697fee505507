"""How long a context one GPU holds: a model's shape, 2 bits per number, filled by the ordinary bulk append.

Two settings: LLaMA-7B under a cap of 80 GiB with 2^20 tokens, and Llama-3-8B with as many as the whole card takes.
"""

import os
import time
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from benchmarks import device_time
from benchmarks.end_to_end import CHUNK, WARM, config, geometry, timed_steps
from benchmarks.kernel_gate import first_line
from kvist.attention.switch import attach
from kvist.bench import memory
from kvist.bench.shapes import nbytes, outline, random_weights
from kvist.cache.cache import Cache
from kvist.methods import parse
from kvist.models.adapter import describe
from kvist.models.compat import cache_argument
from kvist.plan import Recipe
from kvist.testing.stand_in import stand_in

METHOD = "kvquant:2 keys=post-rope outliers=0"
SETTINGS = (("llama-2-7b", 1 << 20, 80 << 30), ("llama-3-8b", 1 << 22, 0))  # shape, tokens, cap in bytes or none
ROOM = 3 << 30  # bytes beside weights and cache: a chunk on its way, logits, workspaces
STEPS = 16
TOY_TOKENS = 600
FAR = 1 << 20
PATIENCE = 45.0  # seconds that all appends of a setting may take; the layers after that are copies of the first


def run(device: str = "cpu", patience: float = PATIENCE, note: Callable[[dict], None] = lambda report: None) -> dict:
    """A row per setting: tokens, bytes, tokens/s, and how much of it was filled how. A context that does not fit is cut
    to what does, and the row says so."""
    place = torch.device(device)
    rows: list[dict] = []
    report = {"title": "The longest context", "machine": device_time.describe(place), "rows": rows}
    report["angles"] = angles(place)
    toy = place.type != "cuda"
    for name, tokens, cap in SETTINGS[:1] if toy else SETTINGS:
        row = {"model": name, "method": METHOD, "wanted tokens": tokens, "device": device_time.label(place)}
        try:
            row |= _setting(name, TOY_TOKENS if toy else tokens, cap, place, patience)
        except Exception as reason:
            row["failed"] = first_line(reason)
        finally:
            if not toy:
                torch.cuda.set_per_process_memory_fraction(1.0)
        rows.append(row)
        memory.settle()
        note(report)
    return report


def fitting(recipe: Recipe, model_config, tokens: int, limit: int) -> int:
    """The most tokens up to `tokens`, in steps of 2^16, whose cache and weights leave ROOM within `limit` bytes."""
    with torch.device("meta"):
        model = outline(model_config, torch.float16)
    known, weights = describe(model), nbytes(model)
    while tokens > 1 << 16:
        total = recipe.bill(known.shapes, len(known.served), tokens, 1, tokens + STEPS + WARM).total()
        if total + weights + ROOM <= limit:
            return tokens
        tokens -= 1 << 16
    return tokens


@torch.no_grad()
def _setting(name: str, tokens: int, cap: int, device: torch.device, patience: float) -> dict:
    toy = device.type != "cuda"
    shape, row = config(name, toy, tokens + STEPS + WARM), {}
    heads = shape.num_key_value_heads
    recipe = stand_in(parse(METHOD), heads, shape.head_dim)
    if not toy:
        whole = torch.cuda.get_device_properties(device).total_memory
        limit = min(cap, whole) if cap else whole
        torch.cuda.set_per_process_memory_fraction(limit / whole)
        tokens = fitting(recipe, shape, tokens, min(limit, memory.free(device)))
        torch.cuda.reset_peak_memory_stats()
        row["cap GiB"] = limit / 2**30
    model = random_weights(shape, torch.float16, device)
    cache = Cache(model, recipe, prefill="stored", reserve=tokens + STEPS + WARM)
    start = time.perf_counter()
    appended = _fill(cache, geometry(model), tokens, device, patience)
    if not toy:
        torch.cuda.synchronize()
        row["fill s"] = time.perf_counter() - start
    row |= {"tokens": tokens, "layers": len(cache.inner.ours), "layers appended": appended}
    row["cache GB"] = sum(cache.report().used.values()) / 1e9
    row["weights GB"] = nbytes(model) / 1e9
    row |= _decoded(model, cache, toy)
    if not toy:
        row["peak GB"] = torch.cuda.max_memory_allocated() / 1e9
    cache.close()
    return row


def _decoded(model, cache: Cache, toy: bool) -> dict:
    """Tokens per second in a captured step; or plain ones, where that cannot be had."""
    try:
        seconds = timed_steps(model, cache, 2 if toy else STEPS + WARM, toy)
        return {"step": "captured"} | ({} if seconds is None else {"tokens/s": 1 / seconds})
    except ValueError as reason:  # what cannot be captured is refused by name
        why = first_line(reason)
    token = torch.zeros(1, 1, dtype=torch.long, device=model.device)
    with attach(model):
        model(input_ids=token, **cache_argument(cache))
        if toy:
            return {"step": "plain", "not captured": why}
        torch.cuda.synchronize()
        start = time.perf_counter()
        for _ in range(STEPS):
            model(input_ids=token, **cache_argument(cache))
        torch.cuda.synchronize()
    return {"step": "plain", "not captured": why, "tokens/s": STEPS / (time.perf_counter() - start)}


def _fill(cache: Cache, shape: tuple[int, int], tokens: int, device: torch.device, patience: float) -> int:
    """Random keys and values through every layer's `update`; how many layers got theirs so. When patience ends, the
    other layers are copies of the first, pages and all."""
    cache.inner.rows.extend(1, tokens, None)
    generator, start = torch.Generator(device).manual_seed(0), time.perf_counter()
    for done, layer in enumerate(cache.inner.ours):
        if done and time.perf_counter() - start > patience:
            for other in cache.inner.ours[done:]:
                _copy(cache.inner.ours[0], other, shape, device)
            return done
        for first in range(0, tokens, CHUNK):
            dims = 1, shape[0], min(CHUNK, tokens - first), shape[1]
            layer.update(*(torch.randn(dims, generator=generator, device=device).half() for _ in range(2)))
        if device.type == "cuda":
            torch.cuda.synchronize()
    return len(cache.inner.ours)


def _copy(source, target, shape: tuple[int, int], device: torch.device) -> None:
    """What `source` holds, to a layer that is empty; its pool is made as its own would be."""
    target.lazy_initialization(*(torch.empty(1, shape[0], 1, shape[1], dtype=source.dtype, device=device),) * 2)
    for a, b in zip(source.tracks, target.tracks, strict=True):
        b.pool.resize(a.pool.capacity)
        b.pool.refs, b.pool.free = list(a.pool.refs), list(a.pool.free)
        b.pool.tables, b.pool._table = [list(table) for table in a.pool.tables], None
        for name, array in a.pool.arrays.items():
            b.pool.arrays[name].copy_(array)
        b.exact.sinks, b.exact.ring = a.exact.sinks.clone(), a.exact.ring.clone()
        b.states = [type(state)(state.decided, state.frontier) for state in a.states]
    target.lengths, target.slots, target.updates = list(source.lengths), source.slots, source.updates
    target.settled = source.settled
    target.changed()


def angles(device: torch.device, position: int = FAR, pairs: int = 64) -> dict:
    """The largest error of rotary angles about `position`, in rad, against float64 products with the model's fp32
    frequencies: of the decode kernel ("kvist", where Triton runs), of the reference's rotary, which undoes what
    transformers did and rounds as it does, and of transformers' own module."""
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    from kvist.kernels.reference.rotary import angles as reference

    made = LlamaRotaryEmbedding(config("llama-2-7b", False, position + 1))  # pyright: ignore[reportArgumentType]
    frequencies = made.inv_freq.float()
    at = torch.arange(position - 64, position + 1)
    exact = at.double().unsqueeze(-1) * frequencies.double()
    theirs = [x[0, :, :pairs] for x in made(torch.zeros(1, len(at), 1), at.unsqueeze(0))]
    right = exact.cos(), exact.sin()
    found = {"reference": _apart(reference(at, frequencies), right), "transformers": _apart(theirs, right)}
    if device.type == "cuda" or os.environ.get("TRITON_INTERPRET") == "1":
        from benchmarks.angles_triton import formed

        mine = formed(at.to(device), frequencies.to(device))
        found["kvist"] = _apart([x.cpu() for x in mine], right)
    return {"position": position} | found


def _apart(first: Sequence[Tensor], second: Sequence[Tensor]) -> float:
    """The largest angle between two pairs of cos and sin."""
    (c, s), (d, t) = ((x.double() for x in pair) for pair in (first, second))
    return float(torch.atan2(s * d - c * t, c * d + s * t).abs().max())
