"""What a model is, as far as its cache is concerned: layers, heads, rotary embedding, and reasons to refuse it."""

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path

import torch

from kvist.models import compat, precision
from kvist.types import Geometry, ModelIdentity

SERVED = "full_attention"
ALIBI = ("bloom", "mpt")


@dataclass(frozen=True)
class Model:
    """`kinds` is the attention type of each layer; kvist serves "full_attention", transformers' own cache the rest."""

    name: str
    kinds: tuple[str, ...]
    arguments: tuple[dict, ...]
    query_heads: int
    shape: Geometry
    rotary: str
    identity: ModelIdentity

    @property
    def served(self) -> list[int]:
        """Layers that kvist stores."""
        return [i for i, kind in enumerate(self.kinds) if kind == SERVED]


def describe(model) -> Model:
    """Read a model's config. Raises ValueError with the reason where the cache of such a model cannot be stored."""
    config = getattr(model, "config", None)
    if config is None or not hasattr(config, "get_text_config"):
        raise ValueError(f"expected a transformers model, found {type(model).__name__}")
    name = config.model_type
    if config.is_encoder_decoder:
        raise ValueError(f"{name} is an encoder-decoder model; kvist caches decoder-only models")
    text = config.get_text_config(decoder=True)
    if getattr(text, "kv_lora_rank", None):
        raise ValueError(f"{name} caches compressed latents (MLA), which are small already; kvist does not store them")
    if getattr(text, "alibi", False) or name in ALIBI:
        raise ValueError(f"{name} uses ALiBi position biases, which kvist's attention does not compute")
    kinds, arguments = compat.layer_types(text)
    if SERVED not in kinds:
        raise ValueError(
            f"{name} has no full-attention layer (its layers: {', '.join(sorted(set(kinds)))}); their caches do not "
            "grow with the context, so there is nothing to gain"
        )
    shape, rotary = _geometry(text, model), _rotary(text)
    identity = _identity(text, config, kinds, shape, rotary)
    return Model(name, tuple(kinds), tuple(arguments), text.num_attention_heads, shape, rotary, identity)


def _geometry(text, model) -> Geometry:
    heads = text.num_attention_heads
    dim = getattr(text, "head_dim", None) or text.hidden_size // heads
    attention = getattr(text, "attn_config", None)
    kv_heads = getattr(text, "num_key_value_heads", None) or getattr(attention, "kv_n_heads", None)
    if text.model_type == "falcon":  # its newer architecture repeats the KV heads before they reach the cache
        kv_heads = 1 if text.multi_query and not text.new_decoder_architecture else heads
    dtype = getattr(model, "dtype", None) or torch.float32
    return Geometry(kv_heads or heads, dim, dim, dtype, precision.kept(model))


def _identity(text, config, kinds: list[str], shape: Geometry, rotary: str) -> ModelIdentity:
    """What a fitted table belongs to: the same for a fine-tuned model, and in every release of transformers."""
    sizes = [getattr(text, name, None) for name in ("vocab_size", "hidden_size", "intermediate_size")]
    facts = [config.model_type, *sizes, text.num_attention_heads, shape.heads, shape.key_dim, list(kinds), rotary]
    return ModelIdentity(
        name=Path(getattr(config, "_name_or_path", "") or config.model_type).name,
        kind=config.model_type,
        config=hashlib.blake2b(json.dumps(facts).encode(), digest_size=8).hexdigest(),
        layers=kinds.count(SERVED),
        heads=shape.heads,
        key_dim=shape.key_dim,
        value_dim=shape.value_dim,
    )


def _rotary(text) -> str:
    """In words: the kind of rotary embedding, its base, and the share of channels it turns."""
    parameters = getattr(text, "rope_parameters", None) or getattr(text, "rope_scaling", None) or {}
    if parameters and all(isinstance(v, dict) for v in parameters.values()):
        parameters = parameters.get(SERVED) or next(iter(parameters.values()))
    kind = parameters.get("rope_type", "default")
    base = parameters.get("rope_theta") or getattr(text, "rope_theta", None)
    if base is None:
        return "none"
    partial = parameters.get("partial_rotary_factor") or getattr(text, "partial_rotary_factor", None) or 1.0
    share = f", {partial:.0%} of the channels" if partial != 1.0 else ""
    return f"{kind}, base {base:g}{share}"
