"""k-nearest-neighbour classification of features.

Shapes: N training rows, M test rows, F features.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

CHUNK = 1024


def knn_predict(
    train_features: Tensor,
    train_labels: Tensor,
    test_features: Tensor,
    *,
    k: int = 20,
    temperature: float = 0.07,
) -> Tensor:
    """Classes voted by the k nearest training rows in cosine similarity.

    A neighbour's vote weighs exp(similarity / temperature).

    Args:
        train_features: (N, F).
        train_labels: (N,) integers from 0.
        test_features: (M, F).
        k: neighbours, at most N.
        temperature: smaller trusts the nearest more.

    Returns:
        (M,) predicted classes.

    Raises:
        ValueError: fewer than k training rows, or numbers of rows and labels that differ.

    Source: Wu et al. 2018, arXiv:1805.01978, section 3.4; Bardes et al. 2022, table 11.
    """
    if len(train_features) != len(train_labels):
        raise ValueError(
            "every training row needs one label, got "
            f"{len(train_features)} rows and {len(train_labels)} labels."
        )
    if not 1 <= k <= len(train_features):
        raise ValueError(f"k must lie between 1 and {len(train_features)} training rows, got {k}.")
    bank = F.normalize(train_features.float(), dim=1)
    num_classes = int(train_labels.max()) + 1
    predictions = []
    for chunk in F.normalize(test_features.float(), dim=1).split(CHUNK):
        similarity, nearest = (chunk @ bank.T).topk(k, dim=1)
        # the largest similarity is subtracted so that the weights cannot overflow
        weights = ((similarity - similarity[:, :1]) / temperature).exp()
        votes = weights.new_zeros(len(chunk), num_classes)
        votes.scatter_add_(1, train_labels[nearest], weights)
        predictions.append(votes.argmax(1))
    return torch.cat(predictions)


def knn_accuracy(
    train_features: Tensor,
    train_labels: Tensor,
    test_features: Tensor,
    test_labels: Tensor,
    *,
    k: int = 20,
    temperature: float = 0.07,
) -> float:
    """Share of test rows, 0 to 1, that `knn_predict` classifies rightly."""
    if len(test_features) != len(test_labels):
        raise ValueError(
            "every test row needs one label, got "
            f"{len(test_features)} rows and {len(test_labels)} labels."
        )
    predicted = knn_predict(
        train_features, train_labels, test_features, k=k, temperature=temperature
    )
    return (predicted == test_labels).float().mean().item()
