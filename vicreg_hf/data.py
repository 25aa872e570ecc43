"""Data sets to batches of uint8 images, in an order that is a function of (seed, step).

Small images of one size are decoded once and stay in memory; others are decoded and cropped by
loading workers. Which of the two is in use changes the speed and nothing else.

Shapes: B images per process, H x W source pixels, S side of a view.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import torch
from datasets.exceptions import DatasetsError
from huggingface_hub.errors import HfHubHTTPError
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Subset
from torchvision.transforms.v2 import functional as tv

from vicreg_hf.demo import load_demo
from vicreg_hf.images import ImageError, decode_image
from vicreg_hf.randomness import permutation
from vicreg_hf.views import TwoViews

DEMO = "demo"
EVAL_SPLITS = ("test", "validation", "valid", "val")
SMALL_IMAGE = 64
"""Side in pixels up to which images are taken at their own size, with the `cifar` views."""
MEMORY_BUDGET = 4 * 2**30
"""Bytes of decoded pixels a process keeps in memory at most."""

Batch = tuple[int, NDArray[np.int64]]
"""The epoch and the sample indices of this process's rows."""


@dataclass
class ImageSplit:
    """One split: encoded images, and labels where the data has them."""

    table: datasets.Dataset
    column: str
    name: str
    labels: Tensor | None = None
    """(N,) classes from 0."""
    label_names: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.table)

    def fingerprint(self) -> dict[str, Any]:
        """What tells one data set from another: its length, and a digest of its first images."""
        digest = hashlib.sha256()
        for cell in self.table[: min(8, len(self))][self.column]:
            digest.update(_encoded_bytes(cell))
        return {"images": len(self), "sha256": digest.hexdigest()}

    def read(self, rows: Sequence[int]) -> list[Tensor]:
        """Decode some rows.

        Returns:
            One (3, H, W) uint8 tensor per row.

        Raises:
            ImageError: names the row.
        """
        images = []
        for row, cell in zip(rows, self.table[list(rows)][self.column], strict=True):
            try:
                images.append(decode_image(_encoded_bytes(cell)))
            except ImageError as error:
                raise ImageError(
                    f"row {row} of {self.name}, column {self.column}: {error}"
                ) from None
        return images


def _encoded_bytes(cell: dict[str, Any] | None) -> bytes:
    if cell is None:
        return b""
    if cell["bytes"] is not None:
        return cell["bytes"]
    try:
        return Path(cell["path"]).read_bytes()
    except (OSError, TypeError) as error:
        raise ImageError(f"the file cannot be read: {error}") from error


def open_dataset(name: str, config_name: str | None = None) -> datasets.DatasetDict:
    """The splits of `demo`, a Hub id, or a local folder.

    Raises:
        ValueError: nothing there that `datasets` can load.
    """
    if name == DEMO:
        return load_demo()
    try:
        folder = Path(name)
        if (folder / "dataset_dict.json").is_file() or (folder / "state.json").is_file():
            loaded = datasets.load_from_disk(name)
        else:
            loaded = datasets.load_dataset(name, config_name)
    except (
        OSError,
        ValueError,
        RuntimeError,
        HfHubHTTPError,
        DatasetsError,
    ) as e:
        reason = next(iter(str(e).strip().splitlines()), type(e).__name__)
        raise ValueError(
            f"dataset_name must be {DEMO}, a data set on the Hub or a local folder that "
            f"datasets.load_dataset takes, got {name!r}: {reason}"
        ) from e
    if isinstance(loaded, datasets.Dataset):
        loaded = datasets.DatasetDict({str(loaded.split or "train"): loaded})
    if not isinstance(loaded, datasets.DatasetDict):
        raise ValueError(f"dataset_name must give map-style splits, got {type(loaded).__name__}.")
    return loaded


def find_image_column(features: datasets.Features, wanted: str | None) -> str:
    """The column to train on: the one asked for, or the only one that holds images.

    Raises:
        ValueError: no such column, or none or several to choose from.
    """
    found = [name for name, feature in features.items() if isinstance(feature, datasets.Image)]
    if wanted is not None:
        if wanted in found:
            return wanted
        raise ValueError(
            f"image_column must name a column of images, got {wanted!r}; "
            f"columns of images: {', '.join(found) or 'none'}; all: {', '.join(features)}."
        )
    if len(found) == 1:
        return found[0]
    raise ValueError(
        f"image_column must be given unless exactly one column holds images, got {len(found)}; "
        f"columns of images: {', '.join(found) or 'none'}; all: {', '.join(features)}."
    )


def find_label_column(features: datasets.Features, wanted: str | None) -> str | None:
    """The column of classes: the one asked for, else the only ClassLabel, else none."""
    if wanted is not None:
        if wanted in features:
            return wanted
        raise ValueError(
            f"label_column must name a column, got {wanted!r}; columns: {', '.join(features)}."
        )
    found = [name for name, kind in features.items() if isinstance(kind, datasets.ClassLabel)]
    return found[0] if len(found) == 1 else None


def image_split(
    splits: datasets.DatasetDict,
    name: str,
    *,
    dataset_name: str,
    image_column: str | None = None,
    label_column: str | None = None,
) -> ImageSplit:
    """Pick a split and its columns.

    Raises:
        ValueError: no such split, no rows, no such column.
    """
    if name not in splits:
        raise ValueError(f"split must be one of {', '.join(map(str, splits))}, got {name!r}.")
    table = splits[name]
    if len(table) == 0:
        raise ValueError(f"a split must have rows, got none in split {name!r} of {dataset_name}.")
    column = find_image_column(table.features, image_column)
    label = find_label_column(table.features, label_column)
    labels, names = (None, ()) if label is None else _labels(table, label)
    if label_column is not None and labels is None:
        raise ValueError(
            f"label_column must hold a class in every row, got rows of {dataset_name} ({name}) "
            f"without one in {label_column!r}; choose another or leave it out."
        )
    table = table.select_columns([column]).cast_column(column, datasets.Image(decode=False))
    return ImageSplit(table, column, f"{dataset_name} ({name})", labels, names)


def _labels(table: datasets.Dataset, column: str) -> tuple[Tensor | None, tuple[str, ...]]:
    """Classes from 0 and their names; None where a row has no class (null, or -1)."""
    values, feature = (
        table.select_columns([column]).with_format("arrow")[:][column],
        table.features[column],
    )
    if values.null_count:
        return None, ()
    values = values.to_numpy()
    if isinstance(feature, datasets.ClassLabel):
        if values.min() < 0:
            return None, ()
        return torch.from_numpy(values.astype(np.int64)), tuple(feature.names)
    names, classes = np.unique(values, return_inverse=True)
    return torch.as_tensor(classes, dtype=torch.long), tuple(str(name) for name in names)


def held_out_split(
    splits: datasets.DatasetDict, wanted: str | None, train: str, **columns: Any
) -> tuple[ImageSplit | None, str | None]:
    """The split to measure on, and its name.

    Args:
        wanted: None takes the first of `EVAL_SPLITS` that has rows, the columns and labels.
        train: the split that is trained on.
        **columns: as for `image_split`.

    Raises:
        ValueError: the split asked for cannot be used.
    """
    if wanted is not None:
        return image_split(splits, wanted, **columns), wanted
    for name in EVAL_SPLITS:
        if name in splits and name != train:
            with suppress(ValueError):
                found = image_split(splits, name, **columns)
                if found.labels is not None:
                    return found, name
    return None, None


def load_in_memory(split: ImageSplit, budget: int = MEMORY_BUDGET) -> Tensor | None:
    """Decode a whole split.

    Returns:
        (N, 3, H, W) uint8, or None where sizes differ or the pixels exceed the budget in bytes.
    """
    first = split.read([0])[0]
    if first.numel() * len(split) > budget:
        return None
    images = torch.empty((len(split), *first.shape), dtype=torch.uint8)
    step = 256
    for start in range(0, len(split), step):
        rows = range(start, min(start + step, len(split)))
        decoded = split.read(rows)
        if any(image.shape != first.shape for image in decoded):
            return None
        torch.stack(decoded, out=images[start : rows.stop])
    return images


class GlobalBatches:
    """Which samples each step sees: a pure function of (seed, step).

    Every epoch is a new order of all samples, its last incomplete batch left out. A process takes
    a run of consecutive rows of every micro-batch, so that the micro-batches are the same rows on
    any number of processes. Without micro-batches, gathering by rank restores the batch.

    Args:
        num_samples: N.
        batch_size: global; rank and world_size say which part is this process's.
        micro_batch_size: global; None is the whole batch.

    Raises:
        ValueError: fewer samples than a batch, or a batch that processes cannot share evenly.
    """

    def __init__(
        self,
        num_samples: int,
        batch_size: int,
        *,
        seed: int,
        rank: int = 0,
        world_size: int = 1,
        micro_batch_size: int | None = None,
    ) -> None:
        least, most = 2 * world_size, num_samples // world_size * world_size
        if most < least:
            raise ValueError(
                f"a data set must hold at least 2 images per process, got {num_samples} images and "
                f"num_processes={world_size}."
            )
        if num_samples < batch_size:
            raise ValueError(
                f"batch_size must not exceed the number of images, got batch_size={batch_size} "
                f"and {num_samples} images; use at most {most}."
            )
        if batch_size % world_size:
            nearest = min(max(round(batch_size / world_size) * world_size, least), most)
            raise ValueError(
                f"batch_size must divide evenly over processes, got batch_size={batch_size} and "
                f"num_processes={world_size}; the nearest that does is {nearest}."
            )
        if batch_size < least:
            raise ValueError(
                "batch_size must give every process at least 2 images, got "
                f"batch_size={batch_size} and num_processes={world_size}; "
                f"use at least {least}."
            )
        self.num_samples, self.batch_size, self.seed = num_samples, batch_size, seed
        self.steps_per_epoch = num_samples // batch_size
        self.micro_batch_size = min(micro_batch_size or batch_size, batch_size)
        if self.micro_batch_size % world_size:
            nearest = max(round(self.micro_batch_size / world_size), 1) * world_size
            raise ValueError(
                "micro_batch_size must divide evenly over processes, got "
                f"micro_batch_size={self.micro_batch_size} and num_processes={world_size}; "
                f"the nearest that does is {nearest}."
            )
        self.rank, self.world_size = rank, world_size
        self._order = lru_cache(maxsize=2)(self._permutation)

    def _permutation(self, epoch: int) -> NDArray[np.int64]:
        return permutation(self.num_samples, seed=self.seed, epoch=epoch)

    def batch(self, step: int) -> Batch:
        """This process's rows at a step, from 0."""
        epoch, position = divmod(step, self.steps_per_epoch)
        start = position * self.batch_size
        rows = self._order(epoch)[start : start + self.batch_size]
        parts = range(0, self.batch_size, self.micro_batch_size)
        own = [self._own(rows[part : part + self.micro_batch_size]) for part in parts]
        return epoch, np.concatenate(own)

    def _own(self, rows: NDArray[np.int64]) -> NDArray[np.int64]:
        share = len(rows) // self.world_size
        return rows[self.rank * share : (self.rank + 1) * share]


class _Crops(Dataset[Tensor]):
    """Both crops of a sample, cut where it is decoded."""

    def __init__(self, split: ImageSplit, views: TwoViews) -> None:
        self.split, self.views = split, views

    def __getitems__(self, keys: list[tuple[int, int]]) -> list[Tensor]:
        images = self.split.read([index for _, index in keys])
        return [
            self.views.crop(image, index, epoch)
            for image, (epoch, index) in zip(images, keys, strict=True)
        ]


def training_views(
    images: ImageSplit | Tensor,
    batches: GlobalBatches,
    views: TwoViews,
    *,
    steps: range,
    device: torch.device,
    num_workers: int = 0,
) -> Iterator[tuple[Tensor, Tensor]]:
    """The two views of this process's rows at every step, on the device.

    Args:
        images: a split to decode as it goes, or (N, 3, H, W) uint8 in memory.
        steps: steps to yield; starting late resumes exactly.
        num_workers: loading processes; without effect for images in memory.

    Yields:
        Two (B, 3, S, S) float32 tensors.
    """
    if isinstance(images, Tensor):
        for step in steps:
            epoch, rows = batches.batch(step)
            pixels = images[torch.from_numpy(rows)].to(device, non_blocking=True)
            yield views(pixels, rows, epoch)
        return
    loader = DataLoader(
        _Crops(images, views),
        batch_sampler=_Keys(batches, steps),
        num_workers=num_workers,
        collate_fn=torch.stack,
        pin_memory=device.type == "cuda",
        persistent_workers=False,
        prefetch_factor=4 if num_workers else None,
    )
    for step, crops in zip(steps, _one_sentence(loader), strict=True):
        epoch, rows = batches.batch(step)
        yield views.colour(crops.to(device, non_blocking=True), rows, epoch)


def _one_sentence(loader: Iterable[Tensor]) -> Iterator[Tensor]:
    """Pass batches on; of a worker's error only the sentence, not its traceback."""
    try:
        yield from loader
    except ImageError as error:
        sentence = str(error).strip().splitlines()[-1]
        raise ImageError(sentence.split("ImageError: ", 1)[-1]) from None


class _Keys:
    """Batches of (epoch, index), as a DataLoader's batch_sampler."""

    def __init__(self, batches: GlobalBatches, steps: range) -> None:
        self.batches, self.steps = batches, steps

    def __len__(self) -> int:
        return len(self.steps)

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        for step in self.steps:
            epoch, rows = self.batches.batch(step)
            yield [(epoch, int(row)) for row in rows]


def centre_crop(image: Tensor, image_size: int, crop_pct: float) -> Tensor:
    """Resize the shorter side to image_size / crop_pct and cut the middle: the evaluation view.

    Args:
        image: (..., 3, H, W) uint8.

    Returns:
        (..., 3, S, S) uint8.
    """
    if image.shape[-2:] != (image_size, image_size) or crop_pct != 1:
        side = int(image_size / crop_pct)
        image = tv.resize(image, [side], tv.InterpolationMode.BICUBIC, antialias=True)
        image = tv.center_crop(image, [image_size, image_size])
    return image


class _CentreCrops(Dataset[Tensor]):
    def __init__(self, split: ImageSplit, image_size: int, crop_pct: float) -> None:
        self.split, self.image_size, self.crop_pct = split, image_size, crop_pct

    def __len__(self) -> int:
        return len(self.split)

    def __getitems__(self, rows: list[int]) -> list[Tensor]:
        images = self.split.read(rows)
        return [centre_crop(image, self.image_size, self.crop_pct) for image in images]


def evaluation_batches(
    images: ImageSplit | Tensor,
    rows: NDArray[np.int64],
    image_size: int,
    *,
    crop_pct: float = 0.875,
    batch_size: int = 512,
    num_workers: int = 0,
) -> Iterator[Tensor]:
    """The images of some rows, in their order, as (B, 3, S, S) uint8 evaluation views."""
    if isinstance(images, Tensor):
        for part in torch.from_numpy(rows).split(batch_size):
            yield centre_crop(images[part], image_size, crop_pct)
        return
    loader = DataLoader(
        Subset(_CentreCrops(images, image_size, crop_pct), rows.tolist()),
        batch_size=batch_size,
        num_workers=num_workers,
        collate_fn=torch.stack,
    )
    yield from _one_sentence(loader)


def available_cores() -> int:
    """Cores this process may use."""
    with suppress(AttributeError):  # macOS and Windows
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def default_num_workers(num_processes: int) -> int:
    """Loading workers for one of the processes on this machine: its share of the cores."""
    cores = available_cores()
    return max(1, min(16, cores // num_processes - (1 if cores > 2 * num_processes else 0)))
