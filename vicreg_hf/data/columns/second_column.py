"""Which column a second branch reads, where it does not take views of the same image."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import datasets

from vicreg_hf.data.columns.base import Column, sampled_rows
from vicreg_hf.data.columns.finding import find_image_column
from vicreg_hf.data.columns.images import ImageColumn
from vicreg_hf.data.columns.spectrograms import SpectrogramColumn, SpectrogramSettings
from vicreg_hf.data.columns.texts import TextColumn
from vicreg_hf.data.columns.vectors import VectorColumn
from vicreg_hf.data.columns.waveforms import WaveformColumn
from vicreg_hf.models.tokenizers import load_tokenizer


def open_second_column(
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
        tokenizer: Hub id or directory, for text.
        channels: of images.

    Raises:
        ValueError: no such column, none or several to choose from, or no tokenizer.
    """
    if modality == "image":
        found = find_image_column(table.features, name, "prime_column")
        image = ImageColumn(found, table.features[found], channels, **preparation)
        return image.with_range(image.prepare(table)[sampled_rows(len(table))][found])
    name = find_second_column(table.features, modality, name)  # before the Hub may be asked
    if modality == "text":
        return TextColumn(name, load_tokenizer(str(tokenizer)), **preparation)
    if modality == "embedding":
        return VectorColumn.measure(table, name)
    if not waveforms:
        return SpectrogramColumn(name, table.features[name], SpectrogramSettings(**preparation))
    rate = preparation["sampling_rate"]
    return WaveformColumn(name, rate, round(preparation["seconds"] * rate))


def find_second_column(features: datasets.Features, modality: str, wanted: str | None) -> str:
    """The column of a modality: the wanted one, or the only one.

    A column of plain bytes may be wanted for audio.

    Raises:
        ValueError: no such column, or none or several to choose from.
    """
    found = [name for name, feature in features.items() if _holds(feature, modality)]
    listed = f"columns of {modality}: {', '.join(found) or 'none'}; all: {', '.join(features)}."
    if wanted is None:
        if len(found) == 1:
            return found[0]
        raise ValueError(
            f"prime_column must be given unless exactly one column holds {modality}, got "
            f"{len(found)}; {listed}"
        )
    kind = getattr(features.get(wanted), "dtype", None)
    if wanted in found or (modality == "audio" and kind in ("binary", "large_binary")):
        return wanted
    raise ValueError(f"prime_column must name a column of {modality}, got {wanted!r}; {listed}")


def _holds(feature: Any, modality: str) -> bool:
    if modality == "audio":
        return isinstance(feature, datasets.Audio)
    listed = isinstance(feature, (datasets.List, datasets.LargeList))
    inner = feature.feature if listed else feature
    if not isinstance(inner, datasets.Value):
        return False
    if modality == "text":
        return inner.dtype in ("string", "large_string")
    return listed and inner.dtype in ("float16", "float32", "float64")
