"""Corners where a wrong answer would be silent: exact sides in half precision, rows that start as padding, modes."""

import copy

import pytest
import torch
import torch.nn.functional as F
from models_tiny import tiny_llama, tokens

import kvist
from kvist.coding import Codec, Grouping, Hadamard, Raw
from kvist.methods import get
from kvist.models.compat import cache_argument
from kvist.testing.cases import EACH, recipe

HEADS, DIM = 2, 32


def fed(model, method, lengths, dtype):
    """A cache of one layer that was given random tokens; the handles of the last update and everything decoded."""
    cache, generator = kvist.Cache(model, method), torch.Generator().manual_seed(0)
    for n in lengths:
        keys, values = torch.randn(2, 1, HEADS, n, DIM, generator=generator).to(dtype)
        handles = cache.update(keys, values, 0)
    return handles, [handle.dense() for handle in handles]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("text", ["kivi k=16 v=2", "kivi k=2 v=16", "hadamard k=4 v=16", "hadamard k=16 v=2"])
def test_one_exact_side_in_every_type(text, dtype):
    (key, _), (keys, values) = fed(tiny_llama(layers=1), text, (200, 1, 1), dtype)
    query = torch.randn(1, 4, 1, DIM, generator=torch.Generator().manual_seed(1))
    out = key.source.attend(query, DIM**-0.5)
    expected = F.scaled_dot_product_attention(query, keys.float(), values.float(), enable_gqa=True)
    rounding = torch.finfo(dtype).eps * values.float().abs().max()  # dense tensors are rounded to the model's type
    assert (out - expected).abs().max() <= 4 * rounding + 1e-5


@pytest.mark.parametrize("method", ["exact", "int8", "kivi recent=32"])
@pytest.mark.parametrize("attached", [True, False])
def test_a_first_chunk_of_padding_alone(method, attached):
    model = tiny_llama()
    ids = torch.randint(0, 90, (1, 200), generator=torch.Generator().manual_seed(0))
    mask = (torch.arange(200) >= 100).long()[None]
    positions = (mask.cumsum(-1) - 1).clamp_min(0)
    attachment = kvist.attach(model) if attached else None
    cache = kvist.Cache(model, method)
    with torch.no_grad():
        for a, b in ((0, 64), (64, 128), (128, 200)):
            found = model(
                ids[:, a:b], attention_mask=mask[:, :b], position_ids=positions[:, a:b], **cache_argument(cache)
            ).logits
        whole = kvist.Cache(model, method)
        alone = [model(ids[:, a:b], **cache_argument(whole)).logits for a, b in ((100, 128), (128, 200))][-1]
    if attachment is not None:
        attachment.close()
    assert cache.report().tokens == 100
    torch.testing.assert_close(found, alone, rtol=1e-3, atol=1e-3)


def test_a_row_without_tokens_under_a_mask_of_another():
    cache = kvist.Cache(tiny_llama(layers=1), "int8")
    mask = torch.ones(2, 41, dtype=torch.long)
    mask[1, :40] = 0
    handles = None
    for a, b in ((0, 20), (20, 40)):
        cache.announce(2, b - a, mask[:, :b])
        keys, values = torch.randn(2, 2, HEADS, b - a, DIM, generator=torch.Generator().manual_seed(a))
        handles = cache.update(keys, values, 0)
    query = torch.randn(2, HEADS, 1, DIM)
    seen = mask[:, None, None, :40].bool()
    out = F.scaled_dot_product_attention(query, *handles, attn_mask=seen)
    expected = F.scaled_dot_product_attention(query[:1], *(h.dense()[:1] for h in handles))
    torch.testing.assert_close(out[:1], expected, rtol=1e-4, atol=1e-5)
    assert out[1].isfinite().all()


@pytest.mark.parametrize("text", EACH)
def test_what_any_mode_stored_goes_on_in_another(text):
    """A prompt, steps that fill pages and rings, and what changes the storage in place afterwards."""
    model, ids = tiny_llama(), tokens(2, 215)
    logits = []
    for mode in (torch.inference_mode, torch.enable_grad, torch.no_grad):
        cache = kvist.Cache(model, recipe(text))
        with kvist.attach(model):
            with mode():
                model(ids[:, :40], **cache_argument(cache))
                for i in range(40, 160):
                    model(ids[:, i : i + 1], **cache_argument(cache))
            with torch.no_grad():
                model(ids[:, 160:210], **cache_argument(cache))
                cache.crop(-60)
                cache.reorder_cache(torch.tensor([1, 0]))
                steps = [model(ids[:, i : i + 1], **cache_argument(cache)).logits for i in range(210, 215)]
        logits.append(torch.cat(steps))
        cache.close()
    assert torch.equal(logits[0], logits[2]) and torch.equal(logits[1], logits[2])


def test_an_interrupted_forward_is_mended():
    model = tiny_llama()
    ids = torch.randint(0, 90, (1, 60), generator=torch.Generator().manual_seed(0))
    cache = kvist.Cache(model, "kivi recent=32")

    def interrupt(*_):
        raise KeyboardInterrupt

    with torch.no_grad():
        model(ids[:, :50], **cache_argument(cache))
        hook = model.model.layers[1].register_forward_pre_hook(interrupt)
        with pytest.raises(KeyboardInterrupt):
            model(ids[:, 50:], **cache_argument(cache))
        hook.remove()
        torn = copy.deepcopy(cache)
        with pytest.raises(ValueError, match="mend"):
            model(ids[:, 50:], **cache_argument(torn))
        cache.mend()
        assert cache.get_seq_length() == 50
        fresh = kvist.Cache(model, "kivi recent=32")
        model(ids[:, :50], **cache_argument(fresh))
        after, expected = (model(ids[:, 50:], **cache_argument(each)).logits for each in (cache, fresh))
    assert torch.equal(after, expected)


def test_a_changed_byte_in_a_file_is_noticed(tmp_path):
    model = tiny_llama()
    cache = kvist.Cache(model, "int8")
    with torch.no_grad():
        model(torch.arange(1, 60)[None], **cache_argument(cache))
    path = tmp_path / "cache.kvist"
    cache.save(path)
    data = bytearray(path.read_bytes())
    data[-5] ^= 1
    path.write_bytes(data)
    with pytest.raises(ValueError, match="damaged"):
        kvist.Cache.load(path, model)


def test_a_file_holds_tokens_not_room(tmp_path):
    model = tiny_llama()
    cache = kvist.Cache(model, "exact", reserve=50_000)
    with torch.no_grad():
        model(torch.arange(1, 51)[None], **cache_argument(cache))
    cache.save(tmp_path / "cache.kvist")
    held = sum(2 * layer.shape.heads * 50 * layer.shape.key_dim * 4 for layer in cache.layers)
    assert (tmp_path / "cache.kvist").stat().st_size < 2 * held + 8192
    again = kvist.Cache.load(tmp_path / "cache.kvist", model)
    assert again.report().allocated == cache.report().allocated


def test_recipes_that_mean_nothing_are_refused():
    with pytest.raises(ValueError, match="transform"):
        Codec(levels=Raw(), grouping=Grouping(along="channels"), transform=Hadamard())
    plan = get("kivi").model_dump()
    plan["layers"][0]["key"]["codec"]["grouping"]["size"] = 48
    with pytest.raises(ValueError, match="groups of 48"):
        kvist.Recipe.model_validate(plan)
    with pytest.raises(ValueError, match="bits must be one of"):
        get("kivi", k=0)
    with pytest.raises(ValueError, match=r"ratio: .*1\.5"):
        get("kvmix", ratio=1.5)


@pytest.mark.parametrize("method", ["exact", "int8"])
def test_a_number_of_slots_to_crop_may_be_a_tensor(method):
    """So says assisted decoding of transformers 5.17; a tensor that is shared must not count for two."""
    model = tiny_llama()
    cache, said = [kvist.Cache(model, method) for _ in range(2)], []
    for living, kind in zip(cache, (int, torch.tensor), strict=True):
        with torch.no_grad():
            model(tokens(1, 60), **cache_argument(living))
            living.crop(kind(-5))
            said.append([model(tokens(1, n, seed=n), **cache_argument(living)).logits for n in (1, 3)])
        assert all(type(layer.slots) is int for layer in living.inner.ours) and type(living.inner.rows.slots) is int
    assert all(torch.equal(a, b) for a, b in zip(*said, strict=True))
