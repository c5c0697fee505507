"""A cache on disk: one safetensors file, its bookkeeping as JSON in the header. Written whole or not at all.

Only what holds tokens is written: pages in use, each once however many rows share it, and the exact tokens. A file is
refused, with the reason, where format, model, weights or recipe differ from what it was made with.
"""

import copy
import hashlib
import json
from contextlib import contextmanager
from pathlib import Path

import torch
from pydantic import ValidationError
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from kvist import stranger
from kvist.atomic import replacing
from kvist.cache import foreign
from kvist.cache.layer import Layer
from kvist.cache.rows import SlotMap
from kvist.cache.saved import Header, SavedLayer, SavedTrack, capacity, check, check_numbers, held
from kvist.cache.settle import State
from kvist.cache.track import Track
from kvist.models.adapter import fingerprint
from kvist.models.compat import cache_argument
from kvist.plan import Recipe

FORMAT = 3
EMPTY = {"empty": True}
CODES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.uint8: "U8",
    torch.int16: "I16",
}


def save(cache, path: str | Path) -> None:
    """Write `cache` to `path`."""
    model = cache.inner.model()
    if model is None:
        raise ValueError("the model of this cache is gone; save the cache while its model exists")
    if any(layer.is_initialized and layer.slots != cache.inner.rows.slots for layer in cache.inner.ours):
        raise ValueError("a forward was interrupted, and only some layers hold its tokens; call mend() and save then")
    tensors: dict[str, Tensor] = {}
    layers = [_save_layer(layer, f"{i}.", tensors) for i, layer in enumerate(cache.layers)]
    header = {
        "format": FORMAT,
        "model": cache.inner.describes.name,
        "weights": fingerprint(model),
        "recipe": cache.recipe.model_dump(),
        "reserve": cache.reserve,
        "slots": cache.inner.rows.slots,
        "runs": cache.inner.rows.runs,
        "layers": layers,
    }
    tensors = {name: tensor.contiguous().cpu() for name, tensor in tensors.items()}
    text = json.dumps(header)
    with replacing(path) as scratch:
        save_file(tensors, scratch, {"kvist": text, "digest": _digest(text, tensors)})


def load(cls, path: str | Path, model, recipe: Recipe | None):
    """The cache in `path`, for `model`; with `recipe`, only if it was made with that one (`prefill` may differ). All
    that the file says is checked before it is used; ValueError where it cannot be, with the reason."""
    path = Path(path)
    with _opened(path) as file:
        about = file.metadata() or {}
        header = _header(path, about)
        if header.model != model.config.model_type or header.weights != fingerprint(model):
            raise ValueError(
                f"{path} was made with other weights (a {header.model} model); load it with the model that made it"
            )
        made = header.recipe
        if recipe is not None:
            if recipe.model_copy(update={"prefill": made.prefill}) != made:
                raise ValueError(
                    f"{path} was made with another recipe ({made.name}); leave the method out to use that one"
                )
            made = recipe
        cache = cls(model, made, reserve=header.reserve)
        try:
            names = sorted(file.keys())
            saved = _checked(cache, header, {name: file.get_slice(name) for name in names})
            tensors = {name: file.get_tensor(name) for name in names}
            if about.get("digest") != _digest(about["kvist"], tensors):
                raise ValueError("its contents do not have the checksum that they were written with")
            like: list = []
            for i, (layer, state) in enumerate(zip(cache.layers, saved, strict=True)):
                own = {k.split(".", 1)[1]: v for k, v in tensors.items() if k.split(".", 1)[0] == str(i)}
                if isinstance(layer, Layer):
                    _load_layer(layer, state, own, model)
                    continue
                like = like or _sample(cls, model, made)
                about = foreign.Expected(like[i], cache.inner.rows.batch, cache.inner.rows.slots, model.device)
                foreign.load(layer, state, own, about)
        except ValueError as error:
            cache.close()
            raise ValueError(
                f"{path} is damaged, or was not written by kvist: {stranger.printable(str(error))}; make the cache anew"
            ) from None
        except BaseException:
            cache.close()
            raise
    cache.inner.keep_exact(next((layer.exact for layer in cache.inner.ours if layer.is_initialized), None))
    return cache


@torch.no_grad()
def _sample(cls, model, recipe: Recipe) -> list:
    """The layers of a cache of a few tokens: no config tells what transformers' own layers keep, and these do."""
    cache = cls(model, recipe)
    try:
        model(input_ids=torch.zeros(1, foreign.SAMPLE, dtype=torch.long, device=model.device), **cache_argument(cache))
    finally:
        cache.close()
    return cache.layers


@contextmanager
def _opened(path: Path):
    """The file, after it was found to be plain; what its library finds wrong with it is a ValueError."""
    what = f"expected a cache written by kvist at {path}"
    try:
        stranger.plain(path)
    except ValueError as error:
        raise ValueError(f"{what}: {error}") from None
    try:
        with safe_open(path, framework="pt") as file:
            yield file
    except (OSError, SafetensorError) as error:
        raise ValueError(f"{what}, found none that can be read: {stranger.printable(str(error))}") from None


def _header(path: Path, about: dict[str, str]) -> Header:
    if "kvist" not in about:
        raise ValueError(f"{path} is a safetensors file but not a kvist cache")
    try:
        found = stranger.parse(about["kvist"])
        version = found.get("format") if isinstance(found, dict) else None
        if type(version) is not int or version == FORMAT:
            return Header.model_validate(found)
    except ValidationError as error:
        raise ValueError(f"{path} is no cache that kvist wrote: {stranger.said(error)}; make the cache anew") from None
    except ValueError as error:
        raise ValueError(f"{path} is no cache that kvist wrote: {error}; make the cache anew") from None
    raise ValueError(
        f"{path} is a cache of format {version}, and this release of kvist reads format {FORMAT}; read the text "
        "again and save the cache anew, or use the release that wrote it"
    )


def _checked(cache, header: Header, found: dict) -> list[SavedLayer | dict]:
    """The layers of a header that is true of `cache`, still empty, and of the arrays in the file. Raises ValueError."""
    if len(header.layers) != len(cache.layers):
        raise ValueError(f"it has {len(header.layers)} layers, the model {len(cache.layers)}")
    cache.inner.rows.slots, cache.inner.rows.runs = header.slots, header.rows()
    saved: list[SavedLayer | dict] = []
    for i, (layer, state) in enumerate(zip(cache.layers, header.layers, strict=True)):
        own = {name.split(".", 1)[1] for name in found if name.split(".", 1)[0] == str(i)}
        if not isinstance(layer, Layer):
            saved.append(state)
            continue
        try:
            ours = None if state == EMPTY else SavedLayer.model_validate(state)
            wanted = {} if ours is None else check(layer, ours)
            if own != wanted.keys():
                raise ValueError(f"it has not the arrays that it should have: {', '.join(sorted(own ^ wanted.keys()))}")
            for name, (shape, dtype) in wanted.items():
                array = found[f"{i}.{name}"]
                if tuple(array.get_shape()) != shape or array.get_dtype() != CODES.get(dtype):
                    raise ValueError(
                        f"{name} is {array.get_dtype()} {tuple(array.get_shape())}, which does not hold {dtype} {shape}"
                    )
        except ValidationError as error:
            raise ValueError(f"layer {i}: {stranger.said(error)}") from None
        except ValueError as error:
            raise ValueError(f"layer {i}: {error}") from None
        saved.append(state if ours is None else ours)
    known = {str(i) for i in range(len(cache.layers))}
    if strange := sorted(name for name in found if name.split(".", 1)[0] not in known or "." not in name):
        raise ValueError(f"it has an array {strange[0]!r} of no layer")
    return saved


def _digest(text: str, tensors: dict[str, Tensor]) -> str:
    digest = hashlib.blake2b(text.encode(), digest_size=16)
    for name in sorted(tensors):
        digest.update(tensors[name].flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _save_layer(layer, prefix: str, tensors: dict[str, Tensor]) -> dict:
    if not isinstance(layer, Layer):  # transformers' own layer
        saved, found = foreign.save(layer)
        tensors |= {prefix + name: tensor for name, tensor in found.items()}
        return saved
    if not layer.is_initialized:
        return EMPTY
    state = {
        "shape": [
            layer.shape.heads,
            layer.shape.key_dim,
            layer.shape.value_dim,
            str(layer.shape.stored(layer.plan.packs)).removeprefix("torch."),
        ],
        "slots": layer.slots,
        "updates": layer.updates,
        "settled": layer.settled,
        "lengths": layer.lengths,
        "maps": [maps.runs for maps in layer.maps],
        "tracks": [],
    }
    for name, track in zip(("key.", "value."), layer.tracks, strict=True):
        state["tracks"].append(_save_track(track, layer, prefix + name, tensors))
    return state


def _save_track(track: Track, layer: Layer, prefix: str, tensors: dict[str, Tensor]) -> dict:
    pool, exact, rows = track.pool, copy.copy(track.exact), range(layer.batch_size)
    behind, size = [layer.behind(row) for row in rows], exact.capacity
    waiting = max(n - f for n, f in zip(behind, track.frontiers, strict=True))
    exact.resize(waiting, track.frontiers, behind)  # of the copy: only what holds tokens
    used = sorted({page for table in pool.tables for page in table})
    order, filled = {page: i for i, page in enumerate(used)}, held(track, layer.maps, used)
    found = {"sinks": exact.sinks.clone(), "pinned": exact.pinned.clone(), "ring": exact.ring}
    for row in rows:  # room that holds nothing is written as zeros, whatever lay there
        found["sinks"][row, :, layer.lengths[row] :] = 0
        free = set(range(exact.pinned.shape[2])) - set(exact.pins[row].values())
        found["pinned"][row, :, sorted(free)] = 0
        positions = set(range(track.frontiers[row], behind[row]))
        found["ring"][row, :, sorted(set(range(waiting)) - {p % waiting for p in positions})] = 0
    for name, array in pool.arrays.items():
        spec = pool.specs[name]
        entries = filled[:, :: spec.stride].to(array.device)
        entries = entries[:, None] if spec.kind == "head" else entries
        entries = entries.view(*entries.shape, *(1,) * len(spec.shape))
        found[f"pages.{name}"] = array[used].masked_fill_(~entries, 0)
    tensors |= {prefix + name: tensor for name, tensor in found.items()}
    try:
        check_numbers(track, found)
    except ValueError as error:
        raise ValueError(
            f"the cache is not saved, as it holds what the model cannot have meant: {error}; a model that overflows in "
            "fp16 runs in bfloat16"
        ) from None
    return {
        "states": [[state.decided, state.frontier] for state in track.states],
        "tables": [[order[page] for page in table] for table in pool.tables],
        "pins": [list(pins.items()) for pins in exact.pins],
        "capacity": size,
        "clipped": int(track.clipped),
    }


def _load_layer(layer: Layer, saved: SavedLayer | dict, tensors: dict[str, Tensor], model) -> None:
    if not isinstance(saved, SavedLayer):
        return
    shape, batch = saved.geometry, len(saved.lengths)
    sizes, dtype = (shape.key_dim, shape.value_dim), shape.dtype
    if layer.plan.packs:  # exact tokens stay in the type that they were saved in, whatever this model computes in
        layer.exact, dtype = dtype, model.dtype
    layer.lazy_initialization(*(torch.empty(batch, shape.heads, 0, dim, dtype=dtype) for dim in sizes))
    layer.slots, layer.updates, layer.settled = saved.slots, saved.updates, saved.settled
    layer.lengths, layer.maps = list(saved.lengths), [SlotMap(runs) for runs in saved.maps]
    behind = [layer.behind(row) for row in range(batch)]
    waiting = max(n - f for track in saved.tracks for n, (_, f) in zip(behind, track.states, strict=True))
    for name, track, state in zip(("key.", "value."), layer.tracks, saved.tracks, strict=True):
        own = {k.removeprefix(name): v for k, v in tensors.items() if k.startswith(name)}
        check_numbers(track, own)
        _load_track(track, behind, state, own, capacity(layer, saved, waiting))


def _load_track(track: Track, behind: list[int], saved: SavedTrack, tensors: dict[str, Tensor], ring: int) -> None:
    pool, exact = track.pool, track.exact
    track.states = [State(*state) for state in saved.states]
    track.clipped += saved.clipped
    # own, aligned memory: a mapped file is neither, and vector code rounds otherwise where memory is not aligned
    exact.sinks, exact.pinned, exact.ring = (tensors[name].clone() for name in ("sinks", "pinned", "ring"))
    exact.pins = [dict(pins) for pins in saved.pins]
    exact.resize(ring, track.frontiers, behind)
    if not pool.specs:
        return
    pool.tables = [list(table) for table in saved.tables]
    count = len({page for table in pool.tables for page in table})
    pool.resize(track.plan.pool(count, track.batch, pool.page, track.reserve))
    for name, array in pool.arrays.items():
        array[:count] = tensors[f"pages.{name}"]
    for table in pool.tables:
        for page in table:
            pool.refs[page] += 1
    pool.free = [p for p in reversed(range(pool.capacity)) if not pool.refs[p]]
