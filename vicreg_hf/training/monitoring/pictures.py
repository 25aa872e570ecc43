"""The pictures of a model card.

Shapes: N images, C channels, S side in pixels, F features, D embedding.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure
from numpy.typing import NDArray
from torch import Tensor

from vicreg_hf.data.batches import evaluation_batches
from vicreg_hf.data.splits import ImageSplit
from vicreg_hf.features.encode import extract_features
from vicreg_hf.hub.card import LOSS_PICTURE, RETRIEVAL_PICTURE, SPECTRUM_PICTURE
from vicreg_hf.hub.record import Picture
from vicreg_hf.metrics.retrieval import nearest_neighbours
from vicreg_hf.modeling_vicreg import VICRegModel
from vicreg_hf.runtime.randomness import Stream, permutation
from vicreg_hf.training.monitoring.preview import picture_of

TERMS = ("loss", "invariance", "variance", "covariance")
MAX_BANK = 2000
"""Images among which neighbours are looked for."""
QUERIES, NEIGHBOURS = 6, 6
"""Images that are looked up, and how many neighbours of each are shown."""
MAX_SPECTRUM = 1000
"""Images whose features have their singular values drawn."""


def draw_pictures(
    directory: Path,
    model: VICRegModel,
    rows: Sequence[Mapping[str, Any]],
    *,
    train: ImageSplit | None,
    held_out: ImageSplit | None,
    num_workers: int = 0,
) -> list[Picture]:
    """Draw the pictures of a run's card.

    Args:
        directory: of the card.
        model: on any device.
        rows: of metrics.jsonl.
        train: where neighbours are looked for; None, for a stream, leaves out what needs images.
        held_out: whose images are looked up; None takes other training images.

    Returns:
        The pictures, with what each shows.
    """
    draw_loss_terms(rows, directory / LOSS_PICTURE)
    pictures = [Picture(LOSS_PICTURE, "The loss, and its three terms before they are weighted.")]
    if train is None:
        return pictures
    cfg: Any = model.config.pretrained_cfg

    def read_and_encode(split: ImageSplit, chosen: NDArray[np.int64]) -> tuple[Tensor, Tensor]:
        """Images (N, C, S, S) and their representations (N, F)."""
        batches = evaluation_batches(
            split, chosen, cfg["input_size"][-1], crop_pct=cfg["crop_pct"], batch_size=128,
            num_workers=num_workers,
        )  # fmt: skip
        images = torch.cat(list(batches))
        return images, extract_features(
            model.encoder, images.split(128), mean=cfg["mean"], std=cfg["std"],
            device=next(model.parameters()).device,
        )  # fmt: skip

    chosen = permutation(len(train), seed=0, epoch=0, stream=Stream.SPLIT)[: QUERIES + MAX_BANK]
    bank, bank_features = read_and_encode(train, np.sort(chosen[QUERIES:]))
    if held_out is None:
        queries, query_features = read_and_encode(train, chosen[:QUERIES])
        source = "training images left out of the search"
    else:
        chosen = permutation(len(held_out), seed=0, epoch=0, stream=Stream.SPLIT)[:QUERIES]
        queries, query_features = read_and_encode(held_out, chosen)
        source = f"images of {held_out.name}"
    if len(bank) < 2 or len(queries) == 0:
        return pictures
    features = bank_features[:MAX_SPECTRUM]
    training = model.expander.training
    model.expander.eval()
    with torch.inference_mode():
        embeddings = model.expander(features)
    model.expander.train(training)
    draw_spectrum(
        {"representations": features, "embeddings": embeddings}, directory / SPECTRUM_PICTURE
    )
    draw_retrievals(queries, query_features, bank, bank_features, directory / RETRIEVAL_PICTURE)
    return [
        *pictures,
        Picture(
            SPECTRUM_PICTURE,
            f"Singular values of the centred features of {len(features)} images of {train.name}. "
            "A cliff is dimensional collapse.",
        ),
        Picture(
            RETRIEVAL_PICTURE,
            f"Left, {source}; beside each, its nearest neighbours by cosine similarity of the "
            f"encoder's features among {len(bank):,} images of {train.name}.",
        ),
    ]


def draw_loss_terms(rows: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Draw the loss and its terms over the steps.

    Args:
        rows: of metrics.jsonl.
        path: of the PNG.
    """
    rows = [row for row in rows if "loss" in row]
    figure = Figure(figsize=(10, 2.6), layout="constrained")
    for axes, term in zip(figure.subplots(1, len(TERMS)), TERMS, strict=True):
        axes.plot([row["step"] for row in rows], [row[term] for row in rows], linewidth=1)
        axes.set(title=term, xlabel="step")
        axes.margins(x=0)
    _save(figure, path)


def draw_spectrum(features: Mapping[str, Tensor], path: Path) -> None:
    """Draw the singular values of centred features, the largest as 1.

    Args:
        features: (N, F) of each kind, by name.
        path: of the PNG.

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


def draw_retrievals(
    queries: Tensor, query_features: Tensor, bank: Tensor, bank_features: Tensor, path: Path
) -> None:
    """Draw each query beside its nearest images in cosine similarity.

    Args:
        queries: (N, C, S, S) uint8; likewise bank.
        query_features: (N, F); likewise bank_features.
        path: of the PNG.
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
    figure.savefig(path, dpi=100, metadata={"Software": None})
