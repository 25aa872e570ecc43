"""A picture of images beside the views that a run would make of them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from PIL import Image, ImageOps
from torch import Tensor

from vicreg_hf.settings.pretraining import PretrainingArguments
from vicreg_hf.training.building.data import open_training_data
from vicreg_hf.training.building.second_branch import unnormalised_views
from vicreg_hf.training.building.starts import default_side, resolve_starts

IMAGES = 8
"""Images that are shown at most."""
GAP = 4
"""White pixels between pictures."""
LEAST_SIDE = 96
"""Side in pixels up to which smaller views are enlarged."""


def draw_preview(args: PretrainingArguments, path: str | Path) -> Path:
    """Draw the first images of a run's first step, each beside its views.

    They are the views that training would make, without the normalisation.

    Args:
        path: a file name that ends in .png or another extension that PIL writes.

    Returns:
        The path.

    Raises:
        ValueError: an invalid setting, or a path that cannot be written.
    """
    path = Path(path)
    if path.suffix.lower() not in Image.registered_extensions():
        raise ValueError(f"preview must be a file such as views.png, got {str(path)!r}.")
    args, starts = resolve_starts(args)
    args, inputs = open_training_data(args, default_side=default_side(starts))
    views = unnormalised_views(args, inputs.pairs)
    epoch, rows = inputs.batches.batch(0)
    images = inputs.first_images(rows[:IMAGES].tolist())
    rows = rows[: len(images)]
    made = views.transform_crops(views.crop(images, rows, epoch), rows, epoch)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        picture_of_views(images, made).save(path)
    except OSError as error:
        raise ValueError(
            f"preview must be a file that can be written, got {path}: {error}."
        ) from None
    return path


def picture_of_views(images: Sequence[Tensor], views: Sequence[Tensor]) -> Image.Image:
    """A row for each image: the image in a square, and then each of its views.

    Views are enlarged by whole numbers, pixel by pixel, and smaller ones stand in the middle.
    Channels beyond the third are not shown.

    Args:
        images: B tensors of (C, H, W) uint8, of any sizes.
        views: one (B, C, S, S) tensor or more of levels in [0, 1], each of any S.
    """
    side = max(view.shape[-1] for view in views)
    tile = side * -(-LEAST_SIDE // side)
    step = tile + GAP
    sheet = Image.new("RGB", (GAP + (1 + len(views)) * step, GAP + len(images) * step), "white")
    levels = [(view * 255).round().byte() for view in views]
    for row, (image, *own) in enumerate(zip(images, *levels, strict=True)):
        square = ImageOps.pad(picture_of(image), (side, side), Image.Resampling.BICUBIC, "white")
        for column, shown in enumerate([square, *map(picture_of, own)]):
            large = ImageOps.scale(shown, tile // shown.width, Image.Resampling.NEAREST)
            margin = GAP + (tile - large.width) // 2
            sheet.paste(large, (margin + column * step, margin + row * step))
    return sheet


def picture_of(pixels: Tensor) -> Image.Image:
    """RGB of (C, H, W) uint8; grey where there are fewer than three channels."""
    shown = pixels[:3] if len(pixels) >= 3 else pixels[:1].expand(3, -1, -1)
    return Image.fromarray(shown.permute(1, 2, 0).contiguous().numpy())
