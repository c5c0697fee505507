"""The cache driven forward by forward: chunks, turns, crops and changes of the batch, oracle at its side."""

import copy

import pytest
import torch
from models_tiny import padded, tiny_llama, tokens, unpadded
from shadow import Spoken, compare, same

import kvist
from kvist.cache.handle import Handle
from kvist.models.compat import cache_argument
from kvist.testing.cases import CASES, EACH, recipe


def feeding(inputs, chunks, between=None):
    """A run that feeds `chunks` slots at a time, `between(cache, step)` being called after each."""

    def run(model, cache) -> Spoken:
        ids, mask, logits, start = inputs["input_ids"], inputs["attention_mask"], [], 0
        for step, count in enumerate(chunks):
            stop = start + count
            out = model(input_ids=ids[:, start:stop], attention_mask=mask[:, :stop], **cache_argument(cache))
            logits.append(out.logits[:, -1])
            start = stop
            if between is not None:
                start = between(cache, step, start)
        return Spoken(logits, ids)

    return run


@pytest.mark.parametrize("prefill", ["exact", "stored"])
@pytest.mark.parametrize("sizes", [(200, 3), (33, 31, 40, 32, 64, 1, 2), (90, 90, 1, 1, 1)], ids=str)
@pytest.mark.parametrize("text", CASES)
def test_chunks_of_several_sizes(text, sizes, prefill):
    inputs = padded([sum(sizes), sum(sizes) - 45])
    compare(feeding(inputs, sizes), recipe(text, prefill=prefill), mask=inputs["attention_mask"])


@pytest.mark.parametrize(("text", "prefill"), [*((c, "exact") for c in CASES), *((c, "stored") for c in EACH)])
def test_short_chunks(text, prefill):
    """They pack nothing of their own, so that the two kinds of prefill are one."""
    inputs = padded([153, 108])
    compare(feeding(inputs, (17,) * 9), recipe(text, prefill=prefill), mask=inputs["attention_mask"])


@pytest.mark.parametrize("text", CASES)
def test_turns_that_pad_in_the_middle(text):
    """A batch whose second turn is shorter in one row: padding sits between the turns."""
    ids, mask = tokens(2, 180), torch.ones(2, 180, dtype=torch.long)
    mask[0, :20], mask[1, 100:137] = 0, 0
    inputs = {"input_ids": ids, "attention_mask": mask}
    compare(feeding(inputs, (100, 60, 1, 1, 1, 10, 1, 1)), recipe(text), mask=mask)


@pytest.mark.parametrize(
    ("depth", "way"), [*((k, "attached") for k in (1, 7, 32, 33, 61, 140)), (7, "sdpa"), (61, "sdpa")]
)
@pytest.mark.parametrize("text", CASES)
def test_crop(text, depth, way):
    inputs = padded([230, 221])

    def cut(cache, step, start):
        if step not in (1, 4):
            return start
        cache.crop(-depth)
        return start - depth

    run = feeding(inputs, (120, 32, 1, 40, 1, 1, 35, 1), cut)
    compare(run, recipe(text), way, mask=inputs["attention_mask"])


@pytest.mark.parametrize("text", CASES)
def test_shallow_crop_leaves_no_trace(text):
    """An update of n tokens and crop(-k), k <= 32, stores what an update of n-k stores: seen by what comes later."""
    plan = recipe(text)
    for first, last, gone in ((100, 21, 20), (100, 32, 5), (100, 60, 32), (90, 64, 1), (0, 150, 32), (0, 33, 32)):
        held = []
        for extra in (gone, 0):
            cache = kvist.Cache(tiny_llama(layers=len(plan.layers)), plan)
            generator = torch.Generator().manual_seed(0)
            keys, values = torch.randn(2, 1, 2, first + last + 3, 32, generator=generator)
            stop = first + last - gone
            for a, b in ((0, first), (first, stop + extra), (stop, stop + 3)):
                if a < b:
                    cache.announce(1, b - a, None)
                    given = cache.update(keys[:, :, a:b], values[:, :, a:b], 0)
                if b == stop + extra and extra:
                    cache.crop(-extra)
                    assert cache.get_seq_length() == stop
            held.append([x.dense() if isinstance(x, Handle) else x for x in given])
        for (with_crop, without), side in zip(zip(*held, strict=True), cache.layers[0].plan.sides, strict=True):
            same(with_crop, without, side)


@pytest.mark.parametrize("text", CASES)
def test_reorder_repeat_and_select(text):
    inputs = padded([150, 140, 90])
    moves = {
        0: lambda cache: cache.reorder_cache(torch.tensor([2, 0, 0])),
        2: lambda cache: cache.batch_select_indices(torch.tensor([1, 2, 0])),
        3: lambda cache: cache.reorder_cache(torch.tensor([1, 1, 0])),
    }

    def run(model, cache) -> Spoken:
        ids, mask, logits, start = inputs["input_ids"], inputs["attention_mask"], [], 0
        for step, count in enumerate((110, 1, 36, 1, 1, 1)):
            out = model(ids[:, start : start + count], attention_mask=mask[:, : start + count], **cache_argument(cache))
            logits.append(out.logits[:, -1])
            start += count
            if step in moves:
                moves[step](cache)
                order = {0: [2, 0, 0], 2: [1, 2, 0], 3: [1, 1, 0]}[step]
                mask = mask[order]
        return Spoken(logits, ids)

    compare(run, recipe(text), mask=inputs["attention_mask"])


@pytest.mark.parametrize("text", EACH)
def test_batch_repeat_and_fewer_rows(text):
    inputs = padded([140, 101])

    def run(model, cache) -> Spoken:
        ids, mask, logits = inputs["input_ids"], inputs["attention_mask"], []
        logits.append(model(ids, attention_mask=mask, **cache_argument(cache)).logits[:, -1])
        cache.batch_repeat_interleave(3)
        mask = torch.cat([mask.repeat_interleave(3, 0), torch.ones(6, 60, dtype=torch.long)], 1)
        more = tokens(6, 60, seed=3)
        for start, stop in ((0, 1), (1, 35), (35, 36)):
            out = model(more[:, start:stop], attention_mask=mask[:, : 140 + stop], **cache_argument(cache))
            logits.append(out.logits[:, -1])
        keep = torch.tensor([5, 0])
        cache.batch_select_indices(keep)
        for start, stop in ((36, 37), (37, 60)):
            out = model(more[keep, start:stop], attention_mask=mask[keep, : 140 + stop], **cache_argument(cache))
            logits.append(out.logits[:, -1])
        return Spoken(logits, ids)

    compare(run, recipe(text), mask=inputs["attention_mask"])


@pytest.mark.parametrize("text", CASES)
def test_reset_starts_anew(text):
    model, plan = tiny_llama(), recipe(text)
    fresh, used = kvist.Cache(model, plan), kvist.Cache(model, plan)
    said = []
    with torch.no_grad(), kvist.attach(model):
        model(**padded([130, 60]), **cache_argument(used))
        used.reset()
        assert used.get_seq_length() == 0 and used.report().nbytes == 0
        for cache in (fresh, used):
            model(**unpadded(1, 140), **cache_argument(cache))
            said.append(model(tokens(1, 1), **cache_argument(cache)).logits)
    assert torch.equal(*said)


@pytest.mark.parametrize("text", CASES)
def test_deepcopy_lives_its_own_life(text):
    model, plan = tiny_llama(), recipe(text)
    with torch.no_grad(), kvist.attach(model):
        cache = kvist.Cache(model, plan)
        model(**unpadded(2, 140), **cache_argument(cache))
        twin = copy.deepcopy(cache)
        for seed in (5, 6, 7):  # the original goes on elsewhere
            model(
                tokens(2, 40, seed), attention_mask=torch.ones(2, cache.get_seq_length() + 40), **cache_argument(cache)
            )
        assert twin.get_seq_length() == 140
        straight = kvist.Cache(model, plan)
        model(**unpadded(2, 140), **cache_argument(straight))
        mask = torch.ones(2, 176)
        said = [model(tokens(2, 36, 8), attention_mask=mask, **cache_argument(c)).logits for c in (twin, straight)]
    assert torch.equal(*said)
