"""Data sets to batches of views.

Small images of one size are decoded once and stay in memory; others are decoded and cropped by
loading workers. Which of the two is in use changes the speed and nothing else.

Shapes: B images per process, C channels, H x W source pixels, S side of a view.
"""

from __future__ import annotations

import os
import signal
import threading
import time
import zlib
from collections.abc import Generator, Iterable, Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager, suppress
from typing import Any, NamedTuple, cast

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import send_to_device
from numpy.typing import NDArray
from torch import Tensor
from torch.utils._pytree import tree_leaves
from torch.utils.data import DataLoader, Dataset, IterableDataset, Subset
from torchvision.transforms.v2 import functional as tv

from vicreg_hf.bad_images import BadImages
from vicreg_hf.branches import Inputs
from vicreg_hf.columns import BadImage, path_of
from vicreg_hf.images import ImageError
from vicreg_hf.pairs import PairedInput, PairedSplit
from vicreg_hf.prefetch import prefetch
from vicreg_hf.sampler import GlobalBatches
from vicreg_hf.signals import ignore_requests
from vicreg_hf.sources import ImageSplit
from vicreg_hf.streaming import ImageStream
from vicreg_hf.views import RandomViews, Views

SMALL_IMAGE = 64
"""Side in pixels up to which images are taken at their own size, with the `cifar` views."""
MEMORY_BUDGET = 4 * 2**30
"""Bytes of decoded pixels a process keeps in memory at most."""
WORKER_PATIENCE = 5.0
"""Seconds that loading workers have to end by themselves."""
STREAM_CHUNK = 32
"""Images of a stream that a worker crops together."""
MOST_AHEAD = 4
"""Batches, or chunks of a stream, that a loading worker makes ahead at most."""
BYTES_AHEAD = 2 * 2**30
"""Bytes of crops that may wait in shared or pinned memory for a process. All of its workers make as
many batches ahead as stay within it, up to `MOST_AHEAD` each; but one each in any case, even if
those are more bytes."""


class Crops(NamedTuple):
    """What a loading worker makes of a step's samples."""

    views: tuple[Tensor, ...]
    """(B, C, S, S) uint8 of each view."""
    keys: NDArray[np.int64]
    """(B,): what they were drawn by."""
    bad: list[BadImage]
    """What was replaced."""
    paired: Inputs | None = None
    """What belongs to the images, on its way to the second branch."""


class LoadingError(RuntimeError):
    """A loading worker died."""


def load_in_memory(
    split: ImageSplit,
    budget: int = MEMORY_BUDGET,
    bad: BadImages | None = None,
    *,
    rows: NDArray[np.int64] | None = None,
) -> Tensor | None:
    """Decode a whole split, or some rows; what cannot be used is replaced and added to `bad`.

    Returns:
        (N, C, H, W) uint8, or None where sizes differ or the pixels exceed the budget in bytes.
    """
    chosen = range(len(split)) if rows is None else rows.tolist()
    (first,), _ = split.read_or_replace(chosen[:1])
    if first.numel() * len(chosen) > budget:
        return None
    images = torch.empty((len(chosen), *first.shape), dtype=torch.uint8)
    unusable: list[BadImage] = []
    step = 256
    for start in range(0, len(chosen), step):
        decoded, replaced = split.read_or_replace(chosen[start : start + step])
        if any(image.shape != first.shape for image in decoded):
            return None
        torch.stack(decoded, out=images[start : start + step])
        unusable += replaced
    if bad is not None:
        bad.add(unusable)
    return images


class _Source(Dataset[Crops]):
    """What loading workers make crops from."""

    def item_bytes(self) -> int:
        """Of what a worker hands over at once."""
        raise NotImplementedError


def _crop_bytes(views: RandomViews) -> int:
    """Of all crops of an image."""
    return views.in_chans * sum(side**2 for side in views.image_sizes)


class _Crops(_Source):
    """The crops of a step's samples, cut where they are decoded."""

    def __init__(
        self, split: ImageSplit, batches: GlobalBatches, views: RandomViews, steps: range
    ) -> None:
        self.split, self.batches, self.views, self.steps = split, batches, views, steps

    def __len__(self) -> int:
        return len(self.steps)

    def __getitem__(self, position: int) -> Crops:
        epoch, rows = self.batches.batch(self.steps[position])
        images, bad = self.split.read_or_replace(rows.tolist())
        return Crops(self.views.crop(images, rows, epoch), rows, bad)

    def item_bytes(self) -> int:
        return self.batches.rows_per_process * _crop_bytes(self.views)


class _PairedCrops(_Source):
    """The same, and what belongs to the images in another column."""

    def __init__(
        self,
        split: PairedSplit,
        batches: GlobalBatches,
        views: RandomViews,
        paired: PairedInput,
        steps: range,
    ) -> None:
        self.split, self.batches, self.steps = split, batches, steps
        self.views, self.paired = views, paired

    def __len__(self) -> int:
        return len(self.steps)

    def __getitem__(self, position: int) -> Crops:
        epoch, rows = self.batches.batch(self.steps[position])
        pairs, bad = self.split.read_or_replace(rows.tolist())
        images, items = zip(*pairs, strict=True)
        batch = self.paired.batch(items, rows, epoch)
        return Crops(self.views.crop(images, rows, epoch), rows, bad, batch)

    def item_bytes(self) -> int:
        """As of a batch of what the first row holds, whatever the modality."""
        ((_, item),), _ = self.split.read_or_replace([0])
        other = tree_leaves(self.paired.batch([item], np.zeros(1, np.int64), 0))
        of_pair = _crop_bytes(self.views) + sum(tensor.nbytes for tensor in other)
        return self.batches.rows_per_process * of_pair


class _StreamCrops(IterableDataset[Crops], _Source):
    """The crops of what a stream gives, drawn by the images' content."""

    def __init__(self, stream: ImageStream, views: RandomViews, epoch: int) -> None:
        self.stream, self.views, self.epoch = stream, views, epoch

    def __iter__(self) -> Iterator[Crops]:
        images: list[Tensor] = []
        keys: list[int] = []
        bad: list[BadImage] = []
        column = self.stream.column
        for cell in self.stream.cells(self.epoch):
            key = 0
            try:
                key = zlib.crc32(column.encoded(cell))
                images.append(column.decode(cell))
                keys.append(key)
            except ImageError as error:
                name = path_of(cell) or f"an image without a name, of CRC-32 {key:08x}"
                bad.append(BadImage(None, name, str(error), key))
            if len(images) == STREAM_CHUNK:
                yield self._cut(images, keys, bad)
                images, keys, bad = [], [], []
        if images:
            yield self._cut(images, keys, bad)

    def item_bytes(self) -> int:
        return STREAM_CHUNK * _crop_bytes(self.views)

    def _cut(self, images: list[Tensor], keys: list[int], bad: list[BadImage]) -> Crops:
        rows = np.array(keys, dtype=np.int64)
        return Crops(self.views.crop(images, rows, self.epoch), rows, bad)


def batches_ahead(batch_bytes: int, num_workers: int) -> int:
    """How many batches each of a process's loading workers makes ahead: see `BYTES_AHEAD`."""
    return max(1, min(MOST_AHEAD, BYTES_AHEAD // (batch_bytes * num_workers)))


def _loader(source: _Source, num_workers: int, *, pinned: bool) -> DataLoader[Crops]:
    return DataLoader(
        source,
        batch_size=None,
        num_workers=num_workers,
        pin_memory=pinned,
        prefetch_factor=batches_ahead(source.item_bytes(), num_workers) if num_workers else None,
        worker_init_fn=ignore_requests,
    )


@contextmanager
def _loading(loader: DataLoader[Any]) -> Iterator[Any]:
    """What a loader gives, whose workers end with the context, whatever they wait for.

    They hear no request to end, and one that was killed may leave the others a lock that is never
    released. To be entered in the main thread, where alone torch hears of what a worker died.
    """
    batches: Any = iter(loader)
    workers: list[Any] = getattr(batches, "_workers", [])
    try:
        yield batches
    except (ConnectionError, EOFError) as error:  # torch has not heard of it yet
        if (end := _end_of_any(workers)) is None:
            raise
        raise LoadingError(_cause_of_death(end)) from error
    finally:
        if workers:
            patience = threading.Timer(WORKER_PATIENCE, _kill, [workers])
            patience.start()
            with suppress(RuntimeError):  # torch's, of those that are killed
                batches._shutdown_workers()
            patience.cancel()
            _kill(workers)


def _end_of_any(workers: Sequence[Any]) -> str | None:
    """How one of them ended, if one has by now or does within a second."""
    until = time.monotonic() + 1
    while time.monotonic() < until:
        for status in (worker.exitcode for worker in workers):
            if status is not None:
                by = signal.strsignal(-status) if status < 0 else f"exit status {status}"
                return f"it was ended by {by}"
        time.sleep(0.01)
    return None


def _kill(workers: Sequence[Any]) -> None:
    for worker in workers:
        worker.kill()


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
                    source = _PairedCrops(images, batches, views, paired, steps)
                else:
                    source = _Crops(images, batches, views, steps)
                pinned = device.type == "cuda"
                loaded = stack.enter_context(_loading(_loader(source, num_workers, pinned=pinned)))
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
        coloured = views.colour(cut, keys, epoch)
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
        source = _StreamCrops(stream, views, epoch)
        # not the chunks are pinned, but the batches that they are copied to
        with _loading(_loader(source, num_workers, pinned=False)) as chunks:
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


@contextmanager
def loading_errors() -> Iterator[None]:
    """One sentence instead of a worker's traceback, wherever torch raises it.

    Raises:
        ImageError: as the worker did.
        LoadingError: the worker died, and from what.
    """
    try:
        yield
    except ImageError as error:
        sentence = str(error).strip().splitlines()[-1]
        raise ImageError(sentence.split("ImageError: ", 1)[-1]) from None
    except (ConnectionError, EOFError) as error:  # killed in the middle of a batch
        cause = f"the connection to it was lost: {error}"
        raise LoadingError(_cause_of_death(cause)) from None
    except RuntimeError as error:
        # torch's signal handler knows of what the worker died, and its loader only that it did
        messages = [str(cause) for cause in (error.__cause__, error) if cause is not None]
        messages = [message for message in messages if "DataLoader worker" in message]
        if not messages:
            raise
        raise LoadingError(_cause_of_death(messages[0])) from None


def _cause_of_death(message: str) -> str:
    sentence = message.strip().splitlines()[0].rstrip(". ")
    if "Killed" in message:
        why = (
            "Something outside this program killed it, mostly for want of memory: lower "
            "--num_workers or free some."
        )
    elif "Bus error" in message or "shm" in message or "shared memory" in message:
        why = (
            "Shared memory is full: enlarge /dev/shm (docker: --shm-size), or lower --num_workers."
        )
    else:
        why = "With --num_workers 0 the main process decodes, and shows what fails."
    return f"a loading worker died: {sentence}. {why} The last checkpoint is untouched."


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
    with loading_errors(), _loading(loader) as batches:
        for crops, found in batches:
            if bad is not None:
                bad.add(found)
            yield crops


def available_cores() -> int:
    """Cores this process may use."""
    with suppress(AttributeError):  # macOS and Windows
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def local_processes(accelerator: Accelerator) -> int:
    """Processes of this run on this machine."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", str(accelerator.num_processes)))


def default_num_workers(num_processes: int) -> int:
    """Loading workers for one of the processes on this machine: its share of the cores."""
    cores = available_cores()
    return max(1, min(16, cores // num_processes - (1 if cores > 2 * num_processes else 0)))
