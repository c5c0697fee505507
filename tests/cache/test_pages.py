"""Pages: full ones are never written again, rows share them, reorder moves none."""

import copy

import pytest
import torch
from models_tiny import tiny_llama

import kvist
from kvist.testing.cases import EACH, recipe

PACKED = [text for text in EACH if text != "exact"]


def grown(text: str, batch: int = 3, first: int = 300) -> kvist.Cache:
    cache = kvist.Cache(tiny_llama(layers=1), recipe(text))
    feed(cache, batch, first, 0)
    feed(cache, batch, 2, 1)
    return cache


def feed(cache, batch: int, count: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    cache.announce(batch, count, None)
    cache.update(*torch.randn(2, batch, 2, count, 32, generator=generator), 0)


def full_pages(cache) -> list[tuple]:
    """(track, page, its arrays) of every page that a row has filled."""
    found = []
    for index, track in enumerate(cache.layers[0].tracks):
        for row, table in enumerate(track.pool.tables):
            filled = cache.layers[0].maps[row].slot(track.states[row].frontier) // track.pool.page
            for page in table[:filled]:
                found.append((index, page, {name: array[page].clone() for name, array in track.pool.arrays.items()}))
    return found


@pytest.mark.parametrize("text", PACKED)
def test_full_pages_are_never_written_again(text):
    cache = grown(text)
    tracks = cache.layers[0].tracks
    watched = full_pages(cache)
    assert watched
    steps = [
        lambda seed=seed, count=count: feed(cache, 3, count, seed) for seed, count in enumerate((1, 70, 33, 200, 1))
    ]
    steps[2:2] = [lambda: cache.reorder_cache(torch.tensor([1, 1, 2])), lambda: cache.crop(-20)]
    for step in steps:
        step()
        # a page that a row let go of is free for others: it is watched no longer
        watched = [(i, page, arrays) for i, page, arrays in watched if tracks[i].pool.refs[page]]
        for i, page, arrays in watched:
            for name, array in arrays.items():
                assert torch.equal(tracks[i].pool.arrays[name][page], array)
    assert watched


@pytest.mark.parametrize("text", PACKED)
def test_reorder_moves_no_page(text):
    cache = grown(text)
    pools = [track.pool for track in cache.layers[0].tracks]
    tables = [copy.deepcopy(pool.tables) for pool in pools]
    arrays = [{name: (a.data_ptr(), a.clone()) for name, a in pool.arrays.items()} for pool in pools]
    in_use = [pool.in_use for pool in pools]
    cache.reorder_cache(torch.tensor([2, 0, 1]))
    cache.reorder_cache(torch.tensor([1, 0, 2]))
    for pool, table, old, used in zip(pools, tables, arrays, in_use, strict=True):
        assert pool.tables == [table[0], table[2], table[1]]
        assert pool.in_use == used
        for name, (pointer, array) in old.items():
            assert pool.arrays[name].data_ptr() == pointer
            assert torch.equal(pool.arrays[name].view(torch.uint8), array.view(torch.uint8))


@pytest.mark.parametrize("text", PACKED)
def test_rows_share_full_pages_and_copy_only_a_partly_filled_one(text):
    cache = grown(text, batch=1)
    pools = [track.pool for track in cache.layers[0].tracks]
    before = [pool.in_use for pool in pools]
    cache.batch_repeat_interleave(4)
    assert [pool.in_use for pool in pools] == before
    for step in range(40):
        feed(cache, 4, 1, step + 2)
    feed(cache, 4, 1, 99)
    for track, pool, used in zip(cache.layers[0].tracks, pools, before, strict=True):
        filled = 300 // pool.page
        shared = min(filled, *(state.frontier // pool.page for state in track.states))
        first = [table[: min(shared, used - 1)] for table in pool.tables]
        assert all(pages == first[0] for pages in first)
        own = sum(len(table) - len(first[0]) for table in pool.tables)
        assert pool.in_use == len(first[0]) + len({p for table in pool.tables for p in table[len(first[0]) :]})
        assert own >= pool.in_use - len(first[0])


@pytest.mark.parametrize("text", PACKED)
def test_pages_are_counted(text):
    """References equal the table entries; what nobody holds is free; nothing is lost."""
    cache = grown(text)
    moves = [
        lambda: cache.reorder_cache(torch.tensor([0, 0, 2])),
        lambda: cache.crop(-150),
        lambda: cache.batch_repeat_interleave(2),
        lambda: feed(cache, 6, 90, 5),
        lambda: cache.batch_select_indices(torch.tensor([5, 1])),
        lambda: feed(cache, 2, 1, 6),
        lambda: cache.crop(-210),
        lambda: feed(cache, 2, 200, 7),
    ]
    for move in moves:
        move()
        for track in cache.layers[0].tracks:
            pool, held = track.pool, [page for table in track.pool.tables for page in table]
            assert [held.count(page) for page in range(pool.capacity)] == pool.refs
            assert sorted(pool.free) == [page for page in range(pool.capacity) if not pool.refs[page]]
            assert pool.in_use == len(set(held))
            for array in pool.arrays.values():
                assert array.shape[0] == pool.capacity
