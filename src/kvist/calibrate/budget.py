"""From a profile to an allocation: by rank, or by what a budget of stored bytes buys.

Bytes are those of the bill, as a cache would allocate them: codes, scales, outliers, sinks, windows and tables. A layer
is one choice among pairs of widths, because the two sides of a layer share its rings.
"""

from collections.abc import Sequence
from contextlib import suppress

import torch

from kvist import methods
from kvist.allocation import Allocation, rules
from kvist.allocation.solve import Choice, Impossible, exact, greedy
from kvist.calibrate.profile import SIDES, Changes, Profile
from kvist.coding import Codec
from kvist.plan import Recipe
from kvist.types import Geometry, ModelIdentity

__all__ = ["Impossible", "changes_of", "elements", "geometry", "nbytes", "ranked", "solved"]

SOLVERS = {"exact": exact, "greedy": greedy}


def geometry(model: ModelIdentity) -> Geometry:
    """The shape of a layer's cache, exact tokens in 16 bits."""
    return Geometry(model.heads, model.key_dim, model.value_dim, torch.bfloat16)


def elements(model: ModelIdentity, length: int, batch: int = 1) -> int:
    """Numbers that a cache of `batch` rows of `length` tokens stands for, over all layers."""
    return model.layers * batch * length * model.heads * (model.key_dim + model.value_dim)


def nbytes(recipe: Recipe, model: ModelIdentity, length: int, batch: int = 1) -> int:
    """Bytes allocated for `batch` rows of `length` tokens, room reserved, over all layers."""
    return recipe.bill(geometry(model), model.layers, length, batch, reserve=length).total()


def changes_of(profile: Profile, method: str) -> Changes:
    """The changes that a method's codecs make: measured under its own text, or of a method that codes alike and keeps
    another window. Raises ValueError where there are none."""
    for changes in profile.loss_change:
        if changes.method == method:
            return changes
    for changes in profile.loss_change:
        found = _codecs(method, changes.choices)
        with suppress(ValueError):  # the artefacts of another method may be gone
            if found == _codecs(changes.method, changes.choices):
                return changes
    known = " and ".join(repr(changes.method) for changes in profile.loss_change) or "no method"
    raise ValueError(f"the profile knows the errors of {known}, not of {method!r}; profile again with --method")


def _codecs(method: str, choices: Sequence[int]) -> dict[int, list[Codec]]:
    """By width, of those that the method has."""
    found = methods.widths(method, choices).items()
    return {bits: [side.codec for plan in recipe.layers for side in plan.sides] for bits, recipe in found}


def ranked(
    profile: Profile,
    score: str,
    share: float = 0.2,
    high: tuple[int, int] = (3, 4),
    low: tuple[int, int] = (2, 2),
    method: str = "kvmix",
    reference: bool = False,
) -> Allocation:
    """The layers that score highest get the high widths (KVmix section 3.3): by gradient norms, or by how much
    the loss falls when a side goes from its low to its high width. reference: as many as the published code takes."""
    if score not in ("gradient-norm", "loss-change"):
        raise ValueError(f"a score is gradient-norm or loss-change, found {score!r}")
    if score == "gradient-norm":
        scores = [profile.norms(side) for side in SIDES]
    else:
        changes = changes_of(profile, method)
        scores = [changes.at(side, low[i]) - changes.at(side, high[i]) for i, side in enumerate(SIDES)]
    keys, values = (score.tolist() for score in scores)
    made = rules.reference(keys, values, high, low) if reference else rules.top(keys, values, share, high, low)
    note = f"{made.note}: {score}, {profile.origin.samples} prompts"
    return made.model_copy(update={"model": profile.model, "note": note})


def solved(
    profile: Profile,
    method: str,
    budget: int,
    length: int,
    batch: int = 1,
    choices: Sequence[int] | None = None,
    solver: str = "exact",
) -> Allocation:
    """The widths that lose least among those whose cache of `batch` rows of `length` tokens takes at most `budget`
    bytes. Raises Impossible where none does, with the least that is possible.

    choices: those profiled, but for 1 bit unless it is asked for: its errors are too large for a second-order change
    of the loss to tell, and it may do far more harm than is foreseen.
    """
    if solver not in SOLVERS:
        raise ValueError(f"a solver is exact or greedy, found {solver!r}")
    changes = changes_of(profile, method)
    widths = tuple(choices or (bits for bits in changes.choices if bits > 1))
    if not widths:
        raise ValueError(
            f"the profile tried {changes.method!r} at 1 bit alone; allow it by --choices 1, or profile again"
        )
    recipes = {(k, v): methods.parse(method, k=k, v=v) for k in widths for v in widths}
    page = max(recipe.page for recipe in recipes.values())
    shape, layers = geometry(profile.model), profile.model.layers
    losses = {side: {bits: changes.at(side, bits) for bits in widths} for side in SIDES}
    options: list[list[Choice]] = []
    bills: dict = {}
    for i in range(layers):
        options.append([])
        for (k, v), recipe in recipes.items():
            plan = recipe.for_layers(layers)[i]
            if plan not in bills:
                bills[plan] = plan.bill(shape, page, length, batch, reserve=length).total()
            options[i].append(Choice(k, v, bills[plan], float(losses["k"][k][i] + losses["v"][v][i])))
    found = SOLVERS[solver](options, budget)
    picked = [options[i][choice] for i, choice in enumerate(found)]
    bits = 8 * budget / elements(profile.model, length, batch)
    note = f"least loss-change of {method} within {bits:.3g} bits at {length} tokens, {profile.origin.samples} prompts"
    return Allocation(k=tuple(c.k for c in picked), v=tuple(c.v for c in picked), model=profile.model, note=note)
