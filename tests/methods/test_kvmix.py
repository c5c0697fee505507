"""KVmix: the three-bit layout, widths per layer and side, and the collapse of its window in a living layer."""

import pytest
import torch

from kvist import methods
from kvist.allocation import Allocation
from kvist.cache.layer import Layer
from kvist.cache.rows import Rows


def test_three_bits_take_four_stored_bits_at_groups_of_32():
    """The published format takes 5.8: eleven codes and a pair of fp16 numbers per 32-bit word of codes."""
    for side in methods.get("kvmix", bits=3).layers[0].sides:
        arrays = side.codec.encode(torch.randn(2, 32, 64))
        assert 8 * arrays["codes"].nbytes / (2 * 32 * 64) == 3.0
        assert 8 * sum(array.nbytes for array in arrays.values()) / (2 * 32 * 64) == 4.0


def test_no_entry_of_a_three_bit_group_is_clipped():
    """The published format cuts every eleventh entry to 3/7 of its group's range."""
    codec = methods.get("kvmix", bits=3).layers[0].key.codec
    x = torch.linspace(0, 7, 32).view(1, 32, 1).expand(1, 32, 8)
    assert (codec.decode(codec.encode(x)) - x).abs().max() <= 0.5 * (1 + 2**-10)


def test_widths_per_layer_and_side():
    recipe = methods.parse("kvmix k=3,2,2,1 v=4,2,2,2")
    assert [(p.key.codec.levels.bits, p.value.codec.levels.bits) for p in recipe.for_layers(4)] == [
        (3, 4), (2, 2), (2, 2), (1, 2)
    ]  # fmt: skip
    ratios = [(p.key.retention.ratio, p.value.retention.ratio) for p in recipe.layers]
    assert ratios == [(0.2, 0.2), (0.1, 0.1), (0.1, 0.1), (0.1, 0.1)]
    with pytest.raises(ValueError, match="4 layers but the model has 3"):
        recipe.for_layers(3)


@pytest.mark.parametrize(
    ("ratios", "wanted"),
    [("paper", [0.1, 0.1, 0.2, 0.2, 0.2]), ("reference", [0.1, 0.2, 0.2, 0.3, 0.3]), ("", [0.1, 0.1, 0.2, 0.2, 0.2])],
)
def test_ratios_by_width(ratios, wanted):
    for ratio_of, kind in (("waiting", "ratio"), ("context", "share")):
        recipes = [methods.get("kvmix", bits=b, ratios=ratios, ratio_of=ratio_of) for b in (1, 2, 3, 4, 8)]
        rules = [side.retention for recipe in recipes for side in recipe.layers[0].sides]
        assert [rule.ratio for rule in rules] == [ratio for ratio in wanted for _ in range(2)]
        assert {rule.kind for rule in rules} == {kind} and {rule.group for rule in rules} == {32}


def test_an_allocation_brings_its_ratios_along_unless_told_otherwise():
    theirs, ours = Allocation.of((4, 2), 2, ratios="reference"), Allocation.of((4, 2), 2)
    assert methods.get("kvmix", allocation=theirs) == methods.parse("kvmix k=4,2 ratios=reference")
    assert methods.get("kvmix", allocation=theirs, ratios="paper") == methods.get("kvmix", allocation=ours)
    assert methods.get("kivi", allocation=theirs) == methods.get("kivi", allocation=ours)


@pytest.mark.parametrize(
    ("bits", "ratio", "held"),
    [(4, 0.2, [832, 193, 66, 35, 36]), (2, 0.1, [416, 65, 34, 3, 4]), (4, 0.3, [1248, 385, 130, 67, 36])],
)
def test_the_window_collapses_in_a_living_layer(bits, ratio, held):
    """A layer packs at the start of an update, by the length before it: the published number, and the new token."""
    recipe, rows = methods.get("kvmix", bits=bits, ratio=ratio), Rows()
    layer = Layer(recipe.layers[0], recipe.page, recipe.prefill, 0, rows)
    found = []
    for count in (4096, 1, 1, 1, 1, 1):
        rows.extend(1, count, None)
        x = torch.randn(1, 1, count, 8)
        layer.update(x, x)
        found.append([layer.lengths[0] - track.frontiers[0] for track in layer.tracks])
    assert found[1:] == [[expected + 1] * 2 for expected in held]


def test_a_share_of_the_context_grows_in_a_living_layer():
    """The ring of a window that grows is enlarged seldom, holds what it must, and loses nothing."""
    recipe, rows, length = methods.get("kvmix", bits=2, ratio=0.5, ratio_of="context"), Rows(), 0
    layer = Layer(recipe.layers[0], recipe.page, recipe.prefill, 0, rows)
    x, rooms = torch.randn(1, 1, 1500, 8), []
    for count in (100, *[1] * 1400):
        rows.extend(1, count, None)
        layer.update(x[:, :, length : length + count], x[:, :, length : length + count])
        length += count
        rooms.append(layer.key.exact.capacity)
        seen = (
            68 if length == 100 else length - 1
        )  # the rule is asked without the last update, or 32 tokens of a long one
        for track in layer.tracks:
            (frontier,) = track.frontiers
            assert frontier == (seen - seen // 2) // 32 * 32
            assert torch.equal(track.exact.get([0], frontier, length), x[:, :, frontier:length])
    assert rooms == sorted(rooms) and rooms[0] == 128 and rooms[-1] >= 750
    assert len(set(rooms)) <= 9 and rooms[-1] <= 1.25 * (750 + 32) + 64
