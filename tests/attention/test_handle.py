"""The handle that `update` returns: looks like a tensor, answers F.scaled_dot_product_attention from packed pages, and
is the dense tensor for everybody else."""

import pytest
import torch
import torch.nn.functional as F

from kvist import methods
from kvist.cache.handle import Handle
from kvist.cache.layer import Layer
from kvist.cache.rows import Rows
from kvist.cache.view import View

HEADS, DIM, LENGTH = 2, 16, 150


@pytest.fixture
def pair() -> tuple[Handle, Handle]:
    recipe, rows = methods.get("kivi", recent=32), Rows()
    layer = Layer(recipe.layers[0], recipe.page, recipe.prefill, 0, rows)
    for count in (LENGTH - 1, 1):
        rows.extend(2, count, None)
        pair = layer.update(torch.randn(2, HEADS, count, DIM), torch.randn(2, HEADS, count, DIM))
    return pair


@pytest.fixture
def dense_calls(monkeypatch) -> list[int]:
    calls, dense = [], View.dense
    monkeypatch.setattr(View, "dense", lambda view, side: (calls.append(side), dense(view, side))[1])
    return calls


def stock(query, keys, values, **options) -> torch.Tensor:
    return F.scaled_dot_product_attention(query, keys.dense(), values.dense(), **options)


def test_it_looks_like_the_tensor_that_it_stands_for(pair):
    for handle in pair:
        assert isinstance(handle, Handle) and isinstance(handle, torch.Tensor)
        assert handle.shape == (2, HEADS, LENGTH, DIM) and handle.dtype == torch.float32
        assert handle.device.type == "cpu" and f"{LENGTH}" in repr(handle)


def test_strangers_get_the_dense_tensor(pair):
    keys, values = pair
    dense = keys.dense()
    assert torch.equal(keys + 0, dense) and torch.equal(keys.transpose(1, 2), dense.transpose(1, 2))
    assert torch.equal(torch.cat([keys, values], 2), torch.cat([dense, values.dense()], 2))
    assert torch.equal(keys[:, 1:, -3:], dense[:, 1:, -3:]) and type(keys.clone()) is torch.Tensor
    query = torch.randn(2, HEADS, 1, DIM)
    assert torch.equal(query @ keys.mT, query @ dense.mT)


OPTIONS = [
    {},
    {"scale": 0.7},
    {"attn_mask": torch.rand(2, 1, 3, LENGTH, generator=torch.Generator().manual_seed(0)) > 0.3},
    {"attn_mask": torch.rand(2, HEADS, 3, LENGTH, generator=torch.Generator().manual_seed(0)) > 0.3},
    {"attn_mask": torch.randn(2, HEADS, 3, LENGTH, generator=torch.Generator().manual_seed(0)), "scale": 0.2},
    {"attn_mask": torch.randn(1, 1, 1, LENGTH, generator=torch.Generator().manual_seed(0))},
    {"attn_mask": torch.rand(3, LENGTH, generator=torch.Generator().manual_seed(0)) > 0.3},
]


@pytest.mark.parametrize("options", OPTIONS, ids=range(len(OPTIONS)))
def test_sdpa_is_answered_from_packed_pages(pair, options, dense_calls):
    query = torch.randn(2, HEADS, 3, DIM)
    found = F.scaled_dot_product_attention(query, *pair, **options)
    assert dense_calls == []
    torch.testing.assert_close(found, stock(query, *pair, **options), rtol=0, atol=1e-5)


def test_grouped_heads_are_answered_where_stock_sdpa_groups_them(pair, dense_calls):
    query = torch.randn(2, 3 * HEADS, 1, DIM)
    found = F.scaled_dot_product_attention(query, *pair, enable_gqa=True)
    assert dense_calls == []
    torch.testing.assert_close(found, stock(query, *pair, enable_gqa=True), rtol=0, atol=1e-5)
    with pytest.raises(RuntimeError):
        F.scaled_dot_product_attention(query, *pair)


@pytest.mark.parametrize("options", [{"is_causal": True}, {"dropout_p": 1e-12}])
def test_what_packed_pages_do_not_answer_is_computed_densely(pair, options, dense_calls):
    query = torch.randn(2, HEADS, 3, DIM)
    found = F.scaled_dot_product_attention(query, *pair, **options)
    assert dense_calls == [0, 1]
    torch.testing.assert_close(found, stock(query, *pair, **options), rtol=0, atol=1e-5)


def test_keys_and_values_that_do_not_belong_together_are_dense(pair, dense_calls):
    keys, values = pair
    query = torch.randn(2, HEADS, 3, DIM)
    found = F.scaled_dot_product_attention(query, values, keys)
    assert sorted(dense_calls) == [0, 1]
    torch.testing.assert_close(found, stock(query, values, keys), rtol=0, atol=1e-5)


def test_a_handle_is_out_of_date_after_the_next_update(pair):
    keys, _ = pair
    layer = keys.source.store
    layer.rows.extend(2, 1, None)
    layer.update(torch.randn(2, HEADS, 1, DIM), torch.randn(2, HEADS, 1, DIM))
    with pytest.raises(RuntimeError, match="out of date"):
        keys.dense()
