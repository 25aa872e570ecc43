"""Writing an encoder, also as ONNX, and verifying it with the loaders that users have."""

from __future__ import annotations

import copy
import shutil
import tempfile
import warnings
from pathlib import Path
from typing import Any, Protocol

import timm
import torch
from torch import Tensor, nn
from transformers import AutoModel

from vicreg_hf.configuration_vicreg import VICRegConfig
from vicreg_hf.hub.layout import TRAINING_ONLY
from vicreg_hf.runtime.checks import one_line

ONNX_FILE = "onnx/model.onnx"
REMEDY = (
    "Build the backbone from architecture and model_args alone; modules put in by hand are not "
    "written."
)


class ExportError(RuntimeError):
    """An encoder cannot be written so that it loads with the same weights and features."""


class EncoderModel(Protocol):
    """The part of a `VICRegModel` that is published."""

    config: VICRegConfig
    num_features: int

    @property
    def encoder(self) -> nn.Module: ...

    def save_pretrained(self, save_directory: str, *, include_expander: bool = True) -> None: ...


def export_encoder(
    model: EncoderModel, directory: str | Path, *, include_expander: bool = False
) -> Path:
    """Write the published layout once stock transformers and timm load it as this encoder.

    Args:
        directory: made if absent; files with other names in it are left alone.
        include_expander: also write the expander, as `VICRegModel.save_pretrained` does.

    Returns:
        The directory.

    Raises:
        ExportError: weights or features differ when they are loaded; the directory is as it was.
        ValueError: the model is not a VICRegModel.
    """
    if not isinstance(getattr(model, "config", None), VICRegConfig):
        raise ValueError(
            f"model must be a VICRegModel, got {type(model).__name__}; "
            "VICRegModel.from_timm makes one of a backbone of timm."
        )
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    for abandoned in directory.glob(".export-*"):  # by a process that was killed
        shutil.rmtree(abandoned, ignore_errors=True)
    with tempfile.TemporaryDirectory(dir=directory, prefix=".export-") as aside:
        model.save_pretrained(aside, include_expander=include_expander)
        verify_export(model, aside)
        for name in TRAINING_ONLY:
            if not (Path(aside) / name).exists():
                (directory / name).unlink(missing_ok=True)
        for file in Path(aside).iterdir():
            file.replace(directory / file.name)
    return directory


@torch.no_grad()
def verify_export(model: EncoderModel, directory: str | Path) -> None:
    """Load a published encoder as transformers and timm do, and compare it with the model.

    Raises:
        ExportError: weights are not equal bit for bit, or features are not equal.
    """
    reference = copy.deepcopy(model.encoder).cpu().float().eval()
    pixels = example_pixels(model.config)
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
            encoder = load(str(directory)).eval()
        except (RuntimeError, ValueError, TypeError, ImportError, OSError) as error:
            raise ExportError(
                f"{loader} must be able to load the encoder, and cannot: {one_line(error)}. "
                f"{REMEDY}"
            ) from error
        check_same_weights(reference, encoder, loader)
        if not same_features(encoder(pixels), expected):
            raise ExportError(f"{loader} must give the same features, and does not. {REMEDY}")


def example_pixels(config: VICRegConfig) -> Tensor:
    """Two images of noise, (2, C, S, S) float32, always the same."""
    assert config.pretrained_cfg is not None
    noise = torch.Generator().manual_seed(0)
    return torch.randn(2, *config.pretrained_cfg["input_size"], generator=noise)


def same_features(features: Tensor, expected: Tensor) -> bool:
    """Whether features are equal but for rounding, as a loader may sum in another order."""
    return features.shape == expected.shape and torch.allclose(
        features, expected, rtol=1e-4, atol=1e-5
    )


def check_same_weights(expected: nn.Module, loaded: nn.Module, loader: str) -> None:
    """Make sure that the weights of two modules are equal bit for bit.

    Raises:
        ExportError: they are not; the first are named.
    """
    a, b = expected.state_dict(), loaded.state_dict()
    different = sorted(
        name for name in a.keys() | b.keys()
        if name not in a or name not in b or not torch.equal(a[name].cpu(), b[name].cpu())
    )  # fmt: skip
    if different:
        raise ExportError(
            f"{loader} must load the same weights, and {len(different)} differ: "
            f"{', '.join(different[:5])}."
        )


def _load_transformers(directory: str) -> nn.Module:
    model: Any = AutoModel.from_pretrained(directory, dtype=torch.float32)
    return model.timm_model


def _load_timm(directory: str) -> nn.Module:
    return timm.create_model(f"local-dir:{directory}", pretrained=True)


LOADERS = {"transformers": _load_transformers, "timm": _load_timm}


def _without_traces(path: Path) -> None:
    """Leave out of an ONNX file where on this machine the code lies that made each node."""
    import onnx

    model = onnx.load(path)
    parts: list[Any] = [model, model.graph, *model.functions]
    for graph in parts[1:]:
        parts += [*graph.node, *graph.value_info]
    parts += [*model.graph.input, *model.graph.output, *model.graph.initializer]
    for part in parts:
        part.ClearField("metadata_props")
        part.ClearField("doc_string")
    onnx.save(model, path)


def export_onnx(model: EncoderModel, directory: Path) -> Path:
    """Write onnx/model.onnx: pixel_values (B, C, S, S) to pooler_output (B, F), any B.

    Returns:
        The path of the file.

    Raises:
        ValueError: onnx, onnxscript or onnxruntime is not installed.
        RuntimeError: the backbone cannot be exported, or onnxruntime gives other features.
    """
    try:
        import onnxruntime
        import onnxscript  # noqa: F401
    except ImportError as error:
        raise ValueError(
            f"ONNX export needs the package {error.name}; pip install 'vicreg-hf[onnx]'."
        ) from None
    path = directory / ONNX_FILE
    path.parent.mkdir(parents=True, exist_ok=True)
    encoder = copy.deepcopy(model.encoder).cpu().float().eval()
    pixels = example_pixels(model.config)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch warns about its own code
        try:
            torch.onnx.export(
                encoder, (pixels,), path, input_names=["pixel_values"],
                output_names=["pooler_output"], dynamic_shapes=({0: torch.export.Dim("batch")},),
                external_data=False, verbose=False,
            )  # fmt: skip
        except Exception as error:
            raise RuntimeError(
                f"torch.onnx must be able to export {model.config.architecture}, and cannot: "
                f"{one_line(error)[:500]}"
            ) from error
    _without_traces(path)
    session: Any = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    for batch in (pixels, torch.cat([pixels, pixels[:1]])):
        with torch.inference_mode():
            expected = encoder(batch)
        (found,) = session.run(["pooler_output"], {"pixel_values": batch.numpy()})
        if not torch.allclose(torch.from_numpy(found), expected, rtol=1e-3, atol=1e-4):
            raise RuntimeError(
                f"onnxruntime must give the features of {model.config.architecture}, and they "
                f"differ by up to {(torch.from_numpy(found) - expected).abs().max():.2g}."
            )
    return path
