"""KVQuant in every family: keys before that family's own rotary embedding, against a dense reference."""

from contextlib import nullcontext
from functools import cache

import pytest
import torch
import torch.nn.functional as F
from dense_kvquant import SETTINGS, fit, fitted, reference
from models_tiny import padded, tokens
from torch import Tensor
from transformers import DynamicCache
from zoo import CASES, FAMILIES, tiny

import kvist
from kvist.cache.handle import Handle
from kvist.cache.view import View
from kvist.methods.kvquant import recipe
from kvist.models.rope import tagged

PROMPT, STEPS = 100, 16
MAIN = "nuq3-1%"
# one of each kind of rotation, of attention and of layers
SOME = ["llama3-rope", "llama-yarn", "phi3", "cohere", "gemma3", "gpt-oss", "falcon-multi-query"]
SOME_CASES = [(family, attention) for family, attention in CASES if family in SOME]
OTHERS = [name for name in SETTINGS if name != MAIN]
MATRIX = [(*case, MAIN) for case in CASES] + [(*case, setting) for case in SOME_CASES for setting in OTHERS]

attached = pytest.mark.parametrize("attached", [False, True], ids=["stock", "attached"])


def plan(family: str, attention: str, setting: str = MAIN):
    return recipe(fitted(family, attention, setting), SETTINGS[setting].recent)


def dense(family: str, attention: str, setting: str = MAIN) -> DynamicCache:
    return reference(tiny(family, attention), fitted(family, attention, setting), SETTINGS[setting].recent)


def reading(model, on: bool):
    return kvist.attach(model) if on else nullcontext()


@torch.no_grad()
def logits_of(model, cache, chunks) -> Tensor:
    """Logits (B, T, V) of the tokens of all chunks, one forward per chunk."""
    with tagged(model):
        return torch.cat([model(chunk, past_key_values=cache).logits for chunk in chunks], 1)


def sequence(prompt: int = PROMPT) -> list[Tensor]:
    """A prompt, a chunk, single tokens, a chunk longer than what waits for a crop."""
    ids = tokens(1, PROMPT + 60 + STEPS)
    ids = torch.cat([ids[:, :prompt], ids[:, PROMPT:]], 1)
    return [ids[:, :prompt], *ids[:, prompt:].split([5, *[1] * STEPS, 45, 5, 1, 1, 1, 1, 1], 1)]


@cache
def expected(family: str, attention: str, setting: str, prompt: int = PROMPT) -> Tensor:
    return logits_of(tiny(family, attention), dense(family, attention, setting), sequence(prompt))


def same(found: Tensor, wanted: Tensor) -> None:
    """Equal up to fp32 rounding, relative to the spread of the logits (B, T, V). Undoing a rotation rounds, too, and may
    move a code by one: hence a median, and a bound on the worst."""
    error = (found - wanted).abs().amax(-1) / wanted.std()
    assert error.median() <= 5e-4
    assert error.max() <= 0.05


@attached
@pytest.mark.parametrize(("family", "attention", "setting"), MATRIX)
def test_steps(family, attention, setting, attached, monkeypatch):
    model, wanted = tiny(family, attention), expected(family, attention, setting)
    exact = logits_of(model, DynamicCache(config=model.config), sequence())
    effect = (wanted - exact)[:, PROMPT:].abs().amax(-1) / exact.std()
    assert effect.median() > 0.02, "what is rounded must show, or this test could not fail"
    with reading(model, attached):
        if attention == "sdpa" if family.startswith("falcon") else attached:
            monkeypatch.setattr(View, "dense", None)
        cache = kvist.Cache(model, plan(family, attention, setting))
        same(logits_of(model, cache, sequence()), wanted)
    assert cache.recipe.rotary == ("post" not in setting)
    assert cache.report().packed >= PROMPT
