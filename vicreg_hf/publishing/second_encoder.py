"""Publishing the second branch's encoder, in a directory of its own that stock loaders take.

Shapes: F features.
"""

from __future__ import annotations

import json
import shutil
import tempfile
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn

from vicreg_hf.data.columns.texts import TextColumn
from vicreg_hf.data.columns.waveforms import WaveformColumn
from vicreg_hf.data.pairs import PairedSplit
from vicreg_hf.hub.api import push_folder
from vicreg_hf.hub.card import CARD_FILE, personalise
from vicreg_hf.hub.export import ExportError, export_encoder
from vicreg_hf.hub.push import REMOVABLE, UPLOAD
from vicreg_hf.modeling_vicreg import VICRegModel
from vicreg_hf.models.text_encoder import TextEncoder
from vicreg_hf.models.timm_models import is_timm
from vicreg_hf.models.waveform_encoder import WaveformEncoder, save_waveform_encoder
from vicreg_hf.publishing.loading import load_model
from vicreg_hf.runtime.checks import one_line
from vicreg_hf.runtime.files import temporary_folder


def has_second_encoder(model: VICRegModel) -> bool:
    """Whether there is a second encoder to publish; precomputed embeddings have none."""
    return model.prime is not None and not isinstance(model.prime.backbone, nn.Identity)


def export_second_encoder(model: VICRegModel, directory: str | Path, *, column: Any = None) -> Path:
    """Write the second branch's encoder as its own library publishes it, and load it again.

    Of timm the layout is that of `export_encoder`; of text and waveforms it is transformers', with
    the tokenizer or the feature extractor.

    Args:
        directory: made if absent; files of other names in it are left alone.
        column: of text or waveforms, what the encoder was trained on.

    Returns:
        The directory.

    Raises:
        ExportError: weights differ when loaded again; the directory is as it was.
    """
    assert model.prime is not None
    encoder: Any = model.prime.backbone
    directory = Path(directory)
    if is_timm(encoder):
        return export_encoder(model.second_model(), directory, include_expander=True)
    directory.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=directory, prefix=".export-") as aside:
        if isinstance(column, TextColumn):
            encoder.save(aside, column.tokenizer)
            _verify_stock_text(encoder, aside)
            again: nn.Module = TextEncoder.create(aside, pretrained=True)
        else:
            assert isinstance(column, WaveformColumn)
            save_waveform_encoder(encoder, column.sampling_rate, aside)
            again = WaveformEncoder.create(aside, pretrained=True)
        found, expected = again.state_dict(), encoder.state_dict()
        different = [
            name for name in found.keys() | expected.keys()
            if name not in found or name not in expected
            or not torch.equal(found[name].cpu(), expected[name].cpu())
        ]  # fmt: skip
        if different:
            raise ExportError(
                f"transformers must load the same weights of the second encoder, and "
                f"{len(different)} differ: {', '.join(sorted(different)[:5])}."
            )
        for file in Path(aside).iterdir():
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
    if not torch.allclose(hidden.float().mean(1), expected, rtol=1e-4, atol=1e-5):
        raise ExportError(
            f"{name}{part} must give the features that the second encoder was trained to give, "
            "and does not."
        )


def check_second_exportable(model: VICRegModel, pairs: PairedSplit | None) -> None:
    """Make sure, before training, that `export_second_encoder` will be able to write.

    Raises:
        ExportError: it will not.
    """
    if not has_second_encoder(model):
        return
    with temporary_folder() as aside:
        try:
            export_second_encoder(model, aside, column=None if pairs is None else pairs.column)
        except RuntimeError as error:  # of safetensors, or an ExportError
            raise ExportError(
                f"the second encoder cannot be published: {one_line(error)}"
            ) from error


def push_second_encoder(
    directory: Path,
    repo_id: str,
    *,
    first_id: str,
    include_expander: bool = False,
    license: str | None = None,  # noqa: A002
    token: str | bool | None = None,
    revision: str | None = None,
) -> str:
    """Push a second encoder to a repository that is there, in one commit.

    Args:
        directory: what `export_second_encoder` has written, with its card.
        first_id: the repository of the first encoder, which the card names.
        include_expander: of timm's, also push the expander.

    Returns:
        Address of the commit.
    """
    with temporary_folder() as folder:
        if is_timm_directory(directory):
            export_encoder(load_model(directory)[0], folder, include_expander=include_expander)
        else:
            for file in directory.iterdir():
                if file.is_file() and not file.name.startswith("."):
                    shutil.copyfile(file, folder / file.name)
        if (directory / CARD_FILE).is_file():
            text = (directory / CARD_FILE).read_text(encoding="utf-8")
            (folder / CARD_FILE).write_text(personalise(text, first_id, license), encoding="utf-8")
        return push_folder(
            folder, repo_id, commit_message=UPLOAD, token=token,
            revision=revision, removable=lambda name: name in REMOVABLE,
        )  # fmt: skip


def is_timm_directory(directory: Path) -> bool:
    """Whether a published encoder is one of timm's."""
    config = json.loads((directory / "config.json").read_text(encoding="utf-8"))
    return config.get("model_type") == "timm_wrapper"
