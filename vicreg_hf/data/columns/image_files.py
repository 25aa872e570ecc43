"""Encoded images to uint8 tensors, whatever their condition.

Shapes: C channels, H x W pixels.
"""

from __future__ import annotations

import io
import warnings
import zlib
from contextlib import suppress
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError
from torch import Tensor
from torchvision.io import ImageReadMode, decode_jpeg, decode_png

from vicreg_hf.data.columns.base import ImageError
from vicreg_hf.data.columns.tiffs import (
    AS_ARRAYS,
    check_bands,
    describe_tiff,
    is_signed,
    values_of,
    with_fourth_band,
)
from vicreg_hf.views.operations import MODES
from vicreg_hf.views.reduced import ReducedImage, Reduction, Turn, is_large

MAX_PIXELS = 89_000_000
"""Largest size that a header may claim, from where PIL warns; checked before pixels are read."""
with suppress(ImportError):  # PIL's plugin for what telephones write, where it is installed
    from pi_heif import register_heif_opener

    register_heif_opener()
Image.init()
FORMATS = tuple(
    name
    for name in (
        "JPEG", "PNG", "WEBP", "TIFF", "GIF", "BMP", "AVIF", "JPEG2000", "PPM", "DIB", "ICO", "QOI",
        "PSD", "PCX", "SGI", "DDS", "TGA", "HEIF",
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
BLOCK = 2**20
"""Numbers that are converted at once, to need little memory."""
_JPEG = b"\xff\xd8\xff"
_JPEG_END = b"\xff\xd9"
_PNG = b"\x89PNG\r\n\x1a\n"
_ORIENTATION = 0x0112
"""The EXIF tag that says how a camera was held."""

ValueRange = tuple[float, float]
"""The values that become the levels 0 and 255; those beyond them are clipped."""


def decode_image(data: bytes, channels: int = 3, value_range: ValueRange | None = None) -> Tensor:
    """Decode the first frame of an image, upright.

    CMYK, palettes and gray become colour, and what the file calls alpha is dropped.

    Args:
        data: the file's content, in one of `FORMATS`.
        channels: C; 1 is gray, 3 RGB, 4 RGB and whatever the fourth band holds.
        value_range: of images with more than 8 bits, the values that become 0 and 255.

    Returns:
        (C, H, W) uint8, in any memory layout.

    Raises:
        ImageError: empty, damaged or truncated data, another format, more than `MAX_PIXELS`, bands
            that would be lost or made up, or more than 8 bits where no value_range is given.
    """
    pixels = to_uint8(read_pixels(data, channels), value_range)
    if channels == 1 and len(pixels) == 3:  # colour of 16 bits
        pixels = np.array(Image.fromarray(pixels.transpose(1, 2, 0)).convert("L"))[None]
    if len(pixels) < channels:
        pixels = np.repeat(pixels, channels, 0)
    mirrored = tuple(axis for axis, stride in enumerate(pixels.strides) if stride < 0)
    image = torch.from_numpy(np.flip(pixels, mirrored))
    return image.flip(mirrored) if mirrored else image  # much sooner than numpy copies it


def decode_reduced(data: bytes, channels: int, reduction: Reduction) -> ReducedImage | None:
    """Decode a JPEG of RGB or gray at a part of its size, which is sooner done.

    Returns:
        None where that is not possible, the reduction is 1, or the data are damaged: then it is for
        `decode_image`.
    """
    if not data.startswith(_JPEG) or channels not in (1, 3):
        return None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            image = Image.open(io.BytesIO(data), formats=("JPEG",))
        except Exception:  # PIL raises whatever its parsing meets
            return None
        width, height = image.size
        large = is_large(height, width) and width * height <= MAX_PIXELS
        if not large or image.mode not in ("RGB", "L"):
            return None
        turn = _turn(image)
        by = reduction(*((width, height) if turn.transposed else (height, width)))
        with suppress(Exception):
            image.draft(None, (width // by, height // by))
            if by > 1 and image.size == (-(-width // by), -(-height // by)):
                return ReducedImage(image.convert(MODES[channels]), by, (height, width), turn)
    return None


def read_pixels(data: bytes, channels: int = 3) -> NDArray[Any]:
    """The values of an image's pixels, as its file holds them, upright.

    Args:
        data: the file's content, in one of `FORMATS`.
        channels: C, the number that the image is read for.

    Returns:
        (C, H, W) uint8; where there are more than 8 bits, values of their own type, (1, H, W) of
        gray and (3, H, W) or (4, H, W) of colour.

    Raises:
        ImageError: as in `decode_image`.
    """
    if channels not in MODES:
        raise ValueError(
            f"an encoded image has 1, 3 or 4 channels, got {channels}; to have others, {AS_ARRAYS}."
        )
    if not data:
        raise ImageError("the image is empty (0 bytes).")
    try:
        return _read(data, channels)
    except ImageError:
        raise
    except Exception as error:  # decoders raise whatever their parsing meets
        with suppress(Exception):  # texts and profiles may be damaged where the pixels are not
            if len(plain := without_extras(data)) < len(data):
                return _read(plain, channels)
        raise ImageError(f"the image cannot be decoded: {_reason(data, error)}") from error


def has_eight_bits(data: bytes) -> bool:
    """Whether a file's first bytes say that its values are levels from 0 to 255."""
    if data.startswith(_PNG):
        return data[24:25] != b"\x10"
    return data.startswith((_JPEG, b"GIF8", b"RIFF", b"BM"))


def _read(data: bytes, channels: int) -> NDArray[Any]:
    data = with_fourth_band(data) if channels == 4 else data
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # damage that matters is raised
        with Image.open(io.BytesIO(data), formats=FORMATS) as image:
            width, height = image.size
            if width * height > MAX_PIXELS:
                raise ImageError(
                    f"the image has {width} x {height} pixels, more than the {MAX_PIXELS} allowed."
                )
            check_bands(image, channels)
            pixels = _pixels(image, data, channels)  # first: finding EXIF may hide an error of it
            return _turn(image).pixels(pixels)


def upright_size(data: bytes) -> tuple[int, int] | None:
    """Height and width in pixels of an image, upright, by its file's header; None if unreadable."""
    with warnings.catch_warnings(), suppress(Exception):  # PIL raises whatever its parsing meets
        warnings.simplefilter("ignore")
        with Image.open(io.BytesIO(data), formats=FORMATS) as image:
            width, height = image.size
            return (width, height) if _turn(image).transposed else (height, width)
    return None


_TURNS: dict[Any, Turn] = {
    2: Turn(columns=True),
    3: Turn(rows=True, columns=True),
    4: Turn(rows=True),
    5: Turn(transposed=True),
    6: Turn(rows=True, transposed=True),
    7: Turn(rows=True, columns=True, transposed=True),
    8: Turn(columns=True, transposed=True),
}
"""How pixels become upright, by the orientation that EXIF gives."""


def _turn(image: Image.Image) -> Turn:
    with suppress(Exception):  # broken EXIF is no reason to lose an image
        return _TURNS[image.getexif()[_ORIENTATION]]
    return Turn()


def _pixels(image: Image.Image, data: bytes, channels: int) -> NDArray[Any]:
    """The pixels of an open image as they are stored, (C, H, W), or as `read_pixels` says."""
    if channels == 3 and _is_plain_jpeg(image, data):
        # PIL's own libjpeg, without the copies that PIL makes of the pixels
        found: Any = decode_jpeg(_tensor(data), ImageReadMode.RGB)
        return found.numpy()
    image.load()  # an error in here is damage to pixels
    if data.startswith(_PNG) and data[24] == 16 and image.mode != "I;16":
        bands: Any = decode_png(_tensor(data), ImageReadMode.UNCHANGED)  # PIL keeps 8 bits
        if channels == 4 and len(bands) != 4:
            raise ImageError(f"the image must have 4 bands, got {len(bands)} of 16 bits.")
        alpha = len(bands) in (2, 4) and channels != 4
        return bands.numpy()[: len(bands) - alpha]
    if image.mode in ("F", "I") or image.mode.startswith("I;16") or is_signed(image):
        return values_of(image)[None]
    if image.mode == "P" and "transparency" in image.info:
        image = image.convert("RGBA")
    if not (channels == 4 and image.mode == "CMYK"):  # whose four channels stay as they are
        image = image.convert(MODES[channels])
    pixels = np.array(image)
    return pixels.transpose(2, 0, 1) if pixels.ndim == 3 else pixels[None]


def _tensor(data: bytes) -> Tensor:
    return torch.frombuffer(bytearray(data), dtype=torch.uint8)


def _is_plain_jpeg(image: Image.Image, data: bytes) -> bool:
    """A JPEG of RGB or gray that is whole.

    Damaged ones are PIL's: torchvision has leaked memory on them, and crashes on damaged PNGs.
    """
    return data.startswith(_JPEG) and data.endswith(_JPEG_END) and image.mode in ("RGB", "L")


def without_extras(data: bytes) -> bytes:
    """A PNG without texts, profiles and whatever else is not its pixels; other data as they are."""
    kept, at = [data[:8]], 8
    while data.startswith(_PNG) and len(head := data[at : at + 8]) == 8:
        end = at + 12 + int.from_bytes(head[:4])
        kind, checksum = head[4:], data[end - 4 : end]
        whole = zlib.crc32(data[at + 4 : end - 4]).to_bytes(4) == checksum
        if kind[:1].isupper() or (whole and kind in (b"tRNS", b"eXIf")):
            kept.append(data[at:end])
        at = end
    return b"".join(kept) if data.startswith(_PNG) else data


def _reason(data: bytes, error: Exception) -> str:
    """Why an image cannot be decoded."""
    if not isinstance(error, UnidentifiedImageError):
        return str(error)
    if data[4:8] == b"ftyp" and data[8:12] in HEIF_BRANDS and "HEIF" not in FORMATS:
        return "it looks like HEIF, which needs `pip install pi-heif`."
    if (known := describe_tiff(data)) is not None:
        return known
    return "it is of no known format."


def to_uint8(
    values: NDArray[np.generic], value_range: ValueRange | None = None
) -> NDArray[np.uint8]:
    """Bring pixels of any number type to levels from 0 to 255.

    Args:
        values: levels already, if they are uint8.
        value_range: the finite values that become 0 and 255.

    Raises:
        ImageError: other values, of which nothing says what is black and what is white.
    """
    if values.dtype == np.uint8:
        return values.astype(np.uint8, copy=False)
    if value_range is None:
        raise ImageError(
            f"the values of its pixels must be of 8 bits, or a range of them known, got "
            f"{values.dtype} from {values.min()} to {values.max()}; give --value_range, or save "
            "the images of a second column with 8 bits."
        )
    low, high = value_range
    width = high - low if high > low else 1
    flat = values.reshape(-1)
    levels = np.empty(len(flat), np.uint8)
    for start in range(0, len(flat), BLOCK):
        block = flat[start : start + BLOCK].astype(np.float64)
        scaled = (block - low) / width
        scaled = np.nan_to_num(scaled, nan=0, posinf=1, neginf=0).clip(0, 1)
        levels[start : start + BLOCK] = scaled * 255 + 0.5
    return levels.reshape(values.shape)


def array_pixels(array: NDArray[Any], channels: int) -> NDArray[Any]:
    """The pixels of an image that is given as an array, as data sets keep those of many channels.

    Args:
        array: (C, H, W) or (H, W, C), of any number type; also (H, W), if C is 1.
        channels: C.

    Returns:
        (C, H, W), of the same type.

    Raises:
        ImageError: no numbers, another shape, no pixels.
    """
    if not np.issubdtype(array.dtype, np.number):
        raise ImageError(f"an image must be an array of numbers, got {array.dtype}.")
    found = array[None] if array.ndim == 2 else array
    if found.ndim == 3 and found.shape[0] != channels and found.shape[2] == channels:
        found = found.transpose(2, 0, 1)
    if found.ndim != 3 or found.shape[0] != channels or found.size == 0:
        raise ImageError(
            f"an image must be of shape ({channels}, H, W) or (H, W, {channels}), got "
            f"{array.shape}; --model_args '{{\"in_chans\": N}}' takes other numbers of channels."
        )
    return found
