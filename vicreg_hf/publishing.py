"""Publishing encoders: finding what a run made, and pushing it."""

from __future__ import annotations

import shlex
import shutil
from pathlib import Path
from typing import Any

from vicreg_hf.cards import CARD_FILE, PICTURES, SECOND, model_card, personalise
from vicreg_hf.checkpointing import newest_checkpoint
from vicreg_hf.exporting import export_encoder, load_model
from vicreg_hf.hub import (
    check_repo_id,
    check_revision,
    holds_file,
    open_repository,
    push_folder,
    read_text,
)
from vicreg_hf.layout import ENCODER_FILE
from vicreg_hf.modeling_vicreg import VICRegModel
from vicreg_hf.onnx import export_onnx
from vicreg_hf.second_encoder import DIRECTORY, REMOVABLE, UPLOAD, push_second_encoder
from vicreg_hf.whole_files import temporary_folder


def publish(
    source: str | Path,
    repo_id: str,
    *,
    private: bool | None = None,
    include_expander: bool = False,
    revision: str | None = None,
    onnx: bool = False,
    license: str | None = None,  # noqa: A002
    token: str | bool | None = None,
) -> str:
    """Push what a run made, in one commit, with its card.

    A second branch's encoder goes to a repository of its own, `org/name-prime`.

    Args:
        source: output_dir of a run, or a directory that `VICRegModel.from_pretrained` loads.
        repo_id: `org/name`, made if absent.
        private: of a new repository.
        include_expander: also push the expander.
        revision: a branch, made if absent.
        onnx: also push onnx/model.onnx.
        license: of the weights, in the card; None leaves what the card says.
        token: None takes that of HF_TOKEN or `hf auth login`.

    Returns:
        Address of the first encoder's commit.

    Raises:
        ValueError: a source, an id or a revision that cannot be.
        ExportError: the encoder does not load as what it was.
        HubError: the Hub refuses, or cannot be reached; the earlier revision is as it was.
    """
    check_repo_id(repo_id)
    if revision is not None:
        check_revision(revision)
    directory = find_encoder(source)
    model, has_expander = load_model(directory)
    if include_expander and not has_expander:
        raise ValueError(
            f"include_expander needs an expander, and {directory} holds none; publish the "
            "output_dir of the run, or leave it out."
        )
    with temporary_folder() as aside:
        # before there are repositories, which nothing would come to if this failed
        folder = _exported(model, aside, include_expander=include_expander, onnx=onnx)
        where: Any = {"token": token, "revision": revision}
        repo_id = open_repository(repo_id, private=private, **where)
        second = Path(source) / DIRECTORY
        if (second / "config.json").is_file():
            beside = open_repository(f"{repo_id}{SECOND}", private=private, **where)
            push_second_encoder(
                second, beside, first_id=repo_id, include_expander=include_expander,
                license=license, **where,
            )  # fmt: skip
        return _push(folder, model, repo_id, license=license, card=directory, **where)


def push_model(
    model: VICRegModel,
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


def _exported(model: VICRegModel, directory: Path, *, include_expander: bool, onnx: bool) -> Path:
    folder = export_encoder(model, directory, include_expander=include_expander)
    if onnx:
        export_onnx(model, folder)
    return folder


def _push(
    folder: Path,
    model: VICRegModel,
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


def retry_command(source: str | Path, repo_id: str, *, private: bool = False) -> str:
    """The command that pushes a run's encoder again."""
    words = ["python", "scripts/publish.py", str(source), "--repo_id", repo_id]
    return shlex.join([*words, "--private"] if private else words)


def find_encoder(source: str | Path) -> Path:
    """The directory to publish from: a run's encoder, its newest checkpoint, or the source itself.

    Raises:
        ValueError: nothing there can be published.
    """
    source = Path(source)
    for directory in (source / "encoder", source):
        if (directory / "config.json").is_file() and (directory / ENCODER_FILE).is_file():
            return directory
    newest, _ = newest_checkpoint(source / "checkpoints")
    if newest is not None:
        return newest
    raise ValueError(
        "what is published must be the output_dir of a run, its encoder or a checkpoint, got "
        f"{str(source)!r}, which holds neither {ENCODER_FILE} nor a valid checkpoint."
    )
