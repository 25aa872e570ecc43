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

from vicreg_hf.data.columns.finding import find_label_column
from vicreg_hf.data.columns.spectrograms import SpectrogramSettings
from vicreg_hf.data.opening.class_names import is_list, names_classes
from vicreg_hf.data.opening.dataset import open_dataset
from vicreg_hf.data.opening.slicing import (
    EVAL_SPLITS,
    Splits,
    add_parts,
    check_held_out,
    list_splits,
    share_images,
)
from vicreg_hf.data.splits import ImageSplit, image_split, renumbered

CLASSES = (datasets.ClassLabel, datasets.Value)


@dataclass
class Labelled:
    """A split and what its images show."""

    split: ImageSplit
    classes: Tensor | None = None
    """(N,) from 0, -1 where it is not known, where each image is of one class."""
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
    whole = splits
    splits = add_parts(splits, train_split=train_split, eval_split=eval_split)
    test_name = eval_split or _held_out(whole, train_split, dataset_name)
    check_held_out(splits, test_name, train_split)
    common: Any = {
        "dataset_name": Path(dataset_name).name or dataset_name, "image_column": image_column,
        "channels": channels, "sound": sound,
    }  # fmt: skip
    tables = [splits[name] for name in (train_split, test_name)]
    column = _label_column(tables[0], label_column)
    several = column is not None and is_list(tables[0].features[column])
    train, test = (
        image_split(splits, name, label_column=None if several else label_column, **common)
        for name in (train_split, test_name)
    )
    shared = column is not None and column in tables[1].features
    if several:
        assert column is not None
        needed = label_column is not None
        names, targets = _targets(tables, column, (train.name, test.name), needed=needed)
        parts = [Labelled(train, targets=targets[0]), Labelled(test, targets=targets[1])]
    elif shared and train.labels is not None and test.labels is not None:
        exact = all(isinstance(t.features[column], datasets.ClassLabel) for t in tables)
        names = train.label_names
        parts = [Labelled(train, train.labels), Labelled(test, matched_labels(train, test, exact))]
    else:
        names, parts = (), [Labelled(train), Labelled(test)]
    return LabelledData(parts[0], parts[1], names, train_split, test_name)


def _held_out(splits: Splits, train: str, dataset_name: str) -> str:
    for name in EVAL_SPLITS:
        if name in splits and not share_images(splits, name, train):
            return name
    raise ValueError(
        f"eval_split must be given where none is called {', '.join(EVAL_SPLITS)}; {dataset_name} "
        f"has {list_splits(splits)}."
    )


def _label_column(table: Any, wanted: str | None) -> str | None:
    found = find_label_column(table.features, wanted)
    if found is not None:
        kind = table.features[found]
        if isinstance(kind.feature if is_list(kind) else kind, CLASSES):
            return found
        raise ValueError(
            f"label_column must hold classes, or lists of them, got {found!r} of type "
            f"{type(kind).__name__}; columns: {', '.join(table.features)}."
        )
    lists = [
        name for name, kind in table.features.items()
        if is_list(kind) and names_classes(kind)
    ]  # fmt: skip
    return lists[0] if len(lists) == 1 else None


def matched_labels(train: ImageSplit, test: ImageSplit, exact: bool) -> Tensor:
    """The test labels, numbered as the training split's.

    Args:
        exact: whether the names are declared, and not merely those that occur.

    Raises:
        ValueError: classes that one of them lacks.
    """
    assert test.labels is not None
    _check_names(train.label_names, test.label_names, (train.name, test.name), exact)
    known = {name: number for number, name in enumerate(train.label_names)}
    return renumbered(test.labels, [known[name] for name in test.label_names])


def _check_names(
    train: Sequence[str], test: Sequence[str], splits: tuple[str, str], exact: bool
) -> None:
    strange = [name for name in test if name not in set(train)]
    absent = sorted(set(train) - set(test)) if exact else []
    if strange or absent:
        parts = [f"only {splits[1]} has {few(strange)}"] if strange else []
        parts += [f"only {splits[0]} has {few(absent)}"] if absent else []
        raise ValueError(
            f"class names must be the same in both splits, and {' and '.join(parts)}; choose "
            "another --eval_split or --label_column."
        )


def unlearnt(
    train: Tensor, test: Tensor, names: Sequence[str], splits: Sequence[str]
) -> str | None:
    """A sentence on test images that nothing can classify rightly, or anything, if there are any.

    Args:
        train: (N,) classes that are learnt from.
        test: (M,) classes that are measured on.
        names: of the classes.
        splits: the names of both.
    """
    strange = ~torch.isin(test, train)
    if not bool(strange.any()):
        shown = test.unique()
        if len(shown) > 1 or len(train.unique()) == 1:
            return None
        return (
            f"All {len(test)} images of {splits[1]} are of one class, {names[int(shown[0])]}, as a "
            "part of data that are sorted by class may be; accuracy says little then."
        )
    found = [names[int(k)] for k in test[strange].unique()]
    return (
        f"{int(strange.sum())} of {len(test)} images of {splits[1]} are of classes that no image "
        f"of {splits[0]} has: {few(found)}."
    )


def few(names: Sequence[str]) -> str:
    """Five names, and how many more there are."""
    more = f" and {len(names) - 5} more" if len(names) > 5 else ""
    return ", ".join(names[:5]) + more


def _targets(
    tables: Sequence[Any], column: str, splits: tuple[str, str], *, needed: bool
) -> tuple[tuple[str, ...], list[Tensor | None]]:
    """Names of the K classes, and (N, K) of each table, by the names of the first.

    Without names where some image has no list, unless they are needed.
    """
    found = [_listed(table, column) for table in tables]
    lists = [each for each in found if each is not None]
    if len(lists) < len(tables):
        if not needed:
            return (), [None, None]
        raise ValueError(
            "label_column must hold a list of classes in every row, got rows of "
            f"{splits[found.index(None)]} without one in {column!r}."
        )
    kinds = [table.features[column].feature for table in tables]
    exact = all(isinstance(kind, datasets.ClassLabel) for kind in kinds)
    names = lists[0][0]
    _check_names(names, lists[1][0], splits, exact)
    place = {name: k for k, name in enumerate(names)}
    targets: list[Tensor | None] = []
    for _, rows in lists:
        target = torch.zeros(len(rows), len(names), dtype=torch.bool)
        for number, row in enumerate(rows):
            target[number, [place[name] for name in row]] = True
        targets.append(target)
    return names, targets


def _listed(table: Any, column: str) -> tuple[tuple[str, ...], list[list[str]]] | None:
    """The names that are declared, or occur, and those of each image; None where some lack them."""
    kind = table.features.get(column)
    if not is_list(kind):
        return None
    rows = table.select_columns([column]).with_format("arrow")[:][column].to_pylist()
    if any(row is None or None in row for row in rows):
        return None
    if not isinstance(kind.feature, datasets.ClassLabel):
        names = tuple(map(str, sorted({entry for row in rows for entry in row})))
        return names, [[str(entry) for entry in row] for row in rows]
    if any(number < 0 for row in rows for number in row):
        return None
    names = tuple(kind.feature.names)
    return names, [[names[number] for number in row] for row in rows]
