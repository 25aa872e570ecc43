"""A column of images."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import datasets
import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from vicreg_hf.data.columns.image_files import ImageError, decode_image, image_of_array
from vicreg_hf.data.columns.reading import FileColumn


@dataclass(frozen=True)
class ImageColumn(FileColumn):
    """A column of image files, or of arrays (`datasets.Array3D`)."""

    feature: Any
    channels: int = 3

    def prepare(self, table: Any) -> Any:
        table = super().prepare(table)
        if isinstance(self.feature, datasets.Array3D):
            return table
        return table.cast_column(self.name, datasets.Image(decode=False))

    def encoded(self, cell: Any) -> bytes:
        """The bytes of the image's file or array; errors as in `FileColumn.encoded`."""
        if cell is not None and isinstance(self.feature, datasets.Array3D):
            return self._array(cell).tobytes()
        return super().encoded(cell)

    def decode(self, cell: Any) -> Tensor:
        """The image of a cell, (C, H, W) uint8; errors as in `Column.decode`."""
        if cell is not None and isinstance(self.feature, datasets.Array3D):
            return image_of_array(self._array(cell), self.channels)
        return decode_image(self.encoded(cell), self.channels)

    def _array(self, cell: Any) -> NDArray[Any]:
        try:
            return np.asarray(cell, dtype=self.feature.dtype)
        except (TypeError, ValueError) as error:
            raise ImageError(f"the array is not an image: {error}") from error
