"""Data sets of images: where they are found, and reading them.

Shapes: N images, C channels, H x W pixels.
"""

from __future__ import annotations

import errno
import hashlib
import os
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import torch
from datasets import config
from datasets.config import HF_DATASETS_CACHE
from datasets.packaged_modules.imagefolder.imagefolder import ImageFolder
from torch import Tensor

from vicreg_hf.archives import check_archives
from vicreg_hf.columns import (
    BadImage,
    ImageColumn,
    find_image_column,
    find_label_column,
    path_of,
)
from vicreg_hf.demo import load_demo
from vicreg_hf.images import ImageError
from vicreg_hf.modalities.audio import SpectrogramColumn, SpectrogramSettings
from vicreg_hf.replacement import read_or_replace

DEMO = "demo"
UNNAMED = "unnamed"
"""What recipes for data of one's own have in place of a name."""
EVAL_SPLITS = ("test", "validation", "valid", "val")
BUILDERS = {".parquet": "parquet", ".arrow": "arrow", ".tar": "webdataset", ".zip": "imagefolder"}
"""What a single file is opened as; folders are recognised by `datasets`."""
NOT_WRITABLE = (errno.EROFS, errno.EACCES, errno.EPERM, errno.ENOTDIR, errno.EEXIST)
FINGERPRINTED = 64
"""Images of a split by which it is known again."""
Splits = dict[Any, Any]
"""A DatasetDict, or an IterableDatasetDict."""


@dataclass
class ImageSplit:
    """One split: encoded images, and labels where the data has them."""

    table: datasets.Dataset
    column: ImageColumn | SpectrogramColumn
    name: str
    labels: Tensor | None = None
    """(N,) classes from 0."""
    label_names: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.table)

    @property
    def num_images(self) -> int:
        """Its length; that of a stream may be unknown."""
        return len(self)

    def fingerprint(self) -> dict[str, Any]:
        """What tells one data set from another: its length, and a digest of images all over it."""
        digest = hashlib.sha256()
        for cell in self.cells(self.sampled_rows()):
            with suppress(ImageError):
                digest.update(self.column.encoded(cell))
        return {"images": len(self), "sha256": digest.hexdigest()}

    def sampled_rows(self) -> list[int]:
        """Rows all over the split, by which it is known again."""
        return np.unique(np.linspace(0, len(self) - 1, num=FINGERPRINTED).astype(int)).tolist()

    def read(self, rows: Sequence[int]) -> list[Tensor]:
        """Decode some rows.

        Returns:
            One (C, H, W) uint8 tensor per row.

        Raises:
            ImageError: names the row.
        """
        images = []
        for row, cell in zip(rows, self.cells(rows), strict=True):
            try:
                images.append(self.column.decode(cell))
            except ImageError as error:
                raise ImageError(f"{self.place(row)}: {error}") from None
        return images

    def try_read(self, rows: Sequence[int]) -> list[tuple[Tensor | BadImage, str | None]]:
        """Decode some rows.

        Returns:
            Of each row the (C, H, W) uint8 image, or why there is none; and its path, if known.
        """
        found: list[tuple[Tensor | BadImage, str | None]] = []
        for row, cell in zip(rows, self.cells(rows), strict=True):
            path = path_of(cell)
            try:
                found.append((self.column.decode(cell), path))
            except ImageError as error:
                found.append((BadImage(int(row), path, str(error)), path))
        return found

    def read_or_replace(self, rows: Sequence[int]) -> tuple[list[Tensor], list[BadImage]]:
        """Decode some rows, and another image in the place of one that cannot be used.

        Which one is a function of the row alone.

        Returns:
            One (C, H, W) uint8 tensor per row, and what could not be used.

        Raises:
            ImageError: nor could any of `MAX_REPLACEMENTS` others.
        """
        return read_or_replace(self, rows)

    def place(self, row: int) -> str:
        """A row, as a sentence names it."""
        return f"row {row} of {self.name}, column {self.column.name}"

    def cells(self, rows: Sequence[int]) -> list[Any]:
        """The encoded images of some rows."""
        return self.table[list(rows)][self.column.name]

    def decode(self, cell: Any) -> Tensor:
        """The (C, H, W) uint8 image of a cell; an ImageError where it cannot be used."""
        return self.column.decode(cell)


def open_dataset(name: str, config_name: str | None = None, *, streaming: bool = False) -> Splits:
    """The splits of `demo`, a Hub id, a local folder or file.

    Args:
        config_name: of a Hub data set.
        streaming: open tables that are read as they are needed, and not copied to disk first.

    Raises:
        ValueError: nothing there that `datasets` can load; or what is loaded cannot be cached.
    """
    if name == UNNAMED:
        raise ValueError(
            "dataset_name must be given, since this recipe is for data of your own: a data set on "
            "the Hub, or a local folder or file."
        )
    try:
        if os.environ.get("RANK", "0") == "0":
            check_archives(Path(name))
        loaded = _load(name, config_name, streaming)
    except Exception as e:  # builders raise whatever their parsing meets
        if (fault := _cache_fault(e)) is not None:
            raise ValueError(
                f"the cache of data sets must be writable, got {config.HF_DATASETS_CACHE}: "
                f"{fault}; set HF_HOME or HF_DATASETS_CACHE to a folder that is."
            ) from e
        told = [next(iter(str(x).strip().splitlines()), type(x).__name__)
                for x in (e, e.__cause__) if x is not None]  # fmt: skip
        reason = " ".join(told)
        raise ValueError(
            f"dataset_name must be {DEMO}, a data set on the Hub, or a local folder or file that "
            f"datasets.load_dataset takes, got {name!r}: {reason}"
        ) from e
    if isinstance(loaded, (datasets.Dataset, datasets.IterableDataset)):
        return {str(loaded.split or "train"): loaded}
    return loaded


def _cache_fault(error: BaseException) -> OSError | None:
    """What kept `datasets` from writing to its cache, if that is what an error comes from."""
    caches = [Path(cache) for cache in (config.HF_CACHE_HOME, config.HF_DATASETS_CACHE)]
    for each in _causes(error):
        if isinstance(each, OSError) and each.errno in NOT_WRITABLE and each.filename is not None:
            place = Path(os.fsdecode(each.filename))
            if any(place.is_relative_to(c) or c.is_relative_to(place) for c in caches):
                return each
    return None


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__


def _load(name: str, config_name: str | None, streaming: bool) -> Any:
    path = Path(name)
    if name == DEMO:
        loaded = load_demo()
    elif (path / "dataset_dict.json").is_file() or (path / "state.json").is_file():
        loaded = datasets.load_from_disk(name)
    elif path.is_file():
        if path.suffix not in BUILDERS:
            raise ValueError(f"a file must end in {', '.join(BUILDERS)}.")
        return datasets.load_dataset(BUILDERS[path.suffix], data_files=name, streaming=streaming)
    else:
        if path.is_dir() and _is_image_folder(path):
            return datasets.load_dataset("imagefolder", data_dir=name, streaming=streaming)
        own = _own_cache(path) if path.is_dir() and _lists_files(path) else None
        return datasets.load_dataset(name, config_name, streaming=streaming, cache_dir=own)
    if not streaming:
        return loaded
    if isinstance(loaded, datasets.Dataset):
        return loaded.to_iterable_dataset(num_shards=_shards(loaded))
    return {k: table.to_iterable_dataset(num_shards=_shards(table)) for k, table in loaded.items()}


def _lists_files(folder: Path) -> bool:
    """Whether its card does."""
    card = folder / "README.md"
    return card.is_file() and "configs:" in card.read_text(errors="replace")


def _own_cache(folder: Path) -> str:
    """A cache for a folder whose card lists its files, as they are now.

    `datasets` would take what it has cached of any folder of that name with such a card.
    """
    files = sorted(
        (str(file.relative_to(folder)), file.stat().st_size, file.stat().st_mtime_ns)
        for file in folder.rglob("*")
        if file.is_file()
    )
    digest = hashlib.sha256(repr((folder.resolve(), files)).encode()).hexdigest()
    return str(Path(HF_DATASETS_CACHE) / f"folder-{digest[:16]}")


def _is_image_folder(folder: Path) -> bool:
    """Image files, with or without captions or annotations beside them.

    `datasets` would take a folder for what most of its files are.
    """
    if _lists_files(folder):
        return False
    found = {Path(file).suffix.lower() for _, _, files in os.walk(folder) for file in files}
    return not found & BUILDERS.keys() and bool(found & set(ImageFolder.EXTENSIONS))


def _shards(table: datasets.Dataset) -> int:
    """Into as many parts as workers may want to share."""
    return min(64, max(1, len(table)))


def image_split(
    splits: Splits,
    name: str,
    *,
    dataset_name: str,
    image_column: str | None = None,
    label_column: str | None = None,
    channels: int = 3,
    sound: SpectrogramSettings | None = None,
) -> ImageSplit:
    """Pick a split and its columns.

    Args:
        sound: how a column of sound is seen, where there are no images.

    Raises:
        ValueError: no such split, no rows, no such column.
    """
    if name not in splits:
        raise ValueError(f"split must be one of {', '.join(map(str, splits))}, got {name!r}.")
    table = splits[name]
    if len(table) == 0:
        raise ValueError(f"a split must have rows, got none in split {name!r} of {dataset_name}.")
    column = open_column(table.features, image_column, channels=channels, sound=sound)
    label = find_label_column(table.features, label_column)
    labels, names = (None, ()) if label is None else _labels(table, label)
    if label_column is not None and labels is None:
        raise ValueError(
            f"label_column must hold a class in every row, got rows of {dataset_name} ({name}) "
            f"without one in {label_column!r}; choose another or leave it out."
        )
    return ImageSplit(column.prepare(table), column, f"{dataset_name} ({name})", labels, names)


def open_column(
    features: datasets.Features,
    wanted: str | None,
    *,
    channels: int = 3,
    sound: SpectrogramSettings | None = None,
) -> ImageColumn | SpectrogramColumn:
    """The column of images, or of sound, which is seen as spectrograms of one channel.

    Raises:
        ValueError: as `find_image_column`; or soundfile is not installed.
    """
    found = find_image_column(features, wanted)
    if isinstance(features[found], datasets.Audio):
        return SpectrogramColumn.find(features, found, sound)
    return ImageColumn(found, features[found], channels)


def _labels(table: datasets.Dataset, column: str) -> tuple[Tensor | None, tuple[str, ...]]:
    """Classes from 0 and their names; None where a row has no class (null, or -1)."""
    values, feature = (
        table.select_columns([column]).with_format("arrow")[:][column],
        table.features[column],
    )
    if values.null_count:
        return None, ()
    values = values.to_numpy()
    if isinstance(feature, datasets.ClassLabel):
        if values.min() < 0:
            return None, ()
        return torch.from_numpy(values.astype(np.int64)), tuple(feature.names)
    names, classes = np.unique(values, return_inverse=True)
    return torch.as_tensor(classes, dtype=torch.long), tuple(str(name) for name in names)


def held_out_split(
    splits: Splits, wanted: str | None, train: str, **columns: Any
) -> tuple[ImageSplit | None, str | None]:
    """The split to measure on, and its name.

    Args:
        wanted: None takes the first of `EVAL_SPLITS` that has rows, the columns and labels.
        train: the split that is trained on.
        **columns: as for `image_split`.

    Raises:
        ValueError: the split asked for cannot be used.
    """
    if wanted is not None:
        return image_split(splits, wanted, **columns), wanted
    for name in EVAL_SPLITS:
        if name in splits and name != train:
            with suppress(ValueError):
                found = image_split(splits, name, **columns)
                if found.labels is not None:
                    return found, name
    return None, None
