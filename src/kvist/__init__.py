"""kvist: a key-value cache of 1 to 4 bits for Hugging Face causal language models, truly packed."""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from kvist.allocation import Allocation
    from kvist.attention import attach, detach
    from kvist.attention.captured import Captured
    from kvist.cache.cache import Cache
    from kvist.methods.registry import method
    from kvist.plan import Recipe

__version__ = "0.1.0"

_HOMES = {
    "Allocation": "kvist.allocation",
    "Cache": "kvist.cache.cache",
    "Captured": "kvist.attention.captured",
    "Recipe": "kvist.plan",
    "attach": "kvist.attention",
    "detach": "kvist.attention",
    "method": "kvist.methods.registry",
}

__all__ = ["Allocation", "Cache", "Captured", "Recipe", "attach", "detach", "method"]


def __getattr__(name: str):
    if name in _HOMES:
        return getattr(import_module(_HOMES[name]), name)
    raise AttributeError(f"module 'kvist' has no attribute {name!r}")
