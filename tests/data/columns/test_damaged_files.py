"""Damaged files of every format: a tensor or an ImageError, and never the end of the process.

VICREG_FUZZ=100000 sets how many; every file is a function of its number.
"""

from __future__ import annotations

import io
import multiprocessing
import os
from typing import Any

import numpy as np
from PIL import Image

from vicreg_hf.data.columns.image_files import ImageError, decode_image

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


def decode_all(last: Any, decoded: Any) -> None:
    """Decode all damaged files; `last` holds the number of the one in work."""
    files = originals()
    for number in range(COUNT):
        data = mutated(number, files)
        last.value = number
        for channels in (1, 3, 4):
            try:
                image = decode_image(data, channels)
            except ImageError:
                continue
            assert image.shape[0] == channels, (number, image.shape)
            assert image.numel() > 0, number
            decoded.value += 1


def test_no_damaged_file_ends_the_process() -> None:
    whole = [decode_image(data).shape for data in originals()]
    assert len(whole) >= 20
    assert set(whole) == {(3, 24, 32)}
    fork = multiprocessing.get_context("fork")  # a process of its own, and no imports
    last, decoded = fork.Value("i", -1), fork.Value("i", 0)
    process = fork.Process(target=decode_all, args=(last, decoded))
    process.start()
    process.join()
    assert process.exitcode == 0, f"file {last.value}"
    # damage that tells, and damage that does not
    assert 0.2 < decoded.value / (3 * COUNT) < 0.9
