"""Images of several classes at once: one linear SVM a class, after the protocol for VOC07.

It differs in average precision, which scikit-learn does not interpolate, and in fewer costs.

Shapes: N training rows, M test rows, F features, K classes.
"""

from __future__ import annotations

import warnings

import numpy as np
from numpy.typing import ArrayLike, NDArray
from sklearn.exceptions import ConvergenceWarning
from sklearn.metrics import average_precision_score
from sklearn.model_selection import StratifiedKFold, cross_val_score
from sklearn.preprocessing import normalize
from sklearn.svm import LinearSVC

COSTS = tuple(10.0**exponent for exponent in range(-4, 3))
FOLDS = 3
POSITIVE_WEIGHT = 2.0


def svm_scores(
    train_features: ArrayLike,
    train_targets: ArrayLike,
    test_features: ArrayLike,
    *,
    seed: int = 0,
) -> tuple[NDArray[np.float64], list[float]]:
    """Scores of one linear SVM a class, on features of unit length.

    The cost of each class is the one of best average precision in cross-validation over the
    training rows; positives weigh twice.

    Args:
        train_features: (N, F).
        train_targets: (N, K), 1 where a row shows a class and 0 where not.
        test_features: (M, F).

    Returns:
        (M, K) scores, larger where a class is more likely, and the cost of each class.

    Raises:
        ValueError: a class with fewer positive or negative rows than cross-validation needs.

    Source: Goyal et al. 2019, arXiv:1905.01235, whose protocol the paper's table 2 follows.
    """
    targets = np.asarray(train_targets) > 0
    x, x_test = (normalize(np.asarray(v, np.float64)) for v in (train_features, test_features))
    counts = targets.sum(0)
    rare = np.flatnonzero((counts < FOLDS) | (len(targets) - counts < FOLDS))
    if len(rare):
        raise ValueError(
            f"every class needs at least {FOLDS} training images that show it and {FOLDS} that do "
            f"not, got {counts[rare[0]]} of {len(targets)} for class {rare[0]}; leave it out."
        )
    folds = StratifiedKFold(FOLDS, shuffle=True, random_state=seed)
    scores, chosen = np.empty((len(x_test), targets.shape[1])), []
    with warnings.catch_warnings():  # the largest costs do not converge, and are not chosen
        warnings.simplefilter("ignore", ConvergenceWarning)
        for k, target in enumerate(targets.T):
            precision = [
                cross_val_score(_svm(cost, seed), x, target, cv=folds, scoring="average_precision")
                for cost in COSTS
            ]
            chosen.append(COSTS[int(np.argmax(np.mean(precision, axis=1)))])
            scores[:, k] = _svm(chosen[-1], seed).fit(x, target).decision_function(x_test)
    return scores, chosen


def mean_average_precision(scores: ArrayLike, targets: ArrayLike) -> tuple[float, list[float]]:
    """Average precision of every class, and their mean.

    Args:
        scores: (M, K).
        targets: (M, K), 1 where a row shows a class and 0 where not; classes that no row shows
            count for nothing.

    Returns:
        The mean over classes, and that of each class; NaN where no row shows a class.
    """
    scores, targets = np.asarray(scores), np.asarray(targets) > 0
    each = [
        float(average_precision_score(target, score)) if target.any() else float("nan")
        for target, score in zip(targets.T, scores.T, strict=True)
    ]
    shown = [value for value in each if not np.isnan(value)]
    return float(np.mean(shown)) if shown else float("nan"), each


def _svm(cost: float, seed: int) -> LinearSVC:
    weights = {True: POSITIVE_WEIGHT, False: 1.0}
    return LinearSVC(C=cost, class_weight=weights, random_state=seed, max_iter=2000)
