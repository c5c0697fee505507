"""Scores per token against the model's own loss, against plain caches, and against each other."""

import pytest
import torch
import torch.nn.functional as F
from fitted import artifact
from models_tiny import tiny_llama, tokens
from oracle import OracleCache

import kvist
from kvist.evaluate import tokenwise
from kvist.evaluate.contenders import Contender, contender, fill, floors, parted
from kvist.evaluate.simulate import Simulated
from kvist.evaluate.tokenwise import MODES, Tokens, compared, exact, packed_bits, score
from kvist.methods import parse
from kvist.methods.kvquant import recipe as fitted_recipe
from kvist.methods.parts import per_token
from kvist.models.adapter import describe
from kvist.models.compat import cache_argument
from kvist.plan import LayerPlan, Recipe, Side
from kvist.retention import Immediate

LENGTH = 150


def integers(bits: int) -> Recipe:
    side = Side(codec=per_token(bits), retention=Immediate())
    return Recipe(name=f"int{bits}", layers=(LayerPlan(key=side, value=side),))


def named(method: str) -> Contender:
    return Contender("fitted", recipe=fitted_recipe(artifact())) if method == "fitted" else contender(method)


def scores(ids, methods, mode="stored", step=None, prompt=0, **known):
    model = tiny_llama()
    every = [named(each) if isinstance(each, str) else each for each in methods]
    return list(score(model, exact(model, ids, prompt, **known), every, mode, step))


def plain(ids, first, logits) -> Tokens:
    """What `compared` should say of windows, in fp64 and at once."""
    p, q = first[:, :-1].double().softmax(-1), logits[:, :-1].double().softmax(-1)
    nll = -q.log().gather(-1, ids[:, 1:, None])[..., 0]
    return Tokens((p * (p / q).log()).sum(-1), nll, first[:, :-1].argmax(-1) == logits[:, :-1].argmax(-1))


def same(found: Tokens, expected: Tokens, rel: float = 1e-3) -> None:
    assert found.kl.mean() == pytest.approx(expected.kl.mean().item(), rel=rel, abs=1e-8)
    assert torch.allclose(found.nll, expected.nll, rtol=rel, atol=rel)
    assert (found.same == expected.same).double().mean() > 0.98


@torch.no_grad()
def test_nll_is_the_loss_of_the_model():
    model, ids = tiny_llama(), tokens(3, LENGTH)
    for mode in MODES:
        (found,) = scores(ids, ["exact"], mode)
        losses = [float(model(window[None], labels=window[None]).loss) for window in ids]
        assert found.tokens.nll.mean(1).tolist() == pytest.approx(losses, rel=1e-5)
        assert found.tokens.nll.shape == (3, LENGTH - 1) and not found.tokens.kl.any() and found.tokens.same.all()


@pytest.mark.parametrize("mode", MODES)
def test_divergence_falls_with_bits(mode):
    made = [Contender(f"int{b}", recipe=integers(b)) for b in (8, 4, 2)]
    kls = [found.tokens.kl.mean() for found in scores(tokens(1, LENGTH), made, mode)]
    assert 0 < kls[0] < 0.01 * kls[1] and kls[1] < 0.5 * kls[2]


@torch.no_grad()
def test_simulated_reads_what_the_codec_makes_of_every_token():
    model, ids, recipe = tiny_llama(), tokens(1, LENGTH), parse("int4")
    (found,) = scores(ids, ["int4"], "simulated")
    same(
        found.tokens, plain(ids, model(ids).logits, model(ids, **cache_argument(Simulated(model, recipe))).logits), 1e-5
    )
    assert found.packed.all()


ORACLE = ["int4", "hadamard:4", "kivi:4 recent=32", "streaming:4 window=32", "logquant:2 window=32", "fitted"]


@torch.no_grad()
@pytest.mark.parametrize("method", ORACLE)
def test_one_update_reads_what_a_cache_holds(method):
    """The oracle keeps plain tensors, and decides by itself which tokens are packed when."""
    model, ids, recipe = tiny_llama(), tokens(2, LENGTH), named(method).recipe
    (found,) = scores(ids, [method])
    oracle = OracleCache(recipe.model_copy(update={"prefill": "stored"}), 2)
    expected = plain(ids, model(ids).logits, model(ids, **cache_argument(oracle)).logits)
    # rounding may tip a code over to its neighbour in the second layer
    assert found.tokens.kl.mean() == pytest.approx(expected.kl.mean().item(), rel=0.02)
    assert found.tokens.kl.mean() > 1e-6
    assert found.tokens.nll.sum() == pytest.approx(expected.nll.sum().item(), rel=1e-3)


@torch.no_grad()
@pytest.mark.parametrize("prompt", [0, 70])
@pytest.mark.parametrize("method", ORACLE)
def test_steps_read_what_a_cache_holds(method, prompt):
    """A prompt whose keys and values are exact, and updates of 32 behind it."""
    model, ids, recipe = tiny_llama(), tokens(2, LENGTH), named(method).recipe
    (found,) = scores(ids, [method], step=32, prompt=prompt)
    oracle, parts = OracleCache(recipe, 2), []
    starts = ([0] if prompt else []) + list(range(prompt, LENGTH, 32))
    for start, end in zip(starts, [*starts[1:], LENGTH], strict=True):
        parts.append(model(ids[:, start:end], **cache_argument(oracle)).logits)
    expected = plain(ids, model(ids).logits, torch.cat(parts, 1))
    expected = Tokens(*(x[:, prompt:] for x in expected))
    assert found.tokens.kl.shape == (2, LENGTH - prompt - 1)
    assert found.tokens.kl.mean() == pytest.approx(expected.kl.mean().item(), rel=0.02, abs=1e-8)
    assert found.tokens.nll.sum() == pytest.approx(expected.nll.sum().item(), rel=1e-3)


def test_nothing_diverges_before_anything_is_packed():
    (found,) = scores(tokens(2, LENGTH), ["kivi:2 recent=64"], step=16)
    assert 64 <= (~found.packed).sum() < LENGTH - 1
    assert found.tokens.kl[:, ~found.packed].max() < 1e-6 < found.tokens.kl[:, found.packed].mean()


def test_the_exact_cache_never_diverges():
    for step, prompt in ((1, 140), (32, 0), (7, 30)):
        (found,) = scores(tokens(2, LENGTH), ["exact"], step=step, prompt=prompt)
        assert found.tokens.kl.max() < 1e-6 and found.tokens.same.all()


def test_padding_and_chunks_of_the_prompt_change_nothing():
    ids, methods = tokens(2, LENGTH), ["int4", "kivi:2 recent=32", "fitted"]
    alone = scores(ids, methods, step=16, prompt=64)
    for changed in ({"padding": 5}, {"chunk": 20}):
        for a, b in zip(alone, scores(ids, methods, step=16, prompt=64, **changed), strict=True):
            same(b.tokens, a.tokens, 0.02)


def test_floors():
    model, ids = tiny_llama(), tokens(2, LENGTH)
    other, single = floors(model.dtype)
    found = scores(ids, [other, single], step=32)
    assert other.floor == "bfloat16" and floors(torch.bfloat16)[0].floor == "float16"
    assert found[0].tokens.kl.mean() > 1e-7 and found[1].tokens.kl.mean() < 1e-9
    assert model.dtype == torch.float32 and not found[0].packed.any()


def test_one_side_at_a_time():
    ids = tokens(2, LENGTH)
    both, keys, values = scores(ids, parted([contender("int4")], ("both", "keys", "values")), step=32)
    kls = [each.tokens.kl.mean() for each in (both, keys, values)]
    assert max(kls[1:]) > 0 and max(kls[1:]) < 1.5 * kls[0] and kls[0] < 3 * (kls[1] + kls[2])
    assert keys.bits == values.bits > both.bits


@pytest.mark.parametrize("method", ["int4", "kivi:2 recent=32", "logquant:2 window=32", "fitted"])
def test_the_other_side_is_stored_as_it_comes(method):
    model, last = tiny_llama(), 2 * LENGTH - 1
    states = exact(model, tokens(2, last + 2), last + 1).states
    for part, raw in (("keys", 1), ("values", 0)):
        cache = named(method).of(part).cache(model, last + 1)
        fill(cache, [(keys[:, :, :last], values[:, :, :last]) for keys, values in states], None)
        cache.announce(2, 1, None)
        for layer, given in enumerate(states):
            read = cache.update(*(x[:, :, last:] for x in given), layer)
            assert torch.equal(read[raw], given[raw]) and not torch.equal(read[1 - raw], given[1 - raw])
        cache.close()


def test_parts():
    methods = [contender(text) for text in ("exact", "int4")]
    for parts, expected in (
        (("both",), ["both", "both"]),
        (("keys",), ["both", "keys"]),
        (("values", "both"), ["both", "both", "values"]),
    ):
        assert [each.part for each in parted(methods, parts)] == expected
    assert len({each.digest for each in parted(methods[1:], ("both", "keys", "values"))}) == 3


@torch.no_grad()
def test_packed_attention_reads_the_same():
    model, ids, recipe = tiny_llama(), tokens(1, LENGTH), parse("int8").model_copy(update={"prefill": "stored"})
    (found,) = scores(ids, ["int8"])
    with kvist.attach(model):
        logits = model(ids, **cache_argument(kvist.Cache(model, recipe))).logits
    assert found.tokens.kl.mean() == pytest.approx(plain(ids, model(ids).logits, logits).kl.mean().item(), rel=0.05)


def test_bits():
    facts = describe(tiny_llama())
    assert packed_bits(parse("int4"), facts) == 4 + 32 / 32  # two fp16 numbers per head of 32
    assert packed_bits(parse("kivi k=2 v=4"), facts) == (2 + 4) / 2 + 32 / 32
    assert packed_bits(parse("exact"), facts) == 32
    recipe = parse("kivi:2")
    assert packed_bits(recipe, facts) == pytest.approx(recipe.bits_per_element(facts.shape, 2, 1 << 22), rel=5e-3)
    (found,) = scores(tokens(1, LENGTH), ["kivi:2"])
    assert found.bits == recipe.bits_per_element(facts.shape, 2, LENGTH)
    (found,) = scores(tokens(1, LENGTH), ["kivi:2"], "simulated")
    assert found.bits == packed_bits(recipe, facts)


def test_batches_give_the_same_scores():
    methods, ids = ["int4", "kivi:2 recent=32"], tokens(3, LENGTH)
    for mode, step in (("simulated", None), ("stored", None), ("stored", 32)):
        together = scores(ids, methods, mode, step)
        for row in range(3):
            for a, b in zip(together, scores(ids[row : row + 1], methods, mode, step), strict=True):
                assert a.tokens.kl[row].mean() == pytest.approx(b.tokens.kl[0].mean().item(), rel=0.05)
                assert a.tokens.nll[row].sum() == pytest.approx(b.tokens.nll[0].sum().item(), rel=1e-3)
                assert a.bits == b.bits


def test_compared_by_hand(monkeypatch):
    # p = (1/4, 3/4), q = (1/2, 1/2), and the second token came
    known = tokenwise.Reference(
        torch.tensor([[0, 1]]), torch.ones(1, 2).long(), 0, [], torch.tensor([[[0.0, 3.0]] * 2]).log1p()
    )
    first = torch.tensor([[[0.0, torch.tensor(3.0).log()]] * 2])
    found = compared(known._replace(logits=first), torch.tensor([[[1e-6, 0.0]] * 2]), 0)
    assert found.nll.item() == pytest.approx(0.693147, abs=1e-5) and not found.same.item()
    assert found.kl.item() == pytest.approx(-0.25 * 0.693147 + 0.75 * 0.405465, abs=1e-5)
    ids, first, other = tokens(2, 30), torch.randn(2, 30, 101), torch.randn(2, 30, 101)
    known = tokenwise.Reference(ids, torch.ones_like(ids), 0, [], first)
    for chunk in (1, 300, 1 << 19):
        monkeypatch.setattr(tokenwise, "CHUNK", chunk)
        same(compared(known, other, 0), plain(ids, first, other), 1e-5)
    assert F.kl_div(other.log_softmax(-1), first.log_softmax(-1), reduction="none", log_target=True).sum(-1)[
        :, :-1
    ].mean() == pytest.approx(compared(known, other, 0).kl.mean().item(), rel=1e-5)


def test_the_cache_lets_go_of_the_model():
    before = len(tiny_llama()._forward_pre_hooks)
    scores(tokens(1, 40), ["int4"], step=8, prompt=20)
    assert len(tiny_llama()._forward_pre_hooks) == before


def test_refusals():
    ids = tokens(1, 40)
    with pytest.raises(ValueError, match="a mode is"):
        scores(ids, ["int4"], "both")
    with pytest.raises(ValueError, match="no prompt and no step"):
        scores(ids, ["int4"], "simulated", step=4)
    with pytest.raises(ValueError, match="--step"):
        scores(ids, ["int4"], prompt=10)
