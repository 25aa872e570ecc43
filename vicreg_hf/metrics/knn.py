"""k-nearest-neighbour classification of features.

Shapes: N training rows, M test rows, F features.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from vicreg_hf.metrics.checks import (
    Values,
    as_features,
    as_labels,
    check_finite,
    check_one_label_each,
    check_same_width,
)
from vicreg_hf.runtime.checks import is_whole

CHUNK = 1024


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
    train = as_features("train_features", train_features)
    test = as_features("test_features", test_features)
    labels = as_labels("train_labels", train_labels).to(train.device)
    check_one_label_each("training", len(train), len(labels))
    check_same_width(train, test)
    if not is_whole(k) or not 1 <= k <= len(train):
        raise ValueError(f"k must lie between 1 and {len(train)} training rows, got {k}.")
    check_finite("train_features", train)
    check_finite("test_features", test)
    return vote(train, labels, test, k=k, temperature=temperature)


def vote(
    train: Tensor, labels: Tensor, test: Tensor, *, k: int, temperature: float = 0.07
) -> Tensor:
    """`knn_predict` of what is known to be right, but for features that are not finite."""
    bank = F.normalize(train.float(), dim=1)
    num_classes = int(labels.max()) + 1
    predictions = []
    for chunk in F.normalize(test.float(), dim=1).split(CHUNK):
        similarity, nearest = (chunk @ bank.T).topk(k, dim=1)
        # the largest similarity is subtracted so that the weights cannot overflow
        weights = ((similarity - similarity[:, :1]) / temperature).exp()
        votes = weights.new_zeros(len(chunk), num_classes)
        votes.scatter_add_(1, labels[nearest], weights)
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
    """Share of test rows, 0 to 1, that `knn_predict` classifies rightly.

    Raises:
        ValueError: as `knn_predict`, and likewise of test labels; no test rows.
    """
    test = as_features("test_features", test_features)
    labels = as_labels("test_labels", test_labels)
    check_one_label_each("test", len(test), len(labels))
    if not len(test):
        raise ValueError("test_features must have at least 1 row, got none.")
    predicted = knn_predict(train_features, train_labels, test, k=k, temperature=temperature)
    return (predicted == labels.to(predicted.device)).float().mean().item()
