"""Random views of every image, drawn from keyed random numbers and computed in batches.

A view is made in two halves that may run in different places: `RandomViews.crop` (the random
resized crop) and `RandomViews.transform_crops` (flip, colour jitter, grayscale, blur, solarise,
normalisation). Calling the object does both. Between operations pixels are uint8, as they are in
PIL, which the authors use.

Shapes: B images, V views, C channels, H x W source pixels, S side of a view (each may have its
own), K uniforms per view.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Generic, TypeVar, cast

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from PIL import Image
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from torch import Tensor
from torchvision.transforms.v2 import functional as tv

from vicreg_hf.runtime.checks import is_number, is_whole
from vicreg_hf.runtime.randomness import uniforms, view_stream
from vicreg_hf.runtime.transfer import send_together
from vicreg_hf.views.draws import NUM_UNIFORMS, draw_crops, draw_transforms
from vicreg_hf.views.kernels import Kernels
from vicreg_hf.views.operations import as_pixels, resized_crop
from vicreg_hf.views.presets import ViewRecipe
from vicreg_hf.views.reduced import ReducedImage, Reduction, is_large
from vicreg_hf.views.transforms import apply_transforms, plan_transforms

NEEDS_RGB = ("saturation", "hue", "grayscale")
"""Fields of a recipe that have no effect on images of other than three channels."""
PIXELS_AT_ONCE = 2**23
"""Pixels, times channels, that a CPU transforms at once; more would not fit in its cache."""
PIXELS_AT_ONCE_ON_GPU = 2**26
"""Pixels, times channels, of several views that a GPU transforms at once. It takes longer to ask
for fewer than to compute them; more would only take memory."""

SPARE = 2.0
"""Pixels of a reduced crop for each of its view, along either side, below which more would be seen
to be lost."""

PerChannel = Sequence[float] | Sequence[Sequence[float]]
"""A number for each channel, or such numbers for each view."""

Views = TypeVar("Views", bound=tuple[Tensor, ...])
"""A tensor for each view, and one of their places where these are asked for."""

PLACE = ("top", "left", "height", "width", "mirrored")
"""Columns of a view's place: its crop in pixels of the whole image, and 1 where the view is
mirrored left to right, otherwise 0."""


class RandomViews(Generic[Views]):
    """Make a random view of each recipe from a batch of images.

    A view depends on (seed, epoch, index, view) alone, and so not on how many other views there
    are or on their sides. Images of other than three channels keep the operations
    that need no colours: `NEEDS_RGB` names the others.

    Args:
        image_size: S, the side of a view in pixels; one for all, or one for each.
        recipes: one for each view; `multi_crop_recipes` gives those of global and local views.
        mean: subtracted after scaling to [0, 1], per channel; by default ImageNet's, of which
            images of other than three channels get the average. Once for all views, or for each.
        std: divided by after that, per channel; likewise.
        seed: any integer.
        in_chans: C.
        compile: fuse the operations with torch.compile: the same views, sooner, after half a minute
            at the start. Without a C++ compiler it says so and goes on without.
        numbers: which of a sample's views these are, counted from 0, where others are made
            elsewhere; by default the first ones.
        places: also give where the views lie in their images, as one more tensor after the views:
            (B, V, 5) float32, whose columns `PLACE` names.

    Raises:
        ValueError: no recipe or something else, no channels, a side that is no whole number or
            below one pixel, a mean that is not finite, a deviation that is not above 0, or sides,
            means or deviations of another number of views.

    Example:
        >>> (x,) = RandomViews(32, (ViewRecipe(jitter=0, grayscale=0),))(images)
        >>> x, x_prime, *local = RandomViews([224, 224, 96, 96], recipes)(images, rows, epoch)

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
        places: bool = False,
    ) -> None:
        if in_chans < 1:
            raise ValueError(f"in_chans must be at least 1, got {in_chans}.")
        if not are_recipes(recipes) or not recipes:
            raise ValueError(
                f"recipes must be a ViewRecipe for each of at least 1 view, got {recipes!r}."
            )
        self.image_size = tuple(image_size) if isinstance(image_size, Sequence) else image_size
        self.image_sizes: tuple[int, ...] = _per_view("image_size", self.image_size, len(recipes))
        """The side of each view."""
        if not all(is_whole(side) and side > 0 for side in self.image_sizes):
            raise ValueError(
                f"image_size must be a whole number of at least 1 pixel, got {image_size!r}."
            )
        self.seed, self.in_chans, self.recipes, self.places = seed, in_chans, recipes, places
        self.numbers = tuple(range(len(recipes)) if numbers is None else numbers)
        self.kernels = Kernels(compiled=compile)
        means = _per_channel("mean", mean, IMAGENET_DEFAULT_MEAN, len(recipes), in_chans)
        stds = _per_channel("std", std, IMAGENET_DEFAULT_STD, len(recipes), in_chans)
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
        self,
        images: Tensor | Sequence[Tensor | Image.Image],
        indices: ArrayLike | None = None,
        epoch: ArrayLike | None = None,
    ) -> Views:
        """Crop and transform images, on their own device.

        Args:
            images: (B, C, H, W) uint8, or a list of B images of any sizes: (C, H, W) uint8, or of
                PIL, which are converted to C channels.
            indices: (B,) sample indices, such as row numbers; None draws them from torch's
                generator, for use outside a training run.
            epoch: scalar or (B,), which must be given with indices.

        Returns:
            A (B, C, S, S) float32 tensor for each view, normalised; with `places` also these.

        Raises:
            ValueError: images of another dtype or shape, or none; indices that are not one for each
                image, from 0, or without an epoch.
        """
        if isinstance(images, (list, tuple)) and images:
            return self._of_list([as_pixels(image, self.in_chans) for image in images],
                                 indices, epoch)  # fmt: skip
        if (
            not isinstance(images, Tensor)
            or (images.dtype, images.ndim) != (torch.uint8, 4)
            or images.shape[1] != self.in_chans
            or not len(images)
        ):
            found = type(images).__name__
            if isinstance(images, Tensor):
                found += f" of {images.dtype} {tuple(images.shape)}"
            raise ValueError(
                f"images must be a uint8 tensor of shape (B, {self.in_chans}, H, W) with B at "
                f"least 1, got {found}; give images of several sizes as a list."
            )
        height, width = images.shape[-2:]
        drawn = self._all_uniforms(*_keys(indices, epoch, len(images)))
        boxes = [draw_crops(u, height, width, r) for u, r in zip(drawn, self.recipes, strict=True)]
        crops = [
            self.kernels(resized_crop, images, own, shared=(side,))
            for own, side in zip(send_together(boxes, images.device), self.image_sizes, strict=True)
        ]
        return self._transform(cast(Views, (*crops, *self._places(boxes))), drawn)

    def _of_list(
        self, images: list[Tensor], indices: ArrayLike | None, epoch: ArrayLike | None
    ) -> Views:
        keys = _keys(indices, epoch, len(images))
        crops = (view.to(images[0].device) for view in self.crop(images, *keys))
        return self.transform_crops(cast(Views, tuple(crops)), *keys)

    def reduction(self, index: int, epoch: int = 0) -> Reduction:
        """By how much the image of an index may be reduced for the crops of all views."""

        def by(height: int, width: int) -> int:
            if not is_large(height, width):
                return 1
            drawn = zip(self._all_uniforms([index], epoch), self.recipes, strict=True)
            shortest = [draw_crops(u, height, width, own)[0, 2:].min() for u, own in drawn]
            spare = (np.array(shortest) / self.image_sizes).min() / SPARE
            return next((scale for scale in (4, 2) if spare >= scale), 1)

        return by

    def empty_crops(self, count: int, *, pinned: bool = False) -> Views:
        """Room for what `crop` gives of so many images."""
        room = [
            torch.empty(count, self.in_chans, side, side, dtype=torch.uint8, pin_memory=pinned)
            for side in self.image_sizes
        ]
        if self.places:
            room.append(torch.empty(count, len(self.recipes), len(PLACE), pin_memory=pinned))
        return cast(Views, tuple(room))

    def _places(self, boxes: Sequence[NDArray[np.int64]]) -> list[Tensor]:
        """The places of crops that are not mirrored yet, where places are asked for."""
        if not self.places:
            return []
        columns = np.stack(boxes, 1).astype(np.float32)
        return [torch.from_numpy(np.pad(columns, ((0, 0), (0, 0), (0, 1))))]

    def crop(
        self, images: Sequence[Tensor | ReducedImage], indices: ArrayLike, epoch: ArrayLike = 0
    ) -> Views:
        """The crops of images of any sizes; a loading worker calls this.

        Args:
            images: B of (C, H, W) uint8, or reduced by no more than `reduction` says.
            indices: (B,) sample indices.
            epoch: scalar or (B,).

        Returns:
            A (B, C, S, S) uint8 tensor for each view; with `places` also these, not yet mirrored.

        Raises:
            ValueError: no images, or indices that are not one for each, from 0.
        """
        if not len(images):
            raise ValueError("images must be at least 1, got none.")
        drawn = self._all_uniforms(_one_each(indices, len(images)), epoch)
        heights, widths = np.array([image.shape[-2:] for image in images]).T
        all_boxes = [
            draw_crops(u, heights, widths, own) for u, own in zip(drawn, self.recipes, strict=True)
        ]
        room = self.empty_crops(len(images))
        for boxes, side, out in zip(all_boxes, self.image_sizes, room, strict=False):
            for image, box, into in zip(images, boxes.tolist(), out, strict=True):
                into.copy_(_resized(image, box, side))
        return cast(Views, (*room[: len(all_boxes)], *self._places(all_boxes)))

    def transform_crops(self, crops: Views, indices: ArrayLike, epoch: ArrayLike = 0) -> Views:
        """Flip, jitter, blur, solarise and normalise crops, on their own device.

        Args:
            crops: what `crop` gives: (B, C, S, S) uint8 tensors, and with `places` those.
            indices: (B,) as given to `crop`; likewise epoch.

        Returns:
            A (B, C, S, S) float32 tensor for each view, normalised; with `places` also these.

        Raises:
            ValueError: indices that are not one for each crop, from 0.
        """
        return self._transform(crops, self._all_uniforms(_one_each(indices, len(crops[0])), epoch))

    def _all_uniforms(self, indices: ArrayLike, epoch: ArrayLike) -> list[NDArray[np.float32]]:
        return [self.uniforms(indices, epoch, view) for view in range(len(self.recipes))]

    @torch.no_grad()
    def _transform(self, crops: Views, uniforms: list[NDArray[np.float32]]) -> Views:
        drawn = [draw_transforms(u, r) for u, r in zip(uniforms, self.recipes, strict=True)]
        made: list[list[Tensor]] = [[] for _ in drawn]
        for parts in self._parts_at_once(crops[: len(drawn)]):
            x = torch.cat([crops[view][rows] for view, rows in parts]).contiguous()
            transforms = plan_transforms(
                np.concatenate([drawn[view][rows] for view, rows in parts]),
                largest_sigma=max(self.recipes[view].blur_sigma[1] for view, _ in parts),
                in_colour=self.in_chans == 3,
            )
            factors = np.array(self._normalisation[parts[0][0]], np.float32)[..., None, None]
            finished = apply_transforms(x, transforms, factors, self.kernels)
            sizes = [len(crops[view][rows]) for view, rows in parts]
            for (view, _), part in zip(parts, finished.split(sizes), strict=True):
                made[view].append(part)
        whole = [parts[0] if len(parts) == 1 else torch.cat(parts) for parts in made]
        if self.places:
            mirrored = np.stack([own["flip"] for own in drawn], 1)[..., None].astype(np.float32)
            (flips,) = send_together([mirrored], whole[0].device)
            whole.append(torch.cat([crops[-1][..., :-1].to(flips.device), flips], -1))
        return cast(Views, tuple(whole))

    def _parts_at_once(self, crops: Sequence[Tensor]) -> list[list[tuple[int, slice]]]:
        """Rows of views that are transformed together, being of one side and normalisation."""
        groups: dict[Any, list[list[tuple[int, slice]]]] = {}
        room: dict[Any, int] = {}
        for view, (x, factors) in enumerate(zip(crops, self._normalisation, strict=True)):
            key = (x.shape[1:], factors)
            at_once = _rows_at_once(x)
            for start in range(0, len(x), at_once):
                part = slice(start, min(start + at_once, len(x)))
                if room.get(key, 0) < part.stop - start:
                    groups.setdefault(key, []).append([])
                    room[key] = at_once
                groups[key][-1].append((view, part))
                room[key] -= part.stop - start
        return [parts for alike in groups.values() for parts in alike]


def are_recipes(recipes: Any) -> bool:
    """Whether these are a sequence of `ViewRecipe`."""
    return isinstance(recipes, Sequence) and all(isinstance(r, ViewRecipe) for r in recipes)


def _per_view(name: str, values: Any, num_views: int) -> tuple[Any, ...]:
    """A setting for each view, where there may be one for all of them."""
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
    if found.dtype.kind not in "iu" or found.min() < 0:
        raise ValueError(
            f"indices must be whole numbers from 0, got {found.dtype} from {found.min()}."
        )
    return found


def _keys(
    indices: ArrayLike | None, epoch: ArrayLike | None, count: int
) -> tuple[NDArray[np.integer[Any]], ArrayLike]:
    """Sample indices and epoch by which views are drawn; without indices, random ones."""
    if indices is None:
        if epoch is not None:
            raise ValueError(
                f"epoch must be left out without indices, got {epoch}; only images with indices "
                "have the same views in each run."
            )
        return torch.randint(2**31, (count,)).numpy(), 0
    found = _one_each(indices, count)
    if epoch is None:
        raise ValueError(
            "epoch must be given with indices, got none, with which every epoch would have the "
            "same views; count it from 0, or leave out both to draw new views at every call."
        )
    return found, epoch


def _per_channel(
    name: str, values: Any, default: Sequence[float], num_views: int, channels: int
) -> list[tuple[float, ...]]:
    """The numbers of each view, one for each channel; without values the default's."""
    if values is None:
        values = default if channels == 3 else [sum(default) / len(default)]
    if isinstance(values, (Tensor, np.ndarray)):
        values = values.tolist()
    for_each = isinstance(values, Sequence) and any(isinstance(own, Sequence) for own in values)
    views: list[tuple[float, ...]] = []
    for own in _per_view(name, values if for_each else [values] * num_views, num_views):
        if (
            not isinstance(own, Sequence)
            or len(own) not in (1, channels)
            or not all(is_number(value) and math.isfinite(value) for value in own)
        ):
            raise ValueError(
                f"{name} must be a list of finite numbers, one for each of {channels} channels or "
                f"one for all, got {own!r}."
            )
        views.append(tuple(own) if len(own) == channels else (own[0],) * channels)
    return views


def _resized(image: Tensor | ReducedImage, box: Sequence[int], side: int) -> Tensor:
    """A box (top, left, height, width) of an image as (C, S, S) uint8."""
    if isinstance(image, ReducedImage):
        return image.resized(box, side)
    top, left, height, width = box
    part = image[:, top : top + height, left : left + width]
    return tv.resize(part, [side, side], tv.InterpolationMode.BICUBIC, antialias=True)


def _factors(mean: Sequence[float], std: Sequence[float]) -> tuple[tuple[float, ...], ...]:
    """Scale and shift with which x / 255, minus mean, over std is scale * x + shift."""
    scale = tuple(1 / (255 * s) for s in std)
    return scale, tuple(-m / s for m, s in zip(mean, std, strict=True))


def _rows_at_once(x: Tensor) -> int:
    """How many crops like those of x (B, C, S, S) are transformed at once."""
    pixels = max(1, x[:1].numel())
    if x.is_cuda:
        return max(len(x), PIXELS_AT_ONCE_ON_GPU // pixels)
    return max(1, PIXELS_AT_ONCE // pixels)
