"""The class of each row of a split, and the classes of two splits brought together."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import torch
from torch import Tensor

from vicreg_hf.data.columns.finding import find_label_column, holds_class_lists
from vicreg_hf.data.opening.slicing import Splits

MANY_CLASSES = 50
"""A column with more names than this holds no classes if most images have another name in it."""


def find_classes(
    splits: Splits, table: datasets.Dataset, wanted: str | None
) -> tuple[Tensor | None, tuple[str, ...]]:
    """Find the class of each row of a split.

    Args:
        splits: all splits of the data set, by the largest of which a column that nobody asked for
            holds classes or, undeclared, captions, numbers of the images, or scores.
        table: N rows, of one of the splits.
        wanted: the name of the column; None takes the one that `find_label_column` finds.

    Returns:
        (N,) classes from 0, -1 where a row has none, and their names; None where no row has one.

    Raises:
        ValueError: no such column, or one that holds no classes.
    """
    column = find_label_column(table.features, wanted)
    if column is None:
        return None, ()
    unsure = wanted is None
    if unsure and (holds_class_lists(table.features[column]) or not _holds_classes(splits, column)):
        return None, ()
    return _read_classes(table, column)


def _read_classes(table: Any, column: str) -> tuple[Tensor | None, tuple[str, ...]]:
    feature = table.features[column]
    if not isinstance(feature, (datasets.ClassLabel, datasets.Value)):
        raise ValueError(
            "label_column must hold classes, or lists of them where images may be of several, got "
            f"{column!r} of type {type(feature).__name__}; columns: {', '.join(table.features)}."
        )
    cells = table.select_columns([column]).with_format("arrow")[:][column]
    known = ~cells.is_null(nan_is_null=True).to_numpy()
    rows, values = np.flatnonzero(known), cells.filter(pa.array(known)).to_numpy()
    names = getattr(feature, "names", None)
    if values.dtype.kind == "f" and np.array_equal(values, np.trunc(values)):
        values = values.astype(np.int64)  # pandas has whole numbers so beside empty cells
    is_class = np.full(len(values), True)
    if names is not None:
        is_class = values >= 0
    elif values.dtype.kind == "O":
        is_class = values != ""
    elif values.dtype.kind == "i" and len(np.unique(values)) != 2:
        is_class = values != -1  # unless it is one of two classes
    rows, values = rows[is_class], values[is_class]
    if not len(rows):
        return None, ()
    if names is None:
        names, values = np.unique(values, return_inverse=True)
    labels = torch.full((len(table),), -1)
    labels[torch.from_numpy(rows)] = torch.from_numpy(values.astype(np.int64))
    return labels, tuple(map(str, names))


def _holds_classes(splits: Splits, column: str) -> bool:
    kinds = (datasets.ClassLabel, datasets.Value)
    having = [table for table in splits.values() if isinstance(table.features.get(column), kinds)]
    largest = max(having, key=len)
    feature = largest.features[column]
    if isinstance(feature, datasets.ClassLabel):
        return True
    labels, names = _read_classes(largest, column)
    if labels is None or (feature.dtype.startswith("float") and any("." in n for n in names)):
        return False
    return len(names) <= MANY_CLASSES or 2 * len(names) <= int((labels >= 0).sum())


def renumber_classes(labels: Tensor, names: Sequence[str], new_names: Sequence[str]) -> Tensor:
    """Give each class the number that its name has among other names; -1 remains.

    Args:
        labels: (N,) classes, numbered as in `names`.
    """
    numbers = {name: number for number, name in enumerate(new_names)}
    return torch.tensor([*(numbers[name] for name in names), -1])[labels]


def check_class_names(
    train: Sequence[str], test: Sequence[str], splits: Sequence[str], *, declared: bool
) -> None:
    """Refuse a test split with other classes than the training split.

    Args:
        train: the names of the training split's classes.
        test: those of the test split's.
        splits: the names of both splits.
        declared: whether the classes are declared, and not merely those that occur, of which the
            test split may lack some.

    Raises:
        ValueError: one of them has classes that the other lacks.
    """
    surplus = [name for name in test if name not in set(train)]
    absent = sorted(set(train) - set(test)) if declared else []
    parts = [
        f"only {split} has {shorten(names)}"
        for split, names in ((splits[1], surplus), (splits[0], absent))
        if names
    ]
    if parts:
        raise ValueError(
            f"class names must be the same in both splits, and {' and '.join(parts)}; choose "
            "another --eval_split or --label_column."
        )


def describe_missing_classes(
    train: Tensor, test: Tensor, names: Sequence[str], splits: Sequence[str]
) -> str | None:
    """Say that test images are of classes no training image has, or all of one; None if not so.

    Args:
        train: (N,) classes of training images.
        test: (M,) classes of test images.
        names: the names of the classes.
        splits: the names of both splits.
    """
    missing = ~torch.isin(test, train)
    shown = test[missing].unique() if bool(missing.any()) else test.unique()
    if bool(missing.any()):
        return (
            f"{int(missing.sum())} of {len(test)} images of {splits[1]} are of classes that no "
            f"image of {splits[0]} has: {shorten([names[int(k)] for k in shown])}."
        )
    if len(shown) == 1 and len(train.unique()) > 1:
        return (
            f"All {len(test)} images of {splits[1]} are of one class, {names[int(shown[0])]}, as a "
            "part of data that are sorted by class may be; accuracy says little then."
        )
    return None


def shorten(names: Sequence[str]) -> str:
    """The first five names, and how many more there are."""
    more = f" and {len(names) - 5} more" if len(names) > 5 else ""
    return ", ".join(names[:5]) + more
