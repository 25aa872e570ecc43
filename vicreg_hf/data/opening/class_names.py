"""What the numbers of classes mean in the parquet files of a local folder.

`datasets` gives every split the class names of the first, whatever the files of the others say.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import datasets
import pyarrow.parquet as pq


def restore_class_names(
    splits: Mapping[Any, datasets.Dataset], files: Mapping[Any, Iterable[Any]]
) -> None:
    """Give each split, in place, the class names that its own files declare.

    Args:
        files: paths of the files of each split, by its name; others than parquet are passed over.

    Raises:
        ValueError: files of one split that declare different names.
    """
    for name, table in splits.items():
        declared = _declared(str(name), map(str, files.get(name, ())))
        table.info.features = datasets.Features(table.features | declared)


def _declared(split: str, files: Iterable[str]) -> dict[str, Any]:
    """The columns of classes, or of lists of them, that are declared."""
    found: dict[str, Any] = {}
    for file in files:
        if not file.endswith(".parquet"):
            continue
        schema = pq.read_schema(file)
        if b"huggingface" not in (schema.metadata or {}):  # it declares no classes
            continue
        for column, kind in datasets.Features.from_arrow_schema(schema).items():
            if not names_classes(kind):
                continue
            if found.setdefault(column, kind) != kind:
                raise ValueError(
                    f"class names must be the same in all files of a split, and {file} declares "
                    f"others for {column!r} than the first of {split}; write them again with the "
                    "same names, or as splits of their own."
                )
    return found


def names_classes(kind: Any) -> bool:
    """Whether a column of this kind holds numbers of classes, or lists of them."""
    return isinstance(kind.feature if is_list(kind) else kind, datasets.ClassLabel)


def is_list(kind: Any) -> bool:
    """Whether a column of this kind holds lists."""
    return isinstance(kind, (datasets.List, datasets.LargeList))
