"""What the kNN monitor measures, where, and how often it reads the images for it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from datasets import ClassLabel, DatasetDict
from pictures import photographs, png, table_of
from torch import Tensor

from vicreg_hf.data import load_in_memory
from vicreg_hf.evaluation import knn_accuracy
from vicreg_hf.monitor import KNNMonitor
from vicreg_hf.sources import ImageSplit, image_split

CPU, META = torch.device("cpu"), torch.device("meta")
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
BAD = (2, 11)


def labelled(images: Tensor, name: str, bad: tuple[int, ...] = ()) -> ImageSplit:
    """Images and the photograph that each is a piece of."""
    cells: list[bytes | None] = [png(image) for image in images]
    for row in bad:
        cells[row] = b"<html>404</html>"
    table = table_of(cells, label=[k % 2 for k in range(len(images))])
    table = table.cast_column("label", ClassLabel(names=["temple", "flower"]))
    return image_split(DatasetDict({name: table}), name, dataset_name="pieces")


@pytest.fixture(scope="module")
def train() -> ImageSplit:
    return labelled(photographs(40, 32, 32), "train")


@pytest.fixture(scope="module")
def held_out() -> ImageSplit:
    return labelled(photographs(70, 32, 32)[40:], "test", BAD)


def monitor_of(train: ImageSplit, held_out: ImageSplit, **settings: Any) -> KNNMonitor:
    given = {"image_size": 32, "crop_pct": 1.0, "mean": MEAN, "std": STD, "num_workers": 0}
    images = load_in_memory(train)
    assert images is not None
    monitor = KNNMonitor.create(train, images, held_out, **given | settings)
    assert monitor is not None
    return monitor


def test_pixels_are_compared_in_single_precision(train: ImageSplit, held_out: ImageSplit) -> None:
    def features(split: ImageSplit) -> Tensor:
        images, _ = split.read_or_replace(range(len(split)))
        mean, std = (torch.tensor(values).view(3, 1, 1) for values in (MEAN, STD))
        return ((torch.stack(images) / 255 - mean) / std).flatten(1)

    assert train.labels is not None
    assert held_out.labels is not None
    expected = knn_accuracy(
        features(train), train.labels, features(held_out), held_out.labels, k=20
    )
    assert monitor_of(train, held_out).pixels(CPU) == expected
    assert 0.5 < expected < 1


def test_pixels_are_compared_on_the_device_given(train: ImageSplit, held_out: ImageSplit) -> None:
    with pytest.raises((RuntimeError, NotImplementedError), match="meta tensor"):
        monitor_of(train, held_out).pixels(META)  # which does not compute


def test_pixels_of_large_images_are_not_compared(train: ImageSplit, held_out: ImageSplit) -> None:
    assert monitor_of(train, held_out, image_size=65).pixels(CPU) is None
