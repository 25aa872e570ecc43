"""Lists of the images whose labels semi-supervised learning may use.

Shapes: N images.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path, PurePosixPath
from typing import Any

import datasets
import numpy as np
from numpy.typing import NDArray

from vicreg_hf.data.columns.reading import zip_and_name
from vicreg_hf.data.splits import ImageSplit
from vicreg_hf.runtime.checks import fold_name
from vicreg_hf.runtime.files import decode_text

SYNSET_TWICE = re.compile(r"^(n\d{8}_\d+)_n\d{8}(\.\w+)$")
"""ImageNet on the Hub names n01440764_10026.JPEG n01440764_10026_n01440764.JPEG."""
FOLDED = "\0"
"""Stands before names without capitals, which are looked for where none is written as listed."""
ROWS_AT_ONCE = 1024


def listed_subset(
    path: str | Path, image_paths: Sequence[str | None], num_rows: int
) -> NDArray[np.int64]:
    """Rows that a text file names, one a line, as SimCLR's lists of 1 % and 10 % of ImageNet do.

    A line is a row number, or an image's file name or path, of which the name must match. Of
    several images of one name the one whose path ends like the line's is meant. Empty lines and
    those that begin with # are passed over; a row that is named twice counts once. Capitals, ways
    to write accents, and / or a backslash between folders only matter where names differ in them
    alone.

    Args:
        path: of the file; SimCLR's are imagenet_subsets/1percent.txt and 10percent.txt in
            google-research/simclr.
        image_paths: of every row, where known, as `paths_of_images` gives them.
        num_rows: N.

    Returns:
        Row numbers, ascending.

    Raises:
        ValueError: a file that cannot be read or names nothing, a row that is not there, a name
            that no image has or that several have.
    """
    try:
        lines = decode_text(Path(path).read_bytes()).splitlines()
    except (OSError, UnicodeError) as error:
        raise ValueError(f"a list of images must be a text file, got {path}: {error}.") from error
    named: dict[str, list[int]] = {}
    paths = [zip_and_name(each or "")[1].replace("\\", "/") for each in image_paths]
    for row, image_path in enumerate(paths):
        name = PurePosixPath(image_path).name
        short = SYNSET_TWICE.sub(r"\1\2", name)
        folded = (FOLDED + fold_name(each) for each in (name, short) if each)
        for known in dict.fromkeys((name, short, *folded)):
            named.setdefault(known, []).append(row)
    named.pop("", None)
    rows = {
        _row_of(line, named, paths, num_rows, f"line {number} of {path}")
        for number, line in enumerate(map(str.strip, lines), 1)
        if line and not line.startswith("#")
    }
    if not rows:
        raise ValueError(f"a list of images must name some, got none in {path}.")
    return np.array(sorted(rows), dtype=np.int64)


def _row_of(
    line: str,
    named: dict[str, list[int]],
    paths: Sequence[str],
    num_rows: int,
    place: str,
) -> int:
    if line.isdecimal():
        if int(line) >= num_rows:
            raise ValueError(f"a row must be one of 0 to {num_rows - 1}, got {line} in {place}.")
        return int(line)
    if not named:
        raise ValueError(
            f"images without file names must be listed by row numbers, got {line!r} in {place}."
        )
    path = PurePosixPath("/", line.replace("\\", "/"))
    rows = named.get(path.name) or named.get(FOLDED + fold_name(path.name), [])
    if not rows:
        raise ValueError(
            f"every listed name must be an image's, got {line!r} in {place}; the images are named "
            f"like {next(iter(named))!r}."
        )
    if len(rows) > 1:
        for spelled in (str, fold_name):
            end = spelled(str(path))
            ends = [row for row in rows if f"/{spelled(paths[row])}".endswith(end)]
            rows = ends if len(path.parts) > 2 and ends else rows
    if len(rows) > 1:
        raise ValueError(
            f"a listed name must be that of one image, got {line!r} in {place}, which rows "
            f"{rows[0]} and {rows[1]} have; add its folder, or list row numbers."
        )
    return rows[0]


def paths_of_images(split: ImageSplit) -> list[str | None]:
    """The path of every image of a split, where its data set says; no image is decoded."""
    if isinstance(split.column.feature, datasets.Array3D):
        return [None] * len(split)
    paths: list[str | None] = []
    for start in range(0, len(split), ROWS_AT_ONCE):
        rows: Any = split.table.with_format("arrow")[start : start + ROWS_AT_ONCE]
        for chunk in rows[split.column.name].chunks:
            paths += chunk.field("path").to_pylist()
    return paths
