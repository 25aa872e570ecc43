"""Measurements, and bootstrap intervals against theory."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from scipy.stats import binom

from vicreg_hf.evaluation.measurements import Measurement
from vicreg_hf.metrics.intervals import MOST_VALUES, bootstrap_interval

# --- intervals


@pytest.mark.parametrize("shape", ["two values", "many values"])
def test_intervals_cover_the_truth_about_as_often_as_they_say(shape: str) -> None:
    random = np.random.default_rng(0)
    covered = 0
    for seed in range(300):
        if shape == "two values":
            scores, truth = (random.random(200) < 0.7).astype(np.float64), 0.7
        else:
            scores, truth = random.exponential(size=200), 1.0
        low, high = bootstrap_interval(scores, seed=seed, resamples=400)
        covered += low <= truth <= high
    assert 0.90 <= covered / 300 <= 0.98


@pytest.mark.parametrize("scale", [0.3, 7.0])
def test_many_images_give_the_normal_approximation(scale: float) -> None:
    scores = 2 + scale * np.random.default_rng(0).normal(size=5000)
    error = 1.96 * scores.std() / np.sqrt(5000)
    low, high = bootstrap_interval(scores, resamples=3000)
    assert scores.mean() - low == pytest.approx(error, rel=0.08)
    assert high - scores.mean() == pytest.approx(error, rel=0.08)


@pytest.mark.parametrize("right", [2, 20, 90])
def test_two_values_give_quantiles_of_the_binomial_distribution(right: int) -> None:
    scores = np.arange(100) < right
    low, high = bootstrap_interval(scores, resamples=20_000)
    expected = binom.ppf([0.025, 0.975], 100, right / 100) / 100
    assert [low, high] == pytest.approx(expected, abs=0.0101)  # lopsided, and never below 0


def spread(scores: NDArray[np.float64]) -> NDArray[np.float64]:
    """As good as equal, but more different values than are counted."""
    return scores + 1e-7 * np.arange(len(scores))


@pytest.mark.parametrize("values", [2, 5])
def test_few_and_many_values_give_the_same_interval(values: int) -> None:
    scores = np.random.default_rng(0).integers(values, size=400).astype(np.float64)
    assert len(np.unique(scores)) <= MOST_VALUES < len(np.unique(spread(scores)))
    few = bootstrap_interval(scores, resamples=4000)
    many = bootstrap_interval(spread(scores), resamples=4000)
    width = few[1] - few[0]
    assert many == pytest.approx(few, abs=0.05 * width)


def test_equal_scores_leave_no_doubt() -> None:
    assert bootstrap_interval(np.full(30, 0.25)) == (0.25, 0.25)
    assert bootstrap_interval([1.0]) == (1.0, 1.0)


def test_booleans_lists_and_tensors_are_taken() -> None:
    scores = np.random.default_rng(0).random(100) < 0.4
    expected = bootstrap_interval(scores.astype(np.float64))
    assert bootstrap_interval(scores) == expected
    assert bootstrap_interval(scores.tolist()) == expected
    assert bootstrap_interval(torch.from_numpy(scores)) == expected


@pytest.mark.parametrize("values", [2, 1000])
def test_an_interval_is_a_function_of_scores_and_seed(values: int) -> None:
    scores = np.random.default_rng(0).integers(values, size=300).astype(np.float64)
    before = np.random.get_state(legacy=False)["state"]["key"].tolist()  # noqa: NPY002
    first = bootstrap_interval(scores, seed=1)
    assert np.random.get_state(legacy=False)["state"]["key"].tolist() == before  # noqa: NPY002
    assert bootstrap_interval(scores, seed=1) == first
    assert bootstrap_interval(scores, seed=2) != first


@pytest.mark.parametrize(("scores", "shape"), [([], r"\(0,\)"), ([[1.0, 0.0]], r"\(1, 2\)")])
def test_scores_that_are_not_one_an_image_are_refused(scores: list[float], shape: str) -> None:
    with pytest.raises(ValueError, match=f"one number an image, got shape {shape}"):
        bootstrap_interval(scores)


# --- measurements


@pytest.mark.parametrize(
    ("measurement", "expected"),
    [
        (Measurement("knn", "accuracy", 0.71236, 50, 0), "71.24 %"),
        (
            Measurement("knn", "accuracy", 0.71236, 50, 0, low=0.7, high=0.7251),
            "71.24 % (70.00 to 72.51)",
        ),
        (Measurement("knn", "accuracy", 0.0, 50, 0, low=0.0, high=0.0), "0.00 % (0.00 to 0.00)"),
        (Measurement("collapse", "rank", 123.4567, 50, 0, percent=False), "123.5"),
    ],
)
def test_a_measurement_is_shown_with_its_interval(measurement: Measurement, expected: str) -> None:
    assert measurement.shown == expected


def test_a_measurement_survives_json() -> None:
    measurement = Measurement(
        "linear", "top-1 accuracy", 0.5, 10, 3, {"epochs": 30}, 0.4, 0.6,
        details={"tried": [{"learning_rate": 0.1}]},
    )  # fmt: skip
    read = json.loads(json.dumps(measurement.to_dict(), allow_nan=False))
    assert Measurement(**read) == measurement
    assert list(read)[:3] == ["protocol", "name", "value"]


def test_what_to_dict_gives_can_be_changed_without_changing_the_measurement() -> None:
    measurement = Measurement("knn", "accuracy", 0.5, 10, 3, {"k": 20})
    measurement.to_dict()["settings"]["k"] = 1
    assert measurement.settings["k"] == 20
