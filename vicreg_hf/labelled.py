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
from torch import Tensor

from vicreg_hf.columns import find_label_column
from vicreg_hf.sources import EVAL_SPLITS, ImageSplit, Splits, image_split, open_dataset


@dataclass
class Labelled:
    """A split and what its images show."""

    split: ImageSplit
    classes: Tensor | None = None
    """(N,) from 0, where each image is of one class."""
    targets: Tensor | None = None
    """(N, K) bool, where an image may be of several."""


@dataclass
class LabelledData:
    """What an evaluation learns from, and what it measures on."""

    train: Labelled
    test: Labelled
    names: tuple[str, ...]
    """Of the K classes; empty where there are no labels."""
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
) -> LabelledData:
    """Open both splits, with labels if there are any.

    Args:
        eval_split: by default the first of `EVAL_SPLITS`.
        label_column: by default the only column of classes, or of lists of them.

    Raises:
        ValueError: no such split or column, or classes that differ between the splits.
    """
    splits = open_dataset(dataset_name, config_name)
    test_name = eval_split or _held_out(splits, train_split, dataset_name)
    common: Any = {
        "dataset_name": Path(dataset_name).name or dataset_name, "image_column": image_column,
        "channels": channels,
    }  # fmt: skip
    tables = []
    for name in (train_split, test_name):
        if name not in splits:
            raise ValueError(f"split must be one of {', '.join(map(str, splits))}, got {name!r}.")
        tables.append(splits[name])
    column = _label_column(tables[0], label_column)
    several = column is not None and _is_list(tables[0].features[column])
    train, test = (
        image_split(splits, name, label_column=None if several else column, **common)
        for name in (train_split, test_name)
    )
    if several:
        assert column is not None
        targets, names = _targets(tables, column)
        parts = [Labelled(train, targets=targets[0]), Labelled(test, targets=targets[1])]
    elif train.labels is not None and test.labels is not None:
        exact = isinstance(tables[0].features[column], datasets.ClassLabel)
        names = train.label_names
        parts = [Labelled(train, train.labels), Labelled(test, _matched(train, test, exact))]
    else:
        names, parts = (), [Labelled(train), Labelled(test)]
    return LabelledData(parts[0], parts[1], names, train_split, test_name)


def _held_out(splits: Splits, train: str, dataset_name: str) -> str:
    for name in EVAL_SPLITS:
        if name in splits and name != train:
            return name
    raise ValueError(
        f"eval_split must be given where none is called {', '.join(EVAL_SPLITS)}; {dataset_name} "
        f"has {', '.join(map(str, splits))}."
    )


def _label_column(table: Any, wanted: str | None) -> str | None:
    found = find_label_column(table.features, wanted)
    if found is not None:
        return found
    lists = [
        name for name, kind in table.features.items()
        if _is_list(kind) and isinstance(kind.feature, datasets.ClassLabel)
    ]  # fmt: skip
    return lists[0] if len(lists) == 1 else None


def _is_list(kind: Any) -> bool:
    return isinstance(kind, (datasets.List, datasets.LargeList))


def _matched(train: ImageSplit, test: ImageSplit, exact: bool) -> Tensor:
    """The test labels, numbered as the training split's.

    Args:
        exact: whether the names are declared, and not merely those that occur.
    """
    assert test.labels is not None
    known = {name: number for number, name in enumerate(train.label_names)}
    strange = [name for name in test.label_names if name not in known]
    absent = sorted(known.keys() - set(test.label_names)) if exact else []
    if strange or absent:
        parts = [f"only {test.name} has {_few(strange)}"] if strange else []
        parts += [f"only {train.name} has {_few(absent)}"] if absent else []
        raise ValueError(
            f"class names must be the same in both splits, and {' and '.join(parts)}; choose "
            "another --eval_split or --label_column."
        )
    return torch.tensor([known[name] for name in test.label_names])[test.labels]


def _few(names: Sequence[str]) -> str:
    more = f" and {len(names) - 5} more" if len(names) > 5 else ""
    return ", ".join(names[:5]) + more


def _targets(tables: Sequence[Any], column: str) -> tuple[list[Tensor], tuple[str, ...]]:
    """(N, K) of each table, and the names of the classes."""
    values = [table.with_format("arrow")[:][column].to_pylist() for table in tables]
    for table, rows in zip(tables, values, strict=True):
        if any(row is None for row in rows):
            raise ValueError(
                f"label_column must hold a list in every row, got null in {column!r} of split "
                f"{table.split}."
            )
    kind = tables[0].features[column].feature
    if isinstance(kind, datasets.ClassLabel):
        numbers, names = list(range(len(kind.names))), tuple(kind.names)
    else:
        numbers = sorted({entry for row in values[0] for entry in row})
        names = tuple(map(str, numbers))
    place = {number: k for k, number in enumerate(numbers)}
    strange = sorted({str(e) for row in values[1] for e in row if e not in place})
    if strange:
        raise ValueError(
            f"class names must be the same in both splits, and only the one to measure on has "
            f"{_few(strange)}; choose another --eval_split or --label_column."
        )
    targets = []
    for rows in values:
        target = torch.zeros(len(rows), len(names), dtype=torch.bool)
        for number, row in enumerate(rows):
            target[number, [place[entry] for entry in row]] = True
        targets.append(target)
    return targets, names
