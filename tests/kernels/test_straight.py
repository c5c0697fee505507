"""Layers that Triton packs straight into pages store what the reference stores, to the bit."""

import pytest
import torch
from interpreter import DEVICE

from kvist.cache.layer import Layer
from kvist.cache.rows import Rows
from kvist.testing.cases import recipe

SETTINGS = [
    "kivi:2 recent=32",
    "kivi k=3 v=1 recent=64",
    "kivi k=16 v=2 recent=32",
    "hadamard k=2 v=3 group=16 recent=32",
    "logquant window=32",
    "kvquant:4 outliers=0 recent=40",
    "kvquant:4 outliers=0 keys=post-rope recent=40",
    "kvquant k=3,2 v=2,4",
]


def filled(made, device: str | torch.device = "cpu") -> Layer:
    torch.manual_seed(0)
    rows = Rows()
    layer = Layer(made.layers[0], made.page, "stored", 0, rows)
    for i, tokens in enumerate((150, 1, 40, 1)):
        real = torch.ones(2, tokens, dtype=torch.bool)
        real[0, : 37 if i == 0 else 0] = False
        rows.extend(2, tokens, real)
        layer.update(*(torch.randn(2, 2, tokens, 32).to(device) for _ in range(2)))
    return layer


@pytest.mark.parametrize("text", SETTINGS)
def test_pages_are_those_of_the_reference(text, monkeypatch):
    made = recipe(text, prefill="stored")
    expected = filled(made)
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    found = filled(made, DEVICE)
    found.to(torch.device("cpu"))
    for x, y in zip(expected.tracks, found.tracks, strict=True):
        assert x.states == y.states and x.pool.tables == y.pool.tables and int(x.clipped) == int(y.clipped)
        for row, frontier in enumerate(x.frontiers):
            assert frontier
            decoded = (track.decode(row, range(frontier), expected.maps[row]) for track in (x, y))
            assert torch.equal(*decoded)
