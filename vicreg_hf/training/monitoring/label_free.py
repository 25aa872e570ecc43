"""What a run measures without a label, on the same few training images each time.

Shapes: N images of the sample, M of these in two views, C channels, S side in pixels, F
representation, D embedding.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from vicreg_hf.data.batches import centre_crop
from vicreg_hf.data.samples import Sample
from vicreg_hf.data.splits import ImageSplit
from vicreg_hf.data.streams import ImageStream
from vicreg_hf.data.workers import loading, loading_errors
from vicreg_hf.features.encode import extract_features
from vicreg_hf.metrics.collapse import alignment, effective_rank, uniformity
from vicreg_hf.modeling_vicreg import VICRegModel
from vicreg_hf.runtime.randomness import Stream, permutation
from vicreg_hf.training.building.data import TrainingData
from vicreg_hf.views.two_views import Preset, TwoViews

MOST, MOST_PAIRED = 2048, 512
"""Images of the sample at most, and those of them that are seen in two views."""
BUDGET = 2**29
"""Bytes of pixels of the sample that stay in memory; of larger images the sample has fewer."""
EPOCH = 2**32 - 1
"""The epoch that keys the two views; training does not reach it."""
AT_ONCE, READ_AT_ONCE = 128, 16
"""Images that are encoded together, and that a loading worker reads one after the other."""
DECODED, LEAST = 2**31, 64
"""Pixels that are decoded at most, were all images as large as the first, which takes a core about
half a minute; and the number of images that are read nevertheless."""


class FixedSample:
    """Training images that are measured without labels, and kept in memory once they were read.

    Rank and uniformity are those of evaluation views, without augmentation; alignment is that of
    two keyed views. All are of the first branch. Another session measures the same pixels.

    Args:
        model: its configuration says how images are prepared.
        preset: the recipes of the two views.
        seed: of the run, which keys them.
    """

    def __init__(
        self, data: TrainingData, model: VICRegModel, *, preset: Preset, seed: int, num_workers: int
    ) -> None:
        cfg: Any = model.config.pretrained_cfg
        self.data, self.seed, self.num_workers = data, seed, num_workers
        self.views = TwoViews.for_model(model, preset, seed=seed, places=False)
        self.side, self.crop_pct = cfg["input_size"][-1], cfg["crop_pct"]
        self.normalisation = {"mean": cfg["mean"], "std": cfg["std"]}
        pixels = cfg["input_size"][0] * self.side**2
        self.most = max(2, min(MOST, BUDGET * MOST // (pixels * (MOST + 2 * MOST_PAIRED))))
        self.most_paired = max(1, self.most * MOST_PAIRED // MOST)
        self._read: tuple[Tensor, tuple[Tensor, ...]] | None = None

    @property
    def description(self) -> str:
        """A phrase that names the images."""
        number = self.most if self._read is None else len(self._read[0])
        return f"{number:,} images of {self.data.train.name} without augmentation"

    def measure(
        self,
        model: VICRegModel,
        device: torch.device,
        *,
        autocast: Callable[..., AbstractContextManager[object]] = nullcontext,
    ) -> dict[str, float]:
        """RankMe, alignment and uniformity, of representations and of embeddings.

        Args:
            autocast: the context that encoders compute in, to measure in the precision of the run.

        Returns:
            Columns of metrics.jsonl; NaN where features are not finite.
        """
        if self._read is None:
            self._read = self._read_images()
        images, crops = self._read
        settings: Any = self.normalisation | {"device": device, "autocast": autocast}
        y = extract_features(model.encoder, images.split(AT_ONCE), **settings)
        both = extract_features(model.encoder, self._views_on(crops, device), **settings)
        found = _signs(y, both, "sample_")
        z, z_both = (
            extract_features(model.expander, rows.split(2 * AT_ONCE), **settings)
            for rows in (y, both)
        )
        return found | _signs(z, z_both, "sample_embedding_")

    def _views_on(self, crops: tuple[Tensor, ...], device: torch.device) -> Iterator[Tensor]:
        """Batches of the first views of some images, and below them their second views."""
        x, x_prime = (view.split(AT_ONCE) for view in crops)
        for number, pair in enumerate(zip(x, x_prime, strict=True)):
            keys = np.arange(number * AT_ONCE, number * AT_ONCE + len(pair[0]))
            first, second = (view.to(device) for view in pair)
            yield torch.cat(self.views.transform_crops((first, second), keys, EPOCH))

    def _read_images(self) -> tuple[Tensor, tuple[Tensor, ...]]:
        """(N, C, S, S) evaluation views, and (M, C, S, S) crops of both views, all uint8."""
        with loading_errors():
            prepared = list(self._prepared())
        crops = [pair for _, pair in prepared if pair is not None]
        return (
            torch.stack([seen for seen, _ in prepared]),
            tuple(torch.cat(own) for own in zip(*crops, strict=True)),
        )

    def _prepared(self) -> Iterator[tuple[Tensor, tuple[Tensor, ...] | None]]:
        """An evaluation view of each image of the sample, and of the first ones both crops."""
        train, images = self.data.train, self.data.images
        if isinstance(train, ImageStream):
            yield from self._prepared_of_stream(train)
            return
        chosen = permutation(len(train), seed=0, epoch=0, stream=Stream.SPLIT)
        in_memory = isinstance(images, Tensor)
        source = images if in_memory else train
        self._limit(next(_read(source, chosen[:1])))
        prepare = partial(_prepare, self.views, self.crop_pct, self.most_paired)
        first, others = np.split(chosen[: self.most], [self.most_paired])
        order = np.array([*np.sort(first), *np.sort(others)])
        parts = [
            (start, order[start : start + READ_AT_ONCE])
            for start in range(0, len(order), READ_AT_ONCE)
        ]
        make = partial(_prepare_part, source, prepare)
        size = 3 * READ_AT_ONCE * self.views.in_chans * self.side**2
        workers = 0 if in_memory else self.num_workers
        with loading(parts, make, workers, item_bytes=lambda: size) as read:
            for part in read:
                yield from part

    def _prepared_of_stream(
        self, stream: ImageStream
    ) -> Iterator[tuple[Tensor, tuple[Tensor, ...] | None]]:
        """The same of the first usable images of the first pass."""
        number = 0
        for sample in stream.share(0, 1, seed=self.seed).read(0):
            if not isinstance(sample, Sample):
                continue
            if number == 0:
                self._limit(sample.content)
            yield _prepare(self.views, self.crop_pct, self.most_paired, number, sample.content)
            number += 1
            if number == self.most:
                return

    def _limit(self, image: Tensor) -> None:
        """Take fewer images where they are as large as this one, whose decoding takes long."""
        fewer = max(LEAST, DECODED // (image.shape[-2] * image.shape[-1]))
        self.most = min(self.most, fewer)
        self.most_paired = max(1, self.most * MOST_PAIRED // MOST)


def _read(source: ImageSplit | Tensor, rows: Any) -> Iterator[Tensor]:
    """One image after another, as large photographs do not fit in memory together."""
    if isinstance(source, Tensor):
        yield from (source[int(row)] for row in rows)
    else:
        for row in rows:
            yield from source.each_or_replaced([int(row)], [])


def _prepare_part(source: ImageSplit | Tensor, prepare: Any, part: tuple[int, Any]) -> list[Any]:
    start, rows = part
    return [prepare(start + n, image) for n, image in enumerate(_read(source, rows))]


def _prepare(
    views: TwoViews, crop_pct: float, paired: int, number: int, image: Tensor
) -> tuple[Tensor, tuple[Tensor, ...] | None]:
    """The evaluation view of an image, and crops of both views if its number is below paired."""
    seen = centre_crop(image, views.image_sizes[0], crop_pct)
    if number >= paired:
        return seen, None
    return seen, views.crop([image], np.array([number]), EPOCH)


def _signs(x: Tensor, both: Tensor, prefix: str) -> dict[str, float]:
    """Signs of collapse of N features, and of those of two views in the order of `_views_on`."""
    names = ("effective_rank", "alignment", "uniformity")
    if len(x) < 2 or not bool(x.isfinite().all() & both.isfinite().all()):
        return {prefix + name: torch.nan for name in names}
    first, second = zip(*(part.chunk(2) for part in both.split(2 * AT_ONCE)), strict=True)
    values = (effective_rank(x), alignment(torch.cat(first), torch.cat(second)), uniformity(x))
    return {prefix + name: value.item() for name, value in zip(names, values, strict=True)}
