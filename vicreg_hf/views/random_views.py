"""Random views of every image, drawn from keyed random numbers and computed in batches.

A view is made in two halves that may run in different places: `RandomViews.crop` (the random
resized crop) and `RandomViews.colour` (flip, colour jitter, grayscale, blur, solarise,
normalisation). Calling the object does both. Between operations pixels are uint8, as they are in
PIL, which the authors use.

Shapes: B images, C channels, H x W source pixels, S side of a view (each may have its own), K
uniforms per view.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Generic, TypeVar, cast

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from torch import Tensor
from torchvision.transforms.v2 import functional as tv

from vicreg_hf.runtime.checks import is_number, is_whole
from vicreg_hf.runtime.randomness import uniforms, view_stream
from vicreg_hf.runtime.transfer import send_together
from vicreg_hf.views.colouring import finish, plan
from vicreg_hf.views.draws import NUM_UNIFORMS, ColourParameters, draw_colour, draw_crops, joined
from vicreg_hf.views.kernels import Kernels
from vicreg_hf.views.operations import resized_crop
from vicreg_hf.views.presets import ViewRecipe

NEEDS_RGB = ("saturation", "hue", "grayscale")
"""What a recipe asks of colours, and is left out for images of another number of channels."""
ELEMENTS_AT_ONCE = 2**23
"""Levels of which a CPU makes views at once: larger batches leave its cache."""
TOGETHER_ON_GPU = 2**26
"""Levels up to which a GPU makes views of one side together. Fewer take longer to ask for than to
compute; more would only take memory."""

PerChannel = Sequence[float] | Sequence[Sequence[float]]
"""A number for each channel, or such numbers for each view."""

Views = TypeVar("Views", bound=tuple[Tensor, ...])
"""A tensor for each view."""


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
        ValueError: no recipe or something else, no channels, a side that is no whole number or
            below one pixel, a mean that is not finite, a deviation that is not above 0, or sides,
            means or deviations of another number of views.

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
        if not _are_recipes(recipes):
            raise ValueError(f"recipes must be a ViewRecipe for each view, got {recipes!r}.")
        if not recipes:
            raise ValueError("recipes must be of at least 1 view, got none.")
        self.image_size = tuple(image_size) if isinstance(image_size, Sequence) else image_size
        self.image_sizes: tuple[int, ...] = _per_view("image_size", image_size, len(recipes))
        """The side of each view."""
        if not all(is_whole(side) and side > 0 for side in self.image_sizes):
            raise ValueError(
                f"image_size must be a whole number of at least 1 pixel, got {image_size!r}."
            )
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
        if not all(s > 0 for own in stds for s in own):
            raise ValueError(f"std must be above 0 for every channel, got {std}.")
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
            ValueError: images of another dtype or shape, or none; indices that are not one for each
                image, from 0.
        """
        if not isinstance(images, Tensor):
            raise ValueError(
                f"images must be a uint8 tensor of shape (B, {self.in_chans}, H, W), got "
                f"{type(images).__name__}; stack those of one size, or `crop` them first."
            )
        if images.dtype != torch.uint8 or images.ndim != 4 or images.shape[1] != self.in_chans:
            raise ValueError(
                f"images must be a uint8 tensor of shape (B, {self.in_chans}, H, W), got "
                f"{images.dtype} of shape {tuple(images.shape)}."
            )
        if not len(images):
            raise ValueError(f"images must be at least 1, got none of shape {tuple(images.shape)}.")
        if indices is None:
            indices = torch.randint(2**31, (len(images),)).numpy()
        height, width = images.shape[-2:]
        drawn = self._drawn(_one_each(indices, len(images)), epoch)
        boxes = [
            draw_crops(u, height, width, recipe)
            for u, recipe in zip(drawn, self.recipes, strict=True)
        ]
        crops = [
            self.kernels(resized_crop, images, own, shared=(side,))
            for own, side in zip(send_together(boxes, images.device), self.image_sizes, strict=True)
        ]
        return self._colour(cast(Views, tuple(crops)), drawn)

    def crop(self, images: Sequence[Tensor], indices: ArrayLike, epoch: ArrayLike = 0) -> Views:
        """The crops of images of any sizes; what a loading worker does.

        Args:
            images: B of (C, H, W) uint8.
            indices: (B,) sample indices.
            epoch: scalar or (B,).

        Returns:
            A (B, C, S, S) uint8 tensor for each view.

        Raises:
            ValueError: no images, or indices that are not one for each, from 0.
        """
        if not len(images):
            raise ValueError("images must be at least 1, got none.")
        indices = _one_each(indices, len(images))
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

    def colour(self, crops: Views, indices: ArrayLike, epoch: ArrayLike = 0) -> Views:
        """Finish a batch of crops, on their own device.

        Args:
            crops: (B, C, S, S) uint8 tensors, as `crop` gives them.
            indices: (B,) as given to `crop`; likewise epoch.

        Returns:
            A (B, C, S, S) float32 tensor for each view, normalised.

        Raises:
            ValueError: indices that are not one for each crop, from 0.
        """
        return self._colour(crops, self._drawn(_one_each(indices, len(crops[0])), epoch))

    def _drawn(self, indices: ArrayLike, epoch: ArrayLike) -> list[NDArray[np.float32]]:
        return [self.uniforms(indices, epoch, view) for view in range(len(self.recipes))]

    @torch.no_grad()
    def _colour(self, crops: Views, drawn: list[NDArray[np.float32]]) -> Views:
        parameters = [draw_colour(u, r) for u, r in zip(drawn, self.recipes, strict=True)]
        made: dict[int, Tensor] = {}
        for views in self._together(crops):
            own = [crops[view] for view in views]
            finished = self._finish(own, joined([parameters[view] for view in views]), views)
            made.update(zip(views, finished.split([len(x) for x in own]), strict=True))
        return cast(Views, tuple(made[view] for view in range(len(crops))))

    def _together(self, crops: Views) -> list[list[int]]:
        """Views of one side and normalisation, as many of them as may be finished at once."""
        groups: dict[Any, list[list[int]]] = {}
        for view, (x, factors) in enumerate(zip(crops, self._normalisation, strict=True)):
            alike = groups.setdefault((x.shape, factors), [[]])
            if alike[-1] and len(x) * (len(alike[-1]) + 1) > _rows_at_once(x):
                alike.append([])
            alike[-1].append(view)
        return [views for alike in groups.values() for views in alike]

    def _finish(self, crops: list[Tensor], p: ColourParameters, views: list[int]) -> Tensor:
        """The views (n B, C, S, S) of n crops; those of a large batch part by part."""
        factors = np.array(self._normalisation[views[0]], np.float32)[..., None, None]
        largest_sigma = max(self.recipes[view].blur_sigma[1] for view in views)

        def made(parts: list[Tensor], own: ColourParameters) -> Tensor:
            changes = plan(own, largest_sigma=largest_sigma, in_colour=self.in_chans == 3)
            return finish(torch.cat(parts).contiguous(), changes, factors, self.kernels)

        x, at_once = crops[0], _rows_at_once(crops[0])
        if len(x) <= at_once:
            return made(crops, p)
        out = torch.empty(x.shape, dtype=torch.float32, device=x.device)
        for start in range(0, len(x), at_once):
            rows = slice(start, start + at_once)
            out[rows] = made([x[rows]], p.rows(rows))
        return out


def _per_view(name: str, values: Any, num_views: int) -> tuple[Any, ...]:
    """A setting for each view, of one for all of them or one for each."""
    own = tuple(values) if isinstance(values, Sequence) else (values,) * num_views
    if len(own) != num_views:
        raise ValueError(
            f"{name} must be one for all views or one for each of {num_views}, got {len(own)}."
        )
    return own


def _one_each(indices: ArrayLike, count: int) -> NDArray[np.integer[Any]]:
    """Sample indices as an array, if they are one for each of so many images."""
    found = np.asarray(indices)
    if found.size != count:
        raise ValueError(f"indices must be one for each of {count} images, got {found.size}.")
    if found.dtype.kind not in "iu":
        raise ValueError(f"indices must be whole numbers, got {found.dtype}.")
    if found.min() < 0:
        raise ValueError(f"indices must be at least 0, got {found.min()}.")
    return found


def _imagenet(default: Sequence[float], channels: int) -> Sequence[float]:
    return default if channels == 3 else [sum(default) / len(default)]


def _are_recipes(recipes: Any) -> bool:
    return isinstance(recipes, Sequence) and all(isinstance(r, ViewRecipe) for r in recipes)


def _listed(name: str, values: Any) -> Any:
    if isinstance(values, Tensor):
        values = values.tolist()
    if isinstance(values, str) or not isinstance(values, (Sequence, np.ndarray)):
        raise ValueError(f"{name} must be a list with a number per channel, got {values!r}.")
    return values


def _per_channel(
    name: str, values: PerChannel, num_views: int, channels: int
) -> list[tuple[float, ...]]:
    """The numbers of each view, one for each channel."""
    values = _listed(name, values)
    for_each = len(values) > 0 and isinstance(values[0], Sequence)
    views: list[tuple[float, ...]] = []
    for given in _per_view(name, values if for_each else [values] * num_views, num_views):
        own = _listed(name, given)
        if len(own) not in (1, channels):
            raise ValueError(f"{name} must have a number per channel, {channels}, got {list(own)}.")
        if not all(is_number(value) and math.isfinite(value) for value in own):
            raise ValueError(f"{name} must be finite numbers, one per channel, got {list(own)}.")
        views.append(tuple(own) if len(own) == channels else (own[0],) * channels)
    return views


def _factors(mean: Sequence[float], std: Sequence[float]) -> tuple[tuple[float, ...], ...]:
    """What makes of x / 255, minus mean, over std one multiplication and one addition."""
    scale = tuple(1 / (255 * s) for s in std)
    return scale, tuple(-m / s for m, s in zip(mean, std, strict=True))


def _rows_at_once(x: Tensor) -> int:
    """Of crops (B, C, S, S) like these, to be finished in one go."""
    elements = max(1, x[:1].numel())
    if x.is_cuda:
        return max(len(x), TOGETHER_ON_GPU // elements)
    return max(1, ELEMENTS_AT_ONCE // elements)
