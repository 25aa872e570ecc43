"""Intervals against theory."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.stats import binom, binomtest

from vicreg_hf.metrics.intervals import bootstrap_interval, share_interval


@pytest.mark.parametrize("two_values", [True, False])
def test_intervals_cover_the_truth_about_as_often_as_they_say(two_values: bool) -> None:
    random = np.random.default_rng(0)
    covered = 0
    for seed in range(150):
        scores = random.random(200) < 0.7 if two_values else random.exponential(size=200)
        low, high = bootstrap_interval(scores, seed=seed, resamples=300)
        covered += low <= (0.7 if two_values else 1.0) <= high
    assert 0.90 <= covered / 150 <= 0.98


@pytest.mark.parametrize("right", [2, 20, 90])
def test_two_values_give_quantiles_of_the_binomial_distribution(right: int) -> None:
    scores = np.arange(100) < right
    low, high = bootstrap_interval(scores, resamples=20_000)
    expected = binom.ppf([0.025, 0.975], 100, right / 100) / 100
    assert [low, high] == pytest.approx(expected, abs=0.0101)  # lopsided, and never below 0
    assert bootstrap_interval(scores.tolist(), resamples=20_000) == (low, high)


@pytest.mark.parametrize("values", [2, 1000])
def test_an_interval_is_a_function_of_scores_and_seed(values: int) -> None:
    scores = np.random.default_rng(0).integers(values, size=300).astype(np.float64)
    before = np.random.get_state(legacy=False)["state"]["key"].tolist()  # noqa: NPY002
    first = bootstrap_interval(scores, seed=1)
    assert np.random.get_state(legacy=False)["state"]["key"].tolist() == before  # noqa: NPY002
    assert bootstrap_interval(scores, seed=1) == first
    assert bootstrap_interval(np.full(30, 0.25)) == (0.25, 0.25)
    assert bootstrap_interval(scores, seed=2) != first


@pytest.mark.parametrize(("scores", "shape"), [([], r"\(0,\)"), ([[1.0, 0.0]], r"\(1, 2\)")])
def test_scores_that_are_not_one_an_image_are_refused(scores: list[float], shape: str) -> None:
    with pytest.raises(ValueError, match=f"one number an image, got shape {shape}"):
        bootstrap_interval(scores)


@pytest.mark.parametrize("right", [0, 1, 60, 120])
def test_shares_have_wilsons_interval_which_is_never_empty(right: int) -> None:
    interval = binomtest(right, 120).proportion_ci(method="wilson")
    found = share_interval(np.arange(120) < right)
    assert found == pytest.approx((interval.low, interval.high), abs=1e-12)
    assert found[1] - found[0] > 0.03


def test_scores_between_0_and_1_have_intervals_that_cover_their_mean() -> None:
    random, covered = np.random.default_rng(0), 0
    for _ in range(300):
        low, high = share_interval(random.beta(0.5, 0.2, size=80))
        covered += low <= 0.5 / 0.7 <= high
    assert 0.90 <= covered / 300 <= 0.98
    low, high = share_interval(np.full(30, 0.25))
    assert low < 0.25 < high
    with pytest.raises(ValueError, match="scores must be from 0 to 1, got 0 to 2"):
        share_interval([0, 2])
