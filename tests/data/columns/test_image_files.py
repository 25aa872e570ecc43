"""What files decode to, and which are refused."""

from __future__ import annotations

import base64
import io
import struct
import zlib
from collections.abc import Callable
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


def encode(image: Image.Image, file_format: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, file_format, **options)
    return buffer.getvalue()


def decode(data: bytes) -> Pixels:
    """As (H, W, 3)."""
    decoded = decode_image(data)
    assert decoded.dtype == torch.uint8
    return decoded.permute(1, 2, 0).numpy()


def assert_pixels_close(actual: Pixels, expected: Pixels, *, tolerance: int) -> None:
    assert actual.shape == expected.shape
    assert np.abs(actual.astype(int) - expected.astype(int)).max() <= tolerance


@pytest.mark.parametrize(
    ("file_format", "options", "tolerance"),
    [
        ("PNG", {}, 0),
        ("TIFF", {}, 0),
        ("BMP", {}, 0),
        ("WEBP", {"lossless": True}, 0),
        ("WEBP", {"quality": 95}, 8),
        ("JPEG", {"quality": 95, "subsampling": 0}, 8),
        ("JPEG", {"quality": 95, "progressive": True}, 8),
    ],
)
def test_colours_survive(file_format: str, options: dict[str, Any], tolerance: int) -> None:
    data = encode(Image.fromarray(RGB), file_format, **options)
    assert_pixels_close(decode(data), RGB, tolerance=tolerance)


def gray(levels: Pixels) -> Pixels:
    return np.stack([levels] * 3, -1)


def test_gray_and_black_and_white_become_three_equal_channels() -> None:
    for file_format, tolerance in (("PNG", 0), ("GIF", 0), ("JPEG", 4)):
        decoded = decode(encode(Image.fromarray(GRAY), file_format))
        assert_pixels_close(decoded, gray(GRAY), tolerance=tolerance)
    bits = RGB[..., 0] > 100
    decoded = decode(encode(Image.fromarray(bits), "PNG"))
    assert_pixels_close(decoded, gray(bits * np.uint8(255)), tolerance=0)


@pytest.mark.parametrize("alpha", [0, 90])
def test_alpha_is_dropped(alpha: int) -> None:
    rgba = Image.fromarray(np.dstack([RGB, np.full_like(GRAY, alpha)]))
    for file_format in ("PNG", "TIFF"):
        assert_pixels_close(decode(encode(rgba, file_format)), RGB, tolerance=0)
    both = Image.merge("LA", [Image.fromarray(GRAY), Image.new("L", (56, 40), alpha)])
    assert_pixels_close(decode(encode(both, "PNG")), gray(GRAY), tolerance=0)


PALETTE: Pixels = np.array([[200, 10, 30], [0, 90, 250], [7, 7, 7], [255, 255, 0]], np.uint8)


@pytest.mark.parametrize(
    ("file_format", "options"),
    [
        ("GIF", {}),
        ("TIFF", {}),
        ("PNG", {}),
        pytest.param("PNG", {"transparency": 1}, id="one-transparent"),
        pytest.param("PNG", {"transparency": bytes([0, 90, 255, 9])}, id="opacity-each"),
    ],
)
def test_a_palette_becomes_its_colours(file_format: str, options: dict[str, Any]) -> None:
    indices = ((ROWS // 10 + COLUMNS // 7) % 4).astype(np.uint8)
    image = Image.fromarray(indices)
    image.putpalette(PALETTE.tobytes())
    data = encode(image, file_format, **options)
    assert_pixels_close(decode(data), PALETTE[indices], tolerance=0)


@pytest.mark.parametrize(("file_format", "tolerance"), [("TIFF", 0), ("JPEG", 10)])
def test_cmyk_becomes_rgb(file_format: str, tolerance: int) -> None:
    black = np.zeros_like(GRAY)
    image = Image.frombytes("CMYK", (56, 40), np.dstack([255 - RGB, black]).tobytes())
    data = encode(image, file_format, **({"quality": 95} if file_format == "JPEG" else {}))
    assert_pixels_close(decode(data), RGB, tolerance=tolerance)


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


def turned(orientation: int) -> Image.Exif:
    exif = Image.Exif()
    exif[0x0112] = orientation
    return exif


@pytest.mark.parametrize("orientation", UPRIGHT)
@pytest.mark.parametrize(
    ("file_format", "options", "tolerance"),
    [("WEBP", {"lossless": True}, 0), ("JPEG", {"quality": 95, "subsampling": 0}, 8)],
)
def test_images_are_turned_upright(
    file_format: str, options: dict[str, Any], tolerance: int, orientation: int
) -> None:
    data = encode(Image.fromarray(RGB), file_format, exif=turned(orientation), **options)
    assert_pixels_close(decode(data), UPRIGHT[orientation](RGB), tolerance=tolerance)


def test_a_jpeg_is_turned_upright_by_exif_anywhere_or_by_xmp() -> None:
    """As PIL turns it, and so stock processors see it."""
    options: Any = {"quality": 95, "subsampling": 0}
    data = encode(Image.fromarray(RGB), "JPEG", exif=turned(6), **options)
    comment = b"\xff\xfe" + struct.pack(">H", 60_002) + bytes(60_000)
    later = data[:2] + 2 * comment + data[2:]
    assert later.index(b"Exif") > 2**16
    xmp = b'<x xmlns:tiff="http://ns.adobe.com/tiff/1.0/" tiff:Orientation="6"/>'
    for turned_jpeg in (later, encode(Image.fromarray(RGB), "JPEG", xmp=xmp, **options)):
        assert_pixels_close(decode(turned_jpeg), np.rot90(RGB, -1), tolerance=8)


def test_16_bits_and_cmyk_are_turned_upright_too() -> None:
    data = encode(Image.fromarray(GRAY.astype(np.uint16) * 257), "PNG", exif=turned(6))
    assert_pixels_close(decode(data), gray(np.rot90(GRAY, -1)), tolerance=0)
    cmyk = Image.frombytes("CMYK", (56, 40), np.dstack([255 - RGB, 0 * GRAY]).tobytes())
    data = encode(cmyk, "JPEG", quality=95, exif=turned(8))
    assert_pixels_close(decode(data), np.rot90(RGB, 1), tolerance=10)


@pytest.mark.parametrize("file_format", ["PNG", "TIFF"])
def test_16_bits_are_rescaled_and_not_clipped(file_format: str) -> None:
    values = np.linspace(0, 65535, 40 * 56).reshape(40, 56).round().astype(np.uint16)
    expected = gray((values / 257).round().astype(np.uint8))
    decoded = decode(encode(Image.fromarray(values), file_format))
    assert_pixels_close(decoded, expected, tolerance=0)


def test_float_pixels_are_stretched_over_the_gray_levels() -> None:
    for values, levels in [
        ([-3.0, 0.0, 2.0], [0, 153, 255]),  # 3 / 5 of 255
        ([7.0, 7.0, 7.0], [0, 0, 0]),
        ([np.nan, 1.0, 3.0], [0, 0, 255]),
        ([-np.inf, 1.0, np.inf], [0, 0, 255]),
    ]:
        data = encode(Image.fromarray(np.array([values], np.float32)), "TIFF")
        assert_pixels_close(decode(data), gray(np.array([levels], np.uint8)), tolerance=0)


@pytest.mark.parametrize("file_format", ["GIF", "WEBP", "TIFF"])
def test_an_animation_gives_its_first_frame(file_format: str) -> None:
    first, second = Image.new("RGB", (9, 5), (255, 0, 0)), Image.new("RGB", (9, 5), (0, 0, 255))
    options = {"lossless": True} if file_format == "WEBP" else {}
    data = encode(first, file_format, save_all=True, append_images=[second], **options)
    assert_pixels_close(decode(data), np.array(first), tolerance=0)


def png_claiming(width: int, height: int) -> bytes:
    """A PNG of a few bytes whose header promises width x height RGB pixels."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        checksum = zlib.crc32(kind + content)
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", checksum)

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b""))


@pytest.mark.parametrize(
    "data",
    [
        pytest.param(b"\x00", id="one-byte"),
        pytest.param(b"<!DOCTYPE html><html><body>404 Not Found</body></html>", id="html"),
        pytest.param(png_claiming(10, 10), id="png-without-pixels"),
    ],
)
def test_what_is_not_an_image_is_refused(data: bytes) -> None:
    with pytest.raises(ImageError, match="cannot be decoded"):
        decode_image(data)


@pytest.mark.parametrize("share", [0.1, 0.95])
@pytest.mark.parametrize("file_format", ["PNG", "JPEG", "WEBP", "GIF", "TIFF", "BMP"])
def test_truncated_files_are_refused(file_format: str, share: float) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (40, 56, 3), dtype=np.uint8)
    data = encode(Image.fromarray(noise), file_format)
    with pytest.raises(ImageError):
        decode_image(data[: int(len(data) * share)])


# PIL warns above 89 million pixels, and raises its own error above twice as many.
@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize(("width", "height"), [(60_000, 60_000), (1, MAX_PIXELS + 1)])
def test_a_header_that_claims_too_many_pixels_is_refused_before_they_are_read(
    width: int, height: int
) -> None:
    counted = f"{width} x {height} pixels|{width * height} pixels"
    with pytest.raises(ImageError, match=counted):
        decode_image(png_claiming(width, height))


# --- other numbers of channels


def test_one_channel_is_the_luminance_and_four_are_as_they_are_stored() -> None:
    for file_format, tolerance in (("PNG", 0), ("JPEG", 4)):
        decoded = decode_image(encode(Image.fromarray(RGB), file_format, quality=95), 1)
        luminance = np.array(Image.fromarray(RGB).convert("L"))
        assert_pixels_close(decoded[0].numpy(), luminance, tolerance=tolerance)
    four = np.dstack([RGB, GRAY])
    for mode in ("RGBA", "CMYK"):
        data = encode(Image.frombytes(mode, (56, 40), four.tobytes()), "TIFF")
        assert_pixels_close(decode_image(data, 4).permute(1, 2, 0).numpy(), four, tolerance=0)


@pytest.mark.parametrize("channels", [0, 2])
def test_encoded_images_of_other_channels_are_refused(channels: int) -> None:
    with pytest.raises(ValueError, match=f"has 1, 3 or 4 channels, got {channels}"):
        decode_image(encode(Image.fromarray(RGB), "PNG"), channels)


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        (np.array([[[0, 7, 255]]], np.uint8), [[[0, 7, 255]]]),
        (np.array([[[0, 257, 65535]]], np.uint16), [[[0, 1, 255]]]),
        (np.array([[[0, 257, 65535]]], np.int32), [[[0, 1, 255]]]),
        (np.array([[[70000, 170000, 270000]]], np.uint32), [[[0, 128, 255]]]),
        (np.array([[[-100, 0, 100]]], np.int64), [[[0, 128, 255]]]),
        (np.array([[[-1.0, 0.0, 1.0]]]), [[[0, 128, 255]]]),
        (np.array([[[np.nan, 2.0, np.inf]]]), [[[0, 0, 255]]]),
    ],
)
def test_arrays_of_any_number_type_become_grey_levels(
    values: NDArray[Any], expected: list[list[list[int]]]
) -> None:
    assert image_of_array(values, 1).tolist() == expected


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (np.zeros((4, 5)), r"got \(4, 5\)"), (np.zeros((3, 0, 5)), r"got \(3, 0, 5\)"),
        (np.zeros((3, 2, 2), bool), "an array of numbers, got bool"),
    ],
)  # fmt: skip
def test_an_array_of_another_kind_is_refused(values: NDArray[Any], message: str) -> None:
    with pytest.raises(ImageError, match=message):
        image_of_array(values, 3)


# --- JPEGs, which torchvision decodes


@pytest.mark.parametrize(("quality", "subsampling"), [(30, 0), (90, 1), (90, 2)])
@pytest.mark.parametrize("mode", ["RGB", "L"])
def test_a_jpeg_has_pils_own_pixels(quality: int, subsampling: int, mode: str) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (37, 53, 3), dtype=np.uint8)
    image = Image.fromarray(noise).convert(mode)
    data = encode(image, "JPEG", quality=quality, subsampling=subsampling)
    expected = np.array(Image.open(io.BytesIO(data)).convert("RGB"))
    assert_pixels_close(decode(data), expected, tolerance=0)


def test_what_follows_a_jpegs_end_and_broken_exif_do_not_matter() -> None:
    data = encode(Image.fromarray(RGB), "JPEG")
    broken = encode(Image.fromarray(RGB), "JPEG", exif=b"Exif\0\0II*\0\xff\xff\xff\x7f")
    for other in (data + b"\0" * 7, broken):
        assert_pixels_close(decode(other), decode(data), tolerance=0)


def test_no_format_is_read_that_runs_a_program() -> None:
    data = encode(Image.fromarray(RGB), "EPS")
    with pytest.raises(ImageError, match="cannot be decoded"):
        decode_image(data)


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
