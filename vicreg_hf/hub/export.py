"""Writing an encoder, checked through the loaders that others use.

Shapes: C channels, S side in pixels, F features.
"""

from __future__ import annotations

import copy
import shutil
import tempfile
from pathlib import Path
from typing import Any

import timm
import torch
from torch import Tensor, nn
from transformers import AutoModel

from vicreg_hf.configuration_vicreg import VICRegConfig
from vicreg_hf.hub.layout import TRAINING_ONLY
from vicreg_hf.runtime.checks import one_line
from vicreg_hf.runtime.files import temporary_folder


class ExportError(RuntimeError):
    """What was written does not load as what it was written from."""


def export_encoder(model: Any, directory: str | Path, *, include_expander: bool = False) -> Path:
    """Write the published layout, and make sure that stock transformers and timm agree with it.

    Args:
        directory: made if absent; files of other names in it are left alone.
        include_expander: see `VICRegModel.save_pretrained`.

    Returns:
        The directory.

    Raises:
        ExportError: weights or features differ when loaded again; the directory is as it was.
        ValueError: the model is no VICRegModel.
    """
    if not isinstance(getattr(model, "config", None), VICRegConfig):
        raise ValueError(
            f"model must be a VICRegModel, got {type(model).__name__}; "
            "VICRegModel.from_timm makes one of a backbone of timm."
        )
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    for left in directory.glob(".export-*"):  # by a process that was killed
        shutil.rmtree(left, ignore_errors=True)
    with tempfile.TemporaryDirectory(dir=directory, prefix=".export-") as aside:
        model.save_pretrained(aside, include_expander=include_expander)
        verify_export(model, aside)
        for name in TRAINING_ONLY:
            if not (Path(aside) / name).exists():
                (directory / name).unlink(missing_ok=True)
        for file in Path(aside).iterdir():
            file.replace(directory / file.name)
    return directory


def check_exportable(model: Any) -> None:
    """Make sure, before training, that `export_encoder` will be able to write this model.

    Raises:
        ExportError: it will not.
    """
    with temporary_folder() as aside:
        try:
            export_encoder(model, aside)
        except RuntimeError as error:  # safetensors on tensors that share memory, or an ExportError
            raise ExportError(
                f"{model.config.architecture} with model_args={model.config.model_args} cannot be "
                f"published: {one_line(error)}"
            ) from error


@torch.no_grad()
def verify_export(model: Any, directory: str | Path) -> None:
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
    if expected.shape != (2, model.num_features):
        raise ExportError(
            "an encoder must give one vector of features an image to be published, got shape "
            f"{tuple(expected.shape)} for 2; build the backbone with a global_pool."
        )
    for loader, load in LOADERS.items():
        try:
            encoder = load(directory).eval()
        except (RuntimeError, ValueError, TypeError, ImportError) as error:
            raise ExportError(
                f"{loader} must be able to load the encoder, and cannot: "
                f"{one_line(error)}. Build the backbone from architecture and "
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
