"""Whole models of random weights on a GPU: plain generation, captured decode steps, and the longest context that fits.

Each function returns a report whose rows carry times only where they ran on a GPU; on a CPU a tiny model takes the
place of the shapes.
"""

import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import AutoConfig, PreTrainedConfig
from transformers.cache_utils import Cache as TransformersCache

from benchmarks import device_time
from benchmarks.kernel_contenders import BACKENDS
from benchmarks.kernel_gate import first_line
from benchmarks.standing import standing, without_mask
from kvist.attention.captured import Captured
from kvist.bench import generation, memory, shapes
from kvist.bench.generation import Lengths
from kvist.cache.cache import Cache
from kvist.methods import resolve
from kvist.models.compat import cache_argument

MODELS = ("llama-3-8b", "llama-2-7b")
LENGTHS = (4096, 32768)
METHODS = ("kivi:4 group=128", "kivi:2")
NEW, STEPS, WARM = 32, 32, 4  # tokens generated; captured steps that are timed, and those before them
CHUNK = 8192
GOAL = 0.8  # of the time that the bytes predict to be saved
TOY = {"hidden_size": 64, "intermediate_size": 64, "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 32}


def config(name: str, toy: bool, length: int) -> PreTrainedConfig:
    """A shape by name, with room for `length` positions; in its place a tiny one."""
    if toy:
        rope = {"rope_type": "default", "rope_theta": 1e4}
        return AutoConfig.for_model(
            "llama", vocab_size=64, num_hidden_layers=1, rope_parameters=rope, max_position_embeddings=length, **TOY
        )
    found = shapes.shape(name)
    found.max_position_embeddings = max(found.max_position_embeddings, length)
    return found


def model_of(name: str, device: torch.device, toy: bool, length: int) -> Any:
    """Random weights in fp16."""
    return shapes.random_weights(config(name, toy, length), torch.float16, device)


def fill(cache: Cache, shape: tuple[int, int], tokens: int, device: torch.device) -> None:
    """The ordinary bulk append, layer by layer, of random keys and values to an empty cache of one row. shape: KV heads
    and head size."""
    cache.inner.rows.extend(1, tokens, None)
    generator = torch.Generator(device).manual_seed(0)
    for layer in cache.inner.ours:
        for start in range(0, tokens, CHUNK):
            dims = 1, shape[0], min(CHUNK, tokens - start), shape[1]
            layer.update(*(torch.randn(dims, generator=generator, device=device).half() for _ in range(2)))


def generate(
    models: Sequence[str] = MODELS,
    lengths: Sequence[int] = LENGTHS,
    methods: Sequence[str] = METHODS,
    device: str = "cpu",
    note: Callable[[dict], None] = lambda report: None,
) -> dict:
    """Plain `generate`: milliseconds per token after the first, against DynamicCache on the same model."""
    place = torch.device(device)
    toy, rows = place.type != "cuda", []
    report = {"title": "Plain generate", "machine": device_time.describe(place), "rows": rows}
    for name in models[:1] if toy else models:
        model = model_of(name, place, toy, max(lengths) + NEW)
        for length in [200] if toy else lengths:
            spans = Lengths(length, 4 if toy else NEW)
            recipes = {text: resolve(text) for text in methods}
            racers = [r for r in generation.contenders(model, recipes, spans) if not r.name.startswith("static")]
            base = None
            for racer in racers if not toy else [racers[0], *racers[-1:]]:
                row: dict = {
                    "model": name,
                    "tokens": length,
                    "contender": racer.name,
                    "device": device_time.label(place),
                }
                try:
                    found = generation.measure(model, racer, 1, spans, 1 if toy else 2)
                    row["cache MB"] = found["cache bytes"] / 1e6
                    if not toy:
                        row["ms/token"] = 1e3 / found["decode tokens/s"]
                        base = row["ms/token"] if base is None and not racer.method else base
                        row["x dynamic"] = base / row["ms/token"] if base else None
                except Exception as reason:
                    row["failed"] = first_line(reason)
                rows.append(row)
                memory.settle()
                note(report)
        del model
        memory.settle()
    return report


def captured(
    models: Sequence[str] = MODELS,
    lengths: Sequence[int] = LENGTHS,
    methods: Sequence[str] = METHODS,
    device: str = "cpu",
    copied: float | None = None,
    note: Callable[[dict], None] = lambda report: None,
) -> dict:
    """A decode step as one graph: ours against fp16 at the same length, and the share of the time that the bytes of the
    two caches predict to be saved. copied: bytes per second of a plain read."""
    place = torch.device(device)
    toy, rows = place.type != "cuda", []
    report = {"title": "Captured decode steps", "machine": device_time.describe(place), "rows": rows}
    copied = copied or (None if toy else device_time.read_bandwidth(place))
    for name in models[:1] if toy else models:
        model = model_of(name, place, toy, max(lengths) + STEPS + WARM)
        for length in [200] if toy else lengths:
            held, best = 0, None
            row: dict = {"model": name, "tokens": length, "device": device_time.label(place)}
            for backend in ("flash",) if toy else ("flash", "cudnn"):
                mine = row | {"contender": f"fp16, {backend}"}
                try:
                    found, held, mine["kernel"] = _standing_step(model, length, backend, toy)
                    mine["cache MB"] = held / 1e6
                    if found is not None:
                        mine["ms/step"] = 1e3 * found
                        best = min(found, best or found)
                except Exception as reason:
                    mine["failed"] = first_line(reason)
                rows.append(mine)
                memory.settle()
            for text in methods:
                mine = row | {"contender": f"kvist {text}"}
                try:
                    found, nbytes = _captured_step(model, text, length, toy)
                    mine["cache MB"] = nbytes / 1e6
                    if found is not None:
                        mine["ms/step"] = 1e3 * found
                    if found is not None and best is not None and copied:
                        predicted = (held - nbytes) / copied
                        mine |= {"saved ms": 1e3 * (best - found), "bytes predict ms": 1e3 * predicted}
                        mine["share"] = (best - found) / predicted
                except Exception as reason:
                    mine["failed"] = first_line(reason)
                rows.append(mine)
                memory.settle()
                note(report)
        del model
        memory.settle()
    return report


def geometry(model) -> tuple[int, int]:
    """KV heads and head size."""
    return model.config.num_key_value_heads, model.config.head_dim


@torch.no_grad()
def _standing_step(model, length: int, backend: str, toy: bool) -> tuple[float | None, int, str]:
    """Seconds of a step over an fp16 cache that stays at one length, its bytes, and the attention kernel that ran: a
    graph's replay, no mask, no copy of the context; the fastest that fp16 can be made through the model's own forward.
    Raises RuntimeError where another kernel ran than was asked for."""
    cache: TransformersCache = standing(model.config.num_hidden_layers, geometry(model), length, model.device)
    token = torch.zeros(1, 1, dtype=torch.long, device=model.device)
    at = torch.full_like(token, length)
    nbytes = sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)  # pyright: ignore

    def forward() -> Tensor:
        return model(input_ids=token, position_ids=at, **cache_argument(cache), use_cache=True).logits

    chosen = {"flash": SDPBackend.FLASH_ATTENTION, "cudnn": SDPBackend.CUDNN_ATTENTION}[backend]
    with without_mask(model), nullcontext() if toy else sdpa_kernel(chosen):
        if toy:
            forward()
            return None, nbytes, backend
        ran = device_time.kernel_of(forward, BACKENDS[chosen])
        replay = device_time.Replay([forward])
        times = device_time.interleaved({backend: replay}, 5)[backend]
    return sorted(times)[len(times) // 2], nbytes, ran


@torch.no_grad()
def _captured_step(model, method: str, length: int, toy: bool) -> tuple[float | None, int]:
    """Seconds of a captured step, the host's planning and what it sends included, and the bytes that a step reads."""
    steps = 2 if toy else STEPS + WARM
    cache = Cache(model, method, prefill="stored", reserve=length + steps)
    try:
        fill(cache, geometry(model), length, model.device)
        nbytes = sum(cache.report().used.values())
        return timed_steps(model, cache, steps, toy), nbytes
    finally:
        cache.close()


@torch.no_grad()
def timed_steps(model, cache: Cache, steps: int, toy: bool) -> float | None:
    """Seconds per captured step."""
    token = torch.zeros(1, 1, dtype=torch.long, device=model.device)
    with Captured(model, cache, steps) as driver:
        for _ in range(1 if toy else WARM):
            driver.step(token)
        if toy:
            return None
        torch.cuda.synchronize()
        start = time.perf_counter()
        for _ in range(steps - WARM):
            driver.step(token)
        torch.cuda.synchronize()
        return (time.perf_counter() - start) / (steps - WARM)
