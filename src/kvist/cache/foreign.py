"""Layers of transformers' own cache that stand beside ours: sliding windows, convolutions, linear attention, state
spaces, pictures' keys. What they hold is read and written generically: every tensor, number and text among their
attributes, in dicts and lists, too; so that a kind of layer nobody thought of is not forgotten.
"""

import copy
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers.cache_utils import CacheLayerMixin, LinearAttentionCacheLayerMixin

CROSS = "cross_attention"
SAMPLE = 5  # tokens of one row: by their number a size that grows with tokens is told from others
DTYPES = {str(x).removeprefix("torch."): x for x in vars(torch).values() if isinstance(x, torch.dtype)}


class Expected(NamedTuple):
    """What must be true of a saved layer: it is like one that holds a sample, and of the rows and slots of its cache;
    and the device that it comes to."""

    like: Any
    rows: int
    slots: int
    device: torch.device


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


def load(layer, saved: dict, found: dict[str, Tensor], about: Expected) -> None:
    """Give a new layer what was saved of its like. ValueError, the layer unchanged, for what is none of its
    attributes, or cannot be what it held."""
    name, state = saved.get("class"), saved.get("state")
    if name != type(layer).__name__ or not isinstance(state, dict):
        raise ValueError(f"expected a layer of transformers' {type(layer).__name__}, found {name!r}")
    strange = sorted(name for name in state if name not in vars(layer) and hasattr(type(layer), name))
    if strange:
        raise ValueError(f"{strange[0]!r} is nothing that a {type(layer).__name__} holds")
    # own, aligned memory: vector code rounds otherwise where memory is not aligned
    moved = {name: tensor.to(about.device, copy=True) for name, tensor in found.items()}
    try:
        read = {name: _read(part, vars(layer).get(name), moved, about.device) for name, part in state.items()}
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise ValueError(f"what was saved of a {type(layer).__name__} is incomplete: {error}") from None
    for key, value in vars(layer).items():
        if key not in read or not _alike(value, read[key]):
            raise ValueError(f"{key} of a {type(layer).__name__} cannot be {read.get(key)!r:.60}")
    filled = copy.copy(layer)
    vars(filled).update(read)
    _check(filled, layer, about)
    vars(layer).update(read)


def _alike(own: Any, read: Any) -> bool:
    """Whether an attribute of a new layer may have become `read`: nothing yet becomes anything, a count counts on, a
    setting stays."""
    if isinstance(own, Tensor) and not own.dim():
        return isinstance(read, Tensor) and read.dtype == own.dtype and torch.equal(read.cpu(), own.cpu())
    if own is None:
        return True
    same = type(read) is type(own)
    if isinstance(own, dict):
        return same and own.keys() == read.keys() and all(_alike(part, read[key]) for key, part in own.items())
    return same and (not isinstance(own, int | float | str) or not own or own == read)


def _check(layer, new, about: Expected) -> None:
    """What a layer holds is finite, of the rows of the cache, of the shapes that the model makes, and of as many tokens
    as it counts; or it is as new. ValueError."""
    if not all(x.isfinite().all() for x in held(layer) if x.is_floating_point()):
        raise ValueError("it holds numbers that are not finite")
    told = held(about.like) or not held(layer)  # not of what a picture leaves, which the text does not bring
    if told and not _like(vars(layer), vars(about.like if held(layer) else new), about.rows):
        raise ValueError("it does not hold what this model makes")
    if not isinstance(layer, CacheLayerMixin) or not layer.is_initialized:
        return
    kept, counted = layer.keys.shape[-2], layer.get_seq_length()
    if layer.values.shape[-2] != kept:
        raise ValueError(f"it holds {kept} keys and {layer.values.shape[-2]} values")
    if not getattr(layer, "is_sliding", False):
        return
    least = min(about.slots, layer.sliding_window - 1)
    most = about.slots if layer.record_past else max(least, 1)
    if counted != about.slots or not least <= kept <= most:
        raise ValueError(f"its window holds {kept} tokens and counts {counted} of {about.slots}")


def _like(found: Any, like: Any, rows: int, name: Any = "") -> bool:
    """Whether tensors, in dicts and lists, too, are what a layer that holds a sample would have become."""
    if isinstance(like, dict):
        return isinstance(found, dict) and all(_like(found.get(key), part, rows, key) for key, part in like.items())
    if isinstance(like, list | tuple):
        same = type(found) is type(like) and len(found) == len(like)
        return same and all(_like(part, other, rows, name) for part, other in zip(found, like, strict=True))
    if not isinstance(like, Tensor) or not like.dim():
        return type(found) is type(like)
    if not isinstance(found, Tensor) or found.dtype != like.dtype or found.dim() != like.dim():
        return False
    if name in ("keys", "values"):
        return found.shape[0] == rows and found.shape[1:-2] == like.shape[1:-2] and found.shape[-1] == like.shape[-1]
    known = {1: (1, rows), SAMPLE: found.shape}  # of rows; of tokens, as many as there are
    return all(n in known.get(m, (m,)) for n, m in zip(found.shape, like.shape, strict=True))


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
