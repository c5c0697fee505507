"""A fitted artefact for the tiny model, made up."""

import numpy as np
import torch
from models_tiny import tiny_llama

from kvist.artifact import Artifact, Fit, Origin, Settings
from kvist.coding import Fixed, Table, Unrotate
from kvist.models.adapter import describe

HEADS, DIM = 2, 32
CHANNELS = HEADS * DIM
ROTARY = Unrotate(frequencies=tuple(1e4 ** (-i / (DIM // 2)) for i in range(DIM // 2)))


def ladder(bits: int) -> Table:
    points = torch.linspace(-1, 1, 2**bits).double()
    return Table(bits=bits, points=tuple((points.sign() * points.abs() ** 1.3).tolist()))


def artifact(bits=3, outliers=0.05, cap="token", keys="pre-rope", axis="channel", sinks=1, slots=0) -> Artifact:
    """Of the tiny model, with ranges that of some tokens more keys lie beyond than a cap allows, of others fewer."""
    random = np.random.default_rng(0)
    fits = []
    for _ in range(2):
        middle, half = random.normal(0, 0.3, CHANNELS), random.uniform(1.2, 3.0, CHANNELS)
        ends = Fixed(low=tuple(middle - half), high=tuple(middle + half)) if axis == "channel" else None
        fits.append(Fit(table=ladder(bits), range=ends))
    settings = Settings(bits=bits, outliers=outliers, cap=cap, keys=keys, key_axis=axis, sinks=sinks, slots=slots)
    return Artifact(
        model=describe(tiny_llama()).identity,
        settings=settings,
        origin=Origin(source="none", digest=""),
        rotary=ROTARY if keys == "pre-rope" else None,
        keys=tuple(fits),
        values=(Fit(table=ladder(bits)),) * 2,
    )
