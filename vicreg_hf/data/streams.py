"""Data sets that are read as they come, because they do not fit on the disk."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from typing import Any

import datasets
from datasets.distributed import split_dataset_by_node

from vicreg_hf.data.columns.image_files import ImageError
from vicreg_hf.data.columns.images import ImageColumn
from vicreg_hf.data.columns.spectrograms import SpectrogramColumn, SpectrogramSettings
from vicreg_hf.data.opening.slicing import Splits
from vicreg_hf.data.splits import open_column
from vicreg_hf.runtime.checks import one_line

SHUFFLE_BUFFER = 1000
"""Images of a stream that wait, encoded, to be drawn in random order."""


@dataclass
class ImageStream:
    """A split that is read as it comes; this process's share of it."""

    table: datasets.IterableDataset
    column: ImageColumn | SpectrogramColumn
    name: str
    num_images: int | None
    """Of all processes together, where the data set says."""

    def fingerprint(self) -> dict[str, Any]:
        """What tells one data set from another: its length, and a digest of its first images."""
        digest = hashlib.sha256()
        for row in self.table.take(8):
            with suppress(ImageError):
                digest.update(self.column.encoded(row[self.column.name]))
        return {"images": self.num_images, "sha256": digest.hexdigest()}

    def share(self, rank: int, world_size: int, *, seed: int) -> ImageStream:
        """What one of several processes reads: shards of its own, or else every so many images."""
        table = self.table.shuffle(seed=seed, buffer_size=SHUFFLE_BUFFER)
        table = split_dataset_by_node(table, rank=rank, world_size=world_size)
        return replace(self, table=table)

    def cells(self, epoch: int) -> Iterator[Any]:
        """One pass, in an order of its own; in a loading worker, that worker's part of it.

        Raises:
            ImageError: the data cannot be read on.
        """
        self.table.set_epoch(epoch)
        count = 0
        with _reading(self.name, lambda: f" after {count} images of a pass"):
            for row in self.table:
                yield row[self.column.name]
                count += 1


@contextmanager
def _reading(name: str, place: Callable[[], str] = lambda: "") -> Iterator[None]:
    """One sentence for what parsers and networks raise."""
    try:
        yield
    except Exception as error:
        told = one_line(error)
        raise ImageError(
            f"{name} cannot be read{place()}: {type(error).__name__}: {told}"
        ) from error


def image_stream(
    splits: Splits,
    name: str,
    *,
    dataset_name: str,
    image_column: str | None = None,
    channels: int = 3,
    sound: SpectrogramSettings | None = None,
) -> ImageStream:
    """Pick a split of what was opened with streaming=True, and its column of images.

    Raises:
        ValueError: no such split, nothing in it, no such column; or it cannot be read.
    """
    if name not in splits:
        raise ValueError(f"split must be one of {', '.join(map(str, splits))}, got {name!r}.")
    table = splits[name]
    with _reading(f"{dataset_name} ({name})"):
        features = table.features or table._resolve_features().features
    if not features:
        raise ValueError(f"a split must have rows, got none in split {name!r} of {dataset_name}.")
    column = open_column(features, image_column, channels=channels, sound=sound)
    known = (table.info.splits or {}).get(name)
    count = known.num_examples if known is not None else None
    table = column.prepare(table)
    with _reading(f"{dataset_name} ({name})"):
        first = next(iter(table.take(1)), None)
    if first is None:
        raise ValueError(f"a split must have rows, got none in split {name!r} of {dataset_name}.")
    return ImageStream(table, column, f"{dataset_name} ({name})", count or None)
