"""The images of a split beside their features, and how a page holds pictures.

Shapes: n images, C channels, F features.
"""

from __future__ import annotations

import base64
import io
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from vicreg_hf.features.maps import picture_of

STYLES = Path(__file__).parent
"""The folder of the styles of reports, page.css and cases.css, which other pages use, too."""
THUMBNAIL = 96
"""Pixels of a thumbnail's longer side, at most."""
LOSSLESS_BYTES = 4096
"""Thumbnails that are larger as PNG are JPEG."""


@dataclass(frozen=True, eq=False)
class Gallery:
    """The images of a split, and their features."""

    features: Tensor
    """(n, F)."""
    labels: Tensor | None
    """(n,) integers from 0."""
    read: Callable[[Sequence[int]], list[Tensor]]
    """Gives images (C, H, W) uint8 of any sizes for their rows; only RGB of them is shown."""

    def label(self, row: int) -> int | None:
        return None if self.labels is None else int(self.labels[row])


def finite_rows(features: Tensor) -> NDArray[np.int64]:
    """The rows that hold neither NaN nor infinity."""
    return features.isfinite().all(1).nonzero().flatten().cpu().numpy()


def sample(rows: NDArray[np.int64], most: int, seed: int) -> NDArray[np.int64]:
    """At most so many of the rows, chosen at random, ascending."""
    if len(rows) <= most:
        return rows
    return np.sort(np.random.default_rng(seed).choice(rows, most, replace=False))


def take(features: Tensor, rows: NDArray[np.int64]) -> Tensor:
    """Some rows of features, as float32."""
    if len(rows) == len(features) and bool((np.diff(rows) == 1).all()):
        return features.float()
    return features[torch.from_numpy(rows).to(features.device)].float()


@dataclass(frozen=True)
class Inline:
    """A picture as the page holds it."""

    data: bytes
    """The content of a file, which tells nothing but pixels."""
    kind: str
    """png or jpeg."""
    width: int
    height: int

    @property
    def uri(self) -> str:
        return f"data:image/{self.kind};base64,{base64.b64encode(self.data).decode()}"


def thumbnail(image: Tensor, side: int = THUMBNAIL) -> Inline:
    """A small picture of an image (C, H, W) uint8 of any size, its longer side at most `side`."""
    picture = picture_of(image)
    picture.thumbnail((side, side), Image.Resampling.LANCZOS)
    inline = encoded(picture, "png", optimize=True)
    if len(inline.data) <= LOSSLESS_BYTES:
        return inline
    return encoded(picture, "jpeg", quality=85)


def encoded(picture: Image.Image, kind: str, **options: Any) -> Inline:
    buffer = io.BytesIO()
    picture.save(buffer, kind, **options)
    return Inline(buffer.getvalue(), kind, *picture.size)
