"""The attention function that transformers calls once a model is attached."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from kvist.attention.mask import LazyMask
from kvist.cache.handle import Handle

# What may come beside queries, keys and values, and leaves packed attention right: these are understood …
UNDERSTOOD = {"scaling", "softcap", "s_aux", "sliding_window"}
# … and these do not change the result of attention.
HARMLESS = {"position_ids", "use_cache", "output_router_logits", "num_items_in_batch", "logits_to_keep", "labels"}
KNOWN = UNDERSTOOD | HARMLESS


def packed_attention(own: str, fallback: Callable | None = None):
    """An attention function that reads handles packed and gives everything else to the model's own: `fallback`, which
    is what transformers calls `own`."""
    fallback = fallback or ALL_ATTENTION_FUNCTIONS[own]

    def forward(
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        dropout: float = 0.0,
        **kwargs,
    ) -> tuple[Tensor, Tensor | None]:
        if isinstance(key, Handle) and isinstance(value, Handle) and not refusals(attention_mask, dropout, kwargs):
            attend = _untraced if torch.compiler.is_compiling() else _attend
            return attend(query, key, attention_mask, kwargs), None
        key = key.dense() if isinstance(key, Handle) else key
        value = value.dense() if isinstance(value, Handle) else value
        mask = attention_mask.dense() if isinstance(attention_mask, LazyMask) else attention_mask
        if own in ("sdpa", "eager"):
            return fallback(module, query, key, value, mask, dropout=dropout, **kwargs)
        with _named(getattr(module, "config", None), own):
            return fallback(module, query, key, value, mask, dropout=dropout, **kwargs)

    return forward


def _attend(query: Tensor, key: Handle, mask: Tensor | None, kwargs: dict) -> Tensor:
    plain = mask is None or isinstance(mask, LazyMask)
    scale = kwargs.get("scaling")
    out = key.source.attend(
        query,
        query.shape[-1] ** -0.5 if scale is None else scale,
        mask=None if plain else mask,
        causal=plain,
        softcap=kwargs.get("softcap"),
        sink=kwargs.get("s_aux"),
    )
    return out.transpose(1, 2).contiguous()


_untraced = torch.compiler.disable(_attend)  # kernels and pages are nothing that a compiler could trace


@contextmanager
def _named(config, own: str) -> Iterator[None]:
    """Meanwhile the config says the model's own attention: flash attention reads there which of its kinds to run."""
    if config is None:
        yield
        return
    ours, config._attn_implementation_internal = config._attn_implementation_internal, own
    try:
        yield
    finally:
        config._attn_implementation_internal = ours


def refusals(mask: Tensor | None, dropout: float, kwargs: dict) -> list[str]:
    """Why packed data cannot serve a call: named, so that nothing is ever ignored."""
    reasons = []
    for k, v in kwargs.items():  # a flag that is off changes nothing, and neither does causality that is on
        if v is not None and k not in KNOWN and v is not (k == "is_causal"):
            reasons.append(f"keyword {k!r}")
    if kwargs.get("sliding_window") is not None:
        reasons.append("a sliding window")
    if dropout:
        reasons.append("dropout")
    if isinstance(mask, LazyMask) and not mask.plain:
        reasons.append("a mask that is not plain causal")
    if mask is not None and not (isinstance(mask, Tensor) and mask.dim() == 4):
        reasons.append("a mask that is not a tensor (batch, heads, queries, keys)")
    return reasons
