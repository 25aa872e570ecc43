"""Images, or sounds, and what belongs to each in another column of the same data set.

Shapes: B samples per process, C channels, H x W pixels.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any, NamedTuple

import datasets
from numpy.typing import NDArray
from torch import Tensor

from vicreg_hf.data.columns.base import Column
from vicreg_hf.data.columns.image_files import ImageError
from vicreg_hf.data.columns.reading import FileColumn
from vicreg_hf.data.columns.texts import TextColumn
from vicreg_hf.data.samples import Samples
from vicreg_hf.data.splits import ImageSplit
from vicreg_hf.views.reduced import Reduction

Pair = tuple[Tensor, Any]
"""A (C, H, W) uint8 image, and the decoded cell that belongs to it."""


class PairedSplit(Samples[Pair]):
    """One split of which two columns are read row by row; a bad half makes the pair bad.

    Args:
        table: the other column alone, with as many rows.
        column: the other column.
    """

    def __init__(self, images: ImageSplit, table: datasets.Dataset, column: Column) -> None:
        super().__init__(table, column, images.name)
        self.images = images
        self.others: Samples[Any] = Samples(table, column, images.name)

    def fingerprint(self) -> dict[str, Any]:
        """The fingerprint of the images, and a digest of what belongs to the same ones."""
        digest, column = hashlib.sha256(), self.column
        for cell in self.others.cells(self.images.sampled_rows()):
            with suppress(ImageError):  # it cannot be used
                if isinstance(column, FileColumn) and isinstance(cell, dict):
                    digest.update(column.encoded(cell))
                else:
                    digest.update(repr(cell).encode())
                if isinstance(column, TextColumn):  # a digest of the tokens, too
                    digest.update(repr(column.tokens(column.decode(cell))).encode())
        return self.images.fingerprint() | {"prime_sha256": digest.hexdigest()}

    def place(self, row: int) -> str:
        columns = f"{self.images.column.name} and {self.column.name}"
        return f"row {row} of {self.name}, columns {columns}"

    def cells(self, rows: Sequence[int]) -> list[tuple[Any, Any]]:
        return list(zip(self.images.cells(rows), self.others.cells(rows), strict=True))

    def decode(self, cell: tuple[Any, Any], reduction: Reduction | None = None) -> Pair:
        return self.images.decode(cell[0], reduction), self.column.decode(cell[1])


class SecondInput(NamedTuple):
    """How what belongs to images becomes what the second branch takes."""

    collate: Callable[[Sequence[Any], NDArray[Any], int], Any]
    """Makes a batch of B decoded cells, their rows and the epoch, in a loading worker."""
    augment: Callable[[Any, NDArray[Any], int], tuple[Tensor]] | None = None
    """Makes the only view of such a batch, its rows and the epoch, on the device. Where there is
    one, batches are crops of images, which can be made in parts."""
