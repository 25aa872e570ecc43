"""Writing the encoder as ONNX, and comparing its features with onnxruntime's."""

from __future__ import annotations

import copy
import warnings
from pathlib import Path
from typing import Any

import torch

from vicreg_hf.hub.export import EncoderModel, example_pixels
from vicreg_hf.runtime.checks import one_line

ONNX_FILE = "onnx/model.onnx"


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
