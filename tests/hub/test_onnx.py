"""ONNX: the exported encoder gives the features of the model."""

from __future__ import annotations

from pathlib import Path

import onnxruntime
import torch
from families import trained

from vicreg_hf.hub.export import export_onnx


def test_onnx_gives_the_features_of_any_number_of_images(tmp_path: Path) -> None:
    model = trained("test_vit")
    path = export_onnx(model, tmp_path)
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    cfg = model.config.pretrained_cfg
    assert cfg is not None
    for batch in (1, 5):
        x = torch.randn(batch, *cfg["input_size"])
        (features,) = session.run(None, {"pixel_values": x.numpy()})
        with torch.no_grad():
            expected = model.encoder(x)
        torch.testing.assert_close(torch.from_numpy(features), expected, rtol=1e-3, atol=1e-4)
