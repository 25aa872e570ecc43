"""Images, or sounds, and what belongs to each in another column of the same data set.

Shapes: N samples, C channels, H x W pixels.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, Protocol

import datasets
from numpy.typing import NDArray
from torch import Tensor

from vicreg_hf.branches import Inputs
from vicreg_hf.columns import BadImage
from vicreg_hf.images import ImageError
from vicreg_hf.modalities import Column
from vicreg_hf.modalities.sound import sound_file
from vicreg_hf.modalities.text import TextColumn
from vicreg_hf.replacement import read_or_replace
from vicreg_hf.sources import ImageSplit

Pair = tuple[Tensor, Any]
"""A (C, H, W) uint8 image, and the decoded cell that belongs to it."""


class PairedInput(Protocol):
    """How what belongs to an image becomes what the second branch takes."""

    def batch(self, items: Sequence[Any], rows: NDArray[Any], epoch: int) -> Inputs:
        """In a loading worker, of B decoded cells."""
        ...

    def finish(self, batch: Inputs, rows: NDArray[Any], epoch: int) -> Inputs:
        """On the device."""
        ...


@dataclass
class PairedSplit:
    """One split, of which two columns are read row by row."""

    images: ImageSplit
    table: datasets.Dataset
    """The other column alone, with as many rows."""
    column: Column

    def __len__(self) -> int:
        return len(self.images)

    @property
    def name(self) -> str:
        return self.images.name

    def fingerprint(self) -> dict[str, Any]:
        """That of the images, and a digest of what belongs to the same ones."""
        digest = hashlib.sha256()
        for cell in self.table[self.images.sampled_rows()][self.column.name]:
            with suppress(ImageError):  # it cannot be used
                digest.update(_content(cell))
                if isinstance(self.column, TextColumn):  # and what its words have become
                    digest.update(repr(self.column.tokens(self.column.decode(cell))).encode())
        return self.images.fingerprint() | {"prime_sha256": digest.hexdigest()}

    def place(self, row: int) -> str:
        """A row, as a sentence names it."""
        columns = f"{self.images.column.name} and {self.column.name}"
        return f"row {row} of {self.name}, columns {columns}"

    def cells(self, rows: Sequence[int]) -> list[tuple[Any, Any]]:
        """What both columns hold of some rows."""
        others = self.table[list(rows)][self.column.name]
        return list(zip(self.images.cells(rows), others, strict=True))

    def decode(self, cell: tuple[Any, Any]) -> Pair:
        """Both halves of a sample; an ImageError where either cannot be used."""
        return self.images.decode(cell[0]), self.column.decode(cell[1])

    def read_or_replace(self, rows: Sequence[int]) -> tuple[list[Pair], list[BadImage]]:
        """Decode some rows, and another pair in the place of one of which a half is unusable.

        Errors as of `ImageSplit.read_or_replace`.
        """
        return read_or_replace(self, rows)


def _content(cell: Any) -> bytes:
    """What tells a cell from others, wherever its file lies."""
    if isinstance(cell, dict) and "path" in cell:
        return sound_file(cell)
    return repr(cell).encode()
