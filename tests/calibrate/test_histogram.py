"""The histogram against its definition, element by element; in pieces, merged, stored and restored."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from kvist.calibrate import histogram as room
from kvist.calibrate.histogram import Histogram


def by_hand(values: list[float], weights: list[float], bins: int) -> torch.Tensor:
    """The six moments, one value at a time."""
    out = torch.zeros(6, bins, dtype=torch.float64)
    for v, w in zip(values, weights, strict=True):
        v = min(max(v, -1.0), 1.0)
        at = min(math.floor((v + 1) * bins / 2), bins - 1)
        out[:, at] += torch.tensor([1, v, v * v, w, w * v, w * v * v], dtype=torch.float64)
    return out


def close(a: Histogram, b: Histogram) -> None:
    torch.testing.assert_close(a.to_tensor(), b.to_tensor(), rtol=1e-12, atol=1e-12)


# multiples of 1/64 are exact in fp32, and with 8 or 16 bins they fall on edges often
grid = st.integers(-80, 80).map(lambda k: k / 64)


@given(st.lists(st.tuples(grid, st.integers(0, 9)), min_size=1, max_size=40), st.sampled_from([1, 2, 8, 16]))
def test_moments_are_those_of_each_value(pairs, bins):
    values, weights = [v for v, _ in pairs], [float(w) for _, w in pairs]
    weighted, plain = Histogram(bins), Histogram(bins)
    weighted.add(torch.tensor(values), torch.tensor(weights))
    plain.add(torch.tensor(values))
    assert torch.equal(weighted.to_tensor(), by_hand(values, weights, bins))
    assert torch.equal(plain.to_tensor(), by_hand(values, [1.0] * len(values), bins))
    assert (weighted.count, weighted.weight) == (len(values), sum(weights))
    assert (plain.count, plain.weight) == (len(values), len(values))


def test_values_beyond_lie_at_the_ends():
    histogram = Histogram(4)
    histogram.add(torch.tensor([-7.0, -math.inf, 1.0, 2.5, math.inf]))
    assert histogram.to_tensor()[0].tolist() == [2, 0, 0, 3]
    assert histogram.to_tensor()[1].tolist() == [-2, 0, 0, 3]
    assert histogram.to_tensor()[2].tolist() == [2, 0, 0, 3]


@pytest.mark.parametrize("chunk", [7, 100, 1 << 20])
def test_pieces_add_up(monkeypatch, chunk):
    monkeypatch.setattr(room, "CHUNK", chunk)
    values, weights = torch.randn(6, 50, 3) * 0.5, torch.rand(6, 50, 3)
    whole, pieces, left, right = Histogram(64), Histogram(64), Histogram(64), Histogram(64)
    whole.add(values, weights)
    for v, w in zip(values, weights, strict=True):
        pieces.add(v, w)
    left.add(values[:2], weights[:2])
    right.add(values[2:], weights[2:])
    left += right
    reference = by_hand(values.flatten().tolist(), weights.flatten().tolist(), 64)
    torch.testing.assert_close(whole.to_tensor(), reference, rtol=1e-12, atol=1e-12)
    close(whole, pieces)
    close(whole, left)
    assert whole.count == 900 and torch.equal(whole.to_tensor()[0], left.to_tensor()[0])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_any_dtype_shape_and_layout(dtype):
    values = (torch.randn(5, 8, 4) * 0.4).to(dtype)
    strided, flat = Histogram(32), Histogram(32)
    strided.add(values.transpose(0, 2), torch.arange(8.0)[None, :, None].to(dtype))  # weights broadcast
    flat.add(values.float().flatten(), torch.arange(8.0)[None, :, None].expand(5, 8, 4).reshape(-1))
    close(strided, flat)


def test_gradients_are_no_matter():
    values = torch.randn(10, requires_grad=True)
    histogram = Histogram(8)
    histogram.add(values, values.square())
    assert not histogram.to_tensor().requires_grad and histogram.count == 10


def test_nothing_added_is_nothing():
    histogram = Histogram(8)
    histogram.add(torch.empty(0, 4))
    assert histogram.count == 0 and histogram.weight == 0
    assert [len(part) for part in histogram.centroids] == [0, 0]


def test_stored_and_restored_then_resumed():
    first, second = torch.randn(300) / 3, torch.randn(200) / 3
    whole, half = Histogram(), Histogram()
    whole.add(first)
    whole.add(second)
    half.add(first)
    stored = half.to_tensor()
    assert stored.shape == (6, 2048) and stored.dtype == torch.float64
    resumed = Histogram.from_tensor(stored)
    resumed.add(second)
    assert torch.equal(resumed.to_tensor(), whole.to_tensor())
    assert torch.equal(stored, half.to_tensor()) and resumed.bins == 2048


def test_centroids_by_hand():
    histogram = Histogram(4)  # edges -1, -.5, 0, .5, 1
    histogram.add(torch.tensor([-0.25, -0.125, 0.5, 0.75, 0.75]), torch.tensor([1.0, 3.0, 0.0, 0.0, 0.0]))
    means, weights = histogram.centroids
    np.testing.assert_allclose(means, [-0.15625, 2 / 3])  # the second bin has no weight: its plain mean
    np.testing.assert_array_equal(weights, [4, 0])


def test_weightless_centroids_count():
    histogram, plain = Histogram(4), Histogram(4)
    histogram.add(torch.tensor([-0.25, 0.5, 0.75]), torch.zeros(3))
    plain.add(torch.tensor([-0.25, 0.5, 0.75]))
    assert histogram.weight == 0
    for found, expected in zip(histogram.centroids, plain.centroids, strict=True):
        np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize(
    ("values", "weights", "message"),
    [
        ([0.1, math.nan], None, "NaN"),
        ([0.1, 0.2], [1.0, math.nan], "NaN"),
        ([0.1, 0.2], [1.0, math.inf], "infinite"),
        ([0.1, 0.2], [1.0, -1.0], "negative"),
        ([0.1, 0.2], [1.0, 2.0, 3.0], "broadcast"),
    ],
)
def test_refusals_leave_the_histogram_as_it_was(values, weights, message):
    histogram = Histogram(8)
    histogram.add(torch.tensor([0.5]))
    before = histogram.to_tensor()
    with pytest.raises(ValueError, match=message):
        histogram.add(torch.tensor(values), None if weights is None else torch.tensor(weights))
    assert torch.equal(histogram.to_tensor(), before)


def test_refuses_what_was_not_stored_by_it():
    stored = Histogram(8).to_tensor()
    negative, unknown = stored.clone(), stored.clone()
    negative[0, 3], unknown[1, 1] = -1, math.nan
    for wrong in (stored[:5], stored.float(), stored[0], negative, unknown):
        with pytest.raises(ValueError, match="stored histogram"):
            Histogram.from_tensor(wrong)
    with pytest.raises(ValueError, match="8 and 16"):
        left = Histogram(8)
        left += Histogram(16)
    with pytest.raises(ValueError, match="bins=0"):
        Histogram(0)
