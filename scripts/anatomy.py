"""What makes a model's cache hard to code, measured: attention sinks, outlier channels, constant offsets.

Sinks: tokens that most attention goes to and that must be exact (StreamingLLM, arXiv 2309.17453). Channels: keys have a
few large ones, which make ranges along tokens wide (KIVI, arXiv 2402.02750); biases of the projections make constant
ones. Keys are taken as they are cached, after the rotary embedding.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from kvist.models.adapter import describe
from kvist.models.taps import listen

BEHIND = 64  # positions: queries up to here have few tokens to choose from
SINK = 0.3  # of a head's attention: more on the first token, and it is called a sink
SIDES = ("keys", "values")


@torch.no_grad()
def anatomy(model, windows: Tensor) -> dict[str, Any]:
    """Sinks and outliers of a model on tokens int64 (n, T), T > 65, as JSON: a list of one number per served layer
    each, and a summary.

    sinks: `mass`, the mean attention that queries beyond position 64 pay to the first token; `heads`, the share of
    heads where it is more than 0.3. keys, values: over the channels of all KV heads, `largest`, the greatest mean
    |x| over the median channel's; `offset`, the greatest |mean| over standard deviation, of each channel over tokens.
    Raises ValueError for short windows, and where a model shows no attention weights.
    """
    count, length = windows.shape
    if length <= BEHIND + 1:
        raise ValueError(f"sinks are measured beyond position {BEHIND}; windows have {length} tokens, give longer ones")
    facts = describe(model)
    layers = range(len(facts.served))
    zeros = partial(torch.zeros, dtype=torch.float64, device=model.device)
    mass = [zeros(facts.query_heads) for _ in layers]
    widths = [facts.shape.heads * dim for dim in (facts.shape.key_dim, facts.shape.value_dim)]
    sums = [[zeros(3, width) for width in widths] for _ in layers]

    def weigh(layer: int, weights: Tensor) -> None:
        mass[layer] += weights[..., BEHIND + 1 :, 0].double().mean((0, 2)) / count

    def hear(layer: int, side: int, x: Tensor, _: Tensor | None) -> None:
        x = x.transpose(1, 2).flatten(0, 1).flatten(1).double()  # (B T, H D)
        sums[layer][side] += torch.stack([x, x.abs(), x.square()]).mean(1) / count

    with _weighing(model, facts.served, weigh):
        for window in windows.to(model.device):
            listen(model, window[None], hear)
    found = {
        "queries": facts.query_heads,
        "sinks": {
            "mass": [_round(layer.mean()) for layer in mass],
            "heads": [_round((layer > SINK).double().mean()) for layer in mass],
        },
    }
    for side, name in enumerate(SIDES):
        moments = [layer[side] for layer in sums]
        found[name] = {
            "largest": [_round(size.max() / size.median().clamp_min(1e-12)) for _, size, _ in moments],
            "offset": [
                _round((mean.abs() / (square - mean.square()).clamp_min(1e-12).sqrt()).max())
                for mean, _, square in moments
            ],
        }
    return found | {"summary": _summary(found)}


def sentences(found: dict[str, Any]) -> list[str]:
    """What `anatomy` found, to print."""
    summary = found["summary"]
    lines = [
        f"the first token draws {summary['sink_mass']:.0%} of all attention beyond position {BEHIND}; it is a sink "
        f"(more than {SINK:.0%}) in {summary['sink_heads']:.0%} of the heads"
    ]
    for name in SIDES:
        lines.append(
            f"{name}: the largest channel is {summary[f'{name}_largest']:.1f} times the median one, the most constant "
            f"one {summary[f'{name}_offset']:.1f} standard deviations from zero"
        )
    return lines


def _summary(found: dict[str, Any]) -> dict[str, float]:
    """Means over layers of the sinks, and the greatest of all layers for the channels."""
    mean = {f"sink_{name}": _round(sum(values) / len(values)) for name, values in found["sinks"].items()}
    return mean | {f"{side}_{name}": max(values) for side in SIDES for name, values in found[side].items()}


@contextmanager
def _weighing(model, served: list[int], weigh) -> Iterator[None]:
    """Attention weights (B, H, T, T) of each served layer are told while the model runs, and not kept."""
    modules: dict[int, nn.Module] = {
        getattr(part, "layer_idx", -1): part for part in model.modules() if "attention" in type(part).__name__.lower()
    }
    if missing := [layer for layer in served if layer not in modules]:
        raise ValueError(f"{model.config.model_type}: no attention module found for layers {missing}")

    def tell(layer: int, module: nn.Module, arguments, out) -> None:
        weights = out[1] if isinstance(out, tuple) and len(out) > 1 else None
        if weights is None:
            raise ValueError(f"{model.config.model_type} gives no attention weights, even with eager attention")
        weigh(layer, weights)

    before = model.config._attn_implementation
    model.set_attn_implementation("eager")
    hooks = [modules[layer].register_forward_hook(partial(tell, i)) for i, layer in enumerate(served)]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
        model.set_attn_implementation(before)


def _round(x: Tensor | float) -> float:
    return round(float(x), 4)
