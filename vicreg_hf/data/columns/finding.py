"""The columns of a data set that hold images, and classes."""

from __future__ import annotations

from typing import Any

import datasets

LABEL = "label"
"""The column that is taken for classes where none is declared."""
OTHER_IMAGES = (datasets.Array3D, datasets.Audio)
"""Kinds of columns that are taken where there are no images: many channels, or spectrograms."""
BYTES = ("binary", "large_binary")
CLASS_TYPES = frozenset(
    ["string", "large_string", "bool", "float32", "float64"]
    + [f"{u}int{bits}" for u in ("", "u") for bits in (8, 16, 32, 64)]
)


def find_image_column(
    features: datasets.Features, wanted: str | None, setting: str = "image_column"
) -> str:
    """The column to train on: the one asked for, or the only one that holds images.

    A column asked for may also hold image files as plain bytes. Where there are no
    images, arrays of three dimensions are taken for images of many channels, and where there are
    none either, sounds.

    Args:
        setting: the name of the setting that asks, for messages.

    Raises:
        ValueError: no such column, or none or several to choose from.
    """
    found = [n for n, kind in features.items() if _holds_images(kind)]
    for kinds in OTHER_IMAGES:
        found = found or [n for n, kind in features.items() if isinstance(kind, kinds)]
    listed = f"columns of images: {', '.join(found) or 'none'}; all: {', '.join(features)}."
    files = [n for n, kind in features.items() if getattr(kind, "dtype", None) in BYTES]
    if wanted is None:
        if len(found) == 1:
            return found[0]
        hint = f" Bytes of files may be images: --{setting} {files[0]}." if files else ""
        raise ValueError(
            f"{setting} must be given unless exactly one column holds images, got "
            f"{len(found)}; {listed}{hint}"
        )
    kind = features.get(wanted)
    if wanted in files or _holds_images(kind) or isinstance(kind, OTHER_IMAGES):
        return wanted
    raise ValueError(f"{setting} must name a column of images, got {wanted!r}; {listed}")


def _holds_images(kind: Any) -> bool:
    """Whether a column does: by its type, or as `datasets` stores images where that is not said."""
    if isinstance(kind, dict):
        types = {name: getattr(field, "dtype", None) for name, field in kind.items()}
        return types == {"bytes": "binary", "path": "string"}
    return isinstance(kind, datasets.Image)


def find_label_column(features: datasets.Features, wanted: str | None) -> str | None:
    """The column of classes: the one asked for, else the only ClassLabel, else `label`.

    Tables without declared classes, as pandas writes them, have theirs in words or numbers. Where
    there is none of these, the only column of lists of ClassLabels.

    Raises:
        ValueError: no such column.
    """
    if wanted is not None:
        if wanted in features:
            return wanted
        raise ValueError(
            f"label_column must name a column, got {wanted!r}; columns: {', '.join(features)}."
        )
    declared = [name for name, kind in features.items() if declares_classes(kind)]
    found = [name for name in declared if not holds_class_lists(features[name])]
    if not found and getattr(features.get(LABEL), "dtype", None) in CLASS_TYPES:
        return LABEL
    found = found or declared
    return found[0] if len(found) == 1 else None


def declares_classes(kind: Any) -> bool:
    """Whether a column of this kind declares numbers of classes, or lists of them, by name."""
    return isinstance(kind.feature if holds_class_lists(kind) else kind, datasets.ClassLabel)


def holds_class_lists(kind: Any) -> bool:
    """Whether a column of this kind holds lists of classes, or of values that may be classes."""
    return isinstance(kind, (datasets.List, datasets.LargeList)) and isinstance(
        kind.feature, (datasets.ClassLabel, datasets.Value)
    )
