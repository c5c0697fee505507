"""Listen to a model's forwards: which slots are tokens, and their positions. `update` is never told; removable hooks
tell the cache, whichever of the model's doors a call comes through."""

import inspect
import sys
import weakref
from typing import NamedTuple

import torch
from torch import Tensor, nn

from kvist.models.compat import CACHE_NAMES, takes

INPUTS = ("input_ids", "inputs_embeds")


class Heard(NamedTuple):
    """What a call says of its tokens."""

    batch: int
    slots: int
    mask: Tensor | None
    positions: Tensor | None

    def same(self, other: "Heard") -> bool:
        """The same tensors, not equal ones: to compare those would cost as much as to tell again."""
        return self[:2] == other[:2] and self.mask is other.mask and self.positions is other.positions


class Ears:
    """Hooks on every module of `model` that takes tokens and a cache. See `watch`."""

    def __init__(self, model: nn.Module, cache, tell: str, done: str | None):
        self.cache, self.tell, self.done = weakref.ref(cache), tell, done
        self.outer: weakref.ref[nn.Module] | None = None  # the module whose call is being heard
        self.heard = Heard(0, 0, None, None)
        self.hooks = []
        for module in model.modules():
            if takes(type(module), INPUTS) and takes(type(module), CACHE_NAMES):
                self.hooks.append(module.register_forward_pre_hook(self.before, with_kwargs=True))
                self.hooks.append(module.register_forward_hook(self.after, with_kwargs=True, always_call=True))

    def close(self) -> None:
        for hook in self.hooks:
            hook.remove()
        self.hooks = []

    @torch.compiler.disable
    def before(self, module: nn.Module, args: tuple, kwargs: dict) -> None:
        if (cache := self._given(args, kwargs)) is None:
            return
        given = kwargs
        if args:
            given = inspect.signature(type(module).forward).bind_partial(module, *args).arguments | kwargs
        inputs = next((given[name] for name in INPUTS if given.get(name) is not None), None)
        if inputs is None:
            raise ValueError(
                f"{type(module).__name__} was given a kvist.Cache but neither input_ids nor inputs_embeds, so tokens "
                "and padding cannot be told apart"
            )
        call = Heard(inputs.shape[0], inputs.shape[1], given.get("attention_mask"), given.get("position_ids"))
        if self.outer is None or self.outer() in (None, module):
            self.outer, self.heard = weakref.ref(module), call
        else:
            call = _inner(call, self.heard, type(module).__name__)
            if call.same(self.heard):
                return
            self.heard = call
        getattr(cache, self.tell)(*call)

    @torch.compiler.disable
    def after(self, module: nn.Module, args: tuple, kwargs: dict, out) -> None:
        """The outermost call ended, or failed: what it announced and nobody stored is no longer expected."""
        if (cache := self._given(args, kwargs)) is None:
            return
        if self.outer is not None and self.outer() is module:
            self.outer, self.heard = None, Heard(0, 0, None, None)
            if self.done:
                getattr(cache, self.done)(out is not None)

    def _given(self, args: tuple, kwargs: dict):
        """Our cache, if a call was given it: other threads may call the same model with theirs. It is found as what it
        is, under whatever name it comes."""
        cache = self.cache()
        return cache if cache is not None and any(value is cache for value in (*args, *kwargs.values())) else None


def watch(model: nn.Module, cache, tell: str, done: str | None = None):
    """Before each forward that is given `cache`, call its method `tell(batch, slots, attention_mask, position_ids)`,
    and after it `done(returned)`, False where it failed.

    Whichever module of `model` is called, by whichever wrapper: a call inside another, of a text model by the one that
    holds it, tells again where it says more: another mask (batch, tokens), positions, or other tokens. A
    four-dimensional mask, which some models make before they call their text model, says nothing of padding; what the
    call around it said stands. Holds neither model nor cache alive. Returns the function that removes the hooks; they
    also go when the cache does.
    """
    ears = Ears(model, cache, tell, done)
    weakref.finalize(cache, ears.close)
    return ears.close


def calling() -> str | None:
    """The class of the module whose forward runs now, or None where no module runs."""
    frame = sys._getframe(1)
    while frame is not None:
        caller = frame.f_locals.get("self")
        if isinstance(caller, nn.Module):
            return type(caller).__name__
        frame = frame.f_back
    return None


def _inner(call: Heard, around: Heard, name: str) -> Heard:
    """What a call says together with the call around it."""
    least = around.mask.shape[1] if _flat(around.mask) else call.slots  # a mask of this call's tokens alone says less
    mask = call.mask if _flat(call.mask) and call.mask.shape[1] >= least else around.mask
    if mask is not call.mask and (call.batch, call.slots) != (around.batch, around.slots):
        raise ValueError(
            f"{name} was called with {call.batch} x {call.slots} tokens inside a call with {around.batch} x "
            f"{around.slots} and the mask of those: its padding is not known; pass it a mask (batch, tokens)"
        )
    return Heard(call.batch, call.slots, mask, call.positions if _flat(call.positions) else around.positions)


def _flat(x) -> bool:
    return isinstance(x, Tensor) and x.dim() == 2
