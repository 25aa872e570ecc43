"""Writing the second branch's encoder to a directory of its own that stock loaders take."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn

from vicreg_hf.data.columns.texts import TextColumn
from vicreg_hf.data.columns.waveforms import WaveformColumn
from vicreg_hf.hub.export import ExportError, check_same_weights, export_encoder, same_features
from vicreg_hf.modeling_vicreg import VICRegModel
from vicreg_hf.models.text_encoder import TextEncoder
from vicreg_hf.models.timm_models import is_timm
from vicreg_hf.models.waveform_encoder import WaveformEncoder, save_waveform_encoder


def has_second_encoder(model: VICRegModel) -> bool:
    """Whether there is a second encoder to publish; precomputed embeddings have none."""
    return model.prime is not None and not isinstance(model.prime.backbone, nn.Identity)


def export_second_encoder(model: VICRegModel, directory: str | Path, *, column: Any = None) -> Path:
    """Write the second branch's encoder as its own library publishes it, and verify it.

    The layout of an encoder of timm is that of `export_encoder`; one of texts or waveforms is
    written as transformers does, with the tokenizer or the feature extractor.

    Args:
        directory: made if absent; files with other names in it are left alone.
        column: the column of texts or waveforms that the encoder was trained on.

    Returns:
        The directory.

    Raises:
        ExportError: weights or features differ when they are loaded; the directory is as it was.
    """
    assert model.prime is not None
    encoder: Any = model.prime.backbone
    directory = Path(directory)
    if is_timm(encoder):
        return export_encoder(model.second_model(), directory, include_expander=True)
    directory.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=directory, prefix=".export-") as folder:
        if isinstance(column, TextColumn):
            encoder.save(folder, column.tokenizer)
            _verify_stock_text(encoder, folder)
            again: nn.Module = TextEncoder.create(folder, pretrained=True)
        else:
            assert isinstance(column, WaveformColumn)
            save_waveform_encoder(encoder, column.sampling_rate, folder)
            again = WaveformEncoder.create(folder, pretrained=True)
        check_same_weights(encoder, again, "transformers")
        for file in Path(folder).iterdir():
            file.replace(directory / file.name)
    return directory


@torch.no_grad()
def _verify_stock_text(encoder: TextEncoder, directory: str) -> None:
    """Load a text encoder as its card says, and compare its hidden states with the encoder's.

    Raises:
        ExportError: they differ.
    """
    name, part = encoder.loader
    stock: Any = getattr(transformers, name).from_pretrained(directory, dtype=torch.float32)
    stock = stock.get_encoder() if part else stock
    device = next(encoder.parameters()).device
    tokens = torch.tensor([[0, 1, 1], [1, 0, 1]], device=device)
    mask = torch.ones_like(tokens)
    training = encoder.training
    hidden = stock.to(device).eval()(input_ids=tokens, attention_mask=mask).last_hidden_state
    expected = encoder.eval()({"input_ids": tokens, "attention_mask": mask})
    encoder.train(training)
    if not same_features(hidden.float().mean(1), expected):
        raise ExportError(
            f"{name}{part} must give the features that the second encoder was trained to give, "
            "and does not."
        )
