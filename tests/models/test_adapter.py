"""What a model is, read from its config; and who is refused, with the reason."""

import pytest
import torch
import transformers
from models_tiny import llama_config, tiny_llama
from torch import nn
from transformers import LlamaForCausalLM

import kvist
from kvist.models.adapter import describe

SMALL = {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
LATENT = {
    "intermediate_size": 32, "num_key_value_heads": 4, "kv_lora_rank": 16, "q_lora_rank": 16, "qk_rope_head_dim": 8,
    "v_head_dim": 8, "qk_nope_head_dim": 8, "n_routed_experts": 4, "num_experts_per_tok": 2,
    "moe_intermediate_size": 16, "n_group": 1, "topk_group": 1, "first_k_dense_replace": 2,
}  # fmt: skip
REFUSED = {
    "T5": (
        "T5",
        {"vocab_size": 64, "d_model": 32, "d_kv": 8, "d_ff": 32, "num_layers": 1, "num_heads": 4},
        "encoder-decoder",
    ),
    "DeepSeek-V2": ("DeepseekV2", SMALL | LATENT, "compressed latents"),
    "DeepSeek-V3": ("DeepseekV3", SMALL | LATENT, "compressed latents"),
    "Falcon with ALiBi": ("Falcon", SMALL | {"alibi": True}, "ALiBi"),
    "Bloom": ("Bloom", {"vocab_size": 64, "hidden_size": 32, "n_layer": 1, "n_head": 4}, "ALiBi"),
    "MPT": ("Mpt", {"vocab_size": 64, "d_model": 32, "n_layers": 1, "n_heads": 4}, "ALiBi"),
    "all sliding": ("Mistral", SMALL | {"intermediate_size": 32, "sliding_window": 16}, "no full-attention layer"),
}
CLASS = {"T5": "T5ForConditionalGeneration"}


@pytest.mark.parametrize("case", list(REFUSED))
def test_models_that_are_refused_say_why_and_are_left_alone(case):
    name, options, reason = REFUSED[case]
    config = getattr(transformers, f"{name}Config")(**options)
    with torch.device("meta"):
        model = getattr(transformers, CLASS.get(name, f"{name}ForCausalLM"))._from_config(config)
    with pytest.raises(ValueError, match=reason) as caught:
        kvist.Cache(model, "kivi")
    message = str(caught.value)
    assert message.startswith(config.model_type) and "\n" not in message
    assert not model._forward_pre_hooks


@pytest.mark.parametrize("model", [nn.Linear(3, 3), None, "llama"])
def test_what_is_no_model_is_refused(model):
    with pytest.raises(ValueError, match="expected a transformers model"):
        kvist.Cache(model, "kivi")


def test_a_llama_is_described():
    model = describe(tiny_llama())
    assert (model.name, model.kinds, model.served) == ("llama", ("full_attention",) * 2, [0, 1])
    assert (model.shape.heads, model.shape.key_dim, model.shape.value_dim, model.query_heads) == (2, 32, 32, 4)
    assert model.shape.dtype == torch.float32 and model.rotary == "default, base 10000"


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_the_type_of_the_model_is_that_of_its_exact_tokens(dtype):
    assert describe(LlamaForCausalLM(llama_config()).to(dtype)).shape.dtype == dtype


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 500000.0}}, "linear, base 500000"),
        (
            {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.5}},
            "default, base 10000, 50% of the channels",
        ),
    ],
)
def test_the_rotary_kind_in_words(options, words):
    assert describe(LlamaForCausalLM(llama_config(**options))).rotary == words


def test_a_model_of_two_kinds_of_layers():
    config = transformers.Gemma3TextConfig(
        **SMALL, intermediate_size=32, num_key_value_heads=2, head_dim=8, sliding_window=16,
        layer_types=["sliding_attention", "full_attention"],
    )  # fmt: skip
    model = transformers.Gemma3ForCausalLM(config)
    cache = kvist.Cache(model, "kivi")
    assert cache.inner.describes.kinds == ("sliding_attention", "full_attention") and cache.inner.describes.served == [
        1
    ]
    assert type(cache.layers[0]).__name__ == "DynamicSlidingWindowLayer" and cache.layers[0].sliding_window == 16
    assert cache.inner.ours == [cache.layers[1]]
    with pytest.raises(ValueError, match="describes 2 layers but the model has 1"):
        kvist.Cache(model, "kvmix k=2,3")
