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
        for file in (str(file) for file in files.get(split, ()) if str(file).endswith(".parquet")):
            schema = pq.read_schema(file)
            if b"huggingface" not in (schema.metadata or {}):  # it declares no classes
                continue
            for column, kind in datasets.Features.from_arrow_schema(schema).items():
                if declares_classes(kind) and declared.setdefault(column, kind) != kind:
                    raise ValueError(
                        f"class names must be the same in all files of a split, and {file} "
                        f"declares others for {column!r} than the first of {split}; write them "
                        "again with the same names, or as splits of their own."
                    )
        table.info.features = datasets.Features(table.features | declared)
