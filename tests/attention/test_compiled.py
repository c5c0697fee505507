"""Compiled models: a graph ends at the cache and at packed attention, and goes on after it."""

import pytest
import torch
from models_tiny import llama_config, padded, sharpen
from transformers import LlamaForCausalLM

import kvist
from kvist.models.compat import cache_argument

OPTIONS = {"max_new_tokens": 3, "do_sample": False, "output_logits": True, "return_dict_in_generate": True}


@pytest.fixture(autouse=True)
def compiler():
    torch.compiler.reset()
    yield
    torch.compiler.reset()


CALLS = (
    ("sdpa", "exact", False),
    ("sdpa", "kivi:2 recent=32", True),
    ("eager", "int8", False),
    ("eager", "int8", True),
)


@pytest.mark.parametrize(("attention", "method", "attached"), CALLS)
def test_a_compiled_forward_gives_what_the_forward_gives(attention, method, attached):
    model = LlamaForCausalLM._from_config(llama_config(), attn_implementation=attention, dtype=torch.float32)
    batch = sharpen(model) and padded([90, 70])
    if attached:
        kvist.attach(model)
    expected = model.generate(**batch, **cache_argument(kvist.Cache(model, method)), **OPTIONS)
    model.forward = torch.compile(model.forward, backend="aot_eager")
    cache = kvist.Cache(model, method)
    found = model.generate(**batch, **cache_argument(cache), **OPTIONS)
    assert torch.equal(found.sequences, expected.sequences)
    for a, b in zip(found.logits, expected.logits, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-4 * float(b.std()))
    assert cache.get_seq_length() == 92 and [cache.inner.rows.tokens(row, 92) for row in range(2)] == [92, 72]
