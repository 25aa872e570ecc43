"""Damaged files of every format: an array or an ImageError, and never the end of the process.

VICREG_FUZZ=100000 sets how many; every file is a function of its number.
"""

from __future__ import annotations

import io
import multiprocessing
import os
from contextlib import suppress
from functools import partial
from typing import Any

import numpy as np
import pytest
from paired import encode_sound
from PIL import Image

from vicreg_hf.data.columns.image_files import ImageError, decode_image, without_extras
from vicreg_hf.data.columns.sound_files import decode_sound

COUNT = int(os.environ.get("VICREG_FUZZ", "600"))
FORMATS: list[tuple[str, str, dict[str, object]]] = [
    ("JPEG", "RGB", {"quality": 80}), ("JPEG", "L", {}), ("JPEG", "CMYK", {}),
    ("JPEG", "RGB", {"progressive": True, "exif": b"Exif\0\0II*\0\x08\0\0\0\0\0\0\0\0\0"}),
    ("PNG", "RGB", {}), ("PNG", "P", {"transparency": 3}), ("PNG", "I;16", {}), ("PNG", "RGBA", {}),
    ("GIF", "P", {}), ("WEBP", "RGB", {}), ("WEBP", "RGBA", {"lossless": True}),
    ("TIFF", "F", {}), ("TIFF", "RGB", {"compression": "tiff_lzw"}),
    ("TIFF", "CMYK", {"compression": "tiff_deflate"}), ("BMP", "RGB", {}), ("JPEG2000", "RGB", {}),
    ("AVIF", "RGB", {}), ("ICO", "RGBA", {"sizes": [(32, 24)]}), ("PPM", "RGB", {}),
    ("PCX", "RGB", {}), ("SGI", "RGB", {}), ("TGA", "RGB", {"compression": "tga_rle"}),
    ("DDS", "RGB", {}), ("QOI", "RGB", {}),
]  # fmt: skip


def originals() -> list[bytes]:
    """One small file per format that this PIL writes."""
    files = []
    pixels = np.random.default_rng(0).integers(0, 256, (24, 32, 4), dtype=np.uint8)
    for file_format, mode, options in FORMATS:
        if mode in ("I;16", "F"):
            image = Image.fromarray(pixels[..., 0].astype(np.uint16 if mode == "I;16" else "f4"))
        else:
            image = Image.fromarray(pixels[..., :3]).convert(mode)
        buffer = io.BytesIO()
        try:
            image.save(buffer, file_format, **options)
        except (KeyError, OSError):  # built without the format
            continue
        files.append(buffer.getvalue())
    return files


def mutated(number: int, files: list[bytes]) -> bytes:
    """Bits flipped, bytes overwritten, parts cut, doubled or taken from another file."""
    random = np.random.default_rng(number)
    data = bytearray(files[number % len(files)])
    for _ in range(int(random.integers(1, 6))):
        if not data:
            break
        # most of what decides is in the header
        end = len(data) if random.random() < 0.5 else min(len(data), 64)
        start, size = int(random.integers(end)), int(2 ** random.uniform(0, 7))
        match random.integers(6):
            case 0:
                data[start] ^= 1 << int(random.integers(8))
            case 1:
                data[start] = int(random.choice([0, 1, 127, 128, 255]))
            case 2:
                data[start : start + size] = random.bytes(size)
            case 3:
                del data[start : start + size]
            case 4:
                data[start:start] = data[start : start + size]
            case _:
                other = files[int(random.integers(len(files)))]
                data[start : start + size] = other[start : start + size]
    end = int(random.integers(len(data) + 1)) if random.random() < 0.1 else len(data)
    return bytes(data[:end])


def decode_as_pil(data: bytes, channels: int) -> Any:
    """Decode an image whose pixels PIL reads too, if need be without texts and profiles."""
    image = decode_image(data, channels, (0, 65535))
    for version in (data, without_extras(data)):
        with suppress(Exception), Image.open(io.BytesIO(version)) as opened:
            opened.load()
            return image
    raise AssertionError("PIL refuses its pixels")


def read_all(files: list[bytes], readers: list[Any], last: Any, decoded: Any) -> None:
    """Read all damaged files; `last` holds the number of the one in work."""
    for number in range(COUNT):
        data = mutated(number, files)
        last.value = number
        for read in readers:
            try:
                found = np.asarray(read(data))
            except ImageError:
                continue
            assert found.shape[0] == read.keywords.get("channels", len(found)), number
            assert found.size > 0, number
            assert np.isfinite(found).all(), number
            decoded.value += 1


WAVE = 0.5 * np.sin(np.arange(800) / 6)
SOUNDS = [encode_sound(WAVE, 16_000, kind) for kind in ("WAV", "FLAC", "OGG", "MP3", "AIFF")]
IMAGES = originals()


def test_originals_can_be_read() -> None:
    assert len(IMAGES) >= 20
    assert {decode_as_pil(data, 3).shape for data in IMAGES} == {(3, 24, 32)}


@pytest.mark.parametrize(
    ("files", "readers"),
    [
        (IMAGES, [partial(decode_as_pil, channels=channels) for channels in (1, 3, 4)]),
        (SOUNDS, [partial(decode_sound, sampling_rate=8_000)]),
    ],
    ids=["images", "sounds"],
)
def test_no_damaged_file_ends_the_process(files: list[bytes], readers: list[Any]) -> None:
    fork = multiprocessing.get_context("fork")  # a process of its own, and no imports
    last, decoded = fork.Value("i", -1), fork.Value("i", 0)
    process = fork.Process(target=read_all, args=(files, readers, last, decoded))
    process.start()
    process.join()
    assert process.exitcode == 0, f"file {last.value}"
    # damage that tells, and damage that does not
    assert 0.1 < decoded.value / (len(readers) * COUNT) < 0.9
