"""The names that the installed transformers uses are names that kvist knows."""

import inspect

import pytest
from models_tiny import padded, tiny_llama
from transformers import DynamicCache, GenerationMixin
from transformers.models.auto import modeling_auto

import kvist
from kvist.models import compat

FAMILIES = ("llama", "qwen3", "mistral", "gemma3_text", "phi3", "falcon", "gpt_neox", "olmo2", "granite", "gpt2")


def parameters(function) -> set[str]:
    return set(inspect.signature(function).parameters)


@pytest.mark.parametrize("family", FAMILIES)
def test_models_call_the_cache_what_we_call_it(family):
    cls = modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[family]
    found = parameters(getattr(__import__("transformers"), cls).forward)
    assert compat.CACHE_KEYWORD in found, f"{cls}.forward takes {sorted(found)}: the cache has a new name"


def test_so_does_generate():
    assert compat.CACHE_KEYWORD in parameters(GenerationMixin.prepare_inputs_for_generation)
    assert compat.CACHE_KEYWORD in tiny_llama()(**padded([5]))


@pytest.mark.parametrize("name", compat.CACHE_NAMES)
def test_a_padded_row_is_told_from_tokens_under_every_name(name):
    """Whatever the installed release makes of the name: a warning, an error, or what was asked."""
    if name not in (compat.CACHE_KEYWORD, "past_key_values"):
        pytest.skip(f"this release does not know {name}")
    model, batch = tiny_llama(), padded([9, 4])
    row = {key: value[1:] for key, value in batch.items()}
    cache = kvist.Cache(model, "int8")
    with pytest.warns() if name != compat.CACHE_KEYWORD else kvist.attach(model):
        model(**row, **{name: cache})
    assert cache.inner.rows.tokens(0, 9) == 4 and cache.get_seq_length() == 9


def test_our_own_keyword_brings_no_warning():
    model, batch = tiny_llama(), padded([9, 4])
    model(**batch, **compat.cache_argument(DynamicCache(config=model.config)))
    model.generate(**batch, **compat.cache_argument(kvist.Cache(model, "int8")), max_new_tokens=2, do_sample=False)
