"""Reading samples, and others in the place of those that cannot be used."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol, TypeVar

from vicreg_hf.columns import BadImage, path_of
from vicreg_hf.images import ImageError
from vicreg_hf.randomness import Stream, words

MAX_REPLACEMENTS = 100
"""Samples tried in the place of one that cannot be used."""

T = TypeVar("T", covariant=True)


class Readable(Protocol[T]):
    """Encoded samples by row number."""

    def __len__(self) -> int: ...

    def place(self, row: int) -> str:
        """A row, as a sentence names it."""
        ...

    def cells(self, rows: Sequence[int]) -> list[Any]:
        """What the data set holds of some rows."""
        ...

    def decode(self, cell: Any) -> T:
        """The sample of a cell; an ImageError where it cannot be used."""
        ...


def read_or_replace(samples: Readable[T], rows: Sequence[int]) -> tuple[list[T], list[BadImage]]:
    """Decode some rows, and another sample in the place of one that cannot be used.

    Which one is a function of the row alone.

    Returns:
        One sample per row, and what could not be used.

    Raises:
        ImageError: nor could any of `MAX_REPLACEMENTS` others.
    """
    found: list[T] = []
    bad: list[BadImage] = []
    for row, cell in zip(rows, samples.cells(rows), strict=True):
        try:
            found.append(samples.decode(cell))
        except ImageError as error:
            bad.append(BadImage(int(row), _path(cell), str(error)))
            found.append(_replacement(samples, int(row), bad))
    return found, bad


def _replacement(samples: Readable[T], row: int, bad: list[BadImage]) -> T:
    first = bad[-1].reason
    for attempt in range(MAX_REPLACEMENTS):
        drawn = words([row], 1, seed=0, epoch=attempt, stream=Stream.REPLACEMENT)
        other = int(drawn[0, 0]) % len(samples)
        (cell,) = samples.cells([other])
        try:
            return samples.decode(cell)
        except ImageError as error:
            bad.append(BadImage(other, _path(cell), str(error)))
    raise ImageError(
        f"{samples.place(row)}: {first} Nor could {MAX_REPLACEMENTS} others be used in its place."
    )


def _path(cell: Any) -> str | None:
    """Of the file that a cell, or the first of a pair of them, is from."""
    return path_of(cell[0] if isinstance(cell, tuple) else cell)
