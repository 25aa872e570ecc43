"""Reading rows of a data set: the one place where cells are decoded, and bad ones dealt with.

Shapes: C channels, H x W pixels.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Generic, NamedTuple, TypeVar

import datasets

from vicreg_hf.data.columns.base import BadImage, path_of
from vicreg_hf.data.columns.image_files import ImageError
from vicreg_hf.runtime.randomness import Stream, words

MAX_REPLACEMENTS = 100
"""Samples tried in the place of one that cannot be used."""

T = TypeVar("T")


class Sample(NamedTuple, Generic[T]):
    """A decoded cell."""

    key: int
    """Row number, or, in a stream, the file's CRC-32: random draws are keyed by it."""
    path: str | None
    content: T
    """A (C, H, W) uint8 image, in splits of images."""


@dataclass
class Samples(Generic[T]):
    """Rows that can be read. One that cannot be used is left out, refused or replaced."""

    table: datasets.Dataset
    """The column alone, its cells still encoded."""
    column: Any
    name: str

    def __len__(self) -> int:
        return len(self.table)

    def place(self, row: int) -> str:
        """A row as a sentence names it."""
        return f"row {row} of {self.name}, column {self.column.name}"

    def cells(self, rows: Sequence[int]) -> list[Any]:
        """The encoded cells of some rows."""
        return self.table[list(rows)][self.column.name]

    def decode(self, cell: Any) -> T:
        """The sample of a cell; an ImageError where it cannot be used."""
        return self.column.decode(cell)

    def try_read(self, rows: Sequence[int]) -> list[Sample[T] | BadImage]:
        """Decode some rows; each gives a sample or the reason why there is none."""
        found: list[Sample[T] | BadImage] = []
        for row, cell in zip(map(int, rows), self.cells(rows), strict=True):
            path = path_of(cell)
            try:
                found.append(Sample(row, path, self.decode(cell)))
            except ImageError as error:
                found.append(BadImage(row, path, str(error)))
        return found

    def read(self, rows: Sequence[int]) -> list[T]:
        """Decode some rows, all of which must be usable.

        Raises:
            ImageError: one is not; it is named.
        """
        found = []
        for row, sample in zip(rows, self.try_read(rows), strict=True):
            if isinstance(sample, BadImage):
                raise ImageError(f"{self.place(row)}: {sample.reason}")
            found.append(sample.content)
        return found

    def read_or_replace(self, rows: Sequence[int]) -> tuple[list[T], list[BadImage]]:
        """Decode some rows, and another in the place of one that cannot be used.

        Which one is a function of the row alone.

        Returns:
            One sample per row, and those that could not be used.

        Raises:
            ImageError: nor could any of `MAX_REPLACEMENTS` others.
        """
        found: list[T] = []
        bad: list[BadImage] = []
        for row, sample in zip(rows, self.try_read(rows), strict=True):
            attempt = 0
            while isinstance(sample, BadImage):
                bad.append(sample)
                if attempt == MAX_REPLACEMENTS:
                    raise ImageError(
                        f"{self.place(row)}: {bad[-attempt - 1].reason} Nor could "
                        f"{MAX_REPLACEMENTS} others be used in its place."
                    )
                drawn = words([row], 1, seed=0, epoch=attempt, stream=Stream.REPLACEMENT)
                (sample,) = self.try_read([int(drawn[0, 0]) % len(self)])
                attempt += 1
            found.append(sample.content)
        return found, bad
