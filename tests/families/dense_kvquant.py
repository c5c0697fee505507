"""A dense reference for KVQuant: transformers' own cache, whose keys are taken before their rotation, rounded, and
rotated again by the model's own function with the model's own cos and sin.

It shares no code with the living cache or the codec: the formulas are written out, the tag says what keys were.
"""

import math
import sys
from functools import cache
from statistics import NormalDist
from typing import NamedTuple

import torch
from models_tiny import tokens
from torch import Tensor
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer
from zoo import tiny

from kvist.artifact import Artifact, Fit, Origin, Settings
from kvist.coding import Fixed, Table
from kvist.models.adapter import describe
from kvist.models.compat import cache_argument
from kvist.models.rope import NAME, pre_rope, rotary, tagged


class Setting(NamedTuple):
    """What is fitted, and how many recent tokens stay exact."""

    settings: Settings
    recent: int = 0


SETTINGS = {
    "nuq3-1%": Setting(Settings(bits=3, outliers=0.01)),
    "nuq2 recent": Setting(Settings(bits=2, outliers=0.0, sinks=3), recent=40),
    "nuq3-1% post-rope": Setting(Settings(bits=3, outliers=0.01, keys="post-rope")),
}


class Given(DynamicCache):
    """Keeps what each layer's update was given: keys, and what the tag says of them."""

    def update(self, key_states, value_states, layer_idx, *args, **kwargs):
        self.__dict__.setdefault("given", {})[layer_idx] = key_states, pre_rope(key_states), value_states
        return super().update(key_states, value_states, layer_idx, *args, **kwargs)


def fit(model, settings: Settings) -> Artifact:
    """Ranges of each channel that leave 1 % of some tokens out, and tables of normal quantiles."""
    facts, seen = describe(model), Given(config=model.config)
    with torch.no_grad(), tagged(model):
        model(tokens(1, 200, seed=3), **cache_argument(seen))
    points = [NormalDist().inv_cdf((i + 0.5) / 2**settings.bits) for i in range(2**settings.bits)]
    table = Table(bits=settings.bits, points=tuple(p / points[-1] for p in points))
    keys = []
    for layer in facts.served:
        rotated, tag, _ = seen.given[layer]
        key = rotated if tag is None or settings.keys == "post-rope" else tag.key
        ends = key[0].movedim(1, 0).flatten(1).quantile(torch.tensor([0.005, 0.995]), 0).half().tolist()
        keys.append(Fit(table=table, range=Fixed(low=tuple(ends[0]), high=tuple(ends[1]))))
    return Artifact(
        model=facts.identity,
        settings=settings,
        origin=Origin(source="", digest=""),
        rotary=rotary(model) if settings.keys == "pre-rope" else None,
        keys=tuple(keys),
        values=(Fit(table=table),) * len(keys),
    )


@cache
def fitted(family: str, attention: str, setting: str) -> Artifact:
    return fit(tiny(family, attention), SETTINGS[setting].settings)


def nearest(u: Tensor, table: Table) -> Tensor:
    points = torch.tensor(table.points)
    return points[(u.unsqueeze(-1) - points).abs().argmin(-1)]


def sides(u: Tensor, share: float) -> Tensor:
    """Which of u (B, T, C) are among the share/2 lowest or highest, rounded up, of their token; of equal ones (falcon
    repeats its heads) the first are lower."""
    count, order = math.ceil(share * u.shape[-1] / 2), u.sort(dim=-1, stable=True).indices
    ends = torch.cat([order[..., :count], order[..., u.shape[-1] - count :]], -1)
    return torch.zeros_like(u, dtype=torch.bool).scatter_(-1, ends, True)


def token_major(x: Tensor) -> Tensor:
    """(B, H, T, D) to (B, T, H·D)."""
    return x.transpose(1, 2).flatten(2)


def head_major(x: Tensor, heads: int) -> Tensor:
    return x.unflatten(2, (heads, -1)).transpose(1, 2)


def rounded_keys(keys: Tensor, fit: Fit, share: float) -> Tensor:
    """Keys (B, H, T, D) rounded per channel by known ranges; each token's farthest ones are exact in fp16."""
    x = token_major(keys)
    low, high = (torch.tensor(end).half().float() for end in (fit.range.low, fit.range.high))
    half, middle = ((high - low) / 2).half().float(), ((high + low) / 2).half().float()
    u = (x - middle) / half
    dense = nearest(u, fit.table) * half + middle
    return head_major(torch.where(sides(u, share), x.half().float(), dense), keys.shape[1])


def rounded_values(values: Tensor, fit: Fit, share: float) -> Tensor:
    """Values (B, H, T, D) rounded per token, over all heads, by the range of what is not exact."""
    x = token_major(values)
    escaped = sides(x, share)
    low, high = (x.masked_fill(escaped, sign * torch.inf) for sign in (1, -1))
    low, high = low.amin(-1, keepdim=True), high.amax(-1, keepdim=True)
    half, middle = ((high - low) / 2).half().float(), ((high + low) / 2).half().float()
    dense = nearest((x - middle) / half, fit.table) * half + middle
    return head_major(torch.where(escaped, x.half().float(), dense), values.shape[1])


class RoundedLayer(DynamicLayer):
    """What an update sees: its own tokens exact, of earlier ones all but the sinks and the recent ones rounded.

    starts (B,): the slot of each row's first token.
    """

    def __init__(self, artifact: Artifact, layer: int, recent: int, rotate):
        super().__init__()
        self.fits, self.settings = (artifact.keys[layer], artifact.values[layer]), artifact.settings
        self.recent, self.rotate, self.before, self.starts = recent, rotate, [], torch.zeros(1)

    def update(self, key_states: Tensor, value_states: Tensor, *args, **kwargs) -> tuple[Tensor, Tensor]:
        past = self.get_seq_length()
        keys, values = super().update(key_states, value_states)
        if self.settings.keys == "pre-rope":
            tag = pre_rope(key_states)
            self.before.append((tag.key, tag.cos, tag.sin))
        if not past:
            return keys, values
        slots, sinks = torch.arange(keys.shape[2]), self.starts + self.settings.sinks
        packed = ((slots >= sinks.unsqueeze(-1)) & (slots < past - self.recent))[:, None, :, None]
        rounded = rounded_values(values, self.fits[1], self.settings.outliers)
        return torch.where(packed, self.rounded_keys(), keys), torch.where(packed, rounded, values)

    def rounded_keys(self) -> Tensor:
        share = self.settings.outliers
        if self.settings.keys == "post-rope":
            return rounded_keys(self.keys, self.fits[0], share)
        before, cos, sin = (torch.cat(x, -2) for x in zip(*self.before, strict=True))
        rounded = rounded_keys(before, self.fits[0], share)
        return self.rotate(rounded, rounded, cos, sin)[1]


def reference(model, artifact: Artifact, recent: int = 0) -> DynamicCache:
    """An ordinary cache that rounds as the artefact says; run the model under `tagged`. Sliding layers are
    transformers' own."""
    cache, rotate = DynamicCache(config=model.config), getattr(sys.modules[type(model).__module__], NAME, None)
    for i, layer in enumerate(describe(model).served):
        cache.layers[layer] = RoundedLayer(artifact, i, recent, rotate)
    return cache
