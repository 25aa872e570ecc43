"""Photographs that were decoded at a part of their size, of which crops are cut.

Shapes: C channels, H x W pixels of the whole image, upright; S side of a view.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

Reduction = Callable[[int, int], int]
"""By how much an image of H x W pixels may be reduced: 1, 2 or 4; 8 takes as long as 4."""

REDUCED_FROM = 4_000_000
"""Pixels from which images may be decoded at a part of their size; smaller ones gain little."""


def is_large(height: int, width: int) -> bool:
    """Whether an image has so many pixels that it may be reduced."""
    return height * width >= REDUCED_FROM


class Turn(NamedTuple):
    """How stored pixels become upright: rows and columns are mirrored, then change places."""

    rows: bool = False
    columns: bool = False
    transposed: bool = False

    def pixels(self, stored: NDArray[Any]) -> NDArray[Any]:
        """A view of pixels (C, H, W), upright; nothing is copied."""
        turned = stored[:, :: -1 if self.rows else 1, :: -1 if self.columns else 1]
        return turned.swapaxes(1, 2) if self.transposed else turned


@dataclass(frozen=True)
class ReducedImage:
    """An image with 1/scale of its rows and columns, as they are stored."""

    image: Image.Image
    scale: int
    stored: tuple[int, int]
    """Height and width of the whole image as it is stored."""
    turn: Turn

    @property
    def shape(self) -> tuple[int, int, int]:
        """(C, H, W) of the whole image, upright."""
        height, width = self.stored[::-1] if self.turn.transposed else self.stored
        return len(self.image.getbands()), height, width

    @property
    def nbytes(self) -> int:
        """Bytes of its pixels."""
        return 4 * self.image.width * self.image.height

    def resized(self, box: Sequence[int], side: int) -> Tensor:
        """A box (top, left, height, width) of the whole image as (C, S, S) uint8, bicubic."""
        top, left, height, width = box
        if self.turn.transposed:
            top, left, height, width = left, top, width, height
        top = self.stored[0] - top - height if self.turn.rows else top
        left = self.stored[1] - left - width if self.turn.columns else left
        edges = [edge / self.scale for edge in (left, top, left + width, top + height)]
        x, y = math.floor(edges[0]), math.floor(edges[1])
        # as in the whole image, what lies around a crop does not reach into it
        part = self.image.crop((x, y, math.ceil(edges[2]), math.ceil(edges[3])))
        within = (edges[0] - x, edges[1] - y, edges[2] - x, edges[3] - y)
        made = np.array(part.resize((side, side), Image.Resampling.BICUBIC, within))
        turned = self.turn.pixels(made.reshape(side, side, -1).transpose(2, 0, 1))
        return torch.from_numpy(np.ascontiguousarray(turned))
