"""Scores against the model's own loss, against plain caches, and against each other."""

import pytest
import torch
import torch.nn.functional as F
from fitted import artifact
from kvist.evaluate.perplexity import MODES, compare, measure, packed_bits
from models_tiny import tiny_llama, tokens
from oracle import OracleCache

import kvist
from kvist.evaluate import perplexity
from kvist.evaluate.simulate import Simulated
from kvist.methods import parse
from kvist.methods.kvquant import recipe as fitted_recipe
from kvist.methods.parts import per_token
from kvist.models.adapter import describe
from kvist.plan import LayerPlan, Recipe, Side
from kvist.retention import Immediate

LENGTH = 150


def integers(bits: int) -> Recipe:
    side = Side(codec=per_token(bits), retention=Immediate())
    return Recipe(name=f"int{bits}", layers=(LayerPlan(key=side, value=side),))


def plain(ids, exact, logits) -> tuple[float, float, float]:
    """What `compare` should say of one window, in fp64 and at once."""
    p, q = exact[:-1].double().softmax(-1), logits[:-1].double().softmax(-1)
    kl = (p * (p / q).log()).sum(-1).mean()
    agreed = (exact[:-1].argmax(-1) == logits[:-1].argmax(-1)).double().mean()
    return float(F.cross_entropy(logits[:-1].double(), ids[1:], reduction="sum")), float(kl), float(agreed)


@torch.no_grad()
def test_nll_is_the_loss_of_the_model():
    model, ids = tiny_llama(), tokens(3, LENGTH)
    for mode in MODES:
        for score in measure(model, ids, [parse("exact")], mode):
            window = ids[score.window : score.window + 1]
            loss = float(model(window, labels=window).loss)
            assert score.nll / score.tokens == pytest.approx(loss, rel=1e-5)
            assert (score.tokens, score.kl, score.agreement) == (LENGTH - 1, 0.0, 1.0)


def test_exact_is_the_same_in_both_modes():
    model, ids = tiny_llama(), tokens(2, LENGTH)
    first, second = ([s.nll for s in measure(model, ids, [parse("exact")], mode)] for mode in MODES)
    assert first == second


@pytest.mark.parametrize("mode", MODES)
def test_divergence_falls_with_bits(mode):
    scores = list(measure(tiny_llama(), tokens(1, LENGTH), [integers(b) for b in (8, 4, 2)], mode))
    assert 0 < scores[0].kl < 0.01 * scores[1].kl
    assert scores[1].kl < 0.5 * scores[2].kl and scores[0].agreement > scores[2].agreement


@torch.no_grad()
def test_simulated_reads_what_the_codec_makes_of_every_token():
    model, ids, recipe = tiny_llama(), tokens(1, LENGTH), parse("int4")
    (score,) = measure(model, ids, [recipe], "simulated")
    logits = model(ids, past_key_values=Simulated(model, recipe)).logits
    assert (score.nll, score.kl, score.agreement) == pytest.approx(plain(ids[0], model(ids).logits[0], logits[0]), 1e-5)


@torch.no_grad()
@pytest.mark.parametrize("method", ["int4", "hadamard:4", "kivi:4 recent=32", "streaming:4 window=32", "fitted"])
def test_stored_reads_what_a_cache_holds(method):
    """The oracle keeps plain tensors, and decides by itself which tokens are packed when."""
    model, ids = tiny_llama(), tokens(2, LENGTH)
    recipe = fitted_recipe(artifact()) if method == "fitted" else parse(method)
    recipe = recipe.model_copy(update={"prefill": "stored"})
    for score in measure(model, ids, [recipe], "stored"):
        window = ids[score.window : score.window + 1]
        exact, logits = model(window).logits, model(window, past_key_values=OracleCache(recipe, 2)).logits
        # rounding may tip a code over to its neighbour in the second layer
        nll, kl, _ = plain(window[0], exact[0], logits[0])
        assert score.nll == pytest.approx(nll, abs=0.02 * score.tokens * score.kl)
        assert score.kl == pytest.approx(kl, rel=0.02) and score.kl > 1e-6


def test_simulated_leaves_no_window_and_stored_does():
    recipe, ids = parse("int4"), tokens(1, 40)
    simulated, stored = (next(measure(tiny_llama(), ids, [recipe], mode)) for mode in MODES)
    assert simulated.kl > 2 * stored.kl > 0  # of 40 tokens, the newest 32 are still exact


@torch.no_grad()
def test_packed_attention_reads_the_same():
    model, ids, recipe = tiny_llama(), tokens(1, LENGTH), parse("int8").model_copy(update={"prefill": "stored"})
    (score,) = measure(model, ids, [recipe], "stored")
    with kvist.attach(model):
        logits = model(ids, past_key_values=kvist.Cache(model, recipe)).logits
    nll, kl, _ = plain(ids[0], model(ids).logits[0], logits[0])
    assert score.nll == pytest.approx(nll, rel=1e-4) and score.kl == pytest.approx(kl, rel=0.05)


def test_bits():
    model, facts = tiny_llama(), describe(tiny_llama())
    assert packed_bits(parse("int4"), facts) == 4 + 32 / 32  # two fp16 numbers per head of 32
    assert packed_bits(parse("kivi k=2 v=4"), facts) == (2 + 4) / 2 + 32 / 32
    assert packed_bits(parse("exact"), facts) == 32
    recipe = parse("kivi:2")
    limit = recipe.bits_per_element(facts.shape, 2, 1 << 22)
    assert packed_bits(recipe, facts) == pytest.approx(limit, rel=5e-3)  # which has page tables, too
    (score,) = measure(model, tokens(1, LENGTH), [recipe], "stored")
    assert score.bits == recipe.bits_per_element(facts.shape, 2, LENGTH)


def test_batches_give_the_same_scores():
    recipes, ids = [parse("int4"), parse("kivi:2 recent=32")], tokens(5, LENGTH)
    for mode in MODES:
        alone = {(s.recipe, s.window): s for s in measure(tiny_llama(), ids, recipes, mode)}
        together = {(s.recipe, s.window): s for s in measure(tiny_llama(), ids, recipes, mode, batch=3)}
        assert alone.keys() == together.keys() == {(i, n) for i in range(2) for n in range(5)}
        for at, score in alone.items():
            assert together[at].kl == pytest.approx(score.kl, rel=0.05)
            assert together[at].nll == pytest.approx(score.nll, rel=1e-3)
            assert together[at].bits == score.bits


def test_only_what_is_wanted_is_computed():
    model, forwards = tiny_llama(), []
    handle = model.register_forward_hook(lambda *_: forwards.append(1))
    recipes = [parse("int4"), parse("int8")]
    scores = list(measure(model, tokens(4, 40), recipes, "stored", wanted=lambda i, n: (i, n) == (1, 2)))
    handle.remove()
    assert [(s.recipe, s.window) for s in scores] == [(1, 2)] and len(forwards) == 2  # one of them exact


def test_compare(monkeypatch):
    # two tokens: p = (1/4, 3/4), q = (1/2, 1/2), and the second token was drawn
    ids, exact = torch.tensor([0, 1]), torch.tensor([[0.0, torch.tensor(3.0).log()]] * 2)
    nll, kl, agreed = compare(ids, exact, torch.tensor([[1e-6, 0.0]] * 2))
    assert nll == pytest.approx(0.693147, abs=1e-5) and agreed == 0
    assert kl == pytest.approx(0.25 * 0.693147 * -1 + 0.75 * 0.405465, abs=1e-5)
    ids = tokens(1, 30)[0]
    exact, other = (torch.randn(30, 101) for _ in range(2))
    whole = compare(ids, exact, other)
    assert whole == pytest.approx(plain(ids, exact, other), rel=1e-5)
    for chunk in (1, 300):
        monkeypatch.setattr(perplexity, "CHUNK", chunk)
        assert compare(ids, exact, other) == pytest.approx(whole, rel=1e-6)


def test_the_cache_lets_go_of_the_model():
    model = tiny_llama()
    before = len(model._forward_pre_hooks)
    list(measure(model, tokens(1, 40), [parse("int4")], "stored"))
    assert len(model._forward_pre_hooks) == before


def test_refusals_come_before_any_work():
    model, ids = tiny_llama(), tokens(1, 20)
    with pytest.raises(ValueError, match="a mode is"):
        measure(model, ids, [parse("int4")], "both")  # pyright: ignore[reportArgumentType]
    for mode in MODES:
        with pytest.raises(ValueError, match="3 layers"):
            measure(model, ids, [parse("kvmix k=2,3,4 v=2,3,4")], mode)
    with pytest.raises(ValueError, match="needs"):
        measure(model, ids, [parse("kvquant")], "simulated")
