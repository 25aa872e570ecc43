"""Which column of a split holds classes, and the class of each row."""

from __future__ import annotations

from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import torch
from numpy.typing import NDArray
from torch import Tensor

from vicreg_hf.data.opening.slicing import Splits

MANY_CLASSES = 50
"""Names from which on a column that most images have another in holds no classes."""


def _labels(table: datasets.Dataset, column: str) -> tuple[Tensor | None, tuple[str, ...]]:
    """Classes from 0, -1 where a row has none, and their names; None where no row has one.

    Raises:
        ValueError: a column that holds no classes.
    """
    feature = table.features[column]
    if not isinstance(feature, (datasets.ClassLabel, datasets.Value)):
        raise ValueError(
            f"label_column must hold a class in each row, got {column!r} of type "
            f"{type(feature).__name__}; columns: {', '.join(table.features)}."
        )
    column_values = table.select_columns([column]).with_format("arrow")[:][column]
    known = ~column_values.is_null(nan_is_null=True).to_numpy()
    rows, values = np.flatnonzero(known), column_values.filter(pa.array(known)).to_numpy()
    names = getattr(feature, "names", None)
    if values.dtype.kind == "f" and np.array_equal(values, np.trunc(values)):
        values = values.astype(np.int64)  # as pandas has whole numbers beside empty cells
    has_class = values >= 0 if names is not None else _classes_among(values)
    rows, values = rows[has_class], values[has_class]
    if not len(rows):
        return None, ()
    if names is None:
        names, values = np.unique(values, return_inverse=True)
    labels = torch.full((len(table),), -1)
    labels[torch.from_numpy(rows)] = torch.from_numpy(values.astype(np.int64))
    return labels, tuple(map(str, names))


def _classes_among(values: NDArray[Any]) -> NDArray[np.bool_]:
    """Which undeclared values are classes: not -1, unless it is one of two, and no empty word."""
    if values.dtype.kind == "O":
        return values != ""
    if values.dtype.kind != "i" or len(np.unique(values)) == 2:
        return np.full(len(values), True)
    return values != -1


def _holds_classes(splits: Splits, column: str) -> bool:
    """Whether a column that nobody asked for does, by the largest split that has it.

    Undeclared ones may be captions, numbers of the images, or scores.
    """
    kinds = (datasets.ClassLabel, datasets.Value)
    having = [t for t in splits.values() if isinstance(t.features.get(column), kinds)]
    table = max(having, key=len)
    if isinstance(table.features[column], datasets.ClassLabel):
        return True
    labels, names = _labels(table, column)
    if labels is None:
        return False
    whole = not table.features[column].dtype.startswith("float") or all("." not in n for n in names)
    many = len(names) > MANY_CLASSES and 2 * len(names) > int((labels >= 0).sum())
    return whole and not many
