"""Parts of splits, written as `datasets` writes them: `train[:90%]`, `train+unlabeled`."""

from __future__ import annotations

from collections.abc import Iterator
from textwrap import shorten
from typing import Any

import datasets

EVAL_SPLITS = ("test", "validation", "valid", "val")
"""Splits to measure on, where none is given; the first is preferred."""
Splits = dict[Any, Any]
"""Tables or streams by name; also a DatasetDict or an IterableDatasetDict."""


def add_parts(splits: Splits, **wanted: str | None) -> Splits:
    """Add the parts that settings ask for to the splits, under the words they are asked with.

    Args:
        **wanted: the value of each setting: a split, a part of one, several joined by +, or None.

    Raises:
        ValueError: no such split, no such part, or columns that differ between what is joined.
    """
    parts = {name: _part(splits, name, setting) for setting, name in wanted.items()
             if name is not None and name not in splits}  # fmt: skip
    return {**splits, **parts}


def share_images(splits: Splits, one: str, other: str) -> bool:
    """Whether two splits, or parts, have a row in common."""
    return one == other or any(
        _overlap(a, b) for a in _ranges(splits, one) for b in _ranges(splits, other)
    )


def check_held_out(splits: Splits, held_out: str, train: str) -> None:
    """Refuse to measure on images that are trained on."""
    if share_images(splits, held_out, train):
        raise ValueError(
            f"eval_split must hold other images than train_split, got {held_out!r} and {train!r}; "
            "an image finds itself."
        )


def held_out_names(splits: Splits, train: str) -> Iterator[str]:
    """The names in `EVAL_SPLITS` of splits that share no image with the one trained on."""
    return (
        name for name in EVAL_SPLITS if name in splits and not share_images(splits, name, train)
    )


def _part(splits: Splits, name: str, setting: str) -> datasets.Dataset:
    try:
        ranges = _ranges(splits, name)
    except (ValueError, AssertionError) as error:  # as `datasets` raises them
        raise ValueError(
            f"{setting} must be one of {', '.join(splits)}, part of one such as "
            f"{next(iter(splits), 'train')}[:90%], or several joined by +, got {name!r}."
        ) from error
    if any(_overlap(a, b) for number, a in enumerate(ranges) for b in ranges[:number]):
        raise ValueError(f"{setting} must name each image once, got {name!r}.")
    tables = [splits[each.splitname] for each in ranges]
    if not all(isinstance(table, datasets.Dataset) for table in tables):
        raise ValueError(
            f"{setting} must be one whole split of a stream, got {name!r}; choose of "
            f"{', '.join(splits)}, or use --streaming false."
        )
    parts = [t.select(range(r.from_, r.to)) for t, r in zip(tables, ranges, strict=True)]
    try:
        return datasets.concatenate_datasets(parts)
    except ValueError as error:
        raise ValueError(
            f"{setting} must join splits of the same columns and class names, got {name!r}: "
            f"{shorten(str(error), 300)}"
        ) from error


def _overlap(one: Any, other: Any) -> bool:
    return one.splitname == other.splitname and max(one.from_, other.from_) < min(one.to, other.to)


def _ranges(splits: Splits, name: str) -> list[Any]:
    """The rows of a part, as `datasets` understands it."""
    sizes = {k: len(t) if isinstance(t, datasets.Dataset) else 0 for k, t in splits.items()}
    try:
        return datasets.ReadInstruction.from_spec(name).to_absolute(sizes)
    except (ValueError, AssertionError):
        if name not in sizes:
            raise
        return datasets.ReadInstruction(name).to_absolute(sizes)  # a name that is not read so
