"""Publishing an encoder: checked through the loaders that others use, then pushed."""

from __future__ import annotations

import copy
import shlex
import shutil
import tempfile
from pathlib import Path
from typing import Any

import timm
import torch
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import AutoModel

from vicreg_hf.cards import CARD_FILE, PICTURES, model_card, personalise
from vicreg_hf.checkpointing import newest_checkpoint
from vicreg_hf.configuration_vicreg import INDEX_FILE
from vicreg_hf.hub import check_repo_id, check_revision, holds_file, open_repository, push_folder
from vicreg_hf.modeling_vicreg import ENCODER_FILE, EXPANDER_FILE, VICRegModel
from vicreg_hf.onnx import ONNX_FILE, export_onnx

REMOVABLE = (EXPANDER_FILE, INDEX_FILE, ONNX_FILE, *PICTURES)


class ExportError(RuntimeError):
    """What was written does not load as what it was written from."""


def export_encoder(
    model: VICRegModel, directory: str | Path, *, include_expander: bool = False
) -> Path:
    """Write the published layout, and make sure that stock transformers and timm agree with it.

    Args:
        directory: made if absent; files of other names in it are left alone.
        include_expander: see `VICRegModel.save_pretrained`.

    Returns:
        The directory.

    Raises:
        ExportError: weights or features differ when loaded again; the directory is as it was.
    """
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    for left in directory.glob(".export-*"):  # by a process that was killed
        shutil.rmtree(left, ignore_errors=True)
    with tempfile.TemporaryDirectory(dir=directory, prefix=".export-") as aside:
        model.save_pretrained(aside, include_expander=include_expander)
        verify_export(model, aside)
        for name in (EXPANDER_FILE, INDEX_FILE):
            if not (Path(aside) / name).exists():
                (directory / name).unlink(missing_ok=True)
        for file in Path(aside).iterdir():
            file.replace(directory / file.name)
    return directory


def check_exportable(model: VICRegModel) -> None:
    """Make sure, before training, that `export_encoder` will be able to write this model.

    Raises:
        ExportError: it will not.
    """
    with tempfile.TemporaryDirectory() as aside:
        try:
            export_encoder(model, aside)
        except RuntimeError as error:  # safetensors on tensors that share memory, or an ExportError
            raise ExportError(
                f"{model.config.architecture} with model_args={model.config.model_args} cannot be "
                f"published: {' '.join(str(error).split())}"
            ) from error


@torch.no_grad()
def verify_export(model: VICRegModel, directory: str | Path) -> None:
    """Load a published encoder as transformers and timm do, and compare it with the model.

    Raises:
        ExportError: weights that are not equal bit for bit, or features that are not equal.
    """
    reference = copy.deepcopy(model.encoder).cpu().float().eval()
    cfg = model.config.pretrained_cfg
    assert cfg is not None
    noise = torch.Generator().manual_seed(0)
    pixels = torch.randn(2, *cfg["input_size"], generator=noise)
    expected = reference(pixels)
    if not bool(expected.isfinite().all()):
        raise ExportError("an encoder must give finite features to be published, and does not.")
    for loader, load in LOADERS.items():
        try:
            encoder = load(directory).eval()
        except (RuntimeError, ValueError, TypeError, ImportError) as error:
            raise ExportError(
                f"{loader} must be able to load the encoder, and cannot: "
                f"{' '.join(str(error).split())}. Build the backbone from architecture and "
                "model_args alone; modules put in by hand are not written."
            ) from error
        different = _different(reference.state_dict(), encoder.state_dict())
        if different:
            raise ExportError(
                f"{loader} must load the same weights, and {len(different)} differ: "
                f"{', '.join(different[:5])}."
            )
        features = encoder(pixels)
        if features.shape != expected.shape or not torch.allclose(
            features, expected, rtol=1e-4, atol=1e-5
        ):
            raise ExportError(
                f"{loader} must give the same features, and does not. Build the backbone from "
                "architecture and model_args alone; modules put in by hand are not written."
            )


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
        Address of the commit.

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
    repo_id = open_repository(repo_id, private=private, token=token, revision=revision)
    return push_model(
        model, repo_id, include_expander=include_expander, onnx=onnx, license=license,
        card=directory, token=token, revision=revision,
    )  # fmt: skip


def push_model(
    model: VICRegModel,
    repo_id: str,
    *,
    include_expander: bool = False,
    onnx: bool = False,
    license: str | None = None,  # noqa: A002
    card: Path | None = None,
    commit_message: str = "Upload a VICReg encoder",
    create_pr: bool = False,
    token: str | bool | None = None,
    revision: str | None = None,
) -> str:
    """Push a model to a repository that is there, in one commit; see `publish`.

    Args:
        card: a directory with README.md and pictures; without one the repository keeps its card,
            or gets one that says what the model alone can say.
    """
    with tempfile.TemporaryDirectory() as aside:
        folder = export_encoder(model, aside, include_expander=include_expander)
        if onnx:
            export_onnx(model, folder)
        removable = REMOVABLE
        if card is not None and (card / CARD_FILE).is_file():
            text = (card / CARD_FILE).read_text(encoding="utf-8")
            (folder / CARD_FILE).write_text(personalise(text, repo_id, license), encoding="utf-8")
            for name in PICTURES:
                if (card / name).is_file():
                    (folder / name).parent.mkdir(exist_ok=True)
                    shutil.copyfile(card / name, folder / name)
        elif not holds_file(repo_id, CARD_FILE, token=token, revision=revision):
            text = str(model_card(model.config, num_features=model.num_features))
            (folder / CARD_FILE).write_text(personalise(text, repo_id, license), encoding="utf-8")
        else:
            removable = tuple(set(REMOVABLE) - set(PICTURES))
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


def load_model(directory: Path) -> tuple[VICRegModel, bool]:
    """The model in a directory, and whether its expander is there too and not new.

    Raises:
        ValueError: the directory holds something else.
    """
    try:
        loaded: Any = VICRegModel.from_pretrained(directory, output_loading_info=True)
    except (OSError, RuntimeError, ValueError, TypeError, KeyError, SafetensorError) as error:
        raise ValueError(
            f"{directory} must hold an encoder or a training checkpoint, and does not load: "
            f"{' '.join(str(error).split())}"
        ) from error
    model, found = loaded
    absent = sorted(name for name in found["missing_keys"] if not name.startswith("expander."))
    if absent:
        raise ValueError(
            f"{directory} must hold every weight of {model.config.architecture}, and lacks "
            f"{len(absent)}: {', '.join(absent[:5])}."
        )
    return model, not found["missing_keys"]


def _load_transformers(directory: str | Path) -> nn.Module:
    model: Any = AutoModel.from_pretrained(str(directory), dtype=torch.float32)
    return model.timm_model


def _load_timm(directory: str | Path) -> nn.Module:
    return timm.create_model(f"local-dir:{directory}", pretrained=True)


LOADERS = {"transformers": _load_transformers, "timm": _load_timm}


def _different(a: dict[str, Tensor], b: dict[str, Tensor]) -> list[str]:
    return sorted(
        name for name in a.keys() | b.keys()
        if name not in a or name not in b or not torch.equal(a[name], b[name])
    )  # fmt: skip
