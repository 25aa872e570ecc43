"""Pushing an encoder and its card in one commit."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard

from vicreg_hf.hub.api import open_repository, push_files, read_text, visible_files
from vicreg_hf.hub.card import CARD_FILE, PICTURES, model_card, personalise
from vicreg_hf.hub.export import ONNX_FILE, EncoderModel, export_encoder
from vicreg_hf.hub.layout import TRAINING_ONLY, files_to_push, is_published
from vicreg_hf.runtime.files import temporary_folder

COMMIT_MESSAGE = "Upload a VICReg encoder"
REMOVABLE = (*TRAINING_ONLY, ONNX_FILE, *PICTURES)
"""Files of an earlier revision that are deleted when a push has none of them."""


def push_model(
    model: EncoderModel,
    repo_id: str,
    *,
    include_expander: bool,
    private: bool | None,
    commit_message: str,
    **target: Any,
) -> str:
    """Export a model, and push what was written; see `VICRegModel.push_to_hub`."""
    repo_id = open_repository(repo_id, private=private, **target)
    with temporary_folder() as folder:
        export_encoder(model, folder, include_expander=include_expander)
        return push_encoder(
            folder, repo_id, include_expander=include_expander, commit_message=commit_message,
            short_card=model_card(model, licence=None), **target,
        )  # fmt: skip


def push_encoder(
    directory: Path,
    repo_id: str,
    *,
    include_expander: bool = False,
    extra: Mapping[str, Path] | None = None,
    short_card: ModelCard | None = None,
    first_id: str | None = None,
    license: str | None = None,  # noqa: A002
    commit_message: str = COMMIT_MESSAGE,
    create_pr: bool = False,
    token: str | bool | None = None,
    revision: str | None = None,
) -> str:
    """Push an encoder as it was written and verified, in one commit, to a repository that exists.

    Args:
        directory: where the encoder is, with its card and pictures if there are any.
        include_expander: also push the expander of a VICReg encoder.
        extra: further files, by their path in the repository.
        short_card: the card if neither the directory nor the repository has one.
        first_id: the first branch's repository if this is the second's; both cards name it.
        license: of the weights; None leaves what the card says.

    Returns:
        Address of the commit.

    Raises:
        HubError: the Hub refuses, or cannot be reached; the earlier revision is as it was.
    """
    found = visible_files(directory)
    files: dict[str, Path | bytes] = {**found}
    if is_published(directory):
        files = files_to_push(directory, include_expander=include_expander)
        files |= {name: found[name] for name in PICTURES if name in found}
    removable, text = set(REMOVABLE), None
    if CARD_FILE in found:
        text = found[CARD_FILE].read_text(encoding="utf-8")
    elif kept := read_text(repo_id, CARD_FILE, token=token, revision=revision):
        removable -= set(PICTURES)
        text = kept if license is not None else None
    else:
        text = None if short_card is None else str(short_card)
    if text is not None:
        files[CARD_FILE] = personalise(text, first_id or repo_id, license).encode()
    return push_files(
        {**files, **(extra or {})}, repo_id, commit_message=commit_message, create_pr=create_pr,
        token=token, revision=revision, removable=lambda name: name in removable,
    )  # fmt: skip
