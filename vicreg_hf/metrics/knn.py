"""k-nearest-neighbour classification of features.

Shapes: N training rows, M test rows, F features.
"""

from __future__ import annotations

import torch
from torch import Tensor

from vicreg_hf.metrics.arrays import (
    Values,
    accuracy,
    as_features,
    as_labelled,
    check_finite,
    check_same_width,
)
from vicreg_hf.metrics.retrieval import QUERIES_AT_ONCE, most_similar
from vicreg_hf.runtime.checks import is_whole


def knn_predict(
    train_features: Values,
    train_labels: Values,
    test_features: Values,
    *,
    k: int = 20,
    temperature: float = 0.07,
) -> Tensor:
    """Classes voted by the k nearest training rows in cosine similarity.

    A neighbour's vote weighs exp(similarity / temperature).

    Args:
        train_features: (N, F), a tensor or an array.
        train_labels: (N,) integers from 0.
        test_features: (M, F).
        k: neighbours, at most N.
        temperature: smaller trusts the nearest more.

    Returns:
        (M,) predicted classes.

    Raises:
        ValueError: fewer than k training rows, numbers of rows and labels that differ, features of
            two widths or that are not finite, or labels that are no integers from 0.

    Source: Wu et al. 2018, arXiv:1805.01978, section 3.4; Bardes et al. 2022, table 11.
    """
    train, labels = as_labelled("train", train_features, train_labels)
    test = as_features("test_features", test_features)
    check_same_width(train, test)
    if not is_whole(k) or not 1 <= k <= len(train):
        raise ValueError(f"k must lie between 1 and {len(train)} training rows, got {k}.")
    check_finite("train_features", train)
    check_finite("test_features", test)
    return vote(train, labels, test, k=k, temperature=temperature)


def vote(
    train: Tensor,
    labels: Tensor,
    test: Tensor,
    *,
    k: int,
    temperature: float = 0.07,
    own_rows: Tensor | None = None,
) -> Tensor:
    """`knn_predict` for features and labels that fit together; features need not be finite.

    Args:
        own_rows: (M,) training row that a test row is itself, and that has no vote on it, as in
            leave-one-out; k is then at most N - 1.
    """
    similarity, rows = most_similar(train, test, k, own_rows=own_rows)
    # the largest similarity is subtracted so that the weights cannot overflow
    weights = ((similarity - similarity[:, :1]) / temperature).exp()
    num_classes = int(labels.max()) + 1
    predictions = []
    for own, near in zip(weights.split(QUERIES_AT_ONCE), rows.split(QUERIES_AT_ONCE), strict=True):
        votes = own.new_zeros(len(own), num_classes).scatter_add_(1, labels[near], own)
        predictions.append(votes.argmax(1))
    return torch.cat(predictions)


def knn_accuracy(
    train_features: Values,
    train_labels: Values,
    test_features: Values,
    test_labels: Values,
    *,
    k: int = 20,
    temperature: float = 0.07,
) -> float:
    """Share of test rows, 0 to 1, whose class `knn_predict` finds.

    Raises:
        ValueError: as for `knn_predict`, also for test labels; no test rows.
    """
    test, labels = as_labelled("test", test_features, test_labels)
    return accuracy(
        knn_predict(train_features, train_labels, test, k=k, temperature=temperature), labels
    )
