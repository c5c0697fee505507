"""transformers' own caches, described once: what kvist is compared with, wherever it is."""

from dataclasses import dataclass
from typing import Any, Literal

from torch import Tensor
from transformers import DynamicCache, PreTrainedConfig, StaticCache
from transformers.cache_utils import Cache, QuantizedCache

BACKENDS = {"quanto": (2, 4), "hqq": (1, 2, 3, 4, 8)}  # of QuantizedCache, and the bits that each has


@dataclass(frozen=True)
class Baseline:
    """DynamicCache, StaticCache, or QuantizedCache with a backend and bits: its defaults but for hqq, which groups
    along a token's channels only where it is told."""

    kind: Literal["dynamic", "static", "quantized"]
    backend: str = ""
    bits: int = 0

    @classmethod
    def parse(cls, text: str) -> "Baseline | None":
        """'quanto:2', 'hqq:4', … of a command line; None for what begins otherwise. ValueError for other bits."""
        backend, _, bits = text.partition(":")
        if backend not in BACKENDS:
            return None
        if not bits.isdigit() or int(bits) not in BACKENDS[backend]:
            choices = ", ".join(f"{backend}:{b}" for b in BACKENDS[backend])
            raise ValueError(f"expected one of {choices}, found {text!r}")
        return cls("quantized", backend, int(bits))

    @property
    def description(self) -> dict[str, Any]:
        """As JSON, where a method of ours has its recipe."""
        if self.kind != "quantized":
            return {"name": f"transformers {self.kind.title()}Cache"}
        return {"name": "transformers QuantizedCache", "backend": self.backend, "bits": self.bits, **self._axes}

    def cache(self, config: PreTrainedConfig, length: int = 0) -> Cache:
        """An empty one for a model's text config; length: all tokens that a static one will hold. ValueError where its
        package is not installed."""
        if self.kind == "dynamic":
            return DynamicCache(config=config)
        if self.kind == "static":
            return StaticCache(config=config, max_cache_len=length)
        try:
            return QuantizedCache(backend=self.backend, config=config, nbits=self.bits, **self._axes)
        except ImportError as error:
            name = f"QuantizedCache {self.backend}:{self.bits}"
            raise ValueError(f"{name} needs a package: pip install 'kvist[bench]' ({error})") from None

    @property
    def _axes(self) -> dict[str, int]:
        return {"axis_key": 1, "axis_value": 1} if self.backend == "hqq" else {}


DYNAMIC, STATIC = Baseline("dynamic"), Baseline("static")


def held(cache) -> int:
    """Bytes of every tensor reachable from a cache's layers, quantized ones by their inner tensors."""
    seen: dict[int, int] = {}

    def visit(x) -> None:
        if isinstance(x, Tensor):
            inner = [
                getattr(x, name) for name in ("_data", "_scale", "_shift") if isinstance(getattr(x, name, None), Tensor)
            ]
            if inner:
                for part in inner:
                    visit(part)
            else:
                storage = x.untyped_storage()
                seen[storage.data_ptr()] = storage.nbytes()
        elif isinstance(x, dict):
            for value in x.values():
                visit(value)
        elif isinstance(x, list | tuple):
            for value in x:
                visit(value)

    for layer in cache.layers:
        visit(vars(layer))
    return sum(seen.values())
