"""Columns of precomputed embeddings.

Shapes: B samples, E numbers each.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any

import datasets
import numpy as np
import torch
from numpy.typing import ArrayLike
from torch import Tensor

from vicreg_hf.data.columns.image_files import ImageError

MEASURED = 100
"""Rows whose vectors tell the width."""


@dataclass(frozen=True)
class VectorColumn:
    """Cells of one column, a list of floats each, to vectors of one width."""

    name: str
    width: int | None = None
    """E; None until it is measured."""

    @classmethod
    def find(cls, features: datasets.Features, name: str) -> VectorColumn:
        """The column of this name, which must hold lists of floats.

        Its width is known where the data set declares it; else see `measured`.

        Raises:
            ValueError: it does not.
        """
        if name not in features or not is_vector(features[name]):
            found = [other for other, feature in features.items() if is_vector(feature)]
            raise ValueError(
                f"prime_column must name a column of lists of floats, got {name!r}; columns of "
                f"vectors: {', '.join(found) or 'none'}; all: {', '.join(features)}."
            )
        length = getattr(features[name], "length", -1)
        return cls(name, length if length > 0 else None)

    def measured(self, table: Any) -> VectorColumn:
        """The same with its width known, which is the commonest of a table's first vectors.

        Raises:
            ValueError: none of the first `MEASURED` can be used, or most differ in width.
        """
        if self.width is not None:
            return self
        widths: Counter[int] = Counter()
        for row in table.select_columns([self.name]).take(MEASURED):
            with suppress(ImageError):
                widths[len(self.decode(row[self.name]))] += 1
        if widths:
            ((width, count),) = widths.most_common(1)
            if 2 * count < widths.total():
                raise ValueError(
                    f"prime_column must hold vectors of one width, got {min(widths)} to "
                    f"{max(widths)} numbers in the first {MEASURED} rows of {self.name!r}."
                )
            return replace(self, width=width)
        raise ValueError(
            f"prime_column must hold vectors, got none in the first {MEASURED} rows of "
            f"{self.name!r}; choose another, or filter the rows."
        )

    def prepare(self, table: Any) -> Any:
        """A table of this column alone."""
        return table.select_columns([self.name])

    def decode(self, cell: Any) -> Tensor:
        """The vector of a cell, (E,) float32.

        Raises:
            ImageError: no numbers, another width, or numbers that are not finite in float32.
        """
        try:
            with np.errstate(over="ignore"):
                vector = np.array(cell, dtype=np.float32)
        except (TypeError, ValueError, OverflowError) as error:
            raise ImageError(f"the vector is not a list of numbers: {error}") from error
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
        """The vectors as they are, (B, E) float32: of an embedding there is no second view."""
        return torch.stack(list(items))


def is_vector(feature: Any) -> bool:
    """Whether a feature holds lists of floats."""
    if not isinstance(feature, (datasets.List, datasets.LargeList)):
        return False
    inner = feature.feature
    return isinstance(inner, datasets.Value) and inner.dtype in ("float16", "float32", "float64")
