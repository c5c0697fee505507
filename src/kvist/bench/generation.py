"""One generation of the throughput benchmark: who runs it, how it is clocked, and how much memory it will need."""

import statistics
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig
from transformers.generation.streamers import BaseStreamer

from kvist.attention import attach
from kvist.baselines import DYNAMIC, STATIC, held
from kvist.bench import memory
from kvist.cache.cache import Cache
from kvist.models.adapter import describe
from kvist.models.compat import cache_argument
from kvist.plan import Recipe

SAFETY, MARGIN = 1.5, 1.1  # on a prediction that no measured peak supports, and on one that a peak does
SCRATCH = 64 << 20  # bytes that a CPU's matrix products and allocator keep for themselves, more or less at random
WARM = 8  # tokens of a warm-up, after the first, which generates them all


@dataclass(frozen=True)
class Lengths:
    """Tokens of the prompt, and tokens generated after it. chunk: tokens of the prompt that go through the model at
    once; 0: all."""

    prompt: int
    new: int
    chunk: int = 0

    @property
    def total(self) -> int:
        return self.prompt + self.new


@dataclass
class Racer:
    """A cache and the setting in which it runs. method: its recipe's text, "" for transformers' caches; cache_bytes:
    by arithmetic, of a batch; padding: slots of padding before the prompt; peaks: batch and bytes, as measured."""

    name: str
    method: str
    make: Callable[[], Any]
    cache_bytes: Callable[[int], float]
    padding: int = 0
    compiled: bool = False
    peaks: list[tuple[int, int]] = field(default_factory=list)
    largest: int = 0
    running: bool = True
    ended_by_memory: bool = False

    def line(self) -> tuple[float, float] | None:
        """Bytes of a row and of none: the line through the last two measured peaks; one alone is all rows."""
        if not self.peaks:
            return None
        (b0, p0), (b1, p1) = ([(0, 0), *self.peaks])[-2:]
        slope = (p1 - p0) / (b1 - b0)
        return slope, p1 - slope * b1

    def predict(self, model, batch: int, lengths: Lengths) -> int:
        """The most bytes that a run will hold beyond the weights: by arithmetic or the line, the larger, and some."""
        slots = lengths.prompt + self.padding
        reckoned = self.cache_bytes(batch) + _activations(model, batch, min(slots, lengths.chunk or slots))
        line = self.line()
        scratch = SCRATCH if model.device.type == "cpu" else 0
        return scratch + int(reckoned * SAFETY if line is None else max(reckoned, line[0] * batch + line[1]) * MARGIN)

    def by_the_line(self, limit: int) -> int | None:
        """The largest batch within `limit` by the straight line nearest to all measured peaks; None before there are
        two, or where they do not rise."""
        if len(self.peaks) < 2:
            return None
        slope, start = statistics.linear_regression(*zip(*self.peaks, strict=True))
        return max(self.largest, int((limit - start) / slope + 1e-6)) if slope > 0 else None


class Clock(BaseStreamer):
    """Notes when each token of a batch came; the first thing that it is given is the prompt."""

    def __init__(self):
        self.times: list[float] = []

    def put(self, value: Tensor) -> None:
        self.times.append(time.perf_counter())

    def end(self) -> None:
        """Nothing is left to print."""


def contenders(model, methods: dict[str, Recipe], lengths: Lengths) -> list[Racer]:
    """transformers' dynamic and static cache under SDPA, each at its best public setting; kvist's methods, attached.

    On CUDA `generate` compiles the decode steps of a static cache; on a CPU that does not pay. On a CPU a mask makes
    transformers pack the queries of a group, which is faster than its default; `generate` drops a mask of ones, so
    that one slot of padding is what a user can do. Which of the two wins depends on the lengths: both run.
    """
    config, known = model.config.get_text_config(decoder=True), describe(model)
    on_cpu, shape, layers = model.device.type == "cpu", known.shape, len(known.kinds)
    token = layers * shape.heads * (shape.key_dim + shape.value_dim) * shape.dtype.itemsize

    def dynamic(name: str, padding: int) -> Racer:
        # a step makes a layer's keys anew beside the old ones
        needs = token * (lengths.total + padding) * (1 + 1 / (2 * layers))
        return Racer(name, "", lambda: DYNAMIC.cache(config), lambda batch: batch * needs, padding)

    found = [dynamic("dynamic, SDPA", 0)]
    if on_cpu and known.query_heads != shape.heads:
        found.append(dynamic("dynamic, SDPA, one padding slot", 1))
    found.append(
        Racer(
            "static, SDPA" if on_cpu else "static, SDPA, compiled",
            "",
            lambda: STATIC.cache(config, lengths.total),
            lambda batch: batch * token * lengths.total,
            compiled=not on_cpu,
        )
    )
    for name, recipe in methods.items():

        def billed(batch: int, recipe: Recipe = recipe) -> float:
            served = len(known.served)
            ours = recipe.bill(shape, served, lengths.prompt, batch, lengths.total).total()
            return ours + batch * token * lengths.total * (layers - served) / layers

        make = partial(Cache, model, recipe, reserve=lengths.total)
        found.append(Racer(f"kvist {name}", name, make, billed))
    return found


def _activations(model, batch: int, slots: int) -> int:
    """Bytes that a prefill holds beside the cache, roughly: one layer's states, and the logits of the last token, which
    `generate` copies to fp32."""
    config = model.config.get_text_config(decoder=True)
    states = 8 * config.hidden_size + 3 * (getattr(config, "intermediate_size", None) or 4 * config.hidden_size)
    return batch * (slots * states * model.dtype.itemsize + config.vocab_size * (model.dtype.itemsize + 8))


def measure(model, racer: Racer, batch: int, lengths: Lengths, rounds: int = 1, seed: int = 0) -> dict:
    """Medians of `rounds` runs after a warm-up: speeds, bytes of the cache at the end, the peak beyond the weights."""
    device, runs = model.device, []
    if racer.compiled:
        torch.compiler.reset()  # compiled for this batch alone: nothing made general on the way
    ids = prompts(model, batch, lengths.prompt, seed)
    kept: list = [racer.make()]  # a compiled step belongs to one cache object, which must live on
    generate(model, racer, kept[0], ids, lengths.new if not racer.largest else min(WARM, lengths.new), lengths.chunk)
    if not racer.compiled:
        kept.clear()

    def once() -> tuple[dict, int]:
        cache = kept[0] if kept else racer.make()
        _, start, times = generate(model, racer, cache, ids, lengths.new, lengths.chunk)
        return speeds(batch, lengths, start, times), cache.report().nbytes if racer.method else held(cache)

    for _ in range(rounds):
        for cache in kept:
            cache.reset()
        (row, nbytes), high = memory.peak(once, device)
        before = nbytes if kept else 0
        runs.append(row | {"cache bytes": nbytes, "peak bytes": None if high is None else high + before})
    return {
        key: None if None in (values := [each[key] for each in runs]) else statistics.median(values) for key in runs[0]
    }


def prompts(model, batch: int, tokens: int, seed: int) -> Tensor:
    """Random ids (B, T), the same at every call."""
    vocabulary = model.config.get_text_config(decoder=True).vocab_size
    ids = torch.randint(0, vocabulary, (batch, tokens), generator=torch.Generator().manual_seed(seed))
    return ids.to(model.device)


def generate(model, racer: Racer, cache, ids: Tensor, new: int, chunk: int = 0) -> tuple[Tensor, float, list[float]]:
    """Exactly `new` greedy tokens after `ids`: all ids, when it began, and when each token came. The prompt is read in
    chunks, unless `chunk` is 0."""
    ids = torch.nn.functional.pad(ids, (racer.padding, 0))
    mask, clock, own = torch.ones_like(ids), Clock(), model.generation_config
    mask[:, : racer.padding] = 0
    # a checkpoint's own would stop at its end of text
    model.generation_config = GenerationConfig(pad_token_id=0, prefill_chunk_size=chunk or None)
    try:
        with attach(model) if racer.method else nullcontext():
            start = time.perf_counter()
            every = model.generate(
                ids, attention_mask=mask, **cache_argument(cache), max_new_tokens=new, do_sample=False, streamer=clock
            )
    finally:
        model.generation_config = own
    return every[:, racer.padding :], start, clock.times[1:]


def speeds(batch: int, lengths: Lengths, start: float, times: list[float]) -> dict:
    """Tokens per second of a batch: generated ones over the whole run, over the steps after the first token, and the
    prompt's over the time to it."""
    first, last = times[0] - start, times[-1] - start
    return {
        "tokens/s": batch * lengths.new / last,
        "decode tokens/s": batch * (lengths.new - 1) / (last - first),
        "prefill tokens/s": batch * lengths.prompt / first,
        "first token s": first,
    }
