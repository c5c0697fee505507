"""Steps on a CPU: the bits that encoding at leisure gives, attention over everything decoded, no stray memory."""

import copy
from dataclasses import replace

import pytest
import torch
from models_tiny import tiny_llama
from torch import Tensor

import kvist
from kvist.cache import step
from kvist.cache.layer import Layer
from kvist.kernels.choose import choose
from kvist.kernels.contract import Operation
from kvist.kernels.numba import bound
from kvist.kernels.reference.attend import attend
from kvist.testing.cases import CASES, recipe

DIM, ROWS = 40, 3  # the last group along channels is shorter
TYPES = torch.float32, torch.float16, torch.bfloat16


def drawn(seed: int, count: int, dtype: torch.dtype) -> Tensor:
    """Keys and values (2, B, H, T, D)."""
    return torch.randn(2, ROWS, 2, count, DIM, generator=torch.Generator().manual_seed(seed)).to(dtype)


def cached(text: str, dtype: torch.dtype = torch.float32) -> kvist.Cache:
    """A cache with a prompt of unequal rows."""
    made = recipe(text, DIM)
    cache = kvist.Cache(tiny_llama(layers=2 if "," in text else 1, dim=DIM), made)
    told(cache, 0, 130, dtype, pads=(0, 33, 70))
    return cache


def told(cache: kvist.Cache, seed: int, count: int, dtype: torch.dtype, pads=(0, 0, 0)) -> list:
    """Give every layer `count` slots; what attention is given."""
    past = cache.inner.rows.slots
    new = (torch.arange(count) >= torch.tensor(pads).unsqueeze(-1)).long()
    real = torch.ones(ROWS, past, dtype=torch.long)
    for row in range(ROWS) if past else ():
        stored = torch.zeros(past, dtype=torch.long)
        stored[cache.inner.rows.slot_of(row, stored.device)] = 1
        real[row] = stored
    cache.announce(ROWS, count, torch.cat([real, new], 1))
    return [cache.update(*drawn(seed + 100 * i, count, dtype), i) for i in range(len(cache.layers))]


def steps(cache: kvist.Cache, dtype: torch.dtype) -> list:
    """Steps of several lengths, one with padding; enough that every method packs."""
    for seed, (count, pads) in enumerate([(1, (0, 0, 0))] * 40 + [(7, (0, 2, 7)), (32, (0, 0, 0)), (1, (0, 0, 0))], 1):
        given = told(cache, seed, count, dtype, pads)
    return given


@pytest.mark.parametrize("dtype", TYPES, ids=str)
@pytest.mark.parametrize("text", CASES)
def test_steps_store_what_the_reference_stores(text, dtype, monkeypatch):
    """To the bit: codes, scales, outliers, exact tokens, pins, counts of what was clipped."""
    caches = []
    for by_kernel in (True, False):
        if not by_kernel:
            monkeypatch.setattr(step, "take", lambda *_: False)
        cache = cached(text, dtype)
        steps(cache, dtype)
        caches.append(cache)
    for ours, theirs in zip(*(cache.inner.ours for cache in caches), strict=True):
        assert (ours.lengths, ours.slots, ours.settled) == (theirs.lengths, theirs.slots, theirs.settled)
        for mine, other in zip(ours.tracks, theirs.tracks, strict=True):
            assert mine.states == other.states and mine.exact.pins == other.exact.pins
            assert mine.pool.tables == other.pool.tables and int(mine.clipped) == int(other.clipped)
            for row, (_, frontier) in enumerate(mine.states):
                slots = ours.maps[row].slot(frontier)
                for name, spec in mine.pool.specs.items():
                    a, b = (entries(track.pool, name, row, slots // spec.stride) for track in (mine, other))
                    assert torch.equal(a, b), name
                here = range(frontier, ours.behind(row))
                assert all(torch.equal(mine.exact.get([row], p, p + 1), other.exact.get([row], p, p + 1)) for p in here)
                for slot in mine.exact.pins[row].values():
                    assert torch.equal(mine.exact.pinned[row, :, slot], other.exact.pinned[row, :, slot])
                held = min(ours.lengths[row], ours.plan.sinks)
                assert torch.equal(mine.exact.sinks[row, :, :held], other.exact.sinks[row, :, :held])


def entries(pool, name: str, row: int, count: int) -> Tensor:
    """The first entries of an array of a row, as bytes."""
    taken = pool.arrays[name][pool.tables[row]]
    flat = taken.transpose(1, 2).flatten(0, 1) if pool.specs[name].kind == "head" else taken.flatten(0, 1)
    return flat[:count].contiguous().view(torch.uint8)


@pytest.mark.parametrize("dtype", TYPES, ids=str)
@pytest.mark.parametrize("text", CASES)
def test_steps_attend_to_everything_that_is_stored(text, dtype):
    """Equal to attention over decoded tensors, within the rounding of fp32, or of the type that the output has; memory
    that holds nothing holds NaN."""
    cache = cached(text, dtype)
    poison(cache)
    for handles, layer in zip(steps(cache, dtype), cache.inner.ours, strict=True):
        query = torch.randn(ROWS, 4, 1, DIM, generator=torch.Generator().manual_seed(9)).to(dtype)
        if not layer.packs:  # the model's own attention serves
            continue
        found = handles[0].source.attend(query, 0.2, softcap=5.0, sink=torch.tensor([0.5, -1.0, 2.0, -torch.inf]))
        for row in range(ROWS):
            slots = cache.inner.rows.slot_of(row, found.device)
            keys, values = (exact_and_packed(layer, side, row) for side in (0, 1))
            keys, values = (torch.cat([x, x.new_zeros(1, 2, 1, DIM)], 2) for x in (keys, values))
            part = attend(query[row : row + 1], keys[:, :, :-1], values[:, :, :-1], 0.2, softcap=5.0)
            total = torch.logaddexp(part.lse, torch.tensor([0.5, -1.0, 2.0, -torch.inf]).view(1, 4, 1))
            want = part.out * (part.lse - total).exp().unsqueeze(-1)
            assert len(slots) == layer.lengths[row]
            rounding = torch.finfo(dtype).eps + 64 * torch.finfo(torch.float32).eps
            assert (found[row].float() - want[0]).abs().max() <= rounding * values.abs().max()


def exact_and_packed(layer: Layer, side: int, row: int) -> Tensor:
    """All tokens of a row as stored, decoded, (1, H, T, D), fp32."""
    track, maps = layer.tracks[side], layer.maps[row]
    held = min(layer.lengths[row], layer.plan.sinks)
    behind = track.fetch(row, list(range(layer.behind(row))), maps)
    return torch.cat([track.exact.sinks[row, :, :held].float(), behind.float()], 1)[None]


def poison(cache: kvist.Cache) -> None:
    """NaN wherever nothing is stored: behind the ring's and the sinks' tokens, in free pages, among free pins."""
    for layer in cache.inner.ours:
        for track in layer.tracks:
            ring, (sinks, pinned) = track.exact.ring, (track.exact.sinks, track.exact.pinned)
            for row, (_, frontier) in enumerate(track.states):
                used = {p % track.exact.capacity for p in range(frontier, layer.behind(row))}
                ring[row, :, sorted(set(range(track.exact.capacity)) - used)] = torch.nan
                sinks[row, :, layer.lengths[row] :] = torch.nan
                pinned[row, :, sorted(set(range(pinned.shape[2])) - set(track.exact.pins[row].values()))] = torch.nan
            for array in track.pool.arrays.values():
                array[track.pool.free] = torch.nan if array.is_floating_point() else 255


def test_threads_draw_pieces_and_agree_with_one(monkeypatch):
    """Cut into runs of pages, which several threads draw, and merged: the same numbers up to rounding."""
    torch.manual_seed(0)
    cache = kvist.Cache(tiny_llama(layers=1, dim=32), recipe("hadamard k=3 v=2"))
    for count in (3000, 3):
        past = cache.inner.rows.slots + count
        mask = (torch.arange(past) >= torch.tensor([[0], [1900], [2990]])).long()
        cache.announce(3, count, mask)
        given = cache.update(*torch.randn(2, 3, 2, count, 32), 0)
    source = given[0].source
    query, before = torch.randn(3, 4, 3, 32), torch.get_num_threads()
    alone = source.attend(query, 0.3)
    monkeypatch.setattr(bound, "SMALL", 0)
    try:
        torch.set_num_threads(3)
        for _ in range(5):
            torch.testing.assert_close(source.attend(query, 0.3), alone, rtol=0, atol=1e-5)
    finally:
        torch.set_num_threads(before)


def test_a_copied_cache_has_storage_of_its_own():
    cache = cached("int4")
    steps(cache, torch.float32)
    twin = copy.deepcopy(cache)
    before = [handle.dense().clone() for handle in (cache.layers[0].keys, cache.layers[0].values)]
    told(twin, 7, 1, torch.float32)
    told(twin, 8, 1, torch.float32)
    assert all(torch.equal(a, b) for a, b in zip(before, (cache.layers[0].keys, cache.layers[0].values), strict=True))


def test_what_steps_do_not_serve_is_named():
    request = cached("int4").inner.ours[0].request
    assert choose(Operation.WHOLE, request).name == "numba.bound.Bound"
    said = {
        "more than 32 queries": {"queries": 33},
        "a mask hides": {"hidden": True},
        "run on CPUs": {"device": "cuda"},
        "float64": {"kept": torch.float64},
        "Triton": {"interpreted": True},
        "before an interleaved": {"sides": (replace(request.sides[0], rotary="interleaved"), request.sides[1])},
        "kept exact": {"sides": (replace(request.sides[0], rotary="half"), request.sides[1]), "pinned": True},
        "gaps": {"sides": (replace(request.sides[0], rotary="half"), request.sides[1]), "gaps": True},
        "absmax": {"sides": (request.sides[0], replace(request.sides[1], range="absmax"))},
    }
    for words, changed in said.items():
        choice = choose(Operation.WHOLE, replace(request, **changed))
        assert choice.run is None and words in " ".join(choice.reasons), words
