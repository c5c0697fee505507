"""Layers of transformers' own cache that stand beside ours: sliding windows, convolutions, linear attention, state
spaces, pictures' keys. What they hold is read and written generically: every tensor, number and text among their
attributes, in dicts and lists, too; so that a kind of layer nobody thought of is not forgotten.
"""

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers.cache_utils import CacheLayerMixin, LinearAttentionCacheLayerMixin

CROSS = "cross_attention"
DTYPES = {str(x).removeprefix("torch."): x for x in vars(torch).values() if isinstance(x, torch.dtype)}


class Mark(NamedTuple):
    """A cache as a forward found it: its slots, the rows' next positions, and a mark of each layer that is not ours."""

    slots: int
    upcoming: list[int]
    layers: dict[int, tuple]


def tensors(value: Any) -> Iterator[Tensor]:
    """Every tensor in an attribute's value, those in dicts and lists included."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, dict):
        for part in value.values():
            yield from tensors(part)
    elif isinstance(value, list | tuple):
        for part in value:
            yield from tensors(part)


def held(layer) -> list[Tensor]:
    """The tensors that hold a layer's state, each once; those without a dimension are settings."""
    found = {id(tensor): tensor for tensor in tensors(vars(layer)) if tensor.dim()}
    return list(found.values())


def mark(layer) -> tuple:
    """Changes whenever a layer's contents do: it makes a new tensor before it lets go of the old, or writes into it.
    Tensors made in inference mode count no changes: of those none is equal to an earlier one."""
    return tuple((key, _mark(value)) for key, value in vars(layer).items())


def _mark(value: Any) -> Any:
    if isinstance(value, Tensor):
        return object() if value.is_inference() else (id(value), value._version)
    if isinstance(value, dict):
        return tuple((key, _mark(part)) for key, part in value.items())
    if isinstance(value, list | tuple):
        return tuple(map(_mark, value))
    return value


def seen(layer) -> int | None:
    """Slots that a layer was given, where it counts them."""
    counts = isinstance(layer, CacheLayerMixin) and not isinstance(layer, LinearAttentionCacheLayerMixin)
    return int(layer.get_seq_length()) if counts else None


def why_not_cropped(layer, kind: str, remove: int, slots: int) -> str | None:
    """Why the last `remove` of `slots` slots cannot be taken from a layer; None where they can."""
    if kind == CROSS or remove == 0 or remove >= slots:
        return None  # its tokens are not the text's; or a new layer does as well
    owner = {name: next(i for i, c in enumerate(type(layer).__mro__) if name in vars(c)) for name in ("crop", "reset")}
    if owner["reset"] < owner["crop"]:  # a class that keeps more than its parent, and crops no more
        return "it keeps states that are made of several tokens each"
    if isinstance(layer, LinearAttentionCacheLayerMixin) and (reason := _linear(layer, remove)):
        return reason
    return _sliding(layer, remove) if getattr(layer, "is_sliding", False) and layer.is_initialized else None


def _linear(layer: LinearAttentionCacheLayerMixin, remove: int) -> str | None:
    if any(state is not None for state in layer.recurrent_states.values()):
        return "its state is a sum over all tokens"
    for i, state in layer.conv_states.items():
        if state is not None and state.shape[-1] < (layer.conv_kernel_size[i] or 0) + remove:
            return "it keeps no more tokens than its convolution needs"
    return None


def _sliding(layer, remove: int) -> str | None:
    """A window that was never full has all tokens; a full one has lost those before, unless it was told to wait."""
    seen, kept = layer.get_seq_length(), layer.keys.shape[-2]
    if seen < layer.sliding_window or kept - remove >= min(layer.sliding_window - 1, seen - remove):
        return None
    return f"its window of {layer.sliding_window} tokens has dropped those before"


def crop(layer, kind: str, remove: int) -> None:
    """Take the last `remove` slots from a layer that can lose them; for 0, drop what it kept to be able to."""
    if kind != CROSS and (remove or getattr(layer, "record_past", False)):
        layer.crop(-remove)


def why_not_mended(layer, kind: str, slots: int) -> str | None:
    """Why a layer that an interrupted forward has changed cannot go back to `slots` slots; None where it can."""
    if kind == CROSS or isinstance(layer, LinearAttentionCacheLayerMixin) or not isinstance(layer, CacheLayerMixin):
        return "what it held before is gone"
    seen, kept = layer.get_seq_length(), layer.keys.shape[-2]
    bounded = getattr(layer, "is_sliding", False) and not getattr(layer, "record_past", False)
    expected = min(seen, layer.sliding_window - 1) if bounded else kept
    if seen <= slots or not kept == layer.values.shape[-2] == expected:
        return "it was stopped half-way"
    return why_not_cropped(layer, kind, seen - slots, seen)


def save(layer) -> tuple[dict, dict[str, Tensor]]:
    """A layer as JSON, its class and every attribute; and its tensors, named by where they were found."""
    found: dict[str, Tensor] = {}
    seen: dict[int, str] = {}
    state = {name: _written(value, name, found, seen) for name, value in vars(layer).items()}
    return {"class": type(layer).__name__, "state": state}, found


def load(layer, saved: dict, found: dict[str, Tensor], device: torch.device) -> None:
    """Give a new layer what was saved of its like. ValueError, the layer unchanged, for what is none of its
    attributes."""
    name, state = saved.get("class"), saved.get("state")
    if name != type(layer).__name__ or not isinstance(state, dict):
        raise ValueError(f"expected a layer of transformers' {type(layer).__name__}, found {name!r}")
    strange = sorted(name for name in state if name not in vars(layer) and hasattr(type(layer), name))
    if strange:
        raise ValueError(f"{strange[0]!r} is nothing that a {type(layer).__name__} holds")
    # own, aligned memory: vector code rounds otherwise where memory is not aligned
    moved = {name: tensor.to(device, copy=True) for name, tensor in found.items()}
    try:
        read = {name: _read(part, vars(layer).get(name), moved, device) for name, part in state.items()}
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise ValueError(f"what was saved of a {type(layer).__name__} is incomplete: {error}") from None
    vars(layer).update(read)


def _written(value: Any, path: str, found: dict[str, Tensor], seen: dict[int, str]) -> dict:
    """A value under the word for its kind. A tensor that is met twice is written once."""
    if isinstance(value, Tensor):
        if id(value) not in seen:
            seen[id(value)] = path
            found[path] = value.detach().clone(memory_format=torch.contiguous_format)
        return {"tensor": seen[id(value)]}
    if isinstance(value, dict):
        return {"dict": [[key, _written(part, f"{path}.{key}", found, seen)] for key, part in value.items()]}
    if isinstance(value, list | tuple):
        parts = [_written(part, f"{path}.{i}", found, seen) for i, part in enumerate(value)]
        return {"list" if isinstance(value, list) else "tuple": parts}
    if isinstance(value, torch.dtype):
        return {"dtype": str(value).removeprefix("torch.")}
    if isinstance(value, torch.device):
        return {"device": None}
    plain = value is None or isinstance(value, bool | int | float | str)
    return {"plain": value} if plain else {"own": None}  # what a new layer has of its own: a config, a function


def _read(saved: dict, own: Any, found: dict[str, Tensor], device: torch.device) -> Any:
    ((kind, value),) = saved.items()
    if kind == "tensor":
        return found[value]
    if kind == "dict":
        return {key: _read(part, None, found, device) for key, part in value}
    if kind in ("list", "tuple"):
        parts = [_read(part, None, found, device) for part in value]
        return parts if kind == "list" else tuple(parts)
    if kind == "dtype":
        return DTYPES[value]
    return {"device": device, "own": own, "plain": value}[kind]
