"""Two splits with the same classes, to learn from and to measure on; checked before any work.

Shapes: N images of a split, K classes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
import torch
from sklearn.preprocessing import MultiLabelBinarizer
from torch import Tensor

from vicreg_hf.data.classes import check_class_names, renumber_classes
from vicreg_hf.data.columns.finding import declares_classes, find_label_column, is_list
from vicreg_hf.data.columns.spectrograms import SpectrogramSettings
from vicreg_hf.data.opening.dataset import open_dataset
from vicreg_hf.data.opening.slicing import (
    EVAL_SPLITS,
    add_parts,
    check_held_out,
    held_out_names,
    list_splits,
)
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
    image_column: str | None = None,
    label_column: str | None = None,
    channels: int = 3,
    sound: SpectrogramSettings | None = None,
) -> LabelledData:
    """Open both splits, with labels if there are any.

    Args:
        sound: how a column of sound is seen.
        eval_split: by default the first of `EVAL_SPLITS`.
        label_column: by default the only column of classes, or of lists of them.

    Raises:
        ValueError: no such split or column, or classes that differ between the splits.
    """
    splits = open_dataset(dataset_name, config_name)
    splits = add_parts(splits, train_split=train_split, eval_split=eval_split)
    test_split = eval_split or next(held_out_names(splits, train_split), None)
    if test_split is None:
        raise ValueError(
            f"eval_split must be given where none is called {', '.join(EVAL_SPLITS)}; "
            f"{dataset_name} has {list_splits(splits)}."
        )
    check_held_out(splits, test_split, train_split)
    tables = [splits[train_split], splits[test_split]]
    column = _find_label_column(tables[0].features, label_column)
    several = column is not None and is_list(tables[0].features[column])
    train, test = (
        Labelled(image_split(
            splits, split, dataset_name=Path(dataset_name).name or dataset_name, sound=sound,
            image_column=image_column, label_column=None if several else label_column,
            channels=channels,
        ))
        for split in (train_split, test_split)
    )  # fmt: skip
    names: tuple[str, ...] = ()
    if several:
        assert column is not None
        names = _add_targets(train, test, tables, column, needed=label_column is not None)
    elif column is not None and column in tables[1].features:
        names = _add_classes(train, test, tables, column)
    return LabelledData(train, test, names, train_split, test_split)


def _find_label_column(features: Any, wanted: str | None) -> str | None:
    found = find_label_column(features, wanted)
    if found is None:
        lists = [
            name for name, kind in features.items() if is_list(kind) and declares_classes(kind)
        ]
        return lists[0] if len(lists) == 1 else None
    kind = features[found]
    inner = kind.feature if is_list(kind) else kind
    if not isinstance(inner, (datasets.ClassLabel, datasets.Value)):
        raise ValueError(
            f"label_column must hold classes, or lists of them, got {found!r} of type "
            f"{type(kind).__name__}; columns: {', '.join(features)}."
        )
    return found


def _add_classes(
    train: Labelled, test: Labelled, tables: Sequence[Any], column: str
) -> tuple[str, ...]:
    """Add the classes of both splits, numbered as in the training split; returns their names."""
    if train.split.labels is None or test.split.labels is None:
        return ()
    names, test_names = train.split.label_names, test.split.label_names
    declared = all(declares_classes(table.features[column]) for table in tables)
    check_class_names(names, test_names, (train.split.name, test.split.name), declared=declared)
    train.classes = train.split.labels
    test.classes = renumber_classes(test.split.labels, test_names, names)
    return names


def _add_targets(
    train: Labelled, test: Labelled, tables: Sequence[Any], column: str, *, needed: bool
) -> tuple[str, ...]:
    """Add the targets of both splits, numbered as in the training split; returns the K names.

    Adds none where some image has no list, unless they are needed.
    """
    lists = [_read_lists(table, column) for table in tables]
    for part, found in zip((train, test), lists, strict=True):
        if found is None and needed:
            raise ValueError(
                "label_column must hold a list of classes in every row, got rows of "
                f"{part.split.name} without one in {column!r}."
            )
    if lists[0] is None or lists[1] is None:
        return ()
    (names, train_rows), (test_names, test_rows) = lists
    declared = all(declares_classes(table.features[column]) for table in tables)
    check_class_names(names, test_names, (train.split.name, test.split.name), declared=declared)
    binarizer = MultiLabelBinarizer(classes=names)
    for part, rows in ((train, train_rows), (test, test_rows)):
        part.targets = torch.from_numpy(binarizer.fit_transform(rows)).bool()
    return names


def _read_lists(table: Any, column: str) -> tuple[tuple[str, ...], list[list[str]]] | None:
    """The names that are declared, or occur, and those of each row; None where a row lacks them."""
    kind = table.features.get(column)
    if not is_list(kind):
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
