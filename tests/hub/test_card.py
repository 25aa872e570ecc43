"""The code in a card prepares an image as the training did."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from families import trained
from pictures import deep_png
from PIL import Image

from vicreg_hf import export_encoder
from vicreg_hf.data.columns.image_files import array_pixels, decode_image, to_uint8
from vicreg_hf.features.encode import encode_with
from vicreg_hf.features.encoders import open_encoder
from vicreg_hf.hub.card import MODEL_ID, model_card

X, Y = np.meshgrid(np.linspace(0, 1, 60), np.linspace(0, 1, 50))
RGB = (255 * np.stack([X, Y, (X + Y) / 2], -1)).astype(np.uint8)
DEEP = (1000 * X + 400 * Y).astype(np.uint16)
"""Values of 11 bits."""
IMAGES: dict[str, tuple[int, tuple[float, float] | None, Any]] = {
    "rgb": (3, None, RGB),
    "gray": (1, None, RGB[..., 0]),
    "16-bit": (1, (0.0, 1400.0), DEEP),
    "16-bit-for-rgb": (3, (0.0, 1400.0), DEEP),
    "16-bit-rgb": (3, (0.0, 4080.0), RGB.astype(np.uint16) * 16),
    "16-bit-four-bands": (4, (0.0, 4080.0), np.dstack([RGB, RGB[..., 0]]).astype(np.uint16) * 16),
    "8-bit-four-bands-beside-16-bit": (4, (0.0, 60000.0), np.dstack([RGB, RGB[..., 0]])),
    "8-bit-beside-16-bit": (1, (0.0, 60000.0), RGB[..., 0]),
    "8-bit-rgb-beside-16-bit": (3, (0.0, 60000.0), RGB),
    "four-bands": (4, None, np.dstack([RGB, RGB[..., 0]])),
    "12-channels": (12, (0.0, 1400.0), np.stack([DEEP // k for k in range(1, 13)])),
    "12-channels-of-8-bits": (12, None, np.stack([RGB[..., 0] // k for k in range(1, 13)])),
}


@pytest.mark.filterwarnings("ignore:The image decoding and encoding:DeprecationWarning")
@pytest.mark.parametrize("kind", IMAGES)
def test_a_cards_code_gives_the_features_of_a_training_image(kind: str, tmp_path: Path) -> None:
    channels, limits, values = IMAGES[kind]
    model = trained(model_args={"in_chans": channels}, value_range=limits)
    directory = export_encoder(model, tmp_path / "encoder")
    code = re.search(r"```python\n(.*?)```", str(model_card(model)), re.DOTALL)
    assert code is not None
    file = tmp_path / ("image.npy" if channels == 12 else "image.png")
    if channels == 12:
        np.save(file, values)
        image = torch.from_numpy(to_uint8(array_pixels(values, channels), limits))
    else:
        if values.dtype == np.uint16 and values.ndim == 3:  # PIL cannot write it
            file.write_bytes(deep_png(values))
        else:
            Image.fromarray(values).save(file)
        image = decode_image(file.read_bytes(), channels, limits)
    names: dict[str, Any] = {}
    exec(code[1].replace(MODEL_ID, str(directory)).replace(file.name, str(file)), names)
    encoder = open_encoder(str(directory))
    assert encoder.value_range == limits
    ours, of_negative = (
        encode_with(encoder, encoder.prepare(each)[None], torch.device("cpu"))
        for each in (image, 255 - image)
    )
    assert (names["features"] - ours).norm() < 0.1 * (of_negative - ours).norm()
