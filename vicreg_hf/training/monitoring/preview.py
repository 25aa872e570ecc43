"""What the model will see: images beside their views, in one picture."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor
from torchvision.transforms.v2 import functional as tv

from vicreg_hf.data.columns.image_files import ImageError
from vicreg_hf.data.splits import ImageSplit
from vicreg_hf.settings.pretraining import PretrainingArguments
from vicreg_hf.training.building.data import TrainingData, open_training_data
from vicreg_hf.training.building.second_branch import unnormalised_views

GAP = 4
"""White pixels between pictures."""
LEAST_SIDE = 96
"""Smaller views are enlarged so far, pixel by pixel."""


def draw_preview(args: PretrainingArguments, path: str | Path, *, count: int = 8) -> Path:
    """Draw the first images of a run's first step, each beside its views.

    They are the views that training would make, without the normalisation.

    Args:
        path: ends in .png or another extension that PIL writes.
        count: images, at most the batch's.

    Returns:
        The path.

    Raises:
        ValueError: a setting that cannot be, or a path that cannot be written.
    """
    path = Path(path)
    if path.suffix.lower() not in Image.registered_extensions():
        raise ValueError(f"preview must be a file such as views.png, got {str(path)!r}.")
    args, inputs = open_training_data(args)
    views = unnormalised_views(args, inputs.pairs)
    epoch, rows = inputs.batches.batch(0)
    images, rows = _first_images(inputs, rows[:count])
    made = views.colour(views.crop(images, rows, epoch), rows, epoch)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        picture_of_views(images, made).save(path)
    except OSError as error:
        raise ValueError(
            f"preview must be a file that can be written, got {path}: {error}."
        ) from None
    return path


def _first_images(
    inputs: TrainingData, rows: NDArray[np.int64]
) -> tuple[list[Tensor], NDArray[np.int64]]:
    train = inputs.train
    if isinstance(train, ImageSplit):
        return train.read_or_replace(rows.tolist())[0], rows
    images: list[Tensor] = []
    for cell in train.cells(0):
        try:
            images.append(train.column.decode(cell))
        except ImageError:
            continue
        if len(images) == len(rows):
            break
    return images, rows[: len(images)]


def _fit(image: Tensor, side: int) -> Tensor:
    """The whole image in the middle of a white square."""
    height, width = image.shape[-2:]
    scale = side / max(height, width)
    size = [max(1, round(height * scale)), max(1, round(width * scale))]
    image = tv.resize(image, size, tv.InterpolationMode.BICUBIC, antialias=True)
    top, left = (side - size[0]) // 2, (side - size[1]) // 2
    square = torch.full((len(image), side, side), 255, dtype=torch.uint8)
    square[:, top : top + size[0], left : left + size[1]] = image
    return square


def picture_of_views(images: Sequence[Tensor], views: Sequence[Tensor]) -> Image.Image:
    """A row for each image: the image, and then each of its views, all as high as the largest.

    Smaller views are enlarged by whole numbers, pixel by pixel, and stand in the middle. Channels
    beyond the third are not shown.

    Args:
        images: B of (C, H, W) uint8, of any sizes.
        views: one (B, C, S, S) tensor or more of levels in [0, 1], each of any side.
    """
    side = max(view.shape[-1] for view in views)
    tile = side * -(-LEAST_SIDE // side)
    step = tile + GAP
    size = GAP + (1 + len(views)) * step, GAP + len(images) * step
    sheet = Image.new("RGB", size, "white")
    levels = [(view * 255).round().byte() for view in views]
    for row, (image, *own) in enumerate(zip(images, *levels, strict=True)):
        for column, pixels in enumerate([_fit(image, side), *own]):
            drawn = _enlarge(pixels, tile)
            margin = GAP + (tile - drawn.width) // 2
            sheet.paste(drawn, (margin + column * step, margin + row * step))
    return sheet


def _enlarge(pixels: Tensor, room: int) -> Image.Image:
    """A square (C, S, S) of uint8, pixel by pixel and as often as there is room."""
    shown = pixels[:3] if len(pixels) >= 3 else pixels[:1].repeat(3, 1, 1)
    drawn = Image.fromarray(shown.permute(1, 2, 0).contiguous().numpy())
    side = drawn.width * (room // drawn.width)
    return drawn.resize((side, side), Image.Resampling.NEAREST)
