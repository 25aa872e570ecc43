"""Linear SVMs of several classes against one class at a time, and average precision by hand."""

from __future__ import annotations

import numpy as np
import pytest
from numpy.typing import NDArray
from sklearn.metrics import average_precision_score
from sklearn.model_selection import StratifiedKFold
from sklearn.svm import LinearSVC

from vicreg_hf.metrics.svm import COSTS, mean_average_precision, svm_scores

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]


def multi_label(rows: int, *, seed: int, noise: float, dim: int = 8) -> tuple[Floats, Ints]:
    """Features that are the sum of those of three classes, of which a row shows some."""
    random = np.random.default_rng(seed)
    targets = (random.random((rows, 3)) < [0.5, 0.3, 0.15]).astype(np.int64)
    shown = np.random.default_rng(99).normal(size=(3, dim))
    return 1 + targets @ shown + noise * random.normal(size=(rows, dim)), targets


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
            average_precision_score(target[rest], fit(cost, kept).decision_function(x[rest]))
            for kept, rest in folds
        ])
        for cost in COSTS
    ]  # fmt: skip
    best = COSTS[int(np.argmax(np.array(means)))]
    return fit(best, np.arange(len(x))).decision_function(x_test), best


@pytest.mark.filterwarnings("ignore::sklearn.exceptions.ConvergenceWarning")  # the reference's
def test_scores_and_costs_are_those_of_one_class_at_a_time() -> None:
    seed = 1
    x, targets = multi_label(90, seed=0, noise=1.5)
    x_test, _ = multi_label(60, seed=1, noise=1.5)
    lengths = np.logspace(-2, 2, 90)[:, None]  # which do not matter
    scores, costs = svm_scores((x * lengths).tolist(), targets.astype(bool), x_test, seed=seed)
    expected = [one_class(x, target, x_test, seed) for target in targets.T]
    assert costs == [cost for _, cost in expected]
    np.testing.assert_allclose(scores.T, [own for own, _ in expected], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("shown", [2, 10])
def test_a_class_too_rare_or_too_common_is_refused(shown: int) -> None:
    x = np.random.default_rng(0).normal(size=(12, 4))
    targets = np.stack([np.arange(12) % 2, np.arange(12) < shown], axis=1)
    with pytest.raises(ValueError, match=f"got {shown} of 12 for class 1; leave it out"):
        svm_scores(x, targets, x)


def test_average_precision_of_values_worked_by_hand() -> None:
    scores = np.array([[0.9, 3.0, 5.0, 1.0], [0.8, 2.0, 5.0, 1.0], [0.7, -1.0, 5.0, 1.0]])
    targets = np.array([[1, 0, 1, 0], [0, 0, 0, 0], [1, 1, 0, 0]])
    mean, each = mean_average_precision(scores, targets)
    expected = [(1 + 2 / 3) / 2, 1 / 3, 1 / 3]  # of the third, nothing is known
    assert each == pytest.approx([*expected, np.nan], nan_ok=True)
    assert mean == pytest.approx(np.mean(expected))  # over classes that are shown
    assert np.isnan(mean_average_precision(scores, np.zeros_like(targets))[0])
