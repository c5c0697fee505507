"""Laws that every method obeys, on tracks alone: no model, random keys and values. A law raises AssertionError.

A recipe's fits, if it has any, are for HEADS heads of DIM; its windows should be small enough that LENGTH tokens fill
several pages (`kvist.testing.cases`).
"""

from collections.abc import Callable, Sequence
from itertools import pairwise

import torch
from torch import Tensor

from kvist.cache.layer import Layer
from kvist.cache.rows import Rows
from kvist.plan import LayerPlan, Recipe

HEADS, DIM, LENGTH = 2, 32, 301
WAYS = {
    "one at a time": [1] * LENGTH,
    "in chunks": [40, 1, 33, 64, 7, 100, 56],
    "a prompt and steps": [250] + [1] * (LENGTH - 250),
}
MOST_ERROR = 0.3  # of the widest setting, relative


def data(length: int, outliers: bool = False, seed: int = 0) -> Tensor:
    """Keys and values (2, 1, H, T, D); with outliers, a few channels are ten times as large."""
    x = torch.randn(2, 1, HEADS, length, DIM, generator=torch.Generator().manual_seed(seed))
    if outliers:
        x[..., ::13] *= 10
    return x


def fed(plan: LayerPlan, page: int, x: Tensor, sizes: Sequence[int]) -> Layer:
    """A layer of one row after updates of the given sizes, settled."""
    rows = Rows()
    layer, start = Layer(plan, page, "exact", 0, rows), 0
    for size in sizes:
        rows.extend(1, size, None)
        layer.update(x[0, :, :, start : start + size], x[1, :, :, start : start + size])
        start += size
    layer.settle()
    return layer


def frontiers(recipe: Recipe, sizes: Sequence[int]) -> list[int]:
    """Packed tokens of each side of the first layer after updates of these sizes."""
    layer = fed(recipe.layers[0], recipe.page, data(sum(sizes)), sizes)
    return [track.states[0].frontier for track in layer.tracks]


def same_bytes_however_it_is_cut(recipe: Recipe) -> None:
    """The same tokens in one update or in many are packed to the same bytes, as far as both have packed; and as far as
    each other, unless the recipe says why not (`chunking`)."""
    x = data(LENGTH)
    for plan in recipe.layers:
        whole = _packed(fed(plan, recipe.page, x, [LENGTH]))
        for way, sizes in WAYS.items():
            for (frontier, arrays), (other, others) in zip(
                whole, _packed(fed(plan, recipe.page, x, sizes)), strict=True
            ):
                assert recipe.chunking is not None or frontier == other, f"{way}: {frontier} and {other} are packed"
                common = min(frontier, other)
                for name in arrays if common else ():
                    steps = arrays[name].shape[-2 if arrays[name].dim() < 3 else 1] * common // max(frontier, 1)
                    ours, theirs = (a[name][:, :steps] for a in (arrays, others))
                    assert torch.equal(ours, theirs), f"{way}: {name} differ although both are packed"


def reasons_are_needed(recipe: Recipe) -> None:
    """Some cut of some sequence moves a frontier of a method that states a reason why cutting matters."""
    cuts = (frontiers(recipe, [n]) != frontiers(recipe, [n // 2, n - n // 2]) for n in range(64, 200))
    assert recipe.chunking is None or any(cuts), f"{recipe.name} states a reason but is cut alike"


def every_token_is_in_one_place(recipe: Recipe) -> None:
    """At every moment a token is a sink, or packed, or recent; frontiers never retreat; exact tokens are exact."""
    x = data(LENGTH)
    for plan in recipe.layers:
        rows, start = Rows(), 0
        layer = Layer(plan, recipe.page, "exact", 0, rows)
        before = [0, 0]
        for size in (3, 1, 40, 70, *[1] * 100, 60):
            rows.extend(1, size, None)
            layer.update(x[0, :, :, start : start + size], x[1, :, :, start : start + size])
            start += size
            for i, track in enumerate(layer.tracks):
                frontier = track.states[0].frontier
                sinks = min(start, plan.sinks)
                recent = layer.behind(0) - frontier
                assert frontier >= before[i] and frontier % track.codec.granule == 0
                assert sinks + frontier + recent == start and 0 <= recent <= track.exact.capacity
                assert all(0 <= p < frontier for p in track.exact.pins[0])
                assert len(set(track.exact.pins[0].values())) == len(track.exact.pins[0]) <= track.rule.most_pins
                if track.rule.most is not None:
                    assert recent <= track.side.window() + max(0, size - 1)
                before[i] = frontier
        for i, track in enumerate(layer.tracks):  # exact tokens are exact, packed ones are near
            behind = x[i, 0, :, plan.sinks : start]
            held = track.fetch(0, range(layer.behind(0)), layer.maps[0])
            exact = [p for p in range(layer.behind(0)) if p >= track.states[0].frontier or p in track.exact.pins[0]]
            assert torch.equal(held[:, exact], behind[:, exact])
            assert torch.isfinite(held).all()
            assert torch.equal(track.exact.sinks[0, :, : plan.sinks], x[i, 0, :, : plan.sinks])


def json_and_back(recipe: Recipe) -> None:
    """A recipe is plain data."""
    again = Recipe.model_validate_json(recipe.model_dump_json())
    assert again == recipe and str(again) == str(recipe)


def errors_fall(recipes: Sequence[Recipe], outliers: bool = False) -> None:
    """Of recipes by rising bits, what is read back is nearer and nearer, on both sides."""
    x, errors = data(LENGTH, outliers), []
    for recipe in recipes:
        layer = fed(recipe.layers[0], recipe.page, x, [LENGTH])
        held = [track.fetch(0, range(layer.behind(0)), layer.maps[0]) for track in layer.tracks]
        true = x[:, 0, :, layer.plan.sinks :]
        errors.append([float((read - side).norm() / side.norm()) for read, side in zip(held, true, strict=True)])
    for side in (0, 1):
        run = [error[side] for error in errors]
        assert all(a > b for a, b in pairwise(run)), f"errors do not fall: {run}"
        assert run[-1] < MOST_ERROR, f"the widest is off by {run[-1]:.2f}"


LAWS: tuple[Callable[[Recipe], None], ...] = (
    same_bytes_however_it_is_cut,
    reasons_are_needed,
    every_token_is_in_one_place,
    json_and_back,
)
"""What every method obeys: functions of a recipe that raise AssertionError."""


def _packed(layer: Layer) -> list[tuple[int, dict[str, Tensor]]]:
    """Per side: frontier, and the bytes of its packed tokens in order."""
    found = []
    for track in layer.tracks:
        frontier, granule = track.states[0].frontier, track.codec.granule
        groups = torch.arange(-(-frontier // granule))
        arrays = track.pool.entries(0, groups, granule) if frontier else {}
        found.append((frontier, {name: array.clone() for name, array in arrays.items()}))
    return found
