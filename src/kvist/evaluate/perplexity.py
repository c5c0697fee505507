"""Negative log-likelihood of windows of text, and divergence from the exact cache, for several methods at once.

"simulated": every token but the sinks is quantized and back within one teacher-forced pass, as published tables are
made; no window, no storage. "stored": one pass over a living cache, where every query sees what the cache holds, its
windows included. The two are different numbers and are never mixed.
"""

import time
from collections.abc import Callable, Iterator, Sequence
from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor

from kvist.cache.cache import Cache
from kvist.evaluate.simulate import Simulated
from kvist.models.adapter import Model, describe
from kvist.plan import Recipe

Mode = Literal["simulated", "stored"]
MODES: tuple[str, ...] = get_args(Mode)
CHUNK = 1 << 19  # logits compared at a time: their fp32 copies fit a core's cache


class Score(NamedTuple):
    """One recipe on one window, both by their numbers. nll: nats, summed over the `tokens` scored; kl: nats, mean over
    them, of the next-token distribution from that of the exact cache; agreement: the share of them where both put the
    same token first; bits: stored bits per element; seconds: the forward pass."""

    recipe: int
    window: int
    tokens: int
    nll: float
    kl: float
    agreement: float
    bits: float
    seconds: float


def measure(
    model,
    windows: Tensor,
    recipes: Sequence[Recipe],
    mode: Mode,
    *,
    batch: int = 1,
    wanted: Callable[[int, int], bool] = lambda recipe, window: True,
) -> Iterator[Score]:
    """A score for each window of `windows`, int64 (n, seqlen), and each recipe that is `wanted` there (called with
    their numbers). The exact logits of a window are computed once and shared. `batch` windows go through the model at
    a time.

    Bits: in mode "stored" those that the cache reports, with room for exactly the window; in mode "simulated" those
    that a packed token takes. Raises ValueError, before anything is computed, for a recipe that does not suit the
    model.
    """
    if mode not in MODES:
        raise ValueError(f"a mode is {' or '.join(map(repr, MODES))}, found {mode!r}")
    facts = describe(model)
    recipes = [recipe.model_copy(update={"prefill": "stored"}) for recipe in recipes]
    packed = [packed_bits(recipe, facts) for recipe in recipes]  # refuses what cannot be laid out
    for recipe in recipes:
        cache = _cache(model, recipe, mode, 0)
        if isinstance(cache, Cache):
            cache.close()
    return _scores(model, windows, recipes, packed, mode, batch, wanted)


def _scores(model, windows: Tensor, recipes, packed, mode: Mode, batch: int, wanted) -> Iterator[Score]:
    for start in range(0, len(windows), batch):
        numbers = range(start, min(start + batch, len(windows)))
        asked = [i for i in range(len(recipes)) if any(wanted(i, n) for n in numbers)]
        if not asked:
            continue
        ids = windows[start : numbers.stop].to(model.device)
        exact = _logits(model, ids)
        for i in asked:
            cache, began = _cache(model, recipes[i], mode, ids.shape[1]), time.perf_counter()
            logits = _logits(model, ids, cache)
            if logits.is_cuda:
                torch.cuda.synchronize(logits.device)
            seconds = (time.perf_counter() - began) / len(ids)
            bits = packed[i] if isinstance(cache, Simulated) else cache.report().bits_per_element
            if isinstance(cache, Cache):
                cache.close()
            for n, rows in zip(numbers, zip(ids, exact, logits, strict=True), strict=True):
                if wanted(i, n):
                    yield Score(i, n, ids.shape[1] - 1, *compare(*rows), bits, seconds)


def packed_bits(recipe: Recipe, facts: Model) -> float:
    """Bits per element of packed tokens, mean of keys and values, over all layers: pages alone, without windows, sinks
    and tables. What a cache's bits come down to as its length grows."""
    shape, plans = facts.shape, recipe.for_layers(len(facts.served))
    nbytes = sum(
        spec.page_bytes(shape.heads, recipe.page)
        for plan in plans
        for side, dim in zip(plan.sides, (shape.key_dim, shape.value_dim), strict=True)
        for spec in side.codec.layout(shape.heads, dim, shape.dtype).values()
    )
    return 8 * nbytes / (len(plans) * recipe.page * shape.heads * (shape.key_dim + shape.value_dim))


@torch.inference_mode()
def compare(ids: Tensor, exact: Tensor, logits: Tensor) -> tuple[float, float, float]:
    """Of one window's tokens (T,) and logits (T, vocabulary): the sum of the negative log-likelihoods of tokens 1..T-1,
    the mean divergence from the exact distributions that they were drawn from, and the share of equal first choices.
    In fp32, summed in fp64."""
    count, step = len(ids) - 1, max(1, CHUNK // logits.shape[-1])
    total = torch.zeros(3, dtype=torch.float64, device="cpu")
    for start in range(0, count, step):
        part = slice(start, min(start + step, count))
        first, other = exact[part].float(), logits[part].float()
        same = first.argmax(-1) == other.argmax(-1)
        p, q = first.log_softmax(-1), other.log_softmax(-1)
        told = q.gather(-1, ids[1:][part].unsqueeze(-1)).double()
        divergence = (p - q).mul_(p.exp()).sum(-1).double()
        total += torch.stack([-told.sum(), divergence.sum(), same.sum().double()]).cpu()
    nll, kl, agreed = total.tolist()
    return nll, kl / count, agreed / count


def _cache(model, recipe: Recipe, mode: Mode, reserve: int) -> Simulated | Cache:
    return Simulated(model, recipe) if mode == "simulated" else Cache(model, recipe, reserve=reserve)


@torch.inference_mode()
def _logits(model, ids: Tensor, cache: Simulated | Cache | None = None) -> Tensor:
    """Logits (B, T, vocabulary). The cache is read decoded, not by packed attention: every query of a window reads the
    whole of it, and one decode for all is faster."""
    return model(ids, past_key_values=cache, use_cache=cache is not None).logits
