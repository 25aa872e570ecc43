"""Two random views of every image, drawn from keyed random numbers and computed in batches.

A view is made in two halves that may run in different places: `TwoViews.crop` (the random resized
crop) and `TwoViews.colour` (flip, colour jitter, grayscale, blur, solarise, normalisation).
Calling the object does both. Between operations pixels are whole grey levels from 0 to 255, as they
are in PIL, which the authors use.

Shapes: B images, C = 3 channels, H x W source pixels, S side of a view, K uniforms per view.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import permutations

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from torch import Tensor
from torchvision.transforms.v2 import functional as tv

from vicreg_hf.pixels import (
    adjust_brightness,
    adjust_contrast,
    adjust_hue,
    adjust_saturation,
    gaussian_blur,
    grayscale,
    resized_crop,
    solarize,
)
from vicreg_hf.randomness import Stream, uniforms

CROP_ATTEMPTS = 10  # torchvision's RandomResizedCrop gives up after as many
ORDERS = np.array(list(permutations(range(4))))
JITTER = (adjust_brightness, adjust_contrast, adjust_saturation, adjust_hue)


@dataclass(frozen=True)
class ViewRecipe:
    """The distribution of one view; probabilities lie in [0, 1]."""

    scale: tuple[float, float] = (0.08, 1.0)
    """Area of the crop as a fraction of the image's."""
    ratio: tuple[float, float] = (3 / 4, 4 / 3)
    """Width over height of the crop."""
    flip: float = 0.5
    """Probability of mirroring left to right."""
    jitter: float = 0.8
    """Probability of the colour jitter as a whole."""
    brightness: float = 0.4
    """Factor drawn from [1 - brightness, 1 + brightness]; likewise the next two."""
    contrast: float = 0.4
    saturation: float = 0.2
    hue: float = 0.1
    """Shift drawn from [-hue, hue], in turns of the colour circle."""
    grayscale: float = 0.2
    blur: float = 0.0
    """Probability of Gaussian blur."""
    blur_sigma: tuple[float, float] = (0.1, 2.0)
    """Range of the blur's standard deviation, in pixels of the view."""
    solarize: float = 0.0
    """Probability of inverting every level of 128 and above."""


_AUTHORS = ViewRecipe()
_PAPER = replace(_AUTHORS, blur=0.5, solarize=0.1)
_CIFAR = ViewRecipe(scale=(0.2, 1.0), solarize=0.1)
_TINY = ViewRecipe(scale=(0.4, 1.0), jitter=0.6, grayscale=0.1)
_DEMO = ViewRecipe(scale=(0.3, 1.0), flip=0.0, grayscale=0.0)

PRESETS: Mapping[str, tuple[ViewRecipe, ViewRecipe]] = {
    # vicreg@4e12602, augmentations.py: the two views differ.
    "authors": (replace(_AUTHORS, blur=1.0), replace(_AUTHORS, blur=0.1, solarize=0.2)),
    # The paper's text, appendix C.1: both views alike.
    "paper": (_PAPER, _PAPER),
    # solo-learn's recipe for CIFAR: larger crops, no blur.
    "cifar": (_CIFAR, _CIFAR),
    # Gentler than cifar, for small images and backbones of under a million parameters.
    "tiny": (_TINY, _TINY),
    # Handwritten digits: a mirrored digit is not a digit.
    "demo": (_DEMO, _DEMO),
}


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


def apply_colour(x: Tensor, parameters: ColourParameters) -> Tensor:
    """Flip, jitter, grayscale, blur and solarise a batch, in the authors' order.

    Args:
        x: (B, 3, S, S) grey levels 0 to 255, float32; may be changed in place.

    Returns:
        (B, 3, S, S) whole grey levels.
    """

    def rows(mask: NDArray[np.bool_]) -> Tensor:
        return torch.from_numpy(np.flatnonzero(mask)).to(x.device, non_blocking=True)

    def values(array: NDArray[np.float32], mask: NDArray[np.bool_]) -> Tensor:
        return torch.from_numpy(array[mask]).to(x.device, non_blocking=True)

    p = parameters
    if p.flip.any():
        chosen = rows(p.flip)
        x[chosen] = x[chosen].flip(-1)
    for slot in range(4):
        for operation, adjust in enumerate(JITTER):
            mask = p.jitter & (p.order[:, slot] == operation)
            if mask.any():
                chosen = rows(mask)
                x[chosen] = adjust(x[chosen], values(p.factors[:, operation], mask))
    if p.grayscale.any():
        chosen = rows(p.grayscale)
        x[chosen] = grayscale(x[chosen])
    if p.blur.any():
        chosen = rows(p.blur)
        x[chosen] = gaussian_blur(x[chosen], values(p.sigma, p.blur))
    if p.solarize.any():
        chosen = rows(p.solarize)
        x[chosen] = solarize(x[chosen])
    return x


class TwoViews:
    """Make the two views of VICReg from a batch of images.

    What happens to an image depends on (seed, epoch, index, view) alone.

    Args:
        image_size: S, the side of a view in pixels.
        preset: one of `PRESETS`, or the recipes of the first and the second view.
        mean: subtracted after scaling to [0, 1], per channel.
        std: divided by after that, per channel.
        seed: any integer.

    Raises:
        ValueError: unknown preset, or a side below one pixel.

    Example:
        >>> x, x_prime = TwoViews(image_size=32, preset="cifar")(images, indices)

    Source: vicreg@4e12602, augmentations.py, operation by operation and in that order.
    """

    def __init__(
        self,
        image_size: int = 224,
        preset: str | tuple[ViewRecipe, ViewRecipe] = "authors",
        *,
        mean: Sequence[float] = IMAGENET_DEFAULT_MEAN,
        std: Sequence[float] = IMAGENET_DEFAULT_STD,
        seed: int = 0,
    ) -> None:
        if isinstance(preset, str) and preset not in PRESETS:
            raise ValueError(
                f"preset must be one of {', '.join(PRESETS)}, got {preset!r}; "
                "or pass two ViewRecipe objects."
            )
        if image_size < 1:
            raise ValueError(f"image_size must be at least 1 pixel, got {image_size}.")
        self.image_size = image_size
        self.recipes = PRESETS[preset] if isinstance(preset, str) else preset
        self.seed = seed
        # x / 255, minus mean, over std, as one multiplication and one addition
        scale = torch.tensor([1 / (255 * s) for s in std])
        shift = torch.tensor([-m / s for m, s in zip(mean, std, strict=True)])
        self._scale, self._shift = scale.view(-1, 1, 1), shift.view(-1, 1, 1)

    def uniforms(self, indices: ArrayLike, epoch: ArrayLike, view: int) -> NDArray[np.float32]:
        """The (B, K) numbers that decide view 0 or 1 of every image."""
        stream = (Stream.VIEW, Stream.VIEW_PRIME)[view]
        return uniforms(indices, NUM_UNIFORMS, seed=self.seed, epoch=epoch, stream=stream)

    def __call__(
        self, images: Tensor, indices: ArrayLike | None = None, epoch: ArrayLike = 0
    ) -> tuple[Tensor, Tensor]:
        """Crop and colour images of one size, on their own device.

        Args:
            images: (B, 3, H, W) uint8.
            indices: (B,) sample indices; None draws them from torch's generator, for use outside
                a training run.
            epoch: scalar or (B,).

        Returns:
            Two (B, 3, S, S) float32 tensors, normalised.
        """
        if images.dtype != torch.uint8 or images.ndim != 4 or images.shape[1] != 3:
            raise ValueError(
                "images must be a uint8 tensor of shape (B, 3, H, W), got "
                f"{images.dtype} of shape {tuple(images.shape)}."
            )
        if indices is None:
            indices = torch.randint(2**31, (len(images),)).numpy()
        height, width = images.shape[-2:]
        crops = []
        for view, recipe in enumerate(self.recipes):
            boxes = draw_crops(self.uniforms(indices, epoch, view), height, width, recipe)
            crops.append(resized_crop(images, torch.from_numpy(boxes), self.image_size))
        return self._colour(crops, indices, epoch)

    def crop(self, image: Tensor, index: int, epoch: int = 0) -> Tensor:
        """Both crops of one image of any size; what a loading worker does.

        Args:
            image: (3, H, W) uint8.

        Returns:
            (2, 3, S, S) uint8.
        """
        height, width = image.shape[-2:]
        size = [self.image_size, self.image_size]
        crops = []
        for view, recipe in enumerate(self.recipes):
            box = draw_crops(self.uniforms([index], epoch, view), height, width, recipe)[0]
            top, left, h, w = box.tolist()
            part = image[:, top : top + h, left : left + w]
            crops.append(tv.resize(part, size, tv.InterpolationMode.BICUBIC, antialias=True))
        return torch.stack(crops)

    def colour(
        self, crops: Tensor, indices: ArrayLike, epoch: ArrayLike = 0
    ) -> tuple[Tensor, Tensor]:
        """Finish a batch of crops, on their own device.

        Args:
            crops: (B, 2, 3, S, S) uint8.
            indices: (B,) as given to `crop`; likewise epoch.

        Returns:
            Two (B, 3, S, S) float32 tensors, normalised.
        """
        return self._colour([crops[:, 0].float(), crops[:, 1].float()], indices, epoch)

    def _colour(
        self, crops: list[Tensor], indices: ArrayLike, epoch: ArrayLike
    ) -> tuple[Tensor, Tensor]:
        views = []
        for view, (x, recipe) in enumerate(zip(crops, self.recipes, strict=True)):
            x = apply_colour(x, draw_colour(self.uniforms(indices, epoch, view), recipe))
            scale, shift = self._scale.to(x.device), self._shift.to(x.device)
            views.append(torch.addcmul(shift, x, scale))
        return views[0], views[1]
