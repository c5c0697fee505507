"""Tagging keys before RoPE: exact, and gone without a trace."""

import sys

import pytest
import torch
from transformers import AutoModelForCausalLM, CohereConfig, LlamaConfig, Olmo2Config, Phi3Config, Qwen3Config

from kvist.models.rope import NAME, pre_rope, self_test, tagged

SIZES = {
    "vocab_size": 64,
    "hidden_size": 64,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


@pytest.mark.parametrize("config", [LlamaConfig, Qwen3Config, Phi3Config, CohereConfig, Olmo2Config])
def test_every_served_layer_carries_its_key_exactly(config):
    self_test(AutoModelForCausalLM.from_config(config(**SIZES)).eval())


def test_a_model_that_changes_keys_after_rotation_is_refused(monkeypatch):
    model = AutoModelForCausalLM.from_config(LlamaConfig(**SIZES)).eval()
    module = sys.modules[type(model).__module__]
    original = getattr(module, NAME)
    calls = []

    def drifting(q, k, cos, sin, *args, **kwargs):
        calls.append(None)
        q, k = original(q, k, cos, sin, *args, **kwargs)
        return q, k + len(calls)

    monkeypatch.setattr(module, NAME, drifting)
    with pytest.raises(ValueError, match="layer 0"):
        self_test(model)


def test_leaving_puts_the_rotary_function_back():
    model = AutoModelForCausalLM.from_config(LlamaConfig(**SIZES)).eval()
    module = sys.modules[type(model).__module__]
    original = getattr(module, NAME)
    with pytest.raises(RuntimeError), tagged(model):
        assert getattr(module, NAME) is not original
        raise RuntimeError
    assert getattr(module, NAME) is original
    assert pre_rope(torch.zeros(1)) is None
