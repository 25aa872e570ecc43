"""A column of images."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import datasets
import numpy as np
from torch import Tensor

from vicreg_hf.data.columns.image_files import ImageError, decode_image, image_of_array
from vicreg_hf.data.columns.reading import read_file


@dataclass(frozen=True)
class ImageColumn:
    """Cells of one column to uint8 images."""

    name: str
    feature: Any
    channels: int = 3

    def prepare(self, table: Any) -> Any:
        """A table of this column alone, its images still encoded."""
        table = table.select_columns([self.name])
        if isinstance(self.feature, datasets.Array3D):
            return table
        return table.cast_column(self.name, datasets.Image(decode=False))

    def encoded(self, cell: Any) -> bytes:
        """What identifies a cell: the image's file, or the array's bytes.

        Raises:
            ImageError: a file that cannot be read.
        """
        if cell is None:
            return b""
        if isinstance(self.feature, datasets.Array3D):
            return self._array(cell).tobytes()
        if cell["bytes"] is not None:
            return cell["bytes"]
        try:
            return read_file(cell["path"])
        except Exception as error:  # zips raise whatever their parsing meets
            raise ImageError(f"the file cannot be read: {error}") from error

    def decode(self, cell: Any) -> Tensor:
        """The image of a cell, (C, H, W) uint8.

        Raises:
            ImageError: it cannot be read or decoded.
        """
        if cell is not None and isinstance(self.feature, datasets.Array3D):
            return image_of_array(self._array(cell), self.channels)
        return decode_image(self.encoded(cell), self.channels)

    def _array(self, cell: Any) -> Any:
        try:
            return np.asarray(cell, dtype=self.feature.dtype)
        except (TypeError, ValueError) as error:
            raise ImageError(f"the array is not an image: {error}") from error
