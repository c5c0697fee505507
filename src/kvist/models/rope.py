"""Keys before their rotary embedding: tagged where the model rotates them, so that nothing has to be inverted.

`update` receives rotated keys. While `tagged(model)` is open, the modeling file's own rotary function is wrapped so
that each rotated key carries the key it came from and the angles that were used: exact to the bit, whatever the model
does before (biases, norms, fused projections) and whatever its convention (half or interleaved, partial, scaled).
"""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers.cache_utils import DynamicCache

from kvist.models.adapter import describe

NAME = "apply_rotary_pos_emb"


@dataclass(frozen=True)
class PreRope:
    """key (B, H, T, D) before rotation, and the cos and sin that rotated it."""

    key: Tensor
    cos: Tensor
    sin: Tensor


def pre_rope(key: Tensor) -> PreRope | None:
    """What `tagged` left on a rotated key; None if it was not rotated under it."""
    return getattr(key, "_kvist_pre_rope", None)


def _modules(model: nn.Module) -> list:
    """The modeling files of a model that rotate by a function of the usual name."""
    found = {type(part).__module__ for part in model.modules()}
    return [sys.modules[name] for name in sorted(found) if hasattr(sys.modules[name], NAME)]


@contextmanager
def tagged(model: nn.Module) -> Iterator[None]:
    """Tag rotated keys while open. Wraps a function of the modeling file, for all models of that file, and puts the
    original back on leaving; the results are the original's."""
    wrapped = []

    def wrap(original):
        def rotate(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, *args, **kwargs):
            q_out, k_out = original(q, k, cos, sin, *args, **kwargs)
            k_out._kvist_pre_rope = PreRope(k, cos, sin)
            return q_out, k_out

        return rotate

    try:
        for module in _modules(model):
            original = getattr(module, NAME)
            wrapped.append((module, original))
            setattr(module, NAME, wrap(original))
        yield
    finally:
        for module, original in wrapped:
            setattr(module, NAME, original)


class _Spy(DynamicCache):
    """Keeps the tags of the keys that each layer's update was given."""

    def __init__(self, config):
        super().__init__(config=config)
        self.seen: dict[int, tuple[Tensor, PreRope | None]] = {}

    def update(self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args, **kwargs):
        self.seen[layer_idx] = (key_states, pre_rope(key_states))
        return super().update(key_states, value_states, layer_idx, *args, **kwargs)


@torch.no_grad()
def self_test(model: nn.Module) -> None:
    """One short forward: every served layer's key must carry its tag, and rotating that must give the key to the bit.
    Raises ValueError with the layer and what was wrong."""
    spy, device = _Spy(model.config), next(model.parameters()).device
    with tagged(model):
        model(torch.arange(1, 6, device=device).unsqueeze(0), past_key_values=spy)
    rotations = [getattr(module, NAME) for module in _modules(model)]
    for layer in describe(model).served:
        key, tag = spy.seen[layer]
        if tag is None:
            raise ValueError(
                f"layer {layer}: its keys reach the cache without the tag; keys before RoPE are not available here"
            )
        again = (rotate(tag.key, tag.key, tag.cos, tag.sin)[1] for rotate in rotations)
        if not any(torch.equal(key, k) for k in again if k.shape == key.shape):
            raise ValueError(
                f"layer {layer}: rotating the tagged key does not give the stored key; the model changes it after RoPE"
            )
