"""Fake quantization, as published tables measure it: what every token would become if all were packed at once.

The codecs' own outliers fill a fixed number of slots per token. The rules here are those of the published simulation
(KVQuant sections 3.1 and 3.4): keys escape by their channels' thresholds, values by the quantiles of their token.
"""

import math

import torch
from torch import Tensor
from transformers import DynamicCache

from kvist.coding import Codec, Fixed, Slots
from kvist.kernels.reference.grid import narrow, normalise
from kvist.models.adapter import describe
from kvist.plan import LayerPlan, Recipe


class Simulated(DynamicCache):
    """A cache for one pass over whole sequences without padding. Attention is given the simulated tokens; nothing is
    stored. Layers that kvist does not serve keep their own cache."""

    def __init__(self, model, recipe: Recipe):
        facts = describe(model)
        if recipe.needs:
            raise ValueError(f"{recipe.name} needs {' and '.join(recipe.needs)}; give it an artefact")
        if recipe.model is not None:
            recipe.model.check(facts.identity)
        super().__init__(config=model.config)
        self.plans = dict(zip(facts.served, recipe.for_layers(len(facts.served)), strict=True))
        self.passed: set[int] = set()

    def update(self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args, **kwargs):
        if layer_idx not in self.plans:
            return super().update(key_states, value_states, layer_idx, *args, **kwargs)
        if layer_idx in self.passed:
            raise RuntimeError("a simulated cache serves one pass; make a new one for the next")
        self.passed.add(layer_idx)
        return simulate(self.plans[layer_idx], key_states, value_states)


@torch.no_grad()
def simulate(plan: LayerPlan, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
    """Keys and values (B, H, T, D) of tokens 0..T-1, all quantized and back but for the sinks, whatever the retention
    rule says. Of codecs that take several tokens together, an unfinished group at the end stays exact."""
    if not plan.packs:
        return keys, values
    # an uncapped artefact may ask for no slots at all; that outliers were meant shows in its values
    open_ended = isinstance(plan.value.codec.outliers, Slots)
    return _side(plan.key.codec, keys, plan.sinks, open_ended), _side(plan.value.codec, values, plan.sinks, False)


def _side(codec: Codec, x: Tensor, sinks: int, open_ended: bool) -> Tensor:
    whole = max(0, x.shape[-2] - sinks) // codec.granule * codec.granule
    if codec.raw or not whole:
        return x
    part = slice(sinks, sinks + whole)
    at, old = torch.arange(x.shape[-2], device=x.device)[part], x[..., part, :]
    if isinstance(codec.range, Fixed) and (open_ended or isinstance(codec.outliers, Slots)):
        new = _by_threshold(codec, codec.range, codec.transform.forward(old.float(), at))
        new = codec.transform.inverse(new, at)
    elif codec.grouping.across_heads and isinstance(codec.outliers, Slots):
        new = codec.transform.inverse(_by_quantile(codec, codec.outliers, codec.transform.forward(old.float(), at)), at)
    else:
        new = codec.decode(codec.encode(old, at), at)
    out = x.clone()
    out[..., part, :] = new.to(x.dtype)
    return out


def _by_threshold(codec: Codec, fixed: Fixed, x: Tensor) -> Tensor:
    """Beyond its channel's thresholds an entry stays exact: the farthest slots/2 of each side of a token where their
    number is capped, all where it is not. Others are clipped to the ends of the ladder."""
    heads = x.shape[-3]
    scale, offset = fixed.affine(codec.ladder, heads, x.device)
    u = normalise(x, scale, offset)
    if isinstance(codec.outliers, Slots) and codec.outliers.rank == "sides":
        flat = u.movedim(-3, -2).flatten(-2)
        each = codec.outliers.count(flat.shape[-1]) // 2
        escaped = torch.zeros_like(flat, dtype=torch.bool)
        escaped.scatter_(-1, flat.topk(each).indices, True)
        escaped &= flat > 1
        low = torch.zeros_like(escaped).scatter_(-1, flat.topk(each, largest=False).indices, True)
        escaped = (escaped | (low & (flat < -1))).unflatten(-1, (heads, -1)).movedim(-2, -3)
    else:
        low, high = (narrow(torch.tensor(t)).float().view(heads, 1, -1).to(x.device) for t in (fixed.low, fixed.high))
        escaped = (x < low) | (x > high)
    return torch.where(escaped, x, _rounded(codec, u, scale, offset))


def _by_quantile(codec: Codec, outliers: Slots, x: Tensor) -> Tensor:
    """At or beyond the quantiles of its token an entry stays exact; the range is that of the others."""
    heads = x.shape[-3]
    flat = x.movedim(-3, -2).flatten(-2)
    low, high = quantiles(flat, (outliers.share or outliers.slots / flat.shape[-1]) / 2)
    escaped = (flat <= low) | (flat >= high)
    ends = codec.range.measure(flat, escaped)  # pyright: ignore[reportAttributeAccessIssue]
    scale, offset = (narrow(a).unsqueeze(-1) for a in codec.ladder.affine(*ends))
    rounded = _rounded(codec, normalise(flat, scale, offset), scale.float(), offset.float())
    return torch.where(escaped, flat, rounded).unflatten(-1, (heads, -1)).movedim(-2, -3)


def quantiles(x: Tensor, tail: float) -> tuple[Tensor, Tensor]:
    """The quantiles `tail` and 1 - tail along the last dimension, kept as 1, with linear interpolation. Unlike
    torch.quantile, of tensors of any size."""
    place = tail * (x.shape[-1] - 1)
    place = round(place) if math.isclose(place, round(place), abs_tol=1e-9) else place
    first = int(place)
    ends = []
    for largest in (False, True):
        ranked = x.topk(min(first + 2, x.shape[-1]), largest=largest).values
        a, b = ranked[..., first : first + 1], ranked[..., -1:]
        ends.append(torch.lerp(a, b, place - first))
    return ends[0], ends[1]


def _rounded(codec: Codec, u: Tensor, scale: Tensor, offset: Tensor) -> Tensor:
    return codec.ladder.point(codec.ladder.index(u)) * scale + offset
