"""LogQuant and its relatives: budgets, and which tokens a living layer keeps exact."""

import pytest
import torch

from kvist import methods
from kvist.cache.layer import Layer
from kvist.cache.rows import Rows
from kvist.retention import LogSparse


@pytest.mark.parametrize("budget", [128, 192, 256])
def test_budgets_convert_as_published(budget):
    windows = {
        "streaming": (budget - 4) // 2,
        "logquant": budget // 3,
        "partial-streaming": int((budget - 4) / 1.5),
        "partial-logquant": budget // 2,
    }
    for name, window in windows.items():
        plan = methods.get(name, budget=budget).layers[0]
        assert plan.key.retention.window == window
        rule = plan.value.retention
        assert (rule.size if name.startswith("partial") else rule.window) == window
        assert plan.sinks == (4 if "streaming" in name else 0)
        assert methods.get(name, window=window) == methods.get(name, budget=budget)


@pytest.mark.parametrize("name", ["streaming", "logquant", "partial-streaming", "partial-logquant"])
@pytest.mark.parametrize("budget", [128, 192, 256])
def test_a_budget_bounds_the_mean_of_exact_keys_and_values(name, budget):
    plan = methods.get(name, budget=budget).layers[0]
    most = [side.retention.sinks + side.retention.most + side.retention.most_pins for side in plan.sides]
    assert sum(most) / 2 <= budget


def test_partial_forms_pin_keys_alone():
    plan = methods.get("partial-logquant").layers[0]
    assert (plan.key.retention.most_pins, plan.value.retention.most_pins) == (64, 0)


@pytest.mark.parametrize(("window", "prompt"), [(32, 100), (40, 333), (42, 260)])
def test_pinned_tokens_of_a_living_layer_are_exact_and_the_rest_are_not(window, prompt):
    recipe, rows, generator = methods.get("logquant", window=window), Rows(), torch.Generator().manual_seed(window)
    layer = Layer(recipe.layers[0], recipe.page, recipe.prefill, 0, rows)
    sides, length = [[], []], 0
    for count in [prompt, *[1] * 90]:
        rows.extend(1, count, None)
        fresh = [torch.randn(1, 2, count, 16, generator=generator) for _ in sides]
        got = layer.update(*fresh)
        for side, x in zip(sides, fresh, strict=True):
            side.append(x)
        length += count
    rule, decided = LogSparse(window=window), 0
    for n in range(prompt, length):
        decided = rule.advance(decided, n, n == prompt)
    for handle, side, group in zip(got, sides, (32, 1), strict=True):  # keys are packed in whole groups of tokens
        packed = decided // group * group
        exact = sorted({*(p for p in rule.pins(decided) if p < packed), *range(packed, length)})
        dense, truth = handle.dense(), torch.cat(side, 2)
        same = (dense == truth).all(-1).all(1)[0]
        assert same[exact].all()
        assert not same[[p for p in range(length) if p not in exact]].any()


@pytest.mark.parametrize("bits", [1, 3, 8])
def test_widths_that_were_not_published_are_refused(bits):
    with pytest.raises(ValueError, match="bits must be 2 or 4"):
        methods.get("logquant", bits=bits)
