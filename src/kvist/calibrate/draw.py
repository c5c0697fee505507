"""Pictures of a profile and of an allocation, as PNG."""

from pathlib import Path

import numpy as np

from kvist.allocation import Allocation
from kvist.atomic import replacing
from kvist.calibrate.profile import SIDES, Profile

NAMES = {"k": "keys", "v": "values"}
SHOWN = 2  # bits of the changes drawn, where they were tried


def draw(profile: Profile, path: str | Path, allocation: Allocation | None = None) -> None:
    """Heat maps of the scores, layer by prompt, for keys and for values; above them, the bits that an allocation gives
    to each layer."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    maps = [("gradient norm", {side: np.array(getattr(profile.gradient_norm, side)) for side in SIDES})]
    for changes in profile.loss_change:
        at = changes.choices.index(SHOWN) if SHOWN in changes.choices else 0
        title = f"loss change at {changes.choices[at]} bits, {changes.method}, nats"
        maps.append((title, {side: np.array(getattr(changes, side))[:, at] for side in SIDES}))
    rows, layers = len(maps) + (allocation is not None), profile.model.layers
    figure = Figure(figsize=(11, 1 + 2.6 * rows), layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(rows, 2, squeeze=False)
    if allocation is not None:
        _bars(panels[0], allocation)
    for axes, (title, scores) in zip(panels[rows - len(maps) :], maps, strict=True):
        _heat(figure, axes, title, scores)
    figure.suptitle(
        f"{profile.model.name}: {layers} layers, {profile.origin.samples} prompts of {profile.origin.source}"
    )
    with replacing(path) as scratch:
        figure.savefig(scratch, dpi=110, format="png")


def _bars(axes, allocation: Allocation) -> None:
    for ax, side in zip(axes, SIDES, strict=True):
        bits = getattr(allocation, side)
        ax.bar(range(len(bits)), bits, color="tab:blue" if side == "k" else "tab:orange")
        ax.set_title(f"bits of {NAMES[side]}: {sum(bits) / len(bits):.3g} on average")
        ax.set_ylim(0, max(*allocation.k, *allocation.v) + 0.5)
        ax.set_xlabel("layer")
        ax.xaxis.get_major_locator().set_params(integer=True)
        ax.spines[["top", "right"]].set_visible(False)


def _heat(figure, axes, title: str, scores: dict[str, np.ndarray]) -> None:
    """One colour scale, logarithmic, for keys and values."""
    from matplotlib.colors import LogNorm

    every = np.concatenate([x.ravel() for x in scores.values()])
    positive = every[every > 0]
    low = float(positive.min()) if positive.size else 1e-12
    norm = LogNorm(low, max(float(every.max()), low * 1.01))
    for ax, side in zip(axes, SIDES, strict=True):
        image = ax.imshow(np.maximum(scores[side], low), aspect="auto", norm=norm, interpolation="nearest")
        ax.set_title(f"{title}: {NAMES[side]}", fontsize=10)
        ax.set_xlabel("prompt")
        ax.set_ylabel("layer")
        for axis in (ax.xaxis, ax.yaxis):
            axis.get_major_locator().set_params(integer=True)
    figure.colorbar(image, ax=axes, fraction=0.05)
