"""Llama in fp16, bf16 and fp32: as far from the dense reference as the type itself is from fp32, and no farther."""

from contextlib import nullcontext

import pytest
import torch
from dense import rounded_cache
from models_tiny import tokens
from transformers import DynamicCache
from zoo import tiny

import kvist
from kvist.models.compat import cache_argument

PROMPT, STEPS, WINDOW = 150, 40, 32
METHODS = {"kivi": f"kivi:2 recent={WINDOW}", "logquant": f"logquant:2 window={WINDOW}"}


@torch.no_grad()
def logits_of(model, cache) -> torch.Tensor:
    ids = tokens(1, PROMPT + STEPS)
    chunks = [ids[:, :PROMPT], *ids[:, PROMPT:].split(1, 1)]
    return torch.cat([model(chunk, **cache_argument(cache)).logits for chunk in chunks], 1).float()


def error(found: torch.Tensor, expected: torch.Tensor) -> torch.Tensor:
    """The mean distance of logits, over the decoded positions."""
    return (found - expected)[:, PROMPT:].abs().mean()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("method", list(METHODS))
@pytest.mark.parametrize("attached", [False, True], ids=["stock", "attached"])
def test_within_the_rounding_of_the_type(dtype, method, attached):
    """The budget is measured: what the type costs the reference itself, on the same tokens."""
    model, wide = tiny("llama", "sdpa", dtype), tiny("llama", "sdpa")
    expected = logits_of(model, rounded_cache(model, method, 2, WINDOW))
    budget = error(expected, logits_of(wide, rounded_cache(wide, method, 2, WINDOW)))
    with kvist.attach(model) if attached else nullcontext():
        cache = kvist.Cache(model, METHODS[method])
        found = logits_of(model, cache)
    assert all(layer.dtype == dtype and layer.key.exact.ring.dtype == dtype for layer in cache.inner.ours)
    assert error(found, expected) <= 1.5 * budget + 1e-5 * expected.std()
    # the budget is far below what rounding to 2 bits does, so that a wrong token could not hide in it
    exact = logits_of(model, DynamicCache(config=model.config))
    assert budget < 0.5 * error(expected, exact)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("attached", [False, True], ids=["stock", "attached"])
def test_exact_is_bit_identical_in_every_type(dtype, attached):
    model = tiny("llama", "sdpa", dtype)
    expected = logits_of(model, DynamicCache(config=model.config))
    with kvist.attach(model) if attached else nullcontext():
        assert torch.equal(logits_of(model, kvist.Cache(model, "exact")), expected)
