"""The tensor that `update` hands out: right shape, type and device, but no data of its own.

Attention that knows it reads the packed pages. `F.scaled_dot_product_attention` is answered from the packed pages too,
which serves models that call it themselves. Anything else gets the dense tensor: correct, only slower.
"""

from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._pytree import tree_map_only


class Source(Protocol):
    """What a handle stands for: a `View`, or a captured step of a layer."""

    dtype: torch.dtype
    device: torch.device

    def shape(self, side: int) -> tuple[int, int, int, int]: ...

    def dense(self, side: int) -> Tensor: ...

    def attend(
        self, query: Tensor, scale: float, *, mask: Tensor | None = None, causal: bool = True,
        softcap: float | None = None, sink: Tensor | None = None,
    ) -> Tensor: ...  # fmt: skip


class Handle(Tensor):
    """Keys (side 0) or values (side 1) of a view, (B, H, slots, D)."""

    source: Source
    side: int

    @staticmethod
    def __new__(cls, view: Source, side: int) -> "Handle":
        shape, dtype, device = view.shape(side), view.dtype, view.device
        return Tensor._make_wrapper_subclass(cls, shape, dtype=dtype, device=device)

    def __init__(self, view: Source, side: int):
        self.source, self.side = view, side

    @classmethod
    def both(cls, view: Source, keys: tuple[int, ...], values: tuple[int, ...]) -> "tuple[Handle, Handle]":
        """Keys and values of a view, of these shapes."""
        dtype, device, make = view.dtype, view.device, Tensor._make_wrapper_subclass
        pair = make(cls, keys, dtype=dtype, device=device), make(cls, values, dtype=dtype, device=device)
        for side, handle in enumerate(pair):
            handle.source, handle.side = view, side
        return pair

    @torch.compiler.disable
    def dense(self) -> Tensor:
        """All slots decoded, padding as zeros."""
        return self.source.dense(self.side)

    def __repr__(self, **_) -> str:
        return f"Handle({'keys' if self.side == 0 else 'values'}, shape={tuple(self.shape)}, dtype={self.dtype})"

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func is F.scaled_dot_product_attention:
            answer = _sdpa(*args, **kwargs)
            if answer is not None:
                return answer
        with torch._C.DisableTorchFunctionSubclass():
            if torch.is_inference_mode_enabled():  # where views of a tensor without data cannot be made
                with torch.inference_mode(False), torch.no_grad():
                    return func(*args, **kwargs)
            return func(*args, **kwargs)

    @classmethod
    @torch.compiler.disable  # a compiler that traces a model stops here, too: kernels decode what is asked for
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        args, kwargs = tree_map_only(Handle, Handle.dense, (args, kwargs or {}))
        return func(*args, **kwargs)


@torch.compiler.disable
def _sdpa(query, key, value, attn_mask=None, dropout_p=0.0, is_causal=False, scale=None, enable_gqa=False):
    """Stock semantics on packed data, or None where only the dense tensors will do."""
    paired = isinstance(key, Handle) and isinstance(value, Handle) and key.source is value.source
    if not paired or (key.side, value.side) != (0, 1) or dropout_p or is_causal or isinstance(query, Handle):
        return None
    heads = key.shape[1]
    if query.dim() == 4 and query.shape[::3] != key.shape[::3]:  # another batch or head size: stock broadcasting
        return None
    grouped = heads == 1 or (enable_gqa and query.shape[1] % heads == 0)  # a single head is broadcast
    if query.dim() != 4 or (query.shape[1] != heads and not grouped):
        return None
    if attn_mask is not None:
        if attn_mask.dim() > 4 or attn_mask.shape[-1] != key.shape[2]:
            return None
        attn_mask = attn_mask[(None,) * (4 - attn_mask.dim())]
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    return key.source.attend(query, scale, mask=attn_mask, causal=False)


class Undifferentiated(torch.autograd.Function):
    """The identity on a result that depends on `query` in a way that cannot be differentiated: backward says so."""

    @staticmethod
    def forward(ctx, out: Tensor, query: Tensor) -> Tensor:
        return out.view_as(out)

    @staticmethod
    def backward(ctx, grad: Tensor):
        raise RuntimeError("attention over a kvist cache has no gradient; train with transformers' own cache or none")
