"""The images of a data set whose features are nearest to those of new images.

Shapes: N rows of a part, Q new images, F features.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from heapq import nlargest
from pathlib import Path
from typing import Any, NamedTuple

import datasets
import numpy as np
import pyarrow as pa
import torch
from numpy.typing import NDArray
from sklearn.neighbors import NearestNeighbors

from vicreg_hf.data.columns.base import BadImage
from vicreg_hf.data.splits import image_split
from vicreg_hf.features.encode import encode_with
from vicreg_hf.features.encoders import Encoder, open_encoder
from vicreg_hf.features.extract import RECORD, read_record
from vicreg_hf.features.parts import PartError, features_of, read_table
from vicreg_hf.runtime.checks import read_range
from vicreg_hf.runtime.console import warn

AT_ONCE = 64
"""New images that are encoded together."""
PART = re.compile(r"(.+)-(\d{5})-of-(\d{5})\.parquet")
"""Names of parts: the split, the number, and how many the split has."""


class Neighbour(NamedTuple):
    """An image of the data set."""

    similarity: float
    """Cosine similarity of its features and those of the new image, from -1 to 1."""
    split: str
    row: int
    """Its number in the split."""
    image_id: str
    """Its path within the data set, or its number."""
    label: str | None
    """Its class, if it has one."""


class Neighbours(NamedTuple):
    """A new image, and those nearest to it, the nearest first."""

    query: str
    nearest: list[Neighbour]

    def __str__(self) -> str:
        rows = [
            f"  {one.similarity:7.4f}  {one.split}  {one.image_id}"
            + (f"  {one.label}" if one.label is not None else "")
            for one in self.nearest
        ]
        return "\n".join([self.query, *rows])


def nearest_images(
    features: str | Path,
    queries: Sequence[str | Path],
    *,
    k: int = 8,
    split: str | None = None,
    model: str | None = None,
) -> list[Neighbours]:
    """Find the images that are most like new ones, by the cosine similarity of their features.

    Args:
        features: directory that `extract_dataset` wrote.
        queries: files of the new images.
        k: images that are found for each; fewer where there are fewer.
        split: the split that is searched; None searches all.
        model: the encoder, by default where it was when the features were extracted.

    Raises:
        ValueError: no features there, another encoder than theirs, or a query that is no image.
    """
    directory = Path(features)
    record = read_record(directory / RECORD)
    if record is None:
        raise ValueError(f"features must be a directory that extract wrote, got {directory}.")
    if record.get("features") == "map":
        raise ValueError(
            f"search compares pooled features, and {directory} holds feature maps; extract without "
            "--features map into another output_dir."
        )
    if k < 1:
        raise ValueError(f"k must be positive, got {k}.")
    parts = _parts(directory, split)
    encoder = _encoder(record, directory, model)
    wanted = _encode(encoder, list(map(str, queries)), record)
    found: list[list[Neighbour]] = [[] for _ in queries]
    for name, table in parts:
        for kept, nearest in zip(found, _nearest_of(table, name, wanted, k), strict=True):
            kept[:] = nlargest(k, [*kept, *nearest], key=lambda one: one.similarity)
    return [Neighbours(str(q), near) for q, near in zip(queries, found, strict=True)]


def _parts(directory: Path, split: str | None) -> Iterator[tuple[str, pa.Table]]:
    """The split and the rows of each part; those of one part are in memory at a time.

    Raises:
        ValueError: there are none, or one is damaged.
    """
    names = [PART.fullmatch(file.name) for file in sorted((directory / "data").glob("*.parquet"))]
    files = [name for name in names if name is not None]
    splits = list(dict.fromkeys(name[1] for name in files))
    if not files or (split is not None and split not in splits):
        raise ValueError(
            f"split must be one of which {directory} holds features "
            f"({', '.join(splits) or 'none'}), got {split!r}; extract writes them."
        )
    chosen = [name for name in files if split in (None, name[1])]
    for name, count in Counter(name[1] for name in chosen).items():
        total = next(int(each[3]) for each in chosen if each[1] == name)
        if count < total:
            warn(f"{count} of {total} files of {name} are there; extract writes the others.")
    return (_table(directory / "data" / name[0], name[1]) for name in chosen)


def _table(file: Path, split: str) -> tuple[str, pa.Table]:
    try:
        return split, read_table(file)
    except PartError as error:
        raise ValueError(
            f"{file} must be whole, and is damaged: {error}; extract, started again, mends it."
        ) from error


def _encoder(record: Mapping[str, Any], directory: Path, model: str | None) -> Encoder:
    """The encoder that the features are of.

    Raises:
        ValueError: it is not said where it is, it is not there, or it is another.
    """
    name = model or record.get("model")
    if name is None:
        raise ValueError(
            f"{directory / RECORD} must name the encoder of the features, and an earlier version "
            "wrote it, which did not; give the encoder as model."
        )
    if model is None and Path(name).is_absolute() and not Path(name).exists():
        raise ValueError(
            f"model must say where the encoder of the features is now, since {name}, with which "
            "they were extracted, is no longer there."
        )
    encoder = open_encoder(name, record.get("revision") if model is None else None)
    if encoder.fingerprint() != record["encoder"]:
        raise ValueError(
            f"model must be the encoder of the features in {directory}, and {name} has other "
            "weights or another preprocessing by now; give the right one, or extract anew."
        )
    return encoder


def _encode(
    encoder: Encoder, queries: list[str], record: Mapping[str, Any]
) -> NDArray[np.floating[Any]]:
    """Features (Q, F) of new images, which are read, prepared and encoded as extraction does.

    Raises:
        ValueError: a file is not there, or is no image.
    """
    absent = [query for query in queries if not Path(query).is_file()]
    if absent:
        raise ValueError(f"query must be files of images, got {absent[0]!r}, which is none.")
    kind = datasets.Image() if encoder.sound is None else datasets.Audio(decode=False)
    table = datasets.Dataset.from_dict(
        {"query": queries}, features=datasets.Features({"query": kind})
    )
    (of_data, *_) = record["splits"].values()
    split = image_split(
        {"query": table}, "query", dataset_name="query", channels=encoder.in_chans,
        sound=encoder.sound,
        value_range=read_range("value_range", of_data.get("value_range")) or encoder.value_range,
    )  # fmt: skip
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    encoder.module.to(device)
    encoder.module.to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]
    features = []
    for start in range(0, len(queries), AT_ONCE):
        images = []
        for sample in split.try_each(range(start, min(start + AT_ONCE, len(queries)))):
            if isinstance(sample, BadImage):
                raise ValueError(
                    f"query must be images, and {sample.path} cannot be used: {sample.reason}"
                )
            images.append(encoder.prepare(sample.content))
        with torch.autocast(device.type, torch.bfloat16, enabled=record["bf16"]):
            features.append(encode_with(encoder, torch.stack(images), device).cpu())
    return torch.cat(features).numpy()


def _nearest_of(
    table: pa.Table, split: str, wanted: NDArray[np.floating[Any]], k: int
) -> Iterator[list[Neighbour]]:
    """For each of the features wanted, (Q, F), the nearest rows of a part."""
    if not len(table):  # all of its images were bad
        return iter([[] for _ in wanted])
    names = datasets.Features.from_arrow_schema(table.schema).get("label")
    labels = table["label"].to_pylist() if names is not None else [None] * len(table)
    rows, ids = table["row"].to_pylist(), table["image_id"].to_pylist()
    search = NearestNeighbors(n_neighbors=min(k, len(table)), metric="cosine")
    distances, places = search.fit(features_of(table).astype(np.float32)).kneighbors(wanted)

    def label_of(at: int) -> str | None:
        label = labels[at]
        if label is None or label < 0:
            return None
        return str(names.int2str(label) if isinstance(names, datasets.ClassLabel) else label)

    return (
        [
            Neighbour(1 - float(far), split, rows[at], ids[at], label_of(int(at)))
            for far, at in zip(*near, strict=True)
        ]
        for near in zip(distances, places, strict=True)
    )
