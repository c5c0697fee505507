"""Listen to a model's forward: which slots are tokens, and their positions. `update` is never told; a removable
pre-hook tells the cache."""

import inspect
import weakref
from collections.abc import Callable

from torch import Tensor, nn


def watch(model: nn.Module, cache, tell: str) -> Callable[[], None]:
    """Before each forward of `model` given `cache`, call its method `tell(batch, slots, attention_mask, position_ids)`.

    Holds neither of them alive. Returns the function that removes the hook; it also goes when the cache does.
    """
    reference = weakref.ref(cache)
    signature = inspect.signature(model.forward)

    def before(module: nn.Module, args: tuple, kwargs: dict) -> None:
        given = signature.bind_partial(*args, **kwargs).arguments if args else kwargs
        cache = reference()
        if cache is None or given.get("past_key_values") is not cache:
            return
        inputs: Tensor | None = given.get("input_ids")
        inputs = given.get("inputs_embeds") if inputs is None else inputs
        if inputs is not None:
            masks = given.get("attention_mask"), given.get("position_ids")
            getattr(cache, tell)(inputs.shape[0], inputs.shape[1], *masks)

    hook = model.register_forward_pre_hook(before, with_kwargs=True)
    weakref.finalize(cache, hook.remove)
    return hook.remove
