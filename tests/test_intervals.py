"""Intervals hold what they promise: on simulated data, whose true score is known."""

import numpy as np
import pytest

from extras.intervals import (
    RESAMPLES,
    Sample,
    difference_interval,
    draw_anew,
    score_interval,
    weighted_median,
    wilson,
)


def simulated(rng: np.random.Generator, scenes=16, languages=10, seeds=4, better=0.0) -> Sample:
    """Verdicts of pictures whose chance is the sum of a scene's, a language's and a seed's part, on
    the logistic scale.
    better: how much another run is, on the same scale; then the values are paired differences."""
    scene, language, seed = np.indices((scenes, languages, seeds)).reshape(3, -1)
    ease = (
        rng.normal(0, 1, scenes)[scene]
        + rng.normal(0, 1, languages)[language]
        + rng.normal(0, 0.3, seeds)[seed]
    )
    luck = rng.random(ease.shape)
    right = (luck < 1 / (1 + np.exp(1.5 - ease))).astype(float)
    if better:
        right = (rng.random(ease.shape) < 1 / (1 + np.exp(1.5 - better - ease))) - right
    return Sample(right, language, scene, seed, rows_are_drawn=True)


def test_intervals_cover_the_truth_where_wilson_over_all_pictures_does_not():
    rng = np.random.default_rng(0)
    ease = rng.normal(-1.5, np.sqrt(2.09), 1_000_000)
    truth = (1 / (1 + np.exp(-ease))).mean()
    gain = (1 / (1 + np.exp(-ease - 0.7))).mean() - truth
    covered, naive, paired = [], [], []
    for _ in range(100):
        sample = simulated(rng)
        low, high = score_interval(sample)
        covered.append(low <= truth <= high)
        low, high = wilson(sample.values.sum(), len(sample.values))
        naive.append(low <= truth <= high)
        low, high = difference_interval(simulated(rng, better=0.7))
        paired.append(low <= gain <= high)
    assert np.mean(covered) >= 0.9, f"{np.mean(covered)} of the 95 % intervals hold the truth"
    assert np.mean(paired) >= 0.9, f"{np.mean(paired)} of the intervals of a difference do"
    assert np.mean(naive) <= 0.5, f"Wilson over all pictures: {np.mean(naive)}"


def test_independent_pictures_have_wilsons_interval():
    """Against published values (Brown, Cai & DasGupta 2001)."""
    assert wilson(0, 10) == pytest.approx((0, 0.2775), abs=1e-3)
    assert wilson(10, 10) == pytest.approx((0.7225, 1), abs=1e-3)
    assert wilson(5, 10) == pytest.approx((0.2366, 0.7634), abs=1e-3)
    one = np.zeros(80)
    sample = Sample(np.arange(80) % 2.0, one, np.arange(80), one)
    assert score_interval(sample) == wilson(40, 80)
    both = Sample(np.tile(sample.values, 2), np.repeat([0, 1], 80), np.arange(160), np.zeros(160))
    assert score_interval(both) == pytest.approx(wilson(80, 160), abs=0.01), (
        "two rows of equal size"
    )
    copies = Sample(
        np.repeat(sample.values, 10), np.zeros(800), np.repeat(np.arange(80), 10), np.zeros(800)
    )
    assert score_interval(copies) == pytest.approx(wilson(40, 80), abs=0.01), "copies add nothing"


def test_where_nothing_varies_the_interval_is_not_a_point():
    languages, scenes = np.indices((5, 30)).reshape(2, -1)
    none = Sample(np.zeros(150), languages, scenes, np.zeros(150), rows_are_drawn=True)
    assert score_interval(none) == wilson(0, 30)
    low, high = difference_interval(none)
    assert low < -0.1 and high > 0.1


def test_draws_have_the_variance_of_what_they_stand_for():
    """The mean of k values has the variance s^2 / k, whatever k is; two seeds count too."""
    rng = np.random.default_rng(0)
    for k in (2, 3, 20):
        values = rng.normal(size=k)
        weights = draw_anew(np.arange(k), rng)
        means = weights @ values / weights.sum(1)
        assert 0.85 < means.var() / (values.var(ddof=1) / k) < 1.15
    medians = weighted_median(np.arange(101.0), draw_anew(np.arange(101), rng))
    assert medians.shape == (RESAMPLES,) and 48 < np.median(medians) < 52 and 4 < medians.std() < 8
