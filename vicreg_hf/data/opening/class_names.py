"""The names of classes in the parquet files of a local folder.

`datasets` gives every split the class names of the first, whatever the files of the others say.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import datasets
import pyarrow.parquet as pq

from vicreg_hf.data.columns.finding import declares_classes


def restore_class_names(
    splits: Mapping[Any, datasets.Dataset], files: Mapping[Any, Iterable[Any]]
) -> None:
    """Give each split, in place, the class names that its own files declare.

    Args:
        files: paths of the files of each split, by its name; only those of parquet files are read.

    Raises:
        ValueError: files of one split that declare different names.
    """
    for split, table in splits.items():
        declared: dict[str, Any] = {}
        for file in map(str, files.get(split, ())):
            for column, feature in _declared_classes(file).items():
                if declared.setdefault(column, feature) != feature:
                    raise ValueError(
                        f"class names must be the same in all files of a split, and {file} "
                        f"declares others for {column!r} than the first of {split}; write them "
                        "again with the same names, or as splits of their own."
                    )
        table.info.features = datasets.Features(table.features | declared)


def _declared_classes(file: str) -> dict[str, Any]:
    """The columns of classes, or of lists of them, that a parquet file declares."""
    schema = pq.read_schema(file) if file.endswith(".parquet") else None
    if schema is None or b"huggingface" not in (schema.metadata or {}):
        return {}
    features = datasets.Features.from_arrow_schema(schema)
    return {column: kind for column, kind in features.items() if declares_classes(kind)}
