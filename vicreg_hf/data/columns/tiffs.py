"""What TIFFs hold: any number of bands of any type, of which PIL reads some and drops others.

Shapes: H x W pixels.
"""

from __future__ import annotations

import io
import logging
import struct
from contextlib import suppress
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from PIL.TiffImagePlugin import ImageFileDirectory_v2, TiffImageFile

from vicreg_hf.data.columns.base import ImageError

logging.getLogger(TiffImageFile.__module__).addHandler(logging.NullHandler())
_TIFF = {b"II*\0": "<", b"MM\0*": ">"}
"""How TIFFs begin, and the order of bytes in them."""
_BITS, _PHOTOMETRIC, _SAMPLES, _EXTRA, _FORMAT = 258, 262, 277, 338, 339
"""TIFF's tags: the bits of each band, what the bands are, how many there are, what those beyond the
colours are, and whether values are signed, unsigned or float."""
_COLOURS = {0: 1, 1: 1, 2: 3, 3: 1, 5: 4, 6: 3, 8: 3}
"""Number of a TIFF's bands that are colours, by `_PHOTOMETRIC`."""
_ALPHA = (1, 2)
"""Values of `_EXTRA` that call a band alpha."""
AS_ARRAYS = "give the pixels as arrays, in a column of type Array3D"
"""The remedy for images that no file format holds in full."""


def values_of(image: Image.Image) -> NDArray[Any]:
    """The values of an image of one band, of the type that a TIFF says they are of."""
    values = np.asarray(image)
    if is_signed(image) and values.dtype == np.uint8:
        return values.view(np.int8)
    unsigned = isinstance(image, TiffImageFile) and _tag(image, _FORMAT, 1) == 1
    return values.view(np.uint32) if unsigned and image.mode == "I" else values


def is_signed(image: Image.Image) -> bool:
    """Whether an image is a TIFF of signed integers."""
    return isinstance(image, TiffImageFile) and _tag(image, _FORMAT, 1) == 2


def _tag(image: TiffImageFile, tag: int, default: int) -> int:
    """The value of a TIFF's tag, or the first of its values."""
    value: Any = image.tag_v2.get(tag, default)
    return value[0] if isinstance(value, tuple) else value


def check_bands(image: Image.Image, channels: int) -> None:
    """Refuse images of which bands, or bits, would be lost or made up.

    Raises:
        ImageError: names the bands, the bits and a remedy.
    """
    if isinstance(image, TiffImageFile):
        samples, bits = _tag(image, _SAMPLES, 1), _tag(image, _BITS, 1)
        held = f"the image is a TIFF of {samples} bands of {bits} bits"
        if samples > 1 and bits > 8:
            raise ImageError(
                f"{held}, of which PIL keeps 8; save 8 bits a band, or PNGs of 16 bits, or "
                f"{AS_ARRAYS}."
            )
        further = samples - _COLOURS.get(_tag(image, _PHOTOMETRIC, 0), samples)
        said = _tag(image, _EXTRA, 0) in _ALPHA or samples == channels
        if further > 1 or (further == 1 and not said):
            on_four = "train on 4 bands with --model_args '{\"in_chans\": 4}', "
            raise ImageError(
                f"{held}, and does not say that those beyond the colours are alpha; save the "
                f"colours alone, {on_four if samples == 4 else ''}or {AS_ARRAYS}."
            )
    of_four = image.mode == "P" and "transparency" in image.info
    if channels == 4 and not (of_four or image.mode in ("RGBA", "RGBa", "CMYK")):
        raise ImageError(
            f"the image must have 4 bands, got {len(image.getbands())} ({image.mode}); leave it "
            "out, or give all images the same bands."
        )


def with_fourth_band(data: bytes) -> bytes:
    """A TIFF whose fourth band has no said meaning, as one of RGBA: of it PIL keeps all bands."""
    if (order := _TIFF.get(data[:4])) is None:
        return data
    places: dict[tuple[int, int, int], int] = {}
    with suppress(struct.error):
        (start,) = struct.unpack_from(f"{order}I", data, 4)
        (count,) = struct.unpack_from(f"{order}H", data, start)
        for at in range(start + 2, start + 2 + 12 * count, 12):
            tag, _, number, value = struct.unpack_from(f"{order}HHIH", data, at)
            places[tag, number, value] = at + 8
    at = places.get((_EXTRA, 1, 0))
    if at is None or (_SAMPLES, 1, 4) not in places:
        return data
    return data[:at] + struct.pack(f"{order}H", _ALPHA[1]) + data[at + 2 :]


def describe_tiff(data: bytes) -> str | None:
    """Say what a TIFF holds that PIL does not know; None of other data."""
    with suppress(Exception):
        directory = ImageFileDirectory_v2(data[:8])
        file = io.BytesIO(data)
        file.seek(directory.next)
        directory.load(file)
        bits: Any = directory[_BITS]
        kind = {2: "signed", 3: "float"}.get((directory.get(_FORMAT) or (1,))[0], "unsigned")
        return (
            f"it is a TIFF of {directory.get(_SAMPLES, 1)} bands of {bits[0]} bits ({kind}), which "
            "PIL does not read; save it as RGB or gray (gdal_translate -co PHOTOMETRIC=RGB), or "
            f"{AS_ARRAYS}."
        )
    return None
