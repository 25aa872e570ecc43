"""What loading workers make: the crops of a step's samples, cut where images are decoded.

Shapes: B images per process, C channels, S side of a view.
"""

from __future__ import annotations

import zlib
from abc import ABC, abstractmethod
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from torch import Tensor
from torch.utils._pytree import tree_leaves
from torch.utils.data import DataLoader, Dataset, IterableDataset

from vicreg_hf.data.columns.base import BadImage, path_of
from vicreg_hf.data.columns.image_files import ImageError
from vicreg_hf.data.pairs import PairedInput, PairedSplit
from vicreg_hf.data.sampler import GlobalBatches
from vicreg_hf.data.splits import ImageSplit
from vicreg_hf.data.streams import ImageStream
from vicreg_hf.models.branch import BranchInput
from vicreg_hf.runtime.signals import ignore_requests
from vicreg_hf.views.random_views import RandomViews

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
    paired: BranchInput | None = None
    """What belongs to the images, on its way to the second branch."""


class CropSource(Dataset[Crops], ABC):
    """What loading workers make crops from."""

    @abstractmethod
    def item_bytes(self) -> int:
        """Of what a worker hands over at once."""


def _crop_bytes(views: RandomViews) -> int:
    """Of all crops of an image."""
    return views.in_chans * sum(side**2 for side in views.image_sizes)


class SplitCrops(CropSource):
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


class PairedCrops(CropSource):
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


class StreamCrops(IterableDataset[Crops], CropSource):
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


def crop_loader(source: CropSource, num_workers: int, *, pinned: bool) -> DataLoader[Crops]:
    """What gives the source's items in their order.

    Args:
        pinned: copy them to memory that a GPU reads by itself.
    """
    return DataLoader(
        source,
        batch_size=None,
        num_workers=num_workers,
        pin_memory=pinned,
        prefetch_factor=batches_ahead(source.item_bytes(), num_workers) if num_workers else None,
        worker_init_fn=ignore_requests,
    )
