"""Every family × method × way of using a cache, attached and not, against a dense reference."""

from contextlib import nullcontext

import pytest
import torch
from dense import rounded_cache
from models_tiny import PAD, padded, tokens
from transformers import DynamicCache
from zoo import CASES, tiny

import kvist
from kvist.cache.view import View
from kvist.models.compat import cache_argument

PROMPT, STEPS, WINDOW, BITS = 150, 40, 32, 2
METHODS = {"kivi": f"kivi:{BITS} recent={WINDOW}", "logquant": f"logquant:{BITS} window={WINDOW}"}

families = pytest.mark.parametrize(("family", "attention"), CASES)
methods = pytest.mark.parametrize("method", list(METHODS))
attached = pytest.mark.parametrize("attached", [False, True], ids=["stock", "attached"])


def reading(model, on: bool):
    return kvist.attach(model) if on else nullcontext()


@torch.no_grad()
def logits_of(model, cache, chunks, mask=None) -> torch.Tensor:
    """Logits (B, T, V) of the tokens of all chunks, one forward per chunk."""
    seen, out = 0, []
    for chunk in chunks:
        seen += chunk.shape[1]
        given = {} if mask is None else {"attention_mask": mask[:, :seen]}
        out.append(model(chunk, **cache_argument(cache), **given).logits)
    return torch.cat(out, 1)


def sequence(batch: int = 1, seed: int = 1) -> list[torch.Tensor]:
    """A prompt and single tokens, long enough that keys and values are packed several times while decoding."""
    ids = tokens(batch, PROMPT + STEPS, seed)
    return [ids[:, :PROMPT], *ids[:, PROMPT:].split(1, 1)]


def same(found: torch.Tensor, expected: torch.Tensor) -> None:
    """Equal up to fp32 rounding, relative to the spread of the logits (B, T, V). Rounding that differs in the last bit
    may move a scale by one fp16 step or a code by one, hence not 1e-6. One token treated wrongly moves the logits of
    most decoded positions by a tenth of what all packed tokens do together: 0.03 or more (see test_greedy)."""
    error = (found - expected).abs().amax(-1) / expected.std()
    assert error[:, -STEPS:].median() <= 5e-4
    assert error.max() <= 0.05


def read_packed(family: str, attention: str, attached: bool) -> bool:
    """Whether pages are read packed. Falcon does not use the attention interface: under sdpa the handles answer it,
    attached or not; its eager attention multiplies dense tensors."""
    return attention == "sdpa" if family.startswith("falcon") else attached


def no_dense(monkeypatch) -> None:
    def refuse(*_):
        raise AssertionError("a whole track was decoded")

    monkeypatch.setattr(View, "dense", refuse)


@families
@attached
def test_exact_is_bit_identical_to_transformers_own_cache(family, attention, attached):
    model = tiny(family, attention)
    expected = logits_of(model, DynamicCache(config=model.config), sequence(2), torch.ones(2, PROMPT + STEPS))
    with reading(model, attached):
        found = logits_of(model, kvist.Cache(model, "exact"), sequence(2), torch.ones(2, PROMPT + STEPS))
    assert torch.equal(found, expected)


@families
@methods
@attached
def test_greedy(family, attention, method, attached, monkeypatch):
    """Teacher-forced logits equal the dense reference's at every step; generate then picks the same tokens."""
    model = tiny(family, attention)
    expected = logits_of(model, rounded_cache(model, method, BITS, WINDOW), sequence())
    exact = logits_of(model, DynamicCache(config=model.config), sequence())
    effect = (expected - exact)[:, PROMPT:].abs().amax(-1) / exact.std()
    assert effect.median() > 0.03, "2 bits must show, or this test could not fail"
    with reading(model, attached):
        if read_packed(family, attention, attached):
            no_dense(monkeypatch)
        cache = kvist.Cache(model, METHODS[method])
        found = logits_of(model, cache, sequence())
        same(found, expected)
        assert cache.report().packed > PROMPT / 2
        cache.close()
        options = {"max_new_tokens": 24, "do_sample": False}
        prompt = sequence()[0]
        ours = model.generate(prompt, **cache_argument(kvist.Cache(model, METHODS[method])), **options)
    assert torch.equal(
        ours, model.generate(prompt, **cache_argument(rounded_cache(model, method, BITS, WINDOW)), **options)
    )


@families
@methods
@attached
def test_left_padded_rows_equal_the_same_rows_alone(family, attention, method, attached, monkeypatch):
    model = tiny(family, attention)
    lengths = (PROMPT, PROMPT - 37, 61)
    batch, steps = padded(lengths), tokens(len(lengths), STEPS, seed=5)
    mask = torch.cat([batch["attention_mask"], torch.ones(len(lengths), STEPS, dtype=torch.long)], 1)
    positions = (mask.cumsum(1) - 1).clamp_min(0)
    cache, seen, found = kvist.Cache(model, METHODS[method]), 0, []
    with reading(model, attached), torch.no_grad():
        if read_packed(family, attention, attached):
            no_dense(monkeypatch)
        for chunk in (batch["input_ids"], *steps.split(1, 1)):
            part = slice(seen, seen + chunk.shape[1])
            seen = part.stop
            given = {"attention_mask": mask[:, :seen], "position_ids": positions[:, part]}
            found.append(model(chunk, **cache_argument(cache), **given).logits[:, -1:])
    for row, length in enumerate(lengths):
        alone = [batch["input_ids"][row : row + 1, -length:], *steps[row : row + 1].split(1, 1)]
        expected = logits_of(model, rounded_cache(model, method, BITS, WINDOW), alone)[:, length - 1 :]
        same(torch.cat(found, 1)[row : row + 1], expected)
    assert PAD not in batch["input_ids"][2, -61:]


@families
@methods
@attached
def test_crop_takes_back_what_was_never_asked(family, attention, method, attached, monkeypatch):
    """Steps that guess a few tokens and take some back, as assisted decoding does, equal the reference without them."""
    model = tiny(family, attention)
    ids, guesses = tokens(1, PROMPT + STEPS), tokens(1, STEPS, seed=9)
    reference, cache = rounded_cache(model, method, BITS, WINDOW), kvist.Cache(model, METHODS[method])
    cache.activate_past_recording()
    with torch.no_grad():
        expected = [model(ids[:, :PROMPT], **cache_argument(reference)).logits[:, -1]]
        expected += [model(i, **cache_argument(reference)).logits[:, -1] for i in ids[:, PROMPT:].split(1, 1)]
    found = []
    with reading(model, attached), torch.no_grad():
        if read_packed(family, attention, attached):
            no_dense(monkeypatch)
        found.append(model(ids[:, :PROMPT], **cache_argument(cache)).logits[:, -1])
        cache.crop(0)
        for i in range(STEPS):
            wrong = 1 + i % 5
            chunk = torch.cat([ids[:, PROMPT + i : PROMPT + i + 1], guesses[:, i : i + wrong]], 1)
            found.append(model(chunk, **cache_argument(cache)).logits[:, 0])
            cache.crop(-(chunk.shape[1] - 1))
            assert cache.get_seq_length() == PROMPT + i + 1
    same(torch.stack(found, 1), torch.stack(expected, 1))


@families
@pytest.mark.parametrize("method", ["exact", *METHODS])
def test_saved_and_resumed(family, attention, method, tmp_path):
    """A cache that is saved half-way and loaded gives the logits of one that was not, bit for bit."""
    model, chunks = tiny(family, attention), sequence(2)
    mask, text = torch.ones(2, PROMPT + STEPS, dtype=torch.long), METHODS.get(method, method)
    straight = logits_of(model, kvist.Cache(model, text), chunks, mask)
    cache = kvist.Cache(model, text)
    first = logits_of(model, cache, chunks[:30], mask)
    cache.save(tmp_path / "cache.safetensors")
    cache.close()
    resumed = kvist.Cache.load(tmp_path / "cache.safetensors", model, text)
    assert resumed.get_seq_length() == first.shape[1]
    with torch.no_grad():
        rest = [
            model(chunk, **cache_argument(resumed), attention_mask=mask[:, : first.shape[1] + i + 1]).logits
            for i, chunk in enumerate(chunks[30:])
        ]
    assert torch.equal(torch.cat([first, *rest], 1), straight)


@families
def test_the_plan_knows_the_shape_that_the_model_gives(family, attention):
    model = tiny(family, attention)
    cache = kvist.Cache(model, "kivi")
    logits_of(model, cache, [tokens(1, 40)])
    assert all(layer.shape == cache.inner.describes.shape for layer in cache.inner.ours)
    served = cache.inner.describes.served
    sliding = [i for i, layer in enumerate(cache.layers) if layer.is_sliding]
    assert sorted([*served, *sliding]) == list(range(len(cache.layers)))
    assert bool(sliding) == family.startswith(("gemma", "gpt-oss"))
