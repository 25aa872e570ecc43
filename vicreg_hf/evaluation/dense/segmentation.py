"""How well a linear head on an encoder's feature maps tells the class of each pixel.

Shapes: N training and M test images, h x w positions of a map, H x W pixels, K classes.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F

from vicreg_hf.evaluation.dense.head import LEARNING_RATES, FeatureMaps, TrainedHead, train_head
from vicreg_hf.evaluation.dense.masks import Masks
from vicreg_hf.evaluation.measurements import Case, Measurement, Segmented
from vicreg_hf.evaluation.task import Task
from vicreg_hf.features.cache import Features, cached_features
from vicreg_hf.features.encoders import Encoder
from vicreg_hf.features.maps import map_encoder
from vicreg_hf.metrics.segmentation import Overlaps, pixel_confusion
from vicreg_hf.runtime.distributed import failing_together
from vicreg_hf.runtime.files import writing

EPOCHS, BATCH_SIZE, WEIGHT_DECAY = 50, 16, 1e-4
CASES = 3
"""Images that are shown of the best, and as many of the worst."""
CELL = 4
"""Side in pixels to which the cells of a map of pixels are shrunk."""
PROTOCOL, MEAN_IOU = "segmentation", "segmentation mIoU"


@dataclass(frozen=True)
class Found:
    """A trained head, and how it did on the test images."""

    trained: TrainedHead
    maps: FeatureMaps
    """The maps of the M test images."""
    rows: Tensor
    """(M,) their rows."""
    overlaps: Overlaps
    measurement: Measurement


def segment(task: Task) -> None:
    """Train and measure a head on the encoder of a task; every process must call this."""
    found = measure_maps(task, task.encoder)
    if found is None or task.masks is None:
        return
    overlaps, seed, names = found.overlaps, task.args.seed, task.masks.names
    low, high = overlaps.accuracy_interval(seed=seed, resamples=task.args.num_resamples)
    accuracy = Measurement(
        PROTOCOL, "segmentation pixel accuracy", overlaps.accuracy(), len(found.rows), seed,
        found.measurement.settings, low, high,
    )  # fmt: skip
    task.measurements += [found.measurement, accuracy]
    if task.args.save_masks is not None:
        _save_masks(task, found, Path(task.args.save_masks))
    task.segmented = Segmented(names, found.measurement.details["classes"], _cases(task, found))


def measure_maps(task: Task, encoder: Encoder, name: str = MEAN_IOU) -> Found | None:
    """Train a head on the maps of an encoder and measure it on the test images.

    Every process must call this.

    Args:
        name: of the measurement.

    Returns:
        What was found; None in other processes than the main one.

    Raises:
        ValueError: the encoder has no feature map, or the maps do not fit into memory.
        FloatingPointError: no learning rate trains.
    """
    args, masks = task.args, task.masks
    assert masks is not None
    pixels_of_view = math.prod(encoder.data_config["input_size"][1:])
    encoder = map_encoder(encoder, input_size(task))
    assert encoder.map_size is not None
    at_once = args.batch_size * pixels_of_view // math.prod(input_size(task))
    with failing_together(task.device):
        if task.accelerator.is_main_process:  # which alone keeps the maps
            _check_memory(task, encoder)
    features = cached_features(
        encoder, {part: task.part(part).split for part in masks.samples}, Path(args.cache_dir),
        task.accelerator, batch_size=max(1, at_once), num_workers=args.num_workers,
        bf16=args.bf16, max_bad_fraction=args.max_bad_fraction, say=lambda _: None,
        dtype="float16",
    )  # fmt: skip
    with failing_together(task.device):
        if not task.accelerator.is_main_process:
            return None
        train, test = (_with_mask(task, masks, part, features[part]) for part in features)
        assert masks.learned is not None
        rates = LEARNING_RATES if args.lr_head is None else (args.lr_head,)
        chosen: dict[str, Any] = {
            "epochs": args.epochs or EPOCHS, "batch_size": args.train_batch_size or BATCH_SIZE,
            "weight_decay": WEIGHT_DECAY if args.weight_decay is None else args.weight_decay,
        }  # fmt: skip
        trained = train_head(
            FeatureMaps(train.x, encoder.map_size), masks.learned.take(train.rows),
            len(masks.names), learning_rates=rates, seed=args.seed, device=task.device, **chosen,
        )  # fmt: skip
        maps = FeatureMaps(test.x, encoder.map_size)
        overlaps = Overlaps.of(
            pixel_confusion(_predict(trained, maps, place, truth.shape), truth, len(masks.names))
            for place, row in enumerate(test.rows.tolist())
            for truth in [masks.classes("test", row)]
        )
        settings = chosen | {
            "image_size": "x".join(map(str, input_size(task))),
            "map": "x".join(map(str, encoder.map_size)), "learning_rate": trained.learning_rate,
            "void": ",".join(map(str, sorted(masks.void))) or "none",
        }  # fmt: skip
        measured = _measurement(name, overlaps, masks.names, trained, settings, task)
        return Found(trained, maps, test.rows, overlaps, measured)


def input_size(task: Task) -> tuple[int, int]:
    """Height and width to which a task's images are resized."""
    height, width = task.encoder.data_config["input_size"][1:]
    return task.args.map_input or (height, width)


def _check_memory(task: Task, encoder: Encoder) -> None:
    """Refuse maps that do not fit into memory, twice over while they are read.

    Raises:
        ValueError: says how much they take.
    """
    images = sum(len(task.part(part).split) for part in ("train", "test"))
    needed, free = 2 * 2 * images * encoder.num_features, psutil.virtual_memory().available
    if needed > free:
        raise ValueError(
            f"protocol segmentation keeps the maps of {images} images in memory, which take "
            f"{needed / 2**30:.1f} GiB while they are read, and {free / 2**30:.1f} GiB are free; "
            "give a smaller --image_size, or a part such as --train_split train[:20%]."
        )


def _with_mask(task: Task, masks: Masks, part: str, features: Features) -> Features:
    """The maps of images whose masks can be used, and that all encoders can use."""
    rows = masks.usable(part, features.rows)
    kept = torch.isin(features.rows, rows[torch.isin(rows, task.usable[part].rows)])
    if not bool(kept.any()):
        raise ValueError(f"protocol segmentation needs images with masks, and "
                         f"{task.part(part).split.name} has none that can be used.")  # fmt: skip
    if bool(kept.all()):
        return features
    return Features(features.x[kept], features.rows[kept])


def _predict(trained: TrainedHead, maps: FeatureMaps, place: int, shape: Sequence[int]) -> Tensor:
    """(H, W) classes of a test image, on the CPU."""
    x = maps.rows(torch.tensor([place]), trained.head.weight.device)[0]
    return trained.head.predict(x, maps.size, shape).cpu()


def _measurement(
    name: str, overlaps: Overlaps, names: Sequence[str], trained: TrainedHead, settings: Any,
    task: Task,
) -> Measurement:  # fmt: skip
    lows, highs = overlaps.iou_intervals(seed=task.args.seed, resamples=task.args.num_resamples)
    shown = (overlaps.true > 0).sum(0)
    classes = {
        label: {"iou": _known(iou), "low": _known(low), "high": _known(high), "images": int(count)}
        for label, iou, low, high, count in zip(
            names, overlaps.iou(), lows[:-1], highs[:-1], shown, strict=True
        )
    }
    tried = [{"learning_rate": rate, "validation_miou": value}
             for rate, value in trained.validation.items()]  # fmt: skip
    return Measurement(
        PROTOCOL, name, overlaps.mean_iou(), len(overlaps.true), task.args.seed, settings,
        float(lows[-1]), float(highs[-1]), details={"classes": classes, "tried": tried},
    )  # fmt: skip


def _known(value: float) -> float | None:
    return None if math.isnan(value) else float(value)


def _save_masks(task: Task, found: Found, directory: Path) -> None:
    """Write the predicted class numbers of every test image as PNG, of 8 bits where they fit."""
    assert task.masks is not None
    values = task.masks.values
    with writing(directory, "save_masks"):
        directory.mkdir(parents=True, exist_ok=True)
        for place, row in enumerate(found.rows.tolist()):
            shape = task.masks.classes("test", row).shape
            numbers = values[_predict(found.trained, found.maps, place, shape).numpy()]
            kind = np.uint8 if values.max() < 2**8 else np.uint16
            Image.fromarray(numbers.astype(kind)).save(directory / f"{row:06d}.png")


def _cases(task: Task, found: Found) -> list[Case]:
    """The test images on which the head did worst, the worst first, and those on which best."""
    assert task.masks is not None
    scores = found.overlaps.image_iou()
    order = [int(place) for place in np.argsort(scores, kind="stable")
             if not np.isnan(scores[place])]  # fmt: skip
    number = min(CASES, len(order) // 2) or len(order)
    cases = []
    for place in order[:number] + (order[-number:][::-1] if len(order) > number else []):
        row = int(found.rows[place])
        truth = task.masks.classes("test", row)
        (image,) = task.part("test").split.read([row])
        predicted = _predict(found.trained, found.maps, place, truth.shape)
        cases.append(Case(row, float(scores[place]), image, truth, predicted))
    return cases


def pixels_of_cells(encoder: Encoder, size: tuple[int, int]) -> Encoder:
    """An encoder whose maps are the pixels below another's positions, shrunk to `CELL` a side.

    Args:
        size: height and width to which images are resized.
    """
    module = _Cells(map_encoder(encoder, size).map_size).eval()
    identity = {"pixels of cells": list(module.size), "of": encoder.identity}
    return replace(encoder, module=module, identity=identity)


class _Cells(nn.Module):
    """(B, C, H, W) as (B, 16 C, h, w), the pixels of each cell."""

    def __init__(self, size: Any) -> None:
        super().__init__()
        self.size: tuple[int, int] = size

    def forward(self, x: Tensor) -> Tensor:
        height, width = self.size
        shrunk = F.adaptive_avg_pool2d(x, (CELL * height, CELL * width))
        return F.pixel_unshuffle(shrunk, CELL)
