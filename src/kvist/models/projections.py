"""The linear maps that keys and values come from, whatever a model calls them, and how far each one pulls at the loss.

A projection is found by asking autograd: of the maps that ran before a layer cached, the last one on which its keys
depend, and which columns of it they are. So fused projections need no table of names and layouts.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import NamedTuple

import torch
from torch import Tensor, nn
from transformers import DynamicCache
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_utils import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from kvist.models.adapter import describe
from kvist.models.compat import cache_argument
from kvist.models.taps import frozen

TOKENS = 16  # that try a model


class Projection(NamedTuple):
    """A linear map, and the columns of its output that keys or values are made of, int64 ascending."""

    module: nn.Module
    columns: Tensor


# layer, side (0 keys, 1 values), the Frobenius norm of the loss's gradient for the projection's weights
Told = Callable[[int, int, float], None]


class _Asking(DynamicCache):
    """Asks, layer by layer, which of the outputs in `ran` its keys and values depend on."""

    def __init__(self, model: PreTrainedModel, ran: list[tuple[nn.Module, Tensor]]):
        super().__init__(config=model.config)
        self.served, self.ran = describe(model).served, ran
        self.found: list[tuple[Projection, Projection]] = []

    def update(self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args, **kwargs):
        if layer_idx in self.served:
            keys, values = (self._source(x, layer_idx) for x in (key_states, value_states))
            self.found.append((keys, values))
        return key_states, value_states

    def _source(self, x: Tensor, layer: int) -> Projection:
        outputs = [output for _, output in self.ran if output.requires_grad]
        modules = [module for module, output in self.ran if output.requires_grad]
        draw = torch.Generator().manual_seed(layer)
        pull = torch.randn(x.shape, generator=draw).to(x)
        asked = torch.autograd.grad(x, outputs, pull, retain_graph=True, allow_unused=True) if outputs else ()
        for module, gradient in zip(reversed(modules), reversed(asked), strict=True):
            if gradient is not None and gradient.any():
                columns = gradient.flatten(0, -2).any(0).nonzero().flatten()
                if (x.shape[1] * x.shape[3]) % len(columns) == 0:
                    return Projection(module, columns)
        raise ValueError(
            f"what makes the keys and values of layer {layer} is not a linear projection that kvist can find, so "
            "gradient norms cannot be formed; merge adapters first, if the model has any"
        )


def projections(model: PreTrainedModel) -> list[tuple[Projection, Projection]]:
    """Per served layer, where its keys and values come from. Raises ValueError where that is no linear map."""
    ran: list[tuple[nn.Module, Tensor]] = []
    cache = _Asking(model, ran)
    ids = torch.arange(TOKENS, device=model.device).unsqueeze(0) % model.config.get_text_config(decoder=True).vocab_size

    def after(module: nn.Module, args: tuple, out: Tensor) -> None:
        ran.append((module, out))

    with ExitStack() as stack:
        for module in model.modules():
            if isinstance(module, nn.Linear | Conv1D):
                stack.callback(module.register_forward_hook(after).remove)
            if isinstance(module, GradientCheckpointingLayer):  # what ran in the layer before made its input
                stack.callback(module.register_forward_pre_hook(lambda module, args: ran.clear()).remove)
        stack.enter_context(frozen(model))
        stack.enter_context(torch.enable_grad())
        embedded = model.get_input_embeddings()(ids).detach().requires_grad_()
        model(inputs_embeds=embedded, **cache_argument(cache), use_cache=True, logits_to_keep=1)
    return cache.found


@contextmanager
def weight_gradients(found: Sequence[tuple[Projection, Projection]], told: Told) -> Iterator[None]:
    """Meanwhile, a backward pass tells the norm of each projection's weight gradient.

    The gradient GᵀX is formed from the layer's input X (tokens, width) and the gradient G of what it put out, in fp32,
    and forgotten at once: weights need not ask for gradients, and none is stored.
    """

    def tell(layer: int, side: int, columns: Tensor, given: Tensor, gradient: Tensor) -> None:
        pulled = gradient.index_select(-1, columns).flatten(0, -2).float()
        told(layer, side, torch.linalg.matrix_norm(pulled.T @ given.flatten(0, -2).float()).item())

    def listen(layer: int, side: int, projection: Projection):
        def after(module: nn.Module, args: tuple, out: Tensor) -> None:
            if out.requires_grad:
                given = args[0].detach()
                out.register_hook(lambda gradient: tell(layer, side, projection.columns, given, gradient))

        return projection.module.register_forward_hook(after)

    with ExitStack() as stack:
        for layer, sides in enumerate(found):
            for side, projection in enumerate(sides):
                stack.callback(listen(layer, side, projection).remove)
        yield
