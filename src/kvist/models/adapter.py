"""What a model is, as far as its cache is concerned: layers, heads, rotary embedding, and reasons to refuse it."""

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from kvist.models import compat, precision
from kvist.types import Geometry, ModelIdentity

SERVED = "full_attention"
CROSS = "cross_attention"  # a picture's keys, as many as it has patches; transformers calls such layers full attention
ALIBI = ("bloom", "mpt")
SAMPLE = 16  # numbers of each weight that go into the fingerprint
UNLIKE = {
    "dory": "runs its layers several times over a text and gives each pass keys of its own",
    "minimax": "brings a cache class of its own and takes no other",
    "xlm": "fails behind a prompt with transformers' own caches, too",
}
REASONS = {
    "sliding_attention": "its window bounds its cache",
    "chunked_attention": "its chunk bounds its cache",
    "linear_attention": "its state does not grow with the context",
    "conv": "its state does not grow with the context",
    "indexed_attention": "it grows with the context, but chooses the tokens it attends to by keys of another kind",
    "hybrid": "attention and a state that does not grow share the layer; its attention grows, and kvist leaves it",
    "hybrid_sliding": "its window bounds its cache, and its state does not grow",
    CROSS: "it holds what the picture gave it, once",
    "dummy": "it stores nothing: no attention, or another layer's keys",
}


@dataclass(frozen=True)
class Model:
    """`kinds` is the attention type of each layer; kvist serves "full_attention", transformers' own cache the rest.
    `shapes` are those of the layers served, `queries` their query heads."""

    name: str
    kinds: tuple[str, ...]
    arguments: tuple[dict, ...]
    queries: tuple[int, ...]
    shapes: tuple[Geometry, ...]
    rotary: str
    identity: ModelIdentity

    @property
    def shape(self) -> Geometry:
        """The shape of all layers served. ValueError where they differ."""
        if len(set(self.shapes)) > 1:
            found = ", ".join(dict.fromkeys(f"{s.heads} heads of {s.key_dim} and {s.value_dim}" for s in self.shapes))
            raise ValueError(f"this needs layers of one shape, and those of {self.name} differ: {found}")
        return self.shapes[0]

    @property
    def query_heads(self) -> int:
        """The query heads of every layer served. ValueError where they differ."""
        if len(set(self.queries)) > 1:
            raise ValueError(
                f"this needs layers of one shape, and those of {self.name} have {set(self.queries)} queries"
            )
        return self.queries[0]

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
    if name in UNLIKE or not compat.takes_cache(model):
        raise ValueError(f"{name} {UNLIKE.get(name, 'takes no cache of keys and values')}; kvist has nothing to store")
    text = config.get_text_config(decoder=True)
    if getattr(text, "kv_lora_rank", None):
        raise ValueError(f"{name} caches compressed latents (MLA), which are small already; kvist does not store them")
    if getattr(text, "alibi", False) or name in ALIBI:
        raise ValueError(f"{name} uses ALiBi position biases, which kvist's attention does not compute")
    try:
        kinds, arguments = compat.layer_types(text)
        layers = compat.per_layer(text)
    except AttributeError as error:
        raise ValueError(f"{name} has a config that does not tell its layers ({error}); kvist needs to know") from None
    for layer in getattr(text, "cross_attention_layers", None) or ():
        kinds[layer], arguments[layer] = CROSS, {}
    if SERVED not in kinds:
        raise ValueError(f"{name} has no full-attention layer: {_why(kinds)}")
    served = [i for i, kind in enumerate(kinds) if kind == SERVED]
    if not hasattr(layers[served[0]], "num_attention_heads"):
        raise ValueError(f"{name} has layers without attention heads, by its config; kvist has nothing to store")
    shapes = tuple(_geometry(layers[i], model) for i in served)
    queries = tuple(layers[i].num_attention_heads for i in served)
    rotary = _rotary(text)
    identity = _identity(layers[served[0]], config, kinds, shapes, rotary)
    return Model(name, tuple(kinds), tuple(arguments), queries, shapes, rotary, identity)


def _why(kinds: list[str]) -> str:
    """Why layers of these kinds are left to transformers' own cache, in words."""
    return "; ".join(f"{kind}: {reason(kind)}" for kind in sorted(set(kinds)))


def reason(kind: str) -> str:
    """Why a layer of a kind that kvist does not serve keeps transformers' own cache."""
    return REASONS.get(kind, "kvist does not know how it attends")


def _geometry(text, model) -> Geometry:
    """Of one layer, from what its config says of it."""
    heads = text.num_attention_heads
    dim = getattr(text, "head_dim", None) or text.hidden_size // heads
    value_dim = getattr(text, "v_head_dim", None) or dim
    attention = getattr(text, "attn_config", None)
    kv_heads = getattr(text, "num_key_value_heads", None) or getattr(attention, "kv_n_heads", None)
    if text.model_type == "falcon":  # its newer architecture repeats the KV heads before they reach the cache
        kv_heads = 1 if text.multi_query and not text.new_decoder_architecture else heads
    if text.model_type == "gpt_bigcode":
        kv_heads = 1 if text.multi_query else heads
    dtype = getattr(model, "dtype", None) or torch.float32
    return Geometry(kv_heads or heads, dim, value_dim, dtype, precision.kept(model))


def _identity(text, config, kinds: list[str], shapes: tuple[Geometry, ...], rotary: str) -> ModelIdentity:
    """What a fitted table belongs to: the same for a fine-tuned model, and in every release of transformers."""
    sizes, shape = [getattr(text, name, None) for name in ("vocab_size", "hidden_size", "intermediate_size")], shapes[0]
    facts = [config.model_type, *sizes, text.num_attention_heads, shape.heads, shape.key_dim, list(kinds), rotary]
    if len(set(shapes)) > 1:
        facts.append([(each.heads, each.key_dim, each.value_dim) for each in shapes])
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


def fingerprint(model: nn.Module) -> str:
    """A hash of a few numbers of every weight: tells a fine-tuned model from its parent, in milliseconds."""
    digest = hashlib.blake2b(digest_size=16)
    for name, weight in _weights(model):
        flat = weight.detach().flatten()
        picked = (
            flat[:: max(1, flat.numel() // SAMPLE)][:SAMPLE] if not weight.is_meta else flat.new_empty(0, device="cpu")
        )
        digest.update(f"{name}{tuple(weight.shape)}".encode() + picked.float().cpu().numpy().tobytes())
    return digest.hexdigest()


def _weights(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Every weight with its name; of quantized ones the tensors they are made of, and codes kept as buffers."""
    kinds = torch.uint8, torch.int8, torch.int32
    codes = [(name, buffer) for name, buffer in model.named_buffers() if buffer.dim() > 1 and buffer.dtype in kinds]
    for name, weight in (*model.named_parameters(), *codes):
        yield from _plain(name, weight)


def _plain(name: str, weight: Tensor) -> Iterator[tuple[str, Tensor]]:
    if not hasattr(weight, "__tensor_flatten__"):
        yield name, weight
        return
    for part in weight.__tensor_flatten__()[0]:
        yield from _plain(f"{name}.{part}", getattr(weight, part))
