"""Which columns of a data set hold images and classes, and what their cells hold.

Shapes: C channels, H x W pixels.
"""

from __future__ import annotations

from typing import Any

import datasets

LABEL = "label"
"""The column that is taken for classes where none is declared."""
CLASS_TYPES = frozenset(
    ["string", "large_string", "bool", "float32", "float64"]
    + [f"{u}int{bits}" for u in ("", "u") for bits in (8, 16, 32, 64)]
)


def find_image_column(features: datasets.Features, wanted: str | None) -> str:
    """The column to train on: the one asked for, or the only one that holds images.

    A column asked for may also hold image files as plain bytes. Where there are no
    images, arrays of three dimensions are taken for images of many channels, and where there are
    none either, sounds.

    Raises:
        ValueError: no such column, or none or several to choose from.
    """
    found = [n for n, kind in features.items() if _holds_images(kind)]
    found = found or [n for n, kind in features.items() if isinstance(kind, datasets.Array3D)]
    found = found or [n for n, kind in features.items() if isinstance(kind, datasets.Audio)]
    listed = f"columns of images: {', '.join(found) or 'none'}; all: {', '.join(features)}."
    if wanted is None:
        if len(found) == 1:
            return found[0]
        raise ValueError(
            "image_column must be given unless exactly one column holds images, got "
            f"{len(found)}; {listed}{_hint(features)}"
        )
    kind = features.get(wanted)
    if _holds_images(kind) or isinstance(kind, (datasets.Array3D, datasets.Audio)):
        return wanted
    if _holds_bytes(kind):
        return wanted
    raise ValueError(f"image_column must name a column of images, got {wanted!r}; {listed}")


def _hint(features: datasets.Features) -> str:
    held = [n for n, kind in features.items() if _holds_bytes(kind)]
    return f" Bytes of files may be images: --image_column {held[0]}." if held else ""


def _holds_bytes(kind: Any) -> bool:
    return isinstance(kind, datasets.Value) and kind.dtype in ("binary", "large_binary")


def _holds_images(kind: Any) -> bool:
    """Whether a column does: by its type, or as `datasets` stores images where that is not said."""
    if isinstance(kind, dict):
        types = {name: getattr(field, "dtype", None) for name, field in kind.items()}
        return types == {"bytes": "binary", "path": "string"}
    return isinstance(kind, datasets.Image)


def find_label_column(features: datasets.Features, wanted: str | None) -> str | None:
    """The column of classes: the one asked for, else the only ClassLabel, else `label`, else none.

    Tables without declared classes, as pandas writes them, have theirs in words or numbers.
    """
    if wanted is not None:
        if wanted in features:
            return wanted
        raise ValueError(
            f"label_column must name a column, got {wanted!r}; columns: {', '.join(features)}."
        )
    found = [name for name, kind in features.items() if isinstance(kind, datasets.ClassLabel)]
    if not found and getattr(features.get(LABEL), "dtype", None) in CLASS_TYPES:
        return LABEL
    return found[0] if len(found) == 1 else None
