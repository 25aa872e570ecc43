"""Embeddings of both halves of a data set's pairs, by a model of two branches.

Shapes: N pairs that can be used, M counterparts of their images, F features, D embedding.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate.utils import send_to_device
from torch import Tensor

from vicreg_hf.data.columns.base import BadImage
from vicreg_hf.data.columns.image_files import ImageError
from vicreg_hf.data.columns.images import ImageColumn
from vicreg_hf.data.columns.second_column import open_second_column
from vicreg_hf.data.columns.spectrograms import SpectrogramColumn
from vicreg_hf.data.columns.texts import TextColumn
from vicreg_hf.data.columns.waveforms import WaveformColumn
from vicreg_hf.data.pairs import PairedSplit
from vicreg_hf.data.splits import ImageSplit
from vicreg_hf.features.encode import encode
from vicreg_hf.features.encoders import timm_encoder
from vicreg_hf.hub.layout import PRIME_DIRECTORY
from vicreg_hf.hub.source import find_encoder
from vicreg_hf.modeling_vicreg import VICRegModel
from vicreg_hf.publishing.loading import load_model

BATCH = 256


@dataclass
class Pairs:
    """A model of two branches, and the pairs it is measured on."""

    model: VICRegModel
    split: PairedSplit


def open_pairs(
    source: str, table: Any, images: ImageSplit, *, column: str | None, tokenizer: str | None
) -> Pairs:
    """Load both branches with their expanders, and find the column that the second takes.

    Args:
        source: output_dir of a run, or a directory with both branches.
        table: the data set's split, all columns.
        images: the same split's images.
        column: of the images' counterparts; by default the only one of its kind.
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
    found = open_second_column(
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
    """The embeddings of images and of their counterparts in the other column.

    Args:
        features: (N', F) representations of the images of some rows.
        rows: (N',) of the split.

    Returns:
        (N, D) of the images of pairs of which both halves can be used, (M, D) of their
        counterparts, (M,) to which of the N each belongs, and how many pairs were left out. Each of
        several captions of an image counts.
    """
    model: Any = pairs.model
    model.to(device).eval()
    items, kept, owner = [], [], []
    captions = isinstance(pairs.split.column, TextColumn)
    for start in range(0, len(rows), BATCH):
        counterparts = pairs.split.others.try_read(rows[start : start + BATCH].tolist())
        for place, sample in enumerate(counterparts, start):
            if isinstance(sample, BadImage):
                continue
            own = [(text,) for text in sample.content] if captions else [sample.content]
            items += own
            owner += [len(kept)] * len(own)
            kept.append(place)
    if not kept:
        raise ImageError(f"{pairs.split.name} must hold pairs that can be used, got none.")
    z = model.expander(features[torch.tensor(kept, device=features.device)].to(device))
    z_prime = [
        model.prime.expander(_represent(pairs, items[start : start + BATCH], device))
        for start in range(0, len(items), BATCH)
    ]
    left_out = len(rows) - len(kept)
    return z.float(), torch.cat(z_prime).float(), torch.tensor(owner, device=device), left_out


def _represent(pairs: Pairs, items: Sequence[Any], device: torch.device) -> Tensor:
    """The second encoder's representations of decoded cells, without augmentation."""
    column: Any = pairs.split.column
    prime, branch = pairs.model.config.prime, pairs.model.prime
    assert prime is not None
    assert branch is not None
    if isinstance(column, (ImageColumn, SpectrogramColumn)):
        encoder = timm_encoder(
            branch.backbone, prime["architecture"], prime["model_args"], prime["pretrained_cfg"]
        )
        images = torch.stack([encoder.prepare(item) for item in items])
        return encode(branch.represent, images, mean=encoder.mean, std=encoder.std, device=device)
    if isinstance(column, WaveformColumn):
        inputs = column.middle(items)
    else:
        inputs = column.batch(items, np.zeros(len(items), np.int64), 0, 0)
    return branch.represent(send_to_device(inputs, device))
