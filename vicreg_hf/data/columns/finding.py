"""The columns of a data set that hold images, and classes."""

from __future__ import annotations

from typing import Any

import datasets

LABEL = "label"
"""The column that is taken for classes where none is declared."""
OTHER_IMAGES = (datasets.Array3D, datasets.Audio, datasets.Array2D)
"""Kinds of columns that are taken where there are no images: many channels, spectrograms, or gray
images."""
BYTES = frozenset({"binary", "large_binary", "binary_view"})
TEXTS = frozenset({"string", "large_string", "string_view"})
"""The spellings of one type: polars writes the second, and newer tables the third."""
CLASS_TYPES = frozenset(
    ["string", "large_string", "bool", "float32", "float64"]
    + [f"{u}int{bits}" for u in ("", "u") for bits in (8, 16, 32, 64)]
)


def find_image_column(
    features: datasets.Features, wanted: str | None, setting: str = "image_column"
) -> str:
    """The column to train on: the one asked for, or the only one that holds images.

    A column asked for may also hold image files as plain bytes, or their paths. Where there are no
    images, arrays of three dimensions are taken for images of many channels, and where there are
    none either, sounds, and then arrays of two dimensions.

    Args:
        setting: the name of the setting that asks, for messages.

    Raises:
        ValueError: no such column, or none or several to choose from.
    """
    found = [n for n, kind in features.items() if holds_images(kind)]
    for kinds in OTHER_IMAGES:
        found = found or [n for n, kind in features.items() if isinstance(kind, kinds)]
    listed = f"columns of images: {', '.join(found) or 'none'}; all: {', '.join(features)}."
    if wanted is None:
        if len(found) == 1:
            return found[0]
        likely = sorted(
            features, key=lambda n: (not _holds_bytes(features[n]), "im" not in n.lower())
        )
        hints = [] if found else [_hint(n, features[n], setting) for n in likely]
        hint = next(filter(None, hints), "")
        raise ValueError(
            f"{setting} must be given unless exactly one column holds images, got "
            f"{len(found)}; {listed}{hint}"
        )
    kind = features.get(wanted)
    if wanted in features and (_may_be_files(kind) or isinstance(kind, OTHER_IMAGES)):
        return wanted
    hint = _hint(wanted, kind, setting) or f" Images are taken as `{_cast(wanted)}` makes them."
    raise ValueError(
        f"{setting} must name a column of images, got {wanted!r}; {listed}"
        f"{hint if wanted in features else ''}"
    )


def holds_images(kind: Any) -> bool:
    """Whether a column does: by its type, or as `datasets` stores images where that is not said."""
    if isinstance(kind, dict):
        types = {name: getattr(field, "dtype", None) for name, field in kind.items()}
        named = types.pop("path", "null") in TEXTS | {"null"}
        return named and types.keys() == {"bytes"} and types["bytes"] in BYTES
    return isinstance(kind, datasets.Image)


def _may_be_files(kind: Any) -> bool:
    """Whether `datasets` casts a column of this kind to images: structs, bytes, or paths."""
    if isinstance(kind, dict):
        types = {n: getattr(kind.get(n), "dtype", "null") for n in ("bytes", "path")}
        fits = types["bytes"] in BYTES | {"null"} and types["path"] in TEXTS | {"null"}
        return fits and set(types.values()) != {"null"}
    return isinstance(kind, datasets.Image) or getattr(kind, "dtype", None) in BYTES | TEXTS


def _holds_bytes(kind: Any) -> bool:
    return getattr(kind, "dtype", None) in BYTES


def _cast(name: str) -> str:
    return f'dataset.cast_column("{name}", datasets.Image())'


def _hint(name: str, kind: Any, setting: str) -> str:
    """A sentence on how a column that holds no images, or not as it must, is trained on."""
    if _holds_bytes(kind):
        return f" Bytes of files may be images: --{setting} {name}."
    if _may_be_files(kind):
        return f" Paths of files may be images: --{setting} {name}."
    inner = kind
    while isinstance(inner, (datasets.List, datasets.LargeList)):
        inner = inner.feature
    if inner is kind:
        return ""
    if _may_be_files(inner):
        return (
            f" {name} holds lists; keep one image of each, with dataset.map(lambda row: "
            f'{{"{name}": row["{name}"][0]}}), then `{_cast(name)}`, and save_to_disk.'
        )
    return (
        f" {name} holds lists; if they are the pixels of images, write them as arrays of one size, "
        f'with `dataset.cast_column("{name}", datasets.Array3D((H, W, C), "uint8"))`, and '
        "save_to_disk."
    )


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
