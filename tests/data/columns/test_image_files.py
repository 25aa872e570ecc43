"""What files decode to, and which are refused."""

from __future__ import annotations

import base64
import io
import struct
import zlib
from collections.abc import Callable
from dataclasses import replace
from itertools import product
from typing import Any

import datasets
import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from pictures import chunk, deep_png
from PIL import Image

from vicreg_hf.data.columns.image_files import (
    MAX_PIXELS,
    ImageError,
    array_pixels,
    decode_image,
    to_uint8,
)
from vicreg_hf.data.columns.images import ImageColumn

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


def decode(data: bytes, channels: int = 3, limits: Any = (0, 65535)) -> Pixels:
    """As (H, W, C)."""
    decoded = decode_image(data, channels, limits)
    assert decoded.dtype == torch.uint8
    return decoded.permute(1, 2, 0).numpy()


def assert_pixels_close(actual: Pixels, expected: Pixels, *, tolerance: int = 0) -> None:
    assert actual.shape == expected.shape
    assert np.abs(actual.astype(int) - expected.astype(int)).max() <= tolerance


def gray(levels: Any) -> Pixels:
    return np.stack([np.asarray(levels, np.uint8)] * 3, -1)


def alpha(image: Image.Image, opacity: int) -> Image.Image:
    image = image.copy()
    image.putalpha(opacity)
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
        (LEVELS, "GIF", TWO_FRAMES, gray(GRAY), 0),
        (Image.fromarray(BITS), "PNG", {}, gray(BITS * np.uint8(255)), 0),
        (alpha(COLOURS, 0), "PNG TIFF", {}, RGB, 0), (alpha(COLOURS, 90), "PNG TIFF", {}, RGB, 0),
        (alpha(LEVELS, 0), "PNG", {}, gray(GRAY), 0), (alpha(LEVELS, 90), "PNG", {}, gray(GRAY), 0),
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
    """Wide levels are rescaled, alpha is dropped, and the first of several frames is seen."""
    for file_format in formats.split():
        decoded = decode(encode(image, file_format, **options))
        assert_pixels_close(decoded, expected, tolerance=tolerance)


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


@pytest.mark.parametrize(
    ("file_format", "options"), [("PNG", {}), ("TIFF", {"compression": "tiff_deflate"})]
)
def test_files_with_one_changed_byte_of_pixels_are_refused(file_format: str, options: Any) -> None:
    data = encode(Image.fromarray(NOISE), file_format, **options)
    for place in np.random.default_rng(0).integers(len(data) // 4, len(data) // 2, 20):
        damaged = bytearray(data)
        damaged[place] ^= 0x55
        with pytest.raises(ImageError):
            decode_image(bytes(damaged))


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


def test_values_of_any_type_become_levels_by_one_range() -> None:
    for values, limits, expected in (
        ([0, 7, 255], None, [0, 7, 255]),
        (np.array([0, 257, 70000], np.uint32), (0, 65535), [0, 1, 255]),
        (np.array([-1000, -300, 400], np.int16), (-1000, 400), [0, 128, 255]),
        (np.array([-128, 127], np.int8), (-128, 127), [0, 255]),
        (np.array([-np.inf, np.nan, 2.0, np.inf]), (0, 4), [0, 0, 128, 255]),
        (np.array([7.0, 7.0]), (7, 7), [0, 0]),
        (np.array([0, 5e-15, 1e-14]), (0, 1e-14), [0, 128, 255]),
    ):
        found = np.array(values, np.uint8) if limits is None else values
        assert to_uint8(np.asarray(found), limits).tolist() == expected
    for deep in (DEEP, DEEP.astype(np.float32)):
        with pytest.raises(ImageError, match=r"range of them known, got .* give --value_range"):
            to_uint8(deep)


@pytest.mark.parametrize("kind", ["files", "arrays"])
def test_a_column_has_the_range_of_a_sample_unless_one_is_given(
    kind: str, capsys: pytest.CaptureFixture[str]
) -> None:
    values = [np.full((1, 2, 2), n, np.int16) for n in (-1000, 400)]
    if kind == "files":
        signed = [encode(Image.fromarray(v[0].astype(np.int32)), "TIFF") for v in values]
        cells: list[Any] = [{"bytes": data, "path": None} for data in signed]
        column = ImageColumn("image", datasets.Image(decode=False), 1)
        bytes_only = [{"bytes": encode(LEVELS, "PNG"), "path": None}]
        assert column.with_range(bytes_only).value_range is None
    else:
        bytes_only = []
        cells = [value.tolist() for value in values]
        column = ImageColumn("image", datasets.Array3D((1, 2, 2), "int16"), 1)
    ranged = column.with_range([*cells, None])
    assert ranged.value_range == (-1000, 400)
    assert [ranged.decode(cell).unique().tolist() for cell in cells] == [[0], [255]]
    huge = ImageColumn("image", datasets.Array2D((1, 1), "float64"), 1).with_range([[[-1e300]]])
    assert huge.value_range is not None
    assert huge.value_range[0] == -1e300 < huge.value_range[1]
    if kind == "files":  # one value that is out of all proportion, and an image of 8 bits
        hot = np.random.default_rng(0).integers(0, 900, (1, 64, 64)).astype(np.uint16)
        hot[0, 0, 0] = 65535
        mixed = [{"bytes": encode(Image.fromarray(hot[0]), "PNG"), "path": None}, *bytes_only]
        assert column.with_range(mixed).value_range == (0, 65535)
        said = capsys.readouterr().err
        assert "99 % of the values lie from" in said
        assert "1 of 2 images looked at have 8 bits" in said
    given = replace(column, value_range=(0, 800)).with_range(cells)
    assert given.decode(cells[1]).unique().tolist() == [128]


def test_an_array_of_another_kind_is_refused() -> None:
    assert array_pixels(np.zeros((4, 5)), 1).shape == (1, 4, 5)
    for array, message in (
        (np.zeros((4, 5)), r"got \(4, 5\)"),
        (np.zeros((3, 0, 5)), r"got \(3, 0, 5\)"),
        (np.zeros((3, 2, 2), bool), "an array of numbers, got bool"),
    ):
        with pytest.raises(ImageError, match=message):
            array_pixels(array, 3)


def tiff(pixels: NDArray[Any], photometric: int, *extra: int) -> bytes:
    """A TIFF of (H, W, bands) of unsigned integers, as GDAL writes it."""
    height, width, bands = pixels.shape
    bits = struct.pack(f"<{bands}H", *[8 * pixels.itemsize] * bands)
    data = b"II*\0" + struct.pack("<I", 8 + pixels.nbytes + len(bits)) + pixels.tobytes() + bits
    tags = [(256, 4, 1, width), (257, 4, 1, height), (258, 3, bands, 8 + pixels.nbytes),
            (259, 3, 1, 1), (262, 3, 1, photometric), (273, 4, 1, 8), (277, 3, 1, bands),
            (278, 4, 1, height), (279, 4, 1, pixels.nbytes)]  # fmt: skip
    tags += [(338, 3, 1, extra[0])] if extra else []
    return data + struct.pack("<H", len(tags)) + b"".join(
        struct.pack("<HHII", *tag) for tag in tags
    ) + bytes(4)  # fmt: skip


def test_bands_are_what_the_file_says_and_none_is_lost_or_made_up() -> None:
    four, wide = np.dstack([RGB, GRAY]), RGB.astype("<u2") * 40
    for extra in ((), (0,)):
        assert_pixels_close(decode(tiff(four, 2, *extra), 4), four)
        with pytest.raises(ImageError, match=r"4 bands of 8 bits, and does not say .*in_chans"):
            decode(tiff(four, 2, *extra))
    assert_pixels_close(decode(tiff(four, 2, 2)), RGB)  # alpha, it says
    for data, channels, message in (
        (tiff(RGB, 2), 4, r"must have 4 bands, got 3 \(RGB\)"),
        (encode(LEVELS, "PNG"), 4, r"must have 4 bands, got 1 \(L\)"),
        (encode(alpha(LEVELS, 9), "PNG"), 4, r"must have 4 bands, got 2 \(LA\)"),
        (encode(Image.fromarray(DEEP), "PNG", transparency=7), 4, "must have 4 bands, got 1"),
        (deep_png(wide), 4, "must have 4 bands, got 3"),
        (tiff(wide, 2), 3, "3 bands of 16 bits, of which PIL keeps 8; .* PNGs of 16 bits"),
        (tiff(wide, 1), 3, "a TIFF of 3 bands of 16 bits .*PHOTOMETRIC=RGB"),
        (tiff(np.repeat(wide, 4, 2), 1), 3, "a TIFF of 12 bands of 16 bits .*Array3D"),
    ):
        with pytest.raises(ImageError, match=message):
            decode(data, channels)


def test_a_png_of_16_bits_a_colour_keeps_all_of_them_and_junk_beside_pixels_is_no_matter() -> None:
    values = RGB.astype(np.uint16) * 16  # 12 bits, of which PIL would keep 4
    too_large = chunk(b"zTXt", b"note\0\0" + zlib.compress(bytes(2**22)))
    torn = chunk(b"iCCP", b"profile\0\0junk")[:-4] + b"\0\0\0\0"
    for data in (deep_png(values), deep_png(values, too_large), deep_png(values, torn)):
        assert_pixels_close(decode(data, limits=(0, 4080)), RGB)
    assert decode(deep_png(values), 1, (0, 4080)).shape == (40, 56, 1)


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


def test_heic_is_read_or_its_plugin_named(monkeypatch: pytest.MonkeyPatch) -> None:
    pixels = decode(HEIC)
    assert pixels.shape == (24, 16, 3)
    for half, colour in ((pixels[:10], [200, 40, 40]), (pixels[14:], [40, 40, 200])):
        assert_pixels_close(half, np.full_like(half, colour), tolerance=24)
    monkeypatch.setattr("vicreg_hf.data.columns.image_files.FORMATS", ("JPEG", "PNG"))
    with pytest.raises(ImageError, match="it looks like HEIF, which needs `pip install pi-heif`"):
        decode_image(HEIC)
    with pytest.raises(ImageError, match="it is of no known format"):
        decode_image(HEIC.replace(b"heic", b"isom", 1))  # a film
