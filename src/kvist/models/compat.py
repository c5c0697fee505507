"""Differences between the releases of transformers that kvist supports (5.17 to newest)."""

import inspect
from collections.abc import Iterable, Sequence
from functools import lru_cache

from transformers import cache_utils, masking_utils

# What a model's `forward` and `generate` call the cache: since 5.24, and before.
CACHE_NAMES = ("cache", "past_key_values")
CACHE_KEYWORD = next(
    (name for name in CACHE_NAMES if name in inspect.signature(masking_utils.create_causal_mask).parameters),
    CACHE_NAMES[0],
)


def cache_argument(cache) -> dict:
    """A cache as the keyword argument that the installed release wants: `model(ids, **cache_argument(cache))`."""
    return {CACHE_KEYWORD: cache}


def takes(cls: type, names: Iterable[str]) -> bool:
    """Whether `forward` of a module's class has a parameter of one of these names."""
    return not _parameters(cls).isdisjoint(names)


@lru_cache(1024)
def _parameters(cls: type) -> frozenset[str]:
    return frozenset(inspect.signature(cls.forward).parameters)


def layer_types(config) -> tuple[list[str], list[dict]]:
    """The attention type of each layer of a text config, and the arguments of transformers' own cache layer for it.

    Since 5.18 or so the arguments come per layer; before, as one dict for all.
    """
    types, arguments = cache_utils.get_layer_types_and_kwargs(config)
    if isinstance(arguments, dict):
        arguments = [arguments if kind != "full_attention" else {} for kind in types]
    return types, arguments


def own_layer(kinds: Sequence[str], arguments: Sequence[dict], i: int):
    """transformers' own dynamic cache layer for layer i. A picture's keys are kept as a text's would be."""
    kind = "full_attention" if kinds[i] == "cross_attention" else kinds[i]
    return cache_utils.DYNAMIC_LAYER_TYPE_MAPPING[kind](**arguments[i])


def dequantized() -> dict:
    """Arguments by which `from_pretrained` reads GGUF into plain weights; before 5.24 it knew nothing else."""
    import transformers

    made = getattr(transformers, "GgufConfig", None)
    return {"quantization_config": made(dequantize=True)} if made else {}


def per_layer(config) -> list:
    """The text config as each layer sees it: a layer may have sizes of its own."""
    return list(getattr(config, "per_layer_config", None) or [config] * config.num_hidden_layers)


def takes_cache(model) -> bool:
    """Whether any module of a model has a place for a cache, under either of its names; a wrapper may hide it."""
    return any(takes(type(module), CACHE_NAMES) for module in model.modules())
