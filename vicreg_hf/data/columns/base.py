"""The parts that all kinds of columns share, and the sample that cannot be used."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike
from torch import Tensor

SAMPLED = 64
"""Rows of a table from which something is learned about all of them."""


class ImageError(ValueError):
    """Bytes that are not an image, or not one that can be used."""


class BadImage(NamedTuple):
    """An image, or another sample, that cannot be used."""

    row: int | None
    """None in streams, whose samples have no numbers, but mostly paths."""
    path: str | None
    reason: str
    crc32: int | None = None
    """Checksum of a sample of a stream, by which it is found again."""

    @property
    def place(self) -> str:
        """The row and path as a sentence names them."""
        known = [] if self.row is None else [f"row {self.row}"]
        return " ".join(known + ([] if self.path is None else [self.path])) or "an image"


def sampled_rows(length: int) -> list[int]:
    """At most `SAMPLED` rows all over a table of some length."""
    return np.unique(np.linspace(0, length - 1, num=SAMPLED).astype(int)).tolist()


def path_of(cell: Any) -> str | None:
    """The path in a cell, or in the first of a pair of cells, if there is one."""
    cell = cell[0] if isinstance(cell, tuple) else cell
    path = cell.get("path") if isinstance(cell, dict) else cell
    return path if isinstance(path, str) else None


@dataclass(frozen=True)
class Column(ABC):
    """One column of a data set; loading workers get it pickled."""

    name: str

    def prepare(self, table: Any) -> Any:
        """A table of this column alone, its cells still encoded."""
        return table.select_columns([self.name])

    @abstractmethod
    def decode(self, cell: Any) -> Any:
        """The sample of a cell.

        Raises:
            ImageError: it cannot be used.
        """


class BatchColumn(Column):
    """A column whose samples the views of images do not suit: it makes batches itself."""

    @abstractmethod
    def batch(
        self, items: Sequence[Any], rows: ArrayLike, epoch: int, seed: int
    ) -> Tensor | Mapping[str, Tensor]:
        """One random view of each sample, for the encoder's forward.

        Args:
            items: B samples, as `decode` gives them.
            rows: (B,) row numbers, which key the draws together with epoch and seed.
        """
