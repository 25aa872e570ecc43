"""What a second branch sees when it is no image: text, sound, precomputed vectors.

A column turns the cells of a data set into what its branch's encoder takes, and an encoder into
features. Every draw is keyed by (seed, epoch, row), in the stream of the second view.

Shapes: B samples.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from numpy.typing import ArrayLike
from torch import Tensor


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
