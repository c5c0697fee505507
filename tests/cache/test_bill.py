"""Bytes are true: the plan's bill equals what the cache allocated, to the byte and item by item."""

import pytest
import torch
from models_tiny import tiny_llama, unpadded

import kvist
from kvist.models.compat import cache_argument
from kvist.testing.cases import CASES, recipe
from kvist.types import Geometry

SHAPE = Geometry(2, 40, 40, torch.float32)
LENGTHS = (20, 133, 700)


@pytest.mark.parametrize("reserved", [False, True], ids=["grown", "reserved"])
@pytest.mark.parametrize("batch", [1, 4])
@pytest.mark.parametrize("text", CASES)
def test_bill_equals_the_measured_allocation(text, batch, reserved):
    model = tiny_llama(dim=40)
    for length in LENGTHS:
        reserve = length + 77 if reserved else 0
        cache = kvist.Cache(model, recipe(text, 40), reserve=reserve)
        with torch.no_grad():
            model(**unpadded(batch, length), **cache_argument(cache))
        bill = cache.recipe.bill(SHAPE, 2, length, batch, reserve)
        assert dict(bill) == {item: nbytes for item, nbytes in cache.report().allocated.items() if nbytes}


@pytest.mark.parametrize("text", CASES)
def test_report_counts_every_token_and_no_more_than_it_allocates(text):
    model = tiny_llama()
    cache = kvist.Cache(model, recipe(text))
    with torch.no_grad():
        for count in (150, 1, 40, 1):
            mask = torch.ones(3, cache.get_seq_length() + count)
            model(unpadded(3, count)["input_ids"], attention_mask=mask, **cache_argument(cache))
            report = cache.report()
            assert report.tokens == 3 * cache.get_seq_length() == report.packed + report.exact
            assert report.elements == report.tokens * 2 * 2 * 2 * 32
            for item, used in report.used.items():
                assert 0 <= used <= report.allocated.get(item, 0), item
            measured = sum(_storage(layer) for layer in cache.layers)
            assert report.nbytes == measured


def _storage(layer) -> int:
    """Bytes of all tensors that a layer holds, found by walking over it."""
    tensors, skip = [], layer.skip()
    for track in layer.tracks:
        tensors += [*track.pool.arrays.values(), track.exact.ring, track.exact.sinks, track.exact.pinned]
        if track.pool.specs:
            tensors.append(track.pool.table(layer.table_width(track)))
    tensors += [] if skip is None else [skip]
    return sum(tensor.nbytes for tensor in tensors)


def test_more_tokens_than_reserved_grow():
    model = tiny_llama()
    cache = kvist.Cache(model, recipe("kivi:2 recent=32"), reserve=100)
    with torch.no_grad():
        model(**unpadded(1, 90), **cache_argument(cache))
        before = cache.report().nbytes
        model(unpadded(1, 400)["input_ids"], **cache_argument(cache))
    assert cache.get_seq_length() == 490 and cache.report().nbytes > before
