"""Balanced subsets of labelled rows."""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, NDArray

from vicreg_hf.runtime.randomness import Stream, permutation


def balanced_subset(
    labels: ArrayLike, fraction: float = 1.0, seed: int = 0, *, number: int | None = None
) -> NDArray[np.int64]:
    """A random share of the rows of every class, or so many of each.

    A class gives round(fraction * its size) rows, but at least one. The rows of a smaller fraction
    or number are among those of a larger one with the same seed.

    Args:
        labels: (N,) classes from 0.
        fraction: above 0, at most 1.
        seed: any integer; nothing else that is random matters.
        number: rows of each class, at least 1; a class that has fewer gives all of its own.

    Returns:
        Row numbers, ascending.

    Raises:
        ValueError: a fraction or number out of range, no labels, or a row without a class.
    """
    labels = np.asarray(labels)
    if not 0 < fraction <= 1:
        raise ValueError(f"fraction must lie above 0 and be at most 1, got {fraction}.")
    if number is not None and number < 1:
        raise ValueError(f"number must be at least 1, got {number}.")
    if labels.ndim != 1 or len(labels) == 0 or not np.issubdtype(labels.dtype, np.integer):
        raise ValueError(
            f"labels must be one integer a row, got {labels.dtype} of shape {labels.shape}."
        )
    if labels.min() < 0:
        row = int(np.argmax(labels < 0))
        raise ValueError(
            f"every row needs a class from 0, got {labels[row]} in row {row}; leave such rows out."
        )
    # epoch 1, as the kNN monitor chooses its rows by epoch 0
    order = permutation(len(labels), seed=seed, epoch=1, stream=Stream.SPLIT)
    by_class = order[np.argsort(labels[order], kind="stable")]
    sizes = np.unique(labels, return_counts=True)[1]
    classes = np.split(by_class, np.cumsum(sizes)[:-1])
    shares = [rows[: number or max(1, round(fraction * len(rows)))] for rows in classes]
    return np.sort(np.concatenate(shares))
