"""Tables against their definitions: k-means against all partitions and Lloyd, NormalFloat, the grid, Q-Norm."""

import itertools
from functools import cache
from statistics import NormalDist

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from kvist.calibrate.histogram import Histogram
from kvist.calibrate.tables import evenly, fit, kmeans, normal_float, q_norm, to_grid
from kvist.coding import Table


def inertia(values, weights, points) -> float:
    return float((weights * ((values[:, None] - np.asarray(points)) ** 2).min(1)).sum())


def brute_force(values, weights, k) -> float:
    """The least inertia over all ways to cut the sorted values into k runs."""
    order = np.argsort(values)
    v, w = values[order], weights[order]

    @cache
    def run(a: int, b: int) -> float:
        mean = np.average(v[a:b], weights=w[a:b]) if w[a:b].any() else 0.0
        return float((w[a:b] * (v[a:b] - mean) ** 2).sum())

    cuts = itertools.combinations(range(1, len(v)), min(k, len(v)) - 1)
    return min(sum(run(a, b) for a, b in itertools.pairwise((0, *cut, len(v)))) for cut in cuts)


def lloyd(values, weights, points) -> np.ndarray:
    for _ in range(200):
        nearest = np.abs(values[:, None] - points).argmin(1)
        total = np.bincount(nearest, weights, len(points))
        sums = np.bincount(nearest, weights * values, len(points))
        points = np.where(total > 0, sums / np.where(total > 0, total, 1), points)
    return points


def sample(seed: int, n: int) -> tuple[np.ndarray, np.ndarray]:
    """Values with two humps and weights that differ by orders of magnitude."""
    r = np.random.default_rng(seed)
    values = np.where(r.random(n) < 0.3, r.normal(0.6, 0.1, n), r.normal(-0.1, 0.3, n)).clip(-1, 1)
    return values, r.gamma(0.3, size=n)


pairs = st.lists(st.tuples(st.integers(-12, 12), st.integers(0, 5)), min_size=1, max_size=9)


@given(pairs, st.integers(1, 5))
def test_kmeans_is_the_best_partition(pairs, k):
    values, weights = np.array(pairs, float).T
    if not weights.any():
        weights = weights + 1
    points = kmeans(values, weights, k)
    assert len(points) == k and list(points) == sorted(points) and np.isfinite(points).all()
    assert inertia(values, weights, points) == pytest.approx(brute_force(values, weights, k), abs=1e-9)


@given(st.lists(st.tuples(st.integers(0, 300), st.integers(1, 5)), min_size=12, max_size=14, unique_by=lambda p: p[0]))
def test_kmeans_of_many_points(pairs):
    values, weights = np.array(pairs, float).T
    for k in range(2, 12):
        points = kmeans(values, weights, k)
        assert len(set(points)) == k
        assert inertia(values, weights, points) == pytest.approx(brute_force(values, weights, k), rel=1e-9, abs=1e-9)


@pytest.mark.parametrize("k", [2, 3, 4, 8, 16, 32])
def test_kmeans_agrees_with_the_plain_recursion(k):
    """The same optimum as the O(k·n²) recursion over all starts, which takes nothing for monotone."""
    values, weights = sample(1, 257)
    order = np.argsort(values)
    v, w = values[order], weights[order]
    w0, w1, w2 = (np.concatenate(([0], np.cumsum(w * v**power))) for power in range(3))
    mass = w0[None] - w0[:, None]
    spread = w2[None] - w2[:, None] - (w1[None] - w1[:, None]) ** 2 / np.where(mass > 0, mass, 1)
    cost = np.where(mass > 0, spread, np.inf)
    best = cost[0]
    for _ in range(k - 1):
        best = (best[:, None] + cost).min(0)
    assert inertia(values, weights, kmeans(values, weights, k)) == pytest.approx(best[-1], rel=1e-9)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("k", [4, 8, 16])
def test_kmeans_is_never_above_lloyd(seed, k):
    values, weights = sample(seed, 400)
    exact = inertia(values, weights, kmeans(values, weights, k))
    r = np.random.default_rng(seed)
    starts = [np.quantile(values, (np.arange(k) + 0.5) / k), np.linspace(-1, 1, k)]
    starts += [r.choice(values, k, replace=False) for _ in range(6)]
    found = [inertia(values, weights, lloyd(values, weights, start)) for start in starts]
    assert exact <= min(found) * (1 + 1e-12)
    assert max(found) > exact * 1.001  # there are local optima to fall into


@pytest.mark.parametrize("k", [3, 8, 16])
def test_kmeans_follows_its_values_and_not_the_unit_of_weight(k):
    values, weights = sample(4, 500)
    points = np.array(kmeans(values, weights, k))
    order = np.random.default_rng(0).permutation(500)
    np.testing.assert_allclose(kmeans(values[order], weights[order], k), points, atol=1e-12)
    for unit in (1e-30, 3.0, 1e30):
        np.testing.assert_allclose(kmeans(values, weights * unit, k), points, atol=1e-12)
    np.testing.assert_allclose(kmeans(values + 5, weights, k), points + 5, atol=1e-12)
    np.testing.assert_allclose(kmeans(values * 3, weights, k), points * 3, atol=1e-12)
    np.testing.assert_allclose(kmeans(-values, weights, k), -points[::-1], atol=1e-12)


def test_kmeans_joins_equal_values_and_passes_over_weightless_ones():
    joined = kmeans(np.array([0.0, 1.0, 5.0]), np.array([3.0, 1.0, 1.0]), 2)
    assert joined == pytest.approx((0.25, 5.0))
    apart = kmeans(np.array([0.0, 5.0, 0.0, 9.0, 1.0, 0.0]), np.array([1.0, 1.0, 1.0, 0.0, 1.0, 1.0]), 2)
    assert apart == pytest.approx(joined)


def test_kmeans_without_weights_counts_alike():
    values = np.random.default_rng(0).random(50)
    assert kmeans(values, np.zeros(50), 4) == kmeans(values, np.ones(50), 4)


def test_kmeans_of_few_values():
    ones = np.ones
    assert kmeans(np.array([0.0, 1.0]), ones(2), 4) == (0.0, 0.25, 0.5, 1.0)  # the widest gap, the first of equals
    assert kmeans(np.array([0.0, 1.0, 9.0]), ones(3), 4) == (0.0, 1.0, 5.0, 9.0)
    assert kmeans(np.array([3.0, 3.0]), ones(2), 4) == (3.0,) * 4
    assert kmeans(np.array([2.0, 1.0]), ones(2), 2) == (1.0, 2.0)
    assert kmeans(np.array([2.0, 1.0]), np.array([1.0, 3.0]), 1) == (1.25,)


def test_kmeans_stands_extreme_weights():
    values = np.linspace(-1, 1, 300)
    weights = 10.0 ** np.random.default_rng(0).uniform(-200, 0, 300)
    points = kmeans(values, weights, 16)
    assert np.isfinite(points).all() and list(points) == sorted(points) and -1 <= points[0] <= points[-1] <= 1
    heavy = np.argsort(weights)[-4:]
    assert np.abs(values[heavy][:, None] - points).min(1).max() < 1e-6


def test_kmeans_refuses():
    for values, weights, k in [([], [], 2), ([1.0], [1.0, 2.0], 2), ([np.nan], [1.0], 2), ([1.0], [-1.0], 2)]:
        with pytest.raises(ValueError, match="k-means needs"):
            kmeans(np.array(values), np.array(weights), k)
    with pytest.raises(ValueError, match="k=0"):
        kmeans(np.ones(1), np.ones(1), 0)


@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize("weighted", [False, True])
def test_fit_is_kmeans_of_the_values_themselves(bits, weighted):
    values, weights = sample(7, 3000)
    values = values.astype(np.float32).astype(np.float64)
    weights = weights if weighted else np.ones_like(weights)
    histogram = Histogram()
    histogram.add(torch.tensor(values), torch.tensor(weights) if weighted else None)
    points = fit(histogram, bits)
    best = inertia(values, weights, kmeans(values, weights, 2**bits))
    assert best * (1 - 1e-9) <= inertia(values, weights, points) <= best * 1.001
    Table(bits=bits, points=points)


def test_fit_of_an_empty_histogram():
    with pytest.raises(ValueError, match="empty histogram"):
        fit(Histogram(), 2)


@pytest.mark.parametrize("bits", [2, 3, 4, 5])
def test_normal_float_is_made_of_normal_quantiles(bits):
    tail, half, normal = 0.5 * (1 / 32 + 1 / 30), 2 ** (bits - 1), NormalDist()
    end = normal.inv_cdf(1 - tail)
    # half-1 points below zero and half above it, the probabilities of each side evenly spaced up to its tail
    below = [-normal.inv_cdf(0.5 + (0.5 - tail) * i / (half - 1)) / end for i in range(half - 1, 0, -1)]
    above = [normal.inv_cdf(0.5 + (0.5 - tail) * i / half) / end for i in range(1, half + 1)]
    points = normal_float(bits)
    assert points == pytest.approx([*below, 0.0, *above], abs=1e-12)
    assert (points[0], points[half - 1], points[-1]) == (-1.0, 0.0, 1.0)
    assert len(points) == 2**bits and all(a < b for a, b in itertools.pairwise(points))


def test_evenly():
    assert evenly(2) == pytest.approx((-1, -1 / 3, 1 / 3, 1))
    assert len(evenly(5)) == 32 and np.ptp(np.diff(evenly(5))) < 1e-15
    for wrong in (0, 9):
        with pytest.raises(ValueError, match=f"found {wrong}"):
            evenly(wrong)
    for wrong in (1, 6):
        with pytest.raises(ValueError, match=f"found {wrong}"):
            normal_float(wrong)


def places(points) -> np.ndarray:
    """Where points lie on the grid of their ends; fails where one lies beside it."""
    p = np.array(points)
    k = (p - p[0]) / (p[-1] - p[0]) * 255
    assert np.abs(k - np.rint(k)).max() < 1e-6 * 255
    return np.rint(k).astype(int)


ladders = st.lists(st.floats(-1, 1, width=32), min_size=2, max_size=32, unique=True).map(sorted)


@given(ladders.filter(lambda p: p[-1] - p[0] > 1e-3))
def test_grid_places(points):
    moved = to_grid(points)
    k = places(moved)
    assert (moved[0], moved[-1]) == (points[0], points[-1])
    assert (np.diff(k) > 0).all() and k[0] == 0 and k[-1] == 255
    assert to_grid(moved) == pytest.approx(moved, abs=1e-12)
    ideal = np.rint((np.array(points) - points[0]) / (points[-1] - points[0]) * 255)
    if (np.diff(ideal) > 0).all():  # no two meet: each is at its nearest place
        assert k.tolist() == ideal.tolist()


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_a_table_knows_the_grid_it_lies_on(bits):
    for points in (normal_float(bits), evenly(bits), kmeans(*sample(bits, 300), 2**bits)):
        moved = to_grid(points)
        assert Table(bits=bits, points=moved).grid == tuple(places(moved))
        assert np.abs(np.subtract(moved, points)).max() <= (points[-1] - points[0]) / 510 + 1e-12


def test_grid_keeps_crowded_points_apart():
    assert places(to_grid((0.0, 0.1, 0.1, 255.0))).tolist() == [0, 1, 2, 255]
    assert places(to_grid((0.0, 254.9, 255.0, 255.0))).tolist() == [0, 253, 254, 255]
    assert places(to_grid((0.0, 3.2, 3.3, 9.0, 255.0))).tolist() == [0, 3, 4, 9, 255]
    assert places(to_grid(range(256))).tolist() == list(range(256))
    assert to_grid((2.0, 2.0, 2.0, 2.0)) == (2.0,) * 4


def test_grid_refuses():
    for wrong in ((1.0,), (1.0, 0.0), (0.0, np.nan), tuple(range(257))):
        with pytest.raises(ValueError, match="2 to 256 ascending points"):
            to_grid(wrong)


def test_q_norm_by_hand():
    histogram = Histogram(8)
    histogram.add(torch.tensor([-0.5, -0.25, 0.25, 1.0]), torch.tensor([9.0, 1.0, 5.0, 0.0]))
    # as published, weights play no part
    # quantised to -1/4, -1/4, 1/2, 1/2: mean 1/8, deviation 3/8; the values: mean 1/8, variance 21/64
    scale, offset = q_norm(histogram, (-0.25, 0.5), weighted=False)
    assert scale == pytest.approx(21**0.5 / 3)
    assert offset == pytest.approx(1 / 8 - 21**0.5 / 24)


def test_q_norm_weighs_by_hand():
    histogram = Histogram(8)
    histogram.add(torch.tensor([-0.5, 0.5, 1.0]), torch.tensor([1.0, 3.0, 0.0]))
    # quantised to -1/4, 1/2 with weights 1, 3: mean 5/16, variance 27/256; the values: mean 1/4, variance 3/16
    scale, offset = q_norm(histogram, (-0.25, 0.5))
    assert scale == pytest.approx((3 / 16 * 256 / 27) ** 0.5)
    assert offset == pytest.approx(1 / 4 - 5 / 16 * scale)


def test_q_norm_sends_ties_to_the_lower_point():
    histogram = Histogram(8)
    histogram.add(torch.tensor([-1.0, 0.0, 0.0, 1.0]))
    # -1, -1, -1, 1 : mean -1/2, variance 3/4; the values: mean 0, variance 1/2
    scale, offset = q_norm(histogram, (-1.0, 1.0))
    assert (scale, offset) == pytest.approx(((2 / 3) ** 0.5, (2 / 3) ** 0.5 / 2))


@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize("kind", ["fitted", "even"])
@pytest.mark.parametrize("weighted", [False, True])
def test_q_norm_restores_mean_and_deviation(bits, kind, weighted):
    # one place per bin, away from the edges of bins, so that a bin's values share a code
    places = torch.arange(-1023, 1024, 2) / 1024
    chance = torch.exp(-((places - 0.2) ** 2) / 0.1)
    values = places[torch.multinomial(chance, 20000, replacement=True)]
    histogram = Histogram(1024)
    weights = torch.rand(20000).double()
    histogram.add(values, weights)
    points = fit(histogram, bits) if kind == "fitted" else evenly(bits)
    scale, offset = q_norm(histogram, points, weighted)
    read = tuple(p * scale + offset for p in points)
    table = Table(bits=bits, points=points, read=read)
    dequantised = table.point(table.index(values)).double()
    share = weights / weights.sum() if weighted else torch.full_like(weights, 1 / 20000)
    means = [float((share * x).sum()) for x in (dequantised, values)]
    spreads = [float((share * (x - mean) ** 2).sum()) for x, mean in zip((dequantised, values), means, strict=True)]
    assert means[0] == pytest.approx(means[1], abs=1e-6)
    assert spreads[0] == pytest.approx(spreads[1], rel=1e-5)
    assert scale > 1.001 if kind == "fitted" else scale != 1  # nearest centroids always shrink the spread


@pytest.mark.parametrize("bins", [64, 2048])
@pytest.mark.parametrize("bits", [2, 3])
@pytest.mark.parametrize("seed", range(3))
def test_q_norm_of_any_values_is_near_that_of_each_value(seed, bits, bins):
    """Of the values in a bin that a boundary parts, only how many fall on either side is estimated: a miss of four
    standard deviations of that count, times the distance of the two points, is what mean and spread may be off. A bin
    that went to one side as a whole would be off by its half, up to thirty times as much."""
    values = (torch.randn(50000, generator=torch.Generator().manual_seed(seed)) * 0.3 + 0.1).clamp(-1, 1)
    histogram = Histogram(bins)
    histogram.add(values)
    points = fit(histogram, bits)
    table = Table(bits=bits, points=points)
    rounded, exact = torch.tensor(points).double()[table.index(values).long()], values.double()
    edges = torch.tensor(points[1:]).add(torch.tensor(points[:-1])) / 2
    parted = torch.isin(((exact + 1) * bins / 2).long(), ((edges + 1) * bins / 2).long()).sum().item()
    slack = 4 * (parted**0.5 / 2) * max(np.diff(points)) / len(values)
    scale, offset = q_norm(histogram, points)
    # what the histogram says of the rounded values, from what Q-Norm makes of it
    spread = exact.std(unbiased=False).item() / scale
    assert spread == pytest.approx(rounded.std(unbiased=False).item(), abs=slack / rounded.std().item())
    assert (exact.mean().item() - offset) / scale == pytest.approx(rounded.mean().item(), abs=slack)


def test_q_norm_parts_a_bin_by_the_spread_of_its_values():
    histogram = Histogram(1)
    values = torch.linspace(-1, 1, 4001)
    histogram.add(values)  # all in one bin, evenly: a quarter lies below -1/2
    points = (-1.0, 0.0, 0.5, 1.0)
    scale, offset = q_norm(histogram, points)
    shares, ladder = np.array([0.25, 0.375, 0.25, 0.125]), np.array(points)
    mean = shares @ ladder
    spread = (shares @ (ladder - mean) ** 2) ** 0.5
    assert scale == pytest.approx((1 / 3) ** 0.5 / spread, rel=1e-3)
    assert offset == pytest.approx(-mean * scale, abs=1e-3)


@pytest.mark.parametrize("value", [0.0, 0.1, -0.7])
def test_q_norm_of_flat_values(value):
    histogram = Histogram()
    histogram.add(torch.full((1000,), value))
    assert q_norm(histogram, evenly(2)) == (1.0, 0.0)
    spread = Histogram()
    spread.add(torch.rand(100) / 10)
    assert q_norm(spread, (0.05, 0.9)) == (1.0, 0.0)  # all on one point
    with pytest.raises(ValueError, match="empty histogram"):
        q_norm(Histogram(), evenly(2))
