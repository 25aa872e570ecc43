"""Small data sets of photographs, made from what scikit-learn bundles."""

from __future__ import annotations

import io
import struct
import zipfile
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset, DatasetDict, Features, Value
from datasets import Image as ImageFeature
from numpy.typing import NDArray
from PIL import Image
from sklearn.datasets import load_sample_images
from torch import Tensor

from vicreg_hf.data.splits import ImageSplit, image_split


def png(pixels: Tensor) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels.permute(1, 2, 0).numpy()).save(buffer, "PNG")
    return buffer.getvalue()


def photographs(count: int = 20, height: int = 40, width: int = 48) -> Tensor:
    """(count, 3, height, width) uint8 pieces of two photographs."""
    bundle: Any = load_sample_images()
    random = np.random.default_rng(0)
    pieces = []
    for k in range(count):
        y, x = random.integers(427 - height), random.integers(640 - width)
        pieces.append(bundle.images[k % 2][y : y + height, x : x + width])
    return torch.from_numpy(np.stack(pieces)).permute(0, 3, 1, 2).contiguous()


def table_of(cells: list[bytes | None], **columns: list[Any]) -> Dataset:
    features = {"image": ImageFeature()} | {
        name: Value("string" if isinstance(values[0], str) else "int64")
        for name, values in columns.items()
    }
    rows = [None if cell is None else {"bytes": cell, "path": None} for cell in cells]
    return Dataset.from_dict({"image": rows, **columns}, features=Features(features))


def split_of(images: Tensor | list[Tensor]) -> ImageSplit:
    table = table_of([png(image) for image in images])
    return image_split(DatasetDict({"train": table}), "train", dataset_name="photographs")


PNG = png(photographs(1)[0])


def write(folder: Path, names: Sequence[str], content: bytes = PNG) -> Path:
    """The same file under several names."""
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    return folder


def zipped(folder: Path, archive: Path, *, compression: int = zipfile.ZIP_STORED) -> Path:
    with zipfile.ZipFile(archive, "w", compression) as file:
        for path in sorted(folder.rglob("*")):
            file.write(path, path.relative_to(folder))
    return archive


def chunk(kind: bytes, content: bytes) -> bytes:
    """A part of a PNG."""
    checksum = zlib.crc32(kind + content)
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", checksum)


def deep_png(pixels: NDArray[Any], *before: bytes) -> bytes:
    """A PNG of (H, W, 3 or 4) pixels of 16 bits, with other chunks before them."""
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in pixels)
    kind = 2 if pixels.shape[2] == 3 else 6
    header = struct.pack(">IIBBBBB", pixels.shape[1], pixels.shape[0], 16, kind, 0, 0, 0)
    chunks = [chunk(b"IHDR", header), *before, chunk(b"IDAT", zlib.compress(rows))]
    return b"\x89PNG\r\n\x1a\n" + b"".join([*chunks, chunk(b"IEND", b"")])
