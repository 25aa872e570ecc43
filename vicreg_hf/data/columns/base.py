"""What every kind of column offers, and the image that cannot be used."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, Protocol

from numpy.typing import ArrayLike
from torch import Tensor


class BadImage(NamedTuple):
    """An image that cannot be used."""

    row: int | None
    """None in streams, whose images have no numbers, but mostly paths."""
    path: str | None
    reason: str
    crc32: int | None = None
    """Of an image of a stream, among which several may have one path."""

    @property
    def identity(self) -> tuple[int | None, str | None, int | None]:
        """What tells it from others."""
        return self.row, self.path, self.crc32

    @property
    def place(self) -> str:
        """Where it is."""
        known = [] if self.row is None else [f"row {self.row}"]
        return " ".join(known + ([] if self.path is None else [self.path])) or "an image"


def path_of(cell: Any) -> str | None:
    """Where an image came from, if its cell says."""
    path = cell.get("path") if isinstance(cell, dict) else None
    return path if isinstance(path, str) else None


class Column(Protocol):
    """Cells of one column to samples; to be pickled, for loading workers use it."""

    @property
    def name(self) -> str:
        """Of the column."""
        ...

    def prepare(self, table: Any) -> Any:
        """A table of this column alone, its cells still encoded."""
        ...

    def decode(self, cell: Any) -> Any:
        """The sample of a cell, in a loading worker.

        Raises:
            ImageError: it cannot be used.
        """
        ...


class BatchColumn(Column, Protocol):
    """A column that also makes its own views, where those of images do not suit it."""

    def batch(
        self, items: Sequence[Any], rows: ArrayLike, epoch: int, seed: int
    ) -> Tensor | Mapping[str, Tensor]:
        """One keyed view of each sample.

        Args:
            items: B samples, as `decode` gives them.
            rows: (B,) their rows, by which the draws are keyed.

        Returns:
            What the encoder's forward takes; B is first in every tensor's shape.
        """
        ...
