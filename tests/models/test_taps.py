"""Keys, values and their gradients on the way to the cache, against plain autograd; and a model left as it was."""

import copy
from contextlib import nullcontext

import pytest
import torch
import torch.nn.functional as F
from families.zoo import FAMILIES, tiny
from models_tiny import VOCABULARY, tiny_llama, tokens
from torch import Tensor
from transformers import DynamicCache

from kvist.models import taps
from kvist.models.adapter import describe
from kvist.models.compat import cache_argument
from kvist.models.taps import listen, listen_back

SCALED = {  # families whose logits are scaled or capped so that it shows
    "cohere": {"logit_scale": 0.25},
    "granite": {"logits_scaling": 3.0},
    "gemma2": {"final_logit_softcapping": 5.0},
}
MANY = ["llama", "qwen3", "phi3", "gemma2", "cohere", "granite"]


def fresh(family: str):
    """A model of its own, its weights asking for gradients as they do by default."""
    model = copy.deepcopy(tiny(family, FAMILIES[family][2][-1 if family == "llama" else 0]))
    for owner in {id(m): m for m in model.modules()}.values():
        for name, value in SCALED.get(family, {}).items():
            if hasattr(owner, name):
                setattr(owner, name, value)
    for name, value in SCALED.get(family, {}).items():
        setattr(model.config, name, value)
    return model


class Kept(DynamicCache):
    """An ordinary cache that keeps what each layer's update was given."""

    def update(self, key_states, value_states, layer_idx, *args, **kwargs):
        for side, x in enumerate((key_states, value_states)):
            if x.requires_grad:
                x.retain_grad()
            self.__dict__.setdefault("given", {})[layer_idx, side] = x
        return super().update(key_states, value_states, layer_idx, *args, **kwargs)


def plain(model, ids: Tensor) -> tuple[float, dict]:
    """The loss and, by layer and side, activations and gradients, with everything in memory and no tricks."""
    model, cache = copy.deepcopy(model), Kept(config=model.config)
    logits = model(input_ids=ids, **cache_argument(cache), use_cache=True).logits
    loss = F.cross_entropy(logits[:, :-1].float().reshape(-1, logits.shape[-1]), ids[:, 1:].flatten(), reduction="sum")
    loss.backward()
    served = describe(model).served
    found = {(i, side): cache.given[layer, side] for i, layer in enumerate(served) for side in (0, 1)}
    return loss.item(), {place: (x.detach(), x.grad) for place, x in found.items()}


def heard(model, ids: Tensor) -> tuple[float, dict, list]:
    found, order = {}, []

    def note(layer, side, x, gradient):
        assert (layer, side) not in found, "told twice"
        assert not x.requires_grad and not gradient.requires_grad
        found[layer, side] = (x.clone(), gradient.clone())
        order.append(layer)

    return listen_back(model, ids, note), found, order


@pytest.mark.parametrize("pieces", [False, True], ids=["whole", "in-pieces"])
@pytest.mark.parametrize("recomputed", [False, True], ids=["kept", "recomputed"])
@pytest.mark.parametrize("family", MANY)
def test_gradients_are_those_of_plain_autograd(family, recomputed, pieces, monkeypatch):
    monkeypatch.setattr(taps, "ROOM", 0 if recomputed else 1 << 40)
    if pieces:
        monkeypatch.setattr(taps, "LOGITS", 2 * 7 * VOCABULARY)  # 7 tokens of 2 rows at a time: 29 are no multiple
    model, ids = fresh(family), tokens(2, 30)
    wanted_loss, wanted = plain(model, ids)
    loss, found, order = heard(model, ids)
    assert loss == pytest.approx(wanted_loss, rel=1e-5)
    assert found.keys() == wanted.keys() and order == sorted(order, reverse=True)
    for place, (x, gradient) in wanted.items():
        assert torch.allclose(found[place][0], x, rtol=1e-5, atol=1e-5)
        assert gradient.abs().max() > 1e-4  # else the next line says nothing
        assert (found[place][1] - gradient).abs().max() < 1e-4 * gradient.abs().max()


@pytest.mark.parametrize("family", SCALED)
def test_scaling_of_logits_matters_in_these_models(family):
    """The families above test what they say only if their loss depends on it."""
    model, plain_one, ids = fresh(family), copy.deepcopy(tiny(family, FAMILIES[family][2][0])), tokens(1, 12)
    assert heard(model, ids)[0] != pytest.approx(heard(plain_one, ids)[0], rel=1e-2)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_is_heard_in_both_ways(family):
    model, ids = tiny(family, FAMILIES[family][2][0]), tokens(1, 12)
    forward = {}
    listen(model, ids, lambda layer, side, x, gradient: forward.update({(layer, side): (x.clone(), gradient)}))
    wanted_loss, wanted = plain(model, ids)
    loss, back, _ = heard(model, ids)
    assert loss == pytest.approx(wanted_loss, rel=1e-4)
    assert forward.keys() == back.keys() == wanted.keys() and len(forward) == 2 * len(describe(model).served)
    for place, (x, gradient) in forward.items():
        assert gradient is None and torch.allclose(x, back[place][0], atol=1e-5)
        assert torch.allclose(x, wanted[place][0], atol=1e-5)
        assert (back[place][1] - wanted[place][1]).abs().max() <= 1e-3 * wanted[place][1].abs().max()


def test_half_precision_is_near(monkeypatch):
    monkeypatch.setattr(taps, "ROOM", 0)
    model, ids = tiny("llama", "sdpa", torch.bfloat16), tokens(1, 30)
    wanted = plain(tiny("llama", "sdpa"), ids)[1]
    for place, (_, gradient) in heard(model, ids)[1].items():
        exact = wanted[place][1]
        assert gradient.dtype == torch.bfloat16
        assert F.cosine_similarity(gradient.float().flatten(), exact.flatten(), dim=0) > 0.98


def test_an_unknown_head_is_refused():
    model = copy.deepcopy(tiny_llama())
    own = model.lm_head.forward

    class Doubling(torch.nn.Module):
        def forward(self, *args, **kwargs):
            out = model.base_forward(*args, **kwargs)
            out.logits = out.logits * 2
            return out

    model.base_forward = model.forward
    model.forward = Doubling().forward
    with pytest.raises(ValueError, match=r"llama makes its logits.*--sensitivity none"):
        listen_back(model, tokens(1, 12), lambda *told: None)
    assert model.lm_head.forward == own
    listen(model, tokens(1, 12), lambda *told: None)  # what needs no loss goes on


def state(model) -> list:
    """Everything about a model that listening might leave changed."""
    weights = [(w.requires_grad, w.grad is None, w.detach().clone()) for w in model.parameters()]
    parts = [
        (part.training, sorted(vars(part)), vars(part).get("forward"), dict(part._forward_hooks))
        for part in model.modules()
    ]
    return [weights, parts]


def same(a: list, b: list) -> bool:
    weights = all(x[:2] == y[:2] and torch.equal(x[2], y[2]) for x, y in zip(a[0], b[0], strict=True))
    return weights and a[1] == b[1]


@pytest.mark.parametrize("fails", ["no", "listener", "ids", "head", "forward"])
@pytest.mark.parametrize("recomputed", [False, True], ids=["kept", "recomputed"])
def test_the_model_is_left_as_it_was(recomputed, fails, monkeypatch):
    monkeypatch.setattr(taps, "ROOM", 0 if recomputed else 1 << 40)
    model, ids, listener = fresh("llama"), tokens(1, 12), lambda *told: None
    model.model.embed_tokens.weight.requires_grad_(False)  # a user's own choice
    model.model.layers[1].train()
    wrapped = model.model.layers[0].forward
    model.model.layers[0].forward = lambda *args, **kwargs: wrapped(*args, **kwargs)  # as accelerate does
    if fails == "listener":

        def listener(layer, *told):
            if layer == 0:
                raise RuntimeError("enough")

    if fails == "ids":
        ids = ids + VOCABULARY
    if fails == "head":
        monkeypatch.setattr(taps, "_head", lambda *args: 1 / 0)
    if fails == "forward":
        model.model.layers[1].mlp.forward = lambda x: 1 / 0
    before = state(model)
    assert any(weight[0] for weight in before[0]) and not all(weight[0] for weight in before[0])
    with nullcontext() if fails == "no" else pytest.raises((RuntimeError, IndexError, ZeroDivisionError)):
        listen_back(model, ids, listener)
    assert same(state(model), before)
    assert all(weight.grad is None for weight in model.parameters())


def test_no_weight_gets_a_gradient_and_a_users_own_gradients_stay(monkeypatch):
    monkeypatch.setattr(taps, "ROOM", 0)
    model = fresh("llama")
    model.lm_head.weight.grad = torch.ones_like(model.lm_head.weight)
    listen_back(model, tokens(1, 12), lambda *told: None)
    assert torch.equal(model.lm_head.weight.grad, torch.ones_like(model.lm_head.weight))
    assert all(weight.grad is None for weight in model.model.parameters())


def test_it_works_where_gradients_are_off():
    model, ids = fresh("llama"), tokens(1, 12)
    with torch.no_grad():
        loss, found, _ = heard(model, ids)
    wanted, expected = plain(model, ids)
    assert loss == pytest.approx(wanted, rel=1e-5)
    assert all(torch.allclose(found[p][1], expected[p][1], atol=1e-4) for p in expected)


def test_recomputed_layers_keep_their_inputs_only(monkeypatch):
    """Tensors saved for the way back: far fewer numbers where layers are computed again."""
    model, ids, saved = fresh("llama"), tokens(1, 30), {}
    for room in (0, 1 << 40):
        monkeypatch.setattr(taps, "ROOM", room)
        sizes, forward = [], model.model.norm.forward

        def count(x, sizes=sizes, forward=forward):
            sizes.append(True)  # the layers are done: what is saved from here on belongs to the head
            return forward(x)

        model.model.norm.forward = count
        kept = []
        with torch.autograd.graph.saved_tensors_hooks(
            lambda x, kept=kept, sizes=sizes: kept.append(0 if sizes else x.numel()) or x, lambda x: x
        ):
            listen_back(model, ids, lambda *told: None)
        saved[room] = sum(kept)
        del model.model.norm.forward
    assert saved[0] < saved[1 << 40] / 5
