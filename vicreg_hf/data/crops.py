"""The batches that loading workers make: crops, cut where images are decoded.

Shapes: B images per process, C channels, S side of a view.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from torch import Tensor
from torch.utils._pytree import tree_leaves
from torch.utils.data import IterableDataset

from vicreg_hf.data.columns.base import BadImage
from vicreg_hf.data.pairs import PairedSplit, SecondInput
from vicreg_hf.data.sampler import GlobalBatches
from vicreg_hf.data.samples import Sample
from vicreg_hf.data.splits import ImageSplit
from vicreg_hf.data.streams import ImageStream
from vicreg_hf.views.random_views import RandomViews

STREAM_CHUNK = 32
"""Images of a stream that a worker crops together."""


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

    def __call__(self, step: int) -> Crops:
        epoch, rows = self.batches.batch(step)
        return self._crop(rows, epoch)

    def item_bytes(self) -> int:
        """Bytes of a step's crops, if all samples are like the first."""
        crops = self._crop(np.zeros(1, np.int64), 0)
        tensors = tree_leaves((crops.views, crops.paired))
        return self.batches.rows_per_process * sum(getattr(t, "nbytes", 0) for t in tensors)

    def _crop(self, rows: NDArray[np.int64], epoch: int) -> Crops:
        samples, bad = self.samples.read_or_replace(rows.tolist())
        images: Any = samples
        other = None
        if self.paired is not None:
            images, items = zip(*samples, strict=True)
            other = self.paired.collate(items, rows, epoch)
        return Crops(self.views.crop(images, rows, epoch), rows, epoch, bad, other)


class StreamCrops(IterableDataset[list[Sample[Tensor] | BadImage]]):
    """A pass over a stream in chunks of `STREAM_CHUNK` usable images, and makes their crops.

    They are drawn by the images' content.
    """

    def __init__(self, stream: ImageStream, views: RandomViews, epoch: int) -> None:
        self.stream, self.views, self.epoch = stream, views, epoch

    def __iter__(self) -> Iterator[list[Sample[Tensor] | BadImage]]:
        chunk, usable = [], 0
        for sample in self.stream.read(self.epoch):
            chunk.append(sample)
            usable += isinstance(sample, Sample)
            if usable == STREAM_CHUNK:
                yield chunk
                chunk, usable = [], 0
        if usable:
            yield chunk

    def crop(self, chunk: list[Sample[Tensor] | BadImage]) -> Crops:
        """The crops of a chunk."""
        bad = [sample for sample in chunk if isinstance(sample, BadImage)]
        usable = [sample for sample in chunk if isinstance(sample, Sample)]
        keys = np.array([sample.key for sample in usable], dtype=np.int64)
        cut = self.views.crop([sample.content for sample in usable], keys, self.epoch)
        return Crops(cut, keys, self.epoch, bad)

    def item_bytes(self) -> int:
        """Bytes of a chunk's crops."""
        return STREAM_CHUNK * self.views.in_chans * sum(side**2 for side in self.views.image_sizes)
