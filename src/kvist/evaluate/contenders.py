"""Who is measured: a recipe in a living cache, and controls that are no recipe of ours."""

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal
from weakref import WeakKeyDictionary

import torch
from torch import Tensor
from transformers.cache_utils import Cache as TransformersCache
from transformers.cache_utils import CacheLayerMixin

from kvist.baselines import Baseline, held
from kvist.cache.cache import Cache
from kvist.coding import Codec, Grouping, Raw
from kvist.evaluate.results import described, digest_of
from kvist.methods import parse
from kvist.models.adapter import Model, describe
from kvist.models.inject import rounded
from kvist.plan import Recipe

State = tuple[Tensor, Tensor] | CacheLayerMixin  # of a layer: keys and values (B, H, T, D), or what else it keeps
Portion = Literal["both", "keys", "values"]
PARTS: tuple[Portion, ...] = ("both", "keys", "values")
EXACT = "exact"
SINGLE = "batch 1"
_TWINS: WeakKeyDictionary = WeakKeyDictionary()


@dataclass(frozen=True)
class Contender:
    """A name, and what makes its cache: a recipe, or a cache of transformers; or a floor, which quantizes nothing:
    "float16" or another dtype, or "batch 1". `part`: the sides that are coded; the other one is stored as it comes."""

    name: str
    recipe: Recipe | None = None
    baseline: Baseline | None = None
    floor: str | None = None
    part: Portion = "both"

    @property
    def digest(self) -> str:
        return digest_of(self.recipe) if self.recipe else self.name

    @property
    def description(self) -> dict[str, Any]:
        """Its recipe as JSON, or what it is instead."""
        if self.recipe:
            return described(self.recipe)
        if self.floor:
            return {"name": "nothing quantized", "floor": self.floor}
        return self.baseline.description if self.baseline else {}

    @property
    def parts(self) -> tuple[Portion, ...]:
        """What of it can be measured: a recipe that packs has two sides."""
        return PARTS if self.recipe and any(plan.packs for plan in self.recipe.layers) else PARTS[:1]

    def of(self, part: Portion) -> "Contender":
        """The same with one side exact."""
        if part == "both" or self.recipe is None:
            return self
        return replace(self, recipe=one_side(self.recipe, part), part=part)

    def cache(self, model, reserve: int, prefill: Literal["exact", "stored"] = "exact") -> TransformersCache:
        """An empty cache for a model, with room for `reserve` tokens per row. ValueError where it does not suit it."""
        if self.recipe:
            return Cache(model, self.recipe, reserve=reserve, prefill=prefill)
        if prefill == "stored":
            raise ValueError(f"{self.name} gives a prompt its exact keys and values; it has no prefill 'stored'")
        assert self.baseline, "a contender is a recipe, a baseline or a floor, which has no cache"
        return self.baseline.cache(model.config.get_text_config(decoder=True), reserve)

    def twin(self, model):
        """The model that a floor runs: a copy in its dtype, or the same one."""
        if self.floor == SINGLE:
            return model
        if model not in _TWINS or _TWINS[model].dtype != getattr(torch, self.floor or ""):
            _TWINS[model] = rounded(copy.deepcopy(model), getattr(torch, self.floor or ""))
        return _TWINS[model]


def floors(dtype: torch.dtype) -> list[Contender]:
    """What a model's numbers are known to: the same in another 16-bit precision, and one row at a time."""
    other = "float16" if dtype == torch.bfloat16 else "bfloat16"
    return [Contender(f"floor: {floor}", floor=floor) for floor in (other, SINGLE)]


def contender(text: str, made: Callable[[str], Recipe] = parse) -> Contender:
    """From a command line's word: a method's text, or 'quanto:2', 'hqq:4': transformers' QuantizedCache, which is
    none of the published methods. `made` makes recipes of texts."""
    baseline = Baseline.parse(text)
    if baseline:
        return Contender(f"QuantizedCache {text}", baseline=baseline)
    return Contender(text, recipe=made(text))


def parted(contenders: Sequence[Contender], parts: Sequence[str]) -> list[Contender]:
    """Each contender with each of these parts; one that has no sides as it is. ValueError for another word."""
    for part in parts:
        if part not in PARTS:
            raise ValueError(f"parts are {', '.join(PARTS)}, found {part!r}")
    chosen = [set(parts) if len(each.parts) > 1 else {*each.parts} for each in contenders]
    return [each.of(part) for part in PARTS for each, own in zip(contenders, chosen, strict=True) if part in own]


def one_side(recipe: Recipe, part: Portion) -> Recipe:
    """The recipe with keys or values alone coded; the other side is stored as it comes, in the same pages."""
    raw, name = Codec(levels=Raw(), grouping=Grouping(along="channels")), "value" if part == "keys" else "key"
    layers = []
    for plan in recipe.layers:
        side = getattr(plan, name)
        layers.append(plan.model_copy(update={name: side.model_copy(update={"codec": raw})} if plan.packs else {}))
    return recipe.model_copy(update={"layers": tuple(layers)})


def cut(prompt: Sequence[State], tokens: int) -> list[State]:
    """The first tokens of a prompt. ValueError where a layer keeps something else than keys and values of each."""
    strange = next((type(state).__name__ for state in prompt if not isinstance(state, tuple)), None)
    if strange:
        raise ValueError(
            "this task reads the beginning of what a prompt left in the cache, and a layer of this model "
            f"(transformers' {strange}) keeps the end alone; take another task, as fidelity or passkey"
        )
    return [(state[0][:, :, :tokens], state[1][:, :, :tokens]) for state in prompt if isinstance(state, tuple)]


def fill(cache: TransformersCache, prompt: Sequence[State], mask: Tensor | None) -> None:
    """Give an empty cache what a prompt left in each layer, as one forward would: keys and values (B, H, T, D), or a
    copy of a layer of another kind; mask int64 (B, T), 0 for padding, or None."""
    if isinstance(cache, Cache):
        batch, _, length, _ = next(state[0].shape for state in prompt if isinstance(state, tuple))
        positions = None if mask is None else (mask.cumsum(1) - 1).clamp_min(0)
        cache.announce(batch, length, mask, positions)
    for i, state in enumerate(prompt):
        if isinstance(state, tuple):
            cache.update(*state, i)
        else:
            cache.layers[i] = copy.deepcopy(state)


def bits(cache: TransformersCache, facts: Model, batch: int) -> float:
    """Allocated bits per cached number of a model's layers, measured from the tensors that a cache holds."""
    if isinstance(cache, Cache):
        return cache.report().bits_per_element
    tokens = batch * sum(cache.get_seq_length(i) for i in range(len(cache.layers)))
    return 8 * held(cache) / (tokens * facts.shape.heads * (facts.shape.key_dim + facts.shape.value_dim))


def packed(cache: TransformersCache) -> bool:
    """Whether any token is packed by now."""
    if isinstance(cache, Cache):
        return any(
            max(track.frontiers) > 0 for layer in cache.inner.ours if layer.is_initialized for track in layer.tracks
        )
    return True


def check(contender: Contender, model) -> None:
    """Refuse, before the hours, a contender that does not suit a model."""
    if contender.floor:
        return
    if contender.recipe:
        facts = describe(model)
        contender.recipe.for_layers(len(facts.served))
    made = contender.cache(model, 0)
    if isinstance(made, Cache):
        made.close()
