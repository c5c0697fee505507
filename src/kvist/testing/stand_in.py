"""A fitted recipe without a model: for random numbers, where only shapes and speed count."""

import random
from statistics import NormalDist

from kvist.coding import Codec, Fixed, Table, Unrotate
from kvist.plan import LayerPlan, Recipe


def stand_in(recipe: Recipe, heads: int, dim: int) -> Recipe:
    """`recipe`, what it lacks filled with what suits standard normal keys and values of `heads` heads of `dim`: tables
    of normal quantiles, ranges of which some are too narrow, a rotary embedding of base 10,000."""
    if not recipe.needs:
        return recipe
    layers = tuple(
        LayerPlan(
            key=plan.key.model_copy(update={"codec": _filled(plan.key.codec, heads, dim)}),
            value=plan.value.model_copy(update={"codec": _filled(plan.value.codec, heads, dim)}),
        )
        for plan in recipe.layers
    )
    return recipe.model_copy(update={"layers": layers})


def _filled(codec: Codec, heads: int, dim: int) -> Codec:
    draw, parts, bits = random.Random(heads * dim), {}, codec.levels.bits
    if isinstance(codec.levels, Table):
        points = [NormalDist().inv_cdf((i + 0.5) / 2**bits) for i in range(2**bits)]
        parts["levels"] = Table(bits=bits, points=tuple(p / points[-1] for p in points))  # pyright: ignore
    if isinstance(codec.range, Fixed):
        middle, reach = ([draw.uniform(*ends) for _ in range(heads * dim)] for ends in ((-0.5, 0.5), (1.5, 4.0)))
        low, high = (tuple(m + sign * r for m, r in zip(middle, reach, strict=True)) for sign in (-1, 1))
        parts["range"] = Fixed(low=low, high=high)
    if isinstance(codec.transform, Unrotate):
        parts["transform"] = Unrotate(frequencies=tuple(10000.0 ** (-2 * i / dim) for i in range(dim // 2)))
    return codec.model_copy(update=parts)
