"""Metadata files: what belongs to each image of a folder or zip, as `datasets` has them written.

A row names its file in a column `file_name`, or several in `left_file_name` and `right_file_name`
or as a list in `file_names`, by their paths from the folder that the metadata file is in.
"""

from __future__ import annotations

import posixpath
import re
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from io import BytesIO
from typing import Any, NamedTuple

import datasets
import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.json as pj
import pyarrow.parquet as pq
from datasets.packaged_modules.folder_based_builder.folder_based_builder import FolderBasedBuilder

from vicreg_hf.data.columns.reading import beside, read_file
from vicreg_hf.data.opening.folders import Media, column_of_paths
from vicreg_hf.data.opening.listing import suffix_of
from vicreg_hf.runtime.checks import fold_name, one_line
from vicreg_hf.runtime.files import decode_text

METADATA = tuple(FolderBasedBuilder.METADATA_FILENAMES)
ONE, SEVERAL = "file_name", "file_names"
"""The endings of columns that name files."""
STRINGS = (datasets.Value("string"), datasets.Value("large_string"))
CSV_TYPES = {
    r"0|-?[1-9]\d{0,17}": pa.int64(),
    r"-?(0|[1-9]\d*)(\.\d+)?([eE][+-]?\d+)?": pa.float64(),
    r"True|False": pa.bool_(),
}
"""The types of columns all of whose values are written so; 007 and NA are words."""


class MetadataRows(NamedTuple):
    """The N rows of metadata files."""

    files: list[str]
    """(N,) the first file that each row names, or the metadata file where it names none."""
    table: pa.Table
    """(N,) rows, in which files are given by their paths."""
    features: datasets.Features
    named: set[str]
    """The paths of all files that are named."""


def read_metadata(metadata: Sequence[str], media: Media, there: Sequence[str]) -> MetadataRows:
    """Read metadata files, one after the other.

    Args:
        there: paths of the files that may be named. One that is named with other capitals, or
            another way to write accents, is meant where it is the only one.

    Raises:
        ValueError: one that cannot be read, or several in one folder; columns that differ in type;
            no column that names files, or a name that leads out of the folder.
    """
    folders: dict[str, str] = {}
    for file in metadata:
        if (other := folders.setdefault(beside(file, "."), file)) != file:
            raise ValueError(f"a folder must have one metadata file, got {other} and {file}.")
    tables = [_parse(file) for file in metadata]
    try:
        table = pa.concat_tables(tables, promote_options="permissive")
    except pa.ArrowException as error:
        raise ValueError(
            f"metadata files must have columns of the same types, and {metadata[0]} and others"
            f" have not: {error}"
        ) from error
    if not len(table):
        raise ValueError(f"a metadata file must have rows, got none in {metadata[0]}.")
    features = datasets.Features.from_arrow_schema(table.schema)
    sources = [file for file, each in zip(metadata, tables, strict=True) for _ in range(len(each))]
    columns = {
        name: re.sub(r"_?file_names?$", "", name) or media.column + "s" * name.endswith(SEVERAL)
        for name, feature in features.items()
        if _names_files(name, feature)
    }
    if not columns:
        raise ValueError(
            f"metadata must name its files in a column {ONE} of text, got {', '.join(features)} in "
            f"{metadata[0]}."
        )
    replaced = {*columns.values(), "__index_level_0__"} - columns.keys()  # pandas leaves the latter
    table = table.drop_columns([name for name in table.column_names if name in replaced])
    known, folded = set(there), _by_folded_name(there)
    rows: list[list[str]] = [[] for _ in sources]
    for name, column in columns.items():
        cells = [
            [file if file in known else _only_alike(file, folded) for file in _paths(cell, source)]
            for cell, source in zip(table[name].to_pylist(), sources, strict=True)
        ]
        rows = [row + files for row, files in zip(rows, cells, strict=True)]
        several = name.endswith(SEVERAL)
        paths = column_of_paths(cells if several else [(*files, None)[0] for files in cells])
        table = table.set_column(table.column_names.index(name), column, paths)
        features[column] = datasets.List(media.feature) if several else media.feature
    features = datasets.Features({name: features[name] for name in table.column_names})
    firsts = [(*row, source)[0] for row, source in zip(rows, sources, strict=True)]
    return MetadataRows(firsts, table, features, {file for row in rows for file in row})


def _parse(file: str) -> pa.Table:
    try:
        content = BytesIO(read_file(file))
        if suffix_of(file) == ".parquet":
            return pq.read_table(content)
        content = BytesIO(decode_text(content.getvalue()).encode())
        if suffix_of(file) == ".csv":
            return _parse_csv(content)
        if suffix_of(file) == ".jsonl":
            options = pj.ReadOptions(block_size=max(1, content.getbuffer().nbytes))
            return pj.read_json(content, read_options=options)
    except Exception as error:  # parsers raise whatever they meet
        reason = one_line(error)
        if isinstance(error, UnicodeError):
            reason = f"it must be in UTF-8, so save it anew ({reason})"
        raise ValueError(
            f"a metadata file must be readable, and {file} is not: {reason}"
        ) from error


def _parse_csv(content: BytesIO) -> pa.Table:
    """Parse columns as the narrowest type that gives each value back."""
    header = content.readline()
    content.seek(0)
    if b"," not in header and (other := re.search(rb"[;\t|]", header)):
        raise ValueError(f"columns must be separated by commas, got {other[0].decode()!r}")
    table = pd.read_csv(
        content, dtype=str, keep_default_na=False, na_values=[""], index_col=False,
        skipinitialspace=True,
    )  # fmt: skip
    return pa.table({
        name: _narrow(name, pa.array(table[name], pa.large_string(), from_pandas=True))
        for name in table.columns
        if not (name.startswith("Unnamed: ") and np.all(table[name].isna()))  # a comma at each end
    })  # fmt: skip


def _narrow(name: str, words: pa.Array) -> pa.Array:
    if words.null_count < len(words) and not name.endswith((ONE, SEVERAL)):
        for pattern, kind in CSV_TYPES.items():
            if all(re.fullmatch(pattern, word) for word in words.drop_null().to_pylist()):
                return words.cast(kind)
    return words


def _names_files(name: str, feature: Any) -> bool:
    if re.fullmatch(f"(.*_)?{SEVERAL}", name):
        return isinstance(feature, datasets.List) and feature.feature in STRINGS
    return re.fullmatch(f"(.*_)?{ONE}", name) is not None and feature in STRINGS


def _by_folded_name(paths: Iterable[str]) -> Mapping[str, list[str]]:
    folded: dict[str, list[str]] = defaultdict(list)
    for path in paths:
        folded[fold_name(path)].append(path)
    return folded


def _only_alike(path: str, folded: Mapping[str, list[str]]) -> str:
    """The only file whose path is written alike, else the path itself."""
    alike = folded.get(fold_name(path), [])
    return alike[0] if len(alike) == 1 else path


def _paths(cell: str | list[str | None] | None, source: str) -> list[str]:
    """The files that a cell of a metadata file names."""
    found: list[str] = []
    for name in cell if isinstance(cell, list) else [cell]:
        if name is None:
            continue
        within = posixpath.normpath(name.replace("\\", "/"))  # Windows writes paths so
        if "://" in name or re.match(r"/|\.\.(/|$)|[A-Za-z]:/", within):
            raise ValueError(
                "a metadata file must name files by their paths from its own folder, and "
                f"{source} names {name!r}."
            )
        found.append(beside(source, within))
    return found
