"""Columns of precomputed embeddings.

Shapes: B samples, E numbers each.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike
from torch import Tensor

from vicreg_hf.data.columns.base import BatchColumn
from vicreg_hf.data.columns.image_files import ImageError

MEASURED = 100
"""Rows from which the width of the vectors is taken where the data set does not declare it."""


@dataclass(frozen=True)
class VectorColumn(BatchColumn):
    """A column of lists of floats."""

    width: int | None = None
    """E; None takes any."""

    @classmethod
    def measure(cls, table: Any, name: str) -> VectorColumn:
        """The column with its width as declared, or else as most of a table's first vectors have.

        Raises:
            ValueError: none of the first `MEASURED` can be used, or most differ in width.
        """
        declared = getattr(table.features[name], "length", -1)
        if declared > 0:
            return cls(name, declared)
        widths: Counter[int] = Counter()
        for row in table.select_columns([name]).take(MEASURED):
            with suppress(ImageError):
                widths[len(cls(name).decode(row[name]))] += 1
        if not widths:
            raise ValueError(
                f"prime_column must hold vectors, got none in the first {MEASURED} rows of "
                f"{name!r}; choose another, or filter the rows."
            )
        ((width, count),) = widths.most_common(1)
        if 2 * count < widths.total():
            raise ValueError(
                f"prime_column must hold vectors of one width, got {min(widths)} to {max(widths)} "
                f"numbers in the first {MEASURED} rows of {name!r}; choose another."
            )
        return cls(name, width)

    def decode(self, cell: Any) -> Tensor:
        """The vector of a cell, (E,) float32 and finite; errors as in `Column.decode`."""
        with np.errstate(over="ignore"):
            vector = np.array(cell, dtype=np.float32)
        if vector.ndim != 1 or len(vector) == 0 or len(vector) != (self.width or len(vector)):
            wanted = "E" if self.width is None else self.width
            raise ImageError(f"a vector must be of shape ({wanted},), got {vector.shape}.")
        if not np.isfinite(vector).all():
            raise ImageError("the vector must be finite, and is not.")
        return torch.from_numpy(vector)

    def batch(
        self,
        items: Sequence[Tensor],
        rows: ArrayLike,  # noqa: ARG002
        epoch: int,  # noqa: ARG002
        seed: int,  # noqa: ARG002
    ) -> Tensor:
        """The vectors as they are, (B, E) float32: an embedding has no second view."""
        return torch.stack(list(items))
