"""A cache on disk: one safetensors file, its bookkeeping as JSON in the header. Written whole or not at all.

Only what holds tokens is written: pages in use, each once however many rows share it, and the exact tokens. A file is
refused, with the reason, where format, model, weights or recipe differ from what it was made with.
"""

import copy
import hashlib
import json
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from kvist.atomic import replacing
from kvist.cache import foreign
from kvist.cache.layer import Layer
from kvist.cache.rows import Run
from kvist.cache.track import SlotMap, State, Track
from kvist.plan import Recipe

FORMAT = 3
SAMPLE = 16  # numbers of each weight that go into the fingerprint


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


def save(cache, path: str | Path) -> None:
    """Write `cache` to `path`."""
    model = cache._model()
    if model is None:
        raise ValueError("the model of this cache is gone; save the cache while its model exists")
    tensors: dict[str, Tensor] = {}
    layers = [_save_layer(layer, f"{i}.", tensors) for i, layer in enumerate(cache.layers)]
    header = {
        "format": FORMAT,
        "model": cache.describes.name,
        "weights": fingerprint(model),
        "recipe": cache.recipe.model_dump(),
        "reserve": cache.reserve,
        "slots": cache.rows.slots,
        "runs": cache.rows.runs,
        "layers": layers,
    }
    tensors = {name: tensor.contiguous().cpu() for name, tensor in tensors.items()}
    text = json.dumps(header)
    with replacing(path) as scratch:
        save_file(tensors, scratch, {"kvist": text, "digest": _digest(text, tensors)})


def load(cls, path: str | Path, model, recipe: Recipe | None):
    """The cache in `path`, for `model`; with `recipe`, only if it was made with that one (`prefill` may differ)."""
    header, tensors = _read(Path(path))
    if header["model"] != model.config.model_type or header["weights"] != fingerprint(model):
        raise ValueError(
            f"{path} was made with other weights (a {header['model']} model); load it with the model that made it"
        )
    made = Recipe.model_validate(header["recipe"])
    if recipe is not None:
        if recipe.model_copy(update={"prefill": made.prefill}) != made:
            raise ValueError(f"{path} was made with another recipe ({made.name}); leave the method out to use that one")
        made = recipe
    cache = cls(model, made, reserve=header["reserve"])
    cache.rows.slots = header["slots"]
    cache.rows.runs = [[Run(*run) for run in runs] for runs in header["runs"]]
    for i, (layer, state) in enumerate(zip(cache.layers, header["layers"], strict=True)):
        own = {k.split(".", 1)[1]: v for k, v in tensors.items() if k.split(".", 1)[0] == str(i)}
        _load_layer(layer, state, own, model.device)
    return cache


def _digest(text: str, tensors: dict[str, Tensor]) -> str:
    digest = hashlib.blake2b(text.encode(), digest_size=16)
    for name in sorted(tensors):
        digest.update(tensors[name].flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _read(path: Path) -> tuple[dict, dict[str, Tensor]]:
    try:
        with safe_open(path, framework="pt") as file:
            about = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in sorted(file.keys())}
    except (OSError, SafetensorError) as error:
        raise ValueError(f"expected a cache written by kvist at {path}, found none that can be read: {error}") from None
    if "kvist" not in about:
        raise ValueError(f"{path} is a safetensors file but not a kvist cache")
    if about.get("digest") != _digest(about["kvist"], tensors):
        raise ValueError(f"{path} is damaged: its contents do not have the checksum that they were written with")
    header = json.loads(about["kvist"])
    if header["format"] != FORMAT:
        raise ValueError(f"{path} has cache format {header['format']}, kvist reads {FORMAT}; make the cache anew")
    return header, tensors


def _save_layer(layer, prefix: str, tensors: dict[str, Tensor]) -> dict:
    if not isinstance(layer, Layer):  # transformers' own layer
        saved, found = foreign.save(layer)
        tensors |= {prefix + name: tensor for name, tensor in found.items()}
        return saved
    if not layer.is_initialized:
        return {"empty": True}
    state = {
        "shape": [
            layer.shape.heads,
            layer.shape.key_dim,
            layer.shape.value_dim,
            str(layer.dtype).removeprefix("torch."),
        ],
        "slots": layer.slots,
        "updates": layer.updates,
        "settled": layer.settled,
        "lengths": layer.lengths,
        "maps": [maps.runs for maps in layer.maps],
        "tracks": [],
    }
    behind = [layer.behind(row) for row in range(layer.batch_size)]
    for name, track in zip(("key.", "value."), layer.tracks, strict=True):
        state["tracks"].append(_save_track(track, behind, prefix + name, tensors))
    return state


def _save_track(track: Track, behind: list[int], prefix: str, tensors: dict[str, Tensor]) -> dict:
    pool, exact = track.pool, copy.copy(track.exact)
    capacity, waiting = exact.capacity, [n - f for n, f in zip(behind, track.frontiers, strict=True)]
    exact.resize(max(waiting), track.frontiers, behind)  # of the copy: only what holds tokens
    used = sorted({page for table in pool.tables for page in table})
    order = {page: i for i, page in enumerate(used)}
    tensors |= {f"{prefix}pages.{name}": array[used] for name, array in pool.arrays.items()}
    tensors |= {f"{prefix}{name}": getattr(exact, name) for name in ("sinks", "pinned", "ring")}
    return {
        "states": [[state.decided, state.frontier] for state in track.states],
        "tables": [[order[page] for page in table] for table in pool.tables],
        "pins": [list(pins.items()) for pins in exact.pins],
        "capacity": capacity,
        "clipped": int(track.clipped),
    }


def _load_layer(layer, state: dict, tensors: dict[str, Tensor], device: torch.device) -> None:
    if not isinstance(layer, Layer):
        return foreign.load(layer, state, tensors, device)
    if state.get("empty"):
        return
    heads, key_dim, value_dim, dtype = state["shape"]
    batch, dtype = len(state["lengths"]), getattr(torch, dtype)
    layer.lazy_initialization(*(torch.empty(batch, heads, 0, dim, dtype=dtype) for dim in (key_dim, value_dim)))
    layer.slots, layer.updates, layer.settled = state["slots"], state["updates"], state["settled"]
    layer.lengths = state["lengths"]
    layer.maps = [SlotMap(runs) for runs in state["maps"]]
    for name, track, saved in zip(("key.", "value."), layer.tracks, state["tracks"], strict=True):
        behind = [layer.behind(row) for row in range(batch)]
        _load_track(track, behind, saved, {k.removeprefix(name): v for k, v in tensors.items() if k.startswith(name)})


def _load_track(track: Track, behind: list[int], saved: dict, tensors: dict[str, Tensor]) -> None:
    pool, exact = track.pool, track.exact
    track.states = [State(*state) for state in saved["states"]]
    track.clipped += saved["clipped"]
    # own, aligned memory: a mapped file is neither, and vector code rounds otherwise where memory is not aligned
    exact.sinks, exact.pinned, exact.ring = (tensors[name].clone() for name in ("sinks", "pinned", "ring"))
    exact.pins = [dict(pins) for pins in saved["pins"]]
    exact.resize(saved["capacity"], track.frontiers, behind)
    count = 1 + max((page for table in saved["tables"] for page in table), default=-1)
    if not pool.specs:
        return
    pool.resize(track.plan.pool(count, track.batch, pool.page, track.reserve))
    for name, array in pool.arrays.items():
        array[:count] = tensors[f"pages.{name}"]
    for table in saved["tables"]:
        for page in table:
            pool.refs[page] += 1
    pool.tables, pool.free = saved["tables"], [p for p in reversed(range(pool.capacity)) if not pool.refs[p]]
