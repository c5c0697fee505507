"""attach and detach: the model's own results before, during and after; and the way back for what cannot be served."""

import pytest
import torch
from models_tiny import llama_config, padded, sharpen, tiny_llama, tokens
from transformers import AttentionInterface, DynamicCache, GptOssConfig, GptOssForCausalLM, LlamaForCausalLM
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

import kvist
from kvist.attention.function import HARMLESS, UNDERSTOOD, packed_attention, refusals
from kvist.attention.mask import LazyMask, lazy_mask
from kvist.cache.handle import Handle
from kvist.cache.view import View
from kvist.models.compat import cache_argument

KINDS = pytest.mark.parametrize("attention", ["sdpa", "eager"])


def llama(attention: str = "sdpa") -> LlamaForCausalLM:
    return sharpen(LlamaForCausalLM._from_config(llama_config(), attn_implementation=attention, dtype=torch.float32))


@torch.no_grad()
def run(model, cache, steps: int = 3, batch: int = 2) -> torch.Tensor:
    ids = tokens(batch, 120 + steps)
    mask = torch.ones(batch, 120 + steps, dtype=torch.long)
    out = [model(ids[:, :120], **cache_argument(cache), attention_mask=mask[:, :120]).logits]
    for i in range(120, 120 + steps):
        out.append(model(ids[:, i : i + 1], **cache_argument(cache), attention_mask=mask[:, : i + 1]).logits)
    return torch.cat(out, 1)


@pytest.fixture
def asked(monkeypatch) -> list[str]:
    """What was read from views: "packed" and "dense"."""
    calls, attend, dense = [], View.attend, View.dense
    monkeypatch.setattr(View, "attend", lambda *a, **k: (calls.append("packed"), attend(*a, **k))[1])
    monkeypatch.setattr(View, "dense", lambda *a: (calls.append("dense"), dense(*a))[1])
    return calls


@KINDS
def test_detaching_restores_the_model_exactly(attention):
    model = llama(attention)
    before, hooks = model.config.to_dict(), len(model._forward_pre_hooks)
    expected = run(model, DynamicCache(config=model.config))
    attachment = kvist.attach(model)
    assert model.config._attn_implementation.startswith("kvist")
    assert torch.equal(run(model, DynamicCache(config=model.config)), expected), "other caches see no difference"
    with torch.no_grad():
        assert torch.equal(model(tokens(2, 9)).logits, model(tokens(2, 9), use_cache=False).logits)
    attachment.close()
    assert model.config._attn_implementation == attention and model.config.to_dict() == before
    assert len(model._forward_pre_hooks) == hooks
    assert torch.equal(run(model, DynamicCache(config=model.config)), expected)
    attachment.close()
    assert model.config._attn_implementation == attention


@KINDS
def test_padded_batches_without_our_cache_see_no_difference(attention):
    model, batch = llama(attention), padded((30, 17, 5))
    options = {"max_new_tokens": 8, "do_sample": False}
    with torch.no_grad():
        expected = model(**batch).logits
    written = model.generate(**batch, **options)
    with kvist.attach(model), torch.no_grad():
        assert torch.equal(model(**batch).logits, expected)
        assert torch.equal(model.generate(**batch, **options), written)


@KINDS
def test_as_a_context_manager_and_by_detach(attention):
    model = llama(attention)
    with kvist.attach(model) as attachment:
        assert attachment.model is model and model.config._attn_implementation != attention
        with kvist.attach(model):  # twice is once
            pass
        assert model.config._attn_implementation != attention
    assert model.config._attn_implementation == attention
    with pytest.raises(ZeroDivisionError), kvist.attach(model):
        raise ZeroDivisionError
    assert model.config._attn_implementation == attention
    kvist.attach(model)
    kvist.detach(model)
    assert model.config._attn_implementation == attention
    kvist.detach(model)
    assert model.config._attn_implementation == attention


def test_attaching_one_model_leaves_another_alone():
    one, other = llama(), llama()
    with kvist.attach(one):
        assert other.config._attn_implementation == "sdpa"
    assert {"sdpa", "eager"} >= {one.config._attn_implementation, other.config._attn_implementation}


def test_an_attention_that_kvist_does_not_know_is_refused():
    model = llama()
    AttentionInterface.register("somebody_elses", ALL_ATTENTION_FUNCTIONS["sdpa"])
    model.config._attn_implementation_internal = "somebody_elses"
    with pytest.raises(ValueError, match="found 'somebody_elses'"):
        kvist.attach(model)
    assert model.config._attn_implementation == "somebody_elses"


@KINDS
def test_attached_decoding_reads_packed_pages_and_stock_decoding_dense_ones(attention, asked):
    model = llama(attention)
    stock = run(model, kvist.Cache(model, "kivi:2 recent=32"))
    # stock sdpa hands the handles to F.scaled_dot_product_attention, which they answer or not; eager multiplies them
    assert asked if attention == "sdpa" else set(asked) == {"dense"}
    asked.clear()
    with kvist.attach(model):
        found = run(model, kvist.Cache(model, "kivi:2 recent=32"))
    assert asked == ["packed"] * (3 * model.config.num_hidden_layers)
    torch.testing.assert_close(found, stock, rtol=0, atol=1e-3 * float(stock.std()))


def test_refusals_name_what_cannot_be_served():
    plain = LazyMask(None, {"batch_size": 1, "q_length": 1, "kv_length": 5})
    other = LazyMask(None, {"batch_size": 1, "q_length": 1, "kv_length": 5, "mask_function": lambda *_: True})
    assert refusals(plain, 0.0, dict.fromkeys(UNDERSTOOD | HARMLESS)) == []
    assert refusals(plain, 0.0, {"scaling": 0.1, "softcap": 30.0, "s_aux": torch.ones(4), "is_causal": True}) == []
    assert refusals(None, 0.0, {"use_cache": True, "position_ids": torch.zeros(1, 1), "output_attentions": False}) == []
    assert refusals(plain, 0.0, {"position_bias": 0}) == ["keyword 'position_bias'"]
    assert refusals(plain, 0.0, {"cu_seq_lens_q": torch.zeros(2)}) == ["keyword 'cu_seq_lens_q'"]
    assert refusals(plain, 0.0, {"is_causal": False}) == ["keyword 'is_causal'"]
    assert refusals(plain, 0.1, {}) == ["dropout"]
    assert refusals(plain, 0.0, {"sliding_window": 64}) == ["a sliding window"]
    assert refusals(other, 0.0, {}) == ["a mask that is not plain causal"]
    assert len(refusals(other, 0.1, {"x": 1, "y": None, "sliding_window": 3})) == 4


def handles(model, count: int = 1, masked: bool = False):
    """Handles of a layer that has packed tokens, and the queries, for calling an attention function by hand."""
    cache = kvist.Cache(model, "kivi:2 recent=32")
    run(model, cache, batch=1)
    cache.announce(1, count, None)
    shape = (1, 2, count, model.config.head_dim)
    keys, values = cache.update(torch.randn(shape), torch.randn(shape), 0)
    assert isinstance(keys, Handle) and isinstance(values, Handle)
    return torch.randn(1, 4, count, model.config.head_dim), keys, values


@pytest.mark.parametrize("own", ["sdpa", "eager"])
@pytest.mark.parametrize("extra", [{"surprise": 3}, {"sliding_window": 16}, {"dropout": 1e-9}])
def test_what_cannot_be_served_goes_to_the_models_own_attention_on_decoded_tensors(own, extra, asked):
    model = llama(own)
    query, keys, values = handles(model)
    module, seen = model.model.layers[0].self_attn, []

    def own_attention(*args, **kwargs):
        seen.append(kwargs)
        return ALL_ATTENTION_FUNCTIONS["sdpa"](*args, scaling=kwargs["scaling"])

    AttentionInterface.register("spied", own_attention)
    asked.clear()
    out, _ = packed_attention("spied")(module, query, keys, values, None, scaling=0.2, **extra)
    assert asked == ["dense", "dense"]
    assert seen[0].items() >= extra.items(), "the keyword is handed on, never dropped"
    expected = torch.softmax(query @ keys.dense().repeat_interleave(2, 1).transpose(-1, -2) * 0.2, -1)
    expected = (expected @ values.dense().repeat_interleave(2, 1)).transpose(1, 2)
    torch.testing.assert_close(out, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("own", ["sdpa", "eager"])
def test_a_mask_that_is_not_causal_is_built_and_obeyed(own, asked):
    model, count = llama(own), 4
    query, keys, values = handles(model, count)
    module, slots = model.model.layers[0].self_attn, keys.shape[2]
    arguments = {
        "batch_size": 1, "q_length": count, "kv_length": slots, "q_offset": slots - count, "kv_offset": 0,
        "mask_function": lambda b, h, q, kv: kv % 3 == 0, "attention_mask": None, "device": "cpu",
        "dtype": torch.float32,
    }  # fmt: skip
    mask = lazy_mask(own)(**arguments)
    assert mask.shape == (1, 1, count, slots) and not mask.plain
    asked.clear()
    out, _ = packed_attention(own)(module, query, keys, values, mask, scaling=0.2)
    assert set(asked) == {"dense"}
    pick = torch.arange(slots) % 3 == 0
    k, v = (x.dense()[:, :, pick].repeat_interleave(2, 1) for x in (keys, values))
    expected = (torch.softmax(query @ k.transpose(-1, -2) * 0.2, -1) @ v).transpose(1, 2)
    torch.testing.assert_close(out, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("kind", ["bool", "additive"])
def test_a_given_mask_is_obeyed_on_packed_pages(kind, asked):
    """A four-dimensional mask of the user's own, on attention that reads packed pages."""
    model, count = llama(), 4
    query, keys, values = handles(model, count)
    module, slots = model.model.layers[0].self_attn, keys.shape[2]
    visible = torch.rand(1, 1, count, slots, generator=torch.Generator().manual_seed(3)) > 0.5
    mask = visible if kind == "bool" else torch.zeros(visible.shape).masked_fill(~visible, -torch.inf)
    asked.clear()
    out, _ = packed_attention("sdpa")(module, query, keys, values, mask, scaling=0.2)
    assert asked == ["packed"]
    k, v = (x.dense().repeat_interleave(2, 1) for x in (keys, values))
    scores = (query @ k.transpose(-1, -2) * 0.2).masked_fill(~visible, -torch.inf)
    torch.testing.assert_close(out, (scores.softmax(-1) @ v).transpose(1, 2), rtol=0, atol=1e-5)


def test_attention_sinks_take_part():
    """GPT-OSS with and without its sinks differ, and packed attention follows the one that the model has."""
    config = GptOssConfig(
        vocab_size=101, hidden_size=64, intermediate_size=64, num_hidden_layers=1, num_attention_heads=4,
        num_key_value_heads=2, head_dim=32, num_local_experts=2, num_experts_per_tok=1, layer_types=["full_attention"],
        pad_token_id=0, eos_token_id=None,
    )  # fmt: skip
    model = sharpen(GptOssForCausalLM._from_config(config, attn_implementation="eager", dtype=torch.float32))
    results = []
    for logit in (-30.0, 3.0):
        with torch.no_grad():
            model.model.layers[0].self_attn.sinks.fill_(logit)
        stock = run(model, kvist.Cache(model, "kivi:2 recent=32"))
        with kvist.attach(model):
            results.append(run(model, kvist.Cache(model, "kivi:2 recent=32")))
        torch.testing.assert_close(results[-1], stock, rtol=0, atol=1e-3 * float(stock.std()))
    assert (results[0] - results[1]).abs().max() > 0.1 * results[0].std()


def test_training_mode_falls_back_on_dropout(asked):
    model = llama()
    model.config.attention_dropout = 0.5
    for layer in model.model.layers:
        layer.self_attn.attention_dropout = 0.5
    model.train()
    with kvist.attach(model):
        run(model, kvist.Cache(model, "kivi:2 recent=32"), steps=1)
    assert set(asked) == {"dense"}


def test_without_the_switch_inference_mode_reads_the_same():
    ids, found = tokens(2, 150), []
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            cache = kvist.Cache(tiny_llama(), "kivi:2 recent=32")
            parts = [tiny_llama()(ids[:, i : i + 30], **cache_argument(cache)).logits for i in range(0, 150, 30)]
            found.append(torch.cat(parts, 1))
    assert torch.equal(*found)
