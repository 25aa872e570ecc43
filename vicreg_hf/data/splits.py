"""Splits of data sets of images, and reading them.

Shapes: N images, C channels, H x W pixels.
"""

from __future__ import annotations

from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any

import datasets
from torch import Tensor

from vicreg_hf.data.classes import find_classes
from vicreg_hf.data.columns.base import sampled_rows
from vicreg_hf.data.columns.finding import find_image_column
from vicreg_hf.data.columns.image_files import ValueRange
from vicreg_hf.data.columns.images import ImageColumn
from vicreg_hf.data.columns.spectrograms import SpectrogramColumn, SpectrogramSettings
from vicreg_hf.data.opening.slicing import Splits, check_held_out, held_out_names
from vicreg_hf.data.samples import Samples
from vicreg_hf.runtime.checks import range_text


@dataclass
class ImageSplit(Samples[Tensor]):
    """One split: images, encoded, and labels where the data has them."""

    labels: Tensor | None = None
    """(N,) classes from 0; -1 where an image has none. None where none has one."""
    label_names: tuple[str, ...] = ()

    @property
    def value_range(self) -> ValueRange | None:
        """The values that become the levels 0 and 255, in images of more than 8 bits."""
        return getattr(self.column, "value_range", None)

    @property
    def num_images(self) -> int:
        """Its length; that of a stream may be unknown."""
        return len(self)

    def fingerprint(self) -> dict[str, Any]:
        """Its length and a digest of images all over it, which tell it from other data sets."""
        digest = self.column.digest(self.cells(self.sampled_rows()))
        limits = self.value_range
        deep = {} if limits is None else {"value_range": range_text(limits)}
        return {"images": len(self), "sha256": digest} | deep

    def sampled_rows(self) -> list[int]:
        """Rows all over the split, by which it is known again."""
        return sampled_rows(len(self))


def image_split(
    splits: Splits,
    name: str,
    *,
    dataset_name: str,
    image_column: str | None = None,
    label_column: str | None = None,
    channels: int = 3,
    value_range: ValueRange | None = None,
    sound: SpectrogramSettings | None = None,
    column: ImageColumn | None = None,
) -> ImageSplit:
    """Pick a split and its columns.

    Args:
        column: reads the images; None takes the table's own column, as `open_column` does.
        value_range: as in `ImageColumn`; None takes that of a sample of the split.
        sound: how a column of sound is seen, where there are no images.

    Raises:
        ValueError: no such split, no rows, no such column.
    """
    if name not in splits:
        raise ValueError(f"split must be one of {', '.join(splits)}, got {name!r}.")
    table = splits[name]
    if len(table) == 0:
        raise ValueError(f"a split must have rows, got none in split {name!r} of {dataset_name}.")
    found = column or open_column(table.features, image_column, channels=channels, sound=sound)
    labels, names = find_classes(splits, table, label_column)
    if label_column is not None and labels is None:
        raise ValueError(
            f"label_column must hold a class in some row, got none in {label_column!r} of "
            f"{dataset_name} ({name}); choose another or leave it out."
        )
    split = ImageSplit(found.prepare(table), found, f"{dataset_name} ({name})", labels, names)
    if isinstance(found, ImageColumn):
        found = replace(found, value_range=value_range)
        split.column = found.with_range(split.cells(split.sampled_rows()))
    return split


def open_column(
    features: datasets.Features,
    wanted: str | None,
    *,
    channels: int = 3,
    sound: SpectrogramSettings | None = None,
) -> ImageColumn | SpectrogramColumn:
    """The column of images, or of sound, which is seen as spectrograms of one channel.

    Raises:
        ValueError: as `find_image_column`; channels that do not fit; soundfile is not installed.
    """
    found = find_image_column(features, wanted)
    if isinstance(features[found], datasets.Audio):
        return SpectrogramColumn(found, features[found], sound or SpectrogramSettings())
    if isinstance(features[found], datasets.Array2D) and channels != 1:
        raise ValueError(
            f"arrays of two dimensions are images of one channel, got {found!r} for {channels} "
            """channels; give --model_args '{"in_chans": 1}'."""
        )
    return ImageColumn(found, features[found], channels)


def held_out_split(
    splits: Splits, wanted: str | None, train: str, **columns: Any
) -> tuple[ImageSplit | None, str | None]:
    """The split to measure on, and its name.

    Args:
        wanted: None takes the first of `EVAL_SPLITS` that has rows, the columns and labels, and
            none of the images that are trained on.
        train: the split that is trained on.
        **columns: as for `image_split`.

    Raises:
        ValueError: the split asked for cannot be used.
    """
    if wanted is not None:
        check_held_out(splits, wanted, train)
        return image_split(splits, wanted, **columns), wanted
    for name in held_out_names(splits, train):
        with suppress(ValueError):
            found = image_split(splits, name, **columns)
            if found.labels is not None:
                return found, name
    return None, None
