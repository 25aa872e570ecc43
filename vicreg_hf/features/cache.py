"""Features that are computed once for each encoder, data set and preprocessing, and kept.

Shapes: N usable images of a split, F features.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from numpy.typing import NDArray
from torch import Tensor

from vicreg_hf.data.splits import ImageSplit
from vicreg_hf.features.encoders import Encoder
from vicreg_hf.features.parts import Part, PartError, parts_of, read_part
from vicreg_hf.features.writing import complete_parts
from vicreg_hf.runtime.distributed import failing_together
from vicreg_hf.runtime.files import clear_leftovers

ROWS_PER_FILE, MOST_BYTES = 10_000, 2**28
"""Rows of a file at most, and bytes of their features."""
LAYOUT = 2
"""Version of the files, of which each has a place of its own."""


@dataclass(frozen=True)
class Features:
    """Features of the images of a split that can be used."""

    x: Tensor
    """(N, F) on the CPU, of the type they are kept in; (0, F) in other processes than the main
    one."""
    rows: Tensor
    """(N,) numbers of the images within the split, ascending."""


def cached_features(
    encoder: Encoder,
    splits: Mapping[str, ImageSplit],
    cache_dir: Path,
    accelerator: Accelerator,
    *,
    batch_size: int = 256,
    num_workers: int | None = None,
    bf16: bool = False,
    max_bad_fraction: float = 0.05,
    say: Callable[[str], object] | None = None,
    dtype: str = "float32",
) -> dict[str, Features]:
    """Features of every image, from the cache where they are there already.

    They are kept by a digest of the encoder's weights, architecture and preprocessing, of the data
    and of the precision, so that a change of any of them is another place. What a run that was
    stopped has finished is used, and what is damaged is made again, with a warning. Every
    process must call this.

    Args:
        encoder: its module on the accelerator's device.
        cache_dir: made if absent.
        num_workers: per process; by default its share of the cores.
        say: told of images that cannot be used; by default the accelerator prints it.
        dtype: float32 or float16, in which features are kept.

    Raises:
        ImageError: more than max_bad_fraction of the images cannot be used.
        ValueError: a cache that cannot be written.
    """
    precision = f"bf16={bf16}, mixed_precision={accelerator.mixed_precision}"
    precision += "" if dtype == "float32" else f", {dtype}"
    digest = encoder.fingerprint()
    row_bytes = encoder.num_features * np.dtype(dtype).itemsize
    rows_per_file = max(1, min(ROWS_PER_FILE, MOST_BYTES // row_bytes))
    parts: list[Part] = []
    for name, split in splits.items():
        place = cache_dir / _key(digest, precision, split)
        if accelerator.is_main_process:
            clear_leftovers(place)
        parts += parts_of({name: split}, place, rows_per_file)
    complete_parts(
        encoder, splits, parts, accelerator, directory=cache_dir, setting="cache_dir",
        max_bad_fraction=max_bad_fraction, batch_size=batch_size, num_workers=num_workers,
        bf16=bf16, say=say, dtype=dtype,
    )  # fmt: skip
    with failing_together(accelerator.device):
        return {
            name: _read(
                [part for part in parts if part.split == name], encoder.num_features,
                with_features=accelerator.is_main_process,
            )
            for name in splits
        }  # fmt: skip


def _key(encoder: str, precision: str, split: ImageSplit) -> str:
    # datasets' own fingerprint is of the whole table; that of some images tells tables apart that
    # datasets takes for one another
    data = {"table": split.table._fingerprint, "column": split.column.name} | split.fingerprint()
    text = json.dumps([LAYOUT, encoder, precision, data], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:32]


def _read(parts: Sequence[Part], num_features: int, *, with_features: bool) -> Features:
    x, rows = list[NDArray[np.floating[Any]]](), [np.empty(0, np.int64)]
    for part in parts:
        try:
            contents = read_part(part, num_features, with_features=with_features)
        except (FileNotFoundError, PartError) as error:
            raise ValueError(
                "cache_dir must give every process what was written there, and "
                f"{part.file} cannot be read: {error}; choose one that all nodes share."
            ) from error
        x.append(contents.features)
        rows.append(contents.rows)
    x = x or [np.empty((0, num_features), np.float32)]
    return Features(torch.from_numpy(np.concatenate(x)), torch.from_numpy(np.concatenate(rows)))
