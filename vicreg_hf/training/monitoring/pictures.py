"""The pictures of a model card.

Shapes: N images, C channels, S side in pixels, F features, D embedding.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure
from numpy.typing import NDArray
from torch import Tensor

from vicreg_hf.data.batches import evaluation_batches
from vicreg_hf.data.splits import ImageSplit
from vicreg_hf.data.streams import ImageStream
from vicreg_hf.features.encode import extract_features
from vicreg_hf.hub.card import LOSS_PICTURE, RETRIEVAL_PICTURE, SPECTRUM_PICTURE
from vicreg_hf.hub.record import Picture
from vicreg_hf.metrics.retrieval import nearest_neighbours
from vicreg_hf.runtime.console import optional
from vicreg_hf.runtime.files import replacing
from vicreg_hf.runtime.randomness import Stream, permutation
from vicreg_hf.training.monitoring.preview import picture_of
from vicreg_hf.training.run import Run

MAX_BANK = 2000
"""Images among which neighbours are looked for."""
QUERIES, NEIGHBOURS = 6, 6
"""Images that are looked up, and how many neighbours of each are shown."""
MAX_SPECTRUM = 1000
"""Images whose features have their singular values drawn."""
LEFT_OUT = "{} is left out of the model card"


def draw_pictures(run: Run, directory: Path) -> Iterator[Picture]:
    """Draw the pictures of a run's card, which is in a directory; one that fails is left out.

    Of a stream only the loss is drawn. Without held-out images others of the training split are
    looked up.

    Yields:
        Each picture that has been drawn, with what it shows.
    """
    model, held_out, train = run.published, run.inputs.held_out, run.inputs.train
    with optional(LEFT_OUT.format(LOSS_PICTURE)):
        _draw_loss_terms(run.log.rows(), run.terms, directory / LOSS_PICTURE)
        told = "The loss, and its three terms before they are weighted."
        if run.loss_name is not None:
            told = f"The loss, which is `{run.loss_name}` in place of VICReg's, and its terms."
        yield Picture(LOSS_PICTURE, told)
    if isinstance(train, ImageStream):
        return
    cfg: Any = model.config.pretrained_cfg
    device = run.accelerator.device
    settings: Any = {"mean": cfg["mean"], "std": cfg["std"], "device": device}

    def read_and_encode(split: ImageSplit, chosen: NDArray[np.int64]) -> tuple[Tensor, Tensor]:
        """Images (N, C, S, S) and their representations (N, F)."""
        batches = evaluation_batches(
            split, chosen, cfg["input_size"][-1], crop_pct=cfg["crop_pct"], batch_size=128,
            num_workers=run.args.num_workers or 0,
        )  # fmt: skip
        images = torch.cat(list(batches))
        return images, extract_features(model.encoder, images.split(128), **settings)

    chosen = permutation(len(train), seed=0, epoch=0, stream=Stream.SPLIT)[: QUERIES + MAX_BANK]
    searched, queried = np.sort(chosen[QUERIES:]), chosen[:QUERIES]
    source = "training images left out of the search"
    if held_out is not None:
        chosen = permutation(len(held_out), seed=0, epoch=0, stream=Stream.SPLIT)
        queried = chosen[:QUERIES]
        source = f"images of {held_out.name}"
    if len(searched) < 2 or len(queried) == 0:
        return
    bank, bank_features = read_and_encode(train, searched)
    features = bank_features[:MAX_SPECTRUM]
    with optional(LEFT_OUT.format(SPECTRUM_PICTURE)):
        embeddings = extract_features(model.expander, [features], **settings)
        _draw_spectrum(
            {"representations": features, "embeddings": embeddings}, directory / SPECTRUM_PICTURE
        )
        yield Picture(
            SPECTRUM_PICTURE,
            f"Singular values of the centred features of {len(features)} images of {train.name}. "
            "A cliff is dimensional collapse.",
        )
    with optional(LEFT_OUT.format(RETRIEVAL_PICTURE)):
        queries, query_features = read_and_encode(held_out or train, queried)
        _draw_retrievals(
            queries, query_features, bank, bank_features, directory / RETRIEVAL_PICTURE
        )
        yield Picture(
            RETRIEVAL_PICTURE,
            f"Left, {source}; beside each, its nearest neighbours by cosine similarity of the "
            f"encoder's features among {len(bank):,} images of {train.name}.",
        )


def _draw_loss_terms(rows: Sequence[Mapping[str, Any]], terms: Sequence[str], path: Path) -> None:
    """Draw the loss and its terms over the steps, from rows of metrics.jsonl."""
    rows = [row for row in rows if "loss" in row]
    figure = Figure(figsize=(10, 2.6), layout="constrained")
    subplots = figure.subplots(1, len(terms), squeeze=False)[0]
    for axes, term in zip(subplots, terms, strict=True):
        known = [row for row in rows if term in row]
        axes.plot([row["step"] for row in known], [row[term] for row in known], linewidth=1)
        axes.set(title=term, xlabel="step")
        axes.margins(x=0)
    _save(figure, path)


def _draw_spectrum(features: Mapping[str, Tensor], path: Path) -> None:
    """Draw the singular values of centred features (N, F) of each kind, the largest as 1.

    Source: Jing et al. 2022, "Understanding Dimensional Collapse", arXiv:2110.09348, figure 2.
    """
    figure = Figure(figsize=(5, 3), layout="constrained")
    axes = figure.subplots()
    for name, rows in features.items():
        singular = torch.linalg.svdvals((rows - rows.mean(0)).float().cpu())
        singular = singular[: min(len(rows) - 1, rows.shape[1])]
        relative = singular / singular[0].clamp(min=1e-12)
        axes.semilogy(range(1, len(relative) + 1), relative, label=name)
    axes.set(xlabel="rank", ylabel="singular value / largest")
    axes.legend()
    axes.margins(x=0)
    _save(figure, path)


def _draw_retrievals(
    queries: Tensor, query_features: Tensor, bank: Tensor, bank_features: Tensor, path: Path
) -> None:
    """Draw each query beside its nearest images in cosine similarity.

    Images are (N, C, S, S) uint8, and their features (N, F).
    """
    nearest = nearest_neighbours(bank_features, query_features, min(NEIGHBOURS, len(bank))).cpu()
    columns = nearest.shape[1] + 1
    figure = Figure(figsize=(columns, len(queries) * 1.0 + 0.3), layout="constrained")
    grid = figure.subplots(len(queries), columns, squeeze=False)
    for line, query, found in zip(grid, queries, nearest, strict=True):
        for axes, image in zip(line, [query, *bank[found]], strict=True):
            axes.imshow(picture_of(image))
            axes.axis("off")
    grid[0][0].set_title("image", fontsize=9)
    grid[0][1].set_title("nearest", fontsize=9, loc="left")
    _save(figure, path)


def _save(figure: Figure, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as aside:
        figure.savefig(aside, dpi=100, format="png", metadata={"Software": None})
