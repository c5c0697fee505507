"""What cannot be served is refused with the reason, and leaves the cache as it was."""

import pytest
import torch
from models_tiny import padded, tiny_llama, tokens, unpadded

import kvist
from kvist.models.compat import cache_argument
from kvist.testing.cases import recipe


@pytest.fixture
def cache():
    return kvist.Cache(tiny_llama(), recipe("kivi:2 recent=32"))


def test_four_dimensional_masks(cache):
    mask = torch.ones(1, 1, 20, 20, dtype=torch.bool).tril()
    with pytest.raises(ValueError, match=r"2-D padding mask.*\(1, 1, 20, 20\)"):
        tiny_llama()(tokens(1, 20), attention_mask=mask, **cache_argument(cache))
    with pytest.raises(ValueError, match="dict"):
        tiny_llama()(tokens(1, 20), attention_mask={"full_attention": mask}, **cache_argument(cache))


def test_batch_whose_mask_was_not_seen(cache):
    with pytest.raises(ValueError, match="batch of 2 arrived without its attention mask"):
        cache.update(*torch.randn(2, 2, 2, 5, 32), 0)


def test_one_row_needs_no_mask(cache):
    with torch.no_grad():
        tiny_llama().model(tokens(1, 20), **cache_argument(cache))
    assert cache.get_seq_length() == 20


def test_mask_that_changes_its_mind(cache):
    inputs = padded([40, 30])
    with torch.no_grad():
        tiny_llama()(**inputs, **cache_argument(cache))
    with pytest.raises(ValueError, match="differs from the one with which earlier tokens were stored"):
        tiny_llama()(tokens(2, 1), attention_mask=torch.ones(2, 41), **cache_argument(cache))
    changed = torch.cat([inputs["attention_mask"], torch.ones(2, 1)], 1)
    changed[0, 5] = 0
    with pytest.raises(ValueError, match="differs"):
        tiny_llama()(tokens(2, 1), attention_mask=changed, **cache_argument(cache))


def test_mask_that_is_too_short(cache):
    with torch.no_grad():
        tiny_llama()(**unpadded(2, 40), **cache_argument(cache))
    with pytest.raises(ValueError, match="covers 1 slots but the cache holds 40"):
        tiny_llama()(tokens(2, 1), attention_mask=torch.ones(2, 1), **cache_argument(cache))


def test_wrong_batch(cache):
    with torch.no_grad():
        tiny_llama()(**unpadded(2, 40), **cache_argument(cache))
    with pytest.raises(ValueError, match="holds 2 rows, found a batch of 3"):
        tiny_llama()(tokens(3, 1), attention_mask=torch.ones(3, 41), **cache_argument(cache))


def test_refused_calls_leave_no_trace(cache):
    model, fresh = tiny_llama(), kvist.Cache(tiny_llama(), recipe("kivi:2 recent=32"))
    inputs, said = padded([60, 50]), []
    with torch.no_grad():
        for one in (cache, fresh):
            model(**inputs, **cache_argument(one))
        with pytest.raises(ValueError):
            model(tokens(2, 1), attention_mask=torch.ones(2, 61), **cache_argument(cache))
        with pytest.raises(ValueError):
            model(tokens(3, 1), attention_mask=torch.ones(3, 61), **cache_argument(cache))
        with pytest.raises(ValueError):
            cache.crop(5)
        mask = torch.cat([inputs["attention_mask"], torch.ones(2, 3, dtype=torch.long)], 1)
        for one in (cache, fresh):
            said.append(model(tokens(2, 3), attention_mask=mask, **cache_argument(one)).logits)
    assert torch.equal(*said)


def test_positive_crop(cache):
    with pytest.raises(ValueError, match=r"crop\(-k\).*found 3"):
        cache.crop(3)


def test_keys_of_another_shape(cache):
    cache.update(torch.randn(1, 2, 5, 32), torch.randn(1, 2, 5, 32), 0)
    with pytest.raises(ValueError, match="differ in batch, heads or tokens"):
        cache.layers[0].update(torch.randn(1, 2, 5, 32), torch.randn(1, 2, 4, 32))
    with pytest.raises(ValueError, match="this cache holds a batch of 1"):
        cache.layers[0].update(torch.randn(1, 2, 5, 16), torch.randn(1, 2, 5, 16))


def test_layers_out_of_step(cache):
    keys = torch.randn(1, 2, 5, 32)
    cache.update(keys, keys, 0)
    with pytest.raises(ValueError, match="out of step"):
        cache.update(torch.randn(1, 2, 3, 32), torch.randn(1, 2, 3, 32), 1)


def test_view_that_is_out_of_date(cache):
    keys = torch.randn(1, 2, 60, 32)
    cache.update(keys, keys, 0)
    handle, _ = cache.update(keys[:, :, :1], keys[:, :, :1], 0)
    cache.update(keys[:, :, :1], keys[:, :, :1], 0)
    with pytest.raises(RuntimeError, match="out of date"):
        handle.dense()


def test_negative_reserve_and_offloading(cache):
    with pytest.raises(ValueError, match=r"reserve is a number of tokens, .*found -1"):
        kvist.Cache(tiny_llama(), "exact", reserve=-1)
    with pytest.raises(ValueError, match="not offloaded"):
        cache.layers[0].offload()


def test_closing_removes_the_hook():
    model = tiny_llama()
    before = len(model._forward_pre_hooks)
    first, second = kvist.Cache(model, "exact"), kvist.Cache(model, "exact")
    assert len(model._forward_pre_hooks) == before + 2
    first.close()
    assert len(model._forward_pre_hooks) == before + 1
    del second
    assert len(model._forward_pre_hooks) == before
