"""What layers are worth: a profile of a model, as JSON, with its scores prompt by prompt.

Two scores. `gradient-norm` (KVmix section 3.2): the norm of the loss's gradient for the weights that make keys or
values; it ranks layers. `loss-change`: by how much the loss is expected to rise when a side of a layer is coded at a
width, in nats per token; it can be added up, so that it says what a bit buys.
"""

from pathlib import Path
from typing import Literal

import numpy as np
from pydantic import Field, ValidationError, model_validator

from kvist import stranger
from kvist.artifact import Origin
from kvist.atomic import write_json
from kvist.types import ModelIdentity, Part

FORMAT = 1
MOST = 1e30  # of a score: sums and squares of more are infinite
STABLE = 0.8  # Spearman correlation of the rankings of two halves, below which a ranking says little
SIDES: tuple[Literal["k"], Literal["v"]] = ("k", "v")


class Norms(Part):
    """Of keys and of values: per layer, per prompt."""

    k: tuple[tuple[float, ...], ...]
    v: tuple[tuple[float, ...], ...]


class Changes(Part):
    """Expected changes of the loss when a method codes one side of one layer, nats per token: per layer, per width of
    `choices`, per prompt."""

    method: str
    choices: tuple[int, ...] = Field(min_length=1, max_length=16)
    k: tuple[tuple[tuple[float, ...], ...], ...]
    v: tuple[tuple[tuple[float, ...], ...], ...]

    def at(self, side: Literal["k", "v"], bits: int) -> np.ndarray:
        """Means over prompts at a width, (layers,). Raises ValueError for a width that was not tried."""
        if bits not in self.choices:
            known = ", ".join(map(str, self.choices))
            raise ValueError(f"the profile tried {self.method!r} at {known} bits, not at {bits}; profile again")
        return np.array(getattr(self, side))[:, self.choices.index(bits)].mean(-1)


class Profile(Part):
    """Scores of every served layer of a model. dtype: the one it was profiled in; origin: the prompts."""

    format: Literal[1] = FORMAT
    model: ModelIdentity
    dtype: str
    origin: Origin
    gradient_norm: Norms
    loss_change: tuple[Changes, ...]

    @model_validator(mode="after")
    def _check(self) -> "Profile":
        layers, prompts = self.model.layers, self.origin.samples
        if prompts < 1:
            raise ValueError(f"a profile is made of prompts, found {prompts}")
        wanted = [((layers, prompts), self.gradient_norm)]
        wanted += [((layers, len(changes.choices), prompts), changes) for changes in self.loss_change]
        for shape, scores in wanted:
            for side in SIDES:
                try:
                    found = np.array(getattr(scores, side), dtype=float)
                except ValueError:
                    raise ValueError(f"scores of {side} are lists of different lengths, expected {shape}") from None
                if found.shape != shape:
                    raise ValueError(f"scores of {side} must be of shape {shape}, found {found.shape}")
                if not ((found >= 0) & (found < MOST)).all():
                    raise ValueError(f"scores of {side} must be numbers of at least 0 and below {MOST:g}")
        return self

    def norms(self, side: Literal["k", "v"]) -> np.ndarray:
        """Gradient norms, means over prompts, (layers,)."""
        return np.array(getattr(self.gradient_norm, side)).mean(-1)

    def stability(self) -> dict[str, dict[str, float]]:
        """Spearman's correlation between the rankings of layers by the even and by the odd prompts, per score and side;
        of changes, the least over the widths."""
        found = {"gradient-norm": {side: _halves(np.array(getattr(self.gradient_norm, side))) for side in SIDES}}
        for changes in self.loss_change:
            sides = {side: np.array(getattr(changes, side)) for side in SIDES}
            found[f"loss-change of {changes.method}"] = {
                side: min(_halves(scores[:, i]) for i in range(len(changes.choices))) for side, scores in sides.items()
            }
        return found

    @property
    def unstable(self) -> list[str]:
        """The rankings that two halves of the prompts do not agree on, in words."""
        return [
            f"the ranking of {'keys' if side == 'k' else 'values'} by {score} is not stable: two halves of the prompts "
            f"agree at {rho:.2f} (Spearman), {STABLE} is wanted; give more --samples"
            for score, sides in self.stability().items()
            for side, rho in sides.items()
            if rho < STABLE
        ]

    def summary(self) -> dict:
        """Means and variances over prompts, and how stable the rankings are: what the file says beside the scores."""

        def moments(scores: Part, side: str) -> dict:
            found = np.array(getattr(scores, side))
            return {"mean": _rounded(found.mean(-1)), "variance": _rounded(found.var(-1, ddof=1))}

        norms = {side: moments(self.gradient_norm, side) for side in SIDES}
        changes = {c.method: {side: moments(c, side) for side in SIDES} for c in self.loss_change}
        return {"gradient_norm": norms, "loss_change": changes, "stability": self.stability()}

    def save(self, path: str | Path) -> None:
        """Write JSON, the prompts of a layer on one line."""
        write_json(path, self.model_dump(mode="json") | {"summary": self.summary()})

    @classmethod
    def load(cls, path: str | Path) -> "Profile":
        """Read what `save` wrote. Raises ValueError with the reason where that cannot be."""
        try:
            data = stranger.read_json(path)
        except ValueError as error:
            raise ValueError(f"expected a profile's JSON file at {path}: {error}; `kvist profile` makes one") from None
        if not isinstance(data, dict) or data.get("format") != FORMAT or "gradient_norm" not in data:
            raise ValueError(f"{path} is no profile of format {FORMAT}; `kvist profile` makes one")
        data.pop("summary", None)
        try:
            return cls.model_validate(data)
        except ValidationError as error:
            raise ValueError(f"{path} is no valid profile: {stranger.said(error)}") from None


def spearman(a: np.ndarray, b: np.ndarray) -> float:
    """The rank correlation of two lists, ties sharing their mean rank; 1 where either cannot be ranked."""
    ranks = [_ranks(x) - (len(x) - 1) / 2 for x in (a, b)]
    norm = np.sqrt((ranks[0] ** 2).sum() * (ranks[1] ** 2).sum())
    return float((ranks[0] * ranks[1]).sum() / norm) if norm else 1.0


def _ranks(x: np.ndarray) -> np.ndarray:
    below = (x[None, :] < x[:, None]).sum(1)
    equal = (x[None, :] == x[:, None]).sum(1)
    return below + (equal - 1) / 2


def _halves(scores: np.ndarray) -> float:
    """Of scores (layers, prompts)."""
    return spearman(scores[:, ::2].mean(1), scores[:, 1::2].mean(1))


def _rounded(x: np.ndarray) -> list:
    return [float(f"{v:.6g}") for v in x] if x.ndim == 1 else [_rounded(row) for row in x]
