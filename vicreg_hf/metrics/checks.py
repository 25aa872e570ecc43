"""Features and labels as callers give them: tensors, arrays of NumPy or lists.

Shapes: N rows, F features.
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import ArrayLike
from torch import Tensor

Values = Tensor | ArrayLike


def as_tensor(name: str, given: Values) -> Tensor:
    """The same values as a tensor; of arrays without a copy where that can be.

    Raises:
        ValueError: no numbers.
    """
    if isinstance(given, np.ndarray):  # torch warns of what cannot be written to
        given = np.require(given, requirements=["C", "W"])
    try:
        return torch.as_tensor(given)
    except (TypeError, ValueError, RuntimeError) as error:
        raise ValueError(
            f"{name} must be a tensor or an array of numbers, got {type(given).__name__}: {error}"
        ) from error


def as_features(name: str, given: Values) -> Tensor:
    """Features (N, F).

    Raises:
        ValueError: another number of dimensions.
    """
    features = as_tensor(name, given)
    if features.ndim != 2:
        raise ValueError(f"{name} must be rows of features (N, F), got {tuple(features.shape)}.")
    return features


def as_labels(name: str, given: Values) -> Tensor:
    """Labels (N,) as int64.

    Raises:
        ValueError: another number of dimensions, no integers, or one below 0.
    """
    labels = as_tensor(name, given)
    if labels.ndim != 1:
        raise ValueError(f"{name} must be one class for each row, got {tuple(labels.shape)}.")
    if labels.is_floating_point() or labels.is_complex() or labels.dtype == torch.bool:
        raise ValueError(f"{name} must be integers, got {labels.dtype}; convert them with .long().")
    labels = labels.long()
    if len(labels) and int(labels.min()) < 0:
        row = int(labels.argmin())
        raise ValueError(f"{name} must each be a class from 0, got {labels[row]} in row {row}.")
    return labels


def check_one_label_each(kind: str, rows: int, labels: int) -> None:
    """Refuse numbers of rows and labels that differ."""
    if rows != labels:
        raise ValueError(f"every {kind} row needs one label, got {rows} rows and {labels} labels.")


def check_same_width(train: Tensor, test: Tensor) -> None:
    """Refuse test features of another width than the training features."""
    if train.shape[1] != test.shape[1]:
        raise ValueError(
            "train_features and test_features must be of one width, got "
            f"{tuple(train.shape)} and {tuple(test.shape)}."
        )


def check_finite(name: str, features: Tensor) -> None:
    """Refuse features that are not finite numbers."""
    if not bool(features.isfinite().all()):
        raise ValueError(f"{name} must be finite numbers, and some are not.")
