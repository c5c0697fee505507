"""Who is compared in a decode step: transformers' caches at their best public setting, and kvist's methods."""

from collections.abc import Callable
from types import SimpleNamespace

import torch
from torch import Tensor
from transformers import LlamaConfig
from transformers.cache_utils import Cache as TransformersCache
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from kvist.attention.function import packed_attention
from kvist.baselines import DYNAMIC, Baseline, held
from kvist.cache.layer import Layer
from kvist.cache.rows import Rows
from kvist.methods import parse
from kvist.testing.stand_in import stand_in

LAYERS, QUERY_HEADS, KV_HEADS, DIM = 2, 8, 2, 128
SHAPE = f"{LAYERS} layers of {QUERY_HEADS} query and {KV_HEADS} KV heads of {DIM}, bf16, batch 1"

CONFIG = LlamaConfig(
    num_hidden_layers=LAYERS, num_attention_heads=QUERY_HEADS, num_key_value_heads=KV_HEADS, head_dim=DIM
)


class Step:
    """A cache and the attention that serves it. `step()` is one decode step of all layers, no model around it."""

    def __init__(
        self,
        name: str,
        cache: TransformersCache,
        attention: Callable,
        announce: Callable[[int], None],
        room: Callable[[], int],
    ):
        self.name, self.cache, self.attention, self.announce, self.room = name, cache, attention, announce, room
        self.module = SimpleNamespace(num_key_value_groups=QUERY_HEADS // KV_HEADS, is_causal=True, layer_idx=0)

    def fill(self, tokens: int, chunk: int = 8192) -> None:
        """A context of random tokens, without attending to it."""
        for start in range(0, tokens, chunk):
            n = min(chunk, tokens - start)
            self.announce(n)
            for layer in range(LAYERS):
                self.cache.update(_random(KV_HEADS, n), _random(KV_HEADS, n), layer)

    def step(self) -> Tensor:
        """One token through all layers."""
        self.announce(1)
        for layer in range(LAYERS):
            keys, values = self.cache.update(_random(KV_HEADS, 1), _random(KV_HEADS, 1), layer)
            out, _ = self.attention(self.module, _random(QUERY_HEADS, 1), keys, values, None, scaling=DIM**-0.5)
        return out

    def nbytes(self) -> int:
        """Bytes that the cache holds at rest."""
        return self.room()


def _random(heads: int, tokens: int) -> Tensor:
    return torch.randn(1, heads, tokens, DIM, dtype=torch.bfloat16)


def dynamic(masked: bool = False) -> Step:
    """transformers' DynamicCache under SDPA with grouped queries, as it runs a single row (`enable_gqa`); `masked`, as
    it runs when there is a mask: the queries of a group packed as rows, much the faster of the two on a CPU."""
    cache = DYNAMIC.cache(CONFIG)

    def packed(module, query: Tensor, keys: Tensor, values: Tensor, mask: None, **kwargs) -> tuple[Tensor, None]:
        everything = torch.ones(1, 1, 1, keys.shape[2], dtype=torch.bool)
        return sdpa_attention_forward(module, query, keys, values, everything, **kwargs)

    attention = packed if masked else sdpa_attention_forward
    return Step("dynamic", cache, attention, lambda n: None, lambda: held(cache))


def quantized(backend: str, bits: int) -> Step:
    """transformers' QuantizedCache."""
    cache = Baseline("quantized", backend, bits).cache(CONFIG)
    return Step(f"{backend}-{bits}", cache, sdpa_attention_forward, lambda n: None, lambda: held(cache))


def ours(method: str) -> Step:
    """A kvist cache, attached."""
    recipe, rows = stand_in(parse(method), KV_HEADS, DIM), Rows()
    layers: list = [Layer(plan, recipe.page, recipe.prefill, 0, rows) for plan in recipe.for_layers(LAYERS)]
    cache = TransformersCache(layers=layers)

    def room() -> int:
        from kvist.cache.report import measure

        return measure(method, layers).nbytes

    return Step(method, cache, packed_attention("sdpa"), lambda n: rows.extend(1, n, None), room)
