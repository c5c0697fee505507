"""A decode step as one CUDA graph around the model's forward: no launch costs, nothing asked of the device.

Everything that changes from step to step reaches the kernels through tensors that stay where they are: the token, its
position, and the cache's numbers. On a CPU, in Triton's interpreter, the same forward simply runs.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from kvist.attention.switch import attach
from kvist.cache.cache import Cache
from kvist.cache.graph import Steps
from kvist.models.compat import cache_argument

WARM_UP = 2  # forwards before the capture: kernels are compiled, and libraries make their workspaces


class Captured:
    """Decode steps of a model as a CUDA graph, over a cache that holds a prompt: up to `tokens` more per row.

    Room for all of them is reserved at once, and stays. `close()`, or the end of a `with`, gives model and cache back
    for ordinary use. Raises ValueError where a layer's steps cannot be captured, with the reasons.
    """

    def __init__(self, model: nn.Module, cache: Cache, tokens: int = 1024):
        if len(cache.inner.ours) != len(cache.layers):
            raise ValueError("decode steps can be captured where kvist serves every layer; this model has other layers")
        if not cache.inner.rows.runs:
            raise ValueError("the cache is empty: read a prompt into it, then capture decode steps")
        if len({layer.device for layer in cache.inner.ours}) > 1:
            raise ValueError("decode steps can be captured where all layers are on one device; this model is sharded")
        if not cache.inner.upcoming and not cache.inner.rows.dense(cache.inner.ours[0].slots):
            raise ValueError("positions of a loaded cache with padding are not known: take one ordinary step first")
        self.model, self.cache, self.device = model, cache, cache.inner.ours[0].device
        with torch.inference_mode(False):
            self.tokens = torch.zeros(cache.inner.rows.batch, 1, dtype=torch.long, device=self.device)
            self.positions = torch.zeros_like(self.tokens)
        self.graph: torch.cuda.CUDAGraph | None = None
        self.logits: Tensor | None = None
        self._attachment = attach(model)
        try:
            self._steps = cache.inner.steps = Steps(cache.inner.ours, cache.inner.rows, tokens)
        except BaseException:
            self._attachment.close()
            raise
        try:
            if self.device.type == "cuda":
                self._capture()
        except BaseException:
            self.close()
            raise

    @torch.inference_mode(False)
    def _capture(self) -> None:
        with torch.cuda.device(self.device):
            side = torch.cuda.Stream()
            side.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(side):
                for _ in range(WARM_UP):
                    self._forward()
            torch.cuda.current_stream().wait_stream(side)
            self.graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(self.graph):
                self.logits = self._forward()

    @torch.no_grad()
    def _forward(self) -> Tensor:
        self._steps.storing = True
        try:
            return self.model(
                input_ids=self.tokens, position_ids=self.positions, **cache_argument(self.cache), use_cache=True
            ).logits
        finally:
            self._steps.storing = False

    @torch.inference_mode(False)
    @torch.no_grad()
    def step(self, tokens: Tensor) -> Tensor:
        """Store the next token of each row, (B, 1); its logits (B, 1, vocabulary). On a GPU the next step overwrites
        them."""
        if tokens.shape != self.tokens.shape:
            raise ValueError(f"a step takes a token per row, {tuple(self.tokens.shape)}, found {tuple(tokens.shape)}")
        upcoming = self.cache.inner.upcoming or self.cache.inner.rows.next_positions()
        positions = torch.tensor(upcoming).unsqueeze(-1)
        self._steps.plan()
        self.cache.inner.upcoming = [position + 1 for position in upcoming]
        self.tokens.copy_(tokens, non_blocking=True)
        self.positions.copy_(positions, non_blocking=True)
        if self.graph is None:
            return self._forward()
        with torch.cuda.device(self.device):
            self.graph.replay()
        assert self.logits is not None
        return self.logits

    def generate(self, tokens: Tensor, new_tokens: int) -> Tensor:
        """The most likely continuation of each row's next token (B, 1): (B, new_tokens), `tokens` not among them."""
        found = []
        for _ in range(new_tokens):
            tokens = self.step(tokens)[:, -1].argmax(-1, keepdim=True)
            found.append(tokens)
        return torch.cat(found, dim=1)

    def close(self) -> None:
        """Give model and cache back; the graph is freed."""
        self._attachment.close()
        self.cache.inner.steps = None
        self.graph = self.logits = None

    def __enter__(self) -> Captured:
        return self

    def __exit__(self, *_) -> None:
        self.close()
