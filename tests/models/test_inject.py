"""Outliers that change keys and values and leave logits alone."""

import copy

import pytest
import torch
from families.zoo import FAMILIES, tiny
from models_tiny import llama_config, sharpen, tiny_llama, tokens
from torch import Tensor, nn
from transformers import DynamicCache, LlamaForCausalLM, Olmo2Config, Olmo2ForCausalLM, OlmoConfig, OlmoForCausalLM

from kvist.models.compat import cache_argument
from kvist.models.inject import STRENGTHS, TOLERANCE, inject
from kvist.models.rope import check, pre_rope, rotary, tagged

CASES = ["llama", "llama-yarn", "mistral", "qwen2", "cohere", "granite", "starcoder2", "gemma2"]


class Keys(DynamicCache):
    """Keeps what each layer's update was given: keys before RoPE, and values."""

    def update(self, key_states, value_states, layer_idx, *args, **kwargs):
        self.__dict__.setdefault("given", {})[layer_idx] = (pre_rope(key_states).key, value_states)
        return super().update(key_states, value_states, layer_idx, *args, **kwargs)


@torch.no_grad()
def run(model) -> tuple[Tensor, dict[int, tuple[Tensor, Tensor]]]:
    """Logits, and keys and values of each layer, of a batch that `inject` has not seen."""
    cache = Keys(config=model.config)
    with tagged(model):
        logits = model(tokens(2, 40, seed=5), **cache_argument(cache), use_cache=True).logits
    return logits, cache.given


def injected(model: nn.Module, strength: str, seed: int = 0) -> nn.Module:
    return inject(copy.deepcopy(model), strength, seed)


def weights(model: nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize("strength", STRENGTHS)
@pytest.mark.parametrize("family", CASES)
def test_logits_stay_whatever_the_family(family, strength):
    plain = tiny(family, FAMILIES[family][2][0])
    model = injected(plain, strength)
    (before, _), (after, _) = run(plain), run(model)
    assert (before - after).abs().max() < TOLERANCE
    assert not same(weights(plain), weights(model))
    check(model, rotary(model))


@pytest.mark.parametrize("kv_heads", [1, 2, 4])
@pytest.mark.parametrize("strength", STRENGTHS)
def test_keys_grow_by_the_stated_factors(strength, kv_heads):
    plain = tiny_llama(kv_heads=kv_heads)
    (before, old), (after, new) = run(plain), run(injected(plain, strength))
    assert (before - after).abs().max() < TOLERANCE
    amount = STRENGTHS[strength]
    factors = torch.logspace(0, 1, amount.pairs, base=amount.most / amount.least) * amount.least
    for layer in old:
        grown = (new[layer][0].abs().amax((0, 2)) / old[layer][0].abs().amax((0, 2))).unflatten(1, (2, -1))
        for head in grown:  # (2, F): a pair is channels (i, i + F)
            assert torch.allclose(head[0], head[1], rtol=1e-4)
            largest = head[0].sort().values
            assert torch.allclose(largest[-amount.pairs :], factors, rtol=1e-4)
            assert torch.allclose(largest[: -amount.pairs], torch.ones(16 - amount.pairs), rtol=1e-4)


def test_interleaved_pairs_grow_together():
    plain = tiny("cohere", "sdpa")
    (_, old), (_, new) = run(plain), run(injected(plain, "mild"))
    grown = (new[0][0].abs().amax((0, 2)) / old[0][0].abs().amax((0, 2))).unflatten(1, (-1, 2))
    assert torch.allclose(grown[..., 0], grown[..., 1], rtol=1e-4)
    assert [int(n) for n in (grown[..., 0] > 7.99).sum(1)] == [1, 1]


@pytest.mark.parametrize("strength", STRENGTHS)
def test_values_are_mapped_by_a_matrix_of_the_stated_condition(strength):
    plain = tiny_llama(kv_heads=2, layers=1)
    model, condition = injected(plain, strength), STRENGTHS[strength].condition
    old = plain.model.layers[0].self_attn.v_proj.weight.double().unflatten(0, (2, -1))
    new = model.model.layers[0].self_attn.v_proj.weight.double().unflatten(0, (2, -1))
    for head in range(2):
        mapped = torch.linalg.lstsq(old[head].T, new[head].T).solution.T  # new = M old
        assert torch.allclose(mapped @ old[head], new[head], atol=1e-5)
        assert torch.linalg.cond(mapped).item() == pytest.approx(condition, rel=1e-3)
        rows = mapped.norm(dim=1)  # D Q: a channel's gain is its entry of D
        assert rows.max().item() == pytest.approx(condition**0.5, rel=1e-3)
        assert rows.min().item() == pytest.approx(condition**-0.5, rel=1e-3)
    (_, a), (_, b) = run(plain), run(model)
    before, after = (x[0][1][:, 0].flatten(0, 1).T.cov() for x in (a, b))
    spread = [c.diagonal().max() / c.diagonal().min() for c in (before, after)]
    assert spread[1] > condition * spread[0] / 4


def test_biases_are_part_of_keys_and_values():
    plain = sharpen(LlamaForCausalLM(llama_config(attention_bias=True)))
    with torch.no_grad():
        for name, weight in plain.named_parameters():
            if name.endswith("proj.bias"):
                weight.copy_(torch.linspace(-2, 2, len(weight)))
    model = injected(plain, "strong")
    (before, _), (after, _) = run(plain), run(model)
    assert (before - after).abs().max() < TOLERANCE
    old, new = plain.model.layers[0].self_attn, model.model.layers[0].self_attn
    assert not torch.equal(old.k_proj.bias, new.k_proj.bias)
    assert not torch.equal(old.v_proj.bias, new.v_proj.bias)
    assert torch.equal(old.o_proj.bias, new.o_proj.bias)


def test_the_same_seed_draws_the_same():
    plain = tiny_llama()
    one, two, other = (weights(injected(plain, "strong", seed)) for seed in (3, 3, 4))
    assert same(one, two) and not same(one, other)


def test_it_works_in_place_and_on_served_layers_only():
    model = copy.deepcopy(tiny("gemma2", "eager")).train()
    before = weights(model)
    assert inject(model, "mild") is model and model.training
    changed = {name for name, value in weights(model).items() if not torch.equal(value, before[name])}
    projections = ("q_proj", "k_proj", "v_proj", "o_proj")
    assert changed == {f"model.layers.1.self_attn.{name}.weight" for name in projections}


@pytest.mark.parametrize(
    "family, reason", [("qwen3", "q_norm, k_norm"), ("gemma3", "q_norm"), ("phi3", "no linear q_proj")]
)
def test_what_is_not_known_is_refused_by_name(family, reason):
    model = tiny(family, FAMILIES[family][2][0])
    with pytest.raises(ValueError, match=reason):
        inject(model, "mild")


def test_other_mistakes_are_refused_in_a_sentence():
    with pytest.raises(ValueError, match="mild or strong, found 'huge'"):
        inject(tiny_llama(), "huge")
    with pytest.raises(ValueError, match=r"fp32.*found torch.bfloat16.*round it afterwards"):
        inject(tiny("llama", "sdpa", torch.bfloat16), "mild")
    sizes = {"vocab_size": 64, "hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 1}
    with pytest.raises(ValueError, match="clip_qkv"):
        inject(OlmoForCausalLM(OlmoConfig(**sizes, num_attention_heads=4, clip_qkv=8.0)), "mild")
    with pytest.raises(ValueError, match="olmo2: layer 0 has q_norm"):
        inject(Olmo2ForCausalLM(Olmo2Config(**sizes, num_attention_heads=4)), "mild")


def test_a_model_whose_logits_would_move_is_left_as_it_was():
    model = copy.deepcopy(tiny_llama())
    model.model.layers[1].self_attn.v_proj.register_forward_hook(lambda module, args, out: out.tanh())
    before = weights(model)
    with pytest.raises(ValueError, match="logits moved by"):
        inject(model, "mild")
    assert same(before, weights(model))
