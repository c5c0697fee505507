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
        cache = reference()
        if cache is None or not any(value is cache for value in (*args, *kwargs.values())):
            return  # found as what it is: its keyword has had two names
        given = signature.bind_partial(*args, **kwargs).arguments if args else kwargs
        inputs: Tensor | None = given.get("input_ids")
        inputs = given.get("inputs_embeds") if inputs is None else inputs
        if inputs is None:
            raise ValueError(
                f"{type(module).__name__} was given a kvist.Cache but neither input_ids nor inputs_embeds, so tokens "
                "and padding cannot be told apart"
            )
        masks = given.get("attention_mask"), given.get("position_ids")
        getattr(cache, tell)(inputs.shape[0], inputs.shape[1], *masks)

    hook = model.register_forward_pre_hook(before, with_kwargs=True)
    weakref.finalize(cache, hook.remove)
    return hook.remove
