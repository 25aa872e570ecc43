"""Parts of the features of a split: parquet files that are whole or absent, each with a checksum.

Shapes: N usable images of a part, F features.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from vicreg_hf.data.splits import ImageSplit
from vicreg_hf.runtime.checks import one_line
from vicreg_hf.runtime.files import replacing

EMBEDDING, MAP = "embedding", "feature_map"
"""The column of pooled features (F,), and that of feature maps (h w, width)."""
HEIGHT, WIDTH = "map_height", "map_width"
"""Columns of a map's h and w, which readers of parquet would not find in the metadata."""
CHECKSUM = b"vicreg_hf.sha256"
"""Key in a file's metadata of the SHA-256 of its rows."""
NAME = "{split}-{number:05d}-of-{of:05d}.parquet"
_NAME = re.compile(r"(?P<split>.+)-(?P<number>\d{5,})-of-(?P<of>\d{5,})\.parquet")


@dataclass(frozen=True)
class Part:
    """Some rows of a split, and the file their features go to."""

    split: str
    rows: range
    file: Path


class PartFile(NamedTuple):
    """A part that lies in a folder, as its name tells."""

    split: str
    number: int
    of: int
    """How many parts the split is cut into."""
    file: Path


class Contents(NamedTuple):
    """The rows and features that a part holds."""

    rows: NDArray[np.int64]
    """(N,) numbers of the images within the split, ascending."""
    features: NDArray[np.floating[Any]]
    """(N, F), or (0, F) where they were not read."""


class PartError(ValueError):
    """A part that cannot be used; the message says why."""


def parts_of(splits: Mapping[str, ImageSplit], folder: Path, rows_per_file: int) -> list[Part]:
    """The files that splits are cut into."""
    parts = []
    for name, split in splits.items():
        starts = range(0, len(split), rows_per_file)
        for number, start in enumerate(starts):
            rows = range(start, min(start + rows_per_file, len(split)))
            file = folder / NAME.format(split=name, number=number, of=len(starts))
            parts.append(Part(name, rows, file))
    return parts


def part_files(folder: Path) -> list[PartFile]:
    """The parts that are in a folder, those of a split together and in their order."""
    found = ((_NAME.fullmatch(file.name), file) for file in sorted(folder.glob("*.parquet")))
    return [
        PartFile(name["split"], int(name["number"]), int(name["of"]), file)
        for name, file in found if name is not None
    ]  # fmt: skip


def write_part(file: Path, table: pa.Table) -> None:
    """Write a part, whole or not at all.

    Raises:
        OSError: it names the file.
    """
    file.parent.mkdir(parents=True, exist_ok=True)
    metadata = table.schema.metadata or {}
    table = table.replace_schema_metadata({**metadata, CHECKSUM: _sha256(table)})
    with replacing(file) as aside, pq.ParquetWriter(aside, table.schema) as writer:
        if len(table):  # `datasets` cannot read a row group of none
            writer.write_table(table)


def read_table(file: Path, columns: list[str] | None = None) -> pa.Table:
    """Read a part's rows. All of their columns are compared with the checksum of the part.

    Raises:
        FileNotFoundError: it is absent.
        PartError: it is damaged.
    """
    with _named_damage():
        # earlier versions wrote a checksum for each page
        with pq.ParquetFile(file, page_checksum_verification=True) as opened:
            table = opened.read(columns)
        stored = (table.schema.metadata or {}).get(CHECKSUM)  # earlier versions wrote none
        if columns is None and stored is not None and stored != _sha256(table):
            raise PartError("its rows do not have the checksum they were written with")
        return table


def read_part(part: Part, num_features: int, *, with_features: bool = True) -> Contents:
    """Read a part. With its features it is compared with its checksum.

    Raises:
        FileNotFoundError: it is absent.
        PartError: its contents are not those that were written.
    """
    table = read_table(part.file, None if with_features else ["row"])
    with _named_damage():
        rows = table["row"].to_numpy()
        features = np.empty((0, num_features), np.float32)
        if with_features:
            features = features_of(table).reshape(len(rows), num_features)
    inside = not len(rows) or (rows[0] in part.rows and rows[-1] in part.rows)
    if rows.dtype != np.int64 or not inside or (np.diff(rows) <= 0).any():
        raise PartError(f"its rows are not of {part.rows.start} to {part.rows.stop - 1}")
    return Contents(rows, features)


def features_of(table: pa.Table) -> NDArray[np.floating[Any]]:
    """The features of the rows of a part, (N, F); a map's positions follow each other."""
    (name,) = {MAP, EMBEDDING} & set(table.column_names)
    flat = table[name].combine_chunks().flatten()
    flat = (flat.flatten() if name == MAP else flat).to_numpy()
    return flat.reshape(len(table), -1) if len(table) else flat.reshape(0, 0)


@contextmanager
def _named_damage() -> Iterator[None]:
    """Raise a PartError for what pyarrow raises, which depends on the place of the damage."""
    try:
        yield
    except (FileNotFoundError, PartError):
        raise
    except (OSError, pa.ArrowException, ValueError, LookupError, TypeError) as error:
        raise PartError(one_line(error) or type(error).__name__) from error


def _sha256(table: pa.Table) -> bytes:
    digest = hashlib.sha256()
    # joined to another table it is copied: a slice is serialised otherwise than the same rows
    table = pa.concat_tables([table, table.schema.empty_table()])
    for batch in table.combine_chunks().to_batches():
        digest.update(batch.serialize())  # the columns' values; metadata are not among them
    return digest.hexdigest().encode()
