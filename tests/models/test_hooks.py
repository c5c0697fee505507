"""The hook that tells a cache which slots are tokens: on that model alone, and gone when asked or with the cache."""

import copy
import gc
import threading

import pytest
import torch
from models_tiny import llama_config, padded, sharpen, tokens
from transformers import LlamaForCausalLM

import kvist
from kvist.models.compat import cache_argument


@pytest.fixture
def model() -> LlamaForCausalLM:
    return sharpen(LlamaForCausalLM(llama_config()))


def test_only_the_cache_listens_and_close_ends_it(model):
    other = LlamaForCausalLM(llama_config())
    assert not model._forward_pre_hooks
    cache = kvist.Cache(model, "kivi")
    assert len(model._forward_pre_hooks) == 1 and not other._forward_pre_hooks
    cache.close()
    cache.close()
    assert not model._forward_pre_hooks


def test_the_hook_goes_with_its_cache(model):
    cache = kvist.Cache(model, "kivi")
    twin = copy.deepcopy(cache)
    assert len(model._forward_pre_hooks) == 2
    del cache
    gc.collect()
    assert len(model._forward_pre_hooks) == 1
    del twin
    gc.collect()
    assert not model._forward_pre_hooks


def test_two_caches_of_one_model_hear_only_their_own_forwards(model):
    first, second = kvist.Cache(model, "kivi"), kvist.Cache(model, "kivi")
    with torch.no_grad():
        model(**padded((9, 4)), **cache_argument(first))
        model(tokens(1, 5), **cache_argument(second))
    assert (first.inner.rows.slots, first.inner.rows.batch) == (9, 2)
    assert (second.inner.rows.slots, second.inner.rows.batch) == (5, 1)
    assert [first.inner.rows.tokens(row, 9) for row in range(2)] == [9, 4]


def test_positional_arguments_and_embeddings_are_heard(model):
    batch = padded((9, 4))
    with torch.no_grad():
        one, two = kvist.Cache(model, "kivi"), kvist.Cache(model, "kivi")
        by_ids = model(batch["input_ids"], batch["attention_mask"], None, one).logits
        embedded = model.model.embed_tokens(batch["input_ids"])
        by_embeddings = model(
            inputs_embeds=embedded, attention_mask=batch["attention_mask"], **cache_argument(two)
        ).logits
    assert [row[0].slot for row in one.inner.rows.runs] == [row[0].slot for row in two.inner.rows.runs] == [0, 5]
    assert torch.equal(by_ids, by_embeddings)


@pytest.mark.parametrize("batch", [padded((9, 4)), {"input_ids": tokens(1, 9)}], ids=["batch", "row"])
def test_a_model_that_is_not_heard_is_refused(model, batch):
    cache, other = kvist.Cache(model, "kivi"), sharpen(LlamaForCausalLM(llama_config()))
    with torch.no_grad(), pytest.raises(ValueError, match="from LlamaAttention without its attention mask and positi"):
        other(**batch, **cache_argument(cache))
    cache.close()
    with torch.no_grad(), pytest.raises(ValueError, match="without its attention mask and positions being seen"):
        model(**batch, **cache_argument(cache))
    assert cache.get_seq_length() == cache.inner.rows.slots == 0


@pytest.mark.parametrize("shape", [(2, 1, 9, 9), (2, 3)])
def test_masks_that_do_not_tell_padding_are_refused(model, shape):
    cache = kvist.Cache(model, "kivi")
    with torch.no_grad(), pytest.raises(ValueError, match="mask"):
        model(tokens(2, 9), attention_mask=torch.ones(shape), **cache_argument(cache))
    assert cache.get_seq_length() == 0


def test_a_stored_token_cannot_be_masked_later(model):
    cache = kvist.Cache(model, "kivi")
    mask = torch.ones(1, 10, dtype=torch.long)
    with torch.no_grad():
        model(tokens(1, 9), attention_mask=mask[:, :9], **cache_argument(cache))
        mask[0, 2] = 0
        with pytest.raises(ValueError, match="cannot be masked later"):
            model(tokens(1, 1), attention_mask=mask, **cache_argument(cache))


def test_threads_call_one_model_each_with_its_cache(model):
    """A call that ends is that of its own cache, whatever other threads are in the midst of."""
    prompts, found = [tokens(1, 20 + 9 * i, seed=i) for i in range(4)], {}

    def talk(i: int) -> None:
        cache = kvist.Cache(model, "kivi:2 recent=32")
        with torch.no_grad():
            model(prompts[i], **cache_argument(cache))
            steps = [model(prompts[i][:, j : j + 1], **cache_argument(cache)).logits for j in range(20)]
        found[i] = torch.cat(steps)

    threads = [threading.Thread(target=talk, args=(i,)) for i in range(len(prompts))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    together = dict(found)
    for i in range(len(prompts)):
        talk(i)
        assert torch.equal(together[i], found[i])
