"""Two splits with the same classes, to learn from and to measure on; checked before any work.

Shapes: N images of a split, K classes.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from sklearn.preprocessing import MultiLabelBinarizer
from torch import Tensor

from vicreg_hf.data.classes import check_class_names, renumber_classes
from vicreg_hf.data.columns.finding import declares_classes, find_label_column, holds_class_lists
from vicreg_hf.data.opening.dataset import open_dataset
from vicreg_hf.data.opening.slicing import EVAL_SPLITS, add_parts, check_held_out, held_out_names
from vicreg_hf.data.splits import ImageSplit, image_split


@dataclass
class Labelled:
    """A split and the classes of its images."""

    split: ImageSplit
    classes: Tensor | None = None
    """(N,) from 0, -1 where it is not known, where each image is of one class."""
    targets: Tensor | None = None
    """(N, K) bool, where an image may be of several."""


@dataclass
class LabelledData:
    """The split that an evaluation learns from, and the one that it measures on."""

    train: Labelled
    test: Labelled
    names: tuple[str, ...]
    """(K,) names of classes; empty where there are no labels."""
    train_name: str
    test_name: str


def open_labelled(
    dataset_name: str,
    *,
    train_split: str,
    eval_split: str | None,
    config_name: str | None = None,
    label_column: str | None = None,
    **columns: Any,
) -> LabelledData:
    """Open both splits, with labels if there are any.

    Args:
        eval_split: by default the first of `EVAL_SPLITS`.
        label_column: by default the only column of classes, or of lists of them.
        **columns: as for `image_split`.

    Raises:
        ValueError: no such split or column, or classes that differ between the splits.
    """
    splits = open_dataset(dataset_name, config_name)
    splits = add_parts(splits, train_split=train_split, eval_split=eval_split)
    test_split = eval_split or next(held_out_names(splits, train_split), None)
    if test_split is None:
        raise ValueError(
            f"eval_split must be given where none is called {', '.join(EVAL_SPLITS)}; "
            f"{dataset_name} has {', '.join(splits)}."
        )
    check_held_out(splits, test_split, train_split)
    tables = [splits[train_split], splits[test_split]]
    column = find_label_column(tables[0].features, label_column)
    several = column is not None and holds_class_lists(tables[0].features[column])
    columns |= {
        "dataset_name": Path(dataset_name).name or dataset_name,
        "label_column": None if several else label_column,
    }
    parts: list[Labelled] = []
    for each in (train_split, test_split):
        parts.append(Labelled(image_split(splits, each, **columns)))
        columns["value_range"] = parts[0].split.value_range
    data = LabelledData(parts[0], parts[1], (), train_split, test_split)
    if column is None:
        return data
    read = _lists_of_rows if several else _class_of_rows
    found = [read(part.split, table, column) for part, table in zip(parts, tables, strict=True)]
    if several and label_column is not None and None in found:
        raise ValueError(
            "label_column must hold a list of classes in every row, got rows of "
            f"{parts[found.index(None)].split.name} without one in {column!r}."
        )
    train, test = found
    if train is None or test is None:
        return data
    (names, train_labels), (test_names, test_labels) = train, test
    check_class_names(
        names, test_names, [part.split.name for part in parts],
        declared=all(declares_classes(table.features[column]) for table in tables),
    )  # fmt: skip
    if several:
        binarizer = MultiLabelBinarizer(classes=names)
        data.train.targets = torch.from_numpy(binarizer.fit_transform(train_labels)).bool()
        data.test.targets = torch.from_numpy(binarizer.fit_transform(test_labels)).bool()
    else:
        data.train.classes = train_labels
        data.test.classes = renumber_classes(test_labels, test_names, names)
    data.names = names
    return data


def _class_of_rows(
    split: ImageSplit, table: Any, column: str
) -> tuple[tuple[str, ...], Any] | None:
    """The names of the classes, and (N,) classes; None where there are none."""
    if split.labels is None or column not in table.features:
        return None
    return split.label_names, split.labels


def _lists_of_rows(_: ImageSplit, table: Any, column: str) -> tuple[tuple[str, ...], Any] | None:
    """The names that are declared, or occur, and those of N rows; None where a row lacks them."""
    kind = table.features.get(column)
    if not holds_class_lists(kind):
        return None
    rows = table.select_columns([column]).with_format("arrow")[:][column].to_pylist()
    if any(row is None or None in row for row in rows):
        return None
    if not declares_classes(kind):
        names = tuple(map(str, sorted({entry for row in rows for entry in row})))
        return names, [list(map(str, row)) for row in rows]
    if any(number < 0 for row in rows for number in row):
        return None
    return tuple(kind.feature.names), [kind.feature.int2str(row) for row in rows]
