"""Reading rows of a data set: the one place where cells are decoded, and bad ones dealt with.

Shapes: C channels, H x W pixels.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Generic, NamedTuple, TypeVar

import datasets

from vicreg_hf.data.columns.base import BadImage, path_of
from vicreg_hf.data.columns.image_files import ImageError
from vicreg_hf.runtime.randomness import Stream, words
from vicreg_hf.views.reduced import Reduction

MAX_REPLACEMENTS = 100
"""Samples tried in the place of one that cannot be used."""
CELLS_AT_ONCE = 8
"""Cells whose encoded bytes are in memory together."""

Reductions = Callable[[int], Reduction]
"""By how much the image of a key may be reduced."""

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

    def decode(self, cell: Any, reduction: Reduction | None = None) -> T:
        """The sample of a cell; an ImageError where it cannot be used."""
        return (
            self.column.decode(cell) if reduction is None else self.column.decode(cell, reduction)
        )

    def try_read(self, rows: Sequence[int]) -> list[Sample[T] | BadImage]:
        """Decode some rows; each gives a sample or the reason why there is none."""
        return list(self.try_each(rows))

    def try_each(
        self, rows: Sequence[int], reductions: Reductions | None = None
    ) -> Iterator[Sample[T] | BadImage]:
        """The same one after the other, so that no more than one need be in memory.

        Args:
            reductions: gives a row's reduction, as `decode` takes it.
        """
        for start in range(0, len(rows), CELLS_AT_ONCE):
            few = list(map(int, rows[start : start + CELLS_AT_ONCE]))
            for row, cell in zip(few, self.cells(few), strict=True):
                yield self._try_cell(row, cell, None if reductions is None else reductions(row))

    def _try_cell(self, row: int, cell: Any, reduction: Reduction | None) -> Sample[T] | BadImage:
        path = path_of(cell)
        try:
            return Sample(row, path, self.decode(cell, reduction))
        except ImageError as error:
            return BadImage(row, path, str(error))

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
        bad: list[BadImage] = []
        return list(self.each_or_replaced(rows, bad)), bad

    def each_or_replaced(
        self, rows: Sequence[int], bad: list[BadImage], reductions: Reductions | None = None
    ) -> Iterator[T]:
        """The same one after the other; those that could not be used are added to `bad`.

        Args:
            reductions: as in `try_each`; what replaces a row is reduced as that row.
        """
        for row, sample in zip(rows, self.try_each(rows, reductions), strict=True):
            attempt, first = 0, len(bad)
            while isinstance(sample, BadImage):
                bad.append(sample)
                if attempt == MAX_REPLACEMENTS:
                    raise ImageError(
                        f"{self.place(row)}: {bad[first].reason} Nor could "
                        f"{MAX_REPLACEMENTS} others be used in its place."
                    )
                drawn = words([row], 1, seed=0, epoch=attempt, stream=Stream.REPLACEMENT)
                other = int(drawn[0, 0]) % len(self)
                reduction = None if reductions is None else reductions(row)
                sample = self._try_cell(other, self.cells([other])[0], reduction)
                attempt += 1
            yield sample.content
