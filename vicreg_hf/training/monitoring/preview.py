"""A picture of images beside the views that a run would make of them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont, ImageOps
from torch import Tensor

from vicreg_hf.data.columns.base import BadImage
from vicreg_hf.data.streams import ImageStream
from vicreg_hf.features.maps import picture_of
from vicreg_hf.runtime.console import warn
from vicreg_hf.runtime.randomness import Stream, permutation
from vicreg_hf.settings.pretraining import PretrainingArguments
from vicreg_hf.training.building.data import TrainingData, open_training_data
from vicreg_hf.training.building.second_branch import unnormalised_views
from vicreg_hf.training.building.starts import default_side, resolve_starts

IMAGES = 8
"""Images that are shown at most."""
GAP = 4
"""White pixels between pictures."""
LEAST_SIDE = 96
"""Side in pixels up to which smaller views are enlarged."""
CHECKED = 2000
"""Images of larger splits that are decoded, at most, to find those that cannot be."""
FLAT, BLACK = 4 / 255, 8 / 255
"""Spread of levels, and highest level, up to which a view shows nothing."""
FONT = 13
"""Height of text in pixels."""


def draw_preview(
    args: PretrainingArguments, path: str | Path, *, say: Callable[[str], object] = print
) -> Path:
    """Draw the first images of a run's first step, each beside its views.

    They are the views that training would make, without the normalisation. A warning names views
    that show nothing.

    Args:
        say: told how many images, classes and unreadable files there are.
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
    about = describe_images(inputs)
    say(about)
    empty = empty_views(images, made)
    for sentence in empty:
        warn(sentence)
    titles = ["photograph" if inputs.sound is None else "spectrogram"]
    titles += [f"view {number}" for number in range(1, len(made) + 1)]
    sheet = with_titles(picture_of_views(images, made), titles, [about, *empty])
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        sheet.save(path)
    except OSError as error:
        raise ValueError(
            f"preview must be a file that can be written, got {path}: {error}."
        ) from None
    return path


def describe_images(inputs: TrainingData) -> str:
    """A sentence on how many images, classes and unreadable files there are."""
    train = inputs.train
    if isinstance(train, ImageStream):
        return f"{train.name}: a stream, whose images are not counted."
    found = [f"{len(train):,} images"]
    if train.labels is None:
        found.append("no classes")
    else:
        number = len(train.labels[train.labels >= 0].unique())
        found.append(f"{number:,} class{'' if number == 1 else 'es'}")
        if without := int((train.labels < 0).sum()):
            found.append(f"{without:,} without a class")
    if isinstance(inputs.images, Tensor):  # all were read
        inputs.bad.agree(write=False, say=lambda _: None)
        bad, of = len(inputs.bad), ""
    else:
        rows = permutation(len(train), seed=0, epoch=0, stream=Stream.SPLIT)[:CHECKED]
        bad = sum(isinstance(each, BadImage) for each in train.try_each(np.sort(rows).tolist()))
        of = f" of {len(rows):,} looked at" if len(rows) < len(train) else ""
    found.append(f"{bad or 'no'} unreadable file{'' if bad == 1 else 's'}{of}")
    return f"{train.name}: {', '.join(found)}."


def empty_views(images: Sequence[Tensor], views: Sequence[Tensor]) -> list[str]:
    """Sentences on photographs that show nothing, and on views of others that show nothing.

    Args:
        images: B tensors of (C, H, W) uint8.
        views: (B, C, S, S) tensors of levels in [0, 1].
    """
    photographs, lost, sentences = list[str](), list[str](), list[str]()
    for row, (image, *own) in enumerate(zip(images, *views, strict=True), 1):
        if nothing := _nothing(image.float() / 255):
            photographs.append(f"photograph {row} ({nothing})")
            continue
        empty = [(number, _nothing(view.float())) for number, view in enumerate(own, 1)]
        lost += [f"view {n} of photograph {row} ({what})" for n, what in empty if what]
    if photographs:
        sentences.append(f"{', '.join(photographs)} show{'s' * (len(photographs) == 1)} nothing.")
    if lost:
        sentences.append(
            f"{len(lost)} of {len(images) * len(views)} views show nothing, and nothing is learned "
            f"from them: {', '.join(lost)}; choose another --augmentation, or --value_range if the "
            "images have more than 8 bits."
        )
    return sentences


def _nothing(levels: Tensor) -> str | None:
    """What is left of an image (C, H, W) that shows nothing, or None."""
    if bool(levels.max() <= BLACK):
        return "black"
    spread = (levels.amax((1, 2)) - levels.amin((1, 2))).max()
    return "of one colour" if bool(spread <= FLAT) else None


def with_titles(sheet: Image.Image, titles: Sequence[str], lines: Sequence[str]) -> Image.Image:
    """A picture of views below lines of text and the titles of its columns.

    Args:
        sheet: as `picture_of_views` draws it, with a column for each title.
    """
    font = ImageFont.load_default(size=FONT)
    wrapped = [row for line in lines for row in _wrapped(line, sheet.width - 2 * GAP, font)]
    above = GAP + (len(wrapped) + 1) * (FONT + 5)
    whole = Image.new("RGB", (sheet.width, above + sheet.height), "white")
    draw = ImageDraw.Draw(whole)
    for number, text in enumerate(wrapped):
        draw.text((GAP, GAP + number * (FONT + 5)), text, "#333333", font)
    step = (sheet.width - GAP) / len(titles)
    for column, title in enumerate(titles):
        draw.text((GAP + column * step, above - FONT - 3), title, "black", font)
    whole.paste(sheet, (0, above))
    return whole


def _wrapped(
    text: str, width: int, font: ImageFont.FreeTypeFont | ImageFont.ImageFont
) -> list[str]:
    rows = [""]
    for word in text.split():
        longer = f"{rows[-1]} {word}".strip()
        if font.getlength(longer) <= width or not rows[-1]:
            rows[-1] = longer
        else:
            rows.append(word)
    return rows


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
