"""What files decode to, and which are refused."""

from __future__ import annotations

import base64
import io
import struct
import zlib
from collections.abc import Callable
from itertools import product
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image

from vicreg_hf.data.columns.image_files import MAX_PIXELS, ImageError, decode_image, image_of_array

Pixels = NDArray[np.uint8]

# Smooth, so that lossy formats keep it; no row, column or channel is another's mirror image.
ROWS, COLUMNS = np.mgrid[0:40, 0:56]
RGB: Pixels = np.stack([4 * COLUMNS, 6 * ROWS, 2 * ROWS + 2 * COLUMNS], -1).astype(np.uint8)
GRAY: Pixels = RGB[..., 2]
NOISE: Pixels = np.random.default_rng(0).integers(0, 256, (40, 56, 3), dtype=np.uint8)


def encode(image: Image.Image, file_format: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, file_format, **options)
    return buffer.getvalue()


def decode(data: bytes, channels: int = 3) -> Pixels:
    """As (H, W, C)."""
    decoded = decode_image(data, channels)
    assert decoded.dtype == torch.uint8
    return decoded.permute(1, 2, 0).numpy()


def assert_pixels_close(actual: Pixels, expected: Pixels, *, tolerance: int = 0) -> None:
    assert actual.shape == expected.shape
    assert np.abs(actual.astype(int) - expected.astype(int)).max() <= tolerance


def gray(levels: Any) -> Pixels:
    return np.stack([np.asarray(levels, np.uint8)] * 3, -1)


def with_alpha(image: Image.Image, alpha: int) -> Image.Image:
    image = image.copy()
    image.putalpha(alpha)
    return image


COLOURS, LEVELS = Image.fromarray(RGB), Image.fromarray(GRAY)
CMYK = Image.frombytes("CMYK", (56, 40), np.dstack([255 - RGB, 0 * GRAY]).tobytes())
BITS = RGB[..., 0] > 100
DEEP = np.linspace(0, 65535, 40 * 56).reshape(40, 56).round().astype(np.uint16)
INDICES = ((ROWS // 10 + COLUMNS // 7) % 4).astype(np.uint8)
PALETTE = np.array([[200, 10, 30], [0, 90, 250], [7, 7, 7], [255, 255, 0]], np.uint8)
INDEXED = Image.fromarray(INDICES)
INDEXED.putpalette(PALETTE.tobytes())
LOSSLESS = {"lossless": True}
TWO_FRAMES = {"save_all": True, "append_images": [Image.new("RGB", (56, 40))]}


@pytest.mark.parametrize(
    ("image", "formats", "options", "expected", "tolerance"),
    [
        (COLOURS, "PNG TIFF BMP", {}, RGB, 0), (COLOURS, "WEBP", LOSSLESS, RGB, 0),
        (COLOURS, "WEBP", {"quality": 95}, RGB, 8),
        (COLOURS, "JPEG", {"quality": 95, "subsampling": 0}, RGB, 8),
        (COLOURS, "JPEG", {"quality": 95, "progressive": True}, RGB, 8),
        (COLOURS, "TIFF", TWO_FRAMES, RGB, 0), (COLOURS, "WEBP", TWO_FRAMES | LOSSLESS, RGB, 0),
        (LEVELS, "PNG GIF", {}, gray(GRAY), 0), (LEVELS, "JPEG", {}, gray(GRAY), 4),
        (LEVELS, "GIF", TWO_FRAMES, gray(GRAY), 0), (Image.fromarray(BITS), "PNG", {},
         gray(BITS * np.uint8(255)), 0),
        (with_alpha(COLOURS, 0), "PNG TIFF", {}, RGB, 0),
        (with_alpha(COLOURS, 90), "PNG TIFF", {}, RGB, 0),
        (with_alpha(LEVELS, 0), "PNG", {}, gray(GRAY), 0),
        (with_alpha(LEVELS, 90), "PNG", {}, gray(GRAY), 0),
        (INDEXED, "GIF TIFF PNG", {}, PALETTE[INDICES], 0),
        (INDEXED, "PNG", {"transparency": 1}, PALETTE[INDICES], 0),
        (INDEXED, "PNG", {"transparency": bytes([0, 90, 255, 9])}, PALETTE[INDICES], 0),
        (CMYK, "TIFF", {}, RGB, 0), (CMYK, "JPEG", {"quality": 95}, RGB, 10),
        (Image.fromarray(DEEP), "PNG TIFF", {}, gray((DEEP / 257).round()), 0),
    ],
)  # fmt: skip
def test_colours_of_every_mode_survive(
    image: Image.Image, formats: str, options: Any, expected: Pixels, tolerance: int
) -> None:
    """Levels of 16 bits are rescaled, alpha is dropped, and the first of several frames is seen."""
    for file_format in formats.split():
        decoded = decode(encode(image, file_format, **options))
        assert_pixels_close(decoded, expected, tolerance=tolerance)


@pytest.mark.parametrize(
    ("values", "levels"),
    [
        ([-3.0, 0.0, 2.0], [0, 153, 255]),  # 3 / 5 of 255
        ([7.0, 7.0, 7.0], [0, 0, 0]),
        ([np.nan, 1.0, 3.0], [0, 0, 255]),
        ([-np.inf, 1.0, np.inf], [0, 0, 255]),
    ],
)
def test_float_pixels_are_stretched_over_the_gray_levels(
    values: list[float], levels: list[int]
) -> None:
    data = encode(Image.fromarray(np.array([values], np.float32)), "TIFF")
    assert_pixels_close(decode(data), gray([levels]))


# What a viewer does with the stored pixels, per value of the EXIF tag Orientation.
UPRIGHT: dict[int, Callable[[Pixels], Pixels]] = {
    1: lambda stored: stored,
    2: lambda stored: stored[:, ::-1],
    3: lambda stored: stored[::-1, ::-1],
    4: lambda stored: stored[::-1],
    5: lambda stored: stored.swapaxes(0, 1),
    6: lambda stored: np.rot90(stored, -1),
    7: lambda stored: stored[::-1, ::-1].swapaxes(0, 1),
    8: lambda stored: np.rot90(stored, 1),
}


@pytest.mark.parametrize("orientation", UPRIGHT)
def test_images_are_turned_upright(orientation: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    deep = Image.fromarray(GRAY.astype(np.uint16) * 257)
    for image, expected, file_format, options, tolerance in (
        (COLOURS, RGB, "WEBP", LOSSLESS, 0),
        (COLOURS, RGB, "JPEG", {"quality": 95, "subsampling": 0}, 8),
        (deep, gray(GRAY), "PNG", {}, 0),
        (CMYK, RGB, "JPEG", {"quality": 95}, 10),
    ):
        decoded = decode(encode(image, file_format, exif=exif, **options))
        assert_pixels_close(decoded, UPRIGHT[orientation](expected), tolerance=tolerance)


def test_a_jpeg_is_turned_upright_by_exif_anywhere_or_by_xmp() -> None:
    """As PIL turns it, and so stock processors see it."""
    exif = Image.Exif()
    exif[0x0112] = 6
    options: Any = {"quality": 95, "subsampling": 0}
    data = encode(COLOURS, "JPEG", exif=exif, **options)
    comment = b"\xff\xfe" + struct.pack(">H", 60_002) + bytes(60_000)
    later = data[:2] + 2 * comment + data[2:]
    assert later.index(b"Exif") > 2**16
    xmp = b'<x xmlns:tiff="http://ns.adobe.com/tiff/1.0/" tiff:Orientation="6"/>'
    for turned_jpeg in (later, encode(COLOURS, "JPEG", xmp=xmp, **options)):
        assert_pixels_close(decode(turned_jpeg), np.rot90(RGB, -1), tolerance=8)


def png_claiming(width: int, height: int) -> bytes:
    """A PNG of a few bytes whose header promises width x height RGB pixels."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        checksum = zlib.crc32(kind + content)
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", checksum)

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b""))


@pytest.mark.parametrize(
    ("data", "sentence"),
    [
        (b"\x00", "cannot be decoded"),
        (b"<!DOCTYPE html><html><body>404 Not Found</body></html>", "cannot be decoded"),
        (png_claiming(10, 10), "cannot be decoded"),
        (encode(COLOURS, "EPS"), "cannot be decoded"),  # it runs a program
        (png_claiming(60_000, 60_000), r"60000 x 60000 pixels|3600000000 pixels"),
        (png_claiming(1, MAX_PIXELS + 1), f"1 x {MAX_PIXELS + 1} pixels|{MAX_PIXELS + 1} pixels"),
    ],
    ids=["one byte", "html", "no pixels", "eps", "bomb", "one pixel too many"],
)
def test_what_is_no_image_or_too_large_is_refused(data: bytes, sentence: str) -> None:
    with pytest.raises(ImageError, match=sentence):
        decode_image(data)


@pytest.mark.parametrize("file_format", ["PNG", "JPEG", "WEBP", "GIF", "TIFF", "BMP"])
def test_truncated_files_are_refused(file_format: str) -> None:
    data = encode(Image.fromarray(NOISE), file_format)
    for share in (0.1, 0.95):
        with pytest.raises(ImageError):
            decode_image(data[: int(len(data) * share)])


# --- other numbers of channels


def test_one_channel_is_the_luminance_and_four_are_as_they_are_stored() -> None:
    for file_format, tolerance in (("PNG", 0), ("JPEG", 4)):
        decoded = decode(encode(COLOURS, file_format, quality=95), 1)
        luminance = np.array(COLOURS.convert("L"))
        assert_pixels_close(decoded[..., 0], luminance, tolerance=tolerance)
    four = np.dstack([RGB, GRAY])
    for mode in ("RGBA", "CMYK"):
        data = encode(Image.frombytes(mode, (56, 40), four.tobytes()), "TIFF")
        assert_pixels_close(decode(data, 4), four)
    with pytest.raises(ValueError, match="has 1, 3 or 4 channels, got 2"):
        decode_image(data, 2)


def test_arrays_of_any_number_type_become_grey_levels() -> None:
    for values, expected in (
        (np.array([0, 7, 255], np.uint8), [0, 7, 255]),
        (np.array([0, 257, 65535], np.uint16), [0, 1, 255]),
        (np.array([0, 257, 65535], np.int32), [0, 1, 255]),
        (np.array([70000, 170000, 270000], np.uint32), [0, 128, 255]),
        (np.array([-100, 0, 100], np.int64), [0, 128, 255]),
        (np.array([np.nan, 2.0, np.inf]), [0, 0, 255]),
    ):
        assert image_of_array(values[None, None], 1).tolist() == [[expected]]


def test_an_array_of_another_kind_is_refused() -> None:
    for values, message in (
        (np.zeros((4, 5)), r"got \(4, 5\)"), (np.zeros((3, 0, 5)), r"got \(3, 0, 5\)"),
        (np.zeros((3, 2, 2), bool), "an array of numbers, got bool"),
    ):  # fmt: skip
        with pytest.raises(ImageError, match=message):
            image_of_array(values, 3)


# --- JPEGs, which torchvision decodes


def test_a_jpeg_has_pils_own_pixels() -> None:
    for mode, quality, subsampling in product(("RGB", "L"), (30, 90), (0, 1, 2)):
        image = Image.fromarray(NOISE[:37, :53]).convert(mode)
        data = encode(image, "JPEG", quality=quality, subsampling=subsampling)
        expected = np.array(Image.open(io.BytesIO(data)).convert("RGB"))
        assert_pixels_close(decode(data), expected)


def test_what_follows_a_jpegs_end_and_broken_exif_do_not_matter() -> None:
    data = encode(COLOURS, "JPEG")
    broken = encode(COLOURS, "JPEG", exif=b"Exif\0\0II*\0\xff\xff\xff\x7f")
    for other in (data + b"\0" * 7, broken):
        assert_pixels_close(decode(other), decode(data))


# Red above blue, 16 x 24 pixels, by pillow-heif 1.8.
HEIC = base64.b64decode(
    "AAAAHGZ0eXBoZWljAAAAAG1pZjFoZWljbWlhZgAAAb1tZXRhAAAAAAAAACFoZGxyAAAAAAAAAABwaWN0AAAAAAAA"
    "AAAAAAAAAAAAADRpbG9jAAAAAERAAAIAAQAAAAAB4QABAAAAAAAAAEoAAgAAAAACKwABAAAAAAAAACQAAAA4aWlu"
    "ZgAAAAAAAgAAABVpbmZlAgAAAAABAABodmMxAAAAABVpbmZlAgAAAQACAABFeGlmAAAAAA5waXRtAAAAAAABAAAA"
    "/GlwcnAAAADcaXBjbwAAAHVodmNDAQNwAAAAkAAAAAAAHvAA/P34+AAADwNgAAEAGEABDAH//wNwAAADAJAAAAMA"
    "AAMAHroCQGEAAQApQgEBA3AAAAMAkAAAAwAAAwAeoCCBBZbqrprm4CGgwIAAAAyAAAADAIRiAAEABkQBwXPBiQAA"
    "ABNjb2xybmNseAABAA0ABoAAAAAUaXNwZQAAAAAAAABAAAAAQAAAAChjbGFwAAAAEAAAAAEAAAAYAAAAAf///9AA"
    "AAAC////2AAAAAIAAAAQcGl4aQAAAAADCAgIAAAAGGlwbWEAAAAAAAAAAQABBYECAwWEAAAAGmlyZWYAAAAAAAAA"
    "DmNkc2MAAgABAAEAAAB2bWRhdAAAAEYoAa8JyGmJGiObUf8X9/oXoa8W++hWvzVng2sC05L/iBVgV13aaVHcx/Ui"
    "CXyd9Pkq6PTmW6C5rcnqzSk5O4lgw0+XiTpMAAAABkV4aWYAAE1NACoAAAAIAAEBEgADAAAAAQAGAAAAAAAA"
)


def test_heic_is_read() -> None:
    pixels = decode(HEIC)
    assert pixels.shape == (24, 16, 3)
    above, below = pixels[:10].reshape(-1, 3), pixels[14:].reshape(-1, 3)
    assert_pixels_close(above, np.full_like(above, [200, 40, 40]), tolerance=24)
    assert_pixels_close(below, np.full_like(below, [40, 40, 200]), tolerance=24)


def test_heic_without_its_plugin_is_answered_with_its_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vicreg_hf.data.columns.image_files.FORMATS", ("JPEG", "PNG"))
    with pytest.raises(ImageError, match="it looks like HEIF, which needs `pip install pi-heif`"):
        decode_image(HEIC)
    with pytest.raises(ImageError, match="it is of no known format"):
        decode_image(HEIC.replace(b"heic", b"isom", 1))  # a film
