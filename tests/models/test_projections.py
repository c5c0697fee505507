"""Where keys and values come from, in every family, and the norms of their weights' gradients against autograd."""

import copy

import pytest
import torch
import torch.nn.functional as F
from families.zoo import FAMILIES, tiny
from models_tiny import tiny_llama, tokens
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel

from kvist.models import taps
from kvist.models.adapter import describe
from kvist.models.projections import projections, weight_gradients
from kvist.models.taps import listen_back

FUSED = {  # columns of keys and of values, from the published layouts
    "phi3": (range(128, 192), range(192, 256)),  # queries, keys, values side by side
    "dbrx": (range(64, 96), range(96, 128)),
    "falcon-multi-query": (range(64, 80), range(80, 96)),
    # query, key and value of each head in turn
    "falcon-many-heads": ([48 * h + 16 + i for h in range(4) for i in range(16)],
                          [48 * h + 32 + i for h in range(4) for i in range(16)]),
    # two queries, one key, one value per group
    "falcon-new": ([64 * g + 32 + i for g in range(2) for i in range(16)],
                   [64 * g + 48 + i for g in range(2) for i in range(16)]),
}  # fmt: skip


def heard(model, ids) -> dict:
    found: dict = {}

    def told(layer: int, side: int, norm: float) -> None:
        assert (layer, side) not in found, "told twice"
        found[layer, side] = norm

    with weight_gradients(projections(model), told):
        listen_back(model, ids, lambda *others: None)
    return found


def plain(model, ids, rows: bool = True) -> dict:
    """The same from weights that keep their gradients."""
    model = copy.deepcopy(model)
    for weight in model.parameters():
        weight.requires_grad_(True)
    sources = projections(model)
    logits = model(input_ids=ids, use_cache=False).logits
    F.cross_entropy(logits[:, :-1].float().flatten(0, 1), ids[:, 1:].flatten(), reduction="sum").backward()
    gradient = {
        (layer, side): source.module.weight.grad
        for layer, pair in enumerate(sources)
        for side, source in enumerate(pair)
    }
    columns = {(layer, side): source.columns for layer, pair in enumerate(sources) for side, source in enumerate(pair)}
    return {place: (g[columns[place]] if rows else g[:, columns[place]]).norm().item() for place, g in gradient.items()}


@pytest.mark.parametrize("family", FAMILIES)
def test_norms_are_those_of_autograd(family):
    model, ids = tiny(family, FAMILIES[family][2][0]), tokens(2, 30)
    found, wanted = heard(model, ids), plain(model, ids)
    assert found.keys() == wanted.keys() and len(found) == 2 * len(describe(model).served)
    for place, norm in wanted.items():
        assert norm > 0 and found[place] == pytest.approx(norm, rel=1e-4)


@pytest.mark.parametrize("family", FAMILIES)
def test_where_keys_and_values_come_from(family):
    model = tiny(family, FAMILIES[family][2][0])
    names = {module: name for name, module in model.named_modules()}
    for layer, (keys, values) in zip(describe(model).served, projections(model), strict=True):
        if family in FUSED:
            assert keys.module is values.module
            wanted = FUSED[family]
        else:
            assert names[keys.module].endswith(f"{layer}.self_attn.k_proj")
            assert names[values.module].endswith(f"{layer}.self_attn.v_proj")
            wanted = (range(keys.module.out_features), range(values.module.out_features))
        assert [source.columns.tolist() for source in (keys, values)] == [list(columns) for columns in wanted]


def test_weights_that_lie_the_other_way():
    """GPT-2 keeps its fused projection transposed."""
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=101, n_embd=32, n_layer=2, n_head=2, bos_token_id=None, eos_token_id=None)
    model, ids = GPT2LMHeadModel(config).eval(), tokens(1, 20)
    found, wanted = heard(model, ids), plain(model, ids, rows=False)
    assert {place: pytest.approx(norm, rel=1e-4) for place, norm in wanted.items()} == found
    assert [source.columns.tolist() for source in projections(model)[1]] == [list(range(32, 64)), list(range(64, 96))]


def test_layers_computed_again_tell_the_same(monkeypatch):
    model, ids = tiny("phi3", "sdpa"), tokens(1, 30)
    kept = heard(model, ids)
    monkeypatch.setattr(taps, "ROOM", 0)
    assert heard(model, ids) == {place: pytest.approx(norm, rel=1e-5) for place, norm in kept.items()}


def test_no_weight_gets_a_gradient_and_no_hook_stays():
    model = copy.deepcopy(tiny_llama()).requires_grad_(True)
    heard(model, tokens(1, 20))
    assert all(weight.grad is None and weight.requires_grad for weight in model.parameters())
    assert not any(module._forward_hooks for module in model.modules())


@pytest.mark.parametrize("first", [0, 1])
def test_keys_that_come_from_no_linear_map_are_refused(first):
    model = copy.deepcopy(tiny_llama())

    class Squared(nn.Module):
        def __init__(self, inner: nn.Linear):
            super().__init__()
            self.weight = inner.weight

        def forward(self, x):
            return x @ self.weight.square().T

    for layer in model.model.layers[first:]:  # what ran before the layer is not mistaken for its projection
        layer.self_attn.v_proj = Squared(layer.self_attn.v_proj)
    with pytest.raises(ValueError, match=rf"values of layer {first} .* merge adapters"):
        projections(model)
