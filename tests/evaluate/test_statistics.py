"""Means and intervals against hand numbers, all resamples of a few windows, and their coverage."""

import itertools

import numpy as np
import pytest

from kvist.evaluate.statistics import Estimate, difference, mean, perplexity


def test_by_hand():
    assert mean([1.0, 2.0, 3.0, 6.0]).value == 3.0
    assert perplexity([2.0, 4.0], [1, 3]).value == pytest.approx(np.exp(6 / 4))
    assert difference([1.0, 5.0], [2.0, 3.0]).value == 0.5
    # of two windows, a quarter of the draws has only the one, a quarter only the other
    assert mean([0.0, 1.0]) == Estimate(0.5, 0.0, 1.0)
    low, high = perplexity([0.0, 8.0], [2, 4])[1:]
    assert (low, high) == (1.0, pytest.approx(np.exp(2)))


def test_all_resamples():
    values = [0.3, 1.1, 2.0, 5.5, 7.0, -1.0]
    every = [np.mean(chosen) for chosen in itertools.product(values, repeat=len(values))]
    found = mean(values, draws=200_000)
    assert (found.low, found.high) == pytest.approx(tuple(np.quantile(every, [0.025, 0.975])), abs=0.05)


def test_covers_the_truth_about_as_often_as_it_says():
    random = np.random.default_rng(0)
    held = 0
    for seed in range(300):
        found = mean(random.normal(3.0, 1.0, 32), seed, draws=400)
        held += found.low <= 3.0 <= found.high
    assert 0.88 <= held / 300 <= 0.98


def test_paired_is_narrower_on_correlated_windows():
    random = np.random.default_rng(1)
    hard = random.normal(5.0, 1.0, 40)
    a, b = hard + 0.1 + random.normal(0, 0.02, 40), hard
    paired, alone = difference(a, b), mean(a)
    assert paired.high - paired.low < (alone.high - alone.low) / 10
    assert 0 < paired.low < 0.1 < paired.high


def test_seeded():
    values = [1.0, 2.0, 4.0, 9.0, 3.0]
    assert mean(values, 3) == mean(values, 3) != mean(values, 4)


def test_one_window_has_no_interval():
    assert mean([2.5]) == Estimate(2.5, None, None) and str(mean([2.5])) == "2.5"
    assert str(mean([0.0, 1.0])) == "0.5 [0, 1]"


def test_refusals():
    with pytest.raises(ValueError, match="same windows"):
        difference([1.0], [1.0, 2.0])
    with pytest.raises(ValueError, match="number of tokens"):
        perplexity([1.0], [1, 2])
    with pytest.raises(ValueError, match="number per window"):
        mean([])
