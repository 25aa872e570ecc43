"""A column of images."""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any

import datasets
import numpy as np
from numpy.typing import NDArray
from torch import from_numpy

from vicreg_hf.data.columns.base import ImageError
from vicreg_hf.data.columns.image_files import (
    ValueRange,
    array_pixels,
    decode_image,
    decode_reduced,
    has_eight_bits,
    read_pixels,
    to_uint8,
)
from vicreg_hf.data.columns.reading import FileColumn
from vicreg_hf.runtime.console import warn
from vicreg_hf.views.reduced import Reduction

COMPARED = 4096
"""Values of an image that are looked at for what is usual."""
FEW = 16
"""A range is too wide if 99 % of the values lie within this part of it."""


@dataclass(frozen=True)
class ImageColumn(FileColumn):
    """A column of image files, or of arrays (`datasets.Array3D` or `Array2D`)."""

    feature: Any
    channels: int = 3
    value_range: ValueRange | None = None
    """The values that become the levels 0 and 255, where images have more than 8 bits."""

    def prepare(self, table: Any) -> Any:
        table = super().prepare(table)
        if not isinstance(self.feature, datasets.Image):  # to cast large types would copy them
            return table
        return table.cast_column(self.name, datasets.Image(decode=False))

    def encoded(self, cell: Any) -> bytes:
        """The bytes of the image's file or array; errors as in `FileColumn.encoded`."""
        if cell is not None and self._of_arrays:
            return self._array(cell).tobytes()
        return super().encoded(cell)

    def decode(self, cell: Any, reduction: Reduction | None = None) -> Any:
        """The image of a cell, (C, H, W) uint8; errors as in `Column.decode`.

        Args:
            reduction: by how much a JPEG may be reduced, which then comes as a `ReducedImage`.
        """
        if cell is not None and self._of_arrays:
            pixels = array_pixels(self._array(cell), self.channels)
            return from_numpy(np.ascontiguousarray(to_uint8(pixels, self.value_range)))
        data = self.encoded(cell)
        if reduction is not None:
            reduced = decode_reduced(data, self.channels, reduction)
            if reduced is not None:
                return reduced
        return decode_image(data, self.channels, self.value_range)

    def with_range(self, cells: Iterable[Any]) -> ImageColumn:
        """The column with one range of values for all its images, if any have more than 8 bits.

        It is the range that is given, or else from the least to the largest finite value in a
        sample of the cells.
        """
        if self.value_range is not None:
            return self
        low, high, shallow, some = np.inf, -np.inf, 0, [np.empty(0)]
        for cell in cells:
            with suppress(ImageError):  # which its reader says
                values = self._values(cell)
                shallow += values is None
                if values is not None and len(finite := values[np.isfinite(values)]):
                    low, high = min(low, float(finite.min())), max(high, float(finite.max()))
                    some.append(finite[:: len(finite) // COMPARED + 1])
        if low > high:
            return self
        usual = np.percentile(np.concatenate(some), [0.5, 99.5])
        if 0 < usual[1] - usual[0] < (high - low) / FEW:
            warn(
                f"99 % of the values lie from {usual[0]:g} to {usual[1]:g}, which are few of the "
                f"levels between {low:g} and {high:g}; --value_range {usual[0]:g},{usual[1]:g} "
                "gives them all levels."
            )
        if shallow:
            warn(
                f"{shallow} of {shallow + len(some) - 1} images looked at have 8 bits and stay as "
                "they are, and the values of the others are scaled; give all images one depth if "
                "they show the same."
            )
        above = max(low + 1, float(np.nextafter(low, np.inf)))  # for huge values 1 is nothing
        return replace(self, value_range=(low, high if low < high else above))

    def _values(self, cell: Any) -> NDArray[Any] | None:
        """The values of an image as they are stored; None if they are levels of 8 bits."""
        if cell is not None and self._of_arrays:
            values = array_pixels(self._array(cell), self.channels)
        elif has_eight_bits(data := self.encoded(cell)):
            return None
        else:
            values = read_pixels(data, self.channels)
        return None if values.dtype == np.uint8 else values

    @property
    def _of_arrays(self) -> bool:
        return isinstance(self.feature, (datasets.Array3D, datasets.Array2D))

    def _array(self, cell: Any) -> NDArray[Any]:
        try:
            return np.asarray(cell, dtype=self.feature.dtype)
        except (TypeError, ValueError) as error:
            raise ImageError(f"the array is not an image: {error}") from error
