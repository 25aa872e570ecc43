"""Pushing an encoder and its card in one commit."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from vicreg_hf.hub.api import holds_file, push_folder, read_text
from vicreg_hf.hub.card import CARD_FILE, PICTURES, model_card, personalise
from vicreg_hf.hub.export import export_encoder
from vicreg_hf.hub.layout import TRAINING_ONLY
from vicreg_hf.hub.onnx import ONNX_FILE, export_onnx
from vicreg_hf.runtime.files import temporary_folder

UPLOAD = "Upload a VICReg encoder"
"""Of commits, unless told otherwise."""
REMOVABLE = (*TRAINING_ONLY, ONNX_FILE, *PICTURES)
"""Files of an earlier revision that go when a push has none of them."""


def push_model(
    model: Any,
    repo_id: str,
    *,
    include_expander: bool = False,
    onnx: bool = False,
    license: str | None = None,  # noqa: A002
    card: Path | None = None,
    commit_message: str = UPLOAD,
    create_pr: bool = False,
    token: str | bool | None = None,
    revision: str | None = None,
) -> str:
    """Push a model to a repository that is there, in one commit; see `publish`.

    Args:
        card: a directory with README.md and pictures; without one the repository keeps its card,
            or gets one that says what the model alone can say.
    """
    with temporary_folder() as aside:
        folder = _exported(model, aside, include_expander=include_expander, onnx=onnx)
        return _push(
            folder, model, repo_id, license=license, card=card, commit_message=commit_message,
            create_pr=create_pr, token=token, revision=revision,
        )  # fmt: skip


def _exported(model: Any, directory: Path, *, include_expander: bool, onnx: bool) -> Path:
    folder = export_encoder(model, directory, include_expander=include_expander)
    if onnx:
        export_onnx(model, folder)
    return folder


def _push(
    folder: Path,
    model: Any,
    repo_id: str,
    *,
    license: str | None,  # noqa: A002
    card: Path | None,
    commit_message: str = UPLOAD,
    create_pr: bool = False,
    token: str | bool | None,
    revision: str | None,
) -> str:
    """Add the card to an exported encoder, and push both."""
    removable = REMOVABLE
    text = None
    if card is not None and (card / CARD_FILE).is_file():
        text = (card / CARD_FILE).read_text(encoding="utf-8")
        for name in PICTURES:
            if (card / name).is_file():
                (folder / name).parent.mkdir(exist_ok=True)
                shutil.copyfile(card / name, folder / name)
    elif holds_file(repo_id, CARD_FILE, token=token, revision=revision):
        removable = tuple(set(REMOVABLE) - set(PICTURES))
        if license is not None:
            text = read_text(repo_id, CARD_FILE, token=token, revision=revision)
    else:
        # where the weights are from is not known, nor what may be done with them
        text = str(model_card(model.config, num_features=model.num_features, licence=license))
    if text is not None:
        (folder / CARD_FILE).write_text(personalise(text, repo_id, license), encoding="utf-8")
    return push_folder(
        folder, repo_id, commit_message=commit_message, create_pr=create_pr, token=token,
        revision=revision, removable=lambda name: name in removable,
    )  # fmt: skip
