"""Listen to keys and values on their way to the cache, and to the gradients that come back. Nothing is stored.

A tap is a cache: whatever a model does before it caches (biases, norms, fused projections, rotary embedding), its keys
and values pass here.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint
from transformers import DynamicCache
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_utils import PreTrainedModel

from kvist.models.adapter import describe
from kvist.models.compat import cache_argument

LOGITS = 1 << 26  # numbers: logits of so many tokens at a time, vocabulary included
PER_NUMBER, ROOM = 64, 1 << 31  # bytes that a layer keeps per hidden number, about; bytes that may be kept in all

# layer, side (0 keys, 1 values), the tensor (B, H, T, D), its gradient or None
Listener = Callable[[int, int, Tensor, Tensor | None], None]


class Tap(DynamicCache):
    """Tells `listener` of the keys and values of each served layer; with `gradients`, once their gradient is known."""

    def __init__(self, model: PreTrainedModel, listener: Listener, gradients: bool = False):
        super().__init__(config=model.config)
        self.served = {layer: i for i, layer in enumerate(describe(model).served)}
        self.listener, self.gradients = listener, gradients
        self.seen: set[int] = set()

    def update(self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args, **kwargs):
        if layer_idx in self.served and layer_idx not in self.seen:  # a recomputed layer passes here again
            self.seen.add(layer_idx)
            for side, x in enumerate((key_states, value_states)):
                tell = partial(self.listener, self.served[layer_idx], side, x.detach())
                if self.gradients:
                    x.register_hook(lambda grad, tell=tell: tell(grad))
                else:
                    tell(None)
        return key_states, value_states


@torch.no_grad()
def listen(model: PreTrainedModel, ids: Tensor, listener: Listener) -> None:
    """Keys and values of tokens (B, T), layer by layer, in one forward pass."""
    model(input_ids=ids, **cache_argument(Tap(model, listener)), use_cache=True, logits_to_keep=1)


def listen_back(model: PreTrainedModel, ids: Tensor, listener: Listener) -> float:
    """Keys and values of tokens (B, T), and the gradients of the next tokens' summed cross-entropy, from the last
    layer to the first; returns that loss.

    Weights have no gradients. Where all that a backward pass needs would be large, each layer is computed again on the
    way back, so that what is kept is its input. Logits are made a few tokens at a time.
    """
    hidden: list[Tensor] = []
    text = model.config.get_text_config(decoder=True)
    large = ids.numel() * text.hidden_size * text.num_hidden_layers * PER_NUMBER > ROOM
    with frozen(model), _recomputed(model) if large else nullcontext():
        embedded = model.get_input_embeddings()(ids).detach().requires_grad_()
        hook = model.get_decoder().register_forward_hook(lambda module, args, out: hidden.append(out[0]))
        try:
            tap = Tap(model, listener, gradients=True)
            with torch.enable_grad():
                last = model(inputs_embeds=embedded, **cache_argument(tap), use_cache=True, logits_to_keep=1).logits
        finally:
            hook.remove()
        loss, gradient = _loss(model, hidden[-1].detach(), ids, last.detach())
        hidden[-1].backward(gradient)
    return loss


def _loss(model: PreTrainedModel, hidden: Tensor, ids: Tensor, last: Tensor) -> tuple[float, Tensor]:
    """Summed cross-entropy of the tokens that follow, and its gradient for the last hidden states (B, T, E)."""
    head, gradient, total = _head(model, hidden[:, -1:], last), torch.zeros_like(hidden), 0.0
    step = max(1, LOGITS // (ids.shape[0] * last.shape[-1]))
    for start in range(0, ids.shape[1] - 1, step):
        part = slice(start, min(start + step, ids.shape[1] - 1))
        with torch.enable_grad():
            piece = hidden[:, part].detach().requires_grad_()
            targets = ids[:, part.start + 1 : part.stop + 1]
            loss = F.cross_entropy(head(piece).float().flatten(0, 1), targets.flatten(), reduction="sum")
        (gradient[:, part],) = torch.autograd.grad(loss, piece)
        total += loss.item()
    return total, gradient


def _head(model: PreTrainedModel, hidden: Tensor, expected: Tensor) -> Callable[[Tensor], Tensor]:
    """From hidden states to logits as the model makes them: its head, scaled or capped. Checked on the last token."""
    text, project = model.config.get_text_config(decoder=True), model.get_output_embeddings()
    assert project is not None
    cap, up, down = (getattr(text, name, None) for name in ("final_logit_softcapping", "logit_scale", "logits_scaling"))

    def head(x: Tensor) -> Tensor:
        logits = project(x)
        logits = logits * up if up else logits
        logits = logits / down if down else logits
        return torch.tanh(logits / cap) * cap if cap else logits

    with torch.no_grad():
        found = head(hidden)
    slack = 0.02 * expected.float().abs().max().item() + 1e-6
    if found.shape != expected.shape or (found.float() - expected.float()).abs().max() > slack:
        raise ValueError(
            f"{text.model_type} makes its logits in a way that kvist does not know, so their loss cannot be computed "
            "in pieces; `kvist calibrate --sensitivity none` needs no loss"
        )
    return head


@contextmanager
def frozen(model: PreTrainedModel) -> Iterator[None]:
    """No weight asks for a gradient meanwhile."""
    asked = [weight for weight in model.parameters() if weight.requires_grad]
    for weight in asked:
        weight.requires_grad_(False)
    try:
        yield
    finally:
        for weight in asked:
            weight.requires_grad_(True)


@contextmanager
def _recomputed(model: PreTrainedModel) -> Iterator[None]:
    """Decoder layers keep their inputs only, and compute the rest again for the way back."""
    layers = [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]
    own = [vars(layer).get("forward") for layer in layers]  # where somebody else wrapped it, that is put back
    for layer in layers:
        layer.forward = partial(checkpoint, layer.forward, use_reentrant=False)
    try:
        yield
    finally:
        for layer, forward in zip(layers, own, strict=True):
            del layer.forward
            if forward is not None:
                layer.forward = forward
