"""Reading again the images that features were extracted from, to show them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from vicreg_hf.data.columns.base import BadImage
from vicreg_hf.data.opening.dataset import open_dataset
from vicreg_hf.data.splits import ImageSplit, image_split
from vicreg_hf.features.encoders import Encoder
from vicreg_hf.runtime.checks import read_range


def open_pictures(record: Mapping[str, Any], encoder: Encoder) -> dict[str, ImageSplit]:
    """Open the splits of the data set that features were extracted from.

    Args:
        record: of the extraction, as `read_record` gives it.
        encoder: that of the features.

    Raises:
        ValueError: the data set is no longer where it was, or has other images by now.
    """
    name = record.get("dataset_name")
    if name is None:
        raise ValueError(
            "the features must name their data set, and an earlier version extracted them, which "
            "did not note it; extract them anew."
        )
    if Path(name).is_absolute() and not Path(name).exists():
        raise ValueError(
            "the data set must be where it was when its features were extracted, and there is no "
            f"file or folder {name}; move it back, or extract it anew into the same output_dir."
        )
    tables = open_dataset(name, record.get("dataset_config_name"))
    splits = {}
    for split, recorded in record["splits"].items():
        splits[split] = image_split(
            tables, split, dataset_name=name, channels=encoder.in_chans, sound=encoder.sound,
            image_column=record.get("image_column"),
            value_range=read_range("value_range", recorded.get("value_range")),
        )  # fmt: skip
        if splits[split].fingerprint() != recorded:
            raise ValueError(
                f"the data set must have the images that the features are of, and split {split} of "
                f"{name} has others by now; extract its features anew."
            )
    return splits


def picture(splits: Mapping[str, ImageSplit], split: str, row: int) -> Tensor | None:
    """An image (C, H, W) uint8 of any size; None where it cannot be read."""
    if split not in splits:
        return None
    (sample,) = splits[split].try_read([row])
    return None if isinstance(sample, BadImage) else sample.content
