"""What an attached model falls back to is what it would have called, with the mask that this expects."""

import pytest
import torch
from models_tiny import VOCABULARY, llama_config, padded, sharpen, tokens
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, create_block_mask
from transformers import (
    AttentionInterface,
    DynamicCache,
    Llama4Config,
    Llama4ForConditionalGeneration,
    LlamaForCausalLM,
    masking_utils,
)
from transformers.integrations import flex_attention
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, AttentionMaskInterface
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.llama import modeling_llama

import kvist
from kvist.attention.function import packed_attention
from kvist.models.compat import cache_argument


def llama(attention: str) -> LlamaForCausalLM:
    return sharpen(LlamaForCausalLM._from_config(llama_config(), attn_implementation=attention, dtype=torch.float32))


def own_eager(module, query, key, value, attention_mask, **kwargs):
    """An eager function of somebody's own, with a name of its own."""
    return modeling_llama.eager_attention_forward(module, query, key, value, attention_mask, **kwargs)


class Derived(modeling_llama.LlamaAttention):
    """Here and not in the module where its eager function is."""


class Rewritten(modeling_llama.LlamaAttention):
    """Asks for the interface with another default."""

    def forward(self, hidden_states, position_embeddings=None, attention_mask=None, **kwargs):
        caches = [kwargs.pop(name, None) for name in ("cache", "past_key_values")]
        shape = (*hidden_states.shape[:-1], -1, self.head_dim)
        states = [p(hidden_states).view(shape).transpose(1, 2) for p in (self.q_proj, self.k_proj, self.v_proj)]
        states[:2] = modeling_llama.apply_rotary_pos_emb(*states[:2], *position_embeddings)
        for cache in filter(lambda x: x is not None, caches):
            states[1:] = cache.update(*states[1:], self.layer_idx)
        call = ALL_ATTENTION_FUNCTIONS.get_interface(self.config._attn_implementation, own_eager)
        out, weights = call(self, *states, attention_mask, scaling=self.scaling, **kwargs)
        return self.o_proj(out.flatten(2)), weights


def twice(model, batch, method="int8") -> list[Tensor]:
    """Logits of a prompt and a step, without kvist and attached."""
    out = []
    for cache, attached in ((DynamicCache(config=model.config), False), (kvist.Cache(model, method), True)):
        attachment = kvist.attach(model) if attached else None
        with torch.no_grad():
            out.append(model(**batch, **cache_argument(cache)).logits)
        if attachment:
            attachment.close()
    return out


@pytest.mark.parametrize("cls", [Derived, Rewritten])
@pytest.mark.parametrize(
    "options", [{}, {"sliding_window": None, "output_attentions": True}], ids=["packed", "fallback"]
)
def test_classes_of_ones_own_fall_back_to_their_own_eager_function(cls, options):
    model = llama("eager")
    for layer in model.model.layers:
        layer.self_attn.__class__ = cls
    stock, attached = twice(model, padded([30, 17]) | options)
    assert torch.equal(stock, attached), "a prompt attends exactly, by the model's own function"


def test_the_interface_hands_on_the_default_of_whoever_asks():
    seen = []

    def default(module, query, key, value, mask, **kwargs):
        seen.append((mask, kwargs))
        return query, None

    model = llama("eager")
    with kvist.attach(model):
        found = ALL_ATTENTION_FUNCTIONS.get_interface(model.config._attn_implementation, default)
    found(model, *torch.zeros(3, 1, 2, 5, 8), None, scaling=1.0, surprise=3)
    assert seen == [(None, {"scaling": 1.0, "surprise": 3, "dropout": 0.0})]
    assert ALL_ATTENTION_FUNCTIONS.get_interface("eager", default) is default
    with pytest.raises(RuntimeError, match="get_interface"):
        ALL_ATTENTION_FUNCTIONS["kvist_eager"](model)


def test_flash_attention_finds_its_own_name_and_kind_of_mask():
    """Flash attention takes a mask (batch, tokens), and reads in the config which of its kinds to run."""
    name, seen = "flash_attention_of_a_test", []

    def flash(module, query, key, value, attention_mask, **kwargs):
        seen.append((module.config._attn_implementation, attention_mask, type(key)))
        return query.transpose(1, 2).contiguous(), None

    AttentionInterface.register(name, flash)
    AttentionMaskInterface.register(name, ALL_MASK_ATTENTION_FUNCTIONS["flash_attention_2"])
    model, batch = llama("sdpa"), padded([30, 17])
    model.config._attn_implementation_internal = name
    twice(model, batch)
    stock, attached = seen[:2], seen[2:]
    for (before, mask, kind), (now, found, tensor) in zip(stock, attached, strict=True):
        assert before == now == name and kind is tensor is Tensor
        assert mask.shape == (2, 30) and torch.equal(mask, found)
    assert model.config._attn_implementation == name
    ids, cache = torch.cat([batch["input_ids"], batch["input_ids"][:, :1]], 1), kvist.Cache(model, "int8")
    mask = torch.cat([batch["attention_mask"], torch.ones(2, 1, dtype=torch.long)], 1)
    with torch.no_grad():
        model(**batch, **cache_argument(cache))
        model(ids[:, -1:], attention_mask=mask, **cache_argument(cache))
    assert seen[-1][2] is Tensor, "kernels that read memory are given tensors, never handles"


def test_a_two_dimensional_mask_is_not_taken_for_one_of_queries_and_keys():
    model, cache = llama("sdpa"), kvist.Cache(llama("sdpa"), "int8")
    cache.announce(1, 5, None)
    cache.update(*torch.randn(2, 1, 2, 5, 32), 0)
    cache.announce(1, 1, None)
    keys, values = cache.update(*torch.randn(2, 1, 2, 1, 32), 0)
    seen = []
    given = packed_attention("sdpa", lambda *args, **kwargs: seen.append(args))
    given(model, torch.randn(1, 4, 1, 32), keys, values, torch.ones(1, 6), scaling=1.0)
    assert seen and seen[0][4].shape == (1, 6) and torch.equal(seen[0][2], keys.dense())


def test_a_vision_tower_stays_as_it_is():
    text = {
        "vocab_size": VOCABULARY, "hidden_size": 64, "intermediate_size": 96, "intermediate_size_mlp": 64,
        "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "pad_token_id": 0,
        "num_local_experts": 2, "num_experts_per_tok": 1, "layer_types": ["full_attention"] * 2,
        "no_rope_layers": [1, 1],
    }  # fmt: skip
    vision = {
        "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 128, "image_size": 16,
        "patch_size": 4, "projector_input_dim": 32, "projector_output_dim": 32, "vision_output_dim": 32,
    }  # fmt: skip
    config = Llama4Config(text_config=text, vision_config=vision, image_token_index=100)
    model = sharpen(
        Llama4ForConditionalGeneration._from_config(config, attn_implementation="eager", dtype=torch.float32)
    )
    picture, tower = torch.randn(1, 3, 16, 16), model.vision_model
    with torch.no_grad():
        seen, said = tower(picture).last_hidden_state, model.language_model(tokens(1, 30)).logits
        with kvist.attach(model):
            assert tower.config._attn_implementation == "eager"
            assert model.language_model.model.config._attn_implementation == "kvist_eager"
            assert torch.equal(tower(picture).last_hidden_state, seen)
            assert torch.equal(model.language_model(tokens(1, 30)).logits, said)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # transformers sets a flag of torch's that goes away
def test_flex_attention_attached_or_not(monkeypatch):
    def traced(query, key, value, training=False, **kwargs):  # by the same compiler, without a C++ one behind it
        return torch.compile(flex_attention.flex_attention, backend="eager")(query, key, value, **kwargs)

    def block_mask(*args, **kwargs):  # compiled for AVX2 alone, torch's own goes out of its bounds
        return create_block_mask(*args, **(kwargs | {"_compile": False}))

    monkeypatch.setattr(flex_attention, "compile_friendly_flex_attention", traced)
    monkeypatch.setattr(masking_utils, "create_block_mask", block_mask)
    model, batch = llama("flex_attention"), padded([30, 17])
    stock = llama("sdpa")
    options = {"max_new_tokens": 3, "do_sample": False, "output_logits": True, "return_dict_in_generate": True}
    expected = stock.generate(**batch, **cache_argument(kvist.Cache(stock, "int8")), **options)
    for attached in (False, True):
        if attached:
            kvist.attach(model)
        found = model.generate(**batch, **cache_argument(kvist.Cache(model, "int8")), **options)
        assert torch.equal(found.sequences, expected.sequences)
        for a, b in zip(found.logits, expected.logits, strict=True):
            torch.testing.assert_close(a, b, rtol=0, atol=1e-4 * float(b.std()))
    mask = ALL_MASK_ATTENTION_FUNCTIONS["kvist_flex_attention"](
        batch_size=1, q_length=5, kv_length=5, q_offset=0, kv_offset=0, device="cpu", attention_mask=None
    )
    assert isinstance(mask.dense(), BlockMask)
    kvist.detach(model)
    assert model.config._attn_implementation == "flex_attention"
