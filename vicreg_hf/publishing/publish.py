"""Publishing: exporting, verifying and pushing the encoders of a run."""

from __future__ import annotations

import json
import shlex
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import transformers
from huggingface_hub import ModelCard
from torch import nn

from vicreg_hf.data.columns.texts import TextColumn
from vicreg_hf.data.columns.waveforms import WaveformColumn
from vicreg_hf.hub.api import check_licence, check_repo_id, check_revision, open_repository
from vicreg_hf.hub.card import CARD_FILE, PICTURES, PRIME_SUFFIX, model_card, write_card
from vicreg_hf.hub.export import (
    ONNX_FILE,
    ExportError,
    check_same_weights,
    export_encoder,
    export_onnx,
    same_features,
    verify_export,
)
from vicreg_hf.hub.layout import CONFIG_FILE, PRIME_DIRECTORY, is_published
from vicreg_hf.hub.push import push_encoder
from vicreg_hf.hub.source import find_encoder, terms_of
from vicreg_hf.modeling_vicreg import VICRegModel
from vicreg_hf.models.text_encoder import TextEncoder
from vicreg_hf.models.timm_models import is_timm
from vicreg_hf.models.waveform_encoder import WaveformEncoder, save_waveform_encoder
from vicreg_hf.publishing.loading import load_model
from vicreg_hf.runtime.checks import one_line
from vicreg_hf.runtime.files import temporary_folder


def publish(
    source: str | Path,
    repo_id: str,
    *,
    private: bool | None = None,
    include_expander: bool = False,
    revision: str | None = None,
    onnx: bool = False,
    license: str | None = None,  # noqa: A002
    publish_images: bool = False,
    token: str | bool | None = None,
) -> str:
    """Push what a run made, in one commit, with its card.

    A second branch's encoder goes to a repository of its own, `org/name-prime`.

    Args:
        source: output_dir of a run, or a directory that `VICRegModel.from_pretrained` loads.
        repo_id: `org/name`, made if absent.
        private: as `open_repository` takes it.
        include_expander: also push the expander.
        revision: a branch, made if absent.
        onnx: also push onnx/model.onnx.
        license: of the weights, in the card; None leaves what the card says.
        publish_images: also push the picture that shows images of the data.
        token: None takes that of HF_TOKEN or `hf auth login`.

    Returns:
        Address of the first encoder's commit.

    Raises:
        ValueError: the source holds no encoder, or an id or a revision has another form.
        ExportError: stock loaders do not load the encoder with the same weights and features.
        HubError: the Hub refuses, or cannot be reached; the earlier revision is as it was.
    """
    check_repo_id(repo_id)
    if revision is not None:
        check_revision(revision)
    if license is not None:
        check_licence(license)
    second = Path(source) / PRIME_DIRECTORY
    first, model = _open(source, include_expander)
    config = json.loads((first / CONFIG_FILE).read_text(encoding="utf-8"))
    if "ImageClassification" in str(config.get("architectures")):
        raise ValueError(
            f"what is published must be an encoder, and {first} holds a classifier, which would be "
            f"lost; hf upload {repo_id} {first} pushes it as it is, with the names of the classes."
        )
    with temporary_folder() as folder:
        # verified before repositories are made, which would stay empty if this failed
        if is_published(first):
            verify_export(model, first)
        else:
            first = export_encoder(model, folder, include_expander=include_expander)
        has_second = (second / CONFIG_FILE).is_file()
        if has_second and is_published(second):
            verify_export(load_model(second)[0], second)
        address, *_ = push_encoders(
            first, second if has_second else None, repo_id, private=private, revision=revision,
            include_expander=include_expander, short_card=_card_of(first, model, license),
            extra={ONNX_FILE: export_onnx(model, folder)} if onnx else None,
            license=license, publish_images=publish_images, token=token,
        )  # fmt: skip
    return address


def export_source(
    source: str | Path,
    directory: str | Path,
    *,
    include_expander: bool = False,
    onnx: bool = False,
) -> list[Path]:
    """Write the encoder of a run or of a checkpoint to a directory, with its card.

    A second branch's encoder goes to `encoder_prime` in it, where the run has written one.

    Args:
        source: as for `publish`.
        directory: empty, or made if absent. It may be the encoder's own directory, to which onnx
            adds a file.
        include_expander: also write the expander.
        onnx: also write onnx/model.onnx.

    Returns:
        What was written.

    Raises:
        ValueError: the source holds no encoder, the directory holds files already, or packages for
            ONNX are missing.
        ExportError: stock loaders do not load the encoder with the same weights and features.
        RuntimeError: the backbone cannot be written as ONNX.
    """
    (first, model), directory = _open(source, include_expander), Path(directory)
    second, itself = Path(source) / PRIME_DIRECTORY, directory.resolve() == first.resolve()
    if itself and not is_published(first):
        raise ValueError(f"directory must be another than the checkpoint's own, got {directory}.")
    if not itself and directory.exists() and any(directory.iterdir()):
        raise ValueError(
            f"directory must be empty or absent, or the encoder's own, got {directory}, in which "
            "files would be replaced; choose another."
        )
    written = [export_onnx(model, directory)] if onnx else []
    if itself:
        verify_export(model, first)
        return written
    export_encoder(model, directory, include_expander=include_expander)
    card = (first / CARD_FILE).is_file()
    if not card:
        write_card(directory / CARD_FILE, _card_of(first, model))
    for name in (CARD_FILE, *PICTURES) if card else ():
        if (first / name).is_file():
            (directory / name).parent.mkdir(exist_ok=True)
            shutil.copy2(first / name, directory / name)
    written.insert(0, directory)
    if (second / CONFIG_FILE).is_file():
        written.append(directory / PRIME_DIRECTORY)
        shutil.copytree(second, written[-1], dirs_exist_ok=True)
    return written


def _card_of(directory: Path, model: VICRegModel, licence: str | None = None) -> ModelCard:
    """The card of a model whose directory has none, such as a checkpoint."""
    base, stated = terms_of(directory, model)
    return model_card(model, licence=licence or stated, base_model=base)


def _open(source: str | Path, include_expander: bool) -> tuple[Path, VICRegModel]:
    """The directory to publish from, and the model in it.

    Raises:
        ValueError: there is none, or not the expander that is wanted.
    """
    first = find_encoder(source)
    model, has_expander = load_model(first)
    if include_expander and not has_expander:
        raise ValueError(
            f"include_expander needs an expander, and {first} holds none; publish the "
            "output_dir of the run, or leave it out."
        )
    return first, model


def push_encoders(
    first: Path,
    second: Path | None,
    repo_id: str,
    *,
    private: bool | None = None,
    token: str | bool | None = None,
    revision: str | None = None,
    extra: Mapping[str, Path] | None = None,
    short_card: ModelCard | None = None,
    **settings: Any,
) -> list[str]:
    """Push the directories of one or two encoders, as they were written and verified.

    Args:
        first: the first branch's encoder; likewise second.
        extra: see `push_encoder`; likewise short_card and the settings.

    Returns:
        The address of each commit.
    """
    where: Any = {"token": token, "revision": revision}
    repo_id = open_repository(repo_id, private=private, **where)
    second_id = repo_id + PRIME_SUFFIX
    if second is not None:
        second_id = open_repository(second_id, private=private, **where)
    settings |= where
    addresses = [push_encoder(first, repo_id, extra=extra, short_card=short_card, **settings)]
    if second is not None:
        addresses.append(push_encoder(second, second_id, first_id=repo_id, **settings))
    return addresses


def export_encoders(
    model: VICRegModel, first: Path, second: Path, *, column: Any, include_expander: bool = True
) -> Path | None:
    """Write and verify both encoders of a run.

    Args:
        first: the directory of the first encoder; likewise second.
        column: the column of the second branch, if it has one.

    Returns:
        The directory of the second encoder; None if there is none to publish.
    """
    export_encoder(model, first, include_expander=include_expander)
    if model.prime is None or isinstance(model.prime.backbone, nn.Identity):
        return None  # precomputed embeddings have no encoder
    return export_second_encoder(model, second, column=column)


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


def check_exportable(model: VICRegModel, *, column: Any = None) -> None:
    """Make sure, before training, that `export_encoders` will be able to write this model.

    Raises:
        ExportError: it will not.
    """
    with temporary_folder() as folder:
        try:
            export_encoders(
                model, folder, folder / PRIME_DIRECTORY, column=column, include_expander=False
            )
        except RuntimeError as error:  # of safetensors on shared memory, or an ExportError
            raise ExportError(
                f"{model.config.architecture} with model_args={model.config.model_args} cannot be "
                f"published: {one_line(error)}"
            ) from error


def retry_command(
    source: str | Path, repo_id: str, *, private: bool = False, publish_images: bool = False
) -> str:
    """The command that pushes a run's encoder again."""
    words = ["vicreg-hf", "publish", str(source), "--repo_id", repo_id]
    words += ["--private"] * private + ["--publish_images", "true"] * publish_images
    return shlex.join(words)
