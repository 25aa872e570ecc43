"""What the model will see: images beside their two views, in one picture."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor
from torchvision.transforms.v2 import functional as tv

from vicreg_hf.arguments import PretrainingArguments
from vicreg_hf.images import ImageError
from vicreg_hf.inputs import Inputs, open_inputs
from vicreg_hf.sources import ImageSplit
from vicreg_hf.views import TwoViews

GAP = 4
"""White pixels between pictures."""
LEAST_SIDE = 96
"""Smaller views are enlarged so far, pixel by pixel."""


def draw_preview(args: PretrainingArguments, path: str | Path, *, count: int = 8) -> Path:
    """Draw the first images of a run's first step, each beside its two views.

    They are the views that training would make, without the normalisation. Channels beyond the
    third are not shown.

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
    args = replace(args)
    inputs = open_inputs(args)
    assert args.image_size is not None
    assert args.augmentation is not None
    channels = args.in_chans
    views = TwoViews(
        args.image_size, args.augmentation, seed=args.seed, in_chans=channels,
        mean=[0.0] * channels, std=[1.0] * channels,
    )  # fmt: skip
    epoch, rows = inputs.batches.batch(0)
    images, rows = _first_images(inputs, rows[:count])
    x, x_prime = views.colour(views.crop(images, rows, epoch), rows, epoch)
    grid = [
        [_fit(image, args.image_size), *((v * 255).round().byte() for v in pair)]
        for image, *pair in zip(images, x, x_prime, strict=True)
    ]
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        _picture(grid).save(path)
    except OSError as error:
        raise ValueError(
            f"preview must be a file that can be written, got {path}: {error}."
        ) from None
    return path


def _first_images(
    inputs: Inputs, rows: NDArray[np.int64]
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


def _picture(grid: list[list[Tensor]]) -> Image.Image:
    side = grid[0][0].shape[-1]
    factor = -(-LEAST_SIDE // side)
    step = side * factor + GAP
    sheet = Image.new("RGB", (GAP + 3 * step, GAP + len(grid) * step), "white")
    for row, line in enumerate(grid):
        for column, image in enumerate(line):
            shown = image[:3] if len(image) >= 3 else image[:1].repeat(3, 1, 1)
            tile = Image.fromarray(shown.permute(1, 2, 0).contiguous().numpy())
            tile = tile.resize((side * factor, side * factor), Image.Resampling.NEAREST)
            sheet.paste(tile, (GAP + column * step, GAP + row * step))
    return sheet
