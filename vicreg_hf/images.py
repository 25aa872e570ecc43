"""Encoded images to RGB uint8 tensors.

Shapes: H x W pixels.
"""

from __future__ import annotations

import io
from contextlib import suppress

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

MAX_PIXELS = 89_000_000
"""An image whose header claims more is refused before its pixels are read; PIL warns from here."""


class ImageError(ValueError):
    """Bytes that are not an image, or not one that can be used."""


def decode_image(data: bytes) -> Tensor:
    """Decode the first frame of an image, upright, as RGB.

    Args:
        data: the file's content, of any format PIL reads.

    Returns:
        (3, H, W) uint8.

    Raises:
        ImageError: empty, damaged or truncated data, another format, more than `MAX_PIXELS`.
    """
    if not data:
        raise ImageError("the image is empty (0 bytes).")
    try:
        with Image.open(io.BytesIO(data)) as image:
            width, height = image.size
            if width * height > MAX_PIXELS:
                raise ImageError(
                    f"the image has {width} x {height} pixels, more than the {MAX_PIXELS} allowed."
                )
            return _from_pil(image)
    except ImageError:
        raise
    except Exception as error:  # PIL's plugins raise whatever their parsing meets
        raise ImageError(f"the image cannot be decoded: {error}") from error


def _from_pil(image: Image.Image) -> Tensor:
    with suppress(Exception):  # broken EXIF is no reason to lose an image
        image = ImageOps.exif_transpose(image)
    if image.mode in ("F", "I") or image.mode.startswith("I;16"):
        image = _rescale(image)
    if image.mode == "P" and "transparency" in image.info:
        image = image.convert("RGBA")
    pixels = np.array(image.convert("RGB"))
    return torch.from_numpy(pixels).permute(2, 0, 1).contiguous()


def _rescale(image: Image.Image) -> Image.Image:
    """Bring 16-bit and float pixels to 0..255; PIL's own conversion clips them."""
    values = np.asarray(image, dtype=np.float64)
    if image.mode == "F":
        finite = values[np.isfinite(values)]
        low, high = (finite.min(), finite.max()) if finite.size else (0.0, 1.0)
        values = np.nan_to_num((values - low) / max(high - low, 1e-12), nan=0, posinf=1, neginf=0)
    else:
        values = values / 65535
    return Image.fromarray((values.clip(0, 1) * 255 + 0.5).astype(np.uint8))
