"""Data sets that are read as they come, because they do not fit on the disk."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from itertools import islice
from typing import Any

import datasets
from datasets.distributed import split_dataset_by_node
from torch import Tensor

from vicreg_hf.data.columns.base import BadImage, path_of
from vicreg_hf.data.columns.image_files import ImageError, ValueRange
from vicreg_hf.data.columns.images import ImageColumn
from vicreg_hf.data.columns.spectrograms import SpectrogramColumn, SpectrogramSettings
from vicreg_hf.data.opening.slicing import Splits
from vicreg_hf.data.samples import Reductions, Sample
from vicreg_hf.data.splits import open_column
from vicreg_hf.runtime.checks import one_line

RANGED = 16
"""Images of a stream from which its range of values is taken."""
SHUFFLE_BUFFER = 1000
"""Images of a stream that wait, still encoded, to be drawn in random order."""
BUFFER_BYTES = 2**28
"""Bytes that these may take; of large images fewer wait."""


@dataclass
class ImageStream:
    """A split that is read as it comes; this process's share of it."""

    table: datasets.IterableDataset
    column: ImageColumn | SpectrogramColumn
    name: str
    num_images: int | None
    """Number of images of all processes together, where the data set says."""
    buffer_size: int = SHUFFLE_BUFFER

    def fingerprint(self) -> dict[str, Any]:
        """The length and a digest of the first images, which tell one data set from another."""
        digest = self.column.digest(row[self.column.name] for row in self.table.take(8))
        return {"images": self.num_images, "sha256": digest}

    def share(self, rank: int, world_size: int, *, seed: int) -> ImageStream:
        """The part that one of several processes reads: whole shards, or every n-th image."""
        table = self.table.shuffle(seed=seed, buffer_size=self.buffer_size)
        table = split_dataset_by_node(table, rank=rank, world_size=world_size)
        return replace(self, table=table)

    def read(
        self, epoch: int, reductions: Reductions | None = None
    ) -> Iterator[Sample[Tensor] | BadImage]:
        """One pass, each in another order; in a loading worker, that worker's part of it.

        Args:
            reductions: by how much an image may be reduced, by its CRC-32.

        Raises:
            ImageError: the data cannot be read on.
        """
        self.table.set_epoch(epoch)
        count = 0
        with _reading(self.name, lambda: f" after {count} images of a pass"):
            for row in self.table:
                yield self._decode(row[self.column.name], reductions)
                count += 1

    def first(self, count: int, reductions: Reductions | None = None) -> list[Tensor]:
        """The first usable images of the first pass, (C, H, W) uint8 each; reduced as in `read`."""
        samples = self.read(0, reductions)
        return list(islice((s.content for s in samples if isinstance(s, Sample)), count))

    def _decode(self, cell: Any, reductions: Reductions | None) -> Sample[Tensor] | BadImage:
        crc = 0
        try:
            crc = zlib.crc32(self.column.encoded(cell))
            reduction = () if reductions is None else (reductions(crc),)
            return Sample(crc, path_of(cell), self.column.decode(cell, *reduction))
        except ImageError as error:
            path = path_of(cell) or f"an image without a name, of CRC-32 {crc:08x}"
            return BadImage(None, path, str(error), crc)


@contextmanager
def _reading(name: str, place: Callable[[], str] = lambda: "") -> Iterator[None]:
    """Raise an ImageError of one sentence for whatever parsers and networks raise."""
    try:
        yield
    except Exception as error:
        raise ImageError(
            f"{name} cannot be read{place()}: {type(error).__name__}: {one_line(error)}"
        ) from error


def features_of(table: Any, place: str) -> datasets.Features:
    """The kinds of a table's columns; a stream that does not say them is begun to find out.

    Raises:
        ImageError: it cannot be read.
    """
    with _reading(place):
        return table.features or table._resolve_features().features or datasets.Features()


def image_stream(
    splits: Splits,
    name: str,
    *,
    dataset_name: str,
    image_column: str | None = None,
    channels: int = 3,
    value_range: ValueRange | None = None,
    sound: SpectrogramSettings | None = None,
) -> ImageStream:
    """Pick a split of what was opened with streaming=True, and its column of images.

    Args:
        value_range: as in `ImageColumn`; None takes that of the first images.

    Raises:
        ValueError: no such split, nothing in it, no such column; or it cannot be read.
    """
    if name not in splits:
        raise ValueError(f"split must be one of {', '.join(map(str, splits))}, got {name!r}.")
    table, place = splits[name], f"{dataset_name} ({name})"
    features = features_of(table, place)
    empty = ValueError(f"a split must have rows, got none in split {name!r} of {dataset_name}.")
    if not features:
        raise empty
    column = open_column(features, image_column, channels=channels, sound=sound)
    known = (table.info.splits or {}).get(name)
    table = column.prepare(table)
    with _reading(place):
        rows = iter(table.take(1 if value_range else RANGED))
        first = [row[column.name] for row in islice(rows, 1)]
        with suppress(Exception):  # which a pass says, with the number of images before it
            first += [row[column.name] for row in rows]
    if not first:
        raise empty
    if isinstance(column, ImageColumn):
        column = replace(column, value_range=value_range).with_range(first)
    sizes = [len(c["bytes"]) for c in first if isinstance(c, dict) and c.get("bytes")]
    fitting = int(BUFFER_BYTES * len(sizes) / max(1, sum(sizes))) if sizes else SHUFFLE_BUFFER
    num_images = getattr(known, "num_examples", None) or None
    return ImageStream(table, column, place, num_images, max(1, min(SHUFFLE_BUFFER, fitting)))
