"""The encoder as ONNX, checked against itself with onnxruntime."""

from __future__ import annotations

import copy
import warnings
from pathlib import Path
from typing import Any

import torch

from vicreg_hf.runtime.checks import one_line

ONNX_FILE = "onnx/model.onnx"


def export_onnx(model: Any, directory: Path) -> Path:
    """Write onnx/model.onnx: pixel_values (B, C, S, S) to pooler_output (B, F), any B.

    Returns:
        Its path.

    Raises:
        ValueError: onnx, onnxscript or onnxruntime is not installed.
        RuntimeError: the backbone cannot be exported, or onnxruntime's features differ.
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
    cfg = model.config.pretrained_cfg
    assert cfg is not None
    pixels = torch.randn(2, *cfg["input_size"], generator=torch.Generator().manual_seed(0))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of torch's own parts, on their future
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
        (given,) = session.run(["pooler_output"], {"pixel_values": batch.numpy()})
        if not torch.allclose(torch.from_numpy(given), expected, rtol=1e-3, atol=1e-4):
            raise RuntimeError(
                f"onnxruntime must give the features of {model.config.architecture}, and they "
                f"differ by up to {(torch.from_numpy(given) - expected).abs().max():.2g}."
            )
    return path
