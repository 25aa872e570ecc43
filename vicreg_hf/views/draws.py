"""What is drawn for one view: keyed numbers to crops and colour parameters."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from itertools import permutations

import numpy as np
from numpy.typing import ArrayLike, NDArray

from vicreg_hf.views.presets import ViewRecipe

CROP_ATTEMPTS = 10  # torchvision's RandomResizedCrop gives up after as many
ORDERS = np.array(list(permutations(range(4))))


@dataclass(frozen=True)
class ColourParameters:
    """What happens to each of B views after the crop; all fields are arrays over B."""

    flip: NDArray[np.bool_]
    jitter: NDArray[np.bool_]
    order: NDArray[np.int64]
    """(B, 4): the order of brightness 0, contrast 1, saturation 2, hue 3."""
    factors: NDArray[np.float32]
    """(B, 4): brightness, contrast and saturation factors, hue shift."""
    grayscale: NDArray[np.bool_]
    blur: NDArray[np.bool_]
    sigma: NDArray[np.float32]
    solarize: NDArray[np.bool_]

    def rows(self, part: slice) -> ColourParameters:
        """Of some of the views."""
        return ColourParameters(**{f.name: getattr(self, f.name)[part] for f in fields(self)})


def joined(parts: Sequence[ColourParameters]) -> ColourParameters:
    """Of some views and then of others."""
    names = [f.name for f in fields(ColourParameters)]
    return ColourParameters(
        **{name: np.concatenate([getattr(p, name) for p in parts]) for name in names}
    )


# Columns of a view's row of uniforms. They are fixed, so that a recipe can change one probability
# without changing anything else that is drawn.
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


def draw_colour(u: NDArray[np.float32], recipe: ViewRecipe) -> ColourParameters:
    """Everything about B views but their crops, from (B, K) uniforms."""
    strengths = (recipe.brightness, recipe.contrast, recipe.saturation)
    lows = [max(0.0, 1 - s) for s in strengths] + [-recipe.hue]
    highs = [1 + s for s in strengths] + [recipe.hue]
    factors = np.stack(
        [_between(u[:, _FACTORS][:, k], lows[k], highs[k]) for k in range(4)], axis=1
    )
    return ColourParameters(
        flip=u[:, _FLIP] < recipe.flip,
        jitter=u[:, _JITTER] < recipe.jitter,
        order=ORDERS[(u[:, _ORDER] * len(ORDERS)).astype(np.int64)],
        factors=factors,
        grayscale=u[:, _GRAY] < recipe.grayscale,
        blur=u[:, _BLUR] < recipe.blur,
        sigma=_between(u[:, _SIGMA], *recipe.blur_sigma),
        solarize=u[:, _SOLARIZE] < recipe.solarize,
    )
