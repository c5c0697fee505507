"""An fp16 cache that stays at one length: each step overwrites its last token, so that a graph may replay the step."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import AttentionInterface
from transformers.cache_utils import Cache, CacheLayerMixin
from transformers.masking_utils import AttentionMaskInterface

BARE = "kvist-bench-bare"


class StandingLayer(CacheLayerMixin):
    """`length` random tokens, and room for the one that each step brings; what is returned is all of them."""

    is_sliding = False

    def __init__(self, shape: tuple[int, int], length: int, device: torch.device, batch: int = 1):
        super().__init__()
        dims = batch, shape[0], length + 1, shape[1]
        self.length, self.is_initialized = length, True
        self.keys: Tensor = torch.randn(dims, device=device, dtype=torch.float16)
        self.values: Tensor = torch.randn(dims, device=device, dtype=torch.float16)

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Nothing is left to make."""

    def update(self, key_states: Tensor, value_states: Tensor, *args, **kwargs) -> tuple[Tensor, Tensor]:
        self.keys[:, :, -1:].copy_(key_states)
        self.values[:, :, -1:].copy_(value_states)
        return self.keys, self.values

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.length + query_length, 0

    def get_seq_length(self) -> int:
        return self.length

    def get_max_length(self) -> int:
        return -1


def standing(layers: int, shape: tuple[int, int], length: int, device: torch.device) -> Cache:
    """A cache of one row. shape: KV heads and head size."""
    return Cache(layers=[StandingLayer(shape, length, device) for _ in range(layers)])


def _bare(module, query: Tensor, key: Tensor, value: Tensor, attention_mask, scaling=None, **_) -> tuple[Tensor, None]:
    grouped = query.shape[1] != key.shape[1]
    out = F.scaled_dot_product_attention(query, key, value, scale=scaling, enable_gqa=grouped)
    return out.transpose(1, 2).contiguous(), None


@contextmanager
def without_mask(model) -> Iterator[None]:
    """A model's attention is torch's, and no mask is made: one query sees every token, and with a mask the fastest
    kernels refuse."""
    AttentionInterface.register(BARE, _bare)
    AttentionMaskInterface.register(BARE, lambda *args, **kwargs: None)
    before = model.config._attn_implementation
    model.set_attn_implementation(BARE)
    try:
        yield
    finally:
        model.set_attn_implementation(before)
