"""Encoded images to uint8 tensors, whatever their condition.

Shapes: C channels, H x W pixels.
"""

from __future__ import annotations

import io
import warnings
from contextlib import suppress
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor
from torchvision.io import ImageReadMode, decode_jpeg

MAX_PIXELS = 89_000_000
"""Largest size that a header may claim, from where PIL warns; checked before pixels are read."""
with suppress(ImportError):  # PIL's plugin for what telephones write, where it is installed
    from pi_heif import register_heif_opener

    register_heif_opener()
Image.init()
FORMATS = tuple(
    name
    for name in (
        "JPEG", "PNG", "WEBP", "TIFF", "GIF", "BMP", "MPO", "AVIF", "JPEG2000", "PPM", "DIB", "ICO",
        "QOI", "PSD", "PCX", "SGI", "DDS", "TGA", "HEIF",
    )
    if name in Image.OPEN
)  # fmt: skip
"""Formats of pixels alone: PIL's EPS would run Ghostscript on a stranger's program."""
SUFFIXES = frozenset(s for s, name in Image.registered_extensions().items() if name in FORMATS)
"""Endings of the names of image files."""
HEIF_SUFFIXES = frozenset({".heic", ".heif", ".hif"})
"""Endings of files that need a plugin, and are found without it, too."""
HEIF_BRANDS = (b"heic", b"heix", b"hevc", b"mif1", b"msf1")
"""Brands that tell HEIF from films and AVIF."""
MODES = {1: "L", 3: "RGB", 4: "RGBA"}
"""PIL's mode of encoded images, by their number of channels."""
BLOCK = 2**20
"""Numbers that are converted at once, to need little memory."""
_JPEG = b"\xff\xd8\xff"
_JPEG_END = b"\xff\xd9"


class ImageError(ValueError):
    """Bytes that are not an image, or not one that can be used."""


def decode_image(data: bytes, channels: int = 3) -> Tensor:
    """Decode the first frame of an image, upright.

    CMYK, palettes and gray become colour, alpha is dropped; 16-bit levels are rescaled, and float
    values stretched over their range, where PIL would clip them.

    Args:
        data: the file's content, in one of `FORMATS`.
        channels: C; 1 is gray, 3 RGB, 4 RGB and whatever the fourth channel holds.

    Returns:
        (C, H, W) uint8, in either memory layout.

    Raises:
        ImageError: empty, damaged or truncated data, another format, more than `MAX_PIXELS`.
    """
    if channels not in MODES:
        raise ValueError(
            f"an encoded image has 1, 3 or 4 channels, got {channels}; give images of others as "
            "arrays, in a column of type Array3D."
        )
    if not data:
        raise ImageError("the image is empty (0 bytes).")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # damage that matters is raised
            with Image.open(io.BytesIO(data), formats=FORMATS) as image:
                width, height = image.size
                if width * height > MAX_PIXELS:
                    raise ImageError(
                        f"the image has {width} x {height} pixels, more than the {MAX_PIXELS} "
                        "allowed."
                    )
                if channels == 3 and _is_plain_jpeg(image, data):
                    # PIL's own libjpeg, without the copies that PIL makes of the pixels
                    encoded = torch.frombuffer(bytearray(data), dtype=torch.uint8)
                    return decode_jpeg(encoded, ImageReadMode.RGB)  # pyright: ignore[reportReturnType]
                return _from_pil(image, MODES[channels])
    except ImageError:
        raise
    except UnidentifiedImageError:
        why = "it is of no known format"
        if data[4:8] == b"ftyp" and data[8:12] in HEIF_BRANDS and "HEIF" not in FORMATS:
            why = "it looks like HEIF, which needs `pip install pi-heif`"
        raise ImageError(f"the image cannot be decoded: {why}.") from None
    except Exception as error:  # decoders raise whatever their parsing meets
        raise ImageError(f"the image cannot be decoded: {error}") from error


def _is_plain_jpeg(image: Image.Image, data: bytes) -> bool:
    """A JPEG of RGB or gray that is whole and upright.

    Damaged ones are PIL's: torchvision has leaked memory on them, and crashes on damaged PNGs.
    """
    if not (data.startswith(_JPEG) and data.endswith(_JPEG_END) and image.mode in ("RGB", "L")):
        return False
    with suppress(Exception):
        tagged = not image.info.keys().isdisjoint(("exif", "xmp"))
        return not tagged or image.getexif().get(0x0112, 1) == 1
    return False


def _from_pil(image: Image.Image, mode: str) -> Tensor:
    with suppress(Exception):  # broken EXIF is no reason to lose an image
        image = ImageOps.exif_transpose(image)
    if image.mode in ("F", "I") or image.mode.startswith("I;16"):
        image = Image.fromarray(to_uint8(np.asarray(image)))
    if image.mode == "P" and "transparency" in image.info:
        image = image.convert("RGBA")
    if not (mode == "RGBA" and image.mode == "CMYK"):  # whose four channels stay as they are
        image = image.convert(mode)
    pixels = np.array(image)
    return torch.from_numpy(pixels if pixels.ndim == 3 else pixels[..., None]).permute(2, 0, 1)


def to_uint8(values: NDArray[np.generic]) -> NDArray[np.uint8]:
    """Bring pixels of any number type to 0..255.

    Integers are taken as 16-bit levels, if all are; other values are stretched over the range of
    the finite ones.
    """
    if values.dtype == np.uint8:
        return values.astype(np.uint8)
    low, high = 0.0, 65535.0
    if np.issubdtype(values.dtype, np.floating):
        finite = np.isfinite(values)
        low = float(values.min(where=finite, initial=np.inf))
        high = float(values.max(where=finite, initial=-np.inf))
        low, high = (low, high) if low <= high else (0.0, 1.0)
    elif values.min(initial=0) < 0 or values.max(initial=0) > high:
        low, high = float(values.min()), float(values.max())
    flat = values.reshape(-1)
    levels = np.empty(len(flat), np.uint8)
    for start in range(0, len(flat), BLOCK):
        block = flat[start : start + BLOCK].astype(np.float64)
        scaled = (block - low) / max(high - low, 1e-12)
        scaled = np.nan_to_num(scaled, nan=0, posinf=1, neginf=0).clip(0, 1)
        levels[start : start + BLOCK] = scaled * 255 + 0.5
    return levels.reshape(values.shape)


def image_of_array(array: NDArray[Any], channels: int) -> Tensor:
    """An image given as an array, as data sets keep those of many channels.

    Args:
        array: (C, H, W) or (H, W, C), of any number type.
        channels: C.

    Returns:
        (C, H, W) uint8, as `to_uint8` brings it there.

    Raises:
        ImageError: no numbers, another shape, no pixels.
    """
    if not np.issubdtype(array.dtype, np.number):
        raise ImageError(f"an image must be an array of numbers, got {array.dtype}.")
    if array.ndim == 3 and array.shape[0] != channels and array.shape[2] == channels:
        array = array.transpose(2, 0, 1)
    if array.ndim != 3 or array.shape[0] != channels or array.size == 0:
        raise ImageError(
            f"an image must be of shape ({channels}, H, W) or (H, W, {channels}), got "
            f"{array.shape}."
        )
    return torch.from_numpy(np.ascontiguousarray(to_uint8(array)))
