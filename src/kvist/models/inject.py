"""Outliers put into a model without changing what it computes: a stress test whose right answer is known.

Small models lack the huge key channels of large ones. Attention leaves freedom to make them: a pair of key channels
that RoPE turns together may be scaled up if the same pair of every query that reads it is scaled down, because the
scaling commutes with the turning; and values may be mapped by any invertible matrix whose inverse goes into the output
projection. Keys and values in the cache change, logits do not.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from kvist.models.adapter import describe
from kvist.models.rope import rotary

TOLERANCE = 1e-4  # of logits
TEST = (2, 48)  # rows and tokens of the input that logits are compared on
PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj")


@dataclass(frozen=True)
class Strength:
    """pairs: RoPE pairs of channels of each KV head that are scaled, at most a quarter of them, by factors spaced
    evenly in the logarithm from `least` to `most`. condition: largest over smallest singular value of the values' map.
    """

    pairs: int
    least: float
    most: float
    condition: float


STRENGTHS = {
    "mild": Strength(pairs=1, least=8.0, most=8.0, condition=4.0),
    "strong": Strength(pairs=4, least=8.0, most=30.0, condition=16.0),
}


@torch.no_grad()
def inject(model: nn.Module, strength: Literal["mild", "strong"], seed: int = 0) -> nn.Module:
    """Change the projections of every served layer of `model` in place, and return it. fp32 only; round afterwards.

    Keys: drawn pairs of each KV head times their factor, bias included; those pairs of the head's queries divided by
    it. Values (and bias): v becomes D Q v per KV head, Q a random rotation and D a diagonal whose entries run from
    condition^-1/2 to condition^1/2, so channels' ranges differ; its inverse goes into the output projection. The same
    seed draws the same. Logits of a random input are compared before and after.

    Raises ValueError, with the model as it was, where it cannot be done or logits move by more than 1e-4.
    """
    if strength not in STRENGTHS:
        raise ValueError(f"expected strength {' or '.join(STRENGTHS)}, found {strength!r}")
    facts, amount = describe(model), STRENGTHS[strength]
    layers = list(_layers(model))
    turned = rotary(model)
    count = len(turned.frequencies)
    first = torch.arange(count) if turned.style == "half" else 2 * torch.arange(count)
    mates = torch.stack([first, first + (count if turned.style == "half" else 1)], -1)  # (F, 2) channels
    generator = torch.Generator().manual_seed(seed)
    before = _logits(model, seed)
    kept = [parameter.clone() for layer in layers for parameter in layer.parameters()]
    for layer in layers:
        scale = _scales(amount, mates, facts.shape.heads, facts.shape.key_dim, generator)
        maps = _maps(amount, facts.shape.heads, facts.shape.value_dim, generator)
        _rewrite(layer, scale, maps, facts.query_heads // facts.shape.heads)
    error = (_logits(model, seed) - before).abs().max().item()
    if not error < TOLERANCE:
        for parameter, old in zip((p for layer in layers for p in layer.parameters()), kept, strict=True):
            parameter.copy_(old)
        raise ValueError(
            f"{facts.name}: logits moved by {error:.2g}, expected less than {TOLERANCE:g}; its attention does "
            "something between the projections that outliers do not commute with"
        )
    return model


def rounded(model: nn.Module, dtype: torch.dtype) -> nn.Module:
    """Change the parameters of `model` to another precision, and return it. Buffers, rotary frequencies among them,
    stay as they are, as when a model is loaded in that precision."""
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype)
    return model


def _layers(model: nn.Module) -> Iterator[nn.Module]:
    """The attention modules of the served layers, in order, if each is one that can be rewritten."""
    facts = describe(model)
    text = model.config.get_text_config(decoder=True)  # pyright: ignore[reportCallIssue, reportAttributeAccessIssue]
    if getattr(text, "clip_qkv", None) is not None:
        raise ValueError(f"{facts.name} clips its keys and values (clip_qkv), so outliers would change its logits")
    attentions: dict[int, nn.Module] = {
        getattr(part, "layer_idx", -1): part for part in model.modules() if "attention" in type(part).__name__.lower()
    }
    query, key = facts.query_heads * facts.shape.key_dim, facts.shape.heads * facts.shape.key_dim
    for layer in facts.served:
        parts = dict(attentions[layer].named_children()) if layer in attentions else {}
        if missing := [name for name in PROJECTIONS if not isinstance(parts.get(name), nn.Linear)]:
            raise ValueError(
                f"{facts.name}: layer {layer} has no linear {', '.join(missing)} (fused or wrapped projections?); "
                "outliers are put into separate q_proj, k_proj, v_proj and o_proj only"
            )
        if others := [name for name, part in parts.items() if name not in PROJECTIONS and [*part.parameters()]]:
            raise ValueError(
                f"{facts.name}: layer {layer} has {', '.join(others)} beside its projections (QK-norm?), which would "
                "take outliers out again or change logits"
            )
        weights = [parts[name].get_parameter("weight") for name in PROJECTIONS]
        if found := {w.dtype for w in weights if w.dtype != torch.float32 or w.is_meta}:
            raise ValueError(
                f"{facts.name}: expected projections in fp32 with data, found {', '.join(map(str, found))} at layer "
                f"{layer}; load the model with dtype=torch.float32 and round it afterwards"
            )
        if [w.shape[0] for w in weights[:3]] != [query, key, key] or weights[3].shape[1] != query:
            raise ValueError(f"{facts.name}: layer {layer}'s projections are not heads times head size")
        yield attentions[layer]


def _logits(model: nn.Module, seed: int) -> Tensor:
    """Logits (fp64) of a random input, in evaluation mode; modes are put back."""
    device = next(model.parameters()).device
    vocabulary = model.get_input_embeddings().weight.shape[0]  # pyright: ignore[reportCallIssue]
    ids = torch.randint(vocabulary, TEST, generator=torch.Generator().manual_seed(seed)).to(device)
    modes = [(part, part.training) for part in model.modules()]
    model.eval()
    try:
        return model(ids, use_cache=False)[0].double()
    finally:
        for part, training in modes:
            part.training = training


def _scales(amount: Strength, mates: Tensor, heads: int, dim: int, generator: torch.Generator) -> Tensor:
    """Factors of the keys' channels (heads, dim), fp64: 1 but for the drawn pairs."""
    scale = torch.ones(heads, dim, dtype=torch.float64)
    count = max(1, min(amount.pairs, len(mates) // 4))
    factors = torch.logspace(0, 1, count, base=amount.least / amount.most, dtype=torch.float64) * amount.most
    for head in range(heads):
        drawn = torch.randperm(len(mates), generator=generator)[:count]
        scale[head, mates[drawn]] = factors.unsqueeze(-1)
    return scale


def _maps(amount: Strength, heads: int, dim: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """D Q of every KV head and its inverse, each (heads, dim, dim), fp64."""
    noise = torch.randn(heads, dim, dim, generator=generator, dtype=torch.float64)
    rotation, triangle = torch.linalg.qr(noise)
    rotation = rotation * triangle.diagonal(dim1=-2, dim2=-1).sign().unsqueeze(-2)  # drawn evenly from all rotations
    spread = torch.linspace(-0.5, 0.5, dim, dtype=torch.float64)
    order = torch.stack([torch.randperm(dim, generator=generator) for _ in range(heads)])
    diagonal = amount.condition ** spread[order]
    return diagonal.unsqueeze(-1) * rotation, rotation.mT / diagonal.unsqueeze(-2)


def _rewrite(layer: nn.Module, scale: Tensor, maps: tuple[Tensor, Tensor], group: int) -> None:
    """One layer's projections; products in fp64, so that each weight is rounded once."""
    query, key, value, output = (getattr(layer, name) for name in PROJECTIONS)
    for projection, factor in ((query, 1 / scale.repeat_interleave(group, 0)), (key, scale)):
        for parameter in (projection.weight, projection.bias):
            if parameter is not None:
                rows = factor.flatten().to(parameter.device)
                parameter.copy_(parameter.double() * (rows.unsqueeze(-1) if parameter.dim() == 2 else rows))
    forward, back = (m.to(value.weight.device) for m in maps)
    value.weight.copy_((forward @ value.weight.double().unflatten(0, forward.shape[:2])).flatten(0, 1))
    if value.bias is not None:
        value.bias.copy_((forward @ value.bias.double().unflatten(0, forward.shape[:2]).unsqueeze(-1)).flatten())
    back = back.repeat_interleave(group, 0).to(output.weight.device)
    columns = output.weight.double().unflatten(1, back.shape[:2])  # (hidden, query heads, D)
    output.weight.copy_(torch.einsum("ohd,hde->ohe", columns, back).flatten(1))
