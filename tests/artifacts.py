"""Artefacts with random contents, for a tiny model or another."""

import numpy as np
from models_tiny import tiny_llama

from kvist.artifact import Artifact, Fit, Origin, Settings
from kvist.calibrate.tables import to_grid
from kvist.coding import Fixed, Table
from kvist.models.adapter import describe
from kvist.models.rope import rotary


def half(x) -> tuple[float, ...]:
    return tuple(np.asarray(x, np.float16).astype(float).tolist())


def single(x) -> tuple[float, ...]:
    return tuple(np.asarray(x, np.float32).astype(float).tolist())


def made(kind: str = "grid", model=None, **settings) -> Artifact:
    """An artefact with random contents: tables on a grid or free of it, with read tables or without."""
    random, model = np.random.default_rng(0), model or tiny_llama()
    identity = describe(model).identity
    chosen = Settings(**{"bits": 3, "outliers": 0.05} | settings)
    sides: dict = {"keys": [], "values": []}
    for side, fits in sides.items():
        for _ in range(identity.layers):
            points = np.sort(random.uniform(-1, 1, 2**chosen.bits)).astype(np.float32)
            points = to_grid(points.tolist()) if "grid" in kind else single(points)
            if "grid" in kind:  # ends are fp32 in the file
                low, high = points[0], points[-1]
                steps = Table(bits=chosen.bits, points=points).grid
                points = tuple(low + (high - low) * k / 255 for k in steps)
            read = tuple(1.25 * p + 0.25 for p in points) if "read" in kind else None
            read = single(read) if read and "grid" not in kind else read
            channels = identity.heads * identity.key_dim
            ends = np.sort(random.normal(0, 3, (2, channels)).astype(np.float16), 0)
            fixed = Fixed(low=half(ends[0]), high=half(ends[1])) if side == "keys" else None
            fixed = None if chosen.key_axis == "token" else fixed
            fits.append(Fit(table=Table(bits=chosen.bits, points=points, read=read), range=fixed))
    origin = Origin(source="a book", digest="12", samples=3, seqlen=25, seed=7, versions={"kvist": "0"})
    before = rotary(model) if chosen.keys == "pre-rope" else None
    keys, values = map(tuple, sides.values())
    return Artifact(model=identity, settings=chosen, origin=origin, rotary=before, keys=keys, values=values)
