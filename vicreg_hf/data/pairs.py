"""Images, or sounds, and what belongs to each in another column of the same data set.

Shapes: N samples, C channels, H x W pixels.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, Protocol

import datasets
from numpy.typing import NDArray
from torch import Tensor

from vicreg_hf.data.bad_images import read_or_replace
from vicreg_hf.data.columns.base import BadImage, Column
from vicreg_hf.data.columns.finding import find_image_column
from vicreg_hf.data.columns.image_files import ImageError
from vicreg_hf.data.columns.images import ImageColumn
from vicreg_hf.data.columns.sound_files import sound_file
from vicreg_hf.data.columns.spectrograms import SpectrogramColumn, SpectrogramSettings
from vicreg_hf.data.columns.texts import TextColumn, check_text_column, is_text
from vicreg_hf.data.columns.vectors import VectorColumn, is_vector
from vicreg_hf.data.columns.waveforms import WaveformColumn
from vicreg_hf.data.splits import ImageSplit
from vicreg_hf.models.branch import BranchInput
from vicreg_hf.models.tokenizers import load_tokenizer


def paired_column(
    table: datasets.Dataset,
    modality: str,
    name: str | None,
    preparation: Mapping[str, Any],
    *,
    waveforms: bool = False,
    tokenizer: str | None = None,
    channels: int = 3,
) -> Column:
    """The column that a second branch reads.

    Args:
        name: None takes the only column of that kind.
        preparation: as in the description of the branch, `complete_prime`.
        waveforms: whether sounds are taken as they are, and not as spectrograms.
        tokenizer: of text; Hub id or directory.
        channels: of images.

    Raises:
        ValueError: no such column, none or several to choose from, or no tokenizer.
    """
    features = table.features
    name = name or _only_column(features, modality)
    if modality == "text":
        check_text_column(features, name)  # before what may ask the Hub
        return TextColumn.find(
            features, name, tokenizer=load_tokenizer(str(tokenizer)), **preparation
        )
    if modality == "embedding":
        return VectorColumn.find(features, name).measured(table)
    if modality == "image":
        found = find_image_column(features, name)
        return ImageColumn(found, features[found], channels)
    if not waveforms:
        return SpectrogramColumn.find(features, name, SpectrogramSettings(**preparation))
    rate = preparation["sampling_rate"]
    samples = round(preparation["seconds"] * rate)
    return WaveformColumn.find(features, name, sampling_rate=rate, num_samples=samples)


def _only_column(features: datasets.Features, modality: str) -> str:
    """The only column of a kind.

    Raises:
        ValueError: there are none or several.
    """
    holds = {"text": is_text, "embedding": is_vector, "audio": _is_sound}[modality]
    found = [name for name, kind in features.items() if holds(kind)]
    if not found:
        raise ValueError(
            f"a second branch that takes {modality} needs a column of that, got none among "
            f"{', '.join(features)}."
        )
    if len(found) != 1:
        raise ValueError(
            f"prime_column must be given unless exactly one column holds what the modality "
            f"{modality} takes, got {len(found)}: {', '.join(found) or 'none'}; all: "
            f"{', '.join(features)}."
        )
    return found[0]


def _is_sound(feature: Any) -> bool:
    return isinstance(feature, datasets.Audio)


Pair = tuple[Tensor, Any]
"""A (C, H, W) uint8 image, and the decoded cell that belongs to it."""


class PairedInput(Protocol):
    """How what belongs to an image becomes what the second branch takes."""

    def batch(self, items: Sequence[Any], rows: NDArray[Any], epoch: int) -> BranchInput:
        """In a loading worker, of B decoded cells."""
        ...

    def finish(self, batch: BranchInput, rows: NDArray[Any], epoch: int) -> BranchInput:
        """On the device."""
        ...


@dataclass
class PairedSplit:
    """One split, of which two columns are read row by row."""

    images: ImageSplit
    table: datasets.Dataset
    """The other column alone, with as many rows."""
    column: Column

    def __len__(self) -> int:
        return len(self.images)

    @property
    def name(self) -> str:
        return self.images.name

    def fingerprint(self) -> dict[str, Any]:
        """That of the images, and a digest of what belongs to the same ones."""
        digest = hashlib.sha256()
        for cell in self.table[self.images.sampled_rows()][self.column.name]:
            with suppress(ImageError):  # it cannot be used
                digest.update(_content(cell))
                if isinstance(self.column, TextColumn):  # and what its words have become
                    digest.update(repr(self.column.tokens(self.column.decode(cell))).encode())
        return self.images.fingerprint() | {"prime_sha256": digest.hexdigest()}

    def place(self, row: int) -> str:
        """A row, as a sentence names it."""
        columns = f"{self.images.column.name} and {self.column.name}"
        return f"row {row} of {self.name}, columns {columns}"

    def cells(self, rows: Sequence[int]) -> list[tuple[Any, Any]]:
        """What both columns hold of some rows."""
        others = self.table[list(rows)][self.column.name]
        return list(zip(self.images.cells(rows), others, strict=True))

    def decode(self, cell: tuple[Any, Any]) -> Pair:
        """Both halves of a sample; an ImageError where either cannot be used."""
        return self.images.decode(cell[0]), self.column.decode(cell[1])

    def read_or_replace(self, rows: Sequence[int]) -> tuple[list[Pair], list[BadImage]]:
        """Decode some rows, and another pair in the place of one of which a half is unusable.

        Errors as of `ImageSplit.read_or_replace`.
        """
        return read_or_replace(self, rows)


def _content(cell: Any) -> bytes:
    """What tells a cell from others, wherever its file lies."""
    if isinstance(cell, dict) and "path" in cell:
        return sound_file(cell)
    return repr(cell).encode()
