"""Listen to a model's forward: which slots are tokens, and their positions. `update` is never told; a removable
pre-hook tells the cache."""

import inspect
import weakref
from collections.abc import Callable

from torch import Tensor, nn


def watch(model: nn.Module, cache, tell: str, done: str = "") -> Callable[[], None]:
    """Before each forward of `model` given `cache`, call its method `tell(batch, slots, attention_mask, position_ids)`;
    when it has returned, and was not interrupted, its method `done()`, if one is named.

    Holds neither of them alive. Returns the function that removes the hooks; they also go when the cache does.
    """
    reference = weakref.ref(cache)
    signature = inspect.signature(model.forward)

    def heard(args: tuple, kwargs: dict):
        """The cache and the arguments, if it is among them."""
        given = signature.bind_partial(*args, **kwargs).arguments if args else kwargs
        cache = reference()
        return (cache, given) if cache is not None and given.get("past_key_values") is cache else (None, given)

    def before(module: nn.Module, args: tuple, kwargs: dict) -> None:
        cache, given = heard(args, kwargs)
        if cache is None:
            return
        inputs: Tensor | None = given.get("input_ids")
        inputs = given.get("inputs_embeds") if inputs is None else inputs
        if inputs is not None:
            masks = given.get("attention_mask"), given.get("position_ids")
            getattr(cache, tell)(inputs.shape[0], inputs.shape[1], *masks)

    def after(module: nn.Module, args: tuple, kwargs: dict, output) -> None:
        cache, _ = heard(args, kwargs)
        if cache is not None and done:
            getattr(cache, done)()

    hooks = (
        model.register_forward_pre_hook(before, with_kwargs=True),
        model.register_forward_hook(after, with_kwargs=True),
    )

    def remove() -> None:
        for hook in hooks:
            hook.remove()

    weakref.finalize(cache, remove)
    return remove
