"""The images of a data set whose features are nearest to those of new images.

Shapes: N rows of a part, Q new images, F features.
"""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
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
from sklearn.neighbors import NearestNeighbors
from sklearn.preprocessing import normalize

from vicreg_hf.data.columns.base import BadImage
from vicreg_hf.data.splits import ImageSplit, image_split
from vicreg_hf.features.encode import encode_with
from vicreg_hf.features.encoders import Encoder, open_encoder
from vicreg_hf.features.extract import read_record
from vicreg_hf.features.parts import PartError, PartFile, features_of, part_files, read_table
from vicreg_hf.runtime.checks import read_range
from vicreg_hf.runtime.console import warn
from vicreg_hf.settings.searching import RECORD, check_features, check_queries, check_search

ExactSearch = Callable[
    [NDArray[np.floating[Any]], int], tuple[NDArray[np.floating[Any]], NDArray[np.integer[Any]]]
]
"""What `exact_search` returns."""
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


class QueryError(ValueError):
    """New images that cannot be used."""

    def __init__(self, bad: Sequence[BadImage]) -> None:
        named = "; ".join(f"{one.path} cannot be used: {one.reason.rstrip('.')}" for one in bad)
        left = "it" if len(bad) == 1 else "them"
        super().__init__(f"query must be images, and {named}; leave {left} out.")
        self.reason = bad[0].reason
        """Why the first cannot."""


class SearchedPart:
    """The rows of a part, and the search in them, which is prepared when it is first needed."""

    def __init__(self, split: str, table: pa.Table) -> None:
        self.split, self.table = split, table

    @cached_property
    def _search(self) -> ExactSearch:
        return exact_search(features_of(self.table))

    def nearest(self, wanted: NDArray[np.floating[Any]], k: int) -> list[list[Neighbour]]:
        """At most k rows nearest to each of some features (Q, F), the nearest first."""
        if not len(self.table):  # all of its images were bad
            return [[] for _ in wanted]
        similarity, places = self._search(wanted, min(k, len(self.table)))
        return [
            [self._neighbour(float(value), int(place)) for value, place in zip(*near, strict=True)]
            for near in zip(similarity.clip(-1, 1), places, strict=True)
        ]

    @cached_property
    def _label(self) -> Any:
        """The type of the classes; None where there are none."""
        return datasets.Features.from_arrow_schema(self.table.schema).get("label")

    def _neighbour(self, similarity: float, place: int) -> Neighbour:
        (found,) = self.table.drop_columns("embedding").slice(place, 1).to_pylist()
        label = found.get("label")
        if label is not None:
            named = isinstance(self._label, datasets.ClassLabel)
            label = None if label < 0 else str(self._label.int2str(label) if named else label)
        return Neighbour(similarity, self.split, found["row"], found["image_id"], label)


class Parts:
    """The parts of files, each of which is read whenever it is the turn of it.

    Iterating raises a ValueError where a part is damaged.
    """

    def __init__(self, files: Sequence[PartFile]) -> None:
        self.files = files

    def __iter__(self) -> Iterator[SearchedPart]:
        for part in self.files:
            try:
                yield SearchedPart(part.split, read_table(part.file))
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
    """The record of the extraction."""
    encoder: Encoder
    """It is on the device that encodes."""
    files: list[PartFile]
    """The parts that are searched."""
    parts: Iterable[SearchedPart]
    """What these hold: `Parts`, of which one is in memory at a time, or a list."""

    @property
    def num_rows(self) -> int:
        """Images that are searched."""
        return sum(pq.read_metadata(part.file).num_rows for part in self.files)

    def queries(self, paths: Sequence[str]) -> ImageSplit:
        """New images as a split, which is read as that of the features was.

        Raises:
            ValueError: a file is not there.
        """
        check_queries(paths)
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
            QueryError: some are no images.
        """
        device = next(self.encoder.module.parameters()).device
        features: list[torch.Tensor] = []
        bad: list[BadImage] = []
        for start in range(0, len(queries), AT_ONCE):
            images = []
            for sample in queries.try_each(range(start, min(start + AT_ONCE, len(queries)))):
                if isinstance(sample, BadImage):
                    bad.append(sample)
                else:
                    images.append(self.encoder.prepare(sample.content))
            if bad:  # the others are still looked at, to name all that cannot be used
                continue
            with torch.autocast(device.type, torch.bfloat16, enabled=self.record["bf16"]):
                features.append(encode_with(self.encoder, torch.stack(images), device).cpu())
        if bad:
            raise QueryError(bad)
        return torch.cat(features).numpy()

    def find(self, paths: Sequence[str], k: int) -> list[Neighbours]:
        """The k images nearest to each of new ones; for errors see `queries` and `encode`."""
        found = self.nearest(self.encode(self.queries(paths)), k)
        return [Neighbours(path, near) for path, near in zip(paths, found, strict=True)]

    def nearest(self, wanted: NDArray[np.floating[Any]], k: int) -> list[list[Neighbour]]:
        """The k rows nearest to each of some features (Q, F), the nearest first."""
        found: list[list[Neighbour]] = [[] for _ in wanted]
        for part in self.parts:
            for kept, nearest in zip(found, part.nearest(wanted, k), strict=True):
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
    check_features(directory)
    record = read_record(directory / RECORD) or {}
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
    paths = list(map(str, queries))
    check_search(str(features), paths, k=k)
    return open_search(features, split=split, model=model).find(paths, k)


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


def exact_search(bank: NDArray[np.floating[Any]]) -> ExactSearch:
    """Prepare the search for rows of largest cosine similarity: by faiss where it is installed.

    Args:
        bank: (N, F).

    Returns:
        A function of features (Q, F) and k, at most N, that gives (Q, k) similarities, the largest
        first, and (Q, k) row numbers.
    """
    bank = bank.astype(np.float32, copy=False)
    if find_spec("faiss") is None:
        neighbours = NearestNeighbors(algorithm="brute", metric="cosine").fit(bank)

        def nearest(wanted: NDArray[Any], k: int) -> tuple[NDArray[Any], NDArray[Any]]:
            distances, rows = neighbours.kneighbors(wanted, k)
            return 1 - distances, rows

        return nearest
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it warns about its own bindings
        import faiss  # pyright: ignore[reportMissingImports]
    index: Any = faiss.IndexFlatIP(bank.shape[1])
    index.add(normalize(bank))
    return lambda wanted, k: index.search(normalize(wanted), k)
