"""Embeddings of both halves of a data set's pairs, by a model of two branches.

Shapes: N pairs that can be used, M of what belongs to the samples, F features, D embedding.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate.utils import send_to_device
from torch import Tensor

from vicreg_hf.data.columns.image_files import ImageError
from vicreg_hf.data.columns.images import ImageColumn
from vicreg_hf.data.columns.spectrograms import SpectrogramColumn
from vicreg_hf.data.columns.texts import TextColumn
from vicreg_hf.data.columns.waveforms import WaveformColumn
from vicreg_hf.data.pairs import PairedSplit, paired_column
from vicreg_hf.data.splits import ImageSplit
from vicreg_hf.features.encode import normalise_images
from vicreg_hf.features.encoders import timm_encoder
from vicreg_hf.hub.layout import PRIME_DIRECTORY
from vicreg_hf.modeling_vicreg import VICRegModel
from vicreg_hf.publishing.loading import find_encoder, load_model

BATCH = 256


@dataclass
class Pairs:
    """A model of two branches, and the pairs it is measured on."""

    model: VICRegModel
    split: PairedSplit


def open_pairs(
    source: str, table: Any, images: ImageSplit, *, column: str | None, tokenizer: str | None
) -> Pairs:
    """Load both branches with their expanders, and find what the second takes.

    Args:
        source: output_dir of a run, or a directory with both branches.
        table: the data set's split, all columns.
        images: the same split's images.
        column: of what belongs to the images; by default the only one of its kind.
        tokenizer: Hub id or directory; by default that of the run's second encoder.

    Raises:
        ValueError: a model without a second branch or expander, or no such column.
    """
    directory = find_encoder(source)
    model, has_expander = load_model(directory)
    prime = model.config.prime
    if prime is None or not has_expander:
        raise ValueError(
            "protocol cross-retrieval needs both branches and their expanders, and "
            f"{source!r} holds none or one; give the output_dir of a run with a second branch."
        )
    if prime["modality"] == "image" and column is None:
        raise ValueError(
            "protocol cross-retrieval needs pairs, and the second branch of this model takes views "
            "of the same images; give --prime_column if there is another column of images."
        )
    # source may be the run, its encoder or a checkpoint of it
    places = [
        place / PRIME_DIRECTORY for place in (Path(source), *Path(source).resolve().parents[:2])
    ]
    beside = next((place for place in places if place.is_dir()), None)
    if tokenizer is None and prime["modality"] == "text" and beside is None:
        raise ValueError(
            "prime_tokenizer must be given where the second encoder is not beside the first, and "
            f"{source!r} has no {PRIME_DIRECTORY} beside it."
        )
    found = paired_column(
        table, prime["modality"], column, prime["preparation"] or {},
        waveforms=prime["encoder_config"] is not None,
        tokenizer=tokenizer or str(beside),
        channels=(prime["pretrained_cfg"] or {"input_size": (3,)})["input_size"][0],
    )  # fmt: skip
    return Pairs(model, PairedSplit(images, found.prepare(table), found))


@torch.inference_mode()
def embed_pairs(
    pairs: Pairs, features: Tensor, rows: Tensor, device: torch.device
) -> tuple[Tensor, Tensor, Tensor, int]:
    """The embeddings of images and of what belongs to them.

    Args:
        features: (N', F) representations of the images of some rows.
        rows: (N',) of the split.

    Returns:
        (N, D) of the pairs of which both halves can be used, (M, D) of what belongs to them, (M,)
        to which of the N each belongs, and how many were left out. Of several captions each counts.
    """
    model: Any = pairs.model
    model.to(device)
    assert model.prime is not None
    parts, kept, owner = [], [], []
    with _evaluated(model):
        for place, items in _usable(pairs, rows.tolist()):
            for item in items:
                parts.append(item)
                owner.append(len(kept))
            kept.append(place)
        if not kept:
            raise ImageError(f"{pairs.split.name} must hold pairs that can be used, got none.")
        z = model.expander(features[torch.tensor(kept, device=features.device)].to(device))
        z_prime = torch.cat(
            [
                model.prime.expander(
                    model.prime.represent(
                        send_to_device(_inputs(pairs, parts[start : start + BATCH]), device)
                    )
                )
                for start in range(0, len(parts), BATCH)
            ]
        )
    left_out = len(rows) - len(kept)
    return z.float(), z_prime.float(), torch.tensor(owner, device=device), left_out


def _usable(pairs: Pairs, rows: Sequence[int]) -> Iterator[tuple[int, list[Any]]]:
    """Places of the rows of which the other half can be used, and what is in it."""
    split = pairs.split
    for start in range(0, len(rows), BATCH):
        cells = split.table[rows[start : start + BATCH]][split.column.name]
        for place, cell in enumerate(cells, start):
            try:
                item = split.column.decode(cell)
            except ImageError:
                continue
            captions = isinstance(split.column, TextColumn)
            yield place, [(caption,) for caption in item] if captions else [item]


def _inputs(pairs: Pairs, items: Sequence[Any]) -> Any:
    """What the second encoder takes of some decoded cells, without augmentation."""
    column: Any = pairs.split.column
    if isinstance(column, WaveformColumn):
        return column.middle(items)
    if not isinstance(column, (ImageColumn, SpectrogramColumn)):
        return column.batch(items, np.zeros(len(items), np.int64), 0, 0)
    prime, branch = pairs.model.config.prime, pairs.model.prime
    assert prime is not None
    assert branch is not None
    encoder = timm_encoder(
        branch.backbone, prime["architecture"], prime["model_args"], prime["pretrained_cfg"]
    )
    seen = torch.stack([encoder.prepare(item) for item in items])
    return normalise_images(seen, encoder.mean, encoder.std)


@contextmanager
def _evaluated(model: VICRegModel) -> Iterator[None]:
    training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(training)
