"""A mask that is not built unless somebody needs it.

Attention over packed pages knows causality and padding from the cache. Plain tensors (a prompt's first chunk, sliding
layers, no cache at all) still need the mask that the model's own attention expects; it is built when touched.
"""

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, causal_mask_function


class LazyMask(Tensor):
    """Stands for the (B, 1, M, N) mask that `build(**arguments)` makes. `plain`: causal with padding, nothing else."""

    @staticmethod
    def __new__(cls, build, arguments: dict) -> "LazyMask":
        shape = (arguments["batch_size"], 1, arguments["q_length"], arguments["kv_length"])
        return Tensor._make_wrapper_subclass(cls, shape, dtype=torch.bool, device=arguments.get("device", "cpu"))

    def __init__(self, build, arguments: dict):
        self.build, self.arguments = build, arguments
        self.plain = arguments.get("mask_function", causal_mask_function) is causal_mask_function
        self.built: tuple[Tensor | None] | None = None

    def dense(self) -> Tensor | None:
        """What the model's own mask function returns, built once for all layers; None where it says that no mask is
        needed."""
        if self.built is None:
            self.built = (self.build(**self.arguments),)
        return self.built[0]

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        def needed(mask: LazyMask) -> Tensor:
            return mask.build(**(mask.arguments | {"allow_is_causal_skip": False}))

        args, kwargs = tree_map_only(LazyMask, needed, (args, kwargs or {}))
        return func(*args, **kwargs)


def lazy_mask(own: str):
    """The mask function to register beside an attention function that falls back to `own`."""

    @torch.compiler.disable  # a tensor without data is nothing that a compiler could trace
    def make(**arguments) -> LazyMask:
        return LazyMask(ALL_MASK_ATTENTION_FUNCTIONS[own], arguments)

    return make
