"""Completing the parts of a data set's features: those that are absent or damaged are written.

Shapes: B images, C channels, S side in pixels, F features.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import datasets
import numpy as np
import pyarrow as pa
import torch
from accelerate import Accelerator
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from vicreg_hf.data.bad_images import BadImages, check_share
from vicreg_hf.data.columns.base import BadImage
from vicreg_hf.data.columns.reading import zip_and_name
from vicreg_hf.data.splits import ImageSplit
from vicreg_hf.data.workers import loading_errors
from vicreg_hf.features.encode import check_finite_features, encode_with, encoding_precision
from vicreg_hf.features.encoders import Encoder
from vicreg_hf.features.parts import (
    EMBEDDING,
    HEIGHT,
    MAP,
    WIDTH,
    Part,
    PartError,
    read_part,
    write_part,
)
from vicreg_hf.runtime.distributed import failing_together, gather_objects, wait_for_all
from vicreg_hf.runtime.files import writing
from vicreg_hf.runtime.machine import default_num_workers, local_processes


def complete_parts(
    encoder: Encoder,
    splits: Mapping[str, ImageSplit],
    parts: Sequence[Part],
    accelerator: Accelerator,
    *,
    directory: Path,
    max_bad_fraction: float,
    setting: str = "output_dir",
    remedy: str = "",
    listed_in: Path | None = None,
    say: Callable[[str], object] | None = None,
    **settings: Any,
) -> None:
    """Write those of some parts that are absent or damaged; every process must call this.

    Args:
        directory: where the parts are.
        setting: the setting that names the directory; likewise remedy, what to do where it cannot
            be written.
        listed_in: a file with a line for each image that cannot be used.
        say: told how many there are; by default the accelerator prints it.
        settings: of `write_parts`.

    Raises:
        ImageError: more than max_bad_fraction of the images cannot be used.
        ValueError: a directory that cannot be written.
    """
    main, total = accelerator.is_main_process, sum(map(len, splits.values()))
    missing, left_out = _missing_parts(parts, splits, encoder.num_features, accelerator)
    with writing(directory, setting, remedy=remedy):
        left_out += write_parts(encoder, splits, missing, accelerator, **settings)
    bad = BadImages(total, max_bad_fraction, listed_in, fate="left out")
    if main:
        bad.forget()  # all bad images are found again and listed anew
    bad.add(left_out)
    bad.agree(gather_objects, seen=total, write=main, say=say or accelerator.print)
    check_share(sum(gather_objects([len(left_out)])), total, max_bad_fraction)
    wait_for_all()


def _missing_parts(
    parts: Sequence[Part],
    splits: Mapping[str, ImageSplit],
    num_features: int,
    accelerator: Accelerator,
) -> tuple[list[Part], list[BadImage]]:
    """Read the parts that are there, of which every process takes its share.

    Returns:
        The parts that are absent or damaged; and the images that the others of this share lack.
    """
    numbers: list[int] = []
    left_out: list[BadImage] = []
    with failing_together(accelerator.device), loading_errors():
        for number in range(accelerator.process_index, len(parts), accelerator.num_processes):
            part = parts[number]
            try:
                left_out += _lacking(part, splits[part.split], num_features)
            except FileNotFoundError:
                numbers.append(number)
            except PartError as error:
                print(f"warning: {part.file} is damaged and is made again: {error}.", flush=True)
                numbers.append(number)
    return [parts[number] for number in sorted(gather_objects(numbers))], left_out


def _lacking(part: Part, split: ImageSplit, num_features: int) -> list[BadImage]:
    """The images of a part that it lacks, each of which must be one that cannot be used."""
    contents = read_part(part, num_features)
    rows = sorted({*part.rows} - {*contents.rows.tolist()})
    bad = [image for image in split.try_read(rows) if isinstance(image, BadImage)]
    if len(bad) < len(rows):
        raise PartError(f"it lacks {len(rows) - len(bad)} images that can be used")
    return bad


def write_parts(
    encoder: Encoder,
    splits: Mapping[str, ImageSplit],
    parts: Sequence[Part],
    accelerator: Accelerator,
    *,
    batch_size: int,
    num_workers: int | None = None,
    bf16: bool = False,
    dtype: str = "float32",
    root: str = "",
) -> list[BadImage]:
    """Write the features of some parts, of which every process does its share.

    Every process must call this.

    Args:
        encoder: its module on the accelerator's device.
        num_workers: per process; by default its share of the cores.
        root: folder of the data; paths are written relative to it.

    Returns:
        The images that this process could not use.
    """
    device = accelerator.device
    own = parts[accelerator.process_index :: accelerator.num_processes]
    batches = [
        (part, part.rows[start : start + batch_size])
        for part in own
        for start in range(0, len(part.rows), batch_size)
    ]
    if num_workers is None:
        num_workers = default_num_workers(local_processes(accelerator))
    loader = DataLoader(
        _EvaluationViews(splits, batches, encoder), batch_size=None, num_workers=num_workers,
        pin_memory=device.type == "cuda", prefetch_factor=4 if num_workers else None,
    )  # fmt: skip
    encoder.module.to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]
    # should all images of a part be bad, its column is as wide as the others'
    empty = torch.empty(0, encoder.num_features, device=device)
    prepared: list[PreparedRows] = []
    features = [empty]
    left_out: list[BadImage] = []
    with (
        failing_together(device), loading_errors(), encoding_precision(accelerator, bf16),
        tqdm(
            total=sum(len(part.rows) for part in own), unit="image",
            disable=not accelerator.is_local_main_process,
        ) as bar,
    ):  # fmt: skip
        for (part, rows), batch in zip(batches, loader, strict=True):
            prepared.append(batch)
            left_out += batch.bad
            if batch.images is not None:
                features.append(encode_with(encoder, batch.images, device))
            bar.update(len(rows))
            if rows[-1] == part.rows[-1]:
                found = check_finite_features(torch.cat(features).to(getattr(torch, dtype)))
                _write(
                    part, splits[part.split], prepared, found.cpu().numpy(), encoder.map_size, root
                )
                prepared, features = [], [empty]
    return left_out


class PreparedRows(NamedTuple):
    """Rows that a worker has decoded and made ready for the encoder."""

    rows: list[int]
    paths: list[str | None]
    images: Tensor | None
    """(B, C, S, S), of the rows that can be used; None if there are none."""
    bad: list[BadImage]


class _EvaluationViews(Dataset[PreparedRows]):
    """Batches of rows as the encoder's own evaluation views."""

    def __init__(
        self, splits: Mapping[str, ImageSplit], batches: list[tuple[Part, range]], encoder: Encoder
    ) -> None:
        self.splits, self.batches, self.prepare = splits, batches, encoder.prepare

    def __len__(self) -> int:
        return len(self.batches)

    def __getitem__(self, index: int) -> PreparedRows:
        part, wanted = self.batches[index]
        rows, paths, images, bad = [], [], [], []
        for sample in self.splits[part.split].try_each(wanted):
            if isinstance(sample, BadImage):
                bad.append(sample)
                continue
            rows.append(sample.key)
            paths.append(sample.path)
            images.append(self.prepare(sample.content))
        return PreparedRows(rows, paths, torch.stack(images) if images else None, bad)


def _write(
    part: Part,
    split: ImageSplit,
    batches: list[PreparedRows],
    features: NDArray[np.floating[Any]],
    map_size: tuple[int, int] | None,
    root: str,
) -> None:
    rows = [row for batch in batches for row in batch.rows]
    paths = [path for batch in batches for path in batch.paths]
    ids = [_image_id(row, path, root) for row, path in zip(rows, paths, strict=True)]
    kind: Any = datasets.Value(str(features.dtype))
    # from_dict would take each number by itself
    column, lengths = pa.array(features.reshape(-1)), [features.shape[1]]
    if map_size is not None:
        positions = map_size[0] * map_size[1]
        lengths = [features.shape[1] // positions, positions]
    for length in lengths:
        column = pa.FixedSizeListArray.from_arrays(column, length)
        kind = datasets.List(kind, length=length)
    arrays = [pa.array(rows, pa.int64()), pa.array(ids, pa.string()), column]
    kinds: dict[str, Any] = {
        "row": datasets.Value("int64"),
        "image_id": datasets.Value("string"),
        EMBEDDING if map_size is None else MAP: kind,
    }
    if map_size is not None:
        for name, side in zip((HEIGHT, WIDTH), map_size, strict=True):
            arrays.append(pa.array([side] * len(rows), pa.int32()))
            kinds[name] = datasets.Value("int32")
    if split.labels is not None:
        arrays.append(pa.array(split.labels[torch.tensor(rows, dtype=torch.long)].numpy()))
        names = list(split.label_names)
        kinds["label"] = datasets.ClassLabel(names=names) if names else datasets.Value("int64")
    table = pa.Table.from_arrays(arrays, schema=datasets.Features(kinds).arrow_schema)
    write_part(part.file, table)


def _image_id(row: int, path: str | None, root: str) -> str:
    """The image's path within the data set, or its row; never a path of this machine."""
    if path is None:
        return str(row)
    archive, path = zip_and_name(path)
    if archive is not None:
        return f"{_image_id(row, archive, root)}/{path}" if Path(root).is_dir() else path
    if not Path(path).is_absolute():
        return path
    folder = Path(root).resolve()
    inside = Path(path).is_relative_to(folder)
    return Path(path).relative_to(folder).as_posix() if inside else Path(path).name
