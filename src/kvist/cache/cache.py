"""The Hugging Face cache: give it to `model.generate(cache=…)` (`past_key_values=…` before transformers 5.24)."""

import copy
import weakref
from functools import partial
from pathlib import Path

import torch
from torch import Tensor
from transformers.cache_utils import Cache as TransformersCache

from kvist.cache import report
from kvist.cache.guard import Guard
from kvist.cache.handle import Handle
from kvist.cache.inner import Inner
from kvist.cache.layer import Layer
from kvist.cache.rows import Rows
from kvist.methods import resolve
from kvist.models import compat
from kvist.models.adapter import SERVED, Model, describe
from kvist.models.hooks import calling, watch
from kvist.models.rope import rotary
from kvist.plan import Recipe
from kvist.types import ATTACHED, MOST_TOKENS

# Attention that asks a handle for what it needs through torch; flash and flex attention compile, or read memory.
READS_HANDLES = "sdpa", "eager", None


class Cache(TransformersCache):
    """A cache that stores packed keys and values.

    model: a transformers causal language model. method: a method's name with options as keywords (`"kivi", bits=2`),
    its text (`"kivi k=2 v=4"`), a Recipe, or the path of a recipe's JSON file. prefill: "exact", the prompt's own chunk
    attends in full precision, as published; "stored", every query sees what is stored. reserve: tokens per row for
    which room is set aside at the first update; the cache grows beyond it when it must. exact_dtype: the type in which
    layers that pack store their exact tokens, such as torch.bfloat16 where the model computes in float32; by default
    the model's own, or what `kvist.models.precision.keep` was told.

    It is for inference: what it stores has no history, and a backward pass through packed attention is refused. It
    listens to `model` for padding masks, through a hook that `close()` removes. Layers with a window of their own
    (sliding attention) keep transformers' own cache.
    """

    def __init__(
        self,
        model,
        method: "str | Recipe | Path",
        *,
        prefill: str | None = None,
        reserve: int = 0,
        exact_dtype: torch.dtype | None = None,
        **options,
    ):
        recipe = resolve(method, **options)
        if prefill is not None:
            recipe = Recipe.model_validate(recipe.model_dump() | {"prefill": prefill})
        if not 0 <= reserve <= MOST_TOKENS:
            raise ValueError(f"reserve is a number of tokens, at most {MOST_TOKENS}, found {reserve}")
        if exact_dtype is not None and not exact_dtype.is_floating_point:
            raise ValueError(f"exact_dtype is a type of floating-point numbers, found {exact_dtype}")
        self.recipe, self.reserve, describes, rows = recipe, reserve, describe(model), Rows()
        _check_fit(recipe, describes, model)
        plans, kinds = iter(recipe.for_layers(len(describes.served))), describes.kinds
        make = partial(compat.own_layer, kinds, describes.arguments)
        layers: list = [
            Layer(next(plans), recipe.page, recipe.prefill, reserve, rows) if kind == SERVED else make(i)
            for i, kind in enumerate(kinds)
        ]
        super().__init__(layers=layers)
        self.inner = Inner(describes, rows, Guard(self.layers, kinds, make), bool(recipe.rotary))
        self.inner.keep_exact(exact_dtype or describes.shapes[0].exact)
        self._read, self._reads_handles = -1, True  # when it was asked last whether attention takes handles
        self._listen(model)

    def _listen(self, model) -> None:
        self.inner.model = weakref.ref(model)
        self._config = model.config.get_text_config(decoder=True)
        self.close = watch(model, self, "_hear", "_finish")

    def _hear(self, batch: int, slots: int, mask: Tensor | None, positions: Tensor | None = None) -> None:
        """A forward of the model begins. Called by the hook."""
        if self.inner.steps is not None:
            return  # planned already, by whoever captured them
        begun = self.inner.guard.marked(self.inner.upcoming)
        self.announce(batch, slots, mask, positions)
        self.inner.guard.begun = begun

    def announce(self, batch: int, slots: int, mask: Tensor | None, positions: Tensor | None = None) -> None:
        """What the coming forward brings: slots per row, which are tokens (B, past + slots), None for all, and their
        positions (1 or B, slots), None for the numbers of the slots. The model's forwards are heard; this is for what
        no module computes.

        The mask must agree with what is stored for the slots before.
        """
        self.inner.announce(batch, slots, mask, positions)

    def _finish(self, returned: bool) -> None:
        """The forward that was heard is over. Called by the hook. ValueError where it returned and stored nothing."""
        self.inner.finish(returned)

    def update(self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args, **kwargs):
        """Store keys and values (B, H, T, D) of a layer; what attention is to read of all its slots, tensors or handles
        that decode themselves. Called by the model. ValueError where the tokens were not announced."""
        if torch.compiler.is_compiling():  # a graph ends here: pages and kernels are nothing that it could trace
            return _untraced(self, key_states, value_states, layer_idx, *args, **kwargs)
        if layer_idx >= len(self.inner.describes.kinds):
            raise ValueError(
                f"{self.inner.describes.name} has {len(self.inner.describes.kinds)} layers, found one more: {layer_idx}"
            )
        layer, (batch, _, slots, _) = self.layers[layer_idx], key_states.shape
        if not isinstance(layer, Layer):
            return super().update(key_states, value_states, layer_idx, *args, **kwargs)
        if self.inner.steps is not None:
            return self.inner.steps.update(layer, key_states, value_states)
        if layer.slots + slots > self.inner.rows.slots:
            module = calling()
            if module or batch > 1 or self.recipe.rotary:
                raise ValueError(
                    f"a batch of {batch} arrived{f' from {module}' if module else ''} without its attention mask and "
                    "positions being seen, so padding cannot be told from tokens; call the model that was given to "
                    "kvist.Cache, or its text model, or tell the cache first: announce(batch, tokens, mask, positions)"
                )
            self.inner.rows.extend(batch, slots, None)
        if layer.slots + slots != self.inner.rows.slots:
            raise ValueError("layers of the cache are out of step, probably after a forward that failed; call mend()")
        given = layer.update(key_states, value_states)
        if self._read != self.inner.rows.announced:  # once per forward: a config takes its time
            self._read, attention = self.inner.rows.announced, getattr(self._config, "_attn_implementation", None)
            self._reads_handles = attention in READS_HANDLES or str(attention).startswith(ATTACHED)
        if not self._reads_handles:
            given = tuple(x.dense() if isinstance(x, Handle) else x for x in given)
        return given

    def reset(self) -> None:
        """Forget everything and free the storage."""
        self.inner.check_free()
        self.inner.guard.reset()
        self.inner.forget()

    def mend(self) -> None:
        """After a forward that was interrupted: forget what only some of the layers were given.

        Layers that are not ours may have dropped what they held before. ValueError then, with nothing changed, and the
        cache is of no use until `reset()`.
        """
        self.inner.check_free()
        if found := self.inner.guard.mend():
            self.inner.rows.crop(found.slots)
            self.inner.upcoming = found.upcoming

    def crop(self, tokens_to_remove: int) -> None:
        """Remove the last k slots: crop(-k). ValueError, with nothing changed, where a layer not ours cannot."""
        self.inner.check_free()
        remove = -int(tokens_to_remove)  # assisted decoding of transformers 5.17 gives a tensor
        if remove < 0:
            raise ValueError(f"crop(-k) removes the last k tokens; found {-remove}")
        self.inner.guard.crop(remove)
        self.inner.rows.crop(self.inner.ours[0].slots)
        self.inner.upcoming = [position - remove for position in self.inner.upcoming]

    def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
        """Row i becomes what row beam_idx[i] was; full pages are shared, not copied."""
        self._select(beam_idx)

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep these rows, in this order; a row may be named more than once."""
        self._select(indices)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Every row `repeats` times, side by side; full pages are shared, not copied."""
        self._select(torch.arange(self.inner.rows.batch).repeat_interleave(repeats))

    def _select(self, indices: Tensor) -> None:
        """Row i of every layer becomes what row indices[i] was."""
        self.inner.check_free()
        if not self.inner.rows.runs:
            return
        self.inner.guard.check()
        for layer in self.layers:
            layer.reorder_cache(indices)
        order = indices.tolist()
        self.inner.rows.select(order)
        self.inner.upcoming = [self.inner.upcoming[row] for row in order] if self.inner.upcoming else []

    def report(self) -> report.Report:
        """Bytes used and allocated, itemised; bits per element; tokens packed and exact. Measured from the tensors."""
        self.inner.check_steps()
        return report.measure(self.recipe.name, self.layers)

    def bill(self, tokens: int, reserve: int) -> int:
        """Bytes that one row of `tokens`, read at once, takes in the layers that kvist stores."""
        return self.recipe.bill(self.inner.describes.shapes, len(self.inner.ours), tokens, reserve=reserve).total()

    def save(self, path: str | Path) -> None:
        """Write everything stored to one safetensors file, atomically."""
        from kvist.cache.files import save

        self.inner.check_steps()
        self.inner.guard.check()
        save(self, path)

    @classmethod
    def load(cls, path: str | Path, model, method: "str | Recipe | Path | None" = None, **options) -> "Cache":
        """A saved cache, for the same model, in any process. With `method`, refuse a file made by another recipe."""
        from kvist.cache.files import load

        return load(cls, path, model, None if method is None else resolve(method, **options))

    def __deepcopy__(self, memo: dict) -> "Cache":
        twin = self.__class__.__new__(self.__class__)
        memo[id(self)] = twin
        skipped = ("close", "_config")
        memo |= {id(layer.bound): None for layer in self.inner.ours}  # addresses of storage that is not the twin's
        twin.__dict__.update({k: copy.deepcopy(v, memo) for k, v in self.__dict__.items() if k not in skipped})
        twin.inner.guard.begun = None  # its marks tell the tensors of this cache alone
        model = self.inner.model()
        if model is None:
            twin._config, twin.close = self._config, self.close
        else:
            twin._listen(model)
        return twin

    def __reduce_ex__(self, protocol):
        raise TypeError(
            "a kvist.Cache is not pickled, nor saved by torch.save, as it listens to its model: cache.save(path) "
            "writes it, kvist.Cache.load(path, model) reads it, and copy.deepcopy copies it"
        )

    def __repr__(self) -> str:
        return f"kvist.Cache({self.recipe.name!r}, {len(self.inner.ours)} layers, {self.get_seq_length()} slots)"


@torch.compiler.disable
def _untraced(cache: Cache, *args, **kwargs):
    return cache.update(*args, **kwargs)


def _check_fit(recipe: Recipe, describes: Model, model) -> None:
    """Refuse a recipe that lacks something, or was fitted to another model."""
    if recipe.needs:
        raise ValueError(
            f"{recipe.name} needs {' and '.join(recipe.needs)}: run `kvist calibrate MODEL --data TEXT "
            f"--method '{recipe.name}' --out DIR`, then use '{recipe.name} artifact=DIR'"
        )
    try:
        if recipe.model is not None:
            recipe.model.check(describes.identity)
        if recipe.rotary:
            found = rotary(model)
            if not all(plan.key.codec.transform.same(found) for plan in recipe.layers):
                raise ValueError("the model's rotary embedding differs; calibrate for this model")
    except ValueError as error:
        raise ValueError(f"this recipe of {recipe.name} does not fit: {error}") from None
