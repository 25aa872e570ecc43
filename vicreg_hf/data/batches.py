"""Data sets to batches of views.

Small images of one size are decoded once and stay in memory; others are decoded and cropped by
loading workers. This changes the speed and nothing else.

Shapes: B images per process, C channels, H x W source pixels, S side of a view.
"""

from __future__ import annotations

from collections.abc import Generator, Iterable, Iterator
from contextlib import ExitStack, closing
from functools import partial
from itertools import count, islice
from typing import Any, cast

import numpy as np
import torch
from accelerate.utils import send_to_device
from numpy.typing import NDArray
from torch import Tensor
from torchvision.transforms.v2 import functional as tv

from vicreg_hf.data.bad_images import BadImages
from vicreg_hf.data.columns.base import BadImage
from vicreg_hf.data.columns.image_files import ImageError
from vicreg_hf.data.crops import Crops, StepCrops, StreamCrops
from vicreg_hf.data.pairs import PairedSplit, SecondInput
from vicreg_hf.data.sampler import GlobalBatches
from vicreg_hf.data.splits import ImageSplit
from vicreg_hf.data.streams import ImageStream
from vicreg_hf.data.workers import loading, loading_errors, loading_passes, prefetch
from vicreg_hf.runtime.transfer import on_device
from vicreg_hf.views.random_views import RandomViews, Views


def training_views(
    images: ImageSplit | PairedSplit | ImageStream | Tensor,
    batches: GlobalBatches,
    views: RandomViews[Views],
    *,
    steps: range,
    device: torch.device,
    num_workers: int = 0,
    bad: BadImages | None = None,
    paired: SecondInput | None = None,
    reduced: bool = False,
) -> Iterator[Any]:
    """The views of this process's rows at every step, on the device.

    On a GPU the next views are made while a step computes.

    Args:
        images: a split to decode as it goes, alone or with what belongs to it, a stream, or
            (N, C, H, W) uint8 in memory.
        batches: which rows each step sees; of a stream only how many.
        steps: steps to yield; starting late resumes exactly, but for streams.
        num_workers: loading processes; without effect for images in memory.
        bad: told of images that could not be used, before the step that they are replaced in.
        paired: makes what the second branch takes from the other half of a `PairedSplit`.
        reduced: decode photographs at a part of their size, where crops allow it.

    Yields:
        A (B, C, S, S) float32 tensor for each view, channels last; in pairs, what the second branch
        takes comes second.

    Raises:
        ImageError: nothing usable.
        LoadingError: a worker died.
    """
    with loading_errors(), ExitStack() as stack:
        if isinstance(images, Tensor):
            made = _views_of_memory(images, batches, views, steps, device)
        else:
            if isinstance(images, ImageStream):
                source = StreamCrops(images, views, reduced, steps.start)
                # the batches that chunks are copied to are pinned, and so the chunks need not be
                passes = stack.enter_context(
                    loading_passes(source, source.crop, num_workers, item_bytes=source.item_bytes)
                )
                size = batches.rows_per_process
                crops = closing(_crops_of_stream(images, passes, size, views, steps, device))
            else:
                make = StepCrops(images, batches, views, paired, reduced)
                crops = loading(
                    steps, make, num_workers, item_bytes=make.item_bytes,
                    pinned=device.type == "cuda",
                )  # fmt: skip
            made = _views_of_crops(stack.enter_context(crops), views, device, bad, paired)
        yield from prefetch((tuple(map(channels_last, each)) for each in made), device)


def channels_last(view: Any) -> Any:
    """Images in the layout in which convolutions are fast; anything else as it is."""
    if isinstance(view, Tensor) and view.ndim == 4:
        return view.to(memory_format=torch.channels_last)
    return view


def _views_of_memory(
    images: Tensor,
    batches: GlobalBatches,
    views: RandomViews[Views],
    steps: range,
    device: torch.device,
) -> Iterator[Views]:
    for step in steps:
        epoch, rows = batches.batch(step)
        yield views(on_device(images[torch.from_numpy(rows)], device), rows, epoch)


def _views_of_crops(
    batches: Iterable[Crops],
    views: RandomViews[Views],
    device: torch.device,
    bad: BadImages | None,
    paired: SecondInput | None,
) -> Iterator[Any]:
    for crops in batches:
        if bad is not None:
            bad.add(crops.bad)
        cut = cast(Views, send_to_device(crops.views, device, non_blocking=True))
        made = views.transform_crops(cut, crops.keys, crops.epoch)
        if paired is not None:
            other = send_to_device(crops.paired, device, non_blocking=True)
            if paired.augment is not None:
                (other,) = paired.augment(other, crops.keys, crops.epoch)
            made = (made[0], other, *made[1:])
        yield made


def _crops_of_stream(
    stream: ImageStream,
    passes: Iterator[Iterator[Crops]],
    size: int,
    views: RandomViews,
    steps: range,
    device: torch.device,
) -> Generator[Crops]:
    """Batches of one size from chunks of any size, and from one pass after the other."""
    batch, filled = _empty_batch(views, size, device), 0
    left = len(steps)
    for epoch in count(steps.start):  # a resumed run goes on with passes not yet seen
        if not left:
            return
        usable = False
        for chunk in next(passes):
            usable = usable or len(chunk.keys) > 0
            batch.bad.extend(chunk.bad)
            taken = 0
            while taken < len(chunk.keys):
                more = _copy_rows(chunk, taken, batch, filled)
                taken, filled = taken + more, filled + more
                if filled < size:
                    continue
                yield batch._replace(epoch=epoch)
                left -= 1
                if not left:
                    return
                batch, filled = _empty_batch(views, size, device), 0
        if not usable:
            first = islice(stream.read(epoch), 1)
            why = [each.reason for each in first if isinstance(each, BadImage)]
            raise ImageError(
                f"{stream.name} must hold images that can be used, got none. {''.join(why)}"
            )


def _empty_batch(views: RandomViews, size: int, device: torch.device) -> Crops:
    """Room for a batch of crops, pinned if they go to a GPU."""
    pinned = device.type == "cuda"
    return Crops(views.empty_crops(size, pinned=pinned), np.empty(size, np.int64), 0, [])


def _copy_rows(chunk: Crops, taken: int, batch: Crops, filled: int) -> int:
    """Copy as many crops of a chunk as a batch has room for, and return how many.

    A chunk that is copied at once releases its shared memory and file handles, which are few.
    """
    count = min(len(batch.keys) - filled, len(chunk.keys) - taken)
    into, rows = slice(filled, filled + count), slice(taken, taken + count)
    for own, cut in zip(batch.views, chunk.views, strict=True):
        own[into] = cut[rows]
    batch.keys[into] = chunk.keys[rows]
    return count


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


def _evaluation_views(
    split: ImageSplit, image_size: int, crop_pct: float, rows: Tensor
) -> tuple[Tensor, list[BadImage]]:
    bad: list[BadImage] = []
    images = split.each_or_replaced(rows.tolist(), bad)
    return torch.stack([centre_crop(image, image_size, crop_pct) for image in images]), bad


def evaluation_batches(
    images: ImageSplit | Tensor,
    rows: NDArray[np.int64],
    image_size: int,
    *,
    crop_pct: float = 0.875,
    batch_size: int = 512,
    num_workers: int = 0,
    bad: BadImages | None = None,
) -> Iterator[Tensor]:
    """The images of some rows, in their order, as (B, 3, S, S) uint8 evaluation views.

    Args:
        bad: told of images that could not be used, in whose places others are.
    """
    parts = torch.from_numpy(rows).split(batch_size)
    if isinstance(images, Tensor):
        for part in parts:
            yield centre_crop(images[part], image_size, crop_pct)
        return
    make = partial(_evaluation_views, images, image_size, crop_pct)
    size = batch_size * images.column.channels * image_size**2
    with loading_errors(), loading(parts, make, num_workers, item_bytes=lambda: size) as batches:
        for views, found in batches:
            if bad is not None:
                bad.add(found)
            yield views
