"""Features and labels of callers, as tensors, NumPy arrays or lists, made into checked tensors.

Shapes: N rows, F features.
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import ArrayLike
from torch import Tensor

Values = Tensor | ArrayLike


def as_tensor(name: str, values: Values) -> Tensor:
    """The values as a tensor, which shares an array's memory where it can.

    Raises:
        ValueError: values that are no numbers.
    """
    if isinstance(values, np.ndarray):  # torch warns of arrays that are read-only
        values = np.require(values, requirements=["C", "W"])
    try:
        return torch.as_tensor(values)
    except (TypeError, ValueError, RuntimeError) as error:
        raise ValueError(
            f"{name} must be a tensor or an array of numbers, got {type(values).__name__}: {error}"
        ) from error


def as_features(name: str, values: Values) -> Tensor:
    """Features (N, F).

    Raises:
        ValueError: another number of dimensions.
    """
    features = as_tensor(name, values)
    if features.ndim != 2:
        raise ValueError(f"{name} must be rows of features (N, F), got {tuple(features.shape)}.")
    return features


def as_labels(name: str, values: Values) -> Tensor:
    """Labels (N,) as int64.

    Raises:
        ValueError: another number of dimensions, no integers, or one below 0.
    """
    labels = as_tensor(name, values)
    if labels.ndim != 1:
        raise ValueError(f"{name} must be one class for each row, got {tuple(labels.shape)}.")
    if labels.is_floating_point() or labels.is_complex() or labels.dtype == torch.bool:
        raise ValueError(f"{name} must be integers, got {labels.dtype}; convert them with .long().")
    labels = labels.long()
    if len(labels) and int(labels.min()) < 0:
        row = int(labels.argmin())
        raise ValueError(f"{name} must each be a class from 0, got {labels[row]} in row {row}.")
    return labels


def as_labelled(kind: str, features: Values, labels: Values) -> tuple[Tensor, Tensor]:
    """Features (N, F) and labels (N,) of one kind of rows, such as "train", on one device.

    Raises:
        ValueError: as for `as_features` and `as_labels`, or numbers of rows that differ.
    """
    x, y = as_features(f"{kind}_features", features), as_labels(f"{kind}_labels", labels)
    check_one_label_each(kind, len(x), len(y))
    return x, y.to(x.device)


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


def accuracy(predictions: Tensor, labels: Tensor) -> float:
    """Share of test rows, 0 to 1, whose predicted class is their label.

    Raises:
        ValueError: numbers of predictions and labels that differ, or none.
    """
    check_one_label_each("test", len(predictions), len(labels))
    if not len(labels):
        raise ValueError("an accuracy needs at least 1 test row, got none.")
    return (predictions == labels.to(predictions.device)).float().mean().item()
