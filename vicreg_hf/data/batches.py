"""Data sets to batches of views.

Small images of one size are decoded once and stay in memory; others are decoded and cropped by
loading workers. Which of the two is in use changes the speed and nothing else.

Shapes: B images per process, C channels, H x W source pixels, S side of a view.
"""

from __future__ import annotations

from collections.abc import Generator, Iterable, Iterator
from contextlib import ExitStack, closing
from typing import Any, cast

import numpy as np
import torch
from accelerate.utils import send_to_device
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Subset
from torchvision.transforms.v2 import functional as tv

from vicreg_hf.data.bad_images import BadImages
from vicreg_hf.data.columns.base import BadImage
from vicreg_hf.data.columns.image_files import ImageError
from vicreg_hf.data.crops import Crops, PairedCrops, SplitCrops, StreamCrops, crop_loader
from vicreg_hf.data.pairs import PairedInput, PairedSplit
from vicreg_hf.data.prefetch import prefetch
from vicreg_hf.data.sampler import GlobalBatches
from vicreg_hf.data.splits import ImageSplit
from vicreg_hf.data.streams import ImageStream
from vicreg_hf.data.workers import loading, loading_errors
from vicreg_hf.runtime.signals import ignore_requests
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
    paired: PairedInput | None = None,
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
        paired: what becomes of the other half of a `PairedSplit`.

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
                stream = _crops_of_stream(images, batches, views, steps, device, num_workers)
                crops = stack.enter_context(closing(stream))
            else:
                if isinstance(images, PairedSplit):
                    assert paired is not None
                    source = PairedCrops(images, batches, views, paired, steps)
                else:
                    source = SplitCrops(images, batches, views, steps)
                pinned = device.type == "cuda"
                loaded = stack.enter_context(
                    loading(crop_loader(source, num_workers, pinned=pinned))
                )
                crops = ((batches.batch(s)[0], c) for s, c in zip(steps, loaded, strict=True))
            made = _views_of_crops(crops, views, device, bad, paired)
        yield from prefetch((tuple(map(laid_out, each)) for each in made), device)


def laid_out(view: Any) -> Any:
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
        chosen = images[torch.from_numpy(rows)]
        if device.type == "cuda":
            chosen = chosen.pin_memory()
        yield views(chosen.to(device, non_blocking=True), rows, epoch)


def _views_of_crops(
    crops: Iterable[tuple[int, Crops]],
    views: RandomViews[Views],
    device: torch.device,
    bad: BadImages | None,
    paired: PairedInput | None,
) -> Iterator[Any]:
    for epoch, made in crops:
        if bad is not None:
            bad.add(made.bad)
        keys = np.asarray(made.keys)
        cut = cast(Views, send_to_device(made.views, device, non_blocking=True))
        coloured = views.transform_crops(cut, keys, epoch)
        if paired is None:
            yield coloured
        else:
            other = send_to_device(made.paired, device, non_blocking=True)
            yield (coloured[0], paired.finish(other, keys, epoch), *coloured[1:])


def _crops_of_stream(
    stream: ImageStream,
    batches: GlobalBatches,
    views: RandomViews,
    steps: range,
    device: torch.device,
    num_workers: int,
) -> Generator[tuple[int, Crops]]:
    """Batches of one size from chunks of any; a pass over the stream follows the other."""
    size = batches.rows_per_process
    batch, filled = _empty_batch(views, size, device), 0
    epoch, left = steps.start, len(steps)  # a resumed run goes on with passes not yet seen
    while left:
        count = 0
        source = StreamCrops(stream, views, epoch)
        # not the chunks are pinned, but the batches that they are copied to
        with loading(crop_loader(source, num_workers, pinned=False)) as chunks:
            for chunk in chunks:
                count += len(chunk.keys)
                batch.bad.extend(chunk.bad)
                taken = 0
                while taken < len(chunk.keys):
                    more = _fill(batch, filled, chunk, taken)
                    taken, filled = taken + more, filled + more
                    if filled < size:
                        continue
                    yield epoch, batch
                    left -= 1
                    if not left:
                        return
                    batch, filled = _empty_batch(views, size, device), 0
        if not count:
            raise ImageError(f"{stream.name} must hold images that can be used, got none.")
        epoch += 1


def _empty_batch(views: RandomViews, size: int, device: torch.device) -> Crops:
    """Room for some crops, in memory from which they get to the device soonest."""
    pinned = device.type == "cuda"
    cut = tuple(
        torch.empty(size, views.in_chans, side, side, dtype=torch.uint8, pin_memory=pinned)
        for side in views.image_sizes
    )
    return Crops(cut, np.empty(size, np.int64), [])


def _fill(batch: Crops, filled: int, chunk: Crops, taken: int) -> int:
    """Copy as many crops as there is room for, and say how many.

    A chunk that is copied at once leaves shared memory, and its file, which are few, to others.
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


class _CentreCrops(Dataset[tuple[Tensor, list[BadImage]]]):
    def __init__(self, split: ImageSplit, image_size: int, crop_pct: float) -> None:
        self.split, self.image_size, self.crop_pct = split, image_size, crop_pct

    def __len__(self) -> int:
        return len(self.split)

    def __getitems__(self, rows: list[int]) -> list[tuple[Tensor, list[BadImage]]]:
        images, bad = self.split.read_or_replace(rows)
        crops = [centre_crop(image, self.image_size, self.crop_pct) for image in images]
        return [(crop, bad if k == 0 else []) for k, crop in enumerate(crops)]


def _stacked(samples: list[tuple[Tensor, list[BadImage]]]) -> tuple[Tensor, list[BadImage]]:
    return torch.stack([crop for crop, _ in samples]), [b for _, bad in samples for b in bad]


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
    if isinstance(images, Tensor):
        for part in torch.from_numpy(rows).split(batch_size):
            yield centre_crop(images[part], image_size, crop_pct)
        return
    loader = DataLoader(
        Subset(_CentreCrops(images, image_size, crop_pct), rows.tolist()),
        batch_size=batch_size,
        num_workers=num_workers,
        collate_fn=_stacked,
        worker_init_fn=ignore_requests,
    )
    with loading_errors(), loading(loader) as batches:
        for crops, found in batches:
            if bad is not None:
                bad.add(found)
            yield crops
