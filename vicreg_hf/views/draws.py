"""From a view's uniform numbers to its crop and its transforms."""

from __future__ import annotations

from itertools import permutations
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from vicreg_hf.views.presets import ViewRecipe

CROP_ATTEMPTS = 10  # torchvision's RandomResizedCrop gives up after as many
ORDERS = np.array(list(permutations(range(4))))


TRANSFORMS = np.dtype(
    [
        ("flip", np.bool_),
        ("jitter", np.bool_),
        ("order", np.int64, 4),  # of brightness 0, contrast 1, saturation 2 and hue 3
        ("factors", np.float32, 4),  # of brightness, contrast and saturation, and the hue's shift
        ("grayscale", np.bool_),
        ("blur", np.bool_),
        ("sigma", np.float32),  # in pixels
        ("solarize", np.bool_),
    ]
)
"""The operations on a view after the crop, and their strengths."""

# Columns of a view's row of uniforms. They are fixed, so that a recipe can change one probability
# and nothing else of its views.
_AREA = slice(0, CROP_ATTEMPTS)
_RATIO = slice(CROP_ATTEMPTS, 2 * CROP_ATTEMPTS)
_TOP, _LEFT, _FLIP, _JITTER, _ORDER = range(2 * CROP_ATTEMPTS, 2 * CROP_ATTEMPTS + 5)
_FACTORS = slice(_ORDER + 1, _ORDER + 5)
_GRAY, _BLUR, _SIGMA, _SOLARIZE = range(_ORDER + 5, _ORDER + 9)
NUM_UNIFORMS = _SOLARIZE + 1


def _between(u: NDArray[np.float32], low: float, high: float) -> NDArray[np.float32]:
    return (low + u * (high - low)).astype(np.float32)


def draw_crops(
    u: NDArray[np.float32], heights: ArrayLike, widths: ArrayLike, recipe: ViewRecipe
) -> NDArray[np.int64]:
    """Boxes of random resized crops, distributed as torchvision's.

    Args:
        u: (B, K) uniforms.
        heights: scalar or (B,), in pixels; likewise widths.

    Returns:
        (B, 4): top, left, height, width.
    """
    size = np.broadcast_to(np.stack([np.asarray(heights), np.asarray(widths)], -1), (len(u), 2))
    height, width = size[:, :1].astype(np.float64), size[:, 1:].astype(np.float64)
    area = height * width * _between(u[:, _AREA], *recipe.scale)
    low, high = np.log(recipe.ratio[0]), np.log(recipe.ratio[1])
    ratio = np.exp(_between(u[:, _RATIO], low, high))
    w, h = np.rint(np.sqrt(area * ratio)), np.rint(np.sqrt(area / ratio))
    fits = (w > 0) & (w <= width) & (h > 0) & (h <= height)
    first = np.argmax(fits, axis=1)[:, None]
    w, h = np.take_along_axis(w, first, 1), np.take_along_axis(h, first, 1)
    top, left = u[:, [_TOP]] * (height - h + 1), u[:, [_LEFT]] * (width - w + 1)
    # No attempt fits: the largest central crop within the ratio, as torchvision does.
    low_ratio, high_ratio = recipe.ratio
    central_w = np.where(width / height > high_ratio, np.rint(height * high_ratio), width)
    central_h = np.where(width / height < low_ratio, np.rint(width / low_ratio), height)
    central = [(height - central_h) // 2, (width - central_w) // 2, central_h, central_w]
    boxes = np.concatenate([top, left, h, w], 1)
    boxes = np.where(fits.any(1, keepdims=True), boxes, np.concatenate(central, 1))
    return np.maximum(boxes.astype(np.int64), [0, 0, 1, 1])


def draw_transforms(u: NDArray[np.float32], recipe: ViewRecipe) -> NDArray[Any]:
    """The operations on B views after the crop, from (B, K) uniforms.

    Returns:
        (B,) of `TRANSFORMS`.
    """
    drawn = np.empty(len(u), TRANSFORMS)
    for name, column in (
        ("flip", _FLIP), ("jitter", _JITTER), ("grayscale", _GRAY), ("blur", _BLUR),
        ("solarize", _SOLARIZE),
    ):  # fmt: skip
        drawn[name] = u[:, column] < getattr(recipe, name)
    drawn["order"] = ORDERS[(u[:, _ORDER] * len(ORDERS)).astype(np.int64)]
    strengths = (recipe.brightness, recipe.contrast, recipe.saturation)
    ranges = [(max(0.0, 1 - s), 1 + s) for s in strengths] + [(-recipe.hue, recipe.hue)]
    for number, (low, high) in enumerate(ranges):
        drawn["factors"][:, number] = _between(u[:, _FACTORS][:, number], low, high)
    drawn["sigma"] = _between(u[:, _SIGMA], *recipe.blur_sigma)
    return drawn
