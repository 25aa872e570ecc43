"""Parts of splits, written as `datasets` writes them: `train[:90%]`, `train+unlabeled`."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import datasets

from vicreg_hf.data.columns.finding import declares_classes

EVAL_SPLITS = ("test", "validation", "valid", "val")
"""Splits to measure on, where none is given; the first is preferred."""
Splits = dict[Any, Any]
"""A DatasetDict, or an IterableDatasetDict."""


def add_parts(splits: Splits, **wanted: str | None) -> Splits:
    """Splits, and beside them the parts that settings ask for, under the words they are asked with.

    Args:
        **wanted: what each setting says: a split, a part of one, several joined by +, or None.

    Raises:
        ValueError: no such split, no such part, or columns that differ between what is joined.
    """
    found = dict(splits)
    for setting, name in wanted.items():
        if name is not None and name not in found:
            found[name] = _part(splits, name, setting)
    return found


def share_images(splits: Splits, one: str, other: str) -> bool:
    """Whether two splits, or parts, have a row in common."""
    return one == other or any(
        _overlap(a, b) for a in _ranges(splits, one) for b in _ranges(splits, other)
    )


def check_held_out(splits: Splits, held_out: str, train: str) -> None:
    """Refuse to measure on what is learnt from."""
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


def list_splits(splits: Iterable[Any]) -> str:
    """Their names, as a sentence gives them."""
    return ", ".join(map(str, splits))


def _part(splits: Splits, name: str, setting: str) -> datasets.Dataset:
    try:
        ranges = _ranges(splits, name)
    except (ValueError, AssertionError) as error:  # as `datasets` raises them
        raise ValueError(
            f"{setting} must be one of {list_splits(splits)}, part of one such as "
            f"{next(iter(splits), 'train')}[:90%], or several joined by +, got {name!r}."
        ) from error
    for number, one in enumerate(ranges):
        if any(_overlap(one, other) for other in ranges[:number]):
            raise ValueError(f"{setting} must name each image once, got {name!r}.")
    whole = [splits[each.splitname] for each in ranges]
    if not all(isinstance(table, datasets.Dataset) for table in whole):
        raise ValueError(
            f"{setting} must be one whole split of a stream, got {name!r}; choose of "
            f"{list_splits(splits)}, or use --streaming false."
        )
    parts = [t.select(range(r.from_, r.to)) for t, r in zip(whole, ranges, strict=True)]
    if len(parts) == 1:
        return parts[0]
    _check_class_names(parts, [r.splitname for r in ranges], name)
    try:
        return datasets.concatenate_datasets(parts)
    except ValueError as error:
        raise ValueError(
            f"{setting} must join splits of the same columns, got {name!r}: {error}"
        ) from error


def _check_class_names(parts: Sequence[Any], splits: Sequence[str], name: str) -> None:
    for other, part in zip(splits[1:], parts[1:], strict=True):
        for column, kind in parts[0].features.items():
            own = part.features.get(column)
            if declares_classes(kind) and declares_classes(own) and own != kind:
                raise ValueError(
                    "class names must be the same in all files of a split, and in splits joined "
                    f"by +, got {name!r}, where {other} declares others for {column!r} than "
                    f"{splits[0]}; write them again with the same names."
                )


def _overlap(one: Any, other: Any) -> bool:
    return one.splitname == other.splitname and max(one.from_, other.from_) < min(one.to, other.to)


def _ranges(splits: Splits, name: str) -> list[Any]:
    """The rows of a part, as `datasets` understands it."""
    lengths = {
        str(split): len(table) if isinstance(table, datasets.Dataset) else 0
        for split, table in splits.items()
    }
    try:
        return datasets.ReadInstruction.from_spec(name).to_absolute(lengths)
    except (ValueError, AssertionError):
        if name not in lengths:
            raise
        return datasets.ReadInstruction(name).to_absolute(lengths)  # a name that is not read so
