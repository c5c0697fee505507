"""Laws that every registered method obeys, on tracks alone: no model, random keys and values."""

from itertools import pairwise

import pytest
import torch
from cases import CASES, recipe
from hypothesis import given
from hypothesis import strategies as st

from kvist import methods
from kvist.cache.layer import Layer
from kvist.cache.rows import Rows
from kvist.plan import LayerPlan, Recipe
from kvist.retention import Block, Gather, Immediate, KeepAll, LogSparse, Ratio, Share, Sliding, Streaming

HEADS, DIM, LENGTH = 2, 32, 301


def data(length: int, outliers: bool = False, seed: int = 0) -> torch.Tensor:
    """Keys and values (2, 1, H, T, D); with outliers, a few channels are ten times as large."""
    x = torch.randn(2, 1, HEADS, length, DIM, generator=torch.Generator().manual_seed(seed))
    if outliers:
        x[..., ::13] *= 10
    return x


def fed(plan: LayerPlan, page: int, x: torch.Tensor, sizes) -> Layer:
    """A layer of one row after updates of the given sizes, settled."""
    rows = Rows()
    layer, start = Layer(plan, page, "exact", 0, rows), 0
    for size in sizes:
        rows.extend(1, size, None)
        layer.update(x[0, :, :, start : start + size], x[1, :, :, start : start + size])
        start += size
    layer.settle()
    return layer


def packed_bytes(layer: Layer) -> list[tuple]:
    """Per side: frontier, and the bytes of its packed tokens in order."""
    found = []
    for track in layer.tracks:
        frontier, granule = track.states[0].frontier, track.codec.granule
        groups = torch.arange(-(-frontier // granule))
        arrays = track.pool.entries(0, groups, granule) if frontier else {}
        found.append((frontier, {name: array.clone() for name, array in arrays.items()}))
    return found


WAYS = {
    "one at a time": [1] * LENGTH,
    "in chunks": [40, 1, 33, 64, 7, 100, 56],
    "a prompt and steps": [250] + [1] * (LENGTH - 250),
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("text", CASES)
def test_the_same_bytes_however_it_is_cut(text, way):
    plan, x = recipe(text), data(LENGTH)
    assert sum(WAYS[way]) == LENGTH
    for layer_plan in plan.layers:
        whole, cut = (packed_bytes(fed(layer_plan, plan.page, x, sizes)) for sizes in ([LENGTH], WAYS[way]))
        for (frontier, arrays), (other, others) in zip(whole, cut, strict=True):
            if plan.chunking is None:
                assert frontier == other
            common = min(frontier, other)
            for name in arrays if common else ():
                steps = arrays[name].shape[-2 if arrays[name].dim() < 3 else 1] * common // max(frontier, 1)
                ours, theirs = (a[name][:, :steps] for a in (arrays, others))
                assert torch.equal(ours, theirs), f"{name} differ although both are packed"


def test_reasons_are_stated_where_they_are_needed():
    """Some cut of some sequence moves a frontier of every method that states a reason: none is an excuse."""

    def frontiers(plan: Recipe, sizes: list[int]) -> list[int]:
        layer = fed(plan.layers[0], plan.page, data(sum(sizes)), sizes)
        return [track.states[0].frontier for track in layer.tracks]

    for text in CASES:
        plan = recipe(text)
        differ = (frontiers(plan, [n]) != frontiers(plan, [n // 2, n - n // 2]) for n in range(64, 200))
        assert plan.chunking is None or any(differ), f"{text} states a reason but is cut alike"


@pytest.mark.parametrize("text", CASES)
def test_every_token_is_in_exactly_one_place(text):
    plan, x = recipe(text), data(LENGTH)
    for layer_plan in plan.layers:
        rows, start = Rows(), 0
        layer = Layer(layer_plan, plan.page, "exact", 0, rows)
        before = [0, 0]
        for size in (3, 1, 40, 70, *[1] * 100, 60):
            rows.extend(1, size, None)
            layer.update(x[0, :, :, start : start + size], x[1, :, :, start : start + size])
            start += size
            for i, track in enumerate(layer.tracks):
                frontier = track.states[0].frontier
                sinks = min(start, layer_plan.sinks)
                recent = layer.behind(0) - frontier
                assert frontier >= before[i] and frontier % track.codec.granule == 0
                assert sinks + frontier + recent == start and 0 <= recent <= track.exact.capacity
                assert all(0 <= p < frontier for p in track.exact.pins[0])
                assert len(set(track.exact.pins[0].values())) == len(track.exact.pins[0]) <= track.rule.most_pins
                if track.rule.most is not None:
                    layer_most = track.side.window()
                    assert recent <= layer_most + max(0, size - 1)
                before[i] = frontier
        for i, track in enumerate(layer.tracks):  # exact tokens are exact, packed ones are near
            behind = x[i, 0, :, layer_plan.sinks : start]
            held = track.fetch(0, range(layer.behind(0)), layer.maps[0])
            exact = [p for p in range(layer.behind(0)) if p >= track.states[0].frontier or p in track.exact.pins[0]]
            assert torch.equal(held[:, exact], behind[:, exact])
            assert torch.isfinite(held).all()
            assert torch.equal(track.exact.sinks[0, :, : layer_plan.sinks], x[i, 0, :, : layer_plan.sinks])


WIDTHS = {
    "kivi": [{"bits": b} for b in (1, 2, 3, 4, 8, 16)],
    "kvmix": [{"k": b, "v": b} for b in (1, 2, 3, 4)],
    "hadamard": [{"bits": b} for b in (2, 4, 8)],
    "int": [("int4", {}), ("int8", {}), ("exact", {})],
} | {name: [{"bits": b} for b in (2, 4)] for name in methods.names() if "streaming" in name or "logquant" in name}


@pytest.mark.parametrize("outliers", [False, True], ids=["gaussian", "outliers"])
@pytest.mark.parametrize("name", WIDTHS)
def test_error_falls_when_bits_rise(name, outliers):
    x, errors = data(LENGTH, outliers), []
    for options in WIDTHS[name]:
        plan = methods.get(options[0]) if name == "int" else methods.get(name, **options)
        layer = fed(plan.layers[0], plan.page, x, [LENGTH])
        sides = []
        for side, track in enumerate(layer.tracks):
            sinks = layer.plan.sinks
            held = track.fetch(0, range(layer.behind(0)), layer.maps[0])
            true = x[side, 0, :, sinks:]
            sides.append(float((held - true).norm() / true.norm()))
        errors.append(sides)
    for side in (0, 1):
        run = [error[side] for error in errors]
        assert all(a > b for a, b in pairwise(run)), run
        assert run[-1] < 0.3


@pytest.mark.parametrize("text", CASES)
def test_recipe_to_json_and_back(text, tmp_path):
    plan = recipe(text)
    assert Recipe.model_validate_json(plan.model_dump_json()) == plan
    plan.save(tmp_path / "recipe.json")
    assert Recipe.load(tmp_path / "recipe.json") == plan == methods.parse(str(tmp_path / "recipe.json"))
    assert str(Recipe.load(tmp_path / "recipe.json")) == str(plan)


def test_every_registered_method_is_among_the_cases():
    assert {text.split()[0].split(":")[0] for text in CASES} == set(methods.names())


RULES = st.one_of(
    st.just(KeepAll()),
    st.just(Immediate()),
    st.builds(Block, size=st.integers(1, 70)),
    st.builds(Gather, size=st.integers(1, 70)),
    st.builds(Sliding, size=st.integers(1, 70)),
    st.builds(Streaming, window=st.integers(1, 50)),
    st.builds(LogSparse, window=st.integers(1, 50)),
    st.builds(Ratio, ratio=st.floats(0, 0.9), group=st.sampled_from([1, 32, 64])),
    st.builds(Share, ratio=st.floats(0, 1, exclude_max=True), group=st.sampled_from([1, 32, 64])),
)


@given(RULES, st.lists(st.integers(0, 90), min_size=1, max_size=30))
def test_frontier_never_retreats_and_pins_lie_behind_it(rule, steps):
    frontier = length = 0
    pins: set[int] = set()
    for i, step in enumerate(steps):
        length += step
        new = rule.advance(frontier, length, i == 0)
        assert frontier <= new <= length
        if rule.most is not None:
            assert length - new <= rule.most
        kept = rule.pins(new)
        assert list(kept) == sorted(set(kept)) and all(0 <= p < new for p in kept) and len(kept) <= rule.most_pins
        assert {p for p in kept if p < frontier} <= pins, "a pin that was let go came back"
        frontier, pins = new, set(kept)
