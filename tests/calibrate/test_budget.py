"""From scores to bits: who is ranked first, what a budget buys, and that a cache then takes what was billed."""

import itertools

import pytest
import torch
from models_tiny import tiny_llama, tokens

import kvist
from kvist.allocation.solve import Impossible
from kvist.artifact import Origin
from kvist.calibrate.budget import changes_of, elements, nbytes, ranked, solved
from kvist.calibrate.profile import Changes, Norms, Profile
from kvist.methods import parse
from kvist.models.adapter import describe
from kvist.models.compat import cache_argument

LENGTH = 300
CHOICES = (1, 2, 4)
KEYS = ((3.0, 1.0, 0.1), (5.0, 0.5, 0.1))  # per layer, at 1, 2 and 4 bits
VALUES = ((2.0, 1.9, 0.0), (9.0, 3.0, 0.5))


def scored(model=None, **changes) -> Profile:
    """Of two layers and two prompts, whose scores are twice the same."""
    twice = {"k": KEYS, "v": VALUES}
    twice = {side: tuple(tuple((x, x) for x in layer) for layer in layers) for side, layers in twice.items()}
    return Profile(
        model=describe(model or tiny_llama()).identity,
        dtype="float32",
        origin=Origin(source="a", digest="b", samples=2),
        gradient_norm=Norms(k=((1.0, 3.0), (4.0, 2.0)), v=((0.5, 0.5), (0.2, 0.2))),
        loss_change=(Changes(**{"method": "kivi recent=32", "choices": CHOICES} | twice | changes),),
    )


def test_the_ranks_decide_alone():
    found = ranked(scored(), "gradient-norm", 0.2)
    assert (found.k, found.v) == ((2, 3), (4, 2)) and found.model == scored().model and found.ratios == "paper"
    assert "gradient-norm, 2 prompts" in found.note
    # from 2 to 4 bits, keys gain 0.9 in layer 0 and 0.4 in layer 1; values 1.9 and 2.5
    found = ranked(scored(), "loss-change", 0.2, (4, 4), (2, 2), "kivi recent=32")
    assert (found.k, found.v) == ((4, 2), (2, 4))
    found = ranked(scored(), "gradient-norm", reference=True)  # fewer than ten layers: none
    assert (found.k, found.v, found.ratios) == ((2, 2), (2, 2), "reference")
    with pytest.raises(ValueError, match="a score is gradient-norm or loss-change, found 'norm'"):
        ranked(scored(), "norm")
    with pytest.raises(ValueError, match="at 1, 2, 4 bits, not at 3"):
        ranked(scored(), "loss-change", method="kivi recent=32")


@pytest.mark.parametrize("solver", ["exact", "greedy"])
@pytest.mark.parametrize("batch", [1, 3])
def test_a_budget_buys_the_least_loss(solver, batch):
    """Against all 81 allocations, whose bytes are those of their own recipes."""
    model, found = describe(tiny_llama()).identity, scored()
    loss, size = {}, {}
    for k in itertools.product(CHOICES, repeat=2):
        for v in itertools.product(CHOICES, repeat=2):
            recipe = parse("kivi recent=32", k=k, v=v)
            size[k, v] = nbytes(recipe, model, LENGTH, batch)
            loss[k, v] = sum(
                table[layer][CHOICES.index(bits)]
                for table, side in ((KEYS, k), (VALUES, v))
                for layer, bits in enumerate(side)
            )
    for budget in sorted(set(size.values())):
        made = solved(found, "kivi recent=32", budget, LENGTH, batch, CHOICES, solver)
        pair = made.k, made.v
        best = min(loss[other] for other in loss if size[other] <= budget)
        assert size[pair] <= budget
        assert loss[pair] == pytest.approx(best) if solver == "exact" else loss[pair] >= best - 1e-12
    least = min(size.values())
    with pytest.raises(Impossible, match="impossible") as refusal:
        solved(found, "kivi recent=32", least - 1, LENGTH, batch, CHOICES, solver)
    assert refusal.value.least == least


def test_only_the_widths_asked_for():
    """One bit is taken only by name: there a second-order change of the loss says too little."""
    narrow = solved(scored(), "kivi recent=32", nbytes(parse("kivi:2 recent=32"), scored().model, LENGTH), LENGTH)
    assert (narrow.k, narrow.v) == ((2, 2), (2, 2))
    made = solved(scored(), "kivi recent=32", 10**9, LENGTH, choices=(1, 2))
    assert (made.k, made.v) == ((2, 2), (2, 2))
    with pytest.raises(ValueError, match="not at 8"):
        solved(scored(), "kivi recent=32", 10**9, LENGTH, choices=(2, 8))
    with pytest.raises(ValueError, match="a solver is exact or greedy, found 'best'"):
        solved(scored(), "kivi recent=32", 10**9, LENGTH, solver="best")


def test_errors_serve_methods_that_code_alike():
    found = scored()
    assert changes_of(found, "kvmix") is found.loss_change[0]  # another window, the same codecs
    assert changes_of(found, "kivi recent=128") is found.loss_change[0]
    for other in ("hadamard", "kivi group=64", "kvmix group=128"):
        with pytest.raises(ValueError, match=r"knows the errors of 'kivi recent=32', not of"):
            changes_of(found, other)


def test_a_method_s_own_errors_come_first_and_others_do_not_stand_in_the_way():
    """Not every method has every width that another was tried at, nor are its artefacts there for ever."""
    start = scored().loss_change[0]
    gone = start.model_copy(update={"method": "kvquant artifact=gone"})
    own = start.model_copy(update={"method": "logquant", "choices": (2, 4, 16)})
    found = scored().model_copy(update={"loss_change": (gone, start, own)})
    assert changes_of(found, "logquant") is own and changes_of(found, "logquant window=64") is own
    assert changes_of(found, "kvmix") is start
    made = solved(found, "logquant", 10**9, LENGTH, choices=(2, 4))
    assert set(made.k + made.v) <= {2, 4}
    with pytest.raises(ValueError, match=r"'kivi recent=32' and 'logquant', not of 'hadamard'"):
        changes_of(found, "hadamard")


def test_one_bit_alone_is_taken_by_name_only():
    start = scored().loss_change[0]
    one = {side: tuple(layer[:1] for layer in getattr(start, side)) for side in ("k", "v")}
    narrow = scored(choices=(1,), **one)
    with pytest.raises(ValueError, match="at 1 bit alone; allow it by --choices 1"):
        solved(narrow, start.method, 10**9, LENGTH)
    assert solved(narrow, start.method, 10**9, LENGTH, choices=(1,)).k == (1, 1)


def test_a_cache_takes_what_was_billed():
    model = tiny_llama()
    for of in ("waiting", "context"):
        method = f"kvmix ratio_of={of}"
        budget = int(11 * elements(scored().model, LENGTH) / 8)
        made = solved(scored(), method, budget, LENGTH)
        recipe = parse(method, allocation=made)
        cache = kvist.Cache(model, recipe, reserve=LENGTH)
        with torch.no_grad():
            model(tokens(1, LENGTH), **cache_argument(cache))
        shape = describe(model).shape  # its exact tokens are fp32, a profile bills 16 bits
        assert cache.report().nbytes == recipe.bill(shape, 2, LENGTH, reserve=LENGTH).total()
        assert nbytes(recipe, describe(model).identity, LENGTH) <= budget
        cache.close()


def test_another_model_is_refused():
    other = tiny_llama(layers=2, dim=64)
    made = ranked(scored(), "gradient-norm")
    with pytest.raises(ValueError, match=r"heads of 32, this model has heads of 64"):
        kvist.Cache(other, "kvmix", allocation=made)
