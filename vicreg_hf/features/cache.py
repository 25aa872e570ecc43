"""Features that are computed once for each encoder, data set and preprocessing, and kept.

Shapes: N usable images of a split, F features.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import Tensor

from vicreg_hf.data.bad_images import BadImages, check_share
from vicreg_hf.data.splits import ImageSplit
from vicreg_hf.data.workers import loading_errors
from vicreg_hf.features.encode import features_of
from vicreg_hf.features.encoders import Encoder
from vicreg_hf.features.parts import Contents, Part, PartError, parts_of, read_part
from vicreg_hf.runtime.distributed import failing_together
from vicreg_hf.runtime.files import clear_leftovers, writing
from vicreg_hf.runtime.machine import default_num_workers, local_processes

ROWS_PER_FILE = 10_000
ABSENT = "it is not there"
LAYOUT = 2
"""Of the files; since 2 their pages have checksums."""


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
    stopped has finished is used, and what is damaged is computed again, with a warning. Every
    process must call this.

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
        if accelerator.is_main_process:
            clear_leftovers(place)
        parts += parts_of({name: split}, place, ROWS_PER_FILE)
    contents: dict[int, Contents] = {}
    width = encoder.num_features
    faults = _load(dict(enumerate(parts)), width, accelerator, contents)
    for number, fault in faults.items():
        if fault != ABSENT:
            accelerator.print(
                f"warning: {parts[number].file} is damaged and is computed again: {fault}."
            )
    missing = [parts[number] for number in faults]
    total = sum(map(len, splits.values()))
    if missing:
        mine = missing[accelerator.process_index :: accelerator.num_processes]
        bad = BadImages(total, max_bad_fraction, None, fate="left out")
        workers = num_workers
        if workers is None:
            workers = default_num_workers(local_processes(accelerator))
        device = accelerator.device
        halved = torch.autocast(device.type, torch.bfloat16, enabled=bf16)
        with (
            failing_together(device), writing(cache_dir, "cache_dir"), loading_errors(), halved,
            accelerator.autocast(),
        ):  # fmt: skip
            for found in features_of(
                encoder, dict(splits), mine, device=device, batch_size=batch_size,
                num_workers=workers, show=accelerator.is_local_main_process,
            ):  # fmt: skip
                bad.add(found)
        bad.agree(gather_object, seen=total, write=False, say=accelerator.print)
    accelerator.wait_for_everyone()
    lost = _load({number: parts[number] for number in faults}, width, accelerator, contents)
    if lost:
        number, fault = next(iter(lost.items()))
        raise ValueError(
            f"cache_dir must give every process what was written there, and of {cache_dir} "
            f"{parts[number].file.name} cannot be read: {fault}; choose one that all nodes share."
        )
    check_share(total - sum(len(each.rows) for each in contents.values()), total, max_bad_fraction)
    found = {}
    for name in splits:
        own = [contents[n] for n, part in enumerate(parts) if part.split == name]
        features = [each.features for each in own]
        found[name] = Features(
            torch.from_numpy(np.concatenate([np.empty((0, width), np.float32), *features])),
            torch.from_numpy(np.concatenate([np.empty(0, np.int64), *(e.rows for e in own)])),
        )
    return found


def _key(encoder: str, precision: str, split: ImageSplit) -> str:
    # of the whole table; the digest of the first images tells those apart that datasets mistakes
    data = {"table": split.table._fingerprint, "column": split.column.name} | split.fingerprint()
    text = json.dumps([LAYOUT, encoder, precision, data], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:32]


def _load(
    parts: Mapping[int, Part],
    num_features: int,
    accelerator: Accelerator,
    into: dict[int, Contents],
) -> dict[int, str]:
    """Read parts, without features in other processes than the main one.

    Returns:
        The numbers of those that not all processes could read, and what is wrong with each.
    """
    faults: list[tuple[int, str]] = []
    for number, part in parts.items():
        try:
            into[number] = read_part(part, num_features, with_features=accelerator.is_main_process)
        except FileNotFoundError:
            faults.append((number, ABSENT))
        except PartError as error:
            faults.append((number, str(error)))
    # all must agree, whatever another evaluation puts there meanwhile
    return dict(sorted(gather_object(faults)))
