"""The attention function that transformers calls once a model is attached."""

import sys

from torch import Tensor, nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from kvist.attention.mask import LazyMask
from kvist.cache.handle import Handle

# What may come beside queries, keys and values, and leaves packed attention right: these are understood …
UNDERSTOOD = {"scaling", "softcap", "s_aux", "sliding_window"}
# … and these do not change the result of attention.
HARMLESS = {"position_ids", "use_cache", "output_router_logits", "num_items_in_batch", "logits_to_keep", "labels"}


def packed_attention(own: str):
    """An attention function that reads handles packed and gives everything else to the model's own, `own`."""

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
            plain = attention_mask is None or isinstance(attention_mask, LazyMask)
            scale = kwargs.get("scaling")
            out = key.source.attend(
                query,
                query.shape[-1] ** -0.5 if scale is None else scale,
                mask=None if plain else attention_mask,
                causal=plain,
                softcap=kwargs.get("softcap"),
                sink=kwargs.get("s_aux"),
            )
            return out.transpose(1, 2).contiguous(), None
        key, value = (x.dense() if isinstance(x, Handle) else x for x in (key, value))
        mask = attention_mask.dense() if isinstance(attention_mask, LazyMask) else attention_mask
        fallback = _own(own, module)
        return fallback(module, query, key, value, mask, dropout=dropout, **kwargs)

    return forward


def refusals(mask: Tensor | None, dropout: float, kwargs: dict) -> list[str]:
    """Why packed data cannot serve a call: named, so that nothing is ever ignored."""
    reasons = [
        f"keyword {k!r}"
        for k, v in kwargs.items()  # a flag that is off changes nothing, and neither does causality that is on
        if v is not None and v is not (k == "is_causal") and k not in UNDERSTOOD | HARMLESS
    ]
    if kwargs.get("sliding_window") is not None:
        reasons.append("a sliding window")
    if dropout:
        reasons.append("dropout")
    if isinstance(mask, LazyMask) and not mask.plain:
        reasons.append("a mask that is not plain causal")
    return reasons


def _own(own: str, module: nn.Module):
    if own in ALL_ATTENTION_FUNCTIONS:
        return ALL_ATTENTION_FUNCTIONS[own]
    return sys.modules[type(module).__module__].eager_attention_forward
