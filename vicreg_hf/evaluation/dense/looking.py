"""Feature maps of some test images, and of two random views of each, to look at."""

from __future__ import annotations

from functools import partial

import numpy as np
import torch
from torch import Tensor

from vicreg_hf.evaluation.dense.segmentation import input_size
from vicreg_hf.evaluation.report.maps import Maps
from vicreg_hf.evaluation.task import Task
from vicreg_hf.features.encode import encoding_precision
from vicreg_hf.features.encoders import Encoder
from vicreg_hf.features.maps import FEWEST, map_encoder, maps_of
from vicreg_hf.runtime.console import optional
from vicreg_hf.views.two_views import TwoViews

IMAGES = 4


def maps_of_task(task: Task) -> Maps | None:
    """The maps of some test images, chosen by the seed; None for an encoder without a map, or with
    one of few positions.
    """
    with optional("the report is without its section maps"):
        try:
            whole = map_encoder(task.encoder, input_size(task))
            side = min(input_size(task))
            views = map_encoder(task.encoder, (side, side))
        except ValueError:  # it has none
            return None
        assert whole.map_size is not None
        if whole.map_size[0] * whole.map_size[1] >= FEWEST:
            return _maps(task, whole, views)
    return None


def _maps(task: Task, whole: Encoder, of_views: Encoder) -> Maps | None:
    seed, encoder = task.args.seed, task.encoder
    rows = task.usable["test"].rows.numpy()
    rows = np.sort(np.random.default_rng(seed).permutation(rows)[:IMAGES])
    if not len(rows):
        return None
    images = task.data.test.split.read(rows.tolist())
    shown = torch.stack([whole.prepare(image) for image in images])
    channels = encoder.in_chans
    two_views = TwoViews(
        of_views.image_size, "authors" if encoder.sound is None else "audio", seed=seed,
        mean=[0.0] * channels, std=[1.0] * channels, in_chans=channels,
    )  # fmt: skip
    made = two_views.transform_crops(two_views.crop(images, rows), rows)
    first, second = ((255 * view).round().clamp(0, 255).byte() for view in made)

    def encoded(encoder: Encoder, images: Tensor) -> Tensor:
        return maps_of(
            encoder.module, images, mean=encoder.mean, std=encoder.std, device=task.device,
            autocast=partial(encoding_precision, task.accelerator, task.args.bf16),
        )  # fmt: skip

    return Maps(
        shown, encoded(whole, shown), (first, second),
        (encoded(of_views, first), encoded(of_views, second)),
    )  # fmt: skip
