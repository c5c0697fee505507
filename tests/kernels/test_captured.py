"""Captured decode steps are ordinary ones: the same numbers, the same storage."""

import pytest
import torch
from interpreter import DEVICE
from models_tiny import padded, tiny_llama, unpadded
from transformers import Gemma3ForCausalLM, Gemma3TextConfig

import kvist
from kvist.attention.captured import Captured
from kvist.models.compat import cache_argument
from kvist.testing.cases import recipe

STEPS = 4
SETTINGS = {  # each packs something within these steps
    "kivi:2 recent=32": [94, 61],
    "kivi k=3 v=16 recent=32 sinks=2": [97, 65],
    "hadamard:4": [90, 60],
    "streaming:2 window=40": [143, 200],
    "logquant:2 window=32": [159, 96],
    "kvmix:2": [100, 77],
    "kvquant:2 keys=post-rope outliers=0": [90, 61],
}


def generated(model, made, prompt, following, step):
    """Logits of some steps after a prompt, and the cache."""
    cache = kvist.Cache(model, made)
    with torch.no_grad():
        model(**prompt, **cache_argument(cache))
        return torch.cat(step(cache, following), 1), cache


@pytest.mark.parametrize("text", SETTINGS)
def test_captured_steps_are_ordinary_steps(text, monkeypatch):
    model, made = tiny_llama(layers=1).to(DEVICE), recipe(text)
    prompt = {name: x.to(DEVICE) for name, x in padded(SETTINGS[text]).items()}
    mask, following = prompt["attention_mask"], torch.randint(3, 100, (2, STEPS)).to(DEVICE)

    def ordinary(cache, following):
        attended, found = mask, []
        with kvist.attach(model):
            for token in following.split(1, dim=1):
                attended = torch.cat([attended, mask.new_ones(2, 1)], 1)
                found.append(model(input_ids=token, attention_mask=attended, **cache_argument(cache)).logits)
        return found

    def captured(cache, following):
        monkeypatch.setenv("TRITON_INTERPRET", "1")
        with Captured(model, cache, STEPS) as steps:
            return [steps.step(token).clone() for token in following.split(1, dim=1)]

    expected, a = generated(model, made, prompt, following, ordinary)
    found, b = generated(model, made, prompt, following, captured)
    assert (found - expected).abs().max() <= 4e-3 * expected.abs().max()
    for x, y in zip(a.inner.ours, b.inner.ours, strict=True):
        assert x.lengths == y.lengths
        for s, t in zip(x.tracks, y.tracks, strict=True):
            assert s.states == t.states and s.exact.pins == t.exact.pins and s.pool.tables == t.pool.tables
            packed = 0
            for row, frontier in enumerate(s.frontiers):
                packed += frontier
                if frontier:
                    decoded = (track.decode(row, range(frontier), x.maps[row]) for track in (s, t))
                    assert torch.equal(*decoded)
            assert packed
    with torch.no_grad():  # the cache goes on as if nothing had been
        ones = mask.new_ones(2, mask.shape[1] + STEPS + 1)
        ones[:, : mask.shape[1]] = mask
        after = [model(input_ids=following[:, :1], attention_mask=ones, **cache_argument(c)).logits for c in (a, b)]
    assert torch.allclose(*after, atol=4e-3 * float(expected.abs().max()))


@pytest.mark.parametrize("text", ["kivi:2 recent=32", "kvquant:3", "hadamard:4"])
def test_attached_models_decode_by_the_kernels(text, monkeypatch):
    model, made, prompt = tiny_llama(layers=1), recipe(text), unpadded(2, 95)
    following = torch.randint(3, 100, (2, STEPS), generator=torch.Generator().manual_seed(3))

    def steps(cache, following):
        mask = torch.ones(2, 95, dtype=torch.long)
        with kvist.attach(model):
            for token in following.split(1, dim=1):
                mask = torch.cat([mask, torch.ones(2, 1, dtype=mask.dtype)], 1)
                yield model(input_ids=token, attention_mask=mask, **cache_argument(cache)).logits

    def run():
        return generated(model, made, prompt, following, lambda *given: list(steps(*given)))

    expected, a = run()
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    found, b = run()
    assert (found - expected).abs().max() <= 4e-3 * expected.abs().max()
    assert [t.states for layer in a.inner.ours for t in layer.tracks] == [
        t.states for layer in b.inner.ours for t in layer.tracks
    ]


def test_positions_go_on_from_those_of_the_prompt(monkeypatch):
    """Left padding with position ids, as `generate` gives them."""
    model, made, prompt = tiny_llama(layers=1), recipe("kivi:2 recent=32"), padded([94, 61])
    mask, following = prompt["attention_mask"], torch.randint(3, 100, (2, STEPS))
    prompt["position_ids"] = (mask.cumsum(-1) - 1).clamp_min(0)

    def ordinary(cache, following):
        attended = mask
        with kvist.attach(model):
            for token in following.split(1, dim=1):
                attended = torch.cat([attended, mask.new_ones(2, 1)], 1)
                at = attended.sum(-1, keepdim=True) - 1
                given = {"attention_mask": attended, "position_ids": at} | cache_argument(cache)
                yield model(input_ids=token, **given).logits

    def captured(cache, following):
        monkeypatch.setenv("TRITON_INTERPRET", "1")
        with Captured(model, cache, STEPS) as steps:
            return [steps.step(token) for token in following.split(1, dim=1)]

    expected, _ = generated(model, made, prompt, following, lambda *given: list(ordinary(*given)))
    found, _ = generated(model, made, prompt, following, captured)
    assert (found - expected).abs().max() <= 4e-3 * expected.abs().max()


def test_rings_hold_what_a_step_packs_and_adds(monkeypatch):
    """A window without a bound: nothing that is packed in a launch may be overwritten by it."""
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    model = tiny_llama(layers=1)
    for tokens in (96, 128, 160):
        cache = kvist.Cache(model, recipe("kvmix:2 ratio_of=context ratio=0.1"))
        with torch.no_grad():
            model(**unpadded(1, tokens), **cache_argument(cache))
        layer = cache.inner.ours[0]
        oldest = min(layer.key.frontiers[0], layer.value.frontiers[0])
        with Captured(model, cache, 1):
            assert layer.behind(0) + 1 - oldest <= layer.key.exact.capacity


def test_a_captured_cache_is_left_alone(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    model = tiny_llama(layers=1)
    cache = kvist.Cache(model, recipe("kivi:2 recent=32"))
    with torch.inference_mode():
        model(**unpadded(2, 70), **cache_argument(cache))
        steps = Captured(model, cache, 2)
        steps.step(torch.tensor([[5], [6]]))
    others = [
        lambda: cache.crop(-1),
        lambda: cache.reorder_cache(torch.tensor([1, 0])),
        cache.reset,
        lambda: model(input_ids=torch.tensor([[5], [6]]), **cache_argument(cache)),
    ]
    for other in others:
        with pytest.raises(ValueError, match="captured"), torch.no_grad():
            other()
    steps.step(torch.tensor([[7], [8]]))
    steps.close()
    mask = torch.ones(2, 73, dtype=torch.long)
    with torch.no_grad():
        model(input_ids=torch.tensor([[5], [6]]), attention_mask=mask, **cache_argument(cache))
    cache.crop(-1)


def test_greedy_generation_and_the_end_of_the_room(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    model = tiny_llama(layers=1)
    cache, prompt = kvist.Cache(model, recipe("kivi:2 recent=32")), unpadded(1, 70)
    with torch.no_grad():
        token = model(**prompt, **cache_argument(cache)).logits[:, -1:].argmax(-1)
    with Captured(model, cache, 3) as steps:
        found = steps.generate(token, 3)
        assert found.shape == (1, 3)
        with pytest.raises(ValueError, match="a token per row"):
            steps.step(found)
        with pytest.raises(ValueError, match="no room"):
            steps.step(found[:, -1:])


@pytest.mark.parametrize(
    ("text", "reason"),
    [("kvquant:2", "before a rotary embedding"), ("kvquant:2 keys=post-rope", "outliers"), ("exact", "packs nothing")],
)
def test_what_cannot_be_captured_is_refused_by_name(text, reason, monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    model = tiny_llama(layers=1)
    cache = kvist.Cache(model, recipe(text))
    with pytest.raises(ValueError, match="empty"):
        Captured(model, cache)
    with torch.no_grad():
        model(**unpadded(1, 40), **cache_argument(cache))
    with pytest.raises(ValueError, match=reason):
        Captured(model, cache)
    with torch.no_grad():  # and nothing is changed
        model(input_ids=torch.tensor([[5]]), **cache_argument(cache))


def test_layers_of_transformers_own_cannot_be_captured():
    options = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    kinds = ["sliding_attention", "full_attention"]
    model = Gemma3ForCausalLM(Gemma3TextConfig(vocab_size=101, head_dim=32, layer_types=kinds, **options))
    with pytest.raises(ValueError, match="every layer"):
        Captured(model, kvist.Cache(model, "kivi:2"))
