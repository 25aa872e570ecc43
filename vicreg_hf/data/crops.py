"""The batches that loading workers make: crops, cut where images are decoded.

Shapes: B images per process, C channels, S side of a view.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.data import IterableDataset

from vicreg_hf.data.columns.base import BadImage
from vicreg_hf.data.pairs import PairedSplit, SecondInput
from vicreg_hf.data.sampler import GlobalBatches
from vicreg_hf.data.samples import Sample
from vicreg_hf.data.splits import ImageSplit
from vicreg_hf.data.streams import ImageStream
from vicreg_hf.views.random_views import RandomViews

MOST_BAD = 8
"""A chunk of a stream ends after so many times `STREAM_CHUNK` images, usable or not."""
STREAM_CHUNK = 32
"""Images of a stream that a worker crops together at most."""
PART_BYTES = 2**26
"""Bytes of decoded images, beyond which a worker crops them before it decodes others."""


class Crops(NamedTuple):
    """Crops of a batch of samples."""

    views: tuple[Tensor, ...]
    """(B, C, S, S) uint8 for each view."""
    keys: NDArray[np.int64]
    """(B,) row numbers or checksums, by which the crops were drawn."""
    epoch: int
    bad: list[BadImage]
    """Samples that were replaced, or of a stream left out."""
    paired: Any = None
    """The batch of what belongs to the images, as `SecondInput.collate` gives it."""


@dataclass
class StepCrops:
    """Makes the crops of the samples of a step."""

    samples: ImageSplit | PairedSplit
    batches: GlobalBatches
    views: RandomViews
    paired: SecondInput | None
    reduced: bool = False
    """Decode photographs at a part of their size, where crops allow it."""

    def __call__(self, step: int) -> Crops:
        epoch, rows = self.batches.batch(step)
        return self._crop(rows, epoch)

    def item_bytes(self) -> int:
        """Bytes of a step's crops, if all samples are like the first."""
        crops = self._crop(np.zeros(1, np.int64), 0)
        tensors = tree_leaves((crops.views, crops.paired))
        return self.batches.rows_per_process * sum(getattr(t, "nbytes", 0) for t in tensors)

    def _crop(self, rows: NDArray[np.int64], epoch: int) -> Crops:
        bad: list[BadImage] = []
        reductions = partial(self.views.reduction, epoch=epoch) if self.reduced else None
        samples = self.samples.each_or_replaced(rows.tolist(), bad, reductions)
        views, paired, done = self.views.empty_crops(len(rows)), self.paired, 0
        items, others = [], []  # of the other column: decoded, and made into parts of a batch
        for images in _in_parts(samples):
            own = slice(done, done + len(images))
            done = own.stop
            if paired is not None:
                images, other = zip(*images, strict=True)
                if paired.augment is None:
                    items += other
                else:
                    others.append(paired.collate(other, rows[own], epoch))
                del other
            for view, cut in zip(views, self.views.crop(images, rows[own], epoch), strict=True):
                view[own] = cut
            del images  # or they stay in memory beside the next
        if paired is None:
            return Crops(views, rows, epoch, bad)
        batch = tree_map(_joined, *others) if others else paired.collate(items, rows, epoch)
        return Crops(views, rows, epoch, bad, batch)


def _in_parts(samples: Iterable[Any]) -> Iterator[Any]:
    part, size = [], 0
    for sample in samples:
        part.append(sample)
        size += _num_bytes(sample)
        if size >= PART_BYTES:
            yield part
            part, size = [], 0
    if part:
        yield part


def _num_bytes(sample: Any) -> int:
    return sum(getattr(leaf, "nbytes", 0) for leaf in tree_leaves(sample))


def _joined(*parts: Tensor) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts)


class StreamCrops(IterableDataset[list[Sample[Tensor] | BadImage]]):
    """Passes over a stream in chunks of `STREAM_CHUNK` usable images, and makes their crops.

    They are drawn by the images' content. Chunks of large images are of fewer. Each iteration is
    the next pass, also in loading workers, whose copies of this count for themselves.

    Args:
        reduced: as in `StepCrops`.
        first: number of the first pass.
    """

    def __init__(self, stream: ImageStream, views: RandomViews, reduced: bool, first: int) -> None:
        self.stream, self.views, self.reduced = stream, views, reduced
        self.epoch = first - 1

    def __iter__(self) -> Iterator[list[Sample[Tensor] | BadImage]]:
        self.epoch += 1
        reductions = partial(self.views.reduction, epoch=self.epoch) if self.reduced else None
        chunk, usable, size = [], 0, 0
        for sample in self.stream.read(self.epoch, reductions):
            chunk.append(sample)
            usable += isinstance(sample, Sample)
            size += _num_bytes(sample)
            if STREAM_CHUNK in (usable, len(chunk) // MOST_BAD) or size >= PART_BYTES:
                yield chunk
                chunk, usable, size = [], 0, 0
        if chunk:
            yield chunk

    def crop(self, chunk: list[Sample[Tensor] | BadImage]) -> Crops:
        """The crops of a chunk."""
        bad = [sample for sample in chunk if isinstance(sample, BadImage)]
        usable = [sample for sample in chunk if isinstance(sample, Sample)]
        keys = np.array([sample.key for sample in usable], dtype=np.int64)
        if not usable:
            return Crops(self.views.empty_crops(0), keys, self.epoch, bad)
        cut = self.views.crop([sample.content for sample in usable], keys, self.epoch)
        return Crops(cut, keys, self.epoch, bad)

    def item_bytes(self) -> int:
        """Bytes of a chunk's crops."""
        return STREAM_CHUNK * self.views.in_chans * sum(side**2 for side in self.views.image_sizes)
