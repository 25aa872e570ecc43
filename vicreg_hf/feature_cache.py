"""Features that are computed once for each encoder, data set and preprocessing, and kept.

Shapes: N usable images of a split, F features.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import Tensor

from vicreg_hf.bad_images import BadImages
from vicreg_hf.data import default_num_workers, loading_errors, local_processes
from vicreg_hf.distributed import failing_together
from vicreg_hf.encoders import Encoder
from vicreg_hf.extraction import Part, features_of, parts_of
from vicreg_hf.images import ImageError
from vicreg_hf.sources import ImageSplit

ROWS_PER_FILE = 10_000


@dataclass(frozen=True)
class Features:
    """Of the images of a split that can be used."""

    x: Tensor
    """(N, F) float32, on the CPU; (0, F) in other processes than the main one."""
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
) -> dict[str, Features]:
    """Features of every image, from the cache where they are there already.

    They are kept by a digest of the encoder's weights, architecture and preprocessing, of the data
    and of the precision, so that a change of any of them is another place. What a run that was
    stopped has finished is used. Every process must call this.

    Args:
        encoder: its module on the accelerator's device.
        cache_dir: made if absent.
        num_workers: per process; by default its share of the cores.

    Raises:
        ImageError: more than max_bad_fraction of the images cannot be used.
        ValueError: a cache that cannot be written.
    """
    precision = f"bf16={bf16}, mixed_precision={accelerator.mixed_precision}"
    digest = encoder.fingerprint()
    parts: list[Part] = []
    for name, split in splits.items():
        place = cache_dir / _key(digest, precision, split)
        parts += parts_of({name: split}, place, ROWS_PER_FILE)
    # all must agree, whatever another evaluation puts there meanwhile
    absent = set(gather_object([n for n, part in enumerate(parts) if not _is_whole(part.file)]))
    missing = [part for number, part in enumerate(parts) if number in absent]
    if missing:
        mine = missing[accelerator.process_index :: accelerator.num_processes]
        seen = sum(len(part.rows) for part in missing)
        bad = BadImages(seen, max_bad_fraction, None, fate="left out")
        workers = num_workers
        if workers is None:
            workers = default_num_workers(local_processes(accelerator))
        device = accelerator.device
        halved = torch.autocast(device.type, torch.bfloat16, enabled=bf16)
        with (
            failing_together(device), _writing(cache_dir), loading_errors(), halved,
            accelerator.autocast(),
        ):  # fmt: skip
            for found in features_of(
                encoder, dict(splits), mine, device=device, batch_size=batch_size,
                num_workers=workers, show=accelerator.is_local_main_process,
            ):  # fmt: skip
                bad.add(found)
        bad.agree(gather_object, seen=seen, write=False, say=accelerator.print)
    accelerator.wait_for_everyone()
    lost = gather_object([part.file.name for part in parts if not _is_whole(part.file)])
    if lost:
        raise ValueError(
            f"every process must see the same cache_dir, and for one {cache_dir} lacks {lost[0]}; "
            "choose one that all nodes share."
        )
    found = {
        name: _read(
            [part.file for part in parts if part.split == name], encoder.num_features,
            with_features=accelerator.is_main_process,
        )
        for name in splits
    }  # fmt: skip
    _check_share(found, splits, max_bad_fraction)
    return found


def _check_share(
    found: Mapping[str, Features], splits: Mapping[str, ImageSplit], max_bad_fraction: float
) -> None:
    """Judge what is cached too, which may have been left by a run that allowed more, or failed."""
    total = sum(map(len, splits.values()))
    bad = total - sum(len(features.rows) for features in found.values())
    if bad > max_bad_fraction * total:
        raise ImageError(
            f"at most max_bad_fraction={max_bad_fraction} of the images may be unusable, got {bad} "
            f"of {total}; mend or remove them, or raise --max_bad_fraction."
        )


def _key(encoder: str, precision: str, split: ImageSplit) -> str:
    # of the whole table; the digest of the first images tells those apart that datasets mistakes
    data = {"table": split.table._fingerprint, "column": split.column.name} | split.fingerprint()
    text = json.dumps([encoder, precision, data], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:32]


def _is_whole(file: Path) -> bool:
    try:
        pq.read_metadata(file)
    except (OSError, pa.ArrowInvalid):  # absent, or damaged since
        return False
    return True


@contextmanager
def _writing(cache_dir: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise ValueError(
            f"cache_dir must be a directory that can be written, got {cache_dir}: {error}."
        ) from error


def _read(files: list[Path], width: int, *, with_features: bool) -> Features:
    rows, features = [np.empty(0, np.int64)], [np.empty((0, width), np.float32)]
    for file in files:
        table = pq.read_table(file, columns=["row", "embedding"] if with_features else ["row"])
        rows.append(table["row"].to_numpy())
        if not with_features:
            continue
        flat = table["embedding"].combine_chunks().flatten().to_numpy()
        features.append(flat.reshape(-1, width))
    return Features(
        torch.from_numpy(np.concatenate(features)), torch.from_numpy(np.concatenate(rows))
    )
