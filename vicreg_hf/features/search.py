"""The images of a data set whose features are nearest to those of new images.

Shapes: N rows of a part, Q new images, F features.
"""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from heapq import nlargest
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from numpy.typing import NDArray
from torch.nn.functional import normalize

from vicreg_hf.data.columns.base import BadImage
from vicreg_hf.data.splits import ImageSplit, image_split
from vicreg_hf.features.encode import encode_with
from vicreg_hf.features.encoders import Encoder, open_encoder
from vicreg_hf.features.extract import RECORD, read_record
from vicreg_hf.features.parts import PartError, PartFile, features_of, part_files, read_table
from vicreg_hf.metrics.retrieval import most_similar
from vicreg_hf.runtime.checks import read_range
from vicreg_hf.runtime.console import warn

AT_ONCE = 64
"""New images that are encoded together."""


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


class Parts:
    """The split and the rows of each part, which is read whenever it is the turn of it.

    Iterating raises a ValueError where a part is damaged.
    """

    def __init__(self, files: Sequence[PartFile]) -> None:
        self.files = files

    def __iter__(self) -> Iterator[tuple[str, pa.Table]]:
        for part in self.files:
            try:
                yield part.split, read_table(part.file)
            except PartError as error:
                raise ValueError(
                    f"{part.file} must be whole, and is damaged: {error}; extract, started again, "
                    "mends it."
                ) from error


@dataclass(frozen=True)
class Search:
    """The features of a data set, and the encoder that new images are compared by."""

    directory: Path
    record: Mapping[str, Any]
    """Of the extraction."""
    encoder: Encoder
    """On the device that encodes."""
    files: list[PartFile]
    """The parts that are searched."""
    parts: Iterable[tuple[str, pa.Table]]
    """The split and the rows of each; `Parts`, of which one is in memory at a time, or a list."""

    @property
    def num_rows(self) -> int:
        """Images that are searched."""
        return sum(pq.read_metadata(part.file).num_rows for part in self.files)

    def queries(self, paths: Sequence[str]) -> ImageSplit:
        """New images as a split, which is read as that of the features was.

        Raises:
            ValueError: a file is not there.
        """
        absent = [path for path in paths if not Path(path).is_file()]
        if absent:
            raise ValueError(f"query must be files of images, got {absent[0]!r}, which is none.")
        kind = datasets.Image() if self.encoder.sound is None else datasets.Audio(decode=False)
        features = datasets.Features({"query": kind})
        table = datasets.Dataset.from_dict({"query": list(paths)}, features=features)
        return image_split(
            {"query": table}, "query", dataset_name="query", channels=self.encoder.in_chans,
            sound=self.encoder.sound, value_range=self.value_range,
        )  # fmt: skip

    @property
    def value_range(self) -> tuple[float, float] | None:
        """The values that become black and white, in images of more than 8 bits."""
        (first, *_) = self.record["splits"].values()
        return read_range("value_range", first.get("value_range")) or self.encoder.value_range

    def encode(self, queries: ImageSplit) -> NDArray[np.floating[Any]]:
        """Features (Q, F) of new images, which are prepared and encoded as extraction does.

        Raises:
            ValueError: one is no image.
        """
        device = next(self.encoder.module.parameters()).device
        features = []
        for start in range(0, len(queries), AT_ONCE):
            images = []
            for sample in queries.try_each(range(start, min(start + AT_ONCE, len(queries)))):
                if isinstance(sample, BadImage):
                    raise ValueError(
                        f"query must be images, and {sample.path} cannot be used: {sample.reason}"
                    )
                images.append(self.encoder.prepare(sample.content))
            with torch.autocast(device.type, torch.bfloat16, enabled=self.record["bf16"]):
                features.append(encode_with(self.encoder, torch.stack(images), device).cpu())
        return torch.cat(features).numpy()

    def find(self, paths: Sequence[str], k: int) -> list[Neighbours]:
        """The k images nearest to each of new ones; for errors see `queries` and `encode`."""
        found = self.nearest(self.encode(self.queries(paths)), k)
        return [Neighbours(path, near) for path, near in zip(paths, found, strict=True)]

    def nearest(self, wanted: NDArray[np.floating[Any]], k: int) -> list[list[Neighbour]]:
        """The k rows nearest to each of some features (Q, F), the nearest first."""
        found: list[list[Neighbour]] = [[] for _ in wanted]
        for name, table in self.parts:
            for kept, nearest in zip(found, _nearest_of(table, name, wanted, k), strict=True):
                kept[:] = nlargest(k, [*kept, *nearest], key=lambda one: one.similarity)
        return found


def open_search(
    features: str | Path, *, split: str | None = None, model: str | None = None
) -> Search:
    """Open the features of a data set, to search new images in them.

    Args:
        features: directory that `extract_dataset` wrote.
        split: the split that is searched; None searches all.
        model: the encoder, by default where it was when the features were extracted.

    Raises:
        ValueError: no features there, or another encoder than theirs.
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
    files = _files(directory, split)
    encoder = _encoder(record, directory, model)
    encoder.module.to("cuda" if torch.cuda.is_available() else "cpu")
    encoder.module.to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]
    return Search(directory, record, encoder, files, Parts(files))


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
        features: directory that `extract_dataset` wrote; for split and model see `open_search`.
        queries: files of the new images.
        k: images that are found for each; fewer where there are fewer.

    Raises:
        ValueError: no features there, another encoder than theirs, or a query that is no image.
    """
    check_k(k)
    return open_search(features, split=split, model=model).find(list(map(str, queries)), k)


def check_k(k: int) -> int:
    """Return the number of neighbours.

    Raises:
        ValueError: it is below 1.
    """
    if k < 1:
        raise ValueError(f"k must be positive, got {k}.")
    return k


def _files(directory: Path, split: str | None) -> list[PartFile]:
    """The parts to search.

    Raises:
        ValueError: there are none.
    """
    files = part_files(directory / "data")
    splits = list(dict.fromkeys(part.split for part in files))
    if not files or (split is not None and split not in splits):
        raise ValueError(
            f"split must be one of which {directory} holds features "
            f"({', '.join(splits) or 'none'}), got {split!r}; extract writes them."
        )
    chosen = [part for part in files if split in (None, part.split)]
    totals = {part.split: part.of for part in chosen}
    for name, count in Counter(part.split for part in chosen).items():
        if count < totals[name]:
            warn(f"{count} of {totals[name]} files of {name} are there; extract writes the others.")
    return chosen


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


def nearest_rows(
    bank: NDArray[np.floating[Any]], wanted: NDArray[np.floating[Any]], k: int
) -> tuple[NDArray[np.floating[Any]], NDArray[np.integer[Any]]]:
    """The rows of largest cosine similarity, exactly: by faiss where it is installed.

    Args:
        bank: (N, F).
        wanted: (Q, F).
        k: at most N.

    Returns:
        (Q, k) similarities, the largest first, and (Q, k) row numbers.
    """
    rows, queries = (torch.tensor(each).float() for each in (bank, wanted))
    if find_spec("faiss") is None:
        similarity, places = most_similar(rows, queries, k)
        return similarity.numpy(), places.numpy()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it warns about its own bindings
        import faiss  # pyright: ignore[reportMissingImports]
    index: Any = faiss.IndexFlatIP(rows.shape[1])
    index.add(normalize(rows).numpy())
    return index.search(normalize(queries).numpy(), k)


def _nearest_of(
    table: pa.Table, split: str, wanted: NDArray[np.floating[Any]], k: int
) -> Iterator[list[Neighbour]]:
    """For each of the features wanted, (Q, F), the nearest rows of a part."""
    if not len(table):  # all of its images were bad
        return iter([[] for _ in wanted])
    names = datasets.Features.from_arrow_schema(table.schema).get("label")
    labels = table["label"].to_pylist() if names is not None else [None] * len(table)
    rows, ids = table["row"].to_pylist(), table["image_id"].to_pylist()
    similarity, places = nearest_rows(features_of(table), wanted, min(k, len(table)))

    def label_of(at: int) -> str | None:
        label = labels[at]
        if label is None or label < 0:
            return None
        return str(names.int2str(label) if isinstance(names, datasets.ClassLabel) else label)

    return (
        [
            Neighbour(float(value), split, rows[at], ids[at], label_of(int(at)))
            for value, at in zip(*near, strict=True)
        ]
        for near in zip(similarity.clip(-1, 1), places, strict=True)
    )
