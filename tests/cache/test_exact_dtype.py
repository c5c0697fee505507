"""Exact tokens in a type of their own: stored as if they had come in it, billed to the byte, saved and loaded."""

import pytest
import torch
from models_tiny import tiny_llama, tokens

import kvist
from kvist.models.compat import cache_argument
from kvist.testing.cases import CASES, recipe

PIECES = (150, 1, 40, 1, 1)
HALVES = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])


def states(seed: int, length: int):
    """Keys and values (1, 2, length, 32) in fp32."""
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(1, 2, length, 32, generator=generator) for _ in range(2))


def stored(cache) -> list[torch.Tensor]:
    """Everything that holds tokens, rings up to what was written in them."""
    found = []
    for layer in cache.inner.ours:
        for track in layer.tracks:
            pages = [page for table in track.pool.tables for page in table]
            found += [array[pages] for array in track.pool.arrays.values()]
            behind = layer.behind(0)
            found += [track.exact.get([0], track.frontiers[0], behind), track.exact.sinks]
    return found


@HALVES
@pytest.mark.parametrize("text", CASES)
def test_the_same_is_stored_as_of_states_in_that_type(text, dtype):
    wide = kvist.Cache(tiny_llama(), recipe(text), exact_dtype=dtype)
    narrow = kvist.Cache(tiny_llama(), recipe(text))
    for n, length in enumerate(PIECES):
        start = sum(PIECES[:n])
        for cache in (wide, narrow):
            cache.announce(1, length, None, torch.arange(start, start + length)[None])
        for layer in range(2):
            keys, values = states(2 * n + layer, length)
            out = wide.update(keys, values, layer)
            assert all(x.dtype == torch.float32 and x.shape[2] == sum(PIECES[: n + 1]) for x in out)
            narrow.update(keys.to(dtype), values.to(dtype), layer)
    if not wide.recipe.layers[0].packs:
        assert all(x.dtype == torch.float32 for x in stored(wide))
        return
    for mine, theirs in zip(stored(wide), stored(narrow), strict=True):
        assert mine.dtype == theirs.dtype
        assert torch.equal(mine.nan_to_num(), theirs.nan_to_num())
    query = torch.randn(1, 4, 1, 32)
    attended = [kvist_attention(cache, query) for cache in (wide, narrow)]
    assert torch.allclose(*attended, rtol=0, atol=4 * torch.finfo(dtype).eps * attended[0].abs().max())


def kvist_attention(cache, query):
    """Attention of a query over what layer 0 stores, in fp32."""
    from kvist.cache.view import View

    return View.after(cache.inner.ours[0]).attend(query, 0.3)


@HALVES
@pytest.mark.parametrize("text", CASES)
def test_the_bill_is_right_to_the_byte(text, dtype):
    model = tiny_llama()
    for length in (20, 133):
        cache = kvist.Cache(model, recipe(text), exact_dtype=dtype)
        with torch.no_grad():
            model(tokens(1, length), **cache_argument(cache))
        bill = cache.recipe.bill(cache.inner.describes.shape, 2, length)
        assert dict(bill) == {item: nbytes for item, nbytes in cache.report().allocated.items() if nbytes}
        assert cache.bill(length, reserve=0) == cache.report().nbytes


def test_saved_and_loaded_it_stays(tmp_path):
    model = tiny_llama()
    cache = kvist.Cache(model, "kivi:2", exact_dtype=torch.bfloat16)
    ids = tokens(1, 200)
    with torch.no_grad():
        model(ids[:, :190], **cache_argument(cache))
        cache.save(tmp_path / "saved")
        loaded = kvist.Cache.load(tmp_path / "saved", model)
        assert loaded.report().to_dict() == cache.report().to_dict()
        assert loaded.inner.describes.shape == cache.inner.describes.shape
        outs = [model(ids[:, 190:], **cache_argument(each)).logits for each in (cache, loaded)]
    assert torch.equal(*outs)


def test_what_fp16_cannot_hold_goes_to_its_end_and_is_counted():
    cache = kvist.Cache(tiny_llama(), "kivi:2", exact_dtype=torch.float16)
    for layer in range(2):
        keys, values = states(layer, 40)
        keys[0, 0, 3, 5] = -1e6
        cache.update(keys, values, layer)
    assert cache.inner.ours[0].key.exact.ring[0, 0, 3, 5] == -65504 and cache.report().clipped == 2


def test_a_type_that_is_no_number_of_its_kind_is_refused():
    with pytest.raises(ValueError, match=r"found torch\.int8"):
        kvist.Cache(tiny_llama(), "kivi:2", exact_dtype=torch.int8)
