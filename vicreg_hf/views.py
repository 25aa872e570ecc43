"""Random views of every image, drawn from keyed random numbers and computed in batches.

A view is made in two halves that may run in different places: `RandomViews.crop` (the random
resized crop) and `RandomViews.colour` (flip, colour jitter, grayscale, blur, solarise,
normalisation). Calling the object does both. Between operations pixels are uint8, as they are in
PIL, which the authors use.

Shapes: B images, C channels, H x W source pixels, S side of a view (each may have its own), K
uniforms per view.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Generic, TypeVar, cast

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from torch import Tensor
from torchvision.transforms.v2 import functional as tv

from vicreg_hf.augmentation import (
    NUM_UNIFORMS,
    ColourParameters,
    Recipes,
    ViewRecipe,
    draw_colour,
    draw_crops,
    find_recipes,
)
from vicreg_hf.kernels import Kernels
from vicreg_hf.pixels import (
    adjust_brightness,
    adjust_contrast,
    adjust_hue,
    adjust_saturation,
    box_weights,
    gaussian_blur,
    grayscale,
    mirror,
    normalise,
    resized_crop,
    solarize,
)
from vicreg_hf.randomness import uniforms, view_stream

JITTER = (adjust_brightness, adjust_contrast, adjust_saturation, adjust_hue)
NEEDS_RGB = ("saturation", "hue", "grayscale")
"""What a recipe asks of colours, and is left out for images of another number of channels."""
ELEMENTS_AT_ONCE = 2**23
"""Levels of which a CPU makes views at once: larger batches leave its cache."""

PerChannel = Sequence[float] | Sequence[Sequence[float]]
"""A number for each channel, or such numbers for each view."""

Views = TypeVar("Views", bound=tuple[Tensor, ...])
"""A tensor for each view."""
Operation = Callable[..., Tensor]


class RandomViews(Generic[Views]):
    """Make a random view of each recipe from a batch of images.

    What happens to an image depends on (seed, epoch, index, view) alone, and so not on how many
    other views there are or on their sides. Images of other than three channels keep the operations
    that need no colours: `NEEDS_RGB` names the others.

    Args:
        image_size: S, the side of a view in pixels; one for all, or one for each.
        recipes: of each view; `multi_crop_recipes` gives those of global and local views.
        mean: subtracted after scaling to [0, 1], per channel; by default ImageNet's, of which
            images of other than three channels get the average. Once for all views, or for each.
        std: divided by after that, per channel; likewise.
        seed: any integer.
        in_chans: C.
        compile: fuse the operations with torch.compile: the same views, sooner, after half a minute
            at the start. Without a C++ compiler it says so and goes on without.
        numbers: which of a sample's views these are, counted from 0, where others are made
            elsewhere; by default the first ones.

    Raises:
        ValueError: no recipe, no channels, a side below one pixel, or sides, means or deviations
            of another number of views.

    Example:
        >>> (x,) = RandomViews(32, (ViewRecipe(jitter=0, grayscale=0),))(images, indices)
        >>> x, x_prime, *local = RandomViews([224, 224, 96, 96], recipes)(images, indices)

    Source: vicreg@4e12602, augmentations.py, operation by operation and in that order.
    """

    def __init__(
        self,
        image_size: int | Sequence[int],
        recipes: tuple[ViewRecipe, ...],
        *,
        mean: PerChannel | None = None,
        std: PerChannel | None = None,
        seed: int = 0,
        in_chans: int = 3,
        compile: bool = False,  # noqa: A002 - torch's word
        numbers: Sequence[int] | None = None,
    ) -> None:
        if in_chans < 1:
            raise ValueError(f"in_chans must be at least 1, got {in_chans}.")
        if not recipes:
            raise ValueError("recipes must be of at least 1 view, got none.")
        self.image_size = tuple(image_size) if isinstance(image_size, Sequence) else image_size
        self.image_sizes: tuple[int, ...] = _per_view("image_size", image_size, len(recipes))
        """The side of each view."""
        if min(self.image_sizes) < 1:
            raise ValueError(f"image_size must be at least 1 pixel, got {image_size}.")
        self.seed, self.in_chans, self.recipes = seed, in_chans, recipes
        self.numbers = tuple(range(len(recipes)) if numbers is None else numbers)
        self.kernels = Kernels(compiled=compile)
        means, stds = (
            _per_channel(name, default if values is None else values, len(recipes), in_chans)
            for name, values, default in (
                ("mean", mean, _imagenet(IMAGENET_DEFAULT_MEAN, in_chans)),
                ("std", std, _imagenet(IMAGENET_DEFAULT_STD, in_chans)),
            )
        )
        self._normalisation = [_factors(*own) for own in zip(means, stds, strict=True)]

    @property
    def left_out(self) -> tuple[str, ...]:
        """Operations that the recipes ask for and images of so many channels cannot have."""
        if self.in_chans == 3:
            return ()
        return tuple(n for n in NEEDS_RGB if any(getattr(recipe, n) for recipe in self.recipes))

    def uniforms(self, indices: ArrayLike, epoch: ArrayLike, view: int) -> NDArray[np.float32]:
        """The (B, K) numbers that decide one of the views, counted from 0, of every image."""
        stream = view_stream(self.numbers[view])
        return uniforms(indices, NUM_UNIFORMS, seed=self.seed, epoch=epoch, stream=stream)

    def __call__(
        self, images: Tensor, indices: ArrayLike | None = None, epoch: ArrayLike = 0
    ) -> Views:
        """Crop and colour images of one size, on their own device.

        Args:
            images: (B, C, H, W) uint8.
            indices: (B,) sample indices; None draws them from torch's generator, for use outside
                a training run.
            epoch: scalar or (B,).

        Returns:
            A (B, C, S, S) float32 tensor for each view, normalised.

        Raises:
            ValueError: images of another dtype or shape.
        """
        if images.dtype != torch.uint8 or images.ndim != 4 or images.shape[1] != self.in_chans:
            raise ValueError(
                f"images must be a uint8 tensor of shape (B, {self.in_chans}, H, W), got "
                f"{images.dtype} of shape {tuple(images.shape)}."
            )
        if indices is None:
            indices = torch.randint(2**31, (len(images),)).numpy()
        height, width = images.shape[-2:]
        crops = []
        for view, (recipe, side) in enumerate(zip(self.recipes, self.image_sizes, strict=True)):
            boxes = draw_crops(self.uniforms(indices, epoch, view), height, width, recipe)
            on_device = torch.from_numpy(boxes).to(images.device, non_blocking=True)
            crops.append(self.kernels(resized_crop, images, on_device, shared=(side,)))
        return self.colour(cast(Views, tuple(crops)), indices, epoch)

    def crop(self, images: Sequence[Tensor], indices: ArrayLike, epoch: ArrayLike = 0) -> Views:
        """The crops of images of any sizes; what a loading worker does.

        Args:
            images: B of (C, H, W) uint8.
            indices: (B,) sample indices.
            epoch: scalar or (B,).

        Returns:
            A (B, C, S, S) uint8 tensor for each view.
        """
        heights, widths = np.array([image.shape[-2:] for image in images]).T
        views = []
        for view, (recipe, side) in enumerate(zip(self.recipes, self.image_sizes, strict=True)):
            boxes = draw_crops(self.uniforms(indices, epoch, view), heights, widths, recipe)
            size = [side, side]
            out = torch.empty((len(images), self.in_chans, *size), dtype=torch.uint8)
            for image, (top, left, height, width), into in zip(
                images, boxes.tolist(), out, strict=True
            ):
                part = image[:, top : top + height, left : left + width]
                into.copy_(tv.resize(part, size, tv.InterpolationMode.BICUBIC, antialias=True))
            views.append(out)
        return cast(Views, tuple(views))

    @torch.no_grad()
    def colour(self, crops: Views, indices: ArrayLike, epoch: ArrayLike = 0) -> Views:
        """Finish a batch of crops, on their own device.

        Args:
            crops: (B, C, S, S) uint8 tensors, as `crop` gives them.
            indices: (B,) as given to `crop`; likewise epoch.

        Returns:
            A (B, C, S, S) float32 tensor for each view, normalised.
        """
        views = []
        for view, (x, recipe) in enumerate(zip(crops, self.recipes, strict=True)):
            parameters = draw_colour(self.uniforms(indices, epoch, view), recipe)
            at_once = len(x) if x.is_cuda else max(1, ELEMENTS_AT_ONCE // max(1, x[:1].numel()))
            if len(x) <= at_once:
                views.append(self._finish(x, parameters, view))
                continue
            out = torch.empty(x.shape, dtype=torch.float32, device=x.device)
            for start in range(0, len(x), at_once):
                rows = slice(start, start + at_once)
                out[rows] = self._finish(x[rows], parameters.rows(rows), view)
            views.append(out)
        return cast(Views, tuple(views))

    def _finish(self, x: Tensor, parameters: ColourParameters, view: int) -> Tensor:
        levels = self._apply(x.clone(), parameters, self.recipes[view])
        factors = self._normalisation[view]
        scale, shift = (factor.to(x.device, non_blocking=True) for factor in factors)
        return self.kernels(normalise, levels, shared=(scale, shift))

    def _apply(self, x: Tensor, p: ColourParameters, recipe: ViewRecipe) -> Tensor:
        """Flip, jitter, grayscale, blur and solarise a batch in place, in the authors' order."""

        def change(
            operation: Operation, mask: NDArray[np.bool_], *values: NDArray[np.float32]
        ) -> None:
            chosen = np.flatnonzero(mask)
            if len(chosen):
                rows = torch.from_numpy(chosen).to(x.device, non_blocking=True)
                own = (torch.from_numpy(v[chosen]).to(x.device, non_blocking=True) for v in values)
                _write_rows(x, rows, self.kernels(operation, x.index_select(0, rows), *own))

        in_colour = self.in_chans == 3
        change(mirror, p.flip)
        for slot in range(4):
            for number, operation in enumerate(JITTER):
                if in_colour or operation in JITTER[:2]:
                    factor = np.ascontiguousarray(p.factors[:, number])
                    # like torchvision's, a jitter without hue leaves the colours as they are
                    wanted = factor != (0 if operation is adjust_hue else 1)
                    change(operation, p.jitter & (p.order[:, slot] == number) & wanted, factor)
        if in_colour:
            change(grayscale, p.grayscale)
        if p.blur.any():
            weights = box_weights(torch.from_numpy(p.sigma), recipe.blur_sigma[1]).numpy()
            change(gaussian_blur, p.blur, weights)
        change(solarize, p.solarize)
        return x


class TwoViews(RandomViews[tuple[Tensor, Tensor]]):
    """Make the two views of VICReg from a batch of images.

    Args:
        image_size: S, the side of a view in pixels; one for both, or one for each.
        preset: one of `PRESETS`, a YAML file or its content as `find_recipes` takes it, what that
            gives, or the recipes of the first and the second view.
        mean: as for `RandomViews`; likewise the others.

    Raises:
        ValueError: unknown preset, or as for `RandomViews`.

    Example:
        >>> x, x_prime = TwoViews(image_size=32, preset="cifar")(images, indices)
    """

    def __init__(
        self,
        image_size: int | Sequence[int] = 224,
        preset: str | Mapping[str, Any] | Recipes | tuple[ViewRecipe, ViewRecipe] = "authors",
        *,
        mean: PerChannel | None = None,
        std: PerChannel | None = None,
        seed: int = 0,
        in_chans: int = 3,
        compile: bool = False,  # noqa: A002 - torch's word
    ) -> None:
        recipes = preset if isinstance(preset, tuple) else find_recipes(preset)
        if isinstance(recipes, Recipes):
            recipes = recipes.x, recipes.x_prime
        if len(recipes) != 2:
            raise ValueError(f"preset must have the recipes of 2 views, got {len(recipes)}.")
        super().__init__(
            image_size, recipes, mean=mean, std=std, seed=seed, in_chans=in_chans, compile=compile
        )


def _per_view(name: str, values: Any, num_views: int) -> tuple[Any, ...]:
    """A setting for each view, of one for all of them or one for each."""
    own = tuple(values) if isinstance(values, Sequence) else (values,) * num_views
    if len(own) != num_views:
        raise ValueError(
            f"{name} must be one for all views or one for each of {num_views}, got {len(own)}."
        )
    return own


def _imagenet(default: Sequence[float], channels: int) -> Sequence[float]:
    return default if channels == 3 else [sum(default) / len(default)]


def _per_channel(
    name: str, values: PerChannel, num_views: int, channels: int
) -> list[tuple[float, ...]]:
    """The numbers of each view, one for each channel."""
    for_each = len(values) > 0 and isinstance(values[0], Sequence)
    views: list[tuple[float, ...]] = []
    for own in _per_view(name, values if for_each else [values] * num_views, num_views):
        if len(own) not in (1, channels):
            raise ValueError(f"{name} must have a number per channel, {channels}, got {list(own)}.")
        views.append(tuple(own) if len(own) == channels else (own[0],) * channels)
    return views


def _factors(mean: Sequence[float], std: Sequence[float]) -> tuple[Tensor, Tensor]:
    """What makes of x / 255, minus mean, over std one multiplication and one addition."""
    scale = torch.tensor([1 / (255 * s) for s in std])
    shift = torch.tensor([-m / s for m, s in zip(mean, std, strict=True)])
    return scale.view(-1, 1, 1), shift.view(-1, 1, 1)


def _write_rows(x: Tensor, rows: Tensor, values: Tensor) -> None:
    """x[rows] = values, of contiguous uint8; eight at a time where that is possible."""
    x, values = x.flatten(1), values.reshape(len(rows), -1)
    if x.shape[1] % 8 == 0:
        x, values = x.view(torch.int64), values.view(torch.int64)
    x.index_copy_(0, rows, values)
