"""Weights that are quantized leave keys and values as they are: the cache sees a model like any other."""

import copy
import warnings

import pytest
import torch
from dense import rounded_cache
from models_tiny import tiny_llama, tokens
from sweep import said
from transformers import DynamicCache

import kvist
from kvist.models.adapter import fingerprint

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # of a package that looks for libraries of GPUs
    quantization = pytest.importorskip("torchao.quantization", reason="needs torchao")

CHUNKS = (tokens(1, 90), *tokens(1, 20, 2).split(1, 1))


@pytest.fixture(scope="module")
def model():
    """A tiny Llama whose linear layers hold 8-bit integers."""
    made = copy.deepcopy(tiny_llama())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        quantization.quantize_(made, quantization.Int8WeightOnlyConfig())
    assert type(made.model.layers[0].self_attn.k_proj.weight) is not torch.nn.Parameter
    return made


@pytest.mark.parametrize("attached", [False, True], ids=["stock", "attached"])
def test_exact_is_transformers_own_cache_and_packing_is_the_same(model, attached):
    cache = kvist.Cache(model, "exact")
    wanted = said(model, DynamicCache(config=model.config), *CHUNKS)
    rounded = said(model, rounded_cache(model, "kivi", 2, 32), *CHUNKS)
    with kvist.attach(model) if attached else warnings.catch_warnings():
        found = said(model, cache, *CHUNKS)
        packed = said(model, kvist.Cache(model, "kivi:2 recent=32"), *CHUNKS)
    assert torch.equal(found, wanted) and cache.inner.ours[0].dtype == torch.float32
    assert (packed - rounded).abs().amax(-1).median() <= 5e-4 * rounded.std()
    assert (rounded - wanted).abs().max() > 1e-2 * wanted.std(), "2 bits must show, or this test could not fail"


def test_a_cache_is_saved_and_belongs_to_these_weights(model, tmp_path):
    cache = kvist.Cache(model, "kivi:2 recent=32")
    said(model, cache, *CHUNKS)
    cache.save(tmp_path / "cache")
    again = kvist.Cache.load(tmp_path / "cache", model)
    assert torch.equal(said(model, again, tokens(1, 1)), said(model, cache, tokens(1, 1)))
    assert fingerprint(model) != fingerprint(tiny_llama())
    with pytest.raises(ValueError, match="other weights"):
        kvist.Cache.load(tmp_path / "cache", tiny_llama())
