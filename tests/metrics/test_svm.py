"""Linear SVMs of several classes against one class at a time, and average precision by hand."""

from __future__ import annotations

import warnings

import numpy as np
import pytest
from numpy.typing import NDArray
from sklearn.exceptions import ConvergenceWarning
from sklearn.model_selection import StratifiedKFold
from sklearn.svm import LinearSVC

from vicreg_hf.metrics import svm
from vicreg_hf.metrics.svm import COSTS, mean_average_precision, svm_scores

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]


def multi_label(rows: int, *, seed: int, noise: float, dim: int = 8) -> tuple[Floats, Ints]:
    """Features that are the sum of those of three classes, of which a row shows some."""
    random = np.random.default_rng(seed)
    targets = (random.random((rows, 3)) < [0.5, 0.3, 0.15]).astype(np.int64)
    shown = np.random.default_rng(99).normal(size=(3, dim))
    return 1 + targets @ shown + noise * random.normal(size=(rows, dim)), targets


def precision_by_hand(scores: Floats, target: Ints) -> float:
    """Mean, over what is sought, of the share of it among all that come no later; no ties."""
    ranked = target[np.argsort(-scores)]
    places = np.flatnonzero(ranked)
    return float(np.mean([ranked[: place + 1].mean() for place in places]))


def one_class(x: Floats, target: Ints, x_test: Floats, seed: int) -> tuple[Floats, float]:
    """Goyal et al. 2019, written for one class: positives weigh 2, three folds choose the cost."""

    def fit(cost: float, rows: Ints) -> LinearSVC:
        one = LinearSVC(C=cost, random_state=seed, max_iter=2000)
        return one.fit(x[rows], target[rows], sample_weight=1.0 + target[rows])

    x = x / np.sqrt((x**2).sum(1, keepdims=True))
    x_test = x_test / np.sqrt((x_test**2).sum(1, keepdims=True))
    folds = list(StratifiedKFold(3, shuffle=True, random_state=seed).split(x, target))
    means = [
        np.mean([
            precision_by_hand(fit(cost, kept).decision_function(x[held_out]), target[held_out])
            for kept, held_out in folds
        ])
        for cost in COSTS
    ]  # fmt: skip
    best = COSTS[int(np.argmax(means))]
    return fit(best, np.arange(len(x))).decision_function(x_test), best


# --- the SVMs


@pytest.mark.filterwarnings("ignore::sklearn.exceptions.ConvergenceWarning")  # the reference's
@pytest.mark.parametrize("seed", [0, 1, 3])
def test_scores_and_costs_are_those_of_one_class_at_a_time(seed: int) -> None:
    x, targets = multi_label(90, seed=0, noise=1.5)
    x_test, _ = multi_label(60, seed=1, noise=1.5)
    scores, costs = svm_scores(x, targets, x_test, seed=seed)
    expected = [one_class(x, target, x_test, seed) for target in targets.T]
    assert costs == [cost for _, cost in expected]
    np.testing.assert_allclose(scores.T, [own for own, _ in expected], rtol=1e-6, atol=1e-8)


def test_folds_differ_by_seed_and_costs_by_class() -> None:
    x, targets = multi_label(90, seed=0, noise=1.5)
    chosen = [svm_scores(x, targets, x, seed=seed)[1] for seed in (0, 1)]
    assert chosen[0] != chosen[1]
    assert len(set(chosen[1])) > 1


def test_classes_that_can_be_separated_are() -> None:
    x, targets = multi_label(200, seed=0, noise=0.01)
    x_test, wanted = multi_label(100, seed=1, noise=0.01)
    scores, _ = svm_scores(x, targets, x_test)
    assert scores.shape == (100, 3)
    assert mean_average_precision(scores, wanted)[0] > 0.99


def test_labels_of_noise_are_not_recovered() -> None:
    x, targets = multi_label(200, seed=0, noise=1)
    x_test, wanted = multi_label(100, seed=1, noise=1)
    shuffled = np.random.default_rng(0).permutation(targets)
    scores, _ = svm_scores(x, shuffled, x_test)
    assert mean_average_precision(scores, wanted)[0] < wanted.mean() + 0.15


def test_length_of_features_does_not_matter() -> None:
    x, targets = multi_label(80, seed=0, noise=1)
    lengths = np.logspace(-2, 2, 80)[:, None]
    expected, costs = svm_scores(x, targets, x)
    actual, costs_of_scaled = svm_scores(x * lengths, targets, x * 7)
    np.testing.assert_allclose(actual, expected, rtol=1e-4, atol=1e-6)
    assert costs_of_scaled == costs


def test_lists_booleans_and_float32_are_taken() -> None:
    x, targets = multi_label(60, seed=0, noise=1)
    x = x.astype(np.float32)
    expected, _ = svm_scores(x, targets, x)
    np.testing.assert_array_equal(svm_scores(x, targets.astype(bool), x)[0], expected)
    np.testing.assert_array_equal(svm_scores(x.tolist(), targets.tolist(), x)[0], expected)


def test_a_seed_gives_the_same_scores_and_numpys_generator_has_no_part() -> None:
    x, targets = multi_label(60, seed=0, noise=2)
    before = np.random.get_state(legacy=False)["state"]["key"].tolist()  # noqa: NPY002
    first = svm_scores(x, targets, x, seed=1)
    assert np.random.get_state(legacy=False)["state"]["key"].tolist() == before  # noqa: NPY002
    again = svm_scores(x, targets, x, seed=1)
    np.testing.assert_array_equal(again[0], first[0])
    assert again[1] == first[1]


def test_costs_that_do_not_converge_are_not_spoken_of() -> None:
    random = np.random.default_rng(0)
    x, target = random.normal(size=(100, 300)), random.integers(2, size=100)
    # nearly equal rows of opposite classes
    x, target = (
        np.concatenate([x, x + 1e-3 * random.normal(size=x.shape)]),
        np.r_[target, 1 - target],
    )
    unit = x / np.linalg.norm(x, axis=1, keepdims=True)
    with pytest.warns(ConvergenceWarning):
        svm._svm(1e2, 0).fit(unit, target > 0)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        svm_scores(x, target[:, None], x, costs=[1e2])
    assert caught == []


@pytest.mark.parametrize(
    ("shown", "message"),
    [
        (2, "got 2 of 12 for class 1; leave it out"),
        (0, "got 0 of 12 for class 1"),
        (10, "got 10 of 12 for class 1"),
        (12, "got 12 of 12 for class 1"),
    ],
)
def test_a_class_too_rare_or_too_common_is_refused(shown: int, message: str) -> None:
    x = np.random.default_rng(0).normal(size=(12, 4))
    targets = np.stack([np.arange(12) % 2, np.arange(12) < shown], axis=1)
    with pytest.raises(ValueError, match=message):
        svm_scores(x, targets, x)


@pytest.mark.parametrize("shown", [3, 9])
def test_three_rows_of_a_class_suffice(shown: int) -> None:
    x = np.random.default_rng(0).normal(size=(12, 4))
    scores, costs = svm_scores(x, (np.arange(12) < shown)[:, None], x)
    assert scores.shape == (12, 1)
    assert np.isfinite(scores).all()
    assert costs[0] in COSTS


# --- average precision


@pytest.mark.parametrize(
    ("scores", "target", "expected"),
    [
        ([0.9, 0.8, 0.7, 0.6], [1, 0, 1, 0], (1 + 2 / 3) / 2),
        ([0.6, 0.7, 0.8, 0.9], [1, 0, 1, 0], (1 / 2 + 2 / 4) / 2),
        ([3.0, 2.0, -1.0], [1, 1, 0], 1.0),
        ([3.0, 2.0, -1.0], [0, 0, 1], 1 / 3),
        ([5.0, 5.0, 5.0, 5.0], [1, 0, 0, 0], 1 / 4),  # nothing is known
        ([2.0, 1.0], [1, 1], 1.0),
    ],
)
def test_average_precision_of_values_worked_by_hand(
    scores: list[float], target: list[int], expected: float
) -> None:
    mean, each = mean_average_precision(np.array([scores]).T, np.array([target]).T)
    assert each == [pytest.approx(expected)]
    assert mean == pytest.approx(expected)


def test_mean_average_precision_is_the_mean_over_classes_that_are_shown() -> None:
    random = np.random.default_rng(0)
    scores, targets = random.normal(size=(40, 4)), random.integers(2, size=(40, 4))
    targets[:, 2] = 0
    mean, each = mean_average_precision(scores, targets)
    expected = [precision_by_hand(scores[:, k], targets[:, k]) for k in (0, 1, 3)]
    assert np.isnan(each[2])
    assert [each[k] for k in (0, 1, 3)] == pytest.approx(expected)
    assert mean == pytest.approx(np.mean(expected))


def test_where_no_class_is_shown_there_is_no_mean_and_no_warning() -> None:
    mean, each = mean_average_precision(np.ones((3, 2)), np.zeros((3, 2)))
    assert np.isnan([mean, *each]).all()
