"""Means and intervals against hand numbers, all resamples of a few windows, and their coverage."""

import itertools

import numpy as np
import pytest

from kvist.evaluate.statistics import (
    Estimate,
    difference,
    flipped,
    holm,
    mcnemar,
    mean,
    means,
    paired_p,
    perplexity,
)


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


def test_curves_are_means_at_each_place():
    rows = np.random.default_rng(0).random((9, 4)).tolist()
    for place, found in zip(zip(*rows, strict=True), means(rows, 2), strict=True):
        assert found == pytest.approx(mean(place, 2))
    assert means([[1.0, 2.0]]) == [Estimate(1.0, None, None), Estimate(2.0, None, None)]
    with pytest.raises(ValueError, match="curve per window"):
        means([])


def test_mcnemar_by_hand():
    # 1 against 6 of 7 that differ: twice the chance of 0 or 1 heads in 7 throws
    a, b = [1] * 6 + [0] + [1] * 20, [0] * 6 + [1] + [1] * 20
    assert mcnemar(a, b) == mcnemar(b, a) == pytest.approx(2 * (1 + 7) / 2**7)
    assert mcnemar(a, a) == 1.0 and mcnemar([1, 0], [0, 1]) == 1.0
    assert paired_p(a, b) == mcnemar(a, b) and paired_p([0.5, 1.0], [0.0, 0.0]) == 0.5
    assert mcnemar([1] * 2000, [0] * 2000) == 0.0  # 2**-1999


def test_flipped_signs_against_all_of_them():
    x = [0.3, -0.1, 0.8, 0.4, 1.1, -0.2]
    far = [abs(np.dot(signs, x)) >= abs(sum(x)) - 1e-12 for signs in itertools.product((1, -1), repeat=len(x))]
    assert flipped(x) == pytest.approx(np.mean(far))
    more = np.random.default_rng(0).normal(0.4, 1.0, 12)
    assert flipped(more, draws=4095) == pytest.approx(flipped(more), abs=0.02)  # drawn, and all 4096
    assert flipped([1.0] * 5) == 2 / 32 and flipped([0.0, 0.0]) == 1.0
    assert flipped([1.0] * 200) == pytest.approx(1 / 20_001)


def test_flipped_signs_are_seldom_wrong():
    random = np.random.default_rng(2)
    ps = [flipped(random.normal(0.0, 1.0, 24), seed, draws=999) for seed in range(300)]
    assert 0.02 <= np.mean(np.array(ps) < 0.05) <= 0.09


def test_holm_by_hand():
    assert holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert holm([0.5, 0.9]) == [1.0, 1.0] and holm([]) == []


def test_unpaired_is_refused():
    with pytest.raises(ValueError, match="same items"):
        paired_p([1], [1, 0])
