"""Metadata files: what belongs to each image of a folder or zip, as `datasets` has them written.

A row names its file in a column `file_name`, or several in `left_file_name` and `right_file_name`
or as a list in `file_names`, by their paths from the folder that the metadata file is in.
"""

from __future__ import annotations

import os
import posixpath
import re
from collections.abc import Sequence
from io import BytesIO
from pathlib import PurePosixPath
from typing import Any, NamedTuple

import datasets
import pandas as pd
import pyarrow as pa
import pyarrow.json as pj
import pyarrow.parquet as pq

from vicreg_hf.data.columns.reading import beside, read_file, zip_and_name
from vicreg_hf.data.opening.folders import Kind, MediaFile, Rows, cells_of
from vicreg_hf.runtime.checks import one_line

METADATA = ("metadata.csv", "metadata.jsonl", "metadata.parquet")
ONE, SEVERAL = "file_name", "file_names"
"""How the names of columns that name files end."""
STRINGS = (datasets.Value("string"), datasets.Value("large_string"))


class Listed(NamedTuple):
    """The rows of metadata files."""

    files: list[MediaFile]
    """The first file that each row names, or the metadata file where it names none."""
    rows: Rows
    paths: set[str]
    """Of all files that are named."""


def read_metadata(metadata: Sequence[MediaFile], kind: Kind) -> Listed:
    """Read metadata files, one after the other.

    Raises:
        ValueError: one that cannot be read, or several in one folder; columns that differ in type;
            no column that names files, or a name that leads out of the folder.
    """
    _check_places(metadata)
    tables = [_parse(file) for file in metadata]
    table = _joined(tables, metadata)
    if not len(table):
        raise ValueError(f"a metadata file must have rows, got none in {metadata[0].path}.")
    features = datasets.Features.from_arrow_schema(table.schema)
    naming = [name for name, feature in features.items() if _names_files(name, feature)]
    if not naming:
        raise ValueError(
            f"metadata must name its files in a column {ONE} of text, got {', '.join(features)} in "
            f"{metadata[0].path}."
        )
    sources = [file for file, each in zip(metadata, tables, strict=True) for _ in range(len(each))]
    named = {
        name: [
            _located(cell, source)
            for cell, source in zip(table[name].to_pylist(), sources, strict=True)
        ]
        for name in naming
    }
    firsts = [
        next(filter(None, row), [source])[0]
        for source, *row in zip(sources, *named.values(), strict=True)
    ]
    paths = {file.path for cells in named.values() for files in cells for file in files}
    return Listed(firsts, _rows(table, features, named, kind), paths)


def _rows(
    table: pa.Table,
    features: datasets.Features,
    named: dict[str, list[list[MediaFile]]],
    kind: Kind,
) -> Rows:
    """The columns, of which those that name files hold these instead."""
    columns: dict[str, Any] = {}
    kinds: dict[str, Any] = {}
    taken = {_own_name(name, kind) for name in named} - named.keys()
    for name, feature in features.items():
        if name in taken or name == "__index_level_0__":  # as pandas leaves behind
            continue
        if name not in named:
            columns[name], kinds[name] = table[name], feature
        elif name.endswith(SEVERAL):
            own = _own_name(name, kind)
            columns[own], kinds[own] = _lists(named[name]), datasets.List(kind.feature)
        else:
            own = _own_name(name, kind)
            columns[own] = cells_of([files[0].path if files else None for files in named[name]])
            kinds[own] = kind.feature
    return Rows(pa.table(columns), kinds)


def _own_name(name: str, kind: Kind) -> str:
    """Of the column of files that are named in this one."""
    if name.endswith(SEVERAL):
        return name.removesuffix(SEVERAL).removesuffix("_") or f"{kind.column}s"
    return name.removesuffix(ONE).removesuffix("_") or kind.column


def _check_places(metadata: Sequence[MediaFile]) -> None:
    seen: dict[str, str] = {}
    for file in metadata:
        place = beside(file.path, ".")
        if place in seen:
            raise ValueError(
                f"a folder must have one metadata file, got {seen[place]} and {file.path}."
            )
        seen[place] = file.path


def _parse(file: MediaFile) -> pa.Table:
    name = zip_and_name(file.path)[1]
    try:
        content = BytesIO(read_file(file.path))
        if name.endswith(".csv"):
            return _parse_csv(content)
        if name.endswith(".jsonl"):
            options = pj.ReadOptions(block_size=max(1, content.getbuffer().nbytes))
            return pj.read_json(content, read_options=options)
        return pq.read_table(content)
    except Exception as error:  # parsers raise whatever they meet
        told = one_line(error)
        if isinstance(error, UnicodeDecodeError):
            told = f"it must be in UTF-8, so save it anew ({told})"
        raise ValueError(
            f"a metadata file must be readable, and {file.path} is not: {told}"
        ) from error


def _parse_csv(content: BytesIO) -> pa.Table:
    """Columns of the narrowest type that gives each value back: 007 and NA are words."""
    header = content.readline()
    content.seek(0)
    if b"," not in header and (other := re.search(rb"[;\t|]", header)):
        raise ValueError(f"columns must be separated by commas, got {other[0].decode()!r}")
    words = pd.read_csv(
        content, dtype=str, keep_default_na=False, na_values=[""], index_col=False,
        skipinitialspace=True,
    )  # fmt: skip
    columns = {name: _typed(name, words[name]) for name in words.columns}
    for name, column in list(columns.items()):
        if name.startswith("Unnamed: ") and column.null_count == len(column):
            del columns[name]  # a comma at the end of each line
    return pa.table(columns)


def _typed(name: str, words: Any) -> pa.Array:
    column = pa.array(words, pa.large_string(), from_pandas=True)  # as `datasets` has them
    known = column.drop_null().to_pylist()
    if not known or name.endswith((ONE, SEVERAL)):
        return column
    if all(re.fullmatch(r"0|-?[1-9]\d{0,17}", word) for word in known):
        return column.cast(pa.int64())
    if all(re.fullmatch(r"-?(0|[1-9]\d*)(\.\d+)?([eE][+-]?\d+)?", word) for word in known):
        return column.cast(pa.float64())
    if set(known) <= {"True", "False"}:
        return column.cast(pa.bool_())
    return column


def _joined(tables: Sequence[pa.Table], metadata: Sequence[MediaFile]) -> pa.Table:
    try:
        return pa.concat_tables(tables, promote_options="permissive")
    except pa.ArrowException as error:
        raise ValueError(
            "metadata files must have columns of the same types, and those below "
            f"{os.path.commonpath([file.path for file in metadata])} have not: {error}"
        ) from error


def _names_files(name: str, feature: Any) -> bool:
    if name == ONE or name.endswith(f"_{ONE}"):
        return feature in STRINGS
    if name == SEVERAL or name.endswith(f"_{SEVERAL}"):
        return isinstance(feature, datasets.List) and feature.feature in STRINGS
    return False


def _located(cell: str | list[str | None] | None, source: MediaFile) -> list[MediaFile]:
    """The files that a cell names."""
    names = cell if isinstance(cell, list) else [cell]
    return [_file(name, source) for name in names if name is not None]


def _file(name: str, source: MediaFile) -> MediaFile:
    within = posixpath.normpath(name.replace("\\", "/"))  # as Windows has them too
    if "://" in name or re.match(r"/|\.\.(/|$)|[A-Za-z]:/", within):
        raise ValueError(
            f"a metadata file must name files by their paths from its own folder, and "
            f"{source.path} names {name!r}."
        )
    parts = PurePosixPath(within).parts
    return MediaFile((*source.parts, *parts[:-1]), beside(source.path, within))


def _lists(cells: Sequence[Sequence[MediaFile]]) -> pa.ListArray:
    offsets = [0]
    for files in cells:
        offsets.append(offsets[-1] + len(files))
    flat = cells_of([file.path for files in cells for file in files])
    return pa.ListArray.from_arrays(pa.array(offsets, pa.int32()), flat)
