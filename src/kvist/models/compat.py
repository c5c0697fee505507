"""Differences between the releases of transformers that kvist supports (5.17 to newest)."""

import inspect

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


def layer_types(config) -> tuple[list[str], list[dict]]:
    """The attention type of each layer of a text config, and the arguments of transformers' own cache layer for it.

    Since 5.18 or so the arguments come per layer; before, as one dict for all.
    """
    types, arguments = cache_utils.get_layer_types_and_kwargs(config)
    if isinstance(arguments, dict):
        arguments = [arguments if kind != "full_attention" else {} for kind in types]
    return types, arguments


def own_layer(kind: str, arguments: dict):
    """transformers' own dynamic cache layer for an attention type."""
    return cache_utils.DYNAMIC_LAYER_TYPE_MAPPING[kind](**arguments)
