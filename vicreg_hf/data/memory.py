"""Small images that stay in memory."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from vicreg_hf.data.bad_images import BadImages
from vicreg_hf.data.columns.base import BadImage
from vicreg_hf.data.splits import ImageSplit

SMALL_IMAGE = 64
"""Side in pixels up to which images are taken at their own size, with the `cifar` views."""
MEMORY_BUDGET = 4 * 2**30
"""Bytes of decoded pixels a process keeps in memory at most."""


def load_in_memory(
    split: ImageSplit,
    budget: int = MEMORY_BUDGET,
    bad: BadImages | None = None,
    *,
    rows: NDArray[np.int64] | None = None,
) -> Tensor | None:
    """Decode a whole split, or some rows; what cannot be used is replaced and added to `bad`.

    Returns:
        (N, C, H, W) uint8, or None where sizes differ or the pixels exceed the budget in bytes.
    """
    chosen = range(len(split)) if rows is None else rows.tolist()
    (first,), _ = split.read_or_replace(chosen[:1])
    if first.numel() * len(chosen) > budget:
        return None
    images = torch.empty((len(chosen), *first.shape), dtype=torch.uint8)
    unusable: list[BadImage] = []
    step = 256
    for start in range(0, len(chosen), step):
        decoded, replaced = split.read_or_replace(chosen[start : start + step])
        if any(image.shape != first.shape for image in decoded):
            return None
        torch.stack(decoded, out=images[start : start + step])
        unusable += replaced
    if bad is not None:
        bad.add(unusable)
    return images


def common_side(split: ImageSplit) -> int | None:
    """The side of the images if they look small, square and alike; else None."""
    images, _ = split.read_or_replace(range(min(8, len(split))))
    height, width = images[0].shape[-2:]
    alike = all(image.shape == images[0].shape for image in images)
    return height if alike and height == width <= SMALL_IMAGE else None
