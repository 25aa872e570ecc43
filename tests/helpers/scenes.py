"""Small scenes whose pixels have classes, as data sets with masks."""

from __future__ import annotations

import io
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from datasets import ClassLabel, Dataset, Features, List, Value
from datasets import Image as ImageFeature
from encoders import vicreg
from numpy.typing import NDArray
from PIL import Image

HEIGHT, WIDTH, VOID = 32, 48, 7
COLOURS = np.array([[40, 90, 200], [60, 160, 60], [200, 60, 50]])


def scene(number: int) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
    """Pixels (32, 48, 3) and classes (32, 48): areas of three colours, the first row void."""
    random = np.random.default_rng(number)
    classes = np.zeros((HEIGHT, WIDTH), np.uint8)
    classes[random.integers(8, 24) :] = 1
    left = random.integers(0, 32)
    classes[8:24, left : left + 16] = 2
    noise = random.integers(-40, 40, (HEIGHT, WIDTH, 3))
    image = (COLOURS[classes] + noise).clip(0, 255).astype(np.uint8)
    classes[0] = VOID
    return image, classes


def png(pixels: NDArray[Any] | Image.Image, kind: str = "PNG") -> bytes:
    buffer = io.BytesIO()
    picture = pixels if isinstance(pixels, Image.Image) else Image.fromarray(pixels)
    picture.save(buffer, kind)
    return buffer.getvalue()


def masks_of(numbers: Sequence[int]) -> list[bytes]:
    return [png(scene(number)[1]) for number in numbers]


def write_scenes(
    folder: Path, sizes: Mapping[str, int], spoil: Callable[[list[bytes]], Any] | None = None
) -> Path:
    """A parquet data set with columns image and mask; a function may spoil the training masks."""
    start = 0
    for split, size in sizes.items():
        numbers = range(start, start + size)
        masks: Any = masks_of(numbers)
        if spoil is not None and split == "train":
            spoil(masks)
        columns = {"image": [png(scene(k)[0]) for k in numbers], "mask": masks}
        rows = {name: [{"bytes": cell, "path": None} for cell in cells]
                for name, cells in columns.items()}  # fmt: skip
        table = Dataset.from_dict(
            rows, features=Features({name: ImageFeature() for name in columns})
        )
        folder.mkdir(parents=True, exist_ok=True)
        table.to_parquet(str(folder / f"{split}.parquet"))
        start += size
    return folder


def write_map_encoder(directory: Path, **model_args: Any) -> Path:
    """An untrained encoder; by default of images of 64 x 64 pixels, with a map of 8 x 8."""
    model = vicreg(**(model_args or {"output_stride": 8}))
    assert model.config.pretrained_cfg is not None
    side = 224 if model_args else 64
    model.config.pretrained_cfg |= {"input_size": [3, side, side], "crop_pct": 1.0}
    model.save_pretrained(directory, include_expander=False)
    return directory


def write_boxes(folder: Path) -> Path:
    """A parquet data set of scenes whose house is an object with a box (x, y, width, height)."""
    kinds = {
        "bbox": List(List(Value("float32"))),
        "category": List(ClassLabel(names=["house", "tree"])),
    }
    for split, numbers in {"train": range(6), "test": range(6, 10)}.items():
        rows = []
        for k in numbers:
            image, classes = scene(k)
            y, x = np.nonzero(classes == 2)
            box = [x.min(), y.min(), np.ptp(x) + 1, np.ptp(y) + 1]
            objects = {"bbox": [[float(side) for side in box]], "category": [k % 2]}
            rows.append({"image": {"bytes": png(image), "path": None}, "objects": objects})
        table = Dataset.from_list(
            rows, features=Features({"image": ImageFeature(), "objects": kinds})
        )
        folder.mkdir(parents=True, exist_ok=True)
        table.to_parquet(str(folder / f"{split}.parquet"))
    return folder
